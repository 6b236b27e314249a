import dataclasses
import datetime as dt
import decimal
import enum
import functools
import json
import re
import types
import typing
import uuid
import warnings
import zoneinfo
from collections import OrderedDict, deque

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pytest
import pytz
from dagster._core.errors import DagsterExecutionInterruptedError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PlainSerializer,
    RootModel,
    computed_field,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import TzInfo

from dataforge_kafka_dagster import KafkaRecord
from dataforge_kafka_dagster.kafka import serialization
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.models import is_plain
from dataforge_kafka_dagster.kafka.serialization import (
    deserialize,
    format_of,
    json_lines,
    serialize_headers,
    serialize_key,
    serialize_value,
    to_json,
    to_protobuf_json,
)
from dataforge_kafka_dagster.kafka.sources import chunks


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: float


@dataclasses.dataclass
class Private:
    _id: str
    x: int

    @functools.cached_property
    def twice(self):
        return 2 * self.x


@dataclasses.dataclass(slots=True)
class Slots:
    _id: str
    x: int


class Number(int, enum.Enum):
    ONE = 1


class NotANumber(enum.Enum):
    NAN = float("nan")


class Inner(BaseModel):
    when: dt.date
    amount: decimal.Decimal


class Model(BaseModel):
    name: str
    inner: Inner


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        ({"a": 1}, b'{"a":1}'),
        ({}, b"{}"),
        (OrderedDict(b=1, a=2), b'{"b":1,"a":2}'),
        (types.MappingProxyType({"a": 1}), b'{"a":1}'),
        (Point(1, 2.5), b'{"x":1,"y":2.5}'),
        (
            Model(name="n", inner=Inner(when=dt.date(2013, 1, 1), amount=decimal.Decimal("1.10"))),
            b'{"name":"n","inner":{"when":"2013-01-01","amount":"1.10"}}',
        ),
        ("text", b"text"),
        ("", b""),
        ("é€😀", "é€😀".encode()),
        (b"\x00\xff", b"\x00\xff"),
        (b"", b""),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"ab"), b"ab"),
        (None, None),
    ],
)
def test_values_by_type(value, encoded):
    assert serialize_value(value) == encoded


@pytest.mark.parametrize("cls", [Private, Slots])
@pytest.mark.parametrize("write", [to_json, to_protobuf_json, serialize_value, serialize_key])
def test_a_dataclass_is_its_fields(cls, write):
    thing = cls("a", 2)
    assert getattr(thing, "twice", 4) == 4
    fields = b'{"_id":"a","x":2}'
    assert write(thing) == fields
    assert write({"in": [thing]}) == b'{"in":[' + fields + b"]}"


def test_a_field_without_a_value_is_refused():
    thing = Private("a", 2)
    del thing._id
    with pytest.raises(InvalidRecordError, match="_id"):
        serialize_value(thing, 0)


# As Amsterdam's mean time was; the data bases of time zones do not agree on it.
EARLY = dt.timezone(dt.timedelta(minutes=19, seconds=32))
UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")
NOON = dt.datetime(2020, 1, 1, 12)
BERLIN = pytz.timezone("Europe/Berlin")


class OtherUUID(uuid.UUID):
    """As asyncpg's is one."""


class OtherFloat(float):
    pass


class Text(str):
    __slots__ = ()


class Timed(BaseModel):
    td: dt.timedelta
    n: int


