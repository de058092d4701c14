"""One pass is read and fills the cache: the reply and the states are those of separate runs."""

import pytest
import torch

from latentguard.errors import PromptError
from latentguard.models.conversation import (
    Conversation,
    Sampling,
    _StopTexts,
    capture_tokens,
)
from latentguard.prompts import Message, Prompt
from models.architectures import ARCHITECTURES, chat_model
from models.families import FAMILIES
from serve.running import tiny_model

GREEDY = Sampling(max_tokens=12, temperature=0)
PROMPT = Prompt("Where is the café 😀?", history=(Message("system", "Be brief."),))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def talk(model, sampling=GREEDY, prompt=PROMPT, layers=(1, 3)):
    said = Conversation(model, prompt, positions=("t_inst", "t_post"), layers=layers)
    return said, "".join(piece.text for piece in said.pieces(sampling))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reply_and_the_states_are_those_of_two_runs(architecture):
    model = chat_model(architecture, FAMILIES["qwen2.5"].tokenizer)
    said, text = talk(model)
    (reply,) = model.generate([PROMPT], max_new_tokens=12)
    (states,) = model.capture([PROMPT], layers=(1, 3))
    assert text == reply.text
    torch.testing.assert_close(said.states.values, states.values, rtol=1e-4, atol=1e-5)
    assert said.reply_tokens == len(reply.ids)
    assert said.finish == ("stop" if reply.finished else "length")


def test_no_position_is_read_if_none_is_asked_for(model):
    said = Conversation(model, PROMPT, positions=(), layers=(1,))
    assert said.states is None
    assert "".join(piece.text for piece in said.pieces(GREEDY)) == talk(model)[1]


def test_a_seed_draws_the_same_reply_and_another_one_another(model):
    drawn = [talk(model, Sampling(max_tokens=20, seed=seed))[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_narrow_top_p_is_greedy(model):
    narrow = Sampling(max_tokens=12, temperature=1.5, top_p=1e-6, seed=3)
    assert talk(model, narrow)[1] == talk(model)[1]


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-9])
def test_the_coldest_reply_is_greedy(model, temperature):
    """Logits over so little overflow; a client must not be able to crash the thread with it."""
    assert talk(model, Sampling(max_tokens=12, temperature=temperature))[1] == talk(model)[1]


def test_a_stop_text_ends_the_reply_before_it(model):
    whole = talk(model)[1]
    stop = whole[4:6]
    said, cut = talk(model, Sampling(max_tokens=12, temperature=0, stop=(stop, "never")))
    assert cut == whole[: whole.index(stop)]
    assert said.finish == "stop"


def test_the_reply_ends_where_the_model_can_read_no_more(model):
    prompt = Prompt("a " * ((model.max_tokens - 40) // 2))
    said, _ = talk(model, Sampling(max_tokens=10**6, temperature=0), prompt)
    assert said.prompt_tokens > model.max_tokens // 2
    if said.finish == "length":
        assert said.prompt_tokens + said.reply_tokens == model.max_tokens
    else:
        assert said.prompt_tokens + said.reply_tokens < model.max_tokens


def test_a_prompt_without_room_for_a_reply(model):
    with pytest.raises(PromptError, match="tokens long"):
        talk(model, prompt=Prompt("a " * model.max_tokens))


def test_characters_come_whole_whatever_their_tokens(model):
    """Byte-level tokens split characters; a listener never sees a part of one."""
    from latentguard.models.conversation import _TextStream

    text = "naïve 😀 日本語 done"
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)  # characters of several tokens
    shown = _TextStream(model.tokenizer)
    pieces = [shown.push(token) for token in ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["ab", "c", "d"], ["bc"], "a"),
        (["ab", "x"], ["bc"], "abx"),
        (["a", "b", "c"], ["abcd"], "abc"),
        (["aXbY"], ["Y", "X"], "a"),
        (["END"], [""], "END"),
    ],
)
def test_stop_texts(pieces, stops, shown):
    cut, seen = _StopTexts(stops), ""
    for piece in pieces:
        seen += cut.push(piece)
        if cut.is_met:
            break
    assert seen + cut.flush() == shown


def test_tokens_are_read_from_the_instruction_to_t_post(model):
    layout, states = capture_tokens(model, PROMPT, (1, 3))
    (captured,) = model.capture([PROMPT], positions=("t_inst", "t_post"), layers=(1, 3))
    count = len(layout.spans)
    assert len(states) == count + layout.t_post - layout.t_inst
    for token, at in ((count - 1, 0), (-1, 1)):
        torch.testing.assert_close(states[token], captured.values[0, at], rtol=1e-4, atol=1e-5)
