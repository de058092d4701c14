"""The sets of the suite out of a folder: as fetched, and as published. All rows are made up."""

import csv
import json

import pytest

from latentguard.benchmark.published import load_published
from latentguard.benchmark.suite import SUITE, find_file, load_set, read_set
from latentguard.errors import PromptError

SETS = {one.name: one for one in SUITE}

AS_PUBLISHED = {
    "toxicchat": [
        dict(conv_id="1", user_input="a", human_annotation="True", toxicity="1", jailbreaking="0"),
        dict(conv_id="2", user_input="b", human_annotation="True", toxicity="0", jailbreaking="0"),
        dict(conv_id="3", user_input="c", human_annotation="False", toxicity="0", jailbreaking="0"),
    ],
    "openai_moderation": [
        dict(prompt="a", S=0, H=1),
        dict(prompt="b", S=0),
        dict(prompt="c", S3=1),
    ],
    "aegis": [
        dict(text="a", text_type="user_message", labels_0="Violence", labels_1="Violence"),
        dict(text="b", text_type="user_message", labels_0="Safe", labels_1="Safe"),
        dict(text="c", text_type="llm_response", labels_0="Safe", labels_1="Safe"),
    ],
    "aegis2": [
        dict(id="1", prompt="a", prompt_label="unsafe", violated_categories="Fraud"),
        dict(id="2", prompt="b", prompt_label="safe", violated_categories=""),
        dict(id="3", prompt="REDACTED", prompt_label="unsafe", violated_categories=""),
    ],
    "simple_safety_tests": [dict(id="1", harm_area="Scams", category="x", prompt="a")],
    "harmbench": [
        dict(Behavior="a", FunctionalCategory="standard", SemanticCategory="illegal"),
        dict(Behavior="b", FunctionalCategory="contextual", SemanticCategory="illegal"),
    ],
    "wildguardtest": [
        dict(prompt="a", adversarial=True, prompt_harm_label="harmful", subcategory="others"),
        dict(prompt="b", adversarial=False, prompt_harm_label="unharmful", subcategory="benign"),
        dict(prompt="c", adversarial=False, prompt_harm_label=None, subcategory=None),
    ],
    "xstest": [
        dict(id=1, prompt="a", type="contrast_homonyms", label="unsafe"),
        dict(id=2, prompt="b", type="homonyms", label="safe"),
    ],
    "or_bench": [dict(prompt="b", category="harassment")],
}
"""Rows of a harmful 'a' and a harmless 'b'; 'c' and the rest are left out."""

ONE_SIDED = {"simple_safety_tests": [True], "harmbench": [True], "or_bench": [False]}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestReading:
    def test_every_set_has_made_up_rows_here(self):
        assert set(AS_PUBLISHED) == set(SETS)

    @pytest.mark.parametrize("name", SETS)
    def test_rows_as_published(self, name, tmp_path):
        lines(tmp_path / f"{name}.jsonl", AS_PUBLISHED[name])
        prompts = load_set(SETS[name], tmp_path).prompts
        assert [p.harmful for p in prompts] == ONE_SIDED.get(name, [True, False])
        assert [p.text for p in prompts] == ["a" if p.harmful else "b" for p in prompts]
        assert len({p.id for p in prompts}) == len(prompts)

    def test_rows_as_fetched(self, tmp_path):
        rows = [dict(id="x", text="a", label="harmful"), dict(text="b", label="harmless")]
        lines(tmp_path / "aegis.jsonl", rows)
        prompts = load_set(SETS["aegis"], tmp_path).prompts
        assert [(p.id, p.harmful) for p in prompts] == [("x", True), ("aegis-2", False)]

    def test_csv_as_published(self, tmp_path):
        rows = AS_PUBLISHED["toxicchat"]
        with (tmp_path / "toxic-chat.csv").open("w") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        prompts = load_set(SETS["toxicchat"], tmp_path).prompts
        assert [p.harmful for p in prompts] == [True, False]

    @pytest.mark.parametrize("file", ["OR-Bench.jsonl", "orbench.json", "or_bench.csv"])
    def test_names_of_files_are_read_generously(self, file, tmp_path):
        (tmp_path / file).touch()
        assert find_file(SETS["or_bench"].public, tmp_path) == tmp_path / file

    def test_a_part_of_toxicchat_serves(self, tmp_path):
        (tmp_path / "toxicchat_third.jsonl").touch()
        assert find_file(SETS["toxicchat"].public, tmp_path).name == "toxicchat_third.jsonl"

    def test_two_files_of_a_set_are_refused(self, tmp_path):
        (tmp_path / "xstest.csv").touch()
        (tmp_path / "xstest.jsonl").touch()
        with pytest.raises(PromptError, match=r"xstest\.csv and xstest\.jsonl"):
            load_set(SETS["xstest"], tmp_path)

    def test_no_file_is_no_set(self, tmp_path):
        assert load_set(SETS["xstest"], tmp_path) is None

    def test_rows_of_another_form_name_the_line(self, tmp_path):
        path = lines(tmp_path / "aegis2.jsonl", [AS_PUBLISHED["aegis2"][0], dict(question="a")])
        with pytest.raises(PromptError, match=r"line 2: expected the columns .* found question"):
            read_set(SETS["aegis2"].public, path)

    def test_a_fetched_row_without_a_label_is_refused(self, tmp_path):
        path = lines(tmp_path / "aegis2.jsonl", [dict(text="a", label=None)])
        with pytest.raises(PromptError, match="line 1: expected a label"):
            read_set(SETS["aegis2"].public, path)

    def test_a_limit_takes_rows_from_the_whole_file(self, tmp_path):
        rows = [dict(id=str(n), text="a", label="harmful") for n in range(10)]
        lines(tmp_path / "aegis.jsonl", rows)
        loaded = load_set(SETS["aegis"], tmp_path, limit=4)
        assert [p.id for p in loaded.prompts] == ["0", "2", "5", "7"]
        assert (loaded.available, loaded.note) == (10, "4 (the whole set: 359)")


class TestPublished:
    def test_every_figure_has_a_source_and_a_set_of_the_suite(self):
        for one in load_published():
            assert one.source and one.model
            assert one.set in {*SETS, "mean of 6 sets"}
            assert 0 < one.value <= 1

    def test_no_figure_is_given_twice(self):
        keys = [(one.model, one.set, one.metric) for one in load_published()]
        assert len(keys) == len(set(keys))

    def test_some_figures_are_as_published(self):
        values = {(one.model, one.set): one.value for one in load_published()}
        assert values["WildGuard 7B", "wildguardtest"] == 0.889
        assert values["Qwen3Guard-Gen 8B, strict", "harmbench"] == 1.0
        assert values["Llama Guard", "or_bench"] == 0.126