@pytest.mark.parametrize(
    ("leaf", "encoded"),
    [
        (None, "null"),
        (True, "true"),
        (2**63, str(2**63)),
        (-(2**63), str(-(2**63))),
        (1.5, "1.5"),
        ("ü\n\u2028", '"ü\\n\u2028"'),
        (dt.date(2013, 1, 2), '"2013-01-02"'),
        (dt.datetime(2013, 1, 2, 3, 4, 5, 678901), '"2013-01-02T03:04:05.678901"'),
        (dt.datetime(2013, 1, 2, tzinfo=dt.timezone.utc), '"2013-01-02T00:00:00+00:00"'),
        (dt.datetime(1880, 1, 2, tzinfo=EARLY), '"1880-01-01T23:40:28+00:00"'),
        (pd.Timestamp(dt.datetime(1880, 1, 2, tzinfo=EARLY)), '"1880-01-01T23:40:28+00:00"'),
        (dt.datetime(1880, 1, 2, tzinfo=dt.timezone.min), '"1880-01-02T00:00:00-23:59"'),
        (dt.datetime(2013, 7, 2, 12, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")), '"2013-07-02T12:00:00+02:00"'),
        # In summer by a winter's offset, as arithmetic with pytz leaves it, which is 11:00 in UTC all the same.
        (BERLIN.localize(NOON) + dt.timedelta(182), '"2020-07-01T12:00:00+01:00"'),
        (NOON.replace(tzinfo=BERLIN), '"2020-01-01T12:00:00+00:53"'),
        (NOON.replace(tzinfo=dt.timezone(dt.timedelta(hours=2, seconds=30))), '"2020-01-01T09:59:30+00:00"'),
        (NOON.replace(tzinfo=dt.timezone(dt.timedelta(microseconds=-2))), '"2020-01-01T12:00:00.000002+00:00"'),
        (dt.time(3, 4, 5), '"03:04:05"'),
        (decimal.Decimal("0.10"), '"0.10"'),
        (decimal.Decimal("12345678901234567890.123456789"), '"12345678901234567890.123456789"'),
        (UUID, f'"{UUID}"'),
        (OtherUUID(int=UUID.int), f'"{UUID}"'),
        (OtherFloat(0.5), "0.5"),
        (Colour.RED, '"red"'),
        (np.int64(7), "7"),
        (np.int8(-7), "-7"),
        (np.float64(0.5), "0.5"),
        (np.float32(0.5), "0.5"),
        (np.bool_(True), "true"),
        (np.datetime64("2013-01-02T03:04:05"), '"2013-01-02T03:04:05"'),
        (np.datetime64("2013-01-02"), '"2013-01-02T00:00:00"'),
        (np.datetime64("2013-01-02T03:04:05.012345000", "ns"), '"2013-01-02T03:04:05.012345"'),
        (np.datetime64("2013-01-02T03:04:05.123456789"), '"2013-01-02T03:04:05.123456789"'),
        (np.datetime64("NaT"), "null"),
        (np.datetime64("NaT", "ns"), "null"),
        (np.datetime64("NaT", "s"), "null"),
        (np.array([["2013-01-02T03:04:05.000000001", "NaT"]], "M8[ns]"), '[["2013-01-02T03:04:05.000000001",null]]'),
        (np.array("2013-01-02", "M8[D]"), '"2013-01-02T00:00:00"'),
        (np.float32(0.1), "0.1"),
        (np.uint64(2**64 - 1), str(2**64 - 1)),
        (np.array([[1, 2], [3, 4]]), "[[1,2],[3,4]]"),
        (np.array([[1, 2], [3, 4]]).T, "[[1,3],[2,4]]"),
        (np.array([0.1, 0.2, 0.3], np.float32)[::2], "[0.1,0.3]"),
        (np.array(["a", "b"]), '["a","b"]'),
        (np.array([1, "x", None], dtype=object), '[1,"x",null]'),
        (np.array(7), "7"),
        (np.array([1.5, 0.1], ">f4"), "[1.5,0.1]"),
        (np.array([[1, 2]], ">i2"), "[[1,2]]"),
        (np.array([True, False]), "[true,false]"),
        (np.array([["2013-01-02T03:04:05.000001"]], "M8[us]"), '[["2013-01-02T03:04:05.000001"]]'),
        (np.array([["2013-01-02", "2013-01-03"]], "M8[D]").T, '[["2013-01-02T00:00:00"],["2013-01-03T00:00:00"]]'),
        (pd.Timestamp("2013-01-02 03:04:05"), '"2013-01-02T03:04:05"'),
        (pd.NaT, "null"),
        (pd.NA, "null"),
        ((1, 2), "[1,2]"),
        ([{"x": [Point(1, 2)]}], '[{"x":[{"x":1,"y":2}]}]'),
        (Inner(when=dt.date(2013, 1, 1), amount=decimal.Decimal(1)), '{"when":"2013-01-01","amount":"1"}'),
        (types.MappingProxyType({"k": 1}), '{"k":1}'),
    ],
)
def test_json_forms_of_leaves(leaf, encoded):
    assert to_json({"leaf": leaf}).decode() == '{"leaf":' + encoded + "}"
    assert serialize_value({"leaf": leaf}).decode() == '{"leaf":' + encoded + "}"


@pytest.mark.parametrize("value", [5, 1.5, True, object(), {1, 2}, [1], (1,), dt.date(2013, 1, 1), UUID, Point, int])
def test_other_values_are_refused(value):
    with pytest.raises(InvalidRecordError) as caught:
        serialize_value(value, 3)
    assert caught.value.index == 3
    assert "record 3" in caught.value.culprit
    assert type(value).__name__ in str(caught.value)
    assert "mapping, dataclass, pydantic model, str or bytes" in caught.value.fix


@pytest.mark.parametrize(
    ("value", "field", "said"),
    [
        ({"a": {"b": [1, object()]}}, "a.b.1", "object"),
        ({"a": {1, 2}}, "a", "set"),
        ({"a": b"x"}, "a", "bytes"),
        ({"a": dt.timedelta(1)}, "a", "timedelta"),
        ({"a": 1 + 2j}, "a", "complex"),
        ({"a": np.array([1j])}, "a.0", "ndarray"),
        ({"a": np.complex64(1j)}, "a", "complex64"),
        ({"a": np.timedelta64(1, "s")}, "a", "timedelta64"),
        ({"a": np.array([1], "m8[s]")}, "a.0", "ndarray"),
        ({"a": np.longdouble(1)}, "a", "longdouble"),
        ({"a": pa.scalar((1, 2, 3), pa.month_day_nano_interval()).as_py()}, "a", "MonthDayNano"),
        ({"a": 2**64}, "a", "64-bit|too big"),
        ({"a": "\ud800"}, "a", "UTF-8|utf-8"),
        ({"a": {"b": {1: 2}}}, "a.b.1", "key must be str"),
        ({"ok": 1, Text("bad"): 2}, "'bad'", "key must be str"),
        ({"a": Timed(td=dt.timedelta(1), n=2**70)}, "a.n", "64-bit|too big"),
        (Point(object(), 1), "x", "object"),
        ({"a": Point(1, {3})}, "a.y", "set"),
    ],
)
def test_what_has_no_json_form_is_named_by_its_field(value, field, said):
    with pytest.raises(InvalidRecordError) as caught:
        serialize_value(value, 0)
    assert caught.value.field == field
    assert repr(field) in caught.value.culprit
    assert re.search(said, caught.value.cause)  # by orjson, whose words change
    assert caught.value.fix


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"a": NAN}, "a"),
        ({"a": {"b": [1, -INF]}}, "a.b.1"),
        (Point(1, INF), "y"),
        ({"a": None, "b": (NAN,)}, "b.0"),
        ({"a": np.float64("nan")}, "a"),
        ({"a": np.float32("nan")}, "a"),
        ({"a": np.float16("inf")}, "a"),
        ({"a": np.array([1.0, NAN])}, "a"),
        ({"a": decimal.Decimal("NaN")}, "a"),
        ({"a": None, "b": [decimal.Decimal("sNaN")]}, "b.0"),
        (Point(1, decimal.Decimal("-Infinity")), "y"),
        ({"a": NotANumber.NAN}, "a"),
        ({"a": types.MappingProxyType({"b": [NAN]})}, "a.b.0"),
    ],
)
def test_non_finite_floats_are_refused_and_never_become_null(value, field):
    with pytest.raises(InvalidRecordError) as caught:
        serialize_value(value, 7)
    assert caught.value.index == 7
    assert caught.value.field is not None
    assert caught.value.field.startswith(field)
    assert "NaN" in caught.value.cause


