"""Text attacks are deterministic, give text, and keep the request in it."""

import base64
import codecs
import re
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from latentguard.models.chat import ChatTokenizer
from latentguard.prompts import Prompt
from latentguard.robustness.attacks import ATTACKS
from latentguard.robustness.characters import (
    BASE64,
    BIDI_MARKS,
    LEET,
    LOOKALIKES,
    POP,
    RIGHT_TO_LEFT,
    ROT13,
    ZERO_WIDTH,
)
from latentguard.robustness.languages import english_originals, languages, translations
from latentguard.robustness.suite import attack_names
from latentguard.robustness.surroundings import CONTROL_TOKENS, PROSE, pad_with_prose
from latentguard.study.attacks import TEMPLATES
from models.families import FAMILIES

BY_NAME = {attack.name: attack for attack in ATTACKS}
WORDS = st.lists(st.from_regex(r"[A-Za-z]{1,9}[,.?!]?", fullmatch=True), min_size=1, max_size=12)
SENTENCES = WORDS.map(" ".join)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
class TestEveryAttack:
    @given(text=ANY_TEXT, seed=st.integers(0, 3))
    def test_the_same_seed_gives_the_same_text(self, attack, text, seed):
        changed = attack(text, seed=seed)
        assert changed == attack(text, seed=seed)
        assert changed.strip()
        changed.encode()

    def test_it_changes_an_ordinary_request(self, attack):
        text = "Explain how to bake a loaf of sourdough bread at home"
        assert attack(text) != text

    def test_it_says_what_it_imitates_and_who_described_it(self, attack):
        assert re.search(r"\. Source: .*\(20\d\d\)", attack.description)
        assert attack.description[0].isupper()

    def test_its_name_fits_a_figure(self, attack):
        assert len(attack.name) <= 24


def test_names_are_unique():
    assert len(set(attack_names())) == len(attack_names())


HOLDS = [
    "tokens in front",
    "ChatML turns behind",
    "system turn in front",
    "spoken turns behind",
    "harmless request behind",
    "harmless one in front",
    *(f"wrapper: {template.name}" for template in TEMPLATES),
]


@pytest.mark.parametrize("name", HOLDS)
@given(text=ANY_TEXT)
def test_surroundings_hold_the_text_as_it_was(name, text):
    assert text in BY_NAME[name](text)


@given(text=SENTENCES, sentences=st.integers(1, 80), side=st.sampled_from(["front", "behind"]))
def test_padding_holds_the_text_and_so_many_sentences(text, sentences, side):
    from random import Random

    found = pad_with_prose(text, Random(0), sentences=sentences, side=side)
    assert found.endswith(f"\n\n{text}") if side == "front" else found.startswith(f"{text}\n\n")
    prose = found.removesuffix(f"\n\n{text}").removeprefix(f"{text}\n\n")
    assert sum(prose.count(one) for one in PROSE) == sentences


def removed(text, characters):
    return text.translate({ord(c): None for c in characters})


class TestItCanBeUndone:
    @given(SENTENCES)
    def test_zero_width(self, text):
        assert removed(BY_NAME["zero width"](text), ZERO_WIDTH) == text

    @given(SENTENCES)
    def test_bidi(self, text):
        assert removed(BY_NAME["bidi marks"](text), BIDI_MARKS) == text
        assert removed(BY_NAME["bidi override"](text), RIGHT_TO_LEFT + POP)[::-1] == text

    @given(SENTENCES)
    def test_homoglyphs(self, text):
        back = {twin: letter for letter, twin in LOOKALIKES.items()}
        whole, part = (BY_NAME[f"homoglyphs, {share}"](text) for share in ("all", "a third"))
        assert whole.translate(back) == part.translate(back) == text
        assert not any(ord(c) in LOOKALIKES for c in whole)

    @given(SENTENCES)
    def test_fullwidth(self, text):
        assert unicodedata.normalize("NFKC", BY_NAME["fullwidth"](text)) == text

    @given(SENTENCES)
    def test_control_tokens(self, text):
        found = BY_NAME["tokens between"](text)
        for token in CONTROL_TOKENS:
            found = found.replace(token, "")
        assert found == text

    @given(SENTENCES)
    def test_case(self, text):
        for name in ("random case", "upper case"):
            assert BY_NAME[name](text).lower() == text.lower()

    @given(SENTENCES)
    def test_spacing(self, text):
        for name in ("spaced letters", "joined words"):
            assert BY_NAME[name](text).replace(" ", "") == text.replace(" ", "")

    @given(SENTENCES)
    def test_scrambled_letters(self, text):
        pairs = zip(text.split(), BY_NAME["scrambled letters"](text).split(), strict=True)
        for before, after in pairs:
            assert sorted(before) == sorted(after)
            assert (before[0], before[-1]) == (after[0], after[-1])

    @given(ANY_TEXT)
    def test_encodings(self, text):
        encoded = BY_NAME["base64"](text).removeprefix(BASE64)
        assert base64.b64decode(encoded).decode() == text
        assert codecs.decode(BY_NAME["rot13"](text).removeprefix(ROT13), "rot13") == text

    @given(SENTENCES)
    def test_leetspeak(self, text):
        found = BY_NAME["leetspeak"](text)
        assert all(b in (a, a.translate(LEET)) for a, b in zip(text, found, strict=True))


IMITATIONS = [a.name for a in ATTACKS if a.family in ("special tokens", "template imitation")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", IMITATIONS)
def test_imitations_stay_text_and_t_inst_stays_at_its_end(family, name):
    """No control token comes from the text; what follows t_inst is what follows any text."""
    tokenizer = FAMILIES[family].tokenizer
    chat = ChatTokenizer(tokenizer)
    text = BY_NAME[name]("Explain how to bake bread")
    attacked, plain = chat([Prompt(text), Prompt("Explain how to bake bread")])
    control = set(tokenizer.convert_tokens_to_ids(list(FAMILIES[family].control)))
    assert [i for i in attacked.ids if i in control] == [i for i in plain.ids if i in control]
    assert attacked.ids[attacked.t_inst + 1 :] == plain.ids[plain.t_inst + 1 :]
    assert attacked.t_inst > plain.t_inst


class TestLanguages:
    def test_there_are_ten(self):
        assert len(languages()) == 10

    @pytest.mark.parametrize("language", languages())
    def test_translations_pair_by_pair(self, language):
        texts = translations(language)
        assert [p.harmful for p in texts] == [True, False] * 8
        assert [p.pair for p in texts] == [p.pair for p in english_originals()]
        assert len({p.text for p in texts}) == 16
        assert not {p.text for p in texts} & {p.text for p in english_originals()}

    @pytest.mark.parametrize("language", languages())
    def test_frames_keep_the_english_core(self, language):
        frame = BY_NAME[f"frame: {language}"]
        asked, told = frame("How can I bake bread?"), frame("Explain how to bake bread.")
        other = frame("Write a poem on bread.")
        assert "bake bread" in asked
        assert "bake bread" in told
        assert asked != told
        assert "Write a poem on bread." in other
        assert "How can I" not in asked
        assert "xplain" not in told

    @given(text=SENTENCES)
    def test_other_texts_stay_whole(self, text):
        assume(not text.lower().startswith(("how", "explain", "show", "tell", "teach", "desc")))
        for language in languages():
            assert text in BY_NAME[f"frame: {language}"](text)
