"""The `parameters` text: what other tools expect, what they write, and that nothing is lost on the way."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from backend.errors import InvalidRequest
from backend.infotext import describe, of_file, parse, restore, understand, write
from backend.requests import REQUESTS, SD3Request, SD15Request, StableCascadeRequest
from backend.version import VERSION

SETTINGS: dict[str, Any] = {
    "prompt": "a red house, (hills:1.2)",
    "negative_prompt": "blurry: very",
    "steps": 20,
    "guidance_scale": 7.5,
    "sampler": "dpmpp_2m_karras",
    "width": 512,
    "height": 768,
    "checkpoint": "demo",
    "raw_prompt": False,
    "clip_skip": 0,
}


def test_the_widely_used_form() -> None:
    assert describe(SETTINGS, 7) == (
        "a red house, (hills:1.2)\n"
        "Negative prompt: blurry: very\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 7, Size: 512x768, Model: demo,"
        f" Version: Triptych {VERSION}"
    )
    plain = {**SETTINGS, "negative_prompt": "", "guidance_scale": 7.0, "clip_skip": 1, "raw_prompt": True}
    assert describe(plain, 0) == (
        "a red house, (hills:1.2)\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 0, Size: 512x768, Model: demo,"
        f" Clip skip: 2, Raw prompt: True, Version: Triptych {VERSION}"
    )


def test_restore_is_the_way_back() -> None:
    settings = {**SETTINGS, "clip_skip": 1, "raw_prompt": True, "checkpoint": "someone/some-model"}
    assert restore(describe(settings, 7)) == {**settings, "seed": 7}


@pytest.mark.parametrize(
    ("checkpoint", "model"),
    [
        ("demo", "demo"),
        ("someone/some-model-1.5", "someone/some-model-1.5"),
        ("/home/me/models/dream.v2.safetensors", "dream.v2"),
        ("~/models/folder/", "folder"),
        ("./folder", "folder"),
        (r"C:\models\dream.ckpt", "dream"),
        ("https://huggingface.co/a/b/resolve/main/dream.safetensors", "dream"),
    ],
)
def test_paths_stay_private(checkpoint: str, model: str) -> None:
    text = describe({**SETTINGS, "checkpoint": checkpoint}, 7)
    assert parse(text).fields["Model"] == model
    assert restore(text).get("checkpoint") == (checkpoint if model == checkpoint else None)


CASCADE: dict[str, Any] = {
    "prompt": "a red house",
    "negative_prompt": "night",
    "prior_steps": 20,
    "prior_guidance_scale": 4.0,
    "decoder_steps": 10,
    "decoder_guidance_scale": 0.0,
    "width": 1024,
    "height": 1536,
    "checkpoint": "stable-cascade",
    "stages": "auto",
    "stage_c": None,
    "stage_b": "auto",
    "ran": {"stage_c": "full", "stage_b": "lite"},
    "images": ["/home/me/private/cat.png", "picture 0123"],
    "raw_prompt": False,
    "clip_skip": 0,
}


def test_cascade_in_the_widely_used_form() -> None:
    """What every tool reads tells of Stage C; where image prompts lie is nobody's business."""
    assert describe(CASCADE, 7) == (
        "a red house\n"
        "Negative prompt: night\n"
        "Steps: 20, Sampler: DDPM Wuerstchen, CFG scale: 4, Seed: 7, Size: 1024x1536, Model: stable-cascade,"
        " Decoder steps: 10, Decoder CFG scale: 0, Stage C: full, Stage B: lite, Image prompts: 2,"
        f" Version: Triptych {VERSION}"
    )
    assert "Image prompts" not in describe({**CASCADE, "images": []}, 7)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {
            "prior_guidance_scale": 1.25,
            "decoder_guidance_scale": 2.5,
            "ran": {"stage_c": "lite", "stage_b": "full"},
        },
        {"prompt": "Decoder steps: 3, Stage C: lite, Steps: 9", "negative_prompt": "a\nNegative prompt: b"},
        {"prompt": "", "clip_skip": 1, "raw_prompt": True},
    ],
    ids=str,
)
def test_restore_is_the_way_back_for_cascade(changed: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        **CASCADE,
        "checkpoint": "someone/some-cascade",
        "clip_skip": 1,
        "raw_prompt": True,
        **changed,
    }
    told = restore(describe(settings, 7))
    kept = {name: value for name, value in settings.items() if name not in ("stages", "ran", "images")}
    assert told == {**kept, **settings["ran"], "seed": 7}
    StableCascadeRequest(**told)  # every value can be asked for


