"""The verb ``audit``."""

from cli.tiny_files import written


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
        monkeypatch.setattr("latentguard.data.surface_audit.held_out_ngram_scores", nothing)
        code, out, err = lg("audit", "contrast")
        assert (code, err) == (0, "")
        assert "660 harmful, 960 harmless" in " ".join(out.split())
