"""A directory for files that are not tables, such as training checkpoints, which every node of a cluster can reach."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lakehouse.settings import LakeSettings


@dataclass(frozen=True)
class Storage:
    """A directory on a disk, or in an object store that is accessed with the catalog's properties (s3.endpoint, ...).

    location    an absolute path, or a URI such as s3://bucket/path
    properties  PyIceberg's; may contain secrets
    """

    location: str
    properties: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def on_disk(cls, path: Path) -> Storage:
        """Return a directory of this machine, or of a disk that all nodes mount at the same path."""
        return cls(str(path.absolute()))

    @classmethod
    def from_settings(cls, settings: LakeSettings) -> Storage:
        """Return `ray.storage` if it is set, else a directory beside the tables in an object store, else one in `home`."""
        properties = settings.catalog.properties
        warehouse = properties.get("warehouse", "")
        if configured := settings.ray.storage:
            if _is_remote(configured):
                return cls(configured, properties)
            return cls.on_disk(Path(configured.removeprefix("file://")))
        if _is_remote(warehouse):
            return cls(f"{warehouse.rstrip('/')}/training", properties)
        return cls.on_disk(Path(settings.home) / "training")

    @property
    def is_remote(self) -> bool:
        """Whether the directory is in an object store."""
        return _is_remote(self.location)

    def __truediv__(self, name: str) -> Storage:
        return replace(self, location=f"{self.location.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.location

    def filesystem(self) -> tuple[Any, str]:
        """Return the picklable pyarrow file system and the path in it, or None and the path for a disk."""
        if not self.is_remote:
            return None, self.location
        from pyiceberg.io.pyarrow import PyArrowFileIO

        scheme, host, path = PyArrowFileIO.parse_location(self.location)
        return PyArrowFileIO(dict(self.properties)).fs_by_scheme(scheme, host), path

    def create(self) -> None:
        """Create the directory on a disk; object stores have none."""
        if not self.is_remote:
            Path(self.location).mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Remove the directory with its contents, if it exists."""
        filesystem, path = self.filesystem()
        if filesystem is None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            filesystem.delete_dir_contents(path, missing_dir_ok=True)


def local_warehouse(settings: LakeSettings) -> str:
    """Return the directory of the tables if it is on this machine's disk, otherwise ''."""
    properties = settings.catalog.properties
    if not properties:
        return str(Path(settings.home).absolute() / "warehouse")
    warehouse = properties.get("warehouse", "")
    if warehouse.startswith(("/", "file:")):
        return warehouse.removeprefix("file://")
    return ""


def _is_remote(location: str) -> bool:
    return "://" in location and urlsplit(location).scheme != "file"
