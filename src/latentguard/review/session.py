"""A review: the prompts that were scored, their order, and how far each reviewer is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from threading import RLock
from typing import Any, Literal, get_args

from latentguard.data.label_rows import Label
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt
from latentguard.review.labels import LabelFile, prompt_key

Filter = Literal["unlabelled", "flagged", "allowed", "near", "disputed", "all"]
"""Which prompts come: without a label of the reviewer, of these the flagged, the allowed, or the
ones near the threshold; those on which reviewers disagree; all."""

Order = Literal["file", "near", "highest", "lowest"]
"""As they are in the file; nearest to the threshold first; by score."""

FILTERS: tuple[Filter, ...] = get_args(Filter)
ORDERS: tuple[Order, ...] = get_args(Order)

NEAR_SHARE = 0.1
"""Share of the prompts that count as near the threshold, those with the nearest scores."""

NEAR_COUNT = 20
"""So many count as near at least."""

MAX_CHARACTERS = 20_000_000
"""Characters of the prompts that are kept at most where their number is limited, too."""


@dataclass(frozen=True)
class ReviewItem:
    """A prompt that was scored."""

    prompt: Prompt
    """What was asked."""

    verdict: Verdict
    """What the guard says of it."""

    threshold: float
    """What its score was compared with."""

    guard: str = ""
    """Digest of the guard."""

    @cached_property
    def key(self) -> str:
        """What names it on the page."""
        return prompt_key(self.prompt)

    @property
    def distance(self) -> float:
        """How far its score is from the threshold."""
        return abs(self.verdict.score - self.threshold)

    @property
    def size(self) -> int:
        """Characters of the chat."""
        return len(self.prompt.text) + sum(len(one.content) for one in self.prompt.history)


class ReviewItems:
    """Prompts by key, each once; any thread may add some."""

    def __init__(self, most: int | None = None) -> None:
        """Keep at most so many, the newest; None keeps all."""
        self._most, self._characters = most, 0
        self._items = OrderedDict[str, ReviewItem]()
        self._orders = dict[str, list[str]]()
        self._lock = RLock()

    def add(self, item: ReviewItem) -> None:
        """Keep a prompt; one that is there keeps its place."""
        with self._lock:
            if item.key in self._items:
                return
            self._items[item.key] = item
            self._characters += item.size
            self._orders.clear()
            while self._most is not None and (
                len(self._items) > self._most or self._characters > MAX_CHARACTERS
            ):
                _, oldest = self._items.popitem(last=False)
                self._characters -= oldest.size

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: str) -> ReviewItem | None:
        """The prompt of this key, if it is still there."""
        return self._items.get(key)

    def keys(self, order: Order) -> list[str]:
        """All keys, in an order."""
        sort: dict[Order, Callable[[ReviewItem], float]] = {
            "file": lambda item: 0.0,  # sorting is stable
            "near": lambda item: item.distance,
            "highest": lambda item: -item.verdict.score,
            "lowest": lambda item: item.verdict.score,
        }
        with self._lock:
            if order not in self._orders:
                items = sorted(self._items.items(), key=lambda pair: sort[order](pair[1]))
                self._orders[order] = [key for key, _ in items]
            return self._orders[order]

    def near_keys(self) -> set[str]:
        """The keys of the prompts near the threshold."""
        return set(self.keys("near")[: max(NEAR_COUNT, round(NEAR_SHARE * len(self)))])

    def score_range(self) -> tuple[float, float]:
        """The lowest and the highest score or threshold."""
        with self._lock:
            items = self._items.values()
            values = [value for one in items for value in (one.verdict.score, one.threshold)]
        return min(values, default=0.0), max(values, default=1.0)


class ReviewSession:
    """What the page asks for; labels go to the label file at once."""

    def __init__(self, items: ReviewItems, labels: LabelFile) -> None:
        """Review some prompts, with the labels that are there."""
        self.items, self.labels = items, labels

    def next_item(
        self, reviewer: str, which: Filter, order: Order, after: str | None = None
    ) -> ReviewItem | None:
        """The first prompt of a filter that comes after another.

        Args:
            reviewer: Who asks.
            which: The filter.
            order: In which order they come.
            after: The key of the other; None, or one that is gone, begins at the first.
        """
        keys = self.items.keys(order)
        start = keys.index(after) + 1 if after in keys else 0
        return next(self._matching(reviewer, which, keys[start:]), None)

    def counts(self, reviewer: str, which: Filter) -> dict[str, int]:
        """How far a reviewer is, and how many prompts the filter still has."""
        keys = self.items.keys("file")
        own = [self.labels.labels_of(key).get(reviewer) for key in keys]
        return dict(
            total=len(keys),
            harmful=own.count("harmful"),
            harmless=own.count("harmless"),
            disputed=sum(map(self.labels.is_disputed, keys)),
            matching=sum(1 for _ in self._matching(reviewer, which, keys)),
            agreed=self.labels.agreed_count,
        )

    def _matching(self, reviewer: str, which: Filter, keys: list[str]) -> Iterator[ReviewItem]:
        near = self.items.near_keys() if which == "near" else set()
        for key in keys:
            item = self.items.get(key)
            if item is not None and self._is_wanted(item, reviewer, which, near):
                yield item

    def _is_wanted(self, item: ReviewItem, reviewer: str, which: Filter, near: set[str]) -> bool:
        if which == "all":
            return True
        if which == "disputed":
            return self.labels.is_disputed(item.key)
        if reviewer in self.labels.labels_of(item.key):
            return False
        if which == "near":
            return item.key in near
        is_allowed = item.verdict.decision == "allow"
        return which == "unlabelled" or (which == "allowed") is is_allowed

    def label(self, item: ReviewItem, label: Label, reviewer: str) -> None:
        """Write a label.

        Raises:
            LatentGuardError: if it cannot be written.
        """
        facts = dict(score=item.verdict.score, threshold=item.threshold, guard=item.guard[:12])
        self.labels.label(item.prompt, label, reviewer, facts)

    def to_dict(self, item: ReviewItem, reviewer: str) -> dict[str, Any]:
        """A prompt as the page shows it; what others say comes only after one's own label."""
        labels = self.labels.labels_of(item.key)
        own = labels.pop(reviewer, None)
        verdict = item.verdict
        return dict(
            key=item.key,
            id=item.prompt.id,
            text=item.prompt.text,
            history=[{"role": one.role, "content": one.content} for one in item.prompt.history],
            segment=item.prompt.segment,
            score=verdict.score,
            threshold=item.threshold,
            probability=verdict.probability,
            decision=verdict.decision,
            category=likely_category(verdict),
            obfuscations=list(verdict.obfuscations),
            label=own,
            others=labels if own else {},
            disputed=self.labels.is_disputed(item.key),
        )


def likely_category(verdict: Verdict) -> str | None:
    """The category of a prompt that is not allowed, if its odds beat those of all others."""
    chance = verdict.category_scores.get(verdict.category or "", 0.0)
    is_likely = chance > (len(verdict.category_scores) - 1) * (1 - chance)
    return verdict.category if is_likely and verdict.decision != "allow" else None
