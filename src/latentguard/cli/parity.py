"""The verb ``parity``: the same guard on two backends."""

from __future__ import annotations

from typing import Annotated

import typer

from latentguard.cli.console import echo_err, progress
from latentguard.cli.loading import load_model, read_guard
from latentguard.cli.options import GuardSource, MovedModel


def parity(
    guard: GuardSource,
    backends: Annotated[
        str, typer.Option(help="The reference and the engine to compare.")
    ] = "hf,vllm",
    n: Annotated[
        int, typer.Option(help="Number of prompts of the built-in test split; half are long.")
    ] = 64,
    model: MovedModel = None,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Largest score difference allowed, in standard deviations; exit code 1 beyond."
        ),
    ] = 0.1,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Let vLLM compile the model, as its server does.")
    ] = False,
) -> None:
    """Print how far a guard's scores inside vLLM are from those on transformers.

    It tries batches of 1 and 32, short and long prompts, cached and uncached prefixes, and more
    requests than the cache holds. It needs vLLM in the same environment (docs/how-to/vllm.md).

    Example: latentguard parity guards/smollm2
    """
    from latentguard.errors import GuardError
    from latentguard.integrations.vllm import parity as inside
    from latentguard.integrations.vllm.backend import VllmModel

    if backends != "hf,vllm":
        raise typer.BadParameter("only 'hf,vllm' can be compared", param_hint="--backends")
    loaded = read_guard(guard)
    prompts = inside.material(n)
    backend = load_model(model or loaded.fingerprint.model, loaded.fingerprint.dtype)
    with progress("transformers", len(prompts)) as view:
        reference = list(loaded.scan(backend, prompts, progress=view.advance))
    del backend
    echo_err("Starting vLLM ...")
    how = (
        inside.ENGINE
        | inside.SMALL
        | {
            "enforce_eager": not compiled,
            "disable_log_stats": False,  # counts preemptions
        }
    )
    engine = VllmModel.load(guard, model, **how)
    differences = inside.compare(
        loaded, reference, engine, prompts, spare=lambda: inside.preemptions(engine)
    )
    table = inside.table(differences)
    typer.echo(table.csv(), nl=False)
    worst = max(one.spread for one in differences)
    if not worst <= tolerance:
        raise GuardError(
            f"Scores inside vLLM differ by up to {worst:.2g} spreads, allowed {tolerance:g}; "
            "calibrate the guard on vLLM's own scores, or do not use it there."
        )
