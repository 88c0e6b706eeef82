"""Components where the plan puts them: the same picture from every rung, and no memory that stays behind.

A described card stands in for one of CUDA: the CPU computes what it would, by the same manager and slots.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backend import Hardware, OutOfMemory, SD3Request, SD15Request, Settings, StableCascadeRequest, Studio
from backend.errors import CheckpointError
from backend.events import Event, Finished, Loading, Notice, Planned, Result
from backend.memory.blocks import blocks_of, staying
from backend.memory.hardware import GIB, Free
from backend.memory.placement import Streamer, divided_map, module_of, pin, put, tensors_of
from backend.nn.autoencoder import Autoencoder
from backend.requests import Request
from backend.sd15.unet import UNet
from backend.weights import parts
from tests.checkpoints import sd15_folder

SMALL: dict[str, Any] = {"prompt": "a red house at night", "seed": 3, "width": 64, "height": 64}
REQUESTS: dict[str, Request] = {
    "sd15": SD15Request(**SMALL, steps=2, num_images=2),
    "sd3": SD3Request(**SMALL, steps=2, num_images=2),
    "stable_cascade": StableCascadeRequest(
        **SMALL, prior_steps=2, decoder_steps=2, decoder_guidance_scale=2.0, num_images=2
    ),
}


def card(mib: float, ram_gib: float = 32.0) -> Hardware:
    """A card that leaves so many MiB to a plan; the CPU computes in its place."""
    return replace(Hardware.card(gib=0.5 + mib / 1024, ram_gib=ram_gib), stand_in="cpu")


def studio_on(home: Path, hardware: Hardware | None = None, **settings: Any) -> Studio:
    fields: dict[str, Any] = {"device": "cpu", "dtype": "float32", "home": home, **settings}
    return Studio(Settings(**fields), hardware)


def pixels(result: Result) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image, dtype=int) for image in result.images])


def placed(result: Result) -> set[str]:
    return {part.placement for part in result.plan.components.values()}


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray[Any, Any]]:
    """Each family's pictures when everything stays."""
    studio = studio_on(tmp_path_factory.mktemp("home"), card(8192))
    results = {family: studio.run(request) for family, request in REQUESTS.items()}
    assert all(placed(result) == {"resident"} for result in results.values())
    return {family: pixels(result) for family, result in results.items()}


# ---- the same picture from every rung


@pytest.mark.parametrize("family", REQUESTS)
@pytest.mark.parametrize(("offload", "expected"), [("model", "swapped"), ("sequential", "streamed")])
@pytest.mark.parametrize("where", ["card", "short of RAM", "cpu"])
def test_placement_never_changes_the_picture(
    tmp_path: Path,
    resident: dict[str, np.ndarray[Any, Any]],
    family: str,
    offload: str,
    expected: str,
    where: str,
) -> None:
    hardware = {"card": card(8192), "short of RAM": card(8192, ram_gib=1.01), "cpu": None}[where]
    studio = studio_on(tmp_path, hardware, offload=offload)
    for _ in range(2):  # the second time from wherever the first one left things
        result = studio.run(REQUESTS[family])
        assert expected in placed(result)
        assert "resident" not in placed(result)
        assert np.array_equal(pixels(result), resident[family])
        studio._cache.clear()


@pytest.mark.parametrize("family", REQUESTS)
def test_every_size_of_card_paints_the_same(
    tmp_path: Path, resident: dict[str, np.ndarray[Any, Any]], family: str
) -> None:
    seen: set[str] = set()
    for mib in (60, 24, 16, 10, 7):
        result = studio_on(tmp_path, card(mib)).run(REQUESTS[family])
        seen |= placed(result)
        if result.plan.way == 0 and all(phase.manner.tile is None for phase in result.plan.phases):
            # fewer pictures in one forward change roundings, nothing else
            assert abs(pixels(result) - resident[family]).max() <= 1
    assert {"resident", "swapped"} <= seen


@pytest.mark.parametrize("family", REQUESTS)
def test_streamed_from_files_of_another_dtype(tmp_path: Path, family: str) -> None:
    """The demo's files are float16; bfloat16 networks have their convolutions channels-last."""
    whole = studio_on(tmp_path, dtype="bfloat16").run(REQUESTS[family])
    streamed = studio_on(tmp_path, dtype="bfloat16", offload="sequential").run(REQUESTS[family])
    assert "streamed" in placed(streamed)
    assert np.array_equal(pixels(whole), pixels(streamed))


