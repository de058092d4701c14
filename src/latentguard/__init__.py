"""latentguard: read a chat model's own belief of harmfulness.

The public names load on first use; ``import latentguard`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latentguard.errors import require_extra

if TYPE_CHECKING:
    from latentguard.data.builtin import load_contrast, load_guard_prompts
    from latentguard.data.prompt_files import read_prompts
    from latentguard.errors import LatentGuardError
    from latentguard.guard.cascade import Cascade
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.guard.loading import load_guard
    from latentguard.guard.verdict import Verdict
    from latentguard.integrations.ray import score_corpus
    from latentguard.integrations.vllm.backend import VllmModel
    from latentguard.interventions import Intervention
    from latentguard.models.chat_model import ChatModel
    from latentguard.probes.axis import Axis
    from latentguard.prompts import Message, Prompt, Reply
    from latentguard.states import States

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "Cascade",
    "ChatModel",
    "Intervention",
    "LatentGuard",
    "LatentGuardError",
    "Message",
    "Prompt",
    "Reply",
    "States",
    "Verdict",
    "VllmModel",
    "load_contrast",
    "load_guard",
    "load_guard_prompts",
    "read_prompts",
    "score_corpus",
]

_MODULES = {
    "Axis": "latentguard.probes.axis",
    "Cascade": "latentguard.guard.cascade",
    "ChatModel": "latentguard.models.chat_model",
    "Intervention": "latentguard.interventions",
    "LatentGuard": "latentguard.guard.latent_guard",
    "LatentGuardError": "latentguard.errors",
    "Message": "latentguard.prompts",
    "Prompt": "latentguard.prompts",
    "Reply": "latentguard.prompts",
    "States": "latentguard.states",
    "Verdict": "latentguard.guard.verdict",
    "VllmModel": "latentguard.integrations.vllm.backend",
    "load_contrast": "latentguard.data.builtin",
    "load_guard": "latentguard.guard.loading",
    "load_guard_prompts": "latentguard.data.builtin",
    "read_prompts": "latentguard.data.prompt_files",
    "score_corpus": "latentguard.integrations.ray",
}

_EXTRAS = {"score_corpus": "ray"}
"""Names that need an optional extra."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'latentguard' has no attribute '{name}'")
    if name in _EXTRAS:
        return getattr(require_extra(_MODULES[name], _EXTRAS[name], name), name)
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
