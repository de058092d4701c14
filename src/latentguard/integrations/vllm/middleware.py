"""Middleware of vLLM's OpenAI server: no token of a chat leaves before its verdict.

Chats are guarded; what generates nothing is let through; everything else is refused, and so is a
route that a new vLLM brings.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from fastapi.datastructures import Headers
from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Send

from latentguard.errors import GuardError, LatentGuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.integrations.vllm.chat_guard import ChatGuard, PendingChat, require_answer
from latentguard.integrations.vllm.held_reply import HeldReply, with_length
from latentguard.integrations.vllm.judged_reply import JudgedChat, JudgedReply
from latentguard.integrations.vllm.plugin import VARIABLE
from latentguard.serve.chat_thresholds import DecidedReading
from latentguard.serve.config import Policy, RateOf, ReplyPolicy, ServeConfig
from latentguard.serve.disconnects import run_until
from latentguard.serve.errors import (
    ApiError,
    BadRequest,
    ClientDisconnected,
    PayloadTooLarge,
    Unavailable,
)
from latentguard.serve.json_limits import require_small_json
from latentguard.serve.keys import ApiKeys
from latentguard.serve.replies import ChatWriter, refused_reply

log = logging.getLogger("latentguard.vllm")

POLICY = "LATENTGUARD_POLICY"
REFUSAL = "LATENTGUARD_REFUSAL"
SEGMENT_HEADER = "LATENTGUARD_SEGMENT_HEADER"
RATE_OF = "LATENTGUARD_RATE_OF"
REPLY_POLICY = "LATENTGUARD_REPLY_POLICY"
HOLD_TOKENS = "LATENTGUARD_HOLD_TOKENS"

POLICIES: tuple[Policy, ...] = ("block", "annotate")
"""What becomes of a flagged chat: refused, or answered with its verdict."""

REPLY_POLICIES: tuple[ReplyPolicy, ...] = get_args(ReplyPolicy)
"""What becomes of a flagged reply."""

RATES: tuple[RateOf, ...] = get_args(RateOf)
"""What the false-positive rate is of."""

CHAT = "/v1/chat/completions"
HARMLESS = {
    *(("GET", path) for path in ("/health", "/ping", "/version", "/load", "/v1/models")),
    *(("GET", path) for path in ("/metrics", "/metrics/", "/docs", "/openapi.json")),
    *(("POST", path) for path in ("/ping", "/tokenize", "/detokenize")),
}
"""What generates nothing."""

MOST = 8 << 20
"""Bytes of a request's body."""


Choice = TypeVar("Choice", bound=str)


class Forbidden(ApiError):
    """A route that is not guarded."""

    status, kind, code = 403, "invalid_request_error", "route_not_guarded"


class OtherTokens(BadRequest):
    """The engine's tokens are not those that the guard laid out."""

    code = "unreadable_prompt"


class GuardMiddleware:
    """A pure ASGI middleware; give its path to ``--middleware``."""

    def __init__(self, app: Any) -> None:
        """Wrap the server."""
        self._app, self._opening = app, asyncio.Lock()
        self._chat_guard: ChatGuard | None = None
        self._config = _config()
        self._segment_header = self._config.segment_header or ""

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Guard, let through or refuse."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
        elif kind != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["method"] == "OPTIONS" or (scope["method"], scope["path"]) in HARMLESS:
            await self._app(scope, receive, send)
        else:
            try:
                if (scope["method"], scope["path"]) != ("POST", CHAT):
                    raise Forbidden(
                        f"Only {CHAT} is guarded here, so {scope['path'][:80]} is closed."
                    )
                await self._chat(scope, receive, send)
            except ApiError as fault:
                answer = JSONResponse(fault.body, fault.status, fault.headers)
                await answer(scope, receive, send)

    async def _chat(self, scope: Any, receive: Receive, send: Send) -> None:
        _keys(scope).require(Headers(scope=scope).get("authorization", ""))
        body = await _read(receive)
        chat_guard = await self._opened(scope)
        segment = Headers(scope=scope).get(self._segment_header) or None
        chat = await chat_guard.begin(body, segment)
        stop, disconnect = asyncio.Event(), asyncio.Event()
        judged = None
        if chat.reply is not None:
            judged = JudgedReply(JudgedChat(chat_guard, chat, self._config, stop), send)
        held_reply = HeldReply(send if judged is None else judged.take)
        content = json.dumps(body).encode()
        inner = asyncio.create_task(
            self._app(
                with_length(scope, len(content)), _feed(content, stop, disconnect), held_reply.take
            )
        )
        client = asyncio.create_task(_watch(receive, disconnect))
        try:
            await asyncio.wait({inner, chat.own.response}, return_when=asyncio.FIRST_COMPLETED)
            chat_guard.collect()
            decided: DecidedReading | None = None
            note: dict[str, Any] = {}
            if chat.own.response.done() or held_reply.status == 200:
                decided = await self._decide(chat_guard, chat, disconnect)
                note = _note(decided)
            if decided is not None and self._is_blocked(decided):
                stop.set()
                await self._refuse(chat, note, body)(scope, receive, send)
            else:
                await held_reply.release(note)
                if judged is not None and (answer := await judged.run(inner, note)):
                    await answer(scope, receive, send)
            await inner
        finally:
            stop.set()
            client.cancel()
            chat_guard.forget(chat.own)
            if not inner.done():
                await asyncio.wait({inner}, timeout=5)
                inner.cancel()

    async def _decide(
        self, chat_guard: ChatGuard, chat: PendingChat, disconnect: asyncio.Event
    ) -> DecidedReading | None:
        """The verdict; None if there is none and the chat is answered all the same.

        Raises:
            ApiError: if the chat is not answered.
        """
        values = self._read(chat)
        if values is None:
            return None
        work = require_answer(chat_guard.decide(chat, values))
        return await run_until(work, disconnect.wait())

    def _read(self, chat: PendingChat) -> tuple[float, ...] | None:
        """What the engine read; None if it could not, and the chat is answered all the same.

        Raises:
            Unavailable: if nothing was read (fail closed).
            OtherTokens: if the guard could not read what the engine was given.
        """
        if not chat.own.response.done():
            raise Unavailable("The engine gave no score for this chat.")
        values = chat.own.response.result()
        if values is None and self._config.policy == "block":
            raise OtherTokens(
                "The prompt's tokens are not those of its messages in the chat template: control "
                "tokens in a message, tools, or template options. The guard cannot read it."
            )
        return values

    def _is_blocked(self, decided: DecidedReading) -> bool:
        verdict = decided.verdict
        return self._config.policy == "block" and (verdict.flagged or verdict.decision == "block")

    def _refuse(self, chat: PendingChat, note: dict[str, Any], body: dict[str, Any]) -> Any:
        """What a blocked chat is answered with, as by ``latentguard serve``."""
        options = body.get("stream_options") or {}
        reply = ChatWriter(
            chat.own.request.key,
            str(body.get("model")),
            note,
            usage=bool(options.get("include_usage")),
        )
        return refused_reply(reply, self._config.refusal, is_stream=bool(body.get("stream")))

    async def _opened(self, scope: Any) -> ChatGuard:
        """The chat_guard; made, and compared with the running engine, when the first chat comes.

        Raises:
            Unavailable: if the guard does not fit the engine.
        """
        async with self._opening:
            if self._chat_guard is None:
                try:
                    self._chat_guard = await open_chat_guard(
                        scope["app"].state, self._config.rate_of
                    )
                except LatentGuardError as error:
                    log.error("Every chat is refused: %s", error)
                    raise Unavailable("The guard does not fit the engine.") from None
        return self._chat_guard


