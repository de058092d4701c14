"""Beyond the paper: what is left of refusal without a direction? Directional ablation.

A direction is projected out of the residual stream at every layer and every token, the reply's
too, or at t_inst alone. Weights stay as they are.

Axis names in shapes: a ablations of one kind, n prompts, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from latentguard.interventions import Ablation, Tokens
from latentguard.prompts import Group, Prompt, Reply
from latentguard.report.charts import SHARE, lines_by_layer, to_curve
from latentguard.report.document import Cell, Figure, Section, Table
from latentguard.stats.bootstrap import bootstrap_mean
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import rate_difference, share
from latentguard.study.axes import HARMFULNESS, REFUSAL, Axes, fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.finding import Finding, cells, too_few
from latentguard.study.fluency import MeasuredReplies, measure_replies
from latentguard.study.prompt_groups import BEHAVING, PromptGroups, sample_prompts
from latentguard.study.refusal_odds import Openings, find_openings, log_odds
from latentguard.study.settings import Settings
from latentguard.study.steering import at_layers, best_layers, random_like, reply_to_each

Array = NDArray[np.float64]

AT_T_INST = "harmfulness direction, t_inst alone"
RANDOM = "random direction"
HALVES = "chance: difference of random halves"
"""What is projected out:

- ``HARMFULNESS`` and ``REFUSAL``: the direction of one layer, everywhere.
- ``AT_T_INST``: the harmfulness direction of one layer at t_inst, at every layer.
- ``RANDOM``: an isotropic random direction, everywhere. States hold next to none of it.
- ``HALVES``: the difference of the means at t_post of two random halves of accepted harmless
  prompts, everywhere. States vary along it as they do, but it has nothing to do with refusal.
"""

DRAWS = 2
"""Random directions."""


@dataclass(frozen=True, eq=False)
class Ablated(MeasuredReplies):
    """Replies of a group under one kind of ablation, [a n]."""

    odds: Array
    """Log-odds of refusal by the first word, [a n]."""


@dataclass(frozen=True, eq=False)
class Records:
    """What ablations do to refusal and to fluency."""

    layers: tuple[int, ...]
    """Layers whose directions are projected out, one at a time."""

    groups: Mapping[Group, Mapping[str, Ablated]]
    """Each group as it is (empty name) and under each kind: by layer, or by draw."""

    counts: Mapping[Group, int]
    """Prompts of each group."""

    openings: Openings
    """What the odds are of."""

    note: str
    """What the directions were fitted on."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Reply to both behaving groups under every ablation."""
    openings = find_openings(model, prompt_groups, settings)
    axes = fit_axes(model, prompt_groups, enough=settings.enough)
    layers = tuple(layer for layer in settings.probed_layers(model.depth) if layer) or (1,)
    plain = model.states(prompt_groups.fit_prompts("accepted_harmless")).at("t_post").float()
    kinds = _kinds(axes, plain, layers)
    groups: dict[Group, Mapping[str, Ablated]] = {}
    counts: dict[Group, int] = {}
    for name in BEHAVING:
        tests = prompt_groups.test_prompts(name)
        prompts = sample_prompts(tests, settings.interventions, seed=settings.seed)
        counts[name] = len(prompts)
        if prompts:
            groups[name] = _reply(model, prompts, kinds, openings, settings)
    return Records(layers, groups, counts, openings, axes.note)


def _kinds(
    axes: Axes, plain: Float[Tensor, "n l d"], layers: Sequence[int]
) -> dict[str, list[Ablation]]:
    """Ablations of each kind: one for each layer, or each draw."""
    harmful = [axes.harmful.direction[layer] for layer in layers]
    refuse = [] if axes.refuse is None else [axes.refuse.direction[layer] for layer in layers]
    random = [random_like(harmful[0], draw) for draw in range(DRAWS)]
    vectors: dict[str, tuple[list[Tensor], Tokens]] = {
        HARMFULNESS: (harmful, "all"),
        REFUSAL: (refuse, "all"),
        AT_T_INST: (harmful, "t_inst"),
        RANDOM: (random, "all"),
        HALVES: (_differences_of_halves(plain, layers), "all"),
    }
    return {
        name: [Ablation(vector, tokens, name) for vector in directions]
        for name, (directions, tokens) in vectors.items()
        if directions
    }


def _differences_of_halves(
    plain: Float[Tensor, "n l d"], layers: Sequence[int]
) -> list[Float[Tensor, "d"]]:
    """Difference of the means of two random halves, at some layers spread over ``layers``."""
    if len(plain) < 2:
        return []
    differences = []
    for draw in range(DRAWS):
        layer = layers[int((draw + 0.5) * len(layers) / DRAWS)]
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(draw))
        middle = len(plain) // 2
        halves = plain[order[:middle], layer], plain[order[middle:], layer]
        differences.append(halves[0].mean(0) - halves[1].mean(0))
    return differences


def _reply(
    model: CachedModel,
    prompts: Sequence[Prompt],
    kinds: Mapping[str, Sequence[Ablation]],
    openings: Openings,
    settings: Settings,
) -> dict[str, Ablated]:
    plain, replies = reply_to_each(
        model,
        prompts,
        kinds,
        what="ablation",
        max_new_tokens=settings.reply_tokens,
        watch=openings.words,
    )
    return {name: _measure(model, of) for name, of in {"": [plain], **replies}.items()}


