"""The gallery: reports without any prompt or reply, checked before anything is written."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from latentguard.report.document import Report, Section, Table
from latentguard.study.prompt_groups import contrast_pools
from latentguard.study.run import STORE
from latentguard.study.store import Store
from study.test_compare import saved

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gallery.py"


@pytest.fixture(scope="module")
def gallery():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gallery", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folders(tmp_path):
    folders = [saved(tmp_path / p, "small", p, v) for p, v in (("controlled", 0.4), ("paper", 0.5))]
    for folder in folders:
        (folder / "figures").mkdir()
        (folder / "figures" / "clusters-at-t-inst.svg").write_text("<svg>drawn</svg>")
    return folders


def test_each_report_is_published_with_its_figures_and_tables(gallery, folders, tmp_path):
    out = tmp_path / "gallery"
    assert gallery.main([*map(str, folders), "--out", str(out)]) == 0
    first = (out / "index.md").read_text()
    assert "| small, controlled | small, paper |" in first
    assert "[small, paper](small-paper/index.md)" in first
    assert (
        "**1. Removing the post-instruction tokens weakens refusal.**\n\n- The paper (3.1" in first
    )
    assert (
        "replicated (drop without post-instruction tokens > 0: 0.40 [0.15, 0.65], n = 30)" in first
    )
    assert (out / "small-paper" / "clusters-at-t-inst.svg").read_text() == "<svg>drawn</svg>"
    provenance = (out / "small-paper" / "provenance.json").read_text()
    assert json.loads(provenance)["model"]["model"] == "small"
    assert "/home/me" not in provenance
    page = (out / "small-paper" / "index.md").read_text()
    assert "![Clusters at t_inst](clusters-at-t-inst.svg)" in page and "**Conditions.**" in page


def test_a_published_report_stands_for_the_report_that_is_gone(gallery, folders, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert gallery.main([*map(str, folders), "--out", str(whole)]) == 0
    published = whole / "small-controlled"
    assert gallery.main([str(published), str(folders[1]), "--out", str(again)]) == 0
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert files == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    assert all((whole / path).read_text() == (again / path).read_text() for path in files)


@pytest.mark.parametrize("place", ["table", "figure"])
def test_nothing_is_published_if_a_prompt_is_in_it(gallery, folders, tmp_path, place, capsys):
    text = max(contrast_pools().harmful, key=lambda p: len(p.text)).text.upper()
    if place == "table":
        path = folders[0] / "report.json"
        record = json.loads(path.read_text())
        record["tables"][1]["rows"].append([1, text, "", *[None] * 5, ""])
        path.write_text(json.dumps(record))
    else:
        words = text.replace(" ", "\n ")
        (folders[0] / "figures" / "clusters-at-t-inst.svg").write_text(f"<svg>{words}</svg>")
    out = tmp_path / "gallery"
    assert gallery.main([*map(str, folders), "--out", str(out)]) == 1
    assert not out.exists()
    assert "small-controlled/" in capsys.readouterr().err


def test_nothing_is_published_if_a_reply_is_in_it(gallery, folders, tmp_path):
    reply = "Well, here is what I would say to that."
    store = Store(folders[0] / STORE)
    store.put({"k": json.dumps(dict(text=reply, ids=[1])).encode(), "s": b"\x00{binary"})
    store.close()
    (folders[1] / "figures" / "clusters-at-t-inst.svg").write_text(f"<svg>{reply}</svg>")
    out = tmp_path / "gallery"
    assert gallery.main([*map(str, folders), "--out", str(out)]) == 1
    assert not out.exists()


def test_what_is_published_in_this_repository_holds_no_text_of_the_pools(gallery):
    files = [p for p in (ROOT / "docs" / "gallery").rglob("*") if p.is_file()]
    pages = {str(path): path.read_text(encoding="utf-8") for path in files}
    assert gallery.leaks(pages, gallery.pool_texts(contrast_pools())) == []


def test_a_report_with_examples_is_not_published(gallery, folders, tmp_path):
    """Tables of examples hold prompts; so do figures of a report that shows texts."""
    text = contrast_pools().harmless[0].text
    parts = (Table("Table 5: refused harmless prompts", ("prompt", "reply"), ((text, "x"),)),)
    record = Report("r", (Section("s", "", parts),)).to_dict()
    path = folders[0] / "report.json"
    whole = json.loads(path.read_text())
    whole["tables"] += json.loads(json.dumps(record["tables"]))
    path.write_text(json.dumps(whole))
    assert gallery.main([*map(str, folders), "--out", str(tmp_path / "g")]) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "gallery").glob("*/provenance.json")))
def test_what_is_published_names_no_folder_of_a_machine(path):
    assert '"/' not in path.read_text("utf-8")
