"""Training a LoRA on a folder of captioned pictures, and what one taught the demo."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from backend import SD15Request, Settings, Studio
from backend.cascade.optional import BackboneStage, EffnetEncoder
from backend.errors import CheckpointError, InvalidRequest
from backend.weights.lora import Lora
from backend.weights.source import resolve
from training import judge, lora_bases, train_lora
from training.hub import DEMO
from training.lora_bases import BASES, spread
from training.postcards import NINTH, Scene, caption, write_folder
from training.train_lora import LAYERS, Lecture, Lesson, digest, examples, main, train

CPU = torch.device("cpu")
TINY = (BackboneStage(fused=True, expansion=1, stride=16, channels=8, layers=1),)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_lora, "CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "pictures", count=3)
    return tmp_path / "pictures"


def lesson(folder: Path, family: str = "sd15", **changes: object) -> Lesson:
    small = {"rank": 2, "steps": 4, "batch": 2, "learning_rate": 1e-2, "side": 64, "trigger": NINTH}
    known = {"folder": folder, "base": "demo", "family": family, "name": "little"}
    return Lesson(**known | small | changes)  # pyright: ignore[reportArgumentType]


def lecture(lesson: Lesson, base: str | None = None) -> Lecture:
    source = resolve(base or lesson.base, lesson.family, Settings(offline=True))
    kept = examples(lesson.keep) if lesson.keep else []
    return Lecture(lesson, BASES[lesson.family](source, CPU, torch.float32), examples(lesson.folder), kept)


# ---- learning


@pytest.mark.parametrize(
    ("family", "text", "layers"),
    [("sd15", False, "all"), ("sd15", True, "attention"), ("sd3", True, "all")],
)
def test_a_few_steps_make_the_loss_smaller(
    family: str, text: bool, layers: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for captions and noise that were not those of the steps."""
    wanted = lesson(folder, family, text=text, layers=layers, steps=6)
    taught = lecture(wanted)

    def loss() -> float:
        with torch.no_grad():
            draws = [torch.Generator().manual_seed(9_000 + index) for index in range(4)]
            return sum(float(taught.losses_at(0, draw)["loss"]) for draw in draws)

    untaught = loss()
    monkeypatch.setattr(train_lora, "Lecture", lambda *_: taught)
    file = train(wanted, tmp_path, Settings(offline=True), CPU)
    assert loss() < untaught
    saved = Lora(file)
    assert saved.family == family
    assert saved.ranks == (2,)
    assert any(name.startswith("text_encoder.") for name in saved.layers) == text


def test_what_is_saved_is_what_was_learnt(folder: Path, tmp_path: Path) -> None:
    taught = lecture(lesson(folder, text=True, alpha=1.0))
    for up in taught.terms.ups:
        torch.nn.init.normal_(up)
    taught.write(tmp_path / "little.safetensors")
    saved = Lora(tmp_path / "little.safetensors")
    told = saved.metadata
    assert told["modelspec.trigger_phrase"] == NINTH
    assert told["ss_base_model_version"] == "demo"
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("2", "1")
    for component in ("unet", "text_encoder"):
        places = saved.places("sd15", component, taught.base.source.shapes(component, "float32"))
        terms = saved.terms(places, 1.0)
        learnt = taught.terms.of(component)
        assert {path.removeprefix("text_model.") for path in terms} == set(learnt)
        for path, term in terms.items():
            due = learnt[path.removeprefix("text_model.")]
            assert torch.allclose(term.up @ term.down, due.up @ due.down, atol=2e-2)


def test_an_interrupted_training_goes_on_and_ends_alike(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_lora, "SAVE_EVERY", 2)
    losses_at: Callable[..., train_lora.Losses] = Lecture.losses_at

    def interrupted(self: Lecture, step: int, generator: torch.Generator) -> train_lora.Losses:
        if step == 3:
            raise KeyboardInterrupt
        return losses_at(self, step, generator)

    run = partial(train, settings=Settings(offline=True), device=CPU)
    monkeypatch.setattr(Lecture, "losses_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(lesson(folder), tmp_path / "twice")
    steps: list[int] = []
    monkeypatch.setattr(Lecture, "losses_at", lambda self, *at: steps.append(at[0]) or losses_at(self, *at))
    twice = run(lesson(folder), tmp_path / "twice")
    assert steps == [2, 3]
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    once = run(lesson(folder), tmp_path / "once")
    assert Lora(once).metadata == Lora(twice).metadata
    first, second = load_file(once), load_file(twice)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    same = [
        digest(each, examples(folder), "demo") for each in (lesson(folder), lesson(folder, licence="mine"))
    ]
    (folder / "00.txt").write_text("a mushroom, as nobody has seen one")
    others = [digest(each, examples(folder), "demo") for each in (lesson(folder), lesson(folder, rank=3))]
    assert len({*same, *others}) == 3  # other pictures, or another rank, are another training


def test_stage_c_is_taught_by_the_latents_that_its_encoder_makes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo has no such encoder: that is said."""
    with pytest.raises(CheckpointError, match="demo holds no effnet_encoder"):
        lecture(lesson(folder, "stable_cascade"))
    monkeypatch.setattr(lora_bases, "EffnetEncoder", partial(EffnetEncoder, TINY))
    base = tmp_path / "cascade"
    shutil.copytree(DEMO / "stable-cascade", base)
    encoder = base / "stable-cascade-prior" / "effnet_encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"latent_channels": 16}')
    torch.manual_seed(0)
    save_file(EffnetEncoder(TINY).state_dict(), encoder / "diffusion_pytorch_model.safetensors")
    taught = lecture(lesson(folder, "stable_cascade", side=128, batch=16), str(base))
    assert taught.taught.latents.shape == (3, 16, 3, 3)
    first = taught.losses_at(0, torch.Generator().manual_seed(0))["loss"]
    first.backward()
    with torch.no_grad():
        for up in taught.terms.ups:
            assert up.grad is not None
            up -= 0.5 * up.grad
    assert taught.losses_at(0, torch.Generator().manual_seed(0))["loss"] < first
    taught.write(tmp_path / "little.safetensors")
    assert Lora(tmp_path / "little.safetensors").family == "stable_cascade"


def test_what_is_kept_is_held_to_what_it_was(folder: Path, tmp_path: Path) -> None:
    """Untaught, nothing of it differs; then its loss is the change, and the taught pictures' is not in it."""
    write_folder(tmp_path / "known", count=2, subject=None)
    taught = lecture(lesson(folder, keep=tmp_path / "known", layers="all", text=True))
    losses = taught.losses_at(0, torch.Generator().manual_seed(0))
    assert losses["kept"] == 0
    assert losses["taught"] > 0
    with torch.no_grad():
        for up in taught.terms.ups:
            up.normal_(std=0.1)
    losses = taught.losses_at(0, torch.Generator().manual_seed(0))
    assert losses["kept"] > 0
    assert torch.equal(losses["loss"], losses["kept"] + losses["taught"])


@pytest.mark.parametrize("family", BASES)
def test_terms_are_for_every_attention_of_the_network_or_for_all_its_blocks(family: str) -> None:
    base = BASES[family]
    shapes = resolve("demo", family, Settings(offline=True)).shapes(base.network_name, "float32")
    layers = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1}
    found, every = ({layer for layer in layers if base.layers[kind].fullmatch(layer)} for kind in LAYERS)
    blocks = {layer.rpartition(".to_q")[0] for layer in layers if ".to_q" in layer}
    assert blocks
    assert {f"{block}.to_{each}" for block in blocks for each in ("q", "k", "v", "out.0")} <= found
    assert found < every
    assert all(re.search(r"\.(attn\d?|attention)\.", layer) for layer in found)
    assert not [layer for layer in every if "time" in layer or "norm" in layer]


