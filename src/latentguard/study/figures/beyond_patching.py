"""Beyond the paper: does refusal read harm at t_inst? Activation patching by layer and position.

States of a refused harmful prompt take the place of an accepted harmless prompt's own at one layer
and one position, and the other way round. If refusal at t_post reads harm from t_inst, a patch at
t_inst carries refusal over in the layers before it is read, and a patch at t_post in those after.

Axis names in shapes: l layers, p places, n pairs of prompts, m judged pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from latentguard.interventions import Edit, Patch
from latentguard.prompts import Group, Prompt
from latentguard.report.charts import SHARE_OF_GAP, heat_map, lines_by_layer, to_curve
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.bootstrap import weighted_bootstrap
from latentguard.stats.estimate import Estimate
from latentguard.study.cached_model import CachedModel
from latentguard.study.figures.figure_13_positions import BEFORE
from latentguard.study.finding import Finding, cells
from latentguard.study.prompt_groups import BEHAVING, PromptGroups, sample_prompts
from latentguard.study.refusal_odds import (
    JUDGED,
    TELLS,
    Openings,
    few_or_vague,
    find_openings,
    rate_text,
    refusal_odds,
)
from latentguard.study.settings import Settings
from latentguard.study.steering import at_layers, best_layers, random_like

Array = NDArray[np.float64]

BEHIND = "all behind t_inst"
"""The place of every position behind t_inst together."""

PATCH = "patch"
OWN = "chance: another prompt of its own group"
RANDOM = "random direction, equal norm"
ACCEPTED = "accepted harmful instead of refused"
"""Where the states come from that are put in a prompt's place:

- ``PATCH``: the other group's prompt of the pair.
- ``OWN``: another prompt of the patched prompt's own group. What any patch does.
- ``RANDOM``: the prompt's own states and a random vector as long as the difference of the pair.
- ``ACCEPTED``: a harmful prompt that the model accepts. Harm without refusal. Where there are
  fewer than pairs, they take turns.

The last two are tried where curves are drawn.
"""

DIRECTIONS: tuple[tuple[Group, Group], ...] = (
    BEHAVING,
    (BEHAVING[1], BEHAVING[0]),
)
"""Group that states come from, group that is patched."""

CURVES = ("t_inst", BEHIND, "t_post")
"""Places whose curves are drawn."""

JUDGED_PLACES = ("t_inst", "t_post")


@dataclass(frozen=True, eq=False)
class Direction:
    """Patches from one group into another."""

    source: Group
    """Where states come from."""

    target: Group
    """Whose run is patched."""

    ids: tuple[str, ...]
    """The n patched prompts."""

    unpatched: Array
    """Log-odds of refusal of the patched prompts as they are, [n]."""

    aim: Array
    """The same of the prompts that states come from, [n]."""

    odds: Mapping[str, Array]
    """Log-odds under patches from each kind of source, [l p n]; nan at places not tried."""

    judged_layers: tuple[int, ...]
    """Layers at which replies are judged."""

    refused: Array
    """Whether patched prompts are refused, [l 2 m], at ``JUDGED_PLACES``; nan if unclear."""

    refused_unpatched: Array
    """The same of the prompts as they are, [m]."""

    @property
    def name(self) -> str:
        """Such as ``refused harmful into accepted harmless``."""
        return f"{self.source} into {self.target}".replace("_", " ")

    def shift(self, kind: str) -> Array:
        """How far the log-odds move, [l p n]."""
        shift: Array = self.odds[kind] - self.unpatched
        return shift

    @property
    def gap(self) -> Array:
        """How far they lie apart, [n]."""
        gap: Array = self.aim - self.unpatched
        return gap


@dataclass(frozen=True, eq=False)
class Records:
    """What patches do to refusal."""

    layers: tuple[int, ...]
    """Where patches are put, one layer at a time."""

    places: tuple[str, ...]
    """Positions, and ``BEHIND``."""

    directions: tuple[Direction, ...]
    """Both ways."""

    openings: Openings
    """What refusal is read from."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Patch pairs of prompts at every place and layer, both ways."""
    openings = find_openings(model, prompt_groups, settings)
    places = (*BEFORE, *model.span, BEHIND)
    layers = settings.layers(model.depth)
    directions = tuple(
        _patch_pairs(model, prompt_groups, settings, openings, groups) for groups in DIRECTIONS
    )
    return Records(layers, places, tuple(filter(None, directions)), openings)


