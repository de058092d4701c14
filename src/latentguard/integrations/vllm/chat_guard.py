"""The guard as the server's middleware uses it: a chat becomes score requests, scores a verdict.

The chat's own prefill scores the chat as it stands. Every other text that is read (each message by
itself, decoded texts, chunks) is a request of its own in the same engine. All of them are one flat
list, planned and combined as everywhere else (``guard/reading_plan.py``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentguard.errors import GuardError, ModelMismatch, PromptError, TemplateError
from latentguard.guard.compatibility import TOLERANCE
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import ScoredPlan, Variant
from latentguard.guard.verdict import Verdict
from latentguard.integrations.vllm.columns import Columns, variant_score
from latentguard.integrations.vllm.reply_tokens import ReplyOptions, TokenScoreLog
from latentguard.integrations.vllm.score_channel import ScoreChannel
from latentguard.integrations.vllm.score_request import (
    ScoreRequest,
    TokenScores,
    reply_request,
    score_request,
)
from latentguard.models.chat import ChatTokenizer
from latentguard.models.layout import Layout
from latentguard.prompts import Prompt
from latentguard.serve.chat_readings import ChatReading, chat_readings
from latentguard.serve.chat_request import require_few
from latentguard.serve.chat_thresholds import ChatThresholds, DecidedReading
from latentguard.serve.config import RateOf, ServeConfig
from latentguard.serve.errors import BadRequest, Unavailable, error_location
from latentguard.serve.messages import ChatMessage, own_model_prompt
from latentguard.serve.request_errors import describe_errors

T = TypeVar("T")

log = logging.getLogger("latentguard.vllm")

Values = tuple[float, ...] | None
"""Each column's value; None if the engine's tokens were not those of the request."""

CONCURRENT = 64
"""Requests that one chat may have in the engine at a time."""


class GuardedBody(BaseModel):
    """What the guard reads of a chat completion request."""

    model_config = ConfigDict(extra="ignore")

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


@dataclass(frozen=True)
class ReadingPlan:
    """One text of a chat, and the variants that are read for it."""

    reading: ChatReading
    """The text."""

    variants: tuple[Variant, ...]
    """What is scored (``LatentGuard.plan``)."""


@dataclass(frozen=True)
class PendingScore:
    """A request for scores, and the response to come."""

    ids: tuple[int, ...]
    """The prompt's tokens, as they were laid out."""

    request: ScoreRequest
    """What was asked of the engine."""

    response: asyncio.Future[Values]
    """What it reads."""


@dataclass(frozen=True)
class PendingReply:
    """The replies of a chat, which are to be judged."""

    options: ReplyOptions
    """What was asked of them."""

    log: TokenScoreLog
    """What was read of them so far."""


@dataclass(frozen=True)
class PendingChat:
    """A chat whose own prefill is under way."""

    own: PendingScore
    """The chat as it stands, scored by the prefill that serves it."""

    plans: tuple[ReadingPlan, ...]
    """All that is read of the chat; the first variant of the first is the chat as it stands."""

    segment: str | None
    """Of the traffic."""

    reply: PendingReply | None
    """None if the guard judges no replies."""


