"""Load a guard that answers by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.own_model import OwnModel
from latentguard.states import Backend


def load_guard(
    source: str | Path,
    model: Backend | str | Path | None = None,
    *,
    device: str | None = None,
    allow_mismatch: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> LatentGuard:
    """Load a guard that answers by itself: ``guard("text")`` gives a verdict.

    Args:
        source: A folder that ``latentguard fit`` wrote, a Hub id such as ``org/guard``, or
            ``default``: the guard of SmolLM2-135M that comes with the package.
        model: The guard's model, loaded already; or where it is, if it has moved. By default the
            guard loads its own, when it is first asked.
        device: Where the model is loaded: ``cpu``, ``cuda``, ...
        allow_mismatch: Go on with another model than the guard's own, bound to it; the model is
            loaded at once.
        revision: Of the Hub's repository.
        token: For the Hub.

    Raises:
        GuardError: if there is no such guard, or it is damaged.
        ModelMismatch: if the model is not the guard's own.

    Examples:
        >>> guard = lg.load_guard(folder, model)
        >>> guard("What is the capital of France?").flagged in (True, False)
        True
    """
    guard = LatentGuard.from_pretrained(source, revision=revision, token=token)
    if model is None or isinstance(model, str | Path):
        own = OwnModel(source=None if model is None else str(model), device=device)
        if not allow_mismatch:
            return replace(guard, own_model=own)
        model = own.load(guard.fingerprint)
    return guard.with_model(model, allow_mismatch)
