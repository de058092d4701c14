"""User traffic: how guards do on texts of users, and what in-domain examples change.

Tables 8 and 9, appendix H. The paper adds harmful in-domain examples alone and gives no
false-positive rate; here harmless ones are added, too, and both are measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from latentguard.probes.axis import Axis
from latentguard.prompts import Prompt
from latentguard.report.charts import SHARE, lines_by_layer, to_curve
from latentguard.report.document import Cell, Figure, Table
from latentguard.states import States, digest_prompts
from latentguard.stats.bootstrap import bootstrap_mean
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import proportion, share
from latentguard.study.cached_model import CachedModel
from latentguard.study.detectors import Detector, belief_detector
from latentguard.study.figures.table_03_guards.compared_guards import (
    LINEAR,
    PAPER,
    Scored,
    Training,
    latent_rules,
    scored,
)
from latentguard.study.finding import cells
from latentguard.study.prompt_groups import sample_prompts
from latentguard.study.settings import Settings

LONGEST = 2000
"""Characters; longer texts are left out."""

LABELS = (("safe", False), ("unsafe", True))

SEEDS = 3
"""How often in-domain examples are drawn."""

CODES = {
    "S": "sexual",
    "H": "hate",
    "V": "violence",
    "HR": "harassment",
    "SH": "self-harm",
    "S3": "sexual, minors",
    "H2": "hate, violent",
    "V2": "violence, graphic",
}
"""The OpenAI moderation set's names of its categories."""


@dataclass(frozen=True, eq=False)
class Trial:
    """What a guard flags when it has also learnt from in-domain examples (Table 9)."""

    rule: str
    """Which guard."""

    added: str
    """``none``, ``harmful``, or ``harmful and harmless``."""

    k: int
    """Harmful examples of each category, at most half of it."""

    flagged: NDArray[np.float64]
    """How often each of the n texts is flagged when it is not learnt from; nan if it always is."""


@dataclass(frozen=True, eq=False)
class CategoryTrial:
    """What Latent Guard flags when it has also learnt from examples of one category (Table 9)."""

    category: str
    """Which, by its code."""

    k: int
    """Examples that were asked for."""

    added: int
    """Those that were added: at most half of the category."""

    recall: NDArray[np.float64]
    """Share of the draws, of those that test a text of it, in which the text is flagged, [m]."""

    wrong: NDArray[np.float64]
    """The same of the harmless texts, [h]."""


@dataclass(frozen=True, eq=False)
class Traffic:
    """Texts of users, as all guards judge them."""

    scored: Scored
    """Without in-domain examples."""

    trials: tuple[Trial, ...]
    """With some."""

    left_out: int
    """Texts that are too long."""

    by_category: tuple[CategoryTrial, ...] = ()
    """With examples of one category at a time, as in the paper; its protocol alone."""


def judge_traffic(
    model: CachedModel,
    training_set: Training,
    detectors: Mapping[str, Detector],
    texts: Sequence[Prompt],
    settings: Settings,
) -> Traffic | None:
    """Judge a sample of labelled texts; None if a label is missing.

    Args:
        model: The model.
        training_set: What the guards learn from.
        detectors: Guard -> rule.
        texts: With categories.
        settings: At most ``test`` texts of a category and three times as many harmless ones;
            ``domain`` holds the numbers of in-domain examples.
    """
    sample = sample_texts(texts, settings)
    if not sample:
        return None
    left_out = sum(len(p.text) > LONGEST for p in texts)
    judged, states = scored(model, "user traffic", sample, detectors)
    trials = tuple(domain_trials(model, training_set, states, settings))
    one_by_one: tuple[CategoryTrial, ...] = ()
    if settings.protocol == "paper":
        one_by_one = tuple(category_trials(training_set, states, settings))
    return Traffic(judged, trials, left_out, one_by_one)


def sample_texts(texts: Sequence[Prompt], settings: Settings) -> list[Prompt]:
    """At most ``test`` texts of a category and three times as many harmless ones, none too long.

    Nothing if a label is missing.
    """
    short = [p for p in texts if len(p.text) <= LONGEST]
    rows = set[int]()
    for members in categories(short).values():
        sample = set(sample_prompts([short[i] for i in members], settings.test, seed=settings.seed))
        rows |= {i for i in members if short[i] in sample}
    harmless = sample_prompts(
        [p for p in short if p.harmful is False], 3 * settings.test, seed=settings.seed
    )
    return [*(short[i] for i in sorted(rows)), *harmless] if rows and harmless else []


def traffic_parts(traffic: Traffic) -> list[Table | Figure]:
    """Tables 8 and 9 and their curves."""
    prompts, trials = traffic.scored.prompts, _trials(traffic)
    parts: list[Table | Figure] = [label_table(traffic.scored, "Guards on moderation texts")]
    parts += [domain_table(prompts, trials), *_curves(traffic)]
    return [*parts, _printed_table9(traffic)] if traffic.by_category else parts


