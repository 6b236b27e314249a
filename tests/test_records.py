import collections
import dataclasses
import datetime as dt
import gc
import itertools
import json
import math
import weakref

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from conftest import Clock
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, field_serializer

from dataforge_kafka_dagster import KafkaRecord
from dataforge_kafka_dagster.kafka import frames, sources
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.records import encode_record
from dataforge_kafka_dagster.kafka.serialization import to_json
from dataforge_kafka_dagster.kafka.sources import chunks

ROWS = [{"id": 1, "name": "a"}, {"id": 2, "name": "ü"}, {"id": 3, "name": None}]


@dataclasses.dataclass
class Row:
    id: int
    name: str


class RowModel(BaseModel):
    id: int
    name: str


def _records(output, key=None):
    """(key, value) of each record."""
    flat = []
    for chunk in chunks(output, key):
        values = list(map(_bytes, chunk.values))
        keys = None if chunk.keys is None else list(map(_bytes, chunk.keys))
        assert chunk.size == sum(len(v or b"") for v in values) + sum(len(k or b"") for k in keys or ())
        assert keys is None or len(keys) == len(values)
        flat += zip(keys or itertools.repeat(None), values, strict=False)
    return flat


def _bytes(text):
    """What confluent-kafka makes of a value or key."""
    return text.encode() if isinstance(text, str) else text


def _values(output):
    return [value for _, value in _records(output)]


@pytest.mark.parametrize(
    ("output", "values"),
    [
        ({"a": 1}, [b'{"a":1}']),
        (Row(1, "a"), [b'{"id":1,"name":"a"}']),
        (RowModel(id=1, name="a"), [b'{"id":1,"name":"a"}']),
        ("text", [b"text"]),
        (b"\x00", [b"\x00"]),
        (bytearray(b"a"), [b"a"]),
        (KafkaRecord({"a": 1}), [b'{"a":1}']),
        ([], []),
        ((), []),
        (iter([]), []),
        ([{"a": 1}, {"b": 2}], [b'{"a":1}', b'{"b":2}']),
        (({"a": 1},), [b'{"a":1}']),
        (iter(["x", "y"]), [b"x", b"y"]),
        ((s for s in ("x", "")), [b"x", b""]),
        ([b"x", bytearray(b"y")], [b"x", b"y"]),
        ([Row(1, "a"), {"id": 2}, RowModel(id=3, name="c")], [b'{"id":1,"name":"a"}', b'{"id":2}', b'{"id":3,"name":"c"}']),
        ([KafkaRecord("x"), KafkaRecord(None, key="k")], [b"x", None]),
        (map(str, [1, 2]), [b"1", b"2"]),
        (collections.deque([{"a": 1}, {"a": 2}]), [b'{"a":1}', b'{"a":2}']),
        (collections.UserList([{"a": 1}]), [b'{"a":1}']),
    ],
)  # fmt: skip
def test_accepted_outputs(output, values):
    assert _values(output) == values


@pytest.mark.parametrize(
    "output", [5, 1.5, True, {1, 2}, object(), Row, {"a": 1}.values(), pl.Series([1]), np.array([1])]
)  # fmt: skip
def test_other_outputs_are_refused_at_once_with_the_accepted_types(output):
    with pytest.raises(InvalidRecordError) as caught:
        chunks(output)
    assert type(output).__qualname__ in caught.value.culprit
    for accepted in ("mapping", "dataclass", "pydantic", "KafkaRecord", "generator", "polars"):
        assert accepted in caught.value.fix


def test_an_async_generator_is_refused():
    async def rows():
        yield {"a": 1}

    with pytest.raises(InvalidRecordError, match="async_generator"):
        chunks(rows())


