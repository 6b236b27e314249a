"""Rows of data frames to chunks of encoded records: whole columns at once where polars can, else row by row.

Both ways give the same bytes, but for a time of day in Arrow's nanoseconds: Python's ends at microseconds. Missing
values (None, NaN, NaT, NA) are null. polars is used if it is installed; pandas and pyarrow frames reach it by slices.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import narwhals as nw

from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.records import Chunk, key_of, list_hint
from dataforge_kafka_dagster.kafka.serialization import (
    DEFAULT_ENCODERS,
    STANDARD_TIME,
    Encoders,
    is_missing,
    is_nan,
    json_lines,
    no_json_form,
    refuse_infinite,
    serialize_key,
    text_size,
    to_json,
)

if TYPE_CHECKING:
    import polars as pl

# Kinds of numpy's data types whose pandas columns polars takes as they are; "O" (object) is looked into.
_NUMPY_KINDS: Final = "biufM"
_EXACT_POLARS: Final = (2, 1)
# Records of which Python has the texts at a time.
_PIECE: Final = 1_024


def open_frame(native: Any, fields: Sequence[str]) -> nw.DataFrame[Any] | None:
    """A data frame whose rows can be published; None if it is no data frame.

    Raises:
        InvalidRecordError: It cannot be read, a column's name is not a str, or a key column is missing.
    """
    if not nw.dependencies.is_into_dataframe(native):
        return None
    try:
        frame: nw.DataFrame[Any] = nw.from_native(native, eager_only=True)
        columns = frame.columns
    except Exception as error:
        raise InvalidRecordError(
            f"data frame of type {type(native).__module__}.{type(native).__qualname__}",
            f"it cannot be read: {error}",
            "Give it unique column names that are all str",
        ) from error
    index = "; its index is none of them, reset_index() makes it one" if frame.implementation.is_pandas() else ""
    for name in (*(fields if columns or len(frame) else ()), *columns):
        if not isinstance(name, str):
            raise InvalidRecordError(
                f"data frame, column {name!r}",
                "its name is not a str",
                "Rename it, as by frame.columns = frame.columns.map(str)",
                field=str(name),
            )
        if name not in columns:
            raise InvalidRecordError(
                f"data frame, column {name!r}",
                "the key column is missing",
                f"Its columns are {', '.join(map(repr, columns[:30]))}{index}{list_hint(name)}",
                field=name,
            )
    if not columns and len(frame):
        raise InvalidRecordError(f"data frame of {len(frame)} rows", "it has no columns", f"Give it columns{index}")
    return frame


class Columns(NamedTuple):
    """Rows of a frame, encoded by column and not yet in Python.

    Attributes:
        texts: The JSON of each, as binary: a str of Python would be encoded again.
        keys: As many, or None if no record has a key.
        size: Bytes of all texts and keys.
    """

    texts: pl.Series
    keys: list[Any] | None
    size: int


def in_pieces(found: Chunk | Columns) -> Iterator[Chunk]:
    """Chunks whose texts are still in the processor's cache when librdkafka copies them."""
    if isinstance(found, Chunk):
        yield found
        return
    texts, keys, _ = found
    sizes = texts.bin.size()
    for i in range(0, len(texts), _PIECE):
        part = slice(i, i + _PIECE)
        some_keys = None if keys is None else keys[part]
        size = int(sizes[part].sum()) + text_size(some_keys)
        yield Chunk(texts[part].to_list(), some_keys, None, size, "json")


