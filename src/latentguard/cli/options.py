"""Options and enumerations that several verbs share."""

from __future__ import annotations

from enum import StrEnum, auto
from pathlib import Path
from typing import Annotated

import typer

OLD_NAMES = {
    "readout": "probe",
    "slice-column": "segment-column",
    "slice-header": "segment-header",
}
"""Option names of earlier versions, which still work and which no help shows."""


class Amount(StrEnum):
    """How many prompts ``stress`` asks."""

    small = auto()
    full = auto()


class Budget(StrEnum):
    """How much of the study is done."""

    paper = auto()
    small = auto()


class Engine(StrEnum):
    """What runs the model over prompts."""

    local = auto()
    ray = auto()


class ProbeKind(StrEnum):
    """The rule that turns hidden states into a score."""

    linear = auto()
    centroid = auto()


class Protocol(StrEnum):
    """How the study is done."""

    controlled = auto()
    paper = auto()


class Quantize(StrEnum):
    """How weights are quantised on loading; the names of ``models/loading.py``."""

    int8 = auto()
    nf4 = auto()


class Side(StrEnum):
    """What rows without a label are taken for."""

    harmful = auto()
    harmless = auto()


AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch",
        help="Accept a model that differs from the guard's; says how far scores move.",
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="'auto' spreads a large model over GPUs and main memory; scores stay the same."
    ),
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, ...; auto: float32 on a CPU, bfloat16 on a GPU.")
]
GuardFolder = Annotated[Path, typer.Argument(help="Folder that 'latentguard fit' wrote.")]
GuardOut = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the changed guard; default: change it in place."),
]
GuardSource = Annotated[
    str,
    typer.Argument(
        help="Guard folder, Hub id (org/guard), or 'default': the packaged guard of SmolLM2-135M."
    ),
]
Harmful = Annotated[list[str] | None, typer.Option(help="Harmful prompts; repeatable.")]
Harmless = Annotated[list[str] | None, typer.Option(help="Harmless prompts; repeatable.")]
HarmlessTraffic = Annotated[
    list[str] | None,
    typer.Option(help="Harmless prompts like your traffic; default: the built-in ones."),
]
Label = Annotated[Side | None, typer.Option(help="Label for rows that have none.")]
Model = Annotated[
    str, typer.Option(help="A Hub id, a folder, a GGUF file, or 'default' (SmolLM2-135M).")
]
MovedModel = Annotated[
    str | None, typer.Option(help="Folder or id of the guard's model, if it has moved.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a guard that is already in the folder.")
]
PromptSource = Annotated[
    str, typer.Argument(help="File of prompts, '-' for standard input, or Hub data set.")
]
SecondOpinionSource = Annotated[
    str | None,
    typer.Option(
        "--second-opinion",
        help="Decides on prompts in the review band: a guard (folder, Hub id), a guard model such "
        "as Llama Guard, or an OpenAI-compatible URL, which is sent their texts: "
        "https://HOST/v1/moderations or http://HOST/v1#MODEL.",
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column that holds the prompt.")]
