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
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from latentguard.integrations.vllm.score_request import ScoreRequest, ScoreResponse

log = logging.getLogger("latentguard.vllm")

LONGEST = 1 << 16
"""Bytes of a datagram; longer ones are sent in parts."""

PATIENCE = 2.0
"""Seconds that a worker waits for a full channel; the answer is then lost, and its chat blocked."""


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

    def collect(self) -> list[ScoreResponse]:
        """What has arrived since the last time."""
        responses = list[ScoreResponse]()
        with contextlib.suppress(BlockingIOError):
            while True:
                for key, values in json.loads(self.socket.recv(LONGEST)):
                    responses.append(ScoreResponse(key, None if values is None else tuple(values)))
        return responses

    @contextlib.contextmanager
    def reading(self) -> Iterator[list[ScoreResponse]]:
        """Collect in the background, for as long as something else keeps this thread busy."""
        responses, end = list[ScoreResponse](), threading.Event()

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


def post(answers: Iterable[tuple[ScoreRequest, list[float] | None]]) -> None:
    """Send responses to their channels; one that is gone or stays full loses them."""
    ordered = sorted(answers, key=lambda pair: pair[0].channel)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.settimeout(PATIENCE)
        for path, group in groupby(ordered, key=lambda pair: pair[0].channel):
            lines = [(request.key, values) for request, values in group]
            try:
                for start in range(0, len(lines), 64):
                    out.sendto(json.dumps(lines[start : start + 64]).encode(), path)
            except OSError as error:
                log.warning("%d answers could not be delivered: %s", len(lines), error)
