"""The verbs calibrate and drift, and --allow-mismatch, on a tiny random model."""

import json
from dataclasses import replace

import pytest

import latentguard
from fake_backend import bare
from latentguard.cli.loading import save_guard
from latentguard.guard.chunking import Chunking
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Prompt
from models.architectures import chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    chat_model("llama", tokenizer).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def row(word, n):
    return dict(
        id=f"{word}-{n}",
        text=f"Tell me the {word} thing number {n}",
        label="harmful" if word == "sly" else "harmless",
        refused=word == "sly",
        language=("en", "de")[n % 2] if n % 10 else "fr",
    )


def rows(count, word, start=0):
    return [row(word, n) for n in range(start, start + count)]


def written(path, found):
    path.write_text("".join(json.dumps(one) + "\n" for one in found))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "calm": written(folder / "calm.jsonl", rows(160, "kind", start=1000)),
        "sly": written(folder / "sly.jsonl", rows(40, "sly", start=1000)),
        "live": written(folder / "live.jsonl", rows(120, "kind", start=1020)),
        "attack": written(folder / "attack.jsonl", rows(80, "sly", start=2000)),
    }


@pytest.fixture(scope="module")
def fitted(model, tmp_path_factory):
    prompts = [
        Prompt(r["text"], harmful=word == "sly", refused=word == "sly")
        for word in ("sly", "kind")
        for r in rows(30, word)
    ]
    folder = tmp_path_factory.mktemp("guards") / "g"
    LatentGuard.fit(latentguard.ChatModel.load(model), prompts).save(folder)
    return folder


@pytest.fixture
def guard(fitted, tmp_path):
    copy = tmp_path / "guard"
    copy.mkdir()
    for file in fitted.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def ready(lg, guard, files):
    assert lg("calibrate", guard, "--harmless", files["calm"], "--max-fpr", "0.05")[0] == 0
    return guard


class TestCalibrate:
    def test_everything(self, lg, guard, files):
        words = ["--harmless", files["calm"], "--harmful", files["sly"], "--max-fpr", "0.05"]
        more = ["--review-fpr", "0.2", "--segment-column", "language"]
        code, out, err = lg("calibrate", guard, *words, *more)
        assert code == 0, err
        assert out.startswith("Threshold ")
        for said in ("| en |", "| fr | 16 | as all |", "Expected calibration error", "suspect"):
            assert said in out
        page = (guard / "calibration" / "report.html").read_text()
        assert "Reliability" in page
        loaded = LatentGuard.load(guard)
        assert set(loaded.thresholds.segments) == {"en", "de"}
        assert "40 refused and 160 accepted" in loaded.quadrants.basis
        assert "Expected calibration error" in lg("show", guard)[1]

    def test_the_page_goes_on_with_the_guard(self, lg, guard, files):
        """A later calibration writes it anew; a guard that is fitted there anew has none."""
        words = ["calibrate", guard, "--harmless", files["calm"], "--max-fpr"]
        assert lg(*words, "0.05")[0] == 0
        page = guard / "calibration" / "report.html"
        assert not page.exists()
        assert lg(*words, "0.05", "--harmful", files["sly"])[0] == 0
        assert "At most 5.00%" in page.read_text()
        assert lg(*words, "0.2")[0] == 0
        assert "At most 20.00%" in page.read_text()
        plain = replace(bare(LatentGuard.load(guard)), bound=None)
        (page.parent / "mine.txt").touch()
        save_guard(plain, guard)
        assert [file.name for file in page.parent.iterdir()] == ["mine.txt"]
        save_guard(plain, guard)
        assert lg(*words, "0.05")[0] == 0
        assert [file.name for file in page.parent.iterdir()] == ["mine.txt"]

    def test_harmful_prompts_of_one_pair(self, lg, guard, files, tmp_path):
        one = written(tmp_path / "one.jsonl", [r | dict(pair="p") for r in rows(40, "sly")])
        words = ["--harmless", files["calm"], "--harmful", one, "--max-fpr", "0.05"]
        code, _, err = lg("calibrate", guard, *words)
        assert code == 1
        assert "at least 5 different texts, or pairs of texts; found 1" in err

    def test_few_harmful_prompts(self, lg, guard, files, tmp_path):
        few = written(tmp_path / "few.jsonl", rows(5, "sly"))
        words = ["--harmless", files["calm"], "--harmful", few, "--max-fpr", "0.05"]
        code, _, err = lg("calibrate", guard, *words)
        assert code == 1
        assert "at least 30 held-out prompts of each class; found 5 harmful" in err

    def test_too_few_long_prompts_leave_their_threshold_as_it_was(self, lg, guard, files, tmp_path):
        chunking = Chunking(threshold=2.5)
        replace(LatentGuard.load(guard), chunking=chunking).save(guard)
        long = [row("kind", 5000) | dict(text="A kind sentence of some length. " * 20)]
        mixed = written(tmp_path / "mixed.jsonl", rows(160, "kind", start=1000) + long)
        code, out, err = lg("calibrate", guard, "--harmless", mixed, "--max-fpr", "0.05")
        assert code == 0
        assert "stays as it was" in err
        assert "n = 160 " in out
        assert LatentGuard.load(guard).chunking.threshold == 2.5

    def test_the_built_in_prompts_leave_it_to_what_fit_picked_it_on(self, lg, guard, monkeypatch):
        texts = [f"Tell me the kind thing number {n}" for n in range(8000, 8100)]
        long = [f"{n}. " + "Tell me the kind thing. " * 9 for n in range(70)]
        said = [Prompt(text, harmful=False) for text in texts + long]
        monkeypatch.setattr("latentguard.cli.calibrate.load_guard_prompts", lambda split: said)
        chunking = Chunking(threshold=2.5, longer_than=150)
        replace(LatentGuard.load(guard), chunking=chunking).save(guard)
        code, out, err = lg("calibrate", guard)
        assert (code, "stays as it was" in err) == (0, False), err
        assert "n = 100 " in out
        assert LatentGuard.load(guard).chunking.threshold == 2.5

    def test_a_segment_that_no_prompt_has(self, lg, guard, files):
        words = ["--harmless", files["calm"], "--max-fpr", "0.05", "--segment-column", "langauge"]
        code, _, err = lg("calibrate", guard, *words)
        assert code == 1 and "'langauge', which no harmless prompt has" in " ".join(err.split())

    def test_the_segment_is_read_when_scoring(self, lg, guard, files):
        words = ["--harmless", files["calm"], "--max-fpr", "0.05", "--segment-column", "language"]
        assert lg("calibrate", guard, *words)[0] == 0
        found = LatentGuard.load(guard)
        limits = found.thresholds
        _, out, _ = lg("score", guard, files["attack"])
        for line, one in zip(out.splitlines(), rows(80, "sly", start=2000), strict=True):
            verdict = json.loads(line)
            threshold = limits.for_segment(one["language"]).block.threshold
            assert verdict["flagged"] == (verdict["score"] > threshold)
            assert verdict["quadrant"] in {f"{a}, {b}" for a in SIDES[0] for b in SIDES[1]}