def _config() -> ServeConfig:
    """What the environment says.

    Raises:
        GuardError: if it says what is not known; the server then does not start.
    """
    hold_tokens = os.environ.get(HOLD_TOKENS, str(ServeConfig.hold_tokens))
    if not hold_tokens.isdecimal():
        raise GuardError(f"{HOLD_TOKENS} is '{hold_tokens}'; expected a whole number.")
    return ServeConfig(
        policy=_choice(POLICY, POLICIES),
        reply_policy=_choice(REPLY_POLICY, REPLY_POLICIES) if REPLY_POLICY in os.environ else None,
        hold_tokens=int(hold_tokens),
        refusal=os.environ.get(REFUSAL, ServeConfig.refusal),
        rate_of=_choice(RATE_OF, RATES),
        segment_header=os.environ.get(SEGMENT_HEADER),
    )


def _choice(variable: str, choices: Sequence[Choice]) -> Choice:
    """What the environment names, else the first.

    Raises:
        GuardError: if there is no such choice; the server then does not start.
    """
    value = os.environ.get(variable, choices[0])
    for choice in choices:
        if choice == value:
            return choice
    raise GuardError(f"{variable} is '{value}'; expected {' or '.join(choices)}.")


def _keys(scope: Any) -> ApiKeys:
    """VLLM's own keys: it asks for one only behind this middleware, once a chat is laid out."""
    args = getattr(scope["app"].state, "args", None)
    keys = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
    return ApiKeys([key for key in keys if key])


async def open_chat_guard(state: Any, rate_of: RateOf) -> ChatGuard:
    """The chat_guard of the server's engine, once its canaries have passed.

    Raises:
        LatentGuardError: if the guard does not fit the engine.
    """
    from transformers import AutoTokenizer

    config = state.vllm_config.model_config
    guard = LatentGuard.load(os.environ[VARIABLE])
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    chat_guard = ChatGuard(
        guard,
        tokenizer,
        state.engine_client,
        most=config.max_model_len,
        usual_reply=config.get_diff_sampling_param().get("max_tokens"),
        rate_of=rate_of,
    )
    try:
        await chat_guard.check()
    except BaseException:
        chat_guard.close()
        raise
    return chat_guard


def _note(decided: DecidedReading | None) -> dict[str, Any]:
    if decided is None:
        return {"latentguard": {"error": OtherTokens.code}}
    return {"latentguard": decided.verdict.to_dict() | {"threshold": decided.threshold}}


async def _read(receive: Receive) -> dict[str, Any]:
    content, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected("The client has left.")
        content += message.get("body", b"")
        more = message.get("more_body", False)
        if len(content) > MOST:
            raise PayloadTooLarge(f"A body has at most {MOST} bytes.")
    body = require_small_json(bytes(content), ServeConfig.max_elements)
    if not isinstance(body, dict):
        raise BadRequest("The body is no JSON object.")
    return body


async def _watch(receive: Receive, disconnect: asyncio.Event) -> None:
    """Say when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    disconnect.set()


def _feed(body: bytes, *ends: asyncio.Event) -> Receive:
    """The body, and then silence until the client leaves or the guard stops the chat."""
    ready = [body]

    async def feed() -> Message:
        if ready:
            return {"type": "http.request", "body": ready.pop(), "more_body": False}
        waiting = [asyncio.create_task(end.wait()) for end in ends]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"}
        finally:
            for task in waiting:
                task.cancel()

    return feed
