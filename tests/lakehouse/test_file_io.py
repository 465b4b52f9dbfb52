"""A response of the object store without a content length is a transient error, not an empty file."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

import pipelines
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.file_io import NonEmptyFileIO
from lakehouse.transient_errors import as_transient_error
from pipelines.settings import Settings


@pytest.fixture
def truncating_store() -> Iterator[str]:
    """Yield the address of a server whose responses end within their headers."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nServer: store\r\nContent-Ty")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("seekable", [True, False])
def test_a_response_without_length_is_a_transient_error(truncating_store, seekable):
    properties = {"s3.endpoint": truncating_store, "s3.access-key-id": "a", "s3.secret-access-key": "b", "s3.region": "us-east-1"}
    with pytest.raises(ConnectionError, match="was read without its content") as caught:
        NonEmptyFileIO(properties).new_input("s3://lake/rows.parquet").open(seekable)
    assert "s3://lake/rows.parquet" in str(as_transient_error(caught.value))


def test_tables_use_this_file_access(tmp_path):
    lake = Lake(Settings(home=tmp_path))
    table = lake.load(pipelines.TABLES["silver.stores"])
    assert isinstance(table.reader.io, NonEmptyFileIO)
    (file,) = (tmp_path / "warehouse" / "silver" / "stores" / "metadata").glob("*.json")
    file.write_bytes(b"")
    with pytest.raises(ConnectionError) as caught:
        lake.load(pipelines.TABLES["silver.stores"])
    assert as_transient_error(caught.value) is not None
