"""How many CPU threads a model reads prompts fastest with, by a short measurement."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from itertools import takewhile

import torch

from latentguard.models.chat_model import ChatModel

PROMPTS = tuple(
    f"{number} {thing} for the old market, and what is the usual way there in the evening?"
    for number in ("One", "Two", "Three")
    for thing in ("pears", "lamps")
)
"""Read at each number of threads: about as many tokens as a batch of short prompts has."""

GAIN = 0.9
"""Share of the time with fewer threads below which more of them are worth having."""

SLOW = 0.5
"""Seconds; a model that takes longer gains from every thread, and is not measured."""


def choose_threads(model: ChatModel) -> int:
    """Set the number of torch's threads to the one that reads a small batch fastest.

    A small model on cores that others use, too, is several times slower with a thread for each
    core than with one. Nothing changes on a GPU, with ``OMP_NUM_THREADS`` set, or for a model that
    takes over half a second for the batch.

    Returns:
        The number of threads.
    """
    most = torch.get_num_threads()
    if model.device.type != "cpu" or most == 1 or "OMP_NUM_THREADS" in os.environ:
        return most
    seconds = _measurement(model)
    seconds(most)  # the first pass is slower
    if seconds(most) > SLOW:
        return most
    best = fastest(list(_counts(most)), seconds)
    torch.set_num_threads(best)
    return best


def fastest(counts: Sequence[int], seconds: Callable[[int], float]) -> int:
    """The number of threads that takes the least time; more only if they save a tenth of it.

    Args:
        counts: Numbers to try, rising.
        seconds: How long a number of threads takes.
    """
    best = counts[0]
    least = seconds(best)
    for count in counts[1:]:
        if (duration := seconds(count)) < GAIN * least:
            best = count
            least = duration
    return best


def _counts(most: int) -> list[int]:
    """1, 2, 4, ... and the most."""
    powers = takewhile(lambda count: count < most, (1 << k for k in range(most)))
    return [*powers, most]


def _measurement(model: ChatModel) -> Callable[[int], float]:
    """What takes the shorter time of two with a number of threads."""

    def read() -> float:
        start = time.perf_counter()
        for _ in model.capture(PROMPTS, progress=lambda _: None):
            pass
        return time.perf_counter() - start

    def seconds(count: int) -> float:
        torch.set_num_threads(count)
        return min(read(), read())

    return seconds
