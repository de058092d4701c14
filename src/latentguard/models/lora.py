"""The fine-tuning attack (section 5.2): a model with attacked weights inside a ``with``.

Only reply tokens carry a loss, at most 24 of each pair. By default LoRA adapters are trained,
through peft; with rank 0, every weight. The weights are put back bit for bit. Axis names in shapes:
b pairs, t tokens of the padded pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from latentguard.errors import ModelError, PromptError, require_extra
from latentguard.models.chat_model import ChatModel
from latentguard.models.hooks import contiguous_head
from latentguard.prompts import Prompt

MAX_REPLY_TOKENS = 24
"""Of no pair more reply tokens than these are trained on, unless whole replies are asked for."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How a model is fine-tuned. The paper states none of these."""

    rank: int = 16
    """Rank of the LoRA adapters; 0 trains every weight."""

    learning_rate: float = 2e-4
    """Of AdamW; about 2e-5 suits rank 0."""

    epochs: int = 3
    """How often each pair is seen."""

    batch_size: int = 8
    """Pairs in one step."""

    opening_tokens: int = 24
    """Most tokens of a reply that carry a loss; more than 24 are never used."""


@dataclass(frozen=True)
class _TrainingPair:
    """One training pair as tokens."""

    ids: tuple[int, ...]
    """Prompt and opening of the reply."""

    start: int
    """Where the reply begins."""


class Finetuning:
    """Fine-tunes one model (implements ``cached_model.Finetune``)."""

    def __init__(
        self, model: ChatModel, config: FinetuneConfig, *, keep: str | Path | None = None
    ) -> None:
        """Prepare; nothing is trained yet.

        Args:
            model: The model, which is trained in place and put back.
            config: Rank, learning rate, epochs, batch and tokens of an opening.
            keep: A folder for the attacked weights, one folder in it for each run; None keeps
                nothing.

        Raises:
            MissingExtra: if peft is needed and not installed.
        """
        if config.rank:
            require_extra("peft", "finetune", "Fine-tuning with LoRA (finetune_rank above 0)")
        self.model, self.config, self.keep = model, config, keep

    @contextmanager
    def __call__(
        self, pairs: Sequence[tuple[Prompt, str]], *, seed: int, reply_tokens: int | None = None
    ) -> Iterator[ChatModel]:
        """The model trained on (prompt, opening of a reply) pairs; see ``cached_model.Finetune``.

        Args:
            pairs: What to train on; prompts carry no loss.
            seed: Of the adapters' first weights and of the order of the pairs.
            reply_tokens: Most tokens of a whole reply; an opening as in the config if None.

        Raises:
            PromptError: if there is no pair, an opening has no token, or a pair is too long.
            ModelError: if peft cannot adapt the model, or the loss is not a finite number.
        """
        model = self.model.model
        rank = self.config.rank
        limit = reply_tokens or min(MAX_REPLY_TOKENS, self.config.opening_tokens)
        tokenized = [_tokenize(self.model, prompt, opening, limit) for prompt, opening in pairs]
        if not tokenized:
            raise PromptError("Fine-tuning needs at least one pair; found none.")
        with _adapters(self.model, rank, seed) if rank else _all_weights(model) as trained:
            _train(self.model, tokenized, self.config, seed)
            if self.keep is not None:
                trained.save_pretrained(Path(self.keep) / f"{len(tokenized)}-pairs-seed-{seed}")
            source = f"{self.model.source}, fine-tuned on {len(tokenized)} pairs"
            template = self.model.chat.template
            yield ChatModel(model, self.model.tokenizer, source=source, template=template)


def _tokenize(model: ChatModel, prompt: Prompt, opening: str, limit: int) -> _TrainingPair:
    prompt_ids = model.chat([prompt])[0].ids
    reply_ids = model.tokenizer.encode(opening, add_special_tokens=False)[:limit]
    if not reply_ids:
        raise PromptError(f"The opening for prompt '{prompt.id}' has no token to train on.")
    model.check_length(len(prompt_ids) + len(reply_ids), prompt)
    return _TrainingPair((*prompt_ids, *reply_ids), len(prompt_ids))


