"""Reading the residual stream: the only module that registers a hook, always in a ``with``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
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
        if isinstance(module, nn.ModuleList) and len(module) == depth and _holds_attention(module)
    ]
    if not lists:
        raise ModelError(
            f"No list of {depth} decoder blocks was found in {type(model).__name__}: "
            "expected a decoder-only Hugging Face model."
        )
    return list(min(lists, key=lambda pair: pair[0])[1])


def _holds_attention(blocks: nn.ModuleList) -> bool:
    """Tell decoder blocks from lists of experts or projections: a block has children's children."""
    return all(any(True for child in b.children() for _ in child.children()) for b in blocks)


@contextmanager
def read_positions(
    blocks: Sequence[nn.Module],
    *,
    columns: Int[Tensor, "b p"],
    layers: Sequence[int],
    buffer: Float[Tensor, "b p l d"],
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
        stop: Leave the pass after the last layer.
    """
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    last = max(range(len(layers)), key=lambda slot: (layers[slot], slot))

    def keep(slot: int, hidden: Tensor) -> None:
        at = hidden.device
        buffer[:, :, slot] = hidden[rows.to(at), columns.to(at)].to(buffer.device)
        if stop and slot == last:
            raise StopForward

    handles: list[Any] = []
    try:
        handles.extend(_hook(blocks, layer, slot, keep) for slot, layer in enumerate(layers))
        yield
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _hook(blocks: Sequence[nn.Module], layer: int, slot: int, keep: Any) -> Any:
    if layer == 0:

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(slot, args[0] if args else kwargs["hidden_states"])

        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        keep(slot, output[0] if isinstance(output, tuple) else output)

    return blocks[layer - 1].register_forward_hook(after)
