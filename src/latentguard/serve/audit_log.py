"""The audit log: one JSON object a verdict, whole lines only, rotated; texts only if asked.

Policies of ``fsync``: ``never`` (a crash of the process loses nothing, one of the machine loses
what the kernel had not written), ``interval`` (at most a second of lines; a thread sees to it) and
``always`` (nothing: each line is on the disk before its verdict leaves).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentguard.prompts import Prompt
from latentguard.serve.config import Fsync
from latentguard.serve.errors import AuditUnavailable

log = logging.getLogger("latentguard.serve")

INTERVAL = 1.0
"""Seconds between two fsyncs of policy ``interval``."""

FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND


class AuditLog:
    """Appends lines to a file; a line that cannot be written whole leaves no trace in it."""

    def __init__(
        self,
        path: str | Path,
        *,
        max_bytes: int = 64 << 20,
        keep: int = 10,
        fsync: Fsync = "interval",
        texts: bool = False,
    ) -> None:
        """Open or create the log; a torn last line, of a killed process, is cut off.

        Args:
            path: The file; older ones are ``PATH.1`` (the newest) to ``PATH.keep``.
            max_bytes: When it is rotated.
            keep: How many older files are kept.
            fsync: When lines are forced to the disk.
            texts: Whether prompts are written too.

        Raises:
            OSError: if it cannot be opened, or another process writes it.
        """
        self.path, self.max_bytes, self.keep = Path(path), max_bytes, keep
        self.fsync, self.texts, self.lost = fsync, texts, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._owner, self._salt = _salt(self._beside("salt"))
        self._lock, self._closed, self._dirty = threading.Lock(), threading.Event(), False
        self._file = os.open(self.path, FLAGS, 0o600)
        self._size = _whole(self._file)
        if fsync == "interval":
            threading.Thread(target=self._keep_synced, name="audit", daemon=True).start()

    def digest(self, prompt: Prompt) -> str:
        """What names a prompt in the log: equal for equal prompts, and no use without the salt."""
        turns = [[turn.role, turn.content] for turn in prompt.history]
        said = json.dumps([turns, prompt.text]).encode()
        return hmac.new(self._salt, said, hashlib.sha256).hexdigest()[:32]

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append a line for each record, all or none.

        Raises:
            AuditUnavailable: if the disk does not take them.
        """
        data = "".join(f"{json.dumps(record)}\n" for record in records).encode()
        with self._lock:
            try:
                if self._size and self._size + len(data) > self.max_bytes:
                    self._rotate()
                self._append(data)
            except OSError as error:
                self.lost += len(records)
                raise AuditUnavailable(
                    f"The audit log cannot be written ({error.strerror})."
                ) from error

    def close(self) -> None:
        """Force everything to the disk, and let another process write."""
        self._closed.set()
        with self._lock, contextlib.suppress(OSError):
            os.close(self._owner)
            os.fsync(self._file)
            os.close(self._file)

    def _beside(self, suffix: str | int) -> Path:
        return self.path.with_name(f"{self.path.name}.{suffix}")

    def _keep_synced(self) -> None:
        """Force lines to the disk now and then; writers do not wait for it."""
        while not self._closed.wait(INTERVAL):
            with self._lock:
                if not self._dirty or self._closed.is_set():
                    continue
                file, self._dirty = os.dup(self._file), False
            try:
                os.fsync(file)
            except OSError as error:
                log.error("The audit log cannot be forced to the disk: %s", error.strerror)
            finally:
                os.close(file)

    def _append(self, data: bytes) -> None:
        try:
            written = os.write(self._file, data)
            if written < len(data):
                raise OSError(28, "no space left for a whole line")
            if self.fsync == "always":
                os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):  # a device cannot be cut
                os.ftruncate(self._file, self._size)
            raise
        self._size, self._dirty = self._size + len(data), True

    def _rotate(self) -> None:
        """Begin a new file; nothing moves until there is one, so that a full disk costs no file."""
        os.fsync(self._file)
        fresh, older = self._beside("new"), [self._beside(n) for n in range(1, self.keep + 1)]
        file = os.open(fresh, FLAGS | os.O_TRUNC, 0o600)
        for source, target in reversed(list(zip([self.path, *older], older, strict=False))):
            if source.exists():
                source.replace(target)
        fresh.replace(self.path)
        os.close(self._file)
        self._file, self._size = file, 0


def _whole(file: int) -> int:
    """Cut a torn last line off, and say how long the rest is."""
    size = end = os.fstat(file).st_size
    while end and os.pread(file, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(file, end)
    return end


def _salt(path: Path) -> tuple[int, bytes]:
    """The salt of this log, made at random the first time; readable by the owner alone.

    Its file stays open and locked, so that no second process cuts or rotates the same log.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(file).st_size:
            os.write(file, secrets.token_hex(32).encode())
        found = os.pread(file, 1024, 0).decode("ascii").strip()
        if len(found) < 32:
            raise OSError(f"{path} holds no salt; remove it to have a new one made.")
        return file, bytes.fromhex(found)
    except BlockingIOError:
        os.close(file)
        raise OSError(f"Another process writes {path.stem}; give each a log of its own.") from None
