"""The site builds strictly, loads nothing from elsewhere, and works in a browser from a folder."""

import json
import re

import pytest

from documentation.conftest import ROOT
from latentguard.guard.artifact import KEYS
from serve.running import passed, post, running

EXTERNAL = re.compile(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)="?https?://[^"> ]*""")


def test_no_page_loads_anything_from_elsewhere(site):
    loaded = {
        match
        for path in site.rglob("*.html")
        for match in EXTERNAL.findall(path.read_text("utf-8"))
    }
    assert {one for one in loaded if 'rel="canonical"' not in one} == set()


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text("utf-8"))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages - set(listed) == set()
    assert len(listed) == len(set(listed))


def test_the_reference_names_every_option_and_every_public_name(site):
    import latentguard

    cli = (site / "reference" / "cli.html").read_text("utf-8")
    assert all(option in cli for option in ("--max-fpr", "--on-review", "--engine"))
    api = (site / "reference" / "api.html").read_text("utf-8")
    missing = [n for n, m in latentguard._MODULES.items() if f'id="{m}.{n}"' not in api]
    assert missing == []


def test_the_page_of_the_guard_folder_names_every_key():
    text = (ROOT / "docs" / "reference" / "artifact.md").read_text("utf-8")
    keys = text.split("## Keys of")[1].split("## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", keys, re.MULTILINE)) == set(KEYS)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_page_of_the_audit_log_names_every_field(tmp_path):
    log = tmp_path / "audit.jsonl"
    with running(audit=log) as url:
        post(f"{url}/v1/moderations", json={"input": passed()})
    text = (ROOT / "docs" / "reference" / "audit-log.md").read_text("utf-8")
    fields = set(re.findall(r"^\| `(\w+)` \|", text.split("## Actions")[0], re.MULTILINE))
    written = set(json.loads(log.read_text("utf-8").splitlines()[0]))
    assert written - fields == set()
    assert fields - written <= {"segment", "source", "text", "reply", "shadow"}
