"""The guard that ``latentguard fit`` and ``calibrate`` make of a model, kept in a folder."""

from __future__ import annotations

from pathlib import Path

from latentguard.data.builtin import load_guard_prompts
from latentguard.guard.artifact import JSON_FILE
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel

MAX_FPR = 0.05


def default_guard(model: ChatModel, folder: Path) -> LatentGuard:
    """The guard in the folder; fitted and calibrated on the guard prompts if there is none."""
    if (folder / JSON_FILE).exists():
        return LatentGuard.load(folder, model)
    guard = LatentGuard.fit(model, load_guard_prompts("train"))
    harmless = [p for p in load_guard_prompts("validation") if not p.harmful]
    guard = guard.calibrate(model, harmless, max_fpr=MAX_FPR)
    guard.save(folder)
    return guard
