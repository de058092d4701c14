"""Verdicts in planted worlds: a fast part of benchmarks/planted_worlds.py, one seed each."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CLAIMS = range(1, 14)
FORM = {2, 3, 7, 8, 9}
"""Claims with form conditions."""


@pytest.fixture(scope="module")
def verdicts():
    """World -> claim -> verdict, with half of the benchmark's prompts."""
    sys.path.append(str(BENCHMARKS))
    try:
        import planted_worlds as worlds

        few = replace(worlds.SETTINGS, asked=240, per_category=30, probed=2)
        yield {
            name: worlds.verdicts_of(worlds.WORLDS[name], 0, CLAIMS, few)
            for name in ("paper", "null", "form")
        }
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_exactly_the_papers_pattern_is_replicated(verdicts):
    assert set(verdicts["paper"].values()) == {"replicated"}


def test_a_world_without_any_pattern_is_not(verdicts):
    assert set(verdicts["null"].values()) <= {"not replicated", "cannot tell"}


def test_form_alone_is_never_plainly_replicated(verdicts):
    assert {verdicts["form"][n] for n in FORM} == {"replicated, but form explains it"}
    others = {verdicts["form"][n] for n in set(CLAIMS) - FORM - REFUSAL}
    assert others <= {"not replicated", "cannot tell"}


REFUSAL = {12, 13}
"""About refusal, which that world does hold at t_post."""
