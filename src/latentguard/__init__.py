"""latentguard: read a chat model's own belief of harmfulness.

The public names load on first use; ``import latentguard`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Axis": "latentguard.probes.axis",
    "ChatModel": "latentguard.models.chat_model",
    "Intervention": "latentguard.states",
    "LatentGuard": "latentguard.guard.latent_guard",
    "LatentGuardError": "latentguard.errors",
    "Prompt": "latentguard.prompts",
    "Reply": "latentguard.prompts",
    "States": "latentguard.states",
    "Verdict": "latentguard.guard.verdict",
    "load_contrast": "latentguard.data.builtin",
    "load_traffic": "latentguard.data.builtin",
    "read_prompts": "latentguard.prompts",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentguard' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
