"""Templates that trim, wrap, move or hide what was said, and tokenizers that cannot be used."""

import pytest

from latentguard.errors import PromptError, TemplateError
from latentguard.model.chat import ChatTokenizer
from latentguard.prompts import Message, Prompt
from model.families import FAMILIES
from model.tokenizers import byte_level, sentencepiece, special

MARKS = special("<u>", "<a>", "<e>")


def tokenizer_with(body, around="{% for m in messages %}%s{% endfor %}{{ '<a>' }}"):
    """A tokenizer whose template writes ``body`` for each message ``m``."""
    return byte_level(around.replace("%s", body), MARKS)


def assert_same_as_plain(tokenizer, prompt):
    chat = [dict(role=m.role, content=m.content) for m in prompt.history]
    chat.append(dict(role="user", content=prompt.text))
    plain = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    layout = ChatTokenizer(tokenizer)([prompt])[0]
    assert list(layout.ids) == plain
    return layout


class TestTemplatesThatHideTheInstruction:
    @pytest.mark.parametrize(
        "body",
        [
            "{{ '<u>' + m.content | upper + '<e>' }}",
            "{{ '<u>' + m.content | lower + '<e>' }}",
            "{{ '<u>' + m.content | escape + '<e>' }}",
            "{{ '<u>' + m.content | tojson + '<e>' }}",
            "{{ '<u>' + m.content + m.content + '<e>' }}",
            "{{ '<u>' + m.content[:5] + '<e>' }}",
            "{{ '<u><e>' }}",
        ],
    )
    def test_changed_repeated_or_dropped(self, body):
        with pytest.raises(TemplateError, match="changes the user message, or shows it"):
            ChatTokenizer(tokenizer_with(body))

    def test_only_the_system_message_is_dropped(self):
        chat = ChatTokenizer(tokenizer_with("{% if m.role == 'user' %}{{ m.content }}{% endif %}"))
        assert chat([Prompt("hello")])[0].t_inst == chat([Prompt("hello")])[0].t_post - 1
        with pytest.raises(TemplateError, match="the system message, or shows it 0 times"):
            chat([Prompt("hello", history=(Message("system", "be brief"),))])

    def test_a_template_that_rejects_the_roles_says_why(self):
        chat = ChatTokenizer(FAMILIES["gemma"].tokenizer)
        with pytest.raises(TemplateError, match="roles system, user: System role not supported"):
            chat([Prompt("hello", history=(Message("system", "be brief"),))])

    def test_a_broken_template(self):
        with pytest.raises(TemplateError, match="rejects the roles user"):
            ChatTokenizer(tokenizer_with("{{ m.content | nonsense }}"))

    def test_a_template_that_asks_for_white_space(self):
        body = "{% if m.content.startswith(' ') %}{{ 'indented: ' }}{% endif %}{{ m.content }}"
        with pytest.raises(TemplateError, match="depending on white space"):
            ChatTokenizer(tokenizer_with(body))


class TestTokenizersThatCannotBeUsed:
    @pytest.mark.parametrize("template", [None, {"default": "{{ messages }}"}])
    def test_no_single_chat_template(self, template):
        tokenizer = byte_level(template, MARKS)
        with pytest.raises(TemplateError, match=r"no single chat template.*instruct"):
            ChatTokenizer(tokenizer)

    def test_no_fast_tokenizer(self):
        class Slow:
            chat_template = "{{ messages[0].content }}"
            is_fast = False

        with pytest.raises(TemplateError, match="fast tokenizer is needed"):
            ChatTokenizer(Slow())


