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
    """Everything about serving that can be set. Frozen."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on; beyond loopback API keys are required")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on")
    replicas: int = Field(1, ge=1, description="Processes that answer, each with the whole state in its memory")
    replica_cpus: float = Field(
        0.0, ge=0, description="CPUs that Ray keeps for a replica; on a cluster, 1 spreads replicas over the nodes with free CPUs"
    )
    keys_file: Path | None = Field(None, description="API keys; by default serve_keys.json in SHOPSPHERE_HOME")
    body_bytes: int = Field(65_536, ge=1, description="Largest body of a request")
    batch_body_bytes: int = Field(8_388_608, ge=1, description="Largest body of a batch of orders")
    scoring_queue: int = Field(64, ge=0, description="Requests that may wait to be scored; more are told 429")
    lookup_threads: int = Field(4, ge=1, description="Customer and history look-ups at a time in a replica")
    lookup_queue: int = Field(64, ge=0, description="Requests that may wait for it; more are told 429")
    wait_seconds: float = Field(2.0, gt=0, description="How long ?min_offset= may wait for the state")
    refresh_seconds: float = Field(5.0, gt=0, description="Pause between two looks for a newer snapshot of the lakehouse")
    probe_seconds: float = Field(0.25, gt=0, description="Pause between two questions for the end of the topics")
    start_seconds: float = Field(20.0, gt=0, description="How long a start waits for the end of the topics before it answers")
    model_seconds: float = Field(3.0, gt=0, description="Pause between two looks for another champion or challenger")
    scores_topic: str = Field("fraud_scores", description="Topic in which scores are kept; empty: they are not kept")
    same_answer_seconds: float = Field(3600.0, gt=0, description="How long an order that comes again gets the same answer")
    review_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="From the threshold on orders are reviewed, from this part of the way from it to 1 on they are declined",
    )
    reasons: int = Field(5, ge=0, description="Reasons given with a score")
    drain_seconds: float = Field(20.0, gt=0, description="How long requests under way may take when serving ends")

    @property
    def keys(self) -> Path:
        """The file of API keys."""
        return self.keys_file or home_directory() / "serve_keys.json"

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
    """Read the settings; `overrides` win. Raises SettingsError naming each wrong setting."""
    try:
        return ServeSettings(**overrides)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_input=False))
        raise SettingsError(f"Settings of serving are wrong: {wrong}. Correct the {PREFIX}... environment variable.") from None