@pytest.mark.parametrize("into", [lambda inner: {"a": inner}, lambda inner: [inner], lambda inner: (inner,)])
def test_nan_is_found_as_deep_as_json_is_written(into):
    def nested(leaf, levels):
        return {"a": functools.reduce(lambda inner, _: into(inner), range(levels), leaf)}

    for levels in (60, 253):
        assert b"null" in serialize_value(nested(None, levels))
        for leaf in (NAN, decimal.Decimal("NaN"), np.array([[NAN]])):
            with pytest.raises(InvalidRecordError, match="neither NaN nor infinity|Recursion"):
                serialize_value(nested(leaf, levels))


class Leg(BaseModel):
    miles: float

    @computed_field
    @property
    def speed(self) -> float:
        return self.miles * INF


class Fare(BaseModel):
    leg: Leg | None = None
    price: float

    @field_serializer("price")
    def known(self, price: float) -> float:
        return {INF: 0.0, 0.0: NAN}.get(price, price)


@pytest.mark.parametrize(
    ("value", "field"),
    [(Leg(miles=1), "speed"), (Fare(leg=Leg(miles=1), price=1), "leg.speed"), ({"fare": Fare(price=0)}, "fare.price")],
)
def test_what_a_model_makes_of_its_fields_is_refused_if_it_is_not_finite(value, field):
    with pytest.raises(InvalidRecordError, match="neither NaN nor infinity") as caught:
        serialize_value(value)
    assert caught.value.field == field
    assert serialize_value(Fare(price=INF)) == b'{"leg":null,"price":0.0}'


def nested(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


# What stands between two values of the array that they are written as, and what looks like it.
MARK = serialization._BETWEEN
MARKS = [MARK, ["a", MARK, "b"], [MARK, MARK], f',"{MARK}",', [",", MARK], {MARK: [MARK, 1]}, "null", None, NAN]


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["a", MARK, "null"]), st.sampled_from([*MARKS, 1, Point(1, NAN), nested(252)]), max_size=2
        )
    )
)
def test_values_are_written_together_as_each_alone(values):
    texts = list(map(to_json, values))
    with_null = [i for i, text in enumerate(texts) if b"null" in text]
    assert json_lines(values) == (texts, with_null, sum(map(len, texts)))


