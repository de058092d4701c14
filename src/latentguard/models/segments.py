"""Reading of one long prompt in segments, so that other work can be done in between.

The keys and values of earlier segments are cached, so the states are those of a single pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.models.hooks import contiguous_head, read_positions
from latentguard.models.layout import CaptureRow
from latentguard.models.loading import cache_argument, is_sharded, unscaled_length
from latentguard.models.prefill import has_only_keys_and_values
from latentguard.states import AttendedSlots

if TYPE_CHECKING:
    from latentguard.models.chat_model import ChatModel


@dataclass(frozen=True)
class Segments:
    """How long prompts are read while others wait."""

    size: int
    """Tokens that are read at once."""

    between: Callable[[], None]
    """Called between two segments, while no hook is on the model; it may use the model."""


def can_be_segmented(model: ChatModel, row: CaptureRow) -> bool:
    """Whether segments of a prompt give the states of a single pass."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.model.config)
    fits = row.length <= unscaled_length(model.model)
    return fits and has_only_keys_and_values(cache) and not is_sharded(model.model)


def prefill(
    model: ChatModel,
    row: CaptureRow,
    layers: Sequence[int],
    segments: Segments,
    *,
    attended: AttendedSlots | None = None,
    stop: bool,
) -> tuple[Float[Tensor, "p l d"], Any]:
    """The states of one prompt, and what the last pass gave: a reply goes on from its cache.

    Args:
        model: The model.
        row: The prompt's tokens and positions.
        layers: Layer indices.
        segments: How many tokens are read at once, and what is done in between.
        attended: Which positions are weighted means.
        stop: Leave each pass after the last layer; nothing is given back then.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.model.config)
    shape = (len(row.spans), len(layers), model.width)
    means = torch.zeros(shape, dtype=torch.float32, device=model.device)
    weights = torch.full(shape[:1], -torch.inf, device=model.device)
    output = None
    for begin in range(0, row.length, segments.size):
        end = min(begin + segments.size, row.length)
        if begin:
            segments.between()
        part, output = _read_segment(model, row, layers, (begin, end), cache, attended, stop=stop)
        share = torch.sigmoid(part.log_weights - weights)
        share[part.log_weights.isneginf()] = 0.0  # no token of the position is in this segment
        means += share.view(-1, 1, 1) * (part.means - means)
        weights = torch.logaddexp(weights, part.log_weights)
    return means.to(model.model.dtype).cpu(), output


@dataclass(frozen=True, eq=False)
class _SegmentMeans:
    """What a segment adds to each position."""

    means: Float[Tensor, "p l d"]
    """The mean of its tokens in the segment, float32; anything where there are none."""

    log_weights: Float[Tensor, "p"]
    """The log of what these tokens weigh: their number, or the sum of exponentials of logits."""


@torch.inference_mode()
def _read_segment(
    model: ChatModel,
    row: CaptureRow,
    layers: Sequence[int],
    segment: tuple[int, int],
    cache: Any,
    attended: AttendedSlots | None,
    *,
    stop: bool,
) -> tuple[_SegmentMeans, Any]:
    """What a segment adds to each position, and what the pass gave."""
    begin, end = segment
    inside = [(max(first, begin), min(last, end - 1)) for first, last in row.spans]
    counts = [max(last - first + 1, 0) for first, last in inside]
    spans = [
        (first - begin, last - begin) if count else (0, 0)
        for (first, last), count in zip(inside, counts, strict=True)
    ]
    places = torch.tensor(spans, dtype=torch.long, device=model.device).view(1, -1, 2)
    starts, columns = places.unbind(-1)
    shape = (1, len(spans), len(layers), model.width)
    buffer = torch.empty(shape, dtype=model.model.dtype, device=model.device)
    ids = torch.tensor([row.ids[begin:end]], device=model.device)
    hooks = read_positions(
        model.blocks,
        columns=columns,
        starts=starts,
        layers=layers,
        buffer=buffer,
        attended=attended,
        stop=stop,
    )
    how = {cache_argument(model.model): cache}
    output = None
    with hooks if spans else nullcontext() as store, contiguous_head(model.model):
        output = model.model(ids, use_cache=True, logits_to_keep=1, **how)
    log_weights = torch.tensor(counts, device=model.device).float().log()
    if attended is not None and store is not None and store.log_weights is not None:
        is_inside = log_weights[list(attended.slots)].isfinite()
        own = store.log_weights[0].to(model.device).where(is_inside, -torch.inf)
        log_weights[list(attended.slots)] = own
    return _SegmentMeans(buffer[0].float(), log_weights), output
