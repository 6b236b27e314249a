"""Validated options, and the pure functions that turn them into librdkafka's settings.

Sources: https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md for the settings,
https://kafka.apache.org/documentation/#producerconfigs for what they mean to Kafka.
"""

from __future__ import annotations

import base64
import difflib
import importlib
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from dataforge_kafka_dagster.kafka.errors import KafkaConfigError, KafkaError, Remedy, without_secrets
from dataforge_kafka_dagster.kafka.registry import (
    OF_VARIABLES,
    SchemaRegistryConfig,
    refuse_bad_url,
    refuse_missing_file,
    refuse_variables,
)

DeliveryGuarantee = Literal["exactly_once", "at_least_once"]

COMPRESSION_TYPES: Final = ("none", "gzip", "snappy", "lz4", "zstd")
SECURITY_PROTOCOLS: Final = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
SASL_MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "AWS_MSK_IAM")
SECRET_OPTIONS: Final = (
    "sasl_password",
    "sasl_oauthbearer_client_secret",
    "sasl_oauthbearer_config",
    "ssl_key_password",
    "ssl_key_pem",
    "ssl_keystore_password",
)
"""Options of a producer whose values are never shown."""
REGISTRY_SECRET_OPTIONS: Final = ("schema_registry_password", "schema_registry_token")
"""Options of a Schema Registry whose values are never shown."""
SECRET_SETTINGS: Final = r"password|passphrase|secret|key\.pem|jaas|oauthbearer\.config|auth\.token|user\.info"  # noqa: S105  (a pattern)
"""A pattern in the names of raw settings, librdkafka's and the Schema Registry's, that are secrets."""
_CALLBACK: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_FILES: Final = (
    "ssl_ca_location",
    "ssl_certificate_location",
    "ssl_key_location",
    "ssl_keystore_location",
    "ssl_crl_location",
    "https_ca_location",
)
# Raw settings of which librdkafka judges itself whether they fit together.
_RAW_TIMEOUTS: Final = {"message.timeout.ms", "delivery.timeout.ms"}
_TIMES: Final = {"linger.ms", "queue.buffering.max.ms", *_RAW_TIMEOUTS}
_RAW_SERVERS: Final = {"bootstrap.servers", "metadata.broker.list"}
_RAW_ACKS: Final = ("acks", "request.required.acks")
# Patterns of what librdkafka needs for idempotence, and so for transactions.
_IDEMPOTENT: Final = {
    "enable.idempotence": "true|t|1",
    **dict.fromkeys(_RAW_ACKS, "all|-1"),
    **dict.fromkeys(("retries", "message.send.max.retries"), "0*[1-9][0-9]*"),
    **dict.fromkeys(("max.in.flight", "max.in.flight.requests.per.connection"), "[1-5]"),
}
# What other clients call an option, and librdkafka's own settings.
_OTHER_NAMES: Final = {
    "servers": "bootstrap_servers",
    "brokers": "bootstrap_servers",
    "broker": "bootstrap_servers",
    "delivery_timeout_ms": "delivery_timeout",
    "message_timeout_ms": "delivery_timeout",
    "request_timeout_ms": "delivery_timeout",
    "sasl_plain_username": "sasl_username",
    "sasl_plain_password": "sasl_password",
    "sasl_oauth_token_provider": "sasl_oauthbearer_callback",
    "ssl_cafile": "ssl_ca_location",
    "ssl_certfile": "ssl_certificate_location",
    "ssl_keyfile": "ssl_key_location",
    "ssl_password": "ssl_key_password",
    "ssl_crlfile": "ssl_crl_location",
    "ssl_ciphers": "ssl_cipher_suites",
    "ssl_check_hostname": "ssl_endpoint_identification_algorithm",
}
_RAW_NAMES: Final = {
    "max_request_size": "message.max.bytes",
    "enable_idempotence": "enable.idempotence",
    "partitioner": "partitioner",
    "max_in_flight_requests_per_connection": "max.in.flight.requests.per.connection",
    "retry_backoff_ms": "retry.backoff.ms",
    "metadata_max_age_ms": "metadata.max.age.ms",
    "connections_max_idle_ms": "connections.max.idle.ms",
    "statistics_interval_ms": "statistics.interval.ms",
}
_PEMS: Final = ("ssl_ca_pem", "ssl_certificate_pem", "ssl_key_pem", "https_ca_pem")
# Ours, or librdkafka's under another name.
_NOT_LIBRDKAFKAS: Final = (
    "sasl_mechanism", "sasl_oauthbearer_callback", "sasl_aws_region", "sasl_aws_profile", "sasl_aws_role_arn"
)  # fmt: skip
_SERVER: Final = re.compile(
    r"^(?:(?P<protocol>[A-Z_]+)://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:,\[\]/]+)(?::(?P<port>\d+))?$"
)
_MAX_TOPIC: Final = 249
_TOPIC: Final = re.compile(r"[A-Za-z0-9._-]+")

ACKS: Final[dict[str, str]] = {"all": "all", "-1": "all", "0": "0", "1": "1"}


_NO_KERBEROS: Final = (
    f"confluent-kafka's wheel is built without Kerberos (GSSAPI). Use one of {', '.join(SASL_MECHANISMS)}; or build"
    " confluent-kafka with it, and set it up in librdkafka_config alone"
)