class ChatGuard:
    """One guard, for one engine; belongs to one event loop."""

    def __init__(
        self,
        guard: LatentGuard,
        tokenizer: Any,
        engine: Any = None,
        *,
        most: int = 1 << 62,
        usual_reply: int | None = None,
        rate_of: RateOf = "chat",
    ) -> None:
        """Prepare.

        Args:
            guard: The guard.
            tokenizer: Of the engine's model.
            engine: Scores what needs a request of its own.
            most: Tokens that the engine reads; a chat of more messages is not even laid out.
            usual_reply: Tokens of a reply where a request does not say; None for all there is
                room for.
            rate_of: Whether the texts of a chat share the false-positive rate.

        Raises:
            ModelMismatch: if tokenizer or template are not the guard's own.
            GuardError: if the guard cannot run inside vLLM, or has no thresholds for chats.
        """
        self.guard = guard
        self.chat = ChatTokenizer(tokenizer, max_tokens=most)
        self._columns = Columns.of(guard)
        self._engine = engine
        self._most, self._usual_reply = most, usual_reply
        self._thresholds, self._rate_of = ChatThresholds(guard), rate_of
        digests = self.chat.tokenizer_digest, self.chat.template_digest
        if digests != (guard.fingerprint.tokenizer, guard.fingerprint.template):
            raise ModelMismatch(
                f"This guard was fitted on '{guard.fingerprint.model}'; the tokenizer or the chat "
                "template that the server uses is another. Use that model's own."
            )
        self._channel = ScoreChannel()
        self._waiting = dict[str, asyncio.Future[Values]]()
        self._logs = dict[str, TokenScoreLog]()
        asyncio.get_running_loop().add_reader(self._channel.socket, self.collect)

    async def begin(self, body: dict[str, Any], segment: str | None = None) -> PendingChat:
        """Put the score request of a chat into its body; what a client sent there is dropped.

        Args:
            body: The request's.
            segment: Of the traffic.

        Raises:
            BadRequest: if the guard cannot read the chat.
        """
        if body.get("use_beam_search"):
            raise BadRequest("Beam search has no prefill of its own to read; leave it out.")
        try:
            messages = GuardedBody.model_validate(body).messages
            layout, plans = await asyncio.to_thread(self._plan, messages)
        except ValidationError as error:
            raise BadRequest(describe_errors(error.errors())) from None
        except (PromptError, TemplateError) as error:
            raise BadRequest(str(error)) from None
        reply = self._expect_reply(body, layout)
        own = self._request(layout, reply)
        for name in ("ec_transfer_params", "vllm_xargs"):
            body.pop(name, None)
        body["kv_transfer_params"] = own.request.params
        return PendingChat(own, plans, segment, reply)

    async def decide(self, chat: PendingChat, values: tuple[float, ...]) -> DecidedReading:
        """The most severe reading of a chat, once all that needs a request of its own is scored.

        Args:
            chat: The chat.
            values: What its own prefill read.

        Raises:
            GuardError: if a number is missing or not finite.
            Exception: whatever the engine raises.
        """
        texts = [variant.prompt for plan in chat.plans for variant in plan.variants]
        scored = iter([values, *await self._score_all(texts[1:])])
        verdicts = [self._verdict(plan, scored, chat.segment) for plan in chat.plans]
        newest = [plan.reading.is_newest for plan in chat.plans]
        segments = [chat.segment] * len(newest)
        return self._thresholds.decide(verdicts, newest, segments, rate_of=self._rate_of)

    def _verdict(
        self, plan: ReadingPlan, scored: Iterator[tuple[float, ...]], segment: str | None
    ) -> Verdict:
        """The verdict on one reading, from the next scores of the flat list."""
        own = islice(scored, len(plan.variants))
        scores = [variant_score(self.guard, values) for values in own]
        prompt = replace(plan.reading.prompt, segment=segment)
        return self.guard.combine(ScoredPlan(prompt, plan.variants, scores)).verdict

    async def _score_all(self, prompts: Sequence[Prompt]) -> list[tuple[float, ...]]:
        turn = asyncio.Semaphore(CONCURRENT)

        async def score(prompt: Prompt) -> Values:
            async with turn:
                return await self.score(prompt)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(score(prompt)) for prompt in prompts]
        scores = [task.result() for task in tasks]
        if None in scores:
            raise GuardError("The engine gave no score for a text that needs a request of its own.")
        return [values for values in scores if values is not None]

    async def score(self, prompt: Prompt) -> Values:
        """What the engine reads of a prompt that nobody else sends it; None if it does not say."""
        pending = self._request((await asyncio.to_thread(self.chat, [prompt]))[0])
        try:
            await self._compute(pending.ids, pending.request)
            return pending.response.result() if pending.response.done() else None
        finally:
            self.forget(pending)

    async def score_last_token(self, ids: Sequence[int]) -> float:
        """The score of the last token of a prompt and its reply; not a number if there is none.

        The prefix cache has all full blocks of them, so at most one block is computed anew.
        """
        request = reply_request(ids, self._channel, tail=1)
        log = self._logs[request.key] = TokenScoreLog.of(1)
        try:
            await self._compute(ids, request)
            return log.scores[0][0] if log.scores[0] else float("nan")
        finally:
            del self._logs[request.key]

    async def _compute(self, ids: Sequence[int], request: ScoreRequest) -> None:
        """Have the engine read a prompt that nobody else sends it; then collect what it posted."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        transfer = {"kv_transfer_params": request.params}
        sampling = SamplingParams(max_tokens=1, extra_args=transfer)
        tokens = TokensPrompt(prompt_token_ids=list(ids))
        async for _ in self._engine.generate(tokens, sampling, request_id=request.key):
            pass
        self.collect()

    def collect(self) -> None:
        """Hand out the responses that have arrived."""
        for response in self._channel.collect():
            if isinstance(response, TokenScores):
                if response.key in self._logs:
                    self._logs[response.key].add(response)
                continue
            waiting = self._waiting.get(response.key)
            if waiting is not None and not waiting.done():
                waiting.set_result(response.values)

    def forget(self, pending: PendingScore) -> None:
        """Nobody waits for this response any more."""
        self._waiting.pop(pending.request.key, None)
        self._logs.pop(pending.request.key, None)

    async def check(self) -> None:
        """Score the guard's canaries in the running engine.

        Raises:
            ModelMismatch: if one has another score than when the guard was fitted, or none.
        """
        for canary in self.guard.canaries:
            values = await self.score(Prompt(canary.text, id="canary"))
            score = variant_score(self.guard, values).score if values else float("nan")
            if not abs(score - canary.score) <= TOLERANCE * self.guard.spread:
                dated = "; its chat template prints today's date" * self.chat.has_date
                raise ModelMismatch(
                    f"A canary scores {score:.4g} in this engine and {canary.score:.4g} when the "
                    f"guard was fitted{dated}; fit it again on what is served."
                )

    def close(self) -> None:
        """Close the channel."""
        asyncio.get_running_loop().remove_reader(self._channel.socket)
        self._channel.close()

    def _plan(self, messages: Sequence[ChatMessage]) -> tuple[Layout, tuple[ReadingPlan, ...]]:
        """The chat's tokens and all that is read of it; a long chat takes a while."""
        messages = [message.with_one_text() for message in messages]  # as vLLM joins parts
        context = own_model_prompt(messages)
        layout = self.chat([context])[0]  # first: it refuses what is too long
        readings = chat_readings(messages, context=context)
        require_few(readings, ServeConfig())
        plans = [ReadingPlan(one, tuple(self.guard.plan(one.prompt))) for one in readings]
        return layout, tuple(plans)

    def _expect_reply(self, body: dict[str, Any], layout: Layout) -> PendingReply | None:
        """Have the server name the tokens of the replies, if they are judged.

        One token fewer is asked for than there is room for: its place is where the last token of a
        reply is read.

        Raises:
            BadRequest: if the replies cannot be judged.
        """
        if self.guard.replies is None:
            return None
        options = ReplyOptions.of(body)
        room = self._most - len(layout.ids) - 1
        if room < 1:
            raise BadRequest("The chat leaves no room for a reply that can be judged; shorten it.")
        asked = [body.get(name) for name in ("max_completion_tokens", "max_tokens")]
        longest = next((n for n in (*asked, self._usual_reply) if isinstance(n, int)), room)
        if longest >= room:
            body["max_completion_tokens"] = room
        body["return_token_ids"] = True
        return PendingReply(options, TokenScoreLog.of(options.count))

    def _request(self, layout: Layout, reply: PendingReply | None = None) -> PendingScore:
        tail = None if reply is None else 0
        request = score_request(layout, self._columns.positions, self._channel, tail=tail)
        response = asyncio.get_running_loop().create_future()
        self._waiting[request.key] = response
        if reply is not None:
            self._logs[request.key] = reply.log
        return PendingScore(layout.ids, request, response)


async def require_answer(work: Awaitable[T]) -> T:
    """What some work of the engine gives.

    Raises:
        Unavailable: if there is nothing (fail closed).
    """
    try:
        return await work
    except Exception as error:  # whatever the engine raises, the chat is not answered
        log.error(
            "No verdict: %s", error if isinstance(error, GuardError) else error_location(error)
        )
        raise Unavailable("The guard cannot give a verdict on this chat.") from None
