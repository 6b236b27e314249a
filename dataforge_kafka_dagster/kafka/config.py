"""Validated options, and the pure functions that turn them into librdkafka's settings.

Sources: https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md for the settings,
https://kafka.apache.org/documentation/#producerconfigs for what they mean to Kafka.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dataforge_kafka_dagster.kafka.errors import KafkaConfigError

DeliveryGuarantee = Literal["exactly_once", "at_least_once"]

COMPRESSION_TYPES: Final = ("none", "gzip", "snappy", "lz4", "zstd")
SECURITY_PROTOCOLS: Final = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
SASL_MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")
SECRET_OPTIONS: Final = ("sasl_password", "sasl_oauthbearer_client_secret", "ssl_key_password", "ssl_key_pem")
SECRET_SETTINGS: Final = r"password|secret|key\.pem|sasl\.jaas"  # noqa: S105  (a pattern)
"""A pattern in the names of raw librdkafka settings that are secrets."""
_SERVER: Final = re.compile(r"^(?:[A-Z_]+://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:,\[\]/]+)(?::(?P<port>\d+))?$")
_MAX_TOPIC: Final = 249
_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]+")

ACKS: Final[dict[str, str]] = {"all": "all", "-1": "all", "0": "0", "1": "1"}


def _not(option: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{option}={value!r} is not possible: {allowed}")


BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "retries": (0, 2147483647),
    "batch_size": (1, 2147483647),
    "linger_ms": (0, 900000),
    "buffer_memory": (1024, 2147483647 * 1024),
    "connect_timeout": (0.001, 300),
    "delivery_timeout": (0.001, 2147483),
}
"""Least and most of each option that is a number."""


class KafkaOptions(BaseModel):
    """The options of a producer whose types Dagster's configuration knows too, without their checks."""

    client_id: str | None = Field(
        default=None, description="Name of this client in the brokers' logs and quotas; librdkafka's own if None."
    )
    retries: int = Field(
        default=3,
        description=(
            "Times a failed request is sent again within delivery_timeout; 0 turns idempotence off."
            " Publications retry until delivery_timeout."
        ),
    )
    batch_size: int = Field(
        default=16384,
        description="Largest batch of records to one Kafka partition, bytes. Publications use 1,000,000 if left alone.",
    )
    linger_ms: float = Field(
        default=5,
        description="How long a batch waits for more records, milliseconds. Publications use 20 if left alone.",
    )
    buffer_memory: int = Field(
        default=33554432,
        description="Most memory for records not yet delivered, bytes. Publications use 67,108,864 if left alone.",
    )
    compression_type: str = Field(
        default="snappy", description=f"Codec of the batches: {', '.join(COMPRESSION_TYPES)}."
    )

    connect_timeout: float = Field(default=5.0, description="How long to wait for a broker's first answer, seconds.")
    delivery_timeout: float = Field(
        default=120.0,
        description="How long a record may take from send to acknowledgement, seconds (message.timeout.ms).",
    )

    security_protocol: str = Field(
        default="PLAINTEXT", description=f"Protocol of the listener: {', '.join(SECURITY_PROTOCOLS)}."
    )
    sasl_mechanism: str | None = Field(default=None, description=f"One of {', '.join(SASL_MECHANISMS)}.")
    sasl_username: str | None = Field(default=None, description="User for PLAIN and SCRAM.")
    sasl_password: str | None = Field(default=None, repr=False, description="Password for PLAIN and SCRAM.")
    sasl_oauthbearer_method: str | None = Field(
        default=None, description="'oidc' lets librdkafka fetch the token itself; else set sasl_oauthbearer_callback."
    )
    sasl_oauthbearer_client_id: str | None = Field(default=None, description="Client id for OIDC.")
    sasl_oauthbearer_client_secret: str | None = Field(default=None, repr=False, description="Client secret for OIDC.")
    sasl_oauthbearer_token_endpoint_url: str | None = Field(default=None, description="Token endpoint for OIDC.")
    sasl_oauthbearer_scope: str | None = Field(default=None, description="Scope for OIDC.")
    sasl_oauthbearer_callback: str | None = Field(
        default=None,
        description=(
            "Import path 'package.module:function' of a function that takes one str (librdkafka's"
            " sasl.oauthbearer.config) and returns (token, expiry in seconds since the epoch)."
        ),
    )
    ssl_ca_location: str | None = Field(default=None, description="File or folder of CA certificates (PEM).")
    ssl_ca_pem: str | None = Field(default=None, repr=False, description="CA certificates, PEM text.")
    ssl_certificate_location: str | None = Field(default=None, description="File of the client's certificate (PEM).")
    ssl_certificate_pem: str | None = Field(default=None, repr=False, description="The client's certificate, PEM text.")
    ssl_key_location: str | None = Field(default=None, description="File of the client's private key (PEM).")
    ssl_key_pem: str | None = Field(default=None, repr=False, description="The client's private key, PEM text.")
    ssl_key_password: str | None = Field(default=None, repr=False, description="Passphrase of the private key.")
    ssl_endpoint_identification_algorithm: str | None = Field(
        default=None, description="'https' (librdkafka's default) checks the broker's host name; 'none' does not."
    )
    enable_ssl_certificate_verification: bool = Field(
        default=True, description="Whether the broker's certificate is checked."
    )

    librdkafka_config: dict[str, str] = Field(
        default_factory=dict,
        repr=False,
        description="Raw librdkafka settings, applied last: they win over every option above.",
    )


