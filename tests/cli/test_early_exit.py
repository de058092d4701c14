"""``calibrate --early-exit``, and ``score`` with such a guard, on a tiny random model."""

import json
import shutil

import pytest

from cli.tiny_files import rows, written
from latentguard.cli import early_exit
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt

SHARE = ("--early-exit", "0.05")


@pytest.fixture(autouse=True)
def few_training_rows(monkeypatch):
    monkeypatch.setattr(early_exit, "TRAINING_ROWS", 200)


@pytest.fixture(scope="module")
def linear_guard(tiny_model, tmp_path_factory):
    """The folder of a guard with the linear probe."""
    model = ChatModel.load(tiny_model)
    prompts = [
        Prompt(row["text"], harmful=word == "sly", pair=row["id"])
        for word in ("sly", "kind")
        for row in rows(60, word)
    ]
    folder = tmp_path_factory.mktemp("linear") / "guard"
    LatentGuard.fit(model, prompts).save(folder)
    return folder


@pytest.fixture
def guard(linear_guard, tmp_path):
    """A copy of it."""
    return shutil.copytree(linear_guard, tmp_path / "guard")


@pytest.fixture
def sides(files, tmp_path):
    """Options that name harmless and harmful prompts."""
    harmful = written(tmp_path / "sly.jsonl", rows(80, "sly", "harmful", start=900))
    return ["--harmless", files["plain"], "--harmful", harmful]


@pytest.fixture
def ready(lg, guard, files, sides):
    words = ["--harmless", files["plain"], "--max-fpr", "0.1"]
    assert lg("calibrate", guard, *words)[0] == 0
    code, _, err = lg("calibrate", guard, *sides, *SHARE)
    assert code == 0, err
    return guard


def test_it_keeps_the_threshold_and_says_what_may_be_lost(lg, guard, files, sides):
    assert lg("calibrate", guard, "--harmless", files["plain"], "--max-fpr", "0.1")[0] == 0
    before = LatentGuard.load(guard)
    code, out, err = lg("calibrate", guard, *sides, *SHARE)
    after = LatentGuard.load(guard)
    assert code == 0, err
    assert after.threshold == before.threshold
    assert after.bound == before.bound
    assert "at most 5.0% are lost" in out
    assert after.usable_early_exit.n == 140
    assert "at most 5.0% are lost" in lg("show", guard)[1]


def test_scored_prompts_leave_early(lg, ready, files):
    code, out, err = lg("score", ready, files["asked"])
    verdicts = [json.loads(line) for line in out.splitlines()]
    assert code == 0, err
    assert [v["id"] for v in verdicts] == [
        row["id"] for row in rows(9, "sly", start=50) + rows(9, "kind")
    ]
    assert any(v["left_early"] for v in verdicts)
    assert not any(v["left_early"] and v["flagged"] for v in verdicts)


def test_it_can_be_calibrated_again(lg, ready, sides):
    first = LatentGuard.load(ready).early_exit
    assert lg("calibrate", ready, *sides, "--early-exit", "0.1")[0] == 0
    again = LatentGuard.load(ready)
    assert again.usable_early_exit.left >= first.left


def test_a_new_threshold_ends_it(lg, ready, files):
    assert lg("calibrate", ready, "--harmless", files["plain"], "--max-fpr", "0.2")[0] == 0
    assert LatentGuard.load(ready).usable_early_exit is None
    assert "are lost" not in lg("show", ready)[1]
    verdicts = [json.loads(line) for line in lg("score", ready, files["asked"])[1].splitlines()]
    assert not any(v["left_early"] for v in verdicts)


@pytest.mark.parametrize(
    "words", [["--max-fpr", "0.1"], ["--balanced"], ["--second-opinion", "default"]]
)
def test_it_is_calibrated_by_itself(lg, guard, sides, words):
    code, _, err = lg("calibrate", guard, *sides, *SHARE, *words)
    assert code == 2
    assert "it is calibrated by itself" in err


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "nan"])
def test_a_share_that_is_none(fails, guard, sides, share):
    said = fails("calibrate", guard, *sides, "--early-exit", share)
    assert "between 0 and 1" in said


def test_too_few_flagged_prompts(fails, guard, files, tmp_path):
    few = written(tmp_path / "few.jsonl", rows(20, "sly", "harmful", start=900))
    said = fails("calibrate", guard, "--harmless", files["plain"], "--harmful", few, *SHARE)
    assert "Give more harmful prompts" in said


def test_the_papers_rule_is_refused_before_its_model_is_loaded(lg, tiny_guard, sides):
    code, _, err = lg("calibrate", tiny_guard, *sides, *SHARE)
    assert code == 1
    assert "needs a guard with the linear probe" in err
    assert "Loading" not in err