@pytest.mark.parametrize(
    "value", [MARKS, [MARK], MARK, None, 1, [], {}], ids=["many", "list", "mark", "None", "int", "[]", "{}"]
)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_values_that_are_no_mappings_are_written_together_too(value, count):
    assert json_lines([value] * count).texts == [to_json(value)] * count


class Interrupted(typing.Mapping):
    """A mapping that is written when somebody cancels the run."""

    def __init__(self, interrupt):
        self.interrupt = interrupt

    def __getitem__(self, key):
        raise KeyError(key)

    def __len__(self):
        return 1

    def __iter__(self):
        raise self.interrupt


class Cancelled(BaseModel):
    it: typing.Any

    @field_serializer("it")
    def write(self, it):
        raise it


@pytest.mark.parametrize(
    "interrupt", [KeyboardInterrupt(), DagsterExecutionInterruptedError(), SystemExit(3)], ids=repr
)
@pytest.mark.parametrize("make", [Interrupted, lambda it: {"a": [Interrupted(it)]}, lambda it: Cancelled(it=it)])
def test_an_interrupt_while_a_value_is_written_is_no_error_of_the_value(interrupt, make):
    value = make(interrupt)
    for write in (to_json, to_protobuf_json, serialize_value):
        with pytest.raises(type(interrupt)):
            write(value)
    for rows in ([{"a": 1}, value, {"a": 2}], [KafkaRecord(value)]):
        with pytest.raises(type(interrupt)):
            list(chunks(rows, on_bad=lambda *_: None))


class Measured(BaseModel):
    it: set[float] | frozenset[float] | deque[float]


@pytest.mark.parametrize("kind", [set, frozenset, deque])
def test_what_is_not_finite_in_a_set_of_a_model_is_refused(kind):
    with pytest.raises(InvalidRecordError, match="record 1, field 'it.0': JSON has neither"):
        list(chunks([Measured(it=kind([1.0])), Measured(it=kind([INF]))]))
    with pytest.raises(InvalidRecordError, match="field 'it.0'"):
        serialize_value(Measured(it=kind([NAN])))


def test_of_many_values_a_wrong_one_is_an_error():
    with pytest.raises(TypeError, match="not JSON serializable"):
        json_lines([{"a": 1}, {"a": object()}])


class Tenant(enum.Enum):
    FIRST = UUID


class Grade(enum.Enum):
    GOOD = 1.5
    UNKNOWN = NAN


@dataclasses.dataclass
class Held:
    it: typing.Any


class Kept(BaseModel):
    it: typing.Any


# Values, and whether there is NaN or infinity in them.
FINITE = (
    None,
    True,
    1,
    1.5,
    "NaN null",
    dt.date(2024, 1, 1),
    dt.datetime(2024, 1, 1),
    decimal.Decimal("1.5"),
    Grade.GOOD,
)
FINITE += (uuid.UUID(int=1), np.float64(1.5), pd.Timestamp(0))
NOT_FINITE = (NAN, -INF, decimal.Decimal("-Infinity"), Grade.UNKNOWN, np.float64("nan"))
marked_leaves = st.sampled_from([(value, False) for value in FINITE] + [(value, True) for value in NOT_FINITE])


def held(inside):
    """Marked values inside one of another kind, which is marked if one of them is."""

    def fields(values):
        return dict(zip("abcd", values, strict=False))

    many = st.lists(inside, max_size=4)
    makers = (list, tuple, fields, lambda values: OrderedDict(fields(values)))
    makers += (lambda values: Held(it=values), lambda values: Kept(it=values))
    return st.builds(
        lambda make, pairs: (make([value for value, _ in pairs]), any(wrong for _, wrong in pairs)),
        st.sampled_from(makers),
        many,
    )


@given(st.lists(st.recursive(marked_leaves, held, max_leaves=6), min_size=1, max_size=8))
def test_a_row_is_refused_if_and_only_if_nan_or_infinity_is_in_it(marked):
    rows = [{"none": None, "no time": pd.NaT, "it": value} for value, _ in marked]
    wrong = [i for i, (_, is_wrong) in enumerate(marked) if is_wrong]
    if not wrong:
        assert [len(chunk.values) for chunk in chunks(rows)] == [len(rows)]
        return
    with pytest.raises(InvalidRecordError, match="neither NaN nor infinity") as caught:
        list(chunks(rows))
    assert caught.value.index == wrong[0]
    assert caught.value.field.startswith("it")


