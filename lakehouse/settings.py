"""Settings: one TOML file plus the environment.

Read from, the first that has it: the environment (`SHOPSPHERE_KAFKA__BOOTSTRAP_SERVERS=...`), the TOML
file (`SHOPSPHERE_CONFIG`, by default `$SHOPSPHERE_HOME/shopsphere.toml`), the defaults below.
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
    """A section of the settings file: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CatalogSettings(Section):
    """The Iceberg catalog. Any PyIceberg catalog: `properties` go to `pyiceberg.catalog.load_catalog` as they are."""

    name: str = Field("shopsphere", description="Name of the catalog")
    properties: dict[str, str] = Field(
        default_factory=dict,
        repr=False,  # credentials are among them
        description="PyIceberg catalog properties (type, uri, warehouse, s3.endpoint ...); "
        "empty: SQLite and a local warehouse under SHOPSPHERE_HOME",
    )


class RaySettings(Section):
    """Ray: where it runs, and when it is worth starting."""

    address: str = Field("", description="Ray address; empty: join the cluster of the job, else start Ray locally")
    cpus: int = Field(0, ge=0, description="CPUs of a local Ray; 0: all of them")
    inline_rows: int = Field(
        50_000,
        ge=0,
        description="A step that reads fewer new rows than this runs in the driver: starting Ray costs more; 0: always Ray",
    )
    rows_per_task: int = Field(250_000, ge=1, description="Rows that one task handles, roughly")
    storage: str = Field(
        "",
        description="Where checkpoints of training go, a path or a URI (s3://bucket/path) that all nodes reach; empty: beside "
        "the tables where these are in an object store, else `training` in SHOPSPHERE_HOME",
    )
    shared_disk: bool = Field(
        False, description="All nodes of the cluster mount SHOPSPHERE_HOME at the same path: tables may then be on a disk"
    )


class LakeSettings(BaseSettings):
    """The settings of the foundation layer. Frozen. An application adds its own in a subclass."""

    model_config = SettingsConfigDict(
        env_prefix="SHOPSPHERE_", env_nested_delimiter="__", frozen=True, extra="forbid", nested_model_default_partial_update=True
    )

    home: Path = Field(Path(".shopsphere"), description="Where everything local lives")
    snapshot_retention_hours: float = Field(24.0 * 7, ge=0, description="`maintain` expires older snapshots")
    orphan_retention_hours: float = Field(
        24.0, ge=1, description="`maintain` deletes unreferenced files older than this; no run may last as long"
    )
    history_days: float = Field(90, ge=1, description="`maintain` drops older days of operations.runs and expectation_results")
    freshness: bool = Field(
        True, description="Judge freshness against the clock; off where the shop's time is not ours, as in the sandbox"
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
    """The directory of everything local: `SHOPSPHERE_HOME`, by default `.shopsphere`, absolute."""
    return Path(os.environ.get("SHOPSPHERE_HOME", ".shopsphere")).expanduser().absolute()


def config_file() -> Path:
    """The settings file: `SHOPSPHERE_CONFIG`, by default `shopsphere.toml` in the home directory."""
    return Path(os.environ.get("SHOPSPHERE_CONFIG", home_directory() / "shopsphere.toml")).expanduser()


Loaded = TypeVar("Loaded", bound=LakeSettings)


def read_settings(kind: type[Loaded], **overrides: Any) -> Loaded:
    """Read settings of a kind; `overrides` win over everything. Raises SettingsError naming each wrong setting."""
    try:
        return kind(**{"home": home_directory(), **overrides})
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors(include_input=False)
        )
        raise SettingsError(
            f"Settings are wrong: {wrong}. Correct {config_file()} or the SHOPSPHERE_... environment variable of that name."
        ) from None
    except (ValueError, OSError) as error:
        raise SettingsError(
            f"The settings cannot be read: {error}. Correct {config_file()}, or the SHOPSPHERE_... environment variable "
            "of that name."
        ) from None
