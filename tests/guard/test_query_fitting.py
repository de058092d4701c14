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
from latentguard.guard.query_fitting import query_rows, within_tokens
from latentguard.probes.capture_cache import CaptureCache
from latentguard.probes.fitting import fit_probe
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


def test_pairs_stay_together_and_half_are_not_seen_by_the_queries():
    seen = query_rows(ROWS)
    unseen = set(range(len(ROWS))) - set(seen)
    assert 0.4 * len(ROWS) < len(seen) == len(set(seen)) <= 0.5 * len(ROWS)
    assert not {ROWS[n].pair for n in seen} & {ROWS[n].pair for n in unseen}


def test_twenty_of_each_class_suffice_and_nineteen_do_not(model):
    rows = labelled(20)
    harmful = [bool(rows[n].harmful) for n in query_rows(rows)]
    assert (harmful.count(True), harmful.count(False)) == (10, 10)
    with pytest.raises(GuardError, match=r"at least 20 prompts of each class.*found 19 harmful"):
        query_rows([p for p in rows if p.harmful][1:] + [p for p in rows if not p.harmful])


def test_rows_and_tokens_are_bounded(model, monkeypatch):
    monkeypatch.setattr(query_fitting, "MAX_ROWS", 30)
    assert len(query_rows(ROWS)) == 30
    monkeypatch.setattr(query_fitting, "MAX_TOKENS", 100)
    monkeypatch.setattr(query_fitting, "FEWEST", 1)
    kept = within_tokens(model, ROWS, query_rows(ROWS))
    assert kept == query_rows(ROWS)[: len(kept)]
    assert 0 < sum(len(layout.instruction) for layout in model.chat([ROWS[n] for n in kept])) <= 100


def test_what_is_said_of_scores_comes_from_rows_that_the_queries_did_not_see(guard, model):
    """Labels that mean nothing: the rows that the queries saw look separable, the others do not."""
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
    assert sum(counts) == len(ROWS) + len(query_rows(ROWS))


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
    with pytest.raises(GuardError, match=r"within 20 tokens.*Give shorter"):
        LatentGuard.fit(model, ROWS, reading="attended")


@pytest.mark.parametrize("name", ["pooled", "attended"])
def test_a_name_without_its_queries_is_no_guard(guard, model, name):
    other = guard if name == "pooled" else LatentGuard.fit(model, ROWS)
    record, tensors = other.to_dict()
    record["reading"] = {**record["reading"], "name": name}
    with pytest.raises(ValueError, match="that the reading needs"):
        LatentGuard.from_dict(record, tensors)


def test_too_few_prompts_are_refused(model):
    with pytest.raises(GuardError, match="at least 20 prompts of each class"):
        LatentGuard.fit(model, ROWS[:30], reading="attended")


def test_a_backend_that_lets_no_tokens_out_is_refused():
    with pytest.raises(GuardError, match="expected a ChatModel, found FakeBackend"):
        LatentGuard.fit(FakeBackend(), labelled(80), reading="attended")


def test_without_queries_nothing_is_fitted(model):
    with pytest.raises(GuardError, match="needs queries"):
        fit_probe(None, Reading.of("attended", 2), "linear", 4)


def test_the_rows_that_queries_have_not_seen_must_be_named(guard, model):
    states = packs.capture(guard, model, ROWS)
    with pytest.raises(GuardError, match="expected unseen_rows"):
        LatentGuard.from_states(model, states, guard.reading)
