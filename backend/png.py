"""PNG files: written with their `parameters` text, and read chunk by chunk without ever decoding pixels."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from backend.errors import InvalidRequest, StorageError

if TYPE_CHECKING:
    from PIL.Image import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
BEGINNING = 33  # bytes: the signature and the chunk IHDR, with which every PNG begins
KEYWORD = b"parameters"
MOST_TEXT = 1 << 18  # bytes of a text, unpacked; the longest prompts take some thousands
MOST_CHUNKS = 100_000  # pixels come in chunks of 8 kB and more
SIDE, QUALITY = 320, 80  # of a thumbnail, in pixels and in WebP's measure


@dataclass(frozen=True, kw_only=True)
class Png:
    """Size in pixels, the text chunk `parameters` if there is one, and whether the file is all there."""

    width: int
    height: int
    parameters: str | None
    whole: bool


def encoded(image: Image, parameters: str) -> bytes:
    """The file's content."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", parameters)  # an iTXt chunk where Latin-1 cannot hold it
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def thumbnail(file: Path) -> bytes:
    """A picture in small, as WebP. Raises StorageError for one that does not open."""
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            picture.thumbnail((SIDE, SIDE))
            picture.convert("RGB").save(buffer, "WEBP", quality=QUALITY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StorageError(f"the picture {file.name} does not open") from error
    return buffer.getvalue()


def read(file: Path) -> Png:
    """Raises InvalidRequest, in words, for what is no PNG, cannot be read, or has too long a text."""
    if "\0" in str(file):
        raise InvalidRequest(f"{file.name!r:.80} is no name of a file")
    try:
        with file.open("rb") as content:
            return _read(content, file.name)
    except OSError as error:
        raise InvalidRequest(f"{file.name} cannot be read: {error.strerror or error}") from error


def _read(content: BinaryIO, name: str) -> Png:
    size = os.fstat(content.fileno()).st_size
    beginning = content.read(BEGINNING)
    if len(beginning) < BEGINNING or not beginning.startswith(SIGNATURE) or beginning[12:16] != b"IHDR":
        raise InvalidRequest(f"{name} is no PNG file")
    width, height = struct.unpack(">II", beginning[16:24])
    text, whole = None, False
    for _ in range(MOST_CHUNKS):
        header = content.read(8)
        if len(header) < 8:
            break
        length, kind = struct.unpack(">I4s", header)
        end = content.tell() + length + 4  # a checksum follows
        if end > size:
            break
        if kind == b"IEND":
            whole = True
            break
        if kind in UNPACK and text is None:
            text = _text(content, kind, length, name)
        content.seek(end)
    return Png(width=width, height=height, parameters=text, whole=whole and width > 0 and height > 0)


def _text(content: BinaryIO, kind: bytes, length: int, name: str) -> str | None:
    """The text of a chunk, if it is the one that is looked for."""
    if content.read(min(length, len(KEYWORD) + 1)) != KEYWORD + b"\0":
        return None
    too_long = InvalidRequest(f"the settings in {name} are too long: they can take up to 256 KiB")
    if length > MOST_TEXT:
        raise too_long
    data = content.read(length - len(KEYWORD) - 1)
    try:
        text, encoding = UNPACK[kind](data)
    except (zlib.error, ValueError, IndexError) as error:
        raise InvalidRequest(f"the settings in {name} are damaged") from error
    if len(text) > MOST_TEXT:
        raise too_long
    return text.decode(encoding, "replace")


def _plain(data: bytes) -> tuple[bytes, str]:
    return data, "latin-1"


def _packed(data: bytes) -> tuple[bytes, str]:
    return _inflated(data[1:]), "latin-1"  # the first byte names the only method that there is


def _international(data: bytes) -> tuple[bytes, str]:
    """Flag and method, language and translated keyword, each with a null after it, then the text."""
    _, _, text = data[2:].split(b"\0", 2)
    return (_inflated(text) if data[0] else text), "utf-8"


def _inflated(data: bytes) -> bytes:
    return zlib.decompressobj().decompress(data, MOST_TEXT + 1)


UNPACK = {b"tEXt": _plain, b"zTXt": _packed, b"iTXt": _international}
