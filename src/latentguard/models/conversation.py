"""Guarded chat in process: one pass fills the cache and is read; the reply goes on from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.errors import ModelError
from latentguard.models.chat_model import ChatModel
from latentguard.models.generate import end_ids
from latentguard.models.hooks import contiguous_head, keep_states, read_positions
from latentguard.models.layout import CaptureRow, Layout, min_token_count, position_spans
from latentguard.models.loading import cache_argument
from latentguard.models.segments import Segments, can_be_segmented, prefill
from latentguard.prompts import Prompt
from latentguard.states import AttendedSlots, States, TokenQueries, attended_slots

GREEDY_BELOW = 1e-4
"""Below this temperature a reply is greedy: logits divided by less overflow float32."""

PLACEHOLDER = "\ufffd"
"""What decoding shows of a character whose bytes have not all come yet."""


@dataclass(frozen=True)
class Sampling:
    """How a reply is sampled."""

    max_tokens: int = 512
    """The longest reply."""

    temperature: float = 1.0
    """Near 0 is greedy."""

    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are sampled."""

    seed: int | None = None
    """The same seed gives the same reply."""

    stop: tuple[str, ...] = ()
    """Texts at which the reply ends; they are left out."""


@dataclass(frozen=True, eq=False)
class TokenProbe:
    """What scores the tokens of a reply: states times weights, summed over the layers."""

    layers: tuple[int, ...]
    """Which layers."""

    weight: Float[Tensor, "l d"]
    """One row a layer, float32, on the model's device."""


@dataclass(frozen=True)
class ReplyPiece:
    """What one token adds to a reply."""

    text: str
    """The text that is whole with it; often empty."""

    score: float | None = None
    """Of the token; None if tokens are not scored, and for what is left at the end."""


class Conversation:
    """One chat: read in one pass, then replied to from that pass's cache."""

    def __init__(
        self,
        model: ChatModel,
        prompt: Prompt,
        *,
        positions: Sequence[str],
        layers: Sequence[int],
        queries: TokenQueries | None = None,
        probe: TokenProbe | None = None,
        segments: Segments | None = None,
    ) -> None:
        """Read the prompt.

        Args:
            model: The model.
            prompt: The prompt, with its history.
            positions: Where states are captured; none is captured if empty.
            layers: At which layers.
            queries: The queries of the attended positions.
            probe: Scores each token of the reply, in the pass that reads it to go on.
            segments: How a long prompt is read while others wait; None reads it in one pass.

        Raises:
            PromptError: if the prompt is empty, too long, or has no such position.
            TemplateError: if the chat template rejects it.
            ModelError: if the model keeps no cache that a reply could go on from.
        """
        self.model = model
        layout = model.chat([prompt])[0]
        model.check_length(len(layout.ids) + 1, prompt)
        row = CaptureRow(layout.ids, tuple(position_spans(layout, positions)))
        attended = attended_slots(positions, layers, queries)
        if segments and row.length > segments.size and can_be_segmented(model, row):
            values, output = prefill(model, row, layers, segments, attended=attended, stop=False)
        else:
            values, output = _read(model, row, layers, attended=attended, stop=False)
        self.states = (
            States(values[None], (prompt,), tuple(positions), tuple(layers), model.fingerprint)
            if positions
            else None
        )
        """The captured states, [1 p l d]; None if no position was asked for."""

        self.prompt_tokens = len(layout.ids)
        """How long the prompt is, template included."""

        self.reply_tokens = 0
        """How many tokens were sampled, the end token included."""

        self.finish = "length"
        """``stop`` once the model or a stop text has ended the reply."""

        self._probe = probe
        self._logits = output.logits[0, -1]
        self._cache = _require_cache(model.model, output)

    def pieces(self, sampling: Sampling) -> Iterator[ReplyPiece]:
        """Yield the reply, a piece for each token.

        With a probe, a token is read before it is shown, the last one too.
        """
        ends = end_ids(self.model)
        text = _TextStream(self.model.tokenizer)
        stops = _StopTexts(sampling.stop)
        sample = _Sampler(sampling)
        limit = min(sampling.max_tokens, self.model.max_tokens - self.prompt_tokens)
        for _ in range(limit):
            token = sample(self._logits)
            self.reply_tokens += 1
            if token in ends:
                self.finish = "stop"
                break
            score = None if self._probe is None else self._scored_step(token, self._probe)
            yield ReplyPiece(stops.push(text.push(token)), score)
            if stops.is_met:
                self.finish = "stop"
                return
            if self._probe is None and self.reply_tokens < limit:
                self._step(token)
        yield ReplyPiece(stops.push(text.flush()) + stops.flush())

    def _scored_step(self, token: int, probe: TokenProbe) -> float:
        """Read a token; returns its score."""
        states = dict[int, Tensor]()
        with keep_states(self.model.blocks, layers=probe.layers, states=states):
            self._step(token)
        weight = probe.weight  # one product for all layers: each by itself costs a token 1 % more
        rows = [states[slot][0, -1].to(weight.device) for slot in range(len(weight))]
        return float((torch.stack(rows).float() * weight).sum())

    @torch.inference_mode()
    def _step(self, token: int) -> None:
        ids = torch.tensor([[token]], device=self.model.device)
        network = self.model.model
        output = network(ids, use_cache=True, **{cache_argument(network): self._cache})
        self._logits = output.logits[0, -1]
        self._cache = _require_cache(network, output)


