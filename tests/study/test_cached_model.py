"""The model gives what the model gives: whatever it was asked before, and wherever it died."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch

from latentguard.errors import ModelError, PromptError
from latentguard.interventions import Intervention
from latentguard.prompts import Message, Prompt, Reply
from latentguard.states import States
from latentguard.study import cached_model as module
from latentguard.study.cached_model import CachedModel
from latentguard.study.prompt_groups import QUESTIONS, inversion_prompt
from models.architectures import chat_model
from study.spy import SHORT, Rounding, Spy, prompts, said, steering


@pytest.fixture(scope="module")
def half(tokenizer):
    """The tiny model in bfloat16."""
    return chat_model("llama", tokenizer, dtype=torch.bfloat16)


class TestAsBefore:
    def test_states_do_not_change_when_more_positions_are_read(self, open_store, small_chunks):
        """An experiment that was reported is reported the same when a study goes on."""
        cached_model = CachedModel(Rounding(), open_store())
        asked = prompts(16)
        first = cached_model.states(asked)
        cached_model.states(asked[5:], positions=("inst-1", *cached_model.span))
        assert torch.equal(cached_model.states(asked).values, first.values)

    @pytest.mark.parametrize("cached", [0, 7])
    def test_near_the_models_own(self, model, open_store, small_chunks, cached):
        asked = prompts(16)
        cached_model = CachedModel(model, open_store())
        cached_model.states(asked[:cached], positions=("t_post",))
        cached_model.replies(asked[:cached], steering(model), **SHORT)
        states = cached_model.states(asked)
        wanted = States.collect(model.capture(asked))
        assert torch.allclose(states.values, wanted.values, atol=1e-5)
        assert (states.prompts, states.layers, states.fingerprint) == (
            wanted.prompts,
            wanted.layers,
            wanted.fingerprint,
        )
        found = cached_model.replies(asked, steering(model), **SHORT)
        assert said(found) == said(model.sweep(asked, steering(model), **SHORT))
        assert [[r.prompt for r in one] for one in found] == [asked] * 3

    @pytest.mark.parametrize("count", [4, 5, 6, 10, 11])
    def test_chunk_borders(self, model, open_store, small_chunks, count):
        asked = [Prompt(f"text {n}") for n in range(count)]
        spy = Spy(model)
        found = CachedModel(spy, open_store()).states(asked)
        assert spy.calls == -(-count // 5)
        assert spy.texts == [p.text for p in asked]
        assert found.prompts == tuple(asked)

    def test_large_sweeps_go_in_small_chunks(self, model, open_store, monkeypatch):
        monkeypatch.setattr(module, "REPLIES_AT_ONCE", 36)
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        asked = [Prompt(f"text {n}") for n in range(20)]
        cached_model.replies(asked, steering(model, 3), **SHORT)
        assert spy.calls == 2  # 12 prompts at once
        cached_model.replies(asked, [steering(model, 9)[-1]] * 9, **SHORT)
        assert spy.calls == 2 + 3 * 3  # never fewer than 8 prompts, 4 ways of steering at once

    def test_a_second_time_the_model_is_not_asked(self, model, open_store):
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        asked = prompts(6)

        def ask():
            replies = cached_model.replies(asked, steering(model), **SHORT, watch=["No"])
            return said(replies), cached_model.states(asked).values

        (replies, states), calls = ask(), spy.calls
        again, others = ask()
        assert again == replies
        assert torch.equal(others, states)
        assert spy.calls == calls

    def test_order_and_repeats(self, model, open_store):
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        asked = [Prompt(c) for c in "abcab"]
        (replies,) = cached_model.replies(iter(asked), **SHORT)
        states = cached_model.states(iter(asked))
        assert [r.prompt.text for r in replies] == list("abcab")
        assert spy.texts == list("abc") * 2
        assert torch.equal(states.values[0], states.values[3])
        (back,) = cached_model.replies(asked[::-1], **SHORT)
        assert back == replies[::-1]
        assert torch.equal(cached_model.states(asked[::-1]).values, states.values.flip(0))


class TestWhatIsTheSame:
    def test_labels_are_the_askers(self, model, open_store):
        """One text under three labels is asked once; each answer carries its own prompt."""
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        asked = [Prompt("same", id=str(n), harmful=h) for n, h in enumerate([True, False, None])]
        (replies,) = cached_model.replies(asked, **SHORT)
        assert [r.prompt for r in replies] == asked
        assert len({(r.text, r.ids) for r in replies}) == 1
        assert cached_model.states(asked).prompts == tuple(asked)
        assert Counter(spy.texts) == {"same": 2}
        later = replace(asked[0], refused=True, category="x", source="y", pair="z")
        (replies,) = cached_model.replies([later], **SHORT)
        assert replies[0].prompt == later
        assert Counter(spy.texts) == {"same": 2}

    def test_labels_of_interventions_too(self, model, open_store):
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        one = steering(model)[1]
        first = cached_model.replies([Prompt("a")], [one], **SHORT)
        other = cached_model.replies([Prompt("a")], [replace(one, label="other")], **SHORT)
        assert (first[0][0].label, other[0][0].label) == ("way 0", "other")
        assert said(first) == said(other)
        assert spy.calls == 1

    def test_the_same_setting_twice(self, model, open_store):
        one = steering(model)[1]
        found = CachedModel(model, open_store()).replies([Prompt("a")], [one, None, one], **SHORT)
        assert found[0] == found[2]
        assert found[1][0].label == ""


class TestWhatDiffers:
    HISTORY = (Message("user", "x"), Message("assistant", "y"))
    PROMPTS = (
        Prompt("a b"),
        Prompt("a b", history=HISTORY),
        Prompt("a b", history=(Message("system", "x"),)),
        Prompt("a b", question_at=2),
        Prompt("a  b"),
    )

    def test_prompts(self, model, open_store):
        """Each is asked on its own, whatever of the others is kept."""
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        for n, prompt in enumerate(self.PROMPTS, 1):
            (found,) = cached_model.replies([prompt], **SHORT)
            assert said([found]) == said([model.generate([prompt], **SHORT)])
            state = cached_model.states([prompt]).values
            wanted = next(model.capture([prompt])).values
            assert torch.allclose(state, wanted, atol=1e-5)
            assert spy.calls == 2 * n

    def test_where_the_question_begins_moves_the_steering(self, model, open_store):
        cached_model = CachedModel(model, open_store())
        push = Intervention(1, torch.randn(model.width) * 5, 3.0, "before")
        found = {}
        for at in (10, 30):
            prompt = replace(inversion_prompt(Prompt("go far away from here now"), QUESTIONS[0]))
            prompt = replace(prompt, question_at=at)
            (replies,) = cached_model.replies([prompt], [push], **SHORT, watch=["No"])
            assert said([replies]) == said(model.sweep([prompt], [push], **SHORT, watch=["No"]))
            found[at] = replies[0].watched
        assert found[10] != found[30]

    def test_interventions(self, model, open_store):
        """Any one thing changed is another setting."""
        noise = torch.Generator().manual_seed(3)
        vector = torch.randn(model.width, generator=noise) * 3
        nudged = vector.clone()
        nudged[5] += 1e-3
        one = Intervention(2, vector, 1.0, "instruction")
        others = [
            replace(one, layer=0),
            replace(one, layer=model.depth),
            replace(one, vector=nudged),
            replace(one, vector=-vector),
            replace(one, coefficient=-1.0),
            replace(one, coefficient=1.0001),
            replace(one, coefficient=0.0),
            replace(one, tokens="all"),
            replace(one, tokens="t_inst"),
            replace(one, while_replying=True),
            None,
        ]
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        asked, how = [Prompt("one two three"), Prompt("four")], dict(watch=["No"], **SHORT)
        for n, setting in enumerate([one, *others], 1):
            found = cached_model.replies(asked, [setting], **how)
            assert spy.calls == n
            assert said(found) == said(model.sweep(asked, [setting], **how))

    def test_vectors_by_prompt(self, model, open_store):
        """Each reply is kept by the vector of its own prompt."""
        noise = torch.Generator().manual_seed(3)
        asked = [Prompt(f"one two {n}") for n in range(5)]
        own = {p: torch.randn(model.width, generator=noise) * 3 for p in asked}
        push = Intervention(2, own, 1.0, "all")
        wanted = said(model.sweep(asked, [push], **SHORT))
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        cached_model.replies([asked[0]], [replace(push, vector=own[asked[0]])], **SHORT)
        assert said(cached_model.replies(asked, [push], **SHORT)) == wanted
        assert spy.calls == 2
        turned = cached_model.replies(asked[::-1], [push], **SHORT)
        assert said(turned) == [wanted[0][::-1]]
        assert spy.calls == 2
        swapped = {asked[0]: own[asked[1]], asked[1]: own[asked[0]]}
        cached_model.replies(asked[:2], [replace(push, vector=swapped)], **SHORT)
        assert spy.calls == 3

    def test_a_vector_is_its_numbers(self, model, open_store):
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        vector = torch.randn(model.width)
        for same in (vector, vector.clone(), torch.stack([vector, -vector], 1)[:, 0]):
            cached_model.replies([Prompt("a")], [Intervention(2, same, 1.0)], **SHORT)
        assert spy.calls == 1

    def test_how_they_are_asked(self, model, open_store):
        cached_model = CachedModel(model, open_store())
        asked = [Prompt("one two three"), Prompt("four")]
        for most, post, watch in product((1, 3), (True, False), ((), ("No",), ("Yes", "No"))):
            how = dict(max_new_tokens=most, post=post, watch=watch)
            assert said(cached_model.replies(asked, **how)) == said(
                model.sweep(asked, [None], **how)
            )

    def test_models(self, model, half, open_store):
        """Two models may share a store."""
        store = open_store()
        asked = prompts(4)
        for one in (model, half, model):
            found = CachedModel(one, store).states(asked)
            wanted = States.collect(one.capture(asked))
            assert found.values.dtype == wanted.values.dtype
            assert torch.allclose(found.values, wanted.values, atol=1e-5)


class TestKinds:
    def test_bfloat16(self, half, open_store):
        store = open_store()
        asked = [Prompt(f"text {n}") for n in range(7)]
        found = CachedModel(half, store).states(asked, positions=("t_post", "inst-1"))
        wanted = States.collect(half.capture(asked, positions=("t_post", "inst-1")))
        assert found.values.dtype == torch.bfloat16
        assert torch.equal(found.values, wanted.values)
        assert torch.equal(found.at("inst-1"), wanted.at("inst-1"))
        replies = CachedModel(half, store).replies(asked, steering(half), **SHORT, watch=["No"])
        assert said(replies) == said(half.sweep(asked, steering(half), **SHORT, watch=["No"]))

    def test_positions_are_kept_one_by_one(self, model, open_store):
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        every = cached_model.span
        found = cached_model.states([Prompt("a b c")], positions=every)
        for position in every:
            one = cached_model.states([Prompt("a b c")], positions=(position,))
            assert torch.equal(one.at(position), found.at(position))
        assert spy.calls == 1
        assert every[0] == "t_inst"
        assert every[-1] == "t_post"
        assert len(every) == model.post + 1

    def test_none(self, model, open_store):
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        assert cached_model.replies([]) == [[]]
        assert cached_model.replies([], steering(model)) == [[], [], []]
        assert cached_model.replies([Prompt("a")], []) == []
        states = cached_model.states([])
        assert (len(states), states.values.shape[:3]) == (0, (0, 2, model.depth + 1))
        assert cached_model.refused([]) == ()
        assert spy.calls == 0

    def test_a_reply_that_ends(self, model, open_store):
        """What a model says, and whether it ended, comes back as it was said."""

        class Speaker(Spy):
            def sweep(self, prompts, interventions, **how):
                ended = Reply(prompts[0], 'né "\t😀"\n', (1, 2), True, "", (("No", -1e-17),))
                cut = Reply(prompts[1], "", (), False, "", (("No", float("-inf")),))
                return [[ended, cut]]

        asked = [Prompt("a"), Prompt("b")]
        cached_model = CachedModel(Speaker(model), open_store())
        first = cached_model.replies(asked)
        assert first == cached_model.replies(asked) == [Speaker(model).sweep(asked, [None])[0]]


class TestWrong:
    def test_what_was_kept_before_an_error_stays(self, model, open_store, small_chunks):
        spy = Spy(model)
        cached_model = CachedModel(spy, open_store())
        asked = [Prompt(f"text {n}") for n in range(8)]
        too_long = Prompt("word " * 600, id="long")
        for ask in (lambda p: cached_model.replies(p, **SHORT), cached_model.states):
            with pytest.raises(PromptError, match="'long' is"):
                ask([*asked, too_long])
        calls = spy.calls
        cached_model.replies(asked, **SHORT)
        cached_model.states(asked[:5])
        assert spy.calls == calls

    @pytest.mark.parametrize("wrong", [dict(layer=99), dict(vector=torch.ones(3))])
    def test_interventions_that_do_not_fit(self, model, open_store, wrong):
        one = replace(steering(model)[1], **wrong)
        with pytest.raises(ModelError):
            CachedModel(model, open_store()).replies([Prompt("a")], [one])

    def test_no_such_position(self, model, open_store):
        with pytest.raises(PromptError, match="no position"):
            CachedModel(model, open_store()).states([Prompt("a")], positions=("post+99",))


class TestRemember:
    def test_once(self, model, open_store):
        cached_model, asked = CachedModel(model, open_store()), []

        def compute():
            asked.append(1)
            return {"a": (1, 2.5), "b": [None, True, "é"]}

        for _ in range(3):
            found = cached_model.cached(["suffix", 3, ["x"]], compute)
            assert found == {"a": [1, 2.5], "b": [None, True, "é"]}
        assert len(asked) == 1
        assert cached_model.cached(["suffix", 4, ["x"]], lambda: 0) == 0

    def test_falsy_answers_too(self, model, open_store):
        cached_model = CachedModel(model, open_store())
        for n, answer in enumerate([None, 0, "", [], False]):
            cached_model.cached([n], lambda answer=answer: answer)
            assert cached_model.cached([n], lambda: pytest.fail("asked again")) == answer

    def test_an_error_is_not_remembered(self, model, open_store):
        cached_model = CachedModel(model, open_store())
        with pytest.raises(ZeroDivisionError):
            cached_model.cached(["x"], lambda: 1 / 0)
        assert cached_model.cached(["x"], lambda: 5) == 5

    def test_it_is_this_models(self, model, half, open_store):
        store = open_store()
        assert CachedModel(model, store).cached(["x"], lambda: 1) == 1
        assert CachedModel(half, store).cached(["x"], lambda: 2) == 2


class TestJudging:
    def test_another_judge(self, model, open_store):
        cached_model = CachedModel(model, open_store(), judge=lambda reply: reply.text)
        outcomes = ["refused", "accepted", "empty", "cut"]
        replies = [Reply(Prompt("a"), text, (), True) for text in outcomes]
        assert cached_model.refused(replies) == (True, False, None, None)


def test_a_model_reads_the_tokens_before_t_inst(model):
    """With causal attention the state there is that of t_inst in a text that stops there."""
    (long,) = model.capture([Prompt("abcd")], positions=("inst-2", "inst-1", "t_inst"))
    for at, text in (("inst-2", "ab"), ("inst-1", "abc"), ("t_inst", "abcd")):
        (short,) = model.capture([Prompt(text)], positions=("t_inst",))
        assert torch.allclose(long.at(at), short.at("t_inst"), atol=1e-5)
