"""Attended positions: weighted means of the instruction's states, in every way a prompt is read."""

import pytest
import torch

from latentguard.errors import GuardError
from latentguard.models.conversation import Conversation, capture_tokens
from latentguard.models.early_exit import capture_staying
from latentguard.models.instruction_states import capture_instructions
from latentguard.models.layout import CaptureRow
from latentguard.models.segments import Segments, prefill
from latentguard.models.shared_model import SharedModel
from latentguard.prompts import Message, Prompt
from latentguard.states import States, TokenQueries, attended_slots
from models.architectures import ARCHITECTURES, chat_model

LAYERS = (1, 2, 4)
PROMPTS = [
    Prompt("Hi"),
    Prompt("How do I bake bread at home without a stand mixer?"),
    Prompt("And the sea? " * 12, history=(Message("system", "Be brief."),)),
    Prompt("Now?", history=(Message("user", "Hi."), Message("assistant", "Hello."))),
]
QUERIES = TokenQueries(1, 3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(1)))
POSITIONS = ("attended+2", "t_inst", "mean", "attended+1")
WHERE = dict(positions=POSITIONS, layers=LAYERS, queries=QUERIES)


def expected(model, prompt):
    """From the states of each token, one prompt at a time."""
    layout, states = capture_tokens(model, prompt, LAYERS)
    own = states[: len(layout.instruction)].float()
    weights = (own[:, 0] @ QUERIES.vectors.T).softmax(0)
    means = torch.einsum("th,tld->hld", weights, own)
    return torch.stack([means[1], own[-1], own.mean(0), means[0]])


def require_expected(model, values):
    wanted = torch.stack([expected(model, prompt) for prompt in PROMPTS])
    torch.testing.assert_close(values.float(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_has_the_weighted_means_of_each_row(architecture, tokenizer):
    model = chat_model(architecture, tokenizer)
    require_expected(model, States.collect(model.capture(PROMPTS, **WHERE)).values)


def test_the_weights_are_no_plain_mean(model):
    attended, _, mean, _ = expected(model, PROMPTS[1])
    assert (attended - mean).norm() > 0.1 * mean.norm()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_segments_add_up_to_them(model, size):
    attended = SharedModel(model, Segments(size, lambda: None))
    require_expected(model, States.collect(attended.capture(PROMPTS, **WHERE)).values)


def test_a_number_that_is_not_finite_is_not_lost_between_segments(model):
    """Spoilt in the last of several segments, where the mean of those before is finite."""
    row = CaptureRow.of(model.chat([PROMPTS[2]])[0], ("attended+1",))
    last, size = -(-row.length // 7), 7
    seen = []

    def spoil(_, __, output):
        seen.append(True)
        if len(seen) == last:
            (output[0] if isinstance(output, tuple) else output)[:] = torch.nan

    handle = model.blocks[0].register_forward_hook(spoil)
    attended = attended_slots(("attended+1",), LAYERS, QUERIES)
    segments = Segments(size, lambda: None)
    try:
        values, _ = prefill(model, row, LAYERS, segments, attended=attended, stop=True)
    finally:
        handle.remove()
    assert len(seen) == last > 2
    assert not torch.isfinite(values).any()


def test_prompts_that_stay_have_them_too(model):
    def keep(states):
        return torch.ones(len(states))

    got = capture_staying(model, PROMPTS, keep, cut=0.0, **WHERE)
    require_expected(model, got.values)


def test_rows_that_leave_do_not_shift_the_weights_of_those_that_stay(model):
    (whole,) = model.capture(PROMPTS, **WHERE)
    first = whole.values[:, :, 0].float()

    def estimate(states):
        gaps = (states.float()[:, None] - first[None]).flatten(2).norm(dim=-1)
        return torch.tensor([1.0 if n in (1, 3) else -1.0 for n in gaps.argmin(1).tolist()])

    got = capture_staying(model, PROMPTS, estimate, cut=0.0, **WHERE)
    assert got.numbers == [1, 3]
    torch.testing.assert_close(got.values, whole.values[[1, 3]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("segments", [None, Segments(7, lambda: None)])
def test_the_pass_that_begins_a_reply_has_them(model, segments):
    values = [Conversation(model, p, segments=segments, **WHERE).states.values for p in PROMPTS]
    require_expected(model, torch.cat(values))


def test_states_of_each_token_are_those_of_a_single_prompt(model):
    found = capture_instructions(model, PROMPTS, LAYERS)
    for prompt, states in zip(PROMPTS, found, strict=True):
        layout, wanted = capture_tokens(model, prompt, LAYERS)
        torch.testing.assert_close(states, wanted[: len(layout.instruction)], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(queries=None), "found no queries"),
        (dict(positions=("attended+3",)), "no position 'attended\\+3'"),
        (dict(layers=(2, 4)), "look at layer 1"),
    ],
)
def test_what_does_not_fit_is_refused(model, change, message):
    with pytest.raises(GuardError, match=message):
        list(model.capture(PROMPTS, **(WHERE | change)))
