"""A program that asks the service never takes an odd answer for a verdict."""

import httpx
import pytest

from latentguard.errors import LatentGuardError
from latentguard.integrations.service_client import REFUSAL, GuardService
from latentguard.serve.config import ServeConfig

GOOD = {"flagged": False, "probability": 0.2, "category": None}


def answering(monkeypatch, **answer):
    """A client of a service that always answers so."""
    monkeypatch.setattr(httpx, "post", lambda *args, **how: httpx.Response(200, **answer))
    return GuardService("http://guard")


def test_verdicts_come_in_order(monkeypatch):
    results = [GOOD, GOOD | {"flagged": True}]
    service = answering(monkeypatch, json={"model": "g", "results": results})
    assert [one.flagged for one in service.score_texts(["a", "b"])] == [False, True]


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "hello"},
        {"json": []},
        {"json": {"model": "g", "results": []}},
        {"json": {"model": "g", "results": [GOOD]}},
        {"json": {"model": "g", "results": [GOOD, {"flagged": False}]}},
        {"json": {"model": "g", "results": [GOOD, GOOD | {"flagged": "no"}]}},
    ],
)
def test_any_other_answer_is_an_error(monkeypatch, answer):
    with pytest.raises(LatentGuardError, match="gave no verdict"):
        answering(monkeypatch, **answer).score_texts(["a", "b"])


def test_the_refusal_is_that_of_the_service():
    assert ServeConfig.refusal == REFUSAL
