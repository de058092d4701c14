"""Figures 13 to 16: every position from two before t_inst to t_post (appendix F).

Where a model thinks, two positions of its own reply follow; the paper has no such model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from latentguard.interventions import Intervention
from latentguard.probes.axis import GROUPS, Axis
from latentguard.prompts import Group
from latentguard.report.charts import SHARE, Curve, lines_by_layer, to_curve
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.states import States
from latentguard.stats.bootstrap import bootstrap_mean, mean_curve
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import rate_difference, share
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


Beliefs = NDArray[np.float64]
"""s^l of n prompts at layers 0 to L, [n l]."""


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

    beliefs: Mapping[Group, Mapping[str, Beliefs]]
    """s^l of accepted harmful and refused harmless prompts at each position; at those of the
    thinking, of the prompts whose reply thinks to its end."""

    steered: tuple[Steered, ...]
    """The inversion task (Figure 16)."""

    norms: tuple[float, ...]
    """Length of each position's direction over that of t_inst, mean over the steered layers."""

    note: str
    """What the centroids were fitted on."""

    thinking: Mapping[str, int] = field(default_factory=dict)
    """How many prompts, fitted and tested, have a reply that thinks to its end; none is counted
    where the model's template knows of no thinking."""

    @property
    def places(self) -> tuple[str, ...]:
        """Where prompts are placed: the positions, and those of the thinking if enough have any."""
        return tuple(next(iter(self.beliefs.values()), self.positions))


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Fit centroids at each position, place the tested prompts, and steer with each direction."""
    positions = (*BEFORE, *model.span)
    axes = fit_axes(model, prompt_groups, enough=settings.enough)
    every = [p for group in prompt_groups.fit.values() for p in group]
    states = model.states(every, positions=positions, what="centroids: every position")
    fitted = _fit(states, axes)
    beliefs = {}
    for group in MISBEHAVING:
        if prompts := prompt_groups.test_prompts(group):
            states = model.states(prompts, positions=positions, what="states: every position")
            beliefs[group] = _place(states, fitted)
    thinking = _thinking(model, prompt_groups, axes, settings)
    for group, placed in thinking.beliefs.items():
        beliefs[group] |= placed
    layers = settings.probed_layers(model.depth)
    norms = np.array([[float(fitted[at].direction[n].norm()) for n in layers] for at in positions])
    relative = (norms / norms[positions.index("t_inst")].clip(1e-12)).mean(1)
    steered = tuple(_steer(model, prompt_groups, settings, fitted))
    lengths = tuple(map(float, relative))
    return Records(positions, beliefs, steered, lengths, axes.note, thinking.counts)


def _fit(states: States, axes: Axes) -> dict[str, Axis]:
    """Equation 2's centroids at each position, from the groups that the axes were fitted on."""
    poles = _poles(axes)
    return {at: Axis.fit(states, at, name=at, **poles) for at in states.positions}


def _poles(axes: Axes) -> dict[str, str]:
    """The two groups that the axes were fitted on."""
    if axes.refuse is None:
        return dict(positive="harmful", negative="harmless")
    return dict(positive="refused_harmful", negative="accepted_harmless")


def _place(states: States, fitted: Mapping[str, Axis]) -> dict[str, Beliefs]:
    """s^l of some prompts at each position."""
    return {at: one.layer_beliefs(states.at(at)).double().numpy() for at, one in fitted.items()}


@dataclass(frozen=True)
class Thinking:
    """What is read where the thinking of the model's own replies ends."""

    beliefs: Mapping[Group, Mapping[str, Beliefs]]
    """s^l of the tested prompts at both positions; of no group if ``counts`` are too few."""

    counts: Mapping[str, int]
    """As in ``Records``."""


