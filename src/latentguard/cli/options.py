"""Options that several verbs share."""

from __future__ import annotations

from enum import StrEnum, auto
from pathlib import Path
from typing import Annotated

import typer


class Engine(StrEnum):
    """What runs the model over prompts."""

    local = auto()
    ray = auto()


class Quantize(StrEnum):
    """How weights are quantised on loading; the names of ``model/loading.py``."""

    int8 = auto()
    nf4 = auto()


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
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="'auto' spreads a large model over GPUs, then memory; the guard is the same anywhere."
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column that holds the prompt.")]
Label = Annotated[Side | None, typer.Option(help="Label of unlabelled rows.")]
GuardFolder = Annotated[Path, typer.Argument(help="Folder that 'latentguard fit' wrote.")]
Moved = Annotated[str | None, typer.Option(help="If the model has moved.")]
AllowMismatch = Annotated[
    bool,
    typer.Option("--allow-mismatch", help="Go on with another model; says how far scores move."),
]
