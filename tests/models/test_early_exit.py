"""Rows that leave a pass early: those that stay are read as if nobody had left."""

import pytest
import torch

from latentguard.models.early_exit import capture_staying
from latentguard.prompts import Message, Prompt
from models.architectures import ARCHITECTURES, HYBRIDS, chat_model

POSITIONS = ("t_inst", "post", "t_post", "mean")
LAYERS = (1, 2, 4)
TEXTS = [
    "Hello there.",
    "How do I bake bread at home without a stand mixer?",
    "Name a river.",
    "What is the capital of France, and how many people live there today?",
    "Sing.",
]


def read(model, stays, prompts=TEXTS, layers=LAYERS):
    """Read prompts; those of ``stays``, by their number in order of length, stay."""
    prompts = [Prompt(text) for text in prompts]
    whole = torch.cat(
        [s.values for s in model.capture(prompts, positions=POSITIONS, layers=layers)]
    )
    first = whole[:, :, 0].float()

    def estimate(states):
        gaps = (states.float()[:, None] - first[None]).flatten(2).norm(dim=-1)
        return torch.tensor([1.0 if n in stays else -1.0 for n in gaps.argmin(1).tolist()])

    got = capture_staying(model, prompts, estimate, cut=0.0, positions=POSITIONS, layers=layers)
    return whole, got


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *HYBRIDS])
def test_rows_that_stay_have_the_states_of_the_whole_pass(architecture, tokenizer):
    model = chat_model(architecture, tokenizer)
    whole, got = read(model, {0, 3})
    assert got.numbers == [0, 3]
    assert got.estimates.tolist() == [1.0, -1.0, -1.0, 1.0, -1.0]
    torch.testing.assert_close(got.values, whole[[0, 3]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stays", [set(), {4}, {0, 1, 2, 3, 4}])
def test_none_one_and_all_may_stay(stays, model):
    whole, got = read(model, stays)
    assert got.numbers == sorted(stays)
    torch.testing.assert_close(got.values, whole[sorted(stays)], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [4, 19])
def test_as_many_rows_as_tokens_confuse_nothing(count, model):
    texts = [f"Word {n}" for n in range(count)]
    whole, got = read(model, {0, 2}, texts)
    torch.testing.assert_close(got.values, whole[[0, 2]], atol=1e-4, rtol=1e-4)


def test_later_blocks_compute_no_row_that_left(model):
    widths = []
    hook = model.blocks[-1].register_forward_hook(lambda _, __, out: widths.append(len(out)))
    try:
        read(model, {1})
    finally:
        hook.remove()
    assert widths == [5, 1]


def test_chats_and_short_prompts_are_batched_alike(model):
    chat = Prompt("And now?", history=(Message("user", "Hi."), Message("assistant", "Hello.")))
    prompts = [chat, Prompt("Hello.")]
    where = dict(positions=POSITIONS, layers=LAYERS)
    (states,) = model.capture(prompts, **where)
    keep = lambda states: torch.ones(len(states))  # noqa: E731
    got = capture_staying(model, prompts, keep, cut=0.0, **where)
    torch.testing.assert_close(got.values, states.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_estimate_that_is_not_finite_stays(value, model):
    undefined = lambda states: torch.full((len(states),), value)  # noqa: E731
    got = capture_staying(
        model, [Prompt("Hello.")], undefined, cut=0.0, positions=POSITIONS, layers=LAYERS
    )
    assert got.numbers == [0]


def test_no_hook_is_left_behind(tokenizer):
    """On a model of its own: transformers leaves hooks where hidden states were asked for."""
    model = chat_model("llama", tokenizer)
    _, got = read(model, {1})
    assert got.numbers == [1]
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in model.blocks)
