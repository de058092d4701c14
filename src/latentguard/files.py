"""Files that several processes may want: one writer at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from latentguard.errors import LatentGuardError


@contextmanager
def exclusive_lock(lock: str | Path, *, output: str | Path) -> Iterator[None]:
    """Hold a lock file while the block runs; it names this process, and is removed at the end.

    On a file system without locks nothing tells whether another run is there, and the block runs.

    Args:
        lock: The lock file; its folder exists.
        output: What is written under this lock; named in the error.

    Raises:
        LatentGuardError: if another run holds the lock (names its process), or the lock file
            cannot be written.
    """
    path = Path(lock)
    with _open_locked(path, output):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _open_locked(path: Path, output: str | Path) -> TextIO:
    """The lock file, open and locked; closing it releases the lock."""
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise LatentGuardError(f"{output} cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            process = f" (process {holder})" if holder else ""
            raise LatentGuardError(
                f"Another run{process} is writing {output}; wait for it, or write elsewhere."
            ) from None
        except OSError:
            return file  # a file system without locks
        if _is_same_file(file, path):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file
        file.close()  # the run before removed it between our opening and our locking


def _is_same_file(file: TextIO, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
