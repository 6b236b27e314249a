"""A Schema Registry: how to reach it, and its answers, with its errors as ours. Needs the extra `schema-registry`."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import struct
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from dataforge_kafka_dagster.kafka.errors import (
    KafkaConfigError,
    KafkaError,
    KafkaTimeoutError,
    Remedy,
    remedy_of_status,
    without_secrets,
)

INSTALL: Final = "Install it with: pip install 'dataforge-kafka-dagster[schema-registry]'"

_FILES: Final = ("ssl_ca_location", "ssl_certificate_location", "ssl_key_location")
# confluent-kafka's settings that are no text, which Dagster's configuration of them is.
_NUMBERS: Final = frozenset(
    {"timeout", "max.retries", "retries.wait.ms", "retries.max.wait.ms", "cache.capacity", "cache.latest.ttl.sec"}
)
_URL: Final = re.compile(r"(?i:https?)://(?:\[[0-9A-Fa-f:.]+\]|[^\s:,/?#\[\]]+)(?::(?P<port>[0-9]+))?(?:[/?#]\S*)?")
_CHARSETS: Final = ("utf-8", "latin-1")  # of httpx, and of authlib, which asks for OAuth tokens
OF_VARIABLES: Final = (
    "Give what os.environ has, or make it an option of a KafkaProducerResource, which takes an EnvVar for the whole of"
    " one, and whose run looks it up"
)
"""What to do with an EnvVar that is no option of a resource."""


def refuse_missing_file(option: str, location: str, for_text: str) -> None:
    """Refuse the path of a file that is not there, or a PEM text in its place, which is not shown: it may be a key.

    Args:
        option: Its name.
        location: The path.
        for_text: What to do with a text.

    Raises:
        ValueError: It is such a one.
    """
    if "-----BEGIN" in location or "\n" in location:
        raise ValueError(f"{option} is not possible: it is a text, not the path of a file. {for_text}")
    path = Path(location)
    try:
        exists = path.exists()
    except OSError as error:  # it is too long, say
        raise ValueError(f"{option} is not possible: {error.strerror}") from None
    if not exists:
        relative = "" if path.is_absolute() else "; give an absolute path: steps may have another working directory"
        raise ValueError(f"{option}={location!r} is not possible: there is no such file{relative}")


def refuse_bad_url(option: str, url: str, instead: str) -> None:
    """Refuse what is no address of HTTP, or one with a user and password in it. It is not shown.

    Args:
        option: Its name.
        url: The address.
        instead: What to set in place of a user and password.

    Raises:
        ValueError: It is such a one.
    """
    if "@" in url:  # wherever: a password may have a slash
        raise ValueError(f"{option} is not possible with user and password in it: {instead}; any other @ is %40")
    match = _URL.fullmatch(url.strip())
    if not match or not 1 <= int(match["port"] or 80) <= 65535:  # noqa: PLR2004
        raise ValueError(
            f"{option} is not possible: give 'http://host:port' or 'https://host:port', the port 1 to 65535"
        )


def refuse_variables(option: str, value: Any, fix: str) -> None:
    """Refuse Dagster's EnvVar as an option, or in one that is a mapping or list, where nothing looks it up.

    Raises:
        ValueError: It is one: a str with the variable's name as its text, or an int of 0.
    """
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, one in (("", value), *((f"[{place!r}]", one) for place, one in inside)):
        if hasattr(one, "env_var_name"):
            raise ValueError(
                f"{option}{name}=EnvVar({one.env_var_name!r}) is not possible: its value would not be looked up. {fix}"
            )


class SchemaRegistryConfig(BaseModel):
    """How to reach a Schema Registry: Confluent's, or one with its API, such as Apicurio, Karapace or Redpanda.

    Raises:
        pydantic.ValidationError: An option is unknown or not allowed, or a file does not exist.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: str = Field(description="Its address, 'https://host:port' with the path of its API; several with commas.")
    username: str | None = Field(default=None, description="User, or API key, for basic authentication.")
    password: str | None = Field(default=None, repr=False, description="Password, or API secret.")
    token: str | None = Field(default=None, repr=False, description="Bearer token, instead of user and password.")
    ssl_ca_location: str | None = Field(default=None, description="File or folder of CA certificates (PEM).")
    ssl_certificate_location: str | None = Field(default=None, description="File of the client's certificate (PEM).")
    ssl_key_location: str | None = Field(default=None, description="File of the client's private key (PEM).")
    timeout: float = Field(
        default=10.0,
        gt=0,
        le=300,
        description="Longest wait for the next bytes of an answer, seconds; it is asked up to three times.",
    )
    client_config: dict[str, str] = Field(
        default_factory=dict,
        repr=False,
        description="Raw settings of confluent-kafka's SchemaRegistryClient, applied last: for OAuth and proxies.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_variables(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_variables(str(info.field_name), value, OF_VARIABLES)
        return value

    @model_validator(mode="after")
    def _fits(self) -> SchemaRegistryConfig:
        for url in self.url.split(","):
            if not url.strip().startswith("mock://"):
                refuse_bad_url("url", url, "set username and password")
        name = "bearer.auth.issuer.endpoint.url"
        if name in self.client_config:
            instead = "set bearer.auth.client.id and bearer.auth.client.secret"
            refuse_bad_url(f"client_config's {name}", self.client_config[name], instead)
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password go together: give both, or none")
        if self.token is not None and self.username is not None:
            raise ValueError("token and username exclude each other: give one of them")
        if self.ssl_key_location and not self.ssl_certificate_location:
            raise ValueError("ssl_key_location needs ssl_certificate_location")
        for name in _FILES:
            location = getattr(self, name)
            if location is not None:
                refuse_missing_file(name, location, "Write it into one")
        return self

    def redact(self, text: str) -> str:
        """The text without any secret of this config."""
        raw = self.client_config
        pairs = [f"{self.username}:{self.password}", raw.get("basic.auth.user.info", "")]
        pairs.append(f"{raw.get('bearer.auth.client.id')}:{raw.get('bearer.auth.client.secret')}")
        # As they go over the wire, where a registry, its token server or a proxy may quote them.
        basic = {base64.b64encode(p.encode(charset, "replace")).decode() for p in pairs for charset in _CHARSETS}
        secrets = {self.password, self.token, *basic, *raw.values()} - {None}
        return without_secrets(text, list(map(str, secrets)))


def client_options(config: SchemaRegistryConfig) -> dict[str, Any]:
    """The settings of confluent-kafka's `SchemaRegistryClient`; raw settings last.

    Raises:
        ValueError: A raw setting is not the number that it should be.
    """
    options: dict[str, Any] = {
        "url": config.url,
        "timeout": config.timeout,
        "max.retries": 2,
        "retries.wait.ms": 200,
        "retries.max.wait.ms": 1000,
    }
    for name in _FILES:
        options[name.replace("_", ".")] = getattr(config, name)
    if config.username is not None:
        options["basic.auth.user.info"] = f"{config.username}:{config.password}"
    if config.token is not None:
        # Confluent Cloud wants cluster and pool named, others ignore the headers; confluent-kafka 2.13 wants both.
        options |= {
            "bearer.auth.credentials.source": "STATIC_TOKEN",
            "bearer.auth.token": config.token,
            "bearer.auth.logical.cluster": "",
            "bearer.auth.identity.pool.id": "",
        }
    raw = {name: _number(name, text) if name in _NUMBERS else text for name, text in config.client_config.items()}
    return {name: value for name, value in options.items() if value is not None} | raw


def _number(name: str, text: str) -> float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ValueError(f"{name} is not a number") from None


def is_answer(error: json.JSONDecodeError) -> bool:
    """Whether it is a registry's answer that is no JSON, and not a record."""
    return any(module.startswith("httpx") for module in _modules(error))


def _modules(error: Exception) -> list[str]:
    """The modules that an error came through."""
    return [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]


class SchemaRegistry:
    """A connection to a Schema Registry, with its errors as ours. Nothing is connected before the first question.

    Args:
        config: How to reach it.

    Raises:
        KafkaConfigError: The extra `schema-registry` is not installed, or an option is refused.
    """

    def __init__(self, config: SchemaRegistryConfig) -> None:
        self.config = config
        try:
            from confluent_kafka.schema_registry import SchemaRegistryClient  # noqa: PLC0415  (optional)
        except ImportError as error:
            raise KafkaConfigError("Schema Registry", f"a package is missing: {error.name}", INSTALL) from error
        try:
            self.client = SchemaRegistryClient.new_client(client_options(config))
        except (ValueError, TypeError, OSError) as error:
            cause = config.redact(str(error))
            raise KafkaConfigError(self.name, cause, "Correct the option that it names") from None

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"Schema Registry at {self.config.url}"

    @contextlib.contextmanager
    def errors(self, culprit: str) -> Iterator[None]:
        """The registry's errors inside become ours.

        Args:
            culprit: What was asked about, such as a subject.

        Raises:
            KafkaError: The registry refused or did not answer; its `remedy` says whether trying again can help.
        """
        from confluent_kafka.schema_registry.error import OAuthTokenError, SchemaRegistryError  # noqa: PLC0415  (optional)
        from confluent_kafka.serialization import SerializationError  # noqa: PLC0415  (heavy)

        try:
            yield
        except SchemaRegistryError as error:
            raise self._refused(error, culprit) from None
        except OAuthTokenError as error:
            raise self._no_token(error.__context__ or error) from None
        except KafkaError:
            raise
        except json.JSONDecodeError as error:
            raise self._odd_answer(f"{culprit}, {self.name}", f"its answer is no JSON: {error}") from None
        except (AttributeError, KeyError, TypeError, struct.error, SerializationError) as error:
            # confluent-kafka takes an answer's form for granted.
            if not _modules(error)[-1].startswith("confluent_kafka.schema_registry"):
                raise
            raise self._odd_answer(f"{culprit}, {self.name}", f"its answer has another form: {error}") from error
        except Exception as error:
            if not type(error).__module__.startswith("httpx"):
                raise
            raise self._unreachable(error) from None

    def checked(self, found: Any, culprit: str) -> Any:
        """A registered schema as it was answered.

        Raises:
            KafkaError: It lacks what each has.
        """
        if type(found.schema_id) is not int or found.schema_id < 1:
            raise self._odd_answer(f"{culprit}, {self.name}", f"its answer has the id {found.schema_id!r}")
        self.text_of(found.schema, culprit)
        return found

    def text_of(self, schema: Any, culprit: str) -> str:
        """The text of a schema as it was answered.

        Raises:
            KafkaError: It has none.
        """
        if not isinstance(schema.schema_str, str):
            raise self._odd_answer(f"{culprit}, {self.name}", "its answer has no schema")
        return schema.schema_str

    @staticmethod
    def _odd_answer(culprit: str, cause: str) -> KafkaError:
        return KafkaError(
            culprit,
            f"what answers there is no Schema Registry: {cause}",
            "Check the registry's url, with the path of its API; redirects are not followed",
        )

    def _refused(self, error: Any, culprit: str) -> KafkaError:
        status = error.http_status_code
        culprit = f"{culprit}, {self.name}"
        # Some registries put the name of their exception in front.
        words = self.config.redact(str(error.error_message)).partition("Exception: ")
        cause = f"{words[2] or words[0]} [HTTP {status}]"
        if status == 409:  # noqa: PLR2004
            fix = (
                "Make the schema compatible with the subject's versions (a new field needs a default), or change the"
                " subject's compatibility rule"
            )
            return KafkaError(culprit, f"the schema is not compatible: {cause}", fix)
        if status in {401, 403}:
            return KafkaError(
                culprit, f"access was refused: {cause}", "Check its username and password or token, and their rights"
            )
        if status == 404:  # noqa: PLR2004
            fix = "Register the schema, or set auto_register; check the subject_strategy and the registry's url"
            return KafkaError(culprit, f"it is not there: {cause}", fix)
        if status < 400 or status == 405:  # noqa: PLR2004
            return self._odd_answer(culprit, cause)
        if status == 407:  # noqa: PLR2004
            fix = "Give user and password in the address of the proxy"
            return KafkaError(culprit, f"the proxy refused access: {cause}", fix)
        if remedy_of_status(status) is Remedy.RETRY:
            fix = "Try again; if it goes on, check the registry's health"
            return KafkaError(culprit, f"the registry failed: {cause}", fix, remedy=Remedy.RETRY)
        return KafkaError(culprit, f"the schema was refused: {cause}", "Correct the schema")

    def _no_token(self, error: BaseException) -> KafkaError:
        cause = self.config.redact(f"it gave no token: {type(error).__name__}: {error}").partition("\n")[0]
        answer = getattr(error, "response", None)
        if answer is not None:
            passing = remedy_of_status(answer.status_code) is Remedy.RETRY
        else:
            passing = type(error).__module__.startswith("httpx") and not _is_refused_by_tls(cause)
        fix = (
            "Check that it runs, bearer.auth.issuer.endpoint.url, and that a firewall lets you through"
            if passing
            else "Check bearer.auth.issuer.endpoint.url, bearer.auth.client.id, bearer.auth.client.secret and"
            " bearer.auth.scope; a CA of its own is told by the environment's SSL_CERT_FILE"
        )
        remedy = Remedy.RETRY if passing else Remedy.FAIL
        return KafkaError(f"OAuth token server of {self.name}", cause, fix, remedy=remedy)

    def _unreachable(self, error: Exception) -> KafkaError:
        text = self.config.redact(str(error) or type(error).__name__)
        if _is_refused_by_tls(text):
            return KafkaError(self.name, text, "Check the registry's url and ssl_ca_location")
        timed_out = "Timeout" in type(error).__name__
        cause = f"no answer within {self.config.timeout:g} s" if timed_out else f"it cannot be reached: {text}"
        fix = "Check that the registry runs, its url, and that a firewall lets you through"
        return (KafkaTimeoutError if timed_out else KafkaError)(self.name, cause, fix, remedy=Remedy.RETRY)


def _is_refused_by_tls(text: str) -> bool:
    """Whether a handshake failed for a certificate or the like, and not for an end or time-out in its midst."""
    return "[SSL: " in text and "UNEXPECTED_EOF" not in text
