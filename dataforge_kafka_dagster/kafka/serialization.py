"""Values and keys to bytes, and back.

A value's format follows from its type: mappings, dataclasses and pydantic models are JSON, a str is UTF-8 text, bytes
are sent as they are. JSON is orjson's: RFC 8259, dates as RFC 3339; a Decimal is its text, so that no digit is lost.
"""

from __future__ import annotations

import base64
import bisect
import collections
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import itertools
import math
import operator
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, cast
from zoneinfo import ZoneInfo

import orjson
from pydantic import BaseModel

from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.models import (
    UnsupportedTypeError,
    dataclass_fields,
    dumped,
    is_model,
    is_of_pydantic,
    is_plain,
    iterator_in,
    plain_models,
    pydantic_dataclass,
)

ValueFormat = Literal["json", "string", "bytes", "avro", "json_schema", "protobuf"]

Headers = Mapping[str, "str | bytes | None"] | Sequence[tuple[str, "str | bytes | None"]]

# orjson 3.13 writes a time of 10 to 99 milliseconds without its leading zero; of a dataclass it leaves out fields that
# begin with an underscore, and adds attributes that are no fields. So all of them come to `_jsonable`.
# It cuts NumPy's dates to microseconds, and takes a missing one of nanoseconds for one of 1677: these come there too.
_OPTIONS: Final = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS
# For the dates and datetimes of models, which it writes as pydantic does.
_DATED_OPTIONS: Final = orjson.OPT_UTC_Z | orjson.OPT_PASSTHROUGH_DATACLASS

# Those that Python's own numbers are as exact as.
_NUMPY_NUMBERS: Final = frozenset(
    {"float64", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}
)

# The types of pandas' NaT and NA.
_MISSING: Final = frozenset({"NaTType", "NAType"})

# From here on no time zone's offset from UTC has seconds: Liberia's was the last.
STANDARD_TIME: Final = dt.datetime(1973, 1, 1, tzinfo=dt.timezone.utc)

_MINUTE: Final = dt.timedelta(minutes=1)

_NULL: Final = re.compile(b"null")

# What stands between two values of an array: seldom in one of them, and quick to write and to find.
_BETWEEN: Final = uuid.uuid4().hex[:8]
_BETWEEN_JSON: Final = f',"{_BETWEEN}",'.encode()

# Types whose values are neither NaN nor infinity; and all that have nothing inside.
_FINITE: Final = frozenset({str, int, bool, type(None), dt.datetime, dt.date, dt.time, uuid.UUID})
_LEAVES: Final = _FINITE | {float, decimal.Decimal}

# What is written as an array; of these, sets and deques only in models.
_LISTS: Final = (list, tuple, set, frozenset, collections.deque)

# What to do where orjson or Python says this, in words that change.
_JSON_FIXES: Final = {
    "64-bit|too big": "Publish it as str",
    "key must be str": "Make the keys str",
    "surrogates": "Remove the lone surrogate, as by .encode(errors='replace').decode()",
}

RowsEncoder = Callable[[Sequence[Any], int], "list[bytes | None]"]
"""Takes values or keys, and the position of the first; returns the bytes of each, or raises `InvalidRecordError`."""


@dataclasses.dataclass(frozen=True)
class Encoders:
    """How the values and keys of a publication become bytes, where their types are not to decide.

    Attributes:
        value: Encodes rows; None goes by their type: JSON, text or bytes.
        key: Encodes keys; None writes them as text.
        form: The format of the values that `value` makes.
    """

    value: RowsEncoder | None = None
    key: RowsEncoder | None = None
    form: ValueFormat | None = None

    def prepare(self, frame: Any, fields: Sequence[str]) -> None:
        """Learn a narwhals data frame's columns, and those of its key, before its rows come."""

    def rows(self, frame: Any) -> Sequence[dict[str, Any]]:
        """The rows of a narwhals data frame as `value` is to have them."""
        return cast("Sequence[dict[str, Any]]", frame.rows(named=True))

    def key_rows(self, frame: Any) -> Sequence[dict[str, Any]]:
        """The rows of a narwhals data frame's key columns as `key` is to have them."""
        return self.rows(frame)


DEFAULT_ENCODERS: Final = Encoders()


def format_of(cls: type) -> ValueFormat | None:
    """The format in which values of a type are published; ``None`` if they cannot be."""
    if issubclass(cls, (bytes, bytearray, memoryview)):
        return "bytes"
    if issubclass(cls, str):
        return "string"
    if issubclass(cls, Mapping) or is_model(cls):
        return "json"
    return None


