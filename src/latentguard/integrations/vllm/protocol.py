"""A question to the guard inside the engine, and its answer.

The question travels with the request: where to read, and the digest of the token ids that were laid
out from segments (``model/chat.py``). The engine answers only if its own tokens are these, so text
that imitates control tokens, another template or tools in the prompt cannot move a position.
"""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from latentguard.errors import GuardError
from latentguard.guard.chunking import Windows, with_pieces
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.verdict import Evidence, Part, Verdict
from latentguard.integrations.vllm.columns import totals
from latentguard.models.layout import Layout, position_spans
from latentguard.prompts import Prompt
from latentguard.states import States

UNSEEN = (KeyError, IndexError, RuntimeError)
"""What reading states raises where there are none."""

FIELD = "latentguard"
"""In vLLM's ``kv_transfer_params``, the one dictionary that reaches a connector."""


@dataclass(frozen=True)
class Ask:
    """A question."""

    to: str
    """Path of the mailbox that waits for the answer."""

    key: str
    """Whose answer it is."""

    ids: str
    """Digest of the prompt's tokens."""

    at: tuple[int, ...]
    """Index of the token that each column is read at, or the last one of those averaged."""

    starts: tuple[int, ...] = ()
    """Index of the first token that each column averages; none: ``at``."""

    @property
    def spans(self) -> list[range]:
        """The tokens of each column."""
        starts = self.starts or self.at
        return [range(first, last + 1) for first, last in zip(starts, self.at, strict=True)]

    @property
    def params(self) -> dict[str, Any]:
        """What goes into ``kv_transfer_params``."""
        return {FIELD: asdict(self)}

    @staticmethod
    def found_in(sampling: Any) -> Ask | None:
        """The question that came with a request; None if there is none."""
        params = (getattr(sampling, "extra_args", None) or {}).get("kv_transfer_params")
        found = params.get(FIELD) if isinstance(params, dict) else None
        if not isinstance(found, dict):
            return None
        return Ask(**(found | {k: tuple(found.get(k, ())) for k in ("at", "starts")}))


@dataclass(frozen=True)
class Answer:
    """What the engine read."""

    key: str
    values: tuple[float, ...] | None
    """Each column; None if the prompt's tokens are not those that were asked about."""


def digest_ids(ids: Sequence[int]) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(array("q", ids).tobytes()).hexdigest()


def ask_about(layout: Layout, positions: Sequence[str], mailbox: Any) -> Ask:
    """The question about a prompt: each column at its position."""
    starts, at = zip(*position_spans(layout, positions), strict=True)
    return Ask(mailbox.path, mailbox.key(), digest_ids(layout.ids), at, starts)


def rows_of(guard: LatentGuard, prompt: Prompt) -> tuple[Prompt, ...]:
    """What is read of a prompt: itself and, if it is long or a chat, the pieces of the windows."""
    windows = guard.part(Windows)
    if windows is None or not windows.needed(prompt):
        return (prompt,)
    return with_pieces(prompt, windows.pieces(prompt))


def verdict_of(guard: LatentGuard, prompt: Prompt, read: Sequence[Sequence[float]]) -> Verdict:
    """The verdict of a ``readable`` guard on what the engine read of ``rows_of`` a prompt.

    Raises:
        GuardError: if a number is missing or not finite.
    """
    states = States(torch.empty(1, 0, 0, 0), (prompt,), (), (), guard.fingerprint)
    scores, beliefs = totals(guard, torch.tensor(read, dtype=torch.float64))
    windows = guard.part(Windows)
    evidence = list[Evidence]()
    if windows is not None and windows.needed(prompt):
        pieces = windows.pieces(prompt)
        evidence = windows.evidence(pieces, scores.tolist(), guard.threshold, guard.spread)
    believed = {name: values[:1] for name, values in beliefs.items()}
    return guard.decide(states, scores[:1], believed, evidence)[0]


def readable(guard: LatentGuard) -> LatentGuard:
    """The guard as it runs inside vLLM: without parts that name, from states, what was decided.

    Raises:
        GuardError: if a part needs states to decide, which stay inside.
    """
    kept = list[Part]()
    bare = replace(guard, parts=())
    prompt, width = Prompt("a", id="1"), len(bare.reading.positions) + len(bare.axes)
    plain = [verdict_of(bare, prompt, [[0.0] * width])]
    nothing = States(torch.empty(1, 0, 0, 0), (prompt,), (), (), guard.fingerprint)
    for part in guard.parts:
        try:
            part.adjust(nothing, torch.zeros(1, dtype=torch.float64))
        except UNSEEN as error:
            raise GuardError(
                f"The part '{part.name}' of this guard decides on whole states, which do not leave "
                f"vLLM ({error!r}); take it out, or put 'latentguard serve --upstream' before it."
            ) from None
        with contextlib.suppress(*UNSEEN):
            part.judge(nothing, plain)
            kept.append(part)
    return replace(guard, parts=tuple(kept))
