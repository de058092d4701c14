"""What pages point to is there: links, anchors, files and scripts that they name."""

import re

import pytest

from documentation.conftest import ROOT

OUTSIDE = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")]
"""Pages that the site does not have; the build checks the links of the others."""

PAGES = [*OUTSIDE, *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([\w-]+))?\)")
FILE = re.compile(r"`(?:python )?((?:benchmarks|deploy|docs|src|tests)/[\w./*-]+)")
MADE = ("docs/reference/", "benchmarks/detection_search.py")
"""Pages that the build makes, and a script that a lab note names as removed."""


def anchors(page):
    """The anchors of a page's headings, as the site and GitHub make them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: page.name)
def test_links_of_pages_outside_the_site_lead_somewhere(page):
    missing = []
    for path, anchor in LINK.findall(page.read_text("utf-8")):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(f"{path}#{anchor}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    found = {name.rstrip("./") for name in FILE.findall(page.read_text("utf-8"))}
    names = {name for name in found if "NN_name" not in name}
    missing = [name for name in names if not name.startswith(MADE) and not [*ROOT.glob(name)]]
    assert missing == []
