"""ChatModel: a Hugging Face chat model that captures states (implements Backend)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentguard.errors import ModelError, PromptError
from latentguard.interventions import Edit
from latentguard.models.chat import ChatTokenizer
from latentguard.models.generate import sweep
from latentguard.models.hooks import decoder_blocks, read_positions, score_tokens
from latentguard.models.layout import CaptureRow, common_prefix_length, too_long_error
from latentguard.models.loading import (
    cache_argument,
    context_length,
    is_sharded,
    load_checkpoint,
    unscaled_length,
)
from latentguard.models.prefill import has_only_keys_and_values
from latentguard.models.reply_loss import reply_losses
from latentguard.models.reply_states import capture_replies, capture_thinking
from latentguard.models.shared_prompt import pad_tokens
from latentguard.models.weights_digest import execution_device, weights_digest
from latentguard.prompts import Prompt, PromptLike, Reply, as_prompts
from latentguard.states import (
    AttendedSlots,
    Fingerprint,
    Progress,
    States,
    TokenQueries,
    attended_slots,
    progress_bar,
)

T = TypeVar("T")

PROMPTS_PER_STATES = 256
"""Prompts that are sorted by length and yielded together; bounds memory, whatever their number."""

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 32768}
"""Padded tokens in one forward pass."""

MAX_PREFIX_TOKENS = 1024
"""Tokens of a prompt beyond which the mask that a cache needs costs more than the cache saves."""


@dataclass
class _Prefix:
    """Keys and values of the tokens with which every prompt begins."""

    ids: tuple[int, ...]
    """The tokens; none if they cannot be shared."""

    cache: Any
    """Their keys and values, a cache of transformers."""

    last_layer: int
    """The cache is filled up to this layer."""


class ChatModel:
    """A chat model on transformers.

    Examples:
        >>> model = lg.ChatModel.load("default")  # doctest: +SKIP
        >>> states = next(model.capture(["Hello."]))
        >>> reply = model.generate(["Hello."], max_new_tokens=3)[0]
        >>> len(reply.ids) <= 3
        True
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        source: str = "",
        quantized: str = "",
        template: str | None = None,
    ) -> None:
        """Wrap a loaded model; ``ChatModel.load`` is the usual way.

        Args:
            model: The network.
            tokenizer: Its fast tokenizer.
            source: Where both came from.
            quantized: How the weights were quantised on loading.
            template: A Jinja template that takes the place of the tokenizer's own.

        Raises:
            ModelError: if the decoder blocks cannot be found.
            TemplateError: if the tokenizer has no usable chat template.
        """
        self.model: Any = model.eval()  # not nn.Module: it types each attribute as a tensor
        self.tokenizer = tokenizer
        self.chat = ChatTokenizer(tokenizer, max_tokens=context_length(model), template=template)
        self.source = source
        self.quantized = quantized
        self.blocks = decoder_blocks(model)
        self._unscaled_length = unscaled_length(model)
        self.tokens_per_batch = TOKENS_PER_BATCH.get(self.device.type, 8192)
        self._prefix: _Prefix | None = None
        self._fingerprint: Fingerprint | None = None

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> ChatModel:
        """Load a Hub id, a folder, a GGUF file, or ``default``.

        Args:
            source: What to load.
            dtype: ``float32``, ``bfloat16``, ...; ``auto`` is float32 on a CPU, else bfloat16.
                With ``/int8`` or ``/nf4`` behind it the weights are quantised (``loading.py``).
            device: ``cpu``, ``cuda``, ...; a GPU is used if there is one.
            options: Passed to ``from_pretrained`` (``device_map``, ``tp_plan``,
                ``distributed_config``, ``quantization_config``, ...). If they place the model,
                ``device`` does not.

        Raises:
            ModelError: if it cannot be found or loaded; says why.
        """
        loaded = load_checkpoint(source, dtype, device, options)
        model = cls(loaded.network, loaded.tokenizer, source=str(source), quantized=loaded.scheme)
        if hasattr(loaded.network.config, "quantization_config"):
            _ = model.fingerprint  # now: bitsandbytes packs weights anew in the first pass
        return model

    def with_template(self, template: str) -> ChatModel:
        """The same network, prompted by another Jinja template; its fingerprint tells of it.

        Raises:
            TemplateError: if the template hides the user's message.
        """
        other = ChatModel(
            self.model,
            self.tokenizer,
            source=self.source,
            quantized=self.quantized,
            template=template,
        )
        if self._fingerprint is not None:  # digests of packed weights are those of before a pass
            digest = other.chat.template_digest
            other._fingerprint = replace(self._fingerprint, template=digest)
        return other

    @property
    def opens_thinking(self) -> bool:
        """Whether the chat template opens the thinking before the reply."""
        return self.chat.opens_thinking

    @property
    def may_think(self) -> bool:
        """Whether the chat template knows of thinking, so that replies may hold some."""
        return self.opens_thinking or self.chat.has_thoughts

    @property
    def model_type(self) -> str:
        """The architecture by its name in the configuration, such as ``llama``."""
        return str(self.model.config.model_type)

    @property
    def device(self) -> torch.device:
        """Where the token embeddings are read."""
        return execution_device(self.model.get_input_embeddings())

    @property
    def depth(self) -> int:
        """Number of blocks L; layers run from 0 to L."""
        return len(self.blocks)

    @property
    def post(self) -> int:
        """Number of post-instruction tokens; t_post is post+this."""
        layout = self.chat([Prompt("a")])[0]
        return layout.t_post - layout.t_inst

    @property
    def width(self) -> int:
        """Width d of the residual stream."""
        config = self.model.config.get_text_config(decoder=True)
        return int(config.hidden_size)

    @property
    def max_tokens(self) -> int:
        """How many tokens the model reads, prompt and reply together."""
        return context_length(self.model)

    @property
    def fingerprint(self) -> Fingerprint:
        """What a guard of this model is bound to; computed once."""
        if self._fingerprint is None:
            dtype = str(self.model.dtype).removeprefix("torch.")
            self._fingerprint = Fingerprint(
                model=self.source,
                weights=weights_digest(self.model),
                tokenizer=self.chat.tokenizer_digest,
                template=self.chat.template_digest,
                dtype="/".join(filter(None, (dtype, self.quantized))),
            )
        return self._fingerprint

    def capture(
        self,
        prompts: Iterable[PromptLike],
        *,
        positions: Sequence[str] = ("t_inst", "t_post"),
        layers: Sequence[int] | None = None,
        queries: TokenQueries | None = None,
        progress: Progress | None = None,
    ) -> Iterator[States]:
        """Yield states in the order of the prompts, ``PROMPTS_PER_STATES`` at a time.

        Args:
            prompts: What to read: texts, prompts or chats; consumed lazily.
            positions: ``t_inst``, ``t_post``, ``post+k``, ``mean`` (over the instruction's tokens)
                or ``post`` (over those after it), ``attended+k`` (a weighted ``mean``).
            layers: Layer indices; all, from 0 (embedding output) to L, if None.
            queries: The queries of the attended positions.
            progress: Called after each batch with its number of prompts; a bar is shown if there
                is none and a person is at an interactive prompt or in a notebook.

        Raises:
            PromptError: if a prompt is empty, too long, or has no such position.

        Examples:
            >>> next(model.capture(["Hello."], positions=("t_inst",), layers=(1, 2)))
            States(n=1, positions=(t_inst), layers=(1, 2), width=32)
        """
        layers = tuple(range(self.depth + 1) if layers is None else layers)
        if not layers or not set(layers) <= set(range(self.depth + 1)):
            raise ModelError(f"Layers run from 0 to {self.depth}; found {layers}.")
        if not positions:
            raise PromptError("At least one position is needed, such as 't_inst'; found none.")
        attended = attended_slots(positions, layers, queries)
        with progress_bar("capture", prompts, progress) as advance:
            for group in _groups(as_prompts(prompts)):
                rows = self.lay_out(group, positions)
                values = self.capture_rows(rows, layers, attended=attended, progress=advance)
                yield States(values, group, tuple(positions), layers, self.fingerprint)

    def generate(self, prompts: Iterable[PromptLike], **options: Any) -> list[Reply]:
        """Reply to prompts greedily, unsteered; ``options`` are those of ``sweep``."""
        return self.sweep(prompts, [None], **options)[0]

    def sweep(
        self,
        prompts: Iterable[PromptLike],
        interventions: Iterable[Edit | None],
        *,
        max_new_tokens: int = 24,
        post: bool = True,
        watch: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> list[list[Reply]]:
        """Reply to prompts greedily under each intervention, a list for each; None is unsteered.

        Args:
            prompts: What to reply to.
            interventions: How to steer, patch, ablate or cut attention.
            max_new_tokens: The longest reply; an end token of the model ends it sooner.
            post: Keep the post-instruction tokens; if not, the prompt ends at t_inst (Table 1).
            watch: Words whose log-probability as first word is wanted, such as ``Certainly``.
            progress: Called with the number of replies just made.

        Raises:
            PromptError: if a prompt is empty, too long, or has no question to stop before.
            ModelError: if a vector or a layer does not fit the model.
        """
        return sweep(
            self,
            as_prompts(prompts),
            interventions,
            max_new_tokens=max_new_tokens,
            post=post,
            watch=watch,
            progress=progress,
        )

    def reply_losses(self, replies: Sequence[Reply]) -> list[float]:
        """Mean loss of each reply's tokens behind its prompt, unsteered, in nats a token.

        Raises:
            PromptError: if a prompt is empty, or too long with its reply.
        """
        return reply_losses(self, replies)

    def capture_thinking(self, replies: Sequence[Reply]) -> list[Float[Tensor, "2 l d"] | None]:
        """States where the thinking of the model's own replies ends, at all layers.

        Each reply is read behind its prompt, as it was written. The first state is that of the last
        token inside the thinking, the second that of the first token behind it. A reply that
        does not think, or has nothing behind its thinking, has None.

        Raises:
            PromptError: if a prompt is empty, or too long with its reply.
        """
        return capture_thinking(self, replies)

    def capture_replies(self, replies: Sequence[Reply]) -> list[Float[Tensor, "t l d"]]:
        """States along replies at all layers: at t_post, then at each token but the end.

        Each reply is read behind its prompt, whoever wrote it.

        Raises:
            PromptError: if a prompt is empty, or too long with its reply.
        """
        return capture_replies(self, replies)

    def lay_out(self, prompts: Sequence[Prompt], positions: Sequence[str]) -> list[CaptureRow]:
        """What is read of prompts.

        Raises:
            PromptError: if a prompt is empty, too long, or has no such position.
        """
        rows = [CaptureRow.of(layout, positions) for layout in self.chat(prompts)]
        for row, prompt in zip(rows, prompts, strict=True):
            self.check_length(row.length, prompt)
        return rows

    def capture_rows(
        self,
        rows: Sequence[CaptureRow],
        layers: tuple[int, ...],
        *,
        attended: AttendedSlots | None = None,
        progress: Progress | None = None,
    ) -> Float[Tensor, "n p l d"]:
        """The states of rows that have as many positions each."""
        shape = (len(rows), len(rows[0].spans), len(layers), self.width)
        values = torch.empty(shape, dtype=self.model.dtype)

        def read(batch: list[int]) -> None:
            values[batch] = self.read_batch([rows[i] for i in batch], layers, attended)

        self.run_in_batches([row.length for row in rows], read, progress=progress)
        return values

    def run_in_batches(
        self,
        lengths: Sequence[int],
        read: Callable[[list[int]], None],
        *,
        progress: Progress | None = None,
    ) -> None:
        """Read rows in batches of like length that fit the memory, the longest first.

        Args:
            lengths: Tokens of each row.
            read: Called with the numbers of the rows of a batch.
            progress: Called with the number of rows just done.
        """
        todo = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
        while todo:
            longest = lengths[todo[0]]
            batch = todo[: max(1, self.tokens_per_batch // longest)]
            if longest > self._unscaled_length:
                batch = [i for i in batch if lengths[i] > self._unscaled_length]
            try:
                read(batch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                self.shrink(error, len(batch) * longest, len(batch))
                continue
            todo = todo[len(batch) :]
            if progress is not None:
                progress(len(batch))

    def check_length(self, length: int, prompt: Prompt) -> None:
        """Raise a PromptError if the model cannot read so many tokens."""
        if length > self.max_tokens:
            raise too_long_error(prompt, f"{length:,}", self.max_tokens)

    def shrink(self, error: Exception, tokens: int, rows: int) -> None:
        """Halve the token budget if memory ran out; anything else, or a lone prompt, is raised.

        So is the error of a model that is sharded: the other processes wait for this very batch.
        """
        is_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not is_memory or rows == 1 or is_sharded(self.model):
            raise error
        self.tokens_per_batch = max(1, min(tokens, self.tokens_per_batch) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def read_batch(
        self,
        rows: Sequence[CaptureRow],
        layers: tuple[int, ...],
        attended: AttendedSlots | None = None,
    ) -> Float[Tensor, "b p l d"]:
        """The states of rows that have as many positions each, in one pass."""
        shape = (len(rows), len(rows[0].spans), len(layers), self.width)
        buffer = torch.empty(shape, dtype=self.model.dtype, device=self.device)

        def read(starts: Tensor, columns: Tensor) -> AbstractContextManager[Any]:
            return read_positions(
                self.blocks,
                columns=columns,
                starts=starts,
                layers=layers,
                buffer=buffer,
                attended=attended,
            )

        self.run_rows(rows, max(layers), read)
        return buffer.cpu()

    @torch.inference_mode()
    def run_rows(
        self,
        rows: Sequence[CaptureRow],
        last_layer: int,
        hooks: Callable[[Int[Tensor, "b p"], Int[Tensor, "b p"]], AbstractContextManager[T]],
    ) -> T:
        """Run rows that have as many positions each in one pass; returns what the hooks yielded.

        Args:
            rows: What is read.
            last_layer: The last that is needed.
            hooks: What the pass runs in, from the first and the last token of each position, as
                the pass counts them.
        """
        prefix = self._shared_prefix(rows, last_layer)
        skip = len(prefix.ids) if prefix else 0
        spans = torch.tensor([row.spans for row in rows], device=self.device) - skip
        with hooks(*spans.unbind(-1)) as yielded:
            self._run(pad_tokens([row.ids[skip:] for row in rows]), prefix)
        return yielded

    @torch.inference_mode()
    def score_batch(
        self, rows: Sequence[CaptureRow], layers: tuple[int, ...], weight: Float[Tensor, "l d"]
    ) -> list[Float[Tensor, "t"]]:
        """For each token of each row's first span the inner product of states and weights."""
        prefix = self._shared_prefix(rows, max(layers))
        skip = len(prefix.ids) if prefix else 0
        ids = pad_tokens([row.ids[skip:] for row in rows])
        totals = torch.zeros(ids.shape, device=self.device)
        with score_tokens(self.blocks, layers=layers, weight=weight, totals=totals):
            self._run(ids, prefix)
        spans = [row.spans[0] for row in rows]
        return [
            row[first - skip : last - skip + 1]
            for row, (first, last) in zip(totals.cpu(), spans, strict=True)
        ]

    def _run(self, ids: Tensor, prefix: _Prefix | None, cache: Any = None) -> None:
        if prefix is not None:
            cache = copy.deepcopy(prefix.cache)
            cache.batch_repeat_interleave(len(ids))
        arguments = {} if cache is None else {cache_argument(self.model): cache}
        self.model(ids.to(self.device), use_cache=cache is not None, **arguments)

    def _shared_prefix(self, rows: Sequence[CaptureRow], last_layer: int) -> _Prefix | None:
        """Keys and values of what every single-turn prompt begins with, computed once and kept."""
        last_layer = max(last_layer, 1)  # an empty cache would shift the position ids
        if self._prefix is None or self._prefix.last_layer < last_layer:
            first, second = self.chat([Prompt("a"), Prompt("Z")])
            shared = common_prefix_length(first.ids, second.ids)
            self._prefix = self._fill_prefix(first.ids[:shared], last_layer)
        ids = self._prefix.ids
        longest = min(MAX_PREFIX_TOKENS, self._unscaled_length)
        is_usable = ids and all(row.length <= longest and row.continues(ids) for row in rows)
        return self._prefix if is_usable else None

    def _fill_prefix(self, ids: tuple[int, ...], last_layer: int) -> _Prefix:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        if not ids or not has_only_keys_and_values(cache):
            return _Prefix((), cache, self.depth)
        columns = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        buffer = torch.empty(1, 1, 1, self.width, dtype=self.model.dtype, device=self.device)
        with read_positions(self.blocks, columns=columns, layers=(last_layer,), buffer=buffer):
            self._run(torch.tensor([ids]), None, cache)
        is_full = all(layer.get_seq_length() == len(ids) for layer in cache.layers[:last_layer])
        return _Prefix(ids if is_full else (), cache, last_layer)


def _groups(prompts: Iterable[Prompt]) -> Iterator[tuple[Prompt, ...]]:
    source = iter(prompts)
    while group := tuple(islice(source, PROMPTS_PER_STATES)):
        yield group