def _measure(model: CachedModel, replies: Sequence[Sequence[Reply]]) -> Ablated:
    measures = measure_replies(model, replies, what="ablation: fluency")
    odds = np.array([[log_odds(reply) for reply in of] for of in replies])
    return Ablated(**vars(measures), odds=odds)


def analyse(records: Records, settings: Settings) -> Finding:
    """How much of refusal is left, and how fluent replies are."""
    parts: list[Table | Figure] = []
    effects: dict[str, Estimate] = {}
    sentence = ""
    if records.groups:
        parts = [*_figures(records), _table(records), _by_layer(records)]
    if min(records.counts.values(), default=0) >= settings.enough:
        effects = dict(_effects(records))
        sentence = _sentence(effects)
    return Finding(_section(records, sentence, parts), effects, _caveats(records, settings))


def _is_refused(kind: str, one: Ablated) -> NDArray[np.bool_]:
    """Whether prompts are refused, [draws n]; the layer of a direction is chosen on others."""
    flags = one.is_refusal
    if kind in ("", RANDOM, HALVES):
        return flags
    return at_layers(flags[None], best_layers(~flags))


def _effects(records: Records) -> Iterator[tuple[str, Estimate]]:
    kinds = records.groups["refused_harmful"]
    for kind in (HARMFULNESS, REFUSAL, AT_T_INST):
        for control in (RANDOM, HALVES):
            if kind in kinds and control in kinds:
                lost = ~_is_refused(kind, kinds[kind])[0]
                difference = rate_difference(lost, ~_is_refused(control, kinds[control]))
                yield _effect_name(kind, control), difference


def _effect_name(kind: str, control: str) -> str:
    return f"refusal lost without the {kind}, minus {control.split(':', maxsplit=1)[0]}"


def _sentence(effects: Mapping[str, Estimate]) -> str:
    clauses = [
        f"the {kind} {effects[name]}"
        for kind in (HARMFULNESS, REFUSAL, AT_T_INST)
        if (name := _effect_name(kind, HALVES)) in effects
    ]
    if not clauses:
        return ""
    return (
        "How much of the refusals of harmful prompts is lost without a direction, beyond what is "
        f"lost without a random one: {', '.join(clauses)}."
    )


def _figures(records: Records) -> Iterator[Figure]:
    for group, kinds in records.groups.items():
        title = group.replace("_", " ")
        curves = {}
        for kind, one in kinds.items():
            flags = one.is_refusal
            rates = [share(row[None]) for row in flags]
            if kind in ("", RANDOM, HALVES):
                rates = [share(flags)] * len(records.layers)
            curves[kind or "no ablation"] = to_curve(rates)
        caption = (
            f"Share of {records.counts[group]} {title} prompts that are refused while a direction "
            "is projected out of every layer, by the layer that the direction is of. Intervals: "
            f"95 %. {records.note}."
        )
        yield lines_by_layer(
            curves,
            records.layers,
            title=f"Directional ablation: {title}",
            y="refusal rate",
            limits=SHARE,
            caption=caption,
            x="layer of the direction",
        )


def _table(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for group, kinds in records.groups.items():
        for kind, one in kinds.items():
            flags = _is_refused(kind, one)
            fluency = (float(np.nanmean(one.losses)), float(one.repetitions.mean()))
            odds = bootstrap_mean(one.odds.mean(0))
            rows.append(
                (
                    group.replace("_", " "),
                    kind or "nothing",
                    *cells(share(flags)),
                    *cells(odds)[:3],
                    *fluency,
                    float(np.exp(fluency[0])),
                )
            )
    note = (
        "Refused: judged replies, at the layer whose direction lowers refusal most on the other "
        "half of the prompts; controls: mean of their draws. Log-odds, loss and repetition: mean "
        "over layers or draws. Loss: of the replies under the model without the ablation, in nats "
        "a token; perplexity is its exponential. Repetition: share of word pairs that stood in the "
        f"reply before. {records.openings.note}. Intervals: 95 %."
    )
    columns = (
        *("prompts", "projected out", "refused", "low", "high", "n"),
        *("log-odds", "odds: low", "odds: high", "loss", "repetition", "perplexity"),
    )
    return Table("Directional ablation", columns, tuple(rows), note)


def _by_layer(records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for group, kinds in records.groups.items():
        for kind in (HARMFULNESS, REFUSAL, AT_T_INST):
            if kind not in kinds:
                continue
            one = kinds[kind]
            for n, layer in enumerate(records.layers):
                rate = share(one.is_refusal[n][None])
                loss = float(one.losses[n].mean())
                rows.append((group.replace("_", " "), kind, layer, *cells(rate), loss))
    columns = ("prompts", "projected out", "layer", "refused", "low", "high", "n", "loss")
    return Table("Directional ablation by layer", columns, tuple(rows), "Intervals: 95 %, Wilson.")


def _section(records: Records, sentence: str, parts: list[Table | Figure]) -> Section:
    text = (
        "A direction is projected out of the residual stream at every layer, while the prompt is "
        f"read and while the reply is made. {sentence} {records.note}."
    )
    return Section("Beyond the paper: directional ablation", text, tuple(parts))


def _caveats(records: Records, settings: Settings) -> tuple[str, ...]:
    few = [
        line
        for group, count in records.counts.items()
        for line in too_few(
            "Ablation", count, f"{group.replace('_', ' ')} prompts", settings.enough
        )
    ]
    kinds = records.groups.get("refused_harmful", {})
    if kinds and REFUSAL not in kinds:
        few.append("Too few prompts are refused for a refusal direction: it was not projected out.")
    return tuple(few)
