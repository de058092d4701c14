"""Estimate: a figure with its 95 % interval and its n."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval and its n."""

    value: float
    """The figure on all rows."""

    low: float
    """Lower end of the 95 % interval."""

    high: float
    """Upper end of the 95 % interval."""

    n: tuple[int, int]
    """How many positive and negative rows."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def total(self) -> int:
        """All rows."""
        return sum(self.n)

    @staticmethod
    def unpack(record: Mapping[str, Any]) -> Estimate:
        """What ``dataclasses.asdict`` and JSON made of one.

        Raises:
            LookupError, TypeError: if it is damaged.
        """
        return Estimate(**{**record, "n": tuple(record["n"])})
