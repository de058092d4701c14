"""The page of verdicts shows what benchmarks/results hold."""

import sys

import pytest

from documentation.conftest import ROOT

PAGE = ROOT / "docs" / "results" / "verdicts.md"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import verdict_tables

    yield verdict_tables
    sys.modules.pop("verdict_tables")


def test_tables_are_those_of_the_results(tables, tmp_path, monkeypatch):
    copy = tmp_path / "verdicts.md"
    copy.write_text(PAGE.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(sys, "argv", ["verdict_tables.py", "--write", str(copy)])
    tables.main()
    assert copy.read_text("utf-8") == PAGE.read_text("utf-8")


def test_every_claim_has_its_rule_on_the_page():
    from latentguard.study.claims import CLAIMS

    rules = PAGE.read_text("utf-8").split("## The rules")[1].split("###")[0]
    assert all(f"\n| {n}. " in rules for n in range(1, len(CLAIMS) + 1))


def test_what_a_world_demands(tables):
    yes, form = tables.VERDICTS[:2]
    assert tables.is_as_demanded({yes: 36, "cannot tell": 4}, 40, "paper", 3)
    assert not tables.is_as_demanded({yes: 35, "cannot tell": 5}, 40, "paper", 3)
    assert tables.is_as_demanded({yes: 1, "cannot tell": 39}, 40, "null", 3)
    assert not tables.is_as_demanded({form: 2, "cannot tell": 38}, 40, "null", 3)
    assert tables.is_as_demanded({form: 40}, 40, "form", 2)
    assert not tables.is_as_demanded({yes: 1, form: 39}, 40, "form", 2)
    assert tables.is_as_demanded({yes: 40}, 40, "form", 12)
