"""Several processes of one service: limits counted together by a real Redis, ids, metrics.

Skipped without Debian's ``redis-server``.
"""

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import time

import httpx
import pytest

from latentguard.serve.errors import QueueFull, RateLimited, Unavailable
from serve.running import get, passed, post, running

pytest.importorskip("redis", reason="needs the extra 'redis'")

REDIS = shutil.which("redis-server")
pytestmark = pytest.mark.skipif(not REDIS, reason="needs Debian's redis-server")


@contextlib.contextmanager
def redis_server(folder):
    """A Redis of its own, in memory; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        REDIS,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(folder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(port):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("redis-server did not start")


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def empty(redis):
    from redis import Redis

    with Redis.from_url(redis) as client:
        client.flushall()
    return redis


def limits(url, **given):
    from latentguard.serve.shared_accounts import SharedAccounts

    return SharedAccounts(url, **(dict(concurrency=2, rate=None, burst=1) | given))


def test_requests_under_way_are_counted_together(empty):
    async def both():
        one, other = limits(empty), limits(empty)
        async with one.admit("a"), other.admit("a"):
            with pytest.raises(QueueFull, match="At most 2"):
                async with one.admit("a"):
                    pass
            async with other.admit("b"):
                pass
        async with other.admit("a"):
            pass
        await one.close()
        await other.close()

    asyncio.run(both())


def test_the_rate_is_of_all_processes(empty):
    async def both():
        one, other = (limits(empty, rate=0.01, burst=3, concurrency=9) for _ in range(2))
        for process in (one, other, one):
            async with process.admit("a"):
                pass
        with pytest.raises(RateLimited) as refused:
            async with other.admit("a"):
                pass
        assert 90 <= refused.value.retry <= 100
        await one.close()
        await other.close()

    asyncio.run(both())


def test_the_last_place_is_given_away_once(empty):
    """Fifty requests at once for ten places, from five processes."""

    async def crowd():
        processes = [limits(empty, concurrency=10) for _ in range(5)]
        hold = asyncio.Event()

        async def ask(process):
            try:
                async with process.admit("a"):
                    await hold.wait()
                    return True
            except QueueFull:
                return False

        asks = [asyncio.create_task(ask(process)) for process in processes * 10]
        while sum(task.done() for task in asks) < 40:
            await asyncio.sleep(0.01)
        hold.set()
        admitted = await asyncio.gather(*asks)
        for process in processes:
            await process.close()
        return sum(admitted)

    assert asyncio.run(crowd()) == 10


def test_what_a_killed_process_held_is_given_back(empty, monkeypatch):
    from latentguard.serve import shared_accounts

    async def story():
        dead, alive = limits(empty, concurrency=1), limits(empty, concurrency=1)
        entry = dead.admit("a")
        await entry.__aenter__()
        with pytest.raises(QueueFull):
            async with alive.admit("a"):
                pass
        await asyncio.sleep(1.2)
        async with alive.admit("a"):
            pass
        await entry.__aexit__(None, None, None)
        await dead.close()
        await alive.close()

    monkeypatch.setattr(shared_accounts, "LEASE", 1)
    asyncio.run(story())


def test_two_services_share_a_limit_and_their_lines_never_share_an_id(empty, tmp_path):
    options = dict(redis=empty, rate=0.001, burst=6, keys=["secret"])
    headers = {"authorization": "Bearer secret"}
    logs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    statuses = []
    with running(audit=logs[0], **options) as one, running(audit=logs[1], **options) as two:
        for url in [one, two] * 5:
            body = {"input": passed()}
            statuses.append(post(f"{url}/v1/moderations", json=body, headers=headers).status_code)
        pages = [url.server.service.telemetry.page().decode() for url in (one, two)]
    assert statuses.count(200) == 6
    assert statuses.count(429) == 4
    files = [*logs, *(log.with_name(f"{log.name}.rejected") for log in logs)]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len({line["request"] for line in lines}) == 10
    assert sum(map(_verdicts, pages)) == 6


def _verdicts(page):
    """What a sum over the processes adds up, as Prometheus does."""
    lines = [line for line in page.splitlines() if line.startswith("latentguard_verdicts_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_without_redis_nobody_is_served_and_it_is_not_ready(tmp_path):
    with redis_server(tmp_path) as where, running(redis=where) as url:
        assert post(f"{url}/v1/moderations", json={"input": passed()}).status_code == 200
        from redis import Redis

        with contextlib.suppress(Exception), Redis.from_url(where) as client:
            client.shutdown(nosave=True)
        answer = post(f"{url}/v1/moderations", json={"input": passed()})
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "The limits of clients cannot be read."
        assert get(f"{url}/readyz").status_code == 503
        assert get(f"{url}/healthz").status_code == 200


def test_an_unreachable_redis_is_an_error_in_words():
    async def ask():
        process = limits("redis://127.0.0.1:9/0")
        with pytest.raises(Unavailable, match="limits of clients"):
            async with process.admit("a"):
                pass
        await process.close()

    asyncio.run(ask())


def test_a_client_that_leaves_gives_its_place_back(empty):
    with running(redis=empty, concurrency=1) as url:
        chat = {"messages": [{"role": "user", "content": passed()}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=chat, timeout=30) as answer:
            next(answer.iter_raw())
        deadline = time.monotonic() + 20
        status = 429
        while status == 429 and time.monotonic() < deadline:
            status = post(f"{url}/v1/moderations", json={"input": passed()}).status_code
            time.sleep(0.1)
        assert status == 200