SIDES = (("harmful", "harmless"), ("refusing", "accepting"))


class TestDrift:
    def test_the_same_traffic(self, lg, ready, files):
        code, out, _ = lg("drift", ready, files["live"])
        assert (code, out.startswith("all: ")) == (0, True), out

    def test_other_traffic_is_exit_code_1(self, lg, ready, files):
        code, out, _ = lg("drift", ready, files["attack"], "--json")
        told = json.loads(out)
        assert (code, told["holds"], told["moved"]) == (1, False, True)
        assert told["n"] == 80

    def test_without_calibration(self, lg, guard, files):
        code, _, err = lg("drift", guard, files["live"])
        assert code == 1
        assert "no calibration" in err


class TestMismatch:
    @pytest.fixture
    def other(self, tmp_path, tokenizer):
        folder = tmp_path / "other"
        chat_model("llama", tokenizer, seed=3).model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("verb", ["score", "drift", "calibrate"])
    def test_it_goes_on_only_if_asked(self, lg, ready, files, other, verb):
        data = ["--harmless", files["calm"]] if verb == "calibrate" else [files["live"]]
        rate = ["--max-fpr", "0.05"] if verb == "calibrate" else []
        words = [verb, ready, *data, *rate, "--model", other]
        code, out, err = lg(*words)
        assert (code, out) == (1, "")
        assert "weights" in err
        assert "fine-tuned, merged, quantised or swapped" in err
        code, out, err = lg(*words, "--allow-mismatch")
        assert (code in (0, 1), bool(out)) == (True, True)
        assert "standard deviations in the mean" in err
        assert "changed side of the threshold" in err

    def test_a_guard_that_was_calibrated_there_belongs_there(self, lg, ready, files, other):
        words = ["--harmless", files["calm"], "--max-fpr", "0.05", "--model", other]
        assert lg("calibrate", ready, *words, "--allow-mismatch")[0] == 0
        code, _, err = lg("score", ready, files["live"])
        assert (code, "Warning" in err) == (0, False), err
        assert "fitted_on" in lg("show", ready)[1]