def is_message(value: object) -> bool:
    """Whether a value is a Protobuf message."""
    return hasattr(value, "DESCRIPTOR") and hasattr(value, "SerializeToString")


def _jsonable(value: Any) -> Any:
    """What orjson is to write for a type it does not know."""
    cls: type = type(value)
    return _writer_of(cls)(value)


@functools.lru_cache(1024)
def _writer_of(cls: type) -> Callable[[Any], Any]:
    if cls.__module__ == "numpy":
        return cls.item if cls.__name__ in _NUMPY_NUMBERS else _of_numpy  # type: ignore[attr-defined]
    if cls is dt.datetime:
        return _datetime_json
    if hasattr(cls, "__dataclass_fields__"):
        return dumped if pydantic_dataclass(cls) else dataclass_fields
    if issubclass(cls, Mapping):
        return dict
    if issubclass(cls, BaseModel):
        return _of_model
    if issubclass(cls, decimal.Decimal):
        return lambda number: format(number, "f") if number.is_finite() else None
    if cls is type(None) or cls.__name__ in _MISSING:
        return lambda _: None
    if issubclass(cls, dt.datetime):
        return lambda moment: _in_whole_minutes(moment).isoformat()
    if issubclass(cls, (dt.date, dt.time)):
        return cls.isoformat
    if issubclass(cls, (float, uuid.UUID)):
        return float if issubclass(cls, float) else str
    if issubclass(cls, tuple) and cls.__name__ != "MonthDayNano":  # Arrow's interval
        return list
    if issubclass(cls, (bytes, bytearray, memoryview)):
        raise UnsupportedTypeError("bytes inside a JSON value; decode them, or publish the record as bytes")
    raise _no_json_form_of(cls)


def _of_model(model: BaseModel) -> Any:
    _refuse_iterator(model)
    return model.model_dump(mode="json")


def _refuse_iterator(model: BaseModel) -> None:
    field = iterator_in(model)
    if field is not None:
        raise UnsupportedTypeError(
            f"field {field!r} of {type(model).__qualname__} is an iterator, which is empty when the record is written"
            " again, or looked into; annotate it as a list, which pydantic makes of an iterator"
        )


def _datetime_json(moment: dt.datetime) -> orjson.Fragment:
    zone = moment.tzinfo
    if not (zone is None or zone is dt.timezone.utc or (type(zone) is ZoneInfo and moment.year >= STANDARD_TIME.year)):
        # orjson has rules of its own for what pytz and others tell, and adds them to another time than Python does.
        moment = _in_whole_minutes(moment)
        offset = moment.utcoffset()
        moment = moment.replace(tzinfo=None if offset is None else dt.timezone(offset))
    return orjson.Fragment(orjson.dumps(moment))


def _in_whole_minutes(moment: dt.datetime) -> dt.datetime:
    """A datetime whose offset RFC 3339 has a form for: one with seconds, which orjson would round, becomes UTC."""
    offset = moment.utcoffset()
    return moment.astimezone(dt.timezone.utc) if offset and offset % _MINUTE else moment


def _no_json_form_of(cls: type) -> UnsupportedTypeError:
    way = (
        ".total_seconds()"
        if issubclass(cls, dt.timedelta)
        else f"{'list' if issubclass(cls, Iterable) else 'str'}(...)"
    )
    return UnsupportedTypeError(f"type {cls.__qualname__} has no JSON form; convert it first, as by {way}")


def _of_numpy(value: Any) -> Any:
    """An array, or a single value, of NumPy's."""
    kind = value.dtype.kind
    if kind in "OU":
        return value.tolist()
    if kind == "M":
        micro = value.astype("M8[us]", order="C")
        # Not so with NaT, which is not equal to itself.
        if (micro == value).all():
            return orjson.Fragment(_numpy_json(micro))
        if value.ndim:
            return list(value)
        return str(value) if value == value else None  # noqa: PLR0124
    if kind in "biuf":
        # By orjson, for the short form of a float32. It takes arrays in C order, and the machine's order of bytes.
        taken = value.flags.c_contiguous and value.dtype.isnative
        return orjson.Fragment(_numpy_json(value if taken else value.astype(value.dtype.newbyteorder("="), order="C")))
    raise _no_json_form_of(type(value))


def _numpy_json(value: Any) -> bytes:
    return orjson.dumps(value, _from_numpy, orjson.OPT_SERIALIZE_NUMPY)


