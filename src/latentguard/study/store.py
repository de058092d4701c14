"""Store: what a model did, kept by content hash in one SQLite file, so that no work is done twice.

An entry is written whole or not at all; a killed process loses only what was not yet put.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from latentguard.errors import StudyError

WAIT = 60
"""Seconds to wait for another process that writes."""


class Store:
    """Bytes by key."""

    def __init__(self, path: str | Path) -> None:
        """Open the file, or make it.

        Raises:
            StudyError: if the file is no store, or cannot be opened.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._explain_errors():
            self._base = sqlite3.connect(path, timeout=WAIT)
        try:
            with self._explain_errors():
                self._make()
        except StudyError:
            self._base.close()
            raise

    def get(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The entries that are there, by key.

        Raises:
            StudyError: if the file cannot be read.
        """
        ask = "SELECT value FROM kept WHERE key = ?"
        records = {}
        with self._explain_errors():
            for key in dict.fromkeys(keys):
                if (row := self._base.execute(ask, (key,)).fetchone()) is not None:
                    records[key] = row[0]
        return records

    def has(self, keys: Iterable[str]) -> set[str]:
        """Which of the keys are there.

        Raises:
            StudyError: if the file cannot be read.
        """
        ask = "SELECT 1 FROM kept WHERE key = ?"
        with self._explain_errors():
            return {key for key in set(keys) if self._base.execute(ask, (key,)).fetchone()}

    def put(self, entries: Mapping[str, bytes]) -> None:
        """Keep all of the entries, or none if the process dies.

        An entry that is there stays: what was computed from it must not change under a reader.

        Raises:
            StudyError: if the file cannot be written, such as on a full disk.
        """
        add = "INSERT OR IGNORE INTO kept VALUES (?, ?)"
        with self._explain_errors(), self._base:
            self._base.executemany(add, entries.items())

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def _make(self) -> None:
        with suppress(sqlite3.OperationalError):  # another process that opens it does just this
            self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=NORMAL")
        self._base.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value BLOB)")

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Say which file it is, and what to do: only what is no store may be deleted."""
        try:
            yield
        except sqlite3.ProgrammingError:  # our mistake, not the file's
            raise
        except sqlite3.OperationalError as error:  # locked, full, not writable
            raise StudyError(
                f"The store {self.path} cannot be used ({error}). Look at the disk, and at other "
                "runs with the same --out; then run this again: what is kept stays."
            ) from error
        except sqlite3.DatabaseError as error:
            raise StudyError(
                f"{self.path} is not a store of states and replies ({error}). Delete it to begin "
                "anew, or name another folder with --out."
            ) from error


def key_of(*parts: Any) -> str:
    """SHA-256 of anything that JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
