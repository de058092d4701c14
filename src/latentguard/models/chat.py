"""Chat template -> token ids and the positions t_inst, t_post and post+k (paper, section 2).

Positions come from segments, never from searching strings. The template is rendered once with a
placeholder for each message, so that the template's own text and the users' texts stay apart; the
control tokens of the template then get names that no text can spell, in the template's text and in
a copy of the tokenizer. One call tokenises the whole: ids are those of ``apply_chat_template`` for
ordinary text, while text that imitates the template stays text.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tokenizers import Tokenizer

from latentguard.errors import PromptError, TemplateError
from latentguard.models.layout import (
    Layout,
    ReplyLayout,
    TemplateFrame,
    Turn,
    chat_turns,
    infer_strips,
    min_token_count,
    too_long_error,
)
from latentguard.models.template_limits import template_limits
from latentguard.models.template_trial import require_bounded
from latentguard.models.thinking_places import CLOSE, OPEN
from latentguard.prompts import Message, Prompt

MAX_CACHED_TURNS = 64
"""Frames of chats with more turns are not cached."""

MAX_CACHED_CHARACTERS = 256
"""Frames of chats whose turns begin with more characters than these are not cached."""


@dataclass(frozen=True)
class _RenderedPrompt:
    """A prompt inside its template, as text."""

    text: str
    """The whole text, with the names of control tokens that no user can spell."""

    start: int
    """Where the last user message starts in the text."""

    stop: int
    """Where the last user message stops in the text."""

    origin: int
    """Where the last user message would start had the template not trimmed it."""


class ChatTokenizer:
    """Turns prompts into layouts, for one tokenizer and its chat template."""

    def __init__(
        self, tokenizer: Any, *, max_tokens: int = 1 << 62, template: str | None = None
    ) -> None:
        """Prepare the copy in which control tokens have unspeakable names.

        Args:
            tokenizer: A fast Hugging Face tokenizer with a chat template.
            max_tokens: Tokens that the model reads; a chat of more messages is not even laid out.
            template: A Jinja template that takes the place of the tokenizer's own.

        Raises:
            TemplateError: if it has no chat template, one that hides the user's message or does
                not come to an end, or is not a fast tokenizer.
        """
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        template = _require_template(tokenizer, template)
        self.template = template
        spec = _plain_spec(tokenizer)
        self.tokenizer_digest = hashlib.sha256(json.dumps(spec).encode()).hexdigest()
        self.template_digest = hashlib.sha256(template.encode()).hexdigest()
        self.has_date = "strftime_now" in template
        """Whether the template may print today's date."""

        self.has_thoughts = CLOSE in template
        """Whether the template knows of thinking; many drop it from earlier replies."""

        self._nonce = secrets.token_hex(4)
        self._marks = re.compile(self._mark("([0-9]+)"))
        mark = self._mark(0).replace(self._nonce, "")
        require_bounded(template, tokenizer.special_tokens_map, ["a", mark, f"\n{mark}\n\n"])
        control = _control_tokens(spec, template + self._sample())
        self._names = {text: f"\ue000{self._nonce}x{n}\ue001" for n, text in enumerate(control)}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)))
        # text may hold unknown tokens, whatever the template holds
        self._control_ids = frozenset(control.values()) - {_unknown_id(spec["model"])}
        self._safe_tokenizer = _rename_control_tokens(spec, self._names, control)
        self._cached_frame = functools.lru_cache(maxsize=256)(self._build_frame)
        self._fit_frame(())

    def __call__(self, prompts: Iterable[Prompt]) -> list[Layout]:
        """Lay out prompts.

        Raises:
            PromptError: if a text is empty once the template has trimmed it, or is not Unicode, or
                if there are more messages than the model reads tokens.
            TemplateError: if the template hides a message or rejects the order of the roles.
        """
        prompts = list(prompts)
        rendered = [self._render_prompt(prompt) for prompt in prompts]
        encodings = self._safe_tokenizer.encode_batch([one.text for one in rendered])
        return [
            self._layout(encoding.ids, encoding.offsets, one, prompt)
            for encoding, one, prompt in zip(encodings, rendered, prompts, strict=True)
        ]

    def lay_out_reply(self, prompt: Prompt, text: str) -> ReplyLayout:
        """Lay out a prompt and the text of a reply to it, as the model would have written it.

        Raises:
            PromptError: as for a prompt, or if the reply is empty or not Unicode.
            TemplateError: as for a prompt.
        """
        _require_unicode(text, prompt)
        [layout] = self([prompt])
        start = len(layout.ids)
        whole = self._safe_tokenizer.encode(self._render_prompt(prompt).text + text).ids
        if tuple(whole[:start]) != layout.ids:  # the reply's first letters join the template's last
            whole = [*layout.ids, *self._safe_tokenizer.encode(text).ids]
        if len(whole) == start:
            raise PromptError(f"Reply '{prompt.id}' is empty: there is no token to read.")
        return ReplyLayout(tuple(whole), start)

    def _layout(
        self,
        ids: list[int],
        offsets: list[tuple[int, int]],
        rendered: _RenderedPrompt,
        prompt: Prompt,
    ) -> Layout:
        t_inst = self._find_t_inst(ids, offsets, rendered, prompt)
        first = t_inst
        while first and offsets[first - 1][1] > rendered.start and self._is_text(ids[first - 1]):
            first -= 1
        start, stop, origin = rendered.start, rendered.stop, rendered.origin
        spans = (  # a token may reach over the edges of the message
            (max(begin, start) - origin, min(end, stop) - origin)
            for begin, end in offsets[first : t_inst + 1]
        )
        return Layout(tuple(ids), t_inst, tuple(spans))

    def _is_text(self, index: int) -> bool:
        return index not in self._control_ids

    def _render_prompt(self, prompt: Prompt) -> _RenderedPrompt:
        fewest = min_token_count(prompt)
        if fewest > self._max_tokens:
            raise too_long_error(prompt, f"at least {fewest:,}", self._max_tokens)
        frame, earlier = self._fit_frame(prompt.history)
        contents = [*earlier, prompt.text]
        text = frame.texts[0]
        start = stop = trimmed = 0
        for n, (left, right), after in zip(frame.order, frame.strips, frame.texts[1:], strict=True):
            content = contents[n].lstrip(left).rstrip(right)
            if n == len(earlier):
                start, stop = len(text), len(text) + len(content)
                trimmed = len(prompt.text) - len(prompt.text.lstrip(left))
            text += content + after
        _require_unicode(text, prompt)
        return _RenderedPrompt(text, start, stop, start - trimmed)

    def _find_t_inst(
        self,
        ids: list[int],
        offsets: list[tuple[int, int]],
        rendered: _RenderedPrompt,
        prompt: Prompt,
    ) -> int:
        start, stop = rendered.start, rendered.stop
        for index in range(len(ids) - 1, -1, -1) if start < stop else ():
            begin, end = offsets[index]
            if begin < stop and end > start and self._is_text(ids[index]):
                return index
            if end <= start:
                break
        raise PromptError(
            f"Prompt '{prompt.id}' is empty once the chat template has trimmed it: "
            "there is no token to read t_inst at."
        )

    def _fit_frame(self, history: Sequence[Message]) -> tuple[TemplateFrame, list[str]]:
        """The frame of a chat, and what of each earlier message goes into its slot.

        Thoughts are left out if the template, which is shown them, writes what it writes without
        them: it has dropped them, and no user's words became the template's text.
        """
        day = self._today()
        whole = [message.content for message in history]
        replies = [self._without_thoughts(message) for message in history]
        if replies != whole:
            thoughts = [a.removesuffix(b) for a, b in zip(whole, replies, strict=True)]
            with_thoughts = self._build_frame(day, chat_turns(history, replies, thoughts))
            if with_thoughts.has_same_text(self._frame(day, chat_turns(history, replies))):
                return with_thoughts, replies
        return self._frame(day, chat_turns(history, whole)), whole

    def _without_thoughts(self, message: Message) -> str:
        if self.has_thoughts and message.role == "assistant":
            return message.content.rpartition(CLOSE)[2]
        return message.content

    def _today(self) -> str:
        """The date if the template may print it, by the clock that ``strftime_now`` reads."""
        return str(datetime.now().date()) if self.has_date else ""

    def _frame(self, day: str, turns: tuple[Turn, ...]) -> TemplateFrame:
        """The frame, cached if it is small; others would fill the memory."""
        characters = sum(len(turn.front) for turn in turns)
        is_small = len(turns) <= MAX_CACHED_TURNS and characters <= MAX_CACHED_CHARACTERS
        return self._cached_frame(day, turns) if is_small else self._build_frame(day, turns)

    def _build_frame(self, _day: str, turns: tuple[Turn, ...]) -> TemplateFrame:
        """Find the frame; the cache keeps one for each day, as the template may print it."""
        plain_order, plain = self._split_at_marks(turns, "", "")
        spaced_order, spaced = self._split_at_marks(turns, " ", "  ")
        lined_order, lined = self._split_at_marks(turns, "\n", "\n\n")
        if not plain_order == spaced_order == lined_order:
            raise TemplateError("The chat template moves messages depending on their white space.")
        strips = infer_strips(plain, spaced, lined)
        return TemplateFrame(tuple(map(self._rename, plain)), plain_order, strips)

    def _mark(self, number: int | str) -> str:
        """Stands for a message; mixed case and mark-up show templates that change what they get."""
        return f"\ue002{self._nonce}m{number}Aa<&'\"\ue003"

    def _split_at_marks(
        self, turns: Sequence[Turn], left: str, right: str
    ) -> tuple[tuple[int, ...], list[str]]:
        """Which message stands in each slot, and the template's text around the slots."""
        contents = [
            turn.front + turn.has_slot * f"{left}{self._mark(n)}{right}"
            for n, turn in enumerate(turns)
        ]
        pieces = self._marks.split(self._render([turn.role for turn in turns], contents))
        order = tuple(map(int, pieces[1::2]))
        counts = Counter(order)
        for n, turn in enumerate(turns):
            if turn.has_slot and counts[n] != 1:
                raise TemplateError(
                    f"The chat template changes the {turn.role} message, or shows it {counts[n]} "
                    "times instead of once, so the instruction cannot be located in it."
                )
        return order, pieces[::2]

    def _sample(self) -> str:
        """What the template writes, to see the tokens that it puts together from parts."""
        text = self._render(["user"], ["a"])
        with contextlib.suppress(TemplateError):  # not every template takes several turns
            text += self._render(["user", "assistant", "user"], ["a"] * 3)
        return text

    @property
    def opens_thinking(self) -> bool:
        """Whether the template opens the model's thinking, so that a reply begins inside it."""
        return self._render(["user"], ["a"]).rstrip().endswith(OPEN)

    def _render(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        chat = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        try:
            with template_limits():
                return str(
                    self._tokenizer.apply_chat_template(
                        chat,
                        chat_template=self.template,
                        tokenize=False,
                        add_generation_prompt=True,
                    )
                )
        except TemplateError:  # it was stopped
            raise
        except Exception as error:  # a template may raise anything
            reason = str(error).split("\n")[0]
            raise TemplateError(
                f"The chat template rejects the roles {', '.join(roles)}: {reason}"
            ) from error

    def _rename(self, text: str) -> str:
        if not self._names:
            return text
        return self._control_pattern.sub(lambda match: self._names[match[0]], text)


def _require_template(tokenizer: Any, template: str | None) -> str:
    template = template or getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        raise TemplateError(
            "This tokenizer has no single chat template, so t_inst and t_post are undefined. "
            "Use a chat (instruct) model, or set tokenizer.chat_template."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateError("A fast tokenizer is needed (one with a tokenizer.json).")
    return template


def _require_unicode(text: str, prompt: Prompt) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"Prompt '{prompt.id}' is not valid Unicode ({error.reason})."
        raise PromptError(reason) from None


def _plain_spec(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as JSON without what adds, cuts or pads tokens."""
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return spec | {"truncation": None, "padding": None, "post_processor": None}


def _control_tokens(spec: dict[str, Any], wording: str) -> dict[str, int]:
    """Added tokens that are special, or that the template itself uses: text -> id."""
    return {
        token["content"]: token["id"]
        for token in spec["added_tokens"]
        if token["content"].strip() and (token["special"] or token["content"] in wording)
    }


def _unknown_id(model: dict[str, Any]) -> int | None:
    index = model["unk_id"] if "unk_id" in model else model["vocab"].get(model.get("unk_token"))
    return None if index is None else int(index)


def _rename_control_tokens(
    spec: dict[str, Any], names: dict[str, str], control: dict[str, int]
) -> Tokenizer:
    """The tokenizer with its control tokens renamed and nothing else changed."""
    added = [t | {"content": names.get(t["content"], t["content"])} for t in spec["added_tokens"]]
    model = _rename_in_model(spec["model"], names)
    safe = Tokenizer.from_str(json.dumps(spec | {"added_tokens": added, "model": model}))
    for text, index in control.items():
        if safe.encode(names[text], add_special_tokens=False).ids != [index]:
            raise TemplateError(f"The control token {text!r} cannot be kept apart from text.")
    return safe


def _rename_in_model(model: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    vocab = model["vocab"]
    unknown = model.get("unk_token")
    if isinstance(vocab, dict):
        vocab = {names.get(text, text): index for text, index in vocab.items()}
    else:
        vocab = [[names.get(text, text), weight] for text, weight in vocab]
    model = model | {"vocab": vocab}
    if unknown is not None:
        model["unk_token"] = names.get(unknown, unknown)
    if "merges" in model:  # text must not merge into a control token either
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [(a, b) for a, b in pairs if names.keys().isdisjoint((a, b, a + b))]
    return model
