"""What a guard holds, and how that is packed into JSON and tensors.

How to add an optional part: see ``parts.py``; its class goes into ``PARTS``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from latentguard.errors import GuardError
from latentguard.guard.artifact import POLES, model_card, read_folder, require_sound, write_folder
from latentguard.guard.canaries import Canary
from latentguard.guard.categories import Categories
from latentguard.guard.chunking import Windows
from latentguard.guard.leakage import NOTHING, Held
from latentguard.guard.obfuscations import Obfuscations
from latentguard.guard.quadrants import Quadrants
from latentguard.guard.thresholds import Calibration
from latentguard.guard.verdict import Part
from latentguard.probes.axis import Axis
from latentguard.probes.probe import Probe
from latentguard.prompts import Prompt
from latentguard.states import Fingerprint, Reading
from latentguard.stats.bounds import Bound

PARTS: list[type[Part]] = [Obfuscations, Windows, Calibration, Quadrants, Categories]
"""Every optional part that there is, in the order in which they judge."""

P = TypeVar("P", bound=Part)


@dataclass(frozen=True, eq=False)
class Contents:
    """What a guard holds; immutable."""

    reading: Reading
    """Where it reads."""

    probe: Probe
    """How states become a score."""

    axes: tuple[Axis, ...]
    """``harmful`` at t_inst; ``refuse`` at t_post where refusals were known."""

    fingerprint: Fingerprint
    """The model it is bound to."""

    platt: tuple[float, float]
    """Slope and intercept: probability = sigmoid(slope * score + intercept)."""

    spread: float
    """Standard deviation of the training scores."""

    canaries: tuple[Canary, ...] = ()
    """Checked when the guard meets a model."""

    threshold: float = 0.0
    """A prompt is flagged if its score is greater."""

    bound: Bound | None = None
    """What calibration promises of the threshold; None before."""

    fitted: dict[str, Any] | None = None
    """Provenance: counts, choices, digests of the data, versions."""

    learnt: Int[Tensor, "n"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """Marks of the prompts that it was fitted on (``learnt``); none in older guards."""

    parts: tuple[Part, ...] = ()
    """Optional parts, at most one of each class, in the order in which they judge."""

    def part(self, kind: type[P]) -> P | None:
        """The part of that class; None if there is none."""
        return next((part for part in self.parts if isinstance(part, kind)), None)

    def with_part(self, new: Part) -> Self:
        """A new guard with this part, instead of the one of its class."""
        parts = [part for part in self.parts if type(part) is not type(new)] + [new]
        return replace(self, parts=tuple(sorted(parts, key=lambda part: PARTS.index(type(part)))))

    @property
    def held(self) -> Held:
        """Marks of the user's prompts that packs are held against, which never calibrate."""
        categories, found = self.part(Categories), NOTHING
        for pack in categories.packs.values() if categories else ():
            found |= Held(frozenset(pack.against), frozenset(pack.shared))
        return found

    @property
    def marks(self) -> list[int]:
        """Of all that the guard was fitted on, and of the examples of its packs."""
        categories = self.part(Categories)
        packs = categories.packs.values() if categories else ()
        return [*self.learnt.tolist(), *(mark for pack in packs for mark in pack.learnt)]

    def reads_pieces(self, prompt: Prompt) -> bool:
        """Whether it has windows, and they read this prompt: it is long, or a chat."""
        windows = self.part(Windows)
        return windows is not None and windows.needed(prompt)

    @property
    def positions(self) -> tuple[str, ...]:
        """Every position that the probe, an axis or a part reads."""
        read = [*self.reading.positions, *(axis.position for axis in self.axes)]
        return tuple(dict.fromkeys([*read, *(p for part in self.parts for p in part.positions)]))

    @property
    def promise(self) -> str:
        """What the threshold promises, in words."""
        return str(self.bound) if self.bound else "not calibrated, so nothing is promised"

    @property
    def card(self) -> str:
        """The model card, in Markdown."""
        notes = [note for part in self.parts for note in part.notes()]
        return model_card(self.pack()[0], promise=self.promise, notes=notes)

    @property
    def digest(self) -> str:
        """SHA-256 of everything that makes its verdicts."""
        record, tensors = self.pack()
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write ``guard.json``, ``guard.safetensors`` and a model card."""
        write_folder(folder, *self.pack(), self.card)

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON can hold, and tensors."""
        packed = {part.name: part.pack() for part in self.parts}
        tensors = {"weight": self.probe.weight, "learnt": self.learnt}
        for axis in self.axes:
            tensors |= {f"{axis.name}.{pole}": getattr(axis, pole) for pole in POLES}
        for name, (_, held) in packed.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in held.items()}
        record = {
            "fingerprint": asdict(self.fingerprint),
            "reading": asdict(self.reading),
            "probe": dict(kind=self.probe.kind, layers=self.probe.layers, bias=self.probe.bias),
            "axes": [dict(name=a.name, position=a.position, counts=a.counts) for a in self.axes],
            "threshold": self.threshold,
            "bound": asdict(self.bound) if self.bound else None,
            "platt": self.platt,
            "spread": self.spread,
            "canaries": [asdict(canary) for canary in self.canaries],
            "fitted": self.fitted,
            "parts": {name: record for name, (record, _) in packed.items()},
        }
        return record, tensors

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            GuardError: if the folder is not a whole guard of a known schema.
        """
        record, tensors = read_folder(folder)
        try:
            return cls.unpack(record, tensors)
        except (LookupError, TypeError, ValueError, AttributeError, GuardError) as error:
            raise GuardError(
                f"{folder} holds a damaged guard ({error!r}); restore it or fit it again."
            ) from None

    @classmethod
    def unpack(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """What ``pack`` packed.

        Raises:
            LookupError, TypeError, ValueError, AttributeError, GuardError: if it is damaged.
        """
        require_sound(record, tensors)
        probe, reading, (slope, intercept) = record["probe"], record["reading"], record["platt"]
        layers = tuple(probe["layers"])
        return cls(
            reading=Reading(reading["name"], tuple(reading["positions"])),
            probe=Probe(probe["kind"], layers, tensors["weight"], float(probe["bias"])),
            axes=tuple(_axis(axis, layers, tensors) for axis in record["axes"]),
            fingerprint=Fingerprint(**record["fingerprint"]),
            platt=(float(slope), float(intercept)),
            spread=float(record["spread"]),
            canaries=tuple(Canary(**canary) for canary in record["canaries"]),
            threshold=float(record["threshold"]),
            bound=Bound(**record["bound"]) if record["bound"] else None,
            fitted=record["fitted"],
            learnt=tensors.get("learnt", torch.zeros(0, dtype=torch.long)),
            parts=_parts(_records(record), tensors),
        )


def _axis(
    record: Mapping[str, Any], layers: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> Axis:
    plus, minus = (tensors[f"{record['name']}.{pole}"] for pole in POLES)
    return Axis(record["name"], record["position"], layers, plus, minus, tuple(record["counts"]))


def _records(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parts; in schema 1 a refusal axis alone made quadrants, cut off half way."""
    if record["schema"] > 1:
        return dict(record["parts"])
    refusal = any(axis["name"] == "refuse" for axis in record["axes"])
    return {Quadrants.name: Quadrants().pack()[0]} if refusal else {}


def _parts(records: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Part, ...]:
    if unknown := set(records) - {kind.name for kind in PARTS}:
        raise ValueError(f"unknown parts, of a newer version: {', '.join(sorted(unknown))}")
    held = {kind: f"{kind.name}." for kind in PARTS if kind.name in records}
    return tuple(
        kind.unpack(
            records[kind.name],
            {key.removeprefix(dot): t for key, t in tensors.items() if key.startswith(dot)},
        )
        for kind, dot in held.items()
    )