def _patch_pairs(
    model: CachedModel,
    prompt_groups: PromptGroups,
    settings: Settings,
    openings: Openings,
    groups: tuple[Group, Group],
) -> Direction | None:
    """Patches from one group into another; None if one of the groups is empty."""
    sources, targets = (_sample(prompt_groups, group, settings) for group in groups)
    n = min(len(sources), len(targets))
    if not n:
        return None
    sources, targets = sources[:n], targets[:n]
    sources_by_kind = {PATCH: sources, OWN: [*targets[1:], targets[0]]}
    accepted = _sample(prompt_groups, "accepted_harmful", settings)
    if groups[0] == "refused_harmful" and len(accepted) >= settings.enough:
        sources_by_kind[ACCEPTED] = [accepted[row % len(accepted)] for row in range(n)]
    maker = _Patches(model, targets, sources_by_kind)
    title = f"patching: {groups[0]}".replace("_", " ")
    layers = settings.layers(model.depth)
    odds = _odds(model, maker, layers, openings.words, what=title)
    (unpatched,) = refusal_odds(model, targets, [None], openings.words, what=title)
    (aim,) = refusal_odds(model, sources, [None], openings.words, what=title)
    probed = settings.probed_layers(model.depth)
    refused = _judge(model, maker, targets[:JUDGED], probed, settings)
    return Direction(
        *groups,
        tuple(p.id for p in targets),
        unpatched,
        aim,
        odds,
        probed,
        refused[1:].reshape(len(probed), len(JUDGED_PLACES), -1),
        refused[0],
    )


def _odds(
    model: CachedModel, maker: _Patches, layers: Sequence[int], words: Sequence[str], *, what: str
) -> dict[str, Array]:
    """Log-odds under patches from each kind of source, [l p n]; nan at places not tried."""
    trials = [
        (layer, place, kind)
        for layer in range(len(layers))
        for place in range(len(maker.places))
        for kind in maker.kinds
        if kind in (PATCH, OWN) or maker.places[place] in CURVES
    ]
    edits = [maker.patch(kind, layers[at], maker.places[place]) for at, place, kind in trials]
    odds_by_trial = refusal_odds(model, maker.targets, edits, words, what=what)
    shape = (len(layers), len(maker.places), len(maker.targets))
    odds = {kind: np.full(shape, np.nan) for kind in maker.kinds}
    for (at, place, kind), row in zip(trials, odds_by_trial, strict=True):
        odds[kind][at, place] = row
    return odds


def _sample(prompt_groups: PromptGroups, group: Group, settings: Settings) -> list[Prompt]:
    """Test prompts of a group that are long enough to have the positions before t_inst."""
    prompts = [p for p in prompt_groups.test_prompts(group) if len(p.text.split()) > len(BEFORE)]
    return sample_prompts(prompts, settings.interventions, seed=settings.seed)


def _judge(
    model: CachedModel,
    maker: _Patches,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    settings: Settings,
) -> Array:
    """Whether replies are refusals, unpatched and at each layer and judged place, [1 + l 2, m]."""
    edits: list[Edit | None] = [None]
    edits += [maker.patch(PATCH, layer, place) for layer in layers for place in JUDGED_PLACES]
    replies = model.replies(
        prompts, edits, what="patching: replies", max_new_tokens=settings.reply_tokens
    )
    return np.array([model.refused(of) for of in replies], dtype=float)


class _Patches:
    """Makes patches of some prompts from states of others."""

    def __init__(
        self, model: CachedModel, targets: Sequence[Prompt], given: Mapping[str, Sequence[Prompt]]
    ) -> None:
        self.targets = tuple(targets)
        self.kinds = (*given, RANDOM)
        positions = (*BEFORE, *model.span)
        self.places = (*positions, BEHIND)
        self._behind = model.span[1:]
        self._positions = positions
        self._own = self._states(model, targets)
        self._given = {kind: self._states(model, of) for kind, of in given.items()}

    def _states(self, model: CachedModel, prompts: Sequence[Prompt]) -> Float[Tensor, "n p l d"]:
        states = model.states(prompts, positions=self._positions, what="states: patching")
        return states.values.float()

    def patch(self, kind: str, layer: int, place: str) -> Patch:
        """Put states of a kind in place at one layer."""
        positions = self._behind if place == BEHIND else (place,)
        slots = [self._positions.index(position) for position in positions]
        own = self._own[:, slots, layer]
        states = self._given[PATCH if kind == RANDOM else kind][:, slots, layer]
        if kind == RANDOM:
            states = own + _random_like(states - own)
        states_by_prompt = dict(zip(self.targets, states, strict=True))
        return Patch(layer, positions, states_by_prompt, label=kind)


