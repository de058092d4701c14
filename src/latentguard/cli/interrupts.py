"""Control-C in a long verb: what is kept, and how to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from latentguard.cli.console import echo_err

INTERRUPTED = 130
"""The exit code after Control-C."""


@contextmanager
def explain_interrupt(advice: str | Callable[[], str]) -> Iterator[None]:
    """End the verb on Control-C with a sentence on what is kept, and exit code 130.

    Args:
        advice: What is kept and how to go on; called on Control-C if it depends on the moment.
    """
    try:
        yield
    except KeyboardInterrupt:
        echo_err(f"Interrupted. {advice() if callable(advice) else advice}")
        raise typer.Exit(INTERRUPTED) from None
