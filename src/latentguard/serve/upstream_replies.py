"""Replies that an upstream writes, followed by the guard's model with a cache of its own.

What comes is held back in chunks: a chunk of a stream is sent on once all of its text was read. All
text of a choice is read, in the order in which it comes: reasoning, content, refusals, arguments of
calls.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from latentguard.errors import GuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.replies import ReplyProbe, ReplyVerdict, running_scores
from latentguard.models.chat_model import ChatModel
from latentguard.models.reply_reading import ReplyReader
from latentguard.prompts import Prompt
from latentguard.serve.errors import ApiError, UpstreamError
from latentguard.serve.messages import READ_FIELDS
from latentguard.serve.replies import reply_note, sse_event
from latentguard.serve.reply_reading import reply_action
from latentguard.serve.service import RequestContext

DONE = b"data: [DONE]"


class FollowedChoice:
    """One choice of an upstream's answer, as it is read."""

    def __init__(self, context: RequestContext, prompt: Prompt) -> None:
        """Begin before the first piece.

        Args:
            context: The request.
            prompt: The chat in context.
        """
        self._context = context
        self._prompt = prompt
        self._reader: ReplyReader | None = None
        self._running = np.zeros(0)
        self.text = ""
        """All that came so far."""

        self.is_flagged = False
        """Whether a running score was above the threshold at any reading."""

    @property
    def score(self) -> float | None:
        """The running score after the last token that was read."""
        return float(self._running[-1]) if len(self._running) else None

    async def read(self, *, is_whole: bool) -> None:
        """Read what came since the last reading.

        Raises:
            ApiError: if it cannot be read.
        """
        if not self.text.strip():
            return
        text = self.text
        judge = self._judge

        def work(guard: LatentGuard, model: ChatModel) -> list[float]:
            if self._reader is None:
                probe = guard.require_reply_probe().probe
                self._reader = ReplyReader(model, self._prompt, probe.layers, probe.weight)
            return self._reader.read(text, is_whole=is_whole)

        piece = Prompt(text[-256:], id=self._prompt.id)  # as much as is new, for a fair share
        engine = self._context.service.engine
        scores = await engine.run_alone(
            piece, work, account=self._context.account, served=self._context.served
        )
        self._running = running_scores([score + judge.probe.bias for score in scores])
        self.is_flagged |= bool((~(self._running <= judge.threshold)).any())

    def verdict(self) -> ReplyVerdict | None:
        """On what was read; None if that is nothing.

        Raises:
            GuardError: if a score is not finite.
        """
        if not len(self._running):
            return None
        return self._judge.decide(self._prompt.id, self._running)

    @property
    def _judge(self) -> ReplyProbe:
        return self._context.served.guard.require_reply_probe()


@dataclass(frozen=True)
class _Chunk:
    """Some lines of a stream."""

    lines: list[bytes]
    """As they came."""

    is_due: bool
    """Whether what came is to be read now."""

    is_whole: bool
    """Whether no more comes."""


