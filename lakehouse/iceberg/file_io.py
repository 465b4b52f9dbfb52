"""File access that rejects empty files: the warehouse has none, so an empty one was not read completely."""

from __future__ import annotations

from typing import cast

from pyarrow import NativeFile
from pyiceberg.io import InputStream
from pyiceberg.io.pyarrow import BUFFER_SIZE, ONE_MEGABYTE, PyArrowFile, PyArrowFileIO


class NonEmptyFile(PyArrowFile):
    """A file that must not be empty: metadata, a manifest, or rows."""

    def open(self, seekable: bool = True) -> InputStream:
        """Open the file. Raises ConnectionError if it is empty.

        An object store's response that is cut off within its headers has no length, which pyarrow takes for 0.
        """
        stream = super().open(seekable=True)
        if cast(NativeFile, stream).size() == 0:
            raise ConnectionError(f"{self.location} was read without its content")
        return stream


class NonEmptyFileIO(PyArrowFileIO):
    """PyIceberg's PyArrow file access, whose input files must not be empty."""

    def new_input(self, location: str) -> PyArrowFile:
        """Return the file at a location (see `FileIO`)."""
        scheme, host, path = self.parse_location(location, self.properties)
        size = int(self.properties.get(BUFFER_SIZE, ONE_MEGABYTE))
        return NonEmptyFile(location, path, self.fs_by_scheme(scheme, host), size)
