"""Public sets: the table, rows of the Hub as prompts, mirrors, digests; nothing is downloaded."""

import hashlib
import json

import pytest

from latentguard.data.download import SOURCES, fetch_set, inspect_set, read_sources
from latentguard.data.prompt_files import read_prompts
from latentguard.data.public_sets import PUBLIC_SETS
from latentguard.errors import PromptError
from latentguard.study.prompt_groups import FOLDER, read_pools
from latentguard.study.run import EXPERIMENTS

SETS = {one.name: one for one in PUBLIC_SETS}

HUB_ROWS = {
    "advbench": {"train": [dict(prompt=" a ", target="b"), dict(prompt="c", target="d")]},
    "alpaca_harmless": {
        "train": [
            dict(instruction="a", input="", output="x"),
            dict(instruction="b", input="given", output="x"),
        ]
    },
    "jbb": {
        "harmful": [dict(Goal="a", Category="Fraud")],
        "benign": [dict(Goal="b", Category="Fraud")],
    },
    "xstest": {
        "train": [
            dict(prompt="a", label="safe", type="homonyms"),
            dict(prompt="b", label="unsafe", type="contrast_homonyms"),
        ]
    },
    "sorry_bench": {
        "train": [
            dict(turns=["a"], category="7", prompt_style="base"),
            dict(turns=["b"], category="7", prompt_style="slang"),
        ]
    },
    "catqa": {"en": [dict(Question="a", Category="Fraud", Subcategory="x")]},
    "persuasion_samples": {"train": [dict(bad_q="a", ss_category="Logic", ss_prompt="b")]},
    "openai_moderation": {
        "train": [
            dict(prompt="a", S=0, H=1, V=0, HR=None, SH=0, S3=0, H2=1, V2=0),
            dict(prompt="b", S=0, H=0, V=0, HR=0, SH=0, S3=0, H2=0, V2=0),
            dict(prompt="c", S=1, H=0, V=0, HR=0, SH=0, S3=1, H2=0, V2=0),
        ]
    },
    "toxicchat": {
        "test": [
            dict(user_input="a", toxicity=1, human_annotation=True),
            dict(user_input="b", toxicity=0, human_annotation=True),
            dict(user_input="c", toxicity=0, human_annotation=False),
        ]
    },
    "aegis": {
        "test": [
            dict(text="a", text_type="user_message", labels_0="Safe", labels_1="Violence"),
            dict(text="b", text_type="user_message", labels_0="Safe", labels_1="Safe"),
            dict(text="c", text_type="llm_response", labels_0="Safe", labels_1=None),
            dict(text="d", text_type="user_message", labels_0="Needs Caution", labels_1=None),
        ]
    },
    "aegis2": {
        "test": [
            dict(prompt="a", prompt_label="unsafe", violated_categories="Fraud", response=None),
            dict(prompt="b", prompt_label="safe", violated_categories="", response=None),
            dict(prompt="REDACTED", prompt_label="unsafe", violated_categories="", response=None),
        ]
    },
    "simple_safety_tests": {"test": [dict(id="1", prompt="a", harm_area="Scams & Fraud")]},
    "harmbench": {"train": [dict(prompt="a", category="illegal")]},
    "wildguardtest": {
        "test": [
            dict(prompt="a", prompt_harm_label="harmful", adversarial=True, subcategory="others"),
            dict(prompt="b", prompt_harm_label="unharmful", adversarial=False, subcategory=None),
            dict(prompt="c", prompt_harm_label=None, adversarial=False, subcategory=None),
        ]
    },
    "or_bench": {"train": [dict(prompt="a", category="harassment")]},
}
"""Rows as the Hub has them, by split; texts are made up."""

