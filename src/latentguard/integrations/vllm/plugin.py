"""vLLM's entry point: guarded model classes, if a guard is named by ``LATENTGUARD_GUARD``."""

from __future__ import annotations

import os

from latentguard.errors import ModelError

VARIABLE = "LATENTGUARD_GUARD"
"""Names the guard's folder; every process of the engine reads it. Without it nothing changes."""

ARCHITECTURES = {"LlamaForCausalLM": "GuardedLlama", "Qwen2ForCausalLM": "GuardedQwen2"}
"""vLLM's architecture -> class in ``model.py``; each is compared with transformers in the tests."""

TESTED = ("0.32",)
"""Minor versions of vLLM that the tests have run on; others are refused."""


def register() -> None:
    """Put the guarded classes in the place of vLLM's own.

    Raises:
        ModelError: if this vLLM was never tested.
    """
    if not os.environ.get(VARIABLE):
        return
    import vllm

    require_tested(vllm.__version__)
    for architecture, name in ARCHITECTURES.items():
        vllm.ModelRegistry.register_model(
            architecture, f"latentguard.integrations.vllm.model:{name}"
        )


def require_tested(version: str) -> None:
    """Raise ``ModelError`` unless the guard was tested inside this vLLM."""
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise ModelError(
            f"The guard was tested inside vLLM {', '.join(TESTED)} and found {version}; install "
            f"one of these, or put 'latentguard serve --upstream' before the server."
        )
