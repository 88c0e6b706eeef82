"""Pictures on disk: whole or not at all, named so that nobody guesses, and never lost to the index."""

from __future__ import annotations

import errno
import io
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from backend import gallery_index, infotext, png
from backend.errors import StorageError
from backend.gallery import Gallery

PICTURE = Image.linear_gradient("L").convert("RGB")
FACTS = {"prompt": "a red house", "seed": 7}


def test_a_picture_and_its_row(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "home")
    assert not gallery.home.exists()
    assert gallery.entries() == []
    parameters = "a red house 赤い家\nSteps: 20, Seed: 7, Size: 256x256"
    path = gallery.save(PICTURE, parameters, FACTS)
    assert path.parent == tmp_path / "home" / "outputs" / time.strftime("%Y-%m-%d")
    assert re.fullmatch(r"\d{9}-[0-9a-f]{24}\.png", path.name)
    with Image.open(path) as read:
        assert read.info["parameters"] == parameters
        assert read.tobytes() == PICTURE.tobytes()
    (entry,) = gallery.entries()
    assert (entry.file, entry.prompt, entry.parameters, entry.facts) == (
        path,
        "a red house",
        parameters,
        FACTS,
    )
    assert abs(entry.created - time.time()) < 60


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "with \0 null", "🏠\nlines\n"])
def test_any_parameters_text(tmp_path: Path, text: str) -> None:
    path = Gallery(tmp_path).save(PICTURE, text, FACTS)
    with Image.open(path) as read:
        assert read.info["parameters"] == text


def test_listing(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    paths = [gallery.save(PICTURE, "", {"prompt": p}) for p in ("a Red house", "blue sea", "100% red_")]
    assert [entry.file for entry in gallery.entries()] == paths[::-1]
    assert [entry.prompt for entry in gallery.entries("red")] == ["100% red_", "a Red house"]
    assert [entry.prompt for entry in gallery.entries("0% r")] == ["100% red_"]
    assert len(gallery.entries(limit=1)) == 1


def test_threads_share_a_gallery(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda n: gallery.save(PICTURE.copy(), "", {"prompt": f"{n}"}), range(40)))
    assert len(set(paths)) == 40
    assert {entry.file for entry in gallery.entries()} == set(paths)


def _save_ten(home: Path) -> None:
    for _ in range(10):
        Gallery(home).save(PICTURE, "", FACTS)


def test_processes_share_a_home(tmp_path: Path) -> None:
    context = get_context("spawn")
    processes = [context.Process(target=_save_ten, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(Gallery(tmp_path).entries()) == 20


def test_an_unwritable_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file where the folder should be")
    gallery = Gallery(home)
    with pytest.raises(StorageError, match=re.escape(f"cannot write to {home}") + ".*--home"):
        gallery.check()
    with pytest.raises(StorageError, match="cannot write to") as caught:
        gallery.save(PICTURE, "", FACTS)
    assert caught.value.images == (PICTURE,)


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "is full; free some space"), (errno.EACCES, "Permission denied")]
)
def test_a_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    gallery = Gallery(tmp_path)
    gallery.check()

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=message) as caught:
        gallery.save(PICTURE, "", FACTS)
    assert str(gallery.outputs) in str(caught.value)
    assert list(gallery.outputs.rglob("*.p*")) == []  # nothing half-written stays behind
    monkeypatch.undo()
    assert gallery.save(PICTURE, "", FACTS).exists()


