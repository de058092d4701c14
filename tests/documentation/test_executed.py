"""Pages are run: what they print is what they say, and commands that are not run are valid."""

import re
import shlex

import pytest
import typer

from docpages.executed import PageFailed, is_same, read_blocks, run_page
from documentation.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
]
GENERATED = ("cli", "api", "http", "metrics", "configuration")
WITH_COMMANDS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.stem not in GENERATED),
]
RUN = [
    page for page in PAGES if any(one.mark is None for one in read_blocks(page.read_text("utf-8")))
]


@pytest.mark.model
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_page_prints_what_it_says(page, tmp_path):
    text = page.read_text("utf-8")
    again = run_page(text, tmp_path)
    assert again == text or is_same(again, text), again


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_valid_usage(page):
    from latentguard.cli import app

    root = typer.main.get_command(app)
    code = "\n".join(one.code for one in read_blocks(page.read_text("utf-8")))
    for line in code.replace("\\\n", " ").splitlines():
        match = re.match(r"(?:\w+=\S+ )*latentguard (.*)", line)
        if match:
            _parse(root, shlex.split(match[1].partition("|")[0].partition(" >")[0], comments=True))


def _parse(command, words):
    """Parsed as the program does it, without being run."""
    name = "latentguard"
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    command.make_context(name, list(words), resilient_parsing=False)


def test_a_block_that_fails_ends_the_page(tmp_path):
    with pytest.raises(PageFailed, match="ended with 3"):
        run_page("```bash\nexit 3\n```\n", tmp_path)


def test_outputs_are_written_behind_their_blocks(tmp_path):
    page = "```python\nn = 2\n```\n\n```bash\necho hello\n```\n\n```text\n?\n```\n"
    page += (
        "<!-- not run: reason -->\n```bash\nfalse\n```\n```python\nprint(n)\n```\n```text\n```\n"
    )
    again = run_page(page, tmp_path)
    assert "```text\nhello\n```" in again
    assert "```text\n2\n```" in again
    assert not is_same(again, page)


def test_rounding_is_the_same_and_words_are_not():
    assert is_same("score 1.206", "score 1.207")
    assert not is_same("score 1.206", "score 1.3")
    assert not is_same("allow 1", "block 1")
