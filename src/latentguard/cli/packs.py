"""Category packs: ``latentguard pack add``, ``list`` and ``remove``."""

from __future__ import annotations

from typing import Annotated

import typer

from latentguard.cli.app import app
from latentguard.cli.console import columns_of, keep, load_guard, note, progress, read_side
from latentguard.cli.options import AllowMismatch, DeviceMap, GuardFolder, Moved, TextColumn

packs = typer.Typer(no_args_is_help=True, help="Risk categories added to a guard from examples.")
app.add_typer(packs, name="pack")

Harmless = Annotated[
    list[str] | None,
    typer.Option(help="Harmless prompts like your traffic; default: the built-in ones."),
]


@packs.command()
def add(  # noqa: PLR0913, PLR0917 (the contract names these options)
    guard: GuardFolder,
    name: Annotated[str, typer.Option(help="Of the category, such as sexual.")],
    examples: Annotated[list[str], typer.Option(help="20 to 50 harmful examples; repeatable.")],
    harmless: Harmless = None,
    text_column: TextColumn = "text",
    model: Moved = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
) -> None:
    """Add a category that can flag, and calibrate anew for the rate that the guard promised.

    Give --harmless prompts of the same kind as the examples wherever you can: half of them are
    what the examples are held against, so that the pack learns harm and not the kind of text; the
    other half calibrates. Without them a pack may flag harmless texts that resemble its examples.
    A guard that was calibrated on your own prompts needs them. One that was fitted with --long is
    calibrated anew for long prompts and chats, too, which takes minutes on a CPU. With
    --allow-mismatch the guard becomes one of the model that it met: what it then promises was
    measured there.
    """
    from latentguard.guard import packs

    loaded, backend = load_guard(guard, model, allow_mismatch=allow_mismatch, device_map=device_map)
    columns = columns_of(loaded, text_column)
    given = read_side(examples, columns, harmful=True)
    calm = read_side(harmless, columns, harmful=False)
    with progress("pack") as bar:
        changed = packs.add(loaded, backend, name, given, calm, progress=bar.advance)
    keep(changed, guard)
    note(f"Pack '{name}' added to {guard}.")
    typer.echo(f"Threshold {changed.threshold:.6g}: {changed.promise}.")


@packs.command(name="list")
def show(guard: GuardFolder) -> None:
    """List the packs of a guard: name, examples, cut-off."""
    from latentguard.guard.categories import Categories
    from latentguard.guard.latent_guard import LatentGuard

    loaded = LatentGuard.load(guard)
    held = loaded.part(Categories)
    for name, pack in (held.packs if held else {}).items():
        assert held is not None
        cut = held.cut_off(name, loaded.threshold)
        counts = f"{pack.examples} harmful, {pack.harmless} harmless examples"
        typer.echo(f"{name}\t{counts}\tflags from a category score of {cut:.3f} on")
    if not held or not held.packs:
        note("No packs. Add one: latentguard pack add GUARD --name NAME --examples FILE")


@packs.command()
def remove(
    guard: GuardFolder,
    name: Annotated[str, typer.Argument(help="Of the pack.")],
    harmless: Harmless = None,
    text_column: TextColumn = "text",
    model: Moved = None,
    allow_mismatch: AllowMismatch = False,
    device_map: DeviceMap = None,
) -> None:
    """Remove a pack, and calibrate anew for the rate that the guard promised."""
    from latentguard.guard import packs

    loaded, backend = load_guard(guard, model, allow_mismatch=allow_mismatch, device_map=device_map)
    calm = read_side(harmless, columns_of(loaded, text_column), harmful=False)
    with progress("pack") as bar:
        changed = packs.remove(loaded, backend, name, calm, progress=bar.advance)
    keep(changed, guard)
    note(f"Pack '{name}' removed from {guard}.")
    typer.echo(f"Threshold {changed.threshold:.6g}: {changed.promise}.")
