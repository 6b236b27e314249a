"""The resource and a topic's asset from YAML, for Dagster's ``dg``.

``dg check yaml`` knows a component by its JSON schema alone, so what is allowed stands there: as if, then and else,
which give one error with its reason, where anyOf says only that nothing fits. Loading checks the same again, and what a
schema cannot say.
"""

import dataclasses
import inspect
import os
import re
import typing
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import dagster as dg
import pydantic
from dagster.components.resolved.core_models import OpSpec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    WrapValidator,
    create_model,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from dataforge_kafka_dagster.failures import failure_of
from dataforge_kafka_dagster.io_manager import (
    WRITE_MODES,
    KafkaIOManager,
    check_write_mode,
    may_give_resource,
    refuse_other_cluster,
    told,
)
from dataforge_kafka_dagster.kafka.config import (
    ACKS,
    BOUNDS,
    COMPRESSION_TYPES,
    REGISTRY_SECRET_OPTIONS,
    SASL_MECHANISMS,
    SECRET_OPTIONS,
    SECRET_SETTINGS,
    SECURITY_PROTOCOLS,
    DeliveryGuarantee,
    KafkaTopicSpec,
    as_text,
    check_topic,
    import_function,
)
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaConfigError
from dataforge_kafka_dagster.kafka.records import key_fields
from dataforge_kafka_dagster.kafka.schemas import KafkaSchema
from dataforge_kafka_dagster.kafka.streams import format_of_file
from dataforge_kafka_dagster.resource import KafkaProducerResource

T = typing.TypeVar("T", bound=BaseModel)

_TEMPLATE: Final = r"\{\{"
_TEMPLATES: Final = re.compile(r"\{\{.*?\}\}(?!\})", re.DOTALL)
_ENV: Final = {
    "type": "object",
    "properties": {"env": {"type": "string", "pattern": r"^[A-Za-z_][A-Za-z0-9_]*$"}},
    "required": ["env"],
    "additionalProperties": False,
}
_PLAIN: Final = {"type": ["string", "number", "boolean"]}
_SECRET_OPTIONS: Final = (*SECRET_OPTIONS, *REGISTRY_SECRET_OPTIONS)
_CHOICES: Final[dict[str, tuple[Any, ...]]] = {
    "acks": (*ACKS, 0, 1),
    "compression_type": COMPRESSION_TYPES,
    "delivery_guarantee": typing.get_args(DeliveryGuarantee),
    "sasl_mechanism": SASL_MECHANISMS,
    "security_protocol": SECURITY_PROTOCOLS,
    "write_mode": WRITE_MODES,
}
_OF_SERVERS: Final = {"type": ["string", "array"], "items": {"type": "string"}}
_OF_FIELDS: Final = {
    "type": ["string", "array", "null"],
    "items": {"type": "string"},
    "minItems": 1,
    "uniqueItems": True,
}
_OF_TOPIC_SPEC: Final = KafkaTopicSpec.model_json_schema() | {"type": ["object", "null"]}
_OF_FACTOR: Final = _OF_TOPIC_SPEC["properties"]["replication_factor"]
_OF_FACTOR.update(_OF_FACTOR.pop("anyOf")[0], type=["integer", "null"])
_TOPIC: Final = r"^[A-Za-z0-9._-]{1,249}$"
_SCHEMA: Final = r"^(avro|json_schema|protobuf|latest|.+\.(avsc|json|proto))$"
_FUNCTION: Final = r"^\w+(\.\w+)*:\w+$"


