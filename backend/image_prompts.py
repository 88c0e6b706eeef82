"""Pictures that a request brings along, read once, when the request is made."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import stat
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64_000_000
# Pillow knows fifty more; one of them runs another program to read a picture.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """A picture in RGB; two of equal content are equal. `origin` is the file that it came from, if any."""

    digest: str
    origin: str | None = field(default=None, compare=False)
    picture: Image = field(compare=False, repr=False)

    @classmethod
    def read(cls, name: str, value: Any) -> ImagePrompt:
        """From a picture of PIL's, a file, or a data URL. `name` says in errors which field it is.

        Raises InvalidRequest for anything that is no picture.
        """
        from PIL import Image, UnidentifiedImageError

        if isinstance(value, ImagePrompt):
            return value
        shown = _shown(value)
        if not isinstance(value, Image.Image | str | Path) or not str(value).strip():
            raise InvalidRequest(f"{name} is {shown}; it can be a picture, a file or a data URL")
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            raise InvalidRequest(f"{name} is {value:.80}, a web address; it can be a file or a data URL")
        try:
            with _opened(value) as given:
                if given.width * given.height > MOST_PIXELS:
                    raise Image.DecompressionBombError
                picture = _plain(given)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            most = MOST_PIXELS // 1_000_000
            raise InvalidRequest(
                f"{name} is {shown}, which is too large: it can be up to {most} million pixels"
            ) from error
        except (UnidentifiedImageError, SyntaxError, binascii.Error) as error:
            raise InvalidRequest(
                f"{name} is {shown}, which is no picture that can be read: PNG, JPEG and WebP can"
            ) from error
        except (OSError, RuntimeError, ValueError) as error:  # missing, a folder, cut short
            reason = getattr(error, "strerror", None) or "it is damaged"
            raise InvalidRequest(f"{name} is {shown}, which cannot be read: {reason}") from error
        origin = str(value) if not isinstance(value, Image.Image) and not _is_data(value) else None
        return cls(digest=_digest(picture), origin=origin, picture=picture)

    def within(self, side: int) -> ImagePrompt:
        """No side longer than so many pixels: it stays in memory for as long as its request waits."""
        if max(self.picture.size) <= side:
            return self
        small = self.picture.copy()
        small.thumbnail((side, side))
        return replace(self, digest=_digest(small), picture=small)

    def __str__(self) -> str:
        return self.origin or f"picture {self.digest}"


def _digest(picture: Image) -> str:
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:16]


def _shown(value: Any) -> str:
    """A file goes by its name: it may be an upload, whose folder is nobody's business."""
    is_file = isinstance(value, str | Path) and not _is_data(value)
    return f"{Path(value).name if is_file else value!r:.80}"


def _opened(value: Image | str | Path) -> AbstractContextManager[Image]:
    """The picture, to be closed afterwards unless it is the caller's own."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Image.Image):
        return nullcontext(value)
    if _is_data(value):
        return Image.open(io.BytesIO(base64.b64decode(str(value).partition(",")[2])), formats=FORMATS)
    path = Path(value).expanduser()
    kind = path.stat().st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        raise UnidentifiedImageError("to read it might never end")
    return Image.open(path, formats=FORMATS)


def _is_data(value: str | Path) -> bool:
    return isinstance(value, str) and value.startswith("data:")


def _plain(picture: Image) -> Image:
    """Upright, in RGB of 8 bits, on white where it is transparent, as on a page."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey, which a plain conversion cuts off at 255
        picture = picture.convert("I").point(lambda grey: grey * (1 / 257)).convert("L")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")
