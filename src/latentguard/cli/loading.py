"""Loading the model and the guard that a verb works with; saving a guard."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from latentguard.cli.console import echo_err
from latentguard.errors import GuardError, MissingExtra, ModelError
from latentguard.guard.hub import find_guard
from latentguard.models.sources import DEFAULT, HUB_ID, resolve

if TYPE_CHECKING:
    from latentguard.guard.cascade import Cascade
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.models.chat_model import ChatModel


def require_model(source: str) -> None:
    """Raise a ModelError if a model is neither here nor within reach, before torch is imported."""
    if source == DEFAULT:
        return
    is_gguf = source.lower().endswith(".gguf")
    if not HUB_ID.fullmatch(source) and not Path(source).exists():
        raise ModelError(
            f"'{source}' could not be loaded as a chat model: there is no such "
            f"{'file' if is_gguf else 'folder'}, and it is no Hub id."
        )
    if not is_gguf:
        resolve(source)


def load_model(source: str, dtype: str = "auto", device_map: str | None = None) -> ChatModel:
    """Load a model without the progress bars and warnings of the libraries below."""
    from transformers.utils import logging as transformers_logging

    from latentguard.models.chat_model import ChatModel
    from latentguard.models.threads import choose_threads

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    echo_err(f"Loading {source} ...")
    placing = {"device_map": device_map} if device_map else {}
    model = ChatModel.load(source, dtype=dtype, **placing)
    choose_threads(model)
    return model


def read_guard(source: str | Path, *, verify_key: Path | None = None) -> LatentGuard:
    """Read a guard, of a folder or of the Hub, without its model.

    Args:
        source: Where it is.
        verify_key: Public key that it has to be signed with; None takes any guard.
    """
    folder = find_guard(source)
    from latentguard.guard.latent_guard import LatentGuard  # torch: not for a name mistyped
    from latentguard.guard.signature import VerifyKey

    return LatentGuard.load(folder, verify_key=VerifyKey(verify_key) if verify_key else None)


def load_guard_model(
    guard: LatentGuard,
    model: str | None,
    *,
    allow_mismatch: bool = False,
    device_map: str | None = None,
) -> tuple[LatentGuard, ChatModel]:
    """Load the model that a guard is bound to, and verify that it is the one.

    Returns:
        The guard and its model. With ``allow_mismatch`` the guard is bound to the model that it
        meets, and the shift of its canary scores goes to standard error.
    """
    backend = load_model(model or guard.fingerprint.model, guard.fingerprint.dtype, device_map)
    if not allow_mismatch:
        guard.verify_model(backend)
        return guard, backend
    bound = guard.accept_model(backend)
    if bound is not guard:
        echo_err(f"Warning: {guard.shift_to(bound)}")
    return bound, backend


def read_cascade(guard: LatentGuard, source: str | Path, second_opinion: str) -> Cascade:
    """A guard with a second opinion, neither of them loaded; warns if nothing is promised of both.

    Args:
        guard: The guard.
        source: Where it is.
        second_opinion: As the option names it.

    Raises:
        LatentGuardError: if there is no such second opinion, or the guard has no review band.
    """
    from latentguard.guard.cascade import Cascade, is_promised
    from latentguard.guard.second_opinion import open_second_opinion

    cascade = Cascade.of(guard, open_second_opinion(second_opinion))
    if guard.bound is not None and not is_promised(guard, cascade.second):
        echo_err(
            f"Warning: {source} was not calibrated with the second opinion {cascade.second.name}, "
            "so nothing is promised of both together. Calibrate it: latentguard calibrate "
            f"{source} --harmless FILE --second-opinion {second_opinion}"
        )
    return cascade


def load_cascade(cascade: Cascade, guard: LatentGuard) -> Cascade:
    """The cascade with the guard as it met its model, and the second opinion loaded."""
    echo_err(f"Loading the second opinion, {cascade.second.name} ...")
    cascade.second.load()
    return cascade.of(guard, cascade.second)


def require_calibrated(guard: LatentGuard, source: str | Path) -> None:
    """Raise a GuardError if a guard was never calibrated."""
    if guard.bound is None:
        raise GuardError(
            f"{source} has no calibration. Calibrate it first: latentguard calibrate {source} "
            "--harmless FILE"
        )


def warn_if_uncalibrated(guard: LatentGuard, source: str | Path, *, replies: bool = False) -> None:
    """Say that the threshold of a guard promises nothing, if it was never calibrated.

    Args:
        guard: The guard.
        source: Where it is.
        replies: Whether it is the threshold for replies that counts.
    """
    bound = guard.replies and guard.replies.bound if replies else guard.bound
    if bound is None:
        option = "--replies" if replies else "--harmless"
        echo_err(
            f"Warning: {source} is not calibrated, so 'flagged' follows a threshold that promises "
            f"nothing. Calibrate it: latentguard calibrate {source} {option} FILE"
        )


def save_guard(guard: LatentGuard, folder: Path, *, report: bool = False) -> None:
    """Save a guard, and its calibration report if one is wanted or is there already.

    Without the extra ``report`` the guard is saved, and a warning says why it has no report.
    """
    from latentguard.guard.calibration_report import calibration_report
    from latentguard.report.document import remove_report

    guard.save(folder)
    page = folder / "calibration"
    has_page = (page / "report.json").exists()
    if has_page and guard.thresholds is None:
        remove_report(page)  # it describes the guard that was there before
    elif report or has_page:
        try:
            echo_err(f"Report: {calibration_report(guard).save(page)}/report.html")
        except MissingExtra as error:
            remove_report(page)  # it describes another calibration
            echo_err(f"Warning: {error}")
