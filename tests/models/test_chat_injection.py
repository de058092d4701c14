"""Text that imitates the template: it stays text, and t_inst stays at its end."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latentguard.models.chat import ChatTokenizer
from latentguard.prompts import Message, Prompt
from models.families import CHATML, FAMILIES
from models.tokenizers import byte_level, ordinary, special, wrapped

CHATS = {name: ChatTokenizer(family.tokenizer) for name, family in FAMILIES.items()}
EVERY_CONTROL = sorted({c for f in FAMILIES.values() for c in (*f.control, *f.headers)})
BETWEEN = st.sampled_from(["", " ", "\n", "Sure, here is", "🙂", "<|", "|>"])


def imitations(name):
    """Concatenations of the template's own strings, of other templates' and of other text."""
    family = FAMILIES[name]
    own = st.sampled_from([*family.control, *family.headers])
    return st.lists(own | st.sampled_from(EVERY_CONTROL) | BETWEEN, min_size=1).map("".join)


def prompt_of(name, text, system, user, assistant):
    first = (Message("system", system),) if FAMILIES[name].system else ()
    return Prompt(text, history=(*first, Message("user", user), Message("assistant", assistant)))


def control_of(name, ids):
    """The control tokens of a row, in order."""
    tokenizer = FAMILIES[name].tokenizer
    control = set(tokenizer.convert_tokens_to_ids(list(FAMILIES[name].control)))
    return [token for token in ids if token in control]


def assert_same_frame(name, layout, plain):
    """The template's tokens are those around an ordinary prompt; none is inside the text."""
    assert control_of(name, layout.ids) == control_of(name, plain.ids)
    assert layout.ids[layout.t_inst + 1 :] == plain.ids[plain.t_inst + 1 :]
    begin = next(i for i, (a, b) in enumerate(zip(layout.ids, plain.ids, strict=False)) if a != b)
    assert control_of(name, layout.ids[begin : layout.t_inst + 1]) == []


@pytest.mark.parametrize("name", FAMILIES)
class TestInjection:
    @given(data=st.data())
    def test_text_made_of_control_strings_stays_text(self, name, data):
        text = data.draw(imitations(name)) + data.draw(st.sampled_from(["end", ".", "🙂", ">"]))
        layout, plain = CHATS[name]([Prompt(text), Prompt("~")])
        assert_same_frame(name, layout, plain)
        decoded = FAMILIES[name].tokenizer.decode(layout.ids[: layout.t_inst + 1])
        assert decoded.replace("▁", " ").endswith(text.strip().replace("▁", " "))

    @given(data=st.data())
    def test_each_control_string_alone_and_last(self, name, data):
        text = data.draw(st.sampled_from([*FAMILIES[name].control, *FAMILIES[name].headers]))
        layout, plain = CHATS[name]([Prompt(text), Prompt("~")])
        assert_same_frame(name, layout, plain)

    @given(data=st.data())
    def test_earlier_turns_inject_nothing_either(self, name, data):
        said = [data.draw(imitations(name)) + "." for _ in range(4)]
        layout, plain = CHATS[name]([prompt_of(name, *said), prompt_of(name, *"~~~~")])
        assert control_of(name, layout.ids) == control_of(name, plain.ids)
        assert layout.ids[layout.t_inst + 1 :] == plain.ids[plain.t_inst + 1 :]

    @given(parts=st.lists(st.from_regex("[\ue000-\ue003]|[0-9a-f]{8}(x|m)[0-9]", fullmatch=True)))
    @example(
        parts=["\ue000", "0a1b2c3d", "x0", "\ue001", "\ue002", "0a1b2c3d", "m0Aa<&'", "\ue003"]
    )
    def test_text_like_the_names_used_inside_is_ordinary(self, name, parts):
        text = "".join(parts) + "."
        plain = FAMILIES[name].tokenizer.apply_chat_template(
            [dict(role="user", content=text)], add_generation_prompt=True
        )
        assert list(CHATS[name]([Prompt(text)])[0].ids) == plain["input_ids"]


def assert_stays_text(tokenizer, text, count):
    """``text`` is not the control token that it spells; the template holds ``count`` of those."""
    chat = ChatTokenizer(tokenizer)
    layout, plain = chat([Prompt(text), Prompt("~")])
    token = tokenizer.convert_tokens_to_ids(text)
    assert plain.ids.count(token) == layout.ids.count(token) == count
    assert tokenizer.decode(layout.ids[: layout.t_inst + 1]).endswith(text)


def test_control_tokens_put_together_from_parts_are_found():
    template = (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|' ~ 'assistant|>' }}{% endif %}"
    )
    added = ordinary("<|user|>", "<|assistant|>")
    assert_stays_text(byte_level(template, added), "<|user|>", 1)
    assert_stays_text(byte_level(template, added), "<|assistant|>", 1)


def test_control_tokens_that_begin_like_others_are_kept_whole():
    template = "{{ '<u>' + messages[-1].content + '<u>s<u' }}"
    tokenizer = byte_level(template, special("<u", "<u>", "<u>s"))
    layout = ChatTokenizer(tokenizer)([Prompt("hello<u>s")])[0]
    kept = tokenizer.convert_ids_to_tokens([layout.ids[0], *layout.ids[layout.t_inst + 1 :]])
    assert kept == ["<u>", "<u>s", "<u"]


def test_added_tokens_that_the_template_has_no_use_for_stay_tokens():
    tokenizer = byte_level(CHATML, [*special("<|im_start|>", "<|im_end|>"), *ordinary("<table>")])
    ids = ChatTokenizer(tokenizer)([Prompt("an HTML <table> here")])[0].ids
    assert tokenizer.convert_tokens_to_ids("<table>") in ids


def test_control_tokens_that_merges_could_make_stay_apart():
    from tokenizers import Tokenizer, decoders, models

    vocab = {c: n for n, c in enumerate(["<", "s", ">", "~", "<s", "<s>", "s>", "a"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "s"), ("<s", ">"), ("s", ">")]))
    backend.decoder = decoders.Fuse()
    template = "{{ '<s>' }}{% for m in messages %}{{ m.content }}{% endfor %}{{ '<s>' }}"
    assert_stays_text(wrapped(backend, template, special("<s>")), "<s>", 2)


def test_a_tokenizer_without_byte_fallback_reads_t_inst_at_an_unknown_token():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: n for n, w in enumerate(["[UNK]", "[BOS]", "[END]", "hello", "UNK", "[", "]"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{{ '[BOS]' }}{% for m in messages %}{{ m.content }}{% endfor %}{{ '[END]' }}"
    chat = ChatTokenizer(wrapped(backend, template, special("[UNK]", "[BOS]", "[END]")))
    strange, lone, spelled = chat([Prompt("hello 🙂"), Prompt("🙂"), Prompt("[UNK]")])
    assert (strange.ids, strange.t_inst) == ((1, 3, 0, 2), 2)
    assert (lone.ids, lone.t_inst) == ((1, 0, 2), 1)
    assert (spelled.ids, spelled.t_inst) == ((1, 5, 4, 6, 2), 3)
