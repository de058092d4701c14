"""Capture of one long prompt in segments, so that other work can be done in between.

The keys and values of earlier segments are cached, so the states are those of a single pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.models.hooks import read_positions
from latentguard.models.layout import CaptureRow
from latentguard.models.loading import cache_argument, is_sharded, unscaled_length
from latentguard.models.prefill import has_only_keys_and_values

if TYPE_CHECKING:
    from latentguard.models.chat_model import ChatModel


def can_be_segmented(model: ChatModel, row: CaptureRow) -> bool:
    """Whether segments of a prompt give the states of a single pass."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.model.config)
    fits = row.length <= unscaled_length(model.model)
    return fits and has_only_keys_and_values(cache) and not is_sharded(model.model)


def capture_in_segments(
    model: ChatModel,
    row: CaptureRow,
    layers: Sequence[int],
    *,
    size: int,
    between: Callable[[], None],
) -> Float[Tensor, "p l d"]:
    """The states of one prompt, read by ``size`` tokens at a time.

    Args:
        model: The model.
        row: The prompt's tokens and positions.
        layers: Layer indices.
        size: Tokens of a segment.
        between: Called between two segments, while no hook is on the model; it may use the model.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.model.config)
    shape = (len(row.spans), len(layers), model.width)
    sums = torch.zeros(shape, dtype=torch.float32, device=model.device)
    for begin in range(0, row.length, size):
        end = min(begin + size, row.length)
        if begin:
            between()
        sums += _read_segment(model, row, layers, (begin, end), cache)
    lengths = torch.tensor([last - first + 1 for first, last in row.spans], device=model.device)
    return (sums / lengths[:, None, None]).to(model.model.dtype).cpu()


@torch.inference_mode()
def _read_segment(
    model: ChatModel,
    row: CaptureRow,
    layers: Sequence[int],
    segment: tuple[int, int],
    cache: Any,
) -> Float[Tensor, "p l d"]:
    """For each position the sum of the states of its tokens in a segment."""
    begin, end = segment
    inside = [(max(first, begin), min(last, end - 1)) for first, last in row.spans]
    counts = [max(last - first + 1, 0) for first, last in inside]
    spans = [
        (first - begin, last - begin) if count else (0, 0)
        for (first, last), count in zip(inside, counts, strict=True)
    ]
    starts, columns = torch.tensor([spans], device=model.device).unbind(-1)
    shape = (1, len(spans), len(layers), model.width)
    buffer = torch.empty(shape, dtype=model.model.dtype, device=model.device)
    ids = torch.tensor([row.ids[begin:end]], device=model.device)
    hooks = read_positions(
        model.blocks, columns=columns, starts=starts, layers=layers, buffer=buffer
    )
    with hooks:
        model.model(ids, use_cache=True, **{cache_argument(model.model): cache})
    return buffer[0].float() * torch.tensor(counts, device=model.device)[:, None, None]
