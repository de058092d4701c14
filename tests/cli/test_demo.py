"""The verb ``demo``, on a tiny random model."""

import json
from dataclasses import replace

import pytest
from threadpoolctl import threadpool_limits

from latentguard.guard.latent_guard import LatentGuard
from models.architectures import chat_model


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
