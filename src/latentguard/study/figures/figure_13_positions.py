"""Figures 13 to 16: every position from two before t_inst to t_post (appendix F)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentguard.interventions import Intervention
from latentguard.probes.axis import Axis
from latentguard.prompts import Group
from latentguard.report.charts import Curve, lines_by_layer, to_curve
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.bootstrap import bootstrap_mean, mean_curve
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import share
from latentguard.study.axes import Axes, fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.finding import Finding, cells
from latentguard.study.judge import Answer
from latentguard.study.prompt_groups import (
    MISBEHAVING,
    PromptGroups,
    inversion_prompt,
    sample_prompts,
)
from latentguard.study.settings import Settings
from latentguard.study.steering import at_layers, best_layers, middle_layers, steer, steer_at_random

BEFORE = ("inst-2", "inst-1")
"""Positions before t_inst that are read (Figure 13)."""


STRONGEST = "flip to Certainly, t_inst minus the strongest other position"

REACH = 0.1
"""Share of answers that some direction must turn to Certainly before positions are compared."""


@dataclass(frozen=True)
class Steered:
    """Harmless prompts in the inversion task, steered towards harmful."""

    along: str
    """Position where the direction was extracted; ``random`` for a draw, empty if unsteered."""

    layer: int
    """Where; -1 if unsteered."""

    answers: tuple[Answer, ...]
    """What each of the n prompts was answered."""


@dataclass(frozen=True, eq=False)
class Records:
    """s^l at every position, and what steering with each position's direction does."""

    positions: tuple[str, ...]
    """In order; t_post is the last."""

    beliefs: Mapping[Group, NDArray[np.float64]]
    """s^l of accepted harmful and refused harmless prompts at layers 0 to L, [n p l]."""

    steered: tuple[Steered, ...]
    """The inversion task (Figure 16)."""

    norms: tuple[float, ...]
    """Length of each position's direction over that of t_inst, mean over the steered layers."""

    note: str
    """What the centroids were fitted on."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Fit centroids at each position, place the tested prompts, and steer with each direction."""
    positions = (*BEFORE, *model.span)
    axes = fit_axes(model, prompt_groups, enough=settings.enough)
    fitted = _fit(model, prompt_groups, axes, positions)
    beliefs = {}
    for group in MISBEHAVING:
        if prompts := prompt_groups.test_prompts(group):
            states = model.states(prompts, positions=positions, what="states: every position")
            parts = [fitted[at].layer_beliefs(states.at(at)).double().numpy() for at in positions]
            beliefs[group] = np.stack(parts, 1)
    layers = settings.probed_layers(model.depth)
    norms = np.array([[float(fitted[at].direction[n].norm()) for n in layers] for at in positions])
    relative = (norms / norms[positions.index("t_inst")].clip(1e-12)).mean(1)
    steered = tuple(_steer(model, prompt_groups, settings, fitted))
    return Records(positions, beliefs, steered, tuple(map(float, relative)), axes.note)


def analyse(records: Records, settings: Settings) -> Finding:
    """Place both groups at each position, and compare the answers under steering."""
    means = {group: _middle(s, settings) for group, s in records.beliefs.items()}
    parts: list[Table | Figure] = []
    if means:
        parts += [_by_position(records, means), _places(records, means), _by_layer(records)]
    effects = {}
    if records.steered:
        parts += [_answers_figure(records), _answers_table(records)]
        if len(records.steered[0].answers) >= settings.enough and _reach(records) >= REACH:
            effects["flip to Certainly, t_inst minus other positions"] = _advantage(records)
            effects[STRONGEST] = _over_strongest(records)
    return Finding(_section(parts), effects, _caveats(records, settings))


def _fit(
    model: CachedModel, prompt_groups: PromptGroups, axes: Axes, positions: tuple[str, ...]
) -> dict[str, Axis]:
    """Equation 2's centroids at each position, from the groups that the axes were fitted on."""
    poles = dict(positive="refused_harmful", negative="accepted_harmless")
    if axes.refuse is None:
        poles = dict(positive="harmful", negative="harmless")
    every = [p for group in prompt_groups.fit.values() for p in group]
    states = model.states(every, positions=positions, what="centroids: every position")
    return {at: Axis.fit(states, at, name=at, **poles) for at in positions}


