"""A trace is what capture gives of each shorter chat, and a score for each token."""

import copy

import pytest
import torch

from latentguard.errors import PromptError
from latentguard.model.long import Kept, turns_of
from latentguard.prompts import Message, Prompt
from latentguard.readouts import Readout
from latentguard.states import States
from model.architectures import ARCHITECTURES, chat_model, hidden_states

POSITIONS = ("t_inst", "post+1", "t_post", "mean")
LAYERS = (1, 2)
PROBE = Readout(
    "linear", (2, 3), torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), 0.5
)
HISTORY = (
    Message("system", "Be brief."),
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris, on the Seine."),
    Message("user", "And of Peru, where llamas live"),
    Message("assistant", "Lima."),
)
CHAT = Prompt("Which of the two has more people in it?", id="chat", history=HISTORY)
LONG = Prompt("Every word of this text is read, one after the other. " * 6, id="long")
SHORTER = Prompt("Hello there.")


def read(model, prompt, probe=PROBE):
    return model.trace(prompt, positions=POSITIONS, layers=LAYERS, probe=probe)


def assert_close(found, wanted):
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1)
    assert error.max() < 1e-4


@pytest.fixture(params=[7, 64, 4096])
def chunked(request, tokenizer):
    model = chat_model("llama", tokenizer)
    model.tokens_per_batch = request.param
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_in_chunks(architecture, tokenizer):
    model = chat_model(architecture, tokenizer)
    whole = States.collect(model.capture([LONG], positions=POSITIONS, layers=LAYERS))
    model.tokens_per_batch = 11
    assert_close(read(model, LONG).states.values, whole.values)


def test_each_turn_has_the_states_of_the_chat_that_ended_there(chunked):
    trace = read(chunked, CHAT)
    shorter = [Prompt(HISTORY[n].content, history=HISTORY[:n]) for n in (1, 3)]
    alone = States.collect(chunked.capture([*shorter, CHAT], positions=POSITIONS, layers=LAYERS))
    assert [turn.message for turn in trace.turns] == [1, 3, 5]
    assert_close(trace.states.values, alone.values)
    assert trace.states.prompts[-1] is CHAT
    assert [p.text for p in trace.states.prompts] == [
        HISTORY[1].content,
        HISTORY[3].content,
        CHAT.text,
    ]


def test_each_token_is_scored_by_all_layers_of_the_probe(chunked):
    for prompt in (LONG, CHAT):
        layout = chunked.chat([prompt])[0]
        states = hidden_states(chunked, layout.ids)
        scores = sum(states[k] @ w for k, w in zip(PROBE.layers, PROBE.weight, strict=True)) + 0.5
        turn = read(chunked, prompt).turns[-1]
        assert turn.spans == layout.spans
        torch.testing.assert_close(
            turn.scores, scores[list(layout.instruction)], atol=1e-4, rtol=1e-4
        )


def test_one_pass_reads_all_turns(model, monkeypatch):
    passes = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda ids, **how: passes.append(ids.shape) or forward(ids, **how)
    )
    read(model, CHAT)
    assert passes == [(1, len(model.chat([CHAT])[0].ids))]


def test_a_turn_that_the_template_writes_otherwise_later_gets_its_own_pass(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (  # only the last message is marked as new
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' new' if loop.last else '' }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    model = chat_model("llama", tokenizer)
    alone = States.collect(model.capture([SHORTER], positions=POSITIONS, layers=LAYERS))
    history = (Message("user", SHORTER.text), Message("assistant", "Hi."))
    trace = read(model, Prompt("And now?", history=history))
    assert_close(trace.states.values[:1], alone.values)


def test_blank_turns_are_passed_over():
    history = (Message("user", " "), Message("assistant", "?"), Message("user", "Hello"))
    assert turns_of(Prompt("Hi", history=history)) == [2, 3]


def test_too_long_a_prompt_says_so(model):
    with pytest.raises(PromptError, match="reads at most 512"):
        read(model, Prompt("word " * 600, id="huge"))


def hooks(model):
    """Transformers leaves its own where another test asked for hidden states."""
    return [(*block._forward_hooks, *block._forward_pre_hooks) for block in model.blocks]


def test_no_hook_is_left_and_nothing_of_the_sequence(model):
    before = hooks(model)
    trace = read(model, LONG)
    assert trace.states.values.shape == (1, len(POSITIONS), 2, 32)
    assert trace.turns[0].scores.ndim == 1
    assert hooks(model) == before


def test_an_error_leaves_no_hook(model):
    before = hooks(model)
    with pytest.raises(RuntimeError, match="size"):
        read(model, LONG, Readout("linear", (2,), torch.zeros(1, 5), 0.0))
    assert hooks(model) == before


def test_count_is_of_the_own_text(model):
    assert model.count(CHAT) == len(model.chat([CHAT])[0].spans)


def test_what_begins_alike_is_read_on(model):
    kept = Kept()
    asked = [LONG, Prompt(LONG.text + "And a little more."), CHAT, Prompt("Every word counts.")]
    for prompt in asked:
        how = dict(positions=POSITIONS, layers=LAYERS, probe=PROBE)
        trace, alone = model.trace(prompt, kept=kept, **how), read(model, prompt)
        assert_close(trace.states.values, alone.states.values)
        torch.testing.assert_close(trace.turns[-1].scores, alone.turns[-1].scores)
