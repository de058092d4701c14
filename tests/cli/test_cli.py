"""The command line, verb by verb, on a tiny random model: output, exit codes, one-line errors."""

import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from threadpoolctl import threadpool_limits

import latentguard
from latentguard.cli import app, main
from latentguard.data.builtin import load_traffic
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Prompt
from models.architectures import WIDE, chat_model

VERBS = {
    "demo": ("--out", "--guard", "--model"),
    "fit": ("--harmful", "--contrast", "--reading", "--dtype", "--quantize", "--device-map"),
    "calibrate": ("--harmless", "--max-fpr", "--confidence", "--device-map"),
    "score": ("--out", "--text-column", "--engine", "--actors", "--block-rows"),
    "audit": ("--label", "--text-column"),
    "show": (),
    "drift": ("--json", "--text-column"),
    "stress": ("--only", "--budget"),
    "serve": ("--host", "--port", "--upstream"),
    "parity": ("--backends",),
    "study": ("--only", "--budget", "--data-dir"),
    "label": ("--out", "--model"),
    "pack add": ("--name", "--examples"),
    "pack list": (),
    "pack remove": ("--harmless",),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama = chat_model("llama", tokenizer).model
    llama.config.max_position_embeddings = 2048  # this tokenizer makes the built-in prompts long
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def lg(monkeypatch, capsys):
    """Run a command in this process; returns exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["latentguard", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def fails(lg):
    """Run a command that should fail in one sentence; returns the sentence."""

    def run(*words):
        code, out, err = lg(*words)
        lines = [line for line in err.splitlines() if not line.startswith(("Loading", "Warning:"))]
        said = [line for line in lines if line.startswith("Error: ")]
        assert (code, len(said)) == (1, 1), err
        assert lines[-1] == said[0]
        assert "Traceback" not in err + out
        return said[0]

    return run


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count, word, label=None, start=0):
    """Rows of one kind; their endings take turns."""
    found = []
    for n in range(start, start + count):
        row = dict(id=f"{word}-{n}", text=f"Tell me the {word} thing number {n}{'.?! '[n % 4]}")
        found.append(row | ({"label": label} if label else {}))
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Labelled and unlabelled files of prompts."""
    folder = tmp_path_factory.mktemp("files")
    mixed = rows(15, "sly", "harmful") + rows(6, "kind", "harmless", start=100)
    return {
        "mixed": written(folder / "mixed.jsonl", mixed),
        "harmless": written(folder / "harmless.jsonl", rows(14, "kind", "harmless")),
        "plain": written(folder / "plain.jsonl", rows(60, "kind", start=500)),
        "few": written(folder / "few.jsonl", rows(20, "kind", start=500)),
        "asked": written(folder / "asked.jsonl", rows(9, "sly", start=50) + rows(9, "kind")),
    }


@pytest.fixture(scope="module")
def fitted(model, files, tmp_path_factory):
    """A guard folder; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("guards") / "g"
    prompts = [
        Prompt(r["text"], harmful=word == "sly") for word in ("sly", "kind") for r in rows(20, word)
    ]
    backend = latentguard.ChatModel.load(model)
    LatentGuard.fit(backend, prompts, reading="t_inst", probe="centroid").save(folder)
    return folder


@pytest.fixture
def guard(fitted, tmp_path):
    copy = tmp_path / "guard"
    copy.mkdir()
    for file in fitted.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def record(folder):
    return json.loads((folder / "guard.json").read_text())


class TestUsage:
    @pytest.mark.parametrize(("verb", "options"), VERBS.items())
    def test_help(self, lg, verb, options):
        code, out, err = lg(*verb.split(), "--help")
        assert (code, err) == (0, "")
        assert f"latentguard {verb}" in out
        assert all(option in out for option in options)

    def test_help_of_all(self, lg):
        code, out, _ = lg("--help")
        assert code == 0
        assert all(verb.split()[0] in out for verb in VERBS)
        assert "latentguard demo" in out

    def test_help_groups_the_verbs_in_panels(self, lg):
        _, out, _ = lg("--help")
        panels = [line.split()[1] for line in out.splitlines() if line.startswith("╭─ ")]
        assert panels == ["Options", "Guard", "Serve", "Research"]

    @pytest.mark.parametrize("verb", VERBS)
    def test_the_example_of_a_verb_is_valid_usage(self, lg, verb):
        """Parsed as a shell would split it, without being run."""
        _, out, _ = lg(*verb.split(), "--help")
        (example,) = re.findall(r"Example: latentguard (.*)", out)
        words = shlex.split(example)
        assert words[: len(verb.split())] == verb.split()
        command = typer.main.get_command(app)
        for name in verb.split():
            command = command.commands[name] if hasattr(command, "commands") else command
        with typer.Context(typer.main.get_command(app)) as outer:
            command.make_context(verb, words[len(verb.split()) :], parent=outer)

    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("--readout", "--probe", ["fit", "--out", "g", "{}", "centroid"]),
            ("--slice-column", "--segment-column", ["calibrate", "none", "{}", "language"]),
            ("--slice-header", "--segment-header", ["serve", "none", "{}", "X-Client"]),
        ],
    )
    def test_an_old_option_name_works_and_is_not_shown(self, lg, old, new, words):
        said = [lg(*[word.format(name) for word in words], "--no-such") for name in (old, new)]
        assert all("No such option: --no-such" in err for _, _, err in said)
        assert old not in lg(words[0], "--help")[1]

    @pytest.mark.parametrize(
        "words",
        [
            ["no-such-verb"],
            ["fit"],
            ["fit", "--out", "g", "--no-such-option"],
            ["calibrate"],
            ["calibrate", "g", "--max-fpr", "low"],
            ["score", "g"],
            ["audit"],
            ["audit", "f.jsonl", "--label", "harmfull"],
            ["fit", "--out", "g", "--probe", "tree"],
        ],
        ids=" ".join,
    )
    def test_wrong_usage_is_2(self, lg, words):
        code, out, err = lg(*words)
        assert (code, out) == (2, "")
        assert "Usage: " in err
        assert "Traceback" not in err


class TestFit:
    def test_files_that_carry_labels(self, lg, model, files, tmp_path):
        out = tmp_path / "new" / "g"
        both = ["--harmful", files["mixed"], "--harmless", files["mixed"]]
        code, stdout, err = lg(
            "fit", "--model", model, "--out", out, *both, "--harmless", files["harmless"]
        )
        assert (code, stdout) == (0, "")
        made = record(out)
        assert (made["fitted"]["harmful"], made["fitted"]["harmless"]) == (15, 6 + 14)
        assert made["fingerprint"]["model"] == str(model)
        assert made["probe"]["kind"] == "linear"
        assert made["reading"]["name"] == "pooled"
        assert f"latentguard calibrate {out}" in err
        assert "Warning" not in err.replace("Warning: The length", "")

    def test_the_papers_guard_on_the_built_in_set(self, lg, model, tmp_path, monkeypatch):
        """On a part of it, which is read in a tenth of the time."""
        some = load_traffic("train")[:1000]
        monkeypatch.setattr("latentguard.cli.fit.load_traffic", {"train": some}.__getitem__)
        rule = ["--reading", "t_inst", "--probe", "centroid"]
        code, _, err = lg("fit", "--model", model, "--out", tmp_path / "g", "--contrast", *rule)
        made = record(tmp_path / "g")
        assert code == 0
        sides = [bool(p.harmful) for p in some]
        assert made["fitted"]["harmful"] == sum(sides)
        assert made["fitted"]["harmless"] == len(sides) - sum(sides)
        assert made["fitted"]["sources"] == ["traffic"]
        assert (made["reading"]["name"], made["probe"]["kind"]) == ("t_inst", "centroid")
        assert made["probe"]["layers"] == [1, 2, 3, 4]
        assert "Warning" not in err

    def test_quantised_weights_and_where_they_lie(self, lg, tokenizer, files, tmp_path):
        """What the guard says of its model is how ``score`` loads it."""
        pytest.importorskip("bitsandbytes")
        model, out = tmp_path / "wide", tmp_path / "g"
        chat_model("llama", tokenizer, **WIDE).model.save_pretrained(model)
        tokenizer.save_pretrained(model)
        train = ("--harmful", files["mixed"], "--harmless", files["harmless"])
        code, _, err = lg("fit", "--model", model, "--out", out, *train, "--quantize", "nf4")
        assert code == 0, err
        assert record(out)["fingerprint"]["dtype"] == "float32/nf4"
        code, verdicts, err = lg("score", out, files["few"], "--device-map", "auto")
        assert code == 0, err
        assert len(verdicts.splitlines()) == 20

    def test_it_warns_of_form(self, lg, model, tmp_path):
        sides = []
        for side, ending in (("harmful", "."), ("harmless", "?")):
            asked = [dict(text=f"item {n}{ending}") for n in range(12)]
            sides += [f"--{side}", written(tmp_path / f"{side}.jsonl", asked)]
        code, _, err = lg("fit", "--model", model, "--out", tmp_path / "g", *sides)
        assert code == 0
        assert "Warning: The ending of a prompt alone tells the label apart (1.00" in err

    def test_another_column(self, lg, fails, model, tmp_path):
        sides = []
        for word in ("sly", "kind"):
            asked = [dict(goal=row["text"]) for row in rows(12, word)]
            side = "harmful" if word == "sly" else "harmless"
            sides += [f"--{side}", written(tmp_path / f"{word}.jsonl", asked)]
        words = ["fit", "--model", model, "--out", tmp_path / "g", *sides]
        assert "line 1: no column 'text'; columns found: goal" in fails(*words)
        assert lg(*words, "--text-column", "goal")[0] == 0

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--harmful", "nothing.jsonl"], "nothing.jsonl cannot be read: No such file"),
            (["--harmful", "{harmless}"], "was given for harmful prompts and holds none"),
            (["--harmful", "{mixed}"], "0 harmless"),
            (["--harmful", "{mixed}", "--harmless", "{mixed}"], "at least 10 prompts of each"),
            (["--contrast", "--reading", "t_last"], "no reading 't_last'"),
            (["--contrast", "--dtype", "float99"], "float99"),
        ],
    )
    def test_errors(self, fails, model, files, tmp_path, words, reason):
        words = [word.format(**files) for word in words]
        assert reason in fails("fit", "--model", model, "--out", tmp_path / "g", *words)
        assert not (tmp_path / "g").exists()

    def test_no_such_model(self, fails, tmp_path):
        words = ["fit", "--contrast", "--model", tmp_path / "none", "--out", tmp_path / "g"]
        assert "could not be loaded as a chat model" in fails(*words)

    def test_a_place_that_cannot_be_written(self, fails, model, files, tmp_path):
        (tmp_path / "file").write_text("mine")
        words = ["--harmful", files["mixed"], "--harmless", files["harmless"], "--model", model]
        assert "file" in fails("fit", *words, "--out", tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"


class TestCalibrate:
    def test_it_says_what_it_promises(self, lg, guard, files):
        before = record(guard)
        code, out, _ = lg("calibrate", guard, "--harmless", files["plain"], "--max-fpr", "0.05")
        assert code == 0
        assert out.startswith("Threshold ")
        assert "at most 5.00% of harmless prompts" in out
        assert "0 of n = 60" in out
        after = record(guard)
        assert after["threshold"] != before["threshold"] == 0.0
        assert after["bound"]["max_fpr"] == 0.05
        assert after["probe"] == before["probe"]

    def test_on_the_built_in_prompts(self, lg, guard):
        code, out, _ = lg("calibrate", guard, "--max-fpr", "0.05")
        assert code == 0
        harmless = [p for p in load_traffic("validation") if not p.harmful]
        assert f"n = {len(harmless)}" in out

    def test_too_few(self, fails, guard, files):
        before = record(guard)
        said = fails("calibrate", guard, "--harmless", files["few"])
        assert "20 harmless prompts are too few" in said
        assert "at least 299" in said
        assert record(guard) == before

    @pytest.mark.parametrize(
        "words", [["--max-fpr", "5"], ["--max-fpr", "0.05", "--confidence", "95"]], ids=" ".join
    )
    def test_percents_instead_of_shares(self, fails, guard, files, words):
        assert "between 0 and 1" in fails("calibrate", guard, "--harmless", files["plain"], *words)


class TestPack:
    def calibrated(self, lg, guard, files):
        assert lg("calibrate", guard, "--harmless", files["plain"], "--max-fpr", "0.05")[0] == 0
        return guard

    def add(self, guard, files, *more):
        return ["pack", "add", guard, "--name", "novel", "--examples", files["mixed"], *more]

    def test_add_list_score_remove(self, lg, guard, files, tmp_path):
        calm = ["--harmless", written(tmp_path / "calm.jsonl", rows(140, "kind", start=600))]
        self.calibrated(lg, guard, files)
        code, out, err = lg(*self.add(guard, files, *calm))
        assert code == 0, err
        assert "of n = 70 were" in out
        assert "at most 5.00% of harmless prompts" in out
        code, out, _ = lg("pack", "list", guard)
        assert (code, out.split("\t")[:2]) == (0, ["novel", "15 harmful, 270 harmless examples"])
        line = json.loads(lg("score", guard, files["asked"])[1].splitlines()[0])
        assert line["category"] == "novel"
        assert 0 <= line["category_scores"]["novel"] <= 1
        assert "Category pack `novel`" in lg("show", guard)[1]
        code, out, _ = lg("pack", "remove", guard, "novel", *calm)
        assert (code, record(guard)["parts"]["categories"]["packs"]) == (0, {})
        assert "No packs" in lg("pack", "list", guard)[2]

    def test_on_another_model(self, fails, lg, guard, files, tmp_path, tokenizer):
        """The shift is told, and what is promised then was measured there."""
        other = tmp_path / "other"
        llama = chat_model("llama", tokenizer, seed=3).model
        llama.config.max_position_embeddings = 2048
        llama.save_pretrained(other)
        tokenizer.save_pretrained(other)
        calm = ["--harmless", written(tmp_path / "calm.jsonl", rows(140, "kind", start=600))]
        before = record(self.calibrated(lg, guard, files))
        words = self.add(guard, files, *calm, "--model", other)
        assert "weights" in fails(*words)
        assert record(guard) == before
        code, out, err = lg(*words, "--allow-mismatch")
        assert code == 0, err
        assert "standard deviations in the mean" in err
        assert "Nothing is promised of it here" in err
        assert "at most 5.00% of harmless prompts" in out
        assert record(guard)["fingerprint"]["model"] == str(other)
        code, _, err = lg("score", guard, files["asked"])
        assert (code, "Warning" in err) == (0, False), err
        code, out, err = lg("pack", "remove", guard, "novel", *calm, "--allow-mismatch")
        assert (code, "Warning" in err) == (0, False), err

    def test_errors_change_nothing(self, fails, lg, guard, files):
        assert "calibrate' first" in fails(*self.add(guard, files))
        before = record(self.calibrated(lg, guard, files))
        assert "give harmless prompts like them" in fails(*self.add(guard, files))
        few = ["--harmless", files["few"]]
        assert "needs 59 harmless prompts" in fails(*self.add(guard, files, *few))
        words = ["pack", "add", guard, "--name", "novel", "--examples", files["harmless"], *few]
        assert "holds none" in fails(*words)
        assert "has no pack 'other'" in fails("pack", "remove", guard, "other")
        assert record(guard) == before


class TestScore:
    def verdicts(self, text):
        return [json.loads(line) for line in text.splitlines()]

    @pytest.fixture
    def wanted(self, guard, model, files):
        backend = latentguard.ChatModel.load(model)
        prompts = latentguard.read_prompts(files["asked"])
        return list(LatentGuard.load(guard).scan(backend, prompts))

    def test_to_standard_output(self, lg, guard, files, wanted):
        code, out, _ = lg("score", guard, files["asked"])
        assert code == 0
        found = self.verdicts(out)
        assert [row["id"] for row in found] == [f"sly-{n}" for n in range(50, 59)] + [
            f"kind-{n}" for n in range(9)
        ]
        for row, verdict in zip(found, wanted, strict=True):
            assert list(row)[:4] == ["id", "score", "probability", "flagged"]
            assert row["score"] == pytest.approx(verdict.score, abs=1e-6)
            assert row["probability"] == pytest.approx(verdict.probability, abs=1e-4)
            assert row["flagged"] is (row["score"] > 0)
            assert 0 < row["probability"] < 1

    def test_to_a_file(self, lg, guard, files, tmp_path):
        out = tmp_path / "new" / "v.jsonl"
        code, stdout, err = lg("score", guard, files["asked"], "--out", out)
        assert (code, stdout) == (0, "")
        assert f"Verdicts in {out}." in err
        assert out.read_text() == lg("score", guard, files["asked"])[1]
        assert [file.name for file in out.parent.iterdir()] == ["v.jsonl"]

    def test_from_standard_input(self, lg, guard, files, monkeypatch):
        content = files["asked"].read_bytes()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        piped = lg("score", guard, "-")[1]
        assert piped == lg("score", guard, files["asked"])[1]
        plain = b"Tell me the sly thing\n\nAnd the kind thing\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(plain)))
        found = self.verdicts(lg("score", guard, "-")[1])
        assert [row["id"] for row in found] == ["stdin-1", "stdin-3"]

    def test_plain_text_and_csv(self, lg, guard, tmp_path):
        (tmp_path / "p.txt").write_text("One thing\nAnother thing\n")
        (tmp_path / "p.csv").write_text('id,goal\n7,"One thing"\n8,"Another, thing"\n')
        lines = self.verdicts(lg("score", guard, tmp_path / "p.txt")[1])
        table = self.verdicts(lg("score", guard, tmp_path / "p.csv", "--text-column", "goal")[1])
        assert [row["id"] for row in lines + table] == ["p-1", "p-2", "7", "8"]
        assert lines[0]["score"] == pytest.approx(table[0]["score"], abs=1e-6)

    def test_labels_are_not_read(self, lg, guard, tmp_path):
        path = written(tmp_path / "p.jsonl", [dict(text="One thing", label="some other scheme")])
        assert lg("score", guard, path)[0] == 0

    def test_a_killed_run_goes_on(self, lg, guard, files, tmp_path, monkeypatch):
        out = tmp_path / "v.jsonl"
        monkeypatch.setattr("latentguard.models.chat_model.PROMPTS_PER_STATES", 5)

        def killed(self, states, count=[]):  # noqa: B006 (counts the calls)
            count.append(1)
            if len(count) > 5:  # canaries take two
                raise KeyboardInterrupt
            return judge(self, states)

        judge = LatentGuard.judge
        monkeypatch.setattr(LatentGuard, "judge", killed)
        code, _, err = lg("score", guard, files["asked"], "--out", out)
        assert code == 130
        assert "Traceback" not in err
        monkeypatch.setattr(LatentGuard, "judge", judge)
        left = Path(f"{out}.partial").read_text().splitlines()
        assert len(left) == 15
        code, _, err = lg("score", guard, files["asked"], "--out", out)
        assert code == 0
        assert "(15 were there from an earlier run)" in err
        assert out.read_text() == lg("score", guard, files["asked"])[1]

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("none.jsonl", None, "none.jsonl cannot be read: No such file"),
            ("bad.jsonl", '{"text": "a"}\n{"text"\n', "bad.jsonl, line 2: not JSON"),
            ("bad.jsonl", '{"text": ""}\n', "bad.jsonl, line 1: 'text' is empty"),
            ("bad.csv", "goal\nx\n", "bad.csv, line 2: no column 'text'; columns found: goal"),
        ],
    )
    def test_prompts_that_cannot_be_read(self, fails, guard, tmp_path, name, content, reason):
        if content is not None:
            (tmp_path / name).write_text(content)
        assert reason in fails("score", guard, tmp_path / name)

    def test_another_model(self, fails, guard, files, tokenizer, tmp_path):
        chat_model("llama", tokenizer, seed=1).model.save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        said = fails("score", guard, files["asked"], "--model", tmp_path / "other")
        assert "weights" in said
        assert all(word not in said for word in ("tokenizer", "template", "dtype"))

    def test_a_model_that_has_moved(self, lg, fails, guard, model, files, tmp_path):
        moved = tmp_path / "moved"
        moved.symlink_to(model)
        changed = record(guard)
        changed["fingerprint"]["model"] = str(tmp_path / "gone")
        (guard / "guard.json").write_text(json.dumps(changed))
        assert "gone' could not be loaded" in fails("score", guard, files["asked"])
        assert lg("score", guard, files["asked"], "--model", moved)[0] == 0

    def test_a_damaged_guard(self, fails, guard, files):
        (guard / "guard.safetensors").write_bytes(b"rubbish")
        assert "damaged or belongs to another guard" in fails("score", guard, files["asked"])

    def test_no_guard(self, fails, files, tmp_path):
        assert "Expected a guard folder" in fails("score", tmp_path / "none", files["asked"])


class TestEngineRay:
    """What is said before Ray is started; tests/integrations has the rest."""

    @pytest.mark.parametrize(
        ("words", "reason"),
        [((), "writes a folder"), (("--device-map", "auto"), "each actor has one device")],
    )
    def test_wrong_usage(self, lg, guard, files, words, reason):
        code, _, err = lg("score", guard, files["plain"], "--engine", "ray", *words)
        assert code == 2
        assert reason in err

    def test_without_ray(self, fails, guard, files, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        for name in [n for n in sys.modules if n.startswith("latentguard.integrations.ray")]:
            monkeypatch.delitem(sys.modules, name)
        said = fails("score", guard, files["plain"], "--engine", "ray", "--out", tmp_path / "out")
        assert "pip install 'latentguard[ray]'" in said


class TestAudit:
    def test_figures(self, lg, files):
        code, out, err = lg("audit", files["mixed"])
        assert code == 0
        assert "15 harmful, 6 harmless" in out
        for feature in ("ending", "form", "length", "ngrams"):
            assert feature in out
        assert "harmful / harmless: " in out
        assert "Traceback" not in err

    def test_warnings(self, lg, tmp_path):
        sides = (("harmful", "."), ("harmless", "?"))
        asked = [dict(text=f"item {n}{e}", label=side) for side, e in sides for n in range(9)]
        code, out, err = lg("audit", written(tmp_path / "p.jsonl", asked))
        assert code == 0
        assert "1.000" in out
        assert "Warning: The ending of a prompt alone" in err

    def test_a_label_for_rows_without(self, lg, files):
        code, out, _ = lg("audit", files["mixed"], files["plain"], "--label", "harmless")
        assert code == 0
        assert "15 harmful, 66 harmless" in out

    def test_without_labels(self, fails, files):
        assert "found 0 and 0" in fails("audit", files["plain"])

    def test_the_built_in_set_has_a_name(self, lg, monkeypatch):
        import numpy as np

        nothing = lambda prompts, folds: np.zeros(len(prompts))  # noqa: E731 (it is slow)
        monkeypatch.setattr("latentguard.data.surface_audit.ngram_held_out", nothing)
        code, out, err = lg("audit", "contrast")
        assert (code, err) == (0, "")
        assert "660 harmful, 960 harmless" in " ".join(out.split())


class TestShow:
    def test_it(self, lg, guard, files):
        code, out, err = lg("show", guard)
        assert (code, err) == (0, "")
        assert out.startswith("# Latent guard for ")
        assert "nothing is promised" in out
        assert "data_sha256: " in out
        lg("calibrate", guard, "--harmless", files["plain"], "--max-fpr", "0.05")
        assert "at most 5.00%" in lg("show", guard)[1]

    def test_a_guard_of_unknown_making(self, lg, guard):
        changed = record(guard)
        changed["fitted"] = None
        (guard / "guard.json").write_text(json.dumps(changed))
        assert lg("show", guard)[0] == 0

    def test_no_guard(self, fails, tmp_path):
        assert "Expected a guard folder" in fails("show", tmp_path)


class TestShowWithoutAGuard:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path))
        monkeypatch.setattr("latentguard.models.sources._hub_models", lambda: iter(()))

    def test_it_lists_the_models_on_this_disk(self, lg, model, tmp_path):
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "default").symlink_to(model)
        code, out, _ = lg("show")
        assert code == 0
        name, size, path = out.strip().split("\t")
        assert (name, path) == ("default", str(tmp_path / "models" / "default"))
        assert size.endswith(" MB")

    def test_it_says_how_to_get_one_if_there_are_none(self, lg):
        code, out, _ = lg("show")
        assert code == 0
        assert "'latentguard demo' fetches the default one" in out


class TestDemo:
    @pytest.fixture(autouse=True)
    def one_thread(self):
        """The n-gram baseline is twenty times slower where several fight for a busy processor."""
        with threadpool_limits(1):
            yield

    def test_the_whole_job_and_once_more(self, lg, fails, model, tmp_path, monkeypatch, tokenizer):
        out, guard = tmp_path / "report", tmp_path / "guard"
        words = ["demo", "--model", model, "--out", out, "--guard", guard]
        code, stdout, err = lg(*words)
        assert code == 0, err
        assert stdout.strip().splitlines()[-1] == str(out / "report.html")
        tables = {file.stem for file in (out / "tables").iterdir()}
        assert {"verdicts", "detection-on-the-test-split"} <= tables
        page = (out / "report.html").read_text("utf-8")
        for words_of in ("Sample prompts", "Detection", "Provenance", "How do I kill a Python"):
            assert words_of in page
        report = json.loads((out / "report.json").read_text())
        assert report["meta"]["bound"]["max_fpr"] == 0.05
        assert report["meta"]["fingerprint"]["model"] == str(model)
        verdicts = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert [row["id"] for row in verdicts] == [f"sample-{n:02}" for n in range(1, 21)]
        shown = next(t for t in report["tables"] if t["title"] == "Verdicts")
        for row, verdict in zip(shown["rows"], verdicts, strict=True):
            assert row[2] == pytest.approx(verdict["score"], abs=1e-6)

        self.once_more(lg, words, out, guard, monkeypatch)
        self.another_guard(fails, words, guard)
        self.another_model(fails, tmp_path, out, guard, tokenizer)

    def another_guard(self, fails, words, guard):
        """One that was fitted into its folder since, and is not calibrated."""
        kept = LatentGuard.load(guard)
        replace(kept, bound=None).save(guard)
        assert "a guard that the demo did not make" in fails(*words)
        kept.save(guard)

    def once_more(self, lg, words, out, guard, monkeypatch):
        before = {file: file.read_bytes() for file in guard.rglob("*") if file.is_file()}
        stamps = {file: file.stat().st_mtime_ns for file in before}
        old = json.loads((out / "report.json").read_text())
        (out / "report.html").unlink()

        def refit(*_, **__):
            raise AssertionError("the guard was there already")

        monkeypatch.setattr(LatentGuard, "from_states", refit)
        assert lg(*words)[0] == 0
        assert {file: file.stat().st_mtime_ns for file in before} == stamps
        assert (out / "report.html").exists()
        again = json.loads((out / "report.json").read_text())
        assert again["meta"] == old["meta"]
        assert again["tables"] == old["tables"]

    def another_model(self, fails, tmp_path, out, guard, tokenizer):
        chat_model("llama", tokenizer, seed=1).model.save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        words = ["demo", "--model", tmp_path / "other", "--out", out, "--guard", guard]
        assert "weights" in fails(*words)


class TestProcess:
    """What only a process of its own can show."""

    RUN = (sys.executable, "-c", "from latentguard.cli import main; main()")
    ENV = os.environ | {
        "PYTHONPATH": str(Path(latentguard.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
    }

    def test_a_terminal_shows_the_bar_and_the_file_gets_the_verdicts(self, guard, files):
        """``latentguard score G F > verdicts.jsonl``, typed by a person."""
        ours, theirs = pty.openpty()
        words = [*self.RUN, "score", guard, files["asked"]]
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=theirs, env=self.ENV, check=True
        )
        os.close(theirs)
        assert [json.loads(line)["id"] for line in done.stdout.splitlines()][-1] == "kind-8"
        assert len(done.stdout.splitlines()) == 18
        assert b"score" in os.read(ours, 1 << 16)
        os.close(ours)

    def test_an_error(self, tmp_path):
        words = [*self.RUN, "show", tmp_path / "none"]
        done = subprocess.run(words, capture_output=True, text=True, env=self.ENV, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Error: ")
        assert len(done.stderr.splitlines()) == 1

    def test_a_reader_that_leaves(self, guard, files, tmp_path):
        """``latentguard score G F | head -1``."""
        many = written(tmp_path / "many.jsonl", rows(400, "kind"))
        words = [*self.RUN, "score", guard, many]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.ENV
        ) as process:
            process.stdout.readline()
            process.stdout.close()
            err = process.stderr.read()
        assert b"Traceback" not in err
        assert b"Exception ignored" not in err
        assert process.returncode == 1

    def test_a_person_who_interrupts(self, guard, tmp_path):
        """Control-C while standard input is awaited."""
        heeding = ["env", "--default-signal=INT"]  # a job in the background ignores it
        words = [*heeding, *self.RUN, "score", guard, "-", "--out", tmp_path / "v.jsonl"]
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=self.ENV
        ) as process:
            assert process.stderr.readline().startswith(b"Loading")
            while not (tmp_path / "v.jsonl.partial.guard").exists():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            err = process.stderr.read()
        assert b"Traceback" not in err
        assert process.returncode == 130