READ = {
    "advbench": [("a", True, None), ("c", True, None)],
    "alpaca_harmless": [("a", False, None)],
    "jbb": [("a", True, "Fraud"), ("b", False, "Fraud")],
    "xstest": [("a", False, "homonyms"), ("b", True, "contrast_homonyms")],
    "sorry_bench": [("a", True, "sorry-7")],
    "catqa": [("a", True, "Fraud")],
    "persuasion_samples": [("b", True, "persuasion")],
    "openai_moderation": [("a", True, "H,H2"), ("b", False, None)],
    "toxicchat": [("a", True, None), ("b", False, None)],
    "aegis": [("a", False, None), ("b", False, None), ("d", True, None)],
    "aegis2": [("a", True, "Fraud"), ("b", False, None)],
    "simple_safety_tests": [("a", True, "Scams & Fraud")],
    "harmbench": [("a", True, "illegal")],
    "wildguardtest": [("a", True, "others"), ("b", False, None)],
    "or_bench": [("a", False, "harassment")],
}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub; returns what it was asked for."""
    import datasets

    asked = []

    def load_dataset(path, name=None, split=None, revision=None, streaming=False):
        asked.append((path, name, split, revision))
        (one,) = [one for one in PUBLIC_SETS if one.hub and one.hub.id == path]
        return HUB_ROWS[one.name][split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


class TestTable:
    def test_every_file_that_a_study_reads_is_in_it(self):
        files = {name for names in FOLDER.values() for name in names}
        others = {name for one in PUBLIC_SETS for name, _ in one.mirrors}
        assert files <= set(SETS) | others
        study = {one.name for one in PUBLIC_SETS if one.experiments != ("benchmark",)}
        assert study <= files

    def test_it_names_experiments_that_exist(self):
        named = {name for one in PUBLIC_SETS for name in one.experiments}
        assert named <= {"all", "benchmark", *EXPERIMENTS}

    @pytest.mark.parametrize("one", PUBLIC_SETS, ids=lambda one: one.name)
    def test_an_entry_says_licence_count_and_origin(self, one):
        assert one.licence and one.upstream and one.about
        assert one.rows > 0
        if one.hub:
            assert one.hub.id.count("/") == 1
            assert one.hub.revision or "revision" in one.hub.unchecked

    def test_names_are_unique(self):
        assert len(SETS) == len(PUBLIC_SETS)


class TestFromTheHub:
    @pytest.mark.parametrize("name", HUB_ROWS)
    def test_rows_become_prompts(self, name, hub, tmp_path):
        fetched = fetch_set(SETS[name], tmp_path)
        prompts = read_prompts(tmp_path / f"{name}.jsonl")
        assert [(p.text, p.harmful, p.category) for p in prompts] == READ[name]
        assert prompts[0].id == f"{name}-0001"
        assert fetched.rows == len(prompts)
        source = SETS[name].hub
        assert hub == [(source.id, source.config, s, source.revision) for s in source.splits]

    def test_every_set_on_the_hub_is_tested_above(self):
        assert set(HUB_ROWS) == {one.name for one in PUBLIC_SETS if one.hub} == set(READ)

    def test_digest_licence_and_count_are_noted(self, hub, tmp_path):
        fetch_set(SETS["jbb"], tmp_path)
        fetched = fetch_set(SETS["advbench"], tmp_path)
        content = (tmp_path / "advbench.jsonl").read_bytes()
        assert fetched.sha256 == hashlib.sha256(content).hexdigest()
        record = json.loads((tmp_path / SOURCES).read_text())
        assert set(record) == {"advbench", "jbb"}
        assert record["advbench"] == dict(
            name="advbench",
            rows=2,
            sha256=fetched.sha256,
            licence="MIT",
            source="walledai/AdvBench",
        )
        assert record["jbb"]["source"].startswith("JailbreakBench/JBB-Behaviors@886acc35")

    def test_no_more_rows_than_the_limit(self, hub, tmp_path, monkeypatch):
        many = [dict(instruction=f"do {n}", input="", output="x") for n in range(2100)]
        monkeypatch.setitem(HUB_ROWS, "alpaca_harmless", {"train": many})
        assert fetch_set(SETS["alpaca_harmless"], tmp_path).rows == 2000

    def test_a_gated_set_says_how_to_get_access(self, tmp_path, monkeypatch):
        import datasets

        def load_dataset(**_):
            raise ConnectionError("401 Client Error")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(PromptError) as error:
            fetch_set(SETS["sorry_bench"], tmp_path)
        assert "401 Client Error" in str(error.value)
        assert "It is gated: accept its terms at https://huggingface.co/" in str(error.value)
        with pytest.raises(PromptError) as error:
            fetch_set(SETS["advbench"], tmp_path)
        assert "gated" not in str(error.value)
        assert list(tmp_path.iterdir()) == []

    def test_columns_that_have_changed_are_named(self, hub, tmp_path, monkeypatch):
        monkeypatch.setitem(HUB_ROWS, "advbench", {"train": [dict(goal="a", target="b")]})
        with pytest.raises(PromptError, match=r"'prompt'.*found goal, target"):
            fetch_set(SETS["advbench"], tmp_path)

    def test_a_set_that_is_not_there_says_where_it_is_published(self, tmp_path):
        with pytest.raises(PromptError, match=r"not on the Hub\. It is published at github\.com"):
            fetch_set(SETS["dsn_suffixes"], tmp_path)


class TestFromAMirror:
    @pytest.fixture
    def mirror(self, tmp_path):
        folder = tmp_path / "mirror"
        folder.mkdir()
        kinds = ("suffix", "template", "persuasion")
        rows = {
            "advbench": [dict(id="x", text="a\u2028b", label="harmful", source="mine")],
            "jailbreaks": [dict(text=f"{kind} {n}", category=kind) for kind in kinds for n in "12"],
        }
        for name, some in rows.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in some]
            (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        return folder

    def test_a_file_is_taken_as_it_is(self, mirror, tmp_path):
        fetched = fetch_set(SETS["advbench"], tmp_path / "data", mirror=mirror)
        copy = tmp_path / "data" / "advbench.jsonl"
        assert copy.read_bytes() == (mirror / "advbench.jsonl").read_bytes()
        assert (fetched.rows, fetched.source) == (1, str(mirror / "advbench.jsonl"))

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("dsn_suffixes", "suffix"),
            ("in_the_wild_templates", "template"),
            ("persuasion_samples", "persuasion"),
        ],
    )
    def test_jailbreaks_are_named_for_what_they_are(self, name, kind, mirror, tmp_path):
        fetch_set(SETS[name], tmp_path / "data", mirror=mirror)
        prompts = read_prompts(tmp_path / "data" / f"{name}.jsonl")
        assert [p.text for p in prompts] == [f"{kind} 1", f"{kind} 2"]

    def test_a_study_reads_the_folder(self, mirror, tmp_path):
        for name in ("advbench", "dsn_suffixes", "persuasion_samples"):
            fetch_set(SETS[name], tmp_path / "data", mirror=mirror)
        (tmp_path / "data" / "alpaca_harmless.jsonl").write_text('{"text": "b"}\n')
        pools = read_pools(tmp_path / "data")
        assert len(pools.jailbreaks) == 4
        assert {p.source for p in pools.jailbreaks} == {"dsn_suffixes", "persuasion_samples"}

    def test_a_set_that_is_not_in_it_is_named(self, mirror, tmp_path):
        with pytest.raises(PromptError, match=r"holds no toxicchat\.jsonl or toxicchat_third"):
            fetch_set(SETS["toxicchat"], tmp_path / "data", mirror=mirror)

    @pytest.mark.parametrize("line", [b'{"text": ""}', b"{oops", b'{"q": 1}', b"\xff"])
    def test_a_bad_row_is_named_and_nothing_is_written(self, line, mirror, tmp_path):
        (mirror / "jbb.jsonl").write_bytes(b'{"text": "a"}\n' + line)
        with pytest.raises(PromptError, match=r"jbb\.jsonl"):
            fetch_set(SETS["jbb"], tmp_path / "data", mirror=mirror)
        assert not (tmp_path / "data").exists()

    def test_another_file_is_not_overwritten_silently(self, mirror, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        (folder / "advbench.jsonl").write_text('{"text": "mine"}\n')
        with pytest.raises(PromptError, match="holds something else; move it away, or add --over"):
            fetch_set(SETS["advbench"], folder, mirror=mirror)
        assert (folder / "advbench.jsonl").read_text() == '{"text": "mine"}\n'
        fetch_set(SETS["advbench"], folder, mirror=mirror, overwrite=True)
        fetch_set(SETS["advbench"], folder, mirror=mirror)  # the same again


class TestInspect:
    def test_a_folder_that_is_not_there(self, tmp_path):
        assert inspect_set(SETS["jbb"], tmp_path / "none").state == "missing"

    def test_there_changed_and_of_unknown_source(self, hub, tmp_path):
        fetch_set(SETS["jbb"], tmp_path)
        path = tmp_path / "jbb.jsonl"
        assert inspect_set(SETS["jbb"], tmp_path).state == "there"
        path.write_text(path.read_text() + '{"text": "more"}\n')
        local = inspect_set(SETS["jbb"], tmp_path)
        assert (local.state, local.rows) == ("changed", 3)
        (tmp_path / "xstest.jsonl").write_text('{"text": "a"}\n')
        assert inspect_set(SETS["xstest"], tmp_path).state == "unknown source"

    @pytest.mark.parametrize("text", ["junk", "[]", '{"jbb": 1}', '{"jbb": {"name": "jbb"}}'])
    def test_damaged_notes_are_said(self, text, tmp_path):
        (tmp_path / SOURCES).write_text(text)
        with pytest.raises(PromptError, match=r"sources\.json cannot be read"):
            read_sources(tmp_path)