def _train(
    model: ChatModel, pairs: Sequence[_TrainingPair], config: FinetuneConfig, seed: int
) -> None:
    """AdamW on float32 copies of what is trained, so that small steps are not rounded away."""
    weights = [p for p in model.model.parameters() if p.requires_grad]
    copies = [p.detach().float().clone().requires_grad_() for p in weights]
    optimizer = torch.optim.AdamW(copies, lr=config.learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        shuffled = torch.randperm(len(pairs), generator=order).tolist()
        for at in range(0, len(shuffled), config.batch_size):
            loss = _loss(model, [pairs[i] for i in shuffled[at : at + config.batch_size]])
            _require_finite(config, loss.detach())
            loss.backward()  # type: ignore[no-untyped-call]
            _step(optimizer, weights, copies)
    _require_finite(config, *(copy.detach() for copy in copies))


def _require_finite(config: FinetuneConfig, *values: Tensor) -> None:
    if not all(torch.isfinite(value).all() for value in values):
        raise ModelError(
            f"Fine-tuning diverged at a learning rate of {config.learning_rate:g}: a loss or a "
            "weight is not a finite number. Set a lower finetune_rate."
        )


def _step(optimizer: torch.optim.Optimizer, weights: list[Any], copies: list[Tensor]) -> None:
    for weight, copy in zip(weights, copies, strict=True):
        copy.grad = None if weight.grad is None else weight.grad.float()
        weight.grad = None
    nn.utils.clip_grad_norm_(copies, 1.0)
    optimizer.step()
    with torch.no_grad():
        for weight, copy in zip(weights, copies, strict=True):
            weight.copy_(copy)


def _loss(model: ChatModel, pairs: Sequence[_TrainingPair]) -> Tensor:
    """Mean cross-entropy of the reply tokens.

    Pairs are padded on the left, so that the replies are the last tokens of all.
    """
    shape = (len(pairs), max(len(pair.ids) for pair in pairs))
    ids = torch.zeros(shape, dtype=torch.long)
    real = torch.zeros(shape, dtype=torch.bool)
    in_reply = torch.zeros(shape, dtype=torch.bool)
    for n, pair in enumerate(pairs):
        padding = shape[1] - len(pair.ids)
        ids[n, padding:] = torch.tensor(pair.ids)
        real[n, padding:] = True
        in_reply[n, padding + pair.start :] = True
    longest = max(len(pair.ids) - pair.start for pair in pairs)
    with contiguous_head(model.model):
        output = model.model(
            ids.to(model.device),
            attention_mask=real.long().to(model.device),
            position_ids=(real.long().cumsum(1) - 1).clamp(min=0).to(model.device),
            use_cache=False,
            logits_to_keep=longest + 1,
        )
    mask = in_reply[:, -longest:]
    logits = output.logits[:, -longest - 1 : -1].float()[mask.to(output.logits.device)]
    return cross_entropy(logits, ids[:, -longest:][mask].to(logits.device))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of this seed inside; afterwards the generators are where they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _trainable(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The model's own weights by name; which of them are trainable is put back."""
    weights = dict(model.named_parameters())
    before = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        yield weights
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
            weight.grad = None


@contextmanager
def _adapters(model: ChatModel, rank: int, seed: int) -> Iterator[Any]:
    """LoRA on all linear layers but the output; the model's own weights never change."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with _trainable(model.model):
        try:
            with _seeded(seed, model.device), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft warns of what it sets by itself
                adapted = get_peft_model(model.model, config)
        except ValueError as error:
            raise ModelError(f"peft cannot adapt this model: {error}") from error
        try:
            yield adapted
        finally:
            adapted.unload()


@contextmanager
def _all_weights(model: nn.Module) -> Iterator[Any]:
    """Train every weight; a copy of each, on the CPU, is put back."""
    with _trainable(model) as weights:
        before = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        for weight in weights.values():
            weight.requires_grad_(weight.is_floating_point())
        try:
            yield model
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(before[name])
