"""Replies behind one prompt, which is read once for all of them.

Axis names in shapes: r replies, m tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from latentguard.models.loading import cache_argument
from latentguard.models.prefill import KeysValues, ReplyingModel, build_cache, read_unsteered
from latentguard.prompts import Prompt


@dataclass(frozen=True, eq=False)
class SharedPrompt:
    """A prompt that was read up to its last token."""

    model: ReplyingModel
    """Which read it."""

    last_id: int
    """Its last token, which is read together with the replies."""

    length: int
    """How many tokens it has."""

    cached: KeysValues
    """Keys and values of all but the last."""

    @staticmethod
    def read(model: ReplyingModel, prompt: Prompt, *, behind: int) -> SharedPrompt:
        """Read a prompt that so many tokens will follow.

        Raises:
            PromptError: if it is empty, or too long with them.
        """
        (layout,) = model.chat([prompt])
        model.check_length(len(layout.ids) + behind, prompt)
        ids = torch.tensor([layout.ids], device=model.device)
        real = torch.ones_like(ids, dtype=torch.bool)
        plain = read_unsteered(model, ids[:, :-1], real[:, :-1], [], layers=[], stop=False)
        return SharedPrompt(model, layout.ids[-1], len(layout.ids), plain.cached)

    def run(self, tokens: Int[Tensor, "r m"]) -> Any:
        """Run the model on the last token of the prompt and the tokens of each reply behind it."""
        rows = torch.zeros(len(tokens), dtype=torch.long)
        past = [(k[rows.to(k.device)], v[rows.to(v.device)]) for k, v in self.cached]
        last = torch.full((len(tokens), 1), self.last_id)
        ids = torch.cat([last, tokens], 1).to(self.model.device)
        places = torch.arange(self.length - 1, self.length - 1 + ids.shape[1], device=ids.device)
        return self.model.model(
            ids,
            position_ids=places.expand(ids.shape),
            use_cache=True,
            **{cache_argument(self.model.model): build_cache(past)},
        )


def pad_tokens(replies: Sequence[Sequence[int]]) -> Int[Tensor, "r m"]:
    """Tokens of replies, padded on the right with 0: causal attention never sees the padding."""
    tokens = torch.zeros(len(replies), max(map(len, replies)), dtype=torch.long)
    for row, ids in enumerate(replies):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens


def group_rows(owners: Iterable[Hashable]) -> list[list[int]]:
    """The rows of each owner."""
    rows: dict[Hashable, list[int]] = {}
    for n, owner in enumerate(owners):
        rows.setdefault(owner, []).append(n)
    return list(rows.values())