class FrameEncoder:
    """Encodes slices of one frame.

    Args:
        fields: Columns that make a record's key.
        encoders: How values and keys become bytes.
    """

    def __init__(self, fields: tuple[str, ...], encoders: Encoders) -> None:
        self._fields = fields
        self._encoders = encoders

    def __call__(self, rows: nw.DataFrame[Any], start: int) -> Chunk | Columns:
        """The rows, encoded; for `in_pieces`.

        Args:
            rows: A slice of the frame.
            start: Position of its first row.

        Raises:
            InvalidRecordError: A value or key cannot be published.
        """
        encoders, fields = self._encoders, self._fields
        chunk: Chunk | Columns | None = None
        if not (encoders.value or encoders.key):
            try:
                chunk = self._by_polars(rows.to_native(), start)
            except BaseException as error:
                if not _is_of_value(error):
                    raise
        if chunk is not None:
            return chunk
        if not fields:
            keys: Sequence[dict[str, Any]] = ()
        elif encoders.key:
            keys = _rows_of(rows[list(fields)], encoders.key_rows, start)
        else:
            keys = _rows_of(rows[list(fields)], _plain_rows, start)
        return self._by_row(_rows_of(rows, encoders.rows if encoders.value else _plain_rows, start), start, keys)

    def _by_polars(self, native: Any, start: int) -> Chunk | Columns | None:
        """The rows, encoded from a frame in polars; None where it could come out otherwise than row by row."""
        frame = _in_polars(native)
        if frame is None:
            return None
        frame = _without_times(frame)
        plain = _plain_types(frame) if _json_is_exact() else None
        if plain is None:
            return self._by_row(_rows_of(frame, DEFAULT_ENCODERS.rows, start), start)
        return self._by_column(plain, start)

    def _by_column(self, frame: pl.DataFrame, start: int) -> Columns:
        if any(map(_has_infinity, frame)):
            for i, row in enumerate(frame.rows(named=True), start):
                refuse_infinite(row, i)
        values = _json_of(frame)
        size = int(values.bin.size().sum())
        if not self._fields:
            return Columns(values, None, size)
        if len(self._fields) > 1:
            keys = _json_of(frame[list(self._fields)]).to_list()
        else:
            keys = self._keys(frame.get_column(self._fields[0]), start)
        return Columns(values, keys, size + text_size(keys))

    def _keys(self, series: pl.Series, start: int) -> list[Any]:
        import polars as pl  # noqa: PLC0415  (optional, and slow to import)

        # A decimal of Python's, made of one with more than 38 digits, as DuckDB has some, would be rounded.
        texts = (pl.String, pl.Date, pl.Decimal, pl.Categorical, pl.Enum)
        if series.dtype.is_integer() or isinstance(series.dtype, texts):
            return series.cast(pl.String).to_list()  # type: ignore[no-any-return]
        return [self._key(value, start + i, series.name) for i, value in enumerate(series.to_list())]

    def _by_row(self, rows: Sequence[dict[str, Any]], start: int, key_rows: Sequence[dict[str, Any]] = ()) -> Chunk:
        encoders, fields = self._encoders, self._fields
        values: Sequence[bytes | str | None]
        if encoders.value:
            values = encoders.value(rows, start)
            size = text_size(values)
        else:
            values, size = self._values(rows, start)
        keys: list[Any] | None = None
        if fields and encoders.key:
            keys = encoders.key([key_of(row, fields) for row in key_rows], start)
        elif len(fields) == 1:
            keys = [self._key(row[fields[0]], start + i, fields[0]) for i, row in enumerate(key_rows or rows)]
        elif fields:
            keys, _ = self._values([key_of(row, fields) for row in key_rows or rows], start)
        return Chunk(values, keys, None, size + text_size(keys), encoders.form or "json")

    @staticmethod
    def _values(rows: Sequence[dict[str, Any]], start: int) -> tuple[list[bytes], int]:
        """The bytes of each value, and their size together."""
        try:
            lines = json_lines(rows)
        except (TypeError, ValueError):
            for i, row in enumerate(rows, start):
                try:
                    to_json(row)
                except (TypeError, ValueError) as error:
                    raise no_json_form(row, i, error) from error
                refuse_infinite(row, i)
            raise
        for i in lines.with_null:
            refuse_infinite(rows[i], start + i)
        return lines.texts, lines.size

    @staticmethod
    def _key(value: Any, index: int, field: str) -> bytes | None:
        if type(value) is str:
            return value.encode()
        return None if is_missing(value) or is_nan(value) else serialize_key(value, index, field)


