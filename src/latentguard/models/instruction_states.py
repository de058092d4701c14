"""States at every token of instructions, each in its template.

Axis names in shapes: t tokens, l layers, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from latentguard.models.layout import CaptureRow
from latentguard.prompts import Prompt
from latentguard.states import Progress

if TYPE_CHECKING:
    from latentguard.models.chat_model import ChatModel


def capture_instructions(
    model: ChatModel,
    prompts: Sequence[Prompt],
    layers: tuple[int, ...],
    *,
    progress: Progress | None = None,
) -> list[Float[Tensor, "t l d"]]:
    """The states at each token of each instruction, in the model's dtype, on the CPU.

    Args:
        model: The model.
        prompts: What is read.
        layers: At which layers.
        progress: Called with the number of prompts just read.

    Raises:
        PromptError: if a prompt is empty or too long.
    """
    rows = model.lay_out(prompts, ("t_inst",))
    tokens = [list(layout.instruction) for layout in model.chat(prompts)]
    states: dict[int, Float[Tensor, "t l d"]] = {}

    def read(batch: list[int]) -> None:
        most = max(len(tokens[n]) for n in batch)
        padded = [_row(rows[n], tokens[n], most) for n in batch]
        for n, values in zip(batch, model.read_batch(padded, layers), strict=True):
            states[n] = values[: len(tokens[n])].clone()  # a view would keep the whole batch

    model.run_in_batches([row.length for row in rows], read, progress=progress)
    return [states[n] for n in range(len(rows))]


def _row(row: CaptureRow, tokens: list[int], most: int) -> CaptureRow:
    """A row that reads each of some tokens; the last is repeated, so that all rows read as many."""
    places = [*tokens, *tokens[-1:] * (most - len(tokens))]
    return CaptureRow(row.ids, tuple((at, at) for at in places))