def test_restored_stages_are_stages() -> None:
    text = describe({**CASCADE, "ran": {"stage_c": "huge", "stage_b": "auto"}}, 7)
    assert not {"stage_c", "stage_b"} & set(restore(text))


def test_each_family_restores_its_own_fields() -> None:
    told = restore(describe(SETTINGS, 7))
    assert not [name for name in told if name.startswith(("prior", "decoder", "stage"))]
    SD15Request(**told)
    assert not {"steps", "guidance_scale", "sampler"} & set(restore(describe(CASCADE, 7)))
    assert not {"t5", "shift", "max_sequence_length", "skip_guidance_layers"} & set(told)
    for text in ("T5", "Shift", "T5: full"):  # a prompt and a model's name are no fields
        told = restore(describe({**SETTINGS, "prompt": text, "checkpoint": f"me/{text}"}, 7))
        assert "t5" not in told
        SD15Request(**told)


def test_damaged_cascade_texts() -> None:
    text = "a\nSteps: 20, Seed: 1, Decoder steps: many, Decoder CFG scale: nan, Stage C: medium"
    assert restore(text) == {"prompt": "a", "negative_prompt": "", "prior_steps": 20, "seed": 1}


SD3: dict[str, Any] = {
    "prompt": "a red house",
    "negative_prompt": "night",
    "steps": 28,
    "guidance_scale": 7.0,
    "sampler": "dpmpp_2m",
    "shift": 3.0,
    "t5": "auto",
    "max_sequence_length": 256,
    "skip_layer_guidance_scale": 0.0,
    "skip_layer_guidance_start": 0.01,
    "skip_layer_guidance_stop": 0.2,
    "skip_guidance_layers": None,
    "ran": {"t5": "int8"},
    "width": 1024,
    "height": 1536,
    "checkpoint": "sd3-medium",
    "raw_prompt": False,
    "clip_skip": 0,
}


def test_sd3_in_the_widely_used_form() -> None:
    assert describe(SD3, 7) == (
        "a red house\n"
        "Negative prompt: night\n"
        "Steps: 28, Sampler: DPM++ 2M, CFG scale: 7, Seed: 7, Size: 1024x1536, Model: sd3-medium,"
        f" Shift: 3, T5: int8, Version: Triptych {VERSION}"
    )
    further = {"max_sequence_length": 512, "skip_layer_guidance_scale": 2.8, "skip_guidance_layers": (7, 8)}
    assert (
        "Shift: 3, T5: int8, Max sequence length: 512, Skip layer guidance: 2.8, Skip layer start: 0.01,"
        ' Skip layer stop: 0.2, Skip layers: "7, 8", Version: '
    ) in describe({**SD3, **further}, 7)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"shift": 2.75, "max_sequence_length": 77, "ran": {"t5": "off"}, "sampler": "heun"},
        {"skip_layer_guidance_scale": 2.8},
        {"skip_layer_guidance_scale": 2.8, "skip_layer_guidance_stop": 0.5, "skip_guidance_layers": (7, 9)},
        {"skip_layer_guidance_scale": 1.0, "skip_guidance_layers": (4,)},
        {"skip_layer_guidance_scale": 1.0, "skip_guidance_layers": ()},
        {"prompt": "T5: off, Shift: 9, Steps: 9", "clip_skip": 1, "raw_prompt": True},
    ],
    ids=str,
)
def test_restore_is_the_way_back_for_sd3(changed: dict[str, Any]) -> None:
    settings: dict[str, Any] = {**SD3, "checkpoint": "someone/some-sd3", **changed}
    told = restore(describe(settings, 7))
    again = SD3Request(**told)  # every value can be asked for
    wanted = {**settings, "t5": settings["ran"]["t5"], "seed": 7}
    assert {name: getattr(again, name) for name in wanted if name != "ran"} == {
        name: value for name, value in wanted.items() if name != "ran"
    }
    if not settings["skip_layer_guidance_scale"]:
        assert not [name for name in told if name.startswith("skip")]


