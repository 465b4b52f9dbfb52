"""Settings of the sources and of the business rules, in addition to those of the foundation layer."""

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

    enabled: bool = Field(True, description="Whether to read this source")
    dsn: SecretStr = Field(SecretStr(""), description="Connection string or URI, as libpq accepts it")
    schema_name: str = Field("public", description="Schema of the tables")
    publication: str = Field("shopsphere", description="Publication to subscribe to")
    slot: str = Field("shopsphere", description="Logical replication slot; created if it does not exist")
    retyped_columns: Literal["error", "beside"] = Field(
        "error",
        description="What to do when the type of a column changes incompatibly: 'error' stops with an error, 'beside' stores "
        "the new values in a new column <column>__<type>",
    )


class MongoSettings(Section):
    """The MongoDB database of marketplace orders."""

    enabled: bool = Field(True, description="Whether to read this source")
    uri: SecretStr = Field(SecretStr(""), description="MongoDB connection URI")
    database: str = Field("shopsphere", description="Name of the database")
    collection: str = Field("marketplace_orders", description="Collection of marketplace orders")
    mode: Literal["auto", "change_stream", "watermark"] = Field(
        "auto", description="How to capture changes; 'auto' uses a change stream if the server supports it"
    )


class KafkaSettings(Section):
    """The Kafka topics of events."""

    enabled: bool = Field(True, description="Whether to read this source")
    bootstrap_servers: str = Field("", description="Brokers as host:port, separated by commas")
    topics: Annotated[tuple[str, ...], NoDecode] = Field(("events",), description="Topics to read, separated by commas")
    properties: dict[str, str] = Field(
        default_factory=dict, repr=False, description="Further librdkafka properties (security.protocol, sasl.*, ...)"
    )

    @field_validator("topics", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    batch_messages: int = Field(250_000, ge=1, description="Maximum number of messages that a task reads")


class ErasureSettings(Section):
    """How erased people are recognised when a source still sends their data."""

    key: SecretStr = Field(
        SecretStr(""),
        description="Secret key of at least 32 characters for the hashes of erased values; "
        "empty: the file `erasure.key` in SHOPSPHERE_HOME, created by the first `erase`",
    )


class Settings(LakeSettings):
    """All settings of the pipelines. Frozen."""

    base_currency: str = Field("USD", pattern="^[A-Z]{3}$", description="ISO 4217 currency of the amounts in gold")
    default_region: str = Field("ID", pattern="^[A-Z]{2}$", description="Region of phone numbers without a country code")
    address_crowd: int = Field(12, ge=2, description="Maximum number of people at an address that still links their records")
    identifier_crowd: int = Field(
        8, ge=2, description="Maximum number of people that share an e-mail, phone or device that still links their records"
    )
    low_stock_days: Decimal = Field(Decimal(7), description="Days of cover below which stock counts as low")
    postgres: PostgresSettings = PostgresSettings()
    mongo: MongoSettings = MongoSettings()
    kafka: KafkaSettings = KafkaSettings()
    erasure: ErasureSettings = ErasureSettings()


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; `overrides` take precedence. Raises SettingsError that names each invalid setting."""
    return read_settings(Settings, **overrides)


@dataclass(frozen=True)
class BusinessSettings:
    """The settings that determine the rows of silver and gold: when one changes, every table is recomputed."""

    base_currency: str = "USD"
    default_region: str = "ID"
    address_crowd: int = 12
    identifier_crowd: int = 8
    low_stock_days: float = 7.0


def business_settings(settings: Settings) -> BusinessSettings:
    """Return the business settings among all settings."""
    return BusinessSettings(
        base_currency=settings.base_currency,
        default_region=settings.default_region,
        address_crowd=settings.address_crowd,
        identifier_crowd=settings.identifier_crowd,
        low_stock_days=float(settings.low_stock_days),
    )


def settings_of(lake: Lake) -> Settings:
    """Return the settings that the lake was opened with. Raises TypeError when they lack those of the pipelines."""
    if not isinstance(lake.settings, Settings):
        raise TypeError(f"The lake was opened with {type(lake.settings).__name__}, expected pipelines.settings.Settings.")
    return lake.settings
