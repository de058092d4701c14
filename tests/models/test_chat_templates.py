"""Templates that trim, wrap, move, hide or date what was said; tokenizers that cannot be used."""

from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from latentguard.errors import PromptError, TemplateError
from latentguard.models import chat as module
from latentguard.models.chat import ChatTokenizer
from latentguard.prompts import Message, Prompt
from models.families import FAMILIES
from models.tokenizers import byte_level, sentencepiece, special

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


class TestDates:
    """Templates that print today's date, as those of Llama-3.2, SmolLM3 and gpt-oss do."""

    AROUND = (
        "{{ '<u>' + strftime_now('%d %b %Y') + '<e>' }}"
        "{% for m in messages %}%s{% endfor %}{{ '<a>' }}"
    )

    @pytest.fixture
    def today(self, monkeypatch):
        """Sets the clock, ours and that of transformers."""

        def on(day):
            class Clock(datetime):
                @classmethod
                def now(cls, tz=None):
                    return datetime(2026, 11, day)

            for where in (module, chat_template_utils):
                monkeypatch.setattr(where, "datetime", Clock, raising=False)

        return on

    def test_after_midnight_the_date_is_that_of_the_day(self, today):
        tokenizer = tokenizer_with("{{ m.content + '<e>' }}", self.AROUND)
        plain = [dict(role="user", content="hello")]
        today(27)
        chat = ChatTokenizer(tokenizer)
        before = chat([Prompt("hello")])[0]
        today(28)
        after = chat([Prompt("hello")])[0]
        assert list(after.ids) == tokenizer.apply_chat_template(plain)["input_ids"]
        assert "28 Nov 2026" in tokenizer.decode(after.ids)
        today(27)
        assert chat([Prompt("hello")])[0] == before

    def test_a_template_without_a_date_is_laid_out_once(self, today):
        today(27)
        chat = ChatTokenizer(tokenizer_with("{{ m.content }}"))
        today(28)
        chat([Prompt("hello")])
        assert not chat.has_date
        assert chat._cached_frame.cache_info().currsize == 1


class TestManyMessages:
    @staticmethod
    def prompt_of(count):
        """A chat of so many messages."""
        turns = [Message(("user", "assistant")[n % 2], "a") for n in range(count - 1)]
        return Prompt("a", id="p7", history=tuple(turns))

    @pytest.mark.parametrize("count", [65, 101])
    @pytest.mark.parametrize("name", ["qwen2.5", "llama-2", "mistral"])
    def test_they_are_laid_out_as_few_are(self, name, count):
        assert_same_as_plain(FAMILIES[name].tokenizer, self.prompt_of(count))

    @pytest.mark.parametrize("count", [3, 10_001])
    def test_the_template_is_rendered_three_times_whatever_their_number(self, count, monkeypatch):
        chat = ChatTokenizer(FAMILIES["qwen2.5"].tokenizer)
        render, calls = chat._render, []
        monkeypatch.setattr(chat, "_render", lambda *a: calls.append(a) or render(*a))
        chat([self.prompt_of(count)])
        assert len(calls) == 3

    @pytest.mark.parametrize(
        "prompt", [prompt_of(81), Prompt("a", history=(Message("system", " " * 1000),))]
    )
    def test_large_frames_are_not_kept(self, prompt):
        chat = ChatTokenizer(FAMILIES["qwen2.5"].tokenizer)
        assert chat([prompt]) == chat([prompt])
        assert chat._cached_frame.cache_info().currsize == 1

    def test_more_than_the_model_reads_tokens_are_not_laid_out(self, monkeypatch):
        chat = ChatTokenizer(tokenizer_with("{{ m.content }}"), max_tokens=100)
        chat([self.prompt_of(99)])
        monkeypatch.setattr(chat, "_render", None)
        with pytest.raises(PromptError, match=r"'p7' is at least 101 tokens .* at most 100"):
            chat([self.prompt_of(101)])

    def test_empty_messages_have_no_tokens(self):
        chat = ChatTokenizer(tokenizer_with("{{ m.content }}"), max_tokens=2)
        assert chat([Prompt("a", history=(Message("system", ""),) * 9)])[0].t_inst == 0


class TestThoughts:
    """What comes before </think> in an earlier reply: many templates drop it."""

    @pytest.mark.parametrize("name", ["qwen3", "deepseek"])
    @pytest.mark.parametrize(
        "said",
        [
            "<think>\nhm, a greeting\n</think>\n\nHello.",
            "<think>\n\n</think>\n\n Hello.\n",
            "a</think>b</think>Hello.",
            "</think>Hello.",
        ],
    )
    def test_they_are_dropped_where_the_template_drops_them(self, name, said):
        turns = (Message("user", "Hi"), Message("assistant", said), Message("user", "So?"))
        turns = (*turns, Message("assistant", "No thoughts."))
        assert_same_as_plain(FAMILIES[name].tokenizer, Prompt("Thanks", history=turns))

    @pytest.mark.parametrize("name", ["qwen3", "deepseek"])
    @pytest.mark.parametrize("role", ["user", "system"])
    def test_what_others_say_is_kept(self, name, role):
        tokenizer = FAMILIES[name].tokenizer
        turns = (Message(role, "one</think>two"), Message("assistant", "three"))
        layout = ChatTokenizer(tokenizer)([Prompt("four</think>five", history=turns)])[0]
        said = tokenizer.decode(layout.ids)
        assert all(text in said for text in ("one</think>two", "four</think>five"))

    @pytest.mark.parametrize(
        "body", ["{{ m.content }}", "{{ m.content.replace('</think>', '<e>') }}"]
    )
    def test_they_stay_text_where_the_template_keeps_them(self, body):
        around = "{% for m in messages %}%s{{ '<u>' }}{% endfor %}{{ '<a></think>' }}"
        tokenizer = byte_level(around.replace("%s", body), special("<u>", "<a>", "</think>"))
        turns = (Message("user", "Hi"), Message("assistant", "<u>x</think>y<u>"))
        layout = ChatTokenizer(tokenizer)([Prompt("Thanks", history=turns)])[0]
        tokens = tokenizer.convert_ids_to_tokens(layout.ids)
        assert (tokens.count("<u>"), tokens.count("</think>")) == (3, 1)
        assert "<u>x</think>y<u>" in tokenizer.decode(layout.ids)

    def test_a_template_that_keeps_another_part_is_an_error(self):
        body = "{{ m.content.split('</think>')[1] if '</think>' in m.content else m.content }}"
        chat = ChatTokenizer(tokenizer_with(body))
        turns = (Message("user", "Hi"), Message("assistant", "a</think>b</think>c"))
        with pytest.raises(TemplateError, match="the assistant message, or shows it 0 times"):
            chat([Prompt("Thanks", history=turns)])


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
