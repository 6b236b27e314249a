"""Values and keys with a schema of a Schema Registry: Avro, Protobuf and JSON Schema, by confluent-kafka's serializers.

Bytes are in Confluent's wire format: a zero, the schema's id in four bytes, then the value.
https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import enum
import functools
import importlib
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dataforge_kafka_dagster.kafka.avro_check import avro_check
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaConfigError, KafkaError
from dataforge_kafka_dagster.kafka.models import dumped, is_model, is_of_pydantic
from dataforge_kafka_dagster.kafka.protobuf import (
    message_at,
    message_of_text,
    message_to_dict,
    place_of,
    protobuf_of,
    rounded_number,
    with_required,
)
from dataforge_kafka_dagster.kafka.registry import INSTALL, SchemaRegistry, SchemaRegistryConfig, is_answer
from dataforge_kafka_dagster.kafka.schema_types import (
    avro_of_class,
    avro_of_frame,
    avro_of_scalar,
    json_schema_of,
    json_schema_of_class,
    key_of_frame,
    rows_of_frame,
)
from dataforge_kafka_dagster.kafka.serialization import (
    Encoders,
    is_message,
    no_json_form,
    refuse_non_finite,
    to_json,
    to_protobuf_json,
)
from dataforge_kafka_dagster.kafka.serialization import record_name as name_of

if TYPE_CHECKING:
    import narwhals as nw

SchemaFormat = Literal["avro", "json_schema", "protobuf"]
SCHEMA_FORMATS: Final[tuple[SchemaFormat, ...]] = get_args(SchemaFormat)
SubjectStrategy = Literal["topic", "record", "topic_record"]

# How fastavro and protobuf name a field.
_NAMED: Final = re.compile(
    r"""(?:on field |no value and no default for |named "|specifies: |Field |Failed to parse )([A-Za-z_]\w*)"""
    r"| at \w+\.([A-Za-z_][\w.]*)"
)
_REGISTRY_TYPES: Final[dict[SchemaFormat, str]] = {"avro": "AVRO", "json_schema": "JSON", "protobuf": "PROTOBUF"}
_SUFFIXES: Final[dict[str, SchemaFormat]] = {".avsc": "avro", ".json": "json_schema", ".proto": "protobuf"}