def _steer(
    model: CachedModel, prompt_groups: PromptGroups, settings: Settings, fitted: Mapping[str, Axis]
) -> Iterator[Steered]:
    usual = prompt_groups.test_prompts("accepted_harmless")
    every = [p for group in prompt_groups.test.values() for p in group if p.harmful is False]
    chosen = usual if len(usual) >= settings.enough else every
    prompts = [
        inversion_prompt(p) for p in sample_prompts(chosen, settings.inverted, seed=settings.seed)
    ]
    many = settings.inversion_coefficient
    how: list[Intervention | None] = [None]
    for layer in settings.probed_layers(model.depth):
        for at, axis in fitted.items():
            how.append(steer(axis, layer, many, tokens="before", label=at))
        for draw in range(settings.random_draws):
            chance = steer_at_random(
                fitted["t_inst"], layer, many, tokens="before", label="random", draw=draw
            )
            how.append(chance)
    if prompts:
        replies = model.replies(
            prompts, how, what="Figure 16: steering", max_new_tokens=settings.inversion_tokens
        )
        for one, said in zip(how, replies, strict=True):
            place = (one.label, one.layer) if one else ("", -1)
            yield Steered(*place, tuple(map(model.answer, said)))


def _middle(s: NDArray[np.float64], settings: Settings) -> list[Estimate]:
    """Mean of s over the middle layers at each position."""
    band = middle_layers(s.shape[2] - 1, settings.middle, of=settings.middle_of)
    return mean_curve(s[:, :, band].mean(2))


def _by_position(records: Records, means: Mapping[Group, list[Estimate]]) -> Figure:
    curves = {_named(records, group): to_curve(found) for group, found in means.items()}
    caption = (
        "A position encodes harmfulness if accepted harmful prompts lie above the dashed line and "
        "refused harmless ones below it. The paper finds that of t_inst alone. Bands: 95 %, "
        f"bootstrap over prompts. {records.note}."
    )
    title = "s over the middle layers, by position"
    return lines_by_layer(
        curves, records.positions, title=title, y="s", caption=caption, x="position", zero=True
    )


