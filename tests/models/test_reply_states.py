"""States along replies: those of a whole pass over prompt and reply."""

import torch

from latentguard.models import reply_states
from latentguard.prompts import Prompt, Reply

PROMPTS = [Prompt("How?"), Prompt("How do birds find their way home in the dark?")]


def ids_of(model, text):
    return tuple(model.tokenizer.encode(text, add_special_tokens=False))


def whole_pass(model, prompt, ids):
    """States of a pass without a cache, at t_post and at each token behind it."""
    (layout,) = model.chat([prompt])
    with torch.inference_mode():
        row = torch.tensor([[*layout.ids, *ids]])
        hidden = model.model(row, output_hidden_states=True).hidden_states
    return torch.stack([h[0, layout.t_post :] for h in hidden[:-1]], 1)  # the last is normed


def test_they_are_those_of_a_whole_pass_whoever_wrote_the_reply(model):
    texts = ("Go on.", "One two three four five.", "No")
    replies = [Reply(p, t, ids_of(model, t)) for t in texts for p in PROMPTS]
    for reply, states in zip(replies, model.capture_replies(replies), strict=True):
        assert len(states) == len(reply.ids) + 1
        expected = whole_pass(model, reply.prompt, reply.ids)
        torch.testing.assert_close(states[:, :-1], expected, atol=1e-5, rtol=1e-5)


def test_the_first_is_t_post_at_every_layer(model):
    (states,) = model.capture_replies([Reply(PROMPTS[1], "Go", ids_of(model, "Go"))])
    captured = next(iter(model.capture([PROMPTS[1]], positions=("t_post",))))
    torch.testing.assert_close(states[0], captured.values[0, 0], atol=1e-5, rtol=1e-5)


def test_the_token_that_ends_a_reply_is_not_read(model, monkeypatch):
    ids = ids_of(model, "Go on.")
    end = 7
    monkeypatch.setattr(reply_states, "end_ids", lambda model: {end})
    cut, ended, empty = (Reply(PROMPTS[0], "Go on.", one) for one in (ids, (*ids, end), (end,)))
    states = model.capture_replies([cut, ended, empty])
    torch.testing.assert_close(states[0], states[1])
    assert len(states[2]) == 1
    assert model.capture_replies([]) == []