class Net(nn.Module):
    """Blocks called in an order of their own, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(40))
        self.register_buffer("table", torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        for index in (*range(0, 40, 2), 7, *range(39, 0, -2), 7):
            x = torch.tanh(self.blocks[index](x)) + self.get_buffer("table")
        return x


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("stay", [0, 5, 39])
def test_blocks_take_turns_in_slots(slots: int, stay: int) -> None:
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    x = torch.randn(4, 32)
    expected = net(x)
    homes = tensors_of(net)
    blocks = blocks_of({name: tensor.nbytes for name, tensor in homes.items()})
    held = blocks.kept + (slots + stay) * max(blocks.blocks)
    streamer = Streamer(net, homes, torch.device("cpu"), held, slots)
    assert len(streamer.coming) == 40 - stay
    for _ in range(3):
        with streamer:
            for _ in range(2):  # the second pass knows the order
                assert torch.equal(net(x), expected)
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(net).values()
            }
            here = sum(size for size in storages.values() if size > 4)
            assert here <= held + 64
        assert all(tensor.is_meta for tensor in tensors_of(net).values())  # nothing of it is left there
    put(net, homes)
    assert torch.equal(net(x), expected)


def test_staying_blocks_are_those_of_the_plan() -> None:
    net = Net()
    sizes = {name: tensor.nbytes for name, tensor in tensors_of(net).items()}
    blocks = blocks_of(sizes)
    streamer = Streamer(net, tensors_of(net), torch.device("cpu"), 40_000, 2)
    assert streamer.stay == staying(blocks, 40_000, 2)


# ---- switching, freeing


def loads(events: list[Event]) -> list[str]:
    return [
        event.component
        for event in events
        if isinstance(event, Loading) and event.action == "load" and not event.done_bytes
    ]


def test_a_switch_there_and_back_reads_no_file(tmp_path: Path) -> None:
    studio = studio_on(tmp_path, card(30))  # one family at a time
    first = list(studio.generate(REQUESTS["sd15"]))
    assert loads(first)
    assert loads(list(studio.generate(REQUESTS["stable_cascade"])))
    waiting = {part.name for part in studio.loaded() if part.where == "RAM"}
    assert {"unet", "vae"} & waiting
    studio._cache.clear()
    again = list(studio.generate(REQUESTS["sd15"]))
    assert loads(again) == []
    before, after = (events[-1] for events in (first, again))
    assert isinstance(before, Finished)
    assert isinstance(after, Finished)
    assert np.array_equal(pixels(before.result), pixels(after.result))


def test_without_ram_what_leaves_the_card_is_let_go(tmp_path: Path) -> None:
    studio = studio_on(tmp_path, card(30))
    studio._manager._ram_free = lambda: 0
    list(studio.generate(REQUESTS["sd15"]))
    list(studio.generate(REQUESTS["stable_cascade"]))
    assert {part.where for part in studio.loaded()} == {"cuda"}


def test_one_file_in_two_checkpoints_is_loaded_once(tmp_path: Path) -> None:
    first = sd15_folder(tmp_path / "first")
    second = sd15_folder(tmp_path / "second", seed=5)
    shared = first / "text_encoder" / "model.safetensors"
    copy = second / "text_encoder" / "model.safetensors"
    copy.unlink()
    copy.symlink_to(shared)
    for file in (*(first / "tokenizer").iterdir(), first / "text_encoder" / "config.json"):
        other = second / file.parent.name / file.name
        other.unlink()
        other.symlink_to(file)
    studio = studio_on(tmp_path)
    request = SD15Request(**SMALL, steps=1, checkpoint=str(first))
    assert "text_encoder" in loads(list(studio.generate(request)))
    assert loads(list(studio.generate(replace(request, checkpoint=str(second))))) == ["unet", "vae"]


def test_parts_are_listed_and_freed_but_not_while_they_are_lent(tmp_path: Path) -> None:
    studio = studio_on(tmp_path)
    events = studio.generate(REQUESTS["sd15"])
    lent: list[Any] = []
    for _ in events:
        lent = [part for part in studio.loaded() if part.lent] or lent
        if lent:
            break
    assert [part.name for part in lent] == ["text_encoder"]
    assert not studio.free(lent[0].key)
    assert [event for event in events if isinstance(event, Finished)]
    listed = {part.name: part for part in studio.loaded()}
    assert set(listed) == {"text_encoder", "unet", "vae"}
    assert listed["unet"].checkpoint == "demo"
    assert studio.free(listed["unet"].key)
    assert not studio.free(listed["unet"].key)
    assert {part.name for part in studio.loaded()} == {"text_encoder", "vae"}
    assert studio.run(REQUESTS["sd15"]).images
    assert studio.free()
    assert studio.loaded() == []


GROWTH = """
import gc, json, sys
from backend import SD15Request, Settings, StableCascadeRequest, Studio
from backend.memory.hardware import anonymous_bytes

