"""Records as what the annotation of an input asks for."""

import collections
import dataclasses
import datetime as dt
import decimal
import functools
import itertools
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson
import pydantic

from dataforge_kafka_dagster.kafka.avro_check import is_exact
from dataforge_kafka_dagster.kafka.errors import KafkaError
from dataforge_kafka_dagster.kafka.models import KNOWS_NAMES, config_of, is_model, writes_aliases
from dataforge_kafka_dagster.kafka.reader import ReadRecord
from dataforge_kafka_dagster.kafka.records import KafkaRecord
from dataforge_kafka_dagster.kafka.schemas import SCHEMA_FORMATS
from dataforge_kafka_dagster.kafka.serialization import ValueFormat, deserialize, to_json


def form_of_each(form: Any) -> Any:
    """The form of each Dagster partition's records, if an input wants them by partition key; else None.

    That is a mapping to frames or to lists of rows. One to lists of anything else is a record.
    """
    form, _ = _without_none(form)
    if not _is_mapping(form) or len(arguments := typing.get_args(form)) != 2:  # noqa: PLR2004
        return None
    of_each = arguments[1]
    items = typing.get_args(of_each) if typing.get_origin(of_each) is list else ()
    of_rows = any(_is_mapping(item) or _is_model(item) for item in items)
    return of_each if of_rows or _library(of_each) else None


def _is_mapping(form: Any) -> bool:
    origin = typing.get_origin(form) or form
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _without_none(form: Any) -> tuple[Any, bool]:
    """An annotation without ``| None``, and whether it had that."""
    arguments = [argument for argument in typing.get_args(form) if argument is not types.NoneType]
    optional = typing.get_origin(form) in {typing.Union, types.UnionType} and len(arguments) == 1
    return (arguments[0], True) if optional else (form, False)


def _library(form: Any) -> str | None:
    """The library of the data frame that an annotation names, if it does."""
    library = getattr(typing.get_origin(form) or form, "__module__", "").partition(".")[0]
    return library if library in {"polars", "pandas", "pyarrow"} else None


def in_form(form: Any, records: Iterable[tuple[ReadRecord, ValueFormat | None]]) -> Any:
    """Records as what an input's annotation asks for; frames are imported only if it names one.

    Args:
        form: The annotation, as `KafkaIOManager.load_input` says.
        records: Each with the format of its value, which is decoded if a schema does that.

    Raises:
        KafkaError: They do not fit it.
    """
    form, optional = _without_none(form)
    origin, arguments = typing.get_origin(form) or form, typing.get_args(form)
    single = _is_mapping(form) or _is_model(origin) or (isinstance(origin, type) and issubclass(origin, (str, bytes)))
    item: Any = form if single else _without_none(arguments[0])[0] if len(arguments) == 1 else None
    if item is not KafkaRecord:
        records = ((record, value_format) for record, value_format in records if record.value is not None)
    if _library(form):
        return _frame(origin, records)
    values: list[Any]
    if item is KafkaRecord:
        values = [_as_kafka_record(record, value_format) for record, value_format in records]
    elif _classes(item):
        values = _models(item, records)
    else:
        values = [_value(record, value_format) for record, value_format in records]
    if not single:
        return values
    if optional and not values:
        return None
    if len(values) != 1:
        raise KafkaError(
            f"input annotated {origin.__qualname__}",
            f"its upstream output has {len(values)} records",
            "Annotate it as a list or a data frame; as dict[str, list[dict]] for those of each Dagster partition",
        )
    return values[0]


def _is_model(form: Any) -> bool:
    """Whether an annotation is a class that values are checked against: a pydantic model or a dataclass."""
    return isinstance(form, type) and is_model(form)


def _models(form: Any, records: Iterable[tuple[ReadRecord, ValueFormat | None]]) -> list[Any]:
    """The values as objects of a pydantic model or dataclass, or mappings that have some."""
    culprit = f"input annotated with {form.__qualname__ if isinstance(form, type) else form}"
    names = functools.cache(lambda by_config: _names_of(form, culprit, by_config=by_config))
    try:
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(form)
    except (pydantic.PydanticUserError, NameError) as error:
        cause = f"pydantic cannot check its fields: {str(error).partition(chr(10))[0]}"
        raise KafkaError(culprit, cause, "Annotate it as a list or dict") from error
    made = []
    for record, value_format in records:
        # Avro and Protobuf go by the fields' own names.
        options = names(value_format not in {"avro", "protobuf"})
        try:
            if value_format == "json":
                made.append(adapter.validate_json(record.value, **options))
            elif value_format == "json_schema":
                made.append(adapter.validate_json(to_json(record.value), **options))
            else:
                # What Avro and Protobuf have for a UUID, a tuple and the like is no strict model's.
                made.append(adapter.validate_python(_value(record, value_format), strict=False, **options))
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise KafkaError(
                f"{culprit}, record at offset {record.message.offset()} of Kafka partition {record.message.partition()}"
                + (f", field {place!r}" if place else ""),
                first["msg"],
                "Annotate it with the class that was published, or as a list or dict",
            ) from error
    return made


