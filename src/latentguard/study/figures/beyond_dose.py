"""Beyond the paper: how much of a direction, and where? Dose curves, with a check of fluency.

Accepted harmless prompts are steered at every token, of the reply too, at each layer and with each
coefficient. A refusal counts for something only while the model still speaks: replies are scored by
the unsteered model, and their repeated words are counted.

Axis names in shapes: c coefficients, l layers, n prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.interventions import Intervention
from latentguard.prompts import Reply
from latentguard.report.charts import heat_map, lines_by_layer, to_curve
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.bootstrap import bootstrap_mean
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import rate_difference, share
from latentguard.study.axes import HARMFULNESS, REFUSAL, Axes, fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.finding import Finding, cells, too_few
from latentguard.study.fluency import MeasuredReplies, measure_replies
from latentguard.study.prompt_groups import PromptGroups, sample_prompts
from latentguard.study.settings import Settings
from latentguard.study.steering import at_layers, best_layers, random_like, reply_to_each

Array = NDArray[np.float64]

CONTROLS = {HARMFULNESS: "random, norm of harmfulness", REFUSAL: "random, norm of refusal"}
"""Each direction's control: a random direction of equal norm, another one at each layer."""

FLUENT = 1.0
"""Nats a token by which the loss of replies may rise above that of unsteered ones."""


@dataclass(frozen=True, eq=False)
class Records:
    """Dose curves."""

    ids: tuple[str, ...]
    """The n prompts."""

    layers: tuple[int, ...]
    """Where they are steered, one layer at a time."""

    doses: tuple[float, ...]
    """Coefficients."""

    unsteered: MeasuredReplies
    """As they are, [1 1 n]."""

    dosed: Mapping[str, MeasuredReplies]
    """By direction, controls included."""

    note: str
    """What the directions were fitted on."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Steer accepted harmless prompts with every dose at every layer."""
    axes = fit_axes(model, prompt_groups, enough=settings.enough)
    layers = settings.layers(model.depth)
    tests = prompt_groups.test_prompts("accepted_harmless")
    prompts = sample_prompts(tests, settings.interventions, seed=settings.seed)
    edits = {
        name: [
            Intervention(layer, vectors[n], dose, "all", name, while_replying=True)
            for dose in settings.doses
            for n, layer in enumerate(layers)
        ]
        for name, vectors in _vectors(axes, layers).items()
    }
    plain, replies = reply_to_each(
        model, prompts, edits, what="dose curves", max_new_tokens=settings.reply_tokens
    )
    unsteered = _measure(model, [plain], (1, 1))
    shape = (len(settings.doses), len(layers))
    dosed = {name: _measure(model, of, shape) for name, of in replies.items()}
    ids = tuple(p.id for p in prompts)
    return Records(ids, layers, settings.doses, unsteered, dosed, axes.note)


def _vectors(axes: Axes, layers: Sequence[int]) -> dict[str, list[Any]]:
    """The vector of each direction and control at each layer."""
    vectors = {}
    for name, axis in ((HARMFULNESS, axes.harmful), (REFUSAL, axes.refuse)):
        if axis is not None:
            vectors[name] = [axis.direction[layer] for layer in layers]
            vectors[CONTROLS[name]] = [random_like(v, n) for n, v in enumerate(vectors[name])]
    return vectors


def _measure(
    model: CachedModel, replies: Sequence[Sequence[Reply]], shape: tuple[int, int]
) -> MeasuredReplies:
    measures = measure_replies(model, replies, what="dose curves: fluency")
    return MeasuredReplies(*(values.reshape(*shape, -1) for values in vars(measures).values()))


def analyse(records: Records, settings: Settings) -> Finding:
    """Refusal and fluency by dose and layer."""
    parts: list[Table | Figure] = []
    effects: dict[str, Estimate] = {}
    sentence = ""
    if records.ids:
        parts = [*_figures(records), _best_table(records), _table(records)]
    if len(records.ids) >= settings.enough:
        effects = dict(_effects(records))
        sentence = _sentence(records)
    return Finding(_section(records, sentence, parts), effects, _caveats(records, settings))


def _fluent(records: Records, one: MeasuredReplies) -> NDArray[np.bool_]:
    """Whether each reply costs at most ``FLUENT`` nats more than the unsteered one, [c l n]."""
    return one.losses - records.unsteered.losses <= FLUENT


def _effects(records: Records) -> Iterator[tuple[str, Estimate]]:
    """Fluent refusals along each direction, over its control, at each dose."""
    for name, control in CONTROLS.items():
        if name in records.dosed:
            for c, dose in enumerate(records.doses):
                own, chance = (hits[c] for hits in (_hits(records, name), _hits(records, control)))
                picks = best_layers(own)
                pair = (at_layers(hits[None], picks)[0] for hits in (own, chance))
                yield f"fluent refusal along {name}, dose {dose:g}", rate_difference(*pair)


def _hits(records: Records, name: str) -> NDArray[np.bool_]:
    """Replies that are refusals, and fluent, [c l n]."""
    one = records.dosed[name]
    return one.is_refusal & _fluent(records, one)


