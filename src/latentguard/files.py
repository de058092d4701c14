"""Files: written whole or not at all, resumed line by line, one writer at a time."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from latentguard.errors import LatentGuardError


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file, whole and on the disk, or leave the one that is there as it is."""
    write_all_atomic({Path(path): content})


def write_all_atomic(contents: Mapping[Path, str | bytes]) -> None:
    """Write several files; none is replaced before all are on the disk.

    Args:
        contents: What each file is to hold; text is written as UTF-8. They are replaced in this
            order, so the file that makes the others valid comes last.
    """
    partials = {path: _partial_name(path) for path in contents}
    try:
        for path, content in contents.items():
            data = content.encode() if isinstance(content, str) else content
            with partials[path].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, partial in partials.items():
            partial.replace(path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside a file, for a library that writes by name.

    What is written there becomes the file once the block ends; it is removed if the block fails.
    """
    partial = _partial_name(Path(path))
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial_name(path: Path) -> Path:
    """A hidden name that no other process or thread takes."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def append_line(file: TextIO, line: str) -> None:
    """Append a line to an open file at once, so that a killed process loses none before it."""
    file.write(f"{line}\n")
    file.flush()


def read_whole_lines(path: str | Path) -> list[str]:
    """The lines of a file that were written whole; a torn last line is cut off the file.

    No file has no lines.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.decode().splitlines()


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
