"""A guard as columns gives the guard's own scores and beliefs."""

from dataclasses import replace

import pytest
import torch

from latentguard.data.builtin import load_contrast
from latentguard.errors import GuardError
from latentguard.guard import packs
from latentguard.guard.chunking import Chunking
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import ScoredPlan
from latentguard.guard.replies import ReplyProbe
from latentguard.integrations.vllm.columns import Columns, variant_score
from latentguard.integrations.vllm.slots import SlotScores
from latentguard.probes.probe import Probe
from latentguard.prompts import Prompt
from latentguard.states import States

ROWS = [replace(p, refused=p.harmful) for p in load_contrast("train") if p.pair][:60]


@pytest.fixture(
    scope="module",
    params=[
        ("pooled", "linear"),
        ("attended", "linear"),
        ("span", "linear"),
        ("t_inst", "centroid"),
    ],
)
def guard(model, request):
    reading, probe = request.param
    return LatentGuard.fit(model, ROWS, reading=reading, probe=probe)


def where(guard):
    """What is captured for a guard."""
    queries = guard.reading.queries
    return dict(positions=guard.positions, layers=guard.probe.layers, queries=queries)


def read_columns(guard, states):
    """What the engine would read: each column at its own position."""
    columns = Columns.of(guard)
    found = []
    for c, position in enumerate(columns.positions):
        layers = [states.select([k]).at(position)[:, 0] for k in columns.layers]
        found.append(columns(layers)[:, c])
    return torch.stack(found, 1)


def verdict_of(guard, prompt, read):
    """The verdict on a prompt from what the engine would read of each variant."""
    scores = [variant_score(guard, values) for values in read]
    return guard.combine(ScoredPlan(prompt, guard.plan(prompt)[: len(scores)], scores)).verdict


def test_columns_add_up_to_the_guards_verdicts(model, guard):
    states = States.collect(model.capture(ROWS[:12], **where(guard)))
    read = read_columns(guard, states).tolist()
    for prompt, values, theirs in zip(states.prompts, read, guard.judge(states), strict=True):
        ours = verdict_of(guard, prompt, [values])
        assert ours.score == pytest.approx(theirs.score, abs=2e-6 * guard.spread + 1e-6)
        assert ours.beliefs == pytest.approx(theirs.beliefs, abs=1e-6)
        assert (ours.flagged, ours.decision) == (theirs.flagged, theirs.decision)


def test_they_are_in_float32_where_the_engine_loads_in_bfloat16(guard):
    """vLLM sets the default dtype while it loads a model."""
    before = Columns.of(guard)
    torch.set_default_dtype(torch.bfloat16)
    try:
        columns, slots = Columns.of(guard), SlotScores(8, 2, 4, torch.device("cpu"))
        states = [torch.ones(3, columns.weight.shape[-1], dtype=torch.bfloat16)] * len(
            columns.layers
        )
        read = columns(states)
    finally:
        torch.set_default_dtype(torch.float32)
    assert columns.same_as(before)
    assert {columns.weight.dtype, read.dtype, slots._rows.dtype} == {torch.float32}


def test_unsorted_layers_are_read_in_rising_order(guard):
    probe = guard.probe
    turned = tuple(reversed(probe.layers))
    shape = (len(guard.reading.positions), len(turned), -1)
    weight = probe.weight.reshape(shape).flip(1).reshape(probe.weight.shape)
    axes = tuple(
        replace(a, layers=turned, positive=a.positive.flip(0), negative=a.negative.flip(0))
        for a in guard.axes
    )
    other = replace(guard, probe=replace(probe, layers=turned, weight=weight), axes=axes)
    assert Columns.of(other).same_as(Columns.of(guard))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_missing_gives_no_verdict(guard, value):
    width = len(Columns.of(guard).positions)
    with pytest.raises(GuardError, match="not a finite number"):
        verdict_of(guard, ROWS[0], [[value] * width])


def test_a_centroid_of_a_mean_is_refused(model):
    pooled = LatentGuard.fit(model, ROWS, reading="pooled", probe="centroid")
    with pytest.raises(GuardError, match="mean over tokens"):
        Columns.of(pooled)


def test_a_sealed_guard_is_refused(guard):
    sealed = replace(guard, reading=replace(guard.reading, name="sealed"))
    with pytest.raises(GuardError, match="pass of its own"):
        Columns.of(sealed)


def test_long_prompts_are_read_by_chunks_as_elsewhere(model, guard):
    chunking = Chunking(threshold=1.0, max_chars=60, longer_than=200)
    guard = replace(guard, chunking=chunking)
    long = Prompt(" ".join(p.text for p in ROWS[:5]), id="long")
    for prompt in (ROWS[0], long):
        texts = [variant.prompt for variant in guard.plan(prompt)]
        states = States.collect(model.capture(texts, **where(guard)))
        ours = verdict_of(guard, prompt, read_columns(guard, states).tolist())
        (theirs,) = guard.scan(model, [prompt])
        assert len(texts) > 5 if prompt is long else len(texts) == 1
        assert ours.score == pytest.approx(theirs.score, abs=1e-4)
        assert [e.start for e in ours.evidence] == [e.start for e in theirs.evidence]


def test_categories_that_only_name_stay_outside(model, guard):
    states = next(model.capture(ROWS[:1], **where(guard)))
    verdict = verdict_of(guard, ROWS[0], read_columns(guard, states).tolist())
    assert (verdict.category, verdict.category_scores) == (None, {})


def test_a_guard_with_packs_decides_on_states_and_is_refused(model, guard):
    packed = packs.with_pack(guard, "deciding", packs.capture(guard, model, ROWS))
    with pytest.raises(GuardError, match="deciding"):
        Columns.of(packed)


@pytest.mark.parametrize("layers", [(1, 2), (2, 0)])
def test_the_last_column_scores_the_tokens_of_replies_at_its_own_layers(model, guard, layers):
    width = guard.axes[0].positive.shape[-1]
    weight = torch.randn(len(layers), width, generator=torch.Generator().manual_seed(0))
    judge = ReplyProbe(Probe("linear", layers, weight, 0.3), (1.0, 0.0), 1.0, {})
    both = Columns.of(replace(guard, replies=judge))
    plain = Columns.of(guard)
    assert set(both.layers) == {*plain.layers, *layers}
    states = [torch.randn(5, width) * 9 for _ in both.layers]
    found = both(states)
    own = torch.stack([states[both.layers.index(k)] for k in layers], 1)
    assert torch.allclose(found[:, -1], torch.einsum("tld,ld->t", own, weight), atol=1e-4)
    prompts = plain([states[both.layers.index(k)] for k in plain.layers])
    assert torch.allclose(found[:, :-1], prompts, atol=1e-5)
    assert not both.same_as(plain)
    assert both.positions == plain.positions
