"""Schemas derived from what Python has: classes and data frames to Avro, and Avro to JSON Schema.

Avro's types and logical types are those of https://avro.apache.org/docs/1.11.1/specification/.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import itertools
import json
import math
import re
import types
import typing
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from pydantic import BaseModel, PlainSerializer, PydanticUserError, RootModel, TypeAdapter, WrapSerializer
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticUndefined

from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.models import is_model, is_of_pydantic, pydantic_dataclass, writes_aliases

if TYPE_CHECKING:
    import narwhals as nw

AvroType = str | dict[str, Any] | list[Any]
"""An Avro schema as JSON values."""

_SCALARS: Final[dict[type, AvroType]] = {
    bool: "boolean",
    int: "long",
    float: "double",
    str: "string",
    bytes: "bytes",
    dt.datetime: {"type": "long", "logicalType": "timestamp-micros"},
    dt.date: {"type": "int", "logicalType": "date"},
    dt.time: {"type": "long", "logicalType": "time-micros"},
    uuid.UUID: {"type": "string", "logicalType": "uuid"},
}
_COLUMNS: Final[dict[str, AvroType]] = {
    **dict.fromkeys(("Int8", "Int16", "Int32", "UInt8", "UInt16"), "int"),
    **dict.fromkeys(("Int64", "UInt32", "UInt64"), "long"),
    "Float32": "float",
    "Float64": "double",
    "Boolean": "boolean",
    **dict.fromkeys(("String", "Categorical", "Enum"), "string"),
    "Binary": "bytes",
    "Date": _SCALARS[dt.date],
    "Time": _SCALARS[dt.time],
}
# What narwhals has no name for.
_ARROW: Final[dict[str, AvroType]] = {
    **dict.fromkeys(("large_binary", "binary_view", "fixed_size_binary"), "bytes"),
    "date64": _SCALARS[dt.date],
}
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OF_AVRO: Final = frozenset(
    {"null", "boolean", "int", "long", "float", "double", "bytes", "string"}
    | {"record", "error", "enum", "array", "map", "fixed", "union"}
)
_NULLS: Final = (None, type(None))


def record_name(text: str) -> str:
    """Text as an Avro name: letters, digits and underscores; dots part its namespace."""
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII) for part in text.split(".")]
    return ".".join(part if part and not part[0].isdigit() else f"_{part}" for part in parts)


def avro_of_class(cls: type, name: str | None = None) -> dict[str, Any]:
    """The Avro record of a dataclass or pydantic model.

    Optional fields are unions with null; defaults that JSON has are defaults of the schema; enums and literals are
    what their values are. Of a model's fields, those that it excludes are left out, and those with a serializer are of
    the type that it is annotated to return.

    Args:
        cls: The class.
        name: Name of the record; the class's if None.

    Raises:
        InvalidRecordError: A field's type has no Avro type.
    """
    return cast("dict[str, Any]", _of_class(cls, {}, name))


def avro_of_scalar(value: Any) -> AvroType | None:
    """The Avro type of a value by itself; None if its type alone does not tell it."""
    return _SCALARS.get(type(value.value if isinstance(value, enum.Enum) else value))


def _of_class(cls: type, seen: dict[type, str], given: str | None = None) -> AvroType:
    if cls in seen:
        return seen[cls]
    if issubclass(cls, RootModel):
        raise _no_type(cls.__name__, "a root model", "Give the schema as text, or use what is inside")
    own = seen[cls] = _free_name(cls, seen, given)
    hints = typing.get_type_hints(cls, include_extras=True)
    if issubclass(cls, BaseModel):  # a generic one's own fields know what they are of
        hints |= {name: field.annotation for name, field in cls.model_fields.items() if _is_open(hints[name])}
    hints |= _serialized(cls)
    fields = []
    for name, default, metadata in _fields(cls):
        field: dict[str, Any] = {"name": name, "type": _of_hint(hints[name], f"{cls.__name__}.{name}", metadata, seen)}
        nullable = isinstance(field["type"], list) and field["type"][0] == "null"
        if default is None and nullable:
            field["default"] = None
        elif isinstance(field["type"], str) and _is_of(field["type"], default):
            field["default"] = default
        fields.append(field)
    return {"type": "record", "name": own, "fields": fields}


def _is_open(hint: Any) -> bool:
    return isinstance(hint, typing.TypeVar) or bool(getattr(hint, "__parameters__", ()))


def _is_of(avro: str, default: Any) -> bool:
    """Whether a default is a value of its type, and JSON has it."""
    if type(default) is int:
        return (avro == "long" and -(2**63) <= default < 2**63) or (avro == "double" and abs(default) <= 2**53)
    if type(default) is float:
        return avro == "double" and math.isfinite(default)
    return type(default) is {"boolean": bool, "string": str}.get(avro)


def _free_name(cls: type, seen: Mapping[type, str], given: str | None) -> str:
    """A record's name: the class's, or a longer one if another class in the schema has that."""
    long = record_name(cls.__qualname__.replace(".", "_"))
    return first_free([record_name(given or cls.__name__), long], seen.values())


def first_free(names: Sequence[str], taken: Iterable[str]) -> str:
    """The first of the names that neither Avro nor another record in the namespace has, or the last with a number."""
    others = _OF_AVRO | {name.rpartition(".")[2] for name in taken}
    numbered = (f"{names[-1]}_{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain(names, numbered) if name.rpartition(".")[2] not in others)


def _fields(cls: type) -> list[tuple[str, Any, Sequence[Any]]]:
    """(name, default or ..., what pydantic knows of it) of each field."""
    known = _known_to_pydantic(cls)
    if known is not None:
        serialized = _serialized(cls)
        return [
            (name, ... if _has_no_default(info) or name in serialized else info.default, info.metadata)
            for name, info in known.items()
            if not info.exclude
        ]
    return [
        (field.name, ... if field.default is dataclasses.MISSING else field.default, ())
        for field in dataclasses.fields(cast("Any", cls))
    ]


def _known_to_pydantic(cls: type) -> Mapping[str, FieldInfo] | None:
    """The fields of a model, or of a dataclass that is pydantic's own; None of others."""
    if issubclass(cls, BaseModel):
        return cls.model_fields
    base: Any = pydantic_dataclass(cls)
    if base is None:
        return None
    # It counts what only its constructor takes (InitVar), too.
    return {field.name: base.__pydantic_fields__[field.name] for field in dataclasses.fields(base)}