SENDABLE: Final = re.compile(r"[\t\n\r -~]*")
"""What a token, and the value of a SASL extension, may be: RFC 7628, 3.1."""
_EXTENSION: Final = re.compile(r"(?!auth$)[A-Za-z]+")


def is_extension(name: object, value: object) -> bool:
    """Whether librdkafka takes this for a SASL extension (RFC 7628, 3.1)."""
    if not isinstance(name, str) or not isinstance(value, str):
        return False
    return bool(_EXTENSION.fullmatch(name) and SENDABLE.fullmatch(value))


def _as_texts(option: str, value: Any) -> Any:
    """Settings, with numbers and booleans as librdkafka and Kafka write them."""
    if not isinstance(value, Mapping):
        return value
    for name, one in value.items():
        if isinstance(one, int) and hasattr(one, "env_var_name"):
            variable = one.env_var_name
            raise ValueError(
                f"{option}={{{name!r}: EnvVar.int({variable!r})}} is not possible: its values are texts."
                f" Give EnvVar({variable!r})"
            )
    return {name: as_text(one) for name, one in value.items()}


def _not(option: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{option}={value!r} is not possible: {allowed}")


def _hint(name: str, known: Iterable[str]) -> str:
    """What to write in place of a name that is no option's."""
    lower = name.lower()
    if lower in {"value_serializer", "key_serializer"}:
        return "values and keys are encoded by their types, and bytes sent as they are: serialize before you send"
    if lower in _RAW_NAMES:
        return f"set {_RAW_NAMES[lower]!r} in librdkafka_config"
    hint = _meant(_OTHER_NAMES.get(lower, lower), known)
    return f"{hint} Raw librdkafka settings go into librdkafka_config." if "." in name or hint[-1] != "?" else hint


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, 1, 0.7)
    return f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}."


def refuse_unknown(options: Any, model: type[BaseModel]) -> Any:
    """Options as they are, if they are a mapping of such that a model has, or it takes others, as a subclass may.

    Raises:
        ValueError: There is no such one.
    """
    if not isinstance(options, Mapping) or model.model_config.get("extra") in {"allow", "ignore"}:
        return options
    known = model.model_fields
    aliases = {field.alias for field in known.values()}
    for name in options:
        if name not in known and name not in aliases:
            raise ValueError(f"unknown option {name!r}: {_meant(str(name), known)}")
    return options


def as_text(value: Any) -> Any:
    """A number or boolean as librdkafka and Kafka write it; anything else as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (int, float)) else value


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
            " Publications retry until delivery_timeout, unless it is 0."
        ),
    )
    batch_size: int = Field(
        default=16384,
        description="Largest batch of records to one Kafka partition, bytes. Publications: 1,000,000 for its default.",
    )
    linger_ms: float = Field(
        default=5,
        description="How long a batch waits for more records, milliseconds. Publications: 20 for its default.",
    )
    buffer_memory: int = Field(
        default=33554432,
        description="Most memory for records not yet delivered, bytes. Publications: 67,108,864 for its default.",
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
    sasl_oauthbearer_callback: str | None = Field(
        default=None,
        description=(
            "Import path 'package.module:function' of a function that takes one str (sasl_oauthbearer_config) and"
            " returns (token, expiry in seconds since the epoch), or these two, the principal and a dict of SASL"
            " extensions."
        ),
    )
    sasl_oauthbearer_config: str | None = Field(
        default=None, repr=False, description="Text that sasl_oauthbearer_callback is called with, in any form."
    )
    sasl_oauthbearer_method: str | None = Field(
        default=None, description="'oidc' lets librdkafka fetch the token itself; else set sasl_oauthbearer_callback."
    )
    sasl_oauthbearer_client_id: str | None = Field(default=None, description="Client id for OIDC.")
    sasl_oauthbearer_client_secret: str | None = Field(default=None, repr=False, description="Client secret for OIDC.")
    sasl_oauthbearer_token_endpoint_url: str | None = Field(default=None, description="Token endpoint for OIDC.")
    sasl_oauthbearer_scope: str | None = Field(default=None, description="Scope for OIDC.")
    sasl_oauthbearer_extensions: str | None = Field(
        default=None, description="SASL extensions for OIDC: 'name=value' pairs with commas between."
    )
    https_ca_location: str | None = Field(
        default=None, description="File or folder of CA certificates (PEM) of the OIDC token endpoint."
    )
    https_ca_pem: str | None = Field(
        default=None, repr=False, description="CA certificates of the OIDC token endpoint, PEM text."
    )
    sasl_aws_region: str | None = Field(default=None, description="AWS region of the cluster, for AWS_MSK_IAM.")
    sasl_aws_profile: str | None = Field(
        default=None, description="Profile of AWS credentials for AWS_MSK_IAM; AWS's default credentials if None."
    )
    sasl_aws_role_arn: str | None = Field(
        default=None, description="IAM role to assume for AWS_MSK_IAM; none if None. Excludes sasl_aws_profile."
    )
    ssl_ca_location: str | None = Field(default=None, description="File or folder of CA certificates (PEM).")
    ssl_ca_pem: str | None = Field(default=None, repr=False, description="CA certificates, PEM text.")
    ssl_certificate_location: str | None = Field(default=None, description="File of the client's certificate (PEM).")
    ssl_certificate_pem: str | None = Field(default=None, repr=False, description="The client's certificate, PEM text.")
    ssl_key_location: str | None = Field(default=None, description="File of the client's private key (PEM).")
    ssl_key_pem: str | None = Field(default=None, repr=False, description="The client's private key, PEM text.")
    ssl_key_password: str | None = Field(default=None, repr=False, description="Passphrase of the private key.")
    ssl_keystore_location: str | None = Field(
        default=None, description="File of the client's certificate and key in one (PKCS#12), instead of PEM."
    )
    ssl_keystore_password: str | None = Field(default=None, repr=False, description="Password of the key store.")
    ssl_crl_location: str | None = Field(
        default=None, description="File of revoked certificates (PEM), against which the broker's is checked."
    )
    ssl_cipher_suites: str | None = Field(
        default=None, description="TLS ciphers allowed, as OpenSSL names them, with colons between."
    )
    ssl_providers: str | None = Field(
        default=None, description="OpenSSL 3 providers with commas between, such as 'default,legacy'."
    )
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

    @field_validator(*_FILES, mode="before")
    @classmethod
    def _as_path(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("librdkafka_config", mode="before")
    @classmethod
    def _settings(cls, value: Any, info: ValidationInfo) -> Any:
        return _as_texts(str(info.field_name), value)


class SchemaRegistryOptions(BaseModel):
    """The options of a Schema Registry whose types Dagster's configuration knows too, without their checks."""

    schema_registry_url: str | None = Field(
        default=None,
        description="Schema Registry, 'https://host:port' with the path of its API; several with commas. Outputs use it"
        " that have a kafka/value_schema or kafka/key_schema.",
    )
    schema_registry_username: str | None = Field(default=None, description="Its user, or API key.")
    schema_registry_password: str | None = Field(default=None, repr=False, description="Its password, or API secret.")
    schema_registry_token: str | None = Field(
        default=None, repr=False, description="Its bearer token, instead of user and password."
    )
    schema_registry_ssl_ca_location: str | None = Field(
        default=None, description="File or folder of CA certificates (PEM) for it."
    )
    schema_registry_ssl_certificate_location: str | None = Field(
        default=None, description="File of the client's certificate (PEM) for it."
    )
    schema_registry_ssl_key_location: str | None = Field(
        default=None, description="File of the client's private key (PEM) for it."
    )
    schema_registry_timeout: float = Field(
        default=10.0,
        description="Longest wait for the next bytes of an answer, seconds; it is asked up to three times.",
    )
    schema_registry_client_config: dict[str, str] = Field(
        default_factory=dict,
        repr=False,
        description="Raw settings of confluent-kafka's SchemaRegistryClient, applied last: for OAuth and proxies.",
    )


