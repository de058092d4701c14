"""The command line: one module a verb."""

from __future__ import annotations

import sys

from latentguard.cli.app import app, run_app
from latentguard.cli.console import echo_err
from latentguard.errors import LatentGuardError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line: exit code 0, 1 (an error in one sentence) or 2 (usage)."""
    try:
        run_app()
    except (LatentGuardError, OSError) as error:  # or a full disk, a folder that is a file
        echo_err(f"Error: {error}")
        sys.exit(1)