class Narrow(BaseModel):
    number: int | None
    share: float | None
    text: str = "a"
    flag: bool
    one: typing.Literal["a", 1]
    uuid: uuid.UUID
    many: list[bool]
    by_name: dict[str, list[bool | str]]

    @field_validator("text")
    @classmethod
    def valid(cls, text):
        return text

    @model_validator(mode="after")
    def all_valid(self):
        return self


class Dated(BaseModel, frozen=True):
    day: dt.date
    number: float
    when: dt.datetime | None = None
    name: str | None = None
    of: uuid.UUID | None = None


class Aliased(Dated):
    other: int = Field(1, alias="second")


anything = st.one_of(
    st.sampled_from([None, True, Number.ONE, UUID, b"a", dt.date(2024, 1, 1), dt.time(1), NAN, [NAN], {"a": 1}]),
    st.sampled_from(
        [{1: "a"}, {Text("a"): 1}, (1,), {1}, Text("a"), OtherUUID(int=1), OtherFloat(1.5), pd.Timestamp(0)]
    ),
    st.sampled_from(
        [Inner.model_construct(when=1), Point(1, 2), np.int64(1), np.float32(1.1), "\ud800", f',"{MARK}",']
    ),
    st.sampled_from(
        [Dated(day=dt.date(2024, 1, 1), number=1), iter(()), nested(300), dt.timedelta(1), object(), -(2**63)]
    ),
    st.integers(-(2**65), 2**65),
    st.floats(),
    st.text(),
    st.decimals(),
    st.datetimes(timezones=st.none() | st.timezones()),
)
valid = {
    "number": st.integers(-(2**65), 2**65) | st.none(),
    "share": st.floats() | st.none(),
    "text": st.text(),
    "flag": st.booleans(),
    "one": st.sampled_from(["a", 1]),
    "uuid": st.uuids(),
    "many": st.lists(st.booleans(), max_size=3),
    "by_name": st.dictionaries(st.text(), st.lists(st.booleans() | st.text(), max_size=2), max_size=3),
}
moments = st.datetimes(
    timezones=st.sampled_from(
        [None, dt.timezone.utc, TzInfo(0), TzInfo(5400), TzInfo(61), dt.timezone(dt.timedelta(1) / 9)]
    )
)
dated = {"day": st.dates(), "number": st.floats(), "when": st.none() | moments, "other": st.integers()}
dated |= {"name": st.none() | st.text(), "of": st.uuids()}


def models(cls, fields):
    return st.builds(cls.model_construct, **{name: fields[name] for name in cls.model_fields})


def with_anything(fields):
    return {name: values | anything for name, values in fields.items()}


@settings(max_examples=60)
@given(
    st.one_of(
        *(
            st.lists(models(cls, kind(fields)), min_size=1, max_size=4)
            for cls, fields in ((Narrow, valid), (Dated, dated), (Aliased, dated))
            for kind in (dict, with_anything)
        )
    )
)
def test_models_are_written_as_what_pydantic_makes_of_them(values):
    def by_pydantic(model):
        return serialization._dumps(model.model_dump(mode="json"), serialization._jsonable)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            texts = list(map(by_pydantic, values))
        except (TypeError, ValueError):
            with pytest.raises((TypeError, ValueError)):
                json_lines(values)
            return
        lines = json_lines(values)
        assert lines.texts == texts
        wrong = [i for i in lines.with_null if serialization._find(values[i], serialization._is_not_finite) is not None]
        if not wrong:
            assert [len(chunk.values) for chunk in chunks(values)] == [len(values)]
            return
        with pytest.raises(InvalidRecordError, match=f"record {wrong[0]}, .*JSON has neither NaN nor infinity"):
            list(chunks(values))


Shouted = typing.Annotated[str, PlainSerializer(str.upper)]


class Loud(BaseModel):
    name: Shouted


class Masked(BaseModel):
    name: typing.Annotated[str, PlainSerializer(lambda text: f"***{text[-2:]}", when_used="json")]
    n: int = 1
    at: dt.datetime = dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ("name", b"***89"),
        (["name", "n"], b'{"name":"***89","n":1}'),
        ("n", b"1"),
        ("at", b"2020-01-01T00:00:00+00:00"),
    ],
)
def test_a_key_is_masked_as_the_value_is(fields, key):
    for row in (Masked(name="123456789"), KafkaRecord(Masked(name="123456789"))):
        (chunk,) = chunks([row], fields)
        assert [text.encode() if isinstance(text, str) else text for text in chunk.keys] == [key]


class LoudInside(BaseModel):
    names: list[Shouted | None]


class LoudKeys(BaseModel):
    by_name: dict[Shouted, str]


class Counted(BaseModel):
    number: int = True
    share: float = 0
    when: dt.datetime = pd.Timestamp(123456789)

    @functools.cached_property
    def twice(self):
        return 2 * self.number


