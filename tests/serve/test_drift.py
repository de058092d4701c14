"""DriftReference scores, and whether the recent ones still look like them."""

import json
import math
import re

import pytest

from latentguard.errors import PromptError
from latentguard.guard.drift import bin_edges
from latentguard.guard.verdict import Evidence, Verdict
from latentguard.serve.drift import DriftMonitor, DriftReference
from latentguard.serve.scoring import ScoredPrompt
from latentguard.serve.telemetry import Telemetry
from serve.running import (
    PROMPTS,
    band_guard,
    flagged,
    get,
    offline,
    post,
    running,
    tiny_guard,
    tiny_model,
)


def drifted(known, seen):
    drift = DriftMonitor(known)
    for score in seen:
        drift.add(score)
    return drift.index


def verdict(score, evidence=()):
    return Verdict("1", score, 0.5, False, {}, evidence=evidence)


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
    assert drifted(UNIFORM, [0.0] * 1000) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(("known", "seen"), [([], UNIFORM), (UNIFORM, UNIFORM[:99])])
def test_too_little_to_say(known, seen):
    assert math.isnan(drifted(known, seen))


def test_only_recent_scores_count():
    assert drifted(UNIFORM, [9.0] * 1000 + UNIFORM) < 0.01


def test_equal_scores_make_fewer_parts():
    two = [1.0] * 25 + [2.0] * 25
    assert drifted(two, [1.0] * 100 + [2.0] * 100) < 0.05
    assert drifted(two, [1.0] * 200) > 0.25
    assert math.isnan(drifted([1.0] * 50, [1.0] * 200))  # nothing to cut


def test_verdicts_are_read_from_a_file(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    row = dict(id="1", score=0.5, probability=0.4, flagged=True, beliefs={"harmful": 0.1})
    file.write_text(json.dumps(row) + "\n")
    known = DriftReference.read(file)
    assert known.points == (dict(score=0.5, flagged=True, beliefs={"harmful": 0.1}),)
    assert known.scores == (0.5,)
    file.write_text(json.dumps(row) + '\n{"text": "no verdict"}\n')
    with pytest.raises(PromptError, match=r"verdicts\.jsonl:2"):
        DriftReference.read(file)
    assert DriftReference.read(None) == DriftReference()


def test_the_calibration_is_the_reference_unless_a_file_is_named(tmp_path):
    guard = band_guard()
    known = DriftReference.of(guard, None)
    assert known.scores == pytest.approx(sorted(v.score for v in offline().values()), abs=1e-6)
    assert known.points == ()
    file = tmp_path / "verdicts.jsonl"
    file.write_text(json.dumps(dict(score=0.5, flagged=True, beliefs={})) + "\n")
    assert DriftReference.of(guard, file).scores == (0.5,)
    assert DriftReference.of(tiny_guard(), None) == DriftReference()


def test_a_calibrated_guard_is_compared_with_its_calibration(tmp_path):
    """The gauge and the buckets of the command itself, which is given no reference."""
    guard = band_guard()
    with running(lambda: (guard, tiny_model()), reference=DriftReference.of(guard, None)) as url:
        post(f"{url}/v1/moderations", json={"input": PROMPTS * 3})
        alike = get(f"{url}/metrics").text
        post(f"{url}/v1/moderations", json={"input": [flagged()] * 100})
        moved = get(f"{url}/metrics").text
    edges = bin_edges(guard.thresholds.common.scores)
    shown = re.findall(r'latentguard_score_bucket\{le="([^+"]+)"', alike)
    assert [float(edge) for edge in shown] == pytest.approx(edges)
    index = [
        float(re.search(r"^latentguard_score_drift (.*)$", page, re.M)[1])
        for page in (alike, moved)
    ]
    assert index[0] < 0.1
    assert index[1] > 0.25


def scored(score, evidence=(), readings=1):
    return ScoredPrompt(verdict(score, evidence), {}, 0.0, readings)


def test_chats_of_several_readings_are_no_part_of_the_drift():
    told = Telemetry(UNIFORM)
    for score in UNIFORM:
        told.verdict("chat", "pass", scored(score))
    before = told.drift.index
    for _ in range(500):
        told.verdict("chat", "pass", scored(9.0, readings=2))
    assert told.drift.index == before


def test_long_prompts_are_no_part_of_the_drift():
    told = Telemetry(UNIFORM)
    for score in UNIFORM:
        told.verdict("chat", "pass", scored(score))
    before = told.drift.index
    for _ in range(500):
        told.verdict("chat", "pass", scored(9.0, (Evidence(0, 0, 1, 9.0),)))
    assert told.drift.index == before
    assert b"latentguard_score_count 1500.0" in told.page()


def test_scores_are_counted_in_deciles_of_the_reference():
    told = Telemetry(UNIFORM)
    for score in UNIFORM:
        told.verdict("moderations", "score", scored(score))
    told.verdict("moderations", "error")
    lines = told.page().decode().splitlines()
    below = [float(line.split()[-1]) for line in lines if line.startswith("latentguard_score_buck")]
    assert below == pytest.approx([n * 100 for n in range(1, 11)], abs=7)
    assert "latentguard_score_count 1000.0" in lines
