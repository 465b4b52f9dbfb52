"""Settings of the platform: sources and business rules beside the settings of the foundation layer."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from lakehouse.iceberg.catalog import Lake
from lakehouse.settings import LakeSettings, Section, read_settings


class PostgresSettings(Section):
    """The operational PostgreSQL database."""

    enabled: bool = Field(True, description="Read this source")
    dsn: SecretStr = Field(SecretStr(""), description="libpq connection string or URI")
    schema_name: str = Field("public", description="Schema that holds the tables")
    publication: str = Field("shopsphere", description="Publication to read")
    slot: str = Field("shopsphere", description="Logical replication slot, created when it is not there")
    retyped_columns: Literal["error", "beside"] = Field(
        "error",
        description="A column whose type changed incompatibly: 'error' stops, 'beside' stores the new values "
        "in a new column named <column>__<type>",
    )


class MongoSettings(Section):
    """The MongoDB database of the marketplaces."""

    enabled: bool = Field(True, description="Read this source")
    uri: SecretStr = Field(SecretStr(""), description="MongoDB connection URI")
    database: str = Field("shopsphere", description="Database")
    collection: str = Field("marketplace_orders", description="Collection of marketplace orders")
    mode: Literal["auto", "change_stream", "watermark"] = Field(
        "auto", description="How changes are read; 'auto': change stream where the server has them"
    )


class KafkaSettings(Section):
    """The Kafka topics of events."""

    enabled: bool = Field(True, description="Read this source")
    bootstrap_servers: str = Field("", description="host:port, comma separated")
    topics: Annotated[tuple[str, ...], NoDecode] = Field(("events",), description="Topics to read, comma separated")
    properties: dict[str, str] = Field(
        default_factory=dict, repr=False, description="More librdkafka properties (security.protocol, sasl.*, ...)"
    )

    @field_validator("topics", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    batch_messages: int = Field(250_000, ge=1, description="Messages that one reading task takes at most")


class ErasureSettings(Section):
    """Erased people: how they are recognised when a source still tells of them."""

    key: SecretStr = Field(
        SecretStr(""),
        description="Secret of at least 32 characters under which erased values are hashed; "
        "empty: `erasure.key` in SHOPSPHERE_HOME, made by the first `erase`",
    )


class Settings(LakeSettings):
    """Everything that can be set. Frozen."""

    base_currency: str = Field("USD", pattern="^[A-Z]{3}$", description="ISO 4217 currency of gold")
    default_region: str = Field("ID", pattern="^[A-Z]{2}$", description="Region of phone numbers that name none")
    address_crowd: int = Field(12, ge=2, description="An address shared by more people than this links nobody")
    identifier_crowd: int = Field(8, ge=2, description="An email, phone or device shared by more people than this links nobody")
    low_stock_days: Decimal = Field(Decimal(7), description="Days of cover below which stock is low")
    postgres: PostgresSettings = PostgresSettings()
    mongo: MongoSettings = MongoSettings()
    kafka: KafkaSettings = KafkaSettings()
    erasure: ErasureSettings = ErasureSettings()


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; `overrides` win over everything. Raises SettingsError naming each wrong setting."""
    return read_settings(Settings, **overrides)


@dataclass(frozen=True)
class BusinessSettings:
    """The settings that shape the rows of silver and gold: when one changes, every table is recomputed."""

    base_currency: str = "USD"
    default_region: str = "ID"
    address_crowd: int = 12
    identifier_crowd: int = 8
    low_stock_days: float = 7.0


def business_settings(settings: Settings) -> BusinessSettings:
    """Return the settings that shape results."""
    return BusinessSettings(
        base_currency=settings.base_currency,
        default_region=settings.default_region,
        address_crowd=settings.address_crowd,
        identifier_crowd=settings.identifier_crowd,
        low_stock_days=float(settings.low_stock_days),
    )


def settings_of(lake: Lake) -> Settings:
    """Return the platform's settings that the lake was opened with. Raises TypeError when it has only the foundation's."""
    if not isinstance(lake.settings, Settings):
        raise TypeError(f"The lake was opened with {type(lake.settings).__name__}, expected pipelines.settings.Settings.")
    return lake.settings
