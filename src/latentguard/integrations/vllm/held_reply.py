"""The server's reply on its way to the client: held until the verdict, then let through."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Message, Send


class HeldReply:
    """Stands between the server and the client's ``send``."""

    def __init__(self, send: Send) -> None:
        """Hold everything."""
        self._send, self._held = send, list[Message]()
        self._open, self._note = False, dict[str, Any]()
        self._turn = asyncio.Lock()
        self._head: Message | None = None
        self._body = b""
        self.status: int | None = None
        """Of the reply, once it has begun."""

    async def take(self, message: Message) -> None:
        """What the server sends."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self._held.append(message)
        if self._open:
            await self._flush()

    async def release(self, note: dict[str, Any]) -> None:
        """Let through what is held, and all that comes, with ``note`` in it."""
        self._open, self._note = True, note
        await self._flush()

    async def _flush(self) -> None:
        async with self._turn:
            while self._held:
                await self._pass(self._held.pop(0))

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            if not self._note or content_type(message) != "application/json":
                await self._send(message)
        elif not self._note or self._head is None:
            await self._send(message)
        elif content_type(self._head) == "application/json":
            await self._whole(message)
        else:
            await self._event(message)

    async def _whole(self, message: Message) -> None:
        """One JSON object: its length changes, so its head waits for its end."""
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        assert self._head is not None
        body = json.dumps(_noted(json.loads(self._body), self._note)).encode()
        await self._send(with_length(self._head, len(body)))
        await self._send({"type": "http.response.body", "body": body})

    async def _event(self, message: Message) -> None:
        """Server-sent events: the note goes into the first that is an object."""
        self._body += message.get("body", b"")
        if message.get("more_body") and not self._body.endswith(b"\n\n"):
            return
        lines = self._body.split(b"\n")
        for number, line in enumerate(lines):
            if line.startswith(b"data: {"):
                lines[number] = (
                    b"data: " + json.dumps(_noted(json.loads(line[6:]), self._note)).encode()
                )
                self._note = {}
                break
        whole, self._body = b"\n".join(lines), b""
        await self._send({**message, "body": whole})


def _noted(content: Any, note: dict[str, Any]) -> Any:
    return content | note if isinstance(content, dict) else content


def with_length(head: Any, length: int) -> Any:
    """The head of a request or an answer whose body has another length."""
    dropped = (b"content-length", b"transfer-encoding")
    headers = [header for header in head["headers"] if header[0].lower() not in dropped]
    return {**head, "headers": [*headers, (b"content-length", str(length).encode())]}


def content_type(head: Message) -> str:
    """Of an answer, without its parameters."""
    headers = dict(head["headers"])
    return bytes(headers.get(b"content-type", b"")).decode("latin-1").split(";")[0]
