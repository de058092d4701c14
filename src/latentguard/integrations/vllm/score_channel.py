"""The way of scores from the engine's worker back to the server: a Unix datagram for each step.

The worker posts before it returns from the step that computed the prompt, so an answer lies in the
channel before the engine can hand out the first token of the reply.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import select
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from latentguard.integrations.vllm.score_request import (
    ScoreRequest,
    ScoreResponse,
    TokenScores,
)

log = logging.getLogger("latentguard.vllm")

LONGEST = 1 << 16
"""Bytes of a datagram; longer ones are sent in parts."""

TOKENS = 256
"""Scores of tokens in one line of a datagram."""

PATIENCE = 2.0
"""Seconds that a worker waits for a full channel; the answer is then lost, and its chat blocked."""


Posted = ScoreResponse | TokenScores
"""What comes through a channel."""


class ScoreChannel:
    """Collects answers; its folder can be entered by this user only."""

    def __init__(self) -> None:
        """Open it."""
        self._folder = Path(tempfile.mkdtemp(prefix="latentguard-"))
        self.path = str(self._folder / "answers")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.socket.setblocking(False)
        self.socket.bind(self.path)

    def key(self) -> str:
        """A new key that nobody can guess."""
        return secrets.token_urlsafe(12)

    def collect(self) -> list[Posted]:
        """What has arrived since the last time, in the order in which it was posted."""
        responses = list[Posted]()
        with contextlib.suppress(BlockingIOError):
            while True:
                responses += map(_posted, json.loads(self.socket.recv(LONGEST)))
        return responses

    @contextlib.contextmanager
    def reading(self) -> Iterator[list[Posted]]:
        """Collect in the background, for as long as something else keeps this thread busy."""
        responses, end = list[Posted](), threading.Event()

        def work() -> None:
            while not end.is_set():
                select.select([self.socket], [], [], 0.05)
                responses.extend(self.collect())

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield responses
        finally:
            end.set()
            thread.join()
            responses.extend(self.collect())

    def close(self) -> None:
        """Close and remove it."""
        self.socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def post(
    answers: Iterable[tuple[ScoreRequest, list[float] | None]],
    tokens: Iterable[tuple[ScoreRequest, TokenScores]] = (),
) -> None:
    """Send responses to their channels; one that is gone or stays full loses them."""
    lines = [(request.channel, [request.key, values]) for request, values in answers]
    lines += [(request.channel, line) for request, own in tokens for line in _token_lines(own)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.settimeout(PATIENCE)
        for path, group in groupby(sorted(lines, key=itemgetter(0)), key=itemgetter(0)):
            own = [line for _, line in group]
            try:
                for datagram in _datagrams(own):
                    out.sendto(datagram, path)
            except OSError as error:
                log.warning("%d answers could not be delivered: %s", len(own), error)


def _datagrams(lines: Sequence[list[Any]]) -> Iterator[bytes]:
    """Lines as JSON lists, each short enough to be sent."""
    parts, size = list[str](), 0
    for part in map(json.dumps, lines):
        if parts and size + len(part) > LONGEST // 2:
            yield f"[{','.join(parts)}]".encode()
            parts, size = [], 0
        parts.append(part)
        size += len(part) + 1
    if parts:
        yield f"[{','.join(parts)}]".encode()


def _token_lines(scores: TokenScores) -> Iterator[list[Any]]:
    for first in range(0, len(scores.values), TOKENS):
        values = scores.values[first : first + TOKENS]
        yield [scores.key, scores.choice, scores.start + first, values]


def _posted(line: list[Any]) -> Posted:
    if len(line) == 2:
        key, values = line
        return ScoreResponse(key, None if values is None else tuple(values))
    key, choice, start, values = line
    return TokenScores(key, choice, start, tuple(values))
