"""The verb ``evaluate``, on a tiny random model."""

import json

from cli.tiny_files import rows, written
from latentguard.guard.latent_guard import LatentGuard


class TestEvaluate:
    def test_it_prints_shares_at_the_threshold(self, lg, guard, files):
        code, out, err = lg("evaluate", guard, files["mixed"])
        assert code == 0, err
        assert out.startswith(f"Threshold {LatentGuard.load(guard).threshold:.6g}: not calibrated")
        assert "| all | 15 |" in out
        assert "is not calibrated" in err

    def test_json_equals_the_verdicts(self, lg, guard, files):
        found = json.loads(lg("evaluate", guard, files["mixed"], "--json")[1])
        lines = [json.loads(line) for line in lg("score", guard, files["mixed"])[1].splitlines()]
        flagged = sum(line["flagged"] for line in lines if line["id"].startswith("sly"))
        assert found["total"]["caught"]["n"] == [flagged, 15 - flagged]

    def test_segments_are_those_of_the_column(self, lg, guard, tmp_path):
        made = [row | dict(team="ab"[n % 2]) for n, row in enumerate(rows(8, "sly", "harmful"))]
        file = written(tmp_path / "rows.jsonl", made)
        out = lg("evaluate", guard, file, "--segment-column", "team")[1]
        assert "**By segment.**" in out
        assert "| b | 4 |" in out

    def test_training_prompts_are_counted(self, lg, guard, tmp_path):
        made = [
            dict(text=f"Tell me the sly thing number {n}.", label="harmful") for n in (0, 4, 99)
        ]
        err = lg("evaluate", guard, written(tmp_path / "seen.jsonl", made))[2]
        assert "fitted on 2 of these 3 prompts" in err

    def test_unlabelled_prompts_are_refused_before_the_model_loads(self, fails, guard, files):
        assert "has no label" in fails("evaluate", guard, files["plain"])
