"""Limits of one client: requests under way, and requests a second."""

import pytest

from latentguard.serve import accounts
from latentguard.serve.accounts import Accounts
from latentguard.serve.errors import QueueFull, RateLimited


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(accounts, "monotonic", lambda: now[0])
    return now


def test_so_many_requests_of_one_client_are_under_way():
    limits = Accounts(concurrency=2, rate=None, burst=1)
    with limits.admit("a"), limits.admit("a"):
        with pytest.raises(QueueFull, match="At most 2"), limits.admit("a"):
            pass
        with limits.admit("b"):
            pass
    with limits.admit("a"):
        pass


def test_requests_that_come_too_fast_are_told_when_to_come_again(clock):
    limits = Accounts(concurrency=9, rate=0.5, burst=2)
    for _ in range(2):
        with limits.admit("a"):
            pass
    with pytest.raises(RateLimited) as told, limits.admit("a"):
        pass
    assert told.value.headers == {"retry-after": "2"}
    with limits.admit("b"):
        pass
    clock[0] += 2
    with limits.admit("a"):
        pass


def test_a_pause_saves_up_no_more_than_the_burst(clock):
    limits = Accounts(concurrency=9, rate=1.0, burst=3)
    clock[0] += 1000
    for _ in range(3):
        with limits.admit("a"):
            pass
    with pytest.raises(RateLimited), limits.admit("a"):
        pass


def test_no_more_clients_are_remembered_than_fit(monkeypatch):
    monkeypatch.setattr(accounts, "ACCOUNTS", 10)
    limits = Accounts(concurrency=9, rate=1.0, burst=1)
    for n in range(100):
        with limits.admit(str(n)):
            pass
    assert len(limits._buckets) == 10