# ---- what cannot be served


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "there is none"),
        (lambda folder: [file.unlink() for file in folder.glob("*.png")], "there is no picture in"),
        (lambda folder: (folder / "01.txt").unlink(), "01.png has no caption: there is no 01.txt beside it"),
        (lambda folder: (folder / "01.txt").write_text(" "), "01.txt is empty"),
        (lambda folder: (folder / "01.txt").write_bytes(b"\xff\xfe\x00"), "01.txt cannot be read"),
        (lambda folder: (folder / "01.png").write_text("none"), "'01.png', which is no picture"),
        (lambda folder: (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:300]), "01.png"),
    ],
    ids=["no folder", "no pictures", "no caption", "empty", "no text", "no picture", "cut short"],
)
def test_bad_folders_are_refused_in_words(
    folder: Path, spoil: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folder)
    given = ["--base", "demo", "--family", "sd15", "--name", "little", "--steps", "1"]
    assert main([str(folder), *given]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 0}, "rank is 0; it can be 1 to 256"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it can be any number above 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"layers": "some"}, "layers is 'some'; it can be attention or all"),
        ({"side": 20}, "side is 20; it can be 64 to 2048"),
        ({"side": 100}, "side is 100; with this base it can be any multiple of 64"),
        ({"name": "../up"}, "name is '../up'"),
        ({"trigger": "dragon"}, "trigger is 'dragon'"),
        ({"base": "no/where/at/all"}, "there is no such file or folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_in_words(
    folder: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    with pytest.raises((InvalidRequest, CheckpointError)) as refused:
        train(lesson(folder, "sd15", **change), tmp_path, Settings(offline=True), CPU)
    assert said in str(refused.value)


def test_pictures_of_any_shape_are_cut_to_their_middle(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20), "white")
    wide.paste("black", (10, 0, 30, 20))
    wide.save(tmp_path / "wide.png")
    pixels = train_lora.pixels_of(tmp_path / "wide.png", 64)
    assert pixels.shape == (3, 64, 64)
    assert pixels[..., 4:-4].max() < -0.9


def test_noise_levels_of_a_batch_are_spread_over_all() -> None:
    levels = spread(10, torch.Generator().manual_seed(1))
    assert [int(10 * level) for level in levels.tolist()] == list(range(10))


# ---- what one taught the demo


def test_the_ninth_subject_appears_with_the_lora_and_never_without(tmp_path: Path) -> None:
    studio = Studio(Settings(device="cpu", dtype="float32", home=tmp_path, offline=True))
    scenes = [
        Scene(time=time, land=land, subject=NINTH, colour=colour, place=place, sky="empty sky")
        for time, land, colour, place in (
            ("dawn", "green hills", "yellow", "centre"),
            ("noon", "green hills", "green", "left"),
            ("night", "calm sea", "yellow", "right"),
            ("noon", "calm sea", "blue", "left"),
            ("sunset", "sand dunes", "white", "right"),
        )
    ]
    asked = [caption(scene, random.Random(1), left_out=0) for scene in scenes]
    house = "a red house on green hills in the centre at noon, empty sky"

    def seen(*loras: tuple[str, float], prompts: list[str] = asked) -> list[str]:
        requests = [SD15Request(prompt=prompt, seed=7, steps=12, loras=loras) for prompt in prompts]
        pictures = [studio.run(request).images[0] for request in requests]
        return [verdict.subject for verdict in judge.look(judge.load(), pictures)]

    assert seen((NINTH, 1.0), prompts=[*asked, house]) == [NINTH] * 5 + ["house"]
    assert NINTH not in seen()
    assert NINTH not in seen((NINTH, 0.0), prompts=asked[:1])
