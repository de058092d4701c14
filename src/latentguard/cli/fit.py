"""The verb ``fit``; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.inputs import read_side, require_distinct
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.loading import load_model, require_model, save_guard
from latentguard.cli.options import (
    DeviceMap,
    Dtype,
    Harmful,
    Harmless,
    Model,
    Overwrite,
    ProbeKind,
    Quantize,
    TextColumn,
)
from latentguard.cli.outputs import output_folder, require_no_guard
from latentguard.data.builtin import DEFAULT_ROWS, load_training_rows
from latentguard.data.prompt_files import Columns, read_replies
from latentguard.models.sources import cache_folder
from latentguard.prompts import Prompt, Reply

if TYPE_CHECKING:
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.models.chat_model import ChatModel
    from latentguard.probes.probe import Kind

CAPTURES = "captures"
"""In the cache folder: the states of a fit that is not finished."""


def fit(  # noqa: PLR0913, PLR0917 (each is an option)
    out: Annotated[Path, typer.Option(help="Folder for the guard.")],
    model: Model = "default",
    contrast: Annotated[
        bool, typer.Option("--contrast", help="Fit on the built-in prompts (the default).")
    ] = False,
    rows: Annotated[
        int, typer.Option(min=2, help="How many of the built-in prompts to fit on.")
    ] = DEFAULT_ROWS,
    all_rows: Annotated[
        bool,
        typer.Option(
            "--all-rows", help="Fit on all built-in prompts: a little better, much slower."
        ),
    ] = False,
    harmful: Harmful = None,
    harmless: Harmless = None,
    reading: Annotated[
        str,
        typer.Option(
            help="Positions to read: pooled, attended, t_inst, t_post, post+K, sealed or span."
        ),
    ] = "pooled",
    probe: Annotated[
        ProbeKind, typer.Option(help="linear, or centroid: the paper's rule.")
    ] = ProbeKind.linear,
    long: Annotated[
        bool, typer.Option("--long", help="Also read long prompts and chats in chunks.")
    ] = False,
    replies: Annotated[
        list[str] | None,
        typer.Option(
            help="Labelled replies (prompt, reply, label): also judge what the model says."
        ),
    ] = None,
    text_column: TextColumn = "text",
    dtype: Dtype = "auto",
    quantize: Annotated[
        Quantize | None,
        typer.Option(
            help="Quantise the weights: int8 (needs torchao) or nf4 (needs bitsandbytes)."
        ),
    ] = None,
    device_map: DeviceMap = None,
    overwrite: Overwrite = False,
) -> None:
    """Fit a guard for MODEL and write it to OUT.

    For the paper's rule, without its choice of refused and accepted prompts: --harmful
    advbench.jsonl --harmless alpaca.jsonl --reading t_inst --probe centroid. Of labelled rows in
    --harmful only the harmful ones are used, and likewise for --harmless.

    For a large model: --device-map auto, and --quantize int8 or nf4. A guard of a quantised model
    does not work on the plain one; the other verbs quantise as 'fit' did.

    With --replies the guard also judges what the model says, token by token. The rows are a file or
    a Hub data set, such as PKU-Alignment/BeaverTails:30k_train; no such rows are built in.

    A killed fit continues where it stopped when it is called again.

    Example: latentguard fit --model Qwen/Qwen2.5-7B-Instruct --out guards/qwen
    """
    kind: Kind = probe.value  # type: ignore[assignment]
    require_no_guard(out, overwrite=overwrite)
    require_model(model)
    advice = f"States are kept in {cache_folder() / CAPTURES}. Run the same command again to go on."
    with output_folder(out), explain_interrupt(advice):
        columns = Columns(text=text_column)
        prompts = read_side(harmful, columns, harmful=True)
        prompts += read_side(harmless, columns, harmful=False)
        if contrast or not prompts:
            prompts += load_training_rows(None if all_rows else rows)
        _check_training(prompts, reading, kind)
        labelled_replies = _training_replies(replies)
        loaded_dtype = f"{dtype}/{quantize.value}" if quantize else dtype
        backend = load_model(model, loaded_dtype, device_map)
        guard = _fit_guard(backend, prompts, reading, kind)
        guard = _fit_long(guard, backend) if long else guard
        save_guard(_fit_replies(guard, backend, labelled_replies), out)
    echo_err(f"Guard written to {out}. Next: latentguard calibrate {out} --harmless FILE")
    if replies:
        echo_err(f"For replies: latentguard calibrate {out} --replies HARMLESS")


def _check_training(prompts: list[Prompt], reading: str, probe: Kind) -> None:
    """Say what cannot be fitted, and warn of form that tells the label apart."""
    from latentguard.data.surface_audit import surface_warnings
    from latentguard.probes.fitting import require_kind_for
    from latentguard.probes.probe import require_both_classes
    from latentguard.states import Reading, require_reading_name

    require_reading_name(reading)
    require_kind_for(Reading(reading, ()), probe)
    require_both_classes([bool(p.harmful) for p in prompts], probe)
    for warning in surface_warnings(prompts):
        echo_err(f"Warning: {warning}")


def _fit_guard(backend: ChatModel, prompts: list[Prompt], reading: str, probe: Kind) -> LatentGuard:
    from latentguard.guard.latent_guard import LatentGuard
    from latentguard.guard.query_fitting import query_rows
    from latentguard.probes.capture_cache import CaptureCache

    cache = CaptureCache(cache_folder() / CAPTURES)
    read_twice = len(query_rows(backend, prompts)) if reading == "attended" else 0
    with cache, progress("capture", len(prompts) + read_twice) as view:
        return LatentGuard.fit(
            backend,
            prompts,
            reading=reading,
            probe=probe,
            progress=view.advance,
            cache=cache,
        )


def _training_replies(sources: list[str] | None) -> list[Reply]:
    """The labelled replies, checked before the model loads."""
    from latentguard.guard.reply_fitting import draw_training_replies, require_reply_labels

    require_distinct(sources or ())
    replies = [reply for source in sources or () for reply in read_replies(source)]
    sample = draw_training_replies(replies)
    if len(sample) < len(replies):
        echo_err(f"{len(sample):,} of {len(replies):,} replies are drawn to fit on.")
    if sample:
        require_reply_labels(sample)
    return sample


def _fit_replies(guard: LatentGuard, backend: ChatModel, replies: list[Reply]) -> LatentGuard:
    from latentguard.guard.reply_fitting import fit_replies

    if not replies:
        return guard
    with progress("replies", len(replies)) as view:
        return fit_replies(backend, guard, replies, progress=view.advance)


def _fit_long(guard: LatentGuard, backend: ChatModel) -> LatentGuard:
    from latentguard.guard.chunk_calibration import fit_chunking

    with progress("long prompts") as view:
        return fit_chunking(backend, guard, progress=view.advance)
