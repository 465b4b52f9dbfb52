"""Local files are closed to other users, and what a killed process leaves is cleaned up."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.waiting import wait_for

from lakehouse.local_access import close_to_other_users, let_others_pass

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import subprocess, sys, time
from lakehouse.private_directory import private_directory
directory = private_directory()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", f"{directory}/socket"], start_new_session=True)
print(directory, child.pid, flush=True)
time.sleep(600 if sys.argv[1] == "wait" else 0)
"""


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_an_existing_home_is_closed_to_others_and_new_files_to_all(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    close_to_other_users(home)
    assert mode(home) == 0o750, "the permissions of a group stay"
    (home / "file").touch()
    assert mode(home / "file") == 0o600
    (home / "directory").mkdir()
    assert mode(home / "directory") == 0o700
    let_others_pass(home)
    assert mode(home) == 0o751


def test_a_home_that_does_not_exist_yet_is_no_error(tmp_path: Path, umask: None) -> None:
    close_to_other_users(tmp_path / "missing")


def start(how: str) -> tuple[subprocess.Popen[str], Path, psutil.Process]:
    """Start a process with a private directory and a child of its own; return both and the directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, how], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    directory, child = process.stdout.readline().split()
    return process, Path(directory), psutil.Process(int(child))


def test_the_directory_is_private_and_removed_at_the_end() -> None:
    process, directory, child = start("wait")
    try:
        assert mode(directory) == 0o700
        assert len(str(directory)) <= 24
        second, other, other_child = start("end")
        assert second.wait(30) == 0
        other_child.kill()
        assert other != directory
        assert not other.exists()
        assert child.is_running(), "a running instance is left alone"
    finally:
        process.kill()
        process.wait()
        child.kill()


def test_processes_of_a_killed_instance_are_stopped_by_the_next_one() -> None:
    process, directory, child = start("wait")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert child.is_running()
    second, _, other_child = start("end")
    assert second.wait(30) == 0
    other_child.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, seconds=10)
    assert directory.exists(), "its logs stay for a day"