class TestBeforeAndAfter:
    def test_harmful_prompts_show_what_a_calibration_changes(self, lg, ready, files):
        words = ["--harmless", files["calm"], "--harmful", files["sly"], "--max-fpr", "0.2"]
        code, out, err = lg("calibrate", ready, *words)
        assert code == 0, err
        assert "**Before and after.**" in out
        assert "| all | caught |" in out
        assert "| all | falsely flagged |" in out

    def test_harmless_prompts_alone_show_none(self, lg, ready, files):
        assert "Before and after" not in lg("calibrate", ready, "--harmless", files["calm"])[1]


class TestOperatingPoints:
    def calibrated(self, lg, guard, files, *more):
        words = ["--harmless", files["calm"], "--harmful", files["sly"], *more]
        code, out, err = lg("calibrate", guard, *words)
        assert code == 0, err
        return out

    def point(self, lg, guard, files):
        line = lg("score", guard, files["attack"])[1].splitlines()[0]
        return json.loads(line)["operating_point"]

    def test_a_rate_is_named_in_verdicts(self, lg, guard, files):
        assert self.point(lg, guard, files) is None
        self.calibrated(lg, guard, files, "--max-fpr", "0.05")
        assert self.point(lg, guard, files) == "max-fpr=0.05"
        assert "Operating point `max-fpr=0.05`" in lg("show", guard)[1]

    def test_balanced(self, lg, guard, files):
        out = self.calibrated(lg, guard, files, "--balanced")
        assert "Operating point `balanced`: the best F1, with 20.0% of the prompts harmful" in out
        assert self.point(lg, guard, files) == "balanced"
        assert "Operating point `balanced`" in (guard / "README.md").read_text()
        loaded = LatentGuard.load(guard)
        assert loaded.bound.max_fpr <= 0.5
        assert loaded.bound.upper <= loaded.bound.max_fpr

    def test_a_cost_ratio_under_a_ceiling(self, lg, guard, files):
        more = ["--cost-ratio", "1000", "--max-fpr", "0.1", "--harmful-share", "0.1"]
        out = self.calibrated(lg, guard, files, *more)
        assert "a miss costs as much as 1000 false alarms, with 10.0%" in out
        assert LatentGuard.load(guard).bound.max_fpr <= 0.1
        assert self.point(lg, guard, files) == "cost-ratio=1000"

    def test_traffic_is_an_estimate_and_says_so(self, lg, guard, files):
        out = self.calibrated(lg, guard, files, "--max-fpr", "0.05", "--traffic", files["live"])
        assert "an estimate, and no bound" in out
        assert "n = 120 unlabelled prompts" in out
        assert self.point(lg, guard, files) == "max-fpr=0.05, traffic"

    def test_built_in_harmful_prompts_serve_for_traffic(self, lg, guard, files, monkeypatch):
        few = [Prompt(r["text"], harmful=True) for r in rows(40, "sly", start=7000)]
        monkeypatch.setattr("latentguard.cli.calibrate.load_guard_prompts", lambda split: few)
        words = ["--harmless", files["calm"], "--max-fpr", "0.05", "--traffic", files["live"]]
        code, _, err = lg("calibrate", guard, *words)
        assert code == 0, err
        assert "The harmful prompts are built-in ones" in err

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--balanced", "--cost-ratio", "2"], "give one of them"),
            (["--balanced", "--harmless", "calm"], "give harmful ones as well"),
            (["--traffic", "live", "--segment-column", "language"], "leave --segment-column out"),
            (["--harmful-share", "0.1"], "belongs to --balanced"),
            (["--cost-ratio", "0", "--harmful", "sly"], "over 0; found 0"),
        ],
    )
    def test_options_that_do_not_go_together(self, lg, guard, files, words, said):
        before = (guard / "guard.json").read_text()
        code, _, err = lg("calibrate", guard, *[files.get(word, word) for word in words])
        assert code == 1
        assert said in err
        assert (guard / "guard.json").read_text() == before

    def test_little_traffic_is_refused_before_the_model_loads(self, lg, guard, files, tmp_path):
        few = written(tmp_path / "few.jsonl", rows(20, "kind", start=5000))
        words = ["--harmless", files["calm"], "--harmful", files["sly"], "--traffic", few]
        words += ["--max-fpr", "0.05"]
        code, _, err = lg("calibrate", guard, *words)
        assert code == 1
        assert "needs 100 unlabelled prompts; found 20" in err
        assert "Loading" not in err
