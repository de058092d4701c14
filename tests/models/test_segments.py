"""Capture in segments: the states of a single pass, with other work in between."""

import pytest
import torch

from latentguard.models.layout import CaptureRow
from latentguard.models.segments import can_be_segmented, capture_in_segments
from latentguard.prompts import Prompt
from models.architectures import ARCHITECTURES, chat_model
from models.families import FAMILIES

POSITIONS = ("t_inst", "t_post", "mean", "post", "post+1")
PROMPT = Prompt("Tell me of the sea and the wind, and of ships. " * 6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [7, 64])
def test_states_are_those_of_one_pass_though_the_model_works_in_between(architecture, size):
    model = chat_model(architecture, FAMILIES["qwen2.5"].tokenizer)
    layers = tuple(range(model.depth + 1))
    row = CaptureRow.of(model.chat([PROMPT])[0], POSITIONS)
    if not can_be_segmented(model, row):
        pytest.skip("keeps more than keys and values")
    calls = []

    def between():
        calls.append(list(model.capture([Prompt("Something else")], layers=(1,))))

    found = capture_in_segments(model, row, layers, size=size, between=between)
    (states,) = model.capture([PROMPT], positions=POSITIONS, layers=layers)
    torch.testing.assert_close(found, states.values[0], rtol=1e-4, atol=1e-5)
    assert len(calls) == (row.length - 1) // size