def test_damaged_sd3_texts() -> None:
    text = (
        "a\nSteps: 20, Sampler: LCM, Seed: 1, T5: huge, Shift: inf, Max sequence length: long,"
        ' Skip layer guidance: nan, Skip layers: "7, eight"'
    )
    assert restore(text) == {"prompt": "a", "negative_prompt": "", "steps": 20, "seed": 1}
    assert "skip_guidance_layers" not in restore(text.replace("eight", "9" * 9999))


TEXTS = [
    "",
    "a",
    " blanks around ",
    "two\nlines\n\nand a blank one",
    "trailing newline\n",
    "tabs\tand\rreturns\r\nof all kinds",
    "Negative prompt: not really",
    "x\nNegative prompt: y\nNegative prompt: z",
    "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1",
    'quotes " and \\ backslashes, commas: colons',
    "fünf Häuser 赤い家 🏠 \u202eright to left\u202c",
    "null \0 and bell \a",
    "half a pair \ud83c",
    'Exact prompt: "z", b: c, d: e, f: g',
]


@pytest.mark.parametrize("negative", TEXTS)
@pytest.mark.parametrize("prompt", TEXTS)
def test_any_text_survives(prompt: str, negative: str) -> None:
    fields = {"Steps": 20, "Seed": 7, "Size": "64x64"}
    text = write(prompt, negative, fields)
    text.encode()  # can be stored
    read = parse(text)
    assert (read.prompt, read.negative_prompt) == (prompt, negative)
    assert read.fields == {"Steps": "20", "Seed": "7", "Size": "64x64"}


@pytest.mark.parametrize("value", [*TEXTS[:-2], "[1, 2", "{", '"half', "{1: 2, 3}", "a, B: c", "1.0"])
def test_any_field_survives(value: str) -> None:
    text = write("p", "", {"Steps": 20, "Model": value, "Note": value, "Seed": 7})
    assert parse(text).fields == {"Steps": "20", "Model": value, "Note": value, "Seed": "7"}


def test_other_tools_texts() -> None:
    text = (
        "masterpiece, <lora:thing:0.8>, (a cat:1.1)\nin a hat\r\n"
        "Negative prompt: bad hands,\nlow quality\n"
        "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6, Seed: 123456, Size: 832x1216, "
        "Model hash: 67ab2fd8ec, Model: ponyXL_v6, VAE: sdxl.vae.safetensors, Clip skip: 2, "
        'Hires prompt: "a cat, close: up", Lora hashes: "thing: 1a2b, other: 3c4d", '
        'Civitai resources: [{"type":"checkpoint","modelVersionId":290640,"modelName":"Pony, V6"}], '
        "ADetailer model: face_yolov8n.pt, Odd: {not json, RNG: CPU, Version: v1.10.1\n"
    )
    info = parse(text)
    assert info.prompt == "masterpiece, <lora:thing:0.8>, (a cat:1.1)\nin a hat"
    assert info.negative_prompt == "bad hands,\nlow quality"
    assert info.fields["Hires prompt"] == "a cat, close: up"
    assert info.fields["Lora hashes"] == "thing: 1a2b, other: 3c4d"
    assert info.fields["Civitai resources"].endswith('"Pony, V6"}]')
    assert info.fields["ADetailer model"] == "face_yolov8n.pt"
    assert info.fields["Odd"] == "{not json"
    assert info.fields["Version"] == "v1.10.1"
    assert restore(text) == {
        "prompt": info.prompt,
        "negative_prompt": info.negative_prompt,
        "steps": 30,
        "sampler": "dpmpp_2m_karras",
        "guidance_scale": 6.0,
        "seed": 123456,
        "width": 832,
        "height": 1216,
        "clip_skip": 1,
    }


def test_what_makes_no_sense_is_left_out() -> None:
    text = "a\nSteps: many, Sampler: Unheard of, CFG scale: nan, Seed: 1.5, Size: large, Clip skip: x"
    assert restore(text) == {"prompt": "a", "negative_prompt": ""}
    assert restore("") == {"prompt": "", "negative_prompt": ""}
    assert restore("just a prompt: with a colon") == {
        "prompt": "just a prompt: with a colon",
        "negative_prompt": "",
    }


