"""A tiny model's guards say of the golden prompts what they said when the record was made."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

RECORD = Path(__file__).parent / "tiny-llama-quick.json"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "golden.py"

TOLERANCE = 1e-4
"""Processors add up in other orders; what is compared on one machine differs by less than 1e-6."""


@pytest.fixture(scope="module")
def golden():
    """The script that made the record, as a module."""
    spec = importlib.util.spec_from_file_location("golden", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_that_a_guard_says_has_changed(golden):
    old = json.loads(RECORD.read_text(encoding="utf-8"))
    tallies = golden.compare(old, golden.collect(old["model"], quick=old["quick"]))
    wrong = {name: tallies[name] for name in golden.failed(tallies, TOLERANCE)}
    assert wrong == {}
    assert tallies["default score"].numbers == len(old["guards"]["default"]["verdicts"])


def test_a_difference_is_found(golden):
    old = json.loads(RECORD.read_text(encoding="utf-8"))
    new = json.loads(RECORD.read_text(encoding="utf-8"))
    verdicts, spread = new["guards"]["paper"]["verdicts"], new["guards"]["paper"]["facts"]["spread"]
    verdicts[0][golden.FIELDS.index("score")] += 1e-5 * spread
    verdicts[1][golden.FIELDS.index("decision")] = "review"
    found = golden.compare(old, new)
    assert golden.failed(found, 1e-6) == ["paper score", "paper decision"]
    assert found["paper score"].greatest == pytest.approx(1e-5, rel=1e-2)
    assert len(found["paper decision"].mismatches) == 1
