"""The scoring thread: it alone owns the model; requests reach it through a bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any, Literal

from latentguard.errors import LatentGuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.models.conversation import longest, tokens_of
from latentguard.prompts import Prompt
from latentguard.serve.errors import Busy, TooLarge, Unavailable, place
from latentguard.serve.guarded_chat import Talk
from latentguard.serve.options import Options
from latentguard.serve.queue import Job, Work, settle, size_of
from latentguard.serve.scoring import Judgement, fault_of, judge_each

log = logging.getLogger("latentguard.serve")

State = Literal["loading", "ready", "draining", "dead"]
Opener = Callable[[], tuple[LatentGuard, ChatModel]]

CRASHES = 5
"""The thread gives up when it has crashed so often within a minute."""


class Scorer:
    """Batches prompts on the fly, answers chats in between, and notices its own crashes."""

    def __init__(
        self,
        opener: Opener,
        options: Options,
        *,
        on_batch: Callable[[Sequence[float]], None] = lambda waits: None,
    ) -> None:
        """Prepare; ``start`` begins.

        Args:
            opener: Loads guard and model, and checks that they match; runs on the thread.
            options: Limits.
            on_batch: Told how long each prompt of a batch waited, in seconds.
        """
        self.options = options
        self.state: State = "loading"
        self.on_death: Callable[[BaseException], None] = lambda error: None
        """Told, on the event loop, why the thread ended."""
        self.crashes = deque[float](maxlen=CRASHES)
        self._opener, self._on_batch = opener, on_batch
        self._lock, self._stopping = threading.Condition(), False
        self._jobs, self._flight = deque[Job](), list[Job]()
        self._coming, self._talks = deque[Talk](), list[Talk]()
        self._busy: float | None = None
        self._thread = threading.Thread(target=self._live, name="scorer", daemon=True)
        self.guard: LatentGuard
        self.model: ChatModel

    # ---- the event loop's side

    def start(self) -> None:
        """Start the thread, and watch it; needs a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Finish what waits, then end the thread."""
        self._watcher.cancel()
        with self._lock:
            self._stopping = True
            self.state = "draining" if self.state == "ready" else self.state
            self._lock.notify_all()
        await asyncio.to_thread(self._thread.join, self.options.drain)

    @property
    def waiting(self) -> int:
        """How many prompts wait."""
        with self._lock:
            self._forget()
            return len(self._jobs) + len(self._coming)

    @property
    def talking(self) -> int:
        """How many chats are being answered."""
        return len(self._talks)

    async def judge(self, prompts: Sequence[Prompt]) -> list[Judgement]:
        """Judge prompts, together with those of other requests.

        Raises:
            Fault: if one cannot be judged; says why.
        """
        self._admit(len(prompts))
        for prompt in prompts:
            await self._require_short(prompt)
        futures = [self._loop.create_future() for _ in prompts]
        self._submit([Job(f, p, size=size_of(p)) for f, p in zip(futures, prompts, strict=True)])
        found: list[Judgement] = await self._within(asyncio.gather(*futures))
        return found

    async def do(self, prompt: Prompt, work: Work) -> Any:
        """Do some work on the thread, alone; ``prompt`` is what it reads.

        Raises:
            Fault: if it cannot be done; says why.
        """
        self._admit(1)
        await self._require_short(prompt)
        future = self._loop.create_future()
        self._submit([Job(future, work=work)])
        return await self._within(future)

    async def begin(self, talk: Talk) -> None:
        """Let the thread answer a chat; the talk tells of it.

        Raises:
            Fault: if it cannot be answered; says why.
        """
        self._admit(1)
        await self._require_short(talk.prompt)
        with self._lock:
            self._admit(1)
            self._coming.append(talk)
            self._lock.notify()

    def _admit(self, count: int) -> None:
        if count > self.options.queue:
            raise TooLarge(f"At most {self.options.queue} prompts can wait; {count} were sent.")
        if self.state not in ("ready", "draining"):
            raise Unavailable("The guard is not ready.")
        if self.waiting + count > self.options.queue:
            raise Busy("Too many prompts are waiting; try again in a second.")

    async def _require_short(self, prompt: Prompt) -> None:
        """Count tokens where there may be too many; a text has no more tokens than bytes."""
        if 4 * size_of(prompt) <= (most := min(self.options.max_tokens, longest(self.model))):
            return
        try:
            found = await self._within(asyncio.to_thread(tokens_of, self.model, prompt, most))
        except LatentGuardError as error:
            raise fault_of(error) from None
        if found > most:
            raise TooLarge(f"The prompt is {found:,} tokens long; at most {most:,} are read.")

    def _submit(self, jobs: Sequence[Job]) -> None:
        with self._lock:
            self._admit(len(jobs))  # once more: counting tokens may have taken a while
            self._jobs.extend(jobs)
            self._lock.notify()

    async def _within(self, work: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self.options.deadline):
                return await work
        except TimeoutError:
            reason = f"No verdict came within {self.options.deadline:g} seconds."
            raise Unavailable(reason) from None

    async def _watch(self) -> None:
        """Notice a thread that ended without a word, or that is stuck."""
        while self.state != "dead":
            await asyncio.sleep(0.2)
            busy = self._busy
            stuck = busy is not None and monotonic() - busy > self.options.stall
            if stuck or not self._thread.is_alive():
                self._die(RuntimeError("the scoring thread is stuck" if stuck else "it ended"))

    # ---- the thread's side

    def _live(self) -> None:
        try:
            self.guard, self.model = self._opener()
            self.state = "ready"
            while (jobs := self._next()) is not None:
                self._flight, self._busy = jobs, monotonic()
                if jobs:
                    self._serve(jobs)
                self._converse()
                self._busy = None
        except BaseException as error:  # whatever it is, nobody may wait for this thread
            self._die(error)

    def _next(self) -> list[Job] | None:
        """The next batch, empty if only chats go on, None at the end."""
        with self._lock:
            while not (self._jobs or self._talks or self._coming):
                if self._stopping:
                    return None
                self._lock.wait()
            if self._jobs and not (self._talks or self._coming):
                self._gather(self._jobs[0].arrived + self.options.wait)
            return self._pop()

    def _gather(self, until: float) -> None:
        """Wait a moment for more prompts, as long as they fit into one batch."""
        while self._jobs and not (self._stopping or self._coming or self._jobs[0].work):
            left = until - monotonic()
            if left <= 0 or sum(job.size for job in self._jobs) >= self._budget:
                return
            self._lock.wait(left)

    def _pop(self) -> list[Job]:
        """Take the oldest job and, of the other prompts, those nearest in length that fit.

        Like lengths waste little on padding, and the oldest is never passed over.
        """
        self._forget()
        taken = [self._jobs.popleft()] if self._jobs else []
        if taken and taken[0].prompt:
            most = taken[0].size
            prompts = [job for job in self._jobs if job.prompt]
            for job in sorted(prompts, key=lambda job: abs(job.size - most)):
                most = max(most, job.size)
                if most * (len(taken) + 1) > self._budget:
                    break
                taken.append(job)
        self._jobs = deque(job for job in self._jobs if job not in taken)
        return taken

    @property
    def _budget(self) -> int:
        return self.options.batch_tokens or self.model.tokens_per_batch

    def _serve(self, jobs: list[Job]) -> None:
        now = monotonic()
        try:
            work, prompts = jobs[0].work, [job.prompt for job in jobs if job.prompt]
            found = self._alone(work) if work else judge_each(self.guard, self.model, prompts)
        except Exception as error:  # whatever it is, nobody may wait for this batch
            self._settle(jobs, [Unavailable("The guard failed on this batch.")] * len(jobs))
            self._recover(error)
            return
        self._on_batch([now - job.arrived for job in jobs])
        self._settle(jobs, found)

    def _alone(self, work: Work) -> list[Any]:
        try:
            return [work(self.guard, self.model)]
        except LatentGuardError as error:
            return [fault_of(error)]

    def _converse(self) -> None:
        """Let each chat take a step, and begin those that wait as others end."""
        with self._lock:
            self._forget()
            room = self.options.chats - len(self._talks)
            self._talks += [self._coming.popleft() for _ in range(min(room, len(self._coming)))]
        self._talks = [talk for talk in self._talks if self._step(talk)]

    def _forget(self) -> None:
        """Drop what nobody waits for any more; for whoever holds the lock."""
        self._jobs = deque(job for job in self._jobs if not job.future.done())
        self._coming = deque(talk for talk in self._coming if not talk.cancelled)

    def _step(self, talk: Talk) -> bool:
        """Whether the chat goes on."""
        try:
            return talk.step(self.guard, self.model)
        except LatentGuardError as error:
            talk.tell(fault_of(error))
        except Exception as error:  # nor for this chat
            talk.tell(Unavailable("The guard failed on this chat."))
            self._recover(error)
        return False

    def _recover(self, error: Exception) -> None:
        """Go on after a crash if the canaries still score as they should; end if not."""
        log.error("The scoring thread crashed: %s", place(error))
        now = monotonic()
        self.crashes.append(now)
        if len(self.crashes) == CRASHES and now - self.crashes[0] < 60:
            raise RuntimeError(f"{CRASHES} crashes within a minute") from error
        self.guard.check(self.model)

    def _settle(self, jobs: Sequence[Job], found: Sequence[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(settle, list(zip(jobs, found, strict=True)))

    def _die(self, error: BaseException) -> None:
        with self._lock:
            if self.state == "dead":
                return
            self.state = "dead"
            jobs, talks = [*self._flight, *self._jobs], [*self._coming, *self._talks]
            self._jobs.clear()
            self._coming.clear()
        log.error("The scoring thread ended: %s", error)
        gone = Unavailable("The guard has failed.")
        self._settle(jobs, [gone] * len(jobs))
        for talk in talks:
            talk.tell(gone)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.on_death, error)
