"""How likely an unedited model finds replies: the mean loss of their tokens, a check of fluency."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from latentguard.models.prefill import ReplyingModel
from latentguard.models.shared_prompt import SharedPrompt, group_rows, pad_tokens
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
    for rows in group_rows(reply.prompt for reply in replies):
        prompt_losses = _losses_behind_one_prompt(model, [replies[n] for n in rows])
        for n, loss in zip(rows, prompt_losses, strict=True):
            losses[n] = loss
    return losses


def _losses_behind_one_prompt(model: ReplyingModel, replies: Sequence[Reply]) -> list[float]:
    longest = max(len(reply.ids) for reply in replies)
    shared = SharedPrompt.read(model, replies[0].prompt, behind=longest)
    vocabulary = int(model.model.get_input_embeddings().num_embeddings)
    at_once = max(1, LOGITS_AT_ONCE // (vocabulary * longest))
    losses: list[float] = []
    for first in range(0, len(replies), at_once):
        chunk = [reply.ids for reply in replies[first : first + at_once]]
        tokens = pad_tokens(chunk)
        chances = shared.run(tokens[:, :-1]).logits.float().log_softmax(-1)
        token_chances = chances.gather(-1, tokens[..., None].to(chances.device))[..., 0]
        losses += [
            -float(row[: len(r)].mean()) for row, r in zip(token_chances, chunk, strict=True)
        ]
    return losses
