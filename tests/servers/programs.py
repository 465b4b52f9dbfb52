"""The servers' programs: jars by Maven, FerretDB by Go, made once under /build/servers; processes that are waited for."""

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


def need(*programs: str) -> None:
    """Skip the test when one of 'java', 'mvn' or 'go' is not installed."""
    install = {"java": "Java 17 (openjdk-17-jdk-headless)", "mvn": "Maven (maven)", "go": "Go 1.24 or later (https://go.dev/dl/)"}
    for program in programs:
        if shutil.which(program) is None:
            skip_or_fail(f"`{program}` is not installed: install {install[program]} for the tests against genuine servers.")


def jars() -> Path:
    """The directory with the jars of pom.xml, fetched by Maven when they are not there yet."""
    need("java", "mvn")
    pom = HERE / "pom.xml"
    with _made_once("jars", pom) as (target, is_made):
        if not is_made:
            _run(
                *("mvn", "--quiet", "--batch-mode", "-f", str(pom), "dependency:copy-dependencies"),
                *("-DincludeScope=runtime", f"-DoutputDirectory={target}"),
                what="The servers' jars cannot be fetched",
            )
    return target


def ferretdb() -> Path:
    """The program of ferretdb/main.go, built when it is not there yet."""
    need("go")
    source = HERE / "ferretdb"
    with _made_once("ferretdb", *sorted(source.glob("*"))) as (target, is_made):
        if not is_made:
            target.mkdir(parents=True)
            _run(
                *("go", "build", "-C", str(source), "-o", str(target / "ferretdb-server"), "."),
                what="FerretDB cannot be built",
            )
    return target / "ferretdb-server"


def wait_until_ready(answers: Callable[[], bool], name: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server that was started answers. Fails the test with the end of its log when it ends, or never does."""

    def ready_or_ended() -> bool:
        return answers() or process.poll() is not None

    try:
        wait_for(ready_or_ended, f"{name} does not answer", READY_SECONDS)
    except AssertionError as error:
        pytest.fail(f"{error}. {log.read_text(errors='replace')[-2000:]}")
    if process.poll() is not None:
        pytest.fail(f"{name} ended. {log.read_text(errors='replace')[-2000:]}")


def listens(port: int) -> bool:
    """Whether somebody accepts connections on a port of 127.0.0.1."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def end(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM) -> None:
    """Signal a process that we started, and wait until it is gone; killed when it does not end."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _made_once(name: str, *sources: Path) -> Iterator[tuple[Path, bool]]:
    """Where something is made from the sources, and whether that was done; remembered when the block ends without an error.

    Two test processes at once wait for each other.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    target, stamp = BUILD / name, BUILD / f"{name}.made"
    wanted = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_made = stamp.exists() and stamp.read_text() == wanted
        if not is_made:
            stamp.unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
        yield target, is_made
        stamp.write_text(wanted)


def _run(*command: str, what: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        skip_or_fail(f"{what} (`{command[0]}` ended with {done.returncode}): {(done.stdout + done.stderr).strip()[-1500:]}")
