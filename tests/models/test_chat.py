"""The chat layout of benign text: the ids of apply_chat_template, and where t_inst is."""

import unicodedata

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from latentguard.errors import PromptError
from latentguard.models.chat import ChatTokenizer
from latentguard.prompts import Message, Prompt
from models.families import FAMILIES

PIECES = (
    *("hello", "What is the capital of France?", "return None", "Frühling", "e\u0301", "\u0301"),
    *("日本語", "🙂", "👩‍👩‍👧‍👦", "مرحبا", "▁", "\ufeff", "\x00", "\ue000", "\ue001x0", "ﬁ"),
    *(
        " ",
        "  ",
        "        ",
        "\n",
        "\n\n\n",
        "\r\n",
        "\t\t",
        "\u3000",
        "\xa0",
        "<",
        "|>",
        "<b>",
        "[",
        "/",
    ),
)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TEXTS = st.lists(st.sampled_from(PIECES) | ANY, min_size=1, max_size=8).map("".join)
EACH_FAMILY = pytest.mark.parametrize("name", FAMILIES)

CHATS = {name: ChatTokenizer(family.tokenizer) for name, family in FAMILIES.items()}
HISTORIES = st.tuples(TEXTS | st.just(""), TEXTS, TEXTS, st.booleans())


def is_benign(text, family):
    return not any(control in text for control in (*family.control, "<unk>"))


def reference(family, prompt):
    """What a plain tokenisation of the template gives."""
    turns = [dict(role=m.role, content=m.content) for m in prompt.history]
    chat = [*turns, dict(role="user", content=prompt.text)]
    encoded = family.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    return tuple(encoded["input_ids"])


def with_history(family, texts, text):
    system, user, assistant, wanted = texts
    first = (Message("system", system),) if wanted and family.system else ()
    return Prompt(text, history=(*first, Message("user", user), Message("assistant", assistant)))


def decoded(family, ids):
    return family.tokenizer.decode(ids, clean_up_tokenization_spaces=False).replace("▁", " ")


def shown(family, name, text):
    """The text as it comes back from the tokens."""
    text = unicodedata.normalize("NFC", text) if name.startswith("qwen") else text
    text = text.strip() if family.trims else text
    text = text.lstrip() if name == "phi-3" else text  # <|user|> swallows blanks on its right
    return text.replace("▁", " ")


@EACH_FAMILY
class TestBenignText:
    @given(text=TEXTS)
    @example(text="  two blanks on both sides, then a new line  \n")
    @example(text="日本語 🙂")
    @example(text="a word " * 4000)
    def test_differs_in_nothing_from_apply_chat_template(self, name, text):
        family = FAMILIES[name]
        assume(text.strip() and is_benign(text, family))
        layout = CHATS[name]([Prompt(text)])[0]
        assert layout.ids == reference(family, Prompt(text))
        assert layout.t_post == len(layout.ids) - 1

    @given(text=TEXTS, history=HISTORIES)
    @example(text="And now?", history=("", "Hello", "Hi!", True))
    @example(text="And now?", history=(" be brief \n", " Hello\n", "\n\n Hi! ", True))
    def test_with_earlier_turns_too(self, name, text, history):
        family = FAMILIES[name]
        prompt = with_history(family, history, text)
        said = "".join([text, *(m.content for m in prompt.history)])
        assume(text.strip() and is_benign(said, family))
        assert CHATS[name]([prompt])[0].ids == reference(family, prompt)

    @given(text=TEXTS, history=st.none() | HISTORIES)
    @example(text="ends in one character of several tokens 🙂", history=None)
    @example(text="ends in blanks  \n", history=None)
    def test_t_inst_is_the_end_of_the_last_user_turn(self, name, text, history):
        family, chat = FAMILIES[name], CHATS[name]
        prompt = with_history(family, history, text) if history else Prompt(text)
        assume(shown(family, name, text))
        layout, plain = chat([prompt, Prompt("hello")])
        assert decoded(family, layout.ids[: layout.t_inst + 1]).endswith(shown(family, name, text))
        assert layout.ids[layout.t_inst + 1 :] == plain.ids[plain.t_inst + 1 :]

    def test_a_batch_is_laid_out_row_by_row(self, name):
        prompts = [Prompt("word " * n + "end") for n in range(1, 9)]
        batch = CHATS[name](prompts)
        assert batch == [CHATS[name]([prompt])[0] for prompt in prompts]
        assert len({layout.t_inst for layout in batch}) == len(prompts)

    def test_post_tokens_are_named_one_by_one(self, name):
        layout = CHATS[name]([Prompt("hello")])[0]
        count = layout.t_post - layout.t_inst
        assert [layout.index(f"post+{k}") for k in range(1, count + 1)] == list(
            range(layout.t_inst + 1, layout.t_post + 1)
        )
        for wrong in ("post+0", f"post+{count + 1}", "post-1", "post+", "inst", "t_inst+1", ""):
            with pytest.raises(PromptError, match=rf"post\+1 to post\+{count} and inst-1"):
                layout.index(wrong)


@EACH_FAMILY
@pytest.mark.parametrize("text", ["", " ", "\n\n", " \t\n "])
def test_text_of_which_nothing_is_left_is_an_error(name, text):
    family, chat = FAMILIES[name], CHATS[name]
    if text == "" or family.trims or name == "phi-3":
        with pytest.raises(PromptError, match="'p7' is empty"):
            chat([Prompt(text, id="p7")])
    else:
        layout = chat([Prompt(text)])[0]
        assert layout.ids == reference(family, Prompt(text))
        assert decoded(family, layout.ids[: layout.t_inst + 1]).endswith(text)


def test_lone_surrogates_are_refused_by_name():
    with pytest.raises(PromptError, match="'p7' is not valid Unicode"):
        CHATS["qwen2.5"]([Prompt("a\ud800", id="p7")])
