"""A proxy before a REST catalog that loses answers: what stands between a client and its catalog, on a bad day."""

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

unsent    it never arrives: the connection ends
dropped   it arrives, its answer does not: the connection ends
cut       it arrives, half of the answer comes back
502, 503  it arrives, the proxy answers that it does not know (an HTML page, as proxies do)
repeated  it arrives twice, since the first answer was lost on the proxy's own way; the second answer comes back
"""
FAULTS: tuple[Fault, ...] = ("unsent", "dropped", "cut", "502", "503", "repeated")
COMMIT = re.compile(r"/v1/(?:\S+/)?namespaces/([^/]+)/tables/([^/?]+)$")


@dataclass
class Proxy:
    """The proxy's address, and what it did to each commit: (table, fault)."""

    address: str
    done: list[tuple[str, Fault]] = field(default_factory=list)


Choose = Callable[[int, str], Fault]
"""choose(number of the commit, table) -> fault"""


@contextmanager
def faulty_proxy(
    catalog: str, choose: Choose, before: Callable[[int, bool], None] = lambda number, arrived: None
) -> Iterator[Proxy]:
    """A proxy before the catalog. before(number, arrived) is called before a commit is sent on and before it is answered."""
    target = urlsplit(catalog)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            commit = COMMIT.search(self.path) if self.command == "POST" else None
            if commit is None:
                return self.give(*self.asked(body))
            table = f"{commit[1]}.{commit[2]}"
            with lock:
                number = len(proxy.done)
                fault = choose(number, table)
                proxy.done.append((table, fault))
            before(number, False)
            if fault == "unsent":
                self.close_connection = True
                return None
            status, kind, content = self.asked(body)
            before(number, True)
            if fault == "dropped":
                self.close_connection = True
            elif fault == "cut":
                self.give(status, kind, content, upto=len(content) // 2)
                self.close_connection = True
            elif fault in ("502", "503"):
                self.give(int(fault), "text/html", b"<html>no answer from upstream</html>")
            elif fault == "repeated":
                self.give(*self.asked(body))
            else:
                self.give(status, kind, content)
            return None

        do_GET = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

        def asked(self, body: bytes) -> tuple[int, str, bytes]:
            connection = HTTPConnection(target.hostname or "", target.port, timeout=60)
            passed = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in ("host", "connection", "accept-encoding")
            }
            connection.request(self.command, self.path, body, passed)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            return response.status, response.getheader("Content-Type") or "application/json", content

        def give(self, status: int, kind: str, content: bytes, upto: int | None = None) -> None:
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