def _thinking(
    model: CachedModel, prompt_groups: PromptGroups, axes: Axes, settings: Settings
) -> Thinking:
    """Fit centroids at both positions of the thinking, and place the tested prompts there."""
    if not model.may_think:
        return Thinking({}, {})
    fit = [p for group in prompt_groups.fit.values() for p in group]
    states = model.thinking_states(fit, max_new_tokens=settings.reply_tokens)
    counts = {
        f"fitted {pole.replace('_', ' ')}": len(states.where(GROUPS[pole]))
        for pole in _poles(axes).values()
    }
    tested = {}
    for group in MISBEHAVING:
        if prompts := prompt_groups.test_prompts(group):
            tested[group] = model.thinking_states(prompts, max_new_tokens=settings.reply_tokens)
            counts[f"tested {group.replace('_', ' ')}"] = len(tested[group])
    if min(counts.values()) < settings.enough:
        return Thinking({}, counts)
    fitted = _fit(states, axes)
    return Thinking({group: _place(of, fitted) for group, of in tested.items()}, counts)


def analyse(records: Records, settings: Settings) -> Finding:
    """Place both groups at each position, and compare the answers under steering."""
    means = {group: _middle(placed, settings) for group, placed in records.beliefs.items()}
    parts: list[Table | Figure] = []
    if means:
        parts += [_by_position(records, means), _places(records, means), _by_layer(records)]
    effects = {}
    if records.steered:
        parts += [_answers_figure(records), _answers_table(records)]
        if len(records.steered[0].answers) >= settings.enough and _reach(records) >= REACH:
            effects["flip to Certainly, t_inst minus other positions"] = _advantage(records)
            effects[STRONGEST] = _over_strongest(records)
    return Finding(_section(records, parts), effects, _caveats(records, settings))


