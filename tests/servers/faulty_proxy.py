"""A proxy in front of a REST catalog that loses requests and responses."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["none", "unsent", "dropped", "cut", "502", "503", "repeated"]
"""What happens to a commit.

unsent    the request does not arrive and the connection is closed
dropped   the request arrives, the response is lost and the connection is closed
cut       the request arrives, half of the response is returned
502, 503  the request arrives, the proxy responds with an error (an HTML page, as proxies do)
repeated  the request arrives twice, because the first response was lost; the second response is returned
"""
FAULTS: tuple[Fault, ...] = ("unsent", "dropped", "cut", "502", "503", "repeated")
COMMIT = re.compile(r"/v1/(?:\S+/)?namespaces/([^/]+)/tables/([^/?]+)$")


@dataclass
class Proxy:
    """The proxy's address, and the fault of each commit: (table, fault)."""

    address: str
    done: list[tuple[str, Fault]] = field(default_factory=list)


Choose = Callable[[int, str], Fault]
"""Returns the fault for the number of a commit and its table."""


@contextmanager
def faulty_proxy(
    catalog: str, choose: Choose, before: Callable[[int, bool], None] = lambda number, arrived: None
) -> Iterator[Proxy]:
    """Start a proxy. before(number, arrived) is called before a commit is forwarded and before its response is returned."""
    target = urlsplit(catalog)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            commit = COMMIT.search(self.path) if self.command == "POST" else None
            if commit is None:
                return self.respond(*self.forward(body))
            table = f"{commit[1]}.{commit[2]}"
            with lock:
                number = len(proxy.done)
                fault = choose(number, table)
                proxy.done.append((table, fault))
            before(number, False)
            if fault == "unsent":
                self.close_connection = True
                return None
            status, kind, content = self.forward(body)
            before(number, True)
            if fault == "dropped":
                self.close_connection = True
            elif fault == "cut":
                self.respond(status, kind, content, upto=len(content) // 2)
                self.close_connection = True
            elif fault in ("502", "503"):
                self.respond(int(fault), "text/html", b"<html>no response from upstream</html>")
            elif fault == "repeated":
                self.respond(*self.forward(body))
            else:
                self.respond(status, kind, content)
            return None

        do_GET = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

        def forward(self, body: bytes) -> tuple[int, str, bytes]:
            connection = HTTPConnection(target.hostname or "", target.port, timeout=60)
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in ("host", "connection", "accept-encoding")
            }
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            return response.status, response.getheader("Content-Type") or "application/json", content

        def respond(self, status: int, kind: str, content: bytes, upto: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:upto])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
