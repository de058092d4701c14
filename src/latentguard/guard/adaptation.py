"""Adaptation: what a guard has learned from labels, and the guard that it was before.

It keeps features of the labelled prompts and no text (``features``). So a batch of labels can be
forgotten: the guard is fitted again from the others, and is the one that never saw the batch.

Axis names in shapes: n labelled prompts, m prompts of the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from latentguard.data.builtin import load_guard_prompts
from latentguard.errors import GuardError
from latentguard.guard.chunk_texts import CALIBRATION_TEXTS, harmless_texts
from latentguard.guard.features import FeatureMap, ReadTexts, probe_inputs, read_texts
from latentguard.guard.leakage import prompt_digest, text_digest
from latentguard.probes.correction import Rows
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress

if TYPE_CHECKING:
    from latentguard.guard.spec import GuardSpec

MAP_ROWS = 5
"""Every so many prompts of the reference standardise its states."""


@dataclass(frozen=True)
class LabelBatch:
    """Labels that were learned together."""

    name: str
    """By which they can be forgotten."""

    date: str
    """When they were learned, such as ``2026-12-31``."""

    harmful: int
    """Prompts with this label."""

    harmless: int
    """Prompts with the other."""

    sha256: str
    """Of the prompts and labels."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Labelled prompts as the guard read them before it learned."""

    texts: ReadTexts
    """Scores and features."""

    harmful: Bool[NDArray[np.bool_], "n"]
    """The labels."""

    digests: Int[NDArray[np.int64], "n"]
    """Of the prompts (``leakage.prompt_digest``)."""

    groups: Int[NDArray[np.int64], "n"]
    """Equal for prompts that are held out together: pairs, or the same text."""

    batches: tuple[str, ...]
    """The batch of each."""

    segments: tuple[str, ...]
    """The segment of each; empty text for none."""

    categories: tuple[str, ...]
    """The risk category of each; empty text for none."""

    def __len__(self) -> int:
        return len(self.harmful)

    @staticmethod
    def of(texts: ReadTexts, prompts: Sequence[Prompt], batch: str) -> Labels:
        """The labels of prompts that were read."""
        return Labels(
            texts,
            np.array([bool(p.harmful) for p in prompts], dtype=bool),
            np.array([prompt_digest(p) for p in prompts], dtype=np.int64),
            np.array([text_digest(p.fold_group) for p in prompts], dtype=np.int64),
            (batch,) * len(prompts),
            tuple(p.segment or "" for p in prompts),
            tuple(p.category or "" for p in prompts),
        )

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Labels:
        """Some of them, in the order given."""
        rows = np.asarray(rows, dtype=np.int64)
        return Labels(
            self.texts.take(rows),
            self.harmful[rows],
            self.digests[rows],
            self.groups[rows],
            _pick(self.batches, rows),
            _pick(self.segments, rows),
            _pick(self.categories, rows),
        )

    def sorted(self) -> Labels:
        """The same in the order of their digests."""
        names = np.array(self.batches)
        return self.take(np.lexsort((names, self.harmful, self.digests)))

    def joined(self, other: Labels) -> Labels:
        """Both, sorted."""
        return Labels(
            self.texts.joined(other.texts),
            np.concatenate([self.harmful, other.harmful]),
            np.concatenate([self.digests, other.digests]),
            np.concatenate([self.groups, other.groups]),
            self.batches + other.batches,
            self.segments + other.segments,
            self.categories + other.categories,
        ).sorted()

    def without(self, batch: str) -> Labels:
        """All but those of a batch."""
        return self.take(np.flatnonzero(np.array(self.batches) != batch))

    @property
    def rows(self) -> Rows:
        """What a correction is learned from: each prompt whole, as it stands."""
        whole = self.texts.whole
        return Rows(
            self.texts.scores[whole], self.texts.features[whole].astype(np.float64), self.harmful
        )

    @property
    def prompts(self) -> list[Prompt]:
        """Stand-ins for the prompts, whose texts are not kept: with digest, label and segment."""
        return [
            Prompt(
                str(digest),
                harmful=bool(harmful),
                segment=segment or None,
                category=category or None,
                pair=str(group),
            )
            for digest, harmful, segment, category, group in zip(
                self.digests, self.harmful, self.segments, self.categories, self.groups, strict=True
            )
        ]