class KafkaProducerConfig(KafkaOptions):
    """Options of a producer, with the names and defaults of the DataForge Kafka Producer Module.

    The options that every Kafka client shares (servers, security) are named as librdkafka's, with underscores for dots.
    Each is checked when the config is made; a `pydantic.ValidationError` names option, value and what is allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    bootstrap_servers: str | list[str] = Field(
        default=["localhost:9092"],
        description="Brokers to connect to first, as 'host:port': a list, or one string with commas.",
    )
    acks: str | int = Field(
        default="all",
        description=(
            "Replicas that must have a record before it counts as delivered: 'all' (or -1), 1 (the leader) or 0 (none)."
            " 0 and 1 turn idempotence off, so a retry may write a record twice."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name in data:
                if name not in cls.model_fields:
                    close = difflib.get_close_matches(str(name), cls.model_fields, n=1)
                    hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(cls.model_fields)}"
                    dotted = " Raw librdkafka settings go into librdkafka_config." if "." in str(name) else ""
                    raise ValueError(f"unknown option {name!r}: {hint}{dotted}")
        return data

    @field_validator(*BOUNDS, mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: Any) -> Any:
        name = info.field_name
        whole = cls.model_fields[name].annotation is int
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if math.isnan(number) or (whole and number % 1):
            raise _not(name, value, "give a whole number" if whole else "give a number")
        low, high = BOUNDS[name]
        if not low <= number <= high:
            raise _not(name, value, f"allowed are {low} to {high}")
        return value

    @field_validator("bootstrap_servers")
    @classmethod
    def _servers(cls, value: str | list[str]) -> str | list[str]:
        servers = value.split(",") if isinstance(value, str) else value
        if not [server for server in servers if server.strip()]:
            raise _not("bootstrap_servers", value, "name at least one broker, such as 'localhost:9092'")
        for server in servers:
            match = _SERVER.match(server.strip())
            if not match:
                raise _not("bootstrap_servers", server, "each is 'host:port', such as 'localhost:9092'")
            if match["port"] and not 1 <= int(match["port"]) <= 65535:  # noqa: PLR2004
                raise _not("bootstrap_servers", server, "the port must be 1 to 65535")
        return value

    @field_validator("acks", mode="before")
    @classmethod
    def _acks(cls, value: Any) -> Any:
        if isinstance(value, bool) or str(value) not in ACKS:
            raise _not("acks", value, "allowed are 'all', -1, 0 and 1")
        return value

    @field_validator("compression_type")
    @classmethod
    def _codec(cls, value: str) -> str:
        return _one_of("compression_type", value, COMPRESSION_TYPES)

    @field_validator("security_protocol")
    @classmethod
    def _protocol(cls, value: str) -> str:
        return _one_of("security_protocol", value.upper(), SECURITY_PROTOCOLS)

    @field_validator("sasl_mechanism")
    @classmethod
    def _mechanism(cls, value: str | None) -> str | None:
        if value is not None and value.upper() == "GSSAPI":
            raise _not(
                "sasl_mechanism", value, "confluent-kafka's wheel is built without Kerberos; use one of the others:"
                f" {', '.join(SASL_MECHANISMS)}, or build confluent-kafka against a librdkafka with GSSAPI"
            )  # fmt: skip
        return None if value is None else _one_of("sasl_mechanism", value.upper(), SASL_MECHANISMS)

    @model_validator(mode="after")
    def _combinations(self) -> KafkaProducerConfig:
        self._check_sasl()
        self._check_ssl()
        for name in ("ssl_ca_location", "ssl_certificate_location", "ssl_key_location"):
            location = getattr(self, name)
            if location is not None and not Path(location).exists():
                raise _not(name, location, "there is no such file")
        return self

    def _check_sasl(self) -> None:
        given = [n for n in type(self).model_fields if n.startswith("sasl_") and getattr(self, n) is not None]
        if not self.security_protocol.startswith("SASL"):
            if given:
                raise ValueError(
                    f"{', '.join(given)} would be ignored with security_protocol={self.security_protocol!r}:"
                    " set security_protocol to 'SASL_SSL' or 'SASL_PLAINTEXT'"
                )
            return
        if self.sasl_mechanism is None:
            raise ValueError(
                f"security_protocol={self.security_protocol!r} needs sasl_mechanism:"
                f" one of {', '.join(SASL_MECHANISMS)}"
            )
        if self.sasl_mechanism == "OAUTHBEARER":
            if self.sasl_oauthbearer_method != "oidc" and not self.sasl_oauthbearer_callback:
                raise ValueError(
                    "sasl_mechanism='OAUTHBEARER' needs sasl_oauthbearer_callback ('package.module:function'),"
                    " or sasl_oauthbearer_method='oidc' with its client id, secret and token endpoint"
                )
        elif self.sasl_username is None or self.sasl_password is None:
            raise ValueError(f"sasl_mechanism={self.sasl_mechanism!r} needs sasl_username and sasl_password")

    def _check_ssl(self) -> None:
        given = [n for n in type(self).model_fields if n.startswith("ssl_") and getattr(self, n) is not None]
        if given and not self.security_protocol.endswith("SSL"):
            raise ValueError(
                f"{', '.join(given)} would be ignored with security_protocol={self.security_protocol!r}:"
                " set security_protocol to 'SSL' or 'SASL_SSL'"
            )
        for what in ("ca", "certificate", "key"):
            if getattr(self, f"ssl_{what}_location") and getattr(self, f"ssl_{what}_pem"):
                raise ValueError(f"ssl_{what}_location and ssl_{what}_pem name the same thing: give one of them")
        certificate = self.ssl_certificate_location or self.ssl_certificate_pem
        key = self.ssl_key_location or self.ssl_key_pem
        if bool(certificate) != bool(key):
            raise ValueError("a client certificate and its private key go together: give both, or none")

    @property
    def servers(self) -> str:
        """The brokers as librdkafka's ``bootstrap.servers``: one string with commas."""
        value = self.bootstrap_servers
        return ",".join(s.strip() for s in (value.split(",") if isinstance(value, str) else value) if s.strip())

    @property
    def idempotent(self) -> bool:
        """Whether the broker drops the duplicates that retries make: needs all acks, and retries."""
        return ACKS[str(self.acks)] == "all" and self.retries > 0

    def redact(self, text: str) -> str:
        """The text without any secret of this config."""
        raw = (v for k, v in self.librdkafka_config.items() if re.search(SECRET_SETTINGS, k))
        for secret in (*(getattr(self, name) for name in SECRET_OPTIONS), *raw):
            if secret:
                text = text.replace(secret, "***")
        return text


