"""A model that is read in small units, with the work of others in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.models.chat_model import ChatModel
from latentguard.models.layout import CaptureRow
from latentguard.models.segments import Segments, can_be_segmented, prefill
from latentguard.prompts import Prompt
from latentguard.states import Progress, States, TokenQueries, attended_slots, no_progress

GROUP = 256
"""Prompts that are sorted by length together."""


class SharedModel:
    """Hands everything to a model, but reads prompts in units of so many tokens.

    Short prompts are read in batches that fit into a unit, long ones by themselves, in segments.
    """

    def __init__(self, model: ChatModel, segments: Segments) -> None:
        """Wrap a model.

        Args:
            model: The model.
            segments: The size of a unit, and what is done between two of them.
        """
        self._model = model
        self._segments = segments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def capture(
        self,
        prompts: Iterable[Prompt],
        *,
        positions: Sequence[str],
        layers: Sequence[int],
        queries: TokenQueries | None = None,
        progress: Progress | None = None,
    ) -> Iterator[States]:
        """Yield states in the order of the prompts, as ``ChatModel.capture`` does."""
        axes = tuple(positions), tuple(layers)
        rest = iter(prompts)
        is_first = True
        while group := tuple(islice(rest, GROUP)):
            rows = [CaptureRow.of(layout, positions) for layout in self._model.chat(group)]
            values: list[Any] = [None] * len(group)
            for unit in self._units(rows):
                if not is_first:
                    self._segments.between()
                is_first = False
                texts = [group[n] for n in unit]
                states = self._read(texts, [rows[n] for n in unit], *axes, queries)
                for n, value in zip(unit, states, strict=True):
                    values[n] = value
                if progress is not None:
                    progress(len(unit))
            yield States(torch.stack(values), group, *axes, self._model.fingerprint)

    def _units(self, rows: Sequence[CaptureRow]) -> Iterator[list[int]]:
        """Prompts that are read together: of like length, padded no longer than a unit."""
        batch: list[int] = []
        for n in sorted(range(len(rows)), key=lambda n: rows[n].length):
            if batch and rows[n].length * (len(batch) + 1) > self._segments.size:
                yield batch
                batch = []
            batch.append(n)
        if batch:
            yield batch

    def _read(
        self,
        texts: Sequence[Prompt],
        rows: Sequence[CaptureRow],
        positions: tuple[str, ...],
        layers: tuple[int, ...],
        queries: TokenQueries | None,
    ) -> list[Float[Tensor, "p l d"]]:
        row, segments = rows[0], self._segments
        if row.length > segments.size and can_be_segmented(self._model, row):
            self._model.check_length(row.length, texts[0])
            attended = attended_slots(positions, layers, queries)
            values, _ = prefill(self._model, row, layers, segments, attended=attended, stop=True)
            return [values]
        captured = self._model.capture(
            texts, positions=positions, layers=layers, queries=queries, progress=no_progress
        )
        return [value for states in captured for value in states.values]
