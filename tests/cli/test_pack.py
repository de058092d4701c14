"""The verbs ``pack add``, ``list`` and ``remove``, on a tiny random model."""

import json

from cli.tiny_files import record, rows, written
from models.architectures import chat_model


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
        assert (code, record(guard)["categories"]["packs"]) == (0, {})
        assert "No packs" in lg("pack", "list", guard)[2]

    def test_before_and_after_are_measured_on_labelled_prompts(
        self, lg, fails, guard, files, tmp_path
    ):
        self.calibrated(lg, guard, files)
        calm = ["--harmless", written(tmp_path / "calm.jsonl", rows(140, "kind", start=600))]
        code, out, _ = lg(*self.add(guard, files, *calm, "--evaluate", files["mixed"]))
        assert code == 0
        caught = next(line for line in out.splitlines() if line.startswith("| all | caught |"))
        assert caught.endswith("| 15 |")
        words = ["pack", "remove", guard, "novel", *calm, "--evaluate", files["plain"]]
        assert "has no label" in fails(*words)

    def test_built_in_prompts_serve_where_none_are_given(self, lg, guard, files, tmp_path):
        self.calibrated(lg, guard, files)
        calm = ["--harmless", written(tmp_path / "calm.jsonl", rows(140, "kind", start=600))]
        out = lg(*self.add(guard, files, *calm))[1]
        assert "On built-in prompts of other categories" in out

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
        assert "Calibrate it first: latentguard calibrate" in fails(*self.add(guard, files))
        before = record(self.calibrated(lg, guard, files))
        assert "give harmless prompts like them" in fails(*self.add(guard, files))
        few = ["--harmless", files["few"]]
        assert "needs 59 harmless prompts" in fails(*self.add(guard, files, *few))
        words = ["pack", "add", guard, "--name", "novel", "--examples", files["harmless"], *few]
        assert "holds none" in fails(*words)
        assert "has no pack 'other'" in fails("pack", "remove", guard, "other")
        assert record(guard) == before
