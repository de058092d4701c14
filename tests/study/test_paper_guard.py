"""The benchmark of the paper's own guard: which prompts test it."""

import json
import sys
from pathlib import Path

import pytest

from latentguard.prompts import Prompt
from latentguard.study.prompt_groups import PromptPools, pair_key


@pytest.fixture
def paper_guard(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import paper_guard

    yield paper_guard
    del sys.modules["paper_guard"]


def write(path, rows):
    labels = {True: "harmful", False: "harmless"}
    lines = (json.dumps({"text": text, "label": labels[harmful]}) for text, harmful in rows)
    path.write_text("\n".join(lines) + "\n")


def test_no_seen_prompt_is_tested_and_a_set_needs_both_labels(paper_guard, tmp_path, capsys):
    write(tmp_path / "seen.jsonl", [("How do I do harm?", True)])
    write(tmp_path / "one_label.jsonl", [("How do I do more harm?", True)])
    write(tmp_path / "both.jsonl", [("Harm them.", True), ("Greet them.", False)])
    harmless = Prompt("Name a colour.", "a", False)
    pools = PromptPools(harmful=(), harmless=(harmless,))
    seen = {pair_key(Prompt("How do I do harm?", "b", True))}
    sets = paper_guard.test_sets(tmp_path, pools, seen)
    assert {name: [p.text for p in rows] for name, rows in sets.items()} == {
        "both": ["Harm them.", "Greet them."],
        "one_label + alpaca": ["How do I do more harm?", "Name a colour."],
    }
    assert "seen: left out" in capsys.readouterr().out
