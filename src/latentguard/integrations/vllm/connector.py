"""A KV connector that transfers nothing: it tells the worker which slots are new and which to read.

What it relies on, each pinned by a test in ``tests/vllm``: metadata is bound before the model runs;
``wait_for_save`` is called after it and before the step's output is returned; ``SchedulerOutput``
names every block that a request gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from latentguard.errors import ModelError
from latentguard.integrations.vllm import model, unsupported
from latentguard.integrations.vllm.plugin import VARIABLE
from latentguard.integrations.vllm.score_channel import post
from latentguard.integrations.vllm.slots import Ledger, SlotScores, Step


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What goes from scheduler to worker in one step."""

    step: Step


class LatentGuardConnector(KVConnectorBase_V1, SupportsHMA):
    """Both sides: the scheduler's keeps the book, the worker's clears, reads and posts."""

    _ledger: Ledger
    _scores: SlotScores

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Begin.

        Raises:
            ModelError: if the engine is configured in a way that the guard cannot vouch for.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        unsupported.require_supported(vllm_config)
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ModelError(
                f"The guard inside vLLM knows one kind of KV cache; this model has {len(groups)}."
            )
        self._block: int = groups[0].kv_cache_spec.block_size
        if role == KVConnectorRole.SCHEDULER:
            self._ledger = Ledger(self._block)

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is delivered."""
        return False

    # the worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Make a row for each slot of the caches.

        Raises:
            ModelError: if the model is not guarded, or was not loaded from a checkpoint.
        """
        if not model.models:
            raise ModelError(
                f"The connector found no guarded model: is {VARIABLE} set, and the plugin "
                "'latentguard' among VLLM_PLUGINS?"
            )
        device = next(iter(kv_caches.values())).device
        blocks = self._kv_cache_config.num_blocks
        self._scores = model.models[-1].open_scores(blocks, self._block, device)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Before the pass: what lies in new blocks is of other requests."""
        super().bind_connector_metadata(connector_metadata)
        self._scores.forget(connector_metadata.step.fresh)
        self._scores.copy(connector_metadata.step.copies)

    def wait_for_save(self) -> None:
        """After the pass, before its tokens leave: read and post."""
        step = self._get_connector_metadata().step
        if step.due or step.refused or step.replies:
            read = [(due.request, self._scores.read(due.slots)) for due in step.due]
            replied = self._scores.read_replies(step.replies) if step.replies else []
            requests = [due.request for due in step.replies]
            refused = [(request, None) for request in step.refused]
            post([*read, *refused], zip(requests, replied, strict=True))

    def start_load_kv(self, forward_context: Any, **keywords: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, *inputs: Any, **keywords: Any) -> None:
        """Nothing is saved."""

    # the scheduler's side

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """What the worker does in this step."""
        return StepMetadata(self._ledger.step(scheduler_output))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        """No tokens from elsewhere."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks are known from the scheduler's output."""

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        """Blocks are free at once, and nothing is said in the response."""
        return False, None
