"""VllmModel: scores from inside vLLM, so that a guard is calibrated on what will be served."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.errors import GuardError, ModelError, PromptError, require_extra
from latentguard.guard.hub import find_guard
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.reading_plan import VariantScore, score_plans
from latentguard.guard.verdict import Verdict
from latentguard.integrations.vllm.columns import Columns, variant_score
from latentguard.integrations.vllm.plugin import VARIABLE
from latentguard.integrations.vllm.reply_tokens import TokenScoreLog
from latentguard.integrations.vllm.score_channel import Posted, ScoreChannel
from latentguard.integrations.vllm.score_request import (
    ScoreRequest,
    ScoreResponse,
    TokenScores,
    reply_request,
    score_request,
)
from latentguard.integrations.vllm.unsupported import CONNECTOR
from latentguard.models.chat import ChatTokenizer
from latentguard.models.generate import all_end_ids
from latentguard.models.layout import ReplyLayout
from latentguard.models.reply_reading import reply_layout
from latentguard.models.sources import resolve
from latentguard.prompts import Prompt, Reply
from latentguard.states import Fingerprint, States

WINDOW = 1024
"""Prompts that are handed to the engine together."""

OTHER_GUARD = "This engine was started for another guard; start one for this."

TRANSFER = dict(
    kv_connector=CONNECTOR,
    kv_connector_module_path="latentguard.integrations.vllm.connector",
    kv_role="kv_both",
)
"""vLLM's ``kv_transfer_config``."""


