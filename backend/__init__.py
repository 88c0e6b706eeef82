"""Triptych's engine: `Studio(Settings(...)).run(SD15Request(prompt=...))`. It imports without torch."""

from backend.errors import (
    AccessError,
    Cancelled,
    CheckpointError,
    InvalidRequest,
    OutOfMemory,
    StorageError,
    TriptychError,
)
from backend.memory.hardware import Hardware
from backend.requests import SD3Request, SD15Request, StableCascadeRequest
from backend.settings import Settings
from backend.studio import Studio

__all__ = [
    "AccessError",
    "Cancelled",
    "CheckpointError",
    "Hardware",
    "InvalidRequest",
    "OutOfMemory",
    "SD3Request",
    "SD15Request",
    "Settings",
    "StableCascadeRequest",
    "StorageError",
    "Studio",
    "TriptychError",
]
