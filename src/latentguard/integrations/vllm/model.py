"""vLLM's models with one addition: each token's columns are written at its KV slot."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from latentguard.errors import ModelError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.integrations.vllm import unsupported
from latentguard.integrations.vllm.columns import Columns
from latentguard.integrations.vllm.plugin import VARIABLE
from latentguard.integrations.vllm.slots import SlotScores
from latentguard.models.chat import ChatTokenizer
from latentguard.models.weights_digest import WeightsDigest
from latentguard.states import Fingerprint

models: list[Guarded] = []
"""The guarded model of this process: vLLM hands a connector the caches but not the model."""


class Guarded:
    """Mixed into a model class of vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """Build the model, and have it hand out the states that the guard reads.

        Raises:
            ModelError: if the engine is configured in a way that the guard cannot vouch for.
            GuardError: if the guard cannot be read, or cannot run inside vLLM.
        """
        unsupported.require_supported(vllm_config)
        unsupported.require_alone()
        guard = LatentGuard.load(os.environ[VARIABLE])
        # the layers change the compiled graph, so the guard must be part of the cache's key
        vllm_config.additional_config[VARIABLE.lower()] = guard.digest
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._guard, self._columns, self._vllm = guard, Columns.of(guard), vllm_config
        self._scores: SlotScores | None = None
        self._known = False
        self.set_aux_hidden_state_layers(self._columns.layers)  # type: ignore[attr-defined]
        models[:] = [self]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """The model's own pass; the extra states are scored and dropped."""
        output = super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds
        )
        if not isinstance(output, tuple):
            return output
        hidden, states = output
        if self._scores is not None and is_forward_context_available():
            slots = get_forward_context().slot_mapping
            if slots:  # none while vLLM measures memory
                self._scores.write(next(iter(slots.values())), self._columns(states))
        return hidden

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load, and compare what was loaded with what the guard is bound to.

        Raises:
            ModelMismatch: if weights, tokenizer, template or dtype are not the guard's own.
        """
        self._known = False
        digest = WeightsDigest(self._vllm.model_config.dtype)
        loaded: set[str] = super().load_weights(_watched(weights, digest))  # type: ignore[misc]
        self._guard.require_match(self._fingerprint(digest))
        self._known = True
        return loaded

    def open_scores(self, blocks: int, block: int, device: torch.device) -> SlotScores:
        """Make room for every KV slot.

        Raises:
            ModelError: if no weights were loaded, such as with dummy weights.
        """
        if not self._known:
            raise ModelError(
                "No weights were loaded from a checkpoint, so the guard cannot know the model; "
                "use --load-format auto."
            )
        self._columns = self._columns.to(device)
        columns = self._columns
        count, queries = len(columns.unit), columns.queries
        self._scores = SlotScores(blocks * block, count, block, device, queries)
        return self._scores

    def _fingerprint(self, digest: WeightsDigest) -> Fingerprint:
        model = self._vllm.model_config
        if model.hf_config.tie_word_embeddings:
            digest.alias("lm_head.weight", "model.embed_tokens.weight")
        chat = ChatTokenizer(AutoTokenizer.from_pretrained(model.tokenizer))
        return Fingerprint(
            model=model.model,
            weights=digest.digest,
            tokenizer=chat.tokenizer_digest,
            template=chat.template_digest,
            dtype=str(model.dtype).removeprefix("torch."),
        )


def _watched(
    weights: Iterable[tuple[str, Tensor]], digest: WeightsDigest
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        if "rotary_emb." not in name:  # old checkpoints hold this; no model loads it
            digest.add(name, tensor)
        yield name, tensor


class GuardedLlama(Guarded, LlamaForCausalLM):
    """Llama, and what shares its architecture."""


class GuardedQwen2(Guarded, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""
