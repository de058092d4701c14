"""The verb ``fit``; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.inputs import read_side
from latentguard.cli.loading import load_model, save_guard
from latentguard.cli.options import (
    DeviceMap,
    Dtype,
    Harmful,
    Harmless,
    Model,
    ProbeKind,
    Quantize,
    TextColumn,
)
from latentguard.data.builtin import load_traffic
from latentguard.prompts import Columns


def fit(  # noqa: PLR0913, PLR0917 (each is an option)
    out: Annotated[Path, typer.Option(help="Folder for the guard.")],
    model: Model = "default",
    contrast: Annotated[
        bool, typer.Option("--contrast", help="Train on the built-in prompts (the default).")
    ] = False,
    harmful: Harmful = None,
    harmless: Harmless = None,
    reading: Annotated[
        str,
        typer.Option(
            help="pooled (t_inst, t_post, two means), t_inst, t_post, post+K, sealed, span."
        ),
    ] = "pooled",
    probe: Annotated[
        ProbeKind, typer.Option(help="linear, or centroid (the paper's rule).")
    ] = ProbeKind.linear,
    long: Annotated[
        bool, typer.Option("--long", help="Also read long prompts and chats by windows.")
    ] = False,
    text_column: TextColumn = "text",
    dtype: Dtype = "auto",
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Weights: int8 (needs torchao) or nf4 (needs bitsandbytes)."),
    ] = None,
    device_map: DeviceMap = None,
) -> None:
    """Fit a guard for MODEL and write it to OUT.

    The paper's guard: --harmful advbench.jsonl --harmless alpaca.jsonl --reading t_inst --probe
    centroid. Rows that carry a label are used only for the side that their file is named for.

    A large model: --device-map auto, and --quantize int8 or nf4. A guard is of the quantised model
    or of the plain one, never of both; the other verbs quantise as it was fitted.

    Example: latentguard fit --model Qwen/Qwen2.5-7B-Instruct --out guards/qwen
    """
    from latentguard.data.surface_audit import surface_warnings
    from latentguard.guard.latent_guard import LatentGuard

    columns = Columns(text=text_column)
    sides = read_side(harmful, columns, harmful=True) + read_side(harmless, columns, harmful=False)
    prompts = sides + (load_traffic("train") if contrast or not sides else [])
    for warning in surface_warnings(prompts):
        echo_err(f"Warning: {warning}")
    backend = load_model(model, f"{dtype}/{quantize.value}" if quantize else dtype, device_map)
    with progress("capture", len(prompts)) as bar:
        guard = LatentGuard.fit(
            backend,
            prompts,
            reading=reading,
            probe=probe.value,  # type: ignore[arg-type]
            progress=bar.advance,
        )
    if long:
        from latentguard.guard.chunk_calibration import fit_windows

        with progress("windows") as bar:
            guard = fit_windows(backend, guard, progress=bar.advance)
    save_guard(guard, out)
    echo_err(f"Guard written to {out}. Next: latentguard calibrate {out} --harmless FILE")
