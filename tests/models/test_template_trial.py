"""Chat templates that loop, print or grow without end are cut at load."""

import sys

import pytest

from latentguard.errors import TemplateError
from latentguard.models import template_limits, template_trial
from latentguard.models.chat import ChatTokenizer
from latentguard.models.template_trial import require_bounded
from latentguard.prompts import Message, Prompt
from models.tokenizers import byte_level, special

MARKS = special("<u>", "<a>")
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}%s{% endfor %}{% endfor %}"
DOUBLING = """
{% set ns = namespace(s='aaaaaaaaaa') %}
{% for i in range(100) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}
"""


@pytest.fixture
def quick(monkeypatch):
    """One second is enough for what never ends."""
    monkeypatch.setattr(template_trial, "CPU_SECONDS", 1)
    template_trial._try.cache_clear()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS.replace("%s", ""), "takes more than 1 seconds"),
        (ENDLESS.replace("%s", "word "), "writes more than 1,000,000 characters"),
        ("{{ 'a' * 10**10 }}", "needs more than 1,024 MiB of memory"),
        ("{{ messages[0].content * 10**10 }}", "needs more than 1,024 MiB of memory"),
        ("{{ 'a' | center(10**10) }}", "needs more than 1,024 MiB of memory"),
        (DOUBLING, "needs more than 1,024 MiB of memory|takes more than 1 seconds"),
        ("{{ 7 | tojson(true, 2) }}" + ENDLESS.replace("%s", ""), "takes more than 1 seconds"),
        ("{{ 7 ** (7 ** (messages | length + 9)) }}", "takes more than 1 seconds"),
        ("a" * (template_trial.MAX_TEMPLATE + 1), "has 1,048,577 characters; expected at most"),
    ],
)
def test_what_has_no_end_is_cut_at_load(quick, template, reason):
    with pytest.raises(TemplateError, match=reason):
        ChatTokenizer(byte_level(template, MARKS))


def test_what_ends_only_for_short_texts_is_cut_too(quick):
    """Marks with white space around them are tried, as they are what is rendered first."""
    loop = ENDLESS.replace("%s", "")
    template = "{% if messages[0].content | length > 9 %}" + loop + "{% endif %}{{ messages }}"
    with pytest.raises(TemplateError, match="takes more than 1 seconds"):
        ChatTokenizer(byte_level(template, MARKS))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ '<u>' + m.content }}{% endfor %}{{ '<a>' }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ strftime_now('%Y') }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m }}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ bos_token }}",
        "{{ raise_exception('no such role') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ a | nonsense }}",
        "{% broken",
    ],
)
def test_what_ends_passes_even_if_it_fails(template):
    require_bounded(template, {"bos_token": "<s>"}, ["a"])


def test_a_template_is_tried_once(monkeypatch):
    template = "{{ messages }}{# once #}"
    require_bounded(template, {}, ["a"])
    monkeypatch.setattr(template_trial.subprocess, "run", None)
    require_bounded(template, {}, ["a"])


def test_a_trial_that_cannot_be_done_is_an_error(monkeypatch):
    monkeypatch.setattr(template_trial, "SCRIPT", "raise SystemExit('no room')")
    with pytest.raises(TemplateError, match=r"could not be tried .* no room"):
        require_bounded("{{ messages }}{# not done #}", {}, ["a"])


LATER = "{% for m in messages %}{{ '<u>' + m.content }}{% endfor %}{% if messages | length > 4 %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS.replace("%s", ""), "takes more than 0.2 seconds"),
        (ENDLESS.replace("%s", "word " * 1000), "writes more than 1,000,000 characters"),
        ("{% macro f() %}" + ENDLESS.replace("%s", "") + "{% endmacro %}{{ f() }}", "takes more"),
    ],
    ids=["loops", "prints", "loops in a macro"],
)
def test_what_has_no_end_for_later_chats_is_stopped(monkeypatch, template, reason):
    monkeypatch.setattr(template_limits, "CPU_SECONDS", 0.2)
    monkeypatch.setattr(template_limits, "MAX_OUTPUT", 1_000_000)
    chat = ChatTokenizer(byte_level(LATER + template + "{% endif %}{{ '<a>' }}", MARKS))
    turns = (Message("user", "a"), Message("assistant", "b"))
    assert chat([Prompt("c", history=turns)])
    before = sys.gettrace()
    with pytest.raises(TemplateError, match=reason):
        chat([Prompt("c", history=turns * 2)])
    assert sys.gettrace() is before
