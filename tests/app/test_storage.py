"""A home that cannot be written to: told before any work, and no reason to fall over."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from gradio_client.exceptions import AppError

from tests.app.support import connected, serving


def test_an_unwritable_home_is_told_and_the_next_request_works(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file where the folder should be")
    with serving(tmp_path, home=home) as server:
        while f"triptych: cannot write to {home}" not in server.log.read_text():  # at the start already
            time.sleep(0.05)
        client = connected(server, tmp_path)
        with pytest.raises(AppError, match=rf"cannot write to {home}.*--home"):
            client.predict(prompt="a red house", steps=2, api_name="/sd15")
        home.unlink()
        files, _ = client.predict(prompt="a red house", steps=2, api_name="/sd15")
        assert Path(files[0]).read_bytes() == server.pictures[0].read_bytes()
