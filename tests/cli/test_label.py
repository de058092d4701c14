"""``latentguard label``: what a random model refuses, whoever kills it, ready to be fitted on."""

import io
import json
import sys

import pytest

import latentguard
from latentguard.data.prompt_files import read_prompts
from latentguard.models.chat_model import ChatModel
from latentguard.study import cached_model as module
from latentguard.study import judge as judging
from models.architectures import chat_model

TALK = [dict(role="user", content="Hello"), dict(role="assistant", content="Yes?")]
ROWS = [
    *(dict(id=f"a{n}", text=f"Do the thing number {n}.", label="harmful") for n in range(12)),
    *(dict(id=f"b{n}", text=f"Name the thing number {n}?", label="harmless") for n in range(12)),
    dict(id="c", text="Say it.", category="kind", source="mine", pair="7", history=TALK),
    dict(id="d", text="Say it.", label="harmless"),
    dict(text="Naïve — 東京"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model folder."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    chat_model("llama", tokenizer).model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def loaded(monkeypatch, folder):
    """Loading is tested elsewhere: one model for all."""
    model = ChatModel.load(folder)
    monkeypatch.setattr(ChatModel, "load", lambda source, **how: model)
    return model


@pytest.fixture(autouse=True)
def judge(monkeypatch):
    """A random model says nothing that reads like a refusal: its tokens decide."""

    def by_tokens(reply):
        return ("refused", "accepted", "cut", "empty")[sum(reply.ids) % 4]

    monkeypatch.setattr(
        module.CachedModel.__init__, "__kwdefaults__", DEFAULTS | {"judge": by_tokens}
    )
    return by_tokens


DEFAULTS = dict(module.CachedModel.__init__.__kwdefaults__)


@pytest.fixture
def asked(tmp_path):
    return written(tmp_path / "asked.jsonl", ROWS)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestWhatItWrites:
    def test_each_row_with_what_the_model_did(self, lg, asked, tmp_path, loaded, judge):
        out = tmp_path / "new" / "labels.jsonl"
        code, stdout, err = lg("label", asked, "--out", out)
        assert (code, stdout) == (0, "")
        replies = loaded.generate(read_prompts(asked))
        outcomes = [judge(reply) for reply in replies]
        assert len(set(outcomes)) >= 3
        for row, given, outcome in zip(lines(out), ROWS, outcomes, strict=True):
            wanted = {"id": "asked-27"} | given | {"reply": outcome}
            if outcome in ("refused", "accepted"):
                wanted["refused"] = outcome == "refused"
            assert row == wanted
        for outcome in set(outcomes):
            assert f"{outcomes.count(outcome)} {outcome}" in err.splitlines()[-1]

    def test_it_can_be_read_again(self, lg, asked, tmp_path):
        lg("label", asked, "--out", tmp_path / "l.jsonl")
        before, after = read_prompts(asked), read_prompts(tmp_path / "l.jsonl")
        for old, new in zip(before, after, strict=True):
            assert (new.text, new.id, new.harmful, new.history) == (
                old.text,
                old.id,
                old.harmful,
                old.history,
            )
            assert (new.category, new.pair) == (old.category, old.pair)
        assert {p.refused for p in after} == {True, False, None}

    def test_no_reply_is_left(self, lg, asked, tmp_path, loaded):
        out = tmp_path / "new" / "labels.jsonl"
        lg("label", asked, "--out", out)
        assert [path.name for path in out.parent.iterdir()] == ["labels.jsonl"]
        text = out.read_text()
        said = [reply.text.strip() for reply in loaded.generate(read_prompts(asked))]
        assert not any(json.dumps(one)[1:-1] in text for one in said if len(one) > 3)

    def test_over_the_file_that_was_read(self, lg, asked):
        assert lg("label", asked, "--out", asked)[0] == 0
        assert [row["text"] for row in lines(asked)] == [row["text"] for row in ROWS]
        before = asked.read_text()
        assert lg("label", asked, "--out", asked)[0] == 0
        assert asked.read_text() == before

    def test_standard_input_and_another_column(self, lg, tmp_path, monkeypatch):
        out = tmp_path / "l.jsonl"
        given = io.TextIOWrapper(io.BytesIO(b'{"goal": "Do it"}\nplain line\n'))
        monkeypatch.setattr(sys, "stdin", given)
        assert lg("label", "-", "--out", out, "--text-column", "goal")[0] == 0
        assert [(row["id"], row["text"]) for row in lines(out)] == [
            ("stdin-1", "Do it"),
            ("stdin-2", "plain line"),
        ]

    def test_a_guard_can_be_fitted_on_it(self, lg, tmp_path):
        asked = written(tmp_path / "many.jsonl", [dict(row, id=row["text"]) for row in MANY])
        lg("label", asked, "--out", tmp_path / "l.jsonl")
        out = tmp_path / "l.jsonl"
        both = ["--harmful", out, "--harmless", out]
        code, _, err = lg("fit", "--model", "default", "--out", tmp_path / "g", *both)
        assert code == 0, err
        labels = read_prompts(out)
        harmful, refuse = latentguard.LatentGuard.load(tmp_path / "g").axes
        refused = sum(p.group == "refused_harmful" for p in labels)
        accepted = sum(p.group == "accepted_harmless" for p in labels)
        assert (harmful.name, refuse.name) == ("harmful", "refuse")
        assert refuse.counts == (refused, accepted)


MANY = [row for k in range(4) for row in ({**r, "text": f"{k}: {r['text']}"} for r in ROWS[:24])]


class TestKilled:
    @pytest.fixture(autouse=True)
    def small_chunks(self, monkeypatch):
        monkeypatch.setattr(module, "REPLIES_AT_ONCE", 8)

    def test_it_goes_on(self, lg, asked, tmp_path, monkeypatch, loaded):
        whole, out = tmp_path / "whole.jsonl", tmp_path / "l.jsonl"
        lg("label", asked, "--out", whole)
        sweep, calls = loaded.sweep, []

        def dying(prompts, interventions, **how):
            if len(calls) == 2:
                raise SystemExit(137)
            calls.append(len(prompts))
            return sweep(prompts, interventions, **how)

        monkeypatch.setattr(loaded, "sweep", dying)
        assert lg("label", asked, "--out", out)[0] == 137
        assert not out.exists()
        assert (tmp_path / "l.jsonl.replies").exists()
        calls[:] = [None] * 3  # lives on
        assert lg("label", asked, "--out", out)[0] == 0
        assert calls[3:] == [8, 3]
        assert out.read_bytes() == whole.read_bytes()
        assert not (tmp_path / "l.jsonl.replies").exists()

    def test_what_lies_there_must_be_replies(self, lg, asked, tmp_path):
        (tmp_path / "l.jsonl.replies").write_text("my own notes\n" * 100)
        code, _, err = lg("label", asked, "--out", tmp_path / "l.jsonl")
        assert code == 1
        assert "Error: " in err
        assert "l.jsonl.replies is not a store" in err
        assert (tmp_path / "l.jsonl.replies").read_text().startswith("my own notes")


class TestErrors:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            (dict(text="word " * 600, id="long"), "'long' is 1,856 tokens long"),
            (dict(text=""), "line 28: 'text' is empty"),
            (dict(goal="x"), "no column 'text'"),
        ],
    )
    def test_a_bad_row(self, lg, tmp_path, row, reason):
        asked = written(tmp_path / "asked.jsonl", [*ROWS, row])
        code, _, err = lg("label", asked, "--out", tmp_path / "l.jsonl")
        assert code == 1
        assert reason in err.splitlines()[-1]
        assert "Traceback" not in err
        assert not (tmp_path / "l.jsonl").exists()

    def test_usage(self, lg, asked):
        for words in (["label"], ["label", asked], ["label", "--out", "x"]):
            code, _, err = lg(*words)
            assert code == 2
            assert "Usage: " in err

    def test_the_judge_is_the_built_in_one(self):
        assert DEFAULTS["judge"] is judging.judge
