"""Categories: planted directions are named, and damaged ones are not loaded."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fake_backend import bare, labelled, noise
from guard.kinds import KINDS, Kinds, harmless, kinds, novel
from latentguard.data.builtin import load_contrast
from latentguard.data.hazards import HAZARDS, MODERATION, OTHER, moderation_names
from latentguard.guard import packs
from latentguard.guard.categories import MIN_PROMPTS, fit_directions
from latentguard.guard.latent_guard import LatentGuard
from latentguard.stats.detection import auroc


@pytest.fixture(scope="module")
def backend():
    return Kinds()


@pytest.fixture(scope="module")
def guard(backend):
    return LatentGuard.fit(backend, kinds(60))


@pytest.fixture(scope="module")
def calibrated(backend, guard):
    return guard.calibrate(backend, harmless(400), max_fpr=0.05)


@pytest.fixture(scope="module")
def packed(backend, calibrated):
    return packs.add(calibrated, backend, "novel", novel(30), harmless(400, 6000))


class TestNaming:
    def test_the_planted_kind_is_named(self, backend, guard):
        test = [p for p in kinds(60, start=100) if p.harmful]
        verdicts = list(guard.scan(backend, test))
        right = [v.category == p.category for v, p in zip(verdicts, test, strict=True)]
        assert np.mean(right) > 0.9
        assert {tuple(v.category_scores) for v in verdicts} == {KINDS}
        assert all(0 <= s <= 1 for v in verdicts for s in v.category_scores.values())

    def test_scores_are_probabilities_of_equally_frequent_classes(self, backend, guard):
        test = kinds(150, start=100)
        scores = np.array([v.category_scores["arson"] for v in guard.scan(backend, test)])
        of = np.array([p.category == "arson" for p in test])
        assert auroc(of, scores) > 0.95
        assert scores[of].mean() > 0.75
        assert scores[~of].mean() < 0.25

    def test_score_and_decision_are_as_without_categories(self, backend, guard):
        plain = bare(guard)
        for one, other in zip(
            guard.scan(backend, kinds(5)), plain.scan(backend, kinds(5)), strict=True
        ):
            assert replace(one, category=None, category_scores={}) == other

    def test_too_few_of_a_kind_are_left_out(self, backend):
        prompts = kinds(3 * MIN_PROMPTS)
        prompts = [p for p in prompts if p.category != "spite"] + [
            p for p in prompts if p.category == "spite"
        ][1:]
        names = LatentGuard.fit(backend, prompts).categories.directions.names
        assert names == ("arson", "fraud")

    def test_without_categories_none_is_named(self, backend):
        guard = LatentGuard.fit(backend, labelled(30))
        (verdict,) = guard.scan(backend, ["something bad"])
        assert (verdict.category, verdict.category_scores) == (None, {})

    @pytest.mark.parametrize("probe", ["linear", "centroid"])
    def test_any_reading_and_probe(self, backend, probe, tmp_path):
        guard = LatentGuard.fit(backend, kinds(60), reading="t_post", probe=probe)
        guard.save(tmp_path)
        again = LatentGuard.load(tmp_path, backend)
        assert again.digest == guard.digest
        assert list(again.scan(backend, kinds(3))) == list(guard.scan(backend, kinds(3)))

    def test_directions_predict_folds_that_they_did_not_see(self):
        """On noise, cross-fitted log-odds separate nothing; those of the fit itself would."""
        states = noise("states", 120, 2, 40)
        rows = {"a": [n % 4 == 0 for n in range(120)]}
        fit = fit_directions(states, rows, [str(n) for n in range(120)])
        assert auroc(np.array(rows["a"]), fit.held_out[:, 0]) < 0.65
        assert auroc(np.array(rows["a"]), fit.directions(states)[:, 0].numpy()) > 0.95


@pytest.mark.parametrize("change", ["names", "packs", "scale", "width", "nan"])
def test_damaged_parts_are_not_loaded(packed, change, tmp_path):
    record, tensors = packed.to_dict()
    part = record["categories"] = json.loads(json.dumps(record["categories"]))
    if change == "names":
        part["names"] = part["names"][1:]
    elif change == "packs":
        part["packs"] = {}
    elif change == "scale":
        del part["scale"]
    elif change == "width":
        part["packs"]["novel"]["scale"]["width"] = 0.0
    else:
        tensors["categories.bias"] = torch.full_like(tensors["categories.bias"], float("nan"))
    with pytest.raises((LookupError, TypeError, ValueError)):
        LatentGuard.from_dict(record, tensors)


def test_the_table_names_what_openai_names():
    assert {name for _, names in HAZARDS.values() for name in names} <= set(MODERATION)
    codes = [code for code, _ in HAZARDS.values() if code]
    assert {f"S{n}" for n in range(1, 15)} == set(codes)
    assert moderation_names("hate") == ("hate",)
    assert moderation_names("violence/graphic") == ("violence/graphic",)
    assert moderation_names("spite") == moderation_names(None) == (OTHER,)


def test_the_contrast_set_uses_names_of_the_table():
    assert {p.category for p in load_contrast() if p.harmful} <= set(HAZARDS)
