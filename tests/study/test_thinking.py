"""Reasoning models: judged by the final answer, and never by a thought that was cut."""

import pytest

from latentguard.prompts import Prompt, Reply
from latentguard.study import labelling
from latentguard.study.cached_model import CachedModel
from latentguard.study.judge import answer, judge
from latentguard.study.paper_judge import PaperJudge, paper_answer
from latentguard.study.prompt_groups import contrast_pools
from latentguard.study.store import Store
from latentguard.study.thinking import final_answer, is_cut_in_thinking

REFUSAL = "I'm sorry, but I can't help with that."
HELP = "Sure, here is how: first take the red one."
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n"
)


def reply(text, *, finished=True):
    return Reply(Prompt("How?"), text, (), finished)


@pytest.mark.parametrize(
    ("thought", "spoken", "outcome"), [(REFUSAL, HELP, "accepted"), (HELP, REFUSAL, "refused")]
)
@pytest.mark.parametrize("says", [judge, PaperJudge()])
def test_the_final_answer_alone_is_judged(says, thought, spoken, outcome):
    assert says(reply(f"<think>\n{thought}\n</think>\n\n{spoken}")) == outcome


@pytest.mark.parametrize("thought", [REFUSAL, HELP, "", "I will not say No. Certainly"])
def test_a_reply_cut_inside_its_thinking_has_no_label(thought):
    cut = reply(f"<think>\n{thought}", finished=False)
    assert is_cut_in_thinking(cut) and final_answer(cut) is None
    assert (judge(cut), PaperJudge()(cut)) == ("cut", "cut")
    assert (answer(cut), paper_answer(cut)) == ("other", "other")


def test_a_reply_cut_after_its_thinking_is_judged_as_any():
    assert judge(reply(f"<think>Hm.</think>{REFUSAL}", finished=False)) == "refused"
    assert judge(reply("<think>Hm.</think>", finished=False)) == "empty"


def test_a_model_that_ends_inside_its_thinking_has_said_nothing():
    assert judge(reply(f"<think>{HELP}")) == "empty"


def test_answers_to_the_question_come_after_the_thinking():
    said = reply("<think>Certainly this is hard. No, wait.</think>\nNo.")
    assert (answer(said), paper_answer(said)) == ("no", "no")


def test_replies_without_thinking_stay_as_they_are():
    plain = reply("I think <think> is a tag.")
    assert final_answer(plain) is plain


class TestTemplateThatOpensTheThinking:
    """A tiny random model, whose template ends in <think>; its replies are planted."""

    @pytest.fixture
    def thinker(self, model, tmp_path):
        other = model.with_template(TEMPLATE)
        store = Store(tmp_path / "s.sqlite")
        yield CachedModel(Planted(other), store)
        store.close()

    def test_the_template_tells(self, model):
        assert model.with_template(TEMPLATE).opens_thinking
        assert not model.opens_thinking

    def test_a_reply_that_begins_inside_is_judged_by_its_answer(self, thinker):
        prompts = [Prompt("ends"), Prompt("cut")]
        (replies,) = thinker.replies(prompts)
        assert [thinker.judge(one) for one in replies] == ["refused", "cut"]
        (without,) = thinker.replies(prompts, post=False)  # the template is not there
        assert not without[0].text.startswith("<think>")

    def test_replies_of_another_sweep_are_judged_alike(self, thinker):
        prompts = [Prompt("ends"), Prompt("cut")]
        (swept,) = thinker.opened(thinker.uncached.sweep(prompts, [None]))
        assert swept == thinker.replies(prompts)[0]
        assert [thinker.continuation(one) for one in swept] == [
            one.text for one in thinker.uncached.sweep(prompts, [None])[0]
        ]

    def test_a_warning_counts_the_replies_that_were_cut(self, thinker, settings):
        asked = labelling.collect(thinker, contrast_pools(), settings)
        groups = labelling.prompt_groups_of(asked, contrast_pools(), settings)
        cut = sum(one.cut_in_thinking for one in asked)
        assert cut == sum(p.refused is None for one in asked for p in one.prompts) > 0
        caveat = labelling.analyse(asked, groups, settings).caveats[0]
        assert caveat.startswith(f"{cut} of ") and "set 'reply_tokens' above 4" in caveat


class Planted:
    """Every second prompt is answered after the thinking; the other replies are cut inside it."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def sweep(self, prompts, interventions, **how):
        return [[self._reply(p) for p in prompts] for _ in interventions]

    def _reply(self, prompt):
        ends = len(prompt.text) % 2 == 0
        text = f"They want help.\n</think>\n{REFUSAL}" if ends else f"{HELP} But should I"
        return Reply(prompt, text, (1, 2), finished=ends)
