"""A shared model: the states of the model itself, read in units with other work in between."""

import pytest
import torch

from latentguard.models.conversation import Conversation, Sampling, capture_tokens
from latentguard.models.segments import Segments
from latentguard.models.shared_model import SharedModel
from latentguard.prompts import Prompt
from models.architectures import chat_model
from models.families import FAMILIES

POSITIONS = ("t_inst", "mean")
TEXTS = ["Hello.", "Tell me of the sea and the wind, and of ships. " * 4, "Hi.", "Good morning."]


@pytest.fixture(scope="module")
def model():
    return chat_model("llama", FAMILIES["qwen2.5"].tokenizer)


def lengths_of_passes(model, monkeypatch):
    """Tokens of each pass, padding with them."""
    sizes = []
    forward = model.model.forward

    def noted(ids, *rest, **how):
        sizes.append(ids.numel())
        return forward(ids, *rest, **how)

    monkeypatch.setattr(model.model, "forward", noted)
    return sizes


def test_no_pass_is_longer_than_a_unit_and_the_states_are_the_models(model, monkeypatch):
    prompts = [Prompt(text) for text in TEXTS * 3]
    how = dict(positions=POSITIONS, layers=(1, 2))
    (expected,) = model.capture(prompts, **how)
    sizes = lengths_of_passes(model, monkeypatch)
    calls = []

    def between():
        calls.append(len(sizes))

    (found,) = SharedModel(model, Segments(100, between)).capture(prompts, **how)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-5)
    assert max(sizes) <= 100
    assert calls == list(range(1, len(sizes)))


def test_a_reply_is_the_same_if_its_prompt_is_read_in_segments(model):
    prompt = Prompt(TEXTS[1])
    how = dict(positions=POSITIONS, layers=(1, 2))
    calls = []
    segments = Segments(16, lambda: calls.append(list(model.capture(["Hi."], layers=(1,)))))
    whole = Conversation(model, prompt, **how)
    parts = Conversation(model, prompt, **how, segments=segments)
    assert len(calls) == (parts.prompt_tokens - 1) // 16
    torch.testing.assert_close(parts.states.values, whole.states.values, rtol=1e-4, atol=1e-5)
    sampling = Sampling(max_tokens=8, temperature=0.0)
    texts = [[p.text for p in chat.pieces(sampling)] for chat in (whole, parts)]
    assert texts[0] == texts[1]
    assert Conversation(model, prompt, positions=(), layers=(1,), segments=segments).states is None


def test_the_states_of_all_tokens_are_the_same_in_segments(model):
    prompt = Prompt(TEXTS[1])
    layout, whole = capture_tokens(model, prompt, (1, 2))
    calls = []
    segments = Segments(16, lambda: calls.append(1))
    _, parts = capture_tokens(model, prompt, (1, 2), segments)
    assert len(calls) == (len(layout.ids) - 1) // 16
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
