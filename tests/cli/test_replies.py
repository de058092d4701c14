"""Replies on the command line: fit --replies, calibrate --replies, score --replies."""

import json

import numpy as np
import pytest

from cli.tiny_files import record, written
from latentguard.data.prompt_files import read_replies
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reply_fitting import fit_replies
from latentguard.models.chat_model import ChatModel

WORDS = "river garden window teacher engine letter school winter music paper city doctor".split()


def reply_rows(count, start=0, harmful=None):
    rng = np.random.default_rng(start)
    rows = []
    for n in range(start, start + count):
        bad = bool(n % 2) if harmful is None else harmful
        words = list(rng.choice(WORDS, size=int(rng.integers(4, 12))))
        text = " sly ".join(words) if bad else " and ".join(words)
        label = "harmful" if bad else "harmless"
        rows.append(dict(id=f"r{n}", prompt=f"Question {n // 2}?", reply=text, label=label))
    return rows


@pytest.fixture(scope="module")
def reply_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replies")
    return {
        "train": written(folder / "train.jsonl", reply_rows(60)),
        "harmless": written(folder / "harmless.jsonl", reply_rows(80, start=500, harmful=False)),
        "asked": written(folder / "asked.jsonl", reply_rows(12, start=900)),
    }


@pytest.fixture(scope="module")
def fitted(model, reply_files, tiny_guard, tmp_path_factory):
    """A guard that judges replies, fitted in Python; ``fit`` itself is tested below."""
    backend = ChatModel.load(model)
    guard = LatentGuard.load(tiny_guard, backend)
    folder = tmp_path_factory.mktemp("fitted") / "g"
    fit_replies(backend, guard, read_replies(reply_files["train"])).save(folder)
    return folder


def test_fit_judges_replies_too(lg, model, files, reply_files, fitted, tmp_path):
    sides = ["--harmful", files["mixed"], "--harmless", files["harmless"], "--probe", "centroid"]
    where = ["--model", model, "--out", tmp_path / "g", "--replies", reply_files["train"]]
    code, _, err = lg("fit", *where, *sides)
    assert code == 0
    assert "--replies HARMLESS" in err
    assert record(tmp_path / "g")["replies"]["fitted"] == record(fitted)["replies"]["fitted"]


def test_calibrate_and_score(lg, fitted, reply_files, model):
    before = record(fitted)
    code, out, err = lg("score", fitted, reply_files["asked"], "--replies")
    assert code == 0
    assert "is not calibrated" in err
    code, out, err = lg(
        "calibrate", fitted, "--replies", reply_files["harmless"], "--max-fpr", "0.05"
    )
    assert code == 0
    assert "harmless replies" in out
    after = record(fitted)
    assert after["threshold"] == before["threshold"]  # that of prompts stays
    assert after["replies"]["bound"]["n"] == 80
    code, out, err = lg("score", fitted, reply_files["asked"], "--replies")
    assert "is not calibrated" not in err
    verdicts = [json.loads(line) for line in out.splitlines()]
    backend = ChatModel.load(model)
    guard = LatentGuard.load(fitted, backend)
    wanted = list(guard.scan_replies(backend, read_replies(reply_files["asked"])))
    assert [row["id"] for row in verdicts] == [f"r{n}" for n in range(900, 912)]
    for row, verdict in zip(verdicts, wanted, strict=True):
        assert row == verdict.to_dict()
    assert {row["flagged"] for row in verdicts} == {True, False}


def test_to_a_file_a_killed_run_goes_on(lg, fitted, reply_files, tmp_path):
    out = tmp_path / "v.jsonl"
    assert lg("score", fitted, reply_files["asked"], "--replies", "--out", out)[0] == 0
    whole = out.read_text()
    digest = LatentGuard.load(fitted).digest
    from latentguard.guard.score_files import _reply_line

    done = [_reply_line(reply) for reply in read_replies(reply_files["asked"])][:5]
    (tmp_path / "w.jsonl.partial").write_text("".join(whole.splitlines(keepends=True)[:5]))
    (tmp_path / "w.jsonl.partial.guard").write_text("\n".join([digest, *done]) + "\n")
    again = tmp_path / "w.jsonl"
    code, _, err = lg("score", fitted, reply_files["asked"], "--replies", "--out", again)
    assert code == 0
    assert "5 were there from an earlier run" in err
    assert [row["id"] for row in map(json.loads, again.read_text().splitlines())] == [
        row["id"] for row in map(json.loads, whole.splitlines())
    ]
    assert again.read_text().splitlines()[:5] == whole.splitlines()[:5]  # not scored again


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (dict(prompt="a"), "no column 'reply'"),
        (dict(reply="a"), "no column 'prompt'"),
        (dict(prompt="a", reply=""), "'reply' is empty"),
        (dict(prompt="a", reply="b", label="rude"), "should be harmful or harmless"),
        (dict(messages=[dict(role="user", content="a")]), "end with a user and the assistant"),
    ],
)
def test_a_row_that_is_no_reply_is_named(lg, fitted, tmp_path, row, reason):
    path = written(tmp_path / "bad.jsonl", [row])
    code, _, err = lg("score", fitted, path, "--replies")
    assert code == 1
    assert reason in err
    assert "line 1" in err


def test_a_guard_of_prompts_alone_says_what_to_do(lg, tiny_guard, reply_files):
    for verb in (["score", tiny_guard, reply_files["asked"], "--replies"],):
        code, _, err = lg(*verb)
        assert code == 1
        assert "fit --replies" in err
    code, _, err = lg("calibrate", tiny_guard, "--replies", reply_files["harmless"])
    assert code == 1
    assert "fit --replies" in err


def test_columns_of_public_sets_and_chats_are_read(tmp_path):
    rows = [
        dict(prompt="a", response="b", is_safe=False),
        dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b")]),
    ]
    one, other = read_replies(written(tmp_path / "rows.jsonl", rows))
    assert (one.prompt.text, one.text, one.harmful) == ("a", "b", True)
    assert (other.prompt.text, other.text, other.harmful) == ("a", "b", None)
