"""The signature of a guard: Ed25519 over the bytes of ``guard.json``, in ``guard.sig`` beside it.

The JSON holds the digest of the tensors, so the signature covers the whole guard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentguard.errors import GuardError, require_extra
from latentguard.files import write_atomic
from latentguard.guard.artifact import JSON_FILE, SIGNATURE_FILE, read_record


class VerifyKey:
    """A public key that guards have to be signed with."""

    def __init__(self, file: str | Path) -> None:
        """Read a public key in PEM.

        Raises:
            GuardError: if it is none.
        """
        self._key = _read_key(file, "public")
        self._file = file

    def require_signed(self, folder: Path, content: bytes) -> None:
        """Check the signature in a guard's folder over the content of its JSON.

        Raises:
            GuardError: if there is none, or it is not of this key and content.
        """
        from cryptography.exceptions import InvalidSignature

        try:
            signature = (folder / SIGNATURE_FILE).read_bytes()
        except OSError:
            raise GuardError(
                f"{folder} has no signature; expected {SIGNATURE_FILE}. Sign it: latentguard sign "
                f"{folder} --key KEY"
            ) from None
        try:
            self._key.verify(signature, content)
        except InvalidSignature:
            raise GuardError(
                f"The signature of {folder} is not by the key {self._file}, or the guard was "
                "changed since. Restore the guard, or sign it again."
            ) from None


def sign_guard(folder: str | Path, key_file: str | Path) -> Path:
    """Sign a guard.

    Args:
        folder: Of the guard.
        key_file: The private key, in PEM without a password.

    Returns:
        Where the signature is.

    Raises:
        GuardError: if the folder holds no sound guard, or the key is none.
    """
    key = _read_key(key_file, "private")
    read_record(folder)
    target = Path(folder) / SIGNATURE_FILE
    write_atomic(target, key.sign((Path(folder) / JSON_FILE).read_bytes()))
    return target


def _read_key(file: str | Path, kind: str) -> Any:
    package = "cryptography.hazmat.primitives.serialization"
    pem = require_extra(package, "sign", "A guard's signature")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ed25519

    is_private = kind == "private"
    key_class = ed25519.Ed25519PrivateKey if is_private else ed25519.Ed25519PublicKey
    try:
        content = Path(file).read_bytes()
        key = (
            pem.load_pem_private_key(content, password=None)
            if is_private
            else pem.load_pem_public_key(content)
        )
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        key = None
    if not isinstance(key, key_class):
        raise GuardError(
            f"{file} is no {kind} key. Expected Ed25519 in PEM without a password, as 'openssl "
            "genpkey -algorithm ed25519' and 'openssl pkey -pubout' write it."
        )
    return key
