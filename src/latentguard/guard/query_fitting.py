"""Queries for the reading ``attended``: fitted on half of the training prompts.

The penalty, the probabilities and the spread of the guard come from the other half, since the
queries have seen the labels of the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentguard.errors import GuardError
from latentguard.models.chat_model import ChatModel
from latentguard.models.instruction_states import capture_instructions
from latentguard.probes.queries import fit_queries
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, Reading

MAX_ROWS, MAX_TOKENS = 4000, 200_000
"""Prompts that queries are fitted on, and tokens in them, at most: each token's states are kept."""

FEWEST = 10
"""Prompts of each class in each half, at least."""


def fit_reading_queries(
    backend: Backend,
    reading: Reading,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    *,
    progress: Progress | None = None,
) -> tuple[Reading, list[int]]:
    """The reading with its queries, and the rows that these have not seen.

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
    seen = within_tokens(backend, prompts, query_rows(prompts))
    rows = [reading.prepare(prompts[n]) for n in seen]
    at_layers = tuple(sorted({layers[0], layers[len(layers) // 2], layers[-1]}))
    states = capture_instructions(backend, rows, at_layers, progress=progress)
    queries = fit_queries(states, [bool(row.harmful) for row in rows], at_layers)
    return reading.with_queries(queries), sorted(set(range(len(prompts))) - set(seen))


def query_rows(prompts: Sequence[Prompt]) -> list[int]:
    """Rows for the queries, in random order: half of each class, ``MAX_ROWS`` at most.

    Pairs stay together.

    Raises:
        GuardError: if a half has too few prompts of a class.
    """
    rows_of: dict[str, list[int]] = {}
    for n, prompt in enumerate(prompts):
        rows_of.setdefault(prompt.fold_group, []).append(n)
    groups = list(rows_of.values())
    is_harmful = np.array([bool(prompt.harmful) for prompt in prompts], dtype=bool)
    counts = np.array([is_harmful.sum(), (~is_harmful).sum()])
    room = (counts * min(0.5, MAX_ROWS / max(len(prompts), 1))).astype(int)
    rows = list[int]()
    for number in np.random.default_rng(0).permutation(len(groups)):
        group = groups[number]
        own = np.array([is_harmful[group].sum(), (~is_harmful[group]).sum()])
        if (own <= room).all():
            room -= own
            rows += group
    taken = np.array([is_harmful[rows].sum(), (~is_harmful[rows]).sum()]) if rows else counts * 0
    if min(*taken, *(counts - taken)) < FEWEST:
        raise GuardError(
            f"The reading 'attended' needs at least {2 * FEWEST} prompts of each class, as its "
            f"queries are fitted on half of them; found {counts[0]} harmful and {counts[1]} "
            "harmless. Give more, or use 'pooled'."
        )
    return rows


def within_tokens(model: ChatModel, prompts: Sequence[Prompt], rows: Sequence[int]) -> list[int]:
    """The first of some rows, with ``MAX_TOKENS`` tokens together at most.

    Raises:
        GuardError: if these have too few prompts of a class.
    """
    layouts = model.chat([prompts[n] for n in rows])
    ends = np.cumsum([len(layout.instruction) for layout in layouts])
    kept = [n for n, end in zip(rows, ends, strict=True) if end <= MAX_TOKENS]
    harmful = sum(bool(prompts[n].harmful) for n in kept)
    if min(harmful, len(kept) - harmful) < FEWEST:
        raise GuardError(
            f"The queries of 'attended' need {FEWEST} prompts of each class within {MAX_TOKENS:,} "
            f"tokens; found {harmful} harmful and {len(kept) - harmful} harmless. Give shorter "
            "prompts, or use 'pooled'."
        )
    return kept
