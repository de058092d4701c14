"""Limits of one client: requests under way, and requests a second."""

import asyncio
from contextlib import contextmanager

import pytest

from latentguard.serve import accounts
from latentguard.serve.accounts import Accounts
from latentguard.serve.errors import QueueFull, RateLimited


@contextmanager
def admitted(limits, account):
    """Admitted outside of an event loop."""
    entry, loop = limits.admit(account), asyncio.new_event_loop()
    try:
        loop.run_until_complete(entry.__aenter__())
        yield
        loop.run_until_complete(entry.__aexit__(None, None, None))
    finally:
        loop.close()


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(accounts, "monotonic", lambda: now[0])
    return now


def test_so_many_requests_of_one_client_are_under_way():
    limits = Accounts(concurrency=2, rate=None, burst=1)
    with admitted(limits, "a"), admitted(limits, "a"):
        with pytest.raises(QueueFull, match="At most 2"), admitted(limits, "a"):
            pass
        with admitted(limits, "b"):
            pass
    with admitted(limits, "a"):
        pass


def test_requests_that_come_too_fast_are_told_when_to_come_again(clock):
    limits = Accounts(concurrency=9, rate=0.5, burst=2)
    for _ in range(2):
        with admitted(limits, "a"):
            pass
    with pytest.raises(RateLimited) as told, admitted(limits, "a"):
        pass
    assert told.value.headers == {"retry-after": "2"}
    with admitted(limits, "b"):
        pass
    clock[0] += 2
    with admitted(limits, "a"):
        pass


def test_a_pause_saves_up_no_more_than_the_burst(clock):
    limits = Accounts(concurrency=9, rate=1.0, burst=3)
    clock[0] += 1000
    for _ in range(3):
        with admitted(limits, "a"):
            pass
    with pytest.raises(RateLimited), admitted(limits, "a"):
        pass


def test_no_more_clients_are_remembered_than_fit(monkeypatch):
    monkeypatch.setattr(accounts, "ACCOUNTS", 10)
    limits = Accounts(concurrency=9, rate=1.0, burst=1)
    for n in range(100):
        with admitted(limits, str(n)):
            pass
    assert len(limits._buckets) == 10
