"""A server in the place of vLLM's, whose engine reads what a test wants."""

import asyncio
import json
import math
from types import SimpleNamespace

from latentguard.integrations.vllm.score_channel import post
from latentguard.integrations.vllm.score_request import ScoreRequest, TokenScores, digest_ids
from serve.running import offline, passed, tiny_guard, tiny_model

SAID = "The first token of a reply"


class Server:
    """As vLLM's: answers a chat, and posts what was read before its first token."""

    def __init__(self, *, read="right", status=200, stream_parts=4):
        self.read, self.status, self.parts = read, status, stream_parts
        self.model, self.guard = tiny_model(), tiny_guard()
        self.seen, self.stopped = [], False

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await send({"type": "websocket.accept"})
            return
        body = (await receive())["body"]
        if scope["path"] != "/v1/chat/completions":
            await self.reply(send, 200, b'{"route": "open"}')
            return
        headers = dict(scope["headers"])
        assert headers[b"content-length"] == str(len(body)).encode()
        asked = json.loads(body)
        self.seen.append(asked)
        if self.status != 200:
            await self.reply(send, self.status, b'{"error": {"message": "no"}}')
            return
        if asked.get("stream"):
            await self.stream(asked, receive, send)
        else:
            self.answer(asked)
            await asyncio.sleep(0.01)
            choice = {"index": 0, "message": {"role": "assistant", "content": SAID}}
            await self.reply(send, 200, json.dumps({"choices": [choice]}).encode())

    async def stream(self, asked, receive, send):
        head = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for n in range(self.parts):
            if n == 1:
                self.answer(asked)
            event = b"data: " + json.dumps({"choices": [{"delta": {"content": SAID}}]}).encode()
            await send({"type": "http.response.body", "body": event + b"\n\n", "more_body": True})
            await asyncio.sleep(0.01)
        gone = asyncio.ensure_future(receive())
        await asyncio.sleep(0.01)
        self.stopped = gone.done() and gone.result()["type"] == "http.disconnect"
        gone.cancel()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def answer(self, asked):
        ask = ScoreRequest(**asked["kv_transfer_params"]["latentguard"])
        text = asked["messages"][-1]["content"]
        layout = self.model.chat([SimpleNamespace(text=text, id="", history=())])[0]
        if self.read == "nothing":
            return
        if self.read == "other" or digest_ids(layout.ids) != ask.ids:
            post([(ask, None)])
            return
        width = len(self.guard.reading.positions)
        score = (offline()[text].score - self.guard.probe.bias) / width
        values = [score] * width + [0.5] * len(self.guard.axes)
        post([(ask, [math.nan] * len(values) if self.read == "nan" else values)])

    async def reply(self, send, status, content):
        head = [(b"content-type", b"application/json")]
        head.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": content})


class Besides:
    """In the place of the engine: what it reads in passes of their own."""

    def __init__(self, *values):
        self.values, self.asked = list(values), []

    async def __call__(self, prompt):
        self.asked.append(prompt.text)
        value = self.values.pop(0)
        if isinstance(value, Exception):
            raise value
        return value


def chat(text, **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def values_of(score, guard=None):
    """What an engine reads where the score is this."""
    guard = guard or tiny_guard()
    width = len(guard.reading.positions)
    return [(score - guard.probe.bias) / width] * width + [0.5] * len(guard.axes)


HIDDEN = "\u0336".join(passed())
"""A prompt that the guard passes, disguised."""


class Hidden(Server):
    """Reads a disguised chat as the least harmful."""

    def answer(self, asked):
        ask = ScoreRequest(**asked["kv_transfer_params"]["latentguard"])
        post([(ask, values_of(offline()[passed()].score))])


PROMPT_IDS = [900, 901]


class LastTokens:
    """In the place of the engine: what it reads of the last token of a reply."""

    def __init__(self, score):
        self.score, self.asked = score, []

    async def __call__(self, ids):
        self.asked.append(ids)
        assert self.score is not None, "the last token was not to be read"
        if isinstance(self.score, Exception):
            raise self.score
        return self.score


class Replies(Server):
    """Writes one token in an event; posts its score once the next one is written, as vLLM does."""

    def __init__(
        self, *scores, finish="stop", stop_reason=None, at_once=1, lost=(), prompt="right"
    ):
        super().__init__(read=prompt)
        self.scores, self.finish, self.stop_reason = scores, finish, stop_reason
        self.at_once, self.lost = at_once, lost
        self.written = 0

    @property
    def words(self):
        return [f"<{n}>" for n in range(len(self.scores))]

    def tell(self, asked, n, choice=0):
        """Post the score of a token, unless it gets lost."""
        ask = ScoreRequest(**asked["kv_transfer_params"]["latentguard"])
        assert ask.tail == 0
        if n not in self.lost:
            post([], [(ask, TokenScores(ask.key, choice, n, (float(self.scores[n]),)))])

    async def __call__(self, scope, receive, send):
        body = (await receive())["body"]
        asked = json.loads(body)
        self.seen.append(asked)
        assert asked["return_token_ids"] is True
        gone = asyncio.ensure_future(receive())
        writing = asyncio.ensure_future(self.write(asked, send))
        await asyncio.wait({gone, writing}, return_when=asyncio.FIRST_COMPLETED)
        self.stopped = not writing.done()
        gone.cancel()
        writing.cancel()

    async def write(self, asked, send):
        count = len(self.scores)
        self.answer(asked)
        if not asked.get("stream"):
            for n in range(count):
                await asyncio.sleep(0.002)
                self.written = n + 1
                if n:
                    self.tell(asked, n - 1)
            await self.reply(send, 200, json.dumps(self.whole(asked)).encode())
            return
        head = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}}
        await self.event(send, {"choices": [role], "prompt_token_ids": PROMPT_IDS})
        for first in range(0, count, self.at_once):
            ids = list(range(first, min(first + self.at_once, count)))
            for n in ids:
                if n:
                    self.tell(asked, n - 1)
            self.written = ids[-1] + 1
            text = "".join(self.words[n] for n in ids)
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            if ids[-1] == count - 1:
                choice |= {"finish_reason": self.finish, "stop_reason": self.stop_reason}
                if self.finish == "stop" and self.stop_reason is None:
                    choice["delta"]["content"] = text.removesuffix(self.words[-1])
            await self.event(send, {"id": "c", "choices": [choice | {"token_ids": ids}]})
            await asyncio.sleep(0.002)
        if (asked.get("stream_options") or {}).get("include_usage"):
            await self.event(send, {"choices": [], "usage": {"completion_tokens": count}})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def whole(self, asked):
        words = self.words[:-1] if self.finish == "stop" else self.words
        message = {"role": "assistant", "content": "".join(words)}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        choice |= {"stop_reason": self.stop_reason, "token_ids": list(range(len(self.scores)))}
        return {"choices": [choice], "prompt_token_ids": PROMPT_IDS}

    async def event(self, send, data):
        body = b"data: " + json.dumps(data).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})