def registry_config(options: Mapping[str, Any]) -> SchemaRegistryConfig | None:
    """The checked options of a Schema Registry from those of `SchemaRegistryOptions`; None if none is given.

    Raises:
        pydantic.ValidationError: One is not allowed.
        KafkaConfigError: There are options, but no url.
    """
    prefix = "schema_registry_"
    given = {
        name.removeprefix(prefix): value
        for name, value in options.items()
        if name in SchemaRegistryOptions.model_fields
        and value != ""  # how the environment says that there is none
        and value != SchemaRegistryOptions.model_fields[name].get_default(call_default_factory=True)
    }
    if given and "url" not in given:
        raise KafkaConfigError(
            ", ".join(f"{prefix}{name}" for name in given), "there is no Schema Registry to use it for",
            f"Set {prefix}url",
        )  # fmt: skip
    return SchemaRegistryConfig(**given) if given else None


class KafkaProducerConfig(KafkaOptions):
    """Options of a producer, with the names and defaults of the DataForge Kafka Producer Module.

    The options that every Kafka client shares (servers, security) are named as librdkafka's, with underscores for dots.
    Sizes are in bytes, time-outs in seconds, and what ends in ``_ms`` in milliseconds.

    Raises:
        pydantic.ValidationError: An option is unknown or not allowed; it names option, value and what is allowed.
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
                if str(name).startswith("sasl_kerberos"):
                    raise ValueError(f"{name} is not possible: {_NO_KERBEROS}")
                if name not in cls.model_fields:
                    raise ValueError(f"unknown option {name!r}: {_hint(str(name), cls.model_fields)}")
                refuse_variables(name, data[name], OF_VARIABLES)
        return data

    @field_validator(*BOUNDS, mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: Any) -> Any:
        name = info.field_name
        whole = cls.model_fields[name].annotation is int
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if math.isnan(number) or (whole and number % 1):
            raise _not(name, value, "give a whole number" if whole else "give a number")
        low, high = BOUNDS[name]
        if not low <= number <= high:
            raise _not(name, value, f"allowed are {low} to {high}")
        return value

    @field_validator("bootstrap_servers", mode="before")
    @classmethod
    def _no_none(cls, value: Any) -> Any:
        if value is None or (isinstance(value, list) and None in value):
            raise _not("bootstrap_servers", value, "is the environment variable set that it comes from?")
        return value

    @field_validator("bootstrap_servers")
    @classmethod
    def _servers(cls, value: str | list[str]) -> str | list[str]:
        servers = value.split(",") if isinstance(value, str) else value
        if not [server for server in servers if server.strip()]:
            raise _not("bootstrap_servers", value, "name at least one broker, such as 'localhost:9092'")
        # What stands before an @ in URLs is a password, which may have commas.
        whole = re.sub(r".*@", "***@", ",".join(servers), flags=re.DOTALL)
        for server in servers:
            match = _SERVER.match(server.strip())
            if "@" in whole or not match:
                shown = whole if "@" in whole else server
                raise _not("bootstrap_servers", shown, "each is 'host:port', such as 'localhost:9092'")
            if match["port"] and not 1 <= int(match["port"]) <= 65535:  # noqa: PLR2004
                raise _not("bootstrap_servers", server, "the port must be 1 to 65535")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _unset(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        # Not its repr, which may be of a secret. librdkafka would read up to the NUL.
        texts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if any("\0" in text for text in texts if isinstance(text, str)):
            raise ValueError(f"{name} is not possible: it contains a NUL character")
        if value == "" and name.startswith(("sasl_", "ssl_", "https_")):
            return None  # how the environment says that there is none
        # So is a PEM text where line ends cannot be.
        return value.replace("\\n", "\n") if name in _PEMS and isinstance(value, str) else value

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
            raise _not("sasl_mechanism", value, _NO_KERBEROS)
        return None if value is None else _one_of("sasl_mechanism", value.upper(), SASL_MECHANISMS)

    @field_validator("sasl_oauthbearer_method")
    @classmethod
    def _method(cls, value: str | None) -> str | None:
        return None if value is None else _one_of("sasl_oauthbearer_method", value.lower(), ("default", "oidc"))

    @field_validator("sasl_oauthbearer_token_endpoint_url")
    @classmethod
    def _token_endpoint(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            instead = "set sasl_oauthbearer_client_id and sasl_oauthbearer_client_secret"
            refuse_bad_url(str(info.field_name), value, instead)
        return value

    @field_validator("sasl_oauthbearer_extensions")
    @classmethod
    def _extensions(cls, value: str | None) -> str | None:
        for pair in re.split(r"(?<!\\),", value or ""):
            name, equals, text = pair.strip().partition("=")
            if pair.strip() and not (equals and is_extension(name, text)):
                raise _not(
                    "sasl_oauthbearer_extensions", name, "give 'name=value', the name of letters, but not 'auth'"
                )
        return value

    @field_validator("sasl_oauthbearer_callback")
    @classmethod
    def _callback(cls, value: str | None) -> str | None:
        if value is not None and not _CALLBACK.fullmatch(value):
            raise _not("sasl_oauthbearer_callback", value, "give an import path 'package.module:function'")
        return value

    @field_validator("ssl_endpoint_identification_algorithm")
    @classmethod
    def _identification(cls, value: str | None) -> str | None:
        return value and _one_of("ssl_endpoint_identification_algorithm", value.lower(), ("https", "none"))

    @model_validator(mode="after")
    def _combinations(self, info: ValidationInfo) -> KafkaProducerConfig:
        """Refuse options that do not fit together.

        The context's "later" names the options whose values are not known yet, but will be given.
        """
        later = (info.context or {}).get("later", ())
        self._check_raw(math.inf if "delivery_timeout" in later else round(self.delivery_timeout * 1000))
        fields = type(self).model_fields
        given = {name for name in fields if name in later or getattr(self, name) is not None}
        if "security_protocol" not in later:
            if "bootstrap_servers" not in later:
                self._check_protocols()
            self._check_sasl(given, later)
            self._check_ssl(given)
        waits = self.linger_ms >= self.delivery_timeout * 1000
        if waits and not {"linger_ms", "delivery_timeout"} & set(later) and not _TIMES & set(self.librdkafka_config):
            raise ValueError(
                f"delivery_timeout={self.delivery_timeout:g} s is over before linger_ms={self.linger_ms:g} is, so a"
                " record may fail before it is sent: raise delivery_timeout, or lower linger_ms"
            )
        for name in _FILES:
            self._check_file(name)
        for name in _PEMS:
            text = getattr(self, name)
            if text and "-----BEGIN " not in text:
                raise ValueError(
                    f"{name} is no PEM text, which has a line '-----BEGIN ...-----': for a file set {name[:-3]}location"
                )
        return self

    def _check_raw(self, most: float) -> None:
        """Refuse raw settings that errors, deadlines and other attempts would not know of."""
        raw = self.librdkafka_config
        if "transactional.id" in raw:
            raise ValueError(
                "librdkafka_config={'transactional.id': ...} is not possible: single records are sent outside of"
                " transactions, and each publication has one of its own, by which attempts find each other."
                " Set transactional_id_prefix"
            )
        if "delivery.report.only.error" in raw:
            raise ValueError(
                "librdkafka_config={'delivery.report.only.error': ...} is not possible: nobody would be told of a"
                " delivery. Leave it out; publications do without reports where they can"
            )
        if "transaction.timeout.ms" in raw:
            raise ValueError(
                "librdkafka_config={'transaction.timeout.ms': ...} is not possible: records would not know of it, which"
                " may not outlive their transaction. Set transaction_timeout"
            )
        for name in _RAW_SERVERS & set(raw):
            raise ValueError(
                f"librdkafka_config={{{name!r}: ...}} is not possible: errors would name other brokers."
                " Set bootstrap_servers"
            )
        for name in _RAW_TIMEOUTS & set(raw):
            if not (raw[name].isdecimal() and 1 <= int(raw[name]) <= most):
                raise ValueError(
                    f"librdkafka_config={{{name!r}: {raw[name]!r}}} is not possible: give whole milliseconds, no more"
                    " than delivery_timeout, which all other waits keep to. Set delivery_timeout"
                )

    def _check_protocols(self) -> None:
        protocol = self.protocol
        for server in self.servers.split(","):
            match = _SERVER.match(server)
            if match and match["protocol"] not in {None, protocol}:
                raise ValueError(
                    f"bootstrap_servers={server!r} and security_protocol={protocol!r} contradict each"
                    " other, and librdkafka would leave that server out: leave out the prefix, or set security_protocol"
                )

    def _check_sasl(self, given: Container[str], later: Container[str]) -> None:
        protocol, mechanism = self.protocol, self.sasl_mechanism
        ours = [n for n in type(self).model_fields if n.startswith(("sasl_", "https_")) and n in given]
        if not protocol.startswith("SASL"):
            if ours:
                raise ValueError(
                    f"{', '.join(ours)} would be ignored with security_protocol={protocol!r}:"
                    " set security_protocol to 'SASL_SSL' or 'SASL_PLAINTEXT'"
                )
            return
        if "sasl_mechanism" in later or (mechanism is None and "security.protocol" in self.librdkafka_config):
            return
        if mechanism is None:
            raise ValueError(
                f"security_protocol={protocol!r} needs sasl_mechanism: one of {', '.join(SASL_MECHANISMS)}"
            )
        used = {"OAUTHBEARER": ("sasl_oauthbearer_", "https_"), "AWS_MSK_IAM": ("sasl_aws_",)}.get(
            mechanism, ("sasl_username", "sasl_password")
        )
        ignored = [name for name in ours if not name.startswith(("sasl_mechanism", *used))]
        if ignored:
            raise ValueError(f"{', '.join(ignored)} would be ignored with sasl_mechanism={mechanism!r}: leave it out")
        if mechanism == "OAUTHBEARER":
            self._check_oauth(given, later)
        elif mechanism == "AWS_MSK_IAM":
            if protocol != "SASL_SSL":
                raise ValueError("sasl_mechanism='AWS_MSK_IAM' needs security_protocol='SASL_SSL' (port 9098 of MSK)")
            if "sasl_aws_region" not in given:
                raise ValueError("sasl_mechanism='AWS_MSK_IAM' needs sasl_aws_region, such as 'eu-central-1'")
            if "sasl_aws_profile" in given and "sasl_aws_role_arn" in given:
                raise ValueError("sasl_aws_profile and sasl_aws_role_arn exclude each other: give one of them, or none")
        elif not ("sasl_username" in given and "sasl_password" in given):
            raise ValueError(f"sasl_mechanism={mechanism!r} needs sasl_username and sasl_password")

    def _check_oauth(self, given: Container[str], later: Container[str]) -> None:
        if "sasl_oauthbearer_method" in later:
            return
        # librdkafka has more ways to a token, such as signed assertions and Azure's and AWS's metadata services.
        if any("oauthbearer" in name for name in self.librdkafka_config):
            return
        callback = "sasl_oauthbearer_callback" in given
        if self.sasl_oauthbearer_method == "oidc":
            names = ("client_id", "client_secret", "token_endpoint_url")
            missing = [name for part in names if (name := f"sasl_oauthbearer_{part}") not in given]
            if missing:
                raise ValueError(f"sasl_oauthbearer_method='oidc' needs {', '.join(missing)}")
            if callback:
                raise ValueError(
                    "sasl_oauthbearer_callback and sasl_oauthbearer_method='oidc' exclude each other:"
                    " the token comes from one of them"
                )
            if "sasl_oauthbearer_config" in given:
                raise ValueError(
                    "sasl_oauthbearer_config would be ignored with sasl_oauthbearer_method='oidc': leave it out"
                )
        elif callback:
            ours = [n for n in type(self).model_fields if n.startswith(("sasl_oauthbearer_", "https_")) and n in given]
            ignored = [name for name in ours if not name.endswith(("_callback", "_config", "_method"))]
            if ignored:
                raise ValueError(
                    f"{', '.join(ignored)} would be ignored with sasl_oauthbearer_callback, whose function asks for the"
                    " token: leave it out, or set sasl_oauthbearer_method='oidc' instead of the function"
                )
        else:
            raise ValueError(
                "sasl_mechanism='OAUTHBEARER' needs sasl_oauthbearer_callback ('package.module:function'),"
                " or sasl_oauthbearer_method='oidc' with its client id, secret and token endpoint"
            )

    def _check_ssl(self, given: Container[str]) -> None:
        ours = [n for n in type(self).model_fields if n.startswith("ssl_") and n in given]
        if not self.enable_ssl_certificate_verification:
            ours.append("enable_ssl_certificate_verification")
        if ours and not self.protocol.endswith("SSL"):
            raise ValueError(
                f"{', '.join(ours)} would be ignored with security_protocol={self.protocol!r}:"
                " set security_protocol to 'SSL' or 'SASL_SSL'"
            )
        for what in ("ssl_ca", "ssl_certificate", "ssl_key", "https_ca"):
            if f"{what}_location" in given and f"{what}_pem" in given:
                raise ValueError(f"{what}_location and {what}_pem name the same thing: give one of them")
        certificate = [n for n in ours if n in {"ssl_certificate_location", "ssl_certificate_pem"}]
        key = [n for n in ours if n in {"ssl_key_location", "ssl_key_pem"}]
        # Which librdkafka judges itself.
        raw = any(name.startswith(("ssl.certificate.", "ssl.key.")) for name in self.librdkafka_config)
        if bool(certificate) != bool(key) and not raw:
            raise ValueError("a client certificate and its private key go together: give both, or none")
        if "ssl_key_password" in given and not key and not raw:
            raise ValueError("ssl_key_password is for a private key: set ssl_key_location or ssl_key_pem too")
        if ("ssl_keystore_location" in given) != ("ssl_keystore_password" in given):
            raise ValueError("ssl_keystore_location and ssl_keystore_password go together: give both, or none")
        if "ssl_keystore_location" in given and certificate:
            raise ValueError(f"ssl_keystore_location and {certificate[0]} name the same thing: give one of them")

    def _check_file(self, name: str) -> None:
        location = getattr(self, name)
        if not location or (name.endswith("ca_location") and location == "probe"):  # librdkafka looks itself
            return
        text = name.removesuffix("location") + "pem"
        refuse_missing_file(name, location, f"Set {text}" if text in _PEMS else "Write it into one")
        if Path(location).is_dir() and not name.endswith("ca_location"):
            raise _not(name, location, "it is a folder, give the file")

    @property
    def servers(self) -> str:
        """The brokers as librdkafka's ``bootstrap.servers``: one string with commas."""
        value = self.bootstrap_servers
        return ",".join(s.strip() for s in (value.split(",") if isinstance(value, str) else value) if s.strip())

    @property
    def protocol(self) -> str:
        """The security protocol as it is in the end, also as a raw setting."""
        return self.librdkafka_config.get("security.protocol", self.security_protocol).upper()

    @property
    def idempotent(self) -> bool:
        """Whether the broker drops the duplicates that retries make: needs all acks, and retries."""
        return ACKS[str(self.acks)] == "all" and self.retries > 0

    @property
    def acknowledged(self) -> bool:
        """Whether the brokers tell what they have got: not with acks=0, also as a raw setting."""
        raw = [self.librdkafka_config[name] for name in _RAW_ACKS if name in self.librdkafka_config]
        return "0" not in (raw or [ACKS[str(self.acks)]])

    def redact(self, text: str) -> str:
        """The text without any secret of this config."""
        raw = (value for name, value in self.librdkafka_config.items() if re.search(SECRET_SETTINGS, name))
        secrets = [*(getattr(self, name) or "" for name in SECRET_OPTIONS), *map(str, raw)]
        # As they go over the wire, where a token server or a proxy may quote them.
        oauth = [one for one in client_options(self).items() if one[0].startswith("sasl.oauthbearer.client")]
        ids, passwords = ([value for name, value in oauth if name.endswith(end)] for end in (".id", ".secret"))
        basic = (f"{client}:{password}".encode() for client in ids for password in passwords)
        return without_secrets(text, [*secrets, *(base64.b64encode(one).decode() for one in basic)])


