"""Guards that read where fitted queries look."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fake_backend import FakeBackend, labelled
from latentguard.data.builtin import load_contrast
from latentguard.errors import GuardError
from latentguard.guard import packs, query_fitting
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.query_fitting import fit_reading_queries, query_rows
from latentguard.probes import fitting
from latentguard.probes.capture_cache import CaptureCache
from latentguard.probes.fitting import fit_probe
from latentguard.probes.probe import layers_of
from latentguard.states import Reading
from latentguard.stats.detection import auroc

ROWS = [replace(p, refused=p.harmful) for p in load_contrast("train") if p.pair][:80]
OTHERS = load_contrast("test")[:40]


@pytest.fixture(scope="module")
def guard(model):
    return LatentGuard.fit(model, ROWS, reading="attended")


def scores(guard, model, prompts):
    return [verdict.score for verdict in guard.scan(model, prompts)]


def test_it_reads_eight_more_positions(guard):
    more = tuple(f"attended+{k}" for k in range(1, 9))
    assert guard.reading.positions == ("t_inst", "post", "t_post", "mean", *more)
    assert guard.reading.queries.layer == guard.probe.layers[0]


def test_it_is_the_same_guard_once_it_was_saved(guard, model, tmp_path):
    guard.save(tmp_path)
    again = LatentGuard.load(tmp_path, model)
    assert again.digest == guard.digest
    assert scores(again, model, OTHERS) == scores(guard, model, OTHERS)


def test_a_guard_without_queries_is_written_as_ever(model, tmp_path):
    LatentGuard.fit(model, ROWS).save(tmp_path)
    assert "queries" not in (tmp_path / "guard.json").read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda record, tensors: tensors.update({"queries.vectors": torch.zeros(3, 32)}),
        lambda record, tensors: tensors["queries.vectors"].fill_(torch.nan),
        lambda record, tensors: tensors.pop("queries.vectors"),
        lambda record, tensors: record.update(queries={"layer": 9}),
        lambda record, tensors: record.update(queries=None),
        lambda record, tensors: tensors.update({"queries.vectors": torch.zeros(8, 31)}),
        lambda record, tensors: tensors.update({"queries.vectors": torch.zeros(9, 32)}),
    ],
)
def test_damaged_queries_are_no_guard(guard, change):
    record, tensors = guard.to_dict()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(record, tensors)
    with pytest.raises((LookupError, ValueError, GuardError)):
        LatentGuard.from_dict(record, tensors)


def test_other_queries_are_another_guard(guard):
    queries = guard.reading.queries
    other = replace(queries, vectors=queries.vectors + 1e-3)
    changed = replace(guard, reading=replace(guard.reading, queries=other))
    assert changed.digest != guard.digest


def test_the_score_is_the_mean_of_that_of_pooled_and_that_of_the_queries(guard, model):
    states = packs.capture(guard, model, ROWS)
    pooled = fit_probe(states, Reading.of("pooled", model.post), "linear", model.depth).probe
    own = guard.probe.weight.unflatten(0, (12, -1)) * 2
    torch.testing.assert_close(own[:4].flatten(0, 1), pooled.weight)
    layers = guard.probe.layers
    read = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    is_read = torch.tensor([layer in read for layer in layers])
    assert (own[4:, ~is_read] == 0).all()
    assert (own[4:, is_read] != 0).all()


def test_pairs_stay_together_and_tokens_are_bounded(model, monkeypatch):
    assert query_rows(model, ROWS) == list(range(len(ROWS)))
    monkeypatch.setattr(query_fitting, "MAX_TOKENS", 1000)
    seen = query_rows(model, ROWS)
    others = set(range(len(ROWS))) - set(seen)
    lengths = [len(layout.instruction) for layout in model.chat(ROWS)]
    assert 900 < sum(lengths[n] for n in seen) <= 1000
    assert not {ROWS[n].pair for n in seen} & {ROWS[n].pair for n in others}


def test_rows_without_room_are_scored_by_the_network_that_never_saw_them(model, monkeypatch):
    monkeypatch.setattr(query_fitting, "MAX_TOKENS", 1000)
    where, layers = Reading.of("attended", model.post), layers_of("linear", model.depth)
    reading, attended = fit_reading_queries(model, where, ROWS, layers)
    is_new = np.isnan(attended.held_out)
    assert 0 < is_new.sum() < len(ROWS)
    states = fitting.capture(model, reading, ROWS, layers=layers)
    fit = fit_probe(states, reading, "linear", model.depth, attended=attended)
    assert np.isfinite(fit.held_out).all()


def test_what_is_said_of_scores_comes_from_networks_that_did_not_see_the_rows(guard, model):
    """Labels that mean nothing: rows that were trained on look separable, others do not."""
    drawn = np.random.default_rng(1).permutation([True, False] * (len(ROWS) // 2))
    rows = [replace(p, harmful=bool(h), pair=None) for p, h in zip(ROWS, drawn, strict=True)]
    found = LatentGuard.fit(model, rows, reading="attended")
    assert 0.2 < found.fitted["cross_validated_auroc"] < 0.75
    fresh = [replace(p, harmful=bool(n % 2), pair=None) for n, p in enumerate(OTHERS)]
    labels = np.array([p.harmful for p in fresh])
    assert abs(auroc(labels, np.array(scores(found, model, fresh))) - 0.5) < 0.25


def test_progress_counts_what_is_read_twice(model):
    counts = []
    LatentGuard.fit(model, ROWS, reading="attended", progress=counts.append)
    assert sum(counts) == 2 * len(ROWS)


def test_a_killed_fit_goes_on_from_its_states(model, tmp_path, monkeypatch):
    first = LatentGuard.fit(model, ROWS, reading="attended", cache=CaptureCache(tmp_path))
    captured = model.capture

    def none(prompts, **how):
        assert not isinstance(prompts, list) or not prompts  # the canaries come one by one
        return captured(prompts, **how)

    monkeypatch.setattr(model, "capture", none)
    again = LatentGuard.fit(model, ROWS, reading="attended", cache=CaptureCache(tmp_path))
    assert torch.equal(again.probe.weight, first.probe.weight)


def test_a_pack_is_fitted_on_what_it_reads(guard, model):
    packed = packs.with_pack(guard, "own", packs.capture(guard, model, ROWS))
    assert all(np.isfinite(scores(packed, model, OTHERS)))


def test_prompts_that_are_too_long_are_refused_in_a_sentence(model, monkeypatch):
    monkeypatch.setattr(query_fitting, "MAX_TOKENS", 20)
    with pytest.raises(GuardError, match=r"within 20 tokens.*Give more or shorter"):
        LatentGuard.fit(model, ROWS, reading="attended")


@pytest.mark.parametrize("name", ["pooled", "attended"])
def test_a_name_without_its_queries_is_no_guard(guard, model, name):
    other = guard if name == "pooled" else LatentGuard.fit(model, ROWS)
    record, tensors = other.to_dict()
    record["reading"] = {**record["reading"], "name": name}
    with pytest.raises(ValueError, match="that the reading needs"):
        LatentGuard.from_dict(record, tensors)


def test_too_few_prompts_are_refused(model):
    with pytest.raises(GuardError, match="need 10 prompts of each class"):
        LatentGuard.fit(model, labelled(9), reading="attended")


def test_the_papers_rule_has_no_such_reading(model):
    with pytest.raises(GuardError, match="has a linear probe; found 'centroid'"):
        LatentGuard.fit(model, ROWS, reading="attended", probe="centroid")


def test_a_backend_that_lets_no_tokens_out_is_refused():
    with pytest.raises(GuardError, match="expected a ChatModel, found FakeBackend"):
        LatentGuard.fit(FakeBackend(), labelled(80), reading="attended")


def test_without_queries_nothing_is_fitted(model):
    with pytest.raises(GuardError, match="needs queries"):
        fit_probe(None, Reading.of("attended", 2), "linear", 4)


def test_the_probe_of_the_queries_must_be_given(guard, model):
    states = packs.capture(guard, model, ROWS)
    with pytest.raises(GuardError, match="needs queries and their probe"):
        LatentGuard.from_states(model, states, guard.reading)
