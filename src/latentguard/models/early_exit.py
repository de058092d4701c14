"""Early exit: rows of a batch that leave the forward pass after the first layer that is read.

The blocks behind that layer compute the rows that stay, and no more.

Axis names in shapes: n prompts, b rows of a batch, k rows that stay, p positions, l layers,
d width, s tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from latentguard.models.chat_model import ChatModel
from latentguard.models.hooks import StopForward, StoreStates, hook_layer, visit_layers
from latentguard.prompts import Prompt
from latentguard.states import AttendedSlots, TokenQueries, attended_slots

Spans = tuple[Int[Tensor, "b p"], Int[Tensor, "b p"]]
"""The first and the last token of each position, as the pass counts them."""

Stay = Callable[[Float[Tensor, "b p d"]], Bool[Tensor, "b"]]
"""Which rows stay, from their states at the first layer."""

Estimate = Callable[[Float[Tensor, "b p d"]], Float[Tensor, "b"]]
"""A number for each row from its states at the first layer; rows with low numbers leave."""


@dataclass(frozen=True, eq=False)
class Staying:
    """What was read of n prompts, of which k stayed."""

    estimates: Float[Tensor, "n"]
    """Of each prompt."""

    numbers: list[int]
    """Which prompts stayed, in order."""

    values: Float[Tensor, "k p l d"]
    """The states of those."""


def capture_staying(
    model: ChatModel,
    prompts: Sequence[Prompt],
    estimate: Estimate,
    *,
    cut: float,
    positions: Sequence[str],
    layers: Sequence[int],
    queries: TokenQueries | None = None,
) -> Staying:
    """Read prompts; those whose estimate lies under ``cut`` leave after the first layer.

    Args:
        model: The model.
        prompts: What to read.
        estimate: Of the states at the first layer.
        cut: Which prompts leave.
        positions: As in ``ChatModel.capture``.
        layers: In order; not the embeddings.
        queries: The queries of the attended positions.

    Raises:
        PromptError: if a prompt is empty, too long, or has no such position.
    """
    attended = attended_slots(positions, layers, queries)
    rows = model.lay_out(prompts, positions)
    estimates = torch.empty(len(rows))
    states = dict[int, Tensor]()

    def read(batch: list[int]) -> None:
        shape = (len(batch), len(positions), len(layers), model.width)
        buffer = torch.empty(shape, dtype=model.model.dtype, device=model.device)

        def stay(first: Tensor) -> Tensor:
            own = estimates[batch] = estimate(first.cpu())
            return ~((own < cut) & own.isfinite())  # what is not finite is found at the end

        def hooks(starts: Tensor, columns: Tensor) -> AbstractContextManager[list[Tensor]]:
            return read_staying(model.blocks, (starts, columns), layers, buffer, stay, attended)

        kept = model.run_rows([rows[n] for n in batch], layers[-1], hooks)
        staying = [batch[n] for n in kept[0].tolist()] if kept else []
        states.update(zip(staying, buffer.cpu(), strict=False))

    model.run_in_batches([row.length for row in rows], read)
    numbers = sorted(states)
    none = torch.empty(0, len(positions), len(layers), model.width)
    values = torch.stack([states[n] for n in numbers]) if numbers else none
    return Staying(estimates, numbers, values)


@contextmanager
def read_staying(
    blocks: Sequence[nn.Module],
    spans: Spans,
    layers: Sequence[int],
    buffer: Float[Tensor, "b p l d"],
    stay: Stay,
    attended: AttendedSlots | None = None,
) -> Iterator[list[Int[Tensor, "k"]]]:
    """Copy the residual stream into ``buffer`` while a pass runs that some rows leave.

    Args:
        blocks: The decoder blocks.
        spans: Where each position is.
        layers: Which layers, in order; rows leave after the first.
        buffer: Where states go: its first rows, in the order of the batch.
        stay: Which rows stay; if none does, the pass is left.
        attended: Which positions are weighted means.

    Yields:
        A list that holds, after the pass, the numbers of the rows that stayed, unless none did.
    """
    starts, columns = spans
    first = torch.empty_like(buffer[:, :, :1])
    kept = list[Tensor]()
    stores = [StoreStates(columns, starts, first, attended)]

    def choose(hidden: Tensor) -> Tensor | None:
        stores[0](0, hidden)
        rows = stay(first[:, :, 0]).nonzero()[:, 0]
        if not len(rows):
            raise StopForward
        kept.append(rows)
        own = rows.to(columns.device)
        stores.append(StoreStates(columns[own], starts[own], buffer[: len(rows)], attended))
        return None if len(rows) == len(hidden) else hidden[rows.to(hidden.device)]

    def store(slot: int, hidden: Tensor) -> None:
        stores[1](slot, hidden)

    with suppress(StopForward), ExitStack() as stack:
        stack.callback(hook_layer(blocks, layers[0], choose).remove)
        for number in range(layers[0], len(blocks)):
            narrow = partial(_narrow, kept, len(columns), number)
            hook = blocks[number].register_forward_pre_hook(narrow, with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(visit_layers(blocks, layers, store, stop=True))
        yield kept


def _narrow(
    kept: Sequence[Tensor],
    count: int,
    number: int,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a block for the rows that stay: masks, places and its part of the cache."""
    (rows,) = kept
    if len(rows) == count:
        return None

    def select(value: Any) -> Any:
        if isinstance(value, Tensor):
            is_by_row = value.ndim > 1 and len(value) == count
            return value[rows.to(value.device)] if is_by_row else value
        if isinstance(value, tuple):
            return tuple(map(select, value))
        if hasattr(value, "layers"):  # a cache of transformers
            value.layers[number].batch_select_indices(rows)
        return value

    stream = args[0] if args else kwargs["hidden_states"]  # has the rows that stay already
    others = {name: select(value) for name, value in kwargs.items() if name != "hidden_states"}
    if args:
        return (stream, *map(select, args[1:])), others
    return (), others | {"hidden_states": stream}
