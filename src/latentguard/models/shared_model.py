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
from latentguard.states import AttendedSlots, Progress, States, TokenQueries, attended_slots

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
        attended = attended_slots(positions, layers, queries)
        rest = iter(prompts)
        is_first = True
        while group := tuple(islice(rest, GROUP)):
            rows = self._model.lay_out(group, positions)
            values: list[Any] = [None] * len(group)
            for unit in self._units(rows):
                if not is_first:
                    self._segments.between()
                is_first = False
                states = self._read([rows[n] for n in unit], axes[1], attended)
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
        rows: Sequence[CaptureRow],
        layers: tuple[int, ...],
        attended: AttendedSlots | None,
    ) -> list[Float[Tensor, "p l d"]]:
        row, segments = rows[0], self._segments
        if row.length > segments.size and can_be_segmented(self._model, row):
            states, _ = prefill(self._model, row, layers, segments, attended=attended, stop=True)
            return [states]
        return list(self._model.capture_rows(rows, layers, attended=attended))
