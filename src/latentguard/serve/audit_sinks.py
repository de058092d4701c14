"""Where audit lines go: a rotated file, a pipe, standard output, syslog, or a collector.

A file is only ever appended to, so that ``logrotate`` may move it (then ``reopen``, by SIGHUP) or
copy and truncate it. A pipe whose reader is slow makes writers wait, and then fail.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
from pathlib import Path
from time import monotonic
from typing import Protocol

from latentguard.serve.audit_otlp import OtlpSink

FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND

PIPE_SECONDS = 5.0
"""So long a pipe may take none of a line."""

SYSLOG = "/dev/log"

SYSLOG_BYTES = 8192
"""Of one message; longer ones are refused, since most syslogs would cut them."""

PRIORITY = b"<134>latentguard: "
"""Facility local0, severity informational."""


class Sink(Protocol):
    """Takes lines, whole or not at all."""

    may_block: bool
    """Whether a write can take long, so that it is not done on the event loop."""

    def append(self, data: bytes) -> None:
        """Write lines.

        Raises:
            OSError: if they cannot be written; none is left in part.
        """

    def sync(self) -> None:
        """Force what was written to the disk."""

    def reopen(self) -> None:
        """Begin anew at the same place, as after a rotation by others."""

    def close(self) -> None:
        """Let go."""


class FileSink:
    """A regular file, readable by its owner alone, rotated once it is large."""

    may_block = False

    def __init__(self, path: Path, *, max_bytes: int, keep: int) -> None:
        """Open or create the file; a torn last line, of a killed process, is cut off.

        Args:
            path: The file; older ones are ``PATH.1`` (the newest) to ``PATH.keep``.
            max_bytes: When it is rotated; 0 leaves that to others.
            keep: How many older files are kept.

        Raises:
            OSError: if it cannot be opened.
        """
        self.path, self.max_bytes, self.keep = path, max_bytes, keep
        self._file = self._open()

    def append(self, data: bytes) -> None:
        """See ``Sink``."""
        size = os.fstat(self._file).st_size  # others may have truncated it
        if self.max_bytes and size and size + len(data) > self.max_bytes:
            self._rotate()
            size = 0
        try:
            if os.write(self._file, data) < len(data):
                raise OSError(28, "no space left for a whole line")
        except OSError:
            self._cut(size)
            raise

    def sync(self) -> None:
        """See ``Sink``."""
        os.fsync(self._file)

    def duplicate(self) -> int:
        """The file once more, to be forced to the disk while lines go on; the caller closes it."""
        return os.dup(self._file)

    def reopen(self) -> None:
        """See ``Sink``."""
        fresh = self._open()
        os.close(self._file)
        self._file = fresh

    def close(self) -> None:
        """See ``Sink``."""
        with contextlib.suppress(OSError):
            os.fsync(self._file)
            os.close(self._file)

    def _open(self) -> int:
        file = os.open(self.path, FLAGS, 0o600)
        make_private(file)
        _cut_torn_line(file)
        return file

    def _cut(self, size: int) -> None:
        """Take back what was written of a line; never make the file longer."""
        with contextlib.suppress(OSError):  # a device cannot be cut
            if os.fstat(self._file).st_size > size:
                os.ftruncate(self._file, size)

    def _rotate(self) -> None:
        """Begin a new file; nothing moves until there is one, so that a full disk costs no file."""
        os.fsync(self._file)
        fresh = self._beside("new")
        older = [self._beside(n) for n in range(1, self.keep + 1)]
        file = os.open(fresh, FLAGS | os.O_TRUNC, 0o600)
        for source, target in reversed(list(zip([self.path, *older], older, strict=False))):
            if source.exists():
                source.replace(target)
        fresh.replace(self.path)
        os.close(self._file)
        self._file = file

    def _beside(self, suffix: str | int) -> Path:
        return self.path.with_name(f"{self.path.name}.{suffix}")


class StreamSink:
    """A pipe, a terminal or standard output."""

    may_block = True

    def __init__(self, path: Path | None) -> None:
        """Open a path, or take standard output.

        Raises:
            OSError: if it cannot be opened, as a pipe that nobody reads.
        """
        self._path = path
        self._file = self._open()
        self._begun = b""
        """What is left of a line that was begun; it goes before the next."""

    def append(self, data: bytes) -> None:
        """See ``Sink``; a line that was begun is finished later, or the stream is of no use."""
        deadline = monotonic() + PIPE_SECONDS
        data = self._begun + data
        is_begun = bool(self._begun)
        while data:
            _, ready, _ = select.select([], [self._file], [], max(deadline - monotonic(), 0))
            if not ready:
                self._begun = data[: data.index(b"\n") + 1] if is_begun else b""
                raise TimeoutError(110, "nobody reads the pipe")
            with contextlib.suppress(BlockingIOError):
                size = os.write(self._file, data[: select.PIPE_BUF])
                is_begun = data[size - 1 : size] != b"\n"
                data = data[size:]
        self._begun = b""

    def sync(self) -> None:
        """See ``Sink``; there is nothing to force."""

    def reopen(self) -> None:
        """See ``Sink``."""
        fresh = self._open()
        os.close(self._file)
        self._file = fresh
        self._begun = b""

    def close(self) -> None:
        """See ``Sink``."""
        os.close(self._file)

    def _open(self) -> int:
        if self._path is None:
            return os.dup(1)
        return os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)


class SyslogSink:
    """The machine's syslog, a datagram for each line."""

    may_block = True

    def __init__(self, address: str = SYSLOG) -> None:
        """Connect.

        Raises:
            OSError: if nobody listens.
        """
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(PIPE_SECONDS)
        self._socket.connect(address)

    def append(self, data: bytes) -> None:
        """See ``Sink``."""
        messages = [PRIORITY + line for line in data.splitlines()]
        if longest := max((len(m) for m in messages if len(m) > SYSLOG_BYTES), default=0):
            raise OSError(
                errno.EMSGSIZE,
                f"a line of {longest:,} bytes is too long for the syslog, which takes "
                f"{SYSLOG_BYTES:,}; leave --audit-texts out, or write to a file",
            )
        for message in messages:
            self._socket.sendto(message, self._address)

    def sync(self) -> None:
        """See ``Sink``; there is nothing to force."""

    def reopen(self) -> None:
        """See ``Sink``; each line finds its way anew, as after a restart of the syslog."""

    def close(self) -> None:
        """See ``Sink``."""
        self._socket.close()


