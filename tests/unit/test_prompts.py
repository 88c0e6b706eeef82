"""Known answers of the prompt syntax, and where long prompts are cut."""

from __future__ import annotations

import pytest

from backend.errors import InvalidRequest
from backend.text.prompts import BREAK, chunks_of, parse

COMMA = 7


@pytest.mark.parametrize(
    ("prompt", "runs"),
    [
        ("", []),
        ("a red house", [("a red house", 1)]),
        ("a (red) house", [("a ", 1), ("red", 1.1), (" house", 1)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("[[red]] house", [("red", 1 / 1.21), (" house", 1)]),
        ("(red:1.3) house", [("red", 1.3), (" house", 1)]),
        ("(red: 0.5 )", [("red", 0.5)]),
        ("(red:.5)", [("red", 0.5)]),
        ("(red:-1)", [("red", -1)]),
        ("(red:0)", [("red", 0)]),
        ("(a (red:1.5) house:2)", [("a ", 2), ("red", 3), (" house", 2)]),
        ("([red])", [("red", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1),
                ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1),
            ],
        ),
        ("(red)(house)", [("redhouse", 1.1)]),
        (r"\(red\)", [("(red)", 1)]),
        (r"\[red\] \\ house", [(r"[red] \ house", 1)]),
        (r"(smile \:\) :1.2)", [("smile \\:) ", 1.2)]),
        (r"C:\pictures", [(r"C:\pictures", 1)]),
        ("(red", [("red", 1.1)]),
        ("a [red house", [("a ", 1), ("red house", 1 / 1.1)]),
        ("red) house]", [("red) house]", 1)]),
        ("red:1.2) house", [("red:1.2) house", 1)]),
        ("[red:1.2]", [("red:1.2", 1 / 1.1)]),
        ("(red:1.2.3)", [("red:1.2.3", 1.1)]),
        ("at 12:30, (noon)", [("at 12:30, ", 1), ("noon", 1.1)]),
        ("()", []),
        ("fünf\n(Häuser:1.2) 🏠", [("fünf\n", 1), ("Häuser", 1.2), (" 🏠", 1)]),
        ("red BREAK house", [("red", 1), BREAK, ("house", 1)]),
        ("(red\nBREAK\nhouse:1.2)", [("red", 1.2), BREAK, ("house", 1.2)]),
        ("BREAKFAST OUTBREAK break", [("BREAKFAST OUTBREAK break", 1)]),
    ],
)  # fmt: skip
def test_known_answers(prompt: str, runs: list[tuple[str, float]]) -> None:
    parsed = parse(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in runs]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in runs])


@pytest.mark.parametrize("prompt", ["(" * 70, "([" * 40 + "red", "(red:1" + "0" * 400 + ")", "((red:99):99)"])
def test_beyond_any_use(prompt: str) -> None:
    with pytest.raises(InvalidRequest, match="weight|deeper"):
        parse(prompt)


def chunk_sizes(ids: list[int | None], size: int = 75) -> list[int]:
    tokens = [None if number is None else (number, 1.0) for number in ids]
    chunks = chunks_of(tokens, size, COMMA)
    assert [token for chunk in chunks for token in chunk] == [token for token in tokens if token]
    return [len(chunk) for chunk in chunks]


@pytest.mark.parametrize(
    ("ids", "sizes"),
    [
        ([], [0]),
        ([1] * 75, [75]),
        ([1] * 76, [75, 1]),
        ([1] * 200, [75, 75, 50]),
        ([1] * 60 + [COMMA] + [1] * 20, [61, 20]),  # the phrase after the comma stays whole
        ([1] * 54 + [COMMA] + [1] * 26, [75, 6]),  # that comma is too far back
        ([1] * 55 + [COMMA] + [1] * 25, [56, 25]),
        ([1] * 70 + [COMMA] + [1] * 4, [75]),  # fits: nothing to cut
        ([1] * 70 + [COMMA] + [1] * 4 + [COMMA, 1], [75, 2]),  # a comma just behind is a good place too
        ([1, None, 1, 1], [1, 2]),
        ([None, 1], [0, 1]),
        ([1, None], [1]),
    ],
)
def test_chunks(ids: list[int | None], sizes: list[int]) -> None:
    assert chunk_sizes(ids) == sizes
