"""Reading and changing the residual stream and attention: with ``early_exit`` the only module
that alters a run.

Hooks are registered, and blocks skipped, in a ``with`` that puts everything back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from latentguard.errors import ModelError
from latentguard.states import AttendedSlots


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
    attended: AttendedSlots | None = None,
    stop: bool = True,
) -> Iterator[StoreStates]:
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
        attended: Which of these means are weighted, by queries at the lowest layer.
        stop: Leave the pass after the last layer.
    """
    store = StoreStates(columns, starts, buffer, attended)
    with visit_layers(blocks, layers, store, stop=stop):
        yield store


class StoreStates:
    """Copies the residual stream at some tokens, layer by layer; see ``read_positions``."""

    def __init__(
        self,
        columns: Int[Tensor, "b p"],
        starts: Int[Tensor, "b p"] | None,
        buffer: Float[Tensor, "b p l d"],
        attended: AttendedSlots | None = None,
    ) -> None:
        """Copy states at ``columns``, or means from ``starts`` on, into ``buffer``."""
        self._rows = torch.arange(len(columns), device=columns.device)[:, None]
        self._columns = columns
        self._buffer = buffer
        self._means = None if starts is None else _Means(starts, columns, attended)

    @property
    def log_weights(self) -> Float[Tensor, "b a"] | None:
        """The logsumexp of each attended position's logits; None before the first layer."""
        return None if self._means is None else self._means.log_weights

    def __call__(self, slot: int, hidden: Float[Tensor, "b s d"]) -> None:
        """Copy the residual stream of the layer with this number."""
        device, buffer = hidden.device, self._buffer
        wanted = hidden[self._rows.to(device), self._columns.to(device)]
        buffer[:, :, slot] = wanted.to(buffer.device)
        if self._means is not None:
            buffer[:, self._means.slots, slot] = self._means(hidden).to(buffer)


@contextmanager
def score_tokens(
    blocks: Sequence[nn.Module],
    *,
    layers: Sequence[int],
    weight: Float[Tensor, "l d"],
    totals: Float[Tensor, "b s"],
    stop: bool = True,
) -> Iterator[None]:
    """Add to ``totals`` the inner product of each token's state with the weights of its layer.

    No state outlives its layer: a number a token is kept.

    Args:
        blocks: The decoder blocks.
        layers: Which layers.
        weight: One row a layer, float32.
        totals: One number for each token that a pass inside computes, float32.
        stop: Leave the pass after the last layer.
    """
    rows = weight.unbind(0)

    def add(slot: int, hidden: Tensor) -> None:
        totals.add_((hidden.float() @ rows[slot].to(hidden.device)).to(totals.device))

    with visit_layers(blocks, layers, add, stop=stop):
        yield


@contextmanager
def keep_states(
    blocks: Sequence[nn.Module], *, layers: Sequence[int], states: dict[int, Float[Tensor, "b s d"]]
) -> Iterator[None]:
    """Keep the residual stream of a pass over few tokens, by the number of its layer in ``layers``.

    Args:
        blocks: The decoder blocks.
        layers: Which layers.
        states: Where they go, as the model has them.
    """
    with visit_layers(blocks, layers, states.__setitem__, stop=False):
        yield


@contextmanager
def visit_layers(
    blocks: Sequence[nn.Module],
    layers: Sequence[int],
    visit: Callable[[int, Tensor], None],
    *,
    stop: bool,
) -> Iterator[None]:
    """Call ``visit`` with the number and the residual stream of each layer in passes inside.

    With ``stop`` a pass is left after the last layer; ``StopForward`` is swallowed here.
    """
    last_slot = max(range(len(layers)), key=lambda slot: (layers[slot], slot))

    def see(slot: int, hidden: Tensor) -> None:
        visit(slot, hidden)
        if stop and slot == last_slot:
            raise StopForward

    with suppress(StopForward), ExitStack() as stack:
        for slot, layer in enumerate(layers):
            stack.callback(hook_layer(blocks, layer, partial(see, slot)).remove)
        yield


class _Means:
    """Means over the tokens from a start to a column, both included.

    In shapes, w is the number of positions that average several tokens in some row, and a that of
    those whose tokens are weighted by queries.
    """

    def __init__(
        self,
        starts: Int[Tensor, "b p"],
        columns: Int[Tensor, "b p"],
        attended: AttendedSlots | None = None,
    ) -> None:
        self._attended = attended
        is_mean = (starts < columns).any(0)
        if attended is not None:
            is_mean[list(attended.slots)] = True
        self.slots = is_mean.nonzero()[:, 0]
        self._starts = starts[:, self.slots]
        self._columns = columns[:, self.slots]
        self._weights: Float[Tensor, "b w s"] | None = None
        self.log_weights: Float[Tensor, "b a"] | None = None

    def __call__(self, hidden: Float[Tensor, "b s d"]) -> Float[Tensor, "b w d"]:
        if self._weights is None:  # all layers share those of the first
            self._weights = self._token_weights(hidden)
        self._weights = self._weights.to(hidden.device)
        return self._weights @ hidden.float()

    def _token_weights(self, hidden: Float[Tensor, "b s d"]) -> Float[Tensor, "b w s"]:
        token = torch.arange(hidden.shape[1], device=hidden.device)
        starts, columns = (x.to(hidden.device)[..., None] for x in (self._starts, self._columns))
        is_inside = (token >= starts) & (token <= columns)
        weights = is_inside / (columns - starts + 1).float()
        if self._attended is not None:
            own = torch.isin(self.slots, torch.tensor(self._attended.slots).to(self.slots))
            own = own.to(hidden.device)
            logits = self._attended.vectors.to(hidden.device) @ hidden.float().mT
            logits = logits.masked_fill(~is_inside[:, own], -torch.inf)
            self.log_weights = logits.logsumexp(-1)
            weights[:, own] = logits.softmax(-1)
        return weights


