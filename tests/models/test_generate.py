"""Unsteered replies are those of transformers' own greedy ``generate``, whatever the batch."""

import pytest
import torch

from latentguard.errors import PromptError
from latentguard.models.generate import READ_BATCHES, _Sweep, end_ids, first_ids
from latentguard.prompts import Message, Prompt
from models.architectures import ARCHITECTURES, chat_model
from models.families import FAMILIES

QUESTION = "What is the capital of France and how many people live there today"
PROMPTS = [Prompt(QUESTION[: 5 + 29 * n % 71] + "?", id=f"p{n}") for n in range(8)]
"""Eight lengths, out of order."""

TURNS = (Message("user", "Hi"), Message("assistant", "Hello!"))
NEW = 7


def talker(architecture, tokenizer, **how):
    """A tiny model whose next token is not mostly its last one: its output weights are its own."""
    model = chat_model(architecture, tokenizer, **how)
    output = model.model.get_output_embeddings()
    output.weight = torch.nn.Parameter(torch.randn_like(output.weight))
    return model


def ids_of(replies):
    return [reply.ids for reply in replies]


def by_transformers(model, ids, new=NEW, ends=None):
    """The new tokens of one row by the model's own generate."""
    inputs = torch.tensor([ids])
    with torch.no_grad():
        output = model.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=ends,
            pad_token_id=0,
        )
    return tuple(output[0, len(ids) :].tolist())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replies_are_those_of_transformers_and_of_single_rows(architecture, tokenizer):
    model = talker(architecture, tokenizer)
    found = model.generate(PROMPTS, max_new_tokens=NEW)
    layouts = model.chat(PROMPTS)
    assert ids_of(found) == [by_transformers(model, layout.ids) for layout in layouts]
    assert len(set(ids_of(found))) > 1  # neither prompts nor steps are all alike
    assert sum(len(set(ids)) for ids in ids_of(found)) > len(found)
    assert found == [model.generate([one], max_new_tokens=NEW)[0] for one in PROMPTS]
    assert [reply.prompt for reply in found] == PROMPTS
    assert not any(reply.finished for reply in found)


def test_any_size_of_batch_gives_the_same(tokenizer):
    model = talker("mistral", tokenizer)
    wanted, done = model.generate(PROMPTS), []
    model.tokens_per_batch = 150 // READ_BATCHES["cpu"]
    assert model.generate(PROMPTS, progress=done.append) == wanted
    assert sum(done) == len(PROMPTS)
    assert len(done) > 2


def test_the_output_layer_is_given_what_lies_in_one_piece(tokenizer):
    model = talker("mistral", tokenizer)
    model.model.requires_grad_(False)  # torch copies frozen weights for each row of a slice
    pieces = []
    head = model.model.get_output_embeddings()
    watch = head.register_forward_hook(lambda _, inputs, __: pieces.append(inputs[0]))
    wanted = model.generate(PROMPTS, max_new_tokens=2)
    watch.remove()
    assert max(len(one) for one in pieces) > 1  # rows
    assert all(one.is_contiguous() for one in pieces)
    assert not head._forward_pre_hooks
    model.model.requires_grad_(True)
    assert model.generate(PROMPTS, max_new_tokens=2) == wanted


def test_earlier_turns_and_prompts_that_share_no_first_token(tokenizer):
    prompts = [*PROMPTS, *(Prompt(p.text, history=TURNS) for p in PROMPTS)]
    system = [Prompt("Hi", history=(Message("system", "Be brief."),))]
    bare = talker("gemma2", FAMILIES["vicuna"].tokenizer)  # its text begins otherwise
    for model in (talker("gemma2", tokenizer), bare):
        found = model.generate(prompts + system, max_new_tokens=4)
        layouts = model.chat(prompts + system)
        assert ids_of(found) == [by_transformers(model, layout.ids, 4) for layout in layouts]


