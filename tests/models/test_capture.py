"""Captured states are the ones that Hugging Face computes, whatever the batch."""

import pytest
import torch

from latentguard.models import chat_model as hf
from latentguard.prompts import Message, Prompt
from latentguard.states import States
from models.architectures import ARCHITECTURES, HYBRIDS, chat_model, hidden_states

POINTS = ("t_inst", "t_post", "post+2")
POSITIONS = (*POINTS, "mean", "post")
DEPTH = 4
QUESTION = "What is the capital of France and how many people live there today"
PROMPTS = [Prompt(QUESTION[: 5 + 29 * n % 71] + "?", id=f"p{n}") for n in range(8)]
"""Eight lengths, out of order."""


def captured(model, prompts=PROMPTS, **how):
    return States.collect(model.capture(prompts, **({"positions": POSITIONS} | how)))


def expected(model, prompt, layers=range(DEPTH), positions=POSITIONS):
    """States of one row of its own, by output_hidden_states: [p l d]."""
    layout = model.chat([prompt])[0]
    states = hidden_states(model, layout.ids)
    tokens = [slice(layout.start(p), layout.index(p) + 1) for p in positions]
    return torch.stack([torch.stack([states[k][t].mean(0) for k in layers]) for t in tokens])


def assert_same(found, wanted, tolerance=1e-5):
    """Each vector is within ``tolerance`` of its own length."""
    wanted, found = wanted.float(), found.float()
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert found.shape == wanted.shape
    assert error.max() < tolerance


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestEveryArchitecture:
    def test_states_are_those_of_hugging_face(self, architecture, tokenizer):
        model = chat_model(architecture, tokenizer)
        states = captured(model)
        assert states.values.shape == (8, len(POSITIONS), DEPTH + 1, 32)
        assert states.prompts == tuple(PROMPTS)
        reference = torch.stack([expected(model, prompt) for prompt in PROMPTS])
        spread = reference.std(dim=0).norm(dim=-1) / reference.norm(dim=-1).mean(dim=0)
        assert spread[:, 1:].min() > 0.02  # the prompts do differ, at each position and layer
        assert_same(states.values[:, :, :DEPTH], reference)

    def test_post_is_the_mean_of_what_comes_after_the_instruction(self, architecture, tokenizer):
        model = chat_model(architecture, tokenizer)
        each = tuple(f"post+{k}" for k in range(1, model.post + 1))
        states = captured(model, positions=(*each, "post"))
        assert len(each) > 1
        assert_same(states.values[:, -1], states.values[:, :-1].float().mean(1))

    def test_the_last_layer_is_before_the_final_norm(self, architecture, tokenizer):
        model = chat_model(architecture, tokenizer)
        states = captured(model, PROMPTS[:2], layers=[DEPTH], positions=POINTS)
        base = model.model.base_model
        norm = next(
            module
            for name, module in base.named_children()
            if name in ("norm", "final_layernorm", "final_layer_norm", "ln_f")
        )
        after = torch.stack([expected(model, p, [DEPTH], POINTS)[:, 0] for p in PROMPTS[:2]])
        with torch.no_grad():
            assert_same(norm(states.values[:, :, 0]), after)
        assert (states.values[:, :, 0] - after).abs().max() > 1e-2

    def test_a_batch_is_its_single_rows(self, architecture, tokenizer):
        model = chat_model(architecture, tokenizer)
        singles = torch.cat([captured(model, [prompt]).values for prompt in PROMPTS])
        assert_same(captured(model).values, singles)

    @pytest.mark.parametrize("layers", [[0], [1], [2, 0]])
    def test_some_layers_from_a_fresh_model(self, architecture, layers, tokenizer):
        model = chat_model(architecture, tokenizer)
        states = captured(model, PROMPTS[:3], layers=layers)
        reference = torch.stack([expected(model, p, layers) for p in PROMPTS[:3]])
        assert states.layers == tuple(layers)
        assert_same(states.values, reference)


@pytest.mark.parametrize("architecture", HYBRIDS)
class TestHybrids:
    """Blocks that remember more than keys and values, which no prefix can be shared of."""

    def test_states_are_those_of_hugging_face(self, architecture, tokenizer):
        model = chat_model(architecture, tokenizer)
        states = captured(model)
        assert model._prefix.ids == ()
        reference = torch.stack([expected(model, prompt) for prompt in PROMPTS])
        assert_same(states.values[:, :, :DEPTH], reference)

    def test_a_batch_is_its_single_rows(self, architecture, tokenizer):
        model = chat_model(architecture, tokenizer)
        singles = torch.cat([captured(model, [prompt]).values for prompt in PROMPTS])
        assert_same(captured(model).values, singles)


