"""Edits of a run beyond steering the prompt: patches, attention knock-outs, ablations.

A prompt is read once as it is. An edited run starts at the first layer and the first token that it
changes; everything before is taken from the plain run. What goes on while the reply is made
(``ReplyEdits``) is changed at each of its tokens.

Axis names in shapes: b prompts, r rows (edit by edit), t tokens of the padded prompt, s tokens of
a pass, p positions, d width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad

from latentguard.errors import ModelError, PromptError
from latentguard.interventions import Ablation, Edit, Intervention, Knockout, Patch
from latentguard.models.hooks import (
    add_vector,
    hide_tokens,
    project_out,
    replace_states,
    skip_blocks,
)
from latentguard.models.layout import Layout
from latentguard.models.prefill import (
    KeysValues,
    PromptBatch,
    ReplyingModel,
    build_cache,
    forward,
    keys_values,
    place_behind_padding,
    pushes,
    read_unsteered,
)
from latentguard.prompts import Prompt

Row = tuple[Prompt, Layout]


def require_fit(model: ReplyingModel, edit: Edit) -> None:
    """Make sure that a model can be edited so.

    Raises:
        ModelError: if a layer, a block or a vector does not fit the model.
    """
    if isinstance(edit, Knockout):
        if not edit.blocks or not set(edit.blocks) <= set(range(1, model.depth + 1)):
            raise ModelError(f"Blocks run from 1 to {model.depth}; found {edit.blocks}.")
        return
    if not isinstance(edit, Ablation) and not 0 <= edit.layer <= model.depth:
        raise ModelError(f"Layers run from 0 to {model.depth}; found {edit.layer}.")
    if isinstance(edit, Patch):
        expected = (len(edit.positions), model.width)
        for states in edit.states.values():
            if tuple(states.shape) != expected:
                raise ModelError(
                    f"States of shape {expected} are needed to patch {', '.join(edit.positions)}; "
                    f"found shape {tuple(states.shape)}."
                )
        return
    vectors = edit.vectors if isinstance(edit, Intervention) else [edit.vector]
    for vector in vectors:
        if tuple(vector.shape) != (model.width,):
            shape = tuple(vector.shape)
            raise ModelError(f"A vector of width {model.width} is needed; found shape {shape}.")


def require_place(edit: Edit, prompt: Prompt, layout: Layout) -> None:
    """Make sure that a prompt has what an edit changes.

    Raises:
        PromptError: if a position, its states or a token to hide is missing.
    """
    if isinstance(edit, Intervention):
        edit.vector_of(prompt)
    if isinstance(edit, Knockout):
        hidden_tokens(layout, prompt, edit)
    if isinstance(edit, Patch):
        if prompt not in edit.states:
            raise PromptError(f"A patch has no states for prompt '{prompt.id}'.")
        for position in edit.positions:
            layout.index(position)


def hidden_tokens(layout: Layout, prompt: Prompt, edit: Knockout) -> list[int]:
    """Indices of the tokens that a knock-out hides.

    Raises:
        PromptError: if no token follows t_inst, or there is no token but t_inst to choose.
    """
    if layout.t_post == layout.t_inst:
        raise PromptError(f"Prompt '{prompt.id}' has no token behind t_inst to cut attention of.")
    if edit.keys == "t_inst":
        return [layout.t_inst]
    every = list(layout.instruction)
    if edit.keys == "instruction":
        return every
    others = every[:-1]
    if not others:
        raise PromptError(f"Prompt '{prompt.id}' has no token but t_inst to cut attention to.")
    if edit.keys == "all but t_inst":
        return others
    pick = others[crc32(f"{edit.draw} {prompt.text}".encode()) % len(others)]
    if edit.keys == "random":
        return [pick]
    return [index for index in every if index != pick]


def first_layer(edit: Edit) -> int:
    """The last layer that an edit leaves as it is, or the one whose states it replaces."""
    if isinstance(edit, Knockout):
        return min(edit.blocks) - 1
    return edit.layer if isinstance(edit, Patch) else 0


def pass_key(edit: Edit) -> tuple[str, int, tuple[str, ...]]:
    """What edits of one pass have in common.

    The kind; the layer at which the pass starts; the positions of a patch, or, of steering, whether
    it reaches the tokens that all prompts begin with, and whether each prompt has its own vector.
    """
    if isinstance(edit, Intervention):
        head = "all" if edit.tokens == "all" else ""
        own = "own" if isinstance(edit.vector, Mapping) else ""
        return "steer", edit.layer, (head, own)
    positions = edit.positions if isinstance(edit, Patch) else ()
    return type(edit).__name__, first_layer(edit), positions


class EditedReader:
    """Reads one batch of prompts under any number of patches, knock-outs and ablations."""

    def __init__(
        self,
        model: ReplyingModel,
        rows: Sequence[Row],
        batch: PromptBatch,
        edits: Sequence[Edit],
    ) -> None:
        """Read the prompts as they are, and keep what the edits start from."""
        self.model = model
        self.batch = batch
        self._rows = rows
        self._padding = (~batch.real).sum(1).tolist()
        layers = sorted({first_layer(one) for one in edits} - {0})
        inside = [self._first_column(one) for one in edits if first_layer(one)]
        self._head = min([batch.head, *inside])
        head = self._head
        past: KeysValues = []
        if head:  # one row serves all prompts
            row = read_unsteered(
                model, batch.ids[:1, :head], batch.real[:1, :head], [], layers=[], stop=False
            )
            past = place_behind_padding(row.cached, batch.real, head)
        tail = batch.ids[:, head:]
        self._plain = read_unsteered(model, tail, batch.real, past, layers=layers, stop=False)

    @torch.inference_mode()
    def read(self, group: Sequence[Any]) -> tuple[KeysValues, Float[Tensor, "r v"]]:
        """Read the prompts under edits of one ``pass_key``: their cache and first logits."""
        model = self.model
        batch = self.batch
        layer = first_layer(group[0])
        column = min(self._first_column(one) for one in group)
        row = torch.arange(len(self._rows), device=batch.ids.device).repeat(len(group))
        cached = self._plain.cached if column else []
        past = [
            (k[row.to(k.device), :, :column], v[row.to(v.device), :, :column]) for k, v in cached
        ]
        start = self._plain.start(layer, row)
        cache = build_cache(past)
        with ExitStack() as stack:
            if start.hidden is not None:
                hidden = start.hidden[:, column - self._head :]
                skip = skip_blocks(model.blocks, layer=layer, hidden=hidden, size=start.size)
                stack.enter_context(skip)
            stack.enter_context(self._edited(group, column))
            logits = forward(model, batch.ids[row, column:], batch.real[row], cache)
        return start.below + keys_values(cache, layer), logits

    def _first_column(self, edit: Edit) -> int:
        """The first column that an edit changes in some row."""
        if isinstance(edit, Ablation):
            return int(self.batch.steered[edit.tokens].any(0).nonzero()[0])
        columns = list[int]()
        for (_, layout), padding in zip(self._rows, self._padding, strict=True):
            first = layout.t_inst + 1
            if isinstance(edit, Patch):
                first = min(layout.index(at) for at in edit.positions)
            columns.append(padding + first)
        return min(columns)

    def _edited(self, group: Sequence[Any], column: int) -> AbstractContextManager[None]:
        """Change a pass that begins at a column."""
        blocks = self.model.blocks
        if isinstance(group[0], Knockout):
            return hide_tokens(blocks, self._hidden(group, column))
        if isinstance(group[0], Ablation):
            units = _units(group).to(self.model.device)
            tokens = torch.cat([self.batch.steered[one.tokens] for one in group])[:, column:]
            directions = units.repeat_interleave(len(self._rows), 0)
            return project_out(blocks, directions=directions, tokens=tokens)
        columns = [
            [padding + layout.index(at) - column for at in one.positions]
            for one in group
            for (_, layout), padding in zip(self._rows, self._padding, strict=True)
        ]
        states = torch.stack([one.states[prompt] for one in group for prompt, _ in self._rows])
        return replace_states(
            blocks,
            layer=group[0].layer,
            columns=torch.tensor(columns, device=self.model.device),
            states=states.to(self.model.device),
        )

    def _hidden(self, group: Sequence[Knockout], column: int) -> dict[int, Bool[Tensor, "r s t"]]:
        """Number of a block -> what each token of a pass does not see there."""
        count = self.batch.ids.shape[1]
        keys = hidden_keys(group, self._rows, self._padding, count)
        readers = torch.zeros_like(keys)
        for n, edit in enumerate(group):
            for k, ((_, layout), padding) in enumerate(zip(self._rows, self._padding, strict=True)):
                first = layout.t_inst + 1 if edit.readers == "after" else layout.t_post
                readers[n * len(self._rows) + k, padding + first :] = True
        pairs = readers[:, column:, None] & keys[:, None]
        return _by_block(group, pairs.to(self.model.device), len(self._rows))


def hidden_keys(
    group: Sequence[Knockout | None], rows: Sequence[Row], padding: Sequence[int], count: int
) -> Bool[Tensor, "r t"]:
    """Which of the ``count`` columns knock-outs hide in each row; none where there is none."""
    keys = torch.zeros(len(group) * len(rows), count, dtype=torch.bool)
    for n, edit in enumerate(group):
        for k, ((prompt, layout), before) in enumerate(zip(rows, padding, strict=True)):
            if edit is not None:
                columns = [before + index for index in hidden_tokens(layout, prompt, edit)]
                keys[n * len(rows) + k, columns] = True
    return keys


def _by_block(
    group: Sequence[Knockout | None], hidden: Bool[Tensor, "r *s"], rows: int
) -> dict[int, Bool[Tensor, "r *s"]]:
    """Number of a block -> ``hidden`` in the rows whose knock-out cuts that block."""
    keys_by_block = {}
    for block in sorted({number for one in group if one for number in one.blocks}):
        cuts = torch.tensor([one is not None and block in one.blocks for one in group])
        rows_cut = cuts.repeat_interleave(rows).to(hidden.device)
        keys_by_block[block] = hidden & rows_cut.reshape(-1, *[1] * (hidden.ndim - 1))
    return keys_by_block


def _units(group: Sequence[Ablation]) -> Float[Tensor, "e d"]:
    """Directions of length 1; one of length 0 stays as it is, and changes nothing."""
    vectors = torch.stack([one.vector.float().cpu() for one in group])
    units: Tensor = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return units


@dataclass(frozen=True, eq=False)
class ReplyEdits:
    """What is changed at each token of a reply, by row."""

    added: dict[int, Float[Tensor, "r d"]] = field(default_factory=dict)
    """Layer -> what is added; zeros where nothing is."""

    removed: Float[Tensor, "r d"] | None = None
    """Unit vectors that are projected out at every layer; zeros where none is."""

    hidden: dict[int, Bool[Tensor, "r t"]] = field(default_factory=dict)
    """Number of a block -> tokens of the prompt that the reply does not see."""

    @staticmethod
    def of(
        settings: Sequence[Edit], rows: Sequence[Row], batch: PromptBatch, model: ReplyingModel
    ) -> ReplyEdits:
        """What goes on in replies, of settings that are decoded together."""
        count = len(rows)
        added: dict[int, Tensor] = {}
        removed = torch.zeros(len(settings), model.width)
        cut: list[Knockout | None] = [None] * len(settings)
        for n, one in enumerate(settings):
            if isinstance(one, Intervention) and one.while_replying:
                shape = (len(settings), count, model.width)
                vectors = added.setdefault(one.layer, torch.zeros(shape))
                vectors[n] = pushes([one], batch.prompts)
            elif isinstance(one, Ablation) and one.tokens == "all":
                removed[n] = _units([one])[0]
            elif isinstance(one, Knockout) and one.readers == "after":
                cut[n] = one
        padding = (~batch.real).sum(1).tolist()
        keys = hidden_keys(cut, rows, padding, batch.ids.shape[1]).to(model.device)
        spread = {at: v.flatten(0, 1).to(model.device) for at, v in added.items()}
        directions = removed.to(model.device).repeat_interleave(count, 0)
        return ReplyEdits(
            spread, directions if removed.any() else None, _by_block(cut, keys, count)
        )

    @contextmanager
    def applied(self, blocks: Sequence[nn.Module], rows: Tensor, length: int) -> Iterator[None]:
        """Change passes of one token each.

        Args:
            blocks: The decoder blocks.
            rows: Which rows are still decoded.
            length: Tokens so far, the prompt's padding included.
        """
        with ExitStack() as stack:
            every = torch.ones(len(rows), 1, dtype=torch.bool, device=rows.device)
            for layer, vectors in self.added.items():
                push = add_vector(blocks, layer=layer, vectors=vectors[rows], tokens=every)
                stack.enter_context(push)
            if self.removed is not None:
                stack.enter_context(project_out(blocks, directions=self.removed[rows]))
            if self.hidden:
                hidden = {
                    number: pad(keys[rows], (0, length - keys.shape[1]))[:, None]
                    for number, keys in self.hidden.items()
                }
                stack.enter_context(hide_tokens(blocks, hidden))
            yield