class PublicationConfig(BaseModel):
    """How publications are made: the producer's options and the guarantee. Picklable.

    Raises `pydantic.ValidationError` where the two do not fit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    producer: KafkaProducerConfig = Field(default_factory=KafkaProducerConfig, description="The producer's options.")
    delivery_guarantee: DeliveryGuarantee = Field(
        default="exactly_once",
        description=(
            "'exactly_once': one transaction per publication. 'at_least_once': an idempotent producer without"
            " transactions, for clusters that have none or do not grant their ACLs."
        ),
    )
    transactional_id_prefix: Annotated[str, Field(min_length=1, max_length=60)] = Field(
        default="dagster",
        description=("Begins every transactional id and ledger group. Deployments that share a cluster need one each."),
    )
    transaction_timeout: float = Field(
        default=600.0,
        ge=1,
        le=2147483,
        description=(
            "Longest publication, seconds. The broker aborts a longer one; its transaction.max.timeout.ms"
            " (15 minutes by default) is the limit."
        ),
    )

    @model_validator(mode="after")
    def _fits(self) -> PublicationConfig:
        raw = self.producer.librdkafka_config
        if "transactional.id" in raw:
            raise ValueError(
                "librdkafka_config={'transactional.id': ...} is not possible: each publication has one of its own, by"
                " which attempts find each other. Set transactional_id_prefix"
            )
        if not raw.get("message.timeout.ms", "0").isdecimal():
            raise ValueError(
                f"librdkafka_config={{'message.timeout.ms': {raw['message.timeout.ms']!r}}} is not possible:"
                " give whole milliseconds, or set delivery_timeout"
            )
        if self.delivery_guarantee == "exactly_once" and ACKS[str(self.producer.acks)] != "all":
            raise ValueError(
                f"acks={self.producer.acks!r} cannot give delivery_guarantee='exactly_once': a record that only some"
                " replicas have may be lost or written twice. Set acks='all', or delivery_guarantee='at_least_once'"
            )
        return self


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise _not(option, value, f"allowed are {', '.join(allowed)}")
    return value


def check_topic(topic: object) -> str:
    """The topic, if Kafka allows its name.

    Raises:
        KafkaConfigError: It is not a str of 1 to 249 of the characters a-z A-Z 0-9 . _ -, or it is '.' or '..'.
    """
    legal = isinstance(topic, str) and _TOPIC.fullmatch(topic) and len(topic) <= _MAX_TOPIC and topic not in {".", ".."}
    if not legal:
        raise KafkaConfigError(
            f"topic {topic!r}",
            "Kafka does not allow this name",
            "Use 1 to 249 of the characters a-z A-Z 0-9 . _ - (and neither '.' nor '..')",
        )
    return cast("str", topic)


def client_options(config: KafkaProducerConfig) -> dict[str, Any]:
    """librdkafka's settings that every kind of client shares: servers, name, security; raw settings last."""
    options: dict[str, Any] = {
        "bootstrap.servers": config.servers,
        "client.id": config.client_id,
        "security.protocol": config.security_protocol,
        "log.connection.close": "false",
    }
    for name in type(config).model_fields:
        if name.startswith(("sasl_", "ssl_")) and name != "sasl_oauthbearer_callback":
            options[name.replace("_", ".")] = getattr(config, name)
    if config.security_protocol.endswith("SSL") and not config.enable_ssl_certificate_verification:
        options["enable.ssl.certificate.verification"] = "false"
    return {name: value for name, value in options.items() if value is not None} | config.librdkafka_config


