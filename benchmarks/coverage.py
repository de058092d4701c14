r"""How often nominal 95 % intervals hold the truth, for every kind that the claims use.

    python benchmarks/coverage.py --repeats 1000 --out benchmarks/results/coverage.json

Data are drawn again and again from a distribution whose truth is known. The last rows are about
whole rules: how often conditions that hold only just are called failed, and the reverse.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from tqdm import tqdm

from latentguard.stats.bootstrap import (
    bootstrap,
    bootstrap_mean,
    crossed_mean,
    mean_difference,
    weighted_bootstrap,
)
from latentguard.stats.detection import auroc_interval, win_matrix
from latentguard.stats.estimate import Estimate
from latentguard.stats.intervals import centered_interval
from latentguard.stats.rates import (
    proportion,
    rate_difference,
    rate_difference_by_direction,
    share,
)
from latentguard.study.claims import Claim, Condition
from latentguard.study.figures.figure_03_beliefs import correlations_of
from latentguard.study.figures.figure_04_steering.direction_cosine import compare_directions
from latentguard.study.figures.figure_09_categories.category_cosines import (
    Cloud,
    resampled_cosines,
    to_others,
)
from latentguard.study.form_controls import beyond_form, kept_beyond_half

SIZES = (10, 20, 30, 100)
"""Prompts of each group."""

Rng = np.random.Generator
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One kind of interval, and a distribution whose truth is known."""

    interval: str
    """What claims use it for."""

    distribution: str
    """In words."""

    truth: float
    """What the interval should hold; nan: the mean figure over all repeats, as few prompts move it
    and the interval is about studies of this size."""

    measure: Callable[[Rng, int], Estimate]
    """Draws data of so many prompts, and gives the figure with its interval."""

    slow: bool = False
    """Whether a quarter of the repeats must do."""


@dataclass(frozen=True)
class Coverage:
    """How often an interval held the truth."""

    interval: str
    distribution: str
    n: int
    """Prompts of each group."""

    coverage: float
    low: float
    """Lower end of the 95 % Wilson interval of the coverage."""

    high: float
    width: float
    """Median width of the interval."""

    repeats: int
    """How often data were drawn and gave an interval."""

    undefined: int
    """How often they gave none, as noise was all there was; claims then cannot tell."""


