"""Outputs that are read bit by bit: files, queries and Arrow streams, none of them held whole.

The libraries are imported for objects of their types only. ADBC, ibis and others speak Arrow's stream interface, and
need nothing of their own here: https://arrow.apache.org/docs/format/CDataInterface/PyCapsuleInterface.html.
"""

from __future__ import annotations

import gzip
import importlib
import json
import re
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from dataforge_kafka_dagster.kafka.errors import InvalidRecordError

_ROWS: Final = 10_000
_FILES: Final = (".ndjson", ".jsonl", ".csv", ".parquet")
_GZIP: Final = ".gz"
_LEAST_POLARS: Final = (1, 37)


class Stream(NamedTuple):
    """The parts of an output, in order.

    Attributes:
        parts: Data frames of some thousand rows, or single rows: a generator, whose `close` ends the reading.
        of_frames: Which of both.
    """

    parts: Generator[Any, None, None]
    of_frames: bool


def open_stream(output: Any) -> Stream | None:
    """An output as a stream, if it is one: reading begins with the first part.

    Args:
        output: A `pathlib.Path` to NDJSON (.ndjson, .jsonl), CSV or Parquet, the text formats also with .gz; a polars
            LazyFrame; a DuckDB relation; a pyarrow RecordBatch, RecordBatchReader or Dataset; or what else speaks
            Arrow's stream interface.

    Returns:
        None for any other output.

    Raises:
        InvalidRecordError: There is no such file, its name says nothing of its format, or a library is missing.
    """
    if isinstance(output, Path):
        return _open_file(output)
    library, name = type(output).__module__.partition(".")[0], type(output).__name__
    if library == "polars" and name == "LazyFrame":
        return Stream(_lazy_frame(output), of_frames=True)
    if library == "pyarrow" and name == "RecordBatch":
        return Stream(_tables([output]), of_frames=True)
    if library == "pyarrow" and hasattr(output, "to_batches") and hasattr(output, "scanner"):
        batches = output.to_batches(batch_size=_ROWS, batch_readahead=2, fragment_readahead=1)
        return Stream(_tables(batches), of_frames=True)
    if library == "duckdb":
        output = _without_uhugeint(output)
        # Its Arrow stream has batches of a million rows.
        read = getattr(output, "to_arrow_reader", None) or getattr(output, "fetch_arrow_reader", None)
        if read is not None:
            return Stream(_tables(_call(read, "DuckDB relation")), of_frames=True)
    if library == "pyarrow" and name == "RecordBatchReader":
        return Stream(_tables(output), of_frames=True)
    # Frames and series of these libraries speak it too, but are no streams.
    if hasattr(output, "__arrow_c_stream__") and library not in {"pyarrow", "polars", "pandas"}:
        pa = _library("pyarrow", f"output of type {type(output).__qualname__}")
        return Stream(_tables(pa.RecordBatchReader.from_stream(output)), of_frames=True)
    return None


def _without_uhugeint(relation: Any) -> Any:
    """A DuckDB relation whose columns of UHUGEINT are text.

    It gives Arrow the 128 bits of their numbers for those of a decimal, of which a half is negative.
    """
    types = [str(dtype) for dtype in getattr(relation, "types", ())]
    if "UHUGEINT" not in types:
        return relation
    columns = []
    # By their places: names may differ by case alone.
    for number, (name, dtype) in enumerate(zip(relation.columns, types, strict=True), 1):
        cast, quoted = "::VARCHAR" if dtype == "UHUGEINT" else "", name.replace('"', '""')
        columns.append(f'#{number}{cast} as "{quoted}"')
    return relation.project(", ".join(columns))


def _call(read: Callable[[int], Any], name: str) -> Any:
    _library("pyarrow", name)
    return read(_ROWS)


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InvalidRecordError(
            what, f"{package} is needed to read it: {error}", f"Install it with: pip install {package}"
        ) from error


def _lazy_frame(frame: Any) -> Generator[Any, None, None]:
    # Before 1.37 the batches of a query that fails just end, as if there were no more.
    found = importlib.import_module("polars").__version__  # its package may have another name, as polars-lts-cpu
    if tuple(map(int, found.split(".")[:2])) < _LEAST_POLARS:
        raise InvalidRecordError(
            "polars LazyFrame", f"polars {found} cannot give it bit by bit", "Use polars 1.37 or later, or collect() it"
        )
    yield from frame.collect_batches(chunk_size=_ROWS, lazy=True)


def _tables(batches: Any) -> Generator[Any, None, None]:
    pa = importlib.import_module("pyarrow")
    try:
        for batch in batches:
            yield pa.Table.from_batches([batch])
    finally:
        # A database's connection is taken by its reader, which an error on its way keeps alive.
        getattr(batches, "close", int)()