class VllmModel:
    """An engine that was started for one guard; implements ``Backend``, but for states.

    Examples:
        >>> engine = lg.VllmModel.load("guards/qwen")  # doctest: +SKIP
        >>> list(guard.scan(engine, ["Hello."]))  # doctest: +SKIP
        [Verdict(allow, probability=0.02, score=-2.1, id='1')]
    """

    def __init__(self, guard: LatentGuard, engine: Any, channel: ScoreChannel) -> None:
        """Wrap an engine; ``VllmModel.load`` is the usual way."""
        self.engine, self._guard, self._channel = engine, guard, channel
        self.columns = Columns.of(guard)
        self.chat = ChatTokenizer(engine.get_tokenizer())

    @classmethod
    def load(cls, guard: str | Path, source: str | None = None, **options: Any) -> VllmModel:
        """Start vLLM for a guard.

        Args:
            guard: A folder, a Hub id, or ``default``.
            source: The model, if it has moved.
            options: vLLM's engine options (``max_num_batched_tokens``, ``enforce_eager``, ...).

        Raises:
            MissingExtra: if vLLM is not installed.
            ModelError: if vLLM refuses; the reason stands in the engine's log.
        """
        folder = find_guard(guard)
        loaded = LatentGuard.load(folder)
        os.environ[VARIABLE] = str(folder.resolve())
        vllm = require_extra("vllm", "vllm", "Reading states inside vLLM (docs/how-to/vllm.md)")
        config = require_extra("vllm.config", "vllm", "Reading states inside vLLM")
        try:
            engine = vllm.LLM(
                model=resolve(source or loaded.fingerprint.model),
                dtype=loaded.fingerprint.dtype,
                kv_transfer_config=config.KVTransferConfig(**TRANSFER),
                **options,
            )
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"vLLM did not start with this guard: {error}") from error
        return cls(loaded, engine, ScoreChannel())

    @property
    def fingerprint(self) -> Fingerprint:
        """The guard's own: the engine compared its weights with it while loading them."""
        return self._guard.fingerprint

    @property
    def depth(self) -> int:
        """Number of blocks L."""
        return int(self.engine.model_config.hf_text_config.num_hidden_layers)

    @property
    def post(self) -> int:
        """Number of post-instruction tokens."""
        layout = self.chat([Prompt("a")])[0]
        return layout.t_post - layout.t_inst

    def capture(self, prompts: Iterable[Prompt], **how: Any) -> Iterator[States]:
        """Raise ``ModelError``: states stay inside."""
        raise ModelError("vLLM lets no states out; fit a guard with ChatModel, and calibrate here.")

    def verdicts(
        self, guard: LatentGuard, prompts: Iterable[Prompt], *, max_tokens: int = 1
    ) -> Iterator[Verdict]:
        """Yield a verdict for each prompt, in order; ``max_tokens`` are generated and dropped.

        Raises:
            GuardError: if the guard reads otherwise than the engine, or a score is missing.
        """
        score = partial(self.scores, guard, max_tokens=max_tokens)
        for scored in score_plans(prompts, guard.plan, score):
            yield guard.combine(scored).verdict

    def scores(
        self, guard: LatentGuard, texts: Iterable[Prompt], *, max_tokens: int = 1
    ) -> Iterator[VariantScore]:
        """Yield the guard's score of each text, in order; see ``states.Scoring``.

        Raises:
            GuardError: if the guard reads otherwise than the engine, or a score is missing.
        """
        if not Columns.of(guard).same_as(self.columns):
            raise GuardError(OTHER_GUARD)
        rest = iter(texts)
        while window := list(islice(rest, WINDOW)):
            for read in self._read(window, max_tokens):
                yield variant_score(guard, read)

    def reply_scores(
        self, replies: Iterable[Reply], layers: Sequence[int], weight: Float[Tensor, "l d"]
    ) -> Iterator[tuple[Reply, Float[Tensor, "t"]]]:
        """Yield each reply with the scores of its tokens, in order; see ``states.ReplyScoring``.

        Raises:
            GuardError: if the guard reads otherwise than the engine, or a score is missing.
            PromptError: if a reply is empty, or too long with its prompt.
        """
        own = self._guard.require_reply_probe().probe
        if own.layers != tuple(layers) or not torch.equal(own.weight, weight):
            raise GuardError(OTHER_GUARD)
        rest = iter(replies)
        while window := list(islice(rest, WINDOW)):
            yield from zip(window, self._read_replies(window), strict=True)

    def _lay_out_reply(self, reply: Reply) -> ReplyLayout:
        config = self.engine.model_config
        ends = (config.try_get_generation_config() or {}).get("eos_token_id")
        layout = reply_layout(self.chat, reply, all_end_ids(ends, self.engine.get_tokenizer()))
        if len(layout.ids) >= config.max_model_len:  # the engine always writes one more
            raise PromptError(
                f"Reply '{reply.prompt.id}' has {len(layout.ids):,} tokens with its prompt; this "
                f"engine reads at most {config.max_model_len - 1:,}."
            )
        return layout

    def _read_replies(self, replies: Sequence[Reply]) -> list[Float[Tensor, "t"]]:
        layouts = [self._lay_out_reply(reply) for reply in replies]
        requests = [
            reply_request(layout.ids, self._channel, tail=len(layout.reply)) for layout in layouts
        ]
        logs = {request.key: TokenScoreLog.of(1) for request in requests}
        for answer in self._generate([layout.ids for layout in layouts], requests, max_tokens=1):
            if isinstance(answer, TokenScores) and answer.key in logs:
                logs[answer.key].add(answer)
        scores = list[Float[Tensor, "t"]]()
        for reply, layout, log in zip(replies, layouts, logs.values(), strict=True):
            own = log.scores[0][: len(layout.reply)]
            if log.is_lost or len(own) < len(layout.reply):
                raise GuardError(
                    f"The engine gave no score for a token of reply '{reply.prompt.id}', so no "
                    "verdict can be given."
                )
            scores.append(torch.tensor(own))
        return scores

    def _read(self, prompts: Sequence[Prompt], max_tokens: int) -> list[tuple[float, ...]]:
        layouts = self.chat(prompts)
        requests = [score_request(lay, self.columns.positions, self._channel) for lay in layouts]
        answers = self._generate([lay.ids for lay in layouts], requests, max_tokens=max_tokens)
        values_by_key = {
            answer.key: answer.values for answer in answers if isinstance(answer, ScoreResponse)
        }
        missing = [
            p.id
            for p, request in zip(prompts, requests, strict=True)
            if not values_by_key.get(request.key)
        ]
        if missing:
            raise GuardError(
                f"The engine gave no score for {len(missing)} prompts (the first is "
                f"'{missing[0]}'), so no verdict can be given."
            )
        return [values_by_key[request.key] or () for request in requests]

    def _generate(
        self, ids: Sequence[Sequence[int]], requests: Sequence[ScoreRequest], *, max_tokens: int
    ) -> list[Posted]:
        """Have the engine read prompts, and what it posted meanwhile."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        how = [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=0.0,
                ignore_eos=True,
                extra_args={"kv_transfer_params": request.params},
            )
            for request in requests
        ]
        tokens = [TokensPrompt(prompt_token_ids=list(own)) for own in ids]
        with self._channel.reading() as answers:
            self.engine.generate(tokens, how, use_tqdm=False)
        return answers
