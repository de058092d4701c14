"""The audit log: one JSON object a verdict, whole lines only; texts only if asked.

Requests that were refused before there was a verdict have a log of their own beside the first, so
that nobody can flush the history of verdicts with them; it never holds texts.

Policies of ``fsync``: ``never`` (a crash of the process loses nothing, one of the machine loses
what the kernel had not written), ``interval`` (at most a second of lines; a thread sees to it) and
``always`` (nothing: each line is on the disk before its verdict leaves).
"""

from __future__ import annotations

import contextlib
import errno
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
from time import monotonic
from typing import Any

from latentguard.prompts import Prompt
from latentguard.serve.audit_sinks import FileSink, Sink, make_private, sink_of
from latentguard.serve.config import Fsync
from latentguard.serve.errors import AuditUnavailable

log = logging.getLogger("latentguard.serve")

INTERVAL = 1.0
"""Seconds between two fsyncs of policy ``interval``."""

REST_SECONDS = 1.0
"""So long nothing is tried after a pipe or a collector took no line in time: who waits for one
keeps all others waiting."""

REJECTED_SHARE = 8
"""The log of refused requests is rotated at this part of the size of the other."""


class AuditLog:
    """Appends lines; one that cannot be written whole leaves no trace."""

    def __init__(
        self,
        target: str | Path,
        *,
        max_bytes: int = 64 << 20,
        keep: int = 10,
        fsync: Fsync = "interval",
        texts: bool = False,
        salt: Path | None = None,
    ) -> None:
        """Open or create the log.

        Args:
            target: A file; a pipe; ``-`` for standard output; ``syslog``; or the URL of an
                OpenTelemetry collector.
            max_bytes: When a file is rotated; 0 leaves that to others.
            keep: How many older files are kept.
            fsync: When lines are forced to the disk.
            texts: Whether prompts are written too.
            salt: The file with the salt; beside a file by default, else made for this process.

        Raises:
            OSError: if it cannot be opened, or another process writes it.
        """
        self.fsync, self.texts, self.lost = fsync, texts, 0
        self.is_failing = False
        """Whether the last line could not be written."""

        self.sink = sink_of(str(target), max_bytes=max_bytes, keep=keep)
        self._rejected: Sink = self.sink
        is_file = isinstance(self.sink, FileSink)
        if salt is None and is_file:
            salt = Path(f"{target}.salt")
        self._owner: int | None = None
        self._salt = secrets.token_bytes(32)
        if salt is not None:
            self._owner, self._salt = _salt(salt)
        if is_file:
            rejected = f"{target}.rejected"
            self._rejected = sink_of(rejected, max_bytes=max_bytes // REJECTED_SHARE, keep=1)
        self._lock, self._closed, self._is_dirty = threading.Lock(), threading.Event(), False
        self._rests_until = -REST_SECONDS
        if fsync == "interval" and is_file:
            threading.Thread(target=self._keep_synced, name="audit", daemon=True).start()

    @property
    def may_block(self) -> bool:
        """Whether a write can take long, so that it is not done on the event loop."""
        return self.fsync == "always" or self.sink.may_block

    def digest(self, prompt: Prompt) -> str:
        """What names a prompt in the log: equal for equal prompts, and no use without the salt."""
        turns = [[turn.role, turn.content] for turn in prompt.history]
        content = json.dumps([turns, prompt.text]).encode()
        return hmac.new(self._salt, content, hashlib.sha256).hexdigest()[:32]

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append a line for each record, all or none.

        Raises:
            AuditUnavailable: if they cannot be written.
        """
        with self._lock:
            try:
                self._append(self.sink, records)
            except OSError as error:
                self.lost += len(records)
                self.is_failing = True
                self._rest_after(error)
                raise AuditUnavailable(
                    f"The audit log cannot be written ({error.strerror})."
                ) from error
            self.is_failing = False

    def reject(self, record: Mapping[str, Any]) -> None:
        """Append a line for a refused request; one that cannot be written is only counted."""
        with self._lock:
            try:
                self._append(self._rejected, [record])
            except OSError as error:
                self.lost += 1
                self._rest_after(error)

    def reopen(self) -> None:
        """Begin anew at the same places, as after a rotation by others.

        Raises:
            OSError: if they cannot be opened; the old ones go on.
        """
        with self._lock:
            self._rests_until = -REST_SECONDS
            self.sink.reopen()
            if self._rejected is not self.sink:
                self._rejected.reopen()

    def close(self) -> None:
        """Force everything to the disk, and let another process write."""
        self._closed.set()
        with self._lock:
            self.sink.close()
            if self._rejected is not self.sink:
                self._rejected.close()
            if self._owner is not None:
                os.close(self._owner)

    def _append(self, sink: Sink, records: Sequence[Mapping[str, Any]]) -> None:
        if monotonic() < self._rests_until:
            raise OSError(errno.EAGAIN, "the last line was not taken")
        data = "".join(f"{json.dumps(record)}\n" for record in records).encode()
        sink.append(data)
        if self.fsync == "always":
            sink.sync()
        self._is_dirty = True

    def _rest_after(self, error: OSError) -> None:
        if isinstance(error, TimeoutError):
            self._rests_until = monotonic() + REST_SECONDS

    def _keep_synced(self) -> None:
        """Force lines to the disk now and then."""
        while not self._closed.wait(INTERVAL):
            with self._lock:
                if not self._is_dirty or self._closed.is_set():
                    continue
                self._is_dirty = False
                assert isinstance(self.sink, FileSink)
                file = self.sink.duplicate()
            try:
                os.fsync(file)
            except OSError as error:
                log.error("The audit log cannot be forced to the disk: %s", error.strerror)
            finally:
                os.close(file)


def _salt(path: Path) -> tuple[int, bytes]:
    """The salt of a log, made at random the first time; readable by the owner alone.

    Its file stays open and locked, so that no second process cuts or rotates the same log.

    Raises:
        OSError: if another process has it, or it holds something else.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        make_private(file)
        if not os.fstat(file).st_size:
            os.write(file, secrets.token_hex(32).encode())
        return file, _parsed_salt(os.pread(file, 1024, 0), path)
    except BlockingIOError:
        os.close(file)
        raise OSError(f"Another process writes {path.stem}; give each a log of its own.") from None
    except OSError:
        os.close(file)
        raise


def _parsed_salt(content: bytes, path: Path) -> bytes:
    with contextlib.suppress(ValueError):
        salt = bytes.fromhex(content.decode("ascii").strip())
        if len(salt) >= 16:
            return salt
    raise OSError(
        f"{path} holds no salt: expected at least 32 hexadecimal digits. Remove it to have a new "
        "one made; prompts then get other names."
    )
