"""The verb ``stress`` on a tiny random model: output, errors, a killed process."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import latentguard
from browser.pages import check
from latentguard.data.builtin import load_contrast
from latentguard.guard.latent_guard import LatentGuard
from latentguard.robustness.run import STORE
from models.architectures import chat_model

FEW = ("--only", "case and spacing", "--only", "padding in front, 500")


@pytest.fixture(scope="module")
def guard(tmp_path_factory, tokenizer):
    """A guard folder of a model folder."""
    folder = tmp_path_factory.mktemp("stress")
    tiny = chat_model("llama", tokenizer)
    tiny.model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    train = [p for p in load_contrast("train") if p.pair][:40]
    backend = latentguard.ChatModel.load(folder / "tiny")
    LatentGuard.fit(backend, train, reading="t_inst", probe="centroid").save(folder / "guard")
    return folder / "guard"


@pytest.fixture(scope="module")
def encodings_folder(tmp_path_factory):
    """A report folder that several tests share; its store answers all but the first."""
    return tmp_path_factory.mktemp("encodings")


def own_prompts(folder, count):
    """Options for a few harmful and harmless prompts, in the column 'q'."""
    options = ["--text-column", "q"]
    for side in ("harmful", "harmless"):
        path = folder / f"{side}.jsonl"
        path.write_text("".join(json.dumps(dict(q=f"{side} {n}")) + "\n" for n in range(count)))
        options += [f"--{side}", path]
    return options


def tables(folder):
    found = json.loads((folder / "report.json").read_text())["tables"]
    return {t["title"]: t["rows"] for t in found}


def test_it_prints_the_report_and_writes_every_format(lg, guard, tmp_path):
    code, out, err = lg("stress", guard, "--out", tmp_path / "s", *FEW)
    assert (code, out.strip()) == (0, str(tmp_path / "s" / "report.html"))
    assert "Traceback" not in err
    rows = tables(tmp_path / "s")["All figures"]
    assert len(rows) == 6  # 512 tokens of context leave no room to pad
    assert len(list((tmp_path / "s" / "tables").glob("*.csv"))) == len(tables(tmp_path / "s"))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_page_is_drawn_whole(lg, guard, encodings_folder, chromium, width, scheme):
    assert lg("stress", guard, "--out", encodings_folder, "--only", "encodings")[0] == 0
    check(chromium, encodings_folder / "report.html", width, scheme)


def test_own_prompts(lg, guard, tmp_path):
    out = tmp_path / "s"
    code, *_ = lg("stress", guard, "--out", out, "--only", "base64", *own_prompts(tmp_path, 3))
    assert code == 0
    assert [row[-1] for row in tables(out)["All figures"]] == ["3 + 3", "3 + 3"]


def test_another_model_is_allowed_by_name(lg, guard, tmp_path, tokenizer):
    other = tmp_path / "other"
    chat_model("llama", tokenizer, seed=3).model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    kept, loaded = tmp_path / "guard", LatentGuard.load(guard)
    calm = [p for p in load_contrast("validation") if not p.harmful]
    own = latentguard.ChatModel.load(loaded.fingerprint.model)
    loaded.calibrate(own, calm, max_fpr=0.05).save(kept)
    words = ["stress", kept, "--out", tmp_path / "s", "--only", "base64", "--model", other]
    code, _, err = lg(*words)
    assert code == 1
    assert "weights" in err
    code, _, err = lg(*words, "--allow-mismatch")
    assert code == 0, err
    assert "standard deviations in the mean" in err
    page = (tmp_path / "s" / "report.html").read_text()
    assert "nothing is promised" in page
    assert "at most 5.00%" not in page
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    assert report["meta"]["model"]["model"] == str(other)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "homoglyphz"], "There is no attack 'homoglyphz'"),
        (["--harmful", "contrast"], "both --harmful and --harmless"),
        (["--harmless", "contrast"], "both --harmful and --harmless"),
        (["--harmful", "none.jsonl", "--harmless", "none.jsonl"], "none.jsonl"),
    ],
)
def test_errors_in_one_sentence_before_the_model_is_loaded(lg, guard, tmp_path, words, said):
    code, out, err = lg("stress", guard, "--out", tmp_path / "s", *words)
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert said in err
    assert "Traceback" not in err


def test_no_guard(lg, tmp_path):
    code, _, err = lg("stress", tmp_path / "none", "--out", tmp_path / "s")
    assert code == 1
    assert err.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("words", [["--budget", "huge"], ["--only"]])
def test_wrong_usage_is_2(lg, guard, tmp_path, words):
    assert lg("stress", guard, "--out", tmp_path / "s", *words)[0] == 2


def test_a_killed_process_goes_on(lg, guard, tmp_path):
    words = ["stress", guard, "--only", "wrappers", "--only", "case and spacing"]
    words += [*own_prompts(tmp_path, 12), "--out"]
    env = os.environ | {
        "PYTHONPATH": str(Path(latentguard.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    script = "from latentguard.cli import main; main()"
    command = [sys.executable, "-c", script, *map(str, words), str(tmp_path / "killed")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=env) as process:
        while kept(tmp_path / "killed" / STORE) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "report.html").exists()
    for out in ("killed", "whole"):
        assert lg(*words, tmp_path / out)[0] == 0
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")


def kept(path):
    """How many entries a store holds."""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as base:
            return base.execute("SELECT count(*) FROM kept").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
