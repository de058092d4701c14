"""Actors: each holds a model and does blocks of a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentguard.data.prompt_files import Columns
from latentguard.errors import GuardError, LatentGuardError, PromptError, TemplateError
from latentguard.guard.early_reading import scan_corpus
from latentguard.guard.latent_guard import LatentGuard
from latentguard.integrations.ray import corpora, shards
from latentguard.integrations.ray.corpora import Block, Row
from latentguard.models.chat_model import PROMPTS_PER_STATES, ChatModel
from latentguard.probes.axis import Centroid
from latentguard.probes.fitting import AXES, Poles, fold_axes, merge_poles
from latentguard.prompts import Prompt


class Worker:
    """An actor. It loads once, and returns what goes wrong: Ray would wrap what it raises."""

    load: Callable[..., None]
    """Loads the model."""

    work: Callable[[Block], dict[str, Any]]
    """Does a block."""

    def __init__(self, **how: Any) -> None:
        """Load; a failure is told with the first block."""
        self._failure = ""
        try:
            self.load(**how)
        except LatentGuardError as error:
            self._failure = str(error)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Do the block that ``item`` holds: its index, a ``failure`` or "", what ``work`` says."""
        result: dict[str, Any] = {"index": item["index"], "failure": self._failure}
        if not self._failure:
            try:
                result |= self.work(Block(**item))
            except (LatentGuardError, OSError) as error:
                result["failure"] = str(error)
        return result


class Scorer(Worker):
    """Scores blocks into files."""

    def load(self, *, guard: LatentGuard, source: str, columns: Columns, out: Path) -> None:
        """Load the guard's model, and check that it is."""
        self.guard, self.columns, self.out = guard, columns, out
        self.backend = ChatModel.load(source, dtype=guard.fingerprint.dtype)
        guard.verify_model(self.backend)

    def work(self, block: Block) -> dict[str, Any]:
        """Write the block's file, unless an actor that died had; tells its rows."""
        if not (self.out / block.name).exists():
            self._write(block)
        return {"rows": block.stop - block.start}

    def _write(self, block: Block) -> None:
        rows = list(corpora.read_block(block, self.columns))
        records = [shards.record(row, None) for row in rows if row.prompt is None]
        usable = iter(row for row in rows if row.prompt is not None)
        while window := list(islice(usable, PROMPTS_PER_STATES)):
            records += self._scored(window)
        records.sort(key=itemgetter("row"))
        shards.write_part(self.out, block, records)

    def _scored(self, rows: list[Row]) -> list[dict[str, Any]]:
        """A prompt that cannot be read, or has no score, costs no verdict but its own."""
        try:
            prompts = [row.prompt for row in rows if row.prompt is not None]
            verdicts = scan_corpus(self.guard, self.backend, prompts)
            return list(map(shards.record, rows, verdicts))
        except (PromptError, TemplateError, GuardError) as error:
            if len(rows) == 1:
                return [shards.record(rows[0], None, str(error))]
            half = len(rows) // 2
            return self._scored(rows[:half]) + self._scored(rows[half:])


class Folder(Worker):
    """Folds blocks into centroids."""

    def load(
        self, *, source: str, dtype: str, layers: Sequence[int] | None, columns: Columns
    ) -> None:
        """Load the model."""
        self.backend, self.columns = ChatModel.load(source, dtype=dtype), columns
        self.layers = tuple(range(self.backend.depth + 1) if layers is None else layers)

    def work(self, block: Block) -> dict[str, Any]:
        """Tell the counts and means of the groups of ``AXES``, and their layers."""
        nothing = Centroid.of(torch.empty(0, len(self.layers), self.backend.width))
        poles: Poles = [(nothing, nothing)] * len(AXES)
        for states in self.backend.capture(self._prompts(block), layers=self.layers):
            poles = merge_poles(poles, fold_axes(states))
        flat = [centroid for pair in poles for centroid in pair]
        means = torch.stack([centroid.mean for centroid in flat]).numpy()
        counts = np.array([centroid.count for centroid in flat])
        return {"layers": np.array(self.layers), "counts": counts, "means": means}

    def _prompts(self, block: Block) -> Iterator[Prompt]:
        for row in corpora.read_block(block, self.columns):
            if row.prompt is None:
                raise PromptError(str(row.error))
            yield row.prompt