def used(model):
    assert model.twice == 2
    return model


@pytest.mark.parametrize(
    ("model", "encoded"),
    [
        (Loud(name="a"), b'{"name":"A"}'),
        (LoudInside(names=["a", None]), b'{"names":["A",null]}'),
        (LoudKeys(by_name={"a": "b"}), b'{"by_name":{"A":"b"}}'),
        # A default, and what is copied with other values, is not validated.
        (Counted(), b'{"number":1,"share":0.0,"when":"1970-01-01T00:00:00.123456"}'),
        (Counted(number=1, share=0.0), b'{"number":1,"share":0.0,"when":"1970-01-01T00:00:00.123456"}'),
        (Counted(number=1, when=NOON), b'{"number":1,"share":0.0,"when":"2020-01-01T12:00:00"}'),
        (Counted(share=0, when=NOON), b'{"number":1,"share":0.0,"when":"2020-01-01T12:00:00"}'),
        (used(Counted(number=1, share=1, when=NOON)), b'{"number":1,"share":1.0,"when":"2020-01-01T12:00:00"}'),
        (
            Aliased(day=NOON.date(), number=1, second=2),
            b'{"day":"2020-01-01","number":1.0,"when":null,"name":null,"of":null,"other":2}',
        ),
    ],
)
def test_of_a_model_what_pydantic_writes_is_written(model, encoded):
    assert json_lines([model] * 2).texts == [encoded] * 2
    assert to_json(model) == encoded


class Listed(BaseModel):
    many: list[int | float]


class DatedList(BaseModel):
    day: dt.date
    names: list[str]


@pytest.mark.parametrize(
    "model",
    [
        *(Dated(day=NOON.date(), number=1.0, when=NOON.replace(tzinfo=zone)) for zone in (EARLY, BERLIN, TzInfo(61))),
        Dated(day=NOON.date(), number=1.0, when=NOON.replace(tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))),
        Dated(day=NOON.date(), number=1.0, when=NOON.replace(1900, tzinfo=zoneinfo.ZoneInfo("Europe/Amsterdam"))),
        Listed.model_construct(many=[True, 1]),
        DatedList.model_construct(day=NOON.date(), names=[dt.time(1, 2, 3, 10_000), NOON.replace(tzinfo=EARLY)]),
        Dated.model_construct(day=NOON.date(), number=1.0, name=dt.time(1, 2, 3, 10_000)),
    ],
    ids=repr,
)
def test_values_that_orjson_writes_in_its_own_way_are_written_by_pydantic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert json_lines([model] * 2).texts == [orjson.dumps(model.model_dump(mode="json"))] * 2


def test_what_is_written_of_fields_alone():
    plain = [Narrow.model_construct(), Dated.model_construct()]
    others = [Aliased, Loud, LoudInside, LoudKeys, Model, Leg, Fare, Measured, Kept, Calm, Open, RootModel[int]]
    assert all(is_plain(type(model)) for model in plain)
    assert not any(map(is_plain, others))


def as_list(values):
    return list(values)


class Once(BaseModel):
    default: int = 1
    them: dict[str, list[typing.Iterable[float]]]


class Within(BaseModel):
    first: Once
    again: Once | None = None

    @model_validator(mode="before")
    @classmethod
    def valid(cls, fields):
        return fields


class Settled(BaseModel):
    here: typing.Annotated[typing.Iterable[int], AfterValidator(as_list)]
    default: typing.Iterable[int] = [2]
    unwritten: typing.Iterable[int] = Field(iter([3]), exclude=True, validate_default=True)


ONCE = {"them": {"a": [iter([NAN])]}}


@pytest.mark.parametrize(
    ("model", "field"),
    [(Once(**ONCE), "them"), (Within(first=ONCE), "first"), (RootModel[typing.Iterable[int]]([1]), "root")],
)
def test_what_a_model_gives_only_once_is_refused(model, field):
    # A chunk with a bad record is written again, and NaN is looked for.
    with pytest.raises(InvalidRecordError, match=f"record 0: .* field '{field}' of .* is an iter") as caught:
        list(chunks([model, model]))
    assert caught.value.fix == "Annotate it as a list, which pydantic makes of an iterator"
    with pytest.raises(InvalidRecordError):
        serialize_value({"it": model})
    with pytest.raises(TypeError):
        to_protobuf_json(model)