def producer_options(config: KafkaProducerConfig) -> dict[str, Any]:
    """librdkafka's settings for a producer of single records."""
    return {
        "acks": ACKS[str(config.acks)],
        "enable.idempotence": config.idempotent,
        "message.send.max.retries": config.retries,
        "batch.size": config.batch_size,
        "queue.buffering.max.ms": config.linger_ms,
        "queue.buffering.max.kbytes": config.buffer_memory // 1024,
        "compression.type": config.compression_type,
        "message.timeout.ms": round(config.delivery_timeout * 1000),
        # The Java client, Connect, Spark and Flink use murmur2: a key goes to the same Kafka partition as theirs.
        "partitioner": "murmur2_random",
        # How long a topic may be unknown to a broker before its records fail; librdkafka waits 30 s.
        "topic.metadata.propagation.max.ms": 5000,
    } | client_options(config)


def publication_options(config: PublicationConfig, transactional_id: str) -> dict[str, Any]:
    """librdkafka's settings for one publication: bulk defaults where the producer's options were left alone."""
    producer = config.producer
    bulk = {"batch_size": 1_000_000, "linger_ms": 20, "buffer_memory": 67_108_864, "retries": 2147483647}
    tuned = producer.model_copy(
        update={n: v for n, v in bulk.items() if getattr(producer, n) == type(producer).model_fields[n].default}
    )
    options: dict[str, Any] = producer_options(tuned)
    if config.delivery_guarantee == "exactly_once":
        timeout = round(config.transaction_timeout * 1000)
        options = {
            "transactional.id": transactional_id,
            "transaction.timeout.ms": timeout,
            "socket.timeout.ms": min(10_000, timeout),
        } | options
        delivery: Any = options["message.timeout.ms"]
        options["message.timeout.ms"] = min(int(delivery), timeout)
    return options


def oauth_callback(config: KafkaProducerConfig) -> Callable[[str], tuple[str, float]] | None:
    """The token function that sasl_oauthbearer_callback names, imported.

    Raises:
        KafkaConfigError: There is no such module or function.
    """
    path = config.sasl_oauthbearer_callback
    if path is None:
        return None
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise KafkaConfigError(
            f"sasl_oauthbearer_callback={path!r}", str(error), "Give an import path 'package.module:function'"
        ) from error
    return cast("Callable[[str], tuple[str, float]]", function)
