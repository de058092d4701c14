"""A signed guard: whoever changes it, or signs with another key, is found out at load."""

import pytest

from fake_backend import FakeBackend, labelled
from guard_files import edit_guard
from latentguard.errors import GuardError
from latentguard.guard.artifact import CARD_FILE, SIGNATURE_FILE, TENSOR_FILE
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.signature import VerifyKey, sign_guard

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")

PRIVATE = serialization.PrivateFormat.PKCS8
PUBLIC = serialization.PublicFormat.SubjectPublicKeyInfo
PEM = serialization.Encoding.PEM


def make_keys(folder, name="key", password=None):
    """A private and a public key in files, as ``openssl genpkey`` writes them."""
    key = ed25519.Ed25519PrivateKey.generate()
    locked = serialization.NoEncryption()
    if password:
        locked = serialization.BestAvailableEncryption(password)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(PEM, PRIVATE, locked))
    public.write_bytes(key.public_key().public_bytes(PEM, PUBLIC))
    return private, public


@pytest.fixture(scope="module")
def guard():
    return LatentGuard.fit(FakeBackend(), labelled(30))


@pytest.fixture
def folder(guard, tmp_path):
    guard.save(tmp_path / "g")
    return tmp_path / "g"


def test_a_signed_guard_loads(guard, folder, tmp_path):
    private, public = make_keys(tmp_path)
    assert sign_guard(folder, private) == folder / SIGNATURE_FILE
    assert LatentGuard.load(folder, verify_key=VerifyKey(public)).digest == guard.digest
    assert LatentGuard.load(folder).digest == guard.digest


def test_one_that_was_never_signed(folder, tmp_path):
    with pytest.raises(GuardError, match=r"has no signature.*latentguard sign"):
        LatentGuard.load(folder, verify_key=VerifyKey(make_keys(tmp_path)[1]))


def test_a_change_that_fits_every_digest(folder, tmp_path):
    private, public = make_keys(tmp_path)
    sign_guard(folder, private)
    edit_guard(folder, lambda record: record.update(fitted=None))
    LatentGuard.load(folder)
    with pytest.raises(GuardError, match=r"The signature of .* changed since"):
        LatentGuard.load(folder, verify_key=VerifyKey(public))


@pytest.mark.parametrize("content", [b"", b"rubbish", bytes(64)])
def test_rubbish_instead_of_a_signature(folder, tmp_path, content):
    (folder / SIGNATURE_FILE).write_bytes(content)
    with pytest.raises(GuardError, match="The signature of"):
        LatentGuard.load(folder, verify_key=VerifyKey(make_keys(tmp_path)[1]))


def test_another_key(folder, tmp_path):
    sign_guard(folder, make_keys(tmp_path)[0])
    other = VerifyKey(make_keys(tmp_path, "other")[1])
    with pytest.raises(GuardError, match=r"not by the key .*other\.pub"):
        LatentGuard.load(folder, verify_key=other)


def test_a_damaged_guard_is_not_signed(folder, tmp_path):
    (folder / TENSOR_FILE).write_bytes(b"rubbish")
    with pytest.raises(GuardError, match="damaged"):
        sign_guard(folder, make_keys(tmp_path)[0])
    assert not (folder / SIGNATURE_FILE).exists()


def test_keys_that_are_none(folder, tmp_path):
    private, public = make_keys(tmp_path)
    for file in (tmp_path / "none", folder / CARD_FILE, private):
        with pytest.raises(GuardError, match=r"is no public key.*openssl genpkey"):
            VerifyKey(file)
    locked, _ = make_keys(tmp_path, "locked", password=b"secret")
    for file in (tmp_path / "none", public, locked):
        with pytest.raises(GuardError, match=r"is no private key.*openssl genpkey"):
            sign_guard(folder, file)
