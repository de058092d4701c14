"""Steered replies are those of the plain statement: a hook, no cache, one row at a time."""

import functools
import itertools
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from latentguard.errors import ModelError, PromptError
from latentguard.interventions import Intervention
from latentguard.models import prefill
from latentguard.models.hooks import add_vector, read_positions, record_output_size, skip_blocks
from latentguard.prompts import Prompt
from models.architectures import ARCHITECTURES, HYBRIDS, chat_model
from models.families import FAMILIES
from models.test_generate import PROMPTS, TURNS, ids_of, talker

ASK = " Is it harmful?"
ASKED = [Prompt(p.text + ASK, id=p.id, question_at=len(p.text)) for p in PROMPTS]
CHOICES = ("instruction", "before", "all", "t_inst")
DEPTH = 4
NEW = 4


def vector(seed=0, width=32):
    return 4 * torch.randn(width, generator=torch.Generator().manual_seed(seed))


def settings(layers=range(DEPTH + 1), choices=CHOICES, coefficients=(1.5, -1.0)):
    every = itertools.product(layers, choices, coefficients)
    return [
        Intervention(layer, vector(n % 3), coefficient, choice, f"{layer} {choice} {coefficient}")
        for n, (layer, choice, coefficient) in enumerate(every)
    ]


def wanted_tokens(model, prompt, choice):
    """Which tokens of a prompt are steered, by decoding: columns of the row."""
    layout = model.chat([prompt])[0]
    if choice == "all":
        return list(range(len(layout.ids)))
    if choice == "t_inst":
        return [layout.t_inst]
    text = prompt.text if choice == "instruction" else prompt.text[: prompt.question_at]
    decode, end = model.tokenizer.decode, layout.t_inst + 1
    whole = [i for i in range(end) if decode(layout.ids[i:end]) in prompt.text]
    return [i for i in whole if decode(layout.ids[whole[0] : i + 1]) in text]


def plainly(model, prompt, setting, new=NEW):
    """Greedy tokens by recomputing everything at each step, with one hook."""
    prompt_ids, found = list(model.chat([prompt])[0].ids), []
    columns = wanted_tokens(model, prompt, setting.tokens)
    push = setting.coefficient * setting.vector

    def shifted(hidden):
        hidden = hidden.clone()
        hidden[0, columns] += push
        if setting.while_replying:
            hidden[0, len(prompt_ids) :] += push
        return hidden

    def before(_, args, kwargs):
        return (shifted(args[0]), *args[1:]), kwargs

    def after(_, __, output):
        return (shifted(output[0]), *output[1:]) if isinstance(output, tuple) else shifted(output)

    blocks, layer = model.blocks, setting.layer
    if layer == 0:
        handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = blocks[layer - 1].register_forward_hook(after)
    try:
        for _ in range(new):
            with torch.no_grad():
                logits = model.model(torch.tensor([prompt_ids + found]), use_cache=False).logits
            found.append(int(logits[0, -1].argmax()))
    finally:
        handle.remove()
    return tuple(found)


def residual(model, ids, layer):
    """The unsteered residual stream of one row: [t d]."""
    columns, buffer = torch.arange(len(ids))[None], torch.empty(1, len(ids), 1, 32)
    where = dict(columns=columns, layers=[layer], buffer=buffer)
    with torch.no_grad(), read_positions(model.blocks, **where):
        model.model(torch.tensor([ids]))
    return buffer[0, :, 0]


@contextmanager
def looking(blocks, seen, **how):
    """``add_vector``, and a look at what then goes on from that layer."""
    with add_vector(blocks, **how):
        if how["layer"] == 0:
            handle = blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        else:
            block = blocks[how["layer"] - 1]
            handle = block.register_forward_hook(lambda _, __, output: seen.append(output))
        yield
        handle.remove()


