"""Where a chat is blocked: each policy with each verdict."""

from types import SimpleNamespace

import pytest

from latentguard.serve.config import ServeConfig
from latentguard.serve.decision import answers_without_verdict, choose_action, is_blocked
from latentguard.serve.errors import ClientDisconnected, Unavailable


def scored(decision):
    verdict = SimpleNamespace(decision=decision, flagged=decision == "block")
    return SimpleNamespace(verdict=verdict)


@pytest.mark.parametrize("policy", ["block", "annotate", "shadow"])
def test_a_flagged_chat_meets_the_policy(policy):
    config = ServeConfig(policy=policy)
    assert choose_action(config, scored("block")) == policy
    assert is_blocked(config, scored("block")) == (policy == "block")


@pytest.mark.parametrize("on_review", ["pass", "annotate", "block"])
def test_a_chat_to_review_is_blocked_only_if_that_is_chosen(on_review):
    config = ServeConfig(on_review=on_review)
    assert is_blocked(config, scored("review")) == (on_review == "block")
    assert choose_action(config, scored("review")) in ("review", "block")


def test_another_chat_passes():
    assert choose_action(ServeConfig(), scored("allow")) == "pass"


@pytest.mark.parametrize("policy", ["block", "annotate", "shadow"])
def test_only_a_shadow_answers_without_a_verdict(policy):
    config = ServeConfig(policy=policy)
    assert answers_without_verdict(config, Unavailable()) == (policy == "shadow")
    assert not answers_without_verdict(config, ClientDisconnected("left"))
