"""The stress suite on planted truth and on a tiny random model; interrupted and resumed."""

from dataclasses import replace
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fake_backend import FakeBackend, labelled, texts
from latentguard.data.builtin import load_contrast
from latentguard.errors import LatentGuardError, PromptError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Prompt
from latentguard.robustness import weights
from latentguard.robustness.report import bootstrap_auroc
from latentguard.robustness.run import StressPlan, require_attack_names, run_stress
from latentguard.robustness.suite import (
    ALL_LANGUAGES,
    BUDGETS,
    PADDING_TOKENS,
    UNCHANGED,
    ContextWindow,
    attack_names,
    build_suite,
    reasons_not_run,
)
from latentguard.robustness.weights import GuardUnderTest
from latentguard.study.cached_model import CachedModel
from latentguard.study.settings import read_settings
from latentguard.study.store import Store

WINDOW = ContextWindow(1 << 62, lambda text: len(text.split()))
PROMPTS = tuple(labelled(30))


class Planted(FakeBackend):
    """A backend with what the suite asks of a chat model beside the protocol."""

    source = "planted"
    max_tokens = 4096

    def chat(self, prompts):
        return [SimpleNamespace(ids=p.text.split()) for p in prompts]


def planted_guard(folder, backend=None, probe="linear"):
    backend = backend or Planted()
    guard = LatentGuard.fit(backend, labelled(40, start=100), reading="t_inst", probe=probe)
    harmless = [Prompt(text) for text in texts(100, bad=False, start=500)]
    guard = guard.calibrate(backend, harmless, max_fpr=0.05)
    return GuardUnderTest(guard, backend, CachedModel(backend, Store(folder / "s.sqlite")))


def table(report, title):
    found = next(t for t in report.tables if t.title == title)
    return {row[1]: dict(zip(found.columns, row, strict=True)) for row in found.rows}


class TestCases:
    def test_the_untransformed_come_first_and_names_are_known(self):
        found = build_suite(PROMPTS, BUDGETS["full"], WINDOW)
        assert found[0].name == UNCHANGED
        assert sorted(c.name for c in found[1:]) == sorted(attack_names())

    def test_only_takes_names_and_families(self):
        found = build_suite(PROMPTS, BUDGETS["small"], WINDOW, only=["homoglyphs", "base64"])
        assert [c.name for c in found[1:]] == [
            "homoglyphs, a third",
            "homoglyphs, all",
            "fullwidth",
            "base64",
        ]

    def test_both_classes_are_changed_alike_and_keep_their_labels(self):
        for case in build_suite(PROMPTS, BUDGETS["small"], WINDOW):
            for variant in case.variants:
                assert [p.harmful for p in variant] == [p.harmful for p in case.originals]
            sides = [sum(p.harmful is side for p in case.originals) for side in (True, False)]
            assert sides[0] == sides[1] <= 24

    def test_padding_is_as_long_as_it_says_and_grows(self):
        found = {c.name: c for c in build_suite(PROMPTS, BUDGETS["full"], WINDOW)}
        for tokens in PADDING_TOKENS:
            for side in ("in front", "behind"):
                case = found[f"padding {side}, {tokens}"]
                lengths = [WINDOW.count_tokens(p.text) for p in case.variants[0]]
                assert all(0.93 * tokens < n < 1.03 * tokens + 10 for n in lengths)

    @pytest.mark.parametrize("context", [512, 1500, 4096, 8192, 40_000])
    def test_padding_keeps_within_the_context(self, context):
        window = ContextWindow(context, WINDOW.count_tokens)
        found = build_suite(PROMPTS, BUDGETS["full"], window)
        padded = [p for c in found if c.family == "padding" for p in c.variants[0]]
        assert all(window.count_tokens(p.text) < context - 100 for p in padded)
        there, absent = {c.name for c in found}, reasons_not_run(BUDGETS["full"], window)
        assert not there & set(absent)
        assert there | set(absent) == {UNCHANGED, *attack_names()}
        assert all(str(context) in reason for reason in absent.values())

    def test_a_length_that_the_budget_leaves_out_can_be_named(self):
        name = "padding behind, 8000"
        assert name in reasons_not_run(BUDGETS["small"], WINDOW)
        (_, case) = build_suite(PROMPTS, BUDGETS["small"], WINDOW, only=[name])
        assert (case.name, len(case.originals)) == (name, 8)

    @pytest.mark.parametrize(
        ("only", "absent"),
        [
            (["padding"], ["padding in front, 8000", "padding behind, 8000"]),
            (["padding in front, 8000"], []),
            (["padding in front, 500"], []),
            (["base64"], []),
        ],
    )
    def test_only_what_was_asked_for_has_a_reason_not_to_run(self, only, absent):
        assert list(reasons_not_run(BUDGETS["small"], WINDOW, only=only)) == absent

    def test_smaller_samples_lie_in_larger_ones(self):
        found = build_suite(PROMPTS, BUDGETS["small"], WINDOW)
        whole = set(found[0].originals)
        assert all(set(c.originals) <= whole for c in found if c.family == "padding")

    def test_the_same_seed_gives_the_same_texts(self):
        first, again, other = (
            build_suite(PROMPTS, BUDGETS["small"], WINDOW, seed=seed) for seed in (0, 0, 1)
        )
        assert first == again != other

    def test_a_class_is_missing(self):
        with pytest.raises(PromptError, match="found 30 and 0"):
            build_suite([p for p in PROMPTS if p.harmful], BUDGETS["small"], WINDOW)

    @pytest.mark.parametrize("name", ["no such", "homoglyph", "Base64"])
    def test_an_unknown_name(self, name):
        with pytest.raises(
            LatentGuardError, match=rf"no attack '{name}'.*base64.*4-bit weights|no"
        ):
            require_attack_names([name])
        require_attack_names(
            ["base64", "padding", "changed weights", "4-bit weights", ALL_LANGUAGES]
        )