class FollowedReply:
    """All choices of an upstream's answer."""

    def __init__(self, context: RequestContext, prompt: Prompt) -> None:
        """Begin before the first piece."""
        self._context = context
        self._prompt = prompt
        self._policy = context.service.config.on_flagged_reply
        self._size = max(1, context.service.config.hold_tokens)
        self._choices: dict[int, FollowedChoice] = {}
        self._head: dict[str, Any] = {}

    async def stream(self, lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The lines of a stream of events, each once its text was read.

        Raises:
            ApiError: if a reply cannot be read; nothing that was not read is sent on then.
        """
        held: list[bytes] = []
        is_over = False
        async for chunk in self._chunks(lines):
            is_over |= chunk.is_whole
            held += chunk.lines
            if chunk.is_due:
                await self._read(is_whole=chunk.is_whole)
            if self._must_end:
                held = await self._cut()
            elif self._policy == "block" and not is_over:
                continue
            else:
                held = await self._released(held, is_whole=chunk.is_whole)
            for line in held:
                yield line
            held = []
            if self._must_end:
                return

    async def _chunks(self, lines: AsyncIterator[bytes]) -> AsyncIterator[_Chunk]:
        """Lines in chunks of so many pieces of text; a shadow waits for none of them."""
        held: list[bytes] = []
        unread = 0
        is_over = False
        async for line in lines:
            unread += self._add(_event(line))
            held.append(line)
            is_whole = line.strip() == DONE and not is_over
            is_over |= is_whole
            is_due = is_whole or unread >= self._size
            if is_due or is_over or self._policy == "shadow":
                yield _Chunk(held, is_due, is_whole)
                held = []
                unread = 0 if is_due else unread
        if not is_over:  # the stream ended without a word
            yield _Chunk(held, True, True)

    async def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """An answer in one, once its text was read; what is flagged is cut away or refused.

        Raises:
            ApiError: if a reply cannot be read.
        """
        for index, text in _texts(body, "message"):
            self._choice(index).text += text
        await self._read(is_whole=True)
        notes = await self._record()
        if self._must_end:
            refusal = self._context.service.config.refusal
            message = {"role": "assistant", "content": refusal, "refusal": refusal}
            for choice in body["choices"]:
                if self._choice(choice.get("index", 0)).is_flagged:
                    choice |= {"message": message, "finish_reason": "content_filter"}
                    choice.pop("logprobs", None)
        said = dict(body.get("latentguard") or {}) | dict(notes.get("latentguard", {}))
        return body | ({"latentguard": said} if said else {})

    # ---- reading

    def _choice(self, index: int) -> FollowedChoice:
        if index not in self._choices:
            self._choices[index] = FollowedChoice(self._context, self._prompt)
        return self._choices[index]

    def _add(self, event: Mapping[str, Any]) -> int:
        """Take up the text of an event; returns how many pieces of text it holds."""
        texts = _texts(event, "delta")
        if texts:
            self._head = {name: event[name] for name in ("id", "created", "model") if name in event}
        for index, text in texts:
            self._choice(index).text += text
        return sum(bool(text) for _, text in texts)

    async def _read(self, *, is_whole: bool) -> None:
        try:
            for choice in self._choices.values():
                await choice.read(is_whole=is_whole)
        except ApiError:
            if self._policy != "shadow":
                raise

    @property
    def _must_end(self) -> bool:
        is_flagged = any(choice.is_flagged for choice in self._choices.values())
        return is_flagged and self._policy in ("cut", "block")

    async def _released(self, held: list[bytes], *, is_whole: bool) -> list[bytes]:
        """Events that may go on, with what is noted of them."""
        if self._policy == "annotate":
            held = [self._annotated(line) for line in held]
        notes = await self._record() if is_whole else {}
        if notes and held and held[-1].strip() == DONE:
            note = self._chunk_event([], notes)
            held = [*held[:-1], *note.encode().split(b"\n")[:-1], held[-1]]
        return held

    def _annotated(self, line: bytes) -> bytes:
        event = _event(line)
        scores = [self._choice(index).score for index, text in _texts(event, "delta") if text]
        if not scores or scores[0] is None:
            return line
        note = dict(event.get("latentguard") or {}) | {"reply_score": scores[0]}
        return b"data: " + json.dumps(event | {"latentguard": note}).encode()

    async def _cut(self) -> list[bytes]:
        """The end of a stream whose reply was flagged."""
        notes = await self._record()
        refusal = self._context.service.config.refusal
        choices = []
        for index in self._choices:
            delta = {"content": refusal} if self._policy == "block" else {}
            choices.append(dict(index=index, delta=delta, finish_reason="content_filter"))
        end = f"{self._chunk_event(choices, notes)}data: [DONE]\n\n"
        return end.encode().split(b"\n")[:-1]

    def _chunk_event(self, choices: list[dict[str, Any]], notes: Mapping[str, Any]) -> str:
        head = self._head | {"object": "chat.completion.chunk", "choices": choices}
        return sse_event(head | dict(notes))

    async def _record(self) -> dict[str, Any]:
        """Note the verdict on each choice; returns what the answer says of the most severe."""
        verdicts = []
        for choice in self._choices.values():
            try:
                verdict = choice.verdict()
            except GuardError as error:
                if self._policy != "shadow":
                    raise UpstreamError(str(error)) from None
                continue
            if verdict is not None:
                verdicts.append(verdict)
                action = reply_action(self._policy, verdict)
                await self._context.record_reply(self._prompt, verdict, action)
        if not verdicts:
            return {}
        worst = max(verdicts, key=lambda one: (one.flagged, one.score))
        return reply_note(self._context, worst)


def _texts(answer: Mapping[str, Any], part: Literal["message", "delta"]) -> list[tuple[int, str]]:
    """The index of each choice, and the text of its message or delta.

    Raises:
        UpstreamError: if the choices are of another shape than OpenAI's.
    """
    try:
        return [
            (int(choice.get("index", 0)), message_text(choice.get(part) or {}))
            for choice in answer.get("choices") or ()
        ]
    except (AttributeError, TypeError, ValueError):
        raise UpstreamError("The upstream's choices cannot be read.") from None


def message_text(message: Mapping[str, Any]) -> str:
    """All text of a message or a delta: reasoning, content, refusal, arguments of calls."""
    texts = [message.get(name) for name in (*READ_FIELDS, "content")]
    calls = [*(message.get("tool_calls") or ()), {"function": message.get("function_call")}]
    texts += [(call.get("function") or {}).get("arguments") for call in calls]
    return "".join(_strings(texts))


def _strings(value: Any) -> Iterator[str]:
    """All strings of a value but the types of parts: some services send content in parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
    elif isinstance(value, dict):
        yield from _strings([inner for name, inner in value.items() if name != "type"])


def _event(line: bytes) -> dict[str, Any]:
    """The object of an event's line; an empty one of any other line.

    Raises:
        UpstreamError: if the line holds no JSON.
    """
    if not line.startswith(b"data:") or line.strip() == DONE:
        return {}
    try:
        event = json.loads(line[5:])
    except (ValueError, RecursionError):
        raise UpstreamError("An event of the upstream's stream is no JSON.") from None
    return event if isinstance(event, dict) else {}
