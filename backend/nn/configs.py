"""Reading a published `config.json` into a config dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from backend.errors import CheckpointError


def known_fields(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `config` that are fields of the dataclass `cls`, lists as tuples."""
    names = {field.name for field in fields(cls)}
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key in names
    }


def require(network: str, config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse settings of the class that this code does not build, naming the value and what is allowed.

    Raises CheckpointError. A setting that the config leaves out has its default, which is allowed.
    """
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            options = " or ".join(repr(value) for value in values)
            raise CheckpointError(f"{network} config: {key} is {config[key]!r}; it can be {options}")
