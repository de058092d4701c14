"""Reading and steering the residual stream: the only module that changes what a model runs.

Hooks are registered, and blocks skipped, in a ``with`` that puts everything back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from latentguard.errors import ModelError


class StopForward(Exception):
    """Leaves a forward pass after the last layer that is needed."""


def decoder_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """Find the decoder blocks of any Hugging Face causal LM by structure, not by name.

    Raises:
        ModelError: if no list of ``num_hidden_layers`` modules of one class is found.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    depth = int(config.num_hidden_layers)
    lists = [
        (name.count("."), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and _are_blocks(module)
    ]
    if not lists:
        raise ModelError(
            f"No list of {depth} decoder blocks was found in {type(model).__name__}: "
            "expected a decoder-only Hugging Face model."
        )
    return list(min(lists, key=lambda pair: pair[0])[1])


def _are_blocks(modules: nn.ModuleList) -> bool:
    """Whether these are decoder blocks, not experts or projections: children have children."""
    return all(any(True for child in m.children() for _ in child.children()) for m in modules)


@contextmanager
def read_positions(
    blocks: Sequence[nn.Module],
    *,
    columns: Int[Tensor, "b p"],
    layers: Sequence[int],
    buffer: Float[Tensor, "b p l d"],
    starts: Int[Tensor, "b p"] | None = None,
    stop: bool = True,
) -> Iterator[None]:
    """Copy the residual stream at ``columns`` into ``buffer`` while a forward pass runs.

    Only the wanted tokens are gathered, inside the hook; no sequence outlives its layer. After the
    last layer the pass is left (``StopForward`` is swallowed here), so neither later blocks nor the
    final norm nor the LM head are computed.

    Args:
        blocks: The decoder blocks.
        columns: Token indices per row, in the tokens that this pass computes.
        layers: Which layers (0 is the input of the first block).
        buffer: Where the states go.
        starts: Where one lies before its column, the mean of the tokens between is kept.
        stop: Leave the pass after the last layer.
    """
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    last_slot = max(range(len(layers)), key=lambda slot: (layers[slot], slot))
    means = None if starts is None else _Means(starts, columns)

    def store(slot: int, hidden: Tensor) -> None:
        device = hidden.device
        buffer[:, :, slot] = hidden[rows.to(device), columns.to(device)].to(buffer.device)
        if means is not None:
            buffer[:, means.slots, slot] = means(hidden).to(buffer)
        if stop and slot == last_slot:
            raise StopForward

    handles: list[Any] = []
    try:
        for slot, layer in enumerate(layers):
            handles.append(_register(blocks, layer, partial(store, slot)))
        yield
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


class _Means:
    """Means over the tokens from a start to a column, both included.

    In shapes, w is the number of positions that average several tokens in some row.
    """

    def __init__(self, starts: Int[Tensor, "b p"], columns: Int[Tensor, "b p"]) -> None:
        self.slots = (starts < columns).any(0).nonzero()[:, 0]
        self._starts = starts[:, self.slots]
        self._columns = columns[:, self.slots]
        self._weights: dict[tuple[int, torch.device], Float[Tensor, "b w s"]] = {}

    def __call__(self, hidden: Float[Tensor, "b s d"]) -> Float[Tensor, "b w d"]:
        key = hidden.shape[1], hidden.device
        if key not in self._weights:  # all layers of a device share it
            self._weights[key] = self._token_weights(*key)
        return self._weights[key] @ hidden.float()

    def _token_weights(self, length: int, device: torch.device) -> Float[Tensor, "b w s"]:
        token = torch.arange(length, device=device)
        starts, columns = (x.to(device)[..., None] for x in (self._starts, self._columns))
        return ((token >= starts) & (token <= columns)) / (columns - starts + 1).float()


def _register(
    blocks: Sequence[nn.Module], layer: int, visit: Callable[[Tensor], Tensor | None]
) -> Any:
    """Call ``visit`` with the residual stream at a layer; a tensor that it returns replaces it."""
    if layer == 0:

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = visit(_require_stream(args[0] if args else kwargs["hidden_states"]))
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        new = visit(_require_stream(output[0] if isinstance(output, tuple) else output))
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    return blocks[layer - 1].register_forward_hook(after)


def _require_stream(hidden: Tensor) -> Float[Tensor, "b s d"]:
    if hidden.ndim != 3:
        raise ModelError(
            "Blocks that hand on one vector for each token are needed; these hand on a tensor of "
            f"shape {tuple(hidden.shape)} (such as Gemma-3n's, which keep several). Use another "
            "model."
        )
    return hidden


@contextmanager
def add_vector(
    blocks: Sequence[nn.Module],
    *,
    layer: int,
    vectors: Float[Tensor, "b d"],
    tokens: Bool[Tensor, "b s"],
) -> Iterator[None]:
    """Add a vector to the residual stream at some tokens, in each forward pass inside.

    Args:
        blocks: The decoder blocks.
        layer: Where (0 is the input of the first block).
        vectors: One a row.
        tokens: Which tokens of the pass it is added to; the others stay exactly as they are.
    """

    def shift(hidden: Tensor) -> Tensor:
        step = torch.where(tokens[..., None], vectors[:, None], 0.0)
        return hidden + step.to(hidden)

    handle = _register(blocks, layer, shift)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def record_output_size(block: nn.Module, sizes: list[int]) -> Iterator[None]:
    """Record in ``sizes`` how many values a block returns; 0 if it returns a bare tensor."""

    def record(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        sizes.append(len(output) if isinstance(output, tuple) else 0)

    handle = block.register_forward_hook(record)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def skip_blocks(
    blocks: Sequence[nn.Module], *, layer: int, hidden: Float[Tensor, "b s d"], size: int = 0
) -> Iterator[None]:
    """Run a forward pass from ``layer`` on: the blocks below give back ``hidden`` at once.

    They fill no cache. Hooks on the last of them see ``hidden`` as its output.

    Args:
        blocks: The decoder blocks.
        layer: How many blocks to skip.
        hidden: The residual stream at that layer.
        size: What ``record_output_size`` recorded of a block.
    """
    output = (hidden, *[None] * (size - 1)) if size else hidden
    skipped = blocks[:layer]
    before = [vars(block).get("forward") for block in skipped]  # accelerate may have put one there
    try:
        for block in skipped:
            block.forward = lambda *_, **__: output
        yield
    finally:
        for block, forward in zip(skipped, before, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward
