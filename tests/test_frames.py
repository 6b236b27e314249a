"""Frames encoded by column give, byte for byte, what encoding their rows gives."""

import datetime as dt
import decimal
import json
import math
import threading
import time
import uuid

import narwhals as nw
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from polars.testing.parametric import dataframes

from dataforge_kafka_dagster.kafka import frames
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.schema_types import key_of_frame
from dataforge_kafka_dagster.kafka.serialization import Encoders, json_lines, serialize_key, to_json
from dataforge_kafka_dagster.kafka.sources import chunks

TYPES = [
    pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64, pl.Float32, pl.Float64, pl.String,
    pl.Boolean, pl.Date, pl.Time, pl.Datetime("us"), pl.Datetime("ms"), pl.Datetime("us", "UTC"),
    pl.Datetime("us", "Asia/Kolkata"), pl.Decimal, pl.Categorical, pl.Null, pl.List(pl.Int64), pl.List(pl.String),
    pl.List(pl.Float64), pl.Array(pl.Float32, 2), pl.Struct({"a": pl.Int64, "b": pl.String, "c": pl.Float64}),
    pl.List(pl.Struct({"x": pl.Float64, "y": pl.Boolean})), pl.List(pl.List(pl.Decimal(10, 2))),
    pl.List(pl.Datetime("us")), pl.Array(pl.Datetime("ms", "Asia/Kolkata"), 2),
    pl.List(pl.Struct({"a": pl.List(pl.Datetime("us", "UTC")), "b": pl.Int64})),
]  # fmt: skip


def encoded(frame, key=None):
    """(value, key) of each record, as bytes, or the error that refuses the frame."""
    try:
        return [
            tuple(text.encode() if isinstance(text, str) else text for text in pair)
            for chunk in chunks(frame, key)
            for pair in zip(chunk.values, chunk.keys or [None] * len(chunk.values), strict=True)
        ]
    except InvalidRecordError as error:
        return str(error)


@pytest.fixture
def by_row(monkeypatch):
    """Encodes a frame row by row, as without polars."""

    def encode(frame, key=None):
        with monkeypatch.context() as patch:
            patch.setattr(frames, "_in_polars", lambda _: None)
            return encoded(frame, key)

    return encode


class Counted:
    """Counts the slices that went by column, so that no test compares the rows with themselves."""

    def __init__(self, monkeypatch):
        self.count = 0
        by_column = frames.FrameEncoder._by_column

        def counted(*args):
            self.count += 1
            return by_column(*args)

        monkeypatch.setattr(frames.FrameEncoder, "_by_column", counted)


@pytest.fixture
def columns(monkeypatch):
    return Counted(monkeypatch)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    dataframes(
        min_cols=1, max_cols=4, min_size=1, max_size=5, allow_null=True, allowed_dtypes=TYPES, allow_infinity=False
    )
)
def test_any_polars_frame_is_the_json_of_its_rows(frame):
    expected = json_lines(frame.rows(named=True)).texts
    assert [value for value, _ in encoded(frame)] == expected


@settings(max_examples=60)
@given(
    dataframes(
        min_cols=1, max_cols=1, min_size=1, max_size=5,
        allowed_dtypes=[pl.Int64, pl.UInt8, pl.String, pl.Date, pl.Float64, pl.Boolean, pl.Categorical, pl.Datetime("us")],
        allow_infinity=False,
    )
)  # fmt: skip
def test_any_polars_key_is_the_key_of_its_row(frame):
    name = frame.columns[0]
    expected = [
        None if isinstance(value, float) and math.isnan(value) else serialize_key(value)
        for value in frame[name].to_list()
    ]
    assert [key for _, key in encoded(frame, name)] == expected


MOMENTS = [
    dt.datetime(2020, 1, 2, 3, 4, 5),
    dt.datetime(1969, 1, 2, 3, 4, 5, 6),
    dt.datetime(2020, 1, 2, 3, 4, 5, 60_000),
]
PANDAS = {
    "int64": [1, -2, 3],
    "float": [0.1, float("nan"), 1e16],
    "text": ["a", "ü\n", None],
    "bool": [True, False, True],
    "nullable int": pd.array([1, None, 2**62], dtype="Int64"),
    "nullable bool": pd.array([True, None, False], dtype="boolean"),
    "datetime": pd.to_datetime(MOMENTS),
    "nanoseconds": pd.to_datetime([1, None, 10**18 + 1_000], unit="ns"),
    "zoned": pd.to_datetime([MOMENTS[0], None, MOMENTS[2]]).tz_localize("Asia/Kolkata"),
    "objects": pd.Series([1, "a", None], dtype=object),
    "texts as objects": pd.Series(["a", None, pd.NA], dtype=object),
    "bools as objects": pd.Series([True, None, float("nan")], dtype=object),
    "no objects": pd.Series([None, float("nan"), pd.NaT], dtype=object),
    "text and bytes": pd.Series(["a", None, b"b"], dtype=object),
    "decimals": pd.Series([decimal.Decimal("1.1"), decimal.Decimal("2.25"), None], dtype=object),
    "dates": pd.Series([dt.date(2020, 1, 2), None, dt.date(1, 1, 1)], dtype=object),
    "lists": pd.Series([[1, 2], None, [3.5]], dtype=object),
    "category": pd.Categorical(["a", None, "b"]),
    "numbers as category": pd.Categorical([1, None, 2]),
    "float32": pd.Series([0.1, None, 3], dtype="float32"),
    "uint64": pd.Series([2**64 - 1, 0, 1], dtype="uint64"),
    "arrow": pd.Series([1, None, 3], dtype=pd.ArrowDtype(pa.int64())),
    "durations": pd.to_timedelta([1, 2, 3], unit="s"),
    "infinity": [0.1, float("inf"), 2.0],
    "complex": [1j, 2j, 3j],
}


@pytest.mark.parametrize("name", PANDAS)
def test_each_pandas_column_is_the_json_of_its_rows(name, by_row):
    frame = pd.DataFrame({name: PANDAS[name], "k": ["x", "y", "z"]})
    assert encoded(frame, "k") == by_row(frame, "k")


@pytest.mark.parametrize(
    "name",
    ["int64", "float", "text", "bool", "nullable int", "datetime", "zoned", "float32", "uint64", "texts as objects",
     "bools as objects"],
)  # fmt: skip
def test_common_pandas_columns_go_by_column(name, columns):
    encoded(pd.DataFrame({name: PANDAS[name]}))
    assert columns.count == frames._json_is_exact()


ARROW = {
    "int": pa.array([1, None, 2**62]),
    "float": pa.array([0.1, float("nan"), None]),
    "text": pa.array(["a", "ü\n", None]),
    "large text": pa.array(["a", None, ""], pa.large_string()),
    "bool": pa.array([True, None, False]),
    "date": pa.array([dt.date(2020, 1, 2), None, dt.date(1, 1, 1)]),
    "date64": pa.array([dt.date(2020, 1, 2), None, dt.date(1970, 1, 1)], pa.date64()),
    "seconds": pa.array([MOMENTS[0], None, MOMENTS[0]], pa.timestamp("s")),
    "micros": pa.array(MOMENTS, pa.timestamp("us")),
    "zoned": pa.array(MOMENTS, pa.timestamp("us", "Asia/Kolkata")),
    "time": pa.array([dt.time(1, 2, 3), None, dt.time(1, 2, 3, 400)], pa.time64("us")),
    "decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-0.05")]),
    "long decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-0.05")], pa.decimal256(50, 2)),
    "": pa.array([1, None, 2]),
    "list": pa.array([[1, None], None, []]),
    "struct": pa.array([{"a": 1, "b": "x"}, {"a": None, "b": None}, {"a": 2, "b": None}]),
    "null struct": pa.array([{"a": 1}, None, {"a": 2}]),
    "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "dictionary": pa.array(["a", None, "a"]).dictionary_encode(),
    "numbers as dictionary": pa.array([1, None, 1]).dictionary_encode(),
    "nothing": pa.nulls(3),
    "bytes": pa.array([b"a", None, b"c"]),
    "durations": pa.array([dt.timedelta(1), None, dt.timedelta(2)]),
    "float16": pa.array([1.5, None, 2.0], pa.float32()).cast(pa.float16()),
}


@pytest.mark.parametrize("name", ARROW)
def test_each_arrow_column_is_the_json_of_its_rows(name, by_row):
    table = pa.table({name: ARROW[name], "k": ["x", "y", "z"]})
    assert encoded(table, "k") == by_row(table, "k")


@pytest.mark.parametrize(
    "name", ["int", "float", "text", "bool", "date", "micros", "decimal", "list", "struct", "dictionary"]
)
def test_common_arrow_columns_go_by_column(name, columns):
    encoded(pa.table({name: ARROW[name]}))
    assert columns.count == frames._json_is_exact()


@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
def test_a_time_is_a_key_as_it_is_a_value(library, by_row):
    table = pa.table({"t": [dt.time(1, 2, 3), None, dt.time(1, 2, 3, 400)]})
    frame = {"polars": pl.from_arrow(table), "pandas": table.to_pandas(), "pyarrow": table}[library]
    expected = [
        (b'{"t":"01:02:03"}', b"01:02:03"),
        (b'{"t":null}', None),
        (b'{"t":"01:02:03.000400"}', b"01:02:03.000400"),
    ]
    assert encoded(frame, "t") == by_row(frame, "t") == expected


def test_an_arrow_column_without_a_name_keeps_that(by_row):
    table = pa.table({"": [1, 2], "s": [{"": 3}, None]})
    expected = [(b'{"":1,"s":{"":3}}', b"1"), (b'{"":2,"s":null}', b"2")]
    assert encoded(table, "") == by_row(table, "") == expected


@pytest.mark.parametrize("name", ["*", "^a$", "^.*$"])
@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
def test_a_column_whose_name_is_a_pattern_to_polars_is_only_itself(name, library, by_row, columns):
    whole = pl.DataFrame({"a": [1], "b": ["x"], name: pl.Series([0.5], dtype=pl.Float32)})
    frame = {"polars": whole, "pandas": whole.to_pandas(), "pyarrow": whole.to_arrow()}[library]
    value, key = f'{{"a":1,"b":"x","{name}":0.5}}', f'{{"b":"x","{name}":0.5}}'
    assert encoded(frame, ["b", name]) == by_row(frame, ["b", name]) == [(value.encode(), key.encode())]
    assert columns.count == frames._json_is_exact()
    assert f"field '{name}': JSON has no infinity" in encoded(pl.DataFrame({"a": [1], name: [math.inf]}))
    kept = frames.FrameEncoder((name,), Encoders(key=lambda keys, _: list(map(to_json, keys))))
    assert kept(nw.from_native(frame), 0).keys == [b"0.5"]
    with pytest.raises(InvalidRecordError, match="Avro does not allow this name") as caught:
        key_of_frame(nw.from_native(frame), [name], "t")
    assert caught.value.field == name


@pytest.mark.skipif(not hasattr(pa, "bool8"), reason="this pyarrow has no such types")
def test_arrow_types_of_their_own_come_as_pythons_objects():
    one = uuid.UUID(int=1)
    uuids = pa.array([one.bytes, None], pa.uuid())
    flags = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None], pa.int8()))
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), uuids)
    assert encoded(pa.table({"id": uuids, "ok": flags, "ids": lists}), "id") == [
        (f'{{"id":"{one}","ok":true,"ids":["{one}"]}}'.encode(), str(one).encode()),
        (b'{"id":null,"ok":null,"ids":[null]}', None),
    ]


def test_a_decimal_of_more_than_128_bits_keeps_its_digits():
    number = decimal.Decimal("1" * 60 + ".5")
    table = pa.table(
        {"d": pa.array([number], pa.decimal256(70, 1)), "l": pa.array([[number]], pa.list_(pa.decimal256(70, 1)))}
    )
    assert [json.loads(value) for value, _ in encoded(table)] == [{"d": str(number), "l": [str(number)]}]


FAR = {
    "arrow date": pa.table({"n": [1, 2], "d": pa.array([0, 2**31 - 1], pa.int32()).cast(pa.date32())}),
    "arrow seconds": pa.table({"n": [1, 2], "d": pa.array([0, 2**63 - 1], pa.timestamp("s"))}),
    "arrow micros": pa.table({"n": [1, 2], "d": pa.array([0, 2**63 - 1], pa.timestamp("us"))}),
    "arrow zoned": pa.table({"n": [1, 2], "d": pa.array([0, 1 - 2**63], pa.timestamp("us", "UTC"))}),
    "arrow list": pa.table({"n": [1, 2], "d": pa.array([[0], [2**63 - 1]], pa.list_(pa.timestamp("ms")))}),
    "polars date": pl.DataFrame({"n": [1, 2], "d": pl.Series([0, 2**31 - 1]).cast(pl.Int32).cast(pl.Date)}),
    "polars datetime": pl.DataFrame({"n": [1, 2], "d": pl.Series([0, 2**63 - 1]).cast(pl.Datetime("us"))}),
    "polars struct": pl.DataFrame({"n": [1, 2], "d": [{"a": 0}, {"a": 2**63 - 1}]}).cast({"d": pl.Struct({"a": pl.Datetime("us")})}),
    "polars duration": pl.DataFrame({"n": [1, 2], "d": pl.Series([0, 2**63 - 1]).cast(pl.Duration("ms"))}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAR)
def test_a_date_that_python_does_not_have_is_refused_with_row_and_column(name):
    with pytest.raises(InvalidRecordError, match="field 'd'.*text") as caught:
        list(chunks(FAR[name], start=10))
    assert (caught.value.index, caught.value.field) == (11, "d")
    bad = []
    values = [value for chunk in chunks(FAR[name], on_bad=lambda *what: bad.append(what)) for value in chunk.values]
    assert len(values) == (0 if "duration" in name else 1)  # JSON has none, however short
    row, index, error = bad[-1]
    assert row["n"] == 2
    assert "<" in row["d"]
    assert (index, error.field) == (1, "d")


def test_a_date_after_the_year_9999_is_a_key_as_it_is_a_value():
    frame = pl.DataFrame({"d": pl.Series([0, 4_000_000]).cast(pl.Int32).cast(pl.Date)})
    if not frames._json_is_exact():  # its rows are Python's objects, and Python has no such date
        assert "year 12921 is out of range" in encoded(frame, "d")
        return
    assert encoded(frame, "d") == [(b'{"d":"1970-01-01"}', b"1970-01-01"), (b'{"d":"+12921-08-18"}', b"+12921-08-18")]


def test_a_struct_that_has_a_name_twice_is_refused():
    struct = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(InvalidRecordError, match="field 's'.*duplicate field names"):
        list(chunks(pa.table({"s": struct})))


@pytest.mark.parametrize(
    "series",
    [
        pl.Series("f", [0.5, float("inf")]),
        pl.Series("f", [0.5, float("-inf")], dtype=pl.Float32),
        pl.Series("f", [[0.5], [float("inf")]]),
        pl.Series("f", [{"x": 0.5}, {"x": float("inf")}]),
    ],
)
def test_infinity_is_refused_with_row_and_column(series):
    with pytest.raises(InvalidRecordError, match="infinity") as caught:
        list(chunks(pl.DataFrame([series]), start=10))
    assert caught.value.index == 11
    assert caught.value.field.startswith("f")


@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
def test_a_bad_value_is_refused_with_its_own_row_though_one_before_has_nan(library, by_row):
    frame = pl.DataFrame({"x": [math.nan, math.nan], "y": [None, b"text"]})
    native = {"polars": lambda: frame, "pandas": frame.to_pandas, "pyarrow": frame.to_arrow}[library]()
    for refused in (encoded(native), by_row(native)):
        assert refused.startswith("record 1, field 'y'")
        assert "bytes" in refused


@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
@pytest.mark.parametrize(("bad", "why"), [(math.inf, "infinity"), (b"text", "bytes")])
def test_what_no_key_of_several_columns_has_is_refused_beside_values_that_have_it(library, bad, why):
    frame = pl.DataFrame({"a": [None, bad], "b": [1, 2]})
    native = {"polars": lambda: frame, "pandas": frame.to_pandas, "pyarrow": frame.to_arrow}[library]()
    of_a_schema = Encoders(value=lambda rows, _: [b"value"] * len(rows), form="avro")
    with pytest.raises(InvalidRecordError, match=why) as caught:
        list(chunks(native, ["a", "b"], encoders=of_a_schema))
    assert (caught.value.index, caught.value.field) == (1, "a")
    told = []
    (chunk,) = chunks(native, ["a", "b"], encoders=of_a_schema, on_bad=lambda _, index, __: told.append(index))
    assert (list(chunk.keys), told) == ([b'{"a":null,"b":1}'], [1])


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_a_moment_whose_offset_has_seconds_is_written_in_utc(unit, by_row):
    moments = [dt.datetime(1971, 12, 31), None, dt.datetime(1971, 12, 31, 0, 0, 0, 1000), dt.datetime(2020, 1, 1)]
    series = pl.Series("t", moments, dtype=pl.Datetime(unit, "UTC"))
    table = series.dt.convert_time_zone("Africa/Monrovia").to_frame().to_arrow()  # -00:44:30 until 1972
    texts = ["1971-12-31T00:00:00+00:00", None, "1971-12-31T00:00:00.001000+00:00", "2020-01-01T00:00:00+00:00"]
    for frame in (table, pl.from_arrow(table)):
        assert [json.loads(value)["t"] for value, _ in encoded(frame, "t")] == texts
        assert [key and key.decode() for _, key in encoded(frame, "t")] == texts
        nested = pl.DataFrame(frame).select(pl.struct("t").implode(), a=pl.col("t").reshape((1, 4)))
        expected = {"t": [{"t": text} for text in texts], "a": texts}
        assert [json.loads(value) for value, _ in encoded(nested)] == [expected]
    # By pytz, which an older pyarrow uses, the offset has no seconds.
    if table["t"][0].as_py().utcoffset().seconds % 60:
        assert encoded(table, "t") == by_row(table, "t")


def test_nanoseconds_are_kept():
    frame = pl.DataFrame({"t": pl.Series([1, 1_000, 0, None]).cast(pl.Datetime("ns"))})
    assert [value for value, _ in encoded(frame)] == [
        b'{"t":"1970-01-01T00:00:00.000000001"}',
        b'{"t":"1970-01-01T00:00:00.000001"}',
        b'{"t":"1970-01-01T00:00:00"}',
        b'{"t":null}',
    ]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "dtype",
    [pl.Time, pl.Datetime("ns"), pl.Datetime("ns", "Asia/Kolkata")],
)
def test_nanoseconds_are_kept_in_lists_and_structs(dtype, exact, monkeypatch):
    monkeypatch.setattr(frames, "_json_is_exact", lambda: exact)
    times = pl.Series("^t$", [1, 1_000, 0, None]).cast(dtype)
    texts = [json.loads(value)["^t$"] for value, _ in encoded(times.to_frame())]
    assert texts[0].partition("+")[0].endswith("00.000000001")
    flat = times.to_frame().with_row_index("*")
    struct = pl.struct(pl.all()).alias("*")
    for frame, expected in [
        (times.to_frame().select(pl.all().implode()), [{"^t$": texts}]),
        (times.to_frame().select(pl.all().reshape((2, 2))), [{"^t$": texts[:2]}, {"^t$": texts[2:]}]),
        (flat.select(struct), [{"*": {"*": i, "^t$": text}} for i, text in enumerate(texts)]),
        (
            flat.select(struct.implode()).vstack(
                pl.DataFrame({"*": [None]}, schema=flat.select(struct.implode()).schema)
            ),
            [{"*": [{"*": i, "^t$": text} for i, text in enumerate(texts)]}, {"*": None}],
        ),
    ]:
        assert [json.loads(value) for value, _ in encoded(frame)] == expected
        assert [json.loads(value) for value, _ in encoded(frame.to_arrow())] == expected


def test_null_structs_of_times_stay_null():
    frame = pl.DataFrame({"s": [{"t": dt.time(1)}, None, {"t": None}]})
    assert [json.loads(value)["s"] for value, _ in encoded(frame)] == [{"t": "01:00:00"}, None, {"t": None}]


def test_a_decimal_that_is_nan_is_missing_in_a_frame_and_infinity_is_refused():
    frame = pd.DataFrame({"d": [decimal.Decimal(1), decimal.Decimal("NaN")]})
    assert encoded(frame, "d") == [(b'{"d":"1"}', b"1"), (b'{"d":null}', None)]
    assert "infinity" in encoded(pd.DataFrame({"d": [decimal.Decimal("Infinity")]}))


def test_an_older_polars_whose_json_loses_values_is_not_asked_for_it(monkeypatch):
    frame = pl.DataFrame(
        {"d": [decimal.Decimal("1.10"), None], "a": pl.Series([None, [None, 0.0]], dtype=pl.Array(pl.Float32, 2))},
        schema_overrides={"d": pl.Decimal(10, 2)},
    )
    (usual,) = chunks(frame)
    monkeypatch.setattr("dataforge_kafka_dagster.kafka.frames._json_is_exact", lambda: False)
    monkeypatch.setattr("dataforge_kafka_dagster.kafka.frames._json_of", None)
    (slow,) = chunks(frame)
    expected = ['{"d":"1.10","a":null}', '{"d":null,"a":[null,0.0]}']
    assert [value if isinstance(value, str) else value.decode() for value in usual.values] == expected
    assert slow.values == [text.encode() for text in expected]


def test_python_has_the_texts_of_some_hundred_rows_of_a_frame_at_a_time():
    frame = pl.DataFrame({"id": range(5_000), "k": [f"é{i}" for i in range(5_000)]})
    found = list(chunks(frame, "k"))
    if frames._json_is_exact():  # else by rows
        assert max(len(chunk.values) for chunk in found) == 1_024

    def encoded(texts):
        return [text.encode() if isinstance(text, str) else text for text in texts]

    assert [key for chunk in found for key in encoded(chunk.keys)] == encoded(frame["k"])
    assert [text for chunk in found for text in encoded(chunk.values)] == list(map(to_json, frame.to_dicts()))
    for chunk in found:
        assert chunk.size == sum(map(len, encoded((*chunk.values, *chunk.keys))))


# Large frames, whose next slice another thread encodes.


def large(rows=60_000, bad=()):
    """A frame of many slices, with infinity in some rows."""
    numbers = [math.inf if i in bad else i / 2 for i in range(rows)]
    return pl.DataFrame({"i": range(rows), "x": numbers, "text": [f"é{i}" for i in range(rows)]})


by_column_only = pytest.mark.skipif(not frames._json_is_exact(), reason="this polars goes row by row, in one thread")


def encoders():
    """The threads that encode slices."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("encode")]


@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
def test_a_large_frame_has_all_rows_in_order(library):
    frame = large()
    native = {"polars": lambda: frame, "pandas": frame.to_pandas, "pyarrow": frame.to_arrow}[library]()
    expected = [(to_json(row), str(row["i"]).encode()) for row in frame.iter_rows(named=True)]
    assert encoded(native, "i") == expected
    assert not encoders()


@by_column_only
def test_the_next_slice_is_encoded_while_one_is_sent(monkeypatch):
    begun = []
    to_columns = frames.FrameEncoder._by_column

    def by_column(self, frame, start):
        begun.append(start)
        return to_columns(self, frame, start)

    monkeypatch.setattr(frames.FrameEncoder, "_by_column", by_column)
    position = 0
    for chunk in chunks(large()):
        position += len(chunk.values)
        if 25_000 < position < 26_000:
            break
    deadline = time.monotonic() + 30
    while max(begun) < position and time.monotonic() < deadline:
        time.sleep(0.01)
    assert max(begun) > position


@pytest.mark.parametrize("at", [0, 100, 30_000, 59_999])
def test_a_bad_row_of_a_large_frame_ends_it_after_those_slices_before_it(at):
    sent = 0
    with pytest.raises(InvalidRecordError, match=rf"record {at}, field 'x'"):
        for chunk in chunks(large(bad=[at])):
            sent += len(chunk.values)
    assert sent <= at
    assert sent >= at - 20_000
    assert not encoders()


def test_bad_rows_of_a_large_frame_are_left_out_and_told():
    bad, told = [5, 24_999, 25_000, 59_999], []
    made = chunks(large(bad=bad), on_bad=lambda row, index, _: told.append((row["i"], index)))
    assert [json.loads(value)["i"] for chunk in made for value in chunk.values] == [
        i for i in range(60_000) if i not in bad
    ]
    assert told == [(i, i) for i in bad]
    assert not encoders()


@by_column_only
def test_a_large_frame_that_is_not_taken_to_its_end_leaves_no_thread():
    made = chunks(large())
    while not encoders():
        next(made)
    made.close()
    assert not encoders()