studio = Studio(Settings(device="cpu", home=sys.argv[1]))
small = {"prompt": "a red house", "width": 64, "height": 64}
requests = [SD15Request(**small, steps=1), StableCascadeRequest(**small, prior_steps=1, decoder_steps=1)]

def switch(seed):
    from dataclasses import replace
    studio.run(replace(requests[seed % 2], seed=seed))

sizes = []
for seed in range(4):  # what torch and the tokenizers keep for good
    switch(seed)
studio.unload()
gc.collect()
gc.freeze()  # of what is there by now, nothing goes: there is no need to look at it with each switch
sizes.append(anonymous_bytes())
for seed in range(20):
    switch(seed)
    if seed % 5 == 4:
        studio.unload()
        gc.collect()
        sizes.append(anonymous_bytes())
print(json.dumps(sizes))
"""


def test_twenty_switches_leave_no_memory_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True, check=True
    )
    start, *later = json.loads(done.stdout)
    assert max(later) - start < 50e6


def detected(hardware: Hardware, ram: float = 32.0) -> Hardware:
    """As if it had been looked for: free memory is what others leave, less what is loaded."""
    first = Free(hardware.free_bytes, tuple(card.free_bytes for card in hardware.others), int(ram * GIB))
    return replace(hardware, read=lambda: first)


def test_what_waits_in_ram_is_ours_to_use(tmp_path: Path) -> None:
    studio = studio_on(tmp_path, detected(card(8192)), offload="model")
    studio.run(REQUESTS["sd15"])
    waiting = sum(part.bytes for part in studio.loaded() if part.where == "RAM")
    assert waiting > 0
    # with so little left for others, what is there still has its place
    held = studio._manager.ram_bytes
    studio._hardware = detected(card(8192), ram=1 + 1e6 / GIB)
    plan = studio.plan(replace(REQUESTS["sd15"], seed=9))
    assert studio.hardware().ram_free_bytes == GIB + 1_000_000 + held
    assert {part.home for part in plan.components.values()} == {"ram"}


def test_several_cards_keep_what_is_theirs(tmp_path: Path) -> None:
    both = replace(Hardware.card(gib=0.5 + 14 / 1024, count=2), stand_in="cpu")
    studio = studio_on(tmp_path, both)
    plan = studio.plan(REQUESTS["sd3"])
    assert {part.device for part in plan.components.values()} == {"cuda", "cuda:1"}
    assert {part.placement for part in plan.components.values()} == {"resident"}
    first = list(studio.generate(REQUESTS["sd3"]))
    assert loads(first)
    where = {part.name: part.where for part in studio.loaded()}
    assert where == {part.name: part.device for part in plan.components.values()}
    studio._cache.clear()
    assert loads(list(studio.generate(REQUESTS["sd3"]))) == []
    assert {part.name: part.where for part in studio.loaded()} == where
    for device in ("cuda", "cuda:1"):
        held = [part for part in plan.components.values() if part.device == device]
        assert studio._manager.bytes_on(device) == sum(part.bytes for part in held)


def test_what_stands_aside_is_loaded_once(tmp_path: Path) -> None:
    request = replace(REQUESTS["sd3"], t5="full")
    studio = studio_on(tmp_path, card(8192))
    plan = studio.plan(request)
    t5 = plan.components["text_encoder_3"]
    aside = replace(t5, placement="cpu", device="cpu", home="ram", held_bytes=0)
    _, pipeline = studio._planned(request, (3, 4), studio.hardware())
    component = pipeline.components["text_encoder_3"]
    with studio._manager.use(component, aside) as first:
        assert studio._manager.bytes_on("cuda") == 0
        assert studio._manager.ram_bytes == component.copied_bytes
    with studio._manager.use(component, aside) as again:
        assert again is first


def test_freeing_while_a_component_is_fetched_harms_nothing(tmp_path: Path) -> None:
    studio = studio_on(tmp_path)
    studio.run(REQUESTS["sd15"])
    over = threading.Event()

    def free() -> None:
        while not over.wait(0.01):
            studio.free()

    thread = threading.Thread(target=free)
    thread.start()
    try:
        for seed in range(3):
            assert studio.run(replace(REQUESTS["sd15"], seed=seed)).images
    finally:
        over.set()
        thread.join()


# ---- when the world changes


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A UNet that finds no memory for more than two pictures at once; the batches that it was given."""
    seen: list[int] = []
    forward = UNet.forward

    def limited(self: UNet, latents: Tensor, *rest: Any) -> Tensor:
        seen.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, latents, *rest)

    monkeypatch.setattr(UNet, "forward", limited)
    return seen


