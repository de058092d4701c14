"""Control-C in a long verb: what is kept, and how to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from latentguard.cli.console import echo_err

INTERRUPTED = 130
"""The exit code after Control-C."""


@contextmanager
def explain_interrupt(kept: str | Callable[[], str]) -> Iterator[None]:
    """End the verb on Control-C with a sentence on what is kept, and exit code 130.

    Args:
        kept: What is kept and how to go on; called at the moment of Control-C if it depends on it.
    """
    try:
        yield
    except KeyboardInterrupt:
        echo_err(f"Interrupted. {kept() if callable(kept) else kept}")
        raise typer.Exit(INTERRUPTED) from None