def _from_numpy(value: Any) -> Any:
    """What Python has for an array or a value that orjson does not know."""
    found = value.tolist()
    if type(found) is type(value):
        raise _no_json_form_of(type(value))
    return found


def is_missing(value: object) -> bool:
    """Whether a value is pandas' NaT or NA."""
    return type(value).__name__ in _MISSING


def is_number(value: object) -> bool:
    """Whether a value is anything but a float or decimal that is NaN or infinity."""
    if isinstance(value, decimal.Decimal):
        return value.is_finite()
    return not isinstance(value, float) or math.isfinite(value)


def is_nan(value: object) -> bool:
    """Whether a value is a float or decimal that is NaN."""
    return value.is_nan() if isinstance(value, decimal.Decimal) else isinstance(value, float) and math.isnan(value)


def _is_not_finite(value: object) -> bool:
    return not is_number(value)


def _is_infinite(value: object) -> bool:
    return not (is_number(value) or is_nan(value))


def to_json(value: Any) -> bytes:
    """One value as UTF-8 JSON text; NaN and infinity become null.

    Raises:
        TypeError: Something in it has no JSON form.
    """
    return _dumps(value, _jsonable)


def to_protobuf_json(value: Any) -> bytes:
    """One value as the JSON that Protobuf reads: as `to_json`, with bytes as base64.

    Raises:
        TypeError: Something in it has no JSON form.
    """
    return _dumps(value, _protobuf_jsonable)


def _dumps(value: Any, default: Callable[[Any], Any] | None, options: int = _OPTIONS) -> bytes:
    """JSON by orjson, which makes a TypeError also of an interrupt in a function that it calls."""
    try:
        return orjson.dumps(value, default, options)
    except TypeError as error:
        cause = error.__cause__
        while cause is not None:
            if not isinstance(cause, Exception):
                raise cause from None
            cause = cause.__cause__
        raise


