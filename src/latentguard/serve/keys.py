"""API keys: read from a file or the environment, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from latentguard.errors import LatentGuardError
from latentguard.serve.faults import Unauthorized

VARIABLE = "LATENTGUARD_API_KEYS"
"""Environment variable with keys, separated by commas or line ends."""


class Keys:
    """The keys that clients may show; with none, everybody may come in."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Keep digests of the keys only."""
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def require(self, header: str) -> str:
        """The client's name, the first 8 hex digits of its key's SHA-256; ``-`` without keys.

        Every key is compared, whichever fits, so that the time taken says nothing.

        Raises:
            Unauthorized: unless ``header`` is ``Bearer KEY`` with one of the keys.
        """
        if not self._digests:
            return "-"
        scheme, _, key = header.partition(" ")
        shown = _digest(key.strip())
        found = [hmac.compare_digest(shown, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(found):
            raise Unauthorized("A valid API key is needed: send 'Authorization: Bearer KEY'.")
        return shown.hex()[:8]


def read_keys(file: Path | None, environment: str | None) -> Keys:
    """Keys of a file (one a line; ``#`` begins a comment) and of the environment.

    Raises:
        LatentGuardError: if the file is given and holds no key.
    """
    lines = (environment or "").replace(",", "\n").splitlines()
    if file is not None:
        from_file = _clean(file.read_text("utf-8").splitlines())
        if not from_file:
            raise LatentGuardError(f"{file} holds no API key; expected one a line.")
        lines += from_file
    return Keys(_clean(lines))


def _clean(lines: Sequence[str]) -> list[str]:
    words = (line.split("#")[0].strip() for line in lines)
    return [word for word in words if word]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