def traces(model):
    """All that a hook or a skipped block could leave behind."""
    kept = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()]
    return sum(kept), [name for block in model.blocks for name in vars(block) if name == "forward"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sweep_is_the_plain_statement_of_each_setting(architecture, tokenizer):
    model = talker(architecture, tokenizer)
    prompts, chosen = ASKED[:4], settings(layers=(0, 2, DEPTH), coefficients=(1.5,))
    random.Random(0).shuffle(chosen)
    found = model.sweep(prompts, chosen, max_new_tokens=NEW)
    for setting, replies in zip(chosen, found, strict=True):
        assert ids_of(replies) == [plainly(model, prompt, setting) for prompt in prompts]
        assert {reply.label for reply in replies} == {setting.label}
        assert [reply.prompt for reply in replies] == prompts
    assert len({str(ids_of(replies)) for replies in found}) > len(chosen) // 2  # it does steer
    assert traces(model) == (0, [])


class TestSweep:
    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "mistral", "phi", "neox"])
    def test_it_is_each_setting_and_each_prompt_alone(self, architecture, tokenizer):
        model = talker(architecture, tokenizer)
        chosen = [None, *settings(layers=(1, 3, DEPTH), coefficients=(2.0,))]
        found = model.sweep(ASKED, chosen, max_new_tokens=NEW)
        for setting, replies in zip(chosen, found, strict=True):
            assert replies == model.sweep(ASKED, [setting], max_new_tokens=NEW)[0]
        for prompt, *replies in zip(ASKED, *found, strict=True):
            alone = model.sweep([prompt], chosen, max_new_tokens=NEW)
            assert ids_of(replies) == [one.ids for (one,) in alone]

    def test_small_chunks_make_no_difference(self, tokenizer):
        model = talker("gemma3", tokenizer)
        chosen, done = [None, *settings()], []
        wanted = model.sweep(ASKED, chosen, max_new_tokens=NEW)
        model.tokens_per_batch = 130
        assert model.sweep(ASKED, chosen, max_new_tokens=NEW, progress=done.append) == wanted
        assert sum(done) == len(chosen) * len(ASKED)

    def test_prompts_with_earlier_turns_and_other_templates(self, tokenizer):
        for name in ("qwen2.5", "llama-2", "gemma"):
            model = talker("mistral", FAMILIES[name].tokenizer)
            mixed = [ASKED[0], Prompt("Who?" + ASK, history=TURNS, question_at=4)]
            chosen = settings(layers=(0, 3), coefficients=(1.5,), choices=("all", "t_inst"))
            for setting, replies in zip(chosen, model.sweep(mixed, chosen), strict=True):
                assert ids_of(replies) == [plainly(model, p, setting, 24) for p in mixed]

    def test_without_post_instruction_tokens(self, model):
        setting = Intervention(2, vector(), 1.0, "instruction")
        (found,) = model.sweep(PROMPTS, [setting], post=False, max_new_tokens=1)
        for prompt, reply in zip(PROMPTS, found, strict=True):
            layout = model.chat([prompt])[0]
            ids = torch.tensor([layout.ids[: layout.t_inst + 1]])
            tokens = torch.zeros(ids.shape, dtype=torch.bool)
            tokens[0, list(layout.instruction)] = True
            where = dict(layer=2, vectors=vector()[None], tokens=tokens)
            with torch.no_grad(), add_vector(model.blocks, **where):
                assert reply.ids == (int(model.model(ids).logits[0, -1].argmax()),)

    def test_coefficient_0_is_the_unsteered_run(self, model):
        chosen = [None, *settings(coefficients=(0.0,))]
        plain, *zero = model.sweep(ASKED, chosen, watch=("No",), max_new_tokens=12)
        assert ids_of(plain) == ids_of(model.generate(ASKED, max_new_tokens=12))
        for replies in zero:
            assert ids_of(replies) == ids_of(plain)
            chances = [[reply.watched[0][1] for reply in some] for some in (replies, plain)]
            assert chances[0] == pytest.approx(chances[1], abs=1e-5)

    def test_bfloat16_models_are_steered_in_bfloat16(self, tokenizer):
        model = talker("llama", tokenizer, dtype=torch.bfloat16)
        found = model.sweep(ASKED[:2], settings(layers=(2,)), watch=("No",), max_new_tokens=1)
        setting = settings(layers=(2,))[0]
        model.model.float()
        (wanted,) = model.sweep(ASKED[:2], [setting], watch=("No",), max_new_tokens=1)
        for low, high in zip(found[0], wanted, strict=True):
            assert low.watched[0][1] == pytest.approx(high.watched[0][1], abs=0.2)


