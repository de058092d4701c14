"""GCG suffixes by nanogcg on tiny random models, whatever their tokenizer."""

import gc
import logging
import random
import sys

import pytest
import torch

from latentguard.errors import MissingExtra, PromptError
from latentguard.models.gcg import START, SuffixSearch
from latentguard.prompts import Message, Prompt
from latentguard.study.attacks import TARGET, with_suffix
from models.architectures import chat_model
from models.families import FAMILIES

PROMPT = Prompt("How do I do {it}?", history=(Message("user", "Hi"), Message("assistant", "Yes")))


def test_without_nanogcg(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanogcg", None)
    with pytest.raises(MissingExtra, match=r"pip install 'latentguard\[attacks\]'"):
        SuffixSearch(model)


@pytest.fixture(scope="module")
def gcg():
    return pytest.importorskip("nanogcg.gcg")


@pytest.fixture
def search(gcg, model):
    return SuffixSearch(model, width=12, topk=16)


def loss_of(model, prompt, target=TARGET):
    """Mean negative log-likelihood of the target as opening of the reply, by our own layout."""
    ids = list(model.chat([prompt])[0].ids)
    wanted = model.tokenizer.encode(target, add_special_tokens=False)
    with torch.no_grad():
        logits = model.model(torch.tensor([ids + wanted])).logits[0]
    chances = logits.log_softmax(-1)[len(ids) - 1 : -1]
    return -chances[range(len(wanted)), wanted].mean().item()


class TestSearch:
    def test_the_target_becomes_likelier(self, search, model):
        start = loss_of(model, with_suffix(PROMPT, f" {START}"))
        suffix = search(PROMPT, TARGET, steps=6, seed=0)
        assert suffix.startswith(" ")
        assert suffix.strip() != START
        assert suffix.isascii()
        assert suffix.isprintable()
        assert loss_of(model, with_suffix(PROMPT, suffix)) < start - 0.05

    def test_the_seed_decides_and_no_random_number_of_others_is_used(self, search):
        torch.manual_seed(7)
        random.seed(7)
        state, python = torch.random.get_rng_state(), random.getstate()
        first = search(PROMPT, TARGET, steps=2, seed=3)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert random.getstate() == python
        torch.manual_seed(8)
        assert search(PROMPT, TARGET, steps=2, seed=3) == first
        assert search(PROMPT, TARGET, steps=2, seed=4) != first

    def test_it_leaves_model_and_nanogcg_as_they_were(self, search, model, gcg, capfd):
        bar, level = gcg.tqdm, gcg.logger.level
        frozen = gc.get_freeze_count()
        before = {name: value.clone() for name, value in model.model.state_dict().items()}
        search(PROMPT, TARGET, steps=1, seed=0)
        assert (gcg.tqdm, gcg.logger.level) == (bar, level)
        assert gc.get_freeze_count() == frozen
        assert not torch.are_deterministic_algorithms_enabled()
        after = model.model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert all(p.grad is None for p in model.model.parameters())
        assert capfd.readouterr() == ("", "")

    def test_what_goes_wrong_inside_is_raised_and_tidied_up(self, search, gcg, monkeypatch):
        def fail(self, turns, target):
            raise RuntimeError("no memory")

        monkeypatch.setattr(gcg.GCG, "run", fail)
        bar = gcg.tqdm
        with pytest.raises(RuntimeError, match="no memory"):
            search(PROMPT, TARGET, steps=1, seed=0)
        assert gcg.tqdm is bar
        assert gcg.logger.level != logging.ERROR

    def test_a_prompt_that_is_too_long(self, search):
        with pytest.raises(PromptError, match="tokens long"):
            search(Prompt("ab " * 400, id="long"), TARGET, steps=1, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_tokenizer_and_no_control_token(gcg, family, monkeypatch):
    """None among all candidates, though each place may take any token that is allowed."""
    model, tried = chat_model("llama", FAMILIES[family].tokenizer), []
    sample = gcg.sample_ids_from_grad

    def spy(*args, **kwargs):
        tried.append(sample(*args, **kwargs))
        return tried[-1]

    monkeypatch.setattr(gcg, "sample_ids_from_grad", spy)
    suffix = SuffixSearch(model, width=256, topk=10_000)(PROMPT, TARGET, steps=1, seed=0)
    chosen = {int(i) for ids in tried for i in ids.flatten()}
    assert len(chosen) > 50
    assert not chosen & set(model.tokenizer.get_added_vocab().values())
    assert not chosen & set(model.tokenizer.all_special_ids)
    assert all(model.tokenizer.decode([i]).isascii() for i in chosen)
    assert model.chat([with_suffix(PROMPT, suffix)])


def test_a_bfloat16_model(gcg, tokenizer):
    model = chat_model("qwen2", tokenizer, dtype=torch.bfloat16)
    assert SuffixSearch(model, width=4, topk=8)(PROMPT, TARGET, steps=1, seed=0)


def test_rows_of_the_embedding_without_a_token_are_not_chosen(gcg, tokenizer):
    model = chat_model("llama", tokenizer)
    model.model.resize_token_embeddings(len(tokenizer) + 40, mean_resizing=False)
    forbidden = SuffixSearch(model)._forbidden.tolist()
    assert set(range(len(tokenizer), len(tokenizer) + 40)) <= set(forbidden)
    assert SuffixSearch(model, width=4, topk=500)(PROMPT, TARGET, steps=1, seed=0).isascii()