def format_of_file(path: Path) -> tuple[str, bool]:
    """What a file's name says is in it: one of ``.ndjson .jsonl .csv .parquet``, and whether it is compressed.

    Raises:
        InvalidRecordError: It says nothing.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] == [_GZIP]
    kind = suffixes[-2 if compressed else -1] if len(suffixes) > compressed else ""
    if kind not in _FILES or (compressed and kind == ".parquet"):
        raise InvalidRecordError(
            f"file {str(path)!r}",
            "its name does not say what is in it",
            f"Give a path that ends with {', '.join(_FILES)}; the text formats also with {_GZIP}",
        )
    return kind, compressed


def _open_file(path: Path) -> Stream:
    kind, compressed = format_of_file(path)
    if not path.is_file():
        raise InvalidRecordError(f"file {str(path)!r}", "there is no such file", "Correct the path")
    if kind in {".ndjson", ".jsonl"}:
        return Stream(_json_lines(path, gzip.open if compressed else open), of_frames=False)
    if kind == ".csv":
        return Stream(_csv(path, "gzip" if compressed else None), of_frames=True)
    return Stream(_parquet(path), of_frames=True)


def _json_lines(path: Path, open_file: Any) -> Generator[Any, None, None]:
    number = 0
    try:
        with open_file(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_object(line, f"file {str(path)!r}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidRecordError(
            f"file {str(path)!r}, line {number + 1}", f"it cannot be read: {error}", "Write it anew"
        ) from error


def _json_object(line: bytes, name: str) -> Any:
    fix = "Write one JSON object a line"
    try:
        row = orjson.loads(line)
        if _BIG.search(line):
            json.loads(line, parse_int=_int)
    except _TooBigError as error:
        raise InvalidRecordError(name, f"{error} has more than 64 bits", "Write it as text") from error
    except ValueError as error:
        raise InvalidRecordError(name, f"it is not JSON: {error}", fix) from error
    if not isinstance(row, dict):
        raise InvalidRecordError(name, f"it is a JSON {type(row).__name__}, not an object", fix)
    return row


# Of a number, not of a text, that orjson may read as a float.
_BIG: Final = re.compile(rb"[:\[,\s]-?[0-9]{19}")


class _TooBigError(ValueError):
    """A whole number that orjson would round."""


def _int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:  # noqa: PLR2004  (digits and sign)
        raise _TooBigError(text[:50])
    return int(text)


_OTHER_SEPARATOR: Final = re.compile(r"[;|\t]")


def _csv(path: Path, compression: str | None) -> Generator[Any, None, None]:
    name = f"file {str(path)!r}"
    csv = _library("pyarrow.csv", name)
    pa = importlib.import_module("pyarrow")
    try:
        with pa.input_stream(path, compression=compression) as stream:
            # Else a block may end in mid-value, and what comes next passes for rows.
            options = csv.ParseOptions(newlines_in_values=True)
            reader = csv.open_csv(stream, parse_options=options)
            first, *others = reader.schema.names
            separator = None if others else _OTHER_SEPARATOR.search(first)
            if separator is not None:
                raise InvalidRecordError(
                    f"{name}, line 1",
                    f"its one column has the name {first!r}, as if {separator.group()!r} separated columns",
                    "Write it with commas; or read it yourself with its own separator, and return the rows",
                )
            # pyarrow takes text that is not UTF-8 for bytes.
            columns = zip(reader.schema.names, reader.schema.types, strict=True)
            bad = next((column for column, of_type in columns if pa.types.is_binary(of_type)), None)
            if bad is not None:
                raise _not_utf8(f"{name}, column {bad!r}")
            yield from _tables(reader)
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{name}, line 1") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidRecordError(
            name,
            f"it cannot be read as CSV: {error}",
            "Correct it, for instance a quote that nothing closes; a row has at most a megabyte, and a column's type is"
            " that of its first megabyte. Else read it yourself, and return the rows",
        ) from error


def _not_utf8(culprit: str) -> InvalidRecordError:
    fix = "Write it in UTF-8; or read it yourself with its own encoding, and return the rows"
    return InvalidRecordError(culprit, "it is not UTF-8", fix)


def _parquet(path: Path) -> Generator[Any, None, None]:
    name = f"file {str(path)!r}"
    parquet = _library("pyarrow.parquet", name)
    pa = importlib.import_module("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            yield from _tables(file.iter_batches(batch_size=_ROWS))
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidRecordError(name, f"it cannot be read as Parquet: {error}", "Write it anew") from error
