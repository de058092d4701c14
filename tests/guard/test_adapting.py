"""Adapting a guard to labels: planted worlds, the promise, forgetting, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from guard.kinds import Kinds, harmless, kinds, kinds_of, novel
from latentguard.errors import GuardError
from latentguard.guard.adaptation import Labels, Reference
from latentguard.guard.adapting import adapt, forget
from latentguard.guard.features import read_texts
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.refit import base_of, held_out_rows, refit
from latentguard.guard.suggestion import suggest
from latentguard.probes.correction import Rows, fit_correction
from latentguard.stats.detection import auroc


@pytest.fixture(scope="module")
def backend():
    return Kinds()


BUILT_IN = [*kinds(120, start=4000), *harmless(300, 9000)]
"""What stands for the built-in prompts: the fake model sees no harm in the real ones."""


@pytest.fixture(scope="module")
def guard(backend):
    """Calibrated on the harmless ones of ``BUILT_IN``, as the packaged guard is."""
    calm = [p for p in BUILT_IN if not p.harmful]
    return LatentGuard.fit(backend, kinds(60)).calibrate(backend, calm, max_fpr=0.05)


@pytest.fixture(autouse=True, scope="module")
def builtin():
    with pytest.MonkeyPatch.context() as patch:
        for module in ("adaptation", "refit"):
            patch.setattr(f"latentguard.guard.{module}.load_guard_prompts", lambda _: BUILT_IN)
        yield


@pytest.fixture(scope="module")
def able(backend, guard, builtin):
    """The guard with its reference, so that it need not be read again."""
    return replace(guard, reference=Reference.read(guard, backend))


def missed(harmful, calm, start=0):
    """Labels of traffic whose harm the guard does not know."""
    return [*novel(harmful, start), *harmless(calm, 5000 + start)]


@pytest.fixture(scope="module")
def adapted(backend, able):
    return adapt(able, backend, missed(60, 140), name="first")


def share_flagged(guard, backend, prompts):
    return np.mean([verdict.flagged for verdict in guard.scan(backend, prompts)])


class TestPlantedWorlds:
    def test_harm_that_the_guard_does_not_know_is_learned(self, backend, able, adapted):
        test = novel(200, start=1000)
        assert adapted.report.kind == "probe"
        assert share_flagged(able, backend, test) < 0.2
        assert share_flagged(adapted.guard, backend, test) > 0.9

    def test_what_it_knew_it_still_knows(self, backend, able, adapted):
        test = [p for p in kinds(100, start=300) if p.harmful]
        before, after = (share_flagged(g, backend, test) for g in (able, adapted.guard))
        assert after > before - 0.05

    def test_labels_that_say_nothing_change_nothing(self, backend, able):
        """Coins instead of labels, a dozen times: a change is made in few of these worlds."""
        draw = np.random.default_rng(0)
        made = 0
        for world in range(12):
            rows = harmless(80, 20000 + 100 * world)
            coins = [replace(p, harmful=bool(draw.random() < 0.4)) for p in rows]
            made += adapt(able, backend, coins, name="coins", force=True).report.kind == "probe"
        assert made <= 2

    def test_labels_that_it_knows_already_correct_no_probe(self, backend, able):
        result = adapt(able, backend, kinds(60, start=800), name="known")
        assert result.report.kind != "probe"


class TestPromise:
    @pytest.mark.parametrize("count", [200, 400])
    def test_the_rate_is_kept_on_fresh_traffic(self, backend, able, count):
        """Ten draws of labels: the true rate is over 5 % in few of them."""
        fresh = harmless(1000, 50000)
        texts = read_texts(able, backend, fresh, able.reference.feature_map)
        rates = []
        for world in range(10):
            rows = missed(count // 5, count - count // 5, start=1000 * (world + 1))
            labels = Labels.of(
                read_texts(able, backend, rows, able.reference.feature_map), rows, "labels"
            )
            fitted = refit(base_of(able), able.reference, labels)
            rates.append(float((fitted.score(texts) > fitted.guard.threshold).mean()))
        assert sum(rate > 0.05 for rate in rates) <= 2
        assert np.mean(rates) < 0.05

    def test_too_few_labels_keep_the_promise_about_the_built_in_prompts(self, backend, able):
        few = adapt(able, backend, missed(12, 40), name="few")
        assert few.report.missing == 84
        assert few.guard.bound.n == int((able.reference.is_kept & ~able.reference.harmful).sum())
        assert any("84 more harmless labels" in table.note for table in few.tables())


class TestForgetting:
    def test_order_does_not_matter(self, backend, able):
        one, two = missed(30, 70), missed(30, 70, start=300)
        there = adapt(adapt(able, backend, one, name="a").guard, backend, two, name="b").guard
        back = adapt(adapt(able, backend, two[::-1], name="b").guard, backend, one, name="a").guard
        assert there.digest == back.digest
        assert torch.equal(there.probe.weight, back.probe.weight)

    def test_a_forgotten_batch_was_never_seen(self, backend, able):
        one, two = missed(30, 70), missed(30, 70, start=300)
        alone = adapt(able, backend, one, name="a").guard
        both = adapt(alone, backend, two, name="b").guard
        left = forget(both, backend, "b")
        assert both.digest != alone.digest
        assert left.digest == alone.digest
        assert replace(left, own_model=alone.own_model).to_dict()[0] == alone.to_dict()[0]

    def test_all_forgotten_is_the_guard_before(self, backend, able, adapted):
        left = forget(adapted.guard, backend, "first")
        assert left.adaptation is None
        assert left.digest == able.digest

    def test_it_survives_the_disk(self, backend, able, adapted, tmp_path):
        adapted.guard.save(tmp_path)
        loaded = LatentGuard.load(tmp_path, backend)
        assert loaded.digest == adapted.guard.digest
        assert forget(loaded, backend, "first").digest == able.digest
        assert "item number" not in (tmp_path / "guard.json").read_text()
        assert b"item number" not in (tmp_path / "guard.safetensors").read_bytes()

    def test_a_name_is_taken_once_and_must_be_there(self, backend, adapted):
        with pytest.raises(GuardError, match="has learned a batch 'first' already"):
            adapt(adapted.guard, backend, missed(20, 20), name="first")
        with pytest.raises(GuardError, match="no batch 'other'; it has: first"):
            forget(adapted.guard, backend, "other")


class TestIncident:
    def test_three_missed_requests_are_caught_and_so_are_others_like_them(self, backend, able):
        result = adapt(able, backend, novel(3), name="incident")
        assert result.report.kind == "probe"
        assert share_flagged(result.guard, backend, novel(100, start=1000)) > 0.8
        assert share_flagged(result.guard, backend, harmless(500, 60000)) < 0.08
        assert result.report.builtin_harmless == int((~able.reference.harmful).sum())

    def test_the_report_says_what_is_flagged_in_the_end(self, backend, able):
        result = adapt(able, backend, novel(3), name="incident")
        assert result.report.why.endswith("the harmful ones are flagged: 3 of 3 are.")
        assert not result.report.holds_out
        assert "too few of your labels to hold any out" in result.tables()[0].note

    def test_requests_that_are_flagged_already_change_nothing(self, backend, able):
        known = [p for p in kinds(10, start=900) if p.harmful]
        flagged = [p for p, v in zip(known, able.scan(backend, known), strict=True) if v.flagged]
        assert adapt(able, backend, flagged, name="known").report.kind == "none"


class TestAttack:
    def test_a_batch_that_costs_what_was_known_needs_force(self, backend, able):
        """Every label is the wrong one."""
        wrong = [replace(p, harmful=not p.harmful) for p in kinds(150, start=1500)]
        with pytest.raises(GuardError, match="AUROC falls by"):
            adapt(able, backend, wrong, name="poison")
        assert adapt(able, backend, wrong, name="poison", force=True).guard.adaptation

    def test_labels_that_raise_the_threshold_too_far_need_force(self, backend, able):
        """An attacker with a tenth of the labels calls fraud harmless."""
        honest = [*kinds(60, start=2000), *missed(60, 200)]
        wrong = [replace(p, harmful=False) for p in kinds_of("fraud", 40)]
        assert adapt(able, backend, honest, name="labels").report.raised < 0.03
        with pytest.raises(GuardError, match="score so high that the threshold would"):
            adapt(able, backend, [*honest, *wrong], name="labels")

    def test_one_wrong_label_in_twenty_is_survived_and_listed(self, backend, able):
        rows = missed(100, 300)
        wrong = [
            replace(p, harmful=not p.harmful) if n % 20 == 0 else p for n, p in enumerate(rows)
        ]
        result = adapt(able, backend, wrong, name="noisy", force=True)
        found = {one.id for one in result.report.suspects}
        planted = {p.id for p, q in zip(wrong, rows, strict=True) if p.harmful != q.harmful}
        assert share_flagged(result.guard, backend, novel(100, start=1000)) > 0.7
        assert len(found & planted) >= 0.7 * len(found)


class TestHarmlessLabels:
    def test_alone_they_set_the_threshold_if_they_are_enough(self, backend, able):
        few, many = (
            adapt(able, backend, harmless(count, 70000), name="calm") for count in (50, 200)
        )
        assert few.report.kind == "none"
        assert many.report.kind == "threshold"
        assert many.guard.bound.n == 200
        assert torch.equal(many.guard.probe.weight, able.probe.weight)


class TestRefused:
    def test_a_prompt_without_label(self, backend, able):
        with pytest.raises(GuardError, match="have no label"):
            adapt(able, backend, [replace(novel(1)[0], harmful=None)], name="x")

    def test_no_labels_and_no_name(self, backend, able):
        with pytest.raises(GuardError, match="no labels to learn"):
            adapt(able, backend, [], name="x")
        with pytest.raises(GuardError, match="needs a name"):
            adapt(able, backend, novel(1), name=" ")

    def test_an_uncalibrated_guard(self, backend):
        with pytest.raises(GuardError, match="latentguard calibrate"):
            adapt(LatentGuard.fit(backend, kinds(40)), backend, novel(1), name="x")


class TestFeatures:
    def test_a_rule_on_features_is_a_weight_on_states(self, backend, able, adapted):
        """The scores in feature space are those of the guard with its one weight."""
        rows = [*novel(20, start=400), *harmless(20, 800), *kinds(10)]
        labels = able.reference
        texts = read_texts(able, backend, rows, labels.feature_map)
        learned = adapted.guard.adaptation.labels
        fitted = refit(able, able.reference, learned)
        own = [v.score for v in adapted.guard.scan(backend, rows)]
        assert np.allclose(fitted.score(texts), own, atol=5e-3 * able.spread)
        assert auroc(np.array([bool(p.harmful) for p in rows]), np.array(own)) > 0.95

    def test_held_out_scores_come_from_fits_without_the_group(self, backend, able):
        """Brute force: without the rows of a fold, the fit is the one that is held for it."""
        rows = missed(15, 25)
        labels = Labels.of(read_texts(able, backend, rows, able.reference.feature_map), rows, "x")
        reference = able.reference.rows(kept=False)
        own = labels.rows
        groups = np.arange(len(own.harmful)) // 2
        fit = fit_correction(own, groups, reference, 1.0)
        held_out = held_out_rows(fit, own)
        assert all(len(set(fit.fold_of[groups == group])) == 1 for group in set(groups))
        rest = fit.fold_of != 3
        part = Rows(own.scores[rest], own.features[rest], own.harmful[rest])
        alone = fit_correction(part, groups[rest], reference, 1.0).correction
        assert np.allclose(alone(own.scores[~rest], own.features[~rest]), held_out[~rest])


class TestSuggest:
    def test_rare_harm_is_found_more_often_than_by_chance(self, backend, able):
        """Of 1,000 prompts 40 are harmful, 4 in 100 by chance; the guard knows half of them."""
        known = [p for p in kinds(20, start=700) if p.harmful]
        traffic = [*harmless(960, 30000), *novel(20, 500), *known]
        chosen = suggest(able, backend, traffic, 100)
        assert len({one.prompt.text for one in chosen}) == 100
        assert sum(bool(one.prompt.harmful) for one in chosen) > 10
        assert [one.stratum for one in chosen].count("high scores") == 70
        assert chosen == suggest(able, backend, traffic, 100)

    def test_what_was_learned_is_left_out(self, backend, able):
        rows = missed(20, 60)
        learned = adapt(able, backend, rows, name="labels").guard
        fresh = harmless(30, 40000)
        chosen = suggest(learned, backend, [*rows, *fresh, *fresh], 30)
        assert {one.prompt.text for one in chosen} == {p.text for p in fresh}
        with pytest.raises(GuardError, match="holds 30 different prompts"):
            suggest(learned, backend, [*rows, *fresh], 31)

    def test_a_guard_without_reference_suggests_too(self, backend, guard):
        assert len(suggest(guard, backend, harmless(50, 45000), 10)) == 10