def _names_of(form: Any, culprit: str, *, by_config: bool) -> dict[str, Any]:
    """The options by which pydantic reads classes by the names that they are written with.

    Args:
        form: The annotation that has them.
        culprit: What an error names.
        by_config: Whether a class itself says if aliases are written.

    Raises:
        KafkaError: A field would come back as its default.
    """
    classes = _classes(form)
    by_alias = by_config and writes_aliases(classes[0])
    # Where the classes inside differ, both names are read.
    ways = ((by_alias, not by_alias), (True, True)) if KNOWS_NAMES else ((True, False),)
    lost: set[str] = set()
    for way in ways:
        lost = {field for cls in classes for field in _lost(cls, *way, by_config=by_config)}
        if not lost:
            return {"by_alias": way[0], "by_name": way[1]} if KNOWS_NAMES else {}
    raise KafkaError(
        culprit,
        f"its field {min(lost)!r} is written by a name that it is not read by, or not taken by its constructor",
        "Annotate it as a list or dict, and make its objects from that",
    )


def _classes(form: Any, found: tuple[type, ...] = ()) -> tuple[type, ...]:
    """The models and dataclasses in an annotation, and in their fields'."""
    for part in typing.get_args(form):
        found = _classes(part, found)
    form = typing.get_origin(form) or form
    if not _is_model(form) or form in found:
        return found
    found = (*found, form)
    fields = _fields(form)
    if fields is None:
        try:
            annotations = list(typing.get_type_hints(form).values())
        except Exception:  # noqa: BLE001  (pydantic tells)
            annotations = []
    else:
        annotations = [field.annotation for field in fields.values()]
    for annotation in annotations:
        found = _classes(annotation, found)
    return found


def _fields(cls: type) -> dict[str, Any] | None:
    """The fields of a class of pydantic's; None of a dataclass."""
    return getattr(cls, "__pydantic_fields__", getattr(cls, "model_fields", None))


def _lost(cls: type, by_alias: bool, by_name: bool, *, by_config: bool) -> set[str]:
    """The fields of a class that would come back as their default, or as another's."""
    fields = _fields(cls)
    if fields is None:
        return {field.name for field in dataclasses.fields(cls) if not field.init}
    if not KNOWS_NAMES:
        by_name = bool(config_of(cls).get("populate_by_name"))
    written_by_alias = by_config and writes_aliases(cls)
    lost = set()
    for name, field in fields.items():
        written = (field.serialization_alias or name) if written_by_alias else name
        read = {name} if by_name else set()
        if by_alias:
            read.add(field.validation_alias or name)
        others = fields.keys() - {name} if by_alias and by_name else set()
        if written not in read or not others.isdisjoint(one for one in read if isinstance(one, str)):
            lost.add(name)
    return lost


def _value(record: ReadRecord, value_format: ValueFormat | None) -> Any:
    return record.value if value_format in SCHEMA_FORMATS else deserialize(record.value, value_format or "bytes")


def _as_kafka_record(record: ReadRecord, value_format: ValueFormat | None) -> KafkaRecord:
    message = record.message
    _, timestamp = message.timestamp()
    value = _value(record, value_format)
    return KafkaRecord(value, record.key, message.headers(), message.partition(), timestamp)


def _frame(cls: type, records: Iterable[tuple[ReadRecord, ValueFormat | None]]) -> Any:
    """A frame of the values."""
    library = cls.__module__.partition(".")[0]
    lines = []
    for record, value_format in records:
        if value_format not in {None, "json", *SCHEMA_FORMATS}:
            raise KafkaError(
                f"input annotated as a {library} frame",
                f"its upstream output was published as {value_format}",
                "Annotate it as a list",
            )
        lines.append(record.value)
    frame = frame_of(library, lines)
    return frame.lazy() if cls.__name__ == "LazyFrame" else frame


def frame_of(library: str, lines: Sequence[Any]) -> Any:
    """The frame of values: of their JSON, or as a schema has decoded them.

    Raises:
        KafkaError: They do not fit into one of this library.
    """
    decoded = not all(isinstance(line, bytes) for line in lines)
    try:
        if decoded:  # some perhaps from before there was a schema
            lines = [deserialize(line, "json") if isinstance(line, bytes) else line for line in lines]
        if library == "polars":
            return _polars_frame(lines, decoded=decoded)
        rows = lines if decoded else [deserialize(line, "json") for line in lines]
        return _pandas_frame(rows) if library == "pandas" else _arrow_table(rows)
    except Exception as error:
        raise KafkaError(
            f"input annotated as a {library} frame",
            f"its records do not fit into one: {str(error).partition(chr(10))[0]}",
            "Annotate it as a list",
        ) from error


