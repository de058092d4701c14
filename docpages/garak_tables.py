"""Table of garak's probes against the service, from ``benchmarks/results/garak.json``."""

from __future__ import annotations

from typing import Any

import numpy as np

from docpages.markdown_table import markdown_table, read_result
from latentguard.stats.rates import proportion

GARAK = "python benchmarks/garak_probes.py --garak PYTHON --cap 40 --harmless 100"


def garak_table() -> str:
    """A row a family of probes: attacks that succeed, unguarded and guarded."""
    result = read_result("garak")
    sides = [_by_family(result[name]) for name in ("unguarded", "guarded")]
    rows = [[family, *(_cell(side[family]) for side in sides)] for family in sorted(sides[0])]
    rows.append(["all", *(_cell(_total(side)) for side in sides)])
    return markdown_table(["garak's probes", "unguarded", "guarded"], rows, GARAK)


def _by_family(counts: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Successes and replies of each family."""
    families: dict[str, tuple[int, int]] = {}
    for one in counts:
        family = str(one["probe"]).partition(".")[0]
        successes, prompts = families.get(family, (0, 0))
        families[family] = successes + one["successes"], prompts + one["prompts"]
    return families


def _total(families: dict[str, tuple[int, int]]) -> tuple[int, int]:
    return sum(s for s, _ in families.values()), sum(n for _, n in families.values())


def _cell(counts: tuple[int, int]) -> str:
    """So many of so many, with the share's interval."""
    successes, prompts = counts
    share = proportion(np.arange(prompts) < successes)
    return f"{successes} of {prompts} [{share.low:.2f}, {share.high:.2f}]"


GARAK_TABLES = {"garak": garak_table}
"""Name on a page -> what makes the table."""