class KafkaSchema(BaseModel):
    """Which schema values or keys have, and what the registry is asked for. Picklable.

    The schema is given as ``text`` or ``file``, as a Protobuf ``message``, by `of` from a class, or not at all: then it
    is derived from a frame's columns, or from the dataclass or pydantic model of the first record.

    Raises:
        pydantic.ValidationError: Options do not fit together.

    Example:
        >>> KafkaSchema(file="schemas/flight.avsc", auto_register=False)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: SchemaFormat = Field(
        default="avro",
        description=(
            "'avro', 'json_schema' or 'protobuf'; what the file's ending says (.avsc, .json, .proto), else 'avro'."
        ),
    )
    text: str | None = Field(
        default=None, description="The schema as text: Avro's or JSON Schema's JSON, or a .proto file's."
    )
    file: str | None = Field(
        default=None, description="A file that holds it, read when the first publication needs it."
    )
    message: str | None = Field(
        default=None,
        description=(
            "A message class that protoc made, as 'package.module_pb2:Message'; of a .proto text with several messages,"
            " also of the registry's latest version, the name of one: 'Order', or 'Order.Item' inside of it."
        ),
    )
    name: str | None = Field(
        default=None, description="Name of a derived record, dots part its namespace; the topic's if None."
    )
    auto_register: bool = Field(
        default=True,
        description=(
            "Whether a schema that the subject does not have yet is registered. The registry refuses it if it is not"
            " compatible with the subject's versions, by the rule that is set there. False: it must be there."
        ),
    )
    use_latest_version: bool = Field(
        default=False,
        description=(
            "Take the subject's latest version from the registry instead of giving a schema. The subject strategies by"
            " record need the record's name then."
        ),
    )
    subject_strategy: SubjectStrategy = Field(
        default="topic",
        description=(
            "'topic' (subject <topic>-value or <topic>-key), 'record' (the record's full name) or 'topic_record'"
            " (<topic>-<record's full name>)."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _format_of_file(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            data = dict(data)
            if isinstance(data.get("text"), (Mapping, list)):
                data["text"] = json.dumps(data["text"])
            if isinstance(data.get("file"), Path):
                data["file"] = str(data["file"])
            if "format" not in data and isinstance(data.get("file"), str):
                data["format"] = _SUFFIXES.get(Path(data["file"]).suffix, "avro")
            if "format" not in data and data.get("message"):
                data["format"] = "protobuf"
        return data

    @model_validator(mode="after")
    def _fits(self) -> KafkaSchema:
        given = [name for name in ("text", "file", "message") if getattr(self, name) is not None]
        of_latest = ["message"] if self.format == "protobuf" else []
        if self.use_latest_version and given and given != of_latest:
            raise ValueError(f"use_latest_version takes the schema from the registry: leave out {', '.join(given)}")
        if self.use_latest_version and self.subject_strategy != "topic" and not self.name:
            raise ValueError("use_latest_version finds its subject by the record's name: set name")
        if {"text", "file"} <= set(given):
            raise ValueError("text and file name the same thing: give one of them")
        if self.message is not None and self.format != "protobuf":
            raise ValueError(f"message={self.message!r} is Protobuf's: set format='protobuf'")
        if self.message is not None and len(given) == 1 and not self.use_latest_version and ":" not in self.message:
            raise ValueError(f"message={self.message!r} is not an import path 'package.module_pb2:Message'")
        return self

    @classmethod
    def of(cls, model: type, **options: Any) -> KafkaSchema:
        """The schema of a dataclass or pydantic model, or of a message class that protoc made.

        Args:
            model: The class.
            options: The others of this class: format, auto_register, subject_strategy.

        Raises:
            InvalidRecordError: A field's type has no type in the format.
            KafkaConfigError: The class is none of these.
        """
        if not isinstance(model, type):
            raise KafkaConfigError(f"schema from {model!r}", "it is no class", "Give the class of the records")
        if is_message(model):
            return cls(message=_path_of(model), **options)
        return cls(**options).with_class(model)

    @classmethod
    def parse(cls, given: Any) -> KafkaSchema:
        """A schema from what metadata and configuration hold.

        Args:
            given: A `KafkaSchema`; a mapping of its options; or a str: a format (the schema is derived), "latest" (the
                registry's latest version, Avro), or a file that ends in .avsc, .json or .proto.

        Raises:
            KafkaConfigError: It is none of these, or the options do not fit together.
        """
        fix = (
            "Give 'avro', 'json_schema', 'protobuf', 'latest', a file (.avsc, .json, .proto), or KafkaSchema's options"
        )
        if isinstance(given, KafkaSchema):
            return given
        try:
            if isinstance(given, Mapping):
                return cls(**given)
            if given == "latest":
                return cls(use_latest_version=True)
            if isinstance(given, str) and given in _REGISTRY_TYPES:
                return cls.model_validate({"format": given})
            if isinstance(given, str) and Path(given).suffix in _SUFFIXES:
                return cls(file=given)
        except ValidationError as error:
            said = "; ".join(str(part["msg"]).removeprefix("Value error, ") for part in error.errors())
            raise KafkaConfigError(f"schema {given!r}", said, fix) from None
        raise KafkaConfigError(f"schema {given!r}", "it names no schema", fix)

    def to_metadata(self) -> dict[str, Any]:
        """The format and what else was given, as JSON values: for an asset's metadata, where `parse` reads them."""
        return {"format": self.format, **self.model_dump(exclude_defaults=True)}

    @property
    def is_given(self) -> bool:
        """Whether the schema is known without an output."""
        return self.use_latest_version or bool(self.text or self.file or self.message)

    def with_class(self, model: type) -> KafkaSchema:
        """This schema, derived from a dataclass or pydantic model.

        Raises:
            InvalidRecordError: A field's type has no type in the format.
            KafkaConfigError: The class is neither.
        """
        if not is_model(model):
            raise KafkaConfigError(
                f"schema from {model.__qualname__}",
                "no schema can be derived from this type",
                "Give the schema as text or file, or publish dataclasses, pydantic models or a data frame",
            )
        if self.format == "json_schema":
            return self._with_json(json_schema_of_class(model) | ({"title": self.name} if self.name else {}))
        return self.with_avro(avro_of_class(model, self.name))

    def with_avro(self, avro: Any) -> KafkaSchema:
        """This schema, of what an Avro schema describes, in its own format.

        Raises:
            InvalidRecordError: A field's type has no type in the format.
        """
        if self.format == "json_schema":
            return self._with_json(json_schema_of(avro))
        if self.format == "protobuf":
            file = protobuf_of(avro).DESCRIPTOR.file
            return self._with_text(base64.b64encode(file.serialized_pb).decode())
        return self._with_text(json.dumps(_as_mapping(avro)))

    def _with_json(self, schema: Mapping[str, Any]) -> KafkaSchema:
        return self._with_text(json.dumps(schema))

    def _with_text(self, text: str) -> KafkaSchema:
        return self.model_copy(update={"text": text, "name": None})

    def read(self) -> str | None:
        """The schema's text, from its file if it is in one; None if it is not given as text.

        Raises:
            KafkaConfigError: The file cannot be read.
        """
        if self.file is None:
            return self.text
        try:
            return Path(self.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KafkaConfigError(
                f"schema file {self.file!r}", str(error), f"Give a file that is readable from {Path.cwd()}"
            ) from error


@dataclasses.dataclass(frozen=True)
class RegisteredSchema:
    """A schema as the registry knows it.

    Attributes:
        part: "value" or "key".
        format: "avro", "json_schema" or "protobuf".
        subject: The subject.
        id: The id that stands in front of each value.
        version: The subject's version, from 1; None if the registry does not tell.
    """

    part: Literal["value", "key"]
    format: SchemaFormat
    subject: str
    id: int
    version: int | None


@dataclasses.dataclass(frozen=True)
class Compatibility:
    """Whether a schema may be registered.

    Attributes:
        compatible: Whether the registry would take it.
        subject: The subject that was asked.
        version: Its latest version, from 1; None if it has none yet, which every schema is compatible with.
        reason: Why it would not; empty if it would.
    """

    compatible: bool
    subject: str
    version: int | None
    reason: str = ""


def _path_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _conf(schema: KafkaSchema) -> dict[str, Any]:
    import confluent_kafka.schema_registry as package  # noqa: PLC0415  (optional)

    return {
        "auto.register.schemas": schema.auto_register and not schema.use_latest_version,
        "subject.name.strategy": getattr(package, f"{schema.subject_strategy}_subject_name_strategy"),
    }


class SchemaEncoder:
    """Encodes the values, or the keys, of one topic with a schema of the registry.

    The schema is looked up or registered once, when the first rows or a frame's columns are known, so before anything
    is sent. `registered` says as what.

    Args:
        registry: The registry.
        schema: Which schema.
        topic: The topic, which names the subject.
        part: "value" or "key".
    """

    def __init__(
        self, registry: SchemaRegistry, schema: KafkaSchema, topic: str, part: Literal["value", "key"] = "value"
    ) -> None:
        self.registered: RegisteredSchema | None = None
        self._registry = registry
        self._schema = schema
        self._topic = topic
        self._part = part
        self._serialize: Callable[[Any], bytes] | None = None
        self._context: Any = None
        self._avro: Any = None
        self._preparing = threading.Lock()

    @property
    def form(self) -> SchemaFormat:
        """The format of what it encodes."""
        return self._schema.format

    def prepare(self, like: Any = None, key: Sequence[str] = ()) -> None:
        """Look up or register the schema, once.

        Args:
            like: A narwhals data frame or a row, from which the schema is derived if none is given.
            key: The frame's key columns, for an encoder of keys.

        Raises:
            InvalidRecordError: A column or field has no type in the format.
            KafkaConfigError: No schema is given, and none can be derived; or what is given is no schema.
            KafkaError: The registry refused the schema or does not answer.
        """
        if self._serialize is not None:
            return
        with self._preparing:
            if self._serialize is not None:  # by another thread
                return
            self._schema = self._settled(like, key)
            build = {
                "avro": self._avro_serializer,
                "json_schema": self._json_serializer,
                "protobuf": self._protobuf_serializer,
            }
            with _installed(self.form):
                self._serialize = build[self.form]()

    def compatibility(self, like: Any = None, key: Sequence[str] = ()) -> Compatibility:
        """Whether the registry would take the schema; nothing is registered. Takes and raises what `prepare` does."""
        from confluent_kafka.schema_registry.error import SchemaRegistryError  # noqa: PLC0415  (optional)

        client, schema = self._registry.client, self._settled(like, key)
        with _installed(self.form):
            text, name = (None, schema.name) if schema.use_latest_version else self._text_of(schema)
        subject = self._subject(name)
        with self._registry.errors(f"subject {subject!r}"):
            try:
                latest = self._registry.checked(client.get_latest_version(subject), f"subject {subject!r}")
            except SchemaRegistryError as error:
                if error.http_status_code != 404:  # noqa: PLR2004
                    raise
                gone = f"the subject has no version: {error.error_message}" if schema.use_latest_version else ""
                return Compatibility(not gone, subject, None, gone)
            if text is None or client.test_compatibility(subject, _registry_schema(text, self.form)):
                return Compatibility(True, subject, latest.version)  # noqa: FBT003
        reason = f"the registry's rule refuses it as not compatible with version {latest.version} of {subject!r}"
        return Compatibility(False, subject, latest.version, reason)  # noqa: FBT003

    def _settled(self, like: Any, key: Sequence[str]) -> KafkaSchema:
        """The schema, derived if none is given."""
        schema = self._schema
        if schema.is_given:
            return schema
        if hasattr(like, "to_native"):
            name = schema.name or self._topic
            any_names = self.form == "json_schema"
            if self._part == "value":
                return schema.with_avro(avro_of_frame(like, name, any_names=any_names))
            avro = key_of_frame(like, key, f"{name}_key", any_names=any_names)
            if len(key) == 1:
                self._refuse_single_in_protobuf()
            if self.form == "avro" and isinstance(avro, dict) and avro.get("logicalType") == "decimal":
                # It writes bytes as they are, without a length, and reads them back as bytes.
                raise self._not_derived(
                    "confluent-kafka writes no decimal outside a record", "Cast the column to text or an int"
                )
            return schema.with_avro(avro)
        return self._derived_from(like)

    def _derived_from(self, like: Any) -> KafkaSchema:
        if is_message(type(like)):
            return self._schema.model_copy(update={"message": _path_of(type(like)), "format": "protobuf"})
        avro = avro_of_scalar(like) if self._part == "key" else None
        if avro is not None:
            self._refuse_single_in_protobuf()
            return self._schema.with_avro(avro)
        if isinstance(like, Mapping) or not (hasattr(like, "__dict__") or dataclasses.is_dataclass(like)):
            raise self._not_derived(f"a {type(like).__qualname__} does not say which types its fields have")
        return self._schema.with_class(type(like))

    def _refuse_single_in_protobuf(self) -> None:
        if self.form == "protobuf":
            raise self._not_derived("a single value is no Protobuf message")

    def _not_derived(
        self,
        cause: str,
        fix: str = "Give the schema as text or file, or publish dataclasses, pydantic models or a data frame",
    ) -> KafkaConfigError:
        culprit = f"{self._part} schema {self.form!r} of topic {self._topic!r}"
        return KafkaConfigError(culprit, f"it cannot be derived: {cause}", fix)

    def _text_of(self, schema: KafkaSchema) -> tuple[str, str | None]:
        """A given schema's text, as the registry keeps it, and its record's name."""
        if self.form == "protobuf":
            descriptor = self._message_of(schema).DESCRIPTOR
            return base64.b64encode(descriptor.file.serialized_pb).decode(), descriptor.full_name
        text = cast("str", schema.read())
        if self.form == "json_schema":
            self._json_check(text)
            return text, _record_name(json.loads(text), self.form)
        try:
            from fastavro import parse_schema  # noqa: PLC0415  (optional)

            parsed = json.loads(text)
            parse_schema(parsed)
        except ImportError:
            raise
        except Exception as error:
            raise self._bad_schema(error) from error
        if isinstance(parsed, str):
            parsed = _as_mapping(parsed)
            text = json.dumps(parsed)
        return text, _record_name(parsed, self.form)

    def _known_schema(self) -> tuple[Any, dict[str, Any]]:
        """The schema as the registry takes it, looked up or registered; and what the serializer is to know of it."""
        schema, client = self._schema, self._registry.client
        if schema.use_latest_version:
            subject = self._subject(schema.name)
            with self._registry.errors(f"subject {subject!r}"):
                found = self._registry.checked(client.get_latest_version(subject), f"subject {subject!r}")
            self._check_type(found.schema, subject)
            self.registered = RegisteredSchema(self._part, self.form, subject, found.schema_id, found.version)
            # Only with use.latest.version does confluent-kafka run the rules of a data contract: slowly.
            return found.schema, {"use.latest.version": True} if found.schema.rule_set else {}
        text, name = self._text_of(schema)
        given = _registry_schema(text, self.form)
        subject = self._subject(name)
        with self._registry.errors(f"subject {subject!r}"):
            if schema.auto_register:
                client.register_schema(subject, given)
            found = self._registry.checked(client.lookup_schema(subject, given), f"subject {subject!r}")
        self.registered = RegisteredSchema(self._part, self.form, subject, found.schema_id, found.version)
        return given, {}

    def _check_type(self, found: Any, subject: str) -> None:
        if found.schema_type != _REGISTRY_TYPES[self.form]:
            raise KafkaConfigError(
                f"subject {subject!r}",
                f"its latest version is of type {found.schema_type}, not {_REGISTRY_TYPES[self.form]}",
                "Set the schema's format to that",
            )

    def _subject(self, name: str | None) -> str:
        strategy = _conf(self._schema)["subject.name.strategy"]
        if name is None and self._schema.subject_strategy != "topic":
            raise KafkaConfigError(
                f"{self._part} schema of topic {self._topic!r}",
                f"subject_strategy={self._schema.subject_strategy!r} needs a record's name, which the schema lacks",
                "Name it (in JSON Schema: its title), or use the subject strategy 'topic'",
            )
        return cast("str", strategy(self._context_of(), name))

    def _context_of(self) -> Any:
        if self._context is None:
            from confluent_kafka.serialization import MessageField, SerializationContext  # noqa: PLC0415  (heavy)

            self._context = SerializationContext(self._topic, getattr(MessageField, self._part.upper()))
        return self._context

    def _bad_schema(self, error: Exception) -> KafkaConfigError:
        return KafkaConfigError(
            f"{self._part} schema of topic {self._topic!r}", f"it is no {self.form} schema: {error}", "Correct it"
        )

    def _build(self, make: Callable[[], Any]) -> Callable[[Any], bytes]:
        with self._registry.errors(f"{self._part} schema of topic {self._topic!r}"):
            try:
                serializer = make()
            except (KafkaError, ImportError):
                raise
            except Exception as error:
                if type(error).__module__.startswith(("confluent_kafka", "httpx")):
                    raise
                raise self._bad_schema(error) from error
        context = self._context_of()
        return lambda value: cast("bytes", serializer(value, context))

    def _avro_serializer(self) -> Callable[[Any], bytes]:
        from confluent_kafka.schema_registry.avro import AvroSerializer  # noqa: PLC0415  (optional)

        schema, more = self._known_schema()
        # A field that the schema lacks is an error, not left out.
        conf = _conf(self._schema) | {"validate.strict.allow.default": True} | more
        serialize = self._build(lambda: AvroSerializer(self._registry.client, schema, conf=conf))
        self._avro = json.loads(schema.schema_str)
        with self._registry.errors(f"{self._part} schema of topic {self._topic!r}"):
            others = [json.loads(found.schema_str) for _, found in _referred(self._registry, schema, deleted=True)]
        check = avro_check(self._avro, others)
        if check is None:
            return lambda row: serialize(_plain(row))

        def encode(row: Any) -> bytes:
            value = _plain(row)
            misfit = check(value)
            if misfit is not None:
                raise _FieldError(misfit.field or None, misfit.cause)
            return serialize(value)

        return encode

    def _json_serializer(self) -> Callable[[Any], bytes]:
        from confluent_kafka.schema_registry.json_schema import JSONSerializer  # noqa: PLC0415  (optional)

        schema, more = self._known_schema()
        # What a data contract's rules change, and what refers to other subjects, the serializer has to check itself.
        check = None if more or schema.references else self._json_check(schema.schema_str)
        conf, client = _conf(self._schema) | more | {"validate": check is None}, self._registry.client
        serialize = self._build(lambda: JSONSerializer(schema, client, conf=conf, json_encode=orjson.dumps))

        def encode(row: Any) -> bytes:
            value = _json_values(row)
            if check is not None:
                check(value)
            return serialize(value)

        return encode

    def _json_check(self, text: str) -> Callable[[Any], None]:
        """Raises if a value does not fit: a compiled check, a hundred times as fast as the serializer's own."""
        import jsonschema_rs  # noqa: PLC0415  (optional)

        def fetch(address: str) -> Any:
            raise ValueError(f"{address} is neither in the schema nor one of its references in the registry")

        try:
            validator = jsonschema_rs.validator_for(json.loads(text), validate_formats=False, retriever=fetch)
        except Exception as error:
            raise self._bad_schema(error) from error
        return cast("Callable[[Any], None]", validator.validate)

    def _protobuf_serializer(self) -> Callable[[Any], bytes]:
        from confluent_kafka.schema_registry.protobuf import ProtobufSerializer  # noqa: PLC0415  (optional)
        from google.protobuf.json_format import ParseDict  # noqa: PLC0415  (optional)

        conf = _conf(self._schema)
        if self._schema.use_latest_version:
            latest, more = self._known_schema()
            with self._registry.errors(f"{self._part} schema of topic {self._topic!r}"):
                imports = _imports_of(self._registry, latest)
            cls = self._message_of_text(latest.schema_str, imports)
            # The serializer's own text of the schema may differ from the registry's: the id is what counts.
            conf |= more or self._with_this_id(cls)
        else:
            cls = self._message_of(self._schema)
        serialize = self._build(lambda: ProtobufSerializer(cls, self._registry.client, conf=conf))
        if not self._schema.use_latest_version:
            self._register_message(cls, serialize)

        @functools.lru_cache
        def is_derived(row_type: Any) -> bool:
            return _is_derived(cls.DESCRIPTOR, row_type)

        def encode(row: Any) -> bytes:
            if isinstance(row, cls):
                return serialize(row)
            # A derived message has a class's fields by their names, one that is given may have what it serializes to.
            plain = _plain(row) if is_derived(type(row)) else row  # type: ignore[arg-type]
            value = _json_values(plain, to_protobuf_json)
            rounded = rounded_number(value, cls.DESCRIPTOR)
            if rounded is not None:
                raise _FieldError(rounded, "a whole number that the field's type rounds: make it a float, if it may be")
            return serialize(ParseDict(value, cls()))

        return encode

    def _with_this_id(self, cls: Any) -> dict[str, Any]:
        """Settings of a serializer that asks nothing and writes the id that is known."""
        from confluent_kafka.schema_registry import prefix_schema_id_serializer  # noqa: PLC0415  (optional)
        from confluent_kafka.schema_registry.serde import SchemaId  # noqa: PLC0415  (optional)

        number = cast("RegisteredSchema", self.registered).id
        place = SchemaId("PROTOBUF", number, None, place_of(cls.DESCRIPTOR))
        return {
            "subject.name.strategy": lambda _context, _name: None,
            "schema.id.serializer": lambda payload, context, _: prefix_schema_id_serializer(payload, context, place),
        }

    def _message_of(self, schema: KafkaSchema) -> Any:
        text = schema.read()
        return self._imported_message(schema.message or "") if text is None else self._message_of_text(text, {})

    def _message_of_text(self, text: str, imports: Mapping[str, str]) -> Any:
        folder = Path(self._schema.file).parent if self._schema.file else None
        try:
            return message_of_text(text, self._schema.message, imports, folder)
        except KafkaError:
            raise
        except ValueError as error:
            raise self._bad_schema(error) from error

    @staticmethod
    def _imported_message(path: str) -> Any:
        module, _, name = path.partition(":")
        try:
            cls = importlib.import_module(module)
            for part in name.split("."):
                cls = getattr(cls, part)
        except (ImportError, AttributeError) as error:
            raise KafkaConfigError(
                f"message={path!r}", str(error), "Give an import path 'package.module_pb2:Message'"
            ) from error
        if not is_message(cast("Any", cls)):
            raise KafkaConfigError(f"message={path!r}", "it is no Protobuf message class", "Give one that protoc made")
        return cls

    def _register_message(self, cls: Any, serialize: Callable[[Any], bytes]) -> None:
        """Let the serializer look up or register the message with all that it imports, and learn its id."""
        subject = self._subject(cls.DESCRIPTOR.full_name)
        with self._registry.errors(f"subject {subject!r}"):
            client = self._registry.client
            number = int.from_bytes(serialize(with_required(cls()))[1:5], "big")
            found = client.lookup_schema(subject, client.get_schema(number, subject))
        self.registered = RegisteredSchema(self._part, self.form, subject, number, found.version)

    def rows(self, frame: nw.DataFrame[Any]) -> list[dict[str, Any]]:
        """A frame's rows as this encodes them; NaN is a number in Avro, and null in the formats that have none."""
        return rows_of_frame(frame, nan_is_null=self.form != "avro")

    def __call__(self, rows: Sequence[Any], start: int = 0) -> list[bytes | None]:
        """The rows, encoded; None stays None.

        Args:
            rows: Values or keys: mappings, dataclasses, pydantic models, Protobuf messages, or what the schema's type
                is, such as str.
            start: Position of the first in the output, for errors.

        Raises:
            InvalidRecordError: A row does not fit the schema.
            KafkaError: The registry refused the schema or does not answer.
        """
        if self._serialize is None:
            first = next((row for row in rows if row is not None), None)
            if first is None:  # no schema can be derived yet, and none is needed
                return [None] * len(rows)
            self.prepare(first)
        serialize = cast("Callable[[Any], bytes]", self._serialize)
        encoded: list[bytes | None] = []
        try:
            encoded.extend(None if row is None else serialize(row) for row in rows)
        except InvalidRecordError as error:
            index = start + len(encoded)
            raise self._misfit(rows[len(encoded)], index, _FieldError(error.field, error.cause)) from error
        except KafkaError:
            raise
        except Exception as error:
            index = start + len(encoded)
            with self._registry.errors(f"{self._part} schema of topic {self._topic!r}"):
                if type(error).__module__.startswith(("confluent_kafka.schema_registry.error", "httpx")):
                    raise
            raise self._misfit(rows[len(encoded)], index, error) from error
        return encoded

    def _misfit(self, row: Any, index: int, error: Exception) -> InvalidRecordError:
        field, cause = self._find(row, error)
        place = f", field {field!r}" if field else ""
        what = "key" if self._part == "key" else "value"
        return InvalidRecordError(
            f"{name_of(index)}{place}",
            f"its {what} does not fit the schema of topic {self._topic!r}: {cause[:500]}",
            "Correct the record, or change the schema",
            index=index,
            field=field,
        )

    def _find(self, row: Any, error: Exception) -> tuple[str | None, str]:
        """The field at fault, if it can be told, and what is wrong with it."""
        if isinstance(error, _FieldError):
            return error.field, error.cause
        if hasattr(error, "instance_path"):
            return ".".join(map(str, error.instance_path)) or None, str(getattr(error, "message", error))
        if self.form == "json_schema" and error.__context__ is not None and hasattr(error.__context__, "absolute_path"):
            failed: Any = error.__context__
            return ".".join(map(str, failed.absolute_path)) or None, failed.message
        if self.form == "avro":
            # A model's serializer may fail.
            with contextlib.suppress(Exception):
                found = _avro_misfit(_plain(row), self._avro)
                if found is not None:
                    return found
        match = _NAMED.search(str(error))
        return next(filter(None, match.groups())) if match else None, str(error)


class _FieldError(ValueError):
    def __init__(self, field: str | None, cause: str) -> None:
        super().__init__(cause)
        self.field = field
        self.cause = cause


def _avro_misfit(row: Any, schema: Any) -> tuple[str | None, str] | None:
    from fastavro.validation import ValidationError as AvroValidationError  # noqa: PLC0415  (optional)
    from fastavro.validation import validate  # noqa: PLC0415

    if isinstance(row, Mapping) and isinstance(schema, dict) and schema.get("type") == "record":
        names = [field["name"] for field in schema["fields"]]
        more = [name for name in row if name not in names]
        if more:
            return str(more[0]), f"the schema has no such field; it has {', '.join(names[:30])}"
        for field in schema["fields"]:
            if field["name"] not in row and "default" not in field:
                return field["name"], "the record lacks it, and the schema has no default for it"
    try:
        validate(row, schema)
    except AvroValidationError as error:
        found = [part for part in error.errors if not isinstance(part, str)]
        if found:
            worst = max(found, key=lambda part: part.field.count(".") if part.field else 0)
            path = worst.field or ""
            for name in sorted(_record_names(schema), key=len, reverse=True):
                path = path.replace(f"{name}.", "")
            wanted = [part.schema for part in found if part.field == worst.field]
            return path or None, f"it is of type {type(worst.datum).__qualname__}, not {' or '.join(map(str, wanted))}"
    except Exception:  # noqa: BLE001  (a value that its logical type cannot take, or a reference to another schema)
        return _unprepared(row, schema)
    return None


def _unprepared(row: Any, schema: Any) -> tuple[str, str] | None:
    """The field whose value its logical type cannot take, such as a decimal of too many digits."""
    from fastavro.schema import UnknownType  # noqa: PLC0415  (optional)
    from fastavro.validation import ValidationError as AvroValidationError  # noqa: PLC0415
    from fastavro.validation import validate  # noqa: PLC0415

    for field in schema.get("fields", ()) if isinstance(schema, dict) and isinstance(row, Mapping) else ():
        try:
            validate(row, schema | {"fields": [field]})
        except (AvroValidationError, UnknownType):
            continue
        except Exception as error:  # noqa: BLE001  (of any kind: it is told)
            return field["name"], str(error)
    return None


def _record_names(schema: Any, space: str = "") -> set[str]:
    """The names of an Avro schema's records, as fastavro puts them into a field's path."""
    if isinstance(schema, list):
        return set().union(*(_record_names(member, space) for member in schema))
    if not isinstance(schema, dict):
        return set()
    space = schema.get("namespace", space)
    names = {name for key in ("items", "values", "type") for name in _record_names(schema.get(key), space)}
    if schema.get("type") == "record":
        name = schema["name"]
        names.add(name if "." in name or not space else f"{space}.{name}")
        names.update(name for field in schema["fields"] for name in _record_names(field["type"], space))
    return names


def _referred(registry: SchemaRegistry, schema: Any, **options: Any) -> Iterator[tuple[str, Any]]:
    """(name, schema) of each of other subjects that a schema refers to, behind those that it refers to itself."""
    for reference in schema.references or ():
        found = registry.client.get_version(reference.subject, reference.version, **options).schema
        yield from _referred(registry, found, **options)
        yield reference.name, found


def _registry_schema(text: str, form: SchemaFormat) -> Any:
    from confluent_kafka.schema_registry import Schema  # noqa: PLC0415  (optional)

    return Schema(text, _REGISTRY_TYPES[form])


@contextlib.contextmanager
def _installed(form: SchemaFormat) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise KafkaConfigError(f"{form} schema", f"a package is missing: {error.name}", INSTALL) from error


def _as_mapping(avro: Any) -> Any:
    """A type as confluent-kafka's serializer takes it: not by its bare name."""
    return {"type": avro} if isinstance(avro, str) else avro


def _record_name(schema: Any, form: SchemaFormat) -> str | None:
    if not isinstance(schema, dict):
        return schema if isinstance(schema, str) else None
    if form == "json_schema":
        return schema.get("title")
    name, space = schema.get("name"), schema.get("namespace")
    return f"{space}.{name}" if space and name and "." not in name else name or schema.get("type")


# Before 2.12, pydantic leaves out computed fields only by an option that writes fields of its Json type as text, too.
_NO_COMPUTED: Final = "exclude_computed_fields"
_KNOWN: Final = inspect.signature(BaseModel.model_dump).parameters
_FIELDS_ONLY: Final[dict[str, Any]] = {
    "by_alias": False,
    _NO_COMPUTED if _NO_COMPUTED in _KNOWN else "round_trip": True,
}


def _plain(value: Any) -> Any:
    """A dataclass or model as a mapping by its fields, an enum as its value; anything else as it is.

    A model's fields are what it serializes to, without what it excludes.
    """
    if type(value) in {dict, str, int}:
        return value
    if isinstance(value, enum.Enum):
        return value.value
    if is_of_pydantic(type(value)):
        return _inside(dumped(value, **_FIELDS_ONLY))
    if dataclasses.is_dataclass(value):
        return {field.name: _inside(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else value


def _inside(value: Any) -> Any:
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_inside(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _inside(item) for key, item in value.items()}
    return _plain(value)


def _is_derived(message: Any, cls: type) -> bool:
    """Whether a message is the one derived from a class, told by their descriptors."""
    if not is_model(cls):
        return False
    try:
        derived = protobuf_of(avro_of_class(cls, message.full_name)).DESCRIPTOR
    except Exception:  # noqa: BLE001  (of any kind: none can be derived from it)
        return False
    return bool(_described(derived) == _described(message))


def _described(descriptor: Any) -> Any:
    from google.protobuf import descriptor_pb2  # noqa: PLC0415  (optional)

    described = descriptor_pb2.DescriptorProto()
    descriptor.CopyToProto(described)
    return described


def _json_values(value: Any, write: Callable[[Any], bytes] = to_json) -> Any:
    """A value as JSON has it: what `to_json` or its like writes, read again.

    Raises:
        InvalidRecordError: Something in it has no JSON form.
    """
    try:
        encoded = write(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise no_json_form(value, None, error, write) from error
    if b"null" in encoded:
        refuse_non_finite(value, None)
    return orjson.loads(encoded)


@dataclasses.dataclass(frozen=True)
class SchemaEncoders(Encoders):
    """The encoders of one topic, of which one at least has a schema.

    Attributes:
        value: Encodes values; None goes by their type.
        key: Encodes keys; None writes them as text.
        form: The format of the values that `value` makes.
    """

    value: SchemaEncoder | None = None
    key: SchemaEncoder | None = None

    @property
    def registered(self) -> tuple[RegisteredSchema, ...]:
        """What the registry calls the schemas, as far as they were needed."""
        return tuple(part.registered for part in (self.value, self.key) if part and part.registered)

    def prepare(self, frame: nw.DataFrame[Any], fields: Sequence[str]) -> None:
        """Look up or register the schemas, which are those of a frame's columns if none are given.

        Args:
            frame: The frame.
            fields: Its key columns.

        Raises:
            InvalidRecordError: A column has no type in the format.
            KafkaError: The registry refused a schema or does not answer.
        """
        if self.value:
            self.value.prepare(frame)
        if self.key and fields:
            self.key.prepare(frame, fields)

    def rows(self, frame: nw.DataFrame[Any]) -> Sequence[dict[str, Any]]:
        """A frame's rows as the value's encoder takes them."""
        return self.value.rows(frame) if self.value else super().rows(frame)

    def key_rows(self, frame: nw.DataFrame[Any]) -> Sequence[dict[str, Any]]:
        """The rows of a frame's key columns as the key's encoder takes them."""
        return self.key.rows(frame) if self.key else super().key_rows(frame)


def schema_encoders(
    config: SchemaRegistryConfig | None, topic: str, value: KafkaSchema | None, key: KafkaSchema | None
) -> SchemaEncoders:
    """The encoders of one topic. Schemas that are given are looked up or registered now, others with the first rows.

    Args:
        config: The registry.
        topic: The topic, which names the subjects.
        value: The schema of values; None goes by their type.
        key: The schema of keys; None writes them as text.

    Raises:
        KafkaConfigError: There is no registry, or what is given is no schema.
        KafkaError: The registry refused a schema or does not answer.
    """
    if config is None:
        raise KafkaConfigError(
            f"schema of topic {topic!r}", "there is no Schema Registry to keep it", "Set schema_registry_url"
        )
    registry = SchemaRegistry(config)
    values = SchemaEncoder(registry, value, topic) if value else None
    keys = SchemaEncoder(registry, key, topic, "key") if key else None
    for schema, encoder in ((value, values), (key, keys)):
        if schema and encoder and schema.is_given:
            encoder.prepare()
    return SchemaEncoders(values, keys, value.format if value else None)


class SchemaDecoder:
    """Decodes values and keys by the schema they were written with, which the registry has by the id in their bytes.

    Args:
        registry: The registry.
    """

    def __init__(self, registry: SchemaRegistry) -> None:
        self._registry = registry
        self._decoders: dict[SchemaFormat, Callable[[bytes], Any]] = {}
        self._messages: dict[Any, Any] = {}

    def __call__(self, data: bytes | None, form: SchemaFormat) -> Any:
        """A value: of a record a dict, else what its type is; None stays None.

        Args:
            data: The bytes.
            form: The format they were written in.

        Raises:
            KafkaError: The registry does not know the schema or does not answer, or the bytes are of no such format.
        """
        if data is None:
            return None
        from confluent_kafka.serialization import SerializationError  # noqa: PLC0415  (heavy)

        with self._registry.errors(f"the {form} schema of a record"):
            if form not in self._decoders:
                with _installed(form):
                    self._decoders[form] = self._decoder(form)
            try:
                return self._decoders[form](data)
            except (SerializationError, ValueError, EOFError, IndexError, OverflowError) as error:
                if isinstance(error, json.JSONDecodeError) and is_answer(error):
                    raise
                raise KafkaError(
                    f"bytes {data[:10].hex(' ')}...",
                    f"they are not {form} in a Schema Registry's wire format: {error}",
                    "Read them as bytes, or by the format they were written in",
                ) from error

    def _decoder(self, form: SchemaFormat) -> Callable[[bytes], Any]:
        client = self._registry.client
        if form == "avro":
            from confluent_kafka.schema_registry.avro import AvroDeserializer  # noqa: PLC0415  (optional)

            return cast("Callable[[bytes], Any]", AvroDeserializer(client))
        if form == "json_schema":
            from confluent_kafka.schema_registry.json_schema import JSONDeserializer  # noqa: PLC0415  (optional)

            # It was validated when it was written, and by the id in it no subject is needed.
            conf = {"validate": False, "subject.name.strategy": lambda _context, _name: None}
            decode = JSONDeserializer(None, schema_registry_client=client, conf=conf)
            return cast("Callable[[bytes], Any]", decode)
        return self._from_protobuf

    def _from_protobuf(self, data: bytes) -> Any:
        from confluent_kafka.schema_registry import dual_schema_id_deserializer  # noqa: PLC0415  (optional)
        from confluent_kafka.schema_registry.serde import SchemaId  # noqa: PLC0415

        found = SchemaId("PROTOBUF")
        dual_schema_id_deserializer(data, None, found)
        place = (found.id, tuple(found.message_indexes or [0]))
        if place not in self._messages:
            from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer  # noqa: PLC0415  (optional)

            schema = self._registry.client.get_schema(int(found.id or 0), fmt="serialized")
            imports = _imports_of(self._registry, schema, fmt="serialized")
            cls = message_at(self._registry.text_of(schema, f"schema {found.id}"), place[1], imports)
            # The class is known, so no subject is needed; confluent-kafka 2.13 asks for one all the same.
            self._messages[place] = ProtobufDeserializer(cls, {"subject.name.strategy": lambda _context, _name: None})
        return message_to_dict(self._messages[place](data))


def _imports_of(registry: SchemaRegistry, schema: Any, **options: Any) -> dict[str, str]:
    """The texts of the other subjects' files that a Protobuf schema imports, by the names that it imports them by."""
    return {name: found.schema_str or "" for name, found in _referred(registry, schema, **options)}


def check_compatible(
    registry: SchemaRegistryConfig,
    schema: KafkaSchema,
    topic: str,
    *,
    part: Literal["value", "key"] = "value",
    like: Any = None,
) -> Compatibility:
    """Whether the registry would take a schema for a topic, by its rule for the subject; nothing is registered.

    Args:
        registry: The registry.
        schema: The schema; with use_latest_version, whether the subject has one.
        topic: The topic.
        part: "value" or "key".
        like: A data frame or a record, from which the schema is derived if none is given.

    Raises:
        KafkaConfigError: No schema is given, and none can be derived.
        KafkaError: The registry does not answer.
    """
    import narwhals as nw  # noqa: PLC0415  (slow to import)

    if nw.dependencies.is_into_dataframe(like):
        like = nw.from_native(like, eager_only=True)
    return SchemaEncoder(SchemaRegistry(registry), schema, topic, part).compatibility(like)
