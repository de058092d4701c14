"""HTTPS, by a certificate of the operator."""

import datetime
import ipaddress
import signal
import ssl
import threading
import time

import httpx
import pytest

from latentguard.serve import server
from latentguard.serve.config import ServeConfig
from serve.running import Nursery, opener, tiny_guard, wait_ready
from serve.test_operations import free_port, idle_sockets, wait_closed

x509 = pytest.importorskip("cryptography.x509")


def write_certificate(folder):
    """A certificate that signed itself, and its key; its serial number."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "guard")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    how = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *how))
    return made.serial_number


def served_serial(port):
    found = ssl.get_server_certificate(("127.0.0.1", port))
    return x509.load_pem_x509_certificate(found.encode()).serial_number


def signal_and_wait(child, words):
    child.kill(signal.SIGHUP)
    until = time.monotonic() + 20
    while words not in child.stderr:
        assert time.monotonic() < until, child.stderr
        time.sleep(0.02)


def test_it_serves_https_and_nothing_else(tmp_path):
    first = write_certificate(tmp_path)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    tiny_guard().save(tmp_path / "guard")
    port, health = free_port(), free_port()
    options = ["--port", port, "--health-port", health, "--tls-cert", cert, "--tls-key", key]
    nursery = Nursery(tmp_path)
    try:
        with nursery.process(tmp_path / "guard", *options) as child:
            wait_ready(f"https://127.0.0.1:{port}")
            assert f"Serving {tmp_path / 'guard'} on https://127.0.0.1:{port}" in child.stderr
            trusted = ssl.create_default_context(cafile=str(cert))
            answer = httpx.get(f"https://127.0.0.1:{port}/healthz", verify=trusted)
            assert answer.text == "ok"
            with pytest.raises(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/healthz", verify=False)
            assert httpx.get(f"http://127.0.0.1:{health}/readyz", verify=False).text == "ready"
            assert served_serial(port) == first
            cert.write_text("rubbish")
            signal_and_wait(child, "cannot be used")
            assert served_serial(port) == first
            second = write_certificate(tmp_path)
            signal_and_wait(child, "were read anew")
            assert served_serial(port) == second != first
            child.kill(signal.SIGTERM)
            assert child.wait() == 0
    finally:
        nursery.close()


def test_a_certificate_that_cannot_be_used_leaves_the_one_before(tmp_path):
    """A certificate of another key would be loaded before its key is refused."""
    first = write_certificate(tmp_path)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    how = dict(ssl_certfile=str(cert), ssl_keyfile=str(key))
    made = server.create_server(opener, ServeConfig(), host="127.0.0.1", port=0, **how)
    port = made.listen().getsockname()[1]
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    try:
        wait_ready(f"https://127.0.0.1:{port}")
        old = key.read_bytes()
        write_certificate(tmp_path)
        key.write_bytes(old)
        with pytest.raises(OSError, match="KEY_VALUES_MISMATCH"):
            made._renew_certificate()
        assert served_serial(port) == first
    finally:
        made.should_exit = True
        thread.join(20)


def test_connections_that_never_finish_tls_are_counted(tmp_path):
    write_certificate(tmp_path)
    how = dict(ssl_certfile=str(tmp_path / "cert.pem"), ssl_keyfile=str(tmp_path / "key.pem"))
    config = ServeConfig(max_connections_per_address=3)
    made = server.create_server(opener, config, host="127.0.0.1", port=0, **how)
    port = made.listen().getsockname()[1]
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    try:
        with idle_sockets(f"http://127.0.0.1:{port}", 5) as sockets:
            wait_closed(sockets, 2)
        wait_ready(f"https://127.0.0.1:{port}")
    finally:
        made.should_exit = True
        thread.join(20)
