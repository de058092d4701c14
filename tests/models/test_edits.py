"""Patches, knock-outs, ablations and steered replies are those of the plain statement.

The reference reads one row at a time without a cache, recomputes everything at each token, and
changes the run by hooks of its own; cut attention is a mask of the test's own making.
"""

import itertools
from contextlib import contextmanager

import pytest
import torch

from latentguard.errors import ModelError, PromptError
from latentguard.interventions import Ablation, Intervention, Knockout, Patch
from latentguard.models import reply_loss
from latentguard.models.edits import hidden_tokens
from latentguard.models.generate import first_ids
from latentguard.models.hooks import hide_tokens, project_out
from latentguard.prompts import Prompt
from latentguard.states import States
from models.architectures import ARCHITECTURES, HYBRIDS, chat_model
from models.test_generate import PROMPTS, ids_of, talker
from models.test_steering import traces

DEPTH = 4
NEW = 3
WATCH = ("a", "b", "z")
SLIDING = {"gemma2", "gemma3", "mistral"}
EAGER = ("llama", "gemma", "gpt2", "neox")
"""Architectures that are also tried with the other kind of mask."""

TOLERANCE = dict(atol=2e-4, rtol=1e-4)


def vector(seed=0):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def states_of(model, prompts, positions):
    """[n p l d]"""
    return States.collect(model.capture(prompts, positions=positions)).values


def patch(model, prompts, sources, layer, positions):
    values = states_of(model, sources, positions)[:, :, layer]
    return Patch(layer, positions, dict(zip(prompts, values, strict=True)))


def shifted(prompts):
    """Each prompt's source: the next prompt."""
    return [*prompts[1:], prompts[0]]


def edits(model, prompts):
    """Some of every kind, out of order."""
    sources = shifted(prompts)
    return [
        Knockout((1, 2, 3, 4)),
        patch(model, prompts, sources, 2, ("t_inst",)),
        Ablation(vector(1)),
        Intervention(2, 4 * vector(2), 1.0, "all", while_replying=True),
        Knockout((3,), "random", draw=1),
        None,
        patch(model, prompts, sources, DEPTH, ("t_post", "post+1")),
        Knockout((2, 4), "all but random", "t_post"),
        Ablation(vector(3), "t_inst"),
        patch(model, prompts, sources, 0, ("inst-1", "post+2")),
        Knockout((2, 3), "instruction"),
        Intervention(1, 4 * vector(2), 1.0, "t_inst"),
        Intervention(4, 4 * vector(4), -1.0, "instruction", while_replying=True),
        Knockout((1, 2, 3, 4), "all but t_inst"),
    ]


