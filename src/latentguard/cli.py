"""The command line: one function a verb; heavy imports stay inside them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.contrast import load_contrast
from latentguard.errors import LatentGuardError, PromptError
from latentguard.prompts import Columns, Prompt, read_prompts, side, stream_prompts

if TYPE_CHECKING:
    from latentguard.guard import LatentGuard
    from latentguard.model.hf import ChatModel
    from latentguard.states import Progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Read a chat model's own belief of harmfulness, and guard the model with it.",
    epilog="Start with [bold]latentguard demo[/]. Prompts are JSON Lines (id, text, label, "
    "category), CSV, Parquet, plain text, '-' for standard input, or a Hub data set as "
    "org/name:split.",
)


class Side(StrEnum):
    """What rows without a label are taken for."""

    harmful = auto()
    harmless = auto()


Model = Annotated[
    str, typer.Option(help="A Hub id, a folder, a GGUF file, or 'default' (SmolLM2-135M).")
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, ...; auto: float32 on a CPU, else bfloat16.")
]
TextColumn = Annotated[str, typer.Option(help="Column that holds the prompt.")]
Label = Annotated[Side | None, typer.Option(help="Label of unlabelled rows.")]
GuardFolder = Annotated[Path, typer.Argument(help="Folder that 'latentguard fit' wrote.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Report folder.")] = Path("reports/demo"),
    guard: Annotated[Path, typer.Option(help="Guard folder; reused if it is there.")] = Path(
        "guards/demo"
    ),
    model: Model = "default",
) -> None:
    """Fit, calibrate and try a guard on a real model; prints the report's path last.

    Uses the built-in contrast set. A second run reuses the guard.
    """
    from latentguard.demo import run

    with _progress("demo") as bar:
        folder = run(_load(model), guard, out, step=bar.step)
    typer.echo(folder / "report.html")


@app.command()
def fit(  # noqa: PLR0913, PLR0917 (the contract names these options)
    out: Annotated[Path, typer.Option(help="Folder for the guard.")],
    model: Model = "default",
    contrast: Annotated[
        bool, typer.Option("--contrast", help="Train on the built-in contrast set (the default).")
    ] = False,
    harmful: Annotated[list[str] | None, typer.Option(help="Harmful prompts; repeatable.")] = None,
    harmless: Annotated[
        list[str] | None, typer.Option(help="Harmless prompts; repeatable.")
    ] = None,
    reading: Annotated[
        str, typer.Option(help="t_inst, t_post, post+K, sealed, or span (t_inst and all after).")
    ] = "span",
    readout: Annotated[
        str, typer.Option(help="linear, or centroid (the paper's rule).")
    ] = "linear",
    text_column: TextColumn = "text",
    dtype: Dtype = "auto",
) -> None:
    """Fit a guard for MODEL and write it to OUT.

    The paper's guard: --harmful advbench.jsonl --harmless alpaca.jsonl --reading t_inst --readout
    centroid. Rows that carry a label are used only for the side that their file is named for.
    """
    from latentguard.audit import surface_warnings
    from latentguard.guard import LatentGuard

    sides = _side(harmful, text_column, harmful=True) + _side(harmless, text_column, harmful=False)
    prompts = sides + (load_contrast("train") if contrast or not sides else [])
    for warning in surface_warnings(prompts):
        _note(f"Warning: {warning}")
    backend = _load(model, dtype)
    with _progress("capture", len(prompts)) as bar:
        guard = LatentGuard.fit(
            backend,
            prompts,
            reading=reading,
            readout=readout,  # type: ignore[arg-type]
            progress=bar.advance,
        )
    guard.save(out)
    _note(f"Guard written to {out}. Next: latentguard calibrate {out} --harmless FILE")


@app.command()
def calibrate(
    guard: GuardFolder,
    harmless: Annotated[
        list[str] | None,
        typer.Option(help="Harmless prompts like your traffic; default: the built-in ones."),
    ] = None,
    max_fpr: Annotated[
        float | None, typer.Option(help="Rate to keep; 0.01, or 0.05 with the built-in prompts.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the Clopper-Pearson bound.")] = 0.95,
    text_column: TextColumn = "text",
    model: Annotated[str | None, typer.Option(help="If the model has moved.")] = None,
) -> None:
    """Set the guard's threshold so that it flags at most MAX_FPR of harmless prompts."""
    loaded, backend = _load_guard(guard, model)
    prompts = _side(harmless, text_column, harmful=False)
    if not harmless:
        prompts = [p for p in load_contrast("validation") if not p.harmful]
    rate = max_fpr if max_fpr is not None else (0.01 if harmless else 0.05)
    with _progress("calibrate", len(prompts)) as bar:
        calibrated = loaded.calibrate(
            backend, prompts, max_fpr=rate, confidence=confidence, progress=bar.advance
        )
    calibrated.save(guard)
    typer.echo(f"Threshold {calibrated.threshold:.6g}: {calibrated.promise}.")


