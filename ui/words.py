"""Names and numbers in the page's words: phases, components, precisions, sizes, times."""

from __future__ import annotations

from backend.memory import plan
from ui.i18n import ENGLISH, Tongue

# What Stable Cascade's stages are for; all else is called as the plan calls it.
STAGE_TITLES = {
    "stage_c": "Stage C: composition",
    "stage_b": "Stage B: detail",
    "stage_a": "Stage A: pixels",
}
BITS = {"float32": "32 bit", "bfloat16": "16 bit", "float16": "16 bit", "int8": "8 bit", "nf4": "4 bit"}
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def phase(name: str, t: Tongue = ENGLISH) -> str:
    return t(STAGE_TITLES.get(name) or plan.phase_title(name))


def part(name: str, t: Tongue = ENGLISH) -> str:
    """A component as in a list: text_encoder → Text encoder, text_encoder_3 → T5."""
    words = plan.TITLES.get(name, name.replace("_", " ")).removeprefix("the ")
    return t(words[:1].upper() + words[1:])


def the_part(name: str, t: Tongue = ENGLISH) -> str:
    """A component within a sentence: the text encoder, T5."""
    return t(plan.TITLES.get(name, name.replace("_", " ")))


def precision(name: str, t: Tongue = ENGLISH) -> str:
    return t(BITS.get(name, name))


def seconds(value: float) -> str:
    if value < 9.95:  # above, the rounding would show 10.0
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    return " ".join(_scaled(count))


def share(some: float, all_of: float, t: Tongue = ENGLISH) -> str:
    """2.1 of 3.9 GiB; both units where they differ."""
    (number, unit), (_, whole) = _scaled(some), _scaled(all_of)
    return t("{some} of {all}", some=number if unit == whole else f"{number} {unit}", all=size(all_of))


def _scaled(count: float) -> tuple[str, str]:
    unit, scale = next((each for each in UNITS[:-1] if count >= each[1]), UNITS[-1])
    digits = 1 if scale > 2**10 and count < 100 * scale else 0
    return f"{count / scale:.{digits}f}", unit
