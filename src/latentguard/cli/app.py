"""The Typer application: every verb in its panel of ``latentguard --help``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from rich.markup import escape

from latentguard.cli.adapt import adapt
from latentguard.cli.audit import audit
from latentguard.cli.benchmark import benchmark
from latentguard.cli.calibrate import calibrate
from latentguard.cli.compare import compare
from latentguard.cli.data import data
from latentguard.cli.demo.command import demo
from latentguard.cli.drift import drift
from latentguard.cli.evaluate import evaluate
from latentguard.cli.fit import fit
from latentguard.cli.guards import guards, pull
from latentguard.cli.label import label
from latentguard.cli.options import OLD_NAMES
from latentguard.cli.pack import pack
from latentguard.cli.parity import parity
from latentguard.cli.review import review
from latentguard.cli.score import score
from latentguard.cli.serve.command import serve
from latentguard.cli.show import show
from latentguard.cli.sign import sign
from latentguard.cli.stress import stress
from latentguard.cli.study import study
from latentguard.cli.suggest import suggest

PANELS: dict[str, dict[str, Callable[..., Any]]] = {
    "Guard": {
        "demo": demo,
        "fit": fit,
        "calibrate": calibrate,
        "adapt": adapt,
        "suggest": suggest,
        "score": score,
        "review": review,
        "evaluate": evaluate,
        "benchmark": benchmark,
        "show": show,
        "guards": guards,
        "pull": pull,
        "drift": drift,
        "stress": stress,
    },
    "Serve": {"serve": serve, "sign": sign, "parity": parity},
    "Research": {"study": study, "compare": compare, "label": label, "audit": audit},
}
"""Panel -> verb -> its function, in the order of ``--help``."""

GROUPS: dict[str, dict[str, typer.Typer]] = {"Guard": {"pack": pack}, "Research": {"data": data}}
"""Panel -> group of verbs, such as ``pack add``."""


def current_name(name: str) -> str:
    """The name of today of an option, given without its dashes."""
    return OLD_NAMES.get(name, name)


def build_app() -> typer.Typer:
    """Build the application out of its verbs."""
    application = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"token_normalize_func": current_name},
        help="Read a chat model's own belief of harmfulness, and guard the model with it.",
        epilog="Start with 'latentguard demo'. Prompts are JSON Lines (id, text, label, "
        "category), CSV, Parquet, plain text, '-' for standard input, or a Hub data set as "
        "org/name:split.",
    )
    for panel, verbs in PANELS.items():
        for name, verb in verbs.items():
            application.command(name, rich_help_panel=panel)(verb)
        for name, group in GROUPS.get(panel, {}).items():
            application.add_typer(group, name=name, rich_help_panel=panel)
    return application


app = build_app()


def run_app() -> None:
    """Run the application on the words of the command line.

    Help texts are plain: Typer would have Rich read ``[judge]`` as markup and leave it out.
    """
    command = typer.main.get_command(app)
    _escape_help(command)
    command()


def _escape_help(command: Any) -> None:
    """Escape the square brackets in the help texts of a command, its options and its verbs."""
    for part in (command, *command.params):
        part.help = escape(part.help or "")
    for verb in getattr(command, "commands", {}).values():
        _escape_help(verb)
