"""States at every token of replies, each read behind its prompt, whoever wrote it.

Axis names in shapes: t tokens (the first is t_post), l layers, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.models.generate import end_ids
from latentguard.models.hooks import read_positions
from latentguard.models.prefill import ReplyingModel
from latentguard.models.shared_prompt import SharedPrompt, group_rows, pad_tokens
from latentguard.prompts import Prompt, Reply


@torch.inference_mode()
def capture_replies(model: ReplyingModel, replies: Sequence[Reply]) -> list[Float[Tensor, "t l d"]]:
    """States at all layers at t_post, then at each token of each reply but its end.

    Raises:
        PromptError: if a prompt is empty, or too long with its reply.
    """
    ends = end_ids(model)
    ids = [one.ids[:-1] if one.ids and one.ids[-1] in ends else one.ids for one in replies]
    states: dict[int, Tensor] = {}
    for rows in group_rows(reply.prompt for reply in replies):
        tokens = [ids[n] for n in rows]
        captured = _capture_behind_one_prompt(model, replies[rows[0]].prompt, tokens)
        states |= dict(zip(rows, captured, strict=True))
    return [states[n] for n in range(len(replies))]


def _capture_behind_one_prompt(
    model: ReplyingModel, prompt: Prompt, replies: Sequence[Sequence[int]]
) -> list[Float[Tensor, "t l d"]]:
    tokens = pad_tokens(replies)
    shared = SharedPrompt.read(model, prompt, behind=tokens.shape[1])
    layers = tuple(range(model.depth + 1))
    shape = (len(replies), tokens.shape[1] + 1)
    columns = torch.arange(shape[1], device=model.device).expand(shape)
    buffer = torch.empty(
        (*shape, len(layers), model.width), dtype=model.model.dtype, device=model.device
    )
    with read_positions(model.blocks, columns=columns, layers=layers, buffer=buffer):
        shared.run(tokens)
    return [row[: len(own) + 1] for row, own in zip(buffer.cpu(), replies, strict=True)]