def _places(records: Records, means: Mapping[Group, list[Estimate]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for slot, position in enumerate(records.positions):
        found = [means[group][slot] if group in means else None for group in MISBEHAVING]
        both = [cells(one) if one else (None, None, None, 0) for one in found]
        rows.append((position, *both[0], *both[1], _verdict(*found)))
    heads = [(f"{g.replace('_', ' ')}: s", "low", "high", "n") for g in MISBEHAVING]
    note = (
        "Harmfulness: yes if both intervals lie on its side (accepted harmful above 0, refused "
        "harmless below), no if one lies on the other side."
    )
    columns = ("position", *heads[0], *heads[1], "harmfulness")
    return Table("Clusters at every position", columns, tuple(rows), note)


def _verdict(harmful: Estimate | None, harmless: Estimate | None) -> str:
    if harmful is None or harmless is None:
        return "unclear"
    if harmful.high < 0 or harmless.low > 0:
        return "no"
    return "yes" if harmful.low > 0 and harmless.high < 0 else "unclear"


def _by_layer(records: Records) -> Figure:
    """A panel for each position, with both groups by layer."""
    curves: dict[str, Curve] = {}
    panels: dict[str, list[str]] = {}
    for slot, position in enumerate(records.positions):
        for group, s in records.beliefs.items():
            name = f"{group.replace('_', ' ')}, {position}"
            curves[name] = to_curve(mean_curve(s[:, slot, 1:]))
            panels.setdefault(position, []).append(name)
    counts = " and ".join(
        f"{len(s)} {group.replace('_', ' ')}" for group, s in records.beliefs.items()
    )
    caption = (
        f"Mean of {counts} prompts. Above the dashed line they are nearer to the refused harmful "
        "prompts. A position encodes harmfulness where the two curves lie on either side. Bands: "
        "95 %, bootstrap over prompts."
    )
    depth = next(iter(records.beliefs.values())).shape[2]
    return lines_by_layer(
        curves,
        range(1, depth),
        title="s by layer at every position",
        y="s",
        caption=caption,
        zero=True,
        panels=panels,
    )


def _certainly(records: Records, along: str, layer: int | None = None) -> NDArray[np.bool_]:
    """Whether each prompt was answered so, for each layer and draw that is meant, [draws n]."""
    found = [
        [one == "certainly" for one in steered.answers]
        for steered in records.steered
        if steered.along == along and layer in (None, steered.layer)
    ]
    return np.array(found, dtype=bool)


def _layers(records: Records) -> list[int]:
    return sorted({one.layer for one in records.steered} - {-1})


def _answers_figure(records: Records) -> Figure:
    layers = _layers(records)
    curves = {}
    for along in (*records.positions, "random"):
        curves[along] = to_curve([share(_certainly(records, along, layer)) for layer in layers])
    base, n = _certainly(records, "").mean(), len(records.steered[0].answers)
    caption = (
        f"Share of {n} harmless prompts judged harmful ('Certainly') when they are steered along "
        f"the direction of each position. Unsteered: {base:.2f}. Grey: random directions as long "
        "as that of t_inst. Bands: 95 %."
    )
    title = "Steering with the direction of each position"
    panels = {at: (at, "random") for at in records.positions}
    return lines_by_layer(
        curves, layers, title=title, y="Certainly", caption=caption, panels=panels
    )


def _answers_table(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    norms = dict(zip(records.positions, records.norms, strict=True)) | {"random": 1.0}
    for along in ("", *records.positions, "random"):
        said = [a for one in records.steered if one.along == along for a in one.answers]
        shares = [said.count(a) / len(said) for a in ("no", "refusal", "other") if said]
        rate = share(_certainly(records, along))
        rows.append((along or "unsteered", norms.get(along), *cells(rate), *shares))
    note = (
        f"Mean over layers {', '.join(map(str, _layers(records)))}; the interval is over prompts. "
        "Each direction is added at its own length, as in the paper: where it is longer, it does "
        "more for that reason alone. The paper finds t_inst strongest."
    )
    outcomes = ("Certainly", "low", "high", "n", "No", "refusal", "other")
    columns = ("direction from", "length, of t_inst's", *outcomes)
    return Table("Answers by position of the direction", columns, tuple(rows), note)


def _advantage(records: Records) -> Estimate:
    """'Certainly' with the direction of t_inst, less the mean over the other positions."""
    rates = {at: _certainly(records, at).mean(0) for at in records.positions}
    gap = rates["t_inst"] - np.mean([rates[at] for at in rates if at != "t_inst"], 0)
    return bootstrap_mean(gap)


def _over_strongest(records: Records) -> Estimate:
    """The same less the strongest other position, which is chosen on the other half of prompts."""
    others = [at for at in records.positions if at != "t_inst"]
    rates = np.stack([_certainly(records, at).mean(0) for at in others])
    strongest = at_layers(rates[None], best_layers(rates))[0]
    return bootstrap_mean(_certainly(records, "t_inst").mean(0) - strongest)


def _reach(records: Records) -> float:
    """Most answers that the direction of any position turns to 'Certainly' at any layer."""
    rates = [
        _certainly(records, at, layer).mean()
        for at in records.positions
        for layer in _layers(records)
    ]
    return float(max(rates) - _certainly(records, "").mean())


def _named(records: Records, group: Group) -> str:
    return f"{group.replace('_', ' ')} (n = {len(records.beliefs[group])})"


def _caveats(records: Records, settings: Settings) -> tuple[str, ...]:
    lines = []
    for group in MISBEHAVING:
        count = len(records.beliefs.get(group, ()))
        if count < settings.enough:
            name = group.replace("_", " ")
            lines.append(f"Figure 14: {count} {name} prompts are too few to place them.")
    count = len(records.steered[0].answers) if records.steered else 0
    if count < settings.enough:
        lines.append(f"Figure 16: {count} harmless prompts are too few to steer.")
    elif _reach(records) < REACH:
        few = f"no direction turns {REACH:.0%} of {count} answers to 'Certainly'"
        lines.append(f"Figure 16: {few}; positions cannot be compared.")
    return tuple(lines)


def _section(parts: list[Table | Figure]) -> Section:
    text = (
        "Positions from two tokens before t_inst to t_post, each with its own centroids. inst-1 is "
        "the token before t_inst, post+1 the first after it."
    )
    return Section("Figures 13 to 16: more token positions", text, tuple(parts))