def _has_no_default(info: FieldInfo) -> bool:
    """Whether a field has none that stands in records as it is."""
    serialized = any(isinstance(part, _SERIALIZERS) for part in info.metadata)
    return info.is_required() or info.default_factory is not None or serialized


_SERIALIZERS: Final = (PlainSerializer, WrapSerializer)


def _serialized(cls: type) -> dict[str, Any]:
    """What a model's serializers make of its fields, by field, as far as they are annotated."""
    known = _known_to_pydantic(cls)
    if known is None:
        return {}
    made: dict[str, Any] = {}
    for found in cast("Any", cls).__pydantic_decorators__.field_serializers.values():
        returned = _returned(found.info, found.func)
        fields = known if "*" in found.info.fields else found.info.fields
        made.update(dict.fromkeys(fields, returned) if returned is not None else {})
    return made


def _returned(serializer: Any, function: Any) -> Any:
    """The type that a serializer returns for Python values; None if it does not say."""
    if serializer.when_used.startswith("json"):
        return None
    returned = serializer.return_type
    if returned is PydanticUndefined and isinstance(function, type):
        returned = function
    elif returned is PydanticUndefined:
        with contextlib.suppress(NameError, TypeError):
            returned = typing.get_type_hints(function, include_extras=True).get("return", PydanticUndefined)
    if returned is PydanticUndefined:
        return None
    return typing.Optional[returned] if serializer.when_used == "unless-none" else returned  # noqa: UP045


