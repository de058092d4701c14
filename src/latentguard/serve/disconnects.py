"""Clients that leave before their answer: what was begun for them is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from latentguard.serve.errors import ClientDisconnected

T = TypeVar("T")


async def run_until(work: Coroutine[Any, Any, T], disconnect: Coroutine[Any, Any, Any]) -> T:
    """What some work gives, stopped as soon as ``disconnect`` ends.

    Raises:
        ClientDisconnected: if the client left first.
    """
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(disconnect)
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected("The client has left.")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.wait({task, watcher})


async def run_while_connected(work: Coroutine[Any, Any, T], request: Request) -> T:
    """What some work gives, as long as the client is there.

    Raises:
        ClientDisconnected: if it left first.
    """
    return await run_until(work, _leaves(request))


async def _leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
