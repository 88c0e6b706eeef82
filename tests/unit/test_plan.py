"""The plan as a pure function: the ladder, DESIGN's table by card, and what must hold at every size."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest

from backend import Hardware, SD3Request, SD15Request, Settings, StableCascadeRequest, Studio
from backend.errors import OutOfMemory
from backend.memory.blocks import Blocks, blocks_of, groups, staying
from backend.memory.hardware import GIB
from backend.memory.plan import (
    RESERVE_BYTES,
    ROWS,
    WHOLE,
    Plan,
    Wishes,
    budget_bytes,
    gib,
    lessons_of,
    make_plan,
    phase_title,
)
from backend.phases import Component, Manner, Phase, Pipeline, Progress, Way, split
from backend.requests import Request

CARDS = (2, 4, 6, 8, 10, 12, 16, 24, 48, 80)
SIZES = (512, 768, 1024, 1536)
PREFERENCES = ("auto", "quality", "speed")
FAMILIES: dict[str, tuple[type[Request], str]] = {
    "sd15": (SD15Request, "sd15"),
    "sd3": (SD3Request, "sd3-medium"),
    "stable_cascade": (StableCascadeRequest, "stable-cascade"),
}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    home, models = (tmp_path_factory.mktemp(name) for name in ("home", "models"))
    return Studio(Settings(device="cpu", home=home, models_dir=models, offline=True))


def asked(family: str, **fields: Any) -> Request:
    kind, checkpoint = FAMILIES[family]
    return kind(checkpoint=checkpoint, prompt="a red house", seed=1, **fields)


# ---- the table by card


@pytest.mark.parametrize(
    ("card", "placements", "names"),
    [
        (24, {"resident"}, {"prior", "decoder"}),
        (16, {"resident", "swapped"}, {"prior", "decoder"}),
        (12, {"resident", "swapped"}, {"prior", "decoder"}),
        (10, {"resident", "swapped"}, {"prior", "decoder"}),
        (8, {"resident", "swapped"}, {"prior", "decoder"}),
        (6, {"resident", "swapped"}, {"prior_lite", "decoder_lite"}),
        (4, {"resident", "swapped"}, {"prior_lite", "decoder_lite"}),
        (2, {"resident", "swapped", "streamed"}, {"prior_lite", "decoder_lite"}),
    ],
)
def test_cascade_by_card(studio: Studio, card: int, placements: set[str], names: set[str]) -> None:
    plan = studio.plan(asked("stable_cascade"), Hardware.card(gib=card))
    assert plan.fits
    assert names <= plan.components.keys()
    assert {part.placement for part in plan.components.values()} <= placements


@pytest.mark.parametrize(
    ("card", "t5", "where", "transformer"),
    [
        (24, "bfloat16", "resident", "resident"),
        (16, "bfloat16", "swapped", "resident"),
        (12, "bfloat16", "swapped", "swapped"),
        (10, "bfloat16", "swapped", "swapped"),
        (8, "int8", "swapped", "swapped"),
        (6, "nf4", "swapped", "swapped"),
        (4, "nf4", "streamed", "streamed"),
        (2, "nf4", "streamed", "streamed"),
    ],
)
def test_sd3_by_card(studio: Studio, card: int, t5: str, where: str, transformer: str) -> None:
    plan = studio.plan(asked("sd3"), Hardware.card(gib=card))
    assert plan.fits
    parts = plan.components
    assert (parts["text_encoder_3"].precision, parts["text_encoder_3"].placement) == (t5, where)
    assert parts["transformer"].placement == transformer


def test_t5_is_not_made_smaller_for_a_transformer_that_has_to_be_streamed_anyway(studio: Studio) -> None:
    request = replace(asked("sd3"), checkpoint="sd3.5-large")
    for card, t5 in ((12, "bfloat16"), (8, "int8"), (6, "nf4")):
        plan = studio.plan(request, Hardware.card(gib=card))
        assert plan.components["transformer"].placement == "streamed"
        assert plan.components["text_encoder_3"].precision == t5
        assert plan.components["text_encoder_3"].placement == "swapped"


@pytest.mark.parametrize("card", CARDS)
def test_sd15_by_card(studio: Studio, card: int) -> None:
    plan = studio.plan(asked("sd15"), Hardware.card(gib=card))
    assert plan.fits
    placements = {part.placement for part in plan.components.values()}
    assert placements == {"resident"} if card > 2 else placements <= {"swapped", "streamed"}


def test_t5_stands_aside_where_a_card_cannot_even_stream_it_and_is_left_out_where_ram_is_short(
    studio: Studio,
) -> None:
    small = Hardware.card(gib=1.05)
    plan = studio.plan(asked("sd3", width=512, height=512), small)
    assert plan.fits
    assert plan.components["text_encoder_3"].placement == "cpu"
    assert plan.components["text_encoder_3"].held_bytes == 0
    assert any("T5 runs on the CPU" in text for text in plan.decisions)
    short = studio.plan(asked("sd3", width=512, height=512), Hardware.card(gib=1.05, ram_gib=4))
    assert short.fits
    assert "text_encoder_3" not in short.components
    assert any(text.startswith("T5 does not run: otherwise") for text in short.decisions)


def test_a_cpu_walks_the_same_ladder(studio: Studio) -> None:
    def cpu(ram: float) -> Hardware:
        card = Hardware.card(gib=ram, ram_gib=ram)
        return replace(card, device="cpu", capability=None)

    assert studio.plan(asked("stable_cascade"), cpu(24)).components["prior"].placement == "resident"
    assert studio.plan(asked("stable_cascade"), cpu(8)).components["prior"].placement == "swapped"
    assert "prior_lite" in studio.plan(asked("stable_cascade"), cpu(6)).components
    assert studio.plan(asked("sd3"), cpu(8)).components["text_encoder_3"].precision == "int8"


# ---- what holds everywhere


def everywhere() -> list[tuple[str, int, int, str]]:
    return list(product(FAMILIES, SIZES, (1, 4), PREFERENCES))


def moved(plan: Plan) -> int:
    """Bytes that come to the device for a picture; what is streamed comes for every step."""
    total = 0
    for phase in plan.phases:
        for part in phase.components:
            if part.placement == "swapped":
                total += part.bytes
            elif part.placement == "streamed":
                total += part.bytes + 100 * (part.bytes - part.held_bytes)
    return total


def slower(one: Plan, other: Plan) -> bool:
    """Whether a phase takes more forwards where both plans place its components alike: one that is streamed
    takes as many pictures along as it can, so that its blocks come less often."""
    for a, b in zip(one.phases, other.phases, strict=True):
        alike = [part.placement for part in a.components] == [part.placement for part in b.components]
        if alike and (-a.manner.images, a.manner.apart) > (-b.manner.images, b.manner.apart):
            return True
    return False


@pytest.mark.parametrize(("family", "size", "images", "prefer"), everywhere())
def test_more_memory_never_gives_a_worse_picture_or_a_slower_plan(
    studio: Studio, family: str, size: int, images: int, prefer: str
) -> None:
    request = asked(family, width=size, height=size, num_images=images, prefer=prefer)
    plans = [studio.plan(request, Hardware.card(gib=card)) for card in CARDS]
    for card, plan in zip(CARDS, plans, strict=True):
        budget = card * GIB - RESERVE_BYTES["cuda"]
        for phase in plan.phases:
            held = sum(part.held_bytes for part in plan.held(phase))
            assert phase.peak_bytes == held + phase.work_bytes
        assert plan.fits == (plan.peak_bytes <= budget == plan.budget_bytes)
    for less, more in pairwise(plans):
        assert more.fits or not less.fits
        if not less.fits:
            continue
        assert more.way <= less.way or prefer == "speed"
        if prefer == "speed" and family == "sd3":
            assert more.way <= less.way
        if more.way == less.way:
            assert moved(more) <= moved(less)
            assert not slower(more, less)
    if prefer == "quality":
        assert {plan.way for plan in plans} == {0}
    # everything fits somewhere; and all that a table speaks of fits where it says
    assert plans[-1].fits
    if images == 1 and size <= 1024:
        assert plans[1].fits, plans[1].decisions[0]


def test_preferences_differ(studio: Studio) -> None:
    plans = {
        prefer: studio.plan(asked("stable_cascade", prefer=prefer), Hardware.card(gib=6))
        for prefer in PREFERENCES
    }
    assert "prior_lite" in plans["auto"].components
    assert plans["quality"].components["prior"].placement == "streamed"
    large = studio.plan(asked("stable_cascade", prefer="speed"), Hardware.card(gib=80))
    assert "prior_lite" in large.components
    t5 = [
        studio.plan(asked("sd3", prefer=prefer), Hardware.card(gib=14)).components["text_encoder_3"]
        for prefer in PREFERENCES
    ]
    assert [(part.precision, part.placement) for part in t5] == [
        ("bfloat16", "swapped"), ("bfloat16", "swapped"), ("int8", "resident"),
    ]  # fmt: skip


def test_what_is_asked_for_by_hand_is_kept_to(studio: Studio) -> None:
    plan = studio.plan(asked("sd3", t5="full"), Hardware.card(gib=4))
    assert plan.components["text_encoder_3"].precision == "bfloat16"
    assert plan.components["text_encoder_3"].placement == "streamed"
    full = studio.plan(asked("stable_cascade", stages="full"), Hardware.card(gib=4))
    assert full.components["prior"].placement == "streamed"


def test_where_nothing_fits_the_error_says_what_would(studio: Studio) -> None:
    request = asked("sd15", width=2048, height=2048, dtype="float32", num_images=2)
    hardware = Hardware.card(gib=1.5)
    plan = studio.plan(request, hardware)
    assert not plan.fits
    assert plan.decisions[0].startswith("Does not fit a 1.5 GiB card: ")
    told = Studio(studio.settings, hardware)
    with pytest.raises(
        OutOfMemory, match=r"Does not fit a 1\.5 GiB card.* It would fit with .*pixels"
    ) as caught:
        told.run(request)
    width = int(str(caught.value).rpartition("×")[2].split()[0])
    assert studio.plan(replace(request, width=width, height=width), hardware).fits
    with pytest.raises(OutOfMemory, match="A smaller picture does not fit either"):
        Studio(studio.settings, Hardware.card(gib=0.6)).run(request)


@pytest.mark.parametrize(
    ("settings", "gib", "flag"),
    [({"offload": "none"}, 2, "--offload auto"), ({"vram": 0.6}, 24, "more than --vram 0.6")],
)
def test_a_setting_that_keeps_it_from_fitting_is_named(
    studio: Studio, settings: dict[str, Any], gib: float, flag: str
) -> None:
    narrow = Studio(replace(studio.settings, **settings), Hardware.card(gib=gib))
    with pytest.raises(OutOfMemory) as caught:
        narrow.run(asked("sd15"))
    assert f"It would fit with {flag}" in str(caught.value)
    if "vram" in settings:
        assert "of the 0.6 GiB that vram allows 512 MiB is kept free" in str(caught.value)


def test_balanced_spreads_what_one_card_could_hold(studio: Studio) -> None:
    cards = Hardware.card(gib=24, count=2)
    assert {part.device for part in studio.plan(asked("sd3"), cards).components.values()} == {"cuda"}
    balanced = Studio(replace(studio.settings, device_map="balanced"))
    parts = balanced.plan(asked("sd3"), cards).components
    assert {part.device for part in parts.values()} == {"cuda", "cuda:1"}
    assert parts["text_encoder_3"].device != parts["transformer"].device


def test_budget_is_capped_and_never_negative() -> None:
    card = Hardware.card(gib=24)
    assert budget_bytes(card, 6) == 6 * GIB - RESERVE_BYTES["cuda"]
    assert budget_bytes(card, 100) == 24 * GIB - RESERVE_BYTES["cuda"]
    assert budget_bytes(card, 0.1) == 0


def test_sizes_are_readable() -> None:
    assert (gib(GIB * 3 // 2), gib(50 * 1024**2)) == ("1.5 GiB", "50 MiB")


# ---- a pipeline of round numbers


def part(name: str, size: float, **fields: Any) -> Component:
    return Component(
        name=name, identity=name, bytes=int(size * GIB), precision="float16", dtype="float16",
        load=lambda device: object(), open=object,
        blocks=lambda: Blocks(kept=0, blocks=(int(size * GIB) // 16,) * 16), **fields,
    )  # fmt: skip


def idle(*_: Any) -> Generator[Progress, None, None]:
    yield Progress(step=1, steps=1)


def phase(name: str, *components: str, work: float = 0.0, images: int = 1, **fields: Any) -> Phase:
    def needs(manner: Manner) -> int:
        scores = 0 if manner.rows is None else min(manner.rows, 4096) / 4096
        return int(work * GIB * (manner.images * (1 if manner.apart else 2) + scores))

    fields.setdefault("manners", split(images, guided=True))
    return Phase(
        name=name, components=components, work=needs, key=None, run=idle, pictures=images,
        **fields,
    )  # fmt: skip


def pipeline(*, images: int = 1, work: float = 0.25, unet: float = 2.0, text: float = 1.0) -> Pipeline:
    return Pipeline(
        components={
            "text_encoder": part("text_encoder", text), "unet": part("unet", unet),
            "vae": part("vae", 0.25),
        },
        phases=(
            phase("encode", "text_encoder"),
            phase("denoise", "unet", work=work, images=images),
            phase("decode", "vae", work=work / 4),
        ),
        settings={},
    )  # fmt: skip


def made(hardware: Hardware, *pipelines: Pipeline, **fields: Any) -> Plan:
    ways = [Way(make=lambda each=each: each, label=f"way {n}") for n, each in enumerate(pipelines)]
    return make_plan(ways, hardware=hardware, **fields)


def placements(plan: Plan) -> dict[str, str]:
    return {part.name: part.placement for part in plan.components.values()}


def test_the_ladder_rung_by_rung() -> None:
    # 3.25 GiB of weights, 4 pictures at 2 × 0.25 GiB each
    rungs = {
        6.0: ({"resident"}, 4, False),
        5.0: ({"resident", "swapped"}, 4, False),  # the encoder goes: 4.25
        4.6: ({"swapped"}, 4, False),
        3.6: ({"swapped"}, 2, False),  # UNet 2, work 1
        3.1: ({"swapped"}, 1, False),
        2.8: ({"swapped"}, 1, True),
        2.0: ({"swapped", "streamed"}, 4, False),
    }
    for card, (expected, images, apart) in rungs.items():
        plan = made(Hardware.card(gib=card), pipeline(images=4))
        assert plan.fits, (card, plan.decisions)
        assert set(placements(plan).values()) == expected, card
        if "streamed" not in expected:
            assert (plan.phases[1].manner.images, plan.phases[1].manner.apart) == (images, apart), card


def test_the_plan_prints_and_has_the_shape_of_the_endpoint() -> None:
    plan = made(Hardware.card(gib=8), pipeline())
    plain = plan.to_dict()
    assert set(plain) == {"device", "budget_bytes", "peak_bytes", "phases", "decisions"}
    assert plain["phases"][1] == {
        "name": "denoise",
        "work_bytes": GIB // 2,
        "peak_bytes": int(3.75 * GIB),
        "components": [{"name": "unet", "placement": "resident", "precision": "float16", "bytes": 2 * GIB}],
    }
    assert isinstance(plain["decisions"], list)
    assert "unet float16 resident" in str(plan)
    assert plan.decisions[0] == "Everything stays in memory on an 8 GiB card: 3.8 GiB of the 7.5 GiB at hand."


def test_a_smaller_way_is_told_with_what_kept_the_better_one_out() -> None:
    plan = made(Hardware.card(gib=2), pipeline(unet=8), pipeline(unet=1, text=0.5, work=0.1))
    assert plan.way == 1
    assert plan.decisions[1] == (
        "way 1: otherwise painting would take 8.2 GiB at once, and 1.5 GiB is at hand."
    )


@pytest.mark.parametrize(
    ("wish", "value", "expected"),
    [
        ("offload", "model", {"swapped"}),
        ("offload", "sequential", {"streamed"}),
        ("offload", "none", {"resident"}),
    ],
)
def test_offload_by_hand(wish: str, value: str, expected: set[str]) -> None:
    plan = made(Hardware.card(gib=24), pipeline(), wishes=Wishes(**{wish: value}))
    assert plan.fits
    assert set(placements(plan).values()) == expected


def test_offload_none_takes_fewer_pictures_at_once_and_then_fails() -> None:
    wishes = Wishes(offload="none")
    plan = made(Hardware.card(gib=4.3), pipeline(images=4), wishes=wishes)
    assert (plan.fits, plan.phases[1].manner.images) == (True, 1)
    assert not made(Hardware.card(gib=3), pipeline(images=4), wishes=wishes).fits


def test_attention_holds_its_scores_where_no_kernel_spares_it() -> None:
    unfused = replace(Hardware.card(gib=4.3), fused_attention=False)
    assert made(unfused, pipeline()).phases[1].manner.rows == WHOLE
    tight = replace(Hardware.card(gib=2.83), fused_attention=False)
    plan = made(tight, pipeline())
    assert plan.phases[1].manner.rows in ROWS
    assert any("queries at a time: all would not fit" in text for text in plan.decisions)
    by_hand = made(Hardware.card(gib=24), pipeline(), wishes=Wishes(attention_slicing="on"))
    assert by_hand.phases[1].manner.rows == ROWS[0]


def test_tiles_and_slices_by_hand() -> None:
    manners = (Manner(), Manner(tile=96), Manner(images=3))
    decoding = phase("decode", "vae", work=0.1, manners=manners, images=3)
    whole = replace(pipeline(), phases=(decoding,), components={"vae": part("vae", 0.25)})
    card = Hardware.card(gib=24)

    def manner(**wishes: str) -> Manner:
        return made(card, whole, wishes=Wishes(**wishes)).phases[0].manner

    assert manner() == Manner()
    assert manner(vae_tiling="on") == Manner(tile=96)
    assert manner(vae_slicing="off") == Manner(images=3)
    assert manner(vae_slicing="on") == Manner()


def test_several_cards_share_the_components() -> None:
    card = Hardware.card(gib=3.0, count=2)
    plan = made(card, pipeline())
    assert set(placements(plan).values()) == {"resident"}
    assert {part.device for part in plan.components.values()} == {"cuda", "cuda:1"}
    assert any("is on cuda:1" in text for text in plan.decisions)
    single = made(card, pipeline(), wishes=Wishes(device_map="single"))
    assert {part.device for part in single.components.values()} == {"cuda"}


def test_one_component_is_split_where_no_card_holds_it() -> None:
    large = pipeline(unet=4.0)
    plan = made(Hardware.card(gib=3.5, count=2), large)
    assert plan.fits
    unet = plan.components["unet"]
    assert unet.placement == "resident"
    assert [card for card, _ in unet.shares] == ["cuda", "cuda:1"]
    assert sum(size for _, size in unet.shares) == pytest.approx(4 * GIB, rel=1e-6)
    assert all(size <= 3 * GIB for _, size in unet.shares)
    assert any(text.startswith("The UNet is split over the cards: ") for text in plan.decisions)
    single = made(Hardware.card(gib=3.5, count=2), large, wishes=Wishes(device_map="single"))
    assert single.components["unet"].placement == "streamed"
    short = made(Hardware.card(gib=3.5, count=2), pipeline(unet=8.0))
    assert short.components["unet"].placement == "streamed"


def test_lessons_make_a_plan_leaner() -> None:
    four = pipeline(images=4)
    card = Hardware.card(gib=6)
    before = made(card, four)
    lessons = {lessons_of(four.phases[1], four)[0]: 2.0}
    after = made(card, four, lessons=lessons)
    assert after.phases[1].work_bytes == 2 * four.phases[1].work(after.phases[1].manner)
    assert after.shape != before.shape


def test_ram_that_does_not_hold_what_is_swapped_leaves_it_in_its_file() -> None:
    plan = made(Hardware.card(gib=3.2, ram_gib=1.5), pipeline())
    assert plan.fits
    assert plan.components["unet"].home == "file"
    assert any("The UNet is read again from its file for every use" in text for text in plan.decisions)
    assert made(Hardware.card(gib=3.2, ram_gib=16), pipeline()).components["unet"].home == "ram"


def test_words_for_phases() -> None:
    assert (phase_title("denoise"), phase_title("stage_b"), phase_title("other_one")) == (
        "Painting", "Stage B", "Other one",
    )  # fmt: skip


# ---- blocks


def test_blocks_are_subtrees_of_a_sixteenth_at_most() -> None:
    sizes = {f"blocks.{index}.{name}.weight": 10_000 for index in range(40) for name in ("q", "k")}
    sizes |= {"proj.weight": 30_000, "proj.bias": 100, "norm.weight": 10, "blocks.3.q.bias": 50}
    found = groups(sizes)
    assert ["proj.weight", "proj.bias"] in found
    assert ["blocks.3.q.weight", "blocks.3.k.weight", "blocks.3.q.bias"] in found
    assert not any("norm.weight" in block for block in found)  # too small to matter
    total = sum(sizes.values())
    assert all(sum(sizes[name] for name in block) * 16 <= total for block in found)
    blocks = blocks_of(sizes)
    assert blocks.kept == pytest.approx(10, abs=41 * 256)
    assert sum(blocks.blocks) >= total - 10


def test_what_a_module_owns_beside_modules_of_its_own_stays() -> None:
    sizes = {"net.table": 50_000, **{f"net.{i}.weight": 5_000 for i in range(100)}}
    assert not any("net.table" in block for block in groups(sizes))
    assert blocks_of(sizes).kept >= 45_000


def test_as_many_blocks_stay_as_fit_spread_over_the_network() -> None:
    blocks = Blocks(kept=10, blocks=(100,) * 12)
    assert staying(blocks, 10 + 200, 2) == frozenset()
    stay = staying(blocks, 10 + 200 + 350, 2)
    assert len(stay) == 3
    assert min(b - a for a, b in pairwise(sorted(stay))) > 1
    assert len(staying(blocks, 10 + 1200, 1)) == 11
