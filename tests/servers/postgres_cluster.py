"""Separate PostgreSQL servers: a primary, and standbys that replicate it and can be promoted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from servers.programs import stop_process, wait_until_ready
from support.waiting import free_port, wait_for

from app.sandbox.postgres_server import as_server_user, postgres_programs, server_user
from app.sandbox.processes import server_environment

ROLE = DATABASE = "shopsphere"
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "wal_level": "logical",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "timezone": "UTC",
    "wal_receiver_timeout": "5s",
    "wal_retrieve_retry_interval": "200ms",
}


class Cluster:
    """A server with database 'shopsphere'. As a context manager it is started and finally stopped.

    settings    additions to postgresql.conf
    upstream    the primary of a standby
    """

    def __init__(self, directory: Path, settings: Mapping[str, str] | None = None, upstream: Cluster | None = None) -> None:
        self.directory, self.port, self.upstream = directory, free_port(), upstream
        self._settings = {**SETTINGS, **(settings or {})}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def dsn(self) -> str:
        """The connection URI."""
        return f"postgresql://{ROLE}@127.0.0.1:{self.port}/{DATABASE}"

    def __call__(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run statements on a new connection and return the rows of the last one."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(query, parameters or None)  # type: ignore[call-overload]
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def start(self) -> Self:
        """Start on existing data, if any, and wait until it answers."""
        data = self.directory / "data"
        if not data.exists():
            self._initialize(data)
        settings = self._settings | {"port": str(self.port)}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        log = self.directory / "postgres.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                as_server_user([str(postgres_programs() / "postgres"), "-D", str(data), *arguments]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=server_environment(),
            )
        try:
            wait_until_ready(self._answers, "PostgreSQL", self.process, log)
        except BaseException:
            stop_process(self.process, signal.SIGQUIT)
            raise
        return self

    def stop(self) -> None:
        """Stop it as an operator does: sessions are closed, standbys receive all WAL."""
        if self.process is not None:
            stop_process(self.process, signal.SIGINT)

    def kill(self) -> None:
        """Stop it as a crash does."""
        if self.process is not None:
            stop_process(self.process, signal.SIGQUIT)

    def promote(self) -> None:
        """Promote a standby to primary, which begins a new timeline."""
        assert self("SELECT pg_promote(true, 60)") == [(True,)]

    def wait_for_replay(self) -> None:
        """Wait until this standby has replayed all WAL of its upstream."""
        assert self.upstream is not None
        (written,) = self.upstream("SELECT pg_current_wal_flush_lsn()")[0]
        wait_for(
            lambda: self("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", written) == [(True,)], "the standby did not catch up"
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def _initialize(self, data: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        data.mkdir(mode=0o700)
        if user := server_user():
            os.chown(data, *user)
        if self.upstream is None:
            command = ["initdb", "-D", str(data), "--username", ROLE, "--auth", "trust", "--encoding", "UTF8", "--locale", "C"]
            command.append("--no-sync")
        else:
            # --slot with --create-slot: the primary keeps WAL that the standby has not received yet
            source = f"host=127.0.0.1 port={self.upstream.port} user={ROLE} dbname={DATABASE}"
            command = ["pg_basebackup", "-D", str(data), "-d", source, "--write-recovery-conf", "--create-slot", "--no-sync"]
            command += ["--slot", "standby", "--checkpoint", "fast"]
        program, *arguments = command
        done = subprocess.run(
            as_server_user([str(postgres_programs() / program), *arguments]),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            env=server_environment(),
            check=False,
        )
        if done.returncode:
            shutil.rmtree(data, ignore_errors=True)
            raise AssertionError(done.stdout + done.stderr)

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.dsn, dbname="postgres", connect_timeout=2, autocommit=True) as connection:
                if (
                    self.upstream is None
                    and not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
                ):
                    connection.execute(f"CREATE DATABASE {DATABASE}")
                return True
        except psycopg.OperationalError:
            return False
