"""Pictures on disk: whole or not at all, named so that nobody guesses, and never lost to the index."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend.errors import StorageError
from backend.gallery import Gallery

PICTURE = Image.linear_gradient("L").convert("RGB")
FACTS = {"prompt": "a red house", "seed": 7}


def test_a_picture_and_its_row(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "home")
    assert not gallery.home.exists()
    assert gallery.entries() == []
    parameters = "a red house 赤い家\nSteps: 20, Seed: 7, Size: 256x256"
    path = gallery.save(PICTURE, parameters, FACTS)
    assert path.parent == tmp_path / "home" / "outputs" / time.strftime("%Y-%m-%d")
    assert re.fullmatch(r"\d{9}-[0-9a-f]{24}\.png", path.name)
    with Image.open(path) as read:
        assert read.info["parameters"] == parameters
        assert read.tobytes() == PICTURE.tobytes()
    (entry,) = gallery.entries()
    assert (entry.file, entry.prompt, entry.parameters, entry.facts) == (
        path,
        "a red house",
        parameters,
        FACTS,
    )
    assert abs(entry.created - time.time()) < 60


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "with \0 null", "🏠\nlines\n"])
def test_any_parameters_text(tmp_path: Path, text: str) -> None:
    path = Gallery(tmp_path).save(PICTURE, text, FACTS)
    with Image.open(path) as read:
        assert read.info["parameters"] == text


def test_listing(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    paths = [gallery.save(PICTURE, "", {"prompt": p}) for p in ("a Red house", "blue sea", "100% red_")]
    assert [entry.file for entry in gallery.entries()] == paths[::-1]
    assert [entry.prompt for entry in gallery.entries("red")] == ["100% red_", "a Red house"]
    assert [entry.prompt for entry in gallery.entries("0% r")] == ["100% red_"]
    assert len(gallery.entries(limit=1)) == 1


def test_threads_share_a_gallery(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda n: gallery.save(PICTURE, "", {"prompt": f"{n}"}), range(40)))
    assert len(set(paths)) == 40
    assert {entry.file for entry in gallery.entries()} == set(paths)


def _save_ten(home: Path) -> None:
    for _ in range(10):
        Gallery(home).save(PICTURE, "", FACTS)


def test_processes_share_a_home(tmp_path: Path) -> None:
    context = get_context("spawn")
    processes = [context.Process(target=_save_ten, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(Gallery(tmp_path).entries()) == 20


def test_an_unwritable_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file where the folder should be")
    gallery = Gallery(home)
    with pytest.raises(StorageError, match=re.escape(f"cannot write to {home}") + ".*--home"):
        gallery.check()
    with pytest.raises(StorageError, match="cannot write to") as caught:
        gallery.save(PICTURE, "", FACTS)
    assert caught.value.images == (PICTURE,)


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "is full; free some space"), (errno.EACCES, "Permission denied")]
)
def test_a_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    gallery = Gallery(tmp_path)
    gallery.check()

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=message) as caught:
        gallery.save(PICTURE, "", FACTS)
    assert str(gallery.outputs) in str(caught.value)
    assert list(gallery.outputs.rglob("*.p*")) == []  # nothing half-written stays behind
    monkeypatch.undo()
    assert gallery.save(PICTURE, "", FACTS).exists()


def test_check_leaves_nothing_behind(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    gallery.check()
    assert list(gallery.outputs.iterdir()) == []
    assert not gallery.index.exists()


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Any:
        return Path("/dev/full").open("wb")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(StorageError, match="is full"):
        Gallery(tmp_path).check()


def test_a_broken_index_never_loses_the_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gallery = Gallery(tmp_path)
    gallery.index.write_bytes(b"not a database" * 100)
    assert gallery.save(PICTURE, "", FACTS).exists()
    assert "index" in caplog.text
    with pytest.raises(StorageError, match="The pictures are safe"):
        gallery.entries()


def test_a_locked_index_never_loses_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.gallery.LOCK_SECONDS", 0.1)
    gallery = Gallery(tmp_path)
    gallery.save(PICTURE, "", FACTS)
    with closing(sqlite3.connect(gallery.index)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert gallery.save(PICTURE, "", FACTS).exists()
    assert len(gallery.entries()) == 1


def test_half_a_surrogate_pair_is_no_obstacle(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    gallery.save(PICTURE, "", {"prompt": "half \ud83c"})
    assert gallery.entries()[0].prompt == "half ?"