class TestOptions:
    """A vector for each prompt, and steering while decoding."""

    @pytest.mark.parametrize("architecture", ["llama", "gemma3", "neox"])
    def test_each_prompt_has_a_vector_of_its_own(self, architecture, tokenizer):
        model = talker(architecture, tokenizer)
        own = {prompt: vector(n) for n, prompt in enumerate(ASKED)}
        chosen = [
            Intervention(layer, own, 1.5, choice)
            for layer in (0, 2, DEPTH)
            for choice in ("all", "instruction")
        ]
        mixed = [None, *settings(layers=(2,), coefficients=(1.5,)), *chosen]
        found = model.sweep(ASKED, mixed, max_new_tokens=NEW)[-len(chosen) :]
        for setting, replies in zip(chosen, found, strict=True):
            for prompt, reply in zip(ASKED, replies, strict=True):
                alone = Intervention(setting.layer, own[prompt], 1.5, setting.tokens)
                assert reply.ids == plainly(model, prompt, alone)

    def test_every_prompt_needs_a_vector_of_the_models_width(self, model):
        with pytest.raises(PromptError, match="has no vector of its own to be steered along"):
            model.sweep(PROMPTS[:2], [Intervention(1, {PROMPTS[0]: vector()})])
        with pytest.raises(ModelError, match="width 32 is needed; found shape"):
            model.sweep(PROMPTS[:1], [Intervention(1, {PROMPTS[0]: vector(width=16)})])

    @pytest.mark.parametrize("architecture", ["llama", "gemma3", "neox"])
    def test_steering_while_replying_moves_every_token_of_the_reply(self, architecture, tokenizer):
        model = talker(architecture, tokenizer)
        prompts = ASKED[:4]
        plain = settings(layers=(0, 2, DEPTH), choices=("instruction", "all"), coefficients=(1.5,))
        own = {prompt: vector(n) for n, prompt in enumerate(prompts)}
        chosen = [replace(one, while_replying=True) for one in plain]
        found = model.sweep(prompts, [*plain, *chosen], max_new_tokens=8)
        for setting, replies in zip([*plain, *chosen], found, strict=True):
            assert ids_of(replies) == [plainly(model, p, setting, 8) for p in prompts]
        assert found[: len(plain)] != found[len(plain) :]
        (mine,) = model.sweep(prompts, [replace(chosen[1], vector=own)], max_new_tokens=8)
        for prompt, reply in zip(prompts, mine, strict=True):
            setting = replace(chosen[1], vector=own[prompt])
            assert reply.ids == plainly(model, prompt, setting, 8)
        assert traces(model) == (0, [])


class TestTokens:
    @pytest.mark.parametrize("choice", CHOICES)
    @pytest.mark.parametrize("layer", [0, 2, DEPTH])
    def test_exactly_the_chosen_tokens_move_at_the_layer(self, choice, layer, model, monkeypatch):
        for prompt in ASKED:
            seen = []
            monkeypatch.setattr(prefill, "add_vector", functools.partial(looking, seen=seen))
            model.sweep([prompt], [Intervention(layer, vector(), 1.0, choice)], max_new_tokens=3)
            steered, ids = torch.cat(seen, 1)[0], model.chat([prompt])[0].ids
            change = steered - residual(model, ids, layer)[-len(steered) :]
            moved = change.norm(dim=-1) > 1e-4
            first = len(ids) - len(steered)
            columns = [first + row for row in moved.nonzero()[:, 0].tolist()]
            assert columns == wanted_tokens(model, prompt, choice)
            assert torch.allclose(change[moved], vector().expand(len(columns), -1), atol=1e-4)

    def test_a_token_that_reaches_over_the_question_is_not_before_it(self, model):
        whole = Prompt("people live there")
        spans = model.chat([whole])[0].spans
        (begin, end) = max(spans, key=lambda span: span[1] - span[0])
        assert end - begin > 1
        cut = model.chat([whole])[0].before(end - 1)
        assert len(cut) == spans.index((begin, end))

    @pytest.mark.parametrize("prompt", [Prompt("Why?", id="p"), Prompt("Why?", "p", question_at=0)])
    def test_nothing_before_the_question_is_an_error(self, prompt, model):
        with pytest.raises(PromptError, match="'p' has no question_at with tokens before it"):
            model.sweep([prompt], [Intervention(1, vector(), tokens="before")])


