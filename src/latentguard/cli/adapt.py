"""The verb ``adapt``; heavy imports stay inside it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.inputs import guard_columns, read_side
from latentguard.cli.loading import load_guard_model, read_guard, save_guard
from latentguard.cli.options import DeviceMap, GuardOut, GuardSource, MovedModel, TextColumn
from latentguard.cli.outputs import changed_guard
from latentguard.data.prompt_files import read_prompts
from latentguard.errors import GuardError
from latentguard.prompts import Prompt

if TYPE_CHECKING:
    from latentguard.guard.latent_guard import LatentGuard


def adapt(  # noqa: PLR0913, PLR0917 (each is an option)
    guard: GuardSource,
    labelled: Annotated[
        str | None, typer.Argument(help="Labelled prompts: file, '-', or Hub data set.")
    ] = None,
    harmless: Annotated[
        list[str] | None, typer.Option(help="More harmless prompts of your traffic; repeatable.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of this batch of labels; default: that of the file.")
    ] = None,
    forget: Annotated[
        str | None, typer.Option(help="Forget a batch of labels, as if it had never been learned.")
    ] = None,
    max_fpr: Annotated[
        float | None, typer.Option(help="False-positive rate to keep; default: the guard's own.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Learn labels that cost much of what the guard knew.")
    ] = False,
    text_column: TextColumn = "text",
    model: MovedModel = None,
    device_map: DeviceMap = None,
    out: GuardOut = None,
) -> None:
    """Teach GUARD your labels: a hundred prompts of your traffic, or the few that it missed.

    Each row of LABELLED needs a label, 'harmful' or 'harmless'. Cross-validation inside the labels
    chooses the simplest of three: no change; a new threshold and map to probabilities; a correction
    of the probe. It prints what is caught and falsely flagged before and after, on labels that the
    change did not see and on built-in prompts.

    The threshold keeps the guard's false-positive rate on harmless prompts like those of LABELLED,
    once there are enough (124 for 5 %). With fewer the rate is that on the built-in prompts.

    An incident is a file of a few harmful prompts that were missed: the probe is corrected just so
    far that they are flagged.

    The result is an ordinary guard. It keeps no text: batches have a name, a date and a digest
    ('latentguard show'), and --forget NAME gives the guard that never saw one.

    Example: latentguard adapt default labels.jsonl --out guards/mine
    """
    if (labelled is None) == (forget is None):
        raise GuardError("Give either a file of labelled prompts to learn, or --forget NAME.")
    with changed_guard(guard, out) as target:
        loaded = read_guard(guard)
        if forget is not None:
            changed = _forget(loaded, forget, model, device_map)
        else:
            assert labelled is not None
            rows = _labelled_prompts(loaded, labelled, harmless, text_column)
            batch = name or Path(labelled).stem
            changed = _learn(loaded, rows, batch, max_fpr, force, model, device_map)
        save_guard(changed, target)
    echo_err(f"Saved to {target}.")


def _labelled_prompts(
    guard: LatentGuard, source: str, harmless: list[str] | None, text_column: str
) -> list[Prompt]:
    columns = guard_columns(guard, text_column)
    rows = read_prompts(source, columns=columns)
    return rows + read_side(harmless, columns, harmful=False)


def _learn(
    guard: LatentGuard,
    rows: list[Prompt],
    name: str,
    max_fpr: float | None,
    force: bool,
    model: str | None,
    device_map: str | None,
) -> LatentGuard:
    from latentguard.guard.adapting import adapt as learn
    from latentguard.guard.adapting import require_batch

    prompts = require_batch(guard, rows, name)  # says what is wrong at once
    guard, backend = load_guard_model(guard, model, allow_mismatch=False, device_map=device_map)
    if guard.reference is None:
        echo_err("The built-in prompts are read once, against which the change is measured.")
    with progress("adapt", len(prompts) if guard.reference else None) as view:
        adapted = learn(
            guard,
            backend,
            prompts,
            name=name,
            date=datetime.now(UTC).date().isoformat(),
            max_fpr=max_fpr,
            force=force,
            progress=view.advance,
        )
    typer.echo(adapted.report.why)
    typer.echo(f"Threshold {adapted.guard.threshold:.6g}: {adapted.guard.promise}.")
    for table in adapted.tables():
        typer.echo(f"\n{table.markdown()}")
    return adapted.guard


def _forget(
    guard: LatentGuard, name: str, model: str | None, device_map: str | None
) -> LatentGuard:
    from latentguard.guard.adapting import forget

    if guard.adaptation is None:
        raise GuardError("The guard has learned no labels, so there is nothing to forget.")
    guard.adaptation.require_batch(name)
    guard, backend = load_guard_model(guard, model, allow_mismatch=False, device_map=device_map)
    changed = forget(guard, backend, name)
    typer.echo(f"Forgotten: '{name}'. Threshold {changed.threshold:.6g}: {changed.promise}.")
    return changed
