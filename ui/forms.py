"""From what a page or a client of the API sends to a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from backend.errors import InvalidRequest
from backend.public import MOST_SIDE
from backend.requests import REQUESTS, Request, StableCascadeRequest


def build(family: type[Request], values: Mapping[str, Any], *, public: bool = False) -> Request:
    """A request from a page's or a client's values, where tuples are lists, no `config_from` is empty, and
    uploaded files are dictionaries. On a public server nobody names files of its own."""
    given: dict[str, Any] = {name: _frozen(value) for name, value in values.items()}
    given["config_from"] = given.get("config_from") or None
    if isinstance(given.get("images"), tuple):
        given["images"] = tuple(
            _file(f"images[{index}]", value, public=public) for index, value in enumerate(given["images"])
        )
    request = family(**given)
    if public and isinstance(request, StableCascadeRequest):
        request = replace(request, images=tuple(image.within(MOST_SIDE) for image in request.images))
    return request


def _file(name: str, value: Any, *, public: bool) -> Any:
    """An uploaded file's path; any other value as it is, if it may be."""
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and "\0" not in path:
            file, uploads = Path(path).resolve(), Path(get_upload_folder()).resolve()
            if file.is_relative_to(uploads):
                return str(file)
        raise InvalidRequest(f"{name} is {value!r:.80}, which is no file that was uploaded here")
    if public and isinstance(value, str) and not value.startswith("data:"):
        raise InvalidRequest(
            f"{name} is {value!r:.80}; on this public server it can be an uploaded file or a data URL"
        )
    return value


def build_shown(family: type[Request], values: Mapping[str, Any], *, public: bool = False) -> Request:
    """A request from a page's values; an erased size is no wish for a default that is not shown."""
    for name in ("width", "height"):
        if values[name] is None:
            raise InvalidRequest(f"{name} is empty; give it in pixels, or choose a shape")
    return build(family, values, public=public)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def named(family: Any, values: Any, public: bool) -> Request:
    name = family.replace("-", "_") if isinstance(family, str) else ""
    if name not in REQUESTS:
        raise InvalidRequest(f"family is {family!r}; it can be {', '.join(REQUESTS)}")
    if not isinstance(values, dict):
        raise InvalidRequest(f"request is {values!r}; it must be an object of request fields")
    known = [each.name for each in fields(REQUESTS[name])]
    for given in values:
        if given not in known:
            raise InvalidRequest(f"request has no field {given!r:.80}; it can have {', '.join(known)}")
    return build(REQUESTS[name], values, public=public)