def _random_like(differences: Float[Tensor, "n p d"]) -> Float[Tensor, "n p d"]:
    """A random vector of equal norm for each, the same for a pair and a slot at every layer."""
    rows = [
        torch.stack([random_like(one, 100 * n + slot) for slot, one in enumerate(pair)])
        for n, pair in enumerate(differences)
    ]
    return torch.stack(rows)


def analyse(records: Records, settings: Settings) -> Finding:
    """What share of the gap between the groups a patch carries over."""
    parts: list[Table | Figure] = []
    effects: dict[str, Estimate] = {}
    sentences: list[str] = []
    for direction in records.directions:
        parts += [_map(records, direction), _curves(records, direction)]
    if records.directions:
        parts += [_best_table(records), _by_layer(records)]
    for direction in records.directions:
        if len(direction.ids) >= settings.enough and records.openings.tells > TELLS:
            effects |= dict(_effects(records, direction))
            sentences.append(_sentence(records, direction))
    return Finding(_section(records, sentences, parts), effects, _caveats(records, settings))


def carried(shift: Array, gap: Array) -> Estimate:
    """Share of the gap that is carried over: mean move over mean gap, pairs drawn again."""
    return weighted_bootstrap(lambda w: (w @ shift) / (w @ gap), len(gap))


def _best(records: Records, direction: Direction, place: str) -> dict[str, Estimate]:
    """Each kind's share at the layer that is best for a patch on the other half of the pairs."""
    slot = records.places.index(place)
    gap = direction.gap
    picks = best_layers(direction.shift(PATCH)[:, slot] / gap.mean())
    shares = {}
    for kind in direction.odds:
        shift = at_layers(direction.shift(kind)[:, slot][None], picks)[0]
        if not np.isnan(shift).any():
            shares[kind] = carried(shift, gap)
    own = at_layers(direction.shift(OWN)[:, slot][None], picks)[0]
    patched = at_layers(direction.shift(PATCH)[:, slot][None], picks)[0]
    return shares | {"beyond": carried(patched - own, gap)}


def _effects(records: Records, direction: Direction) -> Iterator[tuple[str, Estimate]]:
    for place in ("t_inst", "t_post", "inst-1"):
        yield f"carried at {place}: {direction.name}", _best(records, direction, place)["beyond"]


def _mean_shares(records: Records, direction: Direction, place: str) -> Array:
    """Mean share carried over by layer, [l]."""
    shift = direction.shift(PATCH)[:, records.places.index(place)]
    shares: Array = shift.mean(1) / direction.gap.mean()
    return shares


def _sentence(records: Records, direction: Direction) -> str:
    """What was found, in words."""
    at_inst = _mean_shares(records, direction, "t_inst")
    at_post = _mean_shares(records, direction, "t_post")
    best = _best(records, direction, "t_inst")
    layer = records.layers[int(at_inst.argmax())]
    later = [n for n in range(len(at_inst)) if (at_post[n:] > at_inst[n:]).all()]
    where = f"from layer {records.layers[later[0]]} on" if later else "at no layer"
    return (
        f"From {direction.name.replace(' into ', ' prompts into ')} ones, t_inst carries at most "
        f"{max(at_inst.max(), 0.0):.2f} of the gap in refusal (layer {layer}; at layers chosen on "
        f"the other half {best[PATCH]}, another prompt of its own group {best[OWN]}, a random "
        f"direction {best[RANDOM]}); t_post carries more than t_inst {where}."
    )


def _map(records: Records, direction: Direction) -> Figure:
    mean_shares = direction.shift(PATCH).mean(2) / direction.gap.mean()
    caption = (
        f"Share of the gap in refusal that a patch at one place and layer carries over, mean of "
        f"{len(direction.ids)} pairs: 0 is the patched prompt's own run, 1 the run that the states "
        f"come from. {records.openings.note}. Shown between 0 and 1; intervals and controls are in "
        "the tables."
    )
    columns = [str(layer) for layer in records.layers]
    values = mean_shares.T.clip(0, 1).tolist()
    title = f"Patching {direction.name}"
    figure = heat_map(values, records.places, columns, title=title, caption=caption, middle=None)
    figure.plot.update_xaxes(title_text="layer (blocks passed)")
    return figure