class TestWhiteSpace:
    @pytest.mark.parametrize(
        "trim",
        ["", " | trim", ".strip()", ".lstrip()", ".rstrip()", ".strip('\n')", ".rstrip(' ')"],
    )
    @pytest.mark.parametrize(
        "text", ["hello", " \n hello \n ", "\n hello \n", "\t\u3000hello\xa0\t"]
    )
    def test_each_way_of_trimming(self, trim, text):
        body = "{{ '<u>  ' + (m.content)%s + '  \n<e>' }}".replace("%s", trim)
        turns = (Message("system", text), Message("user", text), Message("assistant", text))
        assert_same_as_plain(tokenizer_with(body), Prompt(text, history=turns))

    @pytest.mark.parametrize("text", ["hello", "hello ", "hello  ", " hello\n", "日本語 🙂 "])
    def test_a_text_that_merges_with_the_template_ends_in_the_shared_token(self, text):
        template = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        tokenizer = sentencepiece(template + "{% endfor %}", [], style="mistral")
        layout = assert_same_as_plain(tokenizer, Prompt(text))
        assert text.rstrip() in tokenizer.decode(layout.ids[: layout.t_inst + 1])
        after = tokenizer.decode(layout.ids[layout.t_inst + 1 :])
        assert after.strip() == "[/INST]"
        assert tokenizer.decode(layout.ids[: layout.t_inst]).endswith(text) is False

    @pytest.mark.parametrize("text", ["hello", "\n hello \n", "  hello"])
    def test_control_tokens_that_swallow_blanks_are_not_t_inst(self, text):
        added = [*special("<u>", rstrip=True), *special("<e>", lstrip=True)]
        tokenizer = byte_level("{{ '<u>' + messages[-1].content + '<e>' }}", added)
        layout = assert_same_as_plain(tokenizer, Prompt(text))
        assert layout.t_inst == layout.t_post - 1
        assert tokenizer.decode(layout.ids[1 : layout.t_inst + 1]) == "hello"

    def test_an_empty_text_inside_a_token_of_the_template_is_an_error(self):
        tokenizer = byte_level("{{ 'as' + messages[-1].content | trim + 'sistant' }}", [])
        assert tokenizer.tokenize("assistant") == ["a", "ss", "ist", "ant"]
        with pytest.raises(PromptError, match="is empty"):
            ChatTokenizer(tokenizer)([Prompt("\n")])


class TestSystemMessages:
    def test_one_that_moves_into_the_last_turn(self):
        turns = (Message("system", "SYS"), Message("user", "ONE"), Message("assistant", "TWO"))
        tokenizer = FAMILIES["mistral"].tokenizer
        layout = assert_same_as_plain(tokenizer, Prompt("THREE", history=turns))
        assert tokenizer.decode(layout.ids).startswith("<s>[INST] ONE[/INST] TWO</s>[INST] SYS")
        assert tokenizer.decode(layout.ids[: layout.t_inst + 1]).endswith("SYS\n\nTHREE")

    def test_one_that_is_written_after_the_instruction(self):
        template = "{{ '<u>' + messages[-1].content + '<e>' + messages[0].content + '<a>' }}"
        prompt = Prompt("hello", history=(Message("system", "be brief"),))
        tokenizer = byte_level(template, MARKS)
        with pytest.raises(TemplateError, match="2 times"):  # a lone message is both
            ChatTokenizer(tokenizer)
        tokenizer.chat_template = template.replace(
            "messages[0].content", "(messages[0].content if messages | length > 1 else '')"
        )
        layout = assert_same_as_plain(tokenizer, prompt)
        assert tokenizer.decode(layout.ids[: layout.t_inst + 1]) == "<u>hello"

    @pytest.mark.parametrize("system", ["", " ", "\n", "be brief"])
    def test_templates_may_ask_whether_there_is_one(self, system):
        template = (
            "{% if messages[0].role == 'system' and messages[0].content | trim %}"
            "{{ '<u>' + messages[0].content + '<e>' }}{% else %}{{ '<u>default<e>' }}{% endif %}"
            "{{ '<u>' + messages[-1].content + '<a>' }}"
        )
        prompt = Prompt("hello", history=(Message("system", system),))
        assert_same_as_plain(byte_level(template, MARKS), prompt)

    @pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.system])
    @pytest.mark.parametrize("system", ["", "  ", "be brief"])
    def test_empty_and_given_in_every_family(self, name, system):
        prompt = Prompt("hello", history=(Message("system", system),))
        assert_same_as_plain(FAMILIES[name].tokenizer, prompt)


class TestDigests:
    def test_they_bind_the_template_and_the_tokenizer(self):
        one, same = (ChatTokenizer(tokenizer_with("{{ m.content }}")) for _ in range(2))
        other = ChatTokenizer(tokenizer_with("{{ m.content }}<e>"))
        more = ChatTokenizer(byte_level("{{ messages[0].content }}", [*MARKS, *special("<x>")]))
        assert one.template_digest == same.template_digest != other.template_digest
        assert one.tokenizer_digest == same.tokenizer_digest == other.tokenizer_digest
        assert one.tokenizer_digest != more.tokenizer_digest

    def test_padding_truncation_and_added_bos_do_not_matter(self):
        tokenizer = FAMILIES["llama-3"].tokenizer
        before = ChatTokenizer(tokenizer)
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding(direction="left", length=64)
        try:
            after = ChatTokenizer(tokenizer)
        finally:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        assert after.tokenizer_digest == before.tokenizer_digest
        assert after([Prompt("hello there")]) == before([Prompt("hello there")])
