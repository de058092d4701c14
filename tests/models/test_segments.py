"""Capture in segments: the states of a single pass, with other work in between."""

import pytest
import torch

from latentguard.models import segments
from latentguard.models.layout import CaptureRow
from latentguard.models.segments import Segments, can_be_segmented, prefill
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

    found, _ = prefill(model, row, layers, Segments(size, between), stop=True)
    (states,) = model.capture([PROMPT], positions=POSITIONS, layers=layers)
    torch.testing.assert_close(found, states.values[0], rtol=1e-4, atol=1e-5)
    assert len(calls) == (row.length - 1) // size


def test_the_cache_has_the_name_that_the_model_gives_it(monkeypatch):
    """Under another name than its own, a model of transformers would drop it and say nothing."""
    monkeypatch.setattr(segments, "cache_argument", lambda model: "cache_of_tomorrow")
    model = chat_model("qwen2", FAMILIES["qwen2.5"].tokenizer)
    given = []
    forward = model.model.forward

    def renamed(*args, cache_of_tomorrow, **options):
        given.append(cache_of_tomorrow)
        return forward(*args, past_key_values=cache_of_tomorrow, **options)

    monkeypatch.setattr(model.model, "forward", renamed)
    row = CaptureRow.of(model.chat([PROMPT])[0], POSITIONS)
    prefill(model, row, (1,), Segments(7, lambda: None), stop=True)
    assert len(given) > 1
