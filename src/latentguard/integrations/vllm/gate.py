"""The guard as the server's middleware sees it: a chat -> a question, its answer -> a verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentguard.errors import GuardError, ModelMismatch, PromptError, TemplateError
from latentguard.guard.compatibility import TOLERANCE
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import ScoredPlan, Variant
from latentguard.guard.verdict import Verdict
from latentguard.integrations.vllm.columns import Columns, variant_score
from latentguard.integrations.vllm.mailbox import Mailbox
from latentguard.integrations.vllm.protocol import Ask, ask_about
from latentguard.models.chat import ChatTokenizer
from latentguard.models.layout import Layout
from latentguard.prompts import Prompt
from latentguard.serve.errors import BadRequest
from latentguard.serve.messages import ChatMessage, own_model_prompt

Values = tuple[float, ...] | None
"""What was read; None if the engine's tokens were not those that were asked about."""

AT_ONCE = 64
"""Passes of its own that a chat has in the engine."""


class Chat(BaseModel):
    """What the guard reads of a request."""

    model_config = ConfigDict(extra="ignore")

    messages: Annotated[list[ChatMessage], Field(min_length=1)]


@dataclass(frozen=True)
class Question:
    """A question that was put, and the answer to come."""

    prompt: Prompt
    ids: tuple[int, ...]
    """The prompt's tokens, as they were laid out."""

    ask: Ask
    answer: asyncio.Future[Values]
    variants: tuple[Variant, ...] = ()
    """What is read of it (``reading_plan``); all but the first need a pass of their own."""


class Gate:
    """One guard, for one engine; belongs to one event loop."""

    def __init__(
        self, guard: LatentGuard, tokenizer: Any, engine: Any = None, *, most: int = 1 << 62
    ) -> None:
        """Prepare.

        Args:
            guard: The guard.
            tokenizer: Of the engine's model.
            engine: That reads what needs a pass of its own.
            most: Tokens that the engine reads; a chat of more messages is not even laid out.

        Raises:
            ModelMismatch: if tokenizer or template are not the guard's own.
            GuardError: if the guard cannot run inside vLLM.
        """
        self.guard, self.chat = guard, ChatTokenizer(tokenizer, max_tokens=most)
        self._columns, self._engine = Columns.of(guard), engine
        found = self.chat.tokenizer_digest, self.chat.template_digest
        if found != (guard.fingerprint.tokenizer, guard.fingerprint.template):
            raise ModelMismatch(
                f"This guard was fitted on '{guard.fingerprint.model}'; the tokenizer or the chat "
                "template that the server uses is another. Use that model's own."
            )
        self._mailbox = Mailbox()
        self._waiting = dict[str, asyncio.Future[Values]]()
        asyncio.get_running_loop().add_reader(self._mailbox.socket, self.collect)

    async def question(self, body: dict[str, Any], traffic: str | None = None) -> Question:
        """The question about a chat, put into its body; what a client sent in its place is dropped.

        Args:
            body: The request's.
            traffic: The segment that it belongs to.

        Raises:
            BadRequest: if the guard cannot read the chat.
        """
        if body.get("use_beam_search"):
            raise BadRequest("Beam search has no prefill of its own to read; leave it out.")
        try:
            prompt = replace(own_model_prompt(Chat.model_validate(body).messages), segment=traffic)
            question = self._put(prompt, *await asyncio.to_thread(self._plan, prompt))
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise BadRequest(
                f"The guard cannot read this chat: {where} is not as expected."
            ) from None
        except (PromptError, TemplateError) as error:
            raise BadRequest(str(error)) from None
        for name in ("ec_transfer_params", "vllm_xargs"):
            body.pop(name, None)
        body["kv_transfer_params"] = question.ask.params
        return question

    async def judge(self, question: Question, values: tuple[float, ...]) -> Verdict:
        """The verdict, once all that needs a pass of its own is read.

        A version that is flagged is enough: no decoded text is read after it.

        Raises:
            GuardError: if a number is missing or not finite.
            Exception: whatever the engine raises.
        """
        first, *rest = _versions(question.variants)
        read = [values, *await self._read_all([variant.prompt for variant in first[1:]])]
        verdict = self._verdict(question, read)
        for version in rest:
            if verdict.flagged:
                break
            read += await self._read_all([variant.prompt for variant in version])
            verdict = self._verdict(question, read)
        return verdict

    def _verdict(self, question: Question, read: Sequence[Sequence[float]]) -> Verdict:
        """The verdict on what is read so far."""
        scores = [variant_score(self.guard, values) for values in read]
        variants = question.variants[: len(scores)]
        return self.guard.combine(ScoredPlan(question.prompt, variants, scores)).verdict

    async def _read_all(self, rows: Sequence[Prompt]) -> list[tuple[float, ...]]:
        turn = asyncio.Semaphore(AT_ONCE)

        async def read(row: Prompt) -> Values:
            async with turn:
                return await self.read(row)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read(row)) for row in rows]
        found = [task.result() for task in tasks]
        if None in found:
            raise GuardError("The engine gave no score for what needs a pass of its own.")
        return [values for values in found if values is not None]

    async def read(self, prompt: Prompt) -> Values:
        """What the engine reads of a prompt that nobody else sends it; None if it does not say."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        question = self._put(prompt, (await asyncio.to_thread(self.chat, [prompt]))[0])
        how = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": question.ask.params})
        tokens = TokensPrompt(prompt_token_ids=list(question.ids))
        try:
            async for _ in self._engine.generate(tokens, how, request_id=question.ask.key):
                pass
            self.collect()
            return question.answer.result() if question.answer.done() else None
        finally:
            self.forget(question)

    def collect(self) -> None:
        """Hand out what has arrived."""
        for answer in self._mailbox.collect():
            waiting = self._waiting.get(answer.key)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer.values)

    def forget(self, question: Question) -> None:
        """Nobody waits for this any more."""
        self._waiting.pop(question.ask.key, None)

    async def check(self) -> None:
        """Score the guard's canaries in the running engine.

        Raises:
            ModelMismatch: if one has another score than when the guard was fitted, or none.
        """
        for canary in self.guard.canaries:
            prompt = Prompt(canary.text, id="canary")
            values = await self.read(prompt)
            score = variant_score(self.guard, values).score if values else float("nan")
            if not abs(score - canary.score) <= TOLERANCE * self.guard.spread:
                dated = "; its chat template prints today's date" * self.chat.has_date
                raise ModelMismatch(
                    f"A canary scores {score:.4g} in this engine and {canary.score:.4g} when the "
                    f"guard was fitted{dated}; fit it again on what is served."
                )

    def close(self) -> None:
        """Close the mailbox."""
        asyncio.get_running_loop().remove_reader(self._mailbox.socket)
        self._mailbox.close()

    def _plan(self, prompt: Prompt) -> tuple[Layout, Sequence[Variant]]:
        """The prompt's tokens, and what is read of it; a long text takes a while."""
        layout = self.chat([prompt])[0]  # first: it refuses what is too long
        return layout, self.guard.plan(prompt)

    def _put(self, prompt: Prompt, layout: Layout, variants: Sequence[Variant] = ()) -> Question:
        ask = ask_about(layout, self._columns.positions, self._mailbox)
        answer = asyncio.get_running_loop().create_future()
        self._waiting[ask.key] = answer
        return Question(prompt, layout.ids, ask, answer, tuple(variants))


def _versions(variants: Sequence[Variant]) -> list[list[Variant]]:
    """The prompt as it stands and each decoded text, with their chunks."""
    return [list(own) for _, own in groupby(variants, key=lambda variant: variant.version)]