def row_of(frame: nw.DataFrame[Any]) -> dict[str, Any]:
    """A frame's only row; in place of a value that cannot be read, why."""
    try:
        return frame.rows(named=True)[0]
    except BaseException as error:
        if not _is_of_value(error):
            raise

    def read(name: str) -> Any:
        return frame.get_column(name).to_list()[0]

    return {name: f"<{wrong}>" if (wrong := _error_of(read, name)) else read(name) for name in frame.columns}


def _rows_of(frame: Any, read: Callable[[Any], Sequence[dict[str, Any]]], start: int) -> Sequence[dict[str, Any]]:
    """A frame's rows as Python's objects.

    Raises:
        InvalidRecordError: A value has none: a date that Python does not have, or a struct that has a name twice.
    """
    try:
        return read(frame)
    except BaseException as error:
        if not _is_of_value(error):
            raise
        names = [name for name in frame.columns if _error_of(read, frame[[name]])]
        for i in range(len(frame)):
            for name in names:
                if found := _error_of(read, frame[[name]][i : i + 1]):
                    raise InvalidRecordError(
                        f"record {start + i}, field {name!r}",
                        f"Python cannot read it: {found}",
                        "Replace it by None, or make the column text",
                        index=start + i,
                        field=name,
                    ) from error
        raise


def _plain_rows(frame: nw.DataFrame[Any]) -> Sequence[dict[str, Any]]:
    """A frame's rows as they are without a schema: with the digits of a time that Python's would not have."""
    native = _in_polars(frame.to_native())
    return frame.rows(named=True) if native is None else _without_times(native).rows(named=True)


def _error_of(read: Callable[[Any], Any], values: Any) -> BaseException | None:
    """Why values cannot be read as Python's objects, if they cannot."""
    try:
        read(values)
    except BaseException as error:
        if not _is_of_value(error):
            raise
        return error
    return None


def _is_of_value(error: BaseException) -> bool:
    """Whether a value may be at fault that no library can convert, and nobody has said which."""
    if isinstance(error, InvalidRecordError):
        return False
    # polars' panic is no Exception, and cannot be imported.
    return isinstance(error, (ValueError, ArithmeticError)) or type(error).__name__ == "PanicException"


def _in_polars(native: Any) -> pl.DataFrame | None:
    """The frame in polars; None where its values could come out otherwise than from Python's own objects."""
    library = type(native).__module__.partition(".")[0]
    if library == "polars":
        return native  # type: ignore[no-any-return]
    if not _has_polars():
        return None
    import polars as pl  # noqa: PLC0415  (optional, and slow to import)

    try:
        if library == "pandas" and all(map(_is_plain_pandas, native.dtypes)):
            # An object column may hold anything: only text and booleans are the same in polars, and bytes become text.
            from pandas.api.types import infer_dtype  # noqa: PLC0415  (slow to import)

            for name, dtype in native.dtypes.items():
                if str(dtype) == "object" and infer_dtype(native[name]) not in {"string", "boolean", "empty"}:
                    return None
            return pl.from_pandas(native)
        if library == "pyarrow" and not any(field.name == "" or _is_odd_arrow(field.type) for field in native.schema):
            return pl.DataFrame(pl.from_arrow(_in_milliseconds(native)))
    except Exception:  # noqa: BLE001  (whatever it cannot take goes row by row)
        return None
    return None


@functools.cache
def _json_is_exact() -> bool:
    """Whether this polars writes JSON as it should.

    Before 2.0 it loses values of arrays, before 1.37 of decimals; 2.0 mixes null and the struct of nulls inside arrays.
    """
    return tuple(map(int, importlib.import_module("polars").__version__.split(".")[:2])) >= _EXACT_POLARS


@functools.cache
def _has_polars() -> bool:
    return importlib.util.find_spec("polars") is not None


def _is_plain_pandas(dtype: Any) -> bool:
    return getattr(dtype, "kind", "") in _NUMPY_KINDS or type(dtype).__name__ in {
        "StringDtype",
        "BooleanDtype",
        "DatetimeTZDtype",
        *(f"{sign}Int{bits}Dtype".replace("uI", "UI") for sign in ("", "u") for bits in (8, 16, 32, 64)),
    } or str(dtype) == "object"  # fmt: skip


