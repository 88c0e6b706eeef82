"""Where a checkpoint's parts come from: hub repositories, folders in hub layout, or original single files.

No torch at import: the plan and the page ask sources for configs and sizes.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backend import catalog
from backend.errors import CheckpointError, InvalidRequest
from backend.settings import Settings
from backend.weights import kinds
from backend.weights.base import Source, keys_of
from backend.weights.files import SINGLE, WEIGHTS
from backend.weights.folder import FolderSource, is_layout
from backend.weights.hub import Repository, pasted_url
from backend.weights.joined import JoinedSource
from backend.weights.remote import HubSource
from backend.weights.single import FileSource

DEMO = Path(__file__).parents[2] / "assets" / "demo"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(checkpoint: str, family: str, settings: Settings, config_from: str | None = None) -> Source:
    """The source that `checkpoint` names; downloads nothing.

    That can be "demo", a catalogue name, a folder or single file (also relative to `settings.models_dir`), a
    hub repository OWNER/NAME, or a pasted hub URL. `config_from`, a folder or repository in the same
    spellings, completes a single file, or a checkpoint that is half a release; half a release on the hub is
    completed by the published other half. Raises InvalidRequest for what means nothing, CheckpointError for
    what is missing, damaged or of another family.
    """
    if family not in catalog.FAMILIES:
        raise InvalidRequest(f"family is {family!r}; it can be {', '.join(catalog.FAMILIES)}")
    complement = None
    if config_from:
        try:
            found = _find(config_from, family, settings, None)
        except CheckpointError as error:
            raise CheckpointError(f"config_from: {error}") from error
        if found.single and found.root is None:
            raise InvalidRequest(f"config_from is {config_from!r}; it can be a folder or a hub repository")
        complement = found.joined(family)
    found = _find(checkpoint, family, settings, complement)
    if found.single or not _in_parts(family):
        return found.sources[0]
    others = [*([complement] if complement else []), *(_published(family, settings) if found.remote else [])]
    beside = _beside(found.root, family, [*found.sources, *others]) if found.root is not None else []
    whole = JoinedSource(found.name, family, [*found.sources, *others, *beside], found.root)
    whole.check()
    return whole


@dataclass(frozen=True)
class _Found:
    """What a text names: one source, or those of a release in parts.

    `root` is the folder that holds it; `single` one of original files, which takes what it lacks by itself.
    """

    name: str
    sources: list[Source]
    root: Path | None = None
    single: bool = False
    remote: bool = False

    def joined(self, family: str) -> Source:
        one = len(self.sources) == 1
        return self.sources[0] if one else JoinedSource(self.name, family, self.sources, self.root)


def _find(text: str, family: str, settings: Settings, complement: Source | None) -> _Found:
    text = text.strip()
    if text == "demo":
        return _in_folder("demo", family, DEMO / catalog.FAMILIES[family].demo, settings, complement)
    for entry in catalog.CATALOGUE:
        if entry.name == text and entry.repositories:
            kinds.refuse_others(text, entry.family, family)
            one = len(entry.repositories) == 1
            sources = [
                HubSource(text if one else name, family, _repository(name, settings))
                for name in entry.repositories
            ]
            return _Found(text, [*sources], remote=True)
    if url := pasted_url(text):
        name, revision, file = url
        repository = _repository(name, settings, revision)
        if file is None:
            return _Found(name, [HubSource(name, family, repository)], remote=True)
        standard = _standard(family, settings)
        rest = complement or (standard if _in_parts(family) else None)
        return _Found(name, [HubSource(name, family, repository, file, rest, standard)], single=True)
    path = on_disk(text, settings.models_dir)
    if path is None and REPOSITORY.fullmatch(text) and not text.endswith(WEIGHTS):
        return _Found(text, [HubSource(text, family, _repository(text, settings))], remote=True)
    if path is None:
        names = ", ".join(entry.name for entry in catalog.entries(family))
        raise CheckpointError(
            f"checkpoint is {text!r}, and there is no such file or folder; it can be {names}, "
            f"a hub repository (OWNER/NAME), a folder, or a file ({', '.join(SINGLE)})"
        )
    if path.is_dir():
        return _in_folder(path.name, family, path, settings, complement)
    if path.suffix not in WEIGHTS:
        raise CheckpointError(f"{path} is no checkpoint: a single file ends in {', '.join(SINGLE)}")
    file_source = FileSource(path.name, family, [path], complement, _standard(family, settings))
    return _Found(path.name, [file_source], single=True)


def _in_folder(name: str, family: str, root: Path, settings: Settings, complement: Source | None) -> _Found:
    """A folder in hub layout; of a release in parts also one with a folder for each, or of original files."""
    if is_layout(root, family) or not _in_parts(family):
        return _Found(name, [FolderSource(name, family, root)], root)
    parts = [path for path in sorted(root.glob("*")) if path.is_dir() and is_layout(path, family)]
    files = sorted([*root.glob("*.safetensors"), *root.glob("*/*.safetensors")])
    if not (parts or files):
        raise CheckpointError(
            f"{root} is no checkpoint: there is no model_index.json, in it or one folder down, "
            "and no .safetensors file"
        )
    if not parts:
        source = FileSource(name, family, files, complement, _standard(family, settings), root)
        return _Found(name, [source], root, single=True)
    sources = [FolderSource(f"{name}/{path.name}", family, path) for path in parts]
    ordered: dict[Source, None] = {}  # what several hold comes from the first half of the release
    for full, small in keys_of(family).LITE.items():
        owners = [source for source in sources if source.has(full) or source.has(small)]
        if len(owners) > 1:
            names = ", ".join(source.name for source in owners)
            raise CheckpointError(
                f"{name} holds several folders with a {full} ({names}): "
                "give one of them as the checkpoint, and the other half of the release as config_from"
            )
        ordered |= dict.fromkeys(owners)
    return _Found(name, [*(ordered | dict.fromkeys(sources))], root)


def _beside(root: Path, family: str, sources: list[Source]) -> list[Source]:
    """The folder beside half a release that holds the other half, if it is the only one."""
    halves = keys_of(family).LITE.items()
    lacking = [name for half in halves if not any(s.has(n) for s in sources for n in half) for name in half]
    found: list[Source] = []
    for path in sorted(root.parent.glob("*")) if lacking else []:
        if path != root and path.is_dir() and is_layout(path, family):
            with suppress(CheckpointError):  # what lies there is nobody's concern unless it fits
                source = FolderSource(path.name, family, path)
                found += [source] if any(map(source.has, lacking)) else []
    return found if len(found) == 1 else []


def _in_parts(family: str) -> bool:
    """Whether the family is released as several folders."""
    return len(keys_of(family).FOLDERS) > 1


def _published(family: str, settings: Settings) -> list[HubSource]:
    names = catalog.published(family).repositories
    return [HubSource(name, family, _repository(name, settings)) for name in names]


def _standard(family: str, settings: Settings) -> Source:
    """The family's first published checkpoint."""
    return _Found(catalog.published(family).name, [*_published(family, settings)]).joined(family)


def on_disk(text: str, models_dir: Path | None) -> Path | None:
    try:
        places = [Path(text).expanduser(), *([models_dir / text] if models_dir else [])]
        return next((place.absolute() for place in places if place.exists()), None)
    except (OSError, RuntimeError, ValueError) as error:  # too long, a zero byte, an unknown user's home
        raise CheckpointError(f"checkpoint is {text[:80]!r}, which is no path") from error


def _repository(name: str, settings: Settings, revision: str = "main") -> Repository:
    return Repository(name, revision, settings.models_dir, settings.offline)