def _steer(
    model: CachedModel, prompt_groups: PromptGroups, settings: Settings, fitted: Mapping[str, Axis]
) -> Iterator[Steered]:
    usual = prompt_groups.test_prompts("accepted_harmless")
    every = [p for group in prompt_groups.test.values() for p in group if p.harmful is False]
    members = usual if len(usual) >= settings.enough else every
    prompts = [
        inversion_prompt(p) for p in sample_prompts(members, settings.inverted, seed=settings.seed)
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
        for one, way_replies in zip(how, replies, strict=True):
            place = (one.label, one.layer) if one else ("", -1)
            yield Steered(*place, tuple(map(model.answer, way_replies)))


def _middle(placed: Mapping[str, Beliefs], settings: Settings) -> dict[str, Estimate]:
    """Mean of s over the middle layers at each position."""
    depth = next(iter(placed.values())).shape[1] - 1
    band = middle_layers(depth, settings.middle, of=settings.middle_of)
    return {at: bootstrap_mean(s[:, band].mean(1)) for at, s in placed.items()}


def _by_position(records: Records, means: Mapping[Group, Mapping[str, Estimate]]) -> Figure:
    curves = {
        _group_label(records, g): to_curve(list(estimates.values()))
        for g, estimates in means.items()
    }
    caption = (
        "A position encodes harmfulness if accepted harmful prompts lie above the dashed line and "
        "refused harmless ones below it. The paper finds that of t_inst alone. Bands: 95 %, "
        f"bootstrap over prompts. {records.note}."
    )
    title = "s over the middle layers, by position"
    return lines_by_layer(
        curves,
        records.places,
        title=title,
        y="cluster score s",
        caption=caption,
        x="position",
        zero=True,
    )


def _places(records: Records, means: Mapping[Group, Mapping[str, Estimate]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for position in records.places:
        estimates = [means[group][position] if group in means else None for group in MISBEHAVING]
        both = [cells(one) if one else (None, None, None, 0) for one in estimates]
        rows.append((position, *both[0], *both[1], _verdict(*estimates)))
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
    for position in records.places:
        for group, placed in records.beliefs.items():
            name = f"{group.replace('_', ' ')}, {position}"
            curves[name] = to_curve(mean_curve(placed[position][:, 1:]))
            panels.setdefault(position, []).append(name)
    counts = " and ".join(
        f"{_count(records, group)} {group.replace('_', ' ')}" for group in records.beliefs
    )
    caption = (
        f"Mean of {counts} prompts. Above the dashed line they are nearer to the refused harmful "
        "prompts. A position encodes harmfulness where the two curves lie on either side. Bands: "
        "95 %, bootstrap over prompts."
    )
    depth = next(iter(records.beliefs.values()))["t_inst"].shape[1]
    return lines_by_layer(
        curves,
        range(1, depth),
        title="s by layer at every position",
        y="cluster score s",
        caption=caption,
        zero=True,
        panels=panels,
    )


def _certainly(records: Records, along: str, layer: int | None = None) -> NDArray[np.bool_]:
    """Whether each prompt was answered so, for each layer and draw that is meant, [draws n]."""
    sentences = [
        [one == "certainly" for one in steered.answers]
        for steered in records.steered
        if steered.along == along and layer in (None, steered.layer)
    ]
    return np.array(sentences, dtype=bool)


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
        curves,
        layers,
        title=title,
        y="answered 'Certainly'",
        caption=caption,
        limits=SHARE,
        panels=panels,
    )


def _answers_table(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    norms = dict(zip(records.positions, records.norms, strict=True)) | {"random": 1.0}
    for along in ("", *records.positions, "random"):
        answers = [a for one in records.steered if one.along == along for a in one.answers]
        shares = [answers.count(a) / len(answers) for a in ("no", "refusal", "other") if answers]
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
    others = np.mean([rates[at] for at in rates if at != "t_inst"], 0)
    return rate_difference(rates["t_inst"], others)


def _over_strongest(records: Records) -> Estimate:
    """The same less the strongest other position, which is chosen on the other half of prompts."""
    others = [at for at in records.positions if at != "t_inst"]
    rates = np.stack([_certainly(records, at).mean(0) for at in others])
    strongest = at_layers(rates[None], best_layers(rates))[0]
    return rate_difference(_certainly(records, "t_inst").mean(0), strongest)


def _reach(records: Records) -> float:
    """Most answers that the direction of any position turns to 'Certainly' at any layer."""
    rates = [
        _certainly(records, at, layer).mean()
        for at in records.positions
        for layer in _layers(records)
    ]
    return float(max(rates) - _certainly(records, "").mean())


def _group_label(records: Records, group: Group) -> str:
    return f"{group.replace('_', ' ')} (n = {_count(records, group)})"


def _count(records: Records, group: Group) -> int:
    """Tested prompts of a group; fewer of them may think to the end."""
    return len(records.beliefs[group]["t_inst"]) if group in records.beliefs else 0


def _caveats(records: Records, settings: Settings) -> tuple[str, ...]:
    lines = []
    for group in MISBEHAVING:
        count = _count(records, group)
        if count < settings.enough:
            name = group.replace("_", " ")
            lines.append(f"Figure 14: {count} {name} prompts are too few to place them.")
    count = len(records.steered[0].answers) if records.steered else 0
    if count < settings.enough:
        lines.append(f"Figure 16: {count} harmless prompts are too few to steer.")
    elif _reach(records) < REACH:
        few = f"no direction turns {REACH:.0%} of {count} answers to 'Certainly'"
        lines.append(f"Figure 16: {few}; positions cannot be compared.")
    if records.thinking and min(records.thinking.values()) < settings.enough:
        counts = ", ".join(f"{count} {name}" for name, count in records.thinking.items())
        lines.append(
            f"Thinking: too few replies think to the end to read it ({counts}); set 'reply_tokens' "
            f"above {settings.reply_tokens}."
        )
    return tuple(lines)


def _section(records: Records, parts: list[Table | Figure]) -> Section:
    text = (
        "Positions from two tokens before t_inst to t_post, each with its own centroids. inst-1 is "
        "the token before t_inst, post+1 the first after it."
    )
    if len(records.places) > len(records.positions):
        text += (
            " The model thinks before it answers. 'last thought' is the last token inside the "
            "thinking of its own reply, 'after thinking' the first token behind it. Their "
            "centroids are of the prompts whose reply thinks to its end; the table has their n."
        )
    return Section("Figures 13 to 16: more token positions", text, tuple(parts))