def _curves(records: Records, direction: Direction) -> Figure:
    curves = {}
    panels = {}
    for place in CURVES:
        slot = records.places.index(place)
        names = []
        for kind in direction.odds:
            name = f"{kind}, {place}"
            names.append(name)
            shift = direction.shift(kind)[:, slot]
            curves[name] = to_curve([carried(row, direction.gap) for row in shift])
        panels[place] = tuple(names)
    caption = (
        f"Share of the gap in refusal that is carried over from {direction.name}, by layer; "
        f"{len(direction.ids)} pairs. Intervals: 95 %, bootstrap over pairs. Grey: another prompt "
        "of the patched prompt's own group, and a random direction as long as the difference of "
        "the pair."
    )
    title = f"Carried over by layer: {direction.name}"
    return lines_by_layer(
        curves,
        records.layers,
        title=title,
        y="share of the gap",
        limits=SHARE_OF_GAP,
        caption=caption,
        zero=True,
        panels=panels,
    )


def _best_table(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for direction in records.directions:
        judged = _judged_shares(direction)
        for place in records.places:
            best = _best(records, direction, place)
            patched, beyond = best[PATCH], best["beyond"]
            peak = records.layers[int(_mean_shares(records, direction, place).argmax())]
            others = [
                best[kind].value if kind in best else None for kind in (OWN, RANDOM, ACCEPTED)
            ]
            rows.append(
                (
                    direction.name,
                    place,
                    peak,
                    *cells(patched),
                    *others,
                    *cells(beyond)[:3],
                    judged.get(place),
                )
            )
    note = (
        "Each pair is measured at the layer that is best for a patch on the other half of the "
        "pairs; 'highest at' is the best layer on all. Controls at the same layers. Beyond: the "
        "patch less another prompt of its own group, as a share of the gap. Intervals: 95 %, "
        "bootstrap over pairs. Judged: highest share of patched prompts whose replies are refused "
        "at any layer. Unpatched: "
        + "; ".join(f"{d.name} {rate_text(d.refused_unpatched[None])}" for d in records.directions)
        + "."
    )
    columns = (
        *("direction", "place", "highest at", "share carried", "low", "high", "n"),
        *("own group", "random direction", "accepted harmful", "beyond own group"),
        *("beyond: low", "beyond: high", "judged refused"),
    )
    return Table("What a patch carries", columns, tuple(rows), note)


def _judged_shares(direction: Direction) -> dict[str, str]:
    """Place -> the refusal rate that lies farthest from the unpatched one, with n and layer."""
    base = _clear_share(direction.refused_unpatched, default=0.0)
    shares = {}
    for slot, place in enumerate(JUDGED_PLACES):
        flags = direction.refused[:, slot]
        away = [abs(_clear_share(row, default=base) - base) for row in flags]
        farthest = int(np.argmax(away))
        layer = direction.judged_layers[farthest]
        shares[place] = f"{rate_text(flags[farthest][None])}, layer {layer}"
    return shares


def _clear_share(flags: Array, *, default: float) -> float:
    """The share of refusals among flags [m] in which nan is unclear."""
    clear = flags[~np.isnan(flags)]
    return float(clear.mean()) if len(clear) else default


def _by_layer(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for direction in records.directions:
        for place in CURVES:
            slot = records.places.index(place)
            for kind in direction.odds:
                shift = direction.shift(kind)[:, slot]
                for layer, row in zip(records.layers, shift, strict=True):
                    share_of_gap = carried(row, direction.gap)
                    rows.append((direction.name, place, kind, layer, *cells(share_of_gap)))
    columns = ("direction", "place", "states from", "layer", "share carried", "low", "high", "n")
    note = "Intervals: 95 %, bootstrap over pairs."
    return Table("Patching by layer", columns, tuple(rows), note)


def _section(records: Records, sentences: list[str], parts: list[Table | Figure]) -> Section:
    text = (
        "Where does refusal read harm? States of one prompt are put in the place of another's at "
        f"one layer and position. {' '.join(sentences)} {records.openings.note}."
    )
    return Section("Beyond the paper: patching from t_inst to t_post", text, tuple(parts))


def _caveats(records: Records, settings: Settings) -> tuple[str, ...]:
    fewest = min((len(d.ids) for d in records.directions), default=0)
    return tuple(few_or_vague("Patching", records.openings, fewest, "pairs", settings.enough))