def test_out_of_memory_goes_a_rung_lower_and_is_remembered(tmp_path: Path, small_card: list[int]) -> None:
    request = replace(REQUESTS["sd15"], num_images=4)
    studio = studio_on(tmp_path, card(8192))
    events = list(studio.generate(request))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert small_card[:3] == [8, 4, 2]
    plans = [event.plan for event in events if isinstance(event, Planned)]
    assert [plan.phases[1].manner.images for plan in plans] == [4, 2, 1]
    assert finished.result.plan == plans[-1]
    told = [event.text for event in events if isinstance(event, Notice)]
    assert told == finished.result.notices
    assert told[0].startswith(
        "Painting ran out of memory and is repeated with a leaner plan. Painting works on 2 "
    )
    # from its own inputs: the prompt is not read again
    assert [event.component for event in events if isinstance(event, Loading)].count("text_encoder") == 2
    small_card.clear()
    other = list(studio.generate(replace(request, seed=9)))
    assert set(small_card) == {2}  # the lesson
    assert not any(isinstance(event, Notice) for event in other)
    # of a shortage that no formula can be so wrong about, nothing is concluded for other sizes
    larger = studio.plan(replace(request, width=128, height=128))
    assert larger.phases[1].manner.images == 4
    studio.unload()
    assert studio.plan(request).phases[1].manner.images == 4


def test_the_picture_of_a_leaner_plan_is_that_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(REQUESTS["sd15"], num_images=3)
    expected = pixels(studio_on(tmp_path).run(request))
    forward, batches = UNet.forward, []

    def limited(self: UNet, latents: Tensor, *rest: Any) -> Tensor:
        batches.append(len(latents))
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, latents, *rest)

    monkeypatch.setattr(UNet, "forward", limited)
    result = studio_on(tmp_path, card(8192)).run(request)
    assert batches[-1] == 1
    assert result.plan.phases[1].manner.apart
    assert abs(pixels(result) - expected).max() <= 1


def test_it_gives_up_after_four_retries_and_the_next_request_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []
    studio = studio_on(tmp_path, card(8192))
    with monkeypatch.context() as patched:

        def never(*_: Any, **__: Any) -> Tensor:
            tries.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")

        patched.setattr(UNet, "forward", never)
        with pytest.raises(OutOfMemory):
            studio.run(REQUESTS["sd15"])
    assert 1 < len(tries) <= 5
    assert studio.run(REQUESTS["sd15"]).images


