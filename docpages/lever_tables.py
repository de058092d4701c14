"""Tables of levers of reading that the default rule does not use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from docpages.markdown_table import GUARDS, markdown_table, read_results

ARMS = {
    "default": "**the default rule: AUROC**",
    "attended": "`--reading attended`",
    "tokens: mean": "instruction's tokens: mean",
    "tokens: attention": "instruction's tokens: attention, 4 heads",
    "tokens: max": "instruction's tokens: maximum, 4 heads",
    "low rank": "low-rank probe of the default's states",
    "default + tokens: attention": "default and attention, averaged",
    "default + tokens: max": "default and maximum, averaged",
    "default + low rank": "default and low rank, averaged",
    "hard rows": "hard rows count more",
    "variants: fit": "fitted on several surroundings",
    "variants: read": "read in several surroundings",
    "variants: fit and read": "fitted and read in several surroundings",
    "teacher: labels of its rows": "labels, the teacher's rows",
    "teacher: scores": "the teacher's scores, no labels",
    "teacher: labels and scores": "labels and the teacher's scores",
    "n-grams": "n-grams, same training prompts",
    "the paper's rule": "the paper's rule, same prompts and layers",
    "random direction": "random direction, median of five",
}
"""Arm in the results -> name on the page."""

SETS = {
    "mean": "mean of 6",
    "jbb": "JBB",
    "xstest": "XSTest",
    "openai_moderation": "moderation",
    "toxicchat_third": "ToxicChat",
    "sorry_bench + alpaca": "SORRY-Bench",
    "catqa + alpaca": "CatQA",
    "built-in pairs, test": "own pairs",
    "built-in guard prompts, test": "own guard prompts",
}
"""Set in the results -> name on the page."""

COMMAND = "python benchmarks/{}.py --model MODEL --data-dir DATA --cache DIR --out FILE"


def gains_table(kind: str, script: str) -> str:
    """AUROC of the default rule on each set, and what each lever changes, a block a model.

    Args:
        kind: Of the records.
        script: That makes them.
    """
    rows = []
    measured = read_results(kind, GUARDS)
    for name, record in measured:
        for arm, label in ARMS.items():
            if arm not in record["arms"]:
                continue
            figures = record["arms"][arm]
            shown = [
                _figure(figures[one]["auroc"], "")
                if arm == "default"
                else _figure(figures[one]["gain"], "+")
                for one in SETS
            ]
            tried = str(figures["choices"].get("tried", ""))
            rows.append(
                ["" if arm != "default" else name, label, tried, str(figures["reads"]), *shown]
            )
    sizes = measured[0][1]["n"]
    sets = [
        f"{label} ({' + '.join(map(str, sizes[one]))})" if one in sizes else label
        for one, label in SETS.items()
    ]
    return markdown_table(
        ["model", "arm (below the first: gain over it)", "choices tried", "reads", *sets],
        rows,
        COMMAND.format(script),
    )


def _figure(values: Sequence[float], sign: str) -> str:
    """A figure with its interval."""
    value, low, high = (f"{one:{sign}.3f}" for one in values)
    return f"{value} [{low}, {high}]"


LEVER_TABLES: dict[str, Callable[[], str]] = {
    "reading-levers": partial(gains_table, "reading-levers", "reading_levers"),
    "attended": partial(gains_table, "attended", "attended"),
}
"""Name on a page -> what makes the table."""
