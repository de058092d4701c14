"""Which slots are read, which are forgotten; with a scheduler's output made by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentguard.integrations.vllm.score_request import ScoreRequest, digest_ids
from latentguard.integrations.vllm.slots import Ledger, ReplyDue, SlotScores

BLOCK = 4


def ask(ids, *at):
    return ScoreRequest("box", "key", digest_ids(ids), at)


def scheduled(new=(), old=(), done=(), copies=None):
    """New: name, ids, blocks, computed, tokens, ask; old: name, blocks, computed, tokens."""
    return SimpleNamespace(
        finished_req_ids=set(done),
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=name,
                prompt_token_ids=ids,
                block_ids=(blocks,),
                num_computed_tokens=computed,
                sampling_params=SimpleNamespace(
                    extra_args={"kv_transfer_params": asked.params} if asked else None
                ),
            )
            for name, ids, blocks, computed, _, asked in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[row[0] for row in old],
            new_block_ids=[(row[1],) if row[1] is not None else None for row in old],
            num_computed_tokens=[row[2] for row in old],
            resumed_req_ids={row[0] for row in old if len(row) > 4},
        ),
        num_scheduled_tokens={row[0]: row[4] for row in new} | {row[0]: row[3] for row in old},
        kv_cache_block_copies=copies,
    )


IDS = list(range(10))


def test_a_prompt_in_one_step():
    step = Ledger(BLOCK).step(scheduled(new=[("a", IDS, [7, 3, 5], 0, 10, ask(IDS, 6, 9))]))
    assert step.fresh == (7, 3, 5)
    assert [due.slots for due in step.due] == [((3 * 4 + 2,), (5 * 4 + 1,))]


def test_a_prompt_in_chunks_is_due_with_its_last_token():
    ledger = Ledger(BLOCK)
    first = ledger.step(scheduled(new=[("a", IDS, [7, 3], 0, 6, ask(IDS, 5, 9))]))
    assert (first.fresh, first.due) == ((7, 3), ())
    second = ledger.step(scheduled(old=[("a", [5], 6, 4)]))
    assert second.fresh == (5,)
    assert [due.slots for due in second.due] == [((3 * 4 + 1,), (5 * 4 + 1,))]
    after = ledger.step(scheduled(old=[("a", None, 10, 1)]))
    assert (after.fresh, after.due) == ((), ())


def test_cache_hits_keep_what_they_hold():
    step = Ledger(BLOCK).step(scheduled(new=[("a", IDS, [7, 3, 5], 8, 2, ask(IDS, 6, 9))]))
    assert step.fresh == (5,)
    assert [due.slots for due in step.due] == [((3 * 4 + 2,), (5 * 4 + 1,))]


def test_a_preempted_request_reads_its_new_blocks():
    ledger = Ledger(BLOCK)
    ledger.step(scheduled(new=[("a", IDS, [7, 3], 0, 6, ask(IDS, 5, 9))]))
    back = ledger.step(scheduled(old=[("a", [8, 2, 9], 4, 6, "resumed")]))
    assert back.fresh == (2, 9)  # block 8 was a hit
    assert [due.slots for due in back.due] == [((2 * 4 + 1,), (9 * 4 + 1,))]


def test_a_preempted_request_may_come_as_a_new_one():
    ledger = Ledger(BLOCK)
    ledger.step(scheduled(new=[("a", IDS, [7, 3], 0, 6, ask(IDS, 9))]))
    back = ledger.step(scheduled(new=[("a", IDS, [8, 2, 9], 0, 10, ask(IDS, 9))]))
    assert back.fresh == (8, 2, 9)
    assert [due.slots for due in back.due] == [((9 * 4 + 1,),)]


def test_a_request_without_a_question_still_takes_its_blocks():
    step = Ledger(BLOCK).step(scheduled(new=[("a", IDS, [7, 3, 5], 0, 10, None)]))
    assert (step.fresh, step.due) == ((7, 3, 5), ())


@pytest.mark.parametrize("ids", [[*IDS[:-1], 77], [*IDS, 1], IDS[1:]])
def test_other_tokens_than_those_asked_about_are_refused(ids):
    step = Ledger(BLOCK).step(scheduled(new=[("a", ids, [7, 3, 5], 0, len(ids), ask(IDS, 9))]))
    assert [one.key for one in step.refused] == ["key"]
    assert step.due == ()


def test_an_aborted_request_is_forgotten():
    ledger = Ledger(BLOCK)
    ledger.step(scheduled(new=[("a", IDS, [7, 3], 0, 6, ask(IDS, 9))]))
    ledger.step(scheduled(done=["a"]))
    step = ledger.step(scheduled(new=[("b", IDS, [3, 7, 5], 0, 10, ask(IDS, 9))]))
    assert step.fresh == (3, 7, 5)


def test_copied_blocks_take_their_scores_along():
    pair = SimpleNamespace(src_block_id=1, dst_block_id=2)
    step = Ledger(BLOCK).step(
        scheduled(new=[("a", IDS[:8], [1, 2], 6, 2, ask(IDS[:8], 7))], copies=[pair])
    )
    assert step.copies == ((1, 2),)
    scores = SlotScores(12, 1, BLOCK, torch.device("cpu"))
    scores.write(torch.arange(4, 8), torch.ones(4, 1))
    scores.forget(step.fresh)
    scores.copy(step.copies)
    assert scores.read([[8]]) == [1.0]


def test_slots_are_unknown_until_written_and_again_once_forgotten():
    scores = SlotScores(12, 2, BLOCK, torch.device("cpu"))
    assert scores.read([[0], [11]]) != scores.read([[0], [11]])  # NaN
    scores.write(torch.tensor([5, -1, 11]), torch.tensor([[1.0, 2], [8, 8], [3, 4]]))
    assert scores.read([[5], [11]]) == [1.0, 4.0]
    assert all(v != v for v in scores.read([[0], [10]]))  # padding went nowhere
    scores.forget([1])
    assert scores.read([[5]])[0] != scores.read([[5]])[0]
    assert scores.read([[11], [11]]) == [3.0, 4.0]


@given(st.data())
def test_a_slot_that_is_read_holds_what_was_last_computed_there(data):
    """Random traffic over few blocks: each read value is of the right request and token, or NaN."""
    ledger, scores = Ledger(BLOCK), SlotScores(8 * BLOCK, 1, BLOCK, torch.device("cpu"))
    free, held, skip = list(range(8)), {}, data.draw(st.booleans())
    for number in range(data.draw(st.integers(1, 12))):
        if held and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(held)))
            free += held.pop(name)
            done = [name]
        else:
            done = []
        size = data.draw(st.integers(1, 3))
        if len(free) < size:
            continue
        blocks = [free.pop(data.draw(st.integers(0, len(free) - 1))) for _ in range(size)]
        ids = list(range(number * 100, number * 100 + size * BLOCK))
        asked = ask(ids, len(ids) - 1)
        step = ledger.step(
            scheduled(new=[(f"r{number:02}", ids, blocks, 0, len(ids), asked)], done=done)
        )
        held[f"r{number:02}"] = blocks
        scores.forget(step.fresh)
        written = not (skip and number % 2)
        if written:  # else scoring is off: what was there before must not be read
            slots = [b * BLOCK + k for b in blocks for k in range(BLOCK)]
            scores.write(torch.tensor(slots), torch.tensor(ids).float()[:, None])
        value = scores.read(step.due[0].slots)[0]
        assert value == ids[-1] if written else value != value


def test_a_column_that_averages_reads_every_slot_of_its_span():
    asked = ScoreRequest("box", "key", digest_ids(IDS), (6, 9), (2, 9))
    step = Ledger(BLOCK).step(scheduled(new=[("a", IDS, [7, 3, 5], 0, 10, asked)]))
    slots = tuple(7 * 4 + k for k in (2, 3)) + tuple(3 * 4 + k for k in range(3))
    assert step.due[0].slots == (slots, (5 * 4 + 1,))
    scores = SlotScores(40, 2, BLOCK, torch.device("cpu"))
    scores.write(torch.tensor([*slots[1:], 21]), torch.arange(10.0).reshape(5, 2))
    assert scores.read(step.due[0].slots)[0] != scores.read(step.due[0].slots)[0]  # one is unknown
    scores.write(torch.tensor(slots[:1]), torch.tensor([[10.0, 0.0]]))
    assert scores.read(step.due[0].slots) == pytest.approx([(0 + 2 + 4 + 6 + 10) / 5, 9.0])


def test_a_column_of_an_attended_position_is_weighted_by_that_of_its_query():
    scores = SlotScores(12, 3, BLOCK, torch.device("cpu"), {1: 2})
    values = torch.tensor([[1.0, 10.0, 0.0], [2.0, 20.0, 0.0], [3.0, 40.0, 0.0]])
    values[:, 2] = torch.tensor([1.0, 2.0, 5.0]).log()
    scores.write(torch.tensor([4, 9, 2]), values)
    weighted = (1 * 10 + 2 * 20 + 5 * 40) / 8
    assert scores.read([(4, 9, 2), (4, 9, 2)]) == pytest.approx([2.0, weighted])
    assert math.isnan(scores.read([(4,), (4, 5)])[1])


def follow(ids, tail=0):
    return ScoreRequest("box", "key", digest_ids(ids), (len(ids) - 1,), (), tail)


def replied(step):
    return [(due.choice, due.start, due.slots) for due in step.replies]


class TestReplies:
    """Each token of a reply is read once, in the step that first computes it."""

    def test_tokens_are_read_one_by_one_as_they_are_computed(self):
        ledger = Ledger(BLOCK)
        first = ledger.step(scheduled(new=[("a", IDS, [7, 3, 5], 0, 10, follow(IDS))]))
        assert (len(first.due), replied(first)) == (1, [])
        assert replied(ledger.step(scheduled(old=[("a", None, 10, 1)]))) == [(0, 0, (22,))]
        assert replied(ledger.step(scheduled(old=[("a", None, 11, 1)]))) == [(0, 1, (23,))]
        assert replied(ledger.step(scheduled(old=[("a", [2], 12, 1)]))) == [(0, 2, (8,))]

    def test_nothing_is_read_of_a_reply_that_nobody_asked_for(self):
        ledger = Ledger(BLOCK)
        ledger.step(scheduled(new=[("a", IDS, [7, 3, 5], 0, 10, ask(IDS, 9))]))
        assert replied(ledger.step(scheduled(old=[("a", None, 10, 1)]))) == []

    def test_a_prompt_in_chunks_gives_no_token_of_a_reply(self):
        ledger = Ledger(BLOCK)
        steps = [
            ledger.step(scheduled(new=[("a", IDS, [7], 0, 4, follow(IDS))])),
            ledger.step(scheduled(old=[("a", [3], 4, 4)])),
            ledger.step(scheduled(old=[("a", [5], 8, 2)])),
        ]
        assert [replied(step) for step in steps] == [[], [], []]
        assert replied(ledger.step(scheduled(old=[("a", None, 10, 1)]))) == [(0, 0, (22,))]

    def test_what_is_computed_again_after_a_preemption_is_not_read_again(self):
        ledger = Ledger(BLOCK)
        ledger.step(scheduled(new=[("a", IDS, [7, 3, 5], 0, 10, follow(IDS))]))
        ledger.step(scheduled(old=[("a", None, 10, 1)]))
        ledger.step(scheduled(old=[("a", None, 11, 1)]))
        back = ledger.step(scheduled(old=[("a", [8, 2, 9], 0, 9, "resumed")]))
        assert replied(back) == []
        again = ledger.step(scheduled(old=[("a", [1], 9, 4)]))  # 9 to 12; 12 is new
        assert replied(again) == [(0, 2, (4,))]

    def test_a_preempted_request_that_comes_as_a_new_one_goes_on(self):
        ledger = Ledger(BLOCK)
        ledger.step(scheduled(new=[("a", IDS, [7, 3, 5], 0, 10, follow(IDS))]))
        ledger.step(scheduled(old=[("a", None, 10, 1)]))
        back = ledger.step(scheduled(new=[("a", IDS, [8, 2, 9], 0, 12, follow(IDS))]))
        assert replied(back) == [(0, 1, (9 * 4 + 3,))]

    def test_a_name_that_is_used_again_begins_anew(self):
        ledger = Ledger(BLOCK)
        ledger.step(scheduled(new=[("a", IDS, [7, 3, 5], 0, 10, follow(IDS))]))
        ledger.step(scheduled(old=[("a", None, 10, 1)]))
        ledger.step(scheduled(new=[("a", IDS, [7, 3, 5], 0, 10, follow(IDS))], done=["a"]))
        assert replied(ledger.step(scheduled(old=[("a", None, 10, 1)]))) == [(0, 0, (22,))]

    def test_the_last_tokens_of_a_prompt_are_read_as_a_reply_cached_ones_too(self):
        ledger = Ledger(BLOCK)
        step = ledger.step(scheduled(new=[("a", IDS, [7, 3, 5], 8, 2, follow(IDS, tail=3))]))
        assert replied(step) == [(0, 0, (3 * 4 + 3, 20, 21))]

    def test_replies_to_one_prompt_are_told_apart(self):
        new = [(f"{n}_chatcmpl-x-1", IDS, [7 + 3 * n, 3, 5], 0, 10, follow(IDS)) for n in range(2)]
        ledger = Ledger(BLOCK)
        ledger.step(scheduled(new=new))
        step = ledger.step(scheduled(old=[(row[0], None, 10, 1) for row in new]))
        assert [choice for choice, _, _ in replied(step)] == [0, 1]

    def test_replies_to_a_prompt_with_other_tokens_are_read_all_the_same(self):
        ledger = Ledger(BLOCK)
        asked = ScoreRequest("box", "key", "other", (9,), (), 0)
        step = ledger.step(scheduled(new=[("a", IDS, [7, 3, 5], 0, 10, asked)]))
        assert (len(step.refused), step.due) == (1, ())
        assert replied(ledger.step(scheduled(old=[("a", None, 10, 1)]))) == [(0, 0, (22,))]

    def test_a_token_that_was_never_computed_is_not_a_number(self):
        scores = SlotScores(12, 2, BLOCK, torch.device("cpu"))
        scores.write(torch.tensor([4, 5]), torch.tensor([[1.0, 2], [3, 4]]))
        asked = follow(IDS)
        read = scores.read_replies([ReplyDue(asked, 1, 3, (4, 5)), ReplyDue(asked, 0, 0, (6,))])
        assert [(part.choice, part.start) for part in read] == [(1, 3), (0, 0)]
        assert read[0].values == (2.0, 4.0)
        assert read[1].values[0] != read[1].values[0]


@given(st.data())
def test_through_preemption_and_chunks_each_token_is_read_once_and_of_its_own_slot(data):
    """A request over random steps: what is read is the reply, token by token, in order."""
    ledger, scores = Ledger(BLOCK), SlotScores(64 * BLOCK, 1, BLOCK, torch.device("cpu"))
    length = data.draw(st.integers(2, 9))
    asked = follow(list(range(length)))
    blocks, computed, written, read = [0, 1, 2], 0, length, []
    next_block = 3
    for number in range(data.draw(st.integers(2, 14))):
        known = written - computed
        count = data.draw(st.integers(1, known))
        is_preempted = number and computed and data.draw(st.booleans())
        if is_preempted:
            blocks, computed = [next_block], 0
            next_block += 1
            count = data.draw(st.integers(1, written))
        need = -(-(computed + count) // BLOCK) - len(blocks)
        more = list(range(next_block, next_block + max(0, need)))
        next_block += len(more)
        blocks += more
        if not number:
            row = ("a", list(range(length)), list(blocks), 0, count, asked)
            step = ledger.step(scheduled(new=[row]))
        else:
            given_blocks = list(blocks) if is_preempted else (more or None)
            row = ("a", given_blocks, computed, count, *(["resumed"] if is_preempted else []))
            step = ledger.step(scheduled(old=[row]))
        scores.forget(step.fresh)
        tokens = range(computed, computed + count)
        slots = [blocks[i // BLOCK] * BLOCK + i % BLOCK for i in tokens]
        scores.write(torch.tensor(slots), torch.tensor(tokens).float()[:, None])
        computed += count
        if computed == written:  # the last known token was computed: the next is sampled
            written += 1
        parts = scores.read_replies(step.replies) if step.replies else []
        for part in parts:
            assert part.start == len(read)
            read += part.values
    assert read == [float(n) for n in range(length, max(length, written - 1))]
