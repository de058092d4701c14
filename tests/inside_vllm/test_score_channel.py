"""Answers arrive whole, at the right channel, and a lost channel harms nobody."""

import math
from dataclasses import replace

from latentguard.integrations.vllm.score_channel import ScoreChannel, post
from latentguard.integrations.vllm.score_request import ScoreRequest, TokenScores


def asks(box, count):
    return [ScoreRequest(box.path, f"k{n}", "", (0,)) for n in range(count)]


def test_answers_go_to_their_mailboxes():
    one, two = ScoreChannel(), ScoreChannel()
    post([(asks(one, 1)[0], [0.1, math.nan]), (asks(two, 2)[1], None)])
    (answer,) = one.collect()
    assert answer.key == "k0"
    assert answer.values[0] == 0.1 and math.isnan(answer.values[1])
    assert [(a.key, a.values) for a in two.collect()] == [("k1", None)]
    assert one.collect() == []
    one.close()
    two.close()


def test_many_answers_of_one_step_arrive():
    box = ScoreChannel()
    post([(ask, [float(n)] * 12) for n, ask in enumerate(asks(box, 256))])
    assert [a.values[0] for a in box.collect()] == [float(n) for n in range(256)]
    box.close()


def test_answers_arrive_while_the_reader_is_busy():
    box = ScoreChannel()
    with box.reading() as found:
        for _ in range(40):
            post([(ask, [1.0] * 12) for ask in asks(box, 64)])
    assert len(found) == 40 * 64
    box.close()


def test_a_mailbox_that_is_gone_loses_its_answers_only(caplog):
    box, other = ScoreChannel(), ScoreChannel()
    gone = asks(box, 1)[0]
    box.close()
    post([(gone, [1.0]), (asks(other, 1)[0], [2.0])])
    assert [a.values for a in other.collect()] == [(2.0,)]
    assert "could not be delivered" in caplog.text
    other.close()


def test_only_this_user_can_enter():
    box = ScoreChannel()
    assert box._folder.stat().st_mode & 0o077 == 0
    box.close()


def test_scores_of_tokens_arrive_in_order_however_many():
    box = ScoreChannel()
    ask = asks(box, 1)[0]
    many = TokenScores(ask.key, 1, 5, tuple(n / 7 for n in range(9000)))
    with box.reading() as found:
        post([(ask, [1.0])], [(ask, many), (ask, replace(many, start=9005, values=(0.5,)))])
    answer, *parts = found
    assert answer.values == (1.0,)
    assert [part.start for part in parts[:2]] == [5, 5 + len(parts[0].values)]
    assert sum((part.values for part in parts), ()) == (*many.values, 0.5)
    assert {(part.key, part.choice) for part in parts} == {(ask.key, 1)}
    box.close()
