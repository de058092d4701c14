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
    Frame,
    Layout,
    Turn,
    least_tokens,
    strips_of,
    too_long,
    turns_of,
)
from latentguard.prompts import Message, Prompt

TURNS, TEXTS = 64, 256
"""Frames are kept of chats with no more turns, and no more characters in what turns begin with."""

THOUGHT = "</think>"
"""Ends the thoughts that many templates drop from earlier replies."""


@dataclass(frozen=True)
class _Placed:
    """A prompt in its template."""

    text: str
    start: int
    """Where the last user message starts in the text, and where it stops."""

    stop: int
    origin: int
    """Where it would start had the template not trimmed it."""


class ChatTokenizer:
    """Turns prompts into layouts, for one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any, *, most: int = 1 << 62) -> None:
        """Prepare the copy in which control tokens have unspeakable names.

        Args:
            tokenizer: A fast Hugging Face tokenizer with a chat template.
            most: Tokens that the model reads; a chat of more messages is not even laid out.

        Raises:
            TemplateError: if it has no chat template, one that hides the user's message, or is
                not a fast tokenizer.
        """
        self._tokenizer, self._most = tokenizer, most
        template = getattr(tokenizer, "chat_template", None)
        if not isinstance(template, str):
            raise TemplateError(
                "This tokenizer has no single chat template, so t_inst and t_post are undefined. "
                "Use a chat (instruct) model, or set tokenizer.chat_template."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise TemplateError("A fast tokenizer is needed (one with a tokenizer.json).")
        spec = _plain_spec(tokenizer)
        self.tokenizer_digest = hashlib.sha256(json.dumps(spec).encode()).hexdigest()
        self.template_digest = hashlib.sha256(template.encode()).hexdigest()
        self.dated = "strftime_now" in template
        """Whether the template may print today's date."""

        self._thinks = THOUGHT in template
        self._nonce = secrets.token_hex(4)
        self._marks = re.compile(self._mark("([0-9]+)"))
        control = _control_tokens(spec, template + self._sample())
        self._names = {text: f"\ue000{self._nonce}x{n}\ue001" for n, text in enumerate(control)}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)))
        # text may hold unknown tokens, whatever the template holds
        self._control_ids = frozenset(control.values()) - {_unknown_id(spec["model"])}
        self._safe = _renamed(spec, self._names, control)
        self._frame = functools.lru_cache(maxsize=256)(self._new_frame)
        self._fitted(())

    def __call__(self, prompts: Iterable[Prompt]) -> list[Layout]:
        """Lay out prompts.

        Raises:
            PromptError: if a text is empty once the template has trimmed it, or is not Unicode, or
                if there are more messages than the model reads tokens.
            TemplateError: if the template hides a message or rejects the order of the roles.
        """
        prompts = list(prompts)
        placed = [self._place(prompt) for prompt in prompts]
        encodings = self._safe.encode_batch([one.text for one in placed])
        return [
            self._layout(encoding.ids, encoding.offsets, one, prompt)
            for encoding, one, prompt in zip(encodings, placed, prompts, strict=True)
        ]

    def _layout(
        self, ids: list[int], offsets: list[tuple[int, int]], placed: _Placed, prompt: Prompt
    ) -> Layout:
        t_inst = self._t_inst(ids, offsets, placed, prompt)
        first = t_inst
        while first and offsets[first - 1][1] > placed.start and self._is_text(ids[first - 1]):
            first -= 1
        inside = (  # a token may reach over the edges of the message
            (max(begin, placed.start) - placed.origin, min(end, placed.stop) - placed.origin)
            for begin, end in offsets[first : t_inst + 1]
        )
        return Layout(tuple(ids), t_inst, tuple(inside))

    def _is_text(self, index: int) -> bool:
        return index not in self._control_ids

    def _place(self, prompt: Prompt) -> _Placed:
        if (least := least_tokens(prompt)) > self._most:
            raise too_long(prompt, f"at least {least:,}", self._most)
        frame, said = self._fitted(prompt.history)
        contents = [*said, prompt.text]
        text = frame.texts[0]
        start = stop = cut = 0
        for n, (left, right), after in zip(frame.order, frame.strips, frame.texts[1:], strict=True):
            content = contents[n].lstrip(left).rstrip(right)
            if n == len(said):
                start, stop = len(text), len(text) + len(content)
                cut = len(prompt.text) - len(prompt.text.lstrip(left))
            text += content + after
        return _Placed(_unicode(text, prompt), start, stop, start - cut)

    def _t_inst(
        self, ids: list[int], offsets: list[tuple[int, int]], placed: _Placed, prompt: Prompt
    ) -> int:
        start, stop = placed.start, placed.stop
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

    def _fitted(self, history: Sequence[Message]) -> tuple[Frame, list[str]]:
        """The frame of a chat, and what of each earlier message goes into its slot.

        Thoughts are left out if the template, which is shown them, writes what it writes without
        them: it has dropped them, and nothing that was said became the template's text.
        """
        day, whole = self._today(), [m.content for m in history]
        if (rest := [self._thoughtless(m) for m in history]) != whole:
            thoughts = [a.removesuffix(b) for a, b in zip(whole, rest, strict=True)]
            shown = self._new_frame(day, turns_of(history, rest, thoughts))
            if shown.same_text(self._framed(day, turns_of(history, rest))):
                return shown, rest
        return self._framed(day, turns_of(history, whole)), whole

    def _thoughtless(self, message: Message) -> str:
        thinks = self._thinks and message.role == "assistant"
        return message.content.rpartition(THOUGHT)[2] if thinks else message.content

    def _today(self) -> str:
        """The date if the template may print it, by the clock that ``strftime_now`` reads."""
        return str(datetime.now().date()) if self.dated else ""

    def _framed(self, day: str, turns: tuple[Turn, ...]) -> Frame:
        """The frame, kept if it is small; others would fill the memory."""
        small = len(turns) <= TURNS and sum(len(text) for _, text, _ in turns) <= TEXTS
        return (self._frame if small else self._new_frame)(day, turns)

    def _new_frame(self, _day: str, turns: tuple[Turn, ...]) -> Frame:  # a frame is of its day
        tight, spaced, lined = (
            self._split(turns, *edges) for edges in (("", ""), (" ", "  "), ("\n", "\n\n"))
        )
        if not tight[0] == spaced[0] == lined[0]:
            raise TemplateError("The chat template moves messages depending on their white space.")
        strips = strips_of(tight[1], spaced[1], lined[1])
        return Frame(tuple(map(self._rename, tight[1])), tight[0], strips)

    def _mark(self, number: int | str) -> str:
        """Stands for a message; mixed case and mark-up show templates that change what they get."""
        return f"\ue002{self._nonce}m{number}Aa<&'\"\ue003"

    def _split(
        self, turns: Sequence[Turn], left: str, right: str
    ) -> tuple[tuple[int, ...], list[str]]:
        """Which message stands in each slot, and the template's text around the slots."""
        contents = [
            text + slot * f"{left}{self._mark(n)}{right}" for n, (_, text, slot) in enumerate(turns)
        ]
        pieces = self._marks.split(self._render([role for role, *_ in turns], contents))
        order = tuple(map(int, pieces[1::2]))
        shown = Counter(order)
        for n, (role, _, slot) in enumerate(turns):
            if slot and shown[n] != 1:
                raise TemplateError(
                    f"The chat template changes the {role} message, or shows it {shown[n]} times "
                    "instead of once, so the instruction cannot be located in it."
                )
        return order, pieces[::2]

    def _sample(self) -> str:
        """What the template writes, to see the tokens that it puts together from parts."""
        text = self._render(["user"], ["a"])
        with contextlib.suppress(TemplateError):  # not every template takes several turns
            text += self._render(["user", "assistant", "user"], ["a"] * 3)
        return text

    def _render(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        chat = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a template may raise anything
            reason = str(error).split("\n")[0]
            raise TemplateError(
                f"The chat template rejects the roles {', '.join(roles)}: {reason}"
            ) from error

    def _rename(self, text: str) -> str:
        if not self._names:
            return text
        return self._spelled.sub(lambda found: self._names[found[0]], text)


def _unicode(text: str, prompt: Prompt) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"Prompt '{prompt.id}' is not valid Unicode ({error.reason})."
        raise PromptError(reason) from None
    return text


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


def _renamed(spec: dict[str, Any], names: dict[str, str], control: dict[str, int]) -> Tokenizer:
    """The tokenizer with its control tokens renamed and nothing else changed."""
    added = [t | {"content": names.get(t["content"], t["content"])} for t in spec["added_tokens"]]
    model = _renamed_model(spec["model"], names)
    safe = Tokenizer.from_str(json.dumps(spec | {"added_tokens": added, "model": model}))
    for text, index in control.items():
        if safe.encode(names[text], add_special_tokens=False).ids != [index]:
            raise TemplateError(f"The control token {text!r} cannot be kept apart from text.")
    return safe


def _renamed_model(model: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    vocab, unknown = model["vocab"], model.get("unk_token")
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
