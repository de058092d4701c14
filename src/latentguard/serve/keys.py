"""API keys: read from a file or the environment, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Sequence
from pathlib import Path

from latentguard.errors import LatentGuardError
from latentguard.serve.errors import Unauthorized

VARIABLE = "LATENTGUARD_API_KEYS"
"""Environment variable with keys, separated by commas or line ends."""

COMMENT = re.compile(r"(?:^|\s)#")


class ApiKeys:
    """The keys that clients may show; with none, everybody may come in."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Keep digests of the keys only.

        Raises:
            LatentGuardError: if a key is empty, since ``Bearer`` alone would show it.
        """
        if not all(key.strip() for key in keys):
            raise LatentGuardError("An API key is empty; expected at least one character.")
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def replace(self, other: ApiKeys) -> None:
        """Take the keys of another from now on."""
        self._digests = other._digests

    def require(self, header: str) -> str:
        """The client's name, the first 8 hex digits of its key's SHA-256; ``-`` without keys.

        Every key is compared, whichever fits, so that the time taken says nothing.

        Raises:
            Unauthorized: unless ``header`` is ``Bearer KEY`` with one of the keys.
        """
        if not self._digests:
            return "-"
        scheme, _, key = header.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, valid_digest) for valid_digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("A valid API key is needed: send 'Authorization: Bearer KEY'.")
        return digest.hex()[:8]


def load_keys(file: Path | None, environment: str | None) -> ApiKeys:
    """ApiKeys of a file (one a line) and of the environment.

    ``#`` begins a comment at the start of a line or after a blank; elsewhere it is part of a key.

    Raises:
        LatentGuardError: if the file or the variable is given and holds no key, since without keys
            everybody may come in.
    """
    keys = list[str]()
    if file is not None:
        keys += _clean(file.read_text("utf-8"), f"{file} holds no API key; expected one a line.")
    if environment is not None:
        lack = f"{VARIABLE} holds no API key; expected keys with commas between, or no variable."
        keys += _clean(environment.replace(",", "\n"), lack)
    return ApiKeys(keys)


def key_of_environment(variable: str) -> str | None:
    """The key that an environment variable holds; None without the variable.

    Raises:
        LatentGuardError: if the variable is there and empty.
    """
    value = os.environ.get(variable)
    if value is None:
        return None
    if not value.strip():
        raise LatentGuardError(f"{variable} holds no key; expected one, or no variable.")
    return value.strip()


def _clean(text: str, lack: str) -> list[str]:
    words = [COMMENT.split(line)[0].strip() for line in text.splitlines()]
    if not any(words):
        raise LatentGuardError(lack)
    return [word for word in words if word]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
