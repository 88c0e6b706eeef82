"""Reading a published `config.json` into a config dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from backend.errors import CheckpointError

C = TypeVar("C")


def read_config(cls: type[C], network: str, config: Mapping[str, Any]) -> C:
    """The dataclass `cls` from those entries of `config` that are its fields, lists as tuples.

    Raises CheckpointError for a value of the wrong type, naming it.
    """
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in fields(cls):  # pyright: ignore[reportArgumentType]  (cls is a dataclass)
        if field.name in config:
            value = config[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
            if not fits(values[field.name], hints[field.name]):
                raise CheckpointError(f"{network} config: {field.name} is {value!r}, of a wrong type")
    return cls(**values)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of the annotated type; tuples are not empty, sizes not negative."""
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return isinstance(value, tuple) and bool(value) and all(fits(entry, kind) for entry in value)
    if isinstance(hint, UnionType):
        return any(fits(value, kind) for kind in get_args(hint))
    if hint is NoneType:
        return value is None
    if hint is bool or isinstance(value, bool):
        return isinstance(value, bool) and hint is bool
    if hint is int:
        return isinstance(value, int) and value >= 0
    return isinstance(value, int | float if hint is float else hint)


def require(network: str, config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse settings of the class that this code does not build, naming the value and what is allowed.

    Raises CheckpointError. A setting that the config leaves out has its default, which is allowed.
    """
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            options = " or ".join(repr(value) for value in values)
            raise CheckpointError(f"{network} config: {key} is {config[key]!r}; it can be {options}")


def require_each(network: str, config: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> None:
    """`require` for every entry of a list."""
    kinds = config.get(key, ())
    if not isinstance(kinds, list | tuple):
        raise CheckpointError(f"{network} config: {key} is {kinds!r}; it must be a list")
    for kind in kinds:
        require(network, {key: kind}, {key: allowed})
