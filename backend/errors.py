"""Every error that Triptych raises on purpose.

TriptychError
├── InvalidRequest    a value that cannot be served; names it and what is allowed
├── CheckpointError   the checkpoint is missing, damaged, or of another kind
├── AccessError       a hub refused or could not be reached
├── StorageError      a picture could not be written; `images` holds what was made
├── OutOfMemory       the request does not fit this machine
└── Cancelled         stopped by the user
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


class TriptychError(Exception):
    """The root: its text is meant for the user as it stands."""


class InvalidRequest(TriptychError, ValueError):
    """A value that cannot be served."""


class CheckpointError(TriptychError):
    """A checkpoint that is missing, damaged, or not what it was asked to be."""


class AccessError(TriptychError):
    """A repository that refuses, does not exist, or cannot be reached."""


class StorageError(TriptychError):
    """Pictures were made, or would be, but cannot be written; `images` keeps those that were made."""

    def __init__(self, message: str, images: tuple[Image, ...] = ()) -> None:
        super().__init__(message)
        self.images = images


class OutOfMemory(TriptychError):
    """The request does not fit the memory of this machine."""


class Cancelled(TriptychError):
    """The user stopped the request."""
