"""The ports, sockets and limits of a node that serves by itself, which no other instance on the machine may share."""

from __future__ import annotations

import errno
import random
import resource
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lakehouse.errors import ShopSphereError

FAST_PATH: Mapping[str, str] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # by default the path and query of each request, which may contain personal data, are sent to UDP port 514
    "RAY_SERVE_HAPROXY_LOG_TARGET": "/dev/null",
    # by default a client that sends nothing holds a connection for an hour; event streams send something every 15 s
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    # Ray Serve has no setting for the time that the headers of a request may take, and writes this one into the `defaults`
    # section as it is: without the second line, clients that send their headers slowly use up all connections. The third one
    # gives replicas the address of the client for their access log
    "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "leastconn\n    timeout http-request 10s\n    option forwardfor",
}
"""Must be in the environment before Ray starts. Ten times as many requests per second; see docs/concepts/serving.md."""

BLOCKS = range(20_000, 30_000, 50)
"""First ports of the blocks of which an instance takes one: below the ephemeral ports, above those of Ray's workers."""
BLOCK_SIZE = 50
MAX_CONNECTIONS = 10_000
"""Open connections. HAProxy takes two file descriptors for each, and those of a pipe for every fourth."""
SPARE_DESCRIPTORS = 500


@contextmanager
def reserved_node(directory: Path) -> Iterator[dict[str, str]]:
    """Reserve a block of ports for as long as the context is open; yield the environment that Ray needs.

    directory  for HAProxy's sockets and files: only this user may enter it, since the admin socket is open to all who reach it

    HAProxy passes requests to 127.0.0.1 and a port, so a port of another instance would be that instance's data. This process
    and its HAProxy each hold a port of the block exclusively, so no other instance takes the block while one of them runs.
    Raises ShopSphereError.
    """
    block, guard = _reserve_block()
    with guard:
        yield {**FAST_PATH, **_ports(block), **_files(directory), "RAY_SERVE_HAPROXY_MAXCONN": str(_max_connections())}


def check_address(host: str, port: int) -> None:
    """Raise ShopSphereError when the address is in use, or is not one of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ShopSphereError(
                f"Cannot listen on {host}:{port} ({error.strerror}). Choose another with --host or --port."
            ) from None


def _reserve_block() -> tuple[int, socket.socket]:
    """Return a block in which every port is free, and the socket that holds its first one."""
    for block in random.sample(BLOCKS, len(BLOCKS)):
        guard = socket.socket()
        try:
            guard.bind(("", block))
            for port in range(block + 1, block + BLOCK_SIZE):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError as error:
            guard.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        return block, guard
    raise ShopSphereError(
        f"No {BLOCK_SIZE} consecutive ports from {BLOCKS.start} to {BLOCKS.stop - 1} are free. Stop another instance."
    )


def _ports(block: int) -> dict[str, str]:
    """Return the variables that place HAProxy, the fallback proxy and the replicas in a block; its first port is the guard."""
    return {
        "RAY_SERVE_HAPROXY_STATS_PORT": str(block + 1),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(block + 2),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(block + 3),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(block + 4),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(block + 5),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(block + BLOCK_SIZE - 1),
    }


def _files(directory: Path) -> dict[str, str]:
    """Return the variables that place HAProxy's files in a directory. Names are short: Ray adds 57 characters to each path."""
    return {
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "s"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "m"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
    }


def _max_connections() -> int:
    """Return how many connections the limit of open files allows; HAProxy raises its soft limit to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(100, min(MAX_CONNECTIONS, (hard - SPARE_DESCRIPTORS) * 2 // 5))