def _polars_frame(lines: Sequence[Any], *, decoded: bool) -> Any:
    import polars as pl  # noqa: PLC0415  (optional, and slow to import)

    if decoded:
        for name in dict.fromkeys(itertools.chain.from_iterable(lines)) if isinstance(lines[0], dict) else ():
            _refuse_mixed(name, [row.get(name) for row in lines])
        return pl.DataFrame(lines, infer_schema_length=None)
    if not lines:
        return pl.DataFrame()
    frame = pl.read_ndjson(b"\n".join(lines), infer_schema_length=None)
    suspects = [
        series.name
        for series in frame
        if series.dtype.is_nested() or (series.dtype == pl.Float64 and (series.abs() >= _EXACT).any())
    ]
    if suspects:
        rows = [deserialize(line, "json") for line in lines]
        for name in suspects:
            _refuse_mixed(name, [row.get(name) for row in rows])
    # polars makes text of all else in a column that has text.
    for series in frame.select(pl.col(pl.String)):
        # A column's own name may look like a pattern to polars.
        if series.alias("it").str.contains(_OF_NO_TEXT).any():
            no_text = re.compile(re.escape(orjson.dumps(series.name)) + rb':[^"n]')
            for row in (deserialize(line, "json") for line in lines if no_text.search(line)):
                _refuse_mixed(series.name, ["", row.get(series.name)])
    return frame


# What polars writes for a number, boolean, list or object.
_OF_NO_TEXT: Final = r"^(?:[\[{]|(?:-?[0-9.]+(?:e-?[0-9]+)?|true|false)$)"


# Beyond it, not every whole number is a float.
_EXACT: Final = 2**53


def _refuse_mixed(name: str, values: Sequence[Any]) -> None:
    """Refuse a column whose values no column has together: of several types, or whole numbers that floats round."""
    kinds = set(map(type, values)) - {types.NoneType}
    found = sorted(kind.__name__ for kind in kinds)
    if kinds == {dt.datetime}:
        found = sorted({"datetime" if value.tzinfo else "datetime without a time zone" for value in values if value})
    elif kinds == {int, float}:
        big = next(
            (value for value in values if type(value) is int and abs(value) > _EXACT and not is_exact(value, "d")), None
        )
        found = [] if big is None else ["float", f"{big}, which as one is another number"]
    elif kinds == {int, decimal.Decimal}:
        found = []
    if len(found) > 1:
        raise ValueError(f"column {name!r} has {' and '.join(found)}")
    if kinds == {list}:
        _refuse_mixed(name, [item for value in values for item in value or ()])
    elif kinds == {dict}:
        by_key = collections.defaultdict(list)
        for key, item in itertools.chain.from_iterable(value.items() for value in values if value is not None):
            by_key[key].append(item)
        for key, items in by_key.items():
            _refuse_mixed(f"{name}.{key}", items)


def _pandas_frame(rows: Sequence[Any]) -> Any:
    import pandas as pd  # noqa: PLC0415

    frame = pd.DataFrame(rows)
    if rows and isinstance(rows[0], dict):
        for name in frame.columns[[dtype.kind == "f" for dtype in frame.dtypes]]:
            if (frame[name].abs() >= _EXACT).any():
                _refuse_mixed(name, [row.get(name) for row in rows])
            if (exact := _exact_integers(rows, frame[name])) is not None:
                frame[name] = exact
    return frame


def _arrow_table(rows: Sequence[Any]) -> Any:
    import pyarrow as pa  # noqa: PLC0415

    # Table.from_pylist takes the columns of the first row only.
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    if not names:
        return pa.Table.from_struct_array(pa.array(rows, pa.struct([])))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        _refuse_mixed(name, values)  # a boolean would be a number, a datetime a date
        try:
            column = pa.array(values)
        except OverflowError:
            column = pa.array(values, pa.uint64())
        columns[name] = column
    return pa.table(columns)


def _exact_integers(rows: Sequence[Any], column: Any) -> Any:
    """An array for a column of integers and gaps that pandas has rounded to floats; None for one of other values."""
    import numpy as np  # noqa: PLC0415
    import pandas as pd  # noqa: PLC0415

    name = column.name
    if type(next((value for row in rows if (value := row.get(name)) is not None), None)) is not int:
        return None
    values = [row.get(name) for row in rows]
    if not set(map(type, values)) <= {int, types.NoneType}:
        return None
    filled = [value or 0 for value in values]
    low, high = min(filled), max(filled)
    if low < (0 if high >= 2**63 else -(2**63)) or high >= 2**64:
        return pd.array(values, dtype=object)
    exact = np.array(filled, dtype="int64" if high < 2**63 else "uint64")
    return pd.arrays.IntegerArray(exact, column.isna().to_numpy())