@app.command()
def score(
    guard: GuardFolder,
    prompts: Annotated[str, typer.Argument(help="File, '-', or Hub data set.")],
    out: Annotated[
        Path | None, typer.Option(help="JSON Lines file; standard output if none.")
    ] = None,
    text_column: TextColumn = "text",
    model: Annotated[str | None, typer.Option(help="If the model has moved.")] = None,
) -> None:
    """Score prompts: one JSON object a line, in input order (id, score, probability, flagged).

    With --out, a killed run goes on where it stopped when it is called again.
    """
    from latentguard.verdicts import line_of, score_to_file

    loaded, backend = _load_guard(guard, model)
    rows = stream_prompts(prompts, columns=Columns(text=text_column, label=""))  # labels unread
    with _progress("score") as bar:
        if out is None:
            for verdict in loaded.scan(backend, rows, progress=bar.advance):
                typer.echo(line_of(verdict))
            return
        done = score_to_file(loaded, backend, rows, out, progress=bar.advance)
    _note(f"Verdicts in {out}" + (f" ({done} were there from an earlier run)." if done else "."))


@app.command()
def audit(
    files: Annotated[list[str], typer.Argument(help="Labelled files, or 'contrast'.")],
    text_column: TextColumn = "text",
    label: Label = None,
) -> None:
    """Say how well surface form alone separates the labels of a set (0.5: not at all)."""
    from rich.console import Console
    from rich.table import Table

    from latentguard.audit import audit as audit_set

    known = None if label is None else label is Side.harmful
    prompts = [p for file in files for p in _read(file, text_column, known)]
    found = audit_set(prompts)
    view = Table("feature", "separates", title=f"{found.n[0]} harmful, {found.n[1]} harmless")
    for name in ("ending", "form", "length", "ngrams"):
        view.add_row(name, f"{getattr(found, name):.3f}")
    Console().print(view)
    for counts in (found.endings, found.forms):
        rows = [f"{name} {a} / {b}" for name, (a, b) in counts.items()]
        typer.echo("harmful / harmless: " + ", ".join(rows))
    for warning in found.warnings:
        _note(f"Warning: {warning}")


@app.command()
def show(guard: GuardFolder) -> None:
    """Print what a guard is, what it promises, and what it is bound to."""
    from latentguard.artifact import model_card, read_folder
    from latentguard.guard import LatentGuard

    record, _ = read_folder(guard)
    typer.echo(model_card(record, promise=LatentGuard.load(guard).promise))
    for name, value in (record["fitted"] or {}).items():
        typer.echo(f"{name}: {value}")


@app.command()
def models() -> None:
    """List the models that are ready on this disk."""
    from latentguard.model.sources import cached_models

    found = list(cached_models())
    for model in found:
        typer.echo(f"{model.name}\t{model.size / 1e6:,.0f} MB\t{model.path}")
    if not found:
        typer.echo("None yet; 'latentguard demo' fetches the default model.")


def main() -> None:
    """Run the command line: exit code 0, 1 (an error in one sentence) or 2 (usage)."""
    try:
        app()
    except (LatentGuardError, OSError) as error:  # or a full disk, a folder that is a file
        _note(f"Error: {error}")
        sys.exit(1)


def _load(source: str, dtype: str = "auto") -> ChatModel:
    from transformers.utils import logging as transformers_logging

    from latentguard.model.hf import ChatModel

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    _note(f"Loading {source} ...")
    return ChatModel.load(source, dtype=dtype)


def _load_guard(folder: Path, model: str | None) -> tuple[LatentGuard, ChatModel]:
    from latentguard.guard import LatentGuard

    guard = LatentGuard.load(folder)
    backend = _load(model or guard.fingerprint.model, guard.fingerprint.dtype)
    guard.check(backend)
    return guard, backend


def _read(source: str, text_column: str, harmful: bool | None) -> list[Prompt]:
    if source == "contrast":
        return load_contrast()
    return read_prompts(source, columns=Columns(text=text_column), harmful=harmful)


def _side(sources: Sequence[str] | None, text_column: str, *, harmful: bool) -> list[Prompt]:
    prompts: list[Prompt] = []
    for source in sources or ():
        kept = side(_read(source, text_column, None), harmful=harmful)
        if not kept:
            wanted = "harmful" if harmful else "harmless"
            raise PromptError(f"{source} was given for {wanted} prompts and holds none.")
        prompts += kept
    return prompts


def _note(text: str) -> None:
    typer.echo(text, err=True)


class _Bar:
    """A progress bar on standard error."""

    def __init__(self, bar: object, task: object) -> None:
        self._bar, self._task = bar, task

    def advance(self, count: int) -> None:
        """So many more prompts are done."""
        self._bar.advance(self._task, count)  # type: ignore[attr-defined]

    def step(self, name: str, total: int) -> Progress:
        """A new step of so many prompts."""
        self._bar.reset(self._task, description=name, total=total)  # type: ignore[attr-defined]
        return self.advance


@contextmanager
def _progress(name: str, total: int | None = None) -> Iterator[_Bar]:
    from rich import progress as rich
    from rich.console import Console

    name_column = rich.TextColumn("{task.description:<28}")
    shown = (name_column, rich.BarColumn(), rich.MofNCompleteColumn())
    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    stderr = Console(stderr=True)  # verdicts may go to standard output
    with rich.Progress(*shown, *times, console=stderr, redirect_stdout=False) as bar:
        yield _Bar(bar, bar.add_task(name, total=total))
