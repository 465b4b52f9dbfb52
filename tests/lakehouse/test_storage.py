"""The directory of checkpoints follows the settings, and no secret is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from lakehouse.settings import CatalogSettings, RaySettings
from lakehouse.storage import Storage, local_warehouse
from pipelines.settings import Settings

S3 = {"type": "sql", "uri": "postgresql+psycopg://u:hush@db/catalog", "warehouse": "s3://lake/w/", "s3.secret-access-key": "hush"}


def settings(home: Path, storage: str = "", properties: dict[str, str] | None = None) -> Settings:
    return Settings(home=home, ray=RaySettings(storage=storage), catalog=CatalogSettings(properties=properties or {}))


@pytest.mark.parametrize(
    ("storage", "properties", "location"),
    [
        ("", {}, "HOME/training"),
        ("", S3, "s3://lake/w/training"),
        ("s3://other/place", S3, "s3://other/place"),
        ("/mnt/shared", S3, "/mnt/shared"),
        ("file:///mnt/shared", {}, "/mnt/shared"),
        ("", {"type": "rest", "uri": "http://catalog", "warehouse": "prod"}, "HOME/training"),
    ],
)
def test_the_location_follows_the_settings(tmp_path: Path, storage: str, properties: dict[str, str], location: str) -> None:
    found = Storage.from_settings(settings(tmp_path, storage, properties))
    assert found.location == location.replace("HOME", str(tmp_path))
    assert "hush" not in repr(found) + str(found)


def test_a_directory_on_disk_is_created_and_removed(tmp_path: Path) -> None:
    directory = Storage.on_disk(tmp_path / "a") / "b"
    directory.remove()
    directory.create()
    (tmp_path / "a" / "b" / "file").write_text("x")
    assert directory.filesystem() == (None, str(tmp_path / "a" / "b"))
    directory.remove()
    assert list((tmp_path / "a").iterdir()) == []


def test_local_warehouse_is_the_directory_of_tables_on_this_machine(tmp_path: Path) -> None:
    assert local_warehouse(settings(tmp_path)) == str(tmp_path / "warehouse")
    assert local_warehouse(settings(tmp_path, properties={"type": "sql", "warehouse": "file:///lake"})) == "/lake"
    assert local_warehouse(settings(tmp_path, properties=S3)) == ""
