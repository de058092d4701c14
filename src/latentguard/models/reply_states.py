"""States at every token of replies, each read behind its prompt, whoever wrote it.

Axis names in shapes: t tokens (the first is t_post), l layers, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.models.generate import end_ids
from latentguard.models.hooks import read_positions
from latentguard.models.layout import CaptureRow
from latentguard.models.prefill import ReplyingModel
from latentguard.models.shared_prompt import SharedPrompt, group_rows, pad_tokens
from latentguard.models.thinking_places import find_thinking
from latentguard.prompts import Prompt, Reply

if TYPE_CHECKING:
    from latentguard.models.chat_model import ChatModel


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


def capture_thinking(
    model: ChatModel, replies: Sequence[Reply]
) -> list[Float[Tensor, "2 l d"] | None]:
    """States at all layers where the thinking of replies ends (``ChatModel.capture_thinking``).

    Raises:
        PromptError: if a prompt is empty, or too long with its reply.
    """
    states: list[Float[Tensor, "2 l d"] | None] = [None] * len(replies)
    rows: dict[int, CaptureRow] = {}
    for n, reply in enumerate(replies):
        places = find_thinking(model.tokenizer.decode, reply.ids)
        if places is not None:
            (layout,) = model.chat([reply.prompt])
            spans = [(len(layout.ids) + at,) * 2 for at in (places.last_thought, places.after)]
            rows[n] = CaptureRow.of_spans((*layout.ids, *reply.ids), spans)
            model.check_length(rows[n].length, reply.prompt)
    if rows:
        captured = model.capture_rows(list(rows.values()), tuple(range(model.depth + 1)))
        for n, one in zip(rows, captured, strict=True):
            states[n] = one
    return states


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
