"""Reference scores, and whether the recent ones still look like them."""

import json
import math

import pytest

from latentguard.errors import PromptError
from latentguard.serve.drift import Drift, Reference
from latentguard.serve.telemetry import Telemetry


def reference(scores):
    return Reference(tuple(dict(score=s, beliefs={}, flagged=False) for s in scores))


def drifted(known, seen):
    drift = Drift(reference(known))
    for score in seen:
        drift.add(score)
    return drift.index


UNIFORM = [n / 1000 for n in range(1000)]


def test_the_same_scores_have_not_moved():
    assert drifted(UNIFORM, UNIFORM[::-1]) < 0.01


def test_a_shift_is_seen():
    assert drifted(UNIFORM, [score + 0.3 for score in UNIFORM]) > 0.25


def test_the_index_is_the_one_of_the_books():
    """sum (a - e) ln(a / e) over ten parts, by hand for all scores in the lowest."""
    counts = [1000.5] + [0.5] * 9
    shares = [count / sum(counts) for count in counts]
    expected = sum((a - 0.1) * math.log(a / 0.1) for a in shares)
    assert drifted(UNIFORM, [0.0] * 1000) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("known", "seen"), [([], UNIFORM), (UNIFORM, UNIFORM[:99])])
def test_too_little_to_say(known, seen):
    assert math.isnan(drifted(known, seen))


def test_only_recent_scores_count():
    assert drifted(UNIFORM, [9.0] * 1000 + UNIFORM) < 0.01


def test_equal_scores_make_fewer_parts():
    assert drifted([1.0] * 50, [1.0] * 200) < 0.05


def test_verdicts_are_read_from_a_file(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    row = dict(id="1", score=0.5, probability=0.4, flagged=True, beliefs={"harmful": 0.1})
    file.write_text(json.dumps(row) + "\n")
    (point,) = Reference.read(file).points
    assert point == dict(score=0.5, flagged=True, beliefs={"harmful": 0.1})
    file.write_text(json.dumps(row) + '\n{"text": "no verdict"}\n')
    with pytest.raises(PromptError, match=r"verdicts\.jsonl:2"):
        Reference.read(file)
    assert Reference.read(None).points == ()


def test_scores_are_counted_in_deciles_of_the_reference():
    told = Telemetry(reference(UNIFORM))
    for score in UNIFORM:
        told.verdict("moderations", "score", score)
    told.verdict("moderations", "error", None)
    lines = told.page().decode().splitlines()
    below = [float(line.split()[-1]) for line in lines if line.startswith("latentguard_score_buck")]
    assert below == pytest.approx([n * 100 for n in range(1, 11)], abs=2)
    assert "latentguard_score_count 1000.0" in lines
