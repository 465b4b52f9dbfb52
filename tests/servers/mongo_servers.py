"""Servers with MongoDB's protocol: FerretDB (without change streams) and mongo-java-server (in memory; current drivers cannot
resume its change streams)."""

from __future__ import annotations

import signal
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pymongo
from pymongo.errors import PyMongoError
from servers.programs import HERE, ferretdb, jars, stop_process, wait_until_ready
from support.waiting import free_port


class MongoWire(ABC):
    """A server. As a context manager it is started and finally stopped."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """The connection URI."""
        return f"mongodb://127.0.0.1:{self.port}"

    @abstractmethod
    def command(self) -> list[str]:
        """Return the program and its arguments."""

    def start(self) -> Self:
        """Start on existing data, if the server keeps any, and wait until it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        log, command = self.directory / "mongo.log", self.command()
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.directory)
        try:
            wait_until_ready(self._answers, type(self).__name__, self.process, log)
        except BaseException:
            stop_process(self.process, signal.SIGKILL)
            raise
        return self

    def kill(self) -> None:
        """Stop it as a crash does."""
        if self.process is not None:
            stop_process(self.process, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def _answers(self) -> bool:
        try:
            with pymongo.MongoClient[dict[str, Any]](self.uri, serverSelectionTimeoutMS=500) as client:
                client.admin.command("ping")
                return True
        except PyMongoError:
            return False


class FerretDB(MongoWire):
    """FerretDB on SQLite files: no change streams, no Decimal128. Data survive a restart."""

    def command(self) -> list[str]:
        """See MongoWire."""
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        return [str(ferretdb()), f"127.0.0.1:{self.port}", str(data)]


class MongoJava(MongoWire):
    """mongo-java-server, which has Decimal128. In memory: it is empty after a restart."""

    def command(self) -> list[str]:
        """See MongoWire."""
        options = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
        return ["java", *options, "-cp", f"{jars()}/*", str(HERE / "MongoServer.java"), str(self.port)]