def test_what_failed_is_freed_before_the_next_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback of an error holds the tensors of its frames."""
    kept: list[Any] = []
    alive: list[int] = []
    forward = UNet.forward

    class Large:
        pass

    def limited(self: UNet, latents: Tensor, *rest: Any) -> Tensor:
        import weakref

        alive.append(sum(ref() is not None for ref in kept))
        large = Large()
        kept.append(weakref.ref(large))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, latents, *rest)

    monkeypatch.setattr(UNet, "forward", limited)
    gc.disable()
    try:
        studio_on(tmp_path, card(8192)).run(replace(REQUESTS["sd15"], num_images=4))
    finally:
        gc.enable()
    assert set(alive) == {0}


def test_memory_taken_by_another_program_makes_a_lower_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [Free(device=int(GIB * 8), others=(), ram=32 * GIB)]
    hardware = replace(card(8192), read=lambda: free[0])
    studio = studio_on(tmp_path, hardware)
    forward = UNet.forward
    failures = iter([True])

    def taken(self: UNet, *rest: Any) -> Tensor:
        if next(failures, False):
            free[0] = free[0]._replace(device=int(0.5 * GIB) - 6 * 2**20)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, *rest)

    monkeypatch.setattr(UNet, "forward", taken)
    events = list(studio.generate(REQUESTS["sd15"]))
    plans = [event.plan for event in events if isinstance(event, Planned)]
    assert {part.placement for part in plans[0].components.values()} == {"resident"}
    assert "swapped" in {part.placement for part in plans[-1].components.values()}
    assert isinstance(events[-1], Finished)
    assert studio._lessons == {}  # nothing was wrong with the formula
    free[0] = free[0]._replace(device=8 * GIB)
    again = studio.run(replace(REQUESTS["sd15"], seed=8))
    assert placed(again) == {"resident"}


def test_a_vae_that_overflows_is_repeated_in_float32_and_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, seen = Autoencoder.decode, []

    def narrow(self: Autoencoder, latents: Tensor, **rest: Any) -> Tensor:
        seen.append(latents.dtype)
        out = decode(self, latents, **rest)
        return out * float("nan") if latents.dtype == torch.float16 else out

    monkeypatch.setattr(Autoencoder, "decode", narrow)
    studio = studio_on(tmp_path, dtype="float16")
    request = replace(REQUESTS["sd15"], num_images=1)
    result = studio.run(request)
    assert seen == [torch.float16, torch.float32]
    assert result.notices == ["Decoding overflowed in float16: it is repeated in float32."]
    assert result.plan.components["vae"].precision == "float32"
    assert result.plan.components["unet"].precision == "float16"
    assert studio.run(replace(request, seed=4)).notices == []
    assert seen[2:] == [torch.float32]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sd15_folder(tmp_path / "tiny")


def test_a_checkpoint_deleted_between_two_uses_is_a_clear_error(tmp_path: Path, folder: Path) -> None:
    studio = studio_on(tmp_path)
    request = SD15Request(**SMALL, steps=1, checkpoint=str(folder))
    assert studio.run(request).images
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="unet"):
        studio.run(replace(request, seed=5))
    assert studio.run(REQUESTS["sd15"]).images


def test_a_load_that_is_cut_short_leaves_nothing_behind(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = studio_on(tmp_path)
    request = SD15Request(**SMALL, steps=1, checkpoint=str(folder))
    with monkeypatch.context() as patched:

        def broken(*_: Any, **__: Any) -> Any:
            raise OSError(5, "Input/output error")

        patched.setattr(parts, "load_module", broken)
        with pytest.raises(OSError, match="Input/output"):
            studio.run(request)
    assert {part.name for part in studio.loaded()} <= {"text_encoder"}
    assert not any(part.lent for part in studio.loaded())
    assert studio.run(request).images


def test_module_of_finds_the_network_beside_a_tokenizer() -> None:
    net = nn.Linear(1, 1)
    assert module_of(("tokenizer", net)) is net
    assert module_of(net) is net
    assert module_of(object()) is None


class Divisible(Net):
    COMPILED = (nn.Linear,)


def test_a_network_is_divided_in_whole_blocks_by_shares() -> None:
    net = Divisible()
    size = sum(tensor.nbytes for tensor in tensors_of(net).values())
    cards = divided_map(net, {0: size // 4, 1: size * 3 // 4})
    assert set(cards.values()) == {0, 1}
    blocks = [cards[f"blocks.{index}"] for index in range(40)]
    assert 8 <= blocks.count(0) <= 11
    assert blocks == sorted(blocks)


def test_pinned_weights_lie_side_by_side_and_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: dict[int, int] = {}

    class Driver:
        def cudaHostRegister(self, start: int, size: int, flags: int) -> int:  # noqa: N802 (CUDA's own name)
            pinned[start] = size
            return 0

        def cudaHostUnregister(self, start: int) -> None:  # noqa: N802
            del pinned[start]

    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    net = Net()
    homes = tensors_of(net)
    copies = pin(homes)
    assert sum(pinned.values()) < 1.1 * sum(tensor.nbytes for tensor in homes.values()) + 256 * len(homes)
    (start,) = pinned
    for name, tensor in homes.items():
        assert torch.equal(copies[name], tensor)
        assert start <= copies[name].data_ptr() < start + pinned[start]
    del copies
    gc.collect()
    assert not pinned
