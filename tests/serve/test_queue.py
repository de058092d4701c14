"""The queue: fair by tokens between accounts, batches of like lengths, room for those with less."""

import asyncio

import pytest

from latentguard.prompts import Prompt
from latentguard.serve.errors import QueueFull
from latentguard.serve.queue import FairQueue, WorkItem


@pytest.fixture(autouse=True)
def loop():
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture
def item(loop):
    def make(account, size=10, request=None):
        return WorkItem(loop.create_future(), Prompt("a"), None, size, account, request=request)

    return make


def names(items):
    return "".join(one.account for one in items)


def drained(queue, budget):
    batches = []
    while len(queue):
        batches.append(names(queue.take(budget)))
    return batches


def test_accounts_take_turns_by_tokens(item):
    """One with prompts four times as long has a quarter of the turns."""
    queue = FairQueue(100)
    queue.add([item("a", 40) for _ in range(10)])
    queue.add([item("b", 10) for _ in range(10)])
    first = "".join(drained(queue, 1))[:10]
    assert first.count("a") == 2
    assert first.count("b") == 8


def test_one_that_was_idle_does_not_save_up(item):
    queue = FairQueue(100)
    queue.add([item("a") for _ in range(20)])
    for _ in range(10):
        queue.take(1)
    queue.add([item("b") for _ in range(10)])
    assert "".join(drained(queue, 1)).startswith(("ab" * 9, "ba" * 9))


def test_one_that_asks_for_one_long_thing_at_a_time_gains_nothing(item):
    """What was read for it is not forgotten while it waits for nothing."""
    queue, order = FairQueue(100), ""
    queue.add([item("b", 10) for _ in range(30)])
    while "b" in (waiting := {one.account for one in queue}):
        if "a" not in waiting:
            queue.add([item("a", 100)])
        order += names(queue.take(1))
    assert order.count("a") <= 4


def test_a_batch_holds_prompts_of_like_length(item):
    queue = FairQueue(100)
    for size in (10, 90, 12, 11, 80):
        queue.add([item("a", size)])
    assert [one.size for one in queue.take(36)] == [10, 11, 12]
    assert [one.size for one in queue.take(36)] == [90]


def test_a_batch_may_be_limited_to_short_prompts(item):
    queue = FairQueue(100)
    queue.add([item("a", 50), item("a", 10)])
    assert [one.size for one in queue.take(100, max_size=20)] == [10]
    assert queue.take(100, max_size=20) == []
    assert len(queue) == 1


def test_work_that_is_done_alone_has_no_company(item, loop):
    queue = FairQueue(100)
    queue.add([WorkItem(loop.create_future(), None, lambda *_: None, 10, "a")])
    queue.add([item("a"), item("a")])
    assert [len(queue.take(100)) for _ in range(2)] == [1, 2]


def test_the_largest_makes_room_for_one_with_less(item):
    queue, requests = FairQueue(6), [object(), object()]
    queue.add([item("a", request=requests[0]) for _ in range(3)])
    queue.add([item("a", request=requests[1]) for _ in range(3)])
    evicted = queue.add([item("b")])
    assert {one.request for one in evicted} == {requests[1]}
    assert len(evicted) == 3
    assert len(queue) == 4


def test_nobody_makes_room_for_one_with_more(item):
    queue = FairQueue(6)
    queue.add([item("a") for _ in range(3)])
    queue.add([item("b") for _ in range(3)])
    with pytest.raises(QueueFull):
        queue.add([item("b")])
    with pytest.raises(QueueFull):
        queue.add([item("c") for _ in range(3)])
    assert len(queue) == 6


def test_a_request_that_fits_in_nobodys_place_leaves_all_where_they_are(item):
    queue = FairQueue(4)
    queue.add([item("a", request=object()) for _ in range(4)])
    with pytest.raises(QueueFull):
        queue.add([item("b") for _ in range(3)])
    assert names(queue) == "aaaa"


def test_what_nobody_waits_for_is_dropped(item):
    queue = FairQueue(100)
    items = [item("a") for _ in range(3)]
    queue.add(items)
    items[1].future.cancel()
    assert len(queue.take(100)) == 2


def test_only_accounts_that_were_served_less_go_before_one_that_is_being_served(item):
    queue = FairQueue(100)
    queue.add([item("a", 50), item("a", 5)])
    assert names(queue.take(100)) == "aa"
    queue.add([item("a", 5)])
    queue.add([item("b", 30)])
    assert names(queue.take(100, before="a")) == "b"
    assert queue.take(100, before="a") == []
    assert names(queue.take(100)) == "a"


def test_what_was_read_for_an_account_elsewhere_counts(item):
    queue = FairQueue(100)
    queue.add([item("b", 50)])
    queue.charge("a", 10)
    queue.add([item("a", 5)])
    assert names(queue.take(1) + queue.take(1)) == "ba"


def test_what_was_read_while_nobody_waited_is_no_debt(item):
    queue = FairQueue(100)
    for _ in range(100):
        queue.charge("a", 10)
    queue.add([item("b", 20) for _ in range(10)])
    queue.add([item("a", 10)])
    assert "a" in "".join(names(queue.take(1)) for _ in range(3))