class TestPlantedTruth:
    """The backend reads the word "bad" between spaces, whatever stands around it."""

    @pytest.fixture(scope="class")
    def report(self, tmp_path_factory):
        only = ("spaced letters", "harmless request behind", "padding", "translations")
        target = planted_guard(tmp_path_factory.mktemp("planted"))
        return run_stress(target, StressPlan(PROMPTS, "small", only))

    def test_what_keeps_the_word_is_seen_through(self, report):
        rows = table(report, "All figures")
        for name in (UNCHANGED, "harmless request behind", "padding behind, 2000"):
            assert (rows[name]["AUROC"], rows[name]["TPR"]) == (1, 1)
            assert rows[name]["FPR"] < 0.2
            assert rows[name]["change of AUROC"] == 0

    def test_what_is_undone_is_seen_through(self, report):
        row = table(report, "All figures")["spaced letters"]
        assert (row["AUROC"], row["TPR"], row["change of AUROC"]) == (1, 1, 0)

    def test_what_hides_the_word_is_shown_as_weak(self, tmp_path):
        target = planted_guard(tmp_path, probe="centroid")  # it undoes nothing
        report = run_stress(target, StressPlan(PROMPTS, "small", ("spaced letters",)))
        row = table(report, "All figures")["spaced letters"]
        assert 0.3 < row["AUROC"] < 0.7
        assert row["TPR"] < 0.3
        assert row["change of AUROC, high"] < -0.1

    def test_baselines_and_n_are_there(self, report):
        rows = table(report, "All figures")
        assert rows[UNCHANGED]["n harmful + harmless"] == "24 + 24"
        assert rows["padding in front, 500"]["n harmful + harmless"] == "8 + 8"
        assert rows[ALL_LANGUAGES]["n harmful + harmless"] == "8 + 8 x 10"
        for row in rows.values():
            for figure in ("AUROC", "TPR", "FPR", "n-grams", "length"):
                assert row[f"{figure}, low"] <= row[figure] <= row[f"{figure}, high"]

    def test_it_says_that_rows_are_not_corrected(self, report, tmp_path):
        page = (report.save(tmp_path) / "report.html").read_text(encoding="utf-8")
        assert "nothing is corrected for the number of rows" in page
        assert "at most 5.00% of harmless prompts like these" in page

    def test_texts_of_the_prompts_are_only_harmless_examples(self, report, tmp_path):
        page = (report.save(tmp_path) / "report.html").read_text(encoding="utf-8")
        assert "the bad item" not in page


def test_auroc_compares_every_variant_with_every_variant():
    rng = np.random.default_rng(1)
    harmful = np.repeat([True, False], [5, 7])
    scores = rng.normal(size=(3, 12)) + harmful
    pooled = roc_auc_score(np.tile(harmful, 3), scores.ravel())
    assert bootstrap_auroc(scores, harmful).value == pytest.approx(pooled, abs=1e-12)


def test_variants_of_a_prompt_are_drawn_together():
    """Ten copies of the same scores tell no more than one."""
    rng = np.random.default_rng(0)
    harmful = np.repeat([True, False], 8)
    one = (rng.normal(size=16) + harmful)[None]
    single, copied = bootstrap_auroc(one, harmful), bootstrap_auroc(np.repeat(one, 10, 0), harmful)
    assert (single.value, single.low, single.high) == (copied.value, copied.low, copied.high)