@pytest.mark.parametrize(
    ("output", "key", "keys"),
    [
        (ROWS, "id", [b"1", b"2", b"3"]),
        (ROWS, "name", [b"a", "ü".encode(), None]),
        (ROWS, ["id"], [b"1", b"2", b"3"]),
        (ROWS[:1], ["id", "name"], [b'{"id":1,"name":"a"}']),
        (ROWS[:1], ("name", "id"), [b'{"name":"a","id":1}']),
        ([Row(4, "d")], "id", [b"4"]),
        ([RowModel(id=4, name="d")], ["name", "id"], [b'{"name":"d","id":4}']),
        ([{"d": dt.date(2013, 1, 1)}], "d", [b"2013-01-01"]),
        ([KafkaRecord({"id": 1}, key="own"), KafkaRecord({"id": 2})], "id", [b"own", b"2"]),
        ([KafkaRecord(Row(5, "e"))], "id", [b"5"]),
        ([{"id": np.int64(7)}], "id", [b"7"]),
    ],
)
def test_keys_by_field(output, key, keys):
    assert [found for found, _ in _records(output, key)] == keys


@pytest.mark.parametrize("frame", [pl.DataFrame({"a": [1]}), pd.DataFrame({"a": [1]}), pa.table({"a": [1]})])
@pytest.mark.parametrize("wrap", [list, iter])
def test_frames_in_a_list_are_refused_with_what_to_do(frame, wrap):
    with pytest.raises(InvalidRecordError, match="record 1: its value is of type .*Concatenate the frames.*LazyFrame"):
        _records(wrap([{"a": 0}, frame]))
    with pytest.raises(InvalidRecordError, match="record 0: its value is of type .*Concatenate the frames.*LazyFrame"):
        _records(wrap([frame, frame]))


def test_records_without_key_field_have_none():
    (chunk,) = chunks(ROWS)
    assert chunk.keys is None
    assert chunk.extras is None
    assert chunk.form == "json"


def test_a_missing_key_field_names_record_field_and_those_there_are():
    with pytest.raises(InvalidRecordError) as caught:
        _records([*ROWS, {"name": "x"}], "id")
    assert (caught.value.index, caught.value.field) == (3, "id")
    assert "record 3, field 'id'" in str(caught.value)
    assert "name" in caught.value.fix


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("fields", ["id", ["n", "id"]])
def test_a_key_field_is_not_made_up(fields, wrapped):
    """By defaultdict's or Counter's __missing__, which would even keep it."""
    row = collections.Counter(n=1)
    with pytest.raises(InvalidRecordError, match="field 'id': the key field is missing"):
        _records([KafkaRecord(row) if wrapped else row], fields)
    assert row == {"n": 1}


@pytest.mark.parametrize("output", [[{"k": 1, "j": 2}], pd.DataFrame({"k": [1], "j": [2]})])
def test_a_key_field_with_commas_is_told_that_several_are_a_list(output):
    with pytest.raises(InvalidRecordError, match=r"field is missing|key column is missing") as caught:
        _records(output, "k, j")
    assert caught.value.fix.endswith("; for several, give a list: ['k', 'j']")
    assert _records(output, ["k", "j"]) == [(b'{"k":1,"j":2}', b'{"k":1,"j":2}')]


def test_integers_beside_a_missing_one_are_their_own_keys_as_int64():
    frame = pd.DataFrame({"k": [1, None]})
    assert [key for key, _ in _records(frame, "k")] == [b"1.0", None]
    assert [key for key, _ in _records(frame.astype("Int64"), "k")] == [b"1", None]


class Person(BaseModel):
    name: str
    mail: str = Field(serialization_alias="email")
    note: str = Field("x", exclude=True)

    @field_serializer("mail")
    def _mask(self, mail: str) -> str:
        return mail[0] + "***"


@pytest.mark.parametrize("key", ["mail", ["name", "mail"]])
def test_a_models_key_shows_no_more_than_its_value(key):
    ((found, _),) = _records([Person(name="a", mail="me@x.org")], key)
    assert found == (b"m***" if key == "mail" else b'{"name":"a","mail":"m***"}')


def test_a_field_that_a_model_does_not_write_may_be_its_key():
    ((key, value),) = _records([Person(name="a", mail="me@x.org", note="k")], "note")
    assert (key, "note" in json.loads(value)) == (b"k", False)


class Own(KafkaRecord):
    pass


@pytest.mark.parametrize(
    "rows", [[Own({"a": 1}, "k"), KafkaRecord({"a": 2}, "l")], [Own({"a": 1}, "k"), Own(None, "l")]]
)
def test_a_subclass_of_kafka_record_is_one(rows):
    assert [key for key, _ in _records(rows)] == [b"k", b"l"]
    with pytest.raises(InvalidRecordError, match="its value is a KafkaRecord itself"):
        _records([KafkaRecord(rows[0])])
    with pytest.raises(InvalidRecordError, match="record 1: its type Own is of another kind"):
        _records([{"a": 1}, rows[0]])


def test_tombstones_are_counted():
    rows = [KafkaRecord(None, "a"), KafkaRecord({"a": 1}, "b"), KafkaRecord(None, "c")]
    assert [chunk.tombstones for chunk in chunks(rows)] == [2]
    assert [chunk.tombstones for chunk in chunks([*ROWS, *ROWS])] == [0]


@pytest.mark.parametrize("value", [{"name": "x"}, Row(1, "x")])
def test_a_missing_key_field_of_a_kafka_record_is_no_silent_none(value):
    with pytest.raises(InvalidRecordError) as caught:
        _records([KafkaRecord(value)], "no_such")
    assert caught.value.field == "no_such"


@pytest.mark.parametrize("rows", [["text"], [b"bytes"]])
def test_a_key_field_of_what_has_no_fields_is_refused(rows):
    with pytest.raises(InvalidRecordError, match="no fields"):
        _records(rows, "id")


@pytest.mark.parametrize(
    ("rows", "index"),
    [
        ([{"a": 1}, "text"], 1),
        (["text", b"bytes"], 1),
        ([{"a": 1}, KafkaRecord({"a": 1})], 1),
        ([KafkaRecord({"a": 1}), {"a": 1}], 1),
        ([KafkaRecord("a"), KafkaRecord(b"a")], 1),
        ([{"a": 1}, 5], 1),
        ([{"a": 1}, {"a": 1}, None], 2),
        ([[{"a": 1}]], 0),
    ],
)
@pytest.mark.parametrize("kind", [list, iter])
def test_one_kind_of_record_per_output(rows, index, kind):
    with pytest.raises(InvalidRecordError) as caught:
        _records(kind(rows))
    assert caught.value.index == index
    assert f"record {index}" in caught.value.culprit


def test_a_kind_that_changes_in_a_later_chunk_is_refused():
    rows = itertools.chain(({"i": i} for i in range(10_000)), ["text"])
    with pytest.raises(InvalidRecordError) as caught:
        _records(rows)
    assert caught.value.index == 10_000
    assert "dict" in str(caught.value)


def test_a_bad_value_in_a_later_chunk_is_named_by_its_position():
    rows = ({"i": i if i != 9_999 else object()} for i in range(10_000))
    with pytest.raises(InvalidRecordError) as caught:
        _records(rows)
    assert (caught.value.index, caught.value.field) == (9_999, "i")


def test_positions_continue_from_start():
    with pytest.raises(InvalidRecordError) as caught:
        list(chunks([{"a": 1}, {"a": float("nan")}], start=100))
    assert caught.value.index == 101


def test_a_tombstone_says_how():
    with pytest.raises(InvalidRecordError) as caught:
        _records([None])
    assert "KafkaRecord(value=None, key=...)" in caught.value.fix


def test_extras():
    when = dt.datetime(2013, 1, 1, tzinfo=dt.timezone.utc)
    (chunk,) = chunks(
        [
            KafkaRecord("a", key=1, headers={"h": "v"}, partition=2, timestamp=1357000000000),
            KafkaRecord("b", timestamp=when),
            KafkaRecord("c"),
        ]
    )
    assert [tuple(extra) for extra in chunk.extras] == [
        ([("h", b"v")], 2, 1357000000000),
        (None, -1, 1356998400000),
        (None, -1, 0),
    ]
    assert chunk.form == "string"


@pytest.mark.parametrize("partition", [-1, True, 1.0, "0", 2**31])
def test_wrong_partitions(partition):
    with pytest.raises(InvalidRecordError) as caught:
        encode_record(KafkaRecord("a", partition=partition), 4)
    assert f"partition={partition!r}" in str(caught.value)
    assert caught.value.index == 4


@pytest.mark.parametrize("timestamp", [0, -1, True, 1.5, "now", 2**63, dt.datetime(2013, 1, 1), dt.date(2013, 1, 1)])
def test_wrong_timestamps(timestamp):
    with pytest.raises(InvalidRecordError) as caught:
        encode_record(KafkaRecord("a", timestamp=timestamp), 4)
    assert "timestamp=" in str(caught.value)
    assert "milliseconds" in caught.value.fix
    assert "time zone" in caught.value.fix


def test_a_timestamp_before_the_epoch_is_refused():
    with pytest.raises(InvalidRecordError, match="timestamp"):
        encode_record(KafkaRecord("a", timestamp=dt.datetime(1969, 1, 1, tzinfo=dt.timezone.utc)))


def test_a_tombstone_needs_a_key():
    assert encode_record(KafkaRecord(None, key="k"))[:2] == (None, b"k")
    with pytest.raises(InvalidRecordError, match="tombstone"):
        encode_record(KafkaRecord(None), 1)


COLUMNS = {"id": [1, 2], "x": [0.5, None], "s": ["a", None], "d": [dt.date(2013, 1, 1), None]}
JSON_ROWS = [
    {"id": 1, "x": 0.5, "s": "a", "d": "2013-01-01"},
    {"id": 2, "x": None, "s": None, "d": None},
]
FRAMES = {
    "polars": lambda: pl.DataFrame(COLUMNS),
    "pandas": lambda: pd.DataFrame(COLUMNS),
    "pandas with pyarrow": lambda: pa.table(COLUMNS).to_pandas(types_mapper=pd.ArrowDtype),
    "pyarrow": lambda: pa.table(COLUMNS),
}


@pytest.mark.parametrize("make", FRAMES.values(), ids=FRAMES)
def test_frames_are_a_record_per_row(make):
    found = _records(make(), "id")
    assert [json.loads(value) for _, value in found] == JSON_ROWS
    assert [key for key, _ in found] == [b"1", b"2"]


@pytest.mark.parametrize("make", FRAMES.values(), ids=FRAMES)
def test_frames_have_keys_of_several_columns_and_null_keys(make):
    assert [key for key, _ in _records(make(), ["id", "s"])] == [b'{"id":1,"s":"a"}', b'{"id":2,"s":null}']
    assert [key for key, _ in _records(make(), "s")] == [b"a", None]
    assert [key for key, _ in _records(make(), "d")] == [b"2013-01-01", None]


@pytest.mark.parametrize("make", FRAMES.values(), ids=FRAMES)
def test_frames_without_the_key_column_are_refused_at_once(make):
    with pytest.raises(InvalidRecordError) as caught:
        chunks(make(), "tailnum")
    assert "tailnum" in caught.value.culprit
    assert caught.value.field == "tailnum"
    assert "'id', 'x', 's', 'd'" in caught.value.fix


def test_missing_values_of_pandas_are_null():
    frame = pd.DataFrame(
        {
            "i": pd.array([1, None], "Int64"),
            "t": pd.to_datetime(["2013-01-01", None]),
            "f": [float("nan"), 1.0],
            "b": pd.array([True, None], "boolean"),
            "c": pd.Categorical(["a", None]),
            "o": ["x", None],
        }
    )
    assert [json.loads(value) for value in _values(frame)] == [
        {"i": 1, "t": "2013-01-01T00:00:00", "f": None, "b": True, "c": "a", "o": "x"},
        {"i": None, "t": None, "f": 1.0, "b": None, "c": None, "o": None},
    ]
    assert [key for key, _ in _records(frame, "f")] == [None, b"1.0"]
    assert [key for key, _ in _records(frame, "t")][1] is None
    assert [key for key, _ in _records(frame, "i")] == [b"1", None]


def test_nan_of_polars_is_null():
    frame = pl.DataFrame({"f": [float("nan"), 1.0], "k": ["a", "b"]})
    assert _values(frame) == [b'{"f":null,"k":"a"}', b'{"f":1.0,"k":"b"}']


def test_nested_columns():
    frame = pl.DataFrame({"l": [[1, 2]], "s": [{"a": dt.date(2013, 1, 1)}]})
    assert [json.loads(value) for value in _values(frame)] == [{"l": [1, 2], "s": {"a": "2013-01-01"}}]


def test_decimals_of_frames_keep_their_digits():
    frame = pa.table({"d": pa.array(["1.10", "20.00"]).cast(pa.decimal128(10, 2))})
    assert _values(frame) == [b'{"d":"1.10"}', b'{"d":"20.00"}']


@pytest.mark.parametrize("make", FRAMES.values(), ids=FRAMES)
def test_empty_frames_have_no_records(make):
    assert _values(make()[:0] if not isinstance(make(), pa.Table) else make().slice(0, 0)) == []


@pytest.mark.parametrize("polars", [True, False])
@pytest.mark.parametrize("key", [None, "id"])
@pytest.mark.parametrize(
    "frame", [pa.table({}), pa.Table.from_pylist([]), pa.record_batch({}), pl.DataFrame(), pd.DataFrame()]
)
def test_frames_of_no_rows_and_no_columns_have_no_records(frame, key, polars, monkeypatch):
    if not polars:
        monkeypatch.setattr("dataforge_kafka_dagster.kafka.frames._has_polars", lambda: False)
    assert list(itertools.islice(chunks(frame, key), 3)) == []


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "unique"),
        (pd.DataFrame([[1, 2]]), "str"),
        (pl.DataFrame({"b": [b"x"]}), "bytes"),
        (pl.DataFrame({"d": [dt.timedelta(1)]}), "timedelta"),
        (pd.DataFrame(index=range(3)), "no columns"),
    ],
)
def test_frames_that_cannot_be_written_are_refused(frame, said):
    with pytest.raises(InvalidRecordError) as caught:
        _values(frame)
    assert said in str(caught.value)


def test_a_column_whose_name_is_no_text_is_told_how_to_have_one():
    frame = pd.DataFrame({"a": [1], 3: [2]})
    with pytest.raises(InvalidRecordError) as caught:
        chunks(frame, "a")
    assert str(caught.value) == (
        "data frame, column 3: its name is not a str. Rename it, as by frame.columns = frame.columns.map(str)"
    )
    frame.columns = frame.columns.map(str)
    assert _values(frame) == [b'{"a":1,"3":2}']


def test_a_key_in_the_index_of_a_pandas_frame_is_told_how_to_be_one():
    with pytest.raises(InvalidRecordError, match=r"reset_index\(\)"):
        chunks(pd.DataFrame({"delay": [3.5]}, index=pd.Index(["UA"], name="carrier")), "carrier")


def test_a_row_of_a_frame_that_cannot_be_written_is_named():
    frame = pd.DataFrame({"o": [1, 2, object()]})
    with pytest.raises(InvalidRecordError) as caught:
        _values(frame)
    assert (caught.value.index, caught.value.field) == (2, "o")


def test_a_generator_is_not_read_ahead_of_its_chunk():
    taken = 0

    def rows():
        nonlocal taken
        for i in range(100_000):
            taken += 1
            yield {"i": i}

    seen = 0
    for chunk in chunks(rows()):
        seen += len(chunk.values)
        assert taken == seen
        assert len(chunk.values) <= 1_000
    assert seen == 100_000


@pytest.mark.parametrize("kind", [list, iter])
def test_chunks_of_rows_stay_small_also_of_large_records(kind):
    sizes = [chunk.size for chunk in chunks(kind([{"x": "y" * 1_000}] * 1_000 + [{"x": "y" * 100_000}] * 100))]
    assert max(sizes[:10]) <= 66_000
    assert sizes[-30:] == [len(to_json({"x": "y" * 100_000}))] * 30
    # One chunk is taken before it is known how large its records are.
    assert max(sizes) <= 66 * 100_100


def test_chunks_of_a_list_have_more_rows_than_those_of_an_iterator_whose_rows_may_grow():
    rows = [{"x": i} for i in range(2_000)]
    assert [max(len(chunk.values) for chunk in chunks(kind(rows))) for kind in (list, iter)] == [512, 128]


def test_chunks_get_small_again_when_records_grow():
    rows = itertools.chain(({"x": 1} for _ in range(20_000)), ({"x": "y" * 50_000} for _ in range(500)))
    found = list(chunks(rows))
    assert max(len(chunk.values) for chunk in found) == 128
    assert max(chunk.size for chunk in found) <= 8_000_000


def test_rows_are_let_go_of():
    class Counted(dict):
        __hash__ = object.__hash__

    alive = weakref.WeakSet()

    def rows():
        for i in range(30_000):
            row = Counted(i=i)
            alive.add(row)
            yield row

    most = 0
    for _ in chunks(rows()):
        gc.collect(0)
        most = max(most, len(alive))
    assert most <= 2_100


def test_a_frame_is_sliced_not_copied_to_rows_at_once():
    counts = [len(chunk.values) for chunk in chunks(pl.DataFrame({"i": range(50_000)}))]
    assert sum(counts) == 50_000
    assert max(counts) <= 20_000


def test_a_slow_generator_yields_within_about_half_a_second(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sources, "time", clock)

    def rows():
        for i in range(1000):
            clock.sleep(0.05)
            yield {"i": i}

    first = next(chunks(rows()))
    assert 0.4 < clock.now - Clock.now < 0.7
    assert 8 <= len(first.values) <= 14


def test_an_error_of_a_generator_comes_through_unchanged():
    def rows():
        yield {"i": 1}
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"):
        _values(rows())


LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)  # fmt: skip
ROW = st.dictionaries(
    st.text(), st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4)
)


@pytest.mark.slow
@given(st.lists(ROW, max_size=6), st.sampled_from([1, 30]), st.booleans())
def test_any_json_rows_come_back_in_order(rows, times, lazily):
    rows = rows * times
    output = (row for row in rows) if lazily else rows
    assert [json.loads(value) for value in _values(output)] == rows


@pytest.mark.slow
@given(st.lists(st.text() | st.none(), max_size=50))
def test_any_text_column_comes_back(texts):
    frame = pl.DataFrame({"t": pl.Series(texts, dtype=pl.String)})
    found = _records(frame, "t")
    assert [json.loads(value)["t"] for _, value in found] == texts
    assert [None if key is None else key.decode() for key, _ in found] == texts


@given(st.lists(st.fixed_dictionaries({"k": st.text(min_size=1), "v": LEAVES}), max_size=30))
def test_any_key_field_comes_back(rows):
    assert [key.decode() for key, _ in _records(iter(rows), "k")] == [row["k"] for row in rows]


# Records that cannot be published among others that can be.

GOOD, BAD = {"a": 1}, {"a": math.nan}


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.booleans())
def test_those_records_are_left_out_that_cannot_be_published(good, listed):
    rows = [{"i": i, **(GOOD if is_good else BAD)} for i, is_good in enumerate(good)]
    told = []
    made = chunks(
        rows if listed else iter(rows), on_bad=lambda row, index, error: told.append((row["i"], index, error.index))
    )
    assert [json.loads(value)["i"] for chunk in made for value in chunk.values] == [
        i for i, well in enumerate(good) if well
    ]
    assert told == [(i, i, i) for i, well in enumerate(good) if not well]


@pytest.mark.parametrize("bad", [object(), None, 1.5, [{"a": 1}]], ids=["object", "None", "float", "list"])
@pytest.mark.parametrize(
    "good", [{"a": 1}, "text", b"bytes", KafkaRecord({"a": 1})], ids=["dict", "text", "bytes", "record"]
)
def test_what_is_no_record_does_not_say_of_what_kind_the_others_are(bad, good):
    told = []
    made = chunks(
        [bad, good, good, "x" if isinstance(good, dict) else {}, good],
        on_bad=lambda _, index, error: told.append((index, str(error))),
    )
    assert sum(len(chunk.values) for chunk in made) == 3
    assert [index for index, _ in told] == [0, 3]
    with pytest.raises(InvalidRecordError, match="record 0: "):
        list(chunks([bad, good]))


def test_few_bad_rows_of_a_frame_cost_few_encodings(monkeypatch):
    calls = []
    encode = frames.FrameEncoder.__call__
    monkeypatch.setattr(frames.FrameEncoder, "__call__", lambda *args: calls.append(1) or encode(*args))
    frame = pl.DataFrame({"x": [math.inf if i in {7, 30_000} else 0.5 for i in range(60_000)]})
    assert sum(len(chunk.values) for chunk in chunks(frame, on_bad=lambda *_: None)) == 59_998
    assert len(calls) < 60
