"""Where thinking ends, in tokens, and what the model holds there."""

import pytest
import torch

from latentguard.models.thinking_places import ThinkingPlaces, find_thinking
from latentguard.prompts import Prompt, Reply


def decode(ids):
    """Each token is a piece of text."""
    return "".join(ids)


@pytest.mark.parametrize(
    ("tokens", "places"),
    [
        (["a", " b", "</think>", "\n", "No"], ThinkingPlaces(1, 3)),
        (["a", " b", "</", "think", ">", "No"], ThinkingPlaces(1, 5)),
        (["a", ".</", "think", ">\n", "No"], ThinkingPlaces(0, 4)),
        (["<think>", "a", "</think>", "b", "</think>", "No"], ThinkingPlaces(3, 5)),
    ],
)
def test_the_last_thought_and_the_first_token_behind_the_end(tokens, places):
    assert find_thinking(decode, tokens) == places


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        ["No", "."],
        ["a", " b"],
        ["a", "</think>"],
        ["</think>", "No"],
        ["<think>", "\n\n", "</think>", "No"],
    ],
)
def test_replies_without_a_thought_or_an_answer_have_no_such_places(tokens):
    assert find_thinking(decode, tokens) is None


def test_states_are_those_of_a_whole_pass_over_prompt_and_reply(model):
    texts = ["First I look at it.</think> No.", "plain", "Hm</think>\nYes, of course."]
    replies = [
        Reply(Prompt(f"How {t}?"), t, tuple(model.tokenizer.encode(t, add_special_tokens=False)))
        for t in texts
    ]
    found = model.capture_thinking(replies)
    assert found[1] is None
    for reply, states in ((replies[0], found[0]), (replies[2], found[2])):
        places = find_thinking(model.tokenizer.decode, reply.ids)
        assert model.tokenizer.decode(reply.ids[: places.last_thought + 1]) in reply.text
        (layout,) = model.chat([reply.prompt])
        whole = torch.tensor([[*layout.ids, *reply.ids]])
        with torch.inference_mode():
            hidden = model.model(whole, output_hidden_states=True).hidden_states
        for slot, at in enumerate((places.last_thought, places.after)):
            expected = torch.stack([h[0, len(layout.ids) + at] for h in hidden[:-1]])
            torch.testing.assert_close(states[slot, :-1], expected, atol=1e-5, rtol=1e-5)
