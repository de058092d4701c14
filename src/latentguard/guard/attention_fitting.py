"""Queries for the reading ``attended``: fitted on half of the training prompts.

What is said of the guard's scores (the penalty that is chosen, probabilities, the spread) comes
from the other half, since the queries have seen the labels of the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentguard.errors import GuardError
from latentguard.models.chat_model import ChatModel
from latentguard.models.instruction_states import capture_instructions
from latentguard.probes.probe import require_both_classes
from latentguard.probes.queries import fit_queries
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, Reading

MAX_ROWS = 4000
"""Prompts that queries are fitted on, at most: their states lie in memory token by token."""

FEWEST_ROWS = 40
"""Prompts that a guard with queries is fitted on, at least."""


def fit_attention(
    backend: Backend,
    reading: Reading,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    *,
    progress: Progress | None = None,
) -> tuple[Reading, list[int]]:
    """The reading with its queries, and which rows these did not see.

    Args:
        backend: The model.
        reading: ``attended``, without queries.
        prompts: Labelled.
        layers: Those of the probe; the queries look at the first, and are fitted on the first, the
            middle and the last.
        progress: Called with the number of prompts just read for the queries.

    Raises:
        GuardError: if there are too few prompts, or the backend lets no states out.
    """
    if not isinstance(backend, ChatModel):
        raise GuardError(
            "The reading 'attended' is fitted on the states of each token; expected a ChatModel, "
            f"found {type(backend).__name__}."
        )
    if len(prompts) < FEWEST_ROWS:
        raise GuardError(
            f"The reading 'attended' needs at least {FEWEST_ROWS} prompts, as its queries are "
            f"fitted on half of them; found {len(prompts)}. Give more, or use 'pooled'."
        )
    seen, unseen = split_rows(prompts)
    require_both_classes([bool(prompts[n].harmful) for n in seen], "linear")
    rows = [reading.prepare(prompts[n]) for n in seen]
    at_layers = tuple(sorted({layers[0], layers[len(layers) // 2], layers[-1]}))
    states = capture_instructions(backend, rows, at_layers, progress=progress)
    attention = fit_queries(states, [bool(row.harmful) for row in rows], at_layers)
    return reading.with_attention(attention), unseen


def split_rows(prompts: Sequence[Prompt]) -> tuple[list[int], list[int]]:
    """Rows for the queries, half of all but at most ``MAX_ROWS``, and all others.

    Pairs stay together.
    """
    rows_of: dict[str, list[int]] = {}
    for n, prompt in enumerate(prompts):
        rows_of.setdefault(prompt.fold_group, []).append(n)
    groups = list(rows_of.values())
    limit = min(MAX_ROWS, len(prompts) // 2)
    seen = list[int]()
    for number in np.random.default_rng(0).permutation(len(groups)):
        if len(seen) + len(groups[number]) <= limit:
            seen += groups[number]
    unseen = sorted(set(range(len(prompts))) - set(seen))
    return sorted(seen), unseen