def _is_odd_arrow(dtype: Any) -> bool:
    """Whether pyarrow's Python object for a value of this type says something else than polars' does."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.types as kinds  # noqa: PLC0415

    return bool(
        isinstance(dtype, pa.BaseExtensionType)
        or kinds.is_map(dtype)
        or kinds.is_decimal256(dtype)
        or kinds.is_date64(dtype)
        or kinds.is_union(dtype)
        or (kinds.is_struct(dtype) and len({dtype.field(i).name for i in range(dtype.num_fields)}) < dtype.num_fields)
        or (kinds.is_nested(dtype) and any(_is_odd_arrow(dtype.field(i).type) for i in range(dtype.num_fields)))
        or (
            kinds.is_dictionary(dtype)
            and not (kinds.is_string(dtype.value_type) or kinds.is_large_string(dtype.value_type))
        )
    )


def _in_milliseconds(table: Any) -> Any:
    """A table without seconds, which polars multiplies whatever comes out; pyarrow refuses what is too much."""
    import pyarrow as pa  # noqa: PLC0415

    for i, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "s":
            finer = table.column(i).cast(pa.timestamp("ms", field.type.tz))
            table = table.set_column(i, field.name, finer)
    return table


def _without_times(frame: pl.DataFrame) -> pl.DataFrame:
    """Datetimes and times as ISO 8601 text: with as many digits of a second as they need, of 0, 6 and 9."""
    import polars as pl  # noqa: PLC0415  (optional, and slow to import)

    texts = []
    for column in frame:
        dtype = column.dtype
        # A column's own name, and a field's below, may look like a pattern to polars.
        series = column.alias("it")
        early = _has_early(series)
        if isinstance(dtype, (pl.Datetime, pl.Time)) and not early:
            seconds, *finer = _time_formats(dtype)
            fraction = series.dt.nanosecond()
            text = series.dt.to_string(seconds)
            for form, needs in zip(finer, (fraction != 0, fraction % 1000 != 0), strict=True):
                if needs.any():
                    text = text.zip_with(~needs.fill_null(value=False), series.dt.to_string(form))
            texts.append(text.alias(column.name))
        elif _has_times(dtype):
            text = series.to_frame().select(_time_texts(pl.col("it"), dtype, early=early).alias("it")).to_series()
            texts.append(text.alias(column.name))
    return frame.with_columns(texts) if texts else frame


def _has_early(series: pl.Series) -> bool:
    """Whether a moment is so early that its offset from UTC may have seconds, which its text would round."""
    import polars as pl  # noqa: PLC0415  (optional, and slow to import)

    dtype = series.dtype
    series = series.alias("it")  # as in `_without_times`
    if isinstance(dtype, (pl.List, pl.Array)):
        return _has_times(dtype.inner) and _has_early(series.explode())
    if isinstance(dtype, pl.Struct):
        return any(map(_has_early, series.struct.unnest()))
    if not isinstance(dtype, pl.Datetime) or not dtype.time_zone:
        return False
    first: Any = series.to_physical().min()
    return first is not None and first < STANDARD_TIME.timestamp() * {"ms": 1e3, "us": 1e6, "ns": 1e9}[dtype.time_unit]


def _time_formats(dtype: Any) -> tuple[str, str, str]:
    import polars as pl  # noqa: PLC0415  (optional, and slow to import)

    date = "" if isinstance(dtype, pl.Time) else "%Y-%m-%dT"
    zone = "%:z" if isinstance(dtype, pl.Datetime) and dtype.time_zone else ""
    return f"{date}%H:%M:%S{zone}", f"{date}%H:%M:%S%.6f{zone}", f"{date}%H:%M:%S%.9f{zone}"


def _has_times(dtype: Any) -> bool:
    import polars as pl  # noqa: PLC0415  (optional, and slow to import)

    if isinstance(dtype, (pl.List, pl.Array)):
        return _has_times(dtype.inner)
    if isinstance(dtype, pl.Struct):
        return any(_has_times(field.dtype) for field in dtype.fields)
    return isinstance(dtype, (pl.Datetime, pl.Time))


def _time_texts(value: pl.Expr, dtype: Any, *, early: bool) -> pl.Expr:
    """A value, perhaps nested, as `_without_times` writes it: polars' Python objects would end at microseconds.

    What is early is written in UTC where its offset from it has seconds.
    """
    import polars as pl  # noqa: PLC0415  (optional, and slow to import)

    if not _has_times(dtype):
        return value
    if isinstance(dtype, pl.Array):
        value, dtype = value.arr.to_list(), pl.List(dtype.inner)
    if isinstance(dtype, pl.List):
        return value.list.eval(_time_texts(pl.element(), dtype.inner, early=early))
    if isinstance(dtype, pl.Struct):
        numbers = [str(i) for i in range(len(dtype.fields))]
        plain = value.struct.rename_fields(numbers)
        parts = [
            _time_texts(plain.struct.field(number), field.dtype, early=early).alias(number)
            for number, field in zip(numbers, dtype.fields, strict=True)
        ]
        named = pl.struct(parts).struct.rename_fields([field.name for field in dtype.fields])
        return pl.when(value.is_not_null()).then(named)
    seconds, micros, nanos = map(value.dt.to_string, _time_formats(dtype))
    fraction = value.dt.nanosecond()
    text = pl.when(fraction % 1000 != 0).then(nanos).when(fraction != 0).then(micros).otherwise(seconds)
    if early and isinstance(dtype, pl.Datetime) and dtype.time_zone:
        offset = (value.dt.base_utc_offset() + value.dt.dst_offset()).dt.total_seconds()
        in_utc = _time_texts(value.dt.convert_time_zone("UTC"), dtype, early=False)
        return pl.when(offset % 60 != 0).then(in_utc).otherwise(text)
    return text


def _plain_types(frame: pl.DataFrame) -> pl.DataFrame | None:
    """The frame with types that polars writes as JSON as Python does; None if a column has none."""
    casts = []
    for series in frame:
        plain = _plain_type(series.dtype)
        if plain is None:
            return None
        if plain != series.dtype:
            casts.append(series.cast(plain))
    return frame.with_columns(casts) if casts else frame


def _plain_type(dtype: pl.DataType) -> pl.DataType | None:
    import polars as pl  # noqa: PLC0415  (optional, and slow to import)

    if isinstance(dtype, pl.Float32):
        return pl.Float64()
    if isinstance(dtype, (pl.List, pl.Array)):
        inner = _plain_type(dtype.inner)  # type: ignore[arg-type]
        if inner is None:
            return None
        return pl.List(inner) if isinstance(dtype, pl.List) else pl.Array(inner, dtype.size)
    if isinstance(dtype, pl.Struct):
        fields = [(field.name, _plain_type(field.dtype)) for field in dtype.fields]  # type: ignore[arg-type]
        return None if any(plain is None for _, plain in fields) else pl.Struct(dict(fields))  # type: ignore[arg-type]
    numbers = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64, pl.Float64)
    others = (pl.String, pl.Boolean, pl.Date, pl.Decimal, pl.Categorical, pl.Enum, pl.Null)
    return dtype if isinstance(dtype, (*numbers, *others)) else None


def _has_infinity(series: pl.Series) -> bool:
    import polars as pl  # noqa: PLC0415  (optional, and slow to import)

    dtype = series.dtype
    series = series.alias("it")  # as in `_without_times`
    if isinstance(dtype, pl.Float64):
        return bool(series.is_infinite().any())
    if isinstance(dtype, (pl.List, pl.Array)):
        return dtype.inner.is_nested() | dtype.inner.is_float() and _has_infinity(series.explode())
    return isinstance(dtype, pl.Struct) and any(map(_has_infinity, series.struct.unnest()))


def _json_of(frame: pl.DataFrame) -> pl.Series:
    import polars as pl  # noqa: PLC0415  (optional, and slow to import)

    return frame.select(pl.struct(pl.all()).struct.json_encode().cast(pl.Binary)).to_series().alias("json")
