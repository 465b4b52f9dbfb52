"""Where files go that are no tables, such as checkpoints: a directory that every node of a cluster reaches."""

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
    """A directory on a disk, or in an object store that the catalog's own properties (s3.endpoint, ...) open.

    place       an absolute path, or a URI such as s3://bucket/path
    properties  PyIceberg's, which may hold secrets
    """

    place: str
    properties: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def on_disk(cls, path: Path) -> Storage:
        """A directory of this machine, or of a disk that all nodes mount there."""
        return cls(str(path.absolute()))

    @classmethod
    def of(cls, settings: LakeSettings) -> Storage:
        """What the settings name: `ray.storage`, else beside the tables when they are in an object store, else under home."""
        properties = settings.catalog.properties
        warehouse = properties.get("warehouse", "")
        if named := settings.ray.storage:
            return cls(named, properties) if _is_remote(named) else cls.on_disk(Path(named.removeprefix("file://")))
        if _is_remote(warehouse):
            return cls(f"{warehouse.rstrip('/')}/training", properties)
        return cls.on_disk(Path(settings.home) / "training")

    @property
    def remote(self) -> bool:
        """Whether it is in an object store."""
        return _is_remote(self.place)

    def __truediv__(self, name: str) -> Storage:
        return replace(self, place=f"{self.place.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.place

    def filesystem(self) -> tuple[Any, str]:
        """The pyarrow file system, picklable, and the path in it; None and the path for a disk."""
        if not self.remote:
            return None, self.place
        from pyiceberg.io.pyarrow import PyArrowFileIO

        scheme, host, path = PyArrowFileIO.parse_location(self.place)
        return PyArrowFileIO(dict(self.properties)).fs_by_scheme(scheme, host), path

    def make(self) -> None:
        """Make the directory, where there are directories."""
        if not self.remote:
            Path(self.place).mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Remove it with all that is in it; nothing when it is not there."""
        system, path = self.filesystem()
        if system is None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            system.delete_dir_contents(path, missing_dir_ok=True)


def local_warehouse(settings: LakeSettings) -> str:
    """Return the directory of the tables if it is on this machine's disk, otherwise ''."""
    properties = settings.catalog.properties
    if not properties:
        return str(Path(settings.home).absolute() / "warehouse")
    warehouse = properties.get("warehouse", "")
    if warehouse.startswith(("/", "file:")):
        return warehouse.removeprefix("file://")
    return ""


def _is_remote(place: str) -> bool:
    return "://" in place and urlsplit(place).scheme != "file"
