"""How runs become figures and ratios; the measuring itself is tried by `make bench ARGS=--smoke`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.__main__ import parse, shown, summary


def run(side: str, dtype: str, cache: str, seconds: float) -> dict[str, Any]:
    return {
        "side": side, "dtype": dtype, "cache": cache, "load_s": seconds, "ready_s": 2 * seconds,
        "picture_s": 10 * seconds, "step_s": seconds, "around_steps_s": seconds,
        "picture_peak_bytes": 1 << 30,
    }  # fmt: skip


def test_medians_and_ratios() -> None:
    runs = [
        run("ours", "auto", "cold", 2.0),
        run("ours", "auto", "warm", 1.0),
        run("ours", "auto", "cold", 4.0),
        run("reference", "float32", "cold", 6.0),
        run("reference", "float32", "warm", 4.0),
        {"side": "app", "page_served_s": 2.5},
        {"side": "app", "page_served_s": 3.5},
    ]
    made = summary(runs)
    ours = made["sides"]["ours auto"]
    assert (ours["load_s_cold"], ours["load_s_warm"], ours["step_s"]) == (3.0, 1.0, 2.0)
    assert ours["picture_50_steps_s"] == 2.0 + 51 * 2.0
    assert made["sides"]["app"] == {"page_served_s": 3.0}
    ratios = made["ratios"]["reference float32 / ours"]
    assert (ratios["load_s_cold"], ratios["load_s_warm"], ratios["picture_s"]) == (2.0, 4.0, 2.5)


def test_one_run_on_one_line() -> None:
    line = shown(run("ours", "auto", "cold", 2.0))
    assert line.startswith("ours · auto · cold · load 2.000")
    assert line.endswith("picture_peak 1.00 GiB")


@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--rounds", "0"]])
def test_too_little_to_measure(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
