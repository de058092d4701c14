"""First contact: bad input is said before the model loads, nothing is lost, Control-C explains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import latentguard
from cli.tiny_files import record, rows, written
from latentguard.cli import score as score_verb
from latentguard.files import exclusive_lock
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel


@pytest.fixture
def calibrated(lg, guard, files):
    words = ["--harmless", files["plain"], "--max-fpr", "0.05"]
    assert lg("calibrate", guard, *words)[0] == 0
    return guard


@pytest.fixture
def places(tmp_path, guard, files):
    """What the commands below name in braces."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text"\n')
    written(tmp_path / "replies.jsonl", [dict(prompt="a", reply="b")])
    written(tmp_path / "harmful.jsonl", rows(3, "sly", "harmful"))
    written(tmp_path / "own.jsonl", rows(140, "kind", start=600))
    return {"tmp": tmp_path, "guard": guard, **files}


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error of the test."""

    def load(source, **_):
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr(ChatModel, "load", load)


FIT = "fit --out {tmp}/g --harmful {mixed} --harmless {harmless}"
BAD_INPUT = [
    ("fit --out {tmp}/g --harmful none.jsonl", "none.jsonl cannot be read: No such file"),
    ("fit --out {tmp}/g --harmful {tmp}/torn.jsonl", "line 2: not JSON"),
    ("fit --out {tmp}/g --harmful {tmp}/empty.jsonl", "empty.jsonl holds no prompts"),
    ("fit --out {tmp}/g --harmful {harmless}", "each of its 14 rows is labelled harmless"),
    ("fit --out {tmp}/g --harmful {mixed}", "found 15 harmful and 0 harmless"),
    (FIT + " --text-column q", "no column 'q'; columns found: id, text, label"),
    (FIT + " --reading t_last", "no reading 't_last'"),
    (FIT + " --reading post+0", "no reading 'post+0'"),
    (FIT.replace("{tmp}/g", "{tmp}/file/x"), "file/x cannot be written: "),
    (FIT.replace("{tmp}/g", "{tmp}/file"), "file cannot be written: "),
    (FIT.replace("{tmp}/g", "{guard}"), "holds a guard, which would be overwritten"),
    ("score {guard} none.jsonl", "none.jsonl cannot be read: No such file"),
    ("score {guard} nothing", "nothing cannot be read: no such file"),
    ("score {guard} {tmp}/torn.jsonl", "torn.jsonl, line 2: not JSON"),
    ("score {guard} {tmp}/empty.jsonl", "empty.jsonl holds no prompts"),
    ("score {guard} {tmp}/replies.jsonl", "columns found: prompt, reply"),
    ("score {guard} {asked} --out {tmp}/file/x", "file/x cannot be written: "),
    ("score {guard} {asked} --out {tmp}", "should name a file; "),
    ("score {tmp}/none {asked}", "Expected a guard folder"),
    ("calibrate {guard} --harmless none.jsonl", "none.jsonl cannot be read"),
    ("calibrate {guard} --harmless {tmp}/harmful.jsonl", "is labelled harmful"),
    ("calibrate {guard} --harmless {few}", "20 harmless prompts are too few"),
    ("calibrate {guard} --harmless {plain} --max-fpr 5", "between 0 and 1"),
    ("calibrate {guard} --harmless {plain} --segment-column lang", "'lang', which no harmless"),
    ("calibrate {tmp}/none --harmless {plain}", "Expected a guard folder"),
    ("pack add {guard} --name x --examples {mixed}", "guard has no calibration"),
    ("pack remove {guard} x", "guard has no calibration"),
    ("drift {guard} {plain}", "guard has no calibration"),
    ("label none.jsonl --out {tmp}/l.jsonl", "none.jsonl cannot be read"),
    ("label {asked} --out {tmp}/file/x", "file/x cannot be written"),
    ("study default --out {tmp}/file/x", "file/x cannot be written"),
    ("study default --out {tmp}/r --only inverse", "no experiment 'inverse'"),
    ("stress {guard} --out {tmp}/file/x", "file/x cannot be written"),
    ("stress {guard} --out {tmp}/r --only homoglyphz", "no attack 'homoglyphz'"),
    ("demo --out {tmp}/file/x --guard {tmp}/g", "file/x cannot be written"),
    ("demo --out {tmp}/r --guard {tmp}/file", "file cannot be written"),
]


@pytest.mark.parametrize(("command", "reason"), BAD_INPUT)
def test_bad_input_is_said_before_the_model_loads(fails, places, no_model, command, reason):
    before = sorted(places["tmp"].rglob("*"))
    assert reason in fails(*command.format(**places).split())
    assert sorted(places["tmp"].rglob("*")) == before
    assert (places["tmp"] / "file").read_text() == "mine"


BAD_FOR_A_CALIBRATED_GUARD = [
    ("pack add {guard} --name x --examples {tmp}/harmful.jsonl", "at least 10 different harmful"),
    ("pack add {guard} --name X! --examples {mixed}", "'X!' is no name"),
    ("pack add {guard} --name x --examples {mixed}", "give harmless prompts like them"),
    ("pack add {guard} --name x --examples {mixed} --harmless {few}", "59 harmless prompts"),
    ("pack remove {guard} other", "has no pack 'other'"),
    ("calibrate {guard} --harmless {tmp}/seen.jsonl --max-fpr 0.05", "the guard was fitted on"),
    ("drift {guard} {tmp}/torn.jsonl", "line 2: not JSON"),
]


@pytest.mark.parametrize(("command", "reason"), BAD_FOR_A_CALIBRATED_GUARD)
def test_what_a_calibrated_guard_cannot_do_is_said_before_the_model_loads(
    fails, places, calibrated, no_model, command, reason
):
    written(places["tmp"] / "seen.jsonl", rows(20, "kind") + rows(45, "kind", start=500))
    before = record(calibrated)
    assert reason in fails(*command.format(**places).split())
    assert record(calibrated) == before


LOCKED = [
    ("fit --out {tmp}/r --harmful {mixed} --harmless {harmless}", "{tmp}/r/.lock"),
    ("score {guard} {asked} --out {tmp}/v.jsonl", "{tmp}/v.jsonl.lock"),
    ("calibrate {guard} --harmless {plain} --max-fpr 0.05", "{guard}/.lock"),
    ("pack add {guard} --name x --examples {mixed}", "{guard}/.lock"),
    ("pack remove {guard} x", "{guard}/.lock"),
    ("label {asked} --out {tmp}/l.jsonl", "{tmp}/l.jsonl.lock"),
    ("study default --out {tmp}/r", "{tmp}/r/.lock"),
    ("stress {guard} --out {tmp}/r", "{tmp}/r/.lock"),
    ("demo --out {tmp}/d --guard {tmp}/r", "{tmp}/r/.lock"),
]


@pytest.mark.parametrize(("command", "lock"), LOCKED)
def test_two_runs_on_one_output_meet_a_lock(fails, places, no_model, command, lock):
    (places["tmp"] / "r").mkdir()
    with exclusive_lock(lock.format(**places), output="the same"):
        error = fails(*command.format(**places).split())
    assert "Another run (process " in error
    assert "is writing" in error


INTERRUPTED = [
    (
        "fit --out {tmp}/r --harmful {mixed} --harmless {harmless}",
        "Run the same command again to go on",
    ),
    ("score {guard} {asked}", "With --out FILE a run goes on where it stopped"),
    ("score {guard} {asked} --out {tmp}/v.jsonl", "No prompt was scored yet"),
    ("calibrate {guard} --harmless {plain} --max-fpr 0.05", "guard is as it was"),
    ("pack add {guard} --name x --examples {mixed} --harmless {tmp}/own.jsonl", "is as it was"),
    ("drift {guard} {plain}", "Nothing is kept"),
    ("label {asked} --out {tmp}/l.jsonl", "l.jsonl.replies. Run the same command again to go on"),
    ("study default --out {tmp}/r", "store.sqlite. Run the same command again to go on"),
    ("stress {guard} --out {tmp}/r", "Run the same command again to go on"),
    ("demo --out {tmp}/d --guard {tmp}/r", "Run the same command again to go on"),
]


@pytest.mark.parametrize(("command", "kept"), INTERRUPTED)
def test_control_c_says_what_is_kept(lg, places, calibrated, monkeypatch, command, kept):
    def load(source, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatModel, "load", load)
    before = record(calibrated)
    code, _, err = lg(*command.format(**places).split())
    assert code == 130
    last = err.splitlines()[-1]
    assert last.startswith("Interrupted. ")
    assert kept in last
    assert "Traceback" not in err
    assert record(calibrated) == before
    assert not list(places["tmp"].rglob("*.lock"))


def test_control_c_counts_the_verdicts_that_are_kept(lg, guard, files, tmp_path, monkeypatch):
    monkeypatch.setattr("latentguard.models.chat_model.PROMPTS_PER_STATES", 5)
    measure, calls = LatentGuard.measure, []

    def interrupted(self, states):
        calls.append(states)
        if len(calls) > 5:  # canaries take two
            raise KeyboardInterrupt
        return measure(self, states)

    monkeypatch.setattr(LatentGuard, "measure", interrupted)
    code, _, err = lg("score", guard, files["asked"], "--out", tmp_path / "v.jsonl")
    assert code == 130
    assert f"15 verdicts are kept in {tmp_path}/v.jsonl.partial. Run the same command" in err


class TestNothingIsOverwrittenSilently:
    def test_a_guard_is_replaced_only_if_asked(self, lg, fails, calibrated, model, files):
        before = record(calibrated)
        words = ["fit", "--model", model, "--out", calibrated, "--probe", "centroid"]
        words += ["--harmful", files["mixed"], "--harmless", files["harmless"]]
        assert "name another folder, or add --overwrite" in fails(*words)
        assert record(calibrated) == before
        assert lg(*words, "--overwrite")[0] == 0
        assert record(calibrated)["fitted"]["harmful"] == 15
        assert LatentGuard.load(calibrated).bound is None

    def test_a_readme_that_is_no_guards_stays(self, fails, no_model, tmp_path, files):
        (tmp_path / "README.md").write_text("my project")
        words = ["--harmful", files["mixed"], "--harmless", files["harmless"]]
        assert "README.md exists, which would be" in fails("fit", "--out", tmp_path, *words)
        assert (tmp_path / "README.md").read_text() == "my project"

    def test_calibrate_says_which_promise_it_replaces(self, lg, calibrated, files):
        words = ["calibrate", calibrated, "--harmless", files["plain"], "--max-fpr", "0.2"]
        _, out, err = lg(*words)
        assert "Replaced: threshold" in err
        assert "at most 5.00%" in err
        assert "at most 20.00%" in out

    def test_score_says_that_a_file_will_be_replaced(self, lg, guard, files, tmp_path):
        out = tmp_path / "v.jsonl"
        out.write_text("of yesterday\n")
        code, _, err = lg("score", guard, files["asked"], "--out", out)
        assert code == 0
        assert f"{out} is there, and will be replaced" in err
        assert len(out.read_text().splitlines()) == 18

    @pytest.mark.parametrize("command", ["study default --out {}", "stress {guard} --out {}"])
    def test_a_report_that_will_be_replaced_is_said(
        self, lg, guard, tmp_path, monkeypatch, command
    ):
        def load(source, **_):
            raise latentguard.LatentGuardError("reached")

        monkeypatch.setattr(ChatModel, "load", load)
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "report.json").write_text("{}")
        _, _, err = lg(*command.format(tmp_path / "r", guard=guard).split())
        assert f"The report in {tmp_path / 'r'} is there, and will be replaced" in err


class TestWhatIsSaidPlainly:
    def test_an_uncalibrated_guard(self, lg, guard, files):
        code, out, err = lg("score", guard, files["asked"])
        assert (code, len(out.splitlines())) == (0, 18)
        warning = next(line for line in err.splitlines() if line.startswith("Warning: "))
        assert "guard is not calibrated" in warning
        assert f"latentguard calibrate {guard} --harmless FILE" in warning

    def test_a_calibrated_guard_is_not_warned_of(self, lg, calibrated, files):
        assert "not calibrated" not in lg("score", calibrated, files["asked"])[2]

    def test_rows_of_the_other_side_are_counted(self, lg, calibrated, files, tmp_path):
        mixed = written(
            tmp_path / "m.jsonl",
            rows(60, "kind", "harmless", start=500) + rows(2, "sly", "harmful"),
        )
        _, _, err = lg("calibrate", calibrated, "--harmless", mixed, "--max-fpr", "0.05")
        assert f"{mixed}: 2 of 62 rows are labelled harmful: left out." in err

    @pytest.mark.parametrize("name", ["asked", "few"])
    def test_score_shows_the_real_total_of_a_file(self, lg, guard, files, monkeypatch, name):
        totals, shown = [], score_verb.progress
        monkeypatch.setattr(
            score_verb, "progress", lambda what, total: totals.append(total) or shown(what, total)
        )
        out = lg("score", guard, files[name])[1]
        assert totals == [len(out.splitlines())]


@pytest.mark.parametrize(
    "command",
    [
        "fit --out {tmp}/g --model no/such --harmful {mixed} --harmless {harmless}",
        "label {asked} --out {tmp}/l.jsonl --model no/such",
        "study no/such --out {tmp}/r",
        "demo --out {tmp}/r --guard {tmp}/g --model no/such",
    ],
)
def test_an_unknown_model_is_said_before_torch_is_loaded(places, command):
    """In a process of its own, without the Hub: importing torch takes longer than the answer."""
    script = (
        "import sys; from latentguard.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(latentguard.__file__).parents[1])}
    words = [sys.executable, "-c", script, *command.format(**places).split()]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "1 False\n"
    assert "'no/such' could not be loaded as a chat model" in done.stderr
    assert not (places["tmp"] / "g").exists()


def test_a_model_is_loaded_once_the_input_is_sound(lg, places, monkeypatch):
    """The guard of the tests above: the stand-in for the model is reached where nothing is bad."""

    def load(source, **_):
        raise latentguard.LatentGuardError("reached")

    monkeypatch.setattr(ChatModel, "load", load)
    for command, _ in LOCKED[:3]:
        assert "Error: reached" in lg(*command.format(**places).split())[2]
