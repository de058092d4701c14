"""What the page of verdicts says of each claim and each world."""

from docpages import verdict_tables as tables
from documentation.conftest import ROOT
from latentguard.study.claims import CLAIMS

PAGE = ROOT / "docs" / "results" / "verdicts.md"


def test_every_claim_has_its_rule_on_the_page():
    rules = PAGE.read_text("utf-8").split("## The rules")[1].split("###")[0]
    assert all(f"\n| {n}. " in rules for n in range(1, len(CLAIMS) + 1))


def test_what_a_world_demands():
    yes, form = tables.VERDICTS[:2]
    assert tables.is_as_demanded({yes: 36, "cannot tell": 4}, 40, "paper", 3)
    assert not tables.is_as_demanded({yes: 35, "cannot tell": 5}, 40, "paper", 3)
    assert tables.is_as_demanded({yes: 1, "cannot tell": 39}, 40, "null", 3)
    assert not tables.is_as_demanded({form: 2, "cannot tell": 38}, 40, "null", 3)
    assert tables.is_as_demanded({form: 40}, 40, "form", 2)
    assert not tables.is_as_demanded({yes: 1, form: 39}, 40, "form", 2)
    assert tables.is_as_demanded({yes: 40}, 40, "form", 12)