@pytest.mark.parametrize("name", FAMILIES)
class TestSpans:
    def test_they_cover_the_message_and_stop_at_the_offset(self, name):
        model = talker("llama", FAMILIES[name].tokenizer)
        for text in ("Where is it? Say so.", "  two blanks, ünïcödé 🙂 and\n\nlines. ", "x"):
            layout = model.chat([Prompt(text)])[0]
            covered = {i for start, stop in layout.spans for i in range(start, stop)}
            assert covered >= {i for i, letter in enumerate(text) if letter.strip()}
            assert covered <= set(range(len(text)))
            assert layout.instruction.stop == layout.t_inst + 1
            for offset in range(len(text) + 1):
                before = layout.before(offset)
                assert before == list(layout.instruction)[: len(before)]
                assert all(stop <= offset for _, stop in layout.spans[: len(before)])

    def test_what_comes_first_does_not_depend_on_what_follows(self, name):
        model = talker("llama", FAMILIES[name].tokenizer)
        texts = ["Where is it?", "Where is it? Is it harmful?"]
        short, long = model.chat([Prompt(text) for text in texts])
        assert [short.ids[i] for i in short.instruction] == [
            long.ids[i] for i in long.before(len(texts[0]))
        ]


class TestErrors:
    def test_layers_vectors_and_tokens_are_checked(self, model):
        with pytest.raises(ModelError, match="Layers run from 0 to 4; found 5"):
            model.sweep(PROMPTS, [Intervention(5, vector())])
        with pytest.raises(ModelError, match="width 32 is needed; found shape"):
            model.sweep(PROMPTS, [Intervention(1, vector(width=16))])
        with pytest.raises(Exception, match="some"):  # tests check types before values
            Intervention(1, vector(), tokens="some")

    @pytest.mark.parametrize("at", [0, 1, 3])
    def test_an_error_in_any_block_leaves_no_trace(self, at, tokenizer, monkeypatch):
        model = talker("llama", tokenizer)
        wanted = model.sweep(ASKED, settings(), max_new_tokens=2)
        for calls in range(4):
            left = [calls]

            def fail(_, __, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise ZeroDivisionError

            handle = model.blocks[at].mlp.register_forward_pre_hook(fail)
            with pytest.raises(ZeroDivisionError):
                model.sweep(ASKED, settings(), max_new_tokens=2)
            handle.remove()
            assert traces(model) == (0, [])
        assert model.sweep(ASKED, settings(), max_new_tokens=2) == wanted

    def test_a_forward_that_was_replaced_comes_back(self, model):
        """As accelerate replaces it on models that are spread over devices."""
        block = model.blocks[0]
        mine = block.forward
        block.forward = mine
        skipping = skip_blocks(model.blocks, layer=2, hidden=torch.zeros(1, 1, 32))
        try:
            with pytest.raises(ZeroDivisionError), skipping:
                assert block.forward() is not None
                raise ZeroDivisionError
            assert vars(block)["forward"] is mine
            assert "forward" not in vars(model.blocks[1])
        finally:
            del block.forward

    @pytest.mark.parametrize(
        "odd", [dict(layer_types=["linear_attention"]), dict(num_kv_shared_layers=2)]
    )
    def test_models_that_cannot_be_started_in_the_middle_are_refused(self, odd, tokenizer):
        model = talker("llama", tokenizer)
        for name, value in odd.items():
            setattr(model.model.config, name, value)
        with pytest.raises(ModelError, match="attention with their own cache"):
            model.generate(PROMPTS)

    @pytest.mark.parametrize("architecture", HYBRIDS)
    def test_hybrids_are_refused_too(self, architecture, tokenizer):
        with pytest.raises(ModelError, match="attention with their own cache"):
            chat_model(architecture, tokenizer).generate(PROMPTS)


def test_blocks_that_return_tuples_are_skipped_too(tokenizer, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "falcon", ("FalconConfig", {}))
    model = talker("falcon", tokenizer)
    sizes = []
    with record_output_size(model.blocks[0], sizes):
        model.model(torch.tensor([[1, 2]]))
    assert sizes == [2]
    chosen = settings(layers=(1, DEPTH), coefficients=(1.5,))
    for setting, replies in zip(
        chosen, model.sweep(ASKED[:3], chosen, max_new_tokens=NEW), strict=True
    ):
        assert ids_of(replies) == [plainly(model, prompt, setting) for prompt in ASKED[:3]]
