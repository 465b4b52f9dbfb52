"""Settings of the foundation layer, and how settings are read.

A setting comes from the environment (`SHOPSPHERE_KAFKA__BOOTSTRAP_SERVERS=...`), else from the TOML file
(`SHOPSPHERE_CONFIG`, by default `$SHOPSPHERE_HOME/shopsphere.toml`), else from its default.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from lakehouse.errors import SettingsError


class Section(BaseModel):
    """A section of the settings file. Frozen; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CatalogSettings(Section):
    """The Iceberg catalog: any catalog of PyIceberg. `properties` are passed to `pyiceberg.catalog.load_catalog` unchanged."""

    name: str = Field("shopsphere", description="Name of the catalog")
    properties: dict[str, str] = Field(
        default_factory=dict,
        repr=False,  # credentials are among them
        description="PyIceberg catalog properties (type, uri, warehouse, s3.endpoint ...); "
        "empty: SQLite and a local warehouse under SHOPSPHERE_HOME",
    )


class RaySettings(Section):
    """Ray: where it runs, and when it is started."""

    address: str = Field("", description="Ray address; empty: the cluster of the Ray job, otherwise a local Ray")
    cpus: int = Field(0, ge=0, description="CPUs of a local Ray; 0: all")
    inline_rows: int = Field(
        50_000,
        ge=0,
        description="A step that reads fewer new rows than this runs in the driver, without Ray's overhead; 0: always Ray",
    )
    rows_per_task: int = Field(250_000, ge=1, description="Approximate number of rows per task")
    storage: str = Field(
        "",
        description="Directory of training checkpoints, a path or a URI (s3://bucket/path) that all nodes can reach; empty: "
        "beside the tables if they are in an object store, otherwise `training` in SHOPSPHERE_HOME",
    )
    require_token: bool = Field(
        True,
        description="Refuse a cluster that does not authenticate with tokens (RAY_AUTH_MODE=token): whoever reaches its ports "
        "can run code on it",
    )
    shared_disk: bool = Field(
        False, description="All nodes of the cluster mount SHOPSPHERE_HOME at the same path, so that tables may be on disk"
    )


class LakeSettings(BaseSettings):
    """The settings of the foundation layer. Frozen. An application adds its own in a subclass."""

    model_config = SettingsConfigDict(
        env_prefix="SHOPSPHERE_", env_nested_delimiter="__", frozen=True, extra="forbid", nested_model_default_partial_update=True
    )

    home: Path = Field(Path(".shopsphere"), description="Directory of all local files")
    snapshot_retention_hours: float = Field(24.0 * 7, ge=0, description="Maintenance expires older snapshots")
    orphan_retention_hours: float = Field(
        24.0, ge=1, description="Maintenance deletes older unreferenced files; must exceed the duration of any run"
    )
    history_days: float = Field(90, ge=1, description="Maintenance deletes older days of operations.runs and expectation_results")
    freshness: bool = Field(
        True, description="Evaluate freshness against the clock; off if the data's time is simulated, as in the sandbox"
    )
    catalog: CatalogSettings = CatalogSettings()
    ray: RaySettings = RaySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config_file())


def home_directory() -> Path:
    """Return the absolute path of the directory of all local files: `SHOPSPHERE_HOME`, by default `.shopsphere`."""
    return Path(os.environ.get("SHOPSPHERE_HOME", ".shopsphere")).expanduser().absolute()


def config_file() -> Path:
    """Return the path of the settings file: `SHOPSPHERE_CONFIG`, by default `shopsphere.toml` in the home directory."""
    return Path(os.environ.get("SHOPSPHERE_CONFIG", home_directory() / "shopsphere.toml")).expanduser()


SettingsT = TypeVar("SettingsT", bound=LakeSettings)


def read_settings(kind: type[SettingsT], **overrides: Any) -> SettingsT:
    """Read settings into a class; `overrides` take precedence. Raises SettingsError, which names each invalid setting."""
    try:
        return kind(**{"home": home_directory(), **overrides})
    except ValidationError as error:
        invalid = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors(include_input=False)
        )
        raise SettingsError(
            f"Settings are invalid: {invalid}. Correct {config_file()} or the SHOPSPHERE_... environment variable of that name."
        ) from None
    except (ValueError, OSError) as error:
        raise SettingsError(
            f"The settings cannot be read: {error}. Correct {config_file()}, or the SHOPSPHERE_... environment variable "
            "of that name."
        ) from None