def measure(case: Case, n: int, repeats: int) -> Coverage:
    """The coverage of one kind of interval."""
    count = max(repeats // 4, 1) if case.slow else repeats
    rng = np.random.default_rng([n, 1])
    every = [case.measure(rng, n) for _ in range(count)]
    estimates = [one for one in every if np.isfinite(one.low + one.high)]
    truth = case.truth
    if np.isnan(truth):
        truth = float(np.mean([one.value for one in estimates]))
    hits = proportion([one.low - 1e-12 <= truth <= one.high + 1e-12 for one in estimates])
    width = float(np.median([one.high - one.low for one in estimates]))
    return Coverage(
        case.interval,
        case.distribution,
        n,
        hits.value,
        hits.low,
        hits.high,
        width,
        len(estimates),
        count - len(estimates),
    )


# Rates --------------------------------------------------------------------------------------------


def rates() -> Iterator[Case]:
    """Shares, and paired differences of shares."""
    for p in (0.5, 0.9, 0.97):

        def one(rng: Rng, n: int, p: float = p) -> Estimate:
            return proportion(rng.random(n) < p)

        yield Case("share of prompts", f"p = {p}", p, one)

    def of_draws(rng: Rng, n: int) -> Estimate:
        return share(rng.random((5, n)) < rng.beta(2, 2, size=n))

    yield Case(
        "share of prompts, mean of 5 draws", "p of each prompt from Beta(2, 2)", 0.5, of_draws
    )
    for first, second in ((0.5, 0.5), (0.9, 0.1), (0.97, 0.03), (0.95, 0.6)):

        def pair(rng: Rng, n: int, first: float = first, second: float = second) -> Estimate:
            shared = rng.random(n)
            same = rng.random(n) < 0.5
            return rate_difference(shared < first, np.where(same, shared, rng.random(n)) < second)

        yield Case("difference of two rates", f"{first} and {second}", first - second, pair)
    yield from against_directions()


def against_directions() -> Iterator[Case]:
    """A rate less that along random directions, whose rates differ."""
    for directions in (5, 10, 20):
        for spread, a in (("alike", 400.0), ("different", 2.0)):

            def each(rng: Rng, n: int, d: int = directions, a: float = a) -> Estimate:
                by_chance = rng.random((d, n)) < rng.beta(a, 1.5 * a, size=d)[:, None]
                return rate_difference(rng.random(n) < 0.7, by_chance)

            def in_turn(rng: Rng, n: int, d: int = directions, a: float = a) -> Estimate:
                chance = rng.beta(a, 1.5 * a, size=d)[np.arange(n) % d]
                return rate_difference_by_direction(rng.random(n) < 0.7, rng.random(n) < chance, d)

            words = f"0.7 and 0.4, {directions} directions, {spread}"
            yield Case("rate minus random directions", words, 0.3, each)
            yield Case("rate minus random directions, one a prompt", words, 0.3, in_turn)


# Means --------------------------------------------------------------------------------------------


def means() -> Iterator[Case]:
    """Means, their differences, and what is made of them."""

    def normal(rng: Rng, n: int) -> Estimate:
        return bootstrap_mean(rng.normal(size=n))

    def skewed(rng: Rng, n: int) -> Estimate:
        return bootstrap_mean(rng.exponential(size=n))

    def difference(rng: Rng, n: int) -> Estimate:
        return bootstrap_mean(rng.normal(size=n), minus=rng.normal(1, 2, size=n))

    def odds(rng: Rng, n: int) -> Estimate:
        by_chance = rng.normal(size=(5, n)) + rng.normal(size=(5, 1)) * 0.5
        return mean_difference(1 + rng.normal(size=n), by_chance)

    def over_gap(rng: Rng, n: int) -> Estimate:
        before = 1 + rng.normal(size=n) * 0.5
        after = before - 0.2 + rng.normal(size=n) * 0.3
        harmless = -1 + rng.normal(size=n) * 0.5

        def ratio(pairs: Array, others: Array) -> float:
            return float((pairs[:, 1] - pairs[:, 0]).mean() / (pairs[:, 0].mean() - others.mean()))

        return bootstrap(ratio, np.stack([before, after], 1), harmless)

    yield Case("mean", "normal", 0.0, normal)
    yield Case("mean", "exponential", 1.0, skewed)
    yield Case("mean minus mean", "normal, spreads 1 and 2", -1.0, difference)
    yield Case("mean minus 5 random directions", "normal, directions differ by 0.5", 1.0, odds)
    yield Case("change over gap", "-0.2 over 2", -0.1, over_gap, slow=True)
    yield from crossed()


def crossed() -> Iterator[Case]:
    """Means of attacks: requests inside templates, either with an effect of its own."""
    for templates in (5, 12, 30):
        for effect in (0.0, 0.5, 1.0):

            def attacks(rng: Rng, n: int, t: int = templates, effect: float = effect) -> Estimate:
                request = rng.integers(max(n // 2, 2), size=n)
                template = rng.integers(t, size=n)
                values = (
                    rng.normal(size=n)
                    + 0.5 * rng.normal(size=n)[request]
                    + effect * rng.normal(size=t)[template]
                )
                return crossed_mean(values, request.tolist(), template.tolist())

            words = f"{templates} templates, their effect {effect:g} of the noise"
            yield Case("mean over requests x templates (claim 7)", words, 0.0, attacks)


# Areas, correlations, cosines ---------------------------------------------------------------------


def areas() -> Iterator[Case]:
    """AUROC, and the two figures of the form conditions."""
    for area in (0.6, 0.8, 0.95, 0.99):

        def one(rng: Rng, n: int, shift: float = 2**0.5 * norm.ppf(area)) -> Estimate:
            return auroc_interval(win_matrix(rng.normal(size=n) + shift, rng.normal(size=n)))

        yield Case("AUROC", f"{area}", area, one)
    for matched, own in ((0.75, 0.95), (0.9, 0.95), (0.5, 0.9)):

        def kept(rng: Rng, n: int, matched: float = matched, own: float = own) -> Estimate:
            return kept_beyond_half([_wins(rng, n, matched)], [_wins(rng, n, own)])

        truth = (matched - 0.5) - (own - 0.5) / 2
        yield Case("separation kept beyond half", f"AUROC {matched} of {own}", truth, kept)

    def beyond(rng: Rng, n: int) -> Estimate:
        up, down = rng.normal(size=(2, 2, n))
        shift = 2**0.5 * norm.ppf([[0.8], [0.6]])
        both = [win_matrix(a + s, b) for a, b, s in zip(up, down, shift, strict=True)]
        return beyond_form(both[:1], both[1:])

    yield Case("AUROC minus that of form", "0.8 and 0.6", 0.2, beyond)


def _wins(rng: Rng, n: int, area: float) -> Array:
    return win_matrix(rng.normal(size=n) + 2**0.5 * norm.ppf(area), rng.normal(size=n))


def correlated() -> Iterator[Case]:
    """Pearson's r of two beliefs."""
    for r in (0.0, 0.6, 0.9):

        def one(rng: Rng, n: int, r: float = r) -> Estimate:
            x, noise = rng.normal(size=(2, n))
            rows = np.stack([x, r * x + (1 - r * r) ** 0.5 * noise], 1)
            return weighted_bootstrap(lambda w: correlations_of(rows, w), n)

        yield Case("correlation", f"r = {r:g}", r, one)


def cosines() -> Iterator[Case]:
    """Cosines of directions, from states of 64 dimensions."""
    for cosine in (0.0, 0.3):

        def noiseless(rng: Rng, n: int, cosine: float = cosine) -> Estimate:
            return compare_directions(*_two_directions(rng, n, cosine)).noiseless

        def plain(rng: Rng, n: int, cosine: float = cosine) -> Estimate:
            return compare_directions(*_two_directions(rng, n, cosine)).mean

        words = f"cosine {cosine:g}"
        yield Case("cosine of directions, without noise", words, cosine, noiseless, slow=True)
        yield Case("cosine of directions", words, np.nan, plain, slow=True)
    yield Case("gap of category cosines", "6 categories", np.nan, _category_gap, slow=True)


def _two_directions(rng: Rng, n: int, cosine: float) -> tuple[Array, Array]:
    """States of both groups, [n 2 1 d]; the groups differ by 2 along each position's direction."""
    states = rng.normal(size=(2, n, 2, 1, 64))
    states += rng.normal(size=(2, n, 1, 1, 64))
    states[0, :, 0, 0, 0] += 4
    states[0, :, 1, 0, 0] += 4 * cosine
    states[0, :, 1, 0, 1] += 4 * (1 - cosine**2) ** 0.5
    return states[0], states[1]


def _category_gap(rng: Rng, n: int) -> Estimate:
    """As claim 6: mean cosine to the others at t_post less that at t_inst."""
    category = np.repeat(np.arange(6), n).tolist()
    noise = rng.normal(size=(2, 7 * n, 1, 64)) + rng.normal(size=(7 * n, 1, 64))
    drawn = []
    for at, own in enumerate((3.0, 1.0)):
        harmful = noise[at, : 6 * n].copy()
        harmful[:, 0, 0] += 4
        harmful[np.arange(6 * n), 0, 1 + np.array(category)] += own
        sides = (torch.from_numpy(one) for one in (harmful, noise[at, 6 * n :]))
        drawn.append(to_others(resampled_cosines(Cloud.of(*sides, category))).mean((1, 2)))
    return centered_interval(drawn[1] - drawn[0])


# Whole rules --------------------------------------------------------------------------------------


def verdict_errors(n: int, repeats: int) -> Iterator[dict[str, object]]:
    """How often a claim on the edge of truth comes out as either verdict, at most 2.5 % wanted."""
    for count in (1, 3, 6):
        conditions = tuple(Condition(f"effect {k}", above=0) for k in range(count))
        claim = Claim("", "", "trial", "", conditions)
        for verdict, means_of in (
            ("not replicated", [0.0] * count),
            ("replicated", [0.0] + [5.0] * (count - 1)),
        ):
            rng = np.random.default_rng([n, count])
            found = [
                claim.verdict({"trial": _effects(rng, n, means_of)}) == verdict
                for _ in range(repeats)
            ]
            rate = proportion(found)
            yield {
                "conditions": count,
                "verdict": verdict,
                "n": n,
                "share": rate.value,
                "low": rate.low,
                "high": rate.high,
                "repeats": repeats,
            }


def _effects(rng: Rng, n: int, means_of: Sequence[float]) -> dict[str, Estimate]:
    rows = (rng.normal(mean, size=n) for mean in means_of)
    return {f"effect {k}": bootstrap_mean(one) for k, one in enumerate(rows)}


def main() -> None:
    """Measure every case at every size, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    cases = [*rates(), *means(), *areas(), *correlated(), *cosines()]
    intervals, errors = [], []
    for n in SIZES:
        for case in tqdm(cases, desc=f"n = {n}", mininterval=30):
            intervals.append(asdict(measure(case, n, args.repeats)))
        errors += verdict_errors(n, args.repeats)
        found = {"intervals": intervals, "verdicts at the edge of truth": errors}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
