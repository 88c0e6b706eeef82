"""What lies on this machine: which of the catalogue is downloaded, and files and folders of one's own.

What a file is, is told by its header; nothing is loaded. No torch: the page asks while it opens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from backend import catalog
from backend.errors import CheckpointError, InvalidRequest, TriptychError
from backend.memory.plan import TITLES
from backend.settings import Settings
from backend.weights import files, kinds, pickles
from backend.weights.base import Source, alternatives, companion_of, keys_of
from backend.weights.folder import INDEX
from backend.weights.hub import Repository, cache_folder, is_offline
from backend.weights.single import FileSource
from backend.weights.source import on_disk, resolve

DEPTH = 3  # folders below each other that are looked into, the first being `models_dir`
MOST = 5000  # entries of folders that are looked at
CACHED = "models--"  # how the hub's cache calls its folders, which may lie in `models_dir`
STAGES = ("prior", "decoder", "vqgan", "text_encoder")  # of Stable Cascade, whose files hold one network each
ANY = "float32"  # whether files are there is the same in each


@dataclass(frozen=True, kw_only=True)
class Local:
    """A file or folder: `name` is how a request's `checkpoint` names it, `what` it is in words.

    `family` is None for what no picture can be made with, also where it is not what it should be: `problem`
    tells. `note` is what to know of one that can be used.
    """

    name: str
    what: str
    bytes: int
    family: str | None = None
    problem: str = ""
    note: str = ""


class Found(NamedTuple):
    """`cut`: there was more than could be looked at."""

    entries: list[Local]
    cut: bool


class _Told(NamedTuple):
    """What a file's header tells; `lacks` are components that another checkpoint has to give."""

    kind: str | None
    problem: str = ""
    lacks: tuple[str, ...] = ()


def choices(settings: Settings, family: str) -> list[str]:
    """The names to choose a checkpoint from: the catalogue's, then one's own of the family.

    On a public server only what is there of the catalogue.
    """
    if settings.public:
        return here(settings, family)
    own = [each.name for each in found(settings).entries if each.family == family]
    return [*catalog.names(family), *own]


def here(settings: Settings, family: str) -> list[str]:
    """The catalogue's checkpoints that pictures can be made with at once."""
    return [entry.name for entry in catalog.entries(family) if _is_here(settings, entry)]


def refuse_absent(settings: Settings, source: Source, components: Iterable[str], dtype: str) -> None:
    """Raise InvalidRequest where components would have to be downloaded, naming what is there."""
    names = list(components)
    lacking = [name for name in names if not source.present(_prepared(source, name), dtype)]
    if lacking:
        titles = ", ".join(TITLES.get(name, name) for name in lacking)
        what = "which" if lacking == names else f"of which {titles}"
        raise InvalidRequest(
            f"checkpoint is {source.name!r}, {what} is not on this public server, and nothing is downloaded "
            f"here; it can be {', '.join(here(settings, source.family))}"
        )


def found(settings: Settings) -> Found:
    """Checkpoints of one's own: what lies in `models_dir`, and in the hub's cache beside the catalogue's.

    Whatever cannot be used is listed with the reason. Strangers are shown nothing.
    """
    if settings.public:
        return Found([], cut=False)
    look = _Look(settings)
    own = list(look.inside(settings.models_dir, 1)) if settings.models_dir else []
    order = [*catalog.FAMILIES, None]
    entries = sorted([*own, *_downloaded(settings)], key=lambda each: (order.index(each.family), each.name))
    return Found(entries, cut=look.walk.left <= 0)


def weight_files(root: Path) -> list[Path]:
    """The weight files in a folder and below it, but for those of checkpoints' folders."""
    walk, paths, folders = _Walk(), list[Path](), [(root, 1)]
    while folders:
        folder, depth = folders.pop()
        if (folder / INDEX).is_file():
            continue
        found, below = walk.entries(folder)
        paths += found
        folders += [(each, depth + 1) for each in below if depth < DEPTH]
    return sorted(paths)


# ---- files and folders of one's own


