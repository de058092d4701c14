"""The audit log: one JSON object a verdict, whole lines only, rotated; texts only if asked.

Policies of ``fsync``: ``never`` (a crash of the process loses nothing, one of the machine loses
what the kernel had not written), ``interval`` (at most a second of lines) and ``always`` (nothing:
each line is on the disk before its verdict leaves).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from latentguard.prompts import Prompt
from latentguard.serve.faults import Unlogged
from latentguard.serve.options import Fsync

INTERVAL = 1.0
"""Seconds between two fsyncs of policy ``interval``."""


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
            OSError: if it cannot be opened.
        """
        self.path, self.max_bytes, self.keep = Path(path), max_bytes, keep
        self.fsync, self.texts, self.lost = fsync, texts, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._salt = _salt(self.path.with_name(f"{self.path.name}.salt"))
        self._lock, self._synced = threading.Lock(), monotonic()
        self._open()

    def digest(self, prompt: Prompt) -> str:
        """What names a prompt in the log: equal for equal prompts, and no use without the salt."""
        turns = [[turn.role, turn.content] for turn in prompt.history]
        said = json.dumps([turns, prompt.text]).encode()
        return hmac.new(self._salt, said, hashlib.sha256).hexdigest()[:32]

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append a line for each record, all or none.

        Raises:
            Unlogged: if the disk does not take them.
        """
        data = "".join(f"{json.dumps(record)}\n" for record in records).encode()
        with self._lock:
            try:
                if self._size and self._size + len(data) > self.max_bytes:
                    self._rotate()
                self._append(data)
            except OSError as error:
                self.lost += len(records)
                raise Unlogged(f"The audit log cannot be written ({error.strerror}).") from error

    def close(self) -> None:
        """Force everything to the disk."""
        with self._lock, contextlib.suppress(OSError):
            os.fsync(self._file)
            os.close(self._file)

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = _whole(self._file)

    def _append(self, data: bytes) -> None:
        try:
            written = os.write(self._file, data)
            if written < len(data):
                raise OSError(28, "no space left for a whole line")
            now = monotonic()
            if self.fsync == "always" or (
                self.fsync == "interval" and now - self._synced > INTERVAL
            ):
                os.fsync(self._file)
                self._synced = now
        except OSError:
            with contextlib.suppress(OSError):  # a device cannot be cut
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def _rotate(self) -> None:
        older = [self.path.with_name(f"{self.path.name}.{n}") for n in range(1, self.keep + 1)]
        os.fsync(self._file)
        if not older:
            os.ftruncate(self._file, 0)
            self._size = 0
            return
        for source, target in reversed(list(zip([self.path, *older], older, strict=False))):
            if source.exists():
                source.replace(target)
        full = self._file
        self._open()
        os.close(full)


def _whole(file: int) -> int:
    """Cut a torn last line off, and say how long the rest is."""
    size = end = os.fstat(file).st_size
    while end and os.pread(file, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(file, end)
    return end


def _salt(path: Path) -> bytes:
    """The salt of this log, made at random the first time; readable by the owner alone."""
    if not path.exists():
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as salt:
            salt.write(secrets.token_hex(32))
    found = path.read_text("ascii").strip()
    if len(found) < 32:
        raise OSError(f"{path} holds no salt; remove it to have a new one made.")
    return bytes.fromhex(found)
