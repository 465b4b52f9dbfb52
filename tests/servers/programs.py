"""Programs of the servers (jars by Maven, FerretDB by Go, built once in build/servers) and functions to wait for processes."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.waiting import skip_or_fail, wait_for

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "servers"
READY_SECONDS = 90.0


def require_programs(*programs: str) -> None:
    """Skip the test when one of 'java', 'mvn' or 'go' is not installed."""
    install = {"java": "Java 17 (openjdk-17-jdk-headless)", "mvn": "Maven (maven)", "go": "Go 1.24 or later (https://go.dev/dl/)"}
    for program in programs:
        if shutil.which(program) is None:
            skip_or_fail(f"`{program}` is not installed: install {install[program]} for the tests against real servers.")


def jars() -> Path:
    """Return the directory with the jars of pom.xml. Maven downloads them the first time."""
    require_programs("java", "mvn")
    pom = HERE / "pom.xml"
    with _built_once("jars", pom) as (target, is_built):
        if not is_built:
            _run(
                *("mvn", "--quiet", "--batch-mode", "-f", str(pom), "dependency:copy-dependencies"),
                *("-DincludeScope=runtime", f"-DoutputDirectory={target}"),
                failure="The servers' jars cannot be downloaded",
            )
    return target


def ferretdb() -> Path:
    """Return the program of ferretdb/main.go. It is built the first time."""
    require_programs("go")
    source = HERE / "ferretdb"
    with _built_once("ferretdb", *sorted(source.glob("*"))) as (target, is_built):
        if not is_built:
            target.mkdir(parents=True)
            _run(
                *("go", "build", "-C", str(source), "-o", str(target / "ferretdb-server"), "."),
                failure="FerretDB cannot be built",
            )
    return target / "ferretdb-server"


def wait_until_ready(answers: Callable[[], bool], name: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a started server answers. Fails the test with the end of its log when it exits or never answers."""

    def is_ready_or_exited() -> bool:
        return answers() or process.poll() is not None

    try:
        wait_for(is_ready_or_exited, f"{name} does not answer", READY_SECONDS)
    except AssertionError as error:
        pytest.fail(f"{error}. {log.read_text(errors='replace')[-2000:]}")
    if process.poll() is not None:
        pytest.fail(f"{name} exited. {log.read_text(errors='replace')[-2000:]}")


def is_listening(port: int) -> bool:
    """Return whether a process accepts connections on a port of 127.0.0.1."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def stop_process(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> None:
    """Signal a process and wait until it has exited. Kills it when it does not exit."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _built_once(name: str, *sources: Path) -> Iterator[tuple[Path, bool]]:
    """Yield where something is built from the sources, and whether it is already built. Recorded when the block succeeds.

    Concurrent test processes wait for each other.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    target, stamp = BUILD / name, BUILD / f"{name}.made"
    wanted = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_built = stamp.exists() and stamp.read_text() == wanted
        if not is_built:
            stamp.unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
        yield target, is_built
        stamp.write_text(wanted)


def _run(*command: str, failure: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        skip_or_fail(f"{failure} (`{command[0]}` exited with {done.returncode}): {(done.stdout + done.stderr).strip()[-1500:]}")
