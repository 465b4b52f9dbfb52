"""Settings of serving: the environment (`SHOPSPHERE_SERVE_PORT=...`) over the defaults below."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from lakehouse.errors import SettingsError
from lakehouse.settings import home_directory

PREFIX = "SHOPSPHERE_SERVE_"


class ServeSettings(BaseSettings):
    """All settings of serving. Frozen."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on; other than loopback requires API keys")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on")
    replicas: int = Field(1, ge=1, description="Replica processes, each with the whole state in memory")
    replica_cpus: float = Field(
        0.0, ge=0, description="CPUs that Ray reserves per replica; on a cluster, 1 spreads replicas over nodes with free CPUs"
    )
    keys_file: Path | None = Field(None, description="File of API keys; by default serve_keys.json in SHOPSPHERE_HOME")
    body_bytes: int = Field(65_536, ge=1, description="Maximum size of a request body")
    batch_body_bytes: int = Field(8_388_608, ge=1, description="Maximum size of the body of a batch of orders")
    scoring_queue: int = Field(64, ge=0, description="Scoring requests that may be queued; further ones get 429")
    lookup_threads: int = Field(4, ge=1, description="Concurrent customer and history look-ups per replica")
    lookup_queue: int = Field(64, ge=0, description="Look-ups that may be queued; further ones get 429")
    wait_seconds: float = Field(2.0, gt=0, description="Maximum time that a request with ?min_offset= waits for the state")
    refresh_seconds: float = Field(5.0, gt=0, description="Interval between checks for a newer snapshot of the lakehouse")
    probe_seconds: float = Field(0.25, gt=0, description="Interval between queries for the end offsets of the topics")
    start_seconds: float = Field(20.0, gt=0, description="Maximum time that a start waits to catch up with the topics")
    model_seconds: float = Field(3.0, gt=0, description="Interval between checks for a new champion or challenger")
    scores_topic: str = Field("fraud_scores", description="Topic for scores; empty: scores are not stored")
    same_answer_seconds: float = Field(3600.0, gt=0, description="How long a repeated order gets the same answer")
    remembered_scores: int = Field(
        100_000,
        ge=1,
        description="Scored orders of the last `same_answer_seconds` in a replica's memory, 32 kB each; more get 429",
    )
    review_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Orders are reviewed from the threshold, and declined from this fraction of the range between it and 1",
    )
    reasons: int = Field(5, ge=0, description="Number of reasons in a score")
    drain_seconds: float = Field(20.0, gt=0, description="Maximum time for requests in flight when serving stops")

    @property
    def keys(self) -> Path:
        """The file of API keys."""
        return self.keys_file or home_directory() / "serve_keys.json"

    @property
    def keys_named(self) -> bool:
        """Whether the settings name the file of API keys, which must exist then."""
        return self.keys_file is not None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the port."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def load_serve_settings(**overrides: Any) -> ServeSettings:
    """Read the settings; `overrides` take precedence. Raises SettingsError that names each invalid setting."""
    try:
        return ServeSettings(**overrides)
    except ValidationError as error:
        invalid = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_input=False))
        raise SettingsError(f"Invalid settings of serving: {invalid}. Correct the {PREFIX}... environment variable.") from None