class _Env(BaseModel):
    """``{env: NAME}``: the environment variable's value when a run starts; Dagster stores its name only."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    env: Annotated[str, Field(pattern=_ENV["properties"]["env"]["pattern"])]


def _or_template(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"if": {"type": "string", "pattern": _TEMPLATE}, "then": True, "else": schema}


def _or_env(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"if": {"type": "object", "required": ["env"]}, "then": _ENV, "else": schema}


_SECRET: Final = {"if": {"type": "object"}, "then": _ENV, "else": {"const": {"env": "NAME_OF_A_VARIABLE"}}}
_RAW: Final = {
    "type": "object",
    "patternProperties": {SECRET_SETTINGS: _SECRET},
    "additionalProperties": _or_env(_PLAIN),
}


def _is_template(value: object) -> bool:
    return isinstance(value, str) and re.search(_TEMPLATE, value) is not None


def _has_template(value: object) -> bool:
    return any(map(_has_template, value.values())) if isinstance(value, dict) else _is_template(value)


def _secret(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("a secret is not written into YAML, nor a template of it: write {env: NAME_OF_A_VARIABLE}")  # noqa: TRY004  (pydantic's)
    return _Env.model_validate(value)


def _raw_setting(name: str, value: Any) -> Any:
    if re.search(SECRET_SETTINGS, name):
        return _secret(value)
    if isinstance(value, Mapping):
        return _Env.model_validate(value)
    return as_text(value)


def _field(name: str, info: Any) -> tuple[Any, Any]:
    """An option of a resource as a YAML attribute: its type with JSON schema, and its description and default."""
    default = info.get_default(call_default_factory=True)
    described = Field(default=default, description=info.description)
    annotation = info.annotation
    if name in _SECRET_OPTIONS:
        return Annotated[
            _Env | None, WrapValidator(lambda value, _: _secret(value)), WithJsonSchema(_SECRET)
        ], described
    if name in {"librdkafka_config", "schema_registry_client_config"}:

        def raw(value: Any, _: Any) -> Any:
            if not isinstance(value, Mapping):
                raise ValueError("give a mapping from names to values")  # noqa: TRY004  (pydantic's)
            return {setting: _raw_setting(str(setting), its) for setting, its in value.items()}

        return Annotated[Any, WrapValidator(raw), WithJsonSchema(_RAW)], described
    kinds = set(typing.get_args(annotation)) or {annotation}
    schema: dict[str, Any]
    if name in _CHOICES:
        annotation, schema = Literal[_CHOICES[name]], {"enum": list(_CHOICES[name])}
    elif name == "bootstrap_servers":
        annotation, schema = str | list[str], _OF_SERVERS
    elif any(inspect.isclass(kind) and issubclass(kind, BaseModel) for kind in kinds):
        annotation, schema = KafkaTopicSpec | None, _OF_TOPIC_SPEC
    else:
        names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
        schema = {"type": sorted(names[kind] for kind in kinds)}
        if name in BOUNDS:
            schema["minimum"], schema["maximum"] = low, high = BOUNDS[name]
            annotation = Annotated[annotation, Field(ge=low, le=high)]
    env = bool(kinds & {str, int}) and bool not in kinds

    def option(value: Any, check: Any) -> Any:
        if _is_template(value):
            return value
        return _Env.model_validate(value) if env and isinstance(value, Mapping) else check(value)

    schema = _or_template(schema)
    return Annotated[annotation, WrapValidator(option), WithJsonSchema(_or_env(schema) if env else schema)], described


def _as_option(value: Any, annotation: Any) -> Any:
    """A checked attribute as a resource takes it: an environment variable as Dagster's EnvVar."""
    if isinstance(value, _Env):
        return dg.EnvVar.int(value.env) if annotation is int else dg.EnvVar(value.env)
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, dict):
        return {name: _as_option(its, str) for name, its in value.items()}
    return value


def _options(attributes: BaseModel, resource: type[BaseModel], leave: Container[str] = ()) -> dict[str, Any]:
    """The resource's options that the YAML gives."""
    return {
        name: _as_option(getattr(attributes, name), resource.model_fields[name].annotation)
        for name in attributes.model_fields_set
        if name not in leave
    }


