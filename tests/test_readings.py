"""Readings: names, positions, and the ending that ``sealed`` makes uniform."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentguard.errors import GuardError
from latentguard.prompts import Message, Prompt
from latentguard.states import Reading, seal


class TestNames:
    @pytest.mark.parametrize(
        ("name", "positions"),
        [
            ("t_inst", ("t_inst",)),
            ("t_post", ("t_post",)),
            ("post+1", ("post+1",)),
            ("post+3", ("post+3",)),
            ("sealed", ("t_inst",)),
            ("pooled", ("t_inst", "post", "t_post", "mean")),
            ("span", ("t_inst", "post+1", "post+2", "t_post")),
        ],
    )
    def test_positions(self, name, positions):
        assert Reading.of(name, 3) == Reading(name, positions)

    @pytest.mark.parametrize("name", ["post+0", "post+4", "post+01", "post", "T_inst", "", "all"])
    def test_unknown_names(self, name):
        with pytest.raises(GuardError, match=f"no reading '{name}' here".replace("+", r"\+")) as e:
            Reading.of(name, 3)
        assert "t_inst, t_post, post+1" in str(e.value)
        assert "up to 3" in str(e.value)

    def test_a_span_reads_each_token_once(self):
        """t_post is post+POST, so a span of one token after t_inst is t_inst and t_post."""
        assert Reading.of("span", 1).positions == ("t_inst", "t_post")
        for post in range(1, 6):
            assert len(set(Reading.of("span", post).positions)) == post + 1

    def test_a_template_that_ends_with_the_instruction(self):
        assert Reading.of("t_inst", 0).positions == ("t_inst",)
        with pytest.raises(GuardError, match=r"post\+1"):
            Reading.of("post+1", 0)


class TestSeal:
    @pytest.mark.parametrize(
        ("text", "sealed"),
        [
            ("How are you?", "How are you."),
            ("How are you", "How are you."),
            ("How are you.", "How are you."),
            ("Stop!!! ", "Stop."),
            ("Really ?!\n", "Really."),
            ("One. Two? Three", "One. Two? Three."),
            ('He said "no."', 'He said "no.".'),
            ("a, b;", "a, b;."),
            ("???", "."),
            ("...what...", "...what."),
            ("two lines?\n\nyes", "two lines?\n\nyes."),
        ],
    )
    def test_examples(self, text, sealed):
        assert seal(text) == sealed

    def test_long_runs_of_blanks_cost_no_more_than_their_length(self):
        began = time.process_time()
        assert seal("a" + " " * 100_000 + "b. ! ") == "a" + " " * 100_000 + "b."
        assert time.process_time() - began < 1  # took minutes

    @given(st.text(st.sampled_from("ab .?!\n\t,é")))
    def test_only_the_ending_changes(self, text):
        sealed = seal(text)
        kept = sealed.removesuffix(".")
        assert sealed.endswith(".")
        assert text.startswith(kept)
        assert set(text[len(kept) :]) <= set(" .?!\n\t")
        assert seal(sealed) == sealed

    def test_prompts_that_differ_in_their_ending_are_read_alike(self):
        endings = ("", ".", "?", "!", " ", "?!", "...\n")
        assert {seal(f"Tell me more{ending}") for ending in endings} == {"Tell me more."}

    def test_the_rest_of_the_prompt_stays(self):
        history = (Message("user", "Really?"),)
        prompt = Prompt("Why?", id="1", harmful=True, refused=False, pair="p", history=history)
        ready = Reading.of("sealed", 2).prepare(prompt)
        assert (ready.text, ready.id, ready.harmful, ready.refused) == ("Why.", "1", True, False)
        assert (ready.pair, ready.history) == ("p", history)

    @pytest.mark.parametrize("name", ["t_inst", "t_post", "span", "post+1"])
    def test_other_readings_change_nothing(self, name):
        prompt = Prompt("Why?! ")
        assert Reading.of(name, 2).prepare(prompt) is prompt
