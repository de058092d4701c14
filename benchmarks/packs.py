"""Category packs on the OpenAI moderation set: Table 9 with a false-positive column.

    python benchmarks/packs.py --model M --data-dir DIR --states DIR [--guard G] [--out F.json]
        [--dtype D]

G, or a guard as ``fit`` makes it, calibrated for 5 %, without packs and with one for each category
of the set, made of k in-domain examples (at most half of the category; the rest is tested). Packs
are held against, and the guard is calibrated on, either built-in harmless prompts alone, or half of
the in-domain harmless texts as well, as ``latentguard pack add --harmless`` does it; the other half
is tested. "calibrated in the domain" without packs is what those harmless texts give by themselves.
The mean of three draws. The paper's way, examples added to one probe, is Table 9 of the study
(``study/figures/table_03_guards``), whose draws and table these are. Baseline: n-grams, trained and
calibrated on the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from categories import arguments, kept, opened, prompt_sets
from numpy.typing import NDArray

from latentguard.data.surface_audit import ngram_scores
from latentguard.guard.categories import MIN_PROMPTS
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.packs import built_in_harmless, halve, with_pack
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt
from latentguard.report.document import format_cell
from latentguard.states import States
from latentguard.stats.bounds import threshold_for_fpr
from latentguard.study.figures.table_03_guards.user_traffic import (
    SEEDS,
    Trial,
    categories,
    domain_table,
    drawn,
)

MAX_FPR, EXAMPLES = 0.05, (10, 50)
BUILT_IN, DOMAIN = "built-in harmless", "in-domain harmless"


def main() -> None:
    """Run and print."""
    options = arguments()
    model = ChatModel.load(options.model, dtype=options.dtype)
    sets = prompt_sets(options.data_dir, options.harmless, options.longest)
    guard = opened(options, model, sets["train"])
    states = {
        name: kept(model, sets[name], options.states, guard).select(guard.probe.layers)
        for name in ("train", "validation", "moderation")
    }
    trials = list(tried(guard, states))
    table = domain_table(states["moderation"].prompts, trials)
    named = {f"k = {k}, {added}": named_right(guard, states, k, added) for k, added in runs()}
    for row in table.rows:
        print(*map(format_cell, row), sep=" | ")
    print(json.dumps(named, indent=1))
    if options.out:
        record = dict(model=Path(options.model).name, dtype=options.dtype, fitted=guard.fitted)
        record |= dict(columns=table.columns, rows=table.rows, named=named)
        options.out.write_text(json.dumps(record, indent=1))


def runs() -> Iterator[tuple[int, str]]:
    """Every number of examples, with either kind of harmless prompts."""
    yield from ((k, added) for k in EXAMPLES for added in (BUILT_IN, DOMAIN))


def tried(guard: LatentGuard, states: dict[str, States]) -> Iterator[Trial]:
    """Guard and n-grams, without and with packs."""
    for k, added in [(0, BUILT_IN), (0, DOMAIN), *runs()]:
        hits = {name: np.zeros(len(states["moderation"])) for name in ("guard", "n-grams")}
        tested = np.zeros(len(states["moderation"]))
        for draw in range(SEEDS):
            one = Draw(states, k, added, draw)
            free = ~(one.examples | one.given)
            tested += free
            flagged = [v.flagged for v in one.packed(guard).judge(one.texts)]
            hits["guard"] += free & np.array(flagged)
            hits["n-grams"] += free & one.by_words(states["train"].prompts)
        for name, count in hits.items():
            share = np.where(tested > 0, count / np.maximum(tested, 1), np.nan)
            yield Trial(name, added if k else f"none; {added} calibrates", k, share)


class Draw:
    """Which texts are examples, which harmless ones are given, and the guard made of them."""

    def __init__(self, states: dict[str, States], k: int, added: str, draw: int) -> None:
        """Draw; the harmless texts are the same half for every k."""
        self.texts, self.built_in = states["moderation"], states["validation"]
        self.prompts = self.texts.prompts
        self.examples = drawn(self.prompts, k, np.random.default_rng([0, k, draw]), "harmful")
        calm = np.flatnonzero([not p.harmful for p in self.prompts])
        self.given = np.zeros(len(self.prompts), dtype=bool)
        rows = np.random.default_rng([1, draw]).permutation(calm)[: len(calm) // 2]
        self.given[rows if added == DOMAIN else []] = True
        like, calibrating = map(set, halve(self.chosen(self.given)))
        known = states["train"].where(set(built_in_harmless()).__contains__)
        self.against = States.collect([known, self.texts.where(like.__contains__)])
        own = self.texts.where(calibrating.__contains__)
        self.calm = own if added == DOMAIN else self.built_in

    def chosen(self, rows: NDArray[np.bool_]) -> list[Prompt]:
        """The texts of some rows."""
        return [p for p, keep in zip(self.prompts, rows, strict=True) if keep]

    def members(self) -> dict[str, set[Prompt]]:
        """The examples of each category that has enough for a pack."""
        found = {
            name: {self.prompts[i] for i in rows if self.examples[i]}
            for name, rows in categories(self.prompts).items()
        }
        return {name: members for name, members in found.items() if len(members) >= MIN_PROMPTS}

    def packed(self, guard: LatentGuard) -> LatentGuard:
        """The guard with a pack for each category, calibrated."""
        for name, members in self.members().items():
            examples = self.texts.where(members.__contains__)
            guard = with_pack(guard, name.lower(), States.collect([examples, self.against]))
        scores = [v.score for v in guard.judge(self.calm)]
        return replace(guard, threshold=threshold_for_fpr(scores, MAX_FPR).threshold)

    def by_words(self, train: Sequence[Prompt]) -> NDArray[np.bool_]:
        """What n-grams flag, [n], that learn from the same prompts."""
        learnt = [*train, *self.chosen(self.examples), *self.against.prompts]
        scores = ngram_scores(learnt, [*self.prompts, *self.calm.prompts])
        bound = threshold_for_fpr(scores[len(self.prompts) :], MAX_FPR)
        return scores[: len(self.prompts)] > bound.threshold


def named_right(guard: LatentGuard, states: dict[str, States], k: int, added: str) -> str:
    """Of the harmful texts that are flagged and were no examples: is a pack of theirs named?"""
    right = []
    for draw in range(SEEDS):
        one = Draw(states, k, added, draw)
        verdicts = one.packed(guard).judge(one.texts)
        for prompt, known, verdict in zip(one.prompts, one.examples, verdicts, strict=True):
            if prompt.harmful and not known and verdict.flagged:
                right.append(verdict.category in (prompt.category or "").lower().split(","))
    return f"{np.mean(right):.3f} of {len(right)} in {SEEDS} draws"


if __name__ == "__main__":
    main()
