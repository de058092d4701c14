"""What the guard refuses to run inside of: one sentence for each, before any request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from latentguard.errors import ModelError
from latentguard.integrations.vllm.plugin import ARCHITECTURES, VARIABLE

CONNECTOR = "LatentGuardConnector"


def require_supported(config: Any) -> None:
    """Raise ``ModelError``, with the first reason against this ``VllmConfig``."""
    for reason in reasons(config):
        raise ModelError(reason)


def require_alone() -> None:
    """Raise ``ModelError`` if this process has an engine: vLLM would share its connector.

    The second engine's blocks would then be looked up in the scores of the first.
    """
    from vllm.distributed.kv_transfer import has_kv_transfer_group

    if has_kv_transfer_group():
        raise ModelError(
            "A process holds one engine with a guard, and this one has another, or one that failed "
            "to start; shut it down first, or start a new process."
        )


def reasons(config: Any) -> Iterator[str]:
    """Why the guard cannot vouch for an engine that is configured so."""
    model, parallel = config.model_config, config.parallel_config
    architectures = " and ".join(ARCHITECTURES)
    if not set(model.architectures) & set(ARCHITECTURES):
        yield (
            f"The guard inside vLLM knows {architectures}; this model is "
            f"{', '.join(model.architectures)}. Put 'latentguard serve --upstream' before the "
            "server instead."
        )
    transfer = config.kv_transfer_config
    connector = transfer.kv_connector if transfer else None
    if connector != CONNECTOR:
        yield (
            f"{VARIABLE} is set, so the KV connector must be {CONNECTOR} alone; found {connector}. "
            "A cache that is filled from elsewhere brings no scores. Start the server with 'python "
            "-m latentguard.integrations.vllm GUARD'."
        )
    for name in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
    ):
        if (size := getattr(parallel, name, 1)) > 1:
            yield f"The guard inside vLLM was not shown right with {name} {size}; use 1."
    if getattr(parallel, "enable_dbo", False):
        yield "The guard inside vLLM was not shown right with dual batch overlap; switch it off."
    if config.speculative_config is not None:
        yield "Speculative decoding and the guard both need the hidden states; use one of them."
    if config.lora_config is not None:
        yield "A LoRA adapter changes the weights that the guard is bound to; merge it and fit."
    if getattr(model, "quantization", None):
        yield (
            f"This engine quantises the weights ({model.quantization}), which the guard was not "
            "fitted on; serve them as they are."
        )
    if getattr(model, "enable_prompt_embeds", False):
        yield "Prompts that are embeddings have no tokens to check; drop --enable-prompt-embeds."