def _protobuf_jsonable(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if isinstance(value, BaseModel):
        _refuse_iterator(value)
        # pydantic's own JSON has bytes as text.
        plain = value.model_dump()
        return plain if _has_bytes(plain) else value.model_dump(mode="json")
    return _jsonable(value)


def _has_bytes(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return isinstance(value, (bytes, bytearray, memoryview))
    return any(map(_has_bytes, value))


class JsonLines(NamedTuple):
    """Some values as JSON.

    Attributes:
        texts: Each value, as `to_json` writes it.
        with_null: Positions of those with a null in them (perhaps inside a string), which NaN and infinity are
            written as.
        size: Bytes of all texts together.
    """

    texts: list[bytes]
    with_null: list[int]
    size: int


def json_lines(values: Sequence[Any]) -> JsonLines:
    """Each value as `to_json` writes it.

    They are written as one array and cut at what stands between them, which takes less time than a call for each;
    models as their fields where these are the same.

    Raises:
        TypeError: Something in one of them has no JSON form.
        ValueError: Pydantic cannot write a model.
    """
    plain = plain_models(values)
    lines = plain and _together(plain.fields, None, _DATED_OPTIONS if plain.dated else _OPTIONS)
    if lines := lines or _together(values, _jsonable, _OPTIONS):
        return lines
    texts = list(map(to_json, values))
    return _json_lines(texts, b"".join(texts), 0, 0)


def _together(values: Sequence[Any], default: Callable[[Any], Any] | None, options: int) -> JsonLines | None:
    """Values as one array, cut; None if they cannot be written so."""
    array = [_BETWEEN] * (2 * len(values) - 1)
    array[::2] = values
    # Of one value alone: what is nested as deep as orjson writes is too deep in an array.
    with contextlib.suppress(TypeError):
        joined = _dumps(array, default, options)
        texts = joined.split(_BETWEEN_JSON)
        if len(texts) == len(values):
            texts[0] = texts[0][1:]
            texts[-1] = texts[-1][:-1]
            return _json_lines(texts, joined, 1, len(_BETWEEN_JSON))
    return None


def _json_lines(texts: list[bytes], joined: bytes, around: int, between: int) -> JsonLines:
    """The texts, looked through for null.

    They are looked through as one text, since a search in each costs nearly as much as to encode them; by a pattern,
    which finds it faster than ``find`` does. Where nulls are many, a search in each costs less.

    Args:
        texts: The texts.
        joined: All of them, one after the other.
        around: Bytes before the first of them there, and after the last.
        between: Bytes between two of them.
    """
    size = len(joined) - 2 * around - between * (len(texts) - 1)
    few = len(texts) // 4
    starts = [found.start() - around for found in itertools.islice(_NULL.finditer(joined), few + 1)]
    if len(starts) > few:
        return JsonLines(texts, [i for i, text in enumerate(texts) if b"null" in text], size)
    ends = list(itertools.accumulate(len(text) + between for text in texts)) if starts else []
    return JsonLines(texts, sorted({bisect.bisect_right(ends, start) for start in starts}), size)


def text_size(texts: Sequence[bytes | str | None] | None) -> int:
    """Bytes of all texts together, a str as UTF-8.

    Raises:
        UnicodeEncodeError: A str is not text.
    """
    if not texts:
        return 0
    kinds = set(map(type, texts))
    present: Any = filter(None, texts) if type(None) in kinds else texts
    if str not in kinds:
        return sum(map(len, present))
    if bytes not in kinds:
        joined = "".join(present)
        return len(joined) if joined.isascii() else len(joined.encode())
    return sum(len(text.encode()) if isinstance(text, str) else len(text) for text in present)


def serialize_value(value: Any, index: int | None = None) -> bytes | None:
    """A record's value as bytes; ``None`` stays ``None`` (a tombstone).

    Raises:
        InvalidRecordError: The type cannot be published, or something in the value has no JSON form.
    """
    if value is None:
        return None
    form = format_of(type(value))
    if form == "bytes":
        return bytes(value)
    if form is None:
        raise InvalidRecordError(
            record_name(index),
            f"its value is of type {type(value).__qualname__}",
            "Publish a mapping, dataclass, pydantic model, str or bytes",
            index=index,
        )
    if form == "json":
        return _checked_json(value, index)
    try:
        return cast("bytes", value.encode())
    except ValueError as error:
        raise no_json_form(value, index, error) from error


def _checked_json(value: Any, index: int | None) -> bytes:
    """A value or key as JSON.

    Raises:
        InvalidRecordError: Something in it has no JSON form, or is NaN or infinity.
    """
    try:
        encoded = to_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise no_json_form(value, index, error) from error
    if b"null" in encoded:
        refuse_non_finite(value, index)
    return encoded


def refuse_infinite(value: Any, index: int | None) -> None:
    """Refuse infinity in a frame's row, where NaN is a missing value."""
    field = _place_of(value, _is_infinite)
    if field is not None:
        raise InvalidRecordError(
            f"{record_name(index)}, field {field!r}",
            "JSON has no infinity",
            "Replace it by None or a number",
            index=index,
            field=field,
        )


def refuse_non_finite(value: Any, index: int | None) -> None:
    """Refuse NaN and infinity, for which JSON has no form and which orjson writes as null."""
    field = _place_of(value, _is_not_finite)
    if field is not None:
        raise InvalidRecordError(
            f"{record_name(index)}, field {field!r}",
            "JSON has neither NaN nor infinity",
            "Replace it by None; in a data frame that is published, NaN is null",
            index=index,
            field=field,
        )


def _place_of(value: Any, wrong: Callable[[Any], bool]) -> str | None:
    """Dotted path of the first number for which ``wrong`` holds; quick where there is none."""
    try:  # a with statement would take longer than the look
        found = _has_number(value, wrong)
    except RecursionError:  # nested too deep for that; `_find` stops
        found = True
    return _find(value, wrong) if found else None


def _has_number(value: Any, wrong: Callable[[Any], bool]) -> bool:
    """Whether a value that orjson has written holds a number for which ``wrong`` holds, NaN and infinity at most.

    Rows with a null in them come here one by one, so that it is to cost less than to encode them.
    """
    cls = type(value)
    if cls is dict:
        value = value.values()
    elif cls is not list and cls is not tuple:
        return _is_or_has_number(value, wrong)
    for item in value:
        cls = type(item)
        if cls is float:
            if item - item != 0 and wrong(item):
                return True
        elif cls not in _FINITE and _has_number(item, wrong):
            return True
    return False


def _is_or_has_number(value: Any, wrong: Callable[[Any], bool]) -> bool:
    """The same for what is no dict, list or tuple of Python's own."""
    cls: type = type(value)
    if cls in _LEAVES:
        return wrong(value)
    opened = _quick_opener_of(cls)
    plain = opened(value) if opened else value
    if type(plain) is not cls:
        return _has_number(plain, wrong)
    if isinstance(value, Mapping):
        return _has_number(dict(value), wrong)
    return _has_number(list(value), wrong) if isinstance(value, _LISTS) else wrong(value)


@functools.lru_cache(1024)
def _quick_opener_of(cls: type) -> Callable[[Any], Any] | None:
    return operator.attrgetter("__dict__") if is_plain(cls) else _opener_of(cls)


def no_json_form(
    value: Any, index: int | None, error: Exception, write: Callable[[Any], bytes] = to_json
) -> InvalidRecordError:
    """The error for a value that could not be written as JSON, with the field at fault."""
    field = _find(value, lambda v: not _has_json_form(v, write), _written) or None
    cause = error.__cause__ or error  # orjson's own error says only that there was one
    what = str(cause) or type(cause).__name__
    fix = next((fix for said, fix in _JSON_FIXES.items() if re.search(said, what)), "")
    if isinstance(cause, UnsupportedTypeError):
        what, _, fix = what.partition("; ")
    place = f", field {field!r}" if field else ""
    return InvalidRecordError(
        f"{record_name(index)}{place}",
        f"it cannot be written as JSON: {what}" if format_of(type(value)) == "json" else what,
        fix[:1].upper() + fix[1:] or "Convert it to a type that JSON has",
        index=index,
        field=field,
    )


def _has_json_form(leaf: Any, write: Callable[[Any], bytes]) -> bool:
    try:
        write(leaf)
    except (TypeError, ValueError):
        return False
    return True


def _find(value: Any, wrong: Any, opened: Any = None, path: str = "", depth: int = 0) -> str | None:
    """Dotted path of the first leaf for which ``wrong`` holds; ``opened`` is `_plain` or `_written`."""
    opened = opened or _plain
    value = opened(value)
    if depth > 320:  # noqa: PLR2004  (deeper than orjson writes, which is 254 levels and arrays in them)
        return None
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) is not str and wrong({key: None}):
                return f"{path}{key!r}"
            found = _find(item, wrong, opened, f"{path}{key}.", depth + 1)
            if found is not None:
                return found
        return None
    if isinstance(value, _LISTS) and (opened is _plain or isinstance(value, (list, tuple))):
        for i, item in enumerate(value):
            found = _find(item, wrong, opened, f"{path}{i}.", depth + 1)
            if found is not None:
                return found
        if type(value) in _LISTS:
            return None
    return path.rstrip(".") if wrong(value) else None


def _plain(value: Any) -> Any:
    """What of a model, dataclass, enum or NumPy's is written, in Python's own types; anything else as it is."""
    cls: type = type(value)
    opened = _opener_of(cls)
    return opened(value) if opened else value


@functools.lru_cache(1024)
def _opener_of(cls: type) -> Callable[[Any], Any] | None:
    if is_of_pydantic(cls):
        return _dumped
    if dataclasses.is_dataclass(cls):
        return lambda value: dataclass_fields(value, None)
    if issubclass(cls, enum.Enum):
        return operator.attrgetter("value")
    return cls.tolist if cls.__module__ == "numpy" else None  # type: ignore[attr-defined]


def _written(value: Any) -> Any:
    """The same, but of a model what its JSON is made of: its dates and bytes are text."""
    if is_of_pydantic(type(value)):
        with contextlib.suppress(Exception):
            return dumped(value, mode="json")
    return _plain(value)


def _dumped(model: Any) -> Any:
    """What a model is serialized from, as Python values; its fields if its serializers fail."""
    try:
        return dumped(model)
    except Exception:  # noqa: BLE001  (of any kind: it is told elsewhere)
        return dict(model if isinstance(model, BaseModel) else dataclass_fields(model))


def record_name(index: int | None) -> str:
    """What errors call a record: by its position, if it has one."""
    return "record" if index is None else f"record {index}"


def serialize_key(key: Any, index: int | None = None, field: str | None = None) -> bytes | None:
    """A record's key as bytes: a str as UTF-8, a number, date, time or UUID as its text, a mapping or list as JSON.

    The text forms are those of Kafka's StringSerializer, so other clients put the same key on the same Kafka partition.

    Raises:
        InvalidRecordError: The key has no such form.
    """
    write = _KEY_WRITERS.get(type(key))
    if write is not None:
        return write(key)
    if type(key) is dict:
        return _checked_json(key, index)
    if type(key) is not str:
        key = _plain_key(key)
    if key is None or isinstance(key, bytes):
        return key
    if isinstance(key, str):
        try:
            return key.encode()
        except UnicodeEncodeError as error:
            raise _refused_key(f"the key is not text: {error}", "Use bytes", index, field) from error
    text = _key_text(key)
    if text is not None:
        return text.encode()
    if isinstance(key, (bytearray, memoryview)):
        return bytes(key)
    of_numpy = type(key).__module__ == "numpy"
    if of_numpy or isinstance(key, (Mapping, list, tuple, BaseModel)) or dataclasses.is_dataclass(key):
        encoded = _checked_json(key, index)
        return encoded.strip(b'"') if of_numpy else encoded
    raise _refused_key(
        f"a key cannot be {key!r}" if not is_number(key) else f"a key cannot be of type {type(key).__qualname__}",
        "Use a str, bytes, int, date, time, UUID, or a mapping or list of those",
        index,
        field,
    )


# Keys of the types that most are of.
_KEY_WRITERS: Final[Mapping[type, Callable[[Any], bytes]]] = {
    bytes: bytes,
    int: lambda key: b"%d" % key,
    dt.date: lambda key: key.isoformat().encode(),
    uuid.UUID: lambda key: str(key).encode(),
}


def _refused_key(cause: str, fix: str, index: int | None, field: str | None) -> InvalidRecordError:
    place = f", field {field!r}" if field else ""
    return InvalidRecordError(f"{record_name(index)}{place}", cause, fix, index=index, field=field)


def _plain_key(key: Any) -> Any:
    """A key without what wraps it; None if it is missing. Arrays, and dates of NumPy, stay what they are."""
    if isinstance(key, enum.Enum):
        return _plain_key(key.value)
    if is_missing(key):
        return None
    if type(key).__module__ != "numpy" or key.ndim:
        return key
    if type(key).__name__ == "ndarray":
        return _plain_key(key[()])
    if key.dtype.kind in "mM":
        return None if key != key else key  # noqa: PLR0124  (NaT)
    if key.dtype.kind == "f" and key.dtype.itemsize < 8 and math.isfinite(key):  # noqa: PLR2004
        # Its own text has fewer digits than the float64 that it is.
        return to_json(key).decode()
    return key.tolist()


def _key_text(key: Any) -> str | None:
    """The text of a single value, as it stands in the JSON of a record's value; None if it has none."""
    if isinstance(key, dt.time):
        return key.isoformat()
    if isinstance(key, (bool, dt.date)):
        return to_json(key).decode().strip('"')
    if isinstance(key, int):
        return str(int(key))
    if isinstance(key, uuid.UUID):
        return str(key)
    if isinstance(key, decimal.Decimal) and key.is_finite():
        return format(key, "f")
    return to_json(float(key)).decode() if isinstance(key, float) and math.isfinite(key) else None


def serialize_headers(headers: Headers | None, index: int | None = None) -> list[tuple[str, bytes | None]] | None:
    """A record's headers as a list of (name, bytes).

    Raises:
        InvalidRecordError: A name is not a str, or has a NUL in it, or a value is neither str nor bytes nor None.
    """
    if headers is None:
        return None
    pairs = list(headers.items()) if isinstance(headers, Mapping) else headers
    encoded: list[tuple[str, bytes | None]] = []
    try:
        for pair in pairs:
            if isinstance(pair, str):
                raise TypeError(f"{pair!r} is no pair")  # noqa: TRY301
            name, value = pair
            if not isinstance(name, str):
                raise TypeError(f"the name {name!r} is of type {type(name).__qualname__}")  # noqa: TRY301
            if "\0" in name:  # librdkafka would write what stands before it
                raise ValueError(f"the name {name!r} contains a NUL character")  # noqa: TRY301
            name.encode()
            if isinstance(value, str):
                value = value.encode()
            elif value is not None and not isinstance(value, bytes):
                raise TypeError(f"{name!r} is of type {type(value).__qualname__}")  # noqa: TRY301
            encoded.append((name, value))
    except (TypeError, ValueError) as error:
        raise InvalidRecordError(
            f"{record_name(index)}, headers",
            str(error),
            "Give a mapping, or (name, value) pairs, of str to str or bytes",
            index=index,
        ) from error
    return encoded


def deserialize(value: bytes | None, form: ValueFormat) -> Any:
    """A published value back from its bytes.

    Raises:
        ValueError: The bytes are not of this format.
    """
    if value is None or form == "bytes":
        return value
    return value.decode() if form == "string" else orjson.loads(value)