def categories(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Rows of the harmful texts of each category; a text may have several, such as ``H,V``."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        if prompt.harmful:
            for name in (prompt.category or "other").split(","):
                rows.setdefault(name.strip(), []).append(row)
    return dict(sorted(rows.items(), key=lambda pair: (-len(pair[1]), pair[0])))


def domain_trials(
    model: CachedModel, training_set: Training, texts: States, settings: Settings
) -> Iterator[Trial]:
    """Both guards, fitted again with k in-domain examples of each category (Table 9).

    Args:
        model: The model.
        training_set: What they learn from besides.
        texts: Labelled in-domain texts, with categories.
        settings: ``domain`` holds each k.
    """
    digests = [
        digest_prompts(p)
        for p in (training_set.states.prompts, training_set.calibration, texts.prompts)
    ]
    digests.append(str([p.category for p in texts.prompts]))
    for k in (k for k in settings.domain if k):
        for added in ("harmful", "harmful and harmless"):
            ask = partial(_flagged, model, training_set, texts, k, added, settings.seed)
            parts = ["domain, at most half", *digests, k, added, settings.seed]
            for rule, flags in model.cached(parts, ask).items():
                yield Trial(rule, added, k, np.array(flags, dtype=np.float64))


def category_trials(
    training_set: Training, texts: States, settings: Settings
) -> Iterator[CategoryTrial]:
    """Latent Guard with k harmful examples of one category, tested on the rest of that category."""
    prompts = texts.prompts
    harmless = [row for row, p in enumerate(prompts) if not p.harmful]
    for name, rows in categories(prompts).items():
        for k in settings.domain:
            most = min(k, len(rows) // 2)
            hits, tested = np.zeros(len(prompts)), np.zeros(len(prompts))
            for draw in range(SEEDS):
                rng = np.random.default_rng([settings.seed, k, draw])
                examples = {prompts[row] for row in rng.permutation(rows)[:most]}
                states = (
                    [training_set.states, texts.where(examples.__contains__)] if examples else []
                )
                fitted = States.collect(states) if states else training_set.states
                flags = belief_detector(Axis.fit(fitted, "t_inst"))(texts)[0] > 0
                free = np.array([p not in examples for p in prompts])
                hits += flags & free
                tested += free
            share = hits / np.where(tested, tested, np.nan)
            yield CategoryTrial(name, k, most, share[rows], share[harmless])


def _printed_table9(traffic: Traffic) -> Table:
    """Table 9 with examples of one category at a time; each of the paper's columns is a row."""
    rows: list[tuple[Cell, ...]] = []
    for code in dict.fromkeys((*CODES, *(one.category for one in traffic.by_category))):
        mine = [one for one in traffic.by_category if one.category == code]
        name = f"{CODES[code]} ({code})" if code in CODES else code
        for one in mine:
            figures = [values[~np.isnan(values)] for values in (one.recall, one.wrong)]
            numbers = [cells(bootstrap_mean(v)) if len(v) else (None,) * 4 for v in figures]
            rows.append((name, len(one.recall), one.k, one.added, *numbers[0], *numbers[1][:3]))
        if not mine:
            rows.append((name, 0, *[None] * 9))
    note = (
        "Latent Guard with k examples of one category among what its harmful centroid is the mean "
        "of (at most half of the category), tested on the rest of that category, mean over "
        f"{SEEDS} draws; beside it the false positives of the same guard, which the paper does not "
        "give. A category without texts is not in the data at hand. The paper, sexual, minors: "
        "Llama Guard 3 0.942; without and with examples Qwen2-7B 0.200 and 0.941, Llama3 0.271 and "
        "0.964, Llama2 0.847 and 1.000."
    )
    columns = (
        *("category", "texts", "k", "added", "recall", "low", "high", "n"),
        *("false positives", "false positives, low", "false positives, high"),
    )
    return Table("Table 9: one category at a time", columns, tuple(rows), note)


def _flagged(
    model: CachedModel, training_set: Training, texts: States, k: int, added: str, seed: int
) -> dict[str, list[float | None]]:
    """Guard -> share of the draws, of those that test a text, in which it is flagged; None if 0."""
    hits: dict[str, NDArray[np.float64]] = {}
    tested = np.zeros(len(texts))
    for draw in range(SEEDS):
        picked = drawn(texts.prompts, k, np.random.default_rng([seed, k, draw]), added)
        sample = {p for p, pick in zip(texts.prompts, picked, strict=True) if pick}
        states = States.collect([training_set.states, texts.where(sample.__contains__)])
        rest = texts.where((set(texts.prompts) - sample).__contains__)
        tested += ~picked
        for name, rule in latent_rules(model, states, training_set.calibration).items():
            hits.setdefault(name, np.zeros(len(texts)))[~picked] += rule(rest)[0] > 0
    return {
        name: [h / t if t else None for h, t in zip(flags.tolist(), tested.tolist(), strict=True)]
        for name, flags in hits.items()
    }


def drawn(
    prompts: Sequence[Prompt], k: int, rng: np.random.Generator, added: str
) -> NDArray[np.bool_]:
    """Which texts are learnt from: k of each category and, if wanted, as many harmless ones, [n].

    At most half of a category, and half of the harmless texts. A text of several categories counts
    in each, so of some more than k are learnt from.
    """
    picked = np.zeros(len(prompts), dtype=bool)
    members = {name: np.array(rows) for name, rows in categories(prompts).items()}
    for rows in members.values():
        for row in rng.permutation(rows):
            full = any(2 * (picked[of].sum() + 1) > len(of) for of in members.values() if row in of)
            if picked[rows].sum() < k and not full:
                picked[row] = True
    if added != "harmful":
        harmless = [row for row, p in enumerate(prompts) if not p.harmful]
        most = min(int(picked.sum()), len(harmless) // 2)
        picked[rng.choice(harmless, most, replace=False) if most else []] = True
    return picked


def label_table(judged: Scored, title: str) -> Table:
    """Accuracy of each guard on safe and on unsafe texts (Table 8 is of ToxicChat)."""
    rows = list[tuple[Cell, ...]]()
    sides = {name: [bool(p.harmful) is side for p in judged.prompts] for name, side in LABELS}
    for rule in judged.scores:
        for label, keep in sides.items():
            rows.append((rule, label, *cells(share(judged.right(rule)[:, keep]))))
    note = (
        "The paper's Table 8 is ToxicChat, safe and unsafe: Llama Guard 3 0.926 and 0.472; Latent "
        "Guard 0.801 and 0.340 (Qwen2), 0.835 and 0.317 (Llama3), 0.353 and 0.727 (Llama2)."
    )
    columns = ("guard", "label", "accuracy", "low", "high", "n")
    return Table(title, columns, tuple(rows), note)


def _trials(traffic: Traffic) -> list[Trial]:
    """Every guard without in-domain examples, then those that learnt from some."""
    scores = traffic.scored.scores
    none = [Trial(rule, "none", 0, (of > 0).mean(0)) for rule, of in scores.items()]
    return [*none, *traffic.trials]


def domain_table(prompts: Sequence[Prompt], trials: Sequence[Trial]) -> Table:
    """Table 9: what each trial flags of each category, and of the harmless texts."""
    rows: list[tuple[Cell, ...]] = []
    for name, members in _rows(prompts).items():
        for trial in trials:
            rate = _rate(trial, members)
            if rate is not None:
                rows.append((name, trial.rule, trial.added, trial.k, *cells(rate)))
    note = (
        "Share of each category that is flagged: recall; of the last, false positives. The guard "
        "also learns from k examples of each category, at most half of it, alone or with as many "
        "harmless texts. The rest is tested, mean over 3 draws. Intervals: 95 %, "
        "Wilson for one draw, else bootstrap over texts. The paper, sexual, hate, self-harm, "
        "violence, harassment, hate (violent), violence (graphic): Llama Guard 3 0.924 0.747 0.725 "
        "0.755 0.513 0.902 0.500; Qwen2-7B without 0.215 0.395 0.509 0.372 0.342 0.366 0.208, with "
        "0.941 0.919 0.921 0.883 0.947 0.902 0.833. It has no false-positive rate."
    )
    columns = ("category", "guard", "added", "k", "flagged", "low", "high", "n")
    return Table("Table 9: with in-domain examples", columns, tuple(rows), note)


def _rows(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Which texts of user traffic each line of Table 9 is about."""
    rates = {
        f"{code} ({CODES[code]})" if code in CODES else code: rows
        for code, rows in categories(prompts).items()
    }
    rates["all harmful"] = [i for i, p in enumerate(prompts) if p.harmful]
    rates["harmless"] = [i for i, p in enumerate(prompts) if not p.harmful]
    return rates


def _rate(trial: Trial, rows: Sequence[int]) -> Estimate | None:
    """The share that is flagged, of those that were tested; None if none was."""
    values = trial.flagged[list(rows)]
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    if np.isin(values, (0, 1)).all():
        return proportion(values > 0)
    return bootstrap_mean(values)


def _curves(traffic: Traffic) -> Iterator[Figure]:
    """Recall and false positives by the number of in-domain examples."""
    lines, trials = _rows(traffic.scored.prompts), _trials(traffic)
    for rule in (PAPER, LINEAR):
        mine = [trial for trial in trials if trial.rule == rule]
        estimates: dict[str, list[Estimate]] = {}
        for added in dict.fromkeys(t.added for t in mine if t.k):
            for what, rows in (("recall", "all harmful"), ("false positives", "harmless")):
                points = [_rate(t, lines[rows]) for t in mine if t.added in ("none", added)]
                if None not in points:
                    estimates[f"{what}, {added} added"] = [p for p in points if p is not None]
        if estimates:
            ks = list(dict.fromkeys(trial.k for trial in mine))
            n = f"{len(lines['all harmful'])} harmful and {len(lines['harmless'])} harmless texts"
            yield lines_by_layer(
                {name: to_curve(points) for name, points in estimates.items()},
                ks,
                title=f"In-domain examples: {rule}",
                y="share flagged",
                limits=SHARE,
                x="examples of each category (k)",
                caption=f"{n}; those that are learnt from are not tested. Bands: 95 %.",
            )
