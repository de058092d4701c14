"""What turns the judgement, at layers that were chosen on other prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.stats.bootstrap import bootstrap_mean, mean_difference
from latentguard.stats.estimate import Estimate
from latentguard.stats.rates import rate_difference, share
from latentguard.study.figures.figure_05_inversion.collect import (
    CALLED,
    Records,
    Side,
    Task,
    along,
    chance,
)
from latentguard.study.settings import Settings
from latentguard.study.steering import Steering, at_layers, best_layers

ACTS = ", where it acts"
"""At the layers at which the refusal direction turns most replies to plain prompts."""

PLAIN = "Plain prompt"
"""What is asked without a question about it."""

SURELY = 0.1
"""By so much it has to beat random directions there."""


@dataclass(frozen=True)
class Turned:
    """What becomes of m prompts, each at the layer that is best for others."""

    what: str
    """What is counted or measured."""

    along: str
    """How the prompts are steered."""

    picks: NDArray[np.intp]
    """Index of the layer of each, [m]."""

    values: NDArray[Any]
    """Whether it is said, or how far the log-odds move, [draws m]."""

    @property
    def name(self) -> str:
        """As an effect."""
        return f"{self.what} along {self.along}"

    @property
    def estimate(self) -> Estimate:
        """Share, or mean, each prompt counted once."""
        if self.values.dtype == np.bool_:
            return share(self.values)
        return bootstrap_mean(self.values.mean(0))


def turned(task: Task, records: Records, settings: Settings) -> list[Turned]:
    """What turns the answers that are right unsteered, the harmfulness direction first."""
    side, right = task.side, task.right
    if not right.any() or not task.answers:
        return []
    wrong = {way: answers[:, :, right] == side.wrong for way, answers in task.answers.items()}
    acts = _acting(task, records)
    shares = _at_best(task, wrong, side.wrong.capitalize(), None, settings)
    way = along("refuse", side.sign * settings.inversion_coefficient)
    if acts is None or way not in task.answers:
        return shares
    acts = acts[:, right]
    picks, name = best_layers(acts), f"{way.name}{ACTS}"
    is_still_right = task.answers[way][:, :, right] == side.right
    none = _turned_plainly(side, records.by_chance[side.name])[:, :, right]
    plainly = f"{PLAIN} {'accepted' if side.sign < 0 else 'refused'}"
    random = f"{chance('refuse', settings).name}{ACTS}"
    return [
        *shares,
        Turned(side.right.capitalize(), name, picks, at_layers(is_still_right, picks)),
        Turned(plainly, name, picks, at_layers(acts[None], picks)),
        Turned(plainly, random, picks, at_layers(none, picks)),
    ]


def left_alone(shares: Sequence[Turned]) -> dict[str, Estimate]:
    """What becomes of right answers where the refusal direction surely turns plain prompts.

    That a direction leaves answers alone is no finding where it does nothing, or breaks replies as
    any vector of its length does; so nothing is told but where it beats random directions.
    """
    there = [one for one in shares if one.along.endswith(ACTS)]
    plain = [one for one in there if one.what.startswith(PLAIN)]
    if not plain:
        return {}
    acts, none = plain
    over = rate_difference(acts.values[0], none.values)
    effects = {f"{acts.name} minus random": over}
    if over.low > SURELY:
        opposite = next(one for one in there if one.along == acts.along and one is not acts)
        effects[f"{opposite.name}, surely"] = opposite.estimate
    return effects


def moved(task: Task, records: Records, settings: Settings) -> list[Turned]:
    """How far the log-odds of the wrong answer rise, in nats, the harmfulness direction first."""
    if not task.steered_odds or not len(task.odds):
        return []
    shifts = {w: task.side.sign * (odds - task.odds) for w, odds in task.steered_odds.items()}
    what = f"shift towards {task.side.wrong.capitalize()}"
    return _at_best(task, shifts, what, _acting(task, records), settings)


def differences(shares: Sequence[Turned]) -> dict[str, Estimate]:
    """The harmfulness direction against chance at the same layers, and against the refusal
    direction at its own best layers; paired by prompt.
    """
    effects: dict[str, Estimate] = {}
    if not shares:
        return effects
    main, others = shares[0], {one.along: one.values for one in shares[1:]}
    refuse = main.along.replace(CALLED["harmful"], CALLED["refuse"])
    for name, short in ((f"random, norm of {CALLED['harmful']}", "random"), (refuse, refuse)):
        if name in others:
            pair = main.values[0], others[name]
            compare = rate_difference if main.values.dtype == np.bool_ else mean_difference
            effects[f"{main.name} minus {short}"] = compare(*pair)
    return effects


def _acting(task: Task, records: Records) -> NDArray[np.bool_] | None:
    """Whether plain prompts are turned by the refusal direction, [layers n]; None if not known."""
    refused = records.refused.get(task.side.name)
    return None if refused is None else _turned_plainly(task.side, refused)


def _turned_plainly(side: Side, refused: NDArray[np.float64]) -> NDArray[np.bool_]:
    is_turned: NDArray[np.bool_] = refused == (0 if side.sign < 0 else 1)
    return is_turned


def _at_best(
    task: Task,
    values: Mapping[Steering, NDArray[Any]],
    what: str,
    acts: NDArray[np.bool_] | None,
    settings: Settings,
) -> list[Turned]:
    """Each way at its best layers; chance, and the refusal direction, also at those of others."""
    coefficient = task.side.sign * settings.inversion_coefficient
    main, refuse = along("harmful", coefficient), along("refuse", coefficient)
    same = best_layers(values[main][0])
    choices = [(main, main.name, same)]
    for of in CALLED:
        if (control := chance(of, settings)) in values:
            picks = same if of == "harmful" else best_layers(values[refuse][0])
            choices.append((control, control.name, picks))
    if refuse in values:
        choices.append((refuse, f"{refuse.name}, same layers", same))
        if acts is not None:
            choices.append((refuse, f"{refuse.name}{ACTS}", best_layers(acts)))
    choices += [
        (way, _name(way, settings), best_layers(rows[0]))
        for way, rows in values.items()
        if way != main and not way.draws and way.coefficient * task.side.sign > 0
    ]
    return [Turned(what, name, picks, at_layers(values[w], picks)) for w, name, picks in choices]


def _name(way: Steering, settings: Settings) -> str:
    """The coefficient is said if it is not the usual one."""
    usual = abs(way.coefficient) == settings.inversion_coefficient
    return way.name if usual else f"{way.name}, coefficient {abs(way.coefficient):g}"