def hook_layer(
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

    with ExitStack() as stack:
        stack.callback(hook_layer(blocks, layer, shift).remove)
        yield


@contextmanager
def replace_states(
    blocks: Sequence[nn.Module],
    *,
    layer: int,
    columns: Int[Tensor, "r p"],
    states: Float[Tensor, "r p d"],
) -> Iterator[None]:
    """Put states in the place of the residual stream's own at some tokens of a layer.

    Args:
        blocks: The decoder blocks.
        layer: Where (0 is the input of the first block).
        columns: Token indices per row, in the tokens that this pass computes.
        states: What is put there.
    """
    rows = torch.arange(len(columns), device=columns.device)[:, None]

    def put(hidden: Tensor) -> Tensor:
        new = hidden.clone()
        new[rows.to(hidden.device), columns.to(hidden.device)] = states.to(hidden)
        return new

    with ExitStack() as stack:
        stack.callback(hook_layer(blocks, layer, put).remove)
        yield


@contextmanager
def project_out(
    blocks: Sequence[nn.Module],
    *,
    directions: Float[Tensor, "r d"],
    tokens: Bool[Tensor, "r s"] | None = None,
) -> Iterator[None]:
    """Project a direction out of the residual stream at every layer: h - (h u) u.

    Args:
        blocks: The decoder blocks.
        directions: One a row, of length 1; a row of zeros stays as it is.
        tokens: At which tokens of the pass; at each if None.
    """

    def project(hidden: Tensor) -> Tensor:
        stream = hidden.float()
        units = directions.to(stream)[:, None]
        step = (stream * units).sum(-1, keepdim=True) * units
        if tokens is not None:
            step = torch.where(tokens.to(hidden.device)[..., None], step, 0.0)
        return (stream - step).to(hidden)

    with ExitStack() as stack:
        for layer in range(len(blocks) + 1):
            stack.callback(hook_layer(blocks, layer, project).remove)
        yield


@contextmanager
def hide_tokens(
    blocks: Sequence[nn.Module],
    hidden: Mapping[int, Bool[Tensor, "r s t"]],
) -> Iterator[None]:
    """Cut attention: in some blocks some tokens are not seen by some others.

    The mask that a block is given is changed, whether it is of booleans (sdpa) or added (eager).

    Args:
        blocks: The decoder blocks.
        hidden: Number of a block, from 1 on -> which of the t tokens, cached ones included, each
            of the s tokens of the pass does not see.

    Raises:
        ModelError: if a block takes no mask, or one of another kind, such as flash attention's.
    """
    with ExitStack() as stack:
        for number, tokens in hidden.items():
            block = blocks[number - 1]
            hook = partial(_mask_more, _mask_place(block), tokens)
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


MASK = "attention_mask"


def _mask_place(block: nn.Module) -> int:
    """Where among its arguments a block takes the mask."""
    names = list(inspect.signature(block.forward).parameters)
    if MASK not in names:
        raise ModelError(
            f"Attention is cut through the argument '{MASK}' of a block; "
            f"{type(block).__name__} has none. Use another model."
        )
    return names.index(MASK)


def _mask_more(
    place: int,
    hidden: Bool[Tensor, "r s t"],
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with more of its attention masked."""
    mask = args[place] if place < len(args) else kwargs.get(MASK)
    new = _masked(mask, hidden[:, None])
    if place < len(args):
        return (*args[:place], new, *args[place + 1 :]), kwargs
    return args, kwargs | {MASK: new}


def _masked(mask: Any, hidden: Bool[Tensor, "r 1 s t"]) -> Tensor:
    """A mask, [r 1 s t], that also hides some tokens."""
    if mask is None:  # sdpa is given none where every token sees all before it
        size = hidden.shape[-2:]
        causal = torch.ones(size, dtype=torch.bool, device=hidden.device).tril(size[1] - size[0])
        return causal & ~hidden
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != hidden.shape[-2:]:
        raise ModelError(
            "Attention can be cut where masks are [rows heads tokens tokens], as with "
            f"attn_implementation='sdpa' or 'eager'; found {_shape(mask)}."
        )
    hidden = hidden.to(mask.device)
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _shape(mask: Any) -> str:
    return f"one of shape {tuple(mask.shape)}" if hasattr(mask, "shape") else type(mask).__name__


@contextmanager
def record_output_size(block: nn.Module, sizes: list[int]) -> Iterator[None]:
    """Record in ``sizes`` how many values a block returns; 0 if it returns a bare tensor."""

    def record(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        sizes.append(len(output) if isinstance(output, tuple) else 0)

    with ExitStack() as stack:
        stack.callback(block.register_forward_hook(record).remove)
        yield


@contextmanager
def contiguous_head(model: nn.Module) -> Iterator[None]:
    """Copy what goes into the output layer, so that it lies in one piece.

    With frozen weights torch multiplies a slice such as ``hidden[:, -1:]`` row by row, each with a
    copy of all weights: 21 s in place of 0.05 s for 16 rows in bfloat16 on a CPU.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        yield
        return

    def copy(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].contiguous(), *inputs[1:])

    with ExitStack() as stack:
        stack.callback(head.register_forward_pre_hook(copy).remove)
        yield


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