class TopicOptions(BaseModel):
    """The fields of `KafkaTopicSpec`, and of Dagster's configuration of one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partitions: int = Field(
        default=1,
        ge=1,
        le=100_000,
        description="Number of Kafka partitions; an existing topic with fewer is refused.",
    )
    replication_factor: int | None = Field(
        default=None,
        ge=1,
        le=32767,
        description="Brokers that hold each record; None is the brokers' default.replication.factor.",
    )
    configs: dict[str, str] = Field(
        default_factory=dict,
        description=(
            "Settings of a topic that is created, such as {'retention.ms': '604800000'}:"
            " https://kafka.apache.org/documentation/#topicconfigs. Those of an existing one are left alone."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, options: Any) -> Any:
        return refuse_unknown(options, cls)

    @field_validator("configs", mode="before")
    @classmethod
    def _settings(cls, value: Any, info: ValidationInfo) -> Any:
        return _as_texts(str(info.field_name), value)


class KafkaTopicSpec(TopicOptions):
    """How to create a topic that is missing, and the least Kafka partitions of one that exists.

    Raises `pydantic.ValidationError` for a value that no topic can have.
    """

    @field_validator("partitions", "replication_factor", "configs", mode="before")
    @classmethod
    def _no_variables(cls, value: Any, info: ValidationInfo) -> Any:
        fix = "Give the resource's create_topics as a mapping, where an EnvVar is resolved"
        refuse_variables(str(info.field_name), value, fix)
        return value

    def describe(self) -> str:
        """One line for logs and errors."""
        factor = (
            "the brokers' replication factor"
            if self.replication_factor is None
            else (f"replication factor {self.replication_factor}")
        )
        settings = "".join(f", {name}={value}" for name, value in self.configs.items())
        return f"partitions {self.partitions}, {factor}{settings}"


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
    create_topics: KafkaTopicSpec | None = Field(
        default=None,
        description="How to create missing topics; None creates none. Brokers never create them by themselves.",
    )
    schema_registry: SchemaRegistryConfig | None = Field(
        default=None, description="The registry of outputs that have a schema; None if none has."
    )
    on_bad_record: str = Field(
        default="fail",
        description=(
            "What to do with a record that cannot be published: 'fail' ends the publication; else the dead-letter topic"
            " that takes it, in the same transaction ('{topic}' in its name stands for the publication's own)."
        ),
    )

    @field_validator("on_bad_record")
    @classmethod
    def _dead_letter_topic(cls, value: str) -> str:
        return check_on_bad_record(value)

    @model_validator(mode="after")
    def _fits(self) -> PublicationConfig:
        if "\0" in self.transactional_id_prefix:
            raise ValueError("transactional_id_prefix is not possible: it contains a NUL character")
        if not (self.transactional_id_prefix.isascii() and self.transactional_id_prefix.isprintable()):
            raise _not("transactional_id_prefix", self.transactional_id_prefix, "give printable ASCII characters")
        if self.delivery_guarantee == "exactly_once" and ACKS[str(self.producer.acks)] != "all":
            raise ValueError(
                f"acks={self.producer.acks!r} cannot give delivery_guarantee='exactly_once': a record that only some"
                " replicas have may be lost or written twice. Set acks='all', or delivery_guarantee='at_least_once'"
            )
        if self.delivery_guarantee == "exactly_once" and self.producer.retries == 0:
            raise ValueError(
                "retries=0 cannot give delivery_guarantee='exactly_once': it needs idempotence, which needs retries."
                " Set retries above 0, or delivery_guarantee='at_least_once'"
            )
        raw = self.producer.librdkafka_config if self.delivery_guarantee == "exactly_once" else {}
        for name in raw.keys() & _IDEMPOTENT.keys():
            if not re.fullmatch(_IDEMPOTENT[name], raw[name], re.IGNORECASE):
                raise ValueError(
                    f"librdkafka_config={{{name!r}: {raw[name]!r}}} cannot give delivery_guarantee='exactly_once':"
                    " it needs idempotence. Leave it out, or set delivery_guarantee='at_least_once'"
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


def check_on_bad_record(given: object) -> str:
    """What to do with bad records, if it is 'fail' or may name a dead-letter topic.

    Raises:
        KafkaConfigError: It is neither.
    """
    try:
        check_topic(given.replace("{topic}", "t") if isinstance(given, str) else given)
    except KafkaConfigError as error:
        raise KafkaConfigError(f"on_bad_record={given!r}", error.cause, f"{error.fix}, or 'fail'") from None
    return cast("str", given)


def client_options(config: KafkaProducerConfig) -> dict[str, Any]:
    """librdkafka's settings that every kind of client shares: servers, name, security; raw settings last."""
    options: dict[str, Any] = {
        "bootstrap.servers": config.servers,
        "client.id": config.client_id,
        "security.protocol": config.security_protocol,
        "log.connection.close": "false",
        # librdkafka's 100 ms delay the first connection to a broker by its own name. What waits for one that refuses it
        # tries every 13 ms then instead of every 52 ms (an admin client of 2.16), or less and less often (a producer).
        # Amazon MSK limits how often a broker is connected to with IAM.
        "reconnect.backoff.ms": None if config.sasl_mechanism == "AWS_MSK_IAM" else "1",
        # A topic that is misspelt or gone is an error, also where the brokers would create it. For what is no consumer,
        # and so for a client that only asks, librdkafka's default is true.
        "allow.auto.create.topics": "false",
    }
    if config.sasl_mechanism is not None:
        options["sasl.mechanism"] = "OAUTHBEARER" if config.sasl_mechanism == "AWS_MSK_IAM" else config.sasl_mechanism
    for name in type(config).model_fields:
        if name.startswith(("sasl_", "ssl_", "https_")) and name not in _NOT_LIBRDKAFKAS:
            options[name.replace("_", ".")] = getattr(config, name)
    if config.protocol.endswith("SSL") and not config.enable_ssl_certificate_verification:
        options["enable.ssl.certificate.verification"] = "false"
    return {name: value for name, value in options.items() if value is not None} | config.librdkafka_config


