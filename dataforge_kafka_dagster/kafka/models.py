"""Dataclasses and pydantic models: what they are, and what is written of them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import operator
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from pydantic import VERSION, BaseModel, TypeAdapter
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic_core import TzInfo

# Of pydantic's core schemas: what stands around the schema of a value; types that orjson writes as pydantic does; and
# what may be told of a model, its fields together and each of them without a bearing on what is written.
_WRAPPERS: Final = frozenset({"function-before", "function-after", "function-wrap", "nullable", "default"})
_NUMBERS: Final = frozenset({"int", "float"})
_DATES: Final = frozenset({"date", "datetime"})
_TYPES: Final[Mapping[str, type]] = {
    "str": str,
    "bool": bool,
    "uuid": uuid.UUID,
    "int": int,
    "float": float,
    "date": dt.date,
    "datetime": dt.datetime,
}
_MODEL_KEYS: Final = frozenset(
    {"type", "cls", "schema", "config", "custom_init", "root_model", "post_init", "revalidate_instances", "strict"}
    | {"frozen", "ref", "metadata", "generic_origin", "extra_behavior"}
)
_FIELDS_KEYS: Final = frozenset({"type", "fields", "model_name", "computed_fields", "strict", "ref", "metadata"})
_FIELD_KEYS: Final = frozenset({"type", "schema", "validation_alias", "frozen", "metadata"})
_NOT_SCHEMA: Final = frozenset(
    {"cls", "config", "default", "default_factory", "expected", "json_schema_input_schema", "metadata", "serialization"}
)


# Before 2.11, pydantic reads by the model's config alone, and writes aliases where it is told to alone.
KNOWS_NAMES: Final = tuple(map(int, VERSION.split(".")[:2])) >= (2, 11)


class UnsupportedTypeError(TypeError):
    """A type that JSON does not know, with what to do."""


def is_model(cls: type) -> bool:
    """Whether a class is a dataclass or a pydantic model."""
    return dataclasses.is_dataclass(cls) or issubclass(cls, BaseModel)


def is_of_pydantic(cls: type) -> bool:
    """Whether pydantic writes a class's objects: its models, and dataclasses of its own."""
    return _is_of_pydantic(cls)


@functools.lru_cache(1024)
def _is_of_pydantic(cls: type) -> bool:
    return issubclass(cls, BaseModel) or pydantic_dataclass(cls) is not None


def pydantic_dataclass(cls: type) -> type | None:
    """The dataclass of pydantic's that a class is, or inherits from without being a dataclass itself; else None."""
    return _pydantic_dataclass(cls)


@functools.lru_cache(1024)
def _pydantic_dataclass(cls: type) -> type | None:
    found = next((base for base in cls.__mro__ if "__dataclass_fields__" in vars(base)), None)
    return found if found is not None and is_pydantic_dataclass(found) else None


def config_of(cls: type) -> Mapping[str, Any]:
    """What a model, or a dataclass of pydantic's, says of itself to pydantic."""
    return getattr(cls, "model_config", None) or getattr(cls, "__pydantic_config__", None) or {}


def writes_aliases(cls: type) -> bool:
    """Whether a class says of itself that its fields are written by their aliases."""
    return KNOWS_NAMES and bool(config_of(cls).get("serialize_by_alias"))


def dumped(value: Any, **options: Any) -> Any:
    """What pydantic writes of a model, or of a dataclass that is its own: by serializers, without what they exclude.

    Args:
        value: The model or dataclass.
        options: As for ``BaseModel.model_dump``.
    """
    if isinstance(value, BaseModel):
        return value.model_dump(**options)
    return _adapter(pydantic_dataclass(type(value))).dump_python(value, **options)


@functools.lru_cache(1024)
def masks_in_json(cls: type) -> bool:
    """Whether a class of pydantic's has a serializer for JSON alone, also inside, which a dump to Python leaves out."""
    return "'when_used': 'json" in repr(getattr(cls, "__pydantic_core_schema__", ""))


@functools.lru_cache(1024)
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def dataclass_fields(value: object, *missing: Any) -> dict[str, Any]:
    """What a dataclass has in its fields.

    Args:
        value: The dataclass.
        missing: Stands for a field that it lacks.

    Raises:
        UnsupportedTypeError: It lacks one, and nothing is to stand for it.
    """
    names = _field_names(type(value))  # type: ignore[arg-type]
    attributes: dict[str, Any] | None = getattr(value, "__dict__", None)
    if attributes is not None and tuple(attributes) == names:
        return attributes
    try:
        return {name: getattr(value, name, *missing) for name in names}
    except AttributeError as error:
        raise UnsupportedTypeError(f"{error}; give each field a value") from None


@functools.lru_cache(1024)
def _field_names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


class PlainModels(NamedTuple):
    """Models of one class, whose JSON is that of their fields.

    Attributes:
        fields: Of each.
        dated: Whether dates are among them, each in a field that is one; else there are none to be written.
    """

    fields: list[dict[str, Any]]
    dated: bool


def plain_models(values: Sequence[Any]) -> PlainModels | None:
    """What models are written of, where orjson writes of their fields what it would of ``model_dump(mode="json")``.

    To dump them takes several times as long.

    Returns:
        None if they are no models, or of several classes; or something else than their fields may be written.
    """
    classes = set(map(type, values))
    cls = classes.pop() if len(classes) == 1 else object
    shape = _shape(cls, cls.__pydantic_serializer__) if issubclass(cls, BaseModel) else None
    if shape is None:
        return None
    fields = [value.__dict__ for value in values]
    # A cached property stands there, too.
    if set(map(tuple, fields)) != {shape.names}:
        return None
    # A default is not validated: pydantic writes the 0 of a float as 0.0, and the True of an int as 1.
    for name, types in shape.types.items():
        if not types.issuperset(map(type, map(operator.itemgetter(name), fields))):
            return None
    for name in shape.moments:
        zones = map(operator.attrgetter("tzinfo"), filter(None, map(operator.itemgetter(name), fields)))
        if not all(map(_is_plain_zone, set(zones))):
            return None
    return PlainModels(fields, shape.dated)


