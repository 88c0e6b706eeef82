"""What the engine says, in every language: nothing of it is left in English."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from backend import Hardware, SD3Request, SD15Request, Settings, StableCascadeRequest, Studio, public
from backend.cascade.pipeline import NOT_IN_FLOAT16
from backend.errors import InvalidRequest, OutOfMemory, TriptychError
from backend.grid import Axis, Grid
from backend.memory.plan import Plan, Wishes, make_plan
from backend.requests import REQUESTS
from backend.text import inversion
from backend.weights import hub, kinds
from tests.unit.test_plan import FAMILIES, asked, part, phase, pipeline
from ui import forms, handlers, i18n, jobs
from ui.sentences import FIELD, LONGEST, SPOKEN, Sentences, fill

ROOT = Path(__file__).parents[2]
OTHERS = [code for code in i18n.LANGUAGES if code != "en"]
TABLES = {code: json.loads((i18n.FOLDER / f"{code}.json").read_text(encoding="utf-8")) for code in OTHERS}
ISOLATES = re.compile("[\u2066-\u2069]")
ENGLISH = re.compile(
    r"\b(the|of|is|are|and|with|would|which|while|has|be|can|only|at|not|for|it|its|runs|needs)\b"
)
QUOTED = re.compile(r"'[^']*'|`[^`]*`")  # what somebody typed, or is to type


def told(code: str, text: str) -> str:
    return i18n.tongue(code).told(text)


def assert_translated(code: str, text: str) -> None:
    said = told(code, text)
    left = ENGLISH.search(QUOTED.sub("", said))
    assert said != text, f"{text!r} has no words in {code}"
    assert left is None, f"{left and left[0]!r} is English: {said}"


# ---- plans


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    home, models = (tmp_path_factory.mktemp(name) for name in ("home", "models"))
    return Studio(Settings(device="cpu", home=home, models_dir=models, offline=True))


def cpu(gib: float) -> Hardware:
    return replace(Hardware.card(gib=gib, ram_gib=gib), device="cpu", name="a CPU", capability=None)


def plans(studio: Studio) -> Iterator[Plan]:
    machines = [Hardware.card(gib=gib) for gib in (1.05, 2, 4, 6, 8, 12, 24)]
    machines += [cpu(3), cpu(8), cpu(32), Hardware.card(gib=1.05, ram_gib=4), Hardware.card(gib=8, ram_gib=2)]
    for family, machine in product(FAMILIES, machines):
        yield studio.plan(asked(family), machine)
        yield studio.plan(asked(family, prefer="quality", num_images=4, width=1536, height=1536), machine)
    cards = Hardware.card(gib=6, count=2)
    balanced = Studio(
        replace(studio.settings, device_map="balanced", vae_tiling="on", attention_slicing="on")
    )
    narrow = Studio(replace(studio.settings, vram=0.6, offload="none"))
    sequential = Studio(replace(studio.settings, offload="sequential"))
    for family in FAMILIES:
        yield balanced.plan(asked(family), cards)
        yield narrow.plan(asked(family), Hardware.card(gib=24))
        yield sequential.plan(asked(family), cpu(16))
    for t5 in ("off", "full"):
        yield studio.plan(asked("sd3", t5=t5, skip_layer_guidance_scale=2.8, steps=2), Hardware.card(gib=24))
    yield studio.plan(SD3Request(checkpoint="demo", max_sequence_length=512), cpu(8))
    yield studio.plan(StableCascadeRequest(checkpoint="demo", stages="lite"), cpu(8))


def made(hardware: Hardware, **fields: Any) -> Iterator[Plan]:
    """Of networks of round numbers: what does not come up in real ones on the machines above."""
    unfused = replace(hardware, fused_attention=False)
    alone = replace(
        pipeline(), phases=(phase("denoise", "unet"),), components={"unet": part("unet", 2.5 * 24)}
    )
    for each, machine in ((pipeline(images=4), unfused), (alone, replace(hardware, **fields))):
        yield make_plan([way(each)], hardware=machine, wishes=Wishes(prefer="quality"))


def way(made: Any) -> Any:
    from backend.phases import Way

    return Way(make=lambda: made, label="")


@pytest.fixture(scope="module")
def decisions(studio: Studio) -> list[str]:
    found = [text for plan in plans(studio) for text in plan.decisions]
    found += [
        text
        for gib in (2.0, 2.83, 3.1, 3.6, 4.3)
        for plan in made(Hardware.card(gib=gib))
        for text in plan.decisions
    ]
    found += [text for plan in made(Hardware.card(gib=24, count=3)) for text in plan.decisions]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("code", OTHERS)
def test_every_decision_of_a_plan(decisions: list[str], code: str) -> None:
    for text in decisions:
        assert_translated(code, text)


def test_the_plans_above_say_nearly_all_that_plans_say(decisions: list[str]) -> None:
    for words in (
        "Everything stays", "Nothing stays", "is in memory on", "are in memory on", "Does not fit a",
        "fit this machine", "vram allows", "runs on the CPU, in RAM", "is streamed:", "as asked for",
        "memory does not hold it", "is read again", "is split over", "is on cuda:1", "of the 4 pictures",
        "two halves", "in tiles of", "queries at a time", "take no memory", "otherwise", "T5 does not run",
        "T5 runs with 4 bits", "Stage C lite and Stage B lite", "Skip-layer guidance does nothing",
    ):  # fmt: skip
        assert any(words in text for text in decisions), words


@pytest.mark.parametrize("code", OTHERS)
def test_what_would_fit_instead(studio: Studio, code: str) -> None:
    large = asked("sd15", width=2048, height=2048, dtype="float32", num_images=2)
    for request, gib in ((large, 1.5), (asked("sd15"), 0.6), (replace(asked("sd3"), t5="full"), 2)):
        narrow = Studio(replace(studio.settings, offload="none"), Hardware.card(gib=gib))
        with pytest.raises(OutOfMemory) as caught:
            narrow.run(request)
        assert_translated(code, str(caught.value))


# ---- refusals

BAD: list[tuple[str, dict[str, Any]]] = [
    ("sd15", {"steps": 0}),
    ("sd15", {"width": 130}),
    ("sd15", {"guidance_scale": 99}),
    ("sd15", {"guidance_scale": "much"}),
    ("sd15", {"seed": -2}),
    ("sd15", {"num_images": 100}),
    ("sd15", {"sampler": "magic"}),
    ("sd15", {"dtype": "float8"}),
    ("sd15", {"prefer": "luck"}),
    ("sd15", {"clip_skip": 40}),
    ("sd15", {"raw_prompt": "no"}),
    ("sd15", {"loras": "a.safetensors"}),
    ("sd15", {"loras": [["a.safetensors", "much"]]}),
    ("sd15", {"prompt": None}),
    ("sd15", {"prompt": "\ud800"}),
    ("sd15", {"checkpoint": ""}),
    ("sd15", {"checkpoint": 3}),
    ("sd3", {"t5": "half"}),
    ("sd3", {"shift": 0}),
    ("sd3", {"max_sequence_length": 1000}),
    ("sd3", {"skip_layer_guidance_scale": 11}),
    ("sd3", {"skip_layer_guidance_start": 0.5}),
    ("sd3", {"skip_guidance_layers": [-1]}),
    ("stable_cascade", {"stages": "none"}),
    ("stable_cascade", {"stage_b": "none"}),
    ("stable_cascade", {"prior_steps": 0}),
    ("stable_cascade", {"decoder_guidance_scale": -1}),
    ("stable_cascade", {"images": "one"}),
    ("stable_cascade", {"images": ["x"] * 5}),
    ("stable_cascade", {"images": [3]}),
    ("stable_cascade", {"images": ["https://example.org/a.png"]}),
    ("stable_cascade", {"images": ["/nowhere/a.png"]}),
    ("stable_cascade", {"images": ["data:image/png;base64,AAAA"]}),
    ("stable_cascade", {"images": [{"path": "/etc/passwd"}]}),
]


def refused(ask: Callable[[], object]) -> str:
    with pytest.raises(InvalidRequest) as caught:
        ask()
    return str(caught.value)


@pytest.mark.parametrize("code", OTHERS)
@pytest.mark.parametrize(("family", "values"), BAD, ids=lambda value: str(value)[:40])
def test_bad_values(family: str, values: dict[str, Any], code: str) -> None:
    assert_translated(code, refused(lambda: forms.build(REQUESTS[family], values)))


STRANGERS: list[dict[str, Any]] = [
    {"checkpoint": "mine"},
    {"config_from": "mine"},
    {"prompt": "x" * 2000},
    {"num_images": 8},
    {"steps": 100},
    {"width": 2048, "height": 2048},
]


@pytest.mark.parametrize("code", OTHERS)
@pytest.mark.parametrize("values", STRANGERS, ids=lambda value: str(value)[:40])
def test_what_strangers_may_not_ask_for(values: dict[str, Any], code: str) -> None:
    assert_translated(code, refused(lambda: public.check(SD15Request(**values))))


AXES = [
    ("magic", "1"),
    ("steps", ""),
    ("steps", "1-100"),
    ("steps", "10-30 (-5)"),
    ("steps", "1-2 (+5)"),
    ("steps", '"3" 4'),
    ("steps", "0, 500"),
    ("width", "10"),
    ("size", "10x10"),
    ("size", "much"),
    ("seed", "-1"),
    ("sampler", "magic, tricks"),
    ("guidance_scale", "99"),
]


@pytest.mark.parametrize("code", OTHERS)
@pytest.mark.parametrize(("name", "typed"), AXES)
def test_what_cannot_be_an_axis(name: str, typed: str, code: str) -> None:
    assert_translated(code, refused(lambda: Axis.parse("sd15", name, typed)))


@pytest.mark.parametrize("code", OTHERS)
def test_what_cannot_be_a_grid(code: str) -> None:
    seeds, words = Axis.parse("sd15", "seed", "1-20"), Axis.parse("sd15", "prompt_words", "blue, green")
    steps, base = Axis.parse("sd15", "steps", "1-20"), SD15Request(prompt="red")
    for x, y in ((seeds, seeds), (words, None), (seeds, steps)):
        assert_translated(code, refused(lambda x=x, y=y: Grid(base, x, y).check_public()))


# ---- everything else, by the source

RAISED = (
    "InvalidRequest",
    "CheckpointError",
    "AccessError",
    "StorageError",
    "OutOfMemory",
    "Busy",
    "Cancelled",
)
HEARD = [  # where what visitors meet is raised
    *("requests.py", "public.py", "image_prompts.py", "png.py", "infotext.py", "gallery.py", "downloads.py"),
    *("studio.py", "grid/axes.py", "grid/cells.py", "grid/kept.py", "text/prompts.py", "weights/hub.py"),
    *("weights/source.py", "weights/local.py", "weights/files.py", "weights/folder.py", "weights/remote.py"),
    *("weights/single.py", "weights/joined.py", "weights/load.py", "weights/kinds.py", "sd3/pipeline.py"),
    *("cascade/pipeline.py", "sd15/pipeline.py", "weights/flax.py"),
    *("text/inversion.py", "text/tags.py", "adapting.py", "weights/adapters.py", "weights/lora.py"),
]
FILLED = {  # what stands for some of what is filled in; for all else a word that nobody knows
    **dict.fromkeys(("name", "known.name", "stage"), "steps"),
    "told_by": "prompt",
    **dict.fromkeys(("component", "NETWORKS[stage]"), "unet"),
    **dict.fromkeys(("_what_else(start)", "f'; it says: {said}' if said else ''"), ""),
    "WORDS": "prompt_words",
    "TOKEN": hub.TOKEN,
    "' and '.join(there)": "full",
    "done": "read",
    "advice": "try again in a moment",
    "what": "holds 9",
    "hint(files, self.repository.page)": "",
    "'them' if len(lacking) > 1 else 'one'": "them",
    "'it' if len(lacking) == 1 else 'them'": "it",
    "lacking": "Qq holds no text_encoder_3",
}
UNHEARD = (
    "cannot be used: defaults must be",
    "names the file",
    "repeats the tensor",
    "must hold a JSON object",
)


def sentences(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in RAISED:
            match node.args[0]:
                case ast.Constant(value=str(text)):
                    yield text
                case ast.JoinedStr(values=parts):
                    yield "".join(map(filled, parts))


def filled(part: ast.expr) -> str:
    match part:
        case ast.Constant(value=text):
            return str(text)
        case ast.FormattedValue(value=value):
            return FILLED.get(ast.unparse(value), "Qq")
    raise AssertionError(ast.dump(part))


FILES = [*(ROOT / "backend" / name for name in HEARD), *sorted((ROOT / "ui").rglob("*.py"))]


@pytest.mark.parametrize("code", OTHERS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_refusal_has_its_words(file: Path, code: str) -> None:
    for text in sentences(file):
        mere_wrapping = not re.search(r"[a-z]{3}", text.replace("steps", ""))
        if not mere_wrapping and not any(part in text for part in UNHEARD):
            assert told(code, text) != text, text


SAID = [
    jobs.UNEXPECTED,
    handlers.PRIVATE,
    NOT_IN_FLOAT16,
    "Stage B overflowed in float16: it is repeated in bfloat16.",
    "T5 reads 77 tokens, and the prompt has 120: the rest was cut.",
    "The UNet has a LoRA merged into 50 MiB of its weights.",
    "The transformer has 3 LoRAs merged into 1.5 GiB of its weights.",
    "T5 has a LoRA beside its weights: 5 MiB.",
    "The UNet has 2 LoRAs beside its weights: 5 MiB.",
    "demo has no lite Stage C: the full one runs.",
    "Read as embeddings: cat-toy, ink.",
    "fernando was trained with words of its own, 2, which are left out.",
    (
        "Painting ran out of memory and is repeated with a leaner plan. T5 runs with 8 bits a weight: "
        "otherwise painting would take 8.2 GiB at once, and 1.5 GiB is at hand. Decoding goes in tiles of 64 "
        "latent pixels: the whole would not fit."
    ),
    (
        "the disk of /x is full; free some space, or start with --home on another disk. Until then pictures "
        "go to /y."
    ),
    f"config_from: a/b does not exist on https://x.org, or is private; check its name, or give {hub.TOKEN}",
    (
        "x.safetensors: this is an editing model (its UNet takes 8 channels: latents and those of the "
        "picture to edit); only text-to-image models with 4 channels can be run as yet"
    ),
    "x: unet does not fit its config: of 686 tensors, 1 missing (conv_in.weight); 2 unexpected (a, b)",
    *(
        f"x.msgpack is not a valid Flax file: {problem}"
        for problem in (
            "at byte 7 begins what is no part of weights",
            "the numbers of a.kernel do not fit its shape",
            "a.kernel is of complex64, which cannot be read",
            "it holds a.kernel twice",
            "its last array ends at byte 7 of 9",
            "it holds more than 20000 values",
            "its maps are nested deeper than 32",
        )
    ),
    "a.pt is no embedding of textual inversion: its numbers have the shape (3, 8, 8)",
    *(
        f"the embedding 'easy' is for {title}: its vectors have 8 + 9 numbers, and those of this checkpoint 7"
        for title in (*inversion.TITLES.values(), "another text encoder")
    ),
    *sorted(kinds.title(kind) for kind in {*kinds.TENSORS.values(), *kinds.PIPELINES.values()}),
]


@pytest.mark.parametrize("code", OTHERS)
def test_notices_and_kinds(code: str) -> None:
    for text in SAID:
        assert_translated(code, text)


# ---- how sentences are found


@pytest.mark.parametrize("code", OTHERS)
def test_no_form_hides_another(code: str) -> None:
    """Each is found by itself, whatever is filled in."""
    known = {"field": "steps", "component": "unet", "part": "T5", "phase": "painting", "way": "T5 runs whole"}
    for text, translation in TABLES[code]["sentences"].items():
        values = {name: known.get(name, f"Q{number}q") for number, name in enumerate(FIELD.findall(text))}
        said = ISOLATES.sub("", told(code, fill(text, values)))
        words = {name: ISOLATES.sub("", translated(code, value)) for name, value in values.items()}
        assert said == fill(ISOLATES.sub("", translation), words), text


def translated(code: str, value: str) -> str:
    return TABLES[code]["pieces"].get(value) or TABLES[code]["told"].get(value, value)


@pytest.mark.parametrize("code", OTHERS)
def test_names_with_words_in_them_are_used(code: str) -> None:
    names = {
        name
        for table in ("sentences", "pieces")
        for text in TABLES[code][table]
        for name in FIELD.findall(text)
    }
    assert names >= SPOKEN


def test_words_within_a_sentence() -> None:
    german = Sentences(
        {"{parts} wait.": "{parts} warten.", "{name} waits.": "{name} wartet."},
        {" and ": " und ", "the cat": "Katze", "{n} dogs": "{n} Hunde"},
        {"the mouse": "Maus"},
    )
    assert german.told("The cat, 2 dogs and the mouse wait.") == "Katze, 2 Hunde und Maus warten."
    assert german.told("The cat, the cow and 3 dogs wait") == "Katze, the cow und 3 Hunde warten"
    assert german.told("2 dogs waits.") == "2 dogs wartet."  # a name stays as it is
    assert (
        german.told("2 dogs wait. The cat waits. Who knows.") == "2 Hunde warten. The cat wartet. Who knows."
    )
    assert german.told("Who knows? The cat and the mouse.") == "Who knows? The cat and the mouse."
    assert german.told("") == ""


def test_a_field_must_be_known() -> None:
    german = Sentences({"{field} is {value}": "{field}: {value}"}, {"steps": "Schritte"})
    assert german.told("steps is 0") == "Schritte: 0"
    assert german.told("this is not one") == "this is not one"
    assert german.told("mine: steps is 0") == "mine: Schritte: 0"


def test_what_is_filled_in_is_taken_as_it_is() -> None:
    german = Sentences({"{a} of {b}": "{b}: {a}"})
    assert german.told("{b} of {a}") == "{a}: {b}"
    assert german.told(f"{'config_from: ' * LONGEST}x of y").endswith("x of y")


def test_sentences_of_errors_are_translated_for_everyone() -> None:
    error: TriptychError = InvalidRequest("steps is 0; it can be a whole number from 1 to 150")
    assert told("de", handlers.explain(error)).startswith("Schritte: 0 geht nicht")
    assert i18n.ENGLISH.told(str(error)) == str(error)
