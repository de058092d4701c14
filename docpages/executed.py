"""Runs the code blocks of a page, in order, and compares or writes their outputs.

    python -m docpages.executed docs/tutorials/first-guard.md [...]   # writes the outputs anew

A ``text`` block right after a ``python`` or ``bash`` block is its output. A comment on the line
before a block changes what is done with it:

- ``<!-- not run: REASON -->``: it is not run; its commands have to be valid usage all the same.
- ``<!-- until: URL -->``: it is started, and goes on once the URL answers 200.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import urlopen

BLOCK = re.compile(
    r"(?:<!-- (?P<mark>not run|until): (?P<value>.*?) -->\n)?"
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```\n"
    r"(?:\n?^```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
ADDRESS = "127.0.0.1:8400"
"""Where pages say that the service is; it gets a free port."""

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
TOLERANCE = 0.02
"""Numbers may differ by so much, and by this share: processors round differently."""

SECONDS_TO_START = 120


@dataclass(frozen=True)
class Block:
    """One block of code on a page."""

    language: str
    """``python`` or ``bash``."""

    code: str
    """What is run."""

    output: str | None
    """What the page says that it prints; None if it says nothing."""

    mark: str | None
    """``not run``, ``until``, or None."""

    value: str | None
    """The reason, or the URL."""

    span: tuple[int, int]
    """Where its output stands on the page."""


class PageFailed(Exception):
    """A block of a page failed, or printed something else."""


def read_blocks(text: str) -> list[Block]:
    """The blocks of code of a page."""
    return [
        Block(
            language=match["language"],
            code=match["code"],
            output=match["output"],
            mark=match["mark"],
            value=match["value"],
            span=match.span("output"),
        )
        for match in BLOCK.finditer(text)
    ]


def run_page(text: str, folder: Path) -> str:
    """The page with the outputs of this run.

    Args:
        text: Of the page.
        folder: Where its commands run.

    Raises:
        PageFailed: if a block fails.
    """
    with Session(folder, free_address()) as session:
        outputs = [(block, session.run(block)) for block in read_blocks(text)]
    for block, output in reversed(outputs):
        if block.output is not None and output is not None:
            start, end = block.span
            text = f"{text[:start]}{output}{text[end:]}"
    return text


def is_same(one: str, other: str) -> bool:
    """Whether two pages are equal but for the rounding of numbers."""
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    return all(_is_near(float(a), float(b)) for a, b in pairs)


def _is_near(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * max(1.0, abs(one))


class Session:
    """What the blocks of one page share: a folder, names in Python, processes that go on."""

    def __init__(self, folder: Path, address: str) -> None:
        """Prepare.

        Args:
            folder: Where commands run.
            address: What stands for ``ADDRESS``.
        """
        self.folder = folder
        self.address = address
        self.names: dict[str, object] = {"__name__": "__page__"}
        self.processes: list[subprocess.Popen[bytes]] = []
        programs = [str(Path(sys.executable).parent), os.environ["PATH"]]
        self.environment = os.environ | {
            "PATH": os.pathsep.join(programs),
            "COLUMNS": "100",
            "NO_COLOR": "1",
        }

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)

    def run(self, block: Block) -> str | None:
        """What a block prints; None if it is not run, or goes on."""
        code = block.code.replace(ADDRESS, self.address)
        if block.mark == "not run":
            return None
        if block.mark == "until":
            assert block.value is not None
            self.start(code, block.value.replace(ADDRESS, self.address))
            return None
        output = self._python(code) if block.language == "python" else self._bash(code)
        lines = [line.rstrip() for line in output.replace(self.address, ADDRESS).splitlines()]
        return "\n".join(lines).strip("\n") + "\n"

    def _python(self, code: str) -> str:
        printed = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed):
            exec(compile(code, "<page>", "exec"), self.names)
        return printed.getvalue()

    def _bash(self, code: str) -> str:
        ended = subprocess.run(
            ["bash", "-ec", code],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise PageFailed(f"{code}\nended with {ended.returncode}:\n{ended.stderr}")
        return ended.stdout

    def start(self, code: str, url: str) -> None:
        """Start what goes on until the page ends.

        Raises:
            PageFailed: if the URL never answers.
        """
        port = self.address.rpartition(":")[2]
        code = re.sub(r"(latentguard serve [^\n]*)", rf"\1 --port {port}", code)
        log = (self.folder / "service.log").open("wb")
        process = subprocess.Popen(
            ["bash", "-ec", code],
            cwd=self.folder,
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self.processes.append(process)
        if not _answers(url, process):
            raise PageFailed(f"{code}\nis not ready:\n{(self.folder / 'service.log').read_text()}")


def _answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether a URL answers before the process ends, or the time does."""
    end = time.monotonic() + SECONDS_TO_START
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(URLError, ConnectionError), urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return True
        time.sleep(0.3)
    return False


def free_address() -> str:
    """Host and port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def main(pages: Sequence[str]) -> None:
    """Write the outputs of pages anew."""
    for name in pages:
        page = Path(name)
        with TemporaryDirectory() as folder:
            page.write_text(run_page(page.read_text("utf-8"), Path(folder)), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