def token_server(config: KafkaProducerConfig) -> str | None:
    """What errors call the server that librdkafka itself asks for OAuth tokens; None if it asks none."""
    options = client_options(config)
    if config.sasl_mechanism != "OAUTHBEARER" or str(options.get("sasl.oauthbearer.method")).lower() != "oidc":
        return None
    raw = "sasl.oauthbearer.token.endpoint.url"
    if raw in config.librdkafka_config or config.sasl_oauthbearer_token_endpoint_url is None:
        return f"librdkafka_config={{{raw!r}: {options.get(raw)!r}}}"
    return f"sasl_oauthbearer_token_endpoint_url={config.sasl_oauthbearer_token_endpoint_url!r}"


def producer_options(config: KafkaProducerConfig) -> dict[str, Any]:
    """librdkafka's settings for a producer of single records."""
    options: dict[str, Any] = {
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
    } | client_options(config)
    # How long a topic may be unknown to a broker before its records fail, where librdkafka waits 30 s: less than they
    # may be undelivered, which would be told instead.
    return {"topic.metadata.propagation.max.ms": min(5000, int(options["message.timeout.ms"]) // 2)} | options


def publication_options(config: PublicationConfig, transactional_id: str) -> dict[str, Any]:
    """librdkafka's settings for one publication: bulk defaults where the producer's options have their defaults."""
    producer = config.producer
    bulk = {"batch_size": 1_000_000, "linger_ms": 20, "buffer_memory": 67_108_864}
    update: dict[str, Any] = {
        n: v for n, v in bulk.items() if getattr(producer, n) == type(producer).model_fields[n].default
    }
    if producer.retries:
        update["retries"] = BOUNDS["retries"][1]
    options: dict[str, Any] = producer_options(producer.model_copy(update=update))
    if config.delivery_guarantee == "exactly_once":
        timeout = round(config.transaction_timeout * 1000)
        own: dict[str, Any] = {
            "transactional.id": transactional_id,
            "transaction.timeout.ms": timeout,
            "socket.timeout.ms": min(10_000, timeout),
        }
        options = own | options
        for name in _RAW_TIMEOUTS & options.keys():  # librdkafka has two names for it
            options[name] = min(int(options[name]), timeout)
    return options


def import_function(option: str, path: str, redact: Callable[[str], str] = str) -> Callable[..., Any]:
    """The function that an option names by its import path 'package.module:function'.

    Args:
        option: Its name.
        path: Its value.
        redact: Takes secrets out of what the module raises.

    Raises:
        KafkaConfigError: There is no such module or function, it is none, or its module raises.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001  (of any kind: the module is the user's)
        raise KafkaConfigError(
            f"{option}={path!r}",
            redact(f"its import raised {type(error).__name__}: {error}"),
            "Give an import path 'package.module:function', of a module that can be imported in each process",
        ) from None
    if not callable(function):
        raise KafkaConfigError(
            f"{option}={path!r}", f"it is of type {type(function).__qualname__}, no function", "Name a function"
        )
    return cast("Callable[..., Any]", function)


def oauth_callback(config: KafkaProducerConfig) -> Callable[[str], tuple[Any, ...]] | None:
    """The function that fetches OAuth tokens: sasl_oauthbearer_callback's, imported, or AWS_MSK_IAM's; else None.

    Raises:
        KafkaConfigError: There is no such module or function, or the extra ``aws-msk-iam`` is not installed.
    """
    if config.sasl_mechanism == "AWS_MSK_IAM":
        return _msk_token(config)
    path = config.sasl_oauthbearer_callback
    return None if path is None else import_function("sasl_oauthbearer_callback", path, config.redact)


def _msk_token(config: KafkaProducerConfig) -> Callable[[str], tuple[str, float]]:
    try:
        signer = importlib.import_module("aws_msk_iam_sasl_signer.MSKAuthTokenProvider")
    except ImportError as error:
        raise KafkaConfigError(
            "sasl_mechanism='AWS_MSK_IAM'",
            f"the package aws-msk-iam-sasl-signer-python cannot be imported ({error})",
            "Install it with: pip install 'dataforge-kafka-dagster[aws-msk-iam]'",
        ) from error

    def token(_: str) -> tuple[str, float]:
        region, profile, role = config.sasl_aws_region, config.sasl_aws_profile, config.sasl_aws_role_arn
        try:
            if role is not None:
                text, milliseconds = signer.generate_auth_token_from_role_arn(region, role)
            elif profile is not None:
                text, milliseconds = signer.generate_auth_token_from_profile(region, profile)
            else:
                text, milliseconds = signer.generate_auth_token(region)
        except Exception as error:
            raise _no_msk_token(config, error) from error
        return text, milliseconds / 1000

    return token


def _no_msk_token(config: KafkaProducerConfig, error: Exception) -> KafkaError:
    aws = importlib.import_module("botocore.exceptions")
    culprit, code = "sasl_mechanism='AWS_MSK_IAM'", "_AUTHENTICATION"
    if isinstance(error, (AttributeError, aws.NoCredentialsError)):  # the signer (1.0) asks None for its key
        return KafkaConfigError(
            culprit,
            "AWS credentials were not found",
            "Give this process a role, a profile, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            code=code,
        )
    fix = "Check the AWS credentials of this process"
    if config.sasl_aws_role_arn is not None:
        culprit += f" with sasl_aws_role_arn={config.sasl_aws_role_arn!r}"
        fix = "Check that the AWS credentials of this process may assume this role, and that AWS STS can be reached"
    elif config.sasl_aws_profile is not None:
        culprit += f" with sasl_aws_profile={config.sasl_aws_profile!r}"
        fix = "Check this profile in the AWS configuration of this process"
    if isinstance(error, aws.NoRegionError):
        fix = "Set AWS_DEFAULT_REGION to the region of AWS STS"
    away = (OSError, aws.ConnectionError, aws.HTTPClientError, aws.CredentialRetrievalError)
    answer = error.response if isinstance(error, aws.ClientError) else {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    busy = status >= 500 or status == 429 or "Throttl" in answer.get("Error", {}).get("Code", "")  # noqa: PLR2004
    return KafkaError(
        culprit,
        f"AWS gave no token: {type(error).__name__}: {str(error).rstrip('.')}",
        fix,
        code=code,
        remedy=Remedy.RETRY if busy or isinstance(error, away) else Remedy.FAIL,
    )
