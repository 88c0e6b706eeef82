"""What may be an image prompt, how it is read, and what is said of everything else."""

from __future__ import annotations

import base64
import contextlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backend import StableCascadeRequest, image_prompts
from backend.errors import InvalidRequest
from backend.image_prompts import ImagePrompt

RED, WHITE = (255, 0, 0), (255, 255, 255)


def noise(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def read(value: Any) -> ImagePrompt:
    (prompt,) = StableCascadeRequest(images=(value,)).images
    return prompt


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    noise().save(path)
    return path


def test_pictures_files_and_data_urls_are_read_alike(file: Path) -> None:
    picture = noise()
    prompts = [
        read(value) for value in (picture, file, str(file), data_url(file.read_bytes()), read(picture))
    ]
    for prompt in prompts:
        assert prompt.picture.mode == "RGB"
        assert np.array_equal(np.asarray(prompt.picture), np.asarray(picture))
    assert len(set(prompts)) == 1  # equal, and of one hash
    assert [prompt.origin for prompt in prompts] == [None, str(file), str(file), None, None]
    assert str(prompts[1]) == str(file)
    assert str(prompts[0]) == f"picture {prompts[0].digest}"


def test_files_of_the_home_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    assert read("~/picture.png") == read(file)


def test_requests_are_equal_by_the_pictures_content(file: Path) -> None:
    def request(*images: Any) -> StableCascadeRequest:
        return StableCascadeRequest(prompt="a", images=images)

    assert request(file) == request(noise())
    assert hash(request(file)) == hash(request(noise()))
    other = noise()
    other.putpixel((3, 3), (0, 0, 0))
    assert request(file) != request(other)
    assert request(file, other) != request(other, file)
    square, wide = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (8, 2), "red")
    assert request(square) != request(wide)  # the same bytes in another shape


def test_the_callers_picture_stays_as_it_is() -> None:
    picture = noise()
    prompt = read(picture)
    picture.putpixel((0, 0), RED)
    assert prompt.picture.getpixel((0, 0)) != RED
    assert picture.size == (60, 40)  # still open


@pytest.mark.parametrize("form", ["RGBA", "LA", "PA", "P"])
def test_transparent_is_white(form: str, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 2, 2))
    path = tmp_path / "picture.png"
    if form == "P":
        palette = picture.convert("RGB").convert("P")
        palette.save(path, transparency=palette.getpixel((0, 0)))
    else:
        picture.convert(form).save(path, "TIFF" if form == "PA" else "PNG")
    pixels = np.asarray(read(path).picture)
    assert (pixels[:, :2] == WHITE).all()
    assert not (pixels[:, 2:] == WHITE).any(axis=0).all()


def test_half_transparent_is_mixed_with_white() -> None:
    pixel = read(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).picture.getpixel((0, 0))
    assert pixel == pytest.approx((255, 127, 127), abs=1)


def test_cameras_that_were_turned(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste(RED, (0, 0, 20, 20))  # on the left; on top once it is turned by a quarter, clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = read(tmp_path / "turned.png").picture
    assert turned.size == (20, 40)
    assert turned.getpixel((10, 5)) == RED
    assert turned.getpixel((10, 35)) == WHITE


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_of_grey_are_not_cut_off(mode: str) -> None:
    ramp = np.linspace(0, 65535, 256).reshape(1, 256)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    picture = Image.frombytes(mode, (256, 1), ramp.astype(dtype).tobytes())
    grey = np.asarray(read(picture).picture)[0, :, 0].astype(int)
    assert np.abs(grey - np.arange(256)).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "F"])