def sink_of(target: str, *, max_bytes: int, keep: int) -> Sink:
    """The sink that a target names: ``-``, ``syslog``, a URL, a pipe or device, else a file.

    Raises:
        OSError: if it cannot be opened.
    """
    if target == "-":
        return StreamSink(None)
    if target == "syslog":
        return SyslogSink()
    if is_collector(target):
        return OtlpSink(target)
    path = Path(target)
    if path.exists() and not (path.is_file() or path.is_char_device()):
        return StreamSink(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileSink(path, max_bytes=max_bytes, keep=keep)


def is_collector(target: str) -> bool:
    """Whether a target is the URL of an OpenTelemetry collector."""
    return target.startswith(("http://", "https://"))


def require_writable(target: str) -> None:
    """Check that a target can be opened, without taking it from a service that writes it.

    Raises:
        OSError: if it cannot; says why.
    """
    if target == "-":
        return
    if target == "syslog":
        SyslogSink().close()
        return
    if is_collector(target):
        with contextlib.closing(OtlpSink(target)) as collector:
            collector.require_reachable()
        return
    path = Path(target)
    if path.is_dir():
        raise IsADirectoryError(f"The audit log {target} is a folder; name a file in it.")
    nearest = path if path.exists() else next(p for p in path.parents if p.exists())
    if not os.access(nearest, os.W_OK) or (nearest != path and not nearest.is_dir()):
        raise PermissionError(
            f"The audit log {target} cannot be written: {nearest} is not writable."
        )


def make_private(file: int) -> None:
    """Take from a regular file what rights others have.

    Raises:
        OSError: if it belongs to somebody else.
    """
    state = os.fstat(file)
    if stat.S_ISREG(state.st_mode) and state.st_mode & 0o077:
        os.fchmod(file, 0o600)


def _cut_torn_line(file: int) -> None:
    size = end = os.fstat(file).st_size
    while end and os.pread(file, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(file, end)
