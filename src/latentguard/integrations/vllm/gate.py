"""The guard as the server's middleware sees it: a chat -> a question, its answer -> a verdict."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentguard.canaries import TOLERANCE
from latentguard.errors import ModelMismatch, PromptError, TemplateError
from latentguard.guard import LatentGuard
from latentguard.integrations.vllm.asking import Ask, ask_about, readable, verdicts_of
from latentguard.integrations.vllm.columns import Columns
from latentguard.integrations.vllm.mailbox import Mailbox
from latentguard.model.chat import ChatTokenizer
from latentguard.parts import Verdict
from latentguard.prompts import Prompt
from latentguard.serve.faults import BadRequest
from latentguard.serve.messages import ChatMessage, prompt_of

Values = tuple[float, ...] | None
"""What was read; None if the engine's tokens were not those that were asked about."""


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


class Gate:
    """One guard, for one engine; belongs to one event loop."""

    def __init__(self, guard: LatentGuard, tokenizer: Any) -> None:
        """Prepare.

        Raises:
            ModelMismatch: if tokenizer or template are not the guard's own.
            GuardError: if the guard cannot run inside vLLM.
        """
        self.guard, self.chat = readable(guard), ChatTokenizer(tokenizer)
        self._columns = Columns.of(guard)
        found = self.chat.tokenizer_digest, self.chat.template_digest
        if found != (guard.fingerprint.tokenizer, guard.fingerprint.template):
            raise ModelMismatch(
                f"This guard was fitted on '{guard.fingerprint.model}'; the tokenizer or the chat "
                "template that the server uses is another. Use that model's own."
            )
        self._mailbox = Mailbox()
        self._waiting = dict[str, asyncio.Future[Values]]()
        asyncio.get_running_loop().add_reader(self._mailbox.socket, self.collect)

    def question(self, body: dict[str, Any]) -> Question:
        """The question about a chat, put into its body; what a client sent in its place is dropped.

        Raises:
            BadRequest: if the guard cannot read the chat.
        """
        if body.get("use_beam_search"):
            raise BadRequest("Beam search has no prefill of its own to read; leave it out.")
        try:
            prompt = prompt_of(Chat.model_validate(body).messages)
            question = self._put(prompt)
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

    def collect(self) -> None:
        """Hand out what has arrived."""
        for answer in self._mailbox.collect():
            waiting = self._waiting.get(answer.key)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer.values)

    def forget(self, question: Question) -> None:
        """Nobody waits for this any more."""
        self._waiting.pop(question.ask.key, None)

    def verdict(self, question: Question, values: tuple[float, ...]) -> Verdict:
        """The verdict.

        Raises:
            GuardError: if a number is missing or not finite.
        """
        return verdicts_of(self.guard, [question.prompt], [values])[0]

    async def check(self, engine: Any) -> None:
        """Score the guard's canaries in the running engine.

        Raises:
            ModelMismatch: if one has another score than when the guard was fitted, or none.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        for canary in self.guard.canaries:
            question = self._put(Prompt(canary.text, id="canary"))
            how = SamplingParams(
                max_tokens=1, extra_args={"kv_transfer_params": question.ask.params}
            )
            tokens = TokensPrompt(prompt_token_ids=list(question.ids))
            async for _ in engine.generate(tokens, how, request_id=question.ask.key):
                pass
            self.collect()
            self.forget(question)
            values = question.answer.result() if question.answer.done() else None
            score = self.verdict(question, values).score if values else float("nan")
            if not abs(score - canary.score) <= TOLERANCE * self.guard.spread:
                raise ModelMismatch(
                    f"A canary scores {score:.4g} in this engine and {canary.score:.4g} when the "
                    "guard was fitted; fit it again on what is served."
                )

    def close(self) -> None:
        """Close the mailbox."""
        asyncio.get_running_loop().remove_reader(self._mailbox.socket)
        self._mailbox.close()

    def _put(self, prompt: Prompt) -> Question:
        layout = self.chat([prompt])[0]
        ask = ask_about(layout, self._columns.positions, self._mailbox)
        answer = asyncio.get_running_loop().create_future()
        self._waiting[ask.key] = answer
        return Question(prompt, layout.ids, ask, answer)