def _sentence(records: Records) -> str:
    clauses = []
    for name in (HARMFULNESS, REFUSAL):
        if name in records.dosed:
            rates = _hits(records, name).mean(2)
            c, n = np.unravel_index(int(rates.argmax()), rates.shape)
            chance = _hits(records, CONTROLS[name]).mean(2).max()
            clauses.append(
                f"the {name} makes at most {rates.max():.2f} of the prompts fluently refused "
                f"(coefficient {records.doses[c]:g}, layer {records.layers[n]}; a random direction "
                f"of equal norm at most {chance:.2f})"
            )
    text = "; ".join(clauses)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _figures(records: Records) -> Iterator[Figure]:
    rows = [
        (f"{name}, {dose:g}", c, one)
        for name, one in records.dosed.items()
        for c, dose in enumerate(records.doses)
    ]
    columns = [str(layer) for layer in records.layers]
    n = len(records.ids)
    refused = heat_map(
        [one.is_refusal[c].mean(1).tolist() for _, c, one in rows],
        [name for name, _, _ in rows],
        columns,
        title="Dose curves: refused",
        caption=(
            f"Share of {n} accepted harmless prompts that are refused when a direction is added at "
            "one layer (columns) with a coefficient (rows), at every token of prompt and reply."
        ),
        middle=None,
    )
    refused.plot.update_xaxes(title_text="layer (blocks passed)")
    yield refused
    yield _fluency_figure(records)


def _fluency_figure(records: Records) -> Figure:
    curves = {}
    for name, one in records.dosed.items():
        for c, dose in enumerate(records.doses):
            rise = one.losses[c] - records.unsteered.losses[0]
            curves[f"{name}, {dose:g}"] = to_curve([bootstrap_mean(row) for row in rise])
    panels = {
        f"coefficient {dose:g}": tuple(f"{name}, {dose:g}" for name in records.dosed)
        for dose in records.doses
    }
    return lines_by_layer(
        curves,
        records.layers,
        title="Dose curves: fluency",
        y="rise of the loss, nats a token",
        caption=(
            "How much less likely the unsteered model finds the steered replies than its own; "
            f"{len(records.ids)} prompts, 95 % intervals. Above {FLUENT:g} a refusal is not "
            "counted as fluent."
        ),
        zero=True,
        panels=panels,
    )


def _best_table(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, control in CONTROLS.items():
        if name not in records.dosed:
            continue
        for c, dose in enumerate(records.doses):
            hits, chance = _hits(records, name)[c], _hits(records, control)[c]
            picks = best_layers(hits)
            at_best = at_layers(hits[None], picks)[0]
            random = at_layers(chance[None], picks)[0]
            plain = at_layers(records.dosed[name].is_refusal[c][None], picks)[0]
            difference = rate_difference(at_best, random)
            rows.append(
                (
                    name,
                    dose,
                    records.layers[int(hits.mean(1).argmax())],
                    *cells(share(at_best[None])),
                    float(plain.mean()),
                    float(random.mean()),
                    *cells(difference)[:3],
                )
            )
    note = (
        "At the layer that is best on the other half of the prompts. Fluent: refused, and at most "
        f"{FLUENT:g} nat a token less likely than the unsteered reply. Random: one direction of "
        "equal norm at the same layers, counted alike. Intervals: 95 %."
    )
    columns = (
        *("direction", "coefficient", "highest at", "fluently refused", "low", "high", "n"),
        *("refused", "random, fluently refused", "difference", "diff.: low", "diff.: high"),
    )
    return Table("Dose curves at the best layer", columns, tuple(rows), note)


def _table(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    base = records.unsteered
    rows.append(("unsteered", None, None, *_row(base, 0, 0)))
    for name, one in records.dosed.items():
        for c, dose in enumerate(records.doses):
            for n, layer in enumerate(records.layers):
                rows.append((name, dose, layer, *_row(one, c, n)))
    columns = (
        *("direction", "coefficient", "layer", "refused", "low", "high", "n"),
        *("loss", "perplexity", "repetition"),
    )
    note = "Perplexity: exponential of the mean loss. Intervals: 95 %, Wilson."
    return Table("Dose curves", columns, tuple(rows), note)


def _row(one: MeasuredReplies, c: int, n: int) -> tuple[Cell, ...]:
    loss = float(one.losses[c, n].mean())
    rate = share(one.is_refusal[c, n][None])
    return (*cells(rate), loss, float(np.exp(loss)), float(one.repetitions[c, n].mean()))


def _section(records: Records, sentence: str, parts: list[Table | Figure]) -> Section:
    text = (
        "Directions are added at every token of the prompt and of the reply, in growing doses. "
        f"{sentence} {records.note}."
    )
    return Section("Beyond the paper: dose curves", text, tuple(parts))


def _caveats(records: Records, settings: Settings) -> tuple[str, ...]:
    noun = "accepted harmless prompts"
    lines = too_few("Dose curves", len(records.ids), noun, settings.enough)
    if REFUSAL not in records.dosed:
        lines.append("Too few prompts are refused for a refusal direction: it has no dose curve.")
    return tuple(lines)