def test_a_text_of_endless_fields_is_read_to_a_point() -> None:
    fields = parse("a\n" + ", ".join(f"Field {number}: [1" for number in range(20_000))).fields
    assert list(fields)[:2] == ["Field 0", "Field 1"]
    assert 900 < len(fields) <= 1000


OTHER = (
    "a cat (fluffy:1.2)\nNegative prompt: blurry\n"
    "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6, Seed: 123456, Size: 512x768, "
    "Model hash: 67ab2fd8ec, Model: ponyXL_v6, VAE hash: 735e4c3a44, Clip skip: 2, "
    'Hires upscale: 2, Lora hashes: "thing: 1a2b", Version: v1.10.1'
)


def test_another_tools_text_is_told_apart() -> None:
    restored = understand(OTHER)
    assert restored.family == "sd15"
    assert restored.settings == restore(OTHER) | {"raw_prompt": False}  # what is not said is as ever
    assert restored.unknown == ("Model hash", "VAE hash", "Hires upscale")
    assert restored.refused == ("Model",)  # a name alone does not say where the checkpoint is


@pytest.mark.parametrize(
    ("family", "settings"), [("sd15", SETTINGS), ("sd3", SD3), ("stable_cascade", CASCADE)], ids=str
)
def test_our_own_text_is_understood_whole(family: str, settings: dict[str, Any]) -> None:
    restored = understand(describe({**settings, "checkpoint": "demo", "images": []}, 7))
    assert restored.family == family
    assert (restored.unknown, restored.refused) == ((), ())
    assert restored.settings["checkpoint"] == "demo"
    assert restored.settings["seed"] == 7
    assert (restored.settings["clip_skip"], restored.settings["raw_prompt"]) == (0, False)
    REQUESTS[family](**restored.settings)


def test_what_of_our_own_text_cannot_be_restored_is_named() -> None:
    assert understand(describe(CASCADE, 7)).refused == ("Image prompts",)
    assert understand(describe(CASCADE, 7)).settings["checkpoint"] == "stable-cascade"  # a catalogued name
    elsewhere = understand(describe({**SETTINGS, "checkpoint": "/home/me/dream.safetensors"}, 7))
    assert elsewhere.refused == ("Model",)
    assert "checkpoint" not in elsewhere.settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("Steps", "9999"),
        ("Steps", "many"),
        ("CFG scale", "-1"),
        ("Seed", "-7"),
        ("Seed", str(2**64)),
        ("Size", "512x99999"),
        ("Size", "513x512"),
        ("Size", "large"),
        ("Sampler", "Restart"),
        ("Clip skip", "99"),
    ],
)
def test_values_that_no_request_takes_are_refused_by_name(field: str, value: str) -> None:
    fields = {"Steps": 20, "Sampler": "Euler", "CFG scale": 7, "Seed": 1, "Size": "512x512", "Clip skip": 1}
    restored = understand(write("a", "", {**fields, field: value}))
    assert restored.refused == (field,)
    SD15Request(**restored.settings)
    assert len(restored.settings) >= 6  # all that the other fields tell


def test_fields_that_must_fit_together() -> None:
    text = describe({**SD3, "skip_layer_guidance_scale": 2.8, "skip_layer_guidance_start": 0.9}, 7)
    restored = understand(text)
    assert restored.refused == ("Skip layer start", "Skip layer stop")
    assert restored.settings["skip_layer_guidance_scale"] == 2.8
    SD3Request(**restored.settings)
    off = understand(describe(SD3, 7)).settings
    assert (off["skip_layer_guidance_scale"], off["max_sequence_length"]) == (0.0, 256)


def test_a_prompt_alone_is_understood_as_one() -> None:
    restored = understand("just a prompt")
    assert (restored.family, restored.settings) == (
        "sd15",
        {"prompt": "just a prompt", "negative_prompt": ""},
    )


# ---- PNG files


def png(folder: Path, text: str | None, *, compressed: bool = False, key: str = "parameters") -> Path:
    info, file = PngInfo(), folder / "picture.png"
    if text is not None:
        info.add_text(key, text, zip=compressed)
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)
    return file