@dataclass(frozen=True, eq=False)
class Reference:
    """Built-in prompts as the guard reads them: what a change is measured against."""

    feature_map: FeatureMap
    """How features are made of states."""

    short: ReadTexts
    """The built-in guard prompts of the validation split that are read whole."""

    harmful: Bool[NDArray[np.bool_], "m"]
    """Their labels."""

    is_kept: Bool[NDArray[np.bool_], "m"]
    """Half of them, by pair: kept to measure what a change does to them. The others hold it back.
    """

    long: ReadTexts | None
    """Harmless documents and chats; None where the guard reads none by chunks."""

    def rows(self, *, kept: bool) -> Rows:
        """The short prompts that are kept to measure a change, or those that hold it back."""
        half = self.is_kept == kept
        whole = self.short.whole[half]
        return Rows(
            self.short.scores[whole],
            self.short.features[whole].astype(np.float64),
            self.harmful[half],
        )

    @staticmethod
    def read(guard: GuardSpec, backend: Backend, progress: Progress | None = None) -> Reference:
        """Read the built-in prompts with a guard.

        Args:
            guard: Before it learned.
            backend: Its model.
            progress: Called with the number of prompts read.
        """
        prompts = [p for p in load_guard_prompts("validation") if not guard.is_chunked(p)]
        wholes = [guard.reading.prepare(prompt) for prompt in prompts[::MAP_ROWS]]
        feature_map = FeatureMap.of(probe_inputs(guard, backend, wholes))
        short = read_texts(guard, backend, prompts, feature_map, progress=progress)
        long = None
        if guard.chunking is not None:
            texts = harmless_texts("validation", CALIBRATION_TEXTS, guard.chunking.longer_than)
            long = read_texts(guard, backend, texts, feature_map, progress=progress)
        harmful = np.array([bool(p.harmful) for p in prompts])
        is_kept = np.array([text_digest(p.fold_group) % 2 == 1 for p in prompts])
        return Reference(feature_map, short, harmful, is_kept, long)

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and tensors."""
        tensors = {"mean": self.feature_map.mean, "scale": self.feature_map.scale}
        tensors["harmful"] = torch.from_numpy(self.harmful)
        tensors["is_kept"] = torch.from_numpy(self.is_kept)
        tensors |= _named("short", self.short.to_tensors())
        if self.long is not None:
            tensors |= _named("long", self.long.to_tensors())
        return {"prompts": len(self.short)}, tensors

    @staticmethod
    def from_dict(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        reference = Reference(
            FeatureMap(tensors["mean"], tensors["scale"]),
            ReadTexts.from_tensors(_part("short", tensors)),
            tensors["harmful"].numpy(),
            tensors["is_kept"].numpy(),
            ReadTexts.from_tensors(long) if (long := _part("long", tensors)) else None,
        )
        sizes = {len(reference.short), len(reference.harmful), len(reference.is_kept)}
        if sizes != {record["prompts"]}:
            raise ValueError("the reference has not a label for each of its prompts")
        return reference


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What a guard has learned, and what it takes to forget it."""

    batches: tuple[LabelBatch, ...]
    """By name."""

    labels: Labels
    """Of all batches."""

    base_record: Mapping[str, Any]
    """The JSON of the guard before it learned."""

    base_tensors: Mapping[str, Tensor]
    """Those of its tensors that are others now."""

    choice: str
    """What was changed, and why; a sentence."""

    max_fpr: float | None = None
    """The rate asked for; None for that of the guard before."""

    def require_new(self, name: str) -> None:
        """Raise a GuardError if there is a batch of that name."""
        if any(batch.name == name for batch in self.batches):
            raise GuardError(
                f"The guard has learned a batch '{name}' already: choose another name, or forget "
                f"it first with --forget {name}."
            )

    def require_batch(self, name: str) -> None:
        """Raise a GuardError if there is no batch of that name."""
        if all(batch.name != name for batch in self.batches):
            names = ", ".join(batch.name for batch in self.batches)
            raise GuardError(f"The guard has learned no batch '{name}'; it has: {names}.")

    def notes(self) -> list[str]:
        """Paragraphs and a table for the model card."""
        rows = "".join(
            f"| {b.name} | {b.date} | {b.harmful} | {b.harmless} | {b.sha256[:12]} |\n"
            for b in self.batches
        )
        return [
            f"Adapted to labels. {self.choice}",
            "| batch of labels | learned | harmful | harmless | digest |\n"
            f"| --- | --- | --- | --- | --- |\n{rows}".rstrip(),
        ]

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and tensors."""
        labels = self.labels
        record = {
            "batches": [asdict(batch) for batch in self.batches],
            "rows": {
                "batches": labels.batches,
                "segments": labels.segments,
                "categories": labels.categories,
            },
            "base": dict(self.base_record),
            "choice": self.choice,
            "max_fpr": self.max_fpr,
        }
        tensors = {
            name: torch.from_numpy(getattr(labels, name))
            for name in ("harmful", "digests", "groups")
        }
        tensors |= _named("texts", labels.texts.to_tensors())
        return record, tensors | _named("base", self.base_tensors)

    @staticmethod
    def from_dict(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adaptation:
        """What ``to_dict`` wrote.

        Raises:
            LookupError, TypeError, ValueError: if it is damaged.
        """
        names = record["rows"]
        labels = Labels(
            ReadTexts.from_tensors(_part("texts", tensors)),
            tensors["harmful"].numpy(),
            tensors["digests"].numpy(),
            tensors["groups"].numpy(),
            tuple(names["batches"]),
            tuple(names["segments"]),
            tuple(names["categories"]),
        )
        if len({len(getattr(labels, field.name)) for field in fields(labels)}) > 1:
            raise ValueError("the labels have not all of them a row of features")
        return Adaptation(
            batches=tuple(LabelBatch(**batch) for batch in record["batches"]),
            labels=labels,
            base_record=dict(record["base"]),
            base_tensors=_part("base", tensors),
            choice=str(record["choice"]),
            max_fpr=record["max_fpr"],
        )


def _pick(names: tuple[str, ...], rows: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(names[row] for row in rows)


def _named(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def _part(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