class _Attributes(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


def _model(name: str, base: type[T], resource: type[BaseModel], leave: Container[str] = ()) -> type[T]:
    """A model of YAML attributes that are a resource's options."""
    fields: Any = {name: _field(name, info) for name, info in resource.model_fields.items() if name not in leave}
    return create_model(name, __base__=base, **fields)


_IOManagerAttributes: Any = _model("_IOManagerAttributes", _Attributes, KafkaIOManager, ["kafka"])

_PARTITION_KEY: Final = "{partition_key}"
_OF_TEXTS: Final = ("create_topics", "librdkafka_config", "schema_registry_client_config")
_OWN_KEYS: Final = ("resource_key", "io_manager_key", "io_manager")


class _ResourceAttributesBase(_Attributes):
    resource_key: str = Field(default="kafka", description="Name of the KafkaProducerResource.")
    io_manager_key: str | None = Field(
        default="kafka_io", description="Name of the KafkaIOManager; null for none. 'io_manager' makes it the default."
    )
    io_manager: _IOManagerAttributes = Field(
        default_factory=_IOManagerAttributes, description="Options of the KafkaIOManager."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """What a schema cannot say, such as options that do not go together."""
        options = _options(self, KafkaProducerResource, _OWN_KEYS)
        of_io_manager = _options(self.io_manager, KafkaIOManager)
        if self.io_manager_key is None and of_io_manager:
            raise ValueError(
                "io_manager has options, but io_manager_key null makes no IO manager: leave one of them out"
            )
        if not _has_template(options):
            try:
                kafka = KafkaProducerResource(**options)
                if self.io_manager_key is not None and not _has_template(of_io_manager):
                    KafkaIOManager(kafka=kafka, **of_io_manager)
            except pydantic.ValidationError as error:
                raise ValueError("; ".join(map(told, error.errors()))) from None
        return self


_ResourceAttributes: Final = _model("_ResourceAttributes", _ResourceAttributesBase, KafkaProducerResource)


def _made(name: str, given: Any, kinds: tuple[type, ...], make: Callable[[Any], Any], fix: str) -> Any:
    """An attribute made of what Python gives for it.

    Raises:
        KafkaConfigError: It is of none of these kinds, or has options that are not allowed.
    """
    if not isinstance(given, kinds):
        raise KafkaConfigError(name, f"it is of type {type(given).__name__}", fix)
    try:
        return make(given)
    except pydantic.ValidationError as error:
        raise KafkaConfigError(name, "; ".join(map(told, error.errors())), fix) from None


def _resolved(context: dg.ResolutionContext, value: Any, *, text: bool = False) -> Any:
    """The value with its templates filled in, a number as text where ``text``; all else as it is ('01' would become 1).

    Raises:
        KafkaConfigError: A template gives nothing, which would stand for what is left out.
    """
    if isinstance(value, list):
        return [_resolved(context, item, text=text) for item in value]
    if isinstance(value, dict):
        return {name: _resolved(context, item, text=text) for name, item in value.items()}
    if not _is_template(value):
        return value
    filled = context.resolve_value(value)
    # Inside of a text, nothing would be the word None, or no text.
    parts = _TEMPLATES.findall(value) if filled is not None else []
    if filled is None or any(context.resolve_value(part) is None for part in parts if part != value):
        raise KafkaConfigError(
            f"template {value!r}", "it gives nothing", "Set the environment variable that it names, or leave it out"
        )
    return as_text(filled) if text else filled


class _ResourceScaffolder(dg.Scaffolder):
    def scaffold(self, request: dg.ScaffoldRequest[Any]) -> None:
        attributes = (
            "  bootstrap_servers: {env: KAFKA_BOOTSTRAP_SERVERS}\n  resource_key: kafka\n  io_manager_key: kafka_io\n"
            "  # create_topics: {partitions: 6}  # makes topics that are missing"
        )
        _scaffold(request, attributes)


class _TopicScaffolder(dg.Scaffolder):
    def scaffold(self, request: dg.ScaffoldRequest[Any]) -> None:
        name = re.sub(r"[^A-Za-z0-9_]", "_", request.target_path.name)
        _scaffold(request, f"  asset:\n    key: {name}\n  topic: {name}\n  path: {name}.ndjson")


def _scaffold(request: dg.ScaffoldRequest[Any], attributes: str) -> None:
    if request.scaffold_format == "python":
        dg.scaffold_component(request, {})
        return
    text = f"type: {request.type_name}\n\nattributes:\n{attributes}\n"
    # Dagster 1.11 never appends.
    if getattr(request, "append", False):
        with request.target_path.open("a", encoding="utf-8") as file:
            file.write(f"---\n{text}")
    else:
        (request.target_path / "defs.yaml").write_text(text, encoding="utf-8")


class _Component(dg.Component, dg.Resolvable):
    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> Self:
        """The component of a file of YAML; one without attributes has the defaults, and what it needs is missed."""
        return super().load(cls.model()() if attributes is None else attributes, context)


@dg.scaffold_with(_ResourceScaffolder)
@dataclasses.dataclass
class KafkaResourceComponent(_Component):
    """A Kafka cluster for a project: a `KafkaProducerResource`, and a `KafkaIOManager` that publishes to it.

    Its attributes are the resource's options, ``io_manager`` with the IO manager's, and the names of both. Strings and
    whole numbers may be ``{env: NAME}``, the value that an environment variable has when a run starts; secrets must be.

    Attributes:
        kafka: The resource; made of a mapping of its options.
        io_manager: The IO manager, made of a mapping of its options; None for none.
        resource_key: Name of the resource.
        io_manager_key: Name of the IO manager.

    Raises:
        KafkaConfigError: The resource or the IO manager is none, or has options that are not allowed.
    """

    kafka: KafkaProducerResource
    io_manager: KafkaIOManager | None = None
    resource_key: str = "kafka"
    io_manager_key: str = "kafka_io"

    def __post_init__(self) -> None:
        given: Any = self.kafka
        if isinstance(given, Mapping):
            fix = "Give kafka=KafkaProducerResource(bootstrap_servers=...), or a mapping of its options"
            self.kafka = _made("kafka", given, (Mapping,), lambda options: KafkaProducerResource(**options), fix)
        refuse_other_cluster("kafka of the KafkaResourceComponent", self.kafka)
        given = self.io_manager
        if not (given is None or isinstance(given, dg.IOManager) or may_give_resource(given)):
            fix = "Give io_manager=KafkaIOManager(kafka=...), a mapping of its options, or None for none"
            self.io_manager = _made(
                "io_manager", given, (Mapping,), lambda options: KafkaIOManager(**{"kafka": self.kafka, **options}), fix
            )

    @classmethod
    def model(cls) -> type[BaseModel]:
        """The pydantic model of its YAML attributes."""
        return _ResourceAttributes

    @classmethod
    def resolve_from_model(cls, context: dg.ResolutionContext, model: BaseModel) -> Self:
        """The component that YAML attributes describe.

        Raises:
            pydantic.ValidationError: A template gave a value that is not allowed.
        """
        attributes = typing.cast("_ResourceAttributesBase", model)
        options = _options(attributes, KafkaProducerResource, _OWN_KEYS)
        kafka = KafkaProducerResource(
            **{name: _resolved(context, value, text=name in _OF_TEXTS) for name, value in options.items()}
        )
        key = _resolved(context, attributes.io_manager_key)
        io_manager = None
        if key is not None:
            io_manager = KafkaIOManager(
                kafka=kafka, **_resolved(context, _options(attributes.io_manager, KafkaIOManager))
            )
        return cls(kafka, io_manager, _resolved(context, attributes.resource_key), key or "")

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:  # noqa: ARG002
        """The resource and the IO manager as definitions.

        Raises:
            KafkaConfigError: Both have one name.
        """
        if self.io_manager is not None and self.resource_key == self.io_manager_key:
            raise KafkaConfigError(
                f"resource_key={self.resource_key!r}", "it is the io_manager_key too", "Give each a name of its own"
            )
        resources: dict[str, Any] = {self.resource_key: self.kafka}
        if self.io_manager is not None:
            resources[self.io_manager_key] = self.io_manager
        return dg.Definitions(resources=resources)


class _Asset(dg.Resolvable, dg.Model):
    """Dagster's own attributes of an asset: key, partitions_def, description, automation_condition, and so on."""

    asset: dg.ResolvedAssetSpec


# The model behind the annotation, and not a str: no template stands for a whole asset.
_AssetAttributes: Any = typing.get_args(dg.ResolvedAssetSpec)[1].model_field_type
_OpAttributes: Any = OpSpec.model()


_OF_SCHEMA_OPTIONS: Final = KafkaSchema.model_json_schema()
_OF_SCHEMA_OPTIONS["properties"]["text"] = {"type": ["string", "object", "array", "null"]}
_Schema = Annotated[
    str | dict[str, Any] | None,
    WithJsonSchema(
        _or_template(
            {
                "if": {"type": "object"},
                "then": _OF_SCHEMA_OPTIONS,
                "else": {"type": ["string", "object", "null"], "pattern": _SCHEMA},
            }
        )
    ),
]


def _given(name: str) -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


class _TopicAttributes(_Attributes):
    model_config = ConfigDict(
        json_schema_extra={
            "if": {"oneOf": [_given("path"), _given("function")]},
            "then": True,
            "else": {"const": "one of path and function"},
        }
    )

    asset: _AssetAttributes = Field(
        description="Dagster's own attributes of the asset: key, partitions_def, group_name, and so on."
    )
    topic: Annotated[str | None, WithJsonSchema(_or_template({"type": ["string", "null"], "pattern": _TOPIC}))] = Field(
        default=None, description="The topic; the IO manager's if left out, which is the asset key by default."
    )
    key: Annotated[str | list[str] | None, WithJsonSchema(_OF_FIELDS)] = Field(
        default=None, description="Field that is the record's key, or a list of them."
    )
    create_topic: Annotated[KafkaTopicSpec | None, WithJsonSchema(_OF_TOPIC_SPEC)] = Field(
        default=None, description="How to create the topic if it is missing; the resource's create_topics if left out."
    )
    value_schema: _Schema = Field(
        default=None,
        description=(
            "Schema of the values: 'avro', 'json_schema' or 'protobuf' (derived from the records), 'latest' (the"
            " registry's, Avro), a file (.avsc, .json, .proto; relative to this folder), or options of"
            " KafkaSchema."
        ),
    )
    key_schema: _Schema = Field(default=None, description="Schema of the keys; as value_schema.")
    write_mode: Annotated[Literal["append", "upsert"] | None, WithJsonSchema({"enum": [*WRITE_MODES, None]})] = Field(
        default=None, description="'append' or 'upsert'; the IO manager's if left out."
    )
    path: Annotated[str | None, WithJsonSchema({"type": ["string", "null"]})] = Field(
        default=None,
        description=(
            "File of the records: NDJSON, CSV or Parquet, as its name ends; relative to the folder of defs.yaml."
            " {partition_key} is filled in, and cannot lead out of the folder."
        ),
    )
    function: Annotated[
        str | None, WithJsonSchema(_or_template({"type": ["string", "null"], "pattern": _FUNCTION}))
    ] = Field(
        default=None,
        description=(
            "Import path 'package.module:function' of a function that returns the records, as an asset does; it may"
            " take the asset's context. Or a template that gives the function."
        ),
    )
    io_manager_key: str = Field(default="kafka_io", description="Name of the KafkaIOManager.")
    op: _OpAttributes = Field(
        default_factory=_OpAttributes,
        description="Of the op that computes the asset: name, tags, description, pool, backfill_policy.",
    )

    @field_validator("value_schema", "key_schema")
    @classmethod
    def _is_schema(cls, given: Any) -> Any:
        if given is not None and not _is_template(given):
            try:
                KafkaSchema.parse(given)
            except KafkaConfigError as error:
                raise ValueError(str(error)) from None
        return given

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.function is None):
            raise ValueError("give either path or function: where the records come from")
        return self


def _filled(path: str, partition_key: str) -> str:
    """The path with a partition key in it, which may name a folder inside, but none above: it need not be the author's.

    Raises:
        dagster.Failure: It does.
    """
    filled = path.replace(_PARTITION_KEY, partition_key.lstrip("/"))
    if Path(filled).parts.count("..") != Path(path).parts.count(".."):
        raise failure_of(
            KafkaConfigError(
                f"path={path!r}, partition key {partition_key!r}",
                "the key would leave the folder that the path names",
                "Name Dagster partitions without '..', or give a function instead of a path",
            )
        )
    return filled


_NOT_FIRST: Final = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


def _takes_context(function: Callable[..., Any]) -> bool:
    """Whether a function is called with the asset's context: if its first argument has no default, or is one by name.

    An argument is one by name if it is called `context` or is annotated with a context of Dagster's.

    Raises:
        KafkaConfigError: It takes more, or is async.
    """
    culprit = f"function {getattr(function, '__name__', function)!r}"
    try:
        signature = inspect.signature(function)
    except ValueError as error:  # as that of some classes in C
        raise KafkaConfigError(culprit, str(error), "Give a function of Python's that returns records") from error
    if inspect.iscoroutinefunction(function):
        raise KafkaConfigError(
            culprit,
            "it is async, and would return a coroutine",
            "Let it call asyncio.run(...), and return the records",
        )
    first = next((one for one in signature.parameters.values() if one.kind not in _NOT_FIRST), None)
    takes_context = first is not None and (
        first.default is first.empty or first.name == "context" or "ExecutionContext" in str(first.annotation)
    )
    try:
        signature.bind(*[None] * takes_context)
    except TypeError as error:
        raise KafkaConfigError(
            f"{culprit}{signature}",
            f"it is called with {'the context of the asset' if takes_context else 'nothing'}: {error}",
            "Let it take the context or nothing; others need defaults",
        ) from error
    return takes_context


def _schema(given: Any) -> KafkaSchema:
    return KafkaSchema.parse(os.fspath(given) if isinstance(given, os.PathLike) else given)


@dg.scaffold_with(_TopicScaffolder)
@dataclasses.dataclass
class KafkaTopicComponent(_Component):
    """An asset whose records are published to a topic: all of them or none, once.

    Attributes:
        asset: Key, Dagster partitions and all else that Dagster wants to know; made of a key.
        source: Returns the records, and may take the asset's context, by an argument that has no default, is named
            ``context`` or is annotated with a context; or the path of their file, relative to the component's folder,
            in which {partition_key} is filled in.
        topic: The topic; the IO manager's if None.
        key: Field that is the record's key, or several.
        create_topic: How to create the topic if it is missing, made of a mapping; the resource's ``create_topics`` if
            None.
        value_schema: Schema of the values, made of whatever `KafkaSchema.parse` takes, or of a path; its file relative
            to the component's folder; the IO manager's if None.
        key_schema: Schema of the keys, likewise.
        write_mode: "append" or "upsert"; the IO manager's if None.
        io_manager_key: Name of the `KafkaIOManager`.
        op: Of the op that computes the asset: name, tags, description, pool and backfill policy; made of a mapping.

    Raises:
        KafkaConfigError: An attribute is of another type, or has options that are not allowed.
    """

    asset: dg.AssetSpec
    source: Callable[..., Any] | str | os.PathLike[str]
    topic: str | None = None
    key: str | list[str] | None = None
    create_topic: KafkaTopicSpec | None = None
    value_schema: KafkaSchema | None = None
    key_schema: KafkaSchema | None = None
    write_mode: str | None = None
    io_manager_key: str = "kafka_io"
    op: OpSpec = dataclasses.field(default_factory=OpSpec)

    def __post_init__(self) -> None:
        given: Any = self.asset
        if not isinstance(given, dg.AssetSpec):
            self.asset = _made("asset", given, (str, dg.AssetKey), dg.AssetSpec, "Give a dagster.AssetSpec, or a key")
        if not callable(self.source):
            fix = "Give a function that returns the records, or the path of their file"
            self.source = _made("source", self.source, (str, os.PathLike), os.fspath, fix)
        if self.create_topic is not None:
            kinds: tuple[type, ...] = (KafkaTopicSpec, Mapping)
            fix = f"Give a KafkaTopicSpec, or a mapping of {', '.join(KafkaTopicSpec.model_fields)}"
            self.create_topic = _made("create_topic", self.create_topic, kinds, KafkaTopicSpec.model_validate, fix)
        kinds = (KafkaSchema, str, os.PathLike, Mapping)
        fix = "Give a KafkaSchema, or 'avro', 'json_schema', 'protobuf', 'latest', a file, or a mapping of options"
        for name in ("value_schema", "key_schema"):
            given = getattr(self, name)
            if given is not None:
                setattr(self, name, _made(name, given, kinds, _schema, fix))
        given = OpSpec() if self.op is None else self.op
        fix = f"Give an OpSpec, or a mapping of {', '.join(OpSpec.model_fields)}"
        self.op = _made("op", given, (OpSpec, Mapping), OpSpec.model_validate, fix)

    @classmethod
    def model(cls) -> type[BaseModel]:
        """The pydantic model of its YAML attributes."""
        return _TopicAttributes

    @classmethod
    def resolve_from_model(cls, context: dg.ResolutionContext, model: BaseModel) -> Self:
        """The component that YAML attributes describe.

        Raises:
            KafkaConfigError: There is no such function.
        """
        attributes = typing.cast("_TopicAttributes", model)
        schemas = [_resolved(context, given) for given in (attributes.value_schema, attributes.key_schema)]
        value_schema, key_schema = (None if given is None else KafkaSchema.parse(given) for given in schemas)
        spec = attributes.create_topic
        if spec is not None:
            spec = KafkaTopicSpec(**_resolved(context, spec.model_dump(exclude_unset=True), text=True))
        source = _resolved(context, attributes.path)
        if source is None:
            function = _resolved(context, attributes.function)
            source = function if callable(function) else import_function("function", function)
        return cls(
            asset=_Asset.resolve_from_model(context, attributes).asset,
            source=source,
            topic=_resolved(context, attributes.topic),
            key=_resolved(context, attributes.key),
            create_topic=spec,
            value_schema=value_schema,
            key_schema=key_schema,
            write_mode=attributes.write_mode,
            io_manager_key=_resolved(context, attributes.io_manager_key),
            op=OpSpec.resolve_from_model(context, attributes.op),
        )

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """The asset as definitions.

        Raises:
            KafkaConfigError: An attribute is not allowed; ``path`` names a Dagster partition, and the asset has none;
                the function takes more than the context; or the asset's metadata gives what an attribute gives too.
            InvalidRecordError: The end of ``path`` does not say what is in the file.
        """
        if self.topic is not None:
            check_topic(self.topic)
        if self.write_mode is not None:
            check_write_mode(self.write_mode)
        key_fields(self.key)
        if callable(self.source):
            return dg.Definitions(assets=[self._build_asset(context, self.source)])
        source = os.fspath(self.source)
        try:
            # A key may end in the name's end.
            format_of_file(Path(source.replace(_PARTITION_KEY, "key.csv")))
        except InvalidRecordError as error:
            raise InvalidRecordError(f"path={source!r}", error.cause, error.fix) from None
        if _PARTITION_KEY in source and self.asset.partitions_def is None:
            raise KafkaConfigError(
                f"path={source!r}",
                "the asset has no Dagster partitions",
                f"Give it a partitions_def, or leave {_PARTITION_KEY} out",
            )
        folder = context.path

        def path(asset_context: dg.AssetExecutionContext) -> Path | dict[str, Path]:
            if _PARTITION_KEY not in source:
                return folder / source
            return {key: folder / _filled(source, key) for key in asset_context.partition_keys}

        return dg.Definitions(assets=[self._build_asset(context, path)])

    def _build_asset(self, context: dg.ComponentLoadContext, function: Callable[..., Any]) -> dg.AssetsDefinition:
        named: dict[str, Any] = {"kafka/topic": self.topic, "kafka/key": self.key, "kafka/write_mode": self.write_mode}
        for name, schema in {"kafka/value_schema": self.value_schema, "kafka/key_schema": self.key_schema}.items():
            if schema is not None:
                options = schema.to_metadata()
                if schema.file is not None:
                    options["file"] = str(context.path / schema.file)
                named[name] = options
        if self.create_topic is not None:
            named["kafka/create_topic"] = self.create_topic.model_dump(exclude_unset=True)
        metadata = {name: value for name, value in named.items() if value is not None}
        twice = next((name for name in metadata if name in self.asset.metadata), None)
        if twice is not None:
            raise KafkaConfigError(
                f"{twice}={self.asset.metadata[twice]!r} in the asset's metadata",
                f"the component gives it too, {metadata[twice]!r}",
                "Leave one of them out",
            )
        if self.topic is not None:
            metadata["dagster/uri"] = f"kafka://{self.topic}"
        spec = self.asset.merge_attributes(kinds={"kafka"}).replace_attributes(
            metadata=metadata | dict(self.asset.metadata)
        )
        takes_context = _takes_context(function)

        @dg.multi_asset(
            name=self.op.name or spec.key.to_python_identifier(),
            description=self.op.description,
            op_tags=self.op.tags,
            pool=self.op.pool,
            backfill_policy=self.op.backfill_policy,
            outs={
                "result": dg.AssetOut.from_spec(spec.replace_attributes(deps=[]), io_manager_key=self.io_manager_key)
            },
            deps=spec.deps,
            partitions_def=spec.partitions_def,
        )
        def publish(context: dg.AssetExecutionContext) -> Any:
            given = function(context) if takes_context else function()
            # As an Output, for a generator: Dagster would iterate it itself.
            yield given if isinstance(given, (dg.Output, dg.MaterializeResult)) else dg.Output(given, "result")

        return publish