def _require_cache(network: Any, output: Any) -> Any:
    """What the reply goes on from."""
    cache = getattr(output, cache_argument(network), None)
    if cache is None:
        raise ModelError(
            f"A reply goes on from the cache of the pass that read the prompt; this model gave a "
            f"{type(output).__name__} without one. Score its prompts, or guard another model."
        )
    return cache


def count_tokens(model: ChatModel, prompt: Prompt, limit: int) -> int:
    """How many tokens a prompt has; only the least it can have, if that is over ``limit``."""
    fewest = min_token_count(prompt)
    return fewest if fewest > limit else len(model.chat([prompt])[0].ids)


def capture_tokens(
    model: ChatModel, prompt: Prompt, layers: Sequence[int], segments: Segments | None = None
) -> tuple[Layout, Float[Tensor, "t l d"]]:
    """The states of each token from the instruction on, and the layout that names the tokens.

    Args:
        model: The model.
        prompt: The prompt.
        layers: At which layers.
        segments: How a long prompt is read while others wait; None reads it in one pass.

    Raises:
        PromptError: if the prompt is empty or too long.
    """
    layout = model.chat([prompt])[0]
    model.check_length(len(layout.ids), prompt)
    columns = range(layout.instruction.start, len(layout.ids))
    row = CaptureRow(layout.ids, tuple((column, column) for column in columns))
    if segments and row.length > segments.size and can_be_segmented(model, row):
        return layout, prefill(model, row, layers, segments, stop=True)[0]
    return layout, _read(model, row, layers, stop=True)[0]


@torch.inference_mode()
def _read(
    model: ChatModel,
    row: CaptureRow,
    layers: Sequence[int],
    *,
    attended: AttendedSlots | None = None,
    stop: bool,
) -> tuple[Float[Tensor, "p l d"], Any]:
    """States at some tokens, on the CPU, and what the model gave back (None if stopped)."""
    places = torch.tensor(row.spans, dtype=torch.long, device=model.device).view(1, -1, 2)
    starts, columns = places.unbind(-1)
    shape = (1, len(row.spans), len(layers), model.width)
    buffer = torch.empty(shape, dtype=model.model.dtype, device=model.device)
    hooks = read_positions(
        model.blocks,
        columns=columns,
        starts=starts,
        layers=layers,
        buffer=buffer,
        attended=attended,
        stop=stop,
    )
    ids = torch.tensor([row.ids], device=model.device)
    output = None
    with hooks if row.spans else nullcontext(), contiguous_head(model.model):
        output = model.model(ids, use_cache=not stop, logits_to_keep=1)
    return buffer[0].cpu(), output


class _Sampler:
    """Samples tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: Float[Tensor, "v"]) -> int:
        temperature, top_p = self._sampling.temperature, self._sampling.top_p
        if temperature < GREEDY_BELOW:
            return int(logits.argmax())
        chances = (logits.float() / temperature).softmax(-1).cpu()
        if top_p < 1:
            ordered, order = chances.sort(descending=True)
            unlikely = ordered.cumsum(-1) - ordered >= top_p
            unlikely[0] = False  # the likeliest token always stays
            chances[order[unlikely]] = 0
        return int(torch.multinomial(chances, 1, generator=self._generator))


class _TextStream:
    """Turns tokens into text as they come; a character is shown once it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids = list[int]()
        self._start = 0
        """Decoding starts at this token, so that blanks between tokens are right."""

        self._shown = 0
        """The text of the tokens before this one was shown."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is new and whole."""
        self._ids.append(token)
        new = self.flush()
        if not new or new.endswith(PLACEHOLDER):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return new

    def flush(self) -> str:
        """The text that was not shown yet, whole or not."""
        beginning = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(beginning) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class _StopTexts:
    """Cuts a reply at the first stop text, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._pending = ""
        self.is_met = False

    def push(self, piece: str) -> str:
        """Add a piece of the reply; returns what can be shown."""
        text = self._pending + piece
        starts = [text.index(stop) for stop in self._stops if stop in text]
        if starts:
            self.is_met = True
            self._pending = ""
            return text[: min(starts)]
        overlap = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - overlap :]
        return text[: len(text) - overlap]

    def flush(self) -> str:
        """What was held back."""
        pending, self._pending = self._pending, ""
        return pending


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop text."""
    limit = min(len(text), len(stop) - 1)
    return next((n for n in range(limit, 0, -1) if text.endswith(stop[:n])), 0)
