"""Rows (mappings, models, text, bytes, `KafkaRecord`) to chunks of encoded records."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaConfigError
from dataforge_kafka_dagster.kafka.models import dumped, is_of_pydantic, masks_in_json
from dataforge_kafka_dagster.kafka.serialization import (
    DEFAULT_ENCODERS,
    Encoders,
    Headers,
    ValueFormat,
    format_of,
    json_lines,
    record_name,
    refuse_non_finite,
    serialize_headers,
    serialize_key,
    serialize_value,
    text_size,
)

ACCEPTED: Final = (
    "a mapping, dataclass, pydantic model, str, bytes or KafkaRecord; a list, iterator or generator of those;"
    " a pandas, polars or pyarrow data frame; a polars LazyFrame, DuckDB relation or Arrow stream;"
    " or a pathlib.Path to NDJSON, CSV or Parquet"
)


@dataclasses.dataclass(frozen=True)
class KafkaRecord:
    """One record, where a plain value does not say enough.

    Attributes:
        value: Mapping, dataclass, pydantic model (JSON), str (UTF-8), bytes, or None (a tombstone; it needs a key).
        key: str, bytes, int, date, time, UUID, or a mapping or list of those; None lets the producer choose the
            Kafka partition.
        headers: Mapping or (name, value) pairs of str to str, bytes or None.
        partition: Kafka partition, from 0; None lets the key decide.
        timestamp: Milliseconds since the epoch, or an aware datetime; None is now.
    """

    value: Any
    key: Any = None
    headers: Headers | None = None
    partition: int | None = None
    timestamp: int | dt.datetime | None = None


def as_record(
    value: Any,
    key: Any = None,
    headers: Headers | None = None,
    partition: int | None = None,
    timestamp: int | dt.datetime | None = None,
    index: int | None = None,
) -> KafkaRecord:
    """One record of the arguments that it is sent with.

    Args:
        value: Its value, or a `KafkaRecord`, which has all of it.
        key: See `KafkaRecord`, and so are headers, partition and timestamp.
        headers: See key.
        partition: See key.
        timestamp: See key.
        index: Its position, for errors.

    Raises:
        InvalidRecordError: There is something beside a `KafkaRecord`.
    """
    if not isinstance(value, KafkaRecord):
        return KafkaRecord(value, key, headers, partition, timestamp)
    beside = {"key": key, "headers": headers, "partition": partition, "timestamp": timestamp}
    given = [name for name, part in beside.items() if part is not None]
    if given:
        raise InvalidRecordError(
            record_name(index),
            f"{', '.join(given)} beside a KafkaRecord would be ignored",
            "Give it to the KafkaRecord",
            index=index,
        )
    return value


class Extra(NamedTuple):
    """What a record has besides value and key, ready for librdkafka."""

    headers: list[tuple[str, bytes | None]] | None
    partition: int
    timestamp: int


PLAIN: Final = Extra(None, -1, 0)
"""Of a record that has no more."""


class Chunk(NamedTuple):
    """Some records in order, encoded.

    Attributes:
        values: One per record, a str as UTF-8; None is a tombstone.
        keys: As many, or None if no record has a key.
        extras: As many, or None if no record has more than value and key.
        size: Bytes of all values and keys.
        form: Format of the values; None if all are tombstones.
        tombstones: How many of the values are None.
    """

    values: Sequence[bytes | str | None]
    keys: Sequence[bytes | str | None] | None
    extras: Sequence[Extra] | None
    size: int
    form: ValueFormat | None
    tombstones: int = 0

    def each(self) -> Iterator[tuple[bytes | str | None, bytes | str | None, Extra]]:
        """Value, key and the rest of each record."""
        keys, extras = self.keys or itertools.repeat(None), self.extras or itertools.repeat(PLAIN)
        return zip(self.values, keys, extras, strict=False)


def key_fields(key: Any) -> tuple[str, ...]:
    """The fields that make a record's key, from a name, a list of names, or None.

    Raises:
        KafkaConfigError: It is none of these, or names a field twice.
    """
    names = () if key is None else (key,) if isinstance(key, str) else key
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise KafkaConfigError(f"key={key!r}", "it is neither a field name nor a list of them", "Name the key's field")
    if len(set(names)) < len(names):
        raise KafkaConfigError(f"key={key!r}", "it names a field more than once", "Name each field once")
    return tuple(names)


def refuse_output(output: object) -> InvalidRecordError:
    """The error for an output of a type that cannot be published."""
    return InvalidRecordError(
        f"output of type {type(output).__module__}.{type(output).__qualname__}",
        "it cannot be published",
        f"Return {ACCEPTED}",
    )


class RowEncoder:
    """Encodes lists of rows; all rows of an output have one format.

    Args:
        fields: Fields that make the key of rows that have none.
        encoders: How values and keys become bytes.
    """

    def __init__(self, fields: tuple[str, ...], encoders: Encoders = DEFAULT_ENCODERS) -> None:
        self._fields = fields
        self._encoders = encoders
        self._first: type | None = None
        self._form: ValueFormat | None = None

    def __call__(self, rows: Sequence[Any], start: int) -> Chunk:
        """The rows, encoded.

        Args:
            rows: At least one.
            start: Position of the first.

        Raises:
            InvalidRecordError: A row cannot be published.
        """
        first = self._first or type(rows[0])
        types = set(map(type, rows))
        wrapped = issubclass(first, KafkaRecord)
        if any(issubclass(cls, KafkaRecord) != wrapped for cls in types):
            if not (self._first or wrapped):
                self._check_types(rows[:1], start, {first})
            odd = next(i for i, row in enumerate(rows) if isinstance(row, KafkaRecord) != wrapped)
            raise self._odd_one_out(rows, start, odd)
        if not wrapped:
            self._check_types(rows, start, types)
        # Only now: what is no record at all does not say of what kind the others are.
        self._first = first
        if wrapped:
            return self._records(rows, start)
        values, size = self._values(rows, start)
        keys = self._keys(rows, start) if self._fields else None
        return Chunk(values, keys, None, size + text_size(keys), self._encoders.form or self._form)

    def _values(self, rows: Sequence[Any], start: int) -> tuple[Sequence[bytes | str | None], int]:
        """The bytes of each value, and their size together."""
        values: Sequence[bytes | str | None]
        if self._encoders.value:
            values = self._encoders.value(rows, start)
            return values, text_size(values)
        try:
            if self._form != "json":
                values = [bytes(row) if self._form == "bytes" else row.encode() for row in rows]
                return values, text_size(values)
            lines = json_lines(rows)
        except (TypeError, ValueError, RecursionError):
            for i, row in enumerate(rows):
                serialize_value(row, start + i)
            raise
        for i in lines.with_null:
            refuse_non_finite(rows[i], start + i)
        return lines.texts, lines.size

    def _check_types(self, rows: Sequence[Any], start: int, types: set[type]) -> None:
        if self._encoders.value and type(None) not in types:
            return
        expected = self._form or format_of(type(rows[0]))
        if expected is None or any(format_of(cls) != expected for cls in types):
            i = next(i for i, row in enumerate(rows) if expected is None or format_of(type(row)) != expected)
            if format_of(type(rows[i])) is not None:
                raise self._odd_one_out(rows, start, i)
            fix = f"Publish {ACCEPTED.partition(';')[0]}"
            if rows[i] is None:
                fix = "Use KafkaRecord(value=None, key=...) for a tombstone"
            elif _is_frame(rows[i]):
                fix = "Concatenate the frames to one; or, to hold one at a time, return a LazyFrame or Arrow stream"
            raise InvalidRecordError(
                f"record {start + i}", f"its value is of type {type(rows[i]).__qualname__}", fix, index=start + i
            )
        if self._fields and expected != "json":
            raise InvalidRecordError(
                f"key {', '.join(self._fields)!r}",
                f"a {type(rows[0]).__qualname__} has no fields to take it from",
                "Leave the key out, or publish KafkaRecord(value, key=...)",
                field=self._fields[0],
            )
        self._form = expected

    def _odd_one_out(self, rows: Sequence[Any], start: int, i: int) -> InvalidRecordError:
        first = (self._first or type(rows[0])).__qualname__
        return InvalidRecordError(
            f"record {start + i}",
            f"its type {type(rows[i]).__qualname__} is of another kind than the first record's, {first}",
            "Publish records of one kind per output: all mappings or models, all str, all bytes, or all KafkaRecord",
            index=start + i,
        )

    def _keys(self, rows: Sequence[Any], start: int) -> Sequence[bytes | str | None]:
        if self._encoders.key:
            return self._encoders.key([key_of(row, self._fields, i) for i, row in enumerate(rows, start)], start)
        name = ".".join(self._fields)
        if len(self._fields) > 1:
            return [serialize_key(key_of(row, self._fields, i), i, name) for i, row in enumerate(rows, start)]
        found = [row.get(name) if type(row) is dict else None for row in rows]
        # confluent-kafka writes a str as UTF-8 by itself; one that is not text gets its error below.
        if set(map(type, found)) == {str} and "".join(found).isascii():  # type: ignore[arg-type]
            return found
        return [
            serialize_key(key_of(rows[i], self._fields, start + i) if key is None else key, start + i, name)
            for i, key in enumerate(found)
        ]

    def _records(self, rows: Sequence[KafkaRecord], start: int) -> Chunk:
        return self._uniform_records(rows, start) or self._mixed_records(rows, start)

    def _uniform_records(self, rows: Sequence[KafkaRecord], start: int) -> Chunk | None:
        """Records whose values have one format, and all keys or no key; None if they have not."""
        inner = [row.value for row in rows]
        types = set(map(type, inner))
        if any(issubclass(cls, KafkaRecord) for cls in types):
            return None
        forms = set(map(format_of, types))
        form = forms.pop()
        if forms or form is None or form != (self._form or form) or self._encoders.value or self._encoders.key:
            return None
        found = [row.key for row in rows]
        kinds = set(map(type, found))
        keys: Sequence[bytes | str | None] | None = found
        if type(None) in kinds:
            if self._fields or len(kinds) > 1:
                return None
            keys = None
        elif kinds != {bytes} and not (kinds == {str} and "".join(found).isascii()):
            keys = [serialize_key(key, index) for index, key in enumerate(found, start)]
        self._form = form
        values, size = self._values(inner, start)
        extras = [_extra(row, index) for index, row in enumerate(rows, start)]
        return _chunk(values, keys, extras, size + text_size(keys), form)

    def _mixed_records(self, rows: Sequence[KafkaRecord], start: int) -> Chunk:
        values, keys, extras = [], [], []
        for index, row in enumerate(rows, start):
            formless = row.value is None or isinstance(row.value, KafkaRecord) or self._encoders.value
            form = None if formless else format_of(type(row.value))
            if form is not None:
                self._form = self._form or form
                if form != self._form:
                    raise InvalidRecordError(
                        f"record {index}",
                        f"its value is {form}, those before are {self._form}",
                        "Publish values of one format per output",
                        index=index,
                    )
            value, key, extra = encode_record(row, index, self._fields, self._encoders)
            values.append(value)
            keys.append(key)
            extras.append(extra)
        form = self._encoders.form if any(value is not None for value in values) else None
        size = text_size(values) + text_size(keys)
        return _chunk(values, keys, extras, size, form or self._form, values.count(None))


def _is_frame(value: object) -> bool:
    import narwhals as nw  # noqa: PLC0415  (slow to import)

    return bool(nw.dependencies.is_into_dataframe(value))


def _chunk(
    values: Sequence[bytes | str | None],
    keys: Sequence[bytes | str | None] | None,
    extras: list[Extra],
    size: int,
    form: ValueFormat | None,
    tombstones: int = 0,
) -> Chunk:
    """The encoded parts of some `KafkaRecord`s together; without extras if no record has one."""
    plain = extras.count(PLAIN) == len(extras)
    return Chunk(values, keys, None if plain else extras, size, form, tombstones)


def key_of(row: Any, fields: Sequence[str], index: int | None = None) -> Any:
    """The key that a row has in its fields: one field's value, or a mapping of several.

    Raises:
        InvalidRecordError: The row lacks one of them.
    """
    # Not by __missing__: a defaultdict would make the field up, and keep it.
    found = {field: row[field] for field in fields if field in row} if isinstance(row, Mapping) else _shown(row, fields)
    if len(found) == len(fields):
        return {field: found[field] for field in fields} if len(fields) > 1 else found[fields[0]]
    names = list(row) if isinstance(row, Mapping) else list(getattr(row, "__dict__", ()))
    field = next(field for field in fields if field not in found)
    raise InvalidRecordError(
        f"{record_name(index)}, field {field!r}",
        "the key field is missing",
        f"Name a field that every record has; this one has {', '.join(map(str, names[:20]))}{list_hint(field)}",
        index=index,
        field=field,
    )


def list_hint(field: str) -> str:
    """What to add where a field is missing whose name looks like several."""
    names = [name.strip() for name in field.split(",")]
    return f"; for several, give a list: {names}" if len(names) > 1 else ""


def _shown(row: Any, fields: Sequence[str]) -> dict[str, Any]:
    """What an object has in these fields; of a pydantic model what it writes, which may be masked."""
    found = {field: getattr(row, field) for field in fields if hasattr(row, field)}
    if is_of_pydantic(type(row)):
        with contextlib.suppress(Exception):  # of a serializer: told with the value
            written = dumped(row, include=set(fields))
            if not found.keys() >= set(fields):
                written = dumped(row)  # an alias, perhaps
            found |= {field: written[field] for field in fields if field in written}
            if masks_in_json(type(row)):  # type: ignore[arg-type]
                in_json = dumped(row, mode="json")
                # A key of another type than JSON's is written by its own rule.
                found |= {f: in_json[f] for f in fields if f in in_json and isinstance(found.get(f), (str, int, float))}
    return found


def encode_record(
    record: KafkaRecord,
    index: int | None = None,
    fields: Sequence[str] = (),
    encoders: Encoders = DEFAULT_ENCODERS,
) -> tuple[bytes | None, bytes | None, Extra]:
    """One record's value, key and the rest, checked and encoded.

    Args:
        record: The record.
        index: Its position in the output, for errors.
        fields: Fields of its value that make its key if it has none.
        encoders: How value and key become bytes.

    Raises:
        InvalidRecordError: One of them cannot be published, or a tombstone has no key.
    """
    name = record_name(index)
    value, key = record.value, record.key
    if isinstance(value, KafkaRecord):
        raise InvalidRecordError(name, "its value is a KafkaRecord itself", "Publish that one", index=index)
    if key is None and fields and value is not None and (encoders.value or format_of(type(value)) == "json"):
        key = key_of(value, fields, index)
    at = index or 0
    value = encoders.value([value], at)[0] if encoders.value else serialize_value(value, index)
    key = encoders.key([key], at)[0] if encoders.key else serialize_key(key, index)
    if value is None and key is None:
        raise InvalidRecordError(
            name, "a tombstone (value None) without a key deletes nothing", "Give it the key to delete", index=index
        )
    return value, key, _extra(record, index)


def _extra(record: KafkaRecord, index: int | None) -> Extra:
    partition = record.partition
    if record.headers is None and partition is None and record.timestamp is None:
        return PLAIN
    fits = isinstance(partition, int) and not isinstance(partition, bool) and 0 <= partition < 2**31
    if partition is not None and not fits:
        raise InvalidRecordError(
            record_name(index),
            f"partition={partition!r} is not a Kafka partition",
            "Give an int from 0, or None",
            index=index,
        )
    return Extra(
        serialize_headers(record.headers, index),
        -1 if partition is None else partition,
        _timestamp(record.timestamp, index),
    )


def _timestamp(timestamp: object, index: int | None) -> int:
    if timestamp is None:
        return 0
    if isinstance(timestamp, dt.datetime) and timestamp.tzinfo is not None:
        timestamp = round(timestamp.timestamp() * 1000)
    if isinstance(timestamp, bool) or not isinstance(timestamp, int) or not 0 < timestamp < 2**63:
        raise InvalidRecordError(
            record_name(index),
            f"timestamp={timestamp!r} is not a Kafka timestamp",
            "Give milliseconds since the epoch as an int, or a datetime with a time zone, after 1970 began",
            index=index,
        )
    return timestamp
