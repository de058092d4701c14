"""Second opinions in the service, asked on threads of their own.

Neither the event loop nor the scoring thread waits for one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from latentguard.guard.second_opinion import SecondOpinion
from latentguard.prompts import Prompt

log = logging.getLogger("latentguard.serve")


class OpinionThreads:
    """Asks a second opinion, each prompt for at most so many seconds."""

    def __init__(self, second: SecondOpinion, seconds: float) -> None:
        """Prepare.

        Args:
            second: Is asked; loaded before the first request.
            seconds: After which it has failed.
        """
        self._second = second
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(second.at_once, thread_name_prefix="second-opinion")

    async def score(self, prompts: Sequence[Prompt]) -> list[float | None]:
        """Its score of each prompt; None where it fails, or none came in time."""
        return list(await asyncio.gather(*map(self._score_one, prompts)))

    async def _score_one(self, prompt: Prompt) -> float | None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._seconds):
                [score] = await loop.run_in_executor(self._threads, self._second.score, [prompt])
        except TimeoutError:
            log.warning("No second opinion came within %g seconds.", self._seconds)
            return None
        return score

    def close(self) -> None:
        """Drop what waits."""
        self._threads.shutdown(wait=False, cancel_futures=True)
