"""The benchmark with garak: what it reads of a report, and what it asks for. garak itself is not
run here: it has an environment of its own (``benchmarks/garak_probes.py`` says which)."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from docpages import garak_tables

SCRIPT = Path(__file__).parents[1] / "benchmarks/garak_probes.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("garak_probes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_report_becomes_counts_without_texts(script, tmp_path):
    numbers = dict(passed=3, fails=2, nones=1, total_evaluated=5, total_processed=6)
    lines = [
        dict(entry_type="attempt", prompt="secret", outputs=["secret"]),
        dict(entry_type="eval", probe="dan.DUDE", detector="dan.DUDE", **numbers),
    ]
    report = tmp_path / "x.report.jsonl"
    report.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [count] = script.count_successes(report)
    assert (count.probe, count.prompts, count.successes, count.unanswered) == ("dan.DUDE", 5, 2, 1)


def test_it_asks_the_service_and_nothing_else(script, tmp_path):
    config = script.garak_config("http://127.0.0.1:8400", 4, tmp_path)
    generator = config["plugins"]["generators"]["openai"]["OpenAICompatible"]
    assert generator["uri"] == "http://127.0.0.1:8400/v1/"
    assert config["run"]["soft_probe_prompt_cap"] == 4


def test_the_table_has_a_row_for_each_family(monkeypatch):
    def counts(first, second):
        return [
            dict(probe="dan.A", successes=first, prompts=4),
            dict(probe="dan.B", successes=second, prompts=4),
            dict(probe="tap.C", successes=first, prompts=2),
        ]

    result = dict(unguarded=counts(2, 4), guarded=counts(0, 1))
    monkeypatch.setattr(garak_tables, "read_result", lambda _: result)
    table = garak_tables.garak_table()
    assert "| dan | 6 of 8 [" in table
    assert "| all | 8 of 10 [" in table
    assert "| 1 of 10 [" in table
