"""Figure 9b as the paper prints it: one tested category, the best layer of each direction.

The best of many layers, taken on the tested prompts, flatters every direction, and a direction that
is tried at more layers more; the table of flips chooses layer and question on other prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from latentguard.interventions import Intervention
from latentguard.prompts import Prompt
from latentguard.report.document import Cell, Table
from latentguard.states import States
from latentguard.stats.rates import proportion
from latentguard.study.cached_model import CachedModel
from latentguard.study.figures.figure_09_categories.steering import halves
from latentguard.study.finding import cells
from latentguard.study.judge import Answer
from latentguard.study.prompt_groups import inversion_prompt
from latentguard.study.settings import Settings

TESTED = "hate"
"""In the name of the category that the paper tests; the first one, where none has it."""

AVERAGE = "average of all"


@dataclass(frozen=True)
class PrintedFlips:
    """Answers of one category's prompts, steered along the reverse of each direction."""

    tested: str
    """The category."""

    layers: tuple[int, ...]
    """Where, one layer at a time."""

    answers: Mapping[str, NDArray[np.str_]]
    """Direction -> answers, [layers n]."""

    unsteered: tuple[Answer, ...]
    """Of the n prompts."""


def steer_one_category(
    model: CachedModel, settings: Settings, every: Mapping[str, Sequence[Prompt]], base: States
) -> PrintedFlips:
    """Steer the tested half of one category at every layer, with the directions of all categories.

    Args:
        model: The model.
        settings: Which layers, which coefficient.
        every: Category -> its prompts.
        base: States of the harmless prompts.
    """
    tested = next((name for name in every if TESTED in name.lower()), next(iter(every)))
    prompts = [inversion_prompt(p) for p in halves(every[tested])[1]]
    harmless = base.at("t_inst").double().mean(0)
    directions = {}
    for name, members in every.items():
        fitted = model.states(halves(members)[0], what="states: risk categories")
        directions[name] = (fitted.at("t_inst").double().mean(0) - harmless).float()
    directions[AVERAGE] = torch.stack(list(directions.values())).mean(0)
    layers, many = settings.layers(model.depth), -settings.inversion_coefficient
    how = [
        Intervention(layer, vectors[layer], many, "before", name)
        for name, vectors in directions.items()
        for layer in layers
    ]
    unsteered, *steered = model.replies(
        prompts,
        [None, *how],
        what="Figure 9b as printed",
        max_new_tokens=settings.inversion_tokens,
    )
    answers: dict[str, list[list[Answer]]] = {name: [] for name in directions}
    for one, replies in zip(how, steered, strict=True):
        answers[one.label].append([model.answer(reply) for reply in replies])
    arrays = {name: np.array(rows) for name, rows in answers.items()}
    return PrintedFlips(tested, layers, arrays, tuple(map(model.answer, unsteered)))


def printed_table(flips: PrintedFlips) -> Table:
    """The best refusal rate of each direction, the highest first."""
    rows: list[tuple[Cell, ...]] = []
    for name, answers in flips.answers.items():
        rates = [_no_rate(layer) for layer in answers]
        best = int(np.nanargmax(rates)) if not np.isnan(rates).all() else None
        if best is None:
            rows.append((name, None, None, None, None, 0))
        else:
            sayings = _sayings(answers[best])
            rows.append((name, flips.layers[best], *cells(proportion(sayings == "no"))))
    rows.sort(key=lambda row: -float(row[2] or 0))
    base = _sayings(np.array(flips.unsteered))
    rows.append(
        ("unsteered", None, *(cells(proportion(base == "no")) if len(base) else [None] * 4))
    )
    note = (
        f"Tested on {len(flips.unsteered)} prompts of '{flips.tested}', question of Table 2. The "
        "best layer of each direction, chosen on these very prompts, so every rate is too good. "
        "Rate: No among the answers that are Certainly or No (n). Intervals: 95 %, Wilson, of that "
        "layer alone. The paper (Qwen2-7B): own 1.00, Adult_Content 1.00, Child_Abuse 0.96, others "
        "0.32 to 0.84, average 0.52."
    )
    columns = ("reverse direction of", "best layer", "refusal rate", "low", "high", "n")
    return Table("Figure 9b as printed", columns, tuple(rows), note)


def _sayings(answers: NDArray[np.str_]) -> NDArray[np.str_]:
    """The answers that the authors' evaluation counts."""
    return answers[np.isin(answers, ("no", "certainly"))]


def _no_rate(answers: NDArray[np.str_]) -> float:
    sayings = _sayings(answers)
    return float((sayings == "no").mean()) if len(sayings) else float("nan")