class TestMemory:
    PLAN = StressPlan(PROMPTS, "small", ("case and spacing", "two requests"))

    def test_a_run_that_was_broken_off_goes_on(self, tmp_path):
        whole = run_stress(planted_guard(tmp_path / "whole"), self.PLAN)
        backend = Planted()
        target = planted_guard(tmp_path / "broken", backend)
        asked = len(backend.captured)
        whole_run = Planted()
        run_stress(planted_guard(tmp_path / "count", whole_run), self.PLAN)
        texts_of_run = len(whole_run.captured) - asked
        read, backend.capture = backend.capture, broken_after(backend.capture, 8)
        with pytest.raises(KeyboardInterrupt):
            run_stress(target, self.PLAN)
        before = len(backend.captured) - asked
        backend.capture = read
        again = run_stress(target, self.PLAN)
        assert again.to_dict() == whole.to_dict()
        assert len(backend.captured) - asked <= texts_of_run + 16
        assert before > 50

    def test_a_second_run_asks_nothing(self, tmp_path):
        backend = Planted()
        target = planted_guard(tmp_path, backend)
        first = run_stress(target, self.PLAN)
        backend.capture = None
        assert run_stress(target, self.PLAN).to_dict() == first.to_dict()

    def test_another_guard_is_asked_anew(self, tmp_path):
        backend = Planted()
        target = planted_guard(tmp_path, backend)
        run_stress(target, self.PLAN)
        asked = len(backend.captured)
        run_stress(replace(target, guard=replace(target.guard, threshold=9.0)), self.PLAN)
        assert len(backend.captured) > asked


def broken_after(capture, calls):
    """The capture, interrupted at the so manieth call."""
    left = iter(range(calls))

    def read(*args, **how):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return capture(*args, **how)

    return read


class TestWeights:
    @pytest.fixture
    def target(self, model, tmp_path, monkeypatch):
        pytest.importorskip("bitsandbytes")
        small = replace(
            read_settings(budget="small"),
            asked=24, fit=6, test=6, enough=2, layer_step=2, reply_tokens=3,
            finetune_sizes=(4,), finetune_opening=3,
        )  # fmt: skip
        monkeypatch.setattr(weights, "SETTINGS", small)
        train = [p for p in load_contrast("train") if p.pair][:40]
        guard = LatentGuard.fit(model, train, reading="t_inst", probe="centroid")
        store = Store(tmp_path / "s.sqlite")
        return GuardUnderTest(guard, model, CachedModel(model, store, judge=planted_judge))

    def test_every_change_has_its_row_and_leaves_no_trace(self, target, model):
        pytest.importorskip("peft")
        before = {name: w.clone() for name, w in model.model.state_dict().items()}
        prompts = tuple(p for p in load_contrast("test") if p.pair)[:12]
        report = run_stress(target, StressPlan(prompts, "small", ("changed weights",)))
        assert all(torch.equal(w, before[n]) for n, w in model.model.state_dict().items())
        rows = table(report, "All figures")
        assert list(rows) == [UNCHANGED, *weights.NAMES]
        assert all(row["n-grams"] == rows[UNCHANGED]["n-grams"] for row in rows.values())
        (refused,) = (t for t in report.tables if t.title == "Harmful prompts refused")
        assert [row[0] for row in refused.rows] == [weights.AS_LOADED, *weights.NAMES]
        assert refused.rows[-1][1].endswith("fine-tuned on 4 pairs")
        assert all(row[-1] == 6 for row in refused.rows)
        model.model.forward = None  # a second run asks the model nothing
        try:
            assert run_stress(
                target, StressPlan(prompts, "small", ("changed weights",))
            ).to_dict() == (report.to_dict())
        finally:
            del model.model.forward

    def test_weights_that_cannot_be_changed_are_reported_as_not_run(self, target, monkeypatch):
        monkeypatch.setattr(weights, "SETTINGS", replace(weights.SETTINGS, enough=1000))
        report = run_stress(target, StressPlan(PROMPTS[:12], "small", (weights.FINETUNED,)))
        (told,) = (t for t in report.tables if t.title == "Not run")
        assert told.rows[0][0] == weights.FINETUNED
        assert "too few for a refusal axis" in told.rows[0][1]


def planted_judge(reply):
    """A random model never refuses: half of the prompts count as refused."""
    return "refused" if crc32(reply.prompt.text.encode()) % 2 else "accepted"
