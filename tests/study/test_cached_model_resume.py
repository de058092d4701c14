"""Replies and states that are kept: a killed run goes on, two at once do not disturb each other."""

import pytest
import torch

from latentguard.study.cached_model import CachedModel
from study.spy import SHORT, Rounding, Spy, killed, prompts, said, steering


class TestKilled:
    """Killed after any chunk and asked again, it gives the bits of an unbroken run."""

    ASKED = prompts(22)

    def replies(self, cached_model):
        return cached_model.replies(
            self.ASKED, steering(cached_model.uncached), **SHORT, watch=["No"]
        )

    def states(self, cached_model):
        return cached_model.states(self.ASKED, positions=("t_inst", "post+1", "t_post"))

    def filled(self, store, cached):
        """Other experiments were there before."""
        cached_model = CachedModel(Rounding(), store)
        if cached == "some prompts":
            cached_model.replies(
                self.ASKED[3:11:2], steering(cached_model.uncached), **SHORT, watch=["No"]
            )
            cached_model.states(self.ASKED[3:11:2], positions=("t_inst", "post+1", "t_post"))
        if cached == "some of each":
            cached_model.replies(self.ASKED[4:18], [None], **SHORT, watch=["No"])
            cached_model.states(self.ASKED[4:18], positions=("t_post",))
        return store

    @pytest.mark.parametrize("cached", ["nothing", "some prompts", "some of each"])
    def test_in_a_sweep(self, open_store, small_chunks, cached):
        whole = Spy(Rounding())
        wanted = said(self.replies(CachedModel(whole, self.filled(open_store("whole"), cached))))
        assert whole.calls >= 3
        for after in range(whole.calls):
            store = self.filled(open_store(str(after)), cached)
            assert killed(Rounding(), store, self.replies, after)
            rest = Spy(Rounding())
            assert said(self.replies(CachedModel(rest, store))) == wanted
            assert rest.calls == whole.calls - after

    @pytest.mark.parametrize("cached", ["nothing", "some prompts", "some of each"])
    def test_in_a_capture(self, open_store, small_chunks, cached):
        whole = Spy(Rounding())
        wanted = self.states(CachedModel(whole, self.filled(open_store("whole"), cached)))
        assert whole.calls >= 3
        for after in range(whole.calls):
            store = self.filled(open_store(str(after)), cached)
            assert killed(Rounding(), store, self.states, after)
            rest = Spy(Rounding())
            found = self.states(CachedModel(rest, store))
            assert torch.equal(found.values, wanted.values)
            assert rest.calls == whole.calls - after

    def test_again_and_again(self, open_store, small_chunks):
        wanted = said(self.replies(CachedModel(Rounding(), open_store("whole"))))
        store = open_store("broken")
        deaths = sum(killed(Rounding(), store, self.replies, 1) for _ in range(9))
        assert deaths == 8  # chunks of the sweep but one, killed after each
        assert said(self.replies(CachedModel(Rounding(), store))) == wanted

    def test_a_real_model(self, model, open_store, small_chunks):
        """What it had not handed over when it died is asked again, all of it."""

        class Dying(Spy):
            def sweep(self, prompts, interventions, **how):
                found = super().sweep(prompts, interventions, **how)
                if self.calls == 2:
                    raise SystemExit(137)
                return found

        store = open_store()
        with pytest.raises(SystemExit):
            self.replies(CachedModel(Dying(model), store))
        rest = Spy(model)
        wanted = said(self.replies(CachedModel(model, open_store("whole"))))
        assert said(self.replies(CachedModel(rest, store))) == wanted
        assert rest.calls == 8
        assert killed(model, store, self.states, 1)
        wanted = self.states(CachedModel(model, open_store("whole"))).values
        assert torch.equal(self.states(CachedModel(model, store)).values, wanted)


class TestTwoAtOnce:
    """Two processes on one store: both find the same, and it stays."""

    @pytest.mark.parametrize("part", [slice(None), slice(4, 9)])
    def test_the_other_asks_the_same_meanwhile(self, open_store, small_chunks, part):
        asked = prompts(12)
        spy = Spy(Rounding())
        mine, other = CachedModel(spy, open_store()), CachedModel(Rounding(), open_store())
        spy.before = lambda: (other.replies(asked[part]), other.states(asked[part]))
        replies, states = said(mine.replies(asked)), mine.states(asked).values
        for one in (mine, other):
            assert said(one.replies(asked)) == replies
            assert torch.equal(one.states(asked).values, states)


class TestProgress:
    @pytest.fixture
    def steps(self):
        return []

    @pytest.fixture
    def watched(self, model, open_store, steps):
        def step(what, total):
            steps.append([what, total, 0])
            at = len(steps) - 1

            def advance(count):
                assert count >= 0
                steps[at][2] += count

            return advance

        return CachedModel(model, open_store(), step=step)

    @pytest.mark.parametrize("cached", [0, 7])
    def test_it_ends_where_it_said(self, watched, steps, cached):
        asked = prompts(12)
        distinct = len({p.text for p in asked})
        watched.states(asked[:cached], what="some")
        watched.states(asked, what="all")
        assert steps.pop() == ["all", distinct, distinct]
        watched.replies(asked[:cached], **SHORT, what="some")
        watched.replies(asked, steering(watched.uncached), **SHORT, what="all")
        assert steps[-1] == ["all", 3 * distinct, 3 * distinct]

    def test_nothing_to_do(self, watched, steps):
        watched.replies([], what="r")
        watched.states([], what="s")
        assert steps == [["r", 0, 0], ["s", 0, 0]]