def with_chunk(file: Path, kind: bytes, data: bytes) -> Path:
    """The file with one more chunk after its first."""
    content = file.read_bytes()
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    file.write_bytes(content[:33] + chunk + content[33:])
    return file


@pytest.mark.parametrize("text", [OTHER, OTHER.replace("cat", "猫 🏠"), OTHER.replace("cat", "naïve café")])
@pytest.mark.parametrize("compressed", [False, True])
def test_every_kind_of_text_chunk(tmp_path: Path, text: str, compressed: bool) -> None:
    assert of_file(png(tmp_path, text, compressed=compressed)) == understand(text)


def test_the_text_may_follow_the_pixels_and_the_end_be_missing(tmp_path: Path) -> None:
    file = png(tmp_path, None)
    content = file.read_bytes()
    data = b"parameters\0" + OTHER.encode("latin-1")
    file.write_bytes(content[:-12] + struct.pack(">I", len(data)) + b"tEXt" + data + bytes(4))
    assert of_file(file) == understand(OTHER)


def test_files_that_tell_nothing(tmp_path: Path) -> None:
    refused: dict[str, Path] = {}
    no_png = tmp_path / "notes.png"
    no_png.write_text("Steps: 20, Sampler: Euler, Seed: 1")
    refused["notes.png is no PNG file"] = no_png
    (tmp_path / "photo.png").write_bytes(b"\xff\xd8\xff\xe0" + bytes(99))
    refused["photo.png is no PNG file"] = tmp_path / "photo.png"
    (tmp_path / "cut.png").write_bytes(png(tmp_path, OTHER).read_bytes()[:20])
    refused["cut.png is no PNG file"] = tmp_path / "cut.png"
    (tmp_path / "empty.png").touch()
    refused["empty.png is no PNG file"] = tmp_path / "empty.png"
    refused["missing.png cannot be read"] = tmp_path / "missing.png"
    refused[f"{tmp_path.name} cannot be read"] = tmp_path
    for words, file in refused.items():
        with pytest.raises(InvalidRequest, match=words) as caught:
            of_file(file)
        assert str(tmp_path.parent) not in str(caught.value)  # where uploads lie is nobody's business


@pytest.mark.parametrize("key", ["workflow", "parameters2", "p"])
def test_a_picture_without_settings(tmp_path: Path, key: str) -> None:
    for file in (png(tmp_path, None), png(tmp_path, "  \n"), png(tmp_path, OTHER, key=key)):
        with pytest.raises(InvalidRequest, match="picture.png has no settings in it"):
            of_file(file)


def test_bombs_are_refused_unexploded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zlib.compress(bytes(50_000_000))
    too_long = "the settings in picture.png are too long"
    packed = {b"zTXt": b"parameters\0\0" + bomb, b"iTXt": b"parameters\0\1\0\0\0" + bomb}
    plain = {b"tEXt": b"parameters\0" + bytes(1 << 20), b"iTXt": b"parameters\0\0\0\0\0" + bytes(1 << 20)}
    for kind, data in (*packed.items(), *plain.items()):
        with pytest.raises(InvalidRequest, match=too_long):
            of_file(with_chunk(png(tmp_path, None), kind, data))
    file = png(tmp_path, OTHER)
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    file.write_bytes(content)
    monkeypatch.setattr("PIL.Image.open", None)  # no pixel is decoded
    with pytest.raises(InvalidRequest, match="100000 × 100000 pixels; it can have up to 64 million"):
        of_file(file)


@pytest.mark.parametrize(
    ("kind", "data"),
    [(b"zTXt", b"parameters\0\0no zlib"), (b"iTXt", b"parameters\0\0"), (b"iTXt", b"parameters\0")],
)
def test_damaged_chunks(tmp_path: Path, kind: bytes, data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="the settings in picture.png are damaged"):
        of_file(with_chunk(png(tmp_path, None), kind, data))


def test_chunks_without_end(tmp_path: Path) -> None:
    file = png(tmp_path, None)
    file.write_bytes(file.read_bytes()[:33] + struct.pack(">I4sI", 0, b"junk", 0) * 200_000)
    with pytest.raises(InvalidRequest, match="has no settings in it"):
        of_file(file)