class _Walk:
    """Through folders; `left` counts the entries that may still be looked at."""

    def __init__(self) -> None:
        self.left = MOST
        self._seen: set[tuple[int, int]] = set()

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The weight files and the folders in it; none of a folder that was seen, or cannot be read."""
        paths, folders = [], []
        try:
            stat = folder.stat()
            if self.left <= 0 or (stat.st_dev, stat.st_ino) in self._seen:  # links may lead in circles
                return [], []
            self._seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(folder) as entries:
                for entry in islice(entries, self.left):
                    self.left -= 1
                    if entry.name.startswith((".", CACHED)):
                        continue
                    if entry.is_dir():
                        folders.append(folder / entry.name)
                    elif entry.name.endswith(files.WEIGHTS) and (entry.is_file() or entry.is_symlink()):
                        paths.append(folder / entry.name)
        except OSError:
            return [], []
        return sorted(paths), sorted(folders)


class _Look:
    """Looks through `models_dir`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.walk = _Walk()

    def inside(self, folder: Path, depth: int) -> Iterator[Local]:
        """What lies in a folder, and below it."""
        paths, folders = self.walk.entries(folder)
        for path in paths:
            yield self._file(path)
        for each in folders:
            whole = self._whole(each)
            if whole is not None:
                yield whole
            elif depth < DEPTH:
                yield from self.inside(each, depth + 1)

    def _file(self, path: Path) -> Local:
        name = self._name(path)
        return _described(name, path.stat().st_size if path.is_file() else 0, _told_of(path))

    def _whole(self, folder: Path) -> Local | None:
        """A folder that is a checkpoint in itself; None for one with others in it."""
        if (folder / INDEX).is_file():
            return _laid_out(self._name(folder), folder, self.settings)
        for family in catalog.FAMILIES:
            if _may_hold(folder, family):
                try:
                    source = resolve(str(folder), family, self.settings)
                    if not _lacking(source):
                        return _checked(self._name(folder), folder, source, self.settings)
                except TriptychError:  # what is wrong is told of its parts, one by one
                    continue
        return None

    def _name(self, path: Path) -> str:
        """How a request names it: shortest below `models_dir`, if that means nothing else."""
        assert self.settings.models_dir is not None
        short = path.relative_to(self.settings.models_dir).as_posix()
        taken = [entry.name for entry in catalog.CATALOGUE]
        for name in (short, f"./{short}"):
            with suppress(CheckpointError):  # what no request could name so
                where = on_disk(name.strip(), self.settings.models_dir)
                if name not in taken and (where == path.absolute() or not path.exists()):
                    return name
        return str(path)


def _may_hold(folder: Path, family: str) -> bool:
    """Whether a folder without an index looks like one of the family's checkpoints."""
    keys = keys_of(family)
    main = [*keys.LITE, *keys.LITE.values()] or [keys.COMPONENTS[0]]
    if any((folder / name / "config.json").is_file() for name in main):
        return True
    if len(keys.FOLDERS) == 1:
        return False
    if any(islice(folder.glob(f"*/{INDEX}"), 1)):  # its halves
        return True
    paths = islice(folder.glob("*.safetensors"), MOST)  # original files, a network each
    return any(_told_of(path).kind == family for path in paths)


def _laid_out(name: str, folder: Path, settings: Settings, *, remote: bool = False) -> Local:
    """A folder with an index; a `remote` one is that of a repository, which a request names by `name`."""
    size, kind = _size(folder), None
    try:
        index = files.read_json(folder / INDEX)
        kind = kinds.by_index(index)
        if kind is None:
            problem = f"its pipeline is {index.get('_class_name')!r:.80}, which is not known"
            return Local(name=name, what="", bytes=size, problem=problem)
        if kind not in catalog.FAMILIES:
            return Local(name=name, what=kinds.title(kind), bytes=size)
        source = resolve(name if remote else str(folder), kind, settings)
        return _checked(name, folder, source, settings, remote=remote)
    except TriptychError as error:
        what = kinds.title(kind) if kind else ""
        return Local(name=name, what=what, bytes=size, problem=_short(error, folder))


def _checked(name: str, folder: Path, source: Source, settings: Settings, *, remote: bool = False) -> Local:
    """A folder of a family, whose files are whole as far as their headers tell. Raises CheckpointError."""
    lacking = ", ".join(TITLES.get(each, each) for each in _lacking(source))
    note, problem = "", f"it is incomplete: {lacking} cannot be found" if lacking else ""
    if lacking and remote and not is_offline(settings.offline):
        note, problem = "here in part; the rest is downloaded when it is needed", ""
    rows = _needed(source.family)
    for component in [each for row in rows for each in row if source.present([each], ANY)]:
        source.config(component)  # refuses an inpainting UNet
        for path in source.files(component, ANY):
            if path.suffix in files.WEIGHTS:
                problem = problem or _damage(path, *_stamp(path))
    return Local(
        name=name,
        what=kinds.title(source.family),
        bytes=_size(folder),
        family=None if problem else source.family,
        problem=problem,
        note=note,
    )


