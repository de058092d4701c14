"""Guarded chat in process: one pass fills the cache and is read; the reply goes on from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.errors import ModelError
from latentguard.models.generate import end_ids
from latentguard.models.hooks import read_positions
from latentguard.models.layout import Layout, least_tokens
from latentguard.models.loading import most_tokens
from latentguard.prompts import Prompt
from latentguard.states import States

if TYPE_CHECKING:
    from latentguard.models.chat_model import ChatModel

COLD = 1e-4
"""Below this temperature a reply is greedy: logits over less overflow float32."""

BROKEN = "\ufffd"
"""What decoding shows of a character whose bytes have not all come yet."""


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn."""

    max_tokens: int = 512
    """The longest reply."""

    temperature: float = 1.0
    """Near 0 is greedy."""

    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn."""

    seed: int | None = None
    """The same seed draws the same reply."""

    stop: tuple[str, ...] = ()
    """Texts at which the reply ends; they are left out."""


class Conversation:
    """One chat: read in one pass, then replied to from that pass's cache."""

    def __init__(
        self, model: ChatModel, prompt: Prompt, *, positions: Sequence[str], layers: Sequence[int]
    ) -> None:
        """Read the prompt.

        Args:
            model: The model.
            prompt: What is said, with its history.
            positions: Where states are kept; with none, nothing is.
            layers: At which layers.

        Raises:
            PromptError: if the prompt is empty, too long, or has no such position.
            TemplateError: if the chat template rejects it.
            ModelError: if the model keeps no cache that a reply could go on from.
        """
        self.model = model
        layout = model.chat([prompt])[0]
        model.check_length(len(layout.ids) + 1, prompt)
        columns = [layout.index(position) for position in positions]
        starts = [layout.start(position) for position in positions]
        values, output = _read(model, layout, columns, layers, starts=starts, stop=False)
        self.states = (
            States(values[None], (prompt,), tuple(positions), tuple(layers), model.fingerprint)
            if columns
            else None
        )
        """What was read, [1 p l d]; None if no position was asked for."""

        self.prompt_tokens = len(layout.ids)
        """How long the prompt is, template included."""

        self.reply_tokens = 0
        """How many tokens were drawn, the end token included."""

        self.finish = "length"
        """``stop`` once the model or a stop text has ended the reply."""

        self._logits, self._cache = output.logits[0, -1], _cache_of(output)

    def pieces(self, sampling: Sampling) -> Iterator[str]:
        """Yield the reply, a piece of text for each token; some pieces are empty."""
        ends, text = end_ids(self.model), _Text(self.model.tokenizer)
        stops, draw = _Stops(sampling.stop), _Draw(sampling)
        most = min(sampling.max_tokens, longest(self.model) - self.prompt_tokens)
        for _ in range(most):
            token = draw(self._logits)
            self.reply_tokens += 1
            if token in ends:
                self.finish = "stop"
                break
            yield stops.push(text.push(token))
            if stops.met:
                self.finish = "stop"
                return
            if self.reply_tokens < most:
                self._step(token)
        yield stops.push(text.rest()) + stops.rest()

    @torch.inference_mode()
    def _step(self, token: int) -> None:
        ids = torch.tensor([[token]], device=self.model.device)
        output = self.model.model(ids, past_key_values=self._cache, use_cache=True)
        self._logits, self._cache = output.logits[0, -1], output.past_key_values


def _cache_of(output: Any) -> Any:
    """What the reply goes on from."""
    if (cache := getattr(output, "past_key_values", None)) is None:
        raise ModelError(
            f"A reply goes on from the cache of the pass that read the prompt; this model gave a "
            f"{type(output).__name__} without one. Score its prompts, or guard another model."
        )
    return cache


def longest(model: ChatModel) -> int:
    """How many tokens a model can read, prompt and reply together."""
    return most_tokens(model.model)


def tokens_of(model: ChatModel, prompt: Prompt, most: int) -> int:
    """How many tokens a prompt has; only the least it can have, if that is more than ``most``."""
    least = least_tokens(prompt)
    return least if least > most else len(model.chat([prompt])[0].ids)


def read_instruction(
    model: ChatModel, prompt: Prompt, layers: Sequence[int]
) -> tuple[Layout, Float[Tensor, "t l d"]]:
    """The states after each token of the instruction, and the layout that names the tokens.

    Raises:
        PromptError: if the prompt is empty or too long.
    """
    layout = model.chat([prompt])[0]
    model.check_length(len(layout.ids), prompt)
    return layout, _read(model, layout, layout.instruction, layers, stop=True)[0]


@torch.inference_mode()
def _read(
    model: ChatModel,
    layout: Layout,
    columns: Sequence[int],
    layers: Sequence[int],
    *,
    starts: Sequence[int] | None = None,
    stop: bool,
) -> tuple[Float[Tensor, "p l d"], Any]:
    """States at some tokens, on the CPU, and what the model gave back (None if stopped)."""
    where, first = (
        torch.tensor([list(tokens)], dtype=torch.long, device=model.device)
        for tokens in (columns, columns if starts is None else starts)
    )
    shape = (1, len(columns), len(layers), model.width)
    buffer = torch.empty(shape, dtype=model.model.dtype, device=model.device)
    hooks = read_positions(
        model.blocks, columns=where, starts=first, layers=layers, buffer=buffer, stop=stop
    )
    ids, output = torch.tensor([layout.ids], device=model.device), None
    with hooks if columns else nullcontext():
        output = model.model(ids, use_cache=not stop, logits_to_keep=1)
    return buffer[0].cpu(), output


class _Draw:
    """Draws tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.how, self.source = sampling, torch.Generator()
        if sampling.seed is None:
            self.source.seed()
        else:
            self.source.manual_seed(sampling.seed)

    def __call__(self, logits: Float[Tensor, "v"]) -> int:
        if self.how.temperature < COLD:
            return int(logits.argmax())
        chances = (logits.float() / self.how.temperature).softmax(-1).cpu()
        if self.how.top_p < 1:
            ordered, order = chances.sort(descending=True)
            unlikely = ordered.cumsum(-1) - ordered >= self.how.top_p  # the first is always kept
            unlikely[0] = False
            chances[order[unlikely]] = 0
        return int(torch.multinomial(chances, 1, generator=self.source))


class _Text:
    """Turns tokens into text as they come; a character is shown once it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._ids = tokenizer, list[int]()
        self._from = self._shown = 0
        """Tokens before ``_shown`` were shown; decoding starts at ``_from``, for the blanks."""

    def push(self, token: int) -> str:
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(BROKEN):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return new

    def rest(self) -> str:
        return self._new()

    def _new(self) -> str:
        known, whole = self._ids[self._from : self._shown], self._ids[self._from :]
        return self._decode(whole)[len(self._decode(known)) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class _Stops:
    """Cuts a reply at the first stop text, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = [stop for stop in stops if stop], ""
        self.met = False

    def push(self, piece: str) -> str:
        text = self._held + piece
        found = [text.index(stop) for stop in self._stops if stop in text]
        if found:
            self.met, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop text."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
