"""Dataclasses and pydantic models: what they are, and what is written of them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, TypeAdapter
from pydantic.dataclasses import is_pydantic_dataclass

# Of pydantic's core schemas: what stands around the schema of a value; types, beside numbers, that orjson writes as it
# does; and what they may tell of a model, its fields together and each of them without a bearing on what is written.
_WRAPPERS: Final = frozenset({"function-before", "function-after", "function-wrap", "nullable", "default"})
_PLAIN_TYPES: Final = frozenset({"str", "bool", "none", "uuid", "date", "datetime"})
_NUMBERS: Final[Mapping[str, type]] = {"float": float, "int": int}
_MODEL_KEYS: Final = frozenset(
    {"type", "cls", "schema", "config", "custom_init", "root_model", "post_init", "revalidate_instances", "strict"}
    | {"frozen", "ref", "metadata", "generic_origin", "extra_behavior"}
)
_FIELDS_KEYS: Final = frozenset({"type", "fields", "model_name", "computed_fields", "strict", "ref", "metadata"})
_FIELD_KEYS: Final = frozenset({"type", "schema", "validation_alias", "frozen", "metadata"})
_NOT_SCHEMA: Final = frozenset({"cls", "config", "default", "default_factory", "expected", "metadata"})


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
        default: Writes what orjson does not know, as pydantic does.
    """

    fields: list[dict[str, Any]]
    default: Callable[[Any], str]


def plain_models(values: Sequence[Any]) -> PlainModels | None:
    """What models are written of, where orjson writes of their fields what it would of ``model_dump(mode="json")``.

    To dump them takes several times as long. Values of other types than the fields' come to ``default``, which refuses
    them; a model may have them that was not validated.

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
    for name, types in shape.numbers:
        if not types.issuperset(map(type, map(operator.itemgetter(name), fields))):
            return None
    return PlainModels(fields, shape.default)


def is_plain(cls: type) -> bool:
    """Whether models of a class may be such as `plain_models` takes."""
    return issubclass(cls, BaseModel) and _shape(cls, cls.__pydantic_serializer__) is not None


def iterator_in(cls: type[BaseModel]) -> str | None:
    """The first field of a model that is, or has inside, what pydantic reads once: an Iterable or Generator."""
    if not cls.__pydantic_complete__:
        return None
    fields = _unwrapped(cls.__pydantic_core_schema__).get("schema", {}).get("fields", {})
    return next((name for name, field in fields.items() if _has_iterator(field)), None)


def _has_iterator(schema: Any) -> bool:
    if isinstance(schema, Mapping):
        # Of a part that is a schema, what is somebody's own is left out.
        own = _NOT_SCHEMA if isinstance(schema.get("type"), str) else ()
        inside = any(_has_iterator(part) for name, part in schema.items() if name not in own)
        return inside or schema.get("type") == "generator"
    return isinstance(schema, (list, tuple)) and any(map(_has_iterator, schema))


class _Shape(NamedTuple):
    names: tuple[str, ...]
    numbers: tuple[tuple[str, frozenset[type]], ...]
    default: Callable[[Any], str]


@functools.lru_cache(1024)
def _shape(cls: type[BaseModel], _serializer: object) -> _Shape | None:
    """The fields of models that may be written as they are, and how their dates are; None if they may not.

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
    found: set[str] = set()
    numbers = []
    for name, field in fields["fields"].items():
        inner = _unwrapped(field["schema"])
        number = _NUMBERS.get(inner["type"])
        known = "serialization" not in inner if number else _is_known(inner, found)
        if not (known and field.keys() <= _FIELD_KEYS):
            return None
        if number:
            numbers.append((name, frozenset({number, type(None)})))
    # Which of the two types a field has is not known where its value is written.
    if not found <= _PLAIN_TYPES or found >= {"date", "datetime"}:
        return None
    default = _datetime_text if "datetime" in found else _date_text if "date" in found else _no_text
    return _Shape(tuple(fields["fields"]), tuple(numbers), default)


def _is_of_writing(option: str) -> bool:
    return option.startswith("ser") or option in {"json_encoders", "polymorphic_serialization"}


def _unwrapped(schema: Any) -> Any:
    """The schema of values behind validators, a default and None, or what writes them by a serializer."""
    while schema.get("type") in _WRAPPERS and "serialization" not in schema:
        schema = schema["schema"]
    return schema


def _is_known(schema: Any, found: set[str]) -> bool:
    """Whether all parts of the schema of a field's values are known; gathers the types that they have."""
    schema = _unwrapped(schema)
    kind = schema["type"]
    if "serialization" in schema:
        return False
    if kind == "list":
        return "items_schema" in schema and _is_known(schema["items_schema"], found)
    if kind == "dict":
        keys, values = schema.get("keys_schema", {}), schema.get("values_schema")
        of_text = keys.get("type") == "str" and "serialization" not in keys
        return of_text and values is not None and _is_known(values, found)
    if kind == "union":
        choices = (choice[0] if isinstance(choice, tuple) else choice for choice in schema["choices"])
        return all(_is_known(choice, found) for choice in choices)
    if kind == "literal":
        return {type(value) for value in schema["expected"]} <= {str, int, bool, type(None)}
    found.add(kind)
    return True


def _no_text(value: Any) -> str:
    raise UnsupportedTypeError(f"type {type(value).__qualname__} is not that of a field")


def _date_text(value: Any) -> str:
    return value.isoformat() if type(value) is dt.date else _no_text(value)


def _datetime_text(value: Any) -> str:
    if type(value) is not dt.datetime:
        return _no_text(value)
    text = value.isoformat()
    if value.tzinfo is None:
        return text
    if text[-6] not in "+-":  # an offset with seconds
        return _no_text(value)
    return f"{text[:-6]}Z" if text.endswith("+00:00") else text
