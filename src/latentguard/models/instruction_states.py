"""States at every token of instructions, each in its template.

Axis names in shapes: t tokens, l layers, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from latentguard.models.layout import CaptureRow, Layout
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
    layouts = model.chat(prompts)
    for layout, prompt in zip(layouts, prompts, strict=True):
        model.check_length(layout.t_inst + 1, prompt)
    states: dict[int, Float[Tensor, "t l d"]] = {}

    def read(batch: list[int]) -> None:
        most = max(len(layouts[n].instruction) for n in batch)
        rows = [_row(layouts[n], most) for n in batch]
        for n, values in zip(batch, model.read_batch(rows, layers), strict=True):
            count = len(layouts[n].instruction)
            states[n] = values[:count].clone()  # a view would keep the whole batch

    model.run_in_batches([layout.t_inst + 1 for layout in layouts], read, progress=progress)
    return [states[n] for n in range(len(layouts))]


def _row(layout: Layout, most: int) -> CaptureRow:
    """A row that reads each token of the instruction, and the last again up to ``most`` times."""
    tokens = [*layout.instruction]
    tokens += tokens[-1:] * (most - len(tokens))
    return CaptureRow.of_spans(layout.ids, [(at, at) for at in tokens])