class TestScaledPositions:
    """LongRoPE: a batch that is longer than the original length has other factors, all of it."""

    def test_prompts_of_both_lengths_are_read_as_if_alone(self, tokenizer):
        model = chat_model("phi3_long", tokenizer)
        lengths = [len(layout.ids) for layout in model.chat(PROMPTS)]
        assert min(lengths) < 48 < max(lengths)
        reference = torch.stack([expected(model, prompt) for prompt in PROMPTS])
        assert_same(captured(model).values[:, :, :DEPTH], reference)


class TestPadding:
    def test_the_padding_side_of_the_tokenizer_makes_no_difference(self, tokenizer):
        model = chat_model("llama", tokenizer)
        before, side = captured(model).values, tokenizer.padding_side
        try:
            for other in ("left", "right"):
                tokenizer.padding_side = other
                assert torch.equal(captured(chat_model("llama", tokenizer)).values, before)
        finally:
            tokenizer.padding_side = side

    def test_it_equals_a_left_padded_pass_with_mask_and_position_ids(self, model):
        layouts = model.chat(PROMPTS)
        longest = max(len(layout.ids) for layout in layouts)
        for layout, row in zip(layouts, captured(model).values, strict=True):
            pad = longest - len(layout.ids)
            states = hidden_states(
                model,
                [0] * pad + list(layout.ids),
                attention_mask=torch.tensor([[0] * pad + [1] * len(layout.ids)]),
                position_ids=torch.tensor([[0] * pad + list(range(len(layout.ids)))]),
            )
            for p, position in enumerate(POSITIONS):
                tokens = slice(pad + layout.start(position), pad + layout.index(position) + 1)
                wanted = torch.stack([states[k][tokens].mean(0) for k in range(DEPTH)])
                assert_same(row[p, :DEPTH], wanted)


class TestSharedPrefix:
    """Keys and values of the template's first tokens are computed once."""

    HISTORY = (Message("system", "Answer briefly."), Message("user", "Hi"))
    TURNS = (*HISTORY, Message("assistant", "Hello!"))

    @pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral", "gpt2", "qwen2_moe"])
    def test_states_are_the_same_without_it(self, architecture, tokenizer, monkeypatch):
        model = chat_model(architecture, tokenizer)
        shared = captured(model).values
        assert len(model._prefix.ids) > 5
        monkeypatch.setattr(model, "_shared_prefix", lambda rows, last_layer: None)
        assert_same(captured(model).values, shared)

    def test_long_prompts_do_without_it(self, tokenizer, monkeypatch):
        model = chat_model("llama", tokenizer)
        shared, prefixes = captured(model).values, []
        run = model._run
        monkeypatch.setattr(hf, "MAX_PREFIX_TOKENS", 20)
        monkeypatch.setattr(model, "_run", lambda *a: prefixes.append(a[1]) or run(*a))
        assert_same(captured(model).values, shared)
        assert prefixes == [None] * len(prefixes) != []

    def test_prompts_that_begin_otherwise_do_not_use_it(self, model):
        turns = [Prompt(p.text, history=self.TURNS) for p in PROMPTS]
        mixed = [p for pair in zip(turns, PROMPTS, strict=True) for p in pair]
        reference = torch.stack([expected(model, prompt) for prompt in mixed])
        assert_same(captured(model, turns).values[:, :, :DEPTH], reference[::2])
        assert_same(captured(model, mixed).values[:, :, :DEPTH], reference)

    def test_it_grows_with_the_layers_asked_for(self, tokenizer):
        model = chat_model("llama", tokenizer)
        few = captured(model, layers=[1]).values
        every = captured(model).values
        assert_same(every[:, :, 1:2], few)
        assert_same(captured(model, layers=[1]).values, few)
        reference = torch.stack([expected(model, prompt) for prompt in PROMPTS])
        assert_same(every[:, :, :DEPTH], reference)


class TestNumbers:
    @pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3", "neox"])
    def test_bfloat16_models_give_bfloat16_states(self, architecture, tokenizer):
        model = chat_model(architecture, tokenizer, dtype=torch.bfloat16)
        states = captured(model)
        assert states.values.dtype == torch.bfloat16
        reference = torch.stack([expected(model, prompt) for prompt in PROMPTS])
        assert_same(states.values[:, :, :DEPTH], reference, 0.02)  # 8-bit mantissas, other order
        single = captured(model, PROMPTS[:1]).values[0, :, 0]
        assert torch.equal(single, reference[0, :, 0])

    def test_states_are_ordinary_tensors_on_the_cpu(self, model):
        values = captured(model).values
        assert values.device.type == "cpu"
        assert not values.is_inference()
        assert not values.requires_grad

    def test_duplicate_and_unordered_layers_and_positions(self, model):
        states = captured(model, positions=("t_post", "t_inst", "t_post"), layers=[4, 1, 4])
        every = captured(model, positions=("t_inst", "t_post"))
        wanted = every.values[:, [1, 0, 1]][:, :, [4, 1, 4]]
        assert_same(states.values, wanted)
