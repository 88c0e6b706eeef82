"""Words on a picture: a font that has the letters, lines that fit.

Pillow brings a font of its own that has English; other scripts are looked for among the system's fonts.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

FAVOURITES = (  # by the beginning of a file's name, as people know them from their screens
    "dejavusans", "notosans-regular", "segoeui", "arial", "helvetica",
    "notosanscjk-regular", "msyh", "hiragino", "pingfang", "yugoth", "malgun", "wqy", "droidsansfallback",
    "notosansarabic-regular", "geezapro", "notosans", "notokufi",
)  # fmt: skip
ODD = ("bold", "italic", "oblique", "mono", "serif", "condensed", "light", "thin", "black", "emoji", "math")
MOST_FONTS = 400  # looked into for letters that are nowhere else
NOWHERE = "\uffff"  # a character that no font has: its picture is that of all missing ones


def font_for(text: str, size: int) -> FreeTypeFont:
    """The first font that has every letter of the text, or else the one that has most of them."""
    letters = _letters(text)
    best, most = _built_in(size), sum(_has("", letter) for letter in letters)
    if most == len(letters):
        return best
    for file in _system_fonts():
        count = sum(_has(file, letter) for letter in letters)
        if count > most:
            best, most = _sized(file, size), count
        if most == len(letters):
            break
    return best


def written(text: str, font: FreeTypeFont) -> str:
    """The text on one line; letters that the font lacks without their accents, where that helps."""
    line = " ".join(text.split())
    return "".join(_plainer(letter, font) for letter in line)


def wrapped(text: str, font: FreeTypeFont, width: float, most: int) -> list[str]:
    """Lines no wider than `width` pixels, `most` at most: what does not fit is cut, and marked so."""
    lines: list[str] = []
    words = text.split(" ")
    line = ""
    while words and len(lines) <= most:
        longer = f"{line} {words[0]}" if line else words[0]
        if font.getlength(longer) <= width:
            line = longer
            words.pop(0)
        elif line:
            lines.append(line)
            line = ""
        else:  # a word that is too long even alone
            count = _fitting(words[0], font, width)
            lines.append(words[0][:count])
            words[0] = words[0][count:]
    lines += [line] if line else []
    if len(lines) <= most and not words:
        return lines
    kept, dots = lines[:most], "…" if _drawn(font, "…") else "..."
    last = kept[-1]
    while last and font.getlength(last + dots) > width:
        last = last[:-1]
    return [*kept[:-1], last.rstrip() + dots]


def reads_leftward(text: str) -> bool:
    """Whether its first letter that has a direction is one of Arabic, Hebrew, ..."""
    directions = (unicodedata.bidirectional(letter) for letter in text)
    return next((each != "L" for each in directions if each in ("L", "R", "AL")), False)


def _fitting(word: str, font: FreeTypeFont, width: float) -> int:
    count = 1
    while count < len(word) and font.getlength(word[: count + 1]) <= width:
        count += 1
    return count


def _plainer(letter: str, font: FreeTypeFont) -> str:
    if not _letters(letter) or _drawn(font, letter):
        return letter
    base = "".join(each for each in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(each))
    return base if base and all(_drawn(font, each) for each in base) else letter


def _letters(text: str) -> set[str]:
    """What a font must have of its own: no blanks, joiners or marks."""
    return {letter for letter in text if unicodedata.category(letter)[0] not in "ZCM"}


@cache
def _has(file: str, letter: str) -> bool:
    try:
        return _drawn(_sized(file, 16) if file else _built_in(16), letter)
    except OSError:  # a font that is damaged, or of pictures in one size
        return False


def _drawn(font: FreeTypeFont, letter: str) -> bool:
    return _shape(font, letter) != _shape(font, NOWHERE)


def _shape(font: FreeTypeFont, letter: str) -> bytes:
    mask: Any = font.getmask(letter)
    return bytes(mask)


@cache
def _built_in(size: int) -> FreeTypeFont:
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType cannot write"
    return font


@lru_cache(maxsize=32)  # each keeps its file open
def _sized(file: str, size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(file, size)


@cache
def _system_fonts() -> tuple[str, ...]:
    """The files of upright fonts, those that people know first."""
    found = {
        file
        for folder in _folders()
        for pattern in ("*.tt[fc]", "*.otf", "*.TT[FC]", "*.OTF")
        for file in folder.rglob(pattern)
    }

    def order(file: Path) -> tuple[bool, int, str]:
        name = file.stem.lower()
        known = (at for at, each in enumerate(FAVOURITES) if name.startswith(each))
        return any(each in name for each in ODD), next(known, len(FAVOURITES)), str(file)

    return tuple(str(file) for file in sorted(found, key=order)[:MOST_FONTS])


def _folders() -> Iterator[Path]:
    """Where systems keep their fonts."""
    home = Path.home()
    if sys.platform == "win32":
        yield Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts"
        yield home / "AppData/Local/Microsoft/Windows/Fonts"
    elif sys.platform == "darwin":
        yield from (home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts"))
    else:
        yield from (home / ".fonts", home / ".local/share/fonts")
        yield from (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"))
