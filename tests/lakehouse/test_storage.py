"""Where checkpoints go: what the settings say, and nothing secret shown."""

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
    ("storage", "properties", "place"),
    [
        ("", {}, "HOME/training"),
        ("", S3, "s3://lake/w/training"),
        ("s3://other/place", S3, "s3://other/place"),
        ("/mnt/shared", S3, "/mnt/shared"),
        ("file:///mnt/shared", {}, "/mnt/shared"),
        ("", {"type": "rest", "uri": "http://catalog", "warehouse": "prod"}, "HOME/training"),
    ],
)
def test_what_the_settings_say(tmp_path: Path, storage: str, properties: dict[str, str], place: str) -> None:
    found = Storage.from_settings(settings(tmp_path, storage, properties))
    assert found.location == place.replace("HOME", str(tmp_path))
    assert "hush" not in repr(found) + str(found)


def test_a_directory_of_a_disk_comes_and_goes(tmp_path: Path) -> None:
    made = Storage.on_disk(tmp_path / "a") / "b"
    made.remove()
    made.create()
    (tmp_path / "a" / "b" / "file").write_text("x")
    assert made.filesystem() == (None, str(tmp_path / "a" / "b"))
    made.remove()
    assert list((tmp_path / "a").iterdir()) == []


def test_tables_that_other_machines_have_not_got_are_known(tmp_path: Path) -> None:
    assert local_warehouse(settings(tmp_path)) == str(tmp_path / "warehouse")
    assert local_warehouse(settings(tmp_path, properties={"type": "sql", "warehouse": "file:///lake"})) == "/lake"
    assert local_warehouse(settings(tmp_path, properties=S3)) == ""