def test_check_leaves_nothing_behind(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    gallery.check()
    assert list(gallery.outputs.iterdir()) == []
    assert not gallery.index.exists()


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Any:
        return Path("/dev/full").open("wb")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(StorageError, match="is full"):
        Gallery(tmp_path).check()


def test_a_broken_index_never_loses_the_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gallery = Gallery(tmp_path)
    gallery.index.write_bytes(b"not a database" * 100)
    assert gallery.save(PICTURE, "", FACTS).exists()
    assert "index" in caplog.text
    with pytest.raises(StorageError, match="The pictures are safe"):
        gallery.entries()


def test_a_locked_index_never_loses_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.gallery_index.LOCK_SECONDS", 0.1)
    gallery = Gallery(tmp_path)
    gallery.save(PICTURE, "", FACTS)
    assert len(gallery.entries()) == 1
    with closing(sqlite3.connect(gallery.index)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert gallery.save(PICTURE, "", FACTS).exists()
    assert len(gallery.entries()) == 2  # looked for, as it had no row


def test_half_a_surrogate_pair_is_no_obstacle(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    gallery.save(PICTURE, "", {"prompt": "half \ud83c"})
    assert gallery.entries()[0].prompt == "half ?"


# ---- listing


def fill(gallery: Gallery, count: int, **columns: Any) -> None:
    """Rows without the work of painting; all of them share one picture's file under different names."""
    first = gallery.save(PICTURE, "", FACTS)
    values = {"prompt": "a blue sea", "folded": "a blue sea", "parameters": "", "facts": "{}"} | columns
    names = [f"outputs/{first.parent.name}/{number:06}.png" for number in range(count)]
    for name in names:
        os.link(first, gallery.home / name)
    with gallery_index.changing(gallery.index) as database:
        database.execute("DELETE FROM pictures")
        database.executemany(
            f"INSERT INTO pictures (file, created, {', '.join(values)})"
            f" VALUES (?, ?, {', '.join('?' * len(values))})",
            [(name, 1e9 + number // 10, *values.values()) for number, name in enumerate(names)],
        )
    first.unlink()


def test_pages_follow_one_another(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    fill(gallery, 25)  # ten share a moment: their order must still be one
    everything = [entry.name for entry in gallery.entries()]
    pages = [gallery.entries(limit=10, offset=offset) for offset in (0, 10, 20, 30)]
    assert [entry.name for page in pages for entry in page] == everything
    assert [len(page) for page in pages] == [10, 10, 5, 0]
    assert gallery.count() == 25
    assert gallery.count("sea blue") == 25
    assert gallery.count("red") == 0
    assert gallery.entries(limit=-5, offset=10**30) == []


def steps_of(gallery: Gallery, monkeypatch: pytest.MonkeyPatch, *pages: tuple[str, int, Any]) -> list[int]:
    """How many steps of SQLite's machine each page takes, and with it how many rows it looks at."""
    reading, steps = gallery_index.reading, [0]

    @contextmanager
    def counted(index: Path) -> Generator[sqlite3.Connection]:
        with reading(index) as database:
            database.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 1)
            yield database

    monkeypatch.setattr("backend.gallery.reading", counted)
    taken: list[int] = []
    for search, offset, more in pages:
        steps[0] = 0
        assert len(gallery.entries(search, 48, offset, **more)) == 48
        taken.append(steps[0])
    monkeypatch.undo()
    return taken


def test_a_page_reads_only_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[dict[str, Any]] = [{}, {"owner": "me"}, {"favourites": True}]
    pages = [("", 0, more) for more in kinds] + [("sea", 0, {})]
    few, many = Gallery(tmp_path / "few"), Gallery(tmp_path / "many")
    for gallery, count in ((few, 100), (many, 3000)):
        fill(gallery, count, owner="me", favourite=1)
        gallery.count()  # compares with the files once
    of_few, of_many = steps_of(few, monkeypatch, *pages), steps_of(many, monkeypatch, *pages)
    assert of_few == of_many
    (last,) = steps_of(many, monkeypatch, ("", 2952, {}))
    assert last - of_many[0] < 2952 * 5  # what lies before it is stepped over in the index, a few steps a row


def test_search_knows_no_case_in_any_script(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    prompts = ["Ein ÄRGER in der Straße", "КРАСНЫЙ дом", "Caf\u00e9 (composed)", "赤い家"]
    for prompt in prompts:
        gallery.save(PICTURE, "", {"prompt": prompt})
    for search, prompt in zip(("ärger STRASSE", "красный ДОМ", "CAFE\u0301", "赤い"), prompts, strict=True):
        assert [entry.prompt for entry in gallery.entries(search)] == [prompt], search
        assert gallery.count(search) == 1
    assert gallery.count("ärger sea") == 0  # every word counts
    assert gallery.count("half \ud83c") == 0
    assert gallery.count("a " * 100_000) == 2  # no matter how often it is said


def test_everybody_has_pictures_of_their_own(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    mine, yours, nobodys = (gallery.save(PICTURE, "", FACTS, owner=who) for who in ("me", "you", ""))
    name = mine.relative_to(gallery.outputs).as_posix()
    assert [entry.file for entry in gallery.entries(owner="me")] == [mine]
    assert [entry.file for entry in gallery.entries(owner="you", search="red")] == [yours]
    assert gallery.entries(owner="") == []  # who is not known has none, nor those of unknown owners
    assert [entry.file for entry in gallery.entries()] == [nobodys, yours, mine]
    assert (gallery.count(owner="me"), gallery.count(owner=""), gallery.count()) == (1, 0, 3)
    assert gallery.owner(name) == "me"
    assert gallery.entry(name, "me") == gallery.entry(name) != None  # noqa: E711
    assert gallery.entry(name, "you") is None
    for change in (
        gallery.delete,
        gallery.undelete,
        lambda *asked: gallery.favourite(asked[0], True, asked[1]),
    ):
        assert not change(name, "you")
        assert not change(name, "")
    assert gallery.owner(name) == "me"


def test_favourites(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    liked, other = (gallery.save(PICTURE, "", {"prompt": p}) for p in ("a red house", "a blue sea"))
    name = liked.relative_to(gallery.outputs).as_posix()
    assert gallery.favourite(name, True)
    assert [(entry.file, entry.favourite) for entry in gallery.entries()] == [(other, False), (liked, True)]
    assert [entry.file for entry in gallery.entries(favourites=True)] == [liked]
    assert gallery.count(favourites=True) == 1
    assert gallery.count("sea", favourites=True) == 0
    assert gallery.favourite(name, False)
    assert gallery.entries(favourites=True) == []
    assert not gallery.favourite("2020-01-01/unheard-of.png", True)


def test_deleted_pictures_can_be_had_back_until_the_next_start(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    kept, lost = (gallery.save(PICTURE, "", FACTS) for _ in range(2))
    names = [file.relative_to(gallery.outputs).as_posix() for file in (kept, lost)]
    gallery.thumbnail(names[1])
    for name in names:
        assert gallery.delete(name)
        assert not gallery.delete(name)
        assert gallery.entry(name) is None
        with pytest.raises(StorageError, match="there is no picture"):
            gallery.thumbnail(name)
    assert (gallery.entries(), gallery.count()) == ([], 0)
    gallery.reconcile()  # of the same start
    assert gallery.undelete(names[0])
    assert not gallery.undelete(names[0])
    assert [entry.file for entry in gallery.entries()] == [kept]
    assert lost.exists()
    after = Gallery(tmp_path)
    assert [entry.file for entry in after.entries()] == [kept]
    assert not lost.exists()
    assert not after.undelete(names[1])
    with gallery_index.reading(gallery.index) as database:
        assert database.execute("SELECT file FROM thumbnails").fetchall() == []


def test_deleted_pictures_go_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = Gallery(tmp_path)
    path = gallery.save(PICTURE, "", FACTS)
    gallery.delete(path.relative_to(gallery.outputs).as_posix())
    gallery.entries()
    assert path.exists()
    monkeypatch.setattr("backend.gallery.KEPT_SECONDS", 0.0)
    gallery.entries()
    assert not path.exists()


@pytest.mark.parametrize(
    "name", ["", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud83c", "%", "x" * 100_000, "' OR 1=1 --"]
)
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    gallery = Gallery(tmp_path)
    gallery.save(PICTURE, "", FACTS)
    assert gallery.entry(name) is None
    assert gallery.owner(name) is None
    assert [gallery.delete(name), gallery.undelete(name), gallery.favourite(name, True)] == [False] * 3
    with pytest.raises(StorageError, match="there is no picture"):
        gallery.thumbnail(name)
    assert gallery.count() == 1


def test_thumbnails(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    path = gallery.save(PICTURE.resize((1024, 512)), "", FACTS)
    name = path.relative_to(gallery.outputs).as_posix()
    thumbnail = gallery.thumbnail(name)
    with Image.open(io.BytesIO(thumbnail)) as small:
        assert (small.format, small.size) == ("WEBP", (320, 160))
    path.write_bytes(b"no picture")
    assert gallery.thumbnail(name) == thumbnail  # made once, kept in the index
    other = gallery.save(PICTURE, "", FACTS)
    other.write_bytes(b"no picture")
    with pytest.raises(StorageError, match="does not open"):
        gallery.thumbnail(other.relative_to(gallery.outputs).as_posix())


# ---- folder and index


def test_files_without_a_row_get_one(tmp_path: Path) -> None:
    """Copied from another home, or saved while the index could not be written."""
    source, gallery = Gallery(tmp_path / "source"), Gallery(tmp_path / "home")
    text = infotext.write("a red house", "", {"Steps": 20, "Seed": 7, "Size": "64x64", "Model": "demo"})
    path = source.save(PICTURE, text, FACTS, owner="me")
    bare = source.save(PICTURE, "", FACTS)
    os.utime(path, (1e9, 1e9))
    os.utime(bare, (2e9, 2e9))
    shutil.copytree(source.outputs, gallery.outputs)
    unnamed, found = gallery.entries()
    assert (unnamed.prompt, unnamed.facts) == ("", {})
    assert (found.name, found.created) == (path.relative_to(source.outputs).as_posix(), 1e9)
    assert (found.prompt, found.parameters, found.family) == ("a red house", text, "sd15")
    assert found.facts["seed"] == 7
    assert found.owner == ""
    assert gallery.entries(owner="me") == gallery.entries(owner="") == []


def test_an_index_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    path = gallery.save(PICTURE, "", FACTS)
    assert len(gallery.entries()) == 1
    gallery.index.unlink()
    assert [entry.file for entry in gallery.entries()] == [path]


def test_what_does_not_open_is_not_listed_and_not_removed(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    good, emptied, cut, missing, same_size = (gallery.save(PICTURE, "", FACTS) for _ in range(5))
    whole = cut.read_bytes()
    folder = good.parent
    (folder / "stranger.png").write_text("no picture at all")
    (folder / "unlisted.png").write_bytes(whole[:-20])
    (folder / "folder.png").mkdir()
    (folder / "pipe.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo.png")
    emptied.write_bytes(b"")
    cut.write_bytes(whole[: len(whole) // 2])
    same_size.write_bytes(bytes(len(whole)))
    missing.unlink()
    after = Gallery(tmp_path)
    after.favourite(good.relative_to(gallery.outputs).as_posix(), True)
    assert [entry.file for entry in after.entries()] == [good]
    assert after.count() == 1
    assert {"stranger.png", "unlisted.png", cut.name} < {file.name for file in folder.iterdir()}
    cut.write_bytes(whole)  # whoever mends it finds it again
    assert {entry.file for entry in Gallery(tmp_path).entries()} == {good, cut}


def test_a_picture_that_is_taken_away_meanwhile_leaves_the_list(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    paths = [gallery.save(PICTURE, "", FACTS) for _ in range(3)]
    assert len(gallery.entries(limit=2)) == 2
    paths[2].unlink()
    assert [entry.file for entry in gallery.entries(limit=2)] == [paths[1], paths[0]]
    assert gallery.count() == 2


def test_half_written_pictures_of_dead_processes_are_removed(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    folder = gallery.save(PICTURE, "", FACTS).parent
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    remains = [
        f".a.png.{dead.pid}.part",
        ".b.png.part",
        ".c.png.999999999.part",
        f".d.png.{os.getpid()}.part",
    ]
    living = [f".e.png.{os.getpid()}.part", f".f.png.{os.getppid()}.part", "mine.part", ".hidden"]
    for name in remains + living:
        (folder / name).write_bytes(b"half a picture")
    began = psutil.Process().create_time()
    os.utime(folder / remains[-1], (began - 60, began - 60))  # of one that had the number before
    gallery.reconcile()
    assert sorted(file.name for file in folder.iterdir() if file.suffix != ".png") == sorted(living)


def test_what_is_found_while_it_is_saved_keeps_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery, other = Gallery(tmp_path), Gallery(tmp_path)
    changing = gallery_index.changing

    @contextmanager
    def late(index: Path) -> Generator[sqlite3.Connection]:
        monkeypatch.undo()
        other.reconcile()  # the file is there, its row is not
        with changing(index) as database:
            yield database

    monkeypatch.setattr("backend.gallery.changing", late)
    gallery.save(PICTURE, "", FACTS, owner="me")
    (entry,) = gallery.entries(owner="me")
    assert (entry.prompt, entry.facts) == ("a red house", FACTS)


def test_thousands_of_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = Gallery(tmp_path)
    fill(gallery, 1200)
    for path in list(gallery.outputs.rglob("*0.png")):
        path.unlink()
    first = Gallery(tmp_path)
    assert first.count() == 1080
    read, asked = png.read, list[Path]()
    monkeypatch.setattr("backend.png.read", lambda file: (asked.append(file), read(file))[1])
    again = Gallery(tmp_path)
    assert again.count() == 1080
    assert len(asked) <= 120  # those that are missing are looked for, the others are as they were


def old_index(gallery: Gallery, paths: list[Path]) -> None:
    """As version 0.1.0 wrote it."""
    gallery.index.unlink(missing_ok=True)
    with closing(sqlite3.connect(gallery.index)) as database, database:
        database.execute(
            "CREATE TABLE pictures (id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, created REAL NOT NULL,"
            " prompt TEXT NOT NULL, parameters TEXT NOT NULL, facts TEXT NOT NULL)"
        )
        database.executemany(
            "INSERT INTO pictures (file, created, prompt, parameters, facts) VALUES (?, ?, ?, ?, ?)",
            [
                (path.relative_to(gallery.home).as_posix(), 1e9 + number, "Ein ÄRGER", text, '{"seed": 7}')
                for number, (path, text) in enumerate(
                    zip(paths, ("x\nSteps: 1, Seed: 1, T5: full", "x\nSteps: 1, Seed: 1"), strict=True)
                )
            ],
        )


def test_an_index_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    old_index(gallery, paths := [gallery.save(PICTURE, "", FACTS) for _ in range(2)])
    entries = Gallery(tmp_path).entries("ärger")
    assert [(e.file, e.family, e.facts, e.created) for e in entries] == [
        (paths[1], "sd15", {"seed": 7}, 1e9 + 1),
        (paths[0], "sd3", {"seed": 7}, 1e9),
    ]
    assert gallery.favourite(entries[0].name, True)
    newest = gallery.save(PICTURE, "", FACTS, owner="me")
    assert [entry.file for entry in gallery.entries()] == [newest, *paths[::-1]]
    with closing(sqlite3.connect(gallery.index)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (gallery_index.VERSION,)


def test_two_processes_bring_it_up_to_date_at_once(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    old_index(gallery, [gallery.save(PICTURE, "", FACTS) for _ in range(2)])
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda _: Gallery(tmp_path).count(), range(16)))
    assert counts == [2] * 16


SAVES = """
import os, sys
from pathlib import Path
from PIL import Image
from backend.gallery import Gallery

picture = Image.effect_noise((128, 128), 90).convert("RGB")
for _ in sys.stdin:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        print("dead", flush=True)
    else:
        gallery, number = Gallery(Path(sys.argv[1])), 0
        while True:
            path = gallery.save(picture, "a\\nSteps: 1, Seed: 1, Size: 8x8", {"prompt": "a"}, owner="me")
            name = path.relative_to(gallery.outputs).as_posix()
            number += 1
            if number == 1:
                print(os.getpid(), flush=True)
            elif number % 2:
                gallery.thumbnail(name)
            elif number % 4:
                gallery.delete(name)
"""


def test_fifty_kills(tmp_path: Path) -> None:
    """Killed while it saves, shrinks and deletes: nothing listed that does not open, nothing on disk that is
    not listed."""
    moments, opened = random.Random(50), set[Path]()
    writer = subprocess.Popen(
        [sys.executable, "-c", SAVES, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert writer.stdin
    assert writer.stdout
    gallery = Gallery(tmp_path)
    with writer:
        for _ in range(50):
            writer.stdin.write("go\n")
            child = int(writer.stdout.readline())
            time.sleep(moments.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            assert writer.stdout.readline() == "dead\n"
            gallery = Gallery(tmp_path)
            gallery.reconcile()
            listed = {entry.file for entry in gallery.entries(limit=10_000)}
            assert listed == {path for path in gallery.outputs.rglob("*") if path.is_file()}
            for path in listed - opened:
                with Image.open(path) as picture:
                    picture.load()
            opened |= listed
        writer.stdin.close()
    assert len(opened) >= 50  # each made at least one
    with closing(sqlite3.connect(gallery.index)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
