"""Pages are plain: short sentences, a short README, tables that are those of the result files."""

import pytest

from docpages.prose import count_words, sentences
from docpages.result_tables import TABLES, fill_tables, pages_with_tables
from documentation.conftest import ROOT

LONGEST = 30
"""Words of a sentence."""

GENERATED = ("cli", "api", "http", "metrics", "configuration")
PLAIN = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted(
        page
        for page in (ROOT / "docs").rglob("*.md")
        if page.stem not in GENERATED and "gallery" not in page.parts
    ),
]
"""Pages that people wrote; those of the gallery are reports."""


@pytest.mark.parametrize("page", PLAIN, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_is_long(page):
    text = page.read_text("utf-8")
    assert [one for one in sentences(text) if count_words(one) > LONGEST] == []


def test_sentences_are_found():
    text = "# Head\n\nOne `a b`. Two\nlines (x). \n- Item\n\n```bash\nno prose\n```\n| a. b |\n"
    assert sentences(text) == ["One CODE.", "Two lines (x).", "Item"]


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 180


@pytest.mark.parametrize("page", pages_with_tables(), ids=lambda page: page.name)
def test_tables_are_those_of_the_result_files(page):
    text = page.read_text("utf-8")
    assert fill_tables(text) == text


def test_every_mark_of_a_table_is_filled():
    marked = "\n".join(page.read_text("utf-8") for page in pages_with_tables())
    assert marked.count("<!-- table: ") == marked.count("<sub>Made by `") == len(TABLES)
