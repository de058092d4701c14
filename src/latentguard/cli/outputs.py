"""Outputs of a verb: checked before the model loads, one run at a time, nothing lost silently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latentguard.cli.console import echo_err
from latentguard.cli.interrupts import explain_interrupt
from latentguard.errors import LatentGuardError
from latentguard.files import exclusive_lock
from latentguard.guard.artifact import CARD_FILE, JSON_FILE, TENSOR_FILE
from latentguard.guard.hub import HUB_ID
from latentguard.models.sources import DEFAULT

if TYPE_CHECKING:
    from latentguard.report.document import Report

LOCK = ".lock"
"""In an output folder, while a run writes it."""

GUARD_FILES = (JSON_FILE, TENSOR_FILE, CARD_FILE)
"""What saving a guard would replace."""


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and hold its lock while the block runs.

    A folder that was made here and is empty at the end is removed.

    Raises:
        LatentGuardError: if it cannot be made or written, or another run is writing it.
    """
    with _make_folder(folder, folder), exclusive_lock(folder / LOCK, output=folder):
        yield


@contextmanager
def output_file(file: Path) -> Iterator[None]:
    """Make the folder of a file, and hold the lock of the file while the block runs.

    Raises:
        LatentGuardError: if it cannot be written, or another run is writing it.
    """
    if file.is_dir():
        raise LatentGuardError(f"--out should name a file; {file} is a folder.")
    with _make_folder(file.parent, file), exclusive_lock(f"{file}{LOCK}", output=file):
        yield


@dataclass(frozen=True)
class GuardChange:
    """Which guard is calibrated, and where it goes."""

    guard: str
    """A folder, a Hub id, or ``default``."""

    out: Path | None
    """Where the changed guard is written; None changes it in place."""

    model: str | None
    """Where its model is, if it has moved."""

    device_map: str | None
    """How its model is placed."""

    allow_mismatch: bool
    """Go on with another model."""


@contextmanager
def changed_guard(source: str, out: Path | None) -> Iterator[Path]:
    """Hold the lock of the folder that a changed guard is written to; loading says if it is none.

    Control-C while the block runs says that the guard is as it was: the block writes it last.

    Args:
        source: The guard: a folder, a Hub id, or ``default``.
        out: Where the changed guard is written; None changes it in place.

    Yields:
        The folder.

    Raises:
        LatentGuardError: if a guard of the Hub or of the package is to be changed in place, or
            another guard is in the way.
    """
    target = out or Path(source)
    if out is not None and out.resolve() != Path(source).resolve():
        require_no_guard(out, overwrite=False, remedy="name another folder")
    is_hub_id = not target.exists() and HUB_ID.fullmatch(source)
    if out is None and (source == DEFAULT or is_hub_id):
        raise LatentGuardError(
            f"'{source}' is no folder of yours, so it is not changed in place: name a folder for "
            "the changed guard with --out."
        )
    is_guard = (target / GUARD_FILES[0]).exists()
    locked = output_folder(target) if is_guard or out else nullcontext()
    with locked, explain_interrupt(f"{source} is as it was."):
        yield target


def require_no_guard(
    folder: Path, *, overwrite: bool, remedy: str = "name another folder, or add --overwrite"
) -> None:
    """Check that saving a guard would replace nothing.

    Args:
        folder: Where it would be saved.
        overwrite: Whether it may replace what is there.
        remedy: What to do else.

    Raises:
        LatentGuardError: unless ``overwrite``, if a guard, or a file of such a name, is there.
    """
    files = [folder / name for name in GUARD_FILES if (folder / name).exists()]
    if not files or overwrite:
        return
    thing = f"{folder} holds a guard" if folder / GUARD_FILES[0] in files else f"{files[0]} exists"
    raise LatentGuardError(f"{thing}, which would be overwritten; {remedy}.")


def warn_of_replacement(path: Path) -> None:
    """Say that a file, or the report in a folder, will be replaced, if there is one."""
    if path.is_file() or (path / "report.json").exists():
        what = path if path.is_file() else f"The report in {path}"
        echo_err(f"{what} is there, and will be replaced when this run ends.")


def save_report(report: Report, folder: Path) -> None:
    """Write a report and its pictures; without a browser to draw them a warning says so."""
    from latentguard.report.image_files import write_pictures

    report.save(folder)
    try:
        write_pictures(report, folder)
    except LatentGuardError as error:  # the page is there, and shows the same figures
        echo_err(f"Warning: {error}")


@contextmanager
def _make_folder(folder: Path, output: Path) -> Iterator[None]:
    """Make a folder and its parents; those that are empty at the end are removed again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(path for path in (folder, *folder.parents) if path.is_file())
        raise LatentGuardError(f"{output} cannot be written: {file} is no folder.") from None
    except OSError as error:
        raise LatentGuardError(f"{output} cannot be written: {error.strerror}.") from None
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it holds something
                path.rmdir()
