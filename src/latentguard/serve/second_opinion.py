"""Second opinions in the service, asked on threads of their own.

Neither the event loop nor the scoring thread waits for one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from latentguard.guard.second_opinion import SecondOpinion
from latentguard.guard.verdict import Opinion
from latentguard.prompts import Prompt

log = logging.getLogger("latentguard.serve")


class OpinionThreads:
    """Asks a second opinion, each prompt for at most so many seconds."""

    def __init__(self, second: SecondOpinion, seconds: float) -> None:
        """Prepare.

        Args:
            second: Is asked; loaded before the first request.
            seconds: After which an opinion counts as failed.
        """
        self._second = second
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(second.at_once, thread_name_prefix="second-opinion")
        self.on_opinion: Callable[[Opinion], None] = lambda opinion: None
        """Told each opinion."""

    async def ask(self, prompts: Sequence[Prompt]) -> list[Opinion]:
        """An opinion of each prompt; ``failed`` where none came in time."""
        return list(await asyncio.gather(*map(self._ask_one, prompts)))

    async def _ask_one(self, prompt: Prompt) -> Opinion:
        loop = asyncio.get_running_loop()
        opinion: Opinion = "failed"
        try:
            async with asyncio.timeout(self._seconds):
                [opinion] = await loop.run_in_executor(self._threads, self._second.ask, [prompt])
        except TimeoutError:
            log.warning("No second opinion came within %g seconds.", self._seconds)
        self.on_opinion(opinion)
        return opinion

    def close(self) -> None:
        """Drop what waits."""
        self._threads.shutdown(wait=False, cancel_futures=True)
