"""The scoring thread: it alone owns the model; requests reach it through a bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Literal, TypeVar

from latentguard.errors import LatentGuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import VariantScore
from latentguard.models.chat_model import ChatModel
from latentguard.models.conversation import count_tokens
from latentguard.models.segments import Segments
from latentguard.models.shared_model import SharedModel
from latentguard.prompts import Prompt
from latentguard.serve.chat_turns import STEP_TOKENS, ChatTurns
from latentguard.serve.config import ServeConfig
from latentguard.serve.errors import (
    ApiError,
    PayloadTooLarge,
    QueueFull,
    Unavailable,
    error_location,
)
from latentguard.serve.guarded_chat import GuardedChat
from latentguard.serve.queue import (
    FULL,
    FairQueue,
    Work,
    WorkItem,
    estimated_tokens,
    settle,
    size_in_bytes,
)
from latentguard.serve.scoring import PromptScorer, ScoredPrompt, to_api_error
from latentguard.serve.served_guards import Binder, ServedGuard, ServedGuards, verified
from latentguard.serve.sharing import MOST_INTERRUPTED, Abandoned, Sharing
from latentguard.serve.text_cache import TextCache

log = logging.getLogger("latentguard.serve")

T = TypeVar("T")

State = Literal["loading", "ready", "draining", "dead"]
Opener = Callable[[], tuple[LatentGuard, ChatModel]]

CRASHES = 5
"""The thread gives up when it has crashed so often within a minute."""


class ScoringEngine:
    """Batches prompts on the fly, answers chats in between, and notices its own crashes."""

    def __init__(
        self,
        opener: Opener,
        config: ServeConfig,
        *,
        named_guards: Mapping[str, LatentGuard] | None = None,
        bind: Binder = verified,
        on_batch: Callable[[Sequence[float]], None] = lambda waits: None,
    ) -> None:
        """Prepare; ``start`` begins.

        Args:
            opener: Loads guard and model, and checks that they match; runs on the thread.
            config: Limits of queue, batch and time.
            named_guards: Other guards of the same model.
            bind: Lets a guard meet the model; gives it as it is served.
            on_batch: Told how long each prompt of a batch waited, in seconds.
        """
        self.config = config
        self.state: State = "loading"
        self.on_death: Callable[[BaseException], None] = lambda error: None
        """Told, on the event loop, why the thread ended."""
        self.crashes = deque[float](maxlen=CRASHES)
        self._opener, self._on_batch = opener, on_batch
        self._named_guards, self._bind = named_guards or {}, bind
        self._lock, self._stopping = threading.Condition(), False
        self._queue, self._in_flight = FairQueue(config.queue), list[WorkItem]()
        self._sharing = Sharing(config)

        self._chats = ChatTurns(config.chats)
        self._busy_since: float | None = None
        self._cache = TextCache[VariantScore]()
        self._interrupted = 0
        """How many long prompts wait until others were served."""

        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.guards: ServedGuards
        self.model: ChatModel

    @property
    def guard(self) -> LatentGuard:
        """The default guard."""
        return self.guards.default.guard

    @property
    def is_loaded(self) -> bool:
        """Whether guards and model are there."""
        return self.state in ("ready", "draining")

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
        await asyncio.to_thread(self._thread.join, self.config.drain)

    @property
    def waiting(self) -> int:
        """How many prompts and chats wait."""
        with self._lock:
            self._drop_abandoned()
            return len(self._queue) + len(self._chats.waiting)

    @property
    def active_chats(self) -> int:
        """How many chats are being answered."""
        return len(self._chats.active)

    @property
    def has_free_chat(self) -> bool:
        """Whether a chat that comes now is begun at once."""
        return self._chats.has_room

    async def replace_guards(
        self, guard: LatentGuard, named_guards: Mapping[str, LatentGuard]
    ) -> None:
        """Serve other guards of the same model; requests that are under way keep theirs.

        Args:
            guard: The default one.
            named_guards: The others.

        Raises:
            LatentGuardError: if one is not of this model; the old ones go on.
            ApiError: if there was no time for it.
        """

        def meet(_: LatentGuard, model: ChatModel, __: Segments | None) -> ServedGuards | str:
            try:
                return ServedGuards.meet(self._bind(guard, model), named_guards, model, self._bind)
            except LatentGuardError as error:
                return str(error)

        outcome = await self.run_alone(Prompt("-"), meet, seconds=self.config.stall)
        if isinstance(outcome, str):
            raise LatentGuardError(outcome)
        self.guards = outcome

    async def score(
        self, prompts: Sequence[Prompt], *, account: str = "", served: ServedGuard | None = None
    ) -> list[ScoredPrompt]:
        """Score prompts, together with those of other requests.

        Args:
            prompts: What is scored.
            account: Whose they are.
            served: The guard; the default one if None.

        Raises:
            ApiError: if one cannot be scored; says why.
        """
        self._require_ready(len(prompts))
        for prompt in prompts:
            await self._require_short(prompt)
        request = object()
        items = [
            WorkItem(
                self._loop.create_future(),
                prompt=prompt,
                size=estimated_tokens(prompt),
                account=account,
                served=served,
                request=request,
            )
            for prompt in prompts
        ]
        self._submit(items)
        return await self.within_deadline(asyncio.gather(*(item.future for item in items)))

    async def run_alone(
        self,
        prompt: Prompt,
        work: Work,
        *,
        account: str = "",
        served: ServedGuard | None = None,
        seconds: float | None = None,
    ) -> Any:
        """Do some work on the thread, alone.

        Args:
            prompt: What it reads.
            work: Given a guard, its model, and how it may be read in segments.
            account: Whose it is.
            served: The guard; the default one if None.
            seconds: That it may take; the deadline of verdicts if None.

        Raises:
            ApiError: if it cannot be done; says why.
        """
        self._require_ready(1)
        await self._require_short(prompt)
        future = self._loop.create_future()
        size = estimated_tokens(prompt)
        self._submit([WorkItem(future, work=work, size=size, account=account, served=served)])
        return await self.within_deadline(future, seconds)

    async def start_chat(self, chat: GuardedChat) -> None:
        """Let the thread answer a chat, which then emits events.

        Raises:
            ApiError: if it cannot be answered; says why.
        """
        self._require_ready(1)
        await self._require_short(chat.prompt)
        with self._lock:
            self._require_ready(1)
            self._drop_abandoned()
            if len(self._queue) + len(self._chats.waiting) >= self.config.queue:
                raise QueueFull(FULL)
            self._sharing.note(chat.account)
            self._chats.waiting.append(chat)
            self._lock.notify()

    def _require_ready(self, count: int) -> None:
        if count > self.config.queue:
            raise PayloadTooLarge(
                f"At most {self.config.queue} prompts can wait; {count} were sent."
            )
        if not self.is_loaded:
            raise Unavailable("The guard is not ready.")

    async def _require_short(self, prompt: Prompt) -> None:
        """Count tokens where there may be too many.

        A text has no more tokens than bytes, and no fewer than its bytes over those of the longest
        token: what is too long by that is not tokenised.
        """
        most = min(self.config.max_tokens, self.model.max_tokens)
        if 4 * estimated_tokens(prompt) <= most:
            return
        fewest = size_in_bytes(prompt) // self._longest_token
        if fewest > most:
            raise PayloadTooLarge(
                f"The prompt has at least {fewest:,} tokens; at most {most:,} are read."
            )
        try:
            counting = asyncio.to_thread(count_tokens, self.model, prompt, most)
            tokens = await self.within_deadline(counting)
        except LatentGuardError as error:
            raise to_api_error(error) from None
        if tokens > most:
            raise PayloadTooLarge(
                f"The prompt is {tokens:,} tokens long; at most {most:,} are read."
            )

    def _submit(self, items: Sequence[WorkItem]) -> None:
        with self._lock:
            self._require_ready(len(items))  # again: counting tokens may have taken a while
            self._drop_abandoned()
            evicted = self._queue.add(items, others=len(self._chats.waiting))
            if items:
                self._sharing.note(items[0].account)
            self._lock.notify()
        settle((item, QueueFull(FULL)) for item in evicted)

    async def within_deadline(self, work: Awaitable[T], seconds: float | None = None) -> T:
        """What some work gives within so many seconds; the deadline of verdicts if None.

        Raises:
            Unavailable: if it takes longer.
        """
        seconds = seconds or self.config.deadline
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError:
            reason = f"No verdict came within {seconds:g} seconds."
            raise Unavailable(reason) from None

    async def _watch(self) -> None:
        """Notice a thread that ended without a word, or that is stuck."""
        while self.state != "dead":
            await asyncio.sleep(0.2)
            busy = self._busy_since
            stuck = busy is not None and monotonic() - busy > self.config.stall
            if stuck or not self._thread.is_alive():
                self._fail(RuntimeError("the scoring thread is stuck" if stuck else "it ended"))

    # ---- the thread's side

    def _run(self) -> None:
        try:
            guard, self.model = self._opener()
            self.guards = ServedGuards.meet(guard, self._named_guards, self.model, self._bind)
            words = self.model.tokenizer.get_vocab()
            self._longest_token = max(len(word.encode("utf-8", "replace")) for word in words)
            self.state = "ready"
            names = ", ".join(f"{one.name} {one.digest[:12]}" for one in self.guards)
            log.info("Ready: guard %s on '%s'.", names, self.model.fingerprint.model)
            while (items := self._next()) is not None:
                self._in_flight, self._busy_since = items, monotonic()
                if items:
                    self._serve(items)
                self._advance_chats()
                self._busy_since = None
        except BaseException as error:  # whatever it is, nobody may wait for this thread
            self._fail(error)

    def _next(self) -> list[WorkItem] | None:
        """The next batch, empty if only chats go on, None at the end."""
        with self._lock:
            while not (self._queue or self._chats):
                if self._stopping:
                    return None
                self._lock.wait()
            first = self._queue.next_item
            if first is not None and not self._chats:
                self._gather(first.arrived + self.config.wait)
            self._drop_abandoned()
            return self._queue.take(self._sharing.batch_tokens(self.model))

    def _gather(self, until: float) -> None:
        """Wait a moment for more prompts, as long as they fit into one batch."""
        while (first := self._queue.next_item) and not (self._stopping or self._chats.waiting):
            seconds = until - monotonic()
            if (
                first.work
                or seconds <= 0
                or self._queue.tokens >= self._sharing.batch_tokens(self.model)
            ):
                return
            self._lock.wait(seconds)

    def _serve(self, items: list[WorkItem]) -> None:
        now = monotonic()
        model: Any = self.model
        segments = self._segments(
            items[0].account, lambda: not all(item.future.done() for item in items)
        )
        if segments is not None:
            model = SharedModel(self.model, segments)
        try:
            is_alone = items[0].work is not None
            results = self._alone(items[0], segments) if is_alone else self._score(items, model)
        except Abandoned:
            return
        except Exception as error:  # whatever it is, nobody may wait for this batch
            self._settle(items, [Unavailable("The guard failed on this batch.")] * len(items))
            self._recover(error)
            return
        self._on_batch([now - item.arrived for item in items])
        self._settle(items, results)

    def _segments(self, account: str, is_wanted: Callable[[], bool]) -> Segments | None:
        """How the prompts of an account are read; None reads them whole, as they are short.

        Args:
            account: Whose they are.
            is_wanted: Whether somebody still waits for them; else they are not read to their end.
        """
        if self._interrupted >= MOST_INTERRUPTED:
            return None

        def between() -> None:
            self._serve_others(account)
            if not is_wanted():
                raise Abandoned

        return Segments(self._sharing.unit_tokens(self.model), between)

    def _serve_others(self, account: str) -> None:
        """Between two units of an account's prompts: a batch of those who were served less.

        All chats take a step, too. The last that may interrupt are short.
        """
        self._busy_since = monotonic()
        self._interrupted += 1
        try:
            self._serve_before(account)
            if self._interrupted == 1:
                self._advance_chats()
        finally:
            self._interrupted -= 1

    def _serve_before(self, account: str) -> None:
        """Serve a batch of accounts that were served less than this one."""
        is_last = self._interrupted >= MOST_INTERRUPTED
        outer = self._in_flight
        with self._lock:
            unit = self._sharing.unit_tokens(self.model)
            items = self._queue.take(unit, max_size=unit if is_last else None, before=account)
        if not items:
            return
        self._in_flight = [*outer, *items]
        try:
            self._serve(items)
        finally:
            self._in_flight = outer

    def _score(self, items: Sequence[WorkItem], model: Any) -> list[ScoredPrompt | ApiError]:
        """Each guard reads what it is to judge."""
        results = dict[int, ScoredPrompt | ApiError]()
        default = self.guards.default
        judges = [item.served or default for item in items]
        for served in dict.fromkeys(judges):
            own = [n for n, judge in enumerate(judges) if judge is served]
            prompts = [prompt for n in own if (prompt := items[n].prompt)]
            scorer = PromptScorer(served.guard, model, self._cache, digest=served.digest)
            scored = scorer.score_each(prompts, [items[n].account for n in own])
            results |= zip(own, scored, strict=True)
        return [results[n] for n in range(len(items))]

    def _alone(self, item: WorkItem, segments: Segments | None) -> list[Any]:
        assert item.work is not None
        served = item.served or self.guards.default
        try:
            return [item.work(served.guard, self.model, segments)]
        except LatentGuardError as error:
            return [to_api_error(error)]

    def _advance_chats(self) -> None:
        """Let each chat take a step, and begin those that wait as others end."""
        with self._lock:
            self._drop_abandoned()
            self._chats.begin_waiting()
        self._chats.step_each(self._step_and_serve)

    def _drop_abandoned(self) -> None:
        """Drop what nobody waits for any more; for whoever holds the lock."""
        self._queue.drop_abandoned()
        self._chats.drop_cancelled()

    def _step_and_serve(self, chat: GuardedChat) -> bool:
        """Whether the chat goes on; then others have their turn."""
        goes_on = self._step(chat)
        self._serve_before(chat.account)
        return goes_on

    def _step(self, chat: GuardedChat) -> bool:
        """Whether the chat goes on."""
        with self._lock:
            self._queue.charge(chat.account, STEP_TOKENS)
        try:
            segments = self._segments(chat.account, lambda: not chat.cancelled)
            return chat.step(self.model, segments)
        except Abandoned:
            return False
        except LatentGuardError as error:
            chat.emit(to_api_error(error))
        except Exception as error:  # nor for this chat
            chat.emit(Unavailable("The guard failed on this chat."))
            self._recover(error)
        return False

    def _recover(self, error: Exception) -> None:
        """Go on after a crash if the canaries still score as they should; end if not."""
        log.error("The scoring thread crashed: %s", error_location(error))
        now = monotonic()
        self.crashes.append(now)
        if len(self.crashes) == CRASHES and now - self.crashes[0] < 60:
            raise RuntimeError(f"{CRASHES} crashes within a minute") from error
        for served in self.guards:
            served.guard.verify_model(self.model)

    def _settle(self, items: Sequence[WorkItem], outcomes: Sequence[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(settle, list(zip(items, outcomes, strict=True)))

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self.state == "dead":
                return
            self.state = "dead"
            items = [*self._in_flight, *self._queue.clear()]
            chats = self._chats.clear()
        log.error("The scoring thread ended: %s", error)
        failure = Unavailable("The guard has failed.")
        self._settle(items, [failure] * len(items))
        for chat in chats:
            chat.emit(failure)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.on_death, error)
