"""The benchmark on a tiny random model: figures, reports, resuming, missing sets."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from benchmark.test_suite import AS_PUBLISHED, SETS, lines
from cli.tiny_files import rows
from latentguard.benchmark import run
from latentguard.benchmark.figures import Readings, SetFigures, f1_of, measure
from latentguard.benchmark.report import benchmark_report, markdown, save_benchmark
from latentguard.benchmark.run import GUARD, NGRAMS, PAPER, load_suite, run_benchmark
from latentguard.errors import PromptError
from latentguard.guard.cascade import Cascade
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Prompt


@pytest.fixture(scope="module")
def guard(model):
    prompts = [
        Prompt(row["text"], harmful=word == "sly")
        for word in ("sly", "kind")
        for row in rows(20, word)
    ]
    return LatentGuard.fit(model, prompts, reading="t_inst", probe="centroid")


@pytest.fixture(autouse=True)
def few_training_rows(monkeypatch):
    """N-grams are fitted on a few rows."""
    few = [Prompt(f"{word} {n}", harmful=word == "sly") for n in range(9) for word in ("sly", "ok")]
    monkeypatch.setattr(run, "load_training_rows", lambda: few)


@pytest.fixture
def folder(tmp_path):
    """A folder with two sets, one as fetched and one as published, and one that is broken."""
    data = tmp_path / "data"
    data.mkdir()
    both = rows(30, "sly", "harmful", start=100) + rows(40, "kind", "harmless", start=100)
    lines(data / "toxicchat.jsonl", both)
    harmless = [dict(prompt=row["text"], category="x") for row in rows(25, "kind", start=300)]
    lines(data / "or-bench.jsonl", harmless)
    lines(data / "aegis.jsonl", [dict(question="?")])
    return data


class TestFigures:
    def test_they_equal_scikit_learn(self):
        rng = np.random.default_rng(0)
        harmful = rng.random(200) < 0.4
        scores = rng.normal(size=200) + harmful
        found = measure(harmful, Readings(scores, scores > 1, scores > 0.2))
        assert found.f1.value == pytest.approx(f1_score(harmful, scores > 1))
        assert found.f1_at_half.value == pytest.approx(f1_score(harmful, scores > 0.2))
        assert found.auroc.value == pytest.approx(roc_auc_score(harmful, scores))
        assert found.recall.value == pytest.approx((scores[harmful] > 1).mean())
        assert found.fpr.value == pytest.approx((scores[~harmful] > 1).mean())
        assert SetFigures.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    def test_harmful_prompts_alone(self):
        harmful = np.ones(10, dtype=bool)
        found = f1_of(harmful, np.arange(10) < 6)
        assert found.value == pytest.approx(f1_score(harmful, np.arange(10) < 6))
        assert found.low < found.value < found.high

    def test_harmless_prompts_alone_have_a_rate_only(self):
        scores = np.arange(10.0)
        found = measure(np.zeros(10, dtype=bool), Readings(scores, scores > 7, scores > 4))
        assert (found.f1, found.auroc, found.recall) == (None, None, None)
        assert (found.fpr.value, found.fpr_at_half.value) == (0.2, 0.5)


class TestRun:
    def test_each_set_is_measured_and_the_others_are_named(self, guard, model, folder, tmp_path):
        sets, missing = load_suite(folder)
        result = run_benchmark(guard, model, sets, tmp_path / "out", missing=missing)
        assert [one.name for one in result.sets] == ["toxicchat", "or_bench"]
        verdicts = list(guard.scan(model, sets[0].prompts))
        flags = [v.flagged for v in verdicts]
        labels = [p.harmful for p in sets[0].prompts]
        toxic = result.sets[0].figures
        assert toxic[GUARD].f1.value == pytest.approx(f1_score(labels, flags))
        beliefs = [v.beliefs["harmful"] > 0 for v in verdicts]
        assert toxic[PAPER].f1.value == pytest.approx(f1_score(labels, beliefs))
        assert set(toxic) == {GUARD, PAPER, NGRAMS}
        reasons = {one.title: one.reason for one in result.missing}
        assert len(reasons) == 7
        assert "latentguard data fetch" in reasons["WildGuardTest"]
        assert "It is gated" in reasons["WildGuardTest"]
        assert "gated" not in reasons["Aegis 2"]
        assert "line 1: expected the columns" in reasons["Aegis"]
        assert result.latency.n == 32
        assert result.latency.median > 0

    def test_the_report_stands_beside_published_figures(self, guard, model, folder, tmp_path):
        sets, missing = load_suite(folder)
        out = tmp_path / "out"
        result = run_benchmark(guard, model, sets, out, missing=missing)
        page = save_benchmark(result, out)
        text = (out / "report.md").read_text()
        assert text == markdown(benchmark_report(result))
        for said in ("| WildGuard 7B | 0.708 |", "Qwen3Guard technical report", "| OR-Bench |"):
            assert said in text
        assert "WildGuard 7B" in page.read_text()
        record = json.loads((out / "figures.json").read_text())
        assert record["sets"][0]["figures"][GUARD]["f1"]["n"] == [30, 40]
        assert any(one["source"].startswith("Qwen3Guard") for one in record["published"])

    def test_no_text_is_written(self, guard, model, folder, tmp_path):
        sets, _ = load_suite(folder)
        out = tmp_path / "out"
        save_benchmark(run_benchmark(guard, model, sets, out), out)
        for path in out.rglob("*"):
            assert path.is_dir() or "thing number" not in path.read_text()

    def test_a_second_run_scores_nothing_anew(self, guard, model, folder, tmp_path, monkeypatch):
        sets, _ = load_suite(folder)
        first = run_benchmark(guard, model, sets, tmp_path / "out")
        monkeypatch.setattr(run, "score_to_file", None)
        again = run_benchmark(guard, model, sets, tmp_path / "out")
        assert again.to_dict() == first.to_dict()

    def test_a_killed_run_goes_on(self, guard, model, folder, tmp_path, monkeypatch):
        sets, _ = load_suite(folder)
        whole = run_benchmark(guard, model, sets, tmp_path / "whole")

        def die_after(count):
            left = iter(range(count))

            def advance(done):
                if next(left, None) is None:
                    raise KeyboardInterrupt

            return advance

        with pytest.raises(KeyboardInterrupt):
            run_benchmark(
                guard, model, sets, tmp_path / "out", step=lambda name, total: die_after(20)
            )
        scored = []
        original = run.score_to_file

        def noted(*args, **options):
            scored.append(original(*args, **options))
            return scored[-1]

        monkeypatch.setattr(run, "score_to_file", noted)
        resumed = run_benchmark(guard, model, sets, tmp_path / "out")
        assert scored[0] >= 20
        for one, other in zip(resumed.sets, whole.sets, strict=True):
            assert one.figures == other.figures

    def test_other_prompts_are_scored_anew(self, guard, model, folder, tmp_path):
        run_benchmark(guard, model, load_suite(folder)[0], tmp_path / "out")
        lines(folder / "or-bench.jsonl", [dict(prompt=f"other {n}") for n in range(9)])
        result = run_benchmark(guard, model, load_suite(folder)[0], tmp_path / "out")
        assert result.sets[1].figures[GUARD].harmless == 9

    def test_n_grams_learn_the_rows_of_the_guard_where_these_are_built_in(self, guard):
        prompts, basis = run.ngram_training(guard)
        assert "rows of another source" in basis
        assert len(prompts) == 18


class EvenLengths:
    """A second opinion that blocks texts of even length, and fails on a 5."""

    name, at_once, is_graded = "even lengths", 1, False

    def load(self):
        pass

    def score(self, prompts):
        return [self._score(prompt.text) for prompt in prompts]

    def _score(self, text):
        if "5" in text:
            return None
        return 1.0 if len(text) % 2 == 0 else -1.0


class TestSecondOpinion:
    @pytest.fixture
    def cascade(self, guard, model):
        harmless = [Prompt(row["text"], harmful=False) for row in rows(60, "kind", start=500)]
        calibrated = guard.calibrate(model, harmless, max_fpr=0.1, review_fpr=0.9)
        return Cascade.of(calibrated, EvenLengths())

    def test_decisions_are_joint_and_scores_those_of_the_guard(
        self, cascade, model, folder, tmp_path
    ):
        sets, _ = load_suite(folder)
        out = tmp_path / "out"
        result = run_benchmark(cascade, model, sets, out)
        verdicts = list(cascade.scan(model, sets[0].prompts))
        labels = [p.harmful for p in sets[0].prompts]
        toxic = result.sets[0]
        own = toxic.figures[GUARD]
        assert own.f1.value == pytest.approx(f1_score(labels, [v.flagged for v in verdicts]))
        assert own.auroc.value == pytest.approx(roc_auc_score(labels, [v.score for v in verdicts]))
        opinions = [v.second_opinion for v in verdicts]
        assert {"block", "allow", "failed"} <= set(opinions)
        assert toxic.asked.failed == opinions.count("failed")
        asked = [one is not None for one, harmful in zip(opinions, labels, strict=True) if harmful]
        assert toxic.asked.harmful.value == pytest.approx(np.mean(asked))
        assert result.sets[1].asked.harmful is None
        save_benchmark(result, out)
        text = (out / "report.md").read_text()
        assert "with the second opinion even lengths" in text
        assert "How often it was asked" in text

    def test_it_is_not_answered_from_verdicts_of_the_guard_alone(
        self, cascade, model, folder, tmp_path
    ):
        sets, _ = load_suite(folder)
        alone = run_benchmark(cascade.guard, model, sets, tmp_path / "out")
        joint = run_benchmark(cascade, model, sets, tmp_path / "out")
        assert alone.sets[0].asked is None
        assert joint.sets[0].figures[GUARD].f1 != alone.sets[0].figures[GUARD].f1


class TestFolder:
    def test_no_folder(self, tmp_path):
        with pytest.raises(PromptError, match=r"data fetch --out"):
            load_suite(tmp_path / "none")

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(PromptError, match=r"holds no set of the suite"):
            load_suite(tmp_path)

    def test_a_name_that_is_no_set(self, tmp_path):
        with pytest.raises(PromptError, match=r"no set 'toxic'; expected toxicchat, "):
            load_suite(tmp_path, ["toxic"])

    def test_one_set_alone(self, tmp_path):
        for name in ("xstest", "aegis2"):
            lines(tmp_path / f"{name}.jsonl", AS_PUBLISHED[name])
        sets, missing = load_suite(tmp_path, ["aegis2"])
        assert ([one.suite_set.name for one in sets], missing) == (["aegis2"], [])

    def test_every_set_at_once_as_published(self, guard, model, tmp_path):
        for name in SETS:
            lines(tmp_path / f"{name}.jsonl", AS_PUBLISHED[name])
        sets, missing = load_suite(tmp_path)
        assert (len(sets), missing) == (9, [])
        result = run_benchmark(guard, model, sets, tmp_path / "out")
        assert all(math.isfinite(one.prompts_per_second) for one in result.sets)