class TestEnds:
    def test_the_end_tokens_stop_each_row_at_its_own_length(self, tokenizer):
        model = talker("llama", tokenizer)
        free = ids_of(model.generate(PROMPTS, max_new_tokens=12))
        ends = [free[0][3], free[3][6]]
        model.model.generation_config.eos_token_id = ends
        assert end_ids(model) >= set(ends)
        found = model.generate(PROMPTS, max_new_tokens=12)
        layouts = model.chat(PROMPTS)
        for reply, layout in zip(found, layouts, strict=True):
            assert reply.ids == by_transformers(model, layout.ids, 12, ends)
            assert reply.finished == (reply.ids[-1] in ends)
            said = reply.ids[:-1] if reply.finished else reply.ids
            assert reply.text == model.tokenizer.decode(said, skip_special_tokens=True)
        assert len({len(reply.ids) for reply in found}) > 2

    def test_the_end_token_of_the_tokenizer_counts_too(self, tokenizer):
        model = talker("llama", FAMILIES["llama-2"].tokenizer)
        assert end_ids(model) == {model.tokenizer.eos_token_id}
        model.model.generation_config.eos_token_id = 5
        assert end_ids(model) == {5, model.tokenizer.eos_token_id}

    def test_one_token_at_least(self, model):
        assert [len(r.ids) for r in model.generate(PROMPTS[:2], max_new_tokens=1)] == [1, 1]
        with pytest.raises(ValueError, match="at least 1"):
            model.generate(PROMPTS[:1], max_new_tokens=0)


def test_without_post_instruction_tokens_the_prompt_ends_at_t_inst(model):
    found = model.generate(PROMPTS, max_new_tokens=NEW, post=False)
    cut = [layout.ids[: layout.t_inst + 1] for layout in model.chat(PROMPTS)]
    assert ids_of(found) == [by_transformers(model, ids) for ids in cut]
    assert ids_of(found) != ids_of(model.generate(PROMPTS, max_new_tokens=NEW))


@pytest.mark.parametrize("family", ["llama-2", "qwen2.5"])
def test_a_reply_that_goes_on_with_the_users_sentence_keeps_its_blank(family):
    """Llama-2's tokenizer takes a blank in front away, by which such replies are known."""
    model = talker("llama", FAMILIES[family].tokenizer)
    tokenizer = model.tokenizer
    whole = tokenizer("Explain how a bicycle stays upright", add_special_tokens=False)["input_ids"]
    first = len(tokenizer("Explain how a bicycle", add_special_tokens=False)["input_ids"])
    run = _Sweep(model, NEW, False, ())
    assert run._decode_text(whole[first - 1], whole[first:]) == " stays upright"
    assert _Sweep(model, NEW, True, ())._decode_text(whole[first - 1], whole[first:]).strip()


def test_watched_words_carry_the_log_probability_of_their_first_token(model):
    (reply,) = model.generate(PROMPTS[:1], watch=("Certainly", "No"), max_new_tokens=2)
    with torch.no_grad():
        logits = model.model(torch.tensor([model.chat(PROMPTS[:1])[0].ids])).logits[0, -1]
    chances = logits.softmax(-1)
    assert [word for word, _ in reply.watched] == ["Certainly", "No"]
    for word, found in reply.watched:
        ids = first_ids(model, word)
        assert ids == sorted(set(ids))
        texts = [model.tokenizer.decode([i]) for i in ids]
        assert all(text.strip() and word.startswith(text.strip()) for text in texts)
        assert found == pytest.approx(chances[ids].sum().log().item(), abs=1e-5)
    with pytest.raises(ValueError, match="no visible token"):
        model.generate(PROMPTS[:1], watch=(" ",))


def test_prompts_too_long_for_the_reply_are_named(model):
    with pytest.raises(PromptError, match="'long' is"):
        model.generate([*PROMPTS, Prompt("word " * 600, id="long")])


def test_no_prompts_no_replies(model):
    assert model.generate([]) == []
    assert model.sweep(PROMPTS, []) == []


def test_memory_that_runs_out_makes_smaller_batches(tokenizer, monkeypatch):
    model = talker("llama", tokenizer)
    wanted, forward = model.generate(PROMPTS), model.model.forward

    def scarce(ids, **rest):
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return forward(ids, **rest)

    monkeypatch.setattr(model.model, "forward", scarce)
    assert model.generate(PROMPTS) == wanted
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(PROMPTS)


def test_a_lone_row_that_does_not_fit_is_an_error(tokenizer, monkeypatch):
    model = talker("llama", tokenizer)

    def none(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.model, "forward", none)
    with pytest.raises(torch.OutOfMemoryError):
        model.sweep(PROMPTS, [None] * 20)
