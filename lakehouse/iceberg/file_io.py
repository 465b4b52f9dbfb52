"""Reading the warehouse's files: none of them is empty, so one that looks so was not read."""

from __future__ import annotations

from typing import cast

from pyarrow import NativeFile
from pyiceberg.io import InputStream
from pyiceberg.io.pyarrow import BUFFER_SIZE, ONE_MEGABYTE, PyArrowFile, PyArrowFileIO


class NonEmptyFile(PyArrowFile):
    """A file that has content: metadata, a manifest, rows."""

    def open(self, seekable: bool = True) -> InputStream:
        """Open it. Raises ConnectionError when it is empty.

        An object store's answer that breaks off in its headers tells no length, which pyarrow takes for 0."""
        stream = super().open(seekable=True)
        if cast(NativeFile, stream).size() == 0:
            raise ConnectionError(f"{self.location} came without its content")
        return stream


class NonEmptyFileIO(PyArrowFileIO):
    """PyIceberg's file system over pyarrow, which gives files that have content."""

    def new_input(self, location: str) -> PyArrowFile:
        """See `FileIO`."""
        scheme, host, path = self.parse_location(location, self.properties)
        size = int(self.properties.get(BUFFER_SIZE, ONE_MEGABYTE))
        return NonEmptyFile(location, path, self.fs_by_scheme(scheme, host), size)