def _is_plain_zone(zone: dt.tzinfo | None) -> bool:
    """Whether orjson writes its offset as pydantic does, which is a constant one in whole minutes."""
    if zone is None or zone is dt.timezone.utc:
        return True
    offset = zone.utcoffset(None) if type(zone) in {dt.timezone, TzInfo} else None
    return offset is not None and not offset % dt.timedelta(minutes=1)


def is_plain(cls: type) -> bool:
    """Whether models of a class may be such as `plain_models` takes."""
    return issubclass(cls, BaseModel) and _shape(cls, cls.__pydantic_serializer__) is not None


def iterator_in(model: BaseModel) -> str | None:
    """The first field of a model that holds what gives its items only once, as pydantic makes of an Iterable."""
    cls = type(model)
    if not _may_have_iterators(cls, cls.__pydantic_serializer__):
        return None
    written = (name for name, field in cls.model_fields.items() if not field.exclude)
    return next((name for name in written if _holds_iterator(model.__dict__.get(name))), None)


def _holds_iterator(value: Any) -> bool:
    if isinstance(value, BaseModel):
        return iterator_in(value) is not None
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return isinstance(value, Iterator)
    return any(map(_holds_iterator, value))


@functools.lru_cache(1024)
def _may_have_iterators(cls: type[BaseModel], _serializer: object) -> bool:
    return _has_generator(cls.__pydantic_core_schema__)


def _has_generator(schema: Any) -> bool:
    """Whether there is a part of the type ``generator`` in one of pydantic's core schemas."""
    if isinstance(schema, Mapping):
        # Of a part that is a schema, what is somebody's own is left out.
        own = _NOT_SCHEMA if isinstance(schema.get("type"), str) else ()
        inside = any(_has_generator(part) for name, part in schema.items() if name not in own)
        return inside or schema.get("type") == "generator"
    return isinstance(schema, (list, tuple)) and any(map(_has_generator, schema))


class _Shape(NamedTuple):
    """How models of a class are written.

    Attributes:
        names: Of all fields, in order.
        types: Of some, those that their values are to have.
        moments: Fields that are a datetime.
        dated: Whether one is a date or datetime.
    """

    names: tuple[str, ...]
    types: Mapping[str, frozenset[type]]
    moments: tuple[str, ...]
    dated: bool


@functools.lru_cache(1024)
def _shape(cls: type[BaseModel], _serializer: object) -> _Shape | None:
    """How models are written as their fields are; None if they may not.

    It goes by pydantic's core schema, of which each part has to be known:
    https://docs.pydantic.dev/latest/internals/architecture/. A class that is built anew has another serializer then.
    """
    if not cls.__pydantic_complete__ or cls.model_dump is not BaseModel.model_dump:
        return None
    if cls.model_config.get("extra") == "allow" or any(_is_of_writing(option) for option in cls.model_config):
        return None
    model = _unwrapped(cls.__pydantic_core_schema__)
    fields = _unwrapped(model.get("schema", {}))
    if model.get("cls") is not cls or not (model.keys() <= _MODEL_KEYS and fields.keys() <= _FIELDS_KEYS):
        return None
    if model.get("root_model") or fields.get("computed_fields"):
        return None
    kinds: dict[str, str] = {}
    for name, field in fields["fields"].items():
        if not (field.keys() <= _FIELD_KEYS and _is_known(field["schema"], single=True)):
            return None
        kinds[name] = _unwrapped(field["schema"])["type"]
    # Orjson writes dates wherever they are, so that each field is to be looked at where there are some.
    dated = not _DATES.isdisjoint(kinds.values())
    looked_at = {name: kind for name, kind in kinds.items() if dated or kind in _NUMBERS}
    if not _TYPES.keys() >= set(looked_at.values()):
        return None
    types = {name: frozenset({_TYPES[kind], type(None)}) for name, kind in looked_at.items()}
    moments = tuple(name for name, kind in kinds.items() if kind == "datetime")
    return _Shape(tuple(kinds), types, moments, dated)


def _is_of_writing(option: str) -> bool:
    return option.startswith("ser") or option in {"json_encoders", "polymorphic_serialization"}


def _unwrapped(schema: Any) -> Any:
    """The schema of values behind validators, a default and None, or what writes them by a serializer."""
    while schema.get("type") in _WRAPPERS and "serialization" not in schema:
        schema = schema["schema"]
    return schema


def _is_known(schema: Any, *, single: bool = False) -> bool:
    """Whether orjson writes the values of a schema as pydantic does.

    Args:
        schema: The schema.
        single: Whether it is that of a field, whose values are looked at.
    """
    schema = _unwrapped(schema)
    kind = schema["type"]
    if "serialization" in schema:
        return False
    if kind == "list":
        return "items_schema" in schema and _is_known(schema["items_schema"])
    if kind == "dict":
        keys, values = schema.get("keys_schema", {}), schema.get("values_schema")
        of_text = keys.get("type") == "str" and "serialization" not in keys
        return of_text and values is not None and _is_known(values)
    if kind == "union":
        return all(_is_known(choice[0] if isinstance(choice, tuple) else choice) for choice in schema["choices"])
    if kind == "literal":
        return {type(value) for value in schema["expected"]} <= {str, int, bool, type(None)}
    return kind == "none" or (kind in _TYPES and (single or kind not in _NUMBERS | _DATES))