@pytest.mark.parametrize(
    ("model", "encoded"),
    [
        (Settled(here=iter([1])), b'{"here":[1],"default":[2]}'),
        (RootModel[Point](Point(1, 2.5)), b'{"x":1,"y":2.5}'),
        (Within(first=Once(them={})), b'{"first":{"default":1,"them":{}},"again":null}'),
    ],
)
def test_what_only_might_be_an_iterator_is_written(model, encoded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [value for chunk in chunks([model] * 2) for value in chunk.values] == [encoded] * 2


class Open(BaseModel, extra="allow"):
    a: int


@pytest.mark.parametrize(
    ("model", "field"), [(Open(a=1, b=[None, INF]), "b.1"), (RootModel[list[float]]([1.0, NAN]), "1")]
)
def test_what_is_not_finite_beside_a_models_fields_is_refused(model, field):
    with pytest.raises(InvalidRecordError, match="neither NaN nor infinity") as caught:
        list(chunks([model]))
    assert caught.value.field == field


class Calm(BaseModel):
    it: typing.Any = None
    none: None = None

    @field_serializer("it", when_used="json")
    def calmed(self, it):
        return "calm"


def test_whether_a_row_is_refused_does_not_depend_on_the_others():
    row = Kept(it=decimal.Decimal("NaN"))
    (chunk,) = chunks([row, *[Kept(it=None)] * 3])
    assert chunk.values[0] == serialize_value(row) == b'{"it":"NaN"}'


def test_a_value_that_is_written_short_may_hold_itself():
    cycle = []
    cycle.append(cycle)
    assert serialize_value(Calm(it=cycle)) == b'{"it":"calm","none":null}'


def test_why_a_model_cannot_be_written_is_told():
    with pytest.raises(InvalidRecordError, match=r"record 3: .*unknown type.*ndarray"):
        serialize_value(Kept(it=np.array([1.0])), 3)

    class Silent(BaseModel):
        def model_dump(self, **_options):
            raise NotImplementedError

    with pytest.raises(InvalidRecordError, match=r"as JSON: NotImplementedError\."):
        serialize_value(Silent())


def test_text_null_is_not_a_missing_value():
    assert serialize_value({"a": "null", "b": None}) == b'{"a":"null","b":null}'


def test_a_value_inside_itself_is_refused():
    value: dict = {}
    value["again"] = value
    with pytest.raises(InvalidRecordError, match="Recursion limit"):
        serialize_value(value)


def test_fixes_keep_the_spelling_of_json():
    value: list = []
    value.append(value)
    with pytest.raises(InvalidRecordError) as caught:
        serialize_value({"a": value})
    assert caught.value.fix == "Convert it to a type that JSON has"


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        (2**70, "Publish it as str"),
        ({1: 2}, "Make the keys str"),
        ("\ud800", "Remove the lone surrogate, as by .encode(errors='replace').decode()"),
        (Point("\ud800", 1), "Remove the lone surrogate, as by .encode(errors='replace').decode()"),
        (dt.timedelta(1), "Convert it first, as by .total_seconds()"),
        (pd.Timedelta(1), "Convert it first, as by .total_seconds()"),
        (np.timedelta64(1, "s"), "Convert it first, as by str(...)"),
        ({1}, "Convert it first, as by list(...)"),
        (1j, "Convert it first, as by str(...)"),
        (pd.Period("2020"), "Convert it first, as by str(...)"),
    ],
)
def test_what_has_no_json_form_is_told_how_to_have_one(value, fix):
    with pytest.raises(InvalidRecordError) as caught:
        serialize_value({"a": value})
    assert caught.value.fix == fix


@pytest.mark.parametrize(
    ("key", "encoded"),
    [
        (None, None),
        ("N14228", b"N14228"),
        ("é", "é".encode()),
        (b"\x00\xff", b"\x00\xff"),
        (bytearray(b"a"), b"a"),
        (memoryview(b"a"), b"a"),
        (7, b"7"),
        (-(2**70), str(-(2**70)).encode()),
        (True, b"true"),
        (False, b"false"),
        (1.5, b"1.5"),
        (decimal.Decimal("1.10"), b"1.10"),
        (UUID, str(UUID).encode()),
        (Tenant.FIRST, str(UUID).encode()),
        (dt.date(2013, 1, 2), b"2013-01-02"),
        (dt.datetime(2013, 1, 2, 3), b"2013-01-02T03:00:00"),
        (dt.datetime(1880, 1, 2, tzinfo=EARLY), b"1880-01-01T23:40:28+00:00"),
        (dt.time(3, 4, 5, 6), b"03:04:05.000006"),
        ({"a": 1, "b": "x"}, b'{"a":1,"b":"x"}'),
        (["a", 1], b'["a",1]'),
        (("a", 1), b'["a",1]'),
        (Point(1, 2.0), b'{"x":1,"y":2.0}'),
        (np.int64(7), b"7"),
        (np.str_("a"), b"a"),
        (np.array([0.5, 0.1], np.float32), b"[0.5,0.1]"),
        (pd.NaT, None),
        (pd.NA, None),
        (np.datetime64("NaT"), None),
        (np.datetime64("NaT", "ns"), None),
    ],
)
def test_keys_have_the_text_forms_of_javas_string_serializer(key, encoded):
    assert serialize_key(key) == encoded


