"""The reading ``attended``: its queries, fitted on the tokens of the training prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from latentguard.errors import GuardError
from latentguard.models.chat_model import ChatModel
from latentguard.models.instruction_states import capture_instructions
from latentguard.probes.queries import AttendedFit, fit_attended
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, Reading

MAX_TOKENS = 200_000
"""Tokens in the prompts that queries are fitted on, at most: each token's states are kept."""

FEWEST = 10
"""Prompts of each class among them, at least."""


def fit_reading_queries(
    backend: Backend,
    reading: Reading,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    *,
    progress: Progress | None = None,
) -> tuple[Reading, AttendedFit]:
    """The reading with its queries, and the probe of what they attend to.

    Args:
        backend: The model.
        reading: ``attended``, without queries.
        prompts: Labelled.
        layers: Those of the probe; the queries look at the first, and what they attend to is read
            at the first, the middle and the last.
        progress: Called with the number of prompts just read for the queries.

    Raises:
        GuardError: if there are too few prompts, or the backend lets no states out.
    """
    if not isinstance(backend, ChatModel):
        raise GuardError(
            "The reading 'attended' is fitted on the states of each token; expected a ChatModel, "
            f"found {type(backend).__name__}."
        )
    numbers = query_rows(backend, prompts)
    rows = [prompts[n] for n in numbers]
    at_layers = tuple(sorted({layers[0], layers[len(layers) // 2], layers[-1]}))
    states = capture_instructions(backend, rows, at_layers, progress=progress)
    labels = [bool(row.harmful) for row in rows]
    fit = fit_attended(states, labels, [row.fold_group for row in rows], at_layers)
    held_out = np.full(len(prompts), np.nan)
    held_out[numbers] = fit.held_out
    return reading.with_queries(fit.queries), replace(fit, held_out=held_out)


def query_rows(model: ChatModel, prompts: Sequence[Prompt]) -> list[int]:
    """The rows for the queries: all, or at random so many that ``MAX_TOKENS`` hold their tokens.

    Pairs stay together.

    Raises:
        GuardError: if these have too few prompts of a class.
    """
    tokens = np.array([len(layout.instruction) for layout in model.chat(prompts)])
    rows_of: dict[str, list[int]] = {}
    for n, prompt in enumerate(prompts):
        rows_of.setdefault(prompt.fold_group, []).append(n)
    groups = list(rows_of.values())
    kept, room = list[int](), MAX_TOKENS
    for number in np.random.default_rng(0).permutation(len(groups)):
        size = int(tokens[groups[number]].sum())
        if size <= room:
            room -= size
            kept += groups[number]
    harmful = sum(bool(prompts[n].harmful) for n in kept)
    if min(harmful, len(kept) - harmful) < FEWEST:
        raise GuardError(
            f"The queries of 'attended' need {FEWEST} prompts of each class within {MAX_TOKENS:,} "
            f"tokens; found {harmful} harmful and {len(kept) - harmful} harmless. Give more or "
            "shorter prompts, or use 'pooled'."
        )
    return sorted(kept)
