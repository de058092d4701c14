"""The command line: one function a verb."""

from __future__ import annotations

import sys

from latentguard.cli import calibration, guards, packs, parity, serve, stress, study
from latentguard.cli.app import app
from latentguard.cli.console import note
from latentguard.errors import LatentGuardError

__all__ = ["app", "calibration", "guards", "main", "packs", "parity", "serve", "stress", "study"]


def main() -> None:
    """Run the command line: exit code 0, 1 (an error in one sentence) or 2 (usage)."""
    try:
        app()
    except (LatentGuardError, OSError) as error:  # or a full disk, a folder that is a file
        note(f"Error: {error}")
        sys.exit(1)