@contextmanager
def stream_hooks(model, layers, change):
    """Call ``change`` on the residual stream at some layers."""

    def before(_, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def after(_, __, output):
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handles = []
    for layer in layers:
        if layer == 0:
            handles.append(model.blocks[0].register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(model.blocks[layer - 1].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_logits(model, ids, prompt, edit):
    """Logits behind the last token under an edit that is no knock-out; no cache."""
    layout = model.chat([prompt])[0]
    tokens = {
        "all": range(len(layout.ids)),
        "t_inst": [layout.t_inst],
        "instruction": layout.instruction,
    }
    reply = range(len(layout.ids), len(ids))

    def add(hidden):
        hidden = hidden.clone()
        hidden[0, list(tokens[edit.tokens])] += edit.coefficient * edit.vector
        if edit.while_replying:
            hidden[0, list(reply)] += edit.coefficient * edit.vector
        return hidden

    def put(hidden):
        hidden = hidden.clone()
        for position, state in zip(edit.positions, edit.states[prompt], strict=True):
            hidden[0, layout.index(position)] = state
        return hidden

    def project(hidden):
        hidden = hidden.clone()
        unit = edit.vector / edit.vector.norm()
        for index in (*tokens[edit.tokens], *(reply if edit.tokens == "all" else ())):
            hidden[0, index] -= (hidden[0, index] @ unit) * unit
        return hidden

    change = {Intervention: add, Patch: put, Ablation: project}.get(type(edit))
    layers = range(DEPTH + 1) if isinstance(edit, Ablation) else [getattr(edit, "layer", 0)]
    with torch.no_grad(), stream_hooks(model, layers if edit else [], change):
        return model.model(torch.tensor([ids]), use_cache=False).logits[0, -1]


def cut_logits(model, ids, prompt, edit):
    """The same under a knock-out: in each cut block, a mask of our own."""
    layout = model.chat([prompt])[0]
    size = len(ids)
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    first = layout.t_inst + 1 if edit.readers == "after" else layout.t_post
    last = size if edit.readers == "after" else len(layout.ids)
    for reader in range(first, last):
        seen[reader, hidden_tokens(layout, prompt, edit)] = False
    eager = model.model.config._attn_implementation == "eager"
    own = (
        torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        if eager
        else seen[None, None]
    )

    def replace(block, args, kwargs):
        names = list(type(block).forward.__code__.co_varnames)
        place = names.index("attention_mask") - 1
        if place < len(args):
            return (*args[:place], own, *args[place + 1 :]), kwargs
        return args, kwargs | {"attention_mask": own}

    handles = [
        model.blocks[number - 1].register_forward_pre_hook(replace, with_kwargs=True)
        for number in edit.blocks
    ]
    try:
        with torch.no_grad():
            return model.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def plainly(model, prompt, edit, new=NEW):
    """Greedy tokens, and the log-probabilities of the first."""
    ids = list(model.chat([prompt])[0].ids)
    found, chances = [], None
    logits_of = cut_logits if isinstance(edit, Knockout) else first_logits
    for _ in range(new):
        logits = logits_of(model, ids + found, prompt, edit)
        chances = logits.log_softmax(-1) if chances is None else chances
        found.append(int(logits.argmax()))
    return tuple(found), chances


def watched(replies):
    return torch.tensor([[chance for _, chance in reply.watched] for reply in replies])


def expected(model, prompts, chances):
    columns = [first_ids(model, word) for word in WATCH]
    return torch.stack([torch.stack([row[c].logsumexp(0) for c in columns]) for row in chances])


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [*((one, "sdpa") for one in ARCHITECTURES), *((one, "eager") for one in EAGER)],
)
def test_edited_runs_are_the_plain_statement(architecture, attention, tokenizer):
    model = talker(architecture, tokenizer)
    model.model.set_attn_implementation(attention)
    prompts = PROMPTS[:3]
    chosen = edits(model, prompts)
    if architecture in SLIDING:  # our own mask of the reference knows of no window
        chosen = [one for one in chosen if not isinstance(one, Knockout)]
    found = model.sweep(prompts, chosen, max_new_tokens=NEW, watch=WATCH)
    for edit, replies in zip(chosen, found, strict=True):
        ids, chances = zip(*(plainly(model, prompt, edit) for prompt in prompts), strict=True)
        assert ids_of(replies) == list(ids), edit
        torch.testing.assert_close(watched(replies), expected(model, prompts, chances), **TOLERANCE)
    assert traces(model) == (0, [])


def test_each_edit_changes_something(tokenizer):
    model = talker("llama", tokenizer)
    chosen = edits(model, PROMPTS)
    bare, *found = model.sweep(PROMPTS, [None, *filter(None, chosen)], watch=WATCH)
    for edit, replies in zip(filter(None, chosen), found, strict=True):
        first_word = (watched(replies) - watched(bare)).abs().max()
        assert first_word > 1e-3 or ids_of(replies) != ids_of(bare), edit


class TestPatch:
    SAME_LENGTH = (Prompt("Where is q now?"), Prompt("Where is z now?"))

    @pytest.mark.parametrize("layer", range(DEPTH + 1))
    def test_all_positions_give_the_sources_own_run(self, layer, tokenizer):
        model = talker("llama", tokenizer)
        prompt, source = self.SAME_LENGTH
        first, second = model.chat([prompt, source])
        assert len(first.ids) == len(second.ids) and first.ids != second.ids
        after = [f"post+{k}" for k in range(1, first.t_post - first.t_inst + 1)]
        everywhere = (*(f"inst-{k}" for k in range(first.t_inst, 0, -1)), "t_inst", *after)
        (found,) = model.sweep(
            [prompt], [patch(model, [prompt], [source], layer, everywhere)], watch=WATCH
        )
        (wanted,) = model.sweep([source], [None], watch=WATCH)
        torch.testing.assert_close(watched(found), watched(wanted), **TOLERANCE)

    def test_t_post_behind_the_last_block_gives_the_sources_first_word(self, model):
        edit = patch(model, PROMPTS, shifted(PROMPTS), DEPTH, ("t_post",))
        (found,) = model.sweep(PROMPTS, [edit], watch=WATCH, max_new_tokens=1)
        (wanted,) = model.sweep(shifted(PROMPTS), [None], watch=WATCH, max_new_tokens=1)
        assert ids_of(found) == ids_of(wanted)
        torch.testing.assert_close(watched(found), watched(wanted), **TOLERANCE)

    @pytest.mark.parametrize("layer", range(DEPTH + 1))
    def test_a_prompts_own_states_change_nothing(self, layer, model):
        edit = patch(model, PROMPTS, PROMPTS, layer, ("inst-1", "t_inst", "post+1", "t_post"))
        bare, found = model.sweep(PROMPTS, [None, edit], watch=WATCH)
        assert ids_of(found) == ids_of(bare)
        torch.testing.assert_close(watched(found), watched(bare), **TOLERANCE)

    def test_t_inst_does_nothing_where_its_attention_is_cut(self, model):
        """All that t_inst does for the reply passes through attention to it: none is left here."""
        kept = (1, 2, 3, 4)
        bare, cut = model.sweep(PROMPTS, [None, Knockout(kept)], watch=WATCH, max_new_tokens=1)
        assert (watched(bare) - watched(cut)).abs().max() > 1e-3
        edit = patch(model, PROMPTS, shifted(PROMPTS), DEPTH, ("t_inst",))
        (late,) = model.sweep(PROMPTS, [edit], watch=WATCH, max_new_tokens=1)
        torch.testing.assert_close(watched(late), watched(bare), **TOLERANCE)


class TestAblation:
    def test_no_component_is_left_at_any_layer(self, model):
        unit = vector() / vector().norm()
        seen = []

        def look(_, __, output):
            seen.append(output if torch.is_tensor(output) else output[0])

        with torch.no_grad(), project_out(model.blocks, directions=unit[None]):
            handles = [block.register_forward_hook(look) for block in model.blocks]
            inputs = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            model.model(torch.tensor([model.chat(PROMPTS[:1])[0].ids]))
        for handle in (*handles, inputs):
            handle.remove()
        assert len(seen) == DEPTH + 1
        assert all((hidden @ unit).abs().max() < 1e-5 < hidden.abs().max() for hidden in seen)

    def test_the_length_of_the_direction_does_not_matter(self, model):
        once, thrice = model.sweep(
            PROMPTS, [Ablation(vector()), Ablation(3 * vector())], watch=WATCH
        )
        torch.testing.assert_close(watched(once), watched(thrice), **TOLERANCE)

    def test_a_direction_of_no_length_changes_nothing(self, model):
        bare, found = model.sweep(PROMPTS, [None, Ablation(torch.zeros(32))], watch=WATCH)
        assert ids_of(found) == ids_of(bare)
        torch.testing.assert_close(watched(found), watched(bare), **TOLERANCE)


def test_any_mixture_is_each_edit_and_each_prompt_alone(tokenizer):
    """Whatever the batch; rows that finish leave it."""
    model = talker("qwen2", tokenizer)
    common = [i for reply in model.generate(PROMPTS, max_new_tokens=6) for i in reply.ids]
    model.model.generation_config.eos_token_id = max(common, key=common.count)
    chosen = edits(model, PROMPTS)
    together = model.sweep(PROMPTS, chosen, max_new_tokens=6, watch=WATCH)
    assert len({len(reply.ids) for replies in together for reply in replies}) > 1
    for n, edit in enumerate(chosen):
        for k in (0, 3, 6):
            alone = model.sweep([PROMPTS[k]], [edit], max_new_tokens=6)[0][0]
            assert together[n][k].ids == alone.ids


def test_keys_are_tokens_of_the_instruction(model):
    for prompt in PROMPTS[1:]:
        layout = model.chat([prompt])[0]
        every = set(layout.instruction)

        def hidden(keys, draw=0, layout=layout, prompt=prompt):
            return set(hidden_tokens(layout, prompt, Knockout((1,), keys, draw=draw)))

        assert hidden("t_inst") == {layout.t_inst}
        assert hidden("instruction") == every
        assert hidden("all but t_inst") == every - {layout.t_inst}
        picks = [hidden("random", draw) for draw in range(20)]
        assert all(len(pick) == 1 and pick < every - {layout.t_inst} for pick in picks)
        assert len(set.union(*picks)) > 1
        assert hidden("all but random", 3) == every - picks[3]


class TestReplyLosses:
    def test_they_are_the_mean_loss_of_the_replys_tokens(self, model):
        replies = [
            *model.generate(PROMPTS[:3], max_new_tokens=5),
            *model.sweep(PROMPTS[:3], [Intervention(2, 4 * vector(), 2.0)], max_new_tokens=3)[0],
        ]
        for reply, loss in zip(replies, model.reply_losses(replies), strict=True):
            prompt = model.chat([reply.prompt])[0].ids
            ids = torch.tensor([[*prompt, *reply.ids]])
            with torch.no_grad():
                chances = model.model(ids, use_cache=False).logits[0].log_softmax(-1)
            behind = range(len(prompt) - 1, len(prompt) + len(reply.ids) - 1)
            wanted = [
                float(chances[at, token]) for at, token in zip(behind, reply.ids, strict=True)
            ]
            assert loss == pytest.approx(-sum(wanted) / len(wanted), abs=1e-4)

    def test_any_size_of_batch_gives_the_same(self, model, monkeypatch):
        replies = model.generate(PROMPTS[:2], max_new_tokens=4)
        replies += model.generate(PROMPTS[:2], max_new_tokens=7)
        wanted = model.reply_losses(replies)
        monkeypatch.setattr(reply_loss, "LOGITS_AT_ONCE", 1)
        assert model.reply_losses(replies) == pytest.approx(wanted, abs=1e-5)
        assert [model.reply_losses([one])[0] for one in replies] == pytest.approx(wanted, abs=1e-5)


class TestErrors:
    def test_what_does_not_fit_is_named(self, model):
        states = {p: torch.zeros(1, 32) for p in PROMPTS}
        wrong = [
            (Knockout(()), "Blocks run from 1 to 4"),
            (Knockout((0, 1)), "Blocks run from 1 to 4"),
            (Patch(5, ("t_inst",), states), "Layers run from 0 to 4; found 5"),
            (Patch(1, ("t_inst", "t_post"), states), "States of shape"),
            (Ablation(torch.ones(16)), "width 32 is needed"),
        ]
        for edit, words in wrong:
            with pytest.raises(ModelError, match=words):
                model.sweep(PROMPTS, [edit])

    def test_a_prompt_that_lacks_the_place_is_named(self, model):
        short = Prompt("a", id="short")
        with pytest.raises(PromptError, match="no states for prompt 'short'"):
            model.sweep([short], [Patch(1, ("t_inst",), {})])
        with pytest.raises(PromptError, match="'short' has no token but t_inst"):
            model.sweep([short], [Knockout((1,), "random")])
        with pytest.raises(PromptError, match="'short' has no token behind t_inst"):
            model.sweep([short], [Knockout((1,))], post=False)
        with pytest.raises(PromptError, match="no position 'post"):
            edit = Patch(1, ("post+99",), {short: torch.zeros(1, 32)})
            model.sweep([short], [edit])

    @pytest.mark.parametrize("architecture", HYBRIDS)
    def test_hybrids_are_refused(self, architecture, tokenizer):
        with pytest.raises(ModelError, match="attention with their own cache"):
            chat_model(architecture, tokenizer).sweep(PROMPTS, [Knockout((1,))])

    @pytest.mark.parametrize("mask", [torch.ones(1, 3), torch.ones(1, 1, 3, 5), "lengths"])
    def test_masks_of_another_kind_are_refused(self, mask, model):
        """As flash attention's, which say how long each row is."""
        before = traces(model)
        hidden = {1: torch.zeros(1, 3, 3, dtype=torch.bool)}
        with (
            hide_tokens(model.blocks, hidden),
            pytest.raises(ModelError, match="'sdpa' or 'eager'"),
        ):
            model.blocks[0](torch.zeros(1, 3, 32), attention_mask=mask)
        assert traces(model) == before

    def test_blocks_that_take_no_mask_are_refused(self):
        blocks = [torch.nn.Linear(2, 2)]
        hidden = {1: torch.zeros(1, 3, 3, dtype=torch.bool)}
        with pytest.raises(ModelError, match="Linear has none"), hide_tokens(blocks, hidden):
            pass


def test_pairs_of_edits_do_not_mix(model):
    """Two knock-outs of one pass that cut different blocks, and hide different tokens."""
    pairs = itertools.combinations(
        [Knockout((2, 3)), Knockout((2,), "random"), Knockout((2, 4), "instruction", "t_post")], 2
    )
    for pair in pairs:
        together = model.sweep(PROMPTS, pair, watch=WATCH)
        for edit, replies in zip(pair, together, strict=True):
            (alone,) = model.sweep(PROMPTS, [edit], watch=WATCH)
            torch.testing.assert_close(watched(replies), watched(alone), **TOLERANCE)