MOMENTS = st.datetimes(timezones=st.none() | st.just(zoneinfo.ZoneInfo("Europe/Berlin")))
SINGLE = (
    st.sampled_from([Number.ONE, Colour.RED, UUID, np.datetime64("2024-01-01"), np.datetime64("2024-01-01T01", "ns")])
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(allow_nan=False, allow_infinity=False, width=32).map(np.float32)
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.dates()
    | st.times()
    | MOMENTS
)


@given(SINGLE)
@example(np.float32(1e13))
@example(np.float16(0.1))
def test_a_key_is_the_text_that_the_field_has_in_the_value(key):
    assert serialize_key(key) == to_json([key])[1:-1].strip(b'"')


@pytest.mark.parametrize("key", [decimal.Decimal("NaN"), decimal.Decimal("Infinity"), np.float32("nan"), INF])
def test_keys_that_are_no_finite_number_are_refused_with_their_field(key):
    with pytest.raises(InvalidRecordError, match=r"'tailnum'.*a key cannot be") as caught:
        serialize_key(key, 5, "tailnum")
    assert caught.value.field == "tailnum"


@pytest.mark.parametrize(
    "key", [np.timedelta64(1, "ns"), object(), {1}, NAN, INF, 1j, {"a": object()}, [{1}], int, "\ud800", {"a": NAN}]
)
def test_other_keys_are_refused(key):
    with pytest.raises(InvalidRecordError) as caught:
        serialize_key(key, 5, "tailnum")
    assert caught.value.index == 5
    assert "record 5" in caught.value.culprit
    assert caught.value.fix


def test_headers():
    assert serialize_headers(None) is None
    assert serialize_headers({}) == []
    assert serialize_headers({"a": "é", "b": b"\xff", "c": None}) == [("a", "é".encode()), ("b", b"\xff"), ("c", None)]
    assert serialize_headers([("a", "1"), ("a", "2")]) == [("a", b"1"), ("a", b"2")]


@pytest.mark.parametrize(
    "headers", [5, "ab", ["a"], [("a",)], [("a", 1)], {1: "a"}, {"a": 1.5}, {"a": ["b"]}, [None], {"a": "\ud800"}]
)
def test_wrong_headers_are_refused(headers):
    with pytest.raises(InvalidRecordError) as caught:
        serialize_headers(headers, 2)
    assert "record 2, headers" in caught.value.culprit
    assert "mapping" in caught.value.fix
    assert caught.value.index == 2


def test_header_names_that_are_no_text_are_refused():
    with pytest.raises(InvalidRecordError):
        serialize_headers({"\ud800": "a"})


@pytest.mark.parametrize(
    ("cls", "form"),
    [
        (dict, "json"),
        (Point, "json"),
        (Model, "json"),
        (str, "string"),
        (np.str_, "string"),
        (bytes, "bytes"),
        (bytearray, "bytes"),
        (int, None),
        (list, None),
        (type(None), None),
    ],
)
def test_formats(cls, form):
    assert format_of(cls) == form


def test_deserialize_is_the_way_back():
    assert deserialize(b'{"a":1}', "json") == {"a": 1}
    assert deserialize("é".encode(), "string") == "é"
    assert deserialize(b"\xff", "bytes") == b"\xff"
    assert deserialize(None, "json") is None
    with pytest.raises(ValueError):  # noqa: PT011
        deserialize(b"{", "json")
    with pytest.raises(ValueError):  # noqa: PT011
        deserialize(b"\xff", "string")


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.dictionaries(
    st.text(), st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
)


@given(VALUES)
def test_any_json_value_comes_back(value):
    encoded = serialize_value(value)
    assert json.loads(encoded) == value
    assert deserialize(encoded, "json") == value


@given(st.text())
def test_any_text_comes_back(text):
    assert deserialize(serialize_value(text), "string") == text


@pytest.mark.parametrize("micros", [0, 1, 123, 10_000, 99_999, 100_000])
def test_times_and_datetimes_are_iso_8601(micros):
    time, moment = dt.time(1, 2, 3, micros), dt.datetime(2020, 1, 2, 3, 4, 5, micros)
    zoned = moment.replace(tzinfo=dt.timezone(dt.timedelta(hours=-5)))
    values = {"t": time, "d": moment.date(), "m": moment, "z": zoned, "in": [time, moment]}
    assert json.loads(to_json(values)) == {
        "t": time.isoformat(),
        "d": "2020-01-02",
        "m": moment.isoformat(),
        "z": zoned.isoformat(),
        "in": [time.isoformat(), moment.isoformat()],
    }
