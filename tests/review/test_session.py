"""Which prompt comes next, and what a reviewer sees of others."""

import pytest

from latentguard.prompts import Message
from latentguard.review.labels import LabelFile
from latentguard.review.session import ReviewItems, ReviewSession
from review.desks import TEXTS, item, items


@pytest.fixture
def session(tmp_path):
    labels = LabelFile(tmp_path / "labels.jsonl")
    yield ReviewSession(items(), labels)
    labels.close()


def walk(session, which="unlabelled", order="file", reviewer="Ann"):
    """The numbers of the prompts that come, one after the other."""
    found, after = [], None
    while (one := session.next_item(reviewer, which, order, after)) is not None:
        found.append(TEXTS.index(one.prompt.text))
        after = one.key
    return found


def label(session, number, label, reviewer="Ann"):
    key = session.items.keys("file")[number]
    session.label(session.items.get(key), label, reviewer)
    return session.items.get(key)


class TestLists:
    @pytest.mark.parametrize(
        ("order", "numbers"),
        [
            ("file", [0, 1, 2, 3, 4, 5]),
            ("near", [2, 3, 0, 5, 4, 1]),
            ("highest", [4, 0, 2, 3, 5, 1]),
            ("lowest", [1, 5, 3, 2, 0, 4]),
        ],
    )
    def test_orders(self, session, order, numbers):
        assert walk(session, order=order) == numbers

    def test_filters(self, session):
        assert walk(session, "flagged") == [0, 2, 4]
        assert walk(session, "allowed") == [1, 3, 5]
        label(session, 0, "harmless")
        label(session, 1, "harmless")
        assert walk(session, "unlabelled") == [2, 3, 4, 5]
        assert walk(session, "flagged") == [2, 4]
        assert walk(session, "allowed") == [3, 5]
        assert walk(session, "all") == [0, 1, 2, 3, 4, 5]
        assert walk(session, "unlabelled", reviewer="Ben") == [0, 1, 2, 3, 4, 5]

    def test_near_is_the_nearest_tenth(self, tmp_path):
        many = [f"prompt {n}" for n in range(300)]
        labels = LabelFile(tmp_path / "labels.jsonl")
        session = ReviewSession(items(many, list(range(300))), labels)
        assert session.counts("Ann", "near")["matching"] == 30
        labels.close()

    def test_disagreements(self, session):
        label(session, 3, "harmful", "Ann")
        label(session, 3, "harmless", "Ben")
        label(session, 4, "harmful", "Ben")
        assert walk(session, "disputed", reviewer="Cleo") == [3]
        label(session, 3, "harmless", "Cleo")
        assert walk(session, "disputed", reviewer="Ann") == []

    def test_counts_are_the_reviewers_own(self, session):
        label(session, 0, "harmless", "Ann")
        label(session, 1, "harmful", "Ann")
        label(session, 1, "harmless", "Ben")
        counts = session.counts("Ann", "unlabelled")
        assert counts == dict(total=6, harmful=1, harmless=1, disputed=1, matching=4, agreed=1)


class TestItems:
    def test_a_prompt_comes_once(self):
        kept = items([*TEXTS, TEXTS[0]], [0.0] * 7)
        assert len(kept) == 6

    def test_only_the_newest_are_kept(self):
        kept = ReviewItems(most=2)
        for text in TEXTS:
            kept.add(item(text, 0.0))
        assert [kept.get(key).prompt.text for key in kept.keys("file")] == TEXTS[-2:]

    def test_long_ones_make_room(self, monkeypatch):
        monkeypatch.setattr("latentguard.review.session.MAX_CHARACTERS", 100)
        kept = ReviewItems(most=50)
        for text in ("a" * 40, "b" * 40, "c" * 40):
            kept.add(item(text, 0.0))
        assert len(kept) == 2


class TestOthers:
    def test_what_others_say_comes_after_ones_own_label(self, session):
        one = label(session, 2, "harmful", "Ben")
        shown = session.to_dict(one, "Ann")
        assert (shown["label"], shown["others"], shown["disputed"]) == (None, {}, False)
        label(session, 2, "harmless", "Ann")
        shown = session.to_dict(one, "Ann")
        assert (shown["label"], shown["others"]) == ("harmless", {"Ben": "harmful"})
        assert shown["disputed"]

    def test_history_is_shown(self, session):
        chat = item("And now?", 0.0, history=(Message("user", "Hi."),))
        assert session.to_dict(chat, "Ann")["history"] == [{"role": "user", "content": "Hi."}]
