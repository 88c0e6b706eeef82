"""Pictures that a request brings along, read once, when the request is made."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64_000_000


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
        from PIL import Image, ImageOps, UnidentifiedImageError

        if isinstance(value, ImagePrompt):
            return value
        shown = f"{value!r:.80}"
        try:
            if isinstance(value, Image.Image):
                picture, origin = value, None
            elif isinstance(value, str) and value.startswith("data:"):
                picture, origin = Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2]))), None
            elif isinstance(value, str | Path) and str(value).strip():
                picture, origin = Image.open(Path(value).expanduser()), str(value)
            else:
                raise InvalidRequest(f"{name} is {shown}; it can be a picture, a file or a data URL")
            if picture.width * picture.height > MOST_PIXELS:
                raise InvalidRequest(
                    f"{name} is {picture.width} by {picture.height} pixels; it can be up to 64 million in all"
                )
            picture = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:  # transparent is white, as on a page
                layer = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            picture = picture.convert("RGB")
        except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, binascii.Error) as error:
            raise InvalidRequest(f"{name} is {shown}, which is no picture that can be read") from error
        except (OSError, RuntimeError, ValueError) as error:  # missing, a folder, cut short
            reason = getattr(error, "strerror", None) or "it is damaged"
            raise InvalidRequest(f"{name} is {shown}, which cannot be read: {reason}") from error
        content = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:16]
        return cls(digest=content, origin=origin, picture=picture)

    def __str__(self) -> str:
        return self.origin or f"picture {self.digest}"
