"""Figures 4 and 8: refusal of harmless prompts steered along each direction (section 3.4).

The paper steers "all tokens of input instructions", but refusal acts at the post-instruction
tokens (appendix E.1): claims take every token of the prompt, the instruction's alone stand beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentguard.report.charts import SHARE, control_panels, lines_by_layer, to_curve
from latentguard.report.document import Figure, Section, Table
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion, rate_difference, share
from latentguard.study.figures.figure_04_steering.collect import DIRECTIONS, Records
from latentguard.study.figures.figure_04_steering.direction_cosine import DirectionCosine
from latentguard.study.figures.figure_04_steering.held_out_cosine import held_out_table
from latentguard.study.finding import Finding, cells
from latentguard.study.settings import Settings
from latentguard.study.steering import Steering, at_layers, best_layers


def analyse(records: Records, settings: Settings) -> Finding:
    """Refusal by layer, at layers chosen on other prompts, and how alike the directions are."""
    effects: dict[str, Estimate] = {}
    caveats: list[str] = []
    parts: list[Table | Figure] = []
    if n := len(records.ids):
        best = _best(records)
        effects = _effects(records, best, settings.coefficients[0])
        parts = [*_curves(records), _best_table(best, settings), _by_layer(records)]
    if n < settings.enough:
        effects = {}
        caveats.append(f"Only {n} accepted harmless prompts to steer: nothing is concluded of it.")
    if records.alike is None:
        caveats.append("Too few prompts are refused for a refusal direction: it was not steered.")
    else:
        effects["cosine of the directions"] = records.alike.mean
        effects["cosine of the directions, without noise"] = records.alike.noiseless
        parts += _cosine_parts(records.alike)
    if records.held_out:
        parts.append(held_out_table(records.held_out))
    return Finding(_section(records, parts), effects, tuple(caveats))


@dataclass(frozen=True)
class _Best:
    """A direction at layers chosen on other prompts, beside chance at the same layers."""

    way: Steering
    layers: str
    hits: NDArray[np.bool_]
    """[1 n]."""

    chance: NDArray[np.bool_]
    """[draws n]."""

    highest: float
    """Of all layers, on the same prompts."""

    @property
    def over(self) -> Estimate:
        """How much more is refused than by chance."""
        return rate_difference(self.hits[0], self.chance)


def _best(records: Records) -> list[_Best]:
    choices = []
    for way, flags in _refused(records).items():
        if not way.draws:
            picks = best_layers(flags[0])
            layers = " / ".join(str(records.layers[i]) for i in dict.fromkeys(picks.tolist()))
            hits, chance = (at_layers(one, picks) for one in (flags, _control(records, way)))
            choices.append(_Best(way, layers, hits, chance, float(flags[0].mean(1).max())))
    return choices


def _effects(records: Records, best: Sequence[_Best], coefficient: float) -> dict[str, Estimate]:
    """What claims need, at one coefficient."""
    effects = {"refusal, unsteered": proportion(records.unsteered == 1)}
    here = [one for one in best if one.way.coefficient == coefficient]
    for one in here:
        along = f"refusal along {one.way.name.replace(' direction', '')}"
        effects |= {along: share(one.hits), f"{along}, random": share(one.chance)}
        effects |= {f"{along} minus random": one.over}
    whole = {one.way.of: one.hits[0] for one in here if one.way.tokens == "all"}
    if "refuse" in whole:
        over = rate_difference(whole["refuse"], whole["harmful"])
        effects["refusal along refusal minus along harmfulness"] = over
    return effects


def _best_table(best: Sequence[_Best], settings: Settings) -> Table:
    rows = tuple(
        (
            one.way.name,
            one.way.coefficient,
            one.layers,
            *cells(share(one.hits)),
            *cells(share(one.chance))[:3],
            *cells(one.over)[:3],
            one.highest,
        )
        for one in best
    )
    note = (
        "The paper: Llama3 0.94 along harmfulness (layer 9), 1.00 along refusal (layer 11); on "
        "Qwen2-7B and Llama2 much less along harmfulness than along refusal. Each half of the "
        "prompts is steered at the layer that is best for the other half; the highest rate of all "
        f"layers (last column) is too good. Random: mean of {settings.random_draws} draws at the "
        "same layers, on every token. The difference is paired (95 % bootstrap, prompts and draws)."
    )
    heads = ("refused", "low", "high", "n", "random", "random, low", "random, high")
    over_heads = ("minus random", "difference, low", "difference, high", "highest of layers")
    columns = ("steered along", "coefficient", "layers", *heads, *over_heads)
    return Table("Refusal when steered, best layer", columns, rows, note)


def _refused(records: Records) -> dict[Steering, NDArray[np.bool_]]:
    """Whether a reply is a refusal; one that is empty or cut is none."""
    return {way: flags == 1 for way, flags in records.refused.items()}


def _control(records: Records, way: Steering) -> NDArray[np.bool_]:
    """What chance does with a vector as long and as often added, [draws layers n]."""
    same = (way.of, way.coefficient)
    refused_by_way = (
        f for w, f in _refused(records).items() if w.draws and (w.of, w.coefficient) == same
    )
    return next(refused_by_way)


def _by_layer(records: Records) -> Table:
    rows = tuple(
        (
            way.name,
            way.tokens,
            way.coefficient,
            layer,
            *cells(share(flags[:, slot] == 1)),
            float(np.isnan(flags[:, slot]).mean()),
            *((float((records.by_second[way][:, slot] == 1).mean()),) if records.by_second else ()),
        )
        for way, flags in records.refused.items()
        for slot, layer in enumerate(records.layers)
    )
    note = (
        "Share of the n prompts that are refused; a reply that is empty, or cut before it says "
        "which it is, is no refusal (last column: how many are). Intervals: 95 %, Wilson; of "
        "random directions a bootstrap over the prompts."
    )
    heads = ("refused", "low", "high", "n", "empty or cut")
    beside = ("built-in judge: refused",) if records.by_second else ()
    columns = ("steered along", "tokens", "coefficient", "layer", *heads, *beside)
    return Table("Refusal when steered, by layer", columns, rows, note)


def _curves(records: Records) -> list[Figure]:
    """Figure 4 for each coefficient; then the tokens compared at the first."""
    n, curves = len(records.ids), []
    coefficients = list(dict.fromkeys(way.coefficient for way in records.refused))
    for c in coefficients:
        whole = [way for way in records.refused if way.coefficient == c and way.tokens == "all"]
        caption = (
            f"Each of n = {n} harmless prompts that the model accepts, with the direction added "
            f"{c:g} x at one layer, on all tokens. A direction acts where its curve is above the "
            "grey one of random directions as long as it. Bands: 95 %."
        )
        title = f"Refusal when steered, coefficient {c:g} (Figures 4 and 8)"
        curves.append(_figure(records, whole, title, caption))
    first = coefficients[0]
    few = [way for way in records.refused if way.coefficient == first and not way.draws]
    caption = (
        f"n = {n} harmless prompts, coefficient {first:g}: the direction added to every token, "
        "template included, or to the instruction's alone. Bands: 95 %."
    )
    return [*curves, _figure(records, few, "Refusal when steered, by steered tokens", caption)]


def _figure(records: Records, ways: Sequence[Steering], title: str, caption: str) -> Figure:
    by_layer = {way.name: np.moveaxis(records.refused[way] == 1, 1, 0) for way in ways}
    curves = {name: to_curve([share(flags) for flags in of]) for name, of in by_layer.items()}
    panels = control_panels(curves) if any(way.draws for way in ways) else _by_direction(ways)
    return lines_by_layer(
        curves,
        records.layers,
        title=title,
        y="refusal rate",
        caption=caption,
        limits=SHARE,
        panels=panels,
    )


def _by_direction(ways: Sequence[Steering]) -> dict[str, list[str]]:
    """A panel for each direction, with its curves for each choice of tokens."""
    names: dict[str, list[str]] = {}
    for way in ways:
        names.setdefault(way.name.partition(",")[0], []).append(way.name)
    return names


def _cosine_parts(cosine: DirectionCosine) -> tuple[Figure, Table]:
    names = ("the two directions", *(f"{name} with itself, two halves" for _, name in DIRECTIONS))
    curves = dict(zip(names, cosine.bands, strict=True))
    n, layers = sum(cosine.fitted), range(1, cosine.between.shape[1] + 1)
    rows = tuple(
        (name, layer, value, low, high, n)
        for name, curve in curves.items()
        for layer, value, low, high in zip(layers, *curve, strict=True)
    )
    note = (
        f"{cosine.fitted[0]} refused harmful and {cosine.fitted[1]} accepted harmless prompts. The "
        f"two directions: 95 % bootstrap over the prompts, {len(cosine.between) - 1} draws. With "
        "itself: the direction fitted on one half of the prompts and on the other; mean and middle "
        f"95 % of {cosine.itself.shape[1]} splits. A cosine far below that does not come from too "
        "few prompts. Without noise, in the claim: what it would be with endlessly many prompts. "
        "The paper: about 0.1 on Llama2."
    )
    columns = ("cosine of", "layer", "value", "low", "high", "n")
    title = "Cosine of the directions"
    figure = lines_by_layer(curves, layers, title=title, y="cosine", caption=note, zero=True)
    return figure, Table(title, columns, rows, note)


def _section(records: Records, parts: Sequence[Table | Figure]) -> Section:
    text = (
        "If a direction carries harmfulness, or refusal, adding it to a harmless prompt should "
        f"make the model refuse (equation 5). {records.note}."
    )
    return Section("Figures 4 and 8: eliciting refusal", text, tuple(parts))