def _of_hint(hint: Any, place: str, metadata: Sequence[Any], seen: dict[type, str]) -> AvroType:
    hint = getattr(hint, "__supertype__", hint)  # of a NewType
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        extra = [part for item in arguments[1:] for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        returned = [_returned(item, item.func) for item in extra if isinstance(item, _SERIALIZERS)]
        hint = next((made for made in reversed(returned) if made is not None), arguments[0])
        return _of_hint(hint, place, [*metadata, *extra], seen)
    if origin in {typing.Union, types.UnionType}:
        members = [_of_hint(arg, place, metadata, seen) for arg in arguments if arg not in _NULLS]
        members.sort(key=_rank)
        return ["null", *members] if len(members) < len(arguments) else members
    if origin is typing.Literal:
        return _of_values(arguments, place)
    if origin in {list, set, frozenset, collections.abc.Sequence} or (origin is tuple and arguments[1:] == (...,)):
        return {"type": "array", "items": _of_hint(arguments[0], place, (), seen)}
    if origin in {dict, collections.abc.Mapping} and arguments[0] is str:
        return {"type": "map", "values": _of_hint(arguments[1], place, (), seen)}
    if isinstance(hint, type):
        if issubclass(hint, enum.Enum):
            return _of_values([member.value for member in hint], place)
        if issubclass(hint, decimal.Decimal):
            digits = {name: getattr(part, name) for part in metadata for name in _DIGITS if hasattr(part, name)}
            if set(digits) == set(_DIGITS):
                return decimal_type(digits["max_digits"], digits["decimal_places"])
            raise _no_type(
                place, "a Decimal without digits", "Annotate it with Field(max_digits=..., decimal_places=...)"
            )
        if is_model(hint):
            return _of_class(hint, seen)
        for scalar, avro in _SCALARS.items():
            if hint is scalar or (scalar is not int and issubclass(hint, scalar)):
                return avro
    raise _no_type(place, str(hint), "Give the schema as text, or annotate the field with a type that Avro has")


_DIGITS: Final = ("max_digits", "decimal_places")


def _rank(member: AvroType) -> int:
    """Where a union has a member: Avro's serializer takes the first that a value fits.

    An int is a double and most logical types, text a UUID and a date, bytes a decimal, and a datetime a date.
    """
    if isinstance(member, dict) and "logicalType" in member:
        return 3 if member["logicalType"] == "date" else 2
    return 1 if member == "double" else 0


def _of_values(values: Sequence[Any], place: str) -> AvroType:
    # Not Avro's enum: a new member would be an incompatible change for readers.
    kinds = {type(value) for value in values}
    if len(kinds) == 1 and kinds <= {str, int, bool}:
        return _SCALARS[kinds.pop()]
    raise _no_type(place, "an enum of several types", "Give its members values that are all str or all int")


def decimal_type(precision: int, scale: int) -> AvroType:
    """Avro's decimal of so many digits, so many of them behind the point."""
    return {"type": "bytes", "logicalType": "decimal", "precision": precision, "scale": scale}


def _no_type(place: str, what: str, fix: str) -> InvalidRecordError:
    field = place.rpartition(".")[2]
    return InvalidRecordError(f"schema, field {place!r}", f"no Avro type can be derived from {what}", fix, field=field)


def avro_of_frame(frame: nw.DataFrame[Any], name: str, *, any_names: bool = False) -> dict[str, Any]:
    """The Avro record of a frame's columns: each may be null, which is its default, so that columns may come and go.

    Timestamps with a time zone are instants, those without are local ones; both in microseconds.

    Args:
        frame: The frame, of any length.
        name: Name of the record.
        any_names: Whether columns may have names that Avro does not allow, as for JSON Schema.

    Raises:
        InvalidRecordError: A column's name or type has no Avro form.
    """
    own = first_free([record_name(name)], ())
    fields, taken = [], [own]
    for column in frame.columns:
        series = frame[column]
        try:
            dtype = series.dtype
        except ValueError as error:  # narwhals has no decimal of negative scale
            raise _no_column_type(column, f"it: {error}") from error
        if not any_names:
            _check_name(column, column)
            _check_names_in(dtype, column)
        avro = _of_dtype(series, dtype, column, taken)
        fields.append({"name": column, "type": ["null", avro], "default": None})
    return {"type": "record", "name": own, "fields": fields}


def _check_name(name: str, place: str) -> None:
    if not _NAME.fullmatch(name):
        inside = f", field {name!r}" if place != name else ""
        raise InvalidRecordError(
            f"data frame, column {place!r}{inside}",
            "Avro does not allow this name",
            "Rename it: letters, digits and underscores, not a digit first",
            field=place,
        )


def _check_names_in(dtype: Any, place: str) -> None:
    for field in getattr(dtype, "fields", ()):
        _check_name(field.name, place)
        _check_names_in(field.dtype, place)
    if hasattr(dtype, "inner"):
        _check_names_in(dtype.inner, place)


def key_of_frame(frame: nw.DataFrame[Any], fields: Sequence[str], name: str, *, any_names: bool = False) -> AvroType:
    """The Avro type of a frame's key columns: of the only one, or a record of several.

    Raises:
        InvalidRecordError: A column's name or type has no Avro form.
    """
    record = avro_of_frame(frame[list(fields)], name, any_names=any_names)
    types_ = [field["type"][1] for field in record["fields"]]
    if len(types_) == 1:
        return cast("AvroType", types_[0])
    record["fields"] = [{"name": name, "type": avro} for name, avro in zip(fields, types_, strict=True)]
    return record


def _of_dtype(series: nw.Series[Any], dtype: Any, place: str, taken: list[str]) -> AvroType:
    """A data type's Avro type; `taken` has the names of the records so far."""
    kind = type(dtype).__name__
    whole = dtype == series.dtype
    if kind in {"Categorical", "Enum"} and whole and not series.implementation.is_polars():
        series = _categories(series)
        return _of_dtype(series, series.dtype, place, taken)
    native = str(_native_type(series)) if whole and kind == "Unknown" else ""
    known = _COLUMNS.get(kind) or _ARROW.get(native.partition("[")[0])
    if known is not None:
        return known
    if kind == "Object":
        # pandas has no other type for dates, nor for booleans beside missing ones.
        found = {type(value) for value in series.drop_nulls().to_list()}
        if len(found) == 1 and (scalar := _SCALARS.get(found.pop())) is not None:
            return scalar
    if kind == "Datetime":
        return {"type": "long", "logicalType": f"{'' if dtype.time_zone else 'local-'}timestamp-micros"}
    if kind == "Decimal":
        native = _native_type(series) if whole else dtype
        scale = getattr(native, "scale", -1) or 0  # older narwhals do not tell it of nested ones
        if scale >= 0:
            return decimal_type(native.precision or 38, scale)
    if kind == "Unknown" and whole and series.is_null().all():
        raise _no_column_type(place, "a column of nothing but nulls")
    if kind in {"List", "Array"}:
        return {"type": "array", "items": ["null", _of_dtype(series, dtype.inner, f"{place}_item", taken)]}
    if kind == "Struct":
        own = first_free([record_name(place)], taken)
        taken.append(own)
        fields = [
            {"name": field.name, "type": ["null", _of_dtype(series, field.dtype, f"{place}_{field.name}", taken)]}
            for field in dtype.fields
        ]
        return {"type": "record", "name": own, "fields": [f | {"default": None} for f in fields]}
    raise _no_column_type(place, native or str(dtype))


def _no_column_type(place: str, what: str) -> InvalidRecordError:
    return InvalidRecordError(
        f"data frame, column {place!r}",
        f"no Avro type can be derived from {what}",
        "Cast it, or give the schema as text or file",
        field=place,
    )


def _native_type(series: nw.Series[Any]) -> Any:
    """A column's data type as pandas or Arrow has it."""
    native: Any = series.to_native()
    native = getattr(native, "dtype", None) or native.type
    return getattr(native, "pyarrow_dtype", native)


def _categories(series: nw.Series[Any]) -> nw.Series[Any]:
    """A series of the type of a column's categories, which need not be text in pandas and Arrow."""
    import narwhals as nw  # noqa: PLC0415  (slow to import)

    native = _native_type(series)
    if hasattr(native, "categories"):
        return nw.from_native(native.categories.to_series(), series_only=True)
    import pyarrow as pa  # noqa: PLC0415  (optional)

    return nw.from_native(pa.chunked_array([], native.value_type), series_only=True)


def rows_of_frame(frame: nw.DataFrame[Any], *, nan_is_null: bool = True) -> list[dict[str, Any]]:
    """A frame's rows as mappings of Python values; what pandas calls missing is None.

    Args:
        frame: The frame.
        nan_is_null: Whether NaN is None in the other libraries' frames too, where it is a number beside null; inside of
            lists and structs in all of them.
    """
    import narwhals as nw  # noqa: PLC0415  (slow to import)

    columns = []
    for name in frame.columns:
        series = frame[name]
        values = series.to_list()
        if frame.implementation.is_pandas_like():
            if series.null_count():
                missing = series.is_null().to_list()
                values = [None if gone else value for value, gone in zip(values, missing, strict=True)]
            if type(series.dtype).__name__ == "Datetime":
                values = [value and value.to_pydatetime(warn=False) for value in values]
        elif nan_is_null and series.dtype.is_float():
            values = list(map(_null_for_nan, values))
        if nan_is_null and (series.dtype.is_nested() or series.dtype == nw.Object):
            values = list(map(_null_for_nan, values))
        columns.append(values)
    names = frame.columns
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _null_for_nan(value: Any) -> Any:
    """A value with None for NaN, also inside of lists and structs."""
    if type(value) is list:
        return list(map(_null_for_nan, value))
    if type(value) is dict:
        return {key: _null_for_nan(item) for key, item in value.items()}
    return None if type(value) is float and value != value else value  # noqa: PLR0124  (NaN is not itself)


def json_schema_of_class(cls: type) -> dict[str, Any]:
    """The JSON Schema of a dataclass or pydantic model, as pydantic writes it."""
    try:
        made = TypeAdapter(cls).json_schema(mode="serialization", by_alias=False, schema_generator=_JsonSchema)
    except (PydanticUserError, NameError) as error:
        raise InvalidRecordError(
            f"schema of {cls.__qualname__}",
            f"no JSON Schema can be derived: {str(error).partition(chr(10))[0]}",
            "Annotate its fields with types that JSON has, or give the schema as text or file",
        ) from error
    return {"$schema": _DRAFT, "title": cls.__name__} | made


class _JsonSchema(GenerateJsonSchema):
    """Names fields as records do: by their aliases where their own class says so."""

    def model_schema(self, schema: Any) -> Any:
        with self._named_as(schema["cls"]):
            return super().model_schema(schema)

    def dataclass_schema(self, schema: Any) -> Any:
        with self._named_as(schema["cls"]):
            return super().dataclass_schema(schema)

    @contextlib.contextmanager
    def _named_as(self, cls: type) -> Iterator[None]:
        outside = self.by_alias
        self.by_alias = writes_aliases(cls) if is_of_pydantic(cls) else outside
        try:
            yield
        finally:
            self.by_alias = outside

    def default_schema(self, schema: Any) -> Any:
        """A field's schema, without a default that JSON does not have: NaN or infinity."""
        made = super().default_schema(schema)
        try:
            json.dumps(made.get("default"), allow_nan=False)
        except ValueError:
            del made["default"]
        return made


# Registries tell by it what the text is; this one all of them know.
_DRAFT: Final = "http://json-schema.org/draft-07/schema#"


def json_schema_of(avro: Any) -> dict[str, Any]:
    """The JSON Schema of what an Avro type of columns holds, as this package writes it as JSON.

    Raises:
        InvalidRecordError: A column is of bytes.
    """
    return {"$schema": _DRAFT} | _json_of(avro, ())


def _json_of(avro: Any, path: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(avro, list):
        return {"anyOf": [_json_of(member, path) for member in avro]}
    if avro == "bytes":
        raise InvalidRecordError(
            f"data frame, column {'.'.join(path)!r}" if path else "data frame, key",
            "JSON has no bytes",
            "Decode them to text, or ask for Avro or Protobuf",
            field=path[0] if path else None,
        )
    if isinstance(avro, str):
        return dict(_JSON[avro])
    logical = avro.get("logicalType", "")
    if logical in _FORMATS:
        return {"type": "string"} | ({"format": _FORMATS[logical]} if _FORMATS[logical] else {})
    if avro["type"] == "array":
        return {"type": "array", "items": _json_of(avro["items"], path)}
    if avro["type"] == "record":
        properties = {field["name"]: _json_of(field["type"], (*path, field["name"])) for field in avro["fields"]}
        return {"title": avro["name"], "type": "object", "properties": properties, "additionalProperties": False}
    return _json_of(avro["type"], path)


_JSON: Final[dict[str, dict[str, Any]]] = {
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "int": {"type": "integer"},
    "long": {"type": "integer"},
    "float": {"type": "number"},
    "double": {"type": "number"},
    "string": {"type": "string"},
}
_FORMATS: Final = {
    "date": "date",
    "time-micros": None,  # RFC 3339's has an offset
    "timestamp-micros": "date-time",
    "local-timestamp-micros": None,
    "decimal": None,
    "uuid": "uuid",
}
