"""The verb ``score``, on a tiny random model."""

import io
import json
import sys
from pathlib import Path

import pytest

import latentguard
from cli.tiny_files import rows, written
from guard_files import edit_guard
from latentguard.guard.latent_guard import LatentGuard
from models.architectures import chat_model


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
            return measure(self, states)

        measure = LatentGuard.measure
        monkeypatch.setattr(LatentGuard, "measure", killed)
        code, _, err = lg("score", guard, files["asked"], "--out", out)
        assert code == 130
        assert "Traceback" not in err
        monkeypatch.setattr(LatentGuard, "measure", measure)
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
        gone = str(tmp_path / "gone")
        edit_guard(guard, lambda record: record["fingerprint"].update(model=gone))
        assert "gone' could not be loaded" in fails("score", guard, files["asked"])
        assert lg("score", guard, files["asked"], "--model", moved)[0] == 0

    def test_a_damaged_guard(self, fails, guard, files):
        (guard / "guard.safetensors").write_bytes(b"rubbish")
        assert "damaged or belongs to another guard" in fails("score", guard, files["asked"])

    def test_no_guard(self, fails, files, tmp_path):
        assert "Expected a guard folder" in fails("score", tmp_path / "none", files["asked"])


class TestGuardOfTheHub:
    """By the local stand-in of the Hub."""

    def test_it_scores_and_is_shown_by_its_id(self, lg, pushed, guard, files):
        assert lg("score", pushed, files["asked"])[1] == lg("score", guard, files["asked"])[1]
        assert lg("show", pushed)[1] == lg("show", guard)[1]

    def test_a_changed_one_is_written_to_a_folder(self, lg, fails, pushed, files, tmp_path):
        how = ["--harmless", files["plain"], "--max-fpr", "0.05"]
        assert "is not changed in place: name a folder" in fails("calibrate", pushed, *how)
        code, _, err = lg("calibrate", pushed, *how, "--out", tmp_path / "new")
        assert code == 0, err
        assert "at most 5.00%" in lg("show", tmp_path / "new")[1]
        assert "nothing is promised" in lg("show", pushed)[1]
        again = fails("calibrate", pushed, *how, "--out", tmp_path / "new")
        assert "would be overwritten; name another folder." in again
        words = ["pack", "add", tmp_path / "new", "--name", "novel", "--examples", files["mixed"]]
        calm = ["--harmless", written(tmp_path / "calm.jsonl", rows(140, "kind", start=600))]
        assert lg(*words, *calm, "--out", tmp_path / "packed")[0] == 0
        assert "novel" in lg("pack", "list", tmp_path / "packed")[1]
        assert "No packs" in lg("pack", "list", tmp_path / "new")[2]
        assert "No packs" in lg("pack", "list", pushed)[2]

    def test_it_is_served_by_its_id(self, lg, fails, pushed):
        assert lg("serve", pushed, "--check") == (0, "All is well: the service would start.\n", "")
        code, _, err = lg("serve", "org/other", "--check")
        assert code == 2
        assert "no guard of that name came from" in err

    def test_a_guard_that_is_not_there(self, fails, pushed, files):
        error = fails("score", "org/other", files["asked"])
        assert "There is no folder 'org/other', and no guard of that name came from" in error


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
