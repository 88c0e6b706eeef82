"""A network in the blocks in which it is streamed, by the names and sizes of its tensors alone.

The plan counts with them before anything loads; the placement makes the same ones of the loaded network.
"""

from __future__ import annotations

from collections.abc import Mapping

from backend.phases import Blocks

PARTS = 16  # a block is at most this share of the network: two of them on a card at once are an eighth
SMALL = 256  # what is less than this share stays: a copy costs more than it frees
ALIGNMENT = 256  # bytes: where tensors begin in a slot


def groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names of tensors → those of each block that is streamed as one.

    Blocks are the largest subtrees of the network below a sixteenth of it. What a module owns beside modules
    of its own is in none: it is used while they run. Nor is what is too small to matter.
    """
    total = sum(sizes.values())
    blocks: list[list[str]] = []

    def divide(prefix: str, names: list[str]) -> None:
        size = sum(sizes[name] for name in names)
        own = [name for name in names if "." not in name.removeprefix(prefix)]
        if (size * PARTS <= total and prefix) or len(own) == len(names):
            if size * SMALL > total:
                blocks.append(names)
            return
        children: dict[str, list[str]] = {}
        for name in names:
            if name not in own:
                child = name.removeprefix(prefix).split(".", 1)[0]
                children.setdefault(f"{prefix}{child}.", []).append(name)
        for child, below in children.items():
            divide(child, below)

    divide("", list(sizes))
    return blocks


def blocks_of(sizes: Mapping[str, int]) -> Blocks:
    """The same in bytes, for the plan."""
    found = groups(sizes)
    kept = sum(sizes.values()) - sum(sizes[name] for names in found for name in names)
    return Blocks(kept=kept, blocks=tuple(sum(aligned(sizes[name]) for name in names) for names in found))


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def slots(device: str) -> int:
    """How many streamed blocks are on a device at once: on a card one computes while the next one comes."""
    return 1 if device == "cpu" else 2


def staying(blocks: Blocks, held: int, slots: int) -> frozenset[int]:
    """Which blocks of a streamed component stay on the device when it may hold so many bytes of it: as many
    as fit beside the slots of the others, spread over the network, so that there is time between those that
    come."""
    sizes = blocks.blocks
    room = held - blocks.kept - slots * max(sizes, default=0)
    spread = sorted(range(len(sizes)), key=lambda index: index * 0.6180339887 % 1.0)
    stay = []
    for index in spread:
        if sizes[index] <= room:
            room -= sizes[index]
            stay.append(index)
    return frozenset(stay)
