"""Hub repositories: what lies in the cache, what they hold, and downloads that resume.

The cache is the hub library's own, so other programs find what is downloaded here, and the other way round.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from backend.errors import AccessError, CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

SMALL = 16 * 2**20  # bytes: files up to here are not worth resuming
INTERVAL = 0.2  # seconds between two reports of progress
ATTEMPTS = 5  # in a row without a byte
TOKEN = "a token in the environment variable HF_TOKEN, or by `hf auth login`"
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
LISTED = "triptych-files.json"  # beside a repository's files in the cache: what it held when last asked
CHUNK = 2**20  # bytes read at a time for a checksum


class Listed(NamedTuple):
    """A file as a repository lists it: its size in bytes, and the name of its content in the cache."""

    size: int
    etag: str


@dataclass(frozen=True)
class Repository:
    """A model repository at a revision; `cache` is the hub cache's folder, None for its usual place."""

    name: str
    revision: str = "main"
    cache: Path | None = None
    offline: bool = False

    @property
    def page(self) -> str:
        return f"{_endpoint()}/{self.name}"

    def cached(self) -> Path | None:
        """The folder with the files that are downloaded, None before there are any."""
        root = self._root()
        reference = root / "refs" / self.revision
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else self.revision
        folder = root / "snapshots" / commit
        return folder if folder.is_dir() else None

    def listing(self) -> dict[str, Listed]:
        """Every file in the repository. Raises AccessError."""
        from huggingface_hub import HfApi

        with self._explained():
            info = HfApi(endpoint=_endpoint()).model_info(
                self.name, revision=self.revision, files_metadata=True, timeout=_timeout()
            )
        return {
            file.rfilename: Listed(file.size or 0, (file.lfs.sha256 if file.lfs else file.blob_id) or "")
            for file in info.siblings or []
        }

    def remember(self, listing: Mapping[str, Listed]) -> None:
        """Keep the listing, so that it can be told later, without the hub, how much is downloaded."""
        path = self._root() / LISTED
        text = json.dumps({"revision": self.revision, "files": listing})
        with suppress(OSError):  # nothing depends on it but what is told
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(text, encoding="utf-8")
            path.with_suffix(".tmp").replace(path)

    def known(self) -> dict[str, Listed]:
        """The files as they were listed last, {} before that; asks no hub."""
        try:
            kept = json.loads((self._root() / LISTED).read_text(encoding="utf-8"))
            files = kept["files"].items() if kept["revision"] == self.revision else ()
            return {str(name): Listed(int(size), str(etag)) for name, (size, etag) in files}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return {}

    def here(self, file: str, listed: Listed) -> int:
        """How many bytes of a file are downloaded."""
        folder, blob = self.cached(), self._root() / "blobs" / listed.etag
        if (folder is not None and (folder / file).is_file()) or (listed.etag and blob.is_file()):
            return listed.size
        part = _part_of(blob)
        return min(part.stat().st_size, listed.size) if listed.etag and part.is_file() else 0

    def begun(self) -> bool:
        """Whether a file is half downloaded."""
        return any((self._root() / "blobs").glob("*.part"))

    def remove(self) -> int:
        """Delete what is downloaded of it, every revision → the bytes that were freed. Raises OSError."""
        root = self._root()
        files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
        size = sum(path.stat().st_size for path in files)
        if root.is_dir():
            shutil.rmtree(root)
        shutil.rmtree(root.parent / ".locks" / root.name, ignore_errors=True)
        return size

    def download(self, file: str, size: int) -> Iterator[int]:
        """Download one file into the cache, yielding the bytes that are there; resumes what was broken off.

        Raises AccessError, and CheckpointError where the disk is full or the file arrives damaged.
        """
        from huggingface_hub import hf_hub_download

        with self._explained(file):
            if size > SMALL:
                yield from self._resume(file)
            path = hf_hub_download(
                self.name,
                file,
                revision=self.revision,
                cache_dir=self.cache,
                endpoint=_endpoint(),
                tqdm_class=_without_bar(),
            )
            if size <= SMALL:
                _check_small(Path(path), file)
        yield size

    def _resume(self, file: str) -> Iterator[int]:
        """Put the content where `hf_hub_download` looks first; on its own it discards broken downloads."""
        import httpx2
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import WeakFileLock

        url = hf_hub_url(self.name, file, revision=self.revision, endpoint=_endpoint())
        meta = get_hf_file_metadata(url, timeout=_timeout())
        if meta.etag is None or meta.size is None or meta.commit_hash is None:
            return  # a mirror that does not say enough: the library tries in its own way
        url = hf_hub_url(self.name, file, revision=meta.commit_hash, endpoint=_endpoint())
        blob = self._root() / "blobs" / meta.etag
        part = _part_of(blob)
        part.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(part.with_name(part.name + ".lock")):
            failures = 0
            while not blob.exists():
                have = part.stat().st_size if part.exists() else 0
                if have >= meta.size:
                    yield from _accept(part, blob, meta.size, file)
                    break
                free = shutil.disk_usage(part.parent).free
                if free < meta.size - have:
                    raise CheckpointError(
                        f"{file} needs {(meta.size - have) / 1e9:.1f} GB more in {part.parent}, "
                        f"where {free / 1e9:.1f} GB are free"
                    )
                try:
                    yield from _continue(url, part, have)
                except httpx2.TransportError:
                    failures = 0 if part.exists() and part.stat().st_size > have else failures + 1
                    if failures == ATTEMPTS:
                        raise
                    time.sleep(0.2 * 2**failures)

    def _root(self) -> Path:
        return cache_folder(self.cache) / f"models--{self.name.replace('/', '--')}"

    @contextmanager
    def _explained(self, file: str | None = None) -> Generator[None]:
        """Say in our own words what a hub's refusal means and what helps."""
        import httpx2
        from huggingface_hub import errors

        if is_offline(self.offline):
            what = f"{self.name}: {file}" if file else self.name
            raise AccessError(f"{what} is not downloaded, and downloads are off (--offline)")
        try:
            yield
        except errors.GatedRepoError as error:
            raise self._gated(error) from error
        except errors.RepositoryNotFoundError as error:
            raise AccessError(
                f"{self.name} does not exist on {_endpoint()}, or is private; check its name, or give {TOKEN}"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise AccessError(f"{self.name} has no revision {self.revision}; see {self.page}") from error
        except errors.EntryNotFoundError as error:
            if isinstance(error, errors.LocalEntryNotFoundError):
                cause = error.__cause__  # the library takes some refusals for a lost connection
                refused = isinstance(cause, errors.HfHubHTTPError)
                raise (self._refused(cause) if refused else self._unreachable(error)) from error
            raise AccessError(f"{self.name} has no file {file}; see {self.page}") from error
        except errors.HfHubHTTPError as error:
            raise self._refused(error) from error
        except (httpx2.HTTPError, errors.OfflineModeIsEnabled) as error:
            raise self._unreachable(error) from error
        except errors.HFValidationError as error:
            raise InvalidRequest(f"checkpoint is {self.name!r}; a hub repository is OWNER/NAME") from error
        except OSError as error:
            raise CheckpointError(
                f"{self.name} cannot be kept in {self._root()}: {error.strerror or error}"
            ) from error

    def _gated(self, error: GatedRepoError) -> AccessError:
        from huggingface_hub import get_token

        if error.response.status_code == 403 and get_token() is not None:
            return AccessError(
                f"{self.name} is gated, and the token given may not read it: visit {self.page}, accept its "
                "licence there with the account that the token is of, and if it is a fine-grained token, "
                "allow it to read gated repositories"
            )
        return AccessError(
            f"{self.name} is gated: visit {self.page}, accept its licence there, and give {TOKEN} "
            "that may read gated repositories"
        )

    def _refused(self, error: HfHubHTTPError) -> AccessError:
        status, said = error.response.status_code, error.server_message
        if status in (401, 403):
            return AccessError(
                f"{self.page} refused ({status}): give {TOKEN}, or check what the one given may read"
                f"{f'; it says: {said}' if said else ''}"
            )
        return AccessError(f"{_endpoint()} answered {status} for {self.name}; try again later")

    def _unreachable(self, error: Exception) -> AccessError:
        return AccessError(
            f"{_endpoint()} cannot be reached for {self.name} ({type(error.__cause__ or error).__name__}): "
            "check the network, or use a checkpoint that is on disk"
        )


def pasted_url(text: str) -> tuple[str, str, str | None] | None:
    """Repository, revision and file (None: the whole) that a pasted hub URL means; None if `text` is no URL.

    Raises InvalidRequest for a URL of anything else.
    """
    if not re.match(r"https?://", text, re.IGNORECASE):
        return None
    refused = InvalidRequest(
        f"checkpoint is {text!r}; a URL can be that of a hub repository ({_endpoint()}/OWNER/NAME), "
        "or that of a file in it"
    )
    try:
        parts = urlsplit(text)
    except ValueError:
        raise refused from None
    path = [unquote(piece) for piece in parts.path.split("/") if piece]
    if parts.netloc.lower() not in (*HOSTS, urlsplit(_endpoint()).netloc) or ".." in unquote(parts.path):
        raise refused
    match path:
        case ["datasets" | "spaces" | "api", *_]:
            raise refused
        case [owner, name]:
            return f"{owner}/{name}", "main", None
        case [owner, name, "tree", revision]:
            return f"{owner}/{name}", revision, None
        case [owner, name, "resolve" | "blob", revision, *file] if file:
            return f"{owner}/{name}", revision, None if file == ["model_index.json"] else "/".join(file)
        case _:
            raise refused


def _continue(url: str, part: Path, have: int) -> Iterator[int]:
    """Append what lies behind the first `have` bytes to `part`, yielding its size from time to time."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    told = time.monotonic()
    # the client leaves the token out where a redirect goes to another host
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=_timeout()
    ) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # the server sends the whole again
            have = 0
        with part.open("ab" if have else "wb") as out:
            for chunk in response.iter_bytes():
                out.write(chunk)
                have += len(chunk)
                if time.monotonic() - told >= INTERVAL:
                    told = time.monotonic()
                    yield have


def _accept(part: Path, blob: Path, size: int, file: str) -> Iterator[int]:
    """Let a finished download into the cache if it is whole, yielding its size while that is looked at."""
    if part.stat().st_size == size:
        told = time.monotonic()
        sums = _checksums(blob.name, size)
        with part.open("rb") as content:
            while sums and (chunk := content.read(CHUNK)):
                for each in sums:
                    each.update(chunk)
                if time.monotonic() - told >= INTERVAL:
                    told = time.monotonic()
                    yield size
        if not sums or blob.name in [each.hexdigest() for each in sums]:
            part.replace(blob)
            return
    part.unlink()
    raise _damaged(file)


def _check_small(path: Path, file: str) -> None:
    """Raises CheckpointError for a file in the cache that is not what its name there says."""
    if not path.is_symlink():  # a system without links keeps the content here, and its name nowhere
        return
    blob = path.parent / path.readlink()  # one step: the content itself may be shared under another name
    content = blob.read_bytes()
    sums = _checksums(blob.name, len(content))
    for each in sums:
        each.update(content)
    if sums and blob.name not in [each.hexdigest() for each in sums]:
        path.unlink()
        blob.unlink()
        raise _damaged(file)


def _checksums(etag: str, size: int) -> list[Any]:
    """What may have named a content so: SHA-256 large files, git small ones, a plain SHA-1 some mirrors."""
    kind = len(etag) if re.fullmatch(r"[0-9a-f]+", etag) else 0
    if kind == 64:
        return [hashlib.sha256()]
    sha1 = [hashlib.sha1(start, usedforsecurity=False) for start in (b"blob %d\0" % size, b"")]
    return sha1 if kind == 40 else []


def _damaged(file: str) -> CheckpointError:
    return CheckpointError(f"{file} arrived damaged and was removed; try again")


def _part_of(blob: Path) -> Path:
    """Where a content is kept until it is whole."""
    return blob.with_name(blob.name + ".part")


def cache_folder(models_dir: Path | None) -> Path:
    """The hub cache: `models_dir`, or else its usual place."""
    from huggingface_hub import constants

    return Path(models_dir or constants.HF_HUB_CACHE)


def is_offline(wished: bool) -> bool:
    """Whether downloads are off, by a wish or by the hub library's own switch."""
    from huggingface_hub import constants

    return wished or bool(constants.HF_HUB_OFFLINE)


def has_token() -> bool:
    """Whether there is a token to show to the hub."""
    from huggingface_hub import get_token

    return get_token() is not None


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _timeout() -> float:
    from huggingface_hub import constants

    return constants.HF_HUB_ETAG_TIMEOUT


def _without_bar() -> Any:
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Quiet
