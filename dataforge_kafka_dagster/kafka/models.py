"""Dataclasses and pydantic models: what they are, and what is written of them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
from pydantic import BaseModel, TypeAdapter
from pydantic.dataclasses import is_pydantic_dataclass

# Makes one digit of all, and blanks of the rest, to find long numbers quickly.
_DIGITS: Final = bytes(ord("0") if chr(byte).isdecimal() and byte < 128 else ord(" ") for byte in range(256))  # noqa: PLR2004
# As many as the largest integer that orjson writes has.
_MANY_DIGITS: Final = b"0" * 20

# What pydantic's core schemas hold of values that are a user's.
_NOT_SCHEMA: Final = frozenset({"default", "default_factory", "expected", "metadata"})


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


def models_json(values: Sequence[Any]) -> list[bytes] | None:
    """Pydantic's own JSON of each model, which takes a third of the time of the values that orjson would then write.

    Returns:
        The texts; None if one is no model, or functions take part, of an interrupt in which pydantic leaves only the
        text of an error.

    Raises:
        ValueError: Pydantic cannot write one.
        TypeError: There is something in one that orjson does not write: an integer beyond 64 bits.
    """
    if any(not issubclass(cls, BaseModel) or has_functions(cls) for cls in set(map(type, values))):
        return None
    texts = [value.__pydantic_serializer__.to_json(value) for value in values]
    if not _may_differ(b"".join(texts)):
        return texts
    # Read from the text, since an iterator among the fields is empty the second time.
    return [orjson.dumps(json.loads(text)) if _may_differ(text) else text for text in texts]


def _may_differ(text: bytes) -> bool:
    """Whether there may be a number in some JSON that orjson would refuse, or make null as it does NaN and infinity."""
    return _MANY_DIGITS in text.translate(_DIGITS) or b"NaN" in text or b"Infinity" in text


def plain_fields(model: BaseModel) -> Mapping[str, Any]:
    """A model's fields as they are, and what it has beside them; it may write less than that."""
    extra = getattr(model, "__pydantic_extra__", None)
    return model.__dict__ | extra if extra else model.__dict__


@functools.lru_cache(1024)
def has_functions(cls: type[BaseModel]) -> bool:
    """Whether functions of somebody's make of a model's fields what is written of it."""
    return cls.model_dump is not BaseModel.model_dump or _serializes_by_function(cls.__pydantic_core_schema__)


def _serializes_by_function(schema: Any) -> bool:
    """Whether there is a serializer, or a computed field, in one of pydantic's core schemas.

    https://docs.pydantic.dev/latest/internals/architecture/
    """
    if isinstance(schema, (list, tuple)):
        return any(map(_serializes_by_function, schema))
    if not isinstance(schema, Mapping):
        return False
    if schema.get("computed_fields") or "function" in str(schema.get("serialization", {}).get("type")):
        return True
    return any(_serializes_by_function(part) for name, part in schema.items() if name not in _NOT_SCHEMA)
