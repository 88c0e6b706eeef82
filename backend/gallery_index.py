"""The index of the pictures, `<home>/history.sqlite`: its tables, how an older index gets them, and what is
asked of it."""

from __future__ import annotations

import sqlite3
import unicodedata
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from backend import infotext

VERSION = 1  # kept as SQLite's own user_version; 0 is the first form of the index, or a new file
LOCK_SECONDS = 5.0
PICTURES = """
CREATE TABLE IF NOT EXISTS pictures (
    id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, created REAL NOT NULL,
    prompt TEXT NOT NULL, parameters TEXT NOT NULL, facts TEXT NOT NULL
)
"""
FURTHER = {  # columns that version 1 added; one of version 0 can still write its rows
    "owner": "TEXT NOT NULL DEFAULT ''",
    "favourite": "INTEGER NOT NULL DEFAULT 0",
    "deleted": "REAL",  # when, in seconds since 1970
    "gone": "INTEGER NOT NULL DEFAULT 0",  # the file is not there, or does not open
    "seen": "TEXT NOT NULL DEFAULT ''",  # size and time of the file when it was found to open
    "family": "TEXT NOT NULL DEFAULT ''",
    "folded": "TEXT NOT NULL DEFAULT ''",  # the prompt, as it is searched
}
LISTED = "deleted IS NULL AND gone = 0"
FURTHER_TABLES = (
    f"CREATE INDEX newest ON pictures (created) WHERE {LISTED}",
    f"CREATE INDEX of_owner ON pictures (owner, created) WHERE {LISTED}",
    f"CREATE INDEX favourites ON pictures (created) WHERE {LISTED} AND favourite = 1",
    "CREATE INDEX doomed ON pictures (deleted) WHERE deleted IS NOT NULL",
    # apart: they are many bytes, which no listing has to pass over
    "CREATE TABLE thumbnails (file TEXT PRIMARY KEY, webp BLOB NOT NULL)",
)
INSERTED = "file, created, prompt, parameters, facts, owner, family, folded, seen"
OWNED = "owner = ? AND owner <> ''"
MOST_WORDS = 16  # of a search


@contextmanager
def reading(index: Path) -> Generator[sqlite3.Connection]:
    """The index, made or brought up to this version where need be. Raises sqlite3.Error."""
    with closing(sqlite3.connect(index, timeout=LOCK_SECONDS, isolation_level=None)) as database:
        if _version(database) < VERSION:
            _migrate(database)
        yield database


@contextmanager
def changing(index: Path) -> Generator[sqlite3.Connection]:
    """The same for changes: all of them, or after an error none."""
    with reading(index) as database, database:
        database.execute("BEGIN IMMEDIATE")
        yield database


def folded(text: str) -> str:
    """Text as it is searched: regardless of case, and of how accents are written, in any script."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def insert(database: sqlite3.Connection, rows: Sequence[tuple[Any, ...]], found: str) -> None:
    """New rows; where one is found already, it is left ("NOTHING") or becomes the new one ("UPDATE")."""
    names = INSERTED.split(", ")
    update = f"UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in names)}"
    database.executemany(
        f"INSERT INTO pictures ({INSERTED}) VALUES ({', '.join('?' * len(names))})"
        f" ON CONFLICT (file) DO {update if found == 'UPDATE' else found}",
        rows,
    )


def where(search: str, owner: str | None, favourites: bool) -> tuple[str, list[Any]]:
    """A condition and its values."""
    words = folded(storable(search)).split()[:MOST_WORDS]
    terms = [LISTED, *["instr(folded, ?)"] * len(words)]
    values: list[Any] = [*words]
    if owner is not None:
        terms.append(OWNED)
        values.append(storable(owner))
    if favourites:
        terms.append("favourite = 1")
    return " AND ".join(terms), values


def storable(text: str) -> str:
    """SQLite takes no half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def _version(database: sqlite3.Connection) -> int:
    return database.execute("PRAGMA user_version").fetchone()[0]


def _migrate(database: sqlite3.Connection) -> None:
    with database:
        database.execute("BEGIN IMMEDIATE")
        if _version(database) >= VERSION:  # another process was faster
            return
        database.execute(PICTURES)
        for name, kind in FURTHER.items():
            database.execute(f"ALTER TABLE pictures ADD COLUMN {name} {kind}")
        for statement in FURTHER_TABLES:
            database.execute(statement)
        rows = database.execute("SELECT prompt, parameters, id FROM pictures").fetchall()
        told = [
            (folded(prompt), infotext.family_of(infotext.parse(text).fields), key)
            for prompt, text, key in rows
        ]
        database.executemany("UPDATE pictures SET folded = ?, family = ? WHERE id = ?", told)
        database.execute(f"PRAGMA user_version = {VERSION}")
