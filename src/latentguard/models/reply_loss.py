"""How likely an unedited model finds replies: the mean loss of their tokens, a check of fluency.

Axis names in shapes: r replies, m tokens of the longest, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentguard.models.loading import cache_argument
from latentguard.models.prefill import ReplyingModel, build_cache, read_unsteered
from latentguard.prompts import Reply

LOGITS_AT_ONCE = 1 << 26
"""Logits that are kept at once; with a vocabulary of 150,000, those of 440 tokens."""


@torch.inference_mode()
def reply_losses(model: ReplyingModel, replies: Sequence[Reply]) -> list[float]:
    """Mean loss of each reply's tokens behind its prompt, in nats a token; its exp is perplexity.

    Raises:
        PromptError: if a prompt is empty, or too long with its reply.
    """
    losses = [0.0] * len(replies)
    by_prompt: dict[object, list[int]] = {}
    for n, reply in enumerate(replies):
        by_prompt.setdefault(reply.prompt, []).append(n)
    for rows in by_prompt.values():
        prompt_losses = _losses_behind_one_prompt(model, [replies[n] for n in rows])
        for n, loss in zip(rows, prompt_losses, strict=True):
            losses[n] = loss
    return losses


def _losses_behind_one_prompt(model: ReplyingModel, replies: Sequence[Reply]) -> list[float]:
    prompt = replies[0].prompt
    (layout,) = model.chat([prompt])
    longest = max(len(reply.ids) for reply in replies)
    model.check_length(len(layout.ids) + longest, prompt)
    ids = torch.tensor([layout.ids], device=model.device)
    real = torch.ones_like(ids, dtype=torch.bool)
    plain = read_unsteered(model, ids[:, :-1], real[:, :-1], [], layers=[], stop=False)
    vocabulary = int(model.model.get_input_embeddings().num_embeddings)
    at_once = max(1, LOGITS_AT_ONCE // (vocabulary * longest))
    losses: list[float] = []
    for first in range(0, len(replies), at_once):
        chunk = [reply.ids for reply in replies[first : first + at_once]]
        rows = torch.zeros(len(chunk), dtype=torch.long)
        past = [(k[rows.to(k.device)], v[rows.to(v.device)]) for k, v in plain.cached]
        tokens = torch.zeros(len(chunk), longest, dtype=torch.long)
        for row, reply in enumerate(chunk):
            tokens[row, : len(reply)] = torch.tensor(reply)
        tokens = tokens.to(model.device)
        before = torch.cat([ids[:, -1:].expand(len(chunk), 1), tokens[:, :-1]], 1)
        chances = _logits(model, before, build_cache(past), ids.shape[1]).log_softmax(-1)
        token_chances = chances.gather(-1, tokens[..., None])[..., 0]
        losses += [
            -float(row[: len(r)].mean()) for row, r in zip(token_chances, chunk, strict=True)
        ]
    return losses


def _logits(
    model: ReplyingModel, ids: Int[Tensor, "r m"], cache: object, behind: int
) -> Float[Tensor, "r m v"]:
    """Logits behind each of some tokens; the first stands at place ``behind - 1``."""
    places = torch.arange(behind - 1, behind - 1 + ids.shape[1], device=ids.device)
    output = model.model(
        ids,
        position_ids=places.expand(ids.shape),
        use_cache=True,
        **{cache_argument(model.model): cache},
    )
    logits: Tensor = output.logits.float()
    return logits
