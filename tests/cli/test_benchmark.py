"""The verb ``benchmark``, on a tiny random model."""

import pytest

from cli.tiny_files import rows, written
from latentguard.benchmark import run
from latentguard.prompts import Prompt


@pytest.fixture(autouse=True)
def few_training_rows(monkeypatch):
    few = [Prompt(f"{word} {n}", harmful=word == "sly") for n in range(9) for word in ("sly", "ok")]
    monkeypatch.setattr(run, "load_training_rows", lambda: few)


class TestBenchmark:
    def test_it_prints_the_table_and_names_what_is_missing(self, lg, guard, tmp_path):
        data = tmp_path / "data"
        data.mkdir()
        both = rows(12, "sly", "harmful") + rows(12, "kind", "harmless")
        written(data / "xstest.jsonl", both)
        out = tmp_path / "report"
        code, said, err = lg("benchmark", guard, "--data-dir", data, "--out", out)
        assert code == 0, err
        assert "Missing: WildGuardTest." in err
        assert "| WildGuard 7B |" in said
        assert "12, 12" in said
        names = {path.name for path in out.iterdir()}
        assert {"report.html", "report.md", "report.json", "figures.json", "verdicts"} <= names

    def test_a_folder_without_sets_is_refused_before_the_model_loads(self, fails, guard, tmp_path):
        assert "holds no set of the suite" in fails("benchmark", guard, "--data-dir", tmp_path)
