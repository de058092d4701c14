"""A guard as columns gives the guard's own scores and beliefs."""

from dataclasses import replace

import pytest
import torch

from latentguard.data.builtin import load_contrast
from latentguard.errors import GuardError
from latentguard.guard.chunking import Windows
from latentguard.guard.latent_guard import LatentGuard
from latentguard.integrations.vllm.columns import Columns
from latentguard.integrations.vllm.protocol import readable, rows_of, verdict_of
from latentguard.prompts import Prompt
from latentguard.states import States

ROWS = [replace(p, refused=p.harmful) for p in load_contrast("train") if p.pair][:60]


@pytest.fixture(
    scope="module", params=[("pooled", "linear"), ("span", "linear"), ("t_inst", "centroid")]
)
def guard(model, request):
    reading, probe = request.param
    return LatentGuard.fit(model, ROWS, reading=reading, probe=probe)


def read_columns(guard, states):
    """What the engine would read: each column at its own position."""
    columns = Columns.of(guard)
    found = []
    for c, position in enumerate(columns.positions):
        layers = [states.select([k]).at(position)[:, 0] for k in columns.layers]
        found.append(columns(layers)[:, c])
    return torch.stack(found, 1)


def test_columns_add_up_to_the_guards_verdicts(model, guard):
    states = States.collect(
        model.capture(ROWS[:12], positions=guard.positions, layers=guard.probe.layers)
    )
    inside, read = readable(guard), read_columns(guard, states).tolist()
    for prompt, values, theirs in zip(states.prompts, read, guard.judge(states), strict=True):
        ours = verdict_of(inside, prompt, [values])
        assert ours.score == pytest.approx(theirs.score, abs=2e-6 * guard.spread + 1e-6)
        assert ours.beliefs == pytest.approx(theirs.beliefs, abs=1e-6)
        assert (ours.flagged, ours.decision) == (theirs.flagged, theirs.decision)


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


def test_parts_that_only_name_stay_outside(guard):
    class Naming:
        name, positions = "naming", ()

        def adjust(self, states, scores):
            return scores

        def judge(self, states, verdicts):
            return [replace(v, category=str(states.at("t_inst"))) for v in verdicts]

    kept = [part.name for part in readable(replace(guard, parts=(Naming(), *guard.parts))).parts]
    assert "naming" not in kept


def test_long_prompts_are_read_by_pieces_as_elsewhere(model, guard):
    guard = guard.with_part(Windows(threshold=1.0, size=60, over=200))
    long = Prompt(" ".join(p.text for p in ROWS[:5]), id="long")
    for prompt in (ROWS[0], long):
        rows = rows_of(readable(guard), prompt)
        states = States.collect(
            model.capture(rows, positions=guard.positions, layers=guard.probe.layers)
        )
        ours = verdict_of(readable(guard), prompt, read_columns(guard, states).tolist())
        (theirs,) = guard.scan(model, [prompt])
        assert len(rows) > 5 if prompt is long else len(rows) == 1
        assert ours.score == pytest.approx(theirs.score, abs=1e-4)
        assert [e.start for e in ours.evidence] == [e.start for e in theirs.evidence]


def test_a_part_that_decides_on_states_is_refused(guard):
    class Deciding:
        name, positions = "deciding", ()

        def adjust(self, states, scores):
            return scores + states.at("t_inst").sum()

    with pytest.raises(GuardError, match="deciding"):
        readable(replace(guard, parts=(Deciding(),)))
