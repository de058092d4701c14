"""The verb ``sign``; heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentguard.cli.options import GuardFolder


def sign(
    guard: GuardFolder,
    key: Annotated[Path, typer.Option(help="Ed25519 private key, PEM.")],
) -> None:
    """Sign GUARD, so that 'latentguard serve --verify-key' takes this guard and no other.

    Every change of the guard (calibrate, pack) needs a new signature. To make the keys:
    openssl genpkey -algorithm ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out key.pub

    Example: latentguard sign guards/qwen --key key.pem
    """
    from latentguard.guard.signature import sign_guard

    typer.echo(sign_guard(guard, key))
