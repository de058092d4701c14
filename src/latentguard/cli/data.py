"""The verbs ``data list``, ``data fetch`` and ``data import-released``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.console import echo_err
from latentguard.cli.interrupts import explain_interrupt
from latentguard.cli.outputs import output_file, output_folder
from latentguard.errors import LatentGuardError

if TYPE_CHECKING:
    from latentguard.data.public_sets import PublicSet

data = typer.Typer(
    no_args_is_help=True, help="The public data sets that the study and the benchmark use."
)

Folder = Annotated[Path, typer.Option(help="Data folder, for 'latentguard study --data-dir'.")]


@data.command(name="list")
def show(data_dir: Folder = Path("data")) -> None:
    """List the public sets: which experiment needs each, where it comes from, and what is there.

    'latentguard study --data-dir' reads files of these names. A set without a pool is not read by
    any experiment yet. Sets marked 'gated' need an account on the Hub that accepted their terms.

    Example: latentguard data list --data-dir data
    """
    from rich.console import Console
    from rich.table import Table

    from latentguard.data.download import inspect_set
    from latentguard.data.public_sets import PUBLIC_SETS
    from latentguard.study.prompt_groups import FOLDER

    heads = ("file", "experiments", "pools", "rows", "in the folder", "licence", "from")
    view = Table(*heads, box=None)
    for one in PUBLIC_SETS:
        local = inspect_set(one, data_dir)
        contents = local.state if local.state == "missing" else f"{local.rows} ({local.state})"
        view.add_row(
            f"{one.name}.jsonl",
            ", ".join(one.experiments),
            ", ".join(pool for pool, names in FOLDER.items() if one.name in names),
            str(one.rows),
            contents,
            one.licence,
            _origin(one),
        )
    Console().print(view)
    typer.echo("\nAlso read, if you put them there:")
    public = {one.name for one in PUBLIC_SETS}
    for pool, names in FOLDER.items():
        for name in names:
            if name not in public:
                state = "there" if (data_dir / f"{name}.jsonl").exists() else "missing"
                typer.echo(f"  {name}.jsonl, for {pool} ({state})")
    typer.echo(f"\nGet the sets: latentguard data fetch --out {data_dir}")


@data.command()
def fetch(
    out: Annotated[Path, typer.Option(help="Data folder.")] = Path("data"),
    mirror: Annotated[
        Path | None, typer.Option(help="Folder that has the files; the Hub is not asked.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this set, such as 'advbench'; repeatable.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files with other content.")
    ] = False,
) -> None:
    """Put the public sets into a folder, with SHA-256, licence and count of each in sources.json.

    They come from the Hugging Face Hub (extra 'hub-data'), or with --mirror from a folder of
    files of these names. If a set cannot be fetched, the command says where it is published,
    fetches the others, and ends with exit code 1.

    Example: latentguard data fetch --out data --mirror /mnt/mirror
    """
    from latentguard.data.download import fetch_set
    from latentguard.data.public_sets import PUBLIC_SETS

    sets = [one for one in PUBLIC_SETS if not only or one.name in only]
    _require_names(only or [])
    if mirror and not mirror.is_dir():
        raise LatentGuardError(f"--mirror should be a folder; found nothing at {mirror}.")
    failures = []
    advice = f"Whole files stay in {out}. Run the same command again to go on."
    with output_folder(out), explain_interrupt(advice):
        for one in sets:
            try:
                fetched = fetch_set(one, out, mirror=mirror, overwrite=overwrite)
            except LatentGuardError as error:
                failures.append(one.name)
                echo_err(f"{one.name}: {error}")
                continue
            _echo_fetched(one, fetched.rows, fetched.sha256)
    if failures:
        raise LatentGuardError(
            f"{len(failures)} of {len(sets)} sets are missing: {', '.join(failures)}."
        )


@data.command()
def import_released(
    files: Annotated[list[Path], typer.Argument(help="The authors' .pt files.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
) -> None:
    """Read the authors' released .pt files into one safetensors file, without running them.

    A .pt file holds a pickle, which can run anything when it is read. Only arrays and tensors of
    numbers are read here; a file that names anything else is refused.

    Example: latentguard data import-released qwen-dir-hf.pt --out released.safetensors
    """
    from latentguard.data.released import import_released as write_released

    with output_file(out):
        if out.exists():
            raise LatentGuardError(f"{out} is there, and would be overwritten; name another file.")
        for name, shape in write_released(files, out).items():
            typer.echo(f"{name}\t{list(shape)}")
    echo_err(f"Written to {out}.")


def _origin(one: PublicSet) -> str:
    if one.hub is None:
        return one.upstream
    return f"{one.hub.id}{' (gated)' if one.hub.is_gated else ''}"


def _require_names(names: list[str]) -> None:
    from latentguard.data.public_sets import PUBLIC_SETS

    available = [one.name for one in PUBLIC_SETS]
    unknown = [name for name in names if name not in available]
    if unknown:
        raise LatentGuardError(
            f"There is no public set '{unknown[0]}'; expected {', '.join(available)}."
        )


def _echo_fetched(one: PublicSet, rows: int, sha256: str) -> None:
    expected = "" if rows == one.rows else f" (expected {one.rows:,})"
    typer.echo(f"{one.name}\t{rows:,} rows{expected}\t{one.licence}\tsha256 {sha256}")
