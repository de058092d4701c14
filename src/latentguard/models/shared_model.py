"""A model whose long prompts are read in segments, with short work of others in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from latentguard.models.chat_model import ChatModel
from latentguard.models.layout import CaptureRow
from latentguard.models.segments import can_be_segmented, capture_in_segments
from latentguard.prompts import Prompt
from latentguard.states import Progress, States

GROUP = 256
"""Prompts that are sorted into short and long ones together."""


class SharedModel:
    """Hands everything to a model, but reads long prompts one by one, in segments."""

    def __init__(self, model: ChatModel, *, segment: int, between: Callable[[], None]) -> None:
        """Wrap a model.

        Args:
            model: The model.
            segment: Tokens that are read at once; a longer prompt is read in several segments.
            between: Called between two segments; it may use the model.
        """
        self._model, self._segment, self._between = model, segment, between

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def capture(
        self,
        prompts: Iterable[Prompt],
        *,
        positions: Sequence[str],
        layers: Sequence[int],
        progress: Progress | None = None,
    ) -> Iterator[States]:
        """Yield states in the order of the prompts, as ``ChatModel.capture`` does."""
        where = dict(positions=positions, layers=layers, progress=progress)
        rest = iter(prompts)
        while group := tuple(islice(rest, GROUP)):
            rows = [CaptureRow.of(layout, positions) for layout in self._model.chat(group)]
            long = [n for n, row in enumerate(rows) if self._is_long(row)]
            if not long:
                yield from self._model.capture(group, **where)  # type: ignore[arg-type]
                continue
            values: list[Any] = [None] * len(group)
            short = [n for n in range(len(group)) if n not in long]
            texts = [group[n] for n in short]
            states = list(self._model.capture(texts, **where))  # type: ignore[arg-type]
            for n, value in zip(short, (v for one in states for v in one.values), strict=True):
                values[n] = value
            for n in long:
                self._model.check_length(rows[n].length, group[n])
                values[n] = capture_in_segments(
                    self._model, rows[n], layers, size=self._segment, between=self._between
                )
                if progress is not None:
                    progress(1)
            axes = tuple(positions), tuple(layers)
            yield States(torch.stack(values), group, *axes, self._model.fingerprint)

    def _is_long(self, row: CaptureRow) -> bool:
        return row.length > self._segment and can_be_segmented(self._model, row)
