"""Planted records of a fine-tuning attack."""

import numpy as np

from latentguard.prompts import Prompt
from latentguard.study.figures.figure_07_finetuning.collect import Records
from latentguard.study.figures.figure_07_finetuning.snapshot import Stage


def stage_of(name, count, refused, scale=1.0, n=20, **rest):
    """20 harmful prompts with beliefs scale * (0.1, 0.3), 20 harmless ones with their reverse."""
    beliefs = np.repeat([1.0, -1.0], n)[:, None] * np.array([0.1, 0.3])
    return Stage(
        name,
        count,
        refused=[i < refused for i in range(n)] + [False] * n,
        broken=[False] * 2 * n,
        harmful=(scale * beliefs).tolist(),
        refuse=beliefs.tolist(),
        linear=(scale * beliefs.mean(1)).tolist(),
        **rest,
    )


def planted_records(*stages, n=20):
    prompts = [Prompt(f"p{i}", harmful=i < n) for i in range(2 * n)]
    return Records(tuple(prompts), stages, (0, 2), "40 pairs of them")


def rows_of(finding, title):
    (table,) = [p for p in finding.section.parts if p.title == title]
    return {row[:2]: row[2:] for row in table.rows}