def test_every_other_mode(mode: str) -> None:
    assert read(Image.new(mode, (5, 4))).picture.size == (5, 4)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_usual_format(kind: str, tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(encoded(noise(), kind))
    assert read(tmp_path / "picture").picture.size == (60, 40)


@pytest.mark.filterwarnings("error")  # of files left open
@pytest.mark.parametrize("kind", ["EPS", "PCX", "SGI"])
def test_no_unusual_format(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture", kind)
    with pytest.raises(InvalidRequest, match="PNG, JPEG and WebP can"):
        ImagePrompt.read("images", tmp_path / "picture")


def test_moving_pictures_give_their_first(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read(tmp_path / "moving.gif").picture.getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (["a.png"] * 5, "0 to 4 pictures"),
        ("picture.png", "images is 'picture.png'"),
        (None, "images is None"),
        (noise(), "images is <PIL"),
        ({"a": 1}, "images is {'a': 1}"),
        ([None], "images[0] is None; it can be a picture, a file or a data URL"),
        ([noise(), 7], "images[1] is 7; it can be"),
        ([b"bytes"], "images[0] is b'bytes'; it can be"),
        ([["a.png"]], "images[0] is ['a.png']; it can be"),
        ([" "], "images[0] is ' '; it can be"),
        (["\0"], "cannot be read"),
        (["x" * 5000], "File name too long"),
        (["~nobody-of-that-name/picture.png"], "cannot be read"),
        (["data:,"], "no picture"),
        (["data:image/png;base64,"], "no picture"),
        (["data:image/png;base64,!!!!"], "no picture"),
        (["data:image/png;base64,äöü"], "cannot be read"),
        ([data_url(b"a text")], "no picture"),
        ([data_url(encoded(noise())[:200])], "cannot be read: it is damaged"),
        (["https://example.com/picture.png"], "a web address; it can be a file or a data URL"),
    ],
)
def test_refused(images: Any, told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        StableCascadeRequest(images=images)
    assert str(caught.value).startswith("images")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("text.png", b"a text that claims to be a picture", "no picture"),
        ("empty.png", b"", "no picture"),
        ("cut.png", encoded(noise())[:-500], "cannot be read: it is damaged"),
        ("head.png", encoded(noise())[:20], "no picture|damaged"),
        ("cut.jpg", encoded(noise(), "JPEG")[:-500], "cannot be read: it is damaged"),
        ("spoiled.png", encoded(noise()).replace(b"IDAT", b"IDAT\0\0\0\0", 1), "damaged|no picture"),
    ],
)
def test_damaged_files(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=told) as caught:
        read(tmp_path / name)
    assert "images[0] is " in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: Is a directory"):
        read(tmp_path)
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        read(tmp_path / "missing.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.timeout(10)
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InvalidRequest, match="no picture"):
        read(tmp_path / "pipe.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("megapixels", [65, 100, 400])  # Pillow warns from 89 million on, and refuses 179
def test_pictures_that_would_fill_the_memory(megapixels: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (1000, megapixels * 1000)).save(path, compress_level=1)
    with pytest.raises(InvalidRequest, match="too large: it can be up to 64 million pixels"):
        read(path)


def test_the_largest_picture_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_prompts, "MOST_PIXELS", 60 * 40)
    assert read(noise()).picture.size == (60, 40)
    with pytest.raises(InvalidRequest, match="too large"):
        read(noise(60, 41))


def test_one_that_waits_for_long_is_made_smaller() -> None:
    large = read(noise(60, 30))
    assert large.within(60) is large
    small = large.within(40)
    assert small.picture.size == (40, 20)
    assert small != large
    assert large.picture.size == (60, 30)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_never_escapes(tmp_path: Path) -> None:
    """Whatever decoders raise, it is an InvalidRequest."""
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        content = encoded(noise(), kind)
        for _ in range(40):
            spoiled = bytearray(content[: rng.integers(len(content) // 2, len(content))])
            for place in rng.integers(0, len(spoiled), rng.integers(1, 30)):
                spoiled[place] = rng.integers(256)
            (tmp_path / "spoiled").write_bytes(spoiled)
            with contextlib.suppress(InvalidRequest):
                assert read(tmp_path / "spoiled").picture.mode == "RGB"
