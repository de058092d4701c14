"""What ``calibrate`` promises, on a tiny random model."""

import pytest

from cli.tiny_files import record
from latentguard.data.builtin import load_guard_prompts


class TestPromise:
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
        harmless = [p for p in load_guard_prompts("validation") if not p.harmful]
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
