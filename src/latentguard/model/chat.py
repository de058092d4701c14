"""Chat template -> token ids and the positions t_inst, t_post and post+k (paper, section 2).

Positions come from segments, never from searching strings. The template is rendered once with a
placeholder for each message, so that the template's own text and the users' texts stay apart; the
control tokens of the template then get names that no text can spell, in the template's text and in
a copy of the tokenizer. One call tokenises the whole: ids are those of ``apply_chat_template`` for
ordinary text, while text that imitates the template stays text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from latentguard.errors import PromptError, TemplateError
from latentguard.prompts import Prompt


@dataclass(frozen=True)
class Layout:
    """One prompt as the model sees it."""

    ids: tuple[int, ...]
    """Token ids, template included, ready for the reply."""

    t_inst: int
    """Index of the last token of the user's last message."""

    @property
    def t_post(self) -> int:
        """Index of the last token of the whole prompt."""
        return len(self.ids) - 1

    def index(self, position: str) -> int:
        """Absolute index of ``t_inst``, ``t_post`` or ``post+k`` (k-th token after t_inst).

        Raises:
            PromptError: if there is no such position.
        """
        if position in ("t_inst", "t_post"):
            return int(getattr(self, position))
        found = re.fullmatch(r"post\+(\d+)", position)
        if found is None or not 1 <= int(found[1]) <= self.t_post - self.t_inst:
            most = self.t_post - self.t_inst
            raise PromptError(
                f"There is no position '{position}': this chat template has t_inst, t_post and "
                f"post+1 to post+{most}."
            )
        return self.t_inst + int(found[1])


@dataclass(frozen=True)
class _Frame:
    """A template around the messages of a chat: text, slot, text, slot, ..., text."""

    texts: tuple[str, ...]
    strips: tuple[tuple[bool, bool], ...]


class ChatTokenizer:
    """Turns prompts into layouts, for one tokenizer and its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        """Prepare the copy in which control tokens have unspeakable names.

        Args:
            tokenizer: A fast Hugging Face tokenizer with a chat template.

        Raises:
            TemplateError: if it has no chat template, or is not a fast tokenizer.
        """
        self._tokenizer = tokenizer
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
        self._nonce = secrets.token_hex(4)
        control = _control_tokens(spec, template)
        self._names = {text: f"\ue000{self._nonce}x{n}\ue001" for n, text in enumerate(control)}
        self._control_ids = frozenset(control.values())
        self._safe = _renamed(spec, self._names, control)

    def __call__(self, prompts: Iterable[Prompt]) -> list[Layout]:
        """Lay out prompts.

        Raises:
            PromptError: if a text is empty once the template has trimmed it.
            TemplateError: if the template hides a message.
        """
        prompts = list(prompts)
        placed = [self._place(prompt) for prompt in prompts]
        encodings = self._safe.encode_batch([text for text, _, _ in placed])
        return [
            Layout(tuple(encoding.ids), self._t_inst(encoding, start, stop, prompt))
            for encoding, (_, start, stop), prompt in zip(encodings, placed, prompts, strict=True)
        ]

    def _place(self, prompt: Prompt) -> tuple[str, int, int]:
        """The full text, and where in it the last user message starts and stops."""
        contents = [*(m.content for m in prompt.history), prompt.text]
        frame = self._frame((*(m.role for m in prompt.history), "user"))
        text = frame.texts[0]
        start = stop = 0
        for content, (left, right), after in zip(
            contents, frame.strips, frame.texts[1:], strict=True
        ):
            content = content.lstrip() if left else content
            content = content.rstrip() if right else content
            start, stop = len(text), len(text) + len(content)
            text += content + after
        return text, start, stop

    def _t_inst(self, encoding: Any, start: int, stop: int, prompt: Prompt) -> int:
        ids, offsets = encoding.ids, encoding.offsets
        for index in range(len(ids) - 1, -1, -1):
            begin, end = offsets[index]
            if begin < stop and end > start and ids[index] not in self._control_ids:
                return index
            if end <= start:
                break
        raise PromptError(
            f"Prompt '{prompt.id}' is empty once the chat template has trimmed it: "
            "there is no token to read t_inst at."
        )

    @functools.lru_cache(maxsize=256)  # noqa: B019 (the frames die with the tokenizer)
    def _frame(self, roles: tuple[str, ...]) -> _Frame:
        marks = [f"\ue002{self._nonce}m{n}\ue003" for n in range(len(roles))]
        tight = self._render(roles, marks)
        spaced = self._render(roles, [f"  {mark}  " for mark in marks])
        for mark, role in zip(marks, roles, strict=True):
            if tight.count(mark) != 1 or spaced.count(mark) != 1:
                raise TemplateError(
                    f"The chat template shows the {role} message {tight.count(mark)} times instead "
                    "of once, so the instruction cannot be located in it."
                )
        texts = re.split("|".join(map(re.escape, marks)), tight)
        return _Frame(tuple(map(self._rename, texts)), tuple(_strips(spaced, m) for m in marks))

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
        longest_first = sorted(self._names, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        return re.sub(pattern, lambda found: self._names[found[0]], text)


def _strips(spaced: str, mark: str) -> tuple[bool, bool]:
    """Whether the template strips white space before and after a message."""
    before, after = spaced.split(mark)
    return not before.endswith("  "), not after.startswith("  ")


def _plain_spec(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as JSON without what adds, cuts or pads tokens."""
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return spec | {"truncation": None, "padding": None, "post_processor": None}


def _control_tokens(spec: dict[str, Any], template: str) -> dict[str, int]:
    """Added tokens that are special, or that the template itself uses: text -> id."""
    return {
        token["content"]: token["id"]
        for token in spec["added_tokens"]
        if token["content"].strip() and (token["special"] or token["content"] in template)
    }


def _renamed(spec: dict[str, Any], names: dict[str, str], control: dict[str, int]) -> Tokenizer:
    """The tokenizer with its control tokens renamed and nothing else changed."""
    added = [t | {"content": names.get(t["content"], t["content"])} for t in spec["added_tokens"]]
    vocab = spec["model"].get("vocab")
    if isinstance(vocab, dict):
        vocab = {names.get(text, text): index for text, index in vocab.items()}
    elif vocab is not None:
        vocab = [[names.get(text, text), weight] for text, weight in vocab]
    model = spec["model"] | ({"vocab": vocab} if vocab is not None else {})
    safe = Tokenizer.from_str(json.dumps(spec | {"added_tokens": added, "model": model}))
    for text, index in control.items():
        if safe.encode(names[text], add_special_tokens=False).ids != [index]:
            raise TemplateError(f"The control token {text!r} cannot be kept apart from text.")
    return safe