# ---- single files


def _described(name: str, size: int, told: _Told) -> Local:
    what = kinds.title(told.kind) if told.kind else ""
    if told.problem:
        return Local(name=name, what=what, bytes=size, problem=told.problem)
    family = told.kind if told.kind in catalog.FAMILIES else None
    titles = ", ".join(TITLES.get(each, each) for each in told.lacks)
    note = f"without {titles}: set config_from to a checkpoint that has the rest"
    return Local(name=name, what=what, bytes=size, family=family, note=note if told.lacks else "")


def _told_of(path: Path) -> _Told:
    try:
        return _told(path, *_stamp(path))
    except OSError as error:  # gone meanwhile, or a link to nothing
        return _Told(None, f"it cannot be read: {error.strerror or error}")


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change, so that what changed is looked at anew."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=MOST)
def _damage(path: Path, size: int, changed_ns: int) -> str:
    """What is wrong with a weight file, as far as its header tells; "" for a sound one."""
    try:
        if path.suffix in files.HEADED:
            files.shapes(path)
    except CheckpointError as error:
        return _short(error, path, path.name)
    return ""


@lru_cache(maxsize=MOST)
def _told(path: Path, size: int, changed_ns: int) -> _Told:
    kind = None
    try:
        if path.suffix not in files.HEADED:
            return _told_pickle(path)
        shapes = files.shapes(path)
        kind = kinds.by_tensors(shapes)
        kind = kind or next((each for each in catalog.FAMILIES if keys_of(each).is_part(shapes)), None)
        if kind is None:
            some = ", ".join(islice(shapes, 3))
            return _Told(None, f"it is of an unknown kind; its first tensors are called {some:.120}")
        if kind not in catalog.FAMILIES:
            return _Told(kind)
        return _Told(kind, lacks=tuple(_lacking(FileSource(path.name, kind, [path], None, None))))
    except CheckpointError as error:
        return _Told(kind, _short(error, path))


def _told_pickle(path: Path) -> _Told:
    pickle = pickles.look(path)
    kind = kinds.by_tensors(pickle.texts)
    if more := pickle.more_than_weights:
        named = ", ".join(call.replace(" ", ".") for call in more[:2])
        return _Told(
            kind,
            f"it is a pickle that holds more than weights ({named:.120}), so reading it could run "
            "somebody's code. Take the .safetensors version of it",
        )
    return _Told(kind, "" if kind else "it is a pickle of an unknown kind")


# ---- what is there


def _is_here(settings: Settings, entry: catalog.CatalogueEntry) -> bool:
    try:
        return not _lacking(resolve(entry.name, entry.family, settings))
    except TriptychError:
        return False


def _needed(family: str) -> list[tuple[str, ...]]:
    """What no picture can be made without: components, of each row one."""
    keys = keys_of(family)
    return [alternatives(keys, name) for name in keys.REQUIRED or STAGES]


def _lacking(source: Source) -> list[str]:
    """What is needed and not on this machine."""
    rows = _needed(source.family)
    return [row[0] for row in rows if not any(source.present([name], ANY) for name in row)]


def _prepared(source: Source, component: str) -> list[str]:
    """The component and what prepares its input."""
    companion = companion_of(component)
    return [component, companion] if companion and source.has(companion) else [component]


def _downloaded(settings: Settings) -> Iterator[Local]:
    """What else lies in the hub's cache, as far as pictures are made with it."""
    known = {name for entry in catalog.CATALOGUE for name in entry.repositories}
    for root in islice(sorted(cache_folder(settings.models_dir).glob(f"{CACHED}*--*")), MOST):
        name = root.name.removeprefix(CACHED).replace("--", "/")
        repository = Repository(name, cache=settings.models_dir)
        folder = repository.cached() if name not in known else None
        if folder is None:
            continue
        if (folder / INDEX).is_file():
            yield _laid_out(name, folder, settings, remote=True)
            continue
        for path in sorted(folder.glob("*")):
            told = _told_of(path) if path.name.endswith(files.WEIGHTS) else _Told(None)
            if told.kind in catalog.FAMILIES:
                yield _described(f"{repository.page}/blob/main/{path.name}", path.stat().st_size, told)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; links count as what they lead to."""
    paths = (path for path in islice(folder.rglob("*"), MOST) if path.is_file())
    return sum(path.stat().st_size for path in paths)


def _short(error: Exception, path: Path, name: str = "it") -> str:
    """An error's text, where the page has the name already."""
    return str(error).replace(str(path), name)
