"""Features: what a guard keeps of a prompt to learn from its label, in place of its text.

A guard reads tens of thousands of numbers of a prompt. Projected on ``FEATURES`` fixed random
directions they keep their inner products up to noise (Johnson and Lindenstrauss, 1984), and a
linear rule on the features is a linear rule on the states: one weight of the guard's own shape.

Axis names in shapes: v variants of all prompts, s slots (each position in turn, each layer in
turn), d width, k features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from latentguard.errors import GuardError
from latentguard.guard.chunking import Chunking
from latentguard.probes.fitting import slots
from latentguard.prompts import Prompt
from latentguard.states import Backend, Progress, Scoring, no_progress

if TYPE_CHECKING:
    from latentguard.guard.spec import GuardSpec

FEATURES = 512
"""Random directions: 1,024 learn as much from labels, 256 a little less (lab notes)."""

SMALLEST_SCALE = 1e-4
"""Slots that vary less are left out: divided by it, they would be noise."""


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """States to features: standardised slot by slot, then projected."""

    mean: Float[Tensor, "s d"]
    """Of the states over the reference, float32."""

    scale: Float[Tensor, "s d"]
    """Their standard deviation; infinite where a state does not vary."""

    @staticmethod
    def of(inputs: Iterable[Float[Tensor, "n s d"]]) -> FeatureMap:
        """The map that standardises these states, given in batches."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in inputs:
            count += len(batch)
            total = total + batch.double().sum(0)
            squares = squares + batch.double().square().sum(0)
        mean = total / count
        scale = (squares / count - mean.square()).clamp_min(0).sqrt()
        return FeatureMap(
            mean.float(), scale.masked_fill(scale < SMALLEST_SCALE, torch.inf).float()
        )

    def __call__(self, inputs: Float[Tensor, "n s d"]) -> Float[Tensor, "n k"]:
        """The features of states, float32."""
        features = torch.zeros(len(inputs), FEATURES)
        for slot in range(inputs.shape[1]):
            standard = (inputs[:, slot].float() - self.mean[slot]) / self.scale[slot]
            features.addmm_(standard, self._signs(slot))
        return features * self._unit

    def weight(
        self, direction: Float[NDArray[np.float64], "k"]
    ) -> tuple[Float[Tensor, "s d"], float]:
        """The weight and bias of states that give ``features . direction``."""
        own = torch.tensor(direction, dtype=torch.float32) * self._unit
        rows = [self._signs(slot) @ own for slot in range(len(self.mean))]
        weight = torch.stack(rows) / self.scale
        return weight, -float((weight.double() * self.mean.double()).sum())

    @property
    def _unit(self) -> float:
        return float((FEATURES * self.mean.numel()) ** -0.5)

    def _signs(self, slot: int) -> Float[Tensor, "d k"]:
        """The random directions of one slot, +1 and -1: the same on every machine."""
        width = self.mean.shape[1]
        raw = np.random.PCG64(slot).random_raw(width * FEATURES // 64)
        bits = np.unpackbits(raw.astype("<u8").view(np.uint8)).reshape(width, FEATURES)
        return torch.from_numpy(bits).float() * 2 - 1


@dataclass(frozen=True, eq=False)
class ReadTexts:
    """Prompts as a guard read them: the scores and features of all that was read for each."""

    scores: Float[NDArray[np.float64], "v"]
    """Of each variant (``reading_plan``), in the order of the prompts."""

    features: Float[NDArray[np.float16], "v k"]
    """Of the same."""

    owners: Int[NDArray[np.int64], "v"]
    """The number of its prompt, rising from 0."""

    versions: Int[NDArray[np.int64], "v"]
    """Which version of the prompt: 0 as it stands, then the decoded texts."""

    is_chunk: Bool[NDArray[np.bool_], "v"]
    """Whether it is a chunk, rather than the whole of its version."""

    def __len__(self) -> int:
        """The number of prompts."""
        return int(self.owners[-1]) + 1 if len(self.owners) else 0

    @property
    def whole(self) -> Int[NDArray[np.int64], "n"]:
        """Which variant is each prompt as it stands, whole."""
        return np.flatnonzero(~self.is_chunk & (self.versions == 0))

    @property
    def is_chunked(self) -> Bool[NDArray[np.bool_], "n"]:
        """Whether each prompt is read by chunks, in one version at least."""
        chunked = np.zeros(len(self), dtype=bool)
        chunked[self.owners[self.is_chunk]] = True
        return chunked

    def take(self, prompts: Sequence[int] | NDArray[np.int64]) -> ReadTexts:
        """Some of the prompts, in the order given."""
        wanted = np.asarray(prompts, dtype=np.int64)
        starts = np.searchsorted(self.owners, np.arange(len(self) + 1))
        own = [np.arange(starts[n], starts[n + 1]) for n in wanted]
        rows = np.concatenate([*own, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        owners = np.repeat(np.arange(len(wanted)), list(map(len, own)))
        values = {field.name: getattr(self, field.name)[rows] for field in fields(self)}
        return ReadTexts(**{**values, "owners": owners})

    def joined(self, other: ReadTexts) -> ReadTexts:
        """These prompts, then the others."""
        moved = replace(other, owners=other.owners + len(self))
        both = {
            field.name: np.concatenate([getattr(self, field.name), getattr(moved, field.name)])
            for field in fields(self)
        }
        return ReadTexts(**both)

    def combine(
        self, scores: Float[NDArray[np.float64], "v"], chunking: Chunking | None, threshold: float
    ) -> Float[NDArray[np.float64], "n"]:
        """The score of each prompt, as ``reading_plan.combine`` finds it, but for ties.

        Args:
            scores: Of each variant.
            chunking: The guard's.
            threshold: The guard's, for prompts that are read whole.
        """
        firsts = np.flatnonzero(~self.is_chunk)
        version = np.cumsum(~self.is_chunk) - 1
        best = scores[firsts].astype(np.float64)
        counts = np.bincount(version, minlength=len(firsts)) - 1
        highest = np.full(len(firsts), -np.inf)
        np.maximum.at(highest, version[self.is_chunk], scores[self.is_chunk])
        for n in np.flatnonzero(counts):
            assert chunking is not None
            normed = max(
                chunking.chunk_norm(highest[n], counts[n]), chunking.whole_norm(best[n], counts[n])
            )
            best[n] = threshold + chunking.chunk_norm.spread * (normed - chunking.threshold)
        combined = np.full(len(self), -np.inf)
        np.maximum.at(combined, self.owners[firsts], best)
        return combined

    def to_tensors(self) -> dict[str, Tensor]:
        """As a file has it."""
        return {
            field.name: torch.from_numpy(np.ascontiguousarray(getattr(self, field.name)))
            for field in fields(self)
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> ReadTexts:
        """What ``to_tensors`` made.

        Raises:
            LookupError, ValueError: if it is damaged.
        """
        read = ReadTexts(**{f.name: tensors[f.name].numpy() for f in fields(ReadTexts)})
        count = len(read.scores)
        sizes = {len(getattr(read, field.name)) for field in fields(read)}
        is_sound = read.features.shape == (count, FEATURES) and sizes == {count}
        if not is_sound or not all(np.isfinite(a).all() for a in (read.scores, read.features)):
            raise ValueError("features of prompts are not finite numbers, a row for each")
        if (np.diff(read.owners, prepend=-1) > 1).any() or (np.diff(read.owners) < 0).any():
            raise ValueError("features of prompts are in no order")
        return read


def read_texts(
    guard: GuardSpec,
    backend: Backend,
    prompts: Iterable[Prompt],
    feature_map: FeatureMap,
    *,
    progress: Progress | None = None,
) -> ReadTexts:
    """Read prompts as a guard does, and keep scores and features.

    Args:
        guard: Whose plan and probe.
        backend: Its model.
        prompts: What to read.
        feature_map: Of the guard.
        progress: Called with 1 after each prompt.

    Raises:
        GuardError: if the backend lets no states out, or a state is not finite.
    """
    advance = progress or no_progress
    plans = [guard.plan(prompt) for prompt in prompts]
    variants = [variant for plan in plans for variant in plan]
    lasts = np.cumsum([len(plan) for plan in plans])
    scores = np.empty(len(variants))
    features = np.empty((len(variants), FEATURES), dtype=np.float16)
    done = 0
    for inputs in probe_inputs(guard, backend, [variant.prompt for variant in variants]):
        rows = slice(done, done + len(inputs))
        scores[rows] = guard.probe.score_inputs(inputs).double().numpy()
        features[rows] = feature_map(inputs).half().numpy()
        finished = np.searchsorted(lasts, [done, rows.stop], side="right")
        advance(int(finished[1] - finished[0]))
        done = rows.stop
    if not np.isfinite(scores).all() or not np.isfinite(features).all():
        raise GuardError(
            "A state is not a finite number, so nothing can be learned from it; use bfloat16 or "
            "float32 instead of float16."
        )
    return ReadTexts(
        scores,
        features,
        np.repeat(np.arange(len(plans)), list(map(len, plans))),
        np.array([variant.version for variant in variants], dtype=np.int64),
        np.array([variant.chunk is not None for variant in variants], dtype=bool),
    )


def probe_inputs(
    guard: GuardSpec, backend: Backend, prompts: Iterable[Prompt]
) -> Iterable[Float[Tensor, "n s d"]]:
    """Yield what the guard's probe weighs of each prompt, in lazy batches.

    Raises:
        GuardError: if the backend lets no states out.
    """
    if isinstance(backend, Scoring):
        raise GuardError(
            "A guard learns from the states of prompts, which this backend does not give: adapt it "
            "on the transformers model, and serve the adapted guard here."
        )
    for states in backend.capture(
        prompts,
        positions=guard.reading.positions,
        layers=guard.probe.layers,
        queries=guard.reading.queries,
        progress=no_progress,
    ):
        yield guard.probe.inputs(slots(states.select(guard.probe.layers), guard.reading.positions))
