"""Category packs: ``latentguard pack add``, ``list`` and ``remove``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.console import echo_changes, echo_err, progress
from latentguard.cli.inputs import guard_columns, read_side
from latentguard.cli.loading import (
    load_guard_model,
    read_guard,
    require_calibrated,
    save_guard,
)
from latentguard.cli.options import (
    AllowMismatch,
    DeviceMap,
    GuardOut,
    GuardSource,
    HarmlessTraffic,
    MovedModel,
    TextColumn,
)
from latentguard.cli.outputs import changed_guard
from latentguard.data.builtin import load_contrast
from latentguard.data.prompt_files import read_prompts
from latentguard.prompts import Prompt

if TYPE_CHECKING:
    from latentguard.guard.evaluation import Comparison
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.models.chat_model import ChatModel

Evaluate = Annotated[
    str | None,
    typer.Option(help="Labelled prompts to measure the change on; default: built-in ones."),
]

pack = typer.Typer(no_args_is_help=True, help="Risk categories added to a guard from examples.")


@pack.command()
def add(  # noqa: PLR0913, PLR0917 (each is an option)
    guard: GuardSource,
    name: Annotated[str, typer.Option(help="Name of the category, such as fraud.")],
    examples: Annotated[list[str], typer.Option(help="20 to 50 harmful examples; repeatable.")],
    harmless: HarmlessTraffic = None,
    evaluate: Evaluate = None,
    text_column: TextColumn = "text",
    model: MovedModel = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
    out: GuardOut = None,
) -> None:
    """Add a category that can flag, and calibrate again for the rate that the guard promised.

    Give --harmless prompts of the same kind of text as the examples. Half of them train the pack,
    so that it learns harm and not the kind of text; the other half calibrates. Without them a pack
    may flag harmless texts that resemble its examples. A guard that was calibrated on your own
    prompts needs them. A guard that was fitted with --long is also calibrated again for long
    prompts and chats, which takes minutes on a CPU. With --allow-mismatch the guard is bound to the
    model that it is run on, and its promise was measured there.

    Prints what the guard catches and falsely flags before and after, on the labelled prompts of
    --evaluate. Give harmful prompts of other categories too: a pack moves the threshold of all.

    Example: latentguard pack add guards/qwen --name fraud --examples fraud.jsonl
    """
    from latentguard.guard import packs

    with changed_guard(guard, out) as target:
        loaded = read_guard(guard)
        require_calibrated(loaded, guard)
        columns = guard_columns(loaded, text_column)
        positives = read_side(examples, columns, harmful=True)
        negatives = read_side(harmless, columns, harmful=False)
        packs.plan_pack(loaded, name, positives, negatives)  # says what is wrong at once
        labelled = _labelled_prompts(loaded, evaluate, text_column)
        loaded, backend = load_guard_model(
            loaded, model, allow_mismatch=allow_mismatch, device_map=device_map
        )
        change = partial(packs.add, name=name, examples=positives, harmless=negatives)
        changed, comparisons = _measure_change(change, loaded, backend, labelled)
        save_guard(changed, target)
    echo_err(f"Pack '{name}' added to {target}.")
    _echo_change(changed, comparisons, evaluate)


@pack.command(name="list")
def show(guard: GuardSource) -> None:
    """List the packs of a guard: name, number of examples, threshold.

    Example: latentguard pack list guards/qwen
    """
    loaded = read_guard(guard)
    categories = loaded.categories
    for name, one in (categories.packs if categories else {}).items():
        assert categories is not None
        cut_off = categories.cut_off(name, loaded.threshold)
        counts = f"{one.examples} harmful, {one.harmless} harmless examples"
        typer.echo(f"{name}\t{counts}\tflags from a category score of {cut_off:.3f} on")
    if not categories or not categories.packs:
        echo_err("No packs. Add one: latentguard pack add GUARD --name NAME --examples FILE")


@pack.command()
def remove(  # noqa: PLR0913, PLR0917 (each is an option)
    guard: GuardSource,
    name: Annotated[str, typer.Argument(help="Name of the pack.")],
    harmless: HarmlessTraffic = None,
    evaluate: Evaluate = None,
    text_column: TextColumn = "text",
    model: MovedModel = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
    out: GuardOut = None,
) -> None:
    """Remove a pack, and calibrate again for the rate that the guard promised.

    Example: latentguard pack remove guards/qwen fraud
    """
    from latentguard.guard import packs

    with changed_guard(guard, out) as target:
        loaded = read_guard(guard)
        require_calibrated(loaded, guard)
        negatives = read_side(harmless, guard_columns(loaded, text_column), harmful=False)
        packs.without_pack(loaded, name, negatives)  # says what is wrong at once
        labelled = _labelled_prompts(loaded, evaluate, text_column)
        loaded, backend = load_guard_model(
            loaded, model, allow_mismatch=allow_mismatch, device_map=device_map
        )
        change = partial(packs.remove, name=name, harmless=negatives)
        changed, comparisons = _measure_change(change, loaded, backend, labelled)
        save_guard(changed, target)
    echo_err(f"Pack '{name}' removed from {target}.")
    _echo_change(changed, comparisons, evaluate)


def _labelled_prompts(guard: LatentGuard, source: str | None, text_column: str) -> list[Prompt]:
    """What a change is measured on."""
    from latentguard.guard.evaluation import require_labels

    if source is None:
        return load_contrast("validation")
    prompts = read_prompts(source, columns=guard_columns(guard, text_column))
    require_labels(prompts)
    return prompts


def _measure_change(
    change: Callable[..., LatentGuard],
    guard: LatentGuard,
    backend: ChatModel,
    labelled: list[Prompt],
) -> tuple[LatentGuard, list[Comparison]]:
    """The changed guard, and what it does with labelled prompts beside what it did before."""
    from latentguard.guard.evaluation import compare

    with progress("pack") as view:
        before = list(guard.scan(backend, labelled, progress=view.advance))
        changed = change(guard, backend, progress=view.advance)
        after = list(changed.scan(backend, labelled, progress=view.advance))
    return changed, compare(labelled, before, after)


def _echo_change(guard: LatentGuard, comparisons: list[Comparison], evaluate: str | None) -> None:
    note = "On built-in prompts of other categories (--evaluate)."
    typer.echo(f"Threshold {guard.threshold:.6g}: {guard.promise}.")
    echo_changes(comparisons, f"On {evaluate}." if evaluate else note)
