import base64
import concurrent.futures
import dataclasses
import datetime as dt
import decimal
import enum
import http.server
import importlib.metadata
import itertools
import json
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
import uuid
from pathlib import Path
from typing import Annotated, Generic, Literal, NewType, TypeVar

import narwhals as nw
import numpy as np
import orjson
import pandas as pd
import polars as pl
import pyarrow as pa
import pydantic.dataclasses
import pytest
from confluent_kafka.schema_registry import Schema, SchemaReference
from conftest import mostly_slow
from google.protobuf import descriptor_pb2, timestamp_pb2
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    RootModel,
    ValidationError,
    computed_field,
    create_model,
    field_serializer,
)

from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaConfigError, KafkaError, Remedy
from dataforge_kafka_dagster.kafka.models import KNOWS_NAMES
from dataforge_kafka_dagster.kafka.protobuf import _class_at, message_of_text
from dataforge_kafka_dagster.kafka.records import KafkaRecord
from dataforge_kafka_dagster.kafka.registry import SchemaRegistry, SchemaRegistryConfig, client_options
from dataforge_kafka_dagster.kafka.schema_types import rows_of_frame
from dataforge_kafka_dagster.kafka.schemas import KafkaSchema, SchemaDecoder, SchemaEncoder, SchemaEncoders
from dataforge_kafka_dagster.kafka.serialization import serialize_value, to_json
from dataforge_kafka_dagster.kafka.sources import chunks

UTC = dt.timezone.utc
FORMATS = ["avro", "json_schema", "protobuf"]
FLIGHT = {
    "type": "record",
    "name": "Flight",
    "namespace": "org.example",
    "fields": [
        {"name": "tailnum", "type": "string"},
        {"name": "delay", "type": ["null", "long"], "default": None},
        {"name": "at", "type": ["null", {"type": "long", "logicalType": "timestamp-micros"}], "default": None},
    ],
}
PROTO = """
syntax = "proto3";
package org.example;
import "google/protobuf/timestamp.proto";
message Flight { string tailnum = 1; optional int64 delay = 2; google.protobuf.Timestamp at = 3; }
"""


class Kind(enum.Enum):
    JET = "jet"
    PROP = "prop"


@dataclasses.dataclass
class Place:
    lat: float
    lon: float


@dataclasses.dataclass
class Flight:
    tailnum: str
    delay: int | None
    at: dt.datetime
    day: dt.date
    origin: Place
    carriers: list[str]
    kind: Kind = Kind.JET
    note: str = "none"


class Fare(BaseModel):
    id: uuid.UUID
    price: Annotated[decimal.Decimal, Field(max_digits=8, decimal_places=2)]
    seat: Literal["aisle", "window"] | None = None
    raw: bytes = b""


class Aliased(BaseModel):
    tailnum: str = Field(alias="tailNumber")


FLIGHTS = [
    Flight("N1", 3, dt.datetime(2013, 1, 1, 5, 15, 0, 123456, UTC), dt.date(2013, 1, 1), Place(40.5, -73.5), ["UA"]),
    Flight("N2", None, dt.datetime(2013, 1, 2, tzinfo=UTC), dt.date(2013, 1, 2), Place(1.0, 2.0), [], Kind.PROP, "x"),
]


@pytest.fixture
def registry():
    """confluent-kafka's registry inside this process."""
    return SchemaRegistry(SchemaRegistryConfig(url="mock://"))


def encoder(registry, schema, topic="flights", part="value"):
    return SchemaEncoder(registry, KafkaSchema.parse(schema), topic, part)


def frame_of(library, columns):
    frame = pl.DataFrame(columns)
    return nw.from_native({"polars": frame, "pandas": frame.to_pandas(), "pyarrow": frame.to_arrow()}[library])


def test_threads_that_come_first_together_settle_the_schema_once(registry, monkeypatch):
    settled = []

    def settle(self, like, key):
        settled.append(like)
        time.sleep(0.1)
        return KafkaSchema.of(type(like))

    monkeypatch.setattr(SchemaEncoder, "_settled", settle)
    encode = encoder(registry, "avro")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(encode.prepare, [_Fare(1)] * 4))
    assert settled == [_Fare(1)]


@dataclasses.dataclass
class _Fare:
    cents: int


# What a schema may be given as.


def test_a_schema_is_parsed_from_what_metadata_can_hold():
    assert KafkaSchema.parse("avro") == KafkaSchema(format="avro")
    assert KafkaSchema.parse("protobuf").format == "protobuf"
    assert KafkaSchema.parse("latest").use_latest_version
    assert KafkaSchema.parse("schemas/flight.avsc") == KafkaSchema(format="avro", file="schemas/flight.avsc")
    assert KafkaSchema.parse("flight.json").format == "json_schema"
    assert KafkaSchema.parse("flight.proto").format == "protobuf"
    assert json.loads(KafkaSchema.parse({"text": FLIGHT}).text) == FLIGHT
    schema = KafkaSchema(text=json.dumps(FLIGHT), auto_register=False, subject_strategy="record")
    assert KafkaSchema.parse(schema) is schema
    assert KafkaSchema.parse(json.loads(json.dumps(schema.to_metadata()))) == schema
    assert pickle.loads(pickle.dumps(schema)) == schema


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("avrow", "names no schema"),
        (3, "names no schema"),
        ({"formt": "avro"}, "Extra inputs"),
        ({"format": "thrift"}, "'avro', 'json_schema' or 'protobuf'"),
        ({"use_latest_version": True, "text": "{}"}, "leave out text"),
        ({"use_latest_version": True, "subject_strategy": "record"}, "set name"),
        ({"text": "{}", "file": "a.avsc"}, "give one of them"),
        ({"format": "avro", "message": "a:B"}, "format='protobuf'"),
        ({"message": "flights_pb2"}, "import path"),
    ],
)
def test_what_is_no_schema_is_refused_with_what_is_wrong(given, said):
    with pytest.raises(KafkaConfigError, match="schema") as caught:
        KafkaSchema.parse(given)
    assert said in caught.value.cause


@pytest.mark.parametrize("form", mostly_slow(FORMATS))
def test_dataclasses_make_their_schema_and_come_back_as_mappings(registry, form):
    encode = encoder(registry, KafkaSchema.of(Flight, format=form))
    first, second = (SchemaDecoder(registry)(data, form) for data in encode(FLIGHTS))
    text = {"avro": lambda value: value, "json_schema": str, "protobuf": str}[form]
    at = FLIGHTS[0].at.isoformat() if form == "json_schema" else FLIGHTS[0].at
    assert first == {
        "tailnum": "N1",
        "delay": 3,
        "at": at,
        "day": text(dt.date(2013, 1, 1)),
        "origin": {"lat": 40.5, "lon": -73.5},
        "carriers": ["UA"],
        "kind": "jet",
        "note": "none",
    }
    assert second["delay"] is None
    assert second["carriers"] == []
    # The same without being told the class.
    assert encoder(registry, form)(FLIGHTS) == encode(FLIGHTS)


def test_pydantic_models_make_their_schema_with_logical_types(registry):
    schema = KafkaSchema.of(Fare, name="org.example.Fare")
    fields = {field["name"]: field["type"] for field in json.loads(schema.text)["fields"]}
    assert json.loads(schema.text)["name"] == "org.example.Fare"
    assert fields["id"] == {"type": "string", "logicalType": "uuid"}
    assert fields["price"] == {"type": "bytes", "logicalType": "decimal", "precision": 8, "scale": 2}
    assert fields["seat"] == ["null", "string"]
    fare = Fare(id=uuid.uuid4(), price=decimal.Decimal("12.50"), seat="aisle", raw=b"\x00")
    (data,) = encoder(registry, schema)([fare])
    assert SchemaDecoder(registry)(data, "avro") == fare.model_dump()


def test_a_type_that_avro_does_not_have_is_named():
    class Odd(BaseModel):
        price: decimal.Decimal

    class Odder(BaseModel):
        thing: object

    with pytest.raises(InvalidRecordError, match=r"Odd\.price.*max_digits"):
        KafkaSchema.of(Odd)
    with pytest.raises(InvalidRecordError, match=r"Odder\.thing"):
        KafkaSchema.of(Odder)
    with pytest.raises(KafkaConfigError, match="str"):
        KafkaSchema.of(str)


def test_a_class_inside_itself_is_named_not_repeated(registry):
    schema = KafkaSchema.of(Node)
    (data,) = encoder(registry, schema)([Node(1, Node(2, None))])
    assert SchemaDecoder(registry)(data, "avro") == {"n": 1, "next": {"n": 2, "next": None}}


@pytest.mark.parametrize("form", mostly_slow(FORMATS))
def test_a_class_that_is_there_again_is_one_type(registry, form):
    given = Leg(Place(1.0, 2.0), Place(3.0, 4.0), [Place(5.0, 6.0)], Node(1, Node(2, None)))
    (data,) = encoder(registry, {"format": form, "name": "org.example.Leg"})([given])
    assert SchemaDecoder(registry)(data, form) == dataclasses.asdict(given)
    (data,) = encoder(registry, {"format": form, "name": "org.example.N"}, "nodes")([given.node])
    assert SchemaDecoder(registry)(data, form) == dataclasses.asdict(given.node)


@pytest.mark.parametrize("form", mostly_slow(FORMATS))
def test_classes_of_one_name_are_several_types(registry, form):
    given = Invoice(Order(Order.Item(1)), Invoice.Item("a"))
    (data,) = encoder(registry, {"format": form})([given])
    assert SchemaDecoder(registry)(data, form) == dataclasses.asdict(given)


@dataclasses.dataclass
class Node:
    n: int
    next: "Node | None"


@dataclasses.dataclass
class Leg:
    origin: Place
    dest: Place
    stops: list[Place]
    node: Node


@dataclasses.dataclass
class Order:
    @dataclasses.dataclass
    class Item:
        n: int

    item: Item


@dataclasses.dataclass
class Invoice:
    @dataclasses.dataclass
    class Item:
        name: str

    order: Order
    item: Item


def test_a_default_that_its_type_does_not_have_is_left_out(registry):
    class Odd(BaseModel):
        price: Annotated[decimal.Decimal, Field(max_digits=8, decimal_places=2)] = 0
        count: int = 2**63
        ratio: float = float("nan")
        most: float = float("inf")
        raw: bytes = "x"
        day: dt.date = 0
        share: float = 1
        name: str = "x"
        legs: list[float] = [float("nan")]

    schema = json.loads(KafkaSchema.of(Odd).text)
    assert {field["name"]: field["default"] for field in schema["fields"] if "default" in field} == {
        "share": 1,
        "name": "x",
    }
    assert encoder(registry, KafkaSchema.of(Odd)).compatibility().compatible
    text = KafkaSchema.of(Odd, format="json_schema").text
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["properties"]["name"]["default"] == "x"
    assert "default" not in json.loads(text)["properties"]["ratio"]


def test_a_record_inside_one_that_is_given_its_name_has_another(registry):
    (data,) = encoder(registry, KafkaSchema.of(Order, name="shop.Item"))([Order(Order.Item(1))])
    assert SchemaDecoder(registry)(data, "avro") == {"item": {"n": 1}}


# Frames.

COLUMNS = {
    "i": [1, None],
    "s": ["a", None],
    "b": [True, None],
    "f": [1.5, None],
    "day": [dt.date(2013, 1, 1), None],
    "at": [dt.datetime(2013, 1, 1, 5, tzinfo=UTC), None],
    "local": [dt.datetime(2013, 1, 1, 5), None],
}


@pytest.mark.parametrize("library", mostly_slow(["polars", "pandas", "pyarrow"]))
def test_a_frames_columns_make_avros_logical_types_and_nulls(registry, library):
    frame = frame_of(library, COLUMNS)
    encode = encoder(registry, "avro")
    encode.prepare(frame)
    first, second = (SchemaDecoder(registry)(data, "avro") for data in encode(encode.rows(frame)))
    whole = {name: values[0] for name, values in COLUMNS.items()}
    if library == "pandas":  # which has no dates, and no integers beside missing ones
        whole |= {"day": first["day"]}
        assert str(first["day"])[:10] == "2013-01-01"
    assert first == whole
    assert second == dict.fromkeys(COLUMNS)


def test_decimals_lists_and_structs_of_frames_have_avro_types(registry):
    columns = {
        "price": pl.Series([decimal.Decimal("1.25"), None], dtype=pl.Decimal(10, 2)),
        "tags": [["a", None], None],
        "place": [{"lat": 1.5, "lon": 2.5}, None],
        "clock": [dt.time(1, 2, 3), None],
    }
    for library in ("polars", "pyarrow"):
        frame = frame_of(library, columns)
        encode = encoder(registry, "avro", library)
        encode.prepare(frame)
        first, second = (SchemaDecoder(registry)(data, "avro") for data in encode(encode.rows(frame)))
        assert first == {name: next(iter(values)) for name, values in columns.items()}
        assert second == dict.fromkeys(columns)
        schema = json.loads(registry.client.get_schema(encode.registered.id).schema_str)
        price = {"type": "bytes", "logicalType": "decimal", "precision": 10, "scale": 2}
        assert schema["fields"][0] == {"name": "price", "type": ["null", price], "default": None}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("library", ["polars", "pyarrow"])
def test_decimals_inside_lists_and_structs_have_a_type(registry, library, form):
    row = {"prices": [decimal.Decimal("1.25")], "fare": {"net": decimal.Decimal("-2.50")}}
    encode = encoder(registry, form, library)
    frame = frame_of(library, {name: [value] for name, value in row.items()})
    if not hasattr(frame["prices"].dtype.inner, "scale"):
        pytest.skip("this narwhals does not tell it")
    encode.prepare(frame)
    (value,) = encode(encode.rows(frame))
    as_text = {"prices": ["1.25"], "fare": {"net": "-2.50"}}
    assert SchemaDecoder(registry)(value, form) == (row if form == "avro" else as_text)


def test_the_time_of_a_column_has_no_format_that_asks_for_an_offset(registry):
    encode = encoder(registry, "json_schema")
    encode.prepare(frame_of("polars", {"clock": [dt.time(12)]}))
    schema = json.loads(registry.client.get_schema(encode.registered.id).schema_str)
    assert "format" not in str(schema["properties"]["clock"])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("topic", ["orders", "shop.orders"])
def test_structs_of_one_name_are_several_types(registry, topic, form):
    row = {"orders": {"x": 1}, "a": {"b_c": {"q": 1}}, "a_b": {"c": {"q": "s"}}}
    encoders = SchemaEncoders(encoder(registry, form, topic), None, form)
    (chunk,) = chunks(pl.DataFrame([row]), encoders=encoders)
    assert [SchemaDecoder(registry)(value, form) for value in chunk.values] == [row]


@pytest.mark.parametrize("form", ["json_schema", "protobuf"])
def test_frames_have_null_for_nan_in_formats_that_have_no_nan(registry, form):
    frame = frame_of("polars", {"f": [1.5, float("nan"), None]})
    encode = encoder(registry, form)
    encode.prepare(frame)
    assert [SchemaDecoder(registry)(data, form)["f"] for data in encode(encode.rows(frame))] == [1.5, None, None]


@pytest.mark.parametrize("library", ["polars", "pyarrow"])
def test_frames_have_null_for_nan_in_lists_and_structs_too(registry, library):
    frame = frame_of(library, {"l": [[1.5, float("nan")], None], "s": [{"x": [{"y": float("nan")}]}, {"x": None}]})
    encode = encoder(registry, "json_schema")
    encode.prepare(frame)
    rows = [{"l": [1.5, None], "s": {"x": [{"y": None}]}}, {"l": None, "s": {"x": None}}]
    assert [SchemaDecoder(registry)(data, "json_schema") for data in encode(encode.rows(frame))] == rows


def test_lists_in_a_column_of_pandas_have_null_for_nan_too(registry):
    encode = encoder(registry, KafkaSchema(format="json_schema", text='{"title": "Any", "type": "object"}'))
    frame = nw.from_native(pd.DataFrame({"l": [[1.5, float("nan")], [float("inf")]]}))
    rows = encode.rows(frame)
    assert SchemaDecoder(registry)(encode(rows[:1])[0], "json_schema") == {"l": [1.5, None]}
    with pytest.raises(InvalidRecordError, match="NaN nor infinity"):
        encode(rows[1:])


def test_missing_values_of_pandas_are_none():
    frame = pd.DataFrame(
        {"f": [1.5, float("nan")], "t": [pd.NaT, pd.Timestamp(2013, 1, 1)], "n": pd.array([None, 2], "Int64")}
    )
    assert rows_of_frame(nw.from_native(frame)) == [
        {"f": 1.5, "t": None, "n": None},
        {"f": None, "t": dt.datetime(2013, 1, 1), "n": 2},
    ]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"a b": [1]}, "column 'a b': Avro does not allow this name"),
        ({"nothing": [None]}, "column 'nothing': no Avro type can be derived from a column of nothing but nulls"),
        ({"wait": [dt.timedelta(1)]}, "column 'wait'"),
    ],
)
def test_columns_without_an_avro_form_are_named(registry, columns, said):
    with pytest.raises(InvalidRecordError) as caught:
        encoder(registry, "avro").prepare(nw.from_native(pl.DataFrame(columns)))
    assert said in str(caught.value)


@pytest.mark.parametrize("form", FORMATS)
def test_a_decimal_of_negative_scale_has_no_derived_type(registry, form):
    hundreds = pa.array([decimal.Decimal(1200)]).cast(pa.decimal128(5, -2))
    table = pa.table({"d": hundreds})
    for frame in (table, table.to_pandas(types_mapper=pd.ArrowDtype)):
        with pytest.raises(InvalidRecordError, match="column 'd': no Avro type can be derived from") as caught:
            encoder(registry, form).prepare(nw.from_native(frame, eager_only=True))
        assert caught.value.field == "d"


@pytest.mark.parametrize("form", FORMATS)
def test_a_date_of_pandas_that_python_does_not_have_is_refused_with_row_and_column(registry, form):
    frame = pd.DataFrame({"n": [1, 2], "d": np.array(["2020-01-01", "12000-01-01"], "M8[s]")})
    encoders = SchemaEncoders(encoder(registry, form), None, form)
    with pytest.raises(InvalidRecordError, match="record 11, field 'd': Python cannot read it: year 12000") as caught:
        list(chunks(frame, start=10, encoders=encoders))
    assert (caught.value.index, caught.value.field) == (11, "d")
    bad = []
    found = chunks(frame, encoders=encoders, on_bad=lambda row, index, error: bad.append((row["n"], index)))
    assert [SchemaDecoder(registry)(value, form)["n"] for chunk in found for value in chunk.values] == [1]
    assert bad == [(2, 1)]


def test_keys_of_a_frame_have_the_type_of_their_column(registry):
    frame = frame_of("polars", {"tailnum": ["N1"], "day": [dt.date(2013, 1, 1)]})
    one, two = encoder(registry, "avro", "one", "key"), encoder(registry, "avro", "two", "key")
    one.prepare(frame, ["tailnum"])
    two.prepare(frame, ["tailnum", "day"])
    assert SchemaDecoder(registry)(one(["N1"])[0], "avro") == "N1"
    key = {"tailnum": "N1", "day": dt.date(2013, 1, 1)}
    assert SchemaDecoder(registry)(two([key])[0], "avro") == key
    assert one.registered.subject == "one-key"
    assert one.registered.part == "key"


@pytest.mark.parametrize("form", ["avro", "json_schema"])
def test_a_key_schema_is_that_of_the_first_key_that_is_a_single_value(registry, form):
    for number, (key, same) in enumerate([("N1", "N1"), (7, 7), (Kind.PROP, Kind.PROP.value)]):
        encoders = SchemaEncoders(None, encoder(registry, form, f"first-{number}", part="key"))
        (chunk,) = chunks([{"id": None, "n": 1}, {"id": key, "n": 2}], "id", encoders=encoders)
        assert [SchemaDecoder(registry)(data, form) for data in chunk.keys] == [None, same]
    at = dt.datetime(2013, 1, 1, tzinfo=UTC)
    (data,) = encoder(registry, "avro", "first-at", part="key")([at])
    assert SchemaDecoder(registry)(data, "avro") == at


def test_a_key_schema_that_no_key_tells_is_refused(registry):
    for form, key, cause in (
        ("protobuf", "N1", "a single value is no Protobuf message"),
        ("avro", {"id": "N1", "day": "x"}, "dict does not say which types"),
        ("avro", decimal.Decimal(1), "Decimal does not say which types"),
    ):
        with pytest.raises(KafkaConfigError, match=f"key schema '{form}' of topic .*: it cannot be derived: .*{cause}"):
            encoder(registry, form, part="key")([key])
    with pytest.raises(InvalidRecordError, match=r"record 1: its key does not fit the schema"):
        encoder(registry, "avro", part="key")(["N1", 2])


def test_a_decimal_by_itself_is_no_avro_key(registry):
    frame = frame_of("polars", {"price": [decimal.Decimal("1.25")], "day": [dt.date(2013, 1, 1)]})
    with pytest.raises(KafkaConfigError, match="no decimal outside a record") as caught:
        encoder(registry, "avro", part="key").prepare(frame, ["price"])
    assert "Cast" in caught.value.fix
    assert registry.client.get_subjects() == []
    for form, fields in (("avro", ["price", "day"]), ("json_schema", ["price"])):
        encoders = SchemaEncoders(None, encoder(registry, form, form, part="key"))
        (chunk,) = chunks(frame, fields, encoders=encoders)
        assert len(chunk.keys) == 1


@pytest.mark.parametrize(
    "ids", [["a", None], [1.5, None], pd.array([1, None], "Int64"), [pd.Timestamp(2013, 1, 1), None]]
)
def test_missing_keys_of_pandas_are_none_also_where_only_keys_have_a_schema(registry, ids):
    frame = pd.DataFrame({"id": ids, "at": [pd.Timestamp(1), pd.NaT]})
    encoders = SchemaEncoders(None, encoder(registry, "avro", part="key"))
    (chunk,) = chunks(frame, "id", encoders=encoders)
    assert [SchemaDecoder(registry)(key, "avro") for key in chunk.keys] == [ids[0], None]
    assert [json.loads(value)["at"] for value in chunk.values] == ["1970-01-01T00:00:00.000000001", None]


# What the registry is asked.


@pytest.mark.parametrize(
    ("strategy", "subject"),
    mostly_slow(
        [("topic", "flights-value"), ("record", "org.example.Flight"), ("topic_record", "flights-org.example.Flight")]
    ),
)
def test_the_subject_follows_the_strategy(registry, strategy, subject):
    texts = {"avro": json.dumps(FLIGHT), "json_schema": '{"title": "org.example.Flight", "type": "object"}'}
    for form, text in (texts | {"protobuf": PROTO}).items():
        encode = encoder(registry, KafkaSchema(format=form, text=text, subject_strategy=strategy))
        (data,) = encode([{"tailnum": "N1"}])
        assert encode.registered.subject == subject
        assert int.from_bytes(data[1:5], "big") == encode.registered.id
        registry.client.delete_subject(subject)


def test_a_json_schema_without_a_title_has_no_record_to_name_a_subject(registry):
    schema = KafkaSchema(format="json_schema", text='{"type": "object"}', subject_strategy="record")
    with pytest.raises(KafkaConfigError, match="title"):
        encoder(registry, schema)([{}])


@pytest.mark.parametrize("form", FORMATS)
def test_without_auto_register_the_schema_must_be_there(registry, form):
    closed = KafkaSchema.of(Flight, format=form, auto_register=False)
    with pytest.raises(KafkaError, match="flights-value") as caught:
        encoder(registry, closed)(FLIGHTS)
    assert "auto_register" in caught.value.fix
    assert registry.client.get_subjects() == []
    encoder(registry, KafkaSchema.of(Flight, format=form))(FLIGHTS)
    encode = encoder(registry, closed)
    assert encode(FLIGHTS)
    assert encode.registered.version == 1


@pytest.mark.parametrize(("form", "text"), mostly_slow([("avro", json.dumps(FLIGHT)), ("protobuf", PROTO)]))
def test_the_latest_version_is_the_registrys(registry, form, text):
    registry.client.register_schema("flights-value", Schema(text, form.upper()))
    encode = encoder(registry, KafkaSchema(format=form, use_latest_version=True))
    (data,) = encode([{"tailnum": "N1", "delay": 2}])
    assert SchemaDecoder(registry)(data, form) == {"tailnum": "N1", "delay": 2, "at": None}
    assert (encode.registered.version, encode.registered.subject) == (1, "flights-value")
    with pytest.raises(KafkaConfigError, match=f"is of type {form.upper()}, not JSON"):
        encoder(registry, KafkaSchema(format="json_schema", use_latest_version=True))([{}])


def test_a_dataclass_with_slots_makes_its_schema(registry):
    @dataclasses.dataclass(slots=True)
    class Slim:
        n: int

    avro = encoder(registry, "avro")
    assert SchemaDecoder(registry)(avro([Slim(1)])[0], "avro") == {"n": 1}


def test_columns_of_one_name_in_protobufs_json_are_refused(registry):
    frame = frame_of("polars", {"a_b": [1], "aB": [2]})
    with pytest.raises(InvalidRecordError, match="Rename one of the fields"):
        encoder(registry, "protobuf").prepare(frame)


def _compiles(text):
    """Whether protoc takes a schema as the registry has it; Python's own library is less strict."""
    file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(text))
    google = descriptor_pb2.FileDescriptorProto()
    timestamp_pb2.DESCRIPTOR.CopyToProto(google)
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "known.bin"
        known.write_bytes(descriptor_pb2.FileDescriptorSet(file=[google, file]).SerializeToString())
        command = [f"--descriptor_set_in={known}", f"--python_out={folder}", file.name]
        done = subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *command], timeout=60, check=False)
    return done.returncode == 0


@dataclasses.dataclass
class Trip:
    Place: Place
    other: Place | None = None


@pytest.mark.parametrize(
    "values",
    mostly_slow(
        [
            pl.DataFrame({"origin": [{"lat": 1}]}),
            pl.DataFrame({"a": [{"a": {"a": 1}}], "_a": [2], "at": [dt.datetime(2020, 1, 1, tzinfo=UTC)]}),
            pl.DataFrame({"map": [{"x": 1}], "string": [[{"y": 2}]]}),
            [Trip(Place(1.0, 2.0))],
        ]
    ),
)
def test_protoc_takes_what_is_derived(registry, values):
    encoders = SchemaEncoders(encoder(registry, "protobuf"), None, "protobuf")
    (chunk,) = chunks(values, encoders=encoders)
    rows = values.to_dicts() if isinstance(values, pl.DataFrame) else list(map(dataclasses.asdict, values))
    assert [SchemaDecoder(registry)(data, "protobuf") for data in chunk.values] == rows
    assert _compiles(registry.client.get_latest_version("flights-value").schema.schema_str)


SEVERAL = """
syntax = "proto3";
package shop;
import "money.proto";
message Order {
  message Item { string name = 1; shop.Money price = 2; }
  repeated Item items = 1;
}
message Refund { float share = 1; map<string, double> by = 2; Order.Item item = 3; }
"""
MONEY = 'syntax = "proto3"; package shop; message Money { int64 cents = 1; }'


@pytest.mark.parametrize(
    ("message", "index"),
    mostly_slow(
        [
            ("Order.Item", b"\x04\x00\x00"),
            ("shop.Order.Item", b"\x04\x00\x00"),
            ("Refund", b"\x02\x02"),
            ("shop.Order", b"\x00"),
        ]
    ),
)
def test_a_message_of_the_latest_version_is_named_wherever_it_is(registry, message, index):
    client = registry.client
    client.register_schema("money", Schema(MONEY, "PROTOBUF"))
    references = [SchemaReference("money.proto", "money", 1)]
    client.register_schema("flights-value", Schema(SEVERAL, "PROTOBUF", references))
    item = {"name": "pen", "price": {"cents": 150}}
    row = item if message.endswith("Item") else {"items": [item]} if message.endswith("Order") else {"item": item}
    latest = {"format": "protobuf", "use_latest_version": True}
    with pytest.raises(KafkaConfigError, match="it has the messages Order, Refund; name one"):
        encoder(registry, latest)([row])
    with pytest.raises(KafkaConfigError, match="no message 'Item', but Order, Order.Item, Refund"):
        encoder(registry, latest | {"message": "Item"})([row])
    (data,) = encoder(registry, latest | {"message": message})([row])
    assert data[5 : 5 + len(index)] == index
    decoded = SchemaDecoder(registry)(data, "protobuf")
    assert {name: decoded[name] for name in row} == row


def test_what_a_latest_version_imports_may_have_any_name_and_form(registry):
    """Also that of a descriptor, as confluent-kafka registers it, and what two files import."""
    client = registry.client
    file = descriptor_pb2.FileDescriptorProto(name="x", package="shop", syntax="proto3")
    file.message_type.add(name="Money").field.add(name="cents", number=1, type=3, label=1)
    client.register_schema("money", Schema(base64.b64encode(file.SerializeToString()).decode(), "PROTOBUF"))
    money = SchemaReference("money.proto", "money", 1)
    inner = 'syntax = "proto3"; import "money.proto"; message Tax { shop.Money of = 1; }'
    client.register_schema("tax", Schema(inner, "PROTOBUF", [money]))
    text = 'syntax = "proto3"; import "money.proto"; import "schema.proto"; message Bill { shop.Money sum = 1; Tax tax = 2; }'
    client.register_schema(
        "flights-value", Schema(text, "PROTOBUF", [money, SchemaReference("schema.proto", "tax", 1)])
    )
    row = {"sum": {"cents": 5}, "tax": {"of": {"cents": 1}}}
    (data,) = encoder(registry, {"format": "protobuf", "use_latest_version": True})([row])
    assert SchemaDecoder(registry)(data, "protobuf") == row


def test_a_proto_file_may_import_one_that_is_called_schema(registry, tmp_path):
    (tmp_path / "schema.proto").write_text(MONEY)
    (tmp_path / "bill.proto").write_text(
        'syntax = "proto3"; import "schema.proto"; message Bill { shop.Money sum = 1; }'
    )
    (data,) = encoder(registry, str(tmp_path / "bill.proto"))([{"sum": {"cents": 5}}])
    assert SchemaDecoder(registry)(data, "protobuf") == {"sum": {"cents": 5}}


def test_a_file_that_nobody_knows_is_named(registry):
    with pytest.raises(KafkaConfigError, match=r"Protobuf schema: .*lost.proto: File not found"):
        encoder(registry, KafkaSchema(format="protobuf", text='syntax = "proto3"; import "lost.proto"; message A {}'))(
            [{}]
        )


def test_a_proto_file_may_import_one_beside_it(registry, tmp_path):
    (tmp_path / "money.proto").write_text(MONEY)
    (tmp_path / "shop.proto").write_text(SEVERAL)
    schema = KafkaSchema(file=str(tmp_path / "shop.proto"), message="Order.Item")
    row = {"name": "pen", "price": {"cents": 150}}
    (data,) = encoder(registry, schema)([row])
    assert SchemaDecoder(registry)(data, "protobuf") == row


@pytest.mark.parametrize(
    ("row", "field"),
    mostly_slow(
        [
            ({"share": 2**24 + 1}, "share"),
            ({"by": {"x": 1, "y": 2**53 + 1}}, "by"),
            ({"of": [{"share": -(2**24) - 1}]}, "of.share"),
            ({"w": 2**24 + 1}, "w"),
            ({"share": str(2**24 + 1)}, "share"),
            ({"by": {"x": decimal.Decimal(2**53 + 1)}}, "by"),
        ]
    ),
)
def test_whole_numbers_that_a_message_would_round_are_refused(registry, row, field):
    text = (
        'syntax = "proto3"; message R { float share = 1; map<string, double> by = 2; repeated R of = 3; int64 n = 4; }'
    )
    text = text.replace("int64 n = 4;", "int64 n = 4; map<string, uint64> ids = 5; google.protobuf.FloatValue w = 6;")
    text = text.replace("message R", 'import "google/protobuf/wrappers.proto"; message R')
    encode = encoder(registry, {"format": "protobuf", "text": text})
    with pytest.raises(InvalidRecordError, match="rounds") as caught:
        encode([{"share": 2**24, "by": {"x": 2**53}, "n": 2**53 + 1, "ids": {"a": 2**64 - 1}, "w": 2**24}, row])
    assert (caught.value.index, caught.value.field) == (1, field)


def test_a_message_with_required_fields_is_published(registry):
    text = 'syntax = "proto2"; message R { required int32 n = 1; required In in = 2; message In { required string s = 1; } }'
    row = {"n": 5, "in": {"s": "x"}}
    (data,) = encoder(registry, {"format": "protobuf", "text": text})([row])
    assert SchemaDecoder(registry)(data, "protobuf") == row


DECIMAL_IN_FIXED = {
    "type": "fixed",
    "name": "fx",
    "size": 5,
    "logicalType": "decimal",
    "precision": 10,
    "scale": 2,
}


@pytest.mark.parametrize("type_", [DECIMAL_IN_FIXED, ["null", DECIMAL_IN_FIXED]], ids=["alone", "nullable"])
def test_minus_zero_is_refused_where_fastavro_writes_another_number(registry, type_):
    schema = json.dumps({"type": "record", "name": "R", "fields": [{"name": "a", "type": type_}]})
    encode = encoder(registry, {"format": "avro", "text": schema})
    numbers = [decimal.Decimal(text) for text in ("0.00", "-0.01", "-327.68", "99999999.99")]
    read = [SchemaDecoder(registry)(data, "avro")["a"] for data in encode([{"a": number} for number in numbers])]
    assert read == numbers
    with pytest.raises(InvalidRecordError, match="record 0, field 'a'.*minus zero"):
        encode([{"a": decimal.Decimal("-0.00")}])


@pytest.mark.parametrize("value", [b"12", "12"])
def test_text_and_bytes_are_no_nullable_array(registry, value):
    field = {"name": "a", "type": ["null", {"type": "array", "items": "long"}]}
    encode = encoder(
        registry, {"format": "avro", "text": json.dumps({"type": "record", "name": "R", "fields": [field]})}
    )
    read = [SchemaDecoder(registry)(data, "avro")["a"] for data in encode([{"a": None}, {"a": [1]}])]
    assert read == [None, [1]]
    with pytest.raises(InvalidRecordError, match="record 0, field 'a'.*not array"):
        encode([{"a": value}])


def test_an_instant_that_python_has_not_is_told_with_its_bytes(registry):
    field = {"name": "a", "type": {"type": "long", "logicalType": "timestamp-micros"}}
    encode = encoder(
        registry, {"format": "avro", "text": json.dumps({"type": "record", "name": "R", "fields": [field]})}
    )
    (data,) = encode([{"a": 1577836800000000000}])
    with pytest.raises(KafkaError, match="they are not avro"):
        SchemaDecoder(registry)(data, "avro")


@pytest.mark.parametrize("form", ["avro", "json_schema", "protobuf"])
@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
def test_a_frame_without_rows_needs_no_schema(registry, form, library):
    frame = frame_of(library, {"a": []}).to_native()
    encoders = SchemaEncoders(encoder(registry, form), None)
    assert [len(chunk.values) for chunk in chunks(frame, encoders=encoders)] in ([], [0])


def test_well_known_types_come_back_as_what_a_message_is_made_of(registry):
    imports = "".join(f'import "google/protobuf/{name}.proto"; ' for name in ("struct", "wrappers", "duration"))
    text = (
        f'syntax = "proto3"; {imports} message M {{ google.protobuf.Struct st = 1; google.protobuf.Int64Value n = 2;'
        " google.protobuf.Duration du = 3; enum E { Z = 0; O = 1; } map<string, E> by = 4;"
        " repeated google.protobuf.Value any = 5; }"
    )
    encode = encoder(registry, {"format": "protobuf", "text": text})
    row = {"st": {"tags": [1.0, "x"], "in": {"a": [True]}}, "n": 5, "du": "1.500s", "by": {"k": "O"}, "any": [1.0, "x"]}
    (data,) = encode([row])
    decoded = SchemaDecoder(registry)(data, "protobuf")
    assert decoded == row
    # Not its bytes: Protobuf writes the entries of a map in any order.
    assert SchemaDecoder(registry)(encode([decoded])[0], "protobuf") == row
    absent = SchemaDecoder(registry)(encode([{}])[0], "protobuf")
    assert absent == {"st": None, "n": None, "du": None, "by": {}, "any": []}


@pytest.mark.parametrize("form", mostly_slow(["avro", "protobuf"]))
@pytest.mark.parametrize("inside", mostly_slow([{"x y": 1}, [{"a": {"x y": 1}}]]))
def test_a_name_inside_a_struct_that_avro_does_not_allow_is_told(registry, form, inside):
    with pytest.raises(InvalidRecordError, match="column 'at', field 'x y': Avro does not allow this name"):
        encoder(registry, form).prepare(frame_of("polars", {"at": [inside]}))


def test_in_json_schema_columns_have_any_name(registry):
    frame = pl.DataFrame({"x y": [{"1.5 €": [{"-": 1}]}], "k": ["a"]})
    value, key = encoder(registry, "json_schema"), encoder(registry, "json_schema", part="key")
    (chunk,) = chunks(frame, ["x y", "k"], encoders=SchemaEncoders(value, key, "json_schema"))
    decode = SchemaDecoder(registry)
    assert decode(chunk.values[0], "json_schema") == decode(chunk.keys[0], "json_schema") == frame.to_dicts()[0]


@pytest.mark.parametrize(("column", "place"), [(b"x", "b"), ([b"x"], "b"), ({"c": b"x"}, "b.c")])
def test_columns_of_bytes_have_no_json_schema(registry, column, place):
    with pytest.raises(InvalidRecordError, match=f"column '{place}': JSON has no bytes"):
        encoder(registry, "json_schema").prepare(frame_of("polars", {"a": [1], "b": [column]}))
    assert registry.client.get_subjects() == []


def test_a_record_is_not_named_as_a_type_of_avro(registry):
    encoders = SchemaEncoders(encoder(registry, "avro", "int"), None, "avro")
    (chunk,) = chunks(pl.DataFrame({"string": [{"x": 1}], "s": ["y"]}), encoders=encoders)
    assert SchemaDecoder(registry)(chunk.values[0], "avro") == {"string": {"x": 1}, "s": "y"}
    schema = json.loads(registry.client.get_latest_version("int-value").schema.schema_str)
    assert schema["name"] == "int_2"
    assert schema["fields"][0]["type"][1]["name"] == "string_2"


def test_a_derived_json_schema_says_what_it_is(registry):
    encoder(registry, "json_schema").prepare(FLIGHTS[0])
    encoder(registry, "json_schema", "frames").prepare(frame_of("polars", {"a": [1]}))
    for subject in ("flights-value", "frames-value"):
        text = registry.client.get_latest_version(subject).schema.schema_str
        assert json.loads(text)["$schema"] == "http://json-schema.org/draft-07/schema#"
        assert text.count("$schema") == 1


def test_a_class_that_json_schema_cannot_describe_is_told():
    @dataclasses.dataclass
    class Strange:
        thing: threading.Thread

    with pytest.raises(InvalidRecordError, match=r"schema of .*Strange: no JSON Schema can be derived: .*Thread"):
        KafkaSchema.of(Strange, format="json_schema")


T = TypeVar("T")
Tail = NewType("Tail", str)


class Page(BaseModel, Generic[T]):
    items: list[T]
    first: T
    of: Tail = Tail("")


def test_a_generic_model_and_a_new_type_are_what_they_are_of(registry):
    page = Page[int](items=[1, 2], first=1, of=Tail("N1"))
    (data,) = encoder(registry, "avro")([page])
    assert SchemaDecoder(registry)(data, "avro") == {"items": [1, 2], "first": 1, "of": "N1"}
    fields = json.loads(registry.client.get_latest_version("flights-value").schema.schema_str)["fields"]
    assert [field["type"] for field in fields] == [{"type": "array", "items": "long"}, "long", "string"]


def test_bytes_and_days_have_their_type_in_each_of_arrows_forms(registry):
    day = dt.date(2020, 1, 1)
    columns = {"a": pa.large_binary(), "b": pa.binary_view(), "c": pa.binary(2), "d": pa.date64()}
    table = pa.table({name: pa.array([day if name == "d" else b"xy"], kind) for name, kind in columns.items()})
    encoders = SchemaEncoders(encoder(registry, "avro"), None, "avro")
    (chunk,) = chunks(table, encoders=encoders)
    assert SchemaDecoder(registry)(chunk.values[0], "avro") == {"a": b"xy", "b": b"xy", "c": b"xy", "d": day}
    with pytest.raises(InvalidRecordError, match="derived from month_day_nano_interval"):
        encoder(registry, "avro", "other").prepare(
            nw.from_native(pa.table({"a": pa.array([(1, 2, 3)], pa.month_day_nano_interval())}))
        )


@pytest.mark.parametrize("part", ["value", "key"])
@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
def test_beside_a_schema_text_keeps_its_nanoseconds(registry, library, part):
    """Keys of rows a nanosecond apart stay two keys, and values without a schema are what they are without one."""
    frame = frame_of(library, {"at": pl.Series([1, 2]).cast(pl.Datetime("ns")), "n": [1, 2]}).to_native()
    plain = list(chunks(frame, "at"))
    one = encoder(registry, "avro", library, part)
    encoders = SchemaEncoders(one, None, "avro") if part == "value" else SchemaEncoders(None, one)
    with_schema = list(chunks(frame, "at", encoders=encoders))
    part = "keys" if part == "value" else "values"

    def texts(found):
        return [text.encode() if isinstance(text, str) else text for chunk in found for text in getattr(chunk, part)]

    assert texts(with_schema) == texts(plain)
    assert len(set(texts(plain))) == 2


@pytest.mark.parametrize("form", ["avro", "json_schema", "protobuf"])
def test_an_empty_frame_without_columns_has_no_records_and_no_schema(registry, form):
    encoders = SchemaEncoders(encoder(registry, form), encoder(registry, form, part="key"), form)
    assert list(itertools.islice(chunks(pa.table({}), "id", encoders=encoders), 3)) == []
    assert registry.client.get_subjects() == []


def test_what_cannot_be_derived_says_what_to_give(registry):
    with pytest.raises(KafkaConfigError, match="dict does not say which types") as caught:
        encoder(registry, "avro")([{"a": 1}])
    assert "text or file" in caught.value.fix


@pytest.mark.parametrize(
    ("schema", "said"),
    mostly_slow(
        [
            (KafkaSchema(text="{"), "no avro schema"),
            (KafkaSchema(text='{"type": "recor"}'), "recor"),
            (KafkaSchema(format="json_schema", text='{"type": 3}'), "no json_schema schema"),
            (
                KafkaSchema(format="json_schema", text='{"$ref": "http://localhost:1/x.json"}'),
                "neither in the schema nor",
            ),
            (KafkaSchema(format="protobuf", text="message Flight {"), "schema.proto:1"),
            (KafkaSchema(format="protobuf", text='syntax = "proto3"; message A {} message B {}'), "the messages A, B"),
            (KafkaSchema(file="missing.avsc"), "missing.avsc"),
            (KafkaSchema(message="no_such_module:Flight"), "no_such_module"),
            (KafkaSchema(message="json:loads"), "no Protobuf message class"),
        ]
    ),
)
def test_a_broken_schema_is_refused_before_the_registry_is_asked(registry, schema, said):
    with pytest.raises(KafkaConfigError) as caught:
        encoder(registry, schema)([{"a": 1}])
    assert said in str(caught.value)
    assert registry.client.get_subjects() == []


def test_a_schema_is_read_from_its_file(registry, tmp_path):
    for name, text in {"flight.avsc": json.dumps(FLIGHT), "flight.proto": PROTO}.items():
        (tmp_path / name).write_text(text)
        form = KafkaSchema.parse(str(tmp_path / name)).format
        (data,) = encoder(registry, str(tmp_path / name), name)([{"tailnum": "N1"}])
        assert SchemaDecoder(registry)(data, form)["tailnum"] == "N1"


def test_a_message_class_of_protoc_is_used_as_it_is(registry, monkeypatch):
    file = descriptor_pb2.FileDescriptorProto(name="m.proto", syntax="proto3")
    file.message_type.add(name="Other")
    message = file.message_type.add(name="Flight")
    message.field.add(name="tailnum", number=1, type=9, label=1)
    cls = _class_at(file, [1])
    monkeypatch.setitem(sys.modules, "flights_pb2", types.SimpleNamespace(Flight=cls))
    cls.__module__ = "flights_pb2"
    schema = KafkaSchema.of(cls)
    assert schema == KafkaSchema(message="flights_pb2:Flight")
    both = encoder(registry, schema)([cls(tailnum="N1"), {"tailnum": "N2"}])
    assert [SchemaDecoder(registry)(data, "protobuf") for data in both] == [{"tailnum": "N1"}, {"tailnum": "N2"}]
    # The second message of its file: the index stands behind the id.
    assert both[0][5:7] == b"\x02\x02"
    assert encoder(registry, "protobuf")([cls(tailnum="N1")]) == both[:1]


# Records that do not fit.


@pytest.mark.parametrize(
    ("row", "field", "said"),
    mostly_slow(
        [
            ({"tailnum": 3}, "tailnum", "of type int, not string"),
            ({"delay": 3}, "tailnum", "lacks it"),
            ({"tailnum": "N1", "dely": 3}, "dely", "no such field"),
            ({"tailnum": "N1", "delay": "late"}, "delay", "of type str, not null or long"),
            ({"tailnum": "N1", "at": dt.datetime(2013, 1, 1)}, "at", "without a time zone"),
        ]
    ),
)
def test_a_record_that_does_not_fit_names_index_and_field(registry, row, field, said):
    with pytest.raises(InvalidRecordError) as caught:
        encoder(registry, {"text": FLIGHT})([{"tailnum": "N1"}, row], 40)
    assert (caught.value.index, caught.value.field) == (41, field)
    assert said in caught.value.cause
    assert "record 41" in str(caught.value)


UTC_MICROS = {"type": "long", "logicalType": "timestamp-micros"}
POINT = {"type": "record", "name": "Point", "namespace": "org.example", "fields": [{"name": "n", "type": "int"}]}
LIST = {"type": "record", "name": "L", "fields": [{"name": "at", "type": UTC_MICROS}, {"name": "next", "type": "L"}]}
LOCAL_MICROS = {"type": "long", "logicalType": "local-timestamp-micros"}
DAY = {"type": "int", "logicalType": "date"}
NAIVE, NOON = dt.datetime(2013, 1, 1), dt.datetime(2013, 1, 1, 12)


@pytest.mark.parametrize(
    ("avro", "value", "field", "said"),
    mostly_slow(
        [
            ("boolean", "no", "f", "of type str, not boolean"),
            ("boolean", None, "f", "of type NoneType, not boolean"),
            ("int", 2**31, "f", "2147483648 does not fit into an int of 32 bits"),
            ("long", 1.5, "f", "of type float, not long"),
            ("long", decimal.Decimal("1.5"), "f", "of type Decimal, not long"),
            ("float", 1e300, "f", "1e+300 does not fit into a float of 32 bits"),
            ("double", "5", "f", "of type str, not double"),
            ("null", 5, "f", "of type int, not null"),
            (["null", "float"], 1e300, "f", "does not fit into a float"),
            ("float", 2**24 + 1, "f", "16777217 would be rounded as a float"),
            ("double", np.int64(2**53 + 1), "f", "9007199254740993 would be rounded as a double"),
            ("double", 10**310, "f", "would be rounded as a double"),
            (["null", "double"], 2**53 + 1, "f", "would be rounded as a double"),
            (["null", "float", "string"], 2**24 + 1, "f", "would be rounded as a float"),
            (DAY, NOON, "f", "would lose its time"),
            (DAY, NAIVE.replace(tzinfo=UTC), "f", "would lose its time"),
            (["null", DAY], NOON, "f", "would lose its time"),
            (["null", DAY, LOCAL_MICROS], NAIVE, "f", "put the timestamp before the date"),
            (["null", DAY, UTC_MICROS], NOON.replace(tzinfo=UTC), "f", "put the timestamp before the date"),
            (LOCAL_MICROS, NAIVE.replace(tzinfo=UTC), "f", "with a time zone is no local time"),
            ({"type": "long", "logicalType": "time-micros"}, dt.time(12, tzinfo=UTC), "f", "have no time zone"),
            (
                ["null", {"type": "int", "logicalType": "time-millis"}],
                dt.time(12, tzinfo=UTC),
                "f",
                "have no time zone",
            ),
            ({"type": "array", "items": "string"}, "abc", "f", "of type str, not array"),
            ({"type": "array", "items": POINT}, [{"n": 1}, {"n": True}], "f.1.n", "of type bool, not int"),
            ({"type": "map", "values": "int"}, {"a": 2**40}, "f.a", "does not fit into an int"),
            ({"type": "int", "logicalType": "date"}, 1.5, "f", "of type float, not a whole number"),
            ({"type": "int", "logicalType": "date"}, "soon", "f", "Invalid isoformat"),
            (
                {"type": "bytes", "logicalType": "decimal", "precision": 3, "scale": 1},
                decimal.Decimal("1.23"),
                "f",
                "cale",
            ),
            ({"type": "string", "logicalType": "uuid"}, "N1", "f", "'N1' is no UUID"),
            (["null", {"type": "array", "items": UTC_MICROS}], [NAIVE], "f.0", "without a time zone"),
            (["null", {"type": "map", "values": UTC_MICROS}, "string"], {"a": NAIVE}, "f.a", "without a time zone"),
            (LIST, {"at": dt.datetime.now(UTC), "next": {"at": NAIVE}}, "f.next.at", "without a time zone"),
            (POINT, {"n": 1, "m": 2}, "m", "more fields"),
        ],
        2,
    ),
)
def test_what_avros_serializer_would_write_as_something_else_is_refused(registry, avro, value, field, said):
    schema = {"type": "record", "name": "R", "namespace": "org.example", "fields": [{"name": "f", "type": avro}]}
    with pytest.raises(InvalidRecordError) as caught:
        encoder(registry, {"text": schema})([{"f": value}])
    assert (caught.value.index, caught.value.field) == (0, field)
    assert said in caught.value.cause


def record(name, **fields):
    return {"type": "record", "name": name, "fields": [{"name": n, "type": avro} for n, avro in fields.items()]}


UUID = {"type": "string", "logicalType": "uuid"}
ORDER, NOTE = record("Order", id=UUID, total="double"), record("Note", id="string", text="string")
MOMENTS = [record("A", at=UTC_MICROS, a="int"), record("B", at=LOCAL_MICROS, b="int")]
NUMBERS = [record("A", f="float", a="int"), "null", record("B", f="double", b="int")]
NESTED = [
    record("A", of={"type": "array", "items": ORDER}),
    record("B", of={"type": "array", "items": ["Order", NOTE]}),
]


@pytest.mark.parametrize(
    ("members", "value"),
    mostly_slow(
        [
            ([ORDER, NOTE], {"id": "N-17", "text": "hi"}),
            (MOMENTS, {"at": NAIVE, "b": 1}),
            (NUMBERS, {"f": 1e300, "b": 1}),
            (NESTED, {"of": [{"id": "N-17", "text": "hi"}]}),
            ([ORDER, {"type": "map", "values": "string"}], {"id": "N-17"}),
            (["null", LOCAL_MICROS, DAY], NOON),
            (["null", LOCAL_MICROS, DAY], NAIVE),
            (["null", LOCAL_MICROS, DAY], NAIVE.date()),
            (["long", "double"], 2**53 + 1),
            (["null", "double"], 2**53),
        ],
        2,
    ),
)
def test_of_a_union_the_member_that_is_written_is_checked(registry, members, value):
    again = [part if isinstance(part, str) else part.get("name", part) for part in members]
    encode = encoder(registry, {"text": record("R", f=members, again=again) | {"namespace": "org.example"}})
    row = {"f": value, "again": value}
    assert SchemaDecoder(registry)(encode([row])[0], "avro") == row


@pytest.mark.parametrize(
    ("members", "value", "field", "said"),
    mostly_slow(
        [
            ([ORDER, NOTE], {"id": "N-17", "total": 1.5}, "f.id", "'N-17' is no UUID"),
            ([record("A", id=UUID), record("B", id="string")], {"id": "N-17"}, "f.id", "'N-17' is no UUID"),
            (MOMENTS, {"at": NAIVE, "a": 1}, "f.at", "without a time zone"),
            (NUMBERS, {"f": 1e300, "a": 1}, "f.f", "does not fit into a float"),
            ([{"type": "map", "values": UUID}, NOTE], {"id": "N-17", "text": "hi"}, "f.id", "'N-17' is no UUID"),
        ],
        2,
    ),
)
def test_what_a_unions_member_would_write_as_something_else_is_refused(registry, members, value, field, said):
    with pytest.raises(InvalidRecordError) as caught:
        encoder(registry, {"text": record("R", f=members)})([{"f": value}])
    assert caught.value.field == field
    assert said in caught.value.cause


def test_the_names_in_a_union_are_those_of_its_records_namespace(registry):
    schema = record("R", a=record("Outer", f=[ORDER, NOTE]), b=["null", "Outer"]) | {"namespace": "org.example"}
    note = {"f": {"id": "N-17", "text": "hi"}}
    assert encoder(registry, {"text": schema})([{"a": note, "b": note}])


def test_a_name_in_an_avro_schema_is_checked_like_what_it_names(registry):
    fields = [{"name": "a", "type": ["null", POINT]}, {"name": "b", "type": "Point"}]
    encode = encoder(registry, {"text": {"type": "record", "name": "org.example.Two", "fields": fields}})
    good = {"a": {"n": 1}, "b": {"n": np.int32(2)}}
    assert SchemaDecoder(registry)(encode([good])[0], "avro") == good
    with pytest.raises(InvalidRecordError) as caught:
        encode([{"a": None, "b": {"n": 1.5}}])
    assert caught.value.field == "b.n"


def test_what_an_avro_schema_refers_to_in_other_subjects_is_checked_too(registry):
    deep = record("org.example.Deep", id=UUID, ok="boolean")
    inner = record("org.example.Inner", at=UTC_MICROS, deep="org.example.Deep")
    memo = record("org.example.Memo", id=UUID, ok="boolean")
    outer = record("R", note=["org.example.Memo", NOTE], i="org.example.Inner", again=["null", "org.example.Inner"])
    to_deep, to_inner, to_memo = (
        SchemaReference(f"org.example.{name.title()}", name, 1) for name in ("deep", "inner", "memo")
    )
    registry.client.register_schema("deep", Schema(json.dumps(deep), "AVRO"))
    registry.client.register_schema("memo", Schema(json.dumps(memo), "AVRO"))
    registry.client.register_schema("inner", Schema(json.dumps(inner), "AVRO", [to_deep]))
    registry.client.register_schema("flights-value", Schema(json.dumps(outer), "AVRO", [to_inner, to_memo]))
    encode = encoder(registry, "latest")
    good = {"at": NOON.replace(tzinfo=UTC), "deep": {"id": uuid.UUID(int=1), "ok": True}}
    row = {"note": {"id": "N-17", "text": "hi"}, "i": good, "again": good}
    assert SchemaDecoder(registry)(encode([row])[0], "avro") == row
    for changed, field in (
        ({"i": good | {"deep": good["deep"] | {"ok": "no"}}}, "i.deep.ok"),
        ({"i": good | {"at": NOON}}, "i.at"),
        ({"again": good | {"at": NOON}}, "again.at"),
        ({"note": {"id": "N-17", "ok": True}}, "note.id"),
    ):
        with pytest.raises(InvalidRecordError) as caught:
            encode([row | changed])
        assert caught.value.field == field


def test_what_fits_an_avro_schema_is_written_as_it_is(registry):
    types = ["boolean", "int", "float", "double", ["string", {"type": "string", "logicalType": "uuid"}], "bytes"]
    types += [{"type": "array", "items": "long"}, ["null", "float", "double"], DAY, DAY]
    types += [["null", "float"], "float", {"type": "long", "logicalType": "time-micros"}, ["null", LOCAL_MICROS]]
    fields = [{"name": f"f{i}", "type": avro} for i, avro in enumerate(types)]
    encode = encoder(registry, {"text": {"type": "record", "name": "R", "fields": fields}})
    given = [np.True_, np.int64(5), 1, np.float32(1.5), "no UUID", bytearray(b"x"), (1, 2), 1e300, 1, NAIVE]
    given += [2**24, np.int64(-(2**24)), dt.time(12), NOON]
    found = [True, 5, 1.0, 1.5, "no UUID", b"x", [1, 2], 1e300, dt.date(1970, 1, 2), NAIVE.date()]
    found += [2**24, -(2**24), dt.time(12), NOON]
    row = encode([{f"f{i}": value for i, value in enumerate(given)}])[0]
    assert list(SchemaDecoder(registry)(row, "avro").values()) == found


def test_what_a_union_of_hints_may_be_keeps_its_value_whichever_comes_first(registry):
    @dataclasses.dataclass
    class Event:
        at: dt.date | dt.datetime | None
        n: float | int

    given = [Event(NOON.replace(tzinfo=UTC), 2**53 + 1), Event(NAIVE.date(), 1.5), Event(None, 1)]
    found = [SchemaDecoder(registry)(data, "avro") for data in encoder(registry, "avro")(given)]
    assert found == list(map(dataclasses.asdict, given))


MEMBERS = {
    bool: True,
    int: 1767225600000,
    float: 1.5,
    str: "2013-01-01",
    bytes: b"\x01",
    dt.datetime: NOON.replace(tzinfo=UTC),
    dt.date: NAIVE.date(),
    dt.time: dt.time(5),
    uuid.UUID: uuid.UUID(int=1),
    Annotated[decimal.Decimal, Field(max_digits=5, decimal_places=2)]: decimal.Decimal("1.25"),
}


def test_any_two_hints_of_a_union_keep_the_values_of_both(registry):
    unions = {f"u{i}": (hints, typing.Union[hints]) for i, hints in enumerate(itertools.permutations(MEMBERS, 2))}  # noqa: UP007
    all_of = dataclasses.make_dataclass("All", [(name, union) for name, (_, union) in unions.items()])
    given = [all_of(*(MEMBERS[hints[n]] for hints, _ in unions.values())) for n in (0, 1)]
    found = [SchemaDecoder(registry)(data, "avro") for data in encoder(registry, "avro")(given)]
    assert found == list(map(dataclasses.asdict, given))
    assert [[type(value) for value in row.values()] for row in found] == [
        [type(value) for value in dataclasses.astuple(row)] for row in given
    ]


@pytest.mark.parametrize(
    ("logical", "plain", "value", "of_logical"),
    mostly_slow(
        [
            (UTC_MICROS, "long", 1767225600000, NOON.replace(tzinfo=UTC)),
            (UTC_MICROS, {"type": "double"}, 5, NOON.replace(tzinfo=UTC)),
            (DAY, "long", 5, NAIVE.date()),
            (DAY, "string", "2013-01-01", NAIVE.date()),
            ({"type": "long", "logicalType": "time-micros"}, "int", 5, dt.time(5)),
            (UUID, {"type": "string", "avro.java.string": "String"}, str(uuid.UUID(int=1)), uuid.UUID(int=1)),
            (UUID, "string", "guest", uuid.UUID(int=1)),
            (
                {"type": "bytes", "logicalType": "decimal", "precision": 5, "scale": 2},
                "bytes",
                b"\x01",
                decimal.Decimal("1.25"),
            ),
        ],
        2,
    ),
)
def test_a_plain_value_is_not_written_as_the_logical_type_before_it(registry, logical, plain, value, of_logical):
    """A given union is in the order it has; the other way round, all is well."""
    encode = encoder(registry, {"text": record("R", f=["null", logical, plain])}, "refused")
    assert SchemaDecoder(registry)(encode([{"f": of_logical}])[0], "avro") == {"f": of_logical}
    with pytest.raises(InvalidRecordError, match=r"would become a .*; in a union, put") as caught:
        encode([{"f": of_logical}, {"f": value}])
    assert (caught.value.index, caught.value.field) == (1, "f")
    encode = encoder(registry, {"text": record("R", f=["null", plain, logical])}, "kept")
    for given in (value, of_logical, None):
        assert SchemaDecoder(registry)(encode([{"f": given}])[0], "avro") == {"f": given}


@pytest.mark.parametrize(
    "frame", [pl.DataFrame({"n": [1, 2**53 + 1]}), pd.DataFrame({"n": pd.array([1, 2**53 + 1], "Int64")})]
)
def test_a_frames_whole_numbers_are_not_rounded_to_a_given_schemas_doubles(registry, frame):
    encoders = SchemaEncoders(encoder(registry, {"text": record("R", n=["null", "double"])}), None, "avro")
    with pytest.raises(InvalidRecordError, match="record 1, field 'n'.*9007199254740993 would be rounded"):
        list(chunks(frame, encoders=encoders))


@pytest.mark.parametrize(
    ("values", "avro"),
    mostly_slow(
        [
            ([1, None, 1], "long"),
            (["a", None], "string"),
            ([1.5, 2.5], "double"),
            ([dt.date(2013, 1, 1), None], DAY),
            ([NOON, None], LOCAL_MICROS),
        ]
    ),
)
def test_categories_have_the_type_of_their_values(registry, values, avro):
    arrow = pa.array(values).dictionary_encode()
    extension = pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array([arrow])))
    kinds = [pd.Categorical(values), pd.Categorical(values, ordered=True), extension]
    frames = [*(pd.DataFrame({"c": kind}) for kind in kinds), pa.table({"c": arrow})]
    for i, frame in enumerate(frames):
        encode = encoder(registry, "avro", f"t{i}")
        encoders = SchemaEncoders(encode, None, "avro")
        (chunk,) = chunks(frame, encoders=encoders)
        assert [SchemaDecoder(registry)(value, "avro")["c"] for value in chunk.values] == values
        assert json.loads(registry.client.get_schema(encode.registered.id).schema_str)["fields"][0]["type"][1] == avro


def test_categories_of_no_one_type_are_refused_before_a_schema_is_registered(registry):
    with pytest.raises(InvalidRecordError, match="column 'c'.*Cast it"):
        encoder(registry, "avro").prepare(nw.from_native(pd.DataFrame({"c": pd.Categorical([1, "a"])})))
    assert registry.client.get_subjects() == []


def test_a_frame_with_a_null_does_not_fit_a_schema_without(registry):
    encoders = SchemaEncoders(
        encoder(registry, {"text": {"type": "record", "name": "R", "fields": [{"name": "on", "type": "boolean"}]}}),
        None,
        "avro",
    )
    with pytest.raises(InvalidRecordError, match="record 1, field 'on'.*NoneType, not boolean"):
        list(chunks(pl.DataFrame({"on": [True, None]}), encoders=encoders))


def test_a_record_that_does_not_fit_json_schema_or_protobuf_names_index_and_field(registry):
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "integer"}}}}}
    cases = [
        (KafkaSchema.parse({"format": "json_schema", "text": schema}), {"a": {"b": "x"}}, "a.b"),
        (KafkaSchema.parse({"format": "json_schema", "text": schema}), {"a": {"b": float("nan")}}, "a.b"),
        (KafkaSchema(format="protobuf", text=PROTO), {"tailnum": 3}, "tailnum"),
        (KafkaSchema(format="protobuf", text=PROTO), {"tail": "N1"}, "tail"),
        (KafkaSchema(format="protobuf", text=PROTO), {"tailnum": "N1", "delay": 1.5}, "delay"),
        (KafkaSchema.parse({"format": "json_schema", "text": schema}), {"a": {"b": {1}}}, "a.b"),
    ]
    for given, row, field in cases:
        with pytest.raises(InvalidRecordError) as caught:
            encoder(registry, given, f"t{cases.index((given, row, field))}")([row], 7)
        assert (caught.value.index, caught.value.field) == (7, field), str(caught.value)


def test_a_json_schema_that_refers_to_another_subject_is_checked_with_it(registry):
    client = registry.client
    client.register_schema("place", Schema('{"type": "object", "properties": {"lat": {"type": "number"}}}', "JSON"))
    text = '{"type": "object", "properties": {"origin": {"$ref": "place.json"}}}'
    client.register_schema("flights-value", Schema(text, "JSON", [SchemaReference("place.json", "place", 1)]))
    encode = encoder(registry, KafkaSchema(format="json_schema", use_latest_version=True))
    good, bad = {"origin": {"lat": 1.5}}, {"origin": {"lat": "north"}}
    assert SchemaDecoder(registry)(encode([good])[0], "json_schema") == good
    with pytest.raises(InvalidRecordError) as caught:
        encode([good, bad])
    assert (caught.value.index, caught.value.field) == (1, "origin.lat")


def test_a_nested_field_that_does_not_fit_is_named_by_its_path(registry):
    odd = dataclasses.replace(FLIGHTS[0], origin=Place("north", 1.0))
    with pytest.raises(InvalidRecordError) as caught:
        encoder(registry, "avro")([FLIGHTS[0], odd])
    assert (caught.value.index, caught.value.field) == (1, "origin.lat")


def test_records_that_do_not_fit_can_be_put_aside_and_the_others_go_on(registry):
    encoders = SchemaEncoders(encoder(registry, {"text": FLIGHT}), None, "avro")
    rows = [{"tailnum": f"N{n}", "delay": "late" if n in {3, 200} else n} for n in range(300)]
    bad = []
    found = [
        value
        for chunk in chunks(
            rows, encoders=encoders, on_bad=lambda row, index, error: bad.append((row, index, error.field))
        )
        for value in chunk.values
    ]
    decode = SchemaDecoder(registry)
    assert [decode(value, "avro")["delay"] for value in found] == [n for n in range(300) if n not in {3, 200}]
    assert bad == [(rows[3], 3, "delay"), (rows[200], 200, "delay")]


def test_a_lazy_frame_is_encoded_slice_by_slice_with_the_schema_of_its_columns(registry):
    frame = pl.DataFrame({"n": range(5000), "key": ["a"] * 5000})
    value, key = encoder(registry, "avro"), encoder(registry, "avro", part="key")
    found = list(chunks(frame.lazy(), "key", encoders=SchemaEncoders(value, key, "avro")))
    decode = SchemaDecoder(registry)
    assert len(found) > 1
    assert [decode(data, "avro")["n"] for chunk in found for data in chunk.values] == list(range(5000))
    assert {decode(data, "avro") for chunk in found for data in chunk.keys} == {"a"}
    assert {chunk.form for chunk in found} == {"avro"}


def test_bytes_of_no_schema_are_an_error_that_says_so(registry):
    with pytest.raises(KafkaError, match="wire format"):
        SchemaDecoder(registry)(b'{"a": "JSON"}', "avro")


def test_bytes_are_bytes_in_protobuf(registry):
    @dataclasses.dataclass
    class Photo:
        plate: bytes
        fare: Fare | None = None

    fare = Fare(id=uuid.UUID(int=1), price="1.50", raw=b"abcd")
    decode = SchemaDecoder(registry)
    (data,) = encoder(registry, "protobuf", "fares")([fare])
    assert decode(data, "protobuf") == {"id": str(fare.id), "price": "1.50", "seat": None, "raw": b"abcd"}
    (data,) = encoder(registry, "protobuf", "photos")([Photo(b"\xff\x00", fare)])
    assert (decode(data, "protobuf")["plate"], decode(data, "protobuf")["fare"]["raw"]) == (b"\xff\x00", b"abcd")
    encoders = SchemaEncoders(encoder(registry, "protobuf", "frames"), None, "protobuf")
    (chunk,) = chunks(pl.DataFrame({"plate": [b"abcd", None]}), encoders=encoders)
    assert [decode(value, "protobuf")["plate"] for value in chunk.values] == [b"abcd", None]
    with pytest.raises(InvalidRecordError, match="field 'fare'.*timedelta has no JSON form"):
        encoder(registry, "protobuf", "photos")([Photo(b"x", dt.timedelta(1))])


def test_bytes_that_end_too_soon_are_an_error_that_says_so(registry):
    (data,) = encoder(registry, {"text": FLIGHT})([{"tailnum": "N14228"}])
    with pytest.raises(KafkaError, match="they are not avro"):
        SchemaDecoder(registry)(data[:8], "avro")


def test_a_models_json_schema_has_the_names_that_its_records_have(registry):
    # Before 2.11, pydantic's config does not know the option.
    for alias in (False, True)[: 1 + ("serialize_by_alias" in ConfigDict.__annotations__)]:
        model = type("Aliased", (Aliased,), {"model_config": {"serialize_by_alias": alias}, "__module__": __name__})
        (data,) = encoder(registry, "json_schema", f"alias-{alias}")([model(tailNumber="N1")])
        assert list(SchemaDecoder(registry)(data, "json_schema")) == ["tailNumber" if alias else "tailnum"]


@pytest.mark.skipif(not KNOWS_NAMES, reason="pydantic's config does not know the option before 2.11")
def test_a_models_json_schema_has_the_names_that_the_records_of_models_inside_have(registry):
    inside = type("Inside", (Aliased,), {"model_config": {"serialize_by_alias": True}, "__module__": __name__})
    plain = create_model("Plain", inside=inside, others=list[Aliased], to=(str, Field("EWR", serialization_alias="t")))
    outside = create_model("Outside", __base__=inside, plain=plain)
    flight = plain(inside=inside(tailNumber="N1"), others=[Aliased(tailNumber="N2")])
    for number, value in enumerate([flight, outside(plain=flight, tailNumber="N3")]):
        (data,) = encoder(registry, "json_schema", f"inside-{number}")([value])
        assert SchemaDecoder(registry)(data, "json_schema") == orjson.loads(value.model_dump_json())
        made = json.loads(KafkaSchema.of(type(value), format="json_schema").text)
        named = {name for part in (made, *made["$defs"].values()) for name in part["properties"]}
        assert named - {"plain"} == {"tailNumber", "inside", "others", "to", "tailnum"}


def _as_text(value: int) -> str:
    return str(value)


class Passenger(BaseModel):
    model_config = ConfigDict(
        **({"serialize_by_alias": True} if "serialize_by_alias" in ConfigDict.__annotations__ else {})
    )

    name: str = Field("?", alias="fullName")
    card: str = Field("canary-card", exclude=True)
    miles: int = 1
    score: Annotated[int, PlainSerializer(_as_text)] = 5
    level: Annotated[int, PlainSerializer(lambda level: f"L{level}", return_type=str)] = 2

    @field_serializer("miles")
    def rounded(self, miles: int) -> float:
        return miles / 2

    @computed_field
    @property
    def rank(self) -> int:
        return 7


@dataclasses.dataclass
class Booking:
    passengers: list[Passenger]
    first: Passenger | None = None


@pytest.mark.parametrize("form", ["avro", "protobuf"])
def test_a_model_is_what_it_serializes_to_by_its_fields_and_what_it_excludes_is_nowhere(registry, form):
    schema = KafkaSchema.of(Booking, format=form)
    (data,) = encoder(registry, schema)([Booking([Passenger(fullName="Ann", card="canary-card", score=1)])])
    ann = {"name": "Ann", "miles": 0.5, "score": "1", "level": "L2"}
    assert SchemaDecoder(registry)(data, form) == {"passengers": [ann], "first": None}
    (data,) = encoder(registry, form, "passengers")([Passenger(fullName="Ann", score=1)])
    assert SchemaDecoder(registry)(data, form) == ann
    assert b"canary" not in data
    if form == "avro":
        (passengers, _) = json.loads(schema.text)["fields"]
        assert passengers["type"]["items"]["fields"][:2] == [
            {"name": "name", "type": "string", "default": "?"},
            {"name": "miles", "type": "double"},
        ]


@pydantic.dataclasses.dataclass
class Seat:
    row: int
    card: str = Field("canary-card", exclude=True)
    miles: int = 1

    @field_serializer("miles")
    def rounded(self, miles: int) -> float:
        return miles / 2


@pytest.mark.parametrize("form", ["avro", "protobuf", "json_schema"])
def test_a_dataclass_of_pydantic_is_what_it_serializes_to(registry, form):
    allowed = {"properties": {"row": {}, "miles": {"type": "number"}}, "additionalProperties": False}
    of_json = KafkaSchema(format=form, text=json.dumps({"type": "object", **allowed}))
    schema = of_json if form == "json_schema" else KafkaSchema.of(Seat, format=form)
    (data,) = encoder(registry, schema)([Seat(row=3)])
    assert SchemaDecoder(registry)(data, form) == {"row": 3, "miles": 0.5}
    assert b"canary" not in data


class Window(Seat):
    """No dataclass of its own."""


@pydantic.dataclasses.dataclass(config={"arbitrary_types_allowed": True})
class Wide:
    a: int = Field(alias="A")
    pin: dataclasses.InitVar[str] = "0"
    at: typing.Any = None
    scores: np.ndarray = None
    amount: decimal.Decimal = decimal.Decimal("1E+3")


@pydantic.dataclasses.dataclass(slots=True)
class Failing:
    n: int

    @field_serializer("n")
    def odd(self, n):
        return 1 // n


def test_a_dataclass_of_pydantic_in_json():
    """By its serializers, without what it excludes, and with the forms that its values have elsewhere."""
    assert to_json(Seat(row=3)) == to_json(Window(row=3)) == b'{"row":3,"miles":0.5}'
    assert to_json({"seats": [Seat(row=3)]}) == b'{"seats":[{"row":3,"miles":0.5}]}'
    wide = Wide(A=1, at=pd.Timestamp("2020-01-01 00:00:00.123456789"), scores=np.array([0.5]))
    assert to_json(wide) == b'{"a":1,"at":"2020-01-01T00:00:00.123456789","scores":[0.5],"amount":"1000"}'
    assert to_json(Wide(A=1, at=pd.NaT)) == b'{"a":1,"at":null,"scores":null,"amount":"1000"}'
    with pytest.raises(InvalidRecordError, match="field 'at'"):
        serialize_value(Wide(A=1, at=object()))
    with pytest.raises(InvalidRecordError, match="it cannot be written as JSON"):
        serialize_value(Failing(0))


@pytest.mark.parametrize("form", ["avro", "protobuf"])
def test_schemas_of_dataclasses_of_pydantic_have_what_is_written(registry, form):
    @pydantic.dataclasses.dataclass
    class Pinned:
        b: int
        pin: dataclasses.InitVar[str] = "0"

    for one, fields in ((Window(row=3), {"row": 3, "miles": 0.5}), (Pinned(b=1), {"b": 1})):
        (data,) = encoder(registry, KafkaSchema.of(type(one), format=form))([one])
        assert SchemaDecoder(registry)(data, form) == fields


def test_a_given_message_may_have_what_a_model_computes(registry):
    fields = (
        "string name = 1; string fullName = 2; double miles = 3; string score = 4; string level = 5; int64 rank = 6;"
    )
    text = f'syntax = "proto3"; message Passenger {{ {fields} }}'
    (data,) = encoder(registry, KafkaSchema(format="protobuf", text=text))([Passenger(fullName="Ann")])
    assert SchemaDecoder(registry)(data, "protobuf")["rank"] == 7


def test_a_serializer_that_fails_or_says_something_else_is_told_with_its_record(registry):
    class Odd(BaseModel):
        n: int

        @field_serializer("n")
        def odd(self, n):
            return f"{1 // n}"

    encode = encoder(registry, KafkaSchema.of(Odd))
    for n, said in ((0, "division"), (1, "of type str, not long")):
        with pytest.raises(InvalidRecordError, match=said) as caught:
            encode([Odd(n=n)])
        assert caught.value.index == 0


def test_a_root_model_has_no_schema(registry):
    class Names(RootModel[list[str]]):
        pass

    class Crew(BaseModel):
        names: Names

    with pytest.raises(InvalidRecordError, match="Names.*a root model"):
        KafkaSchema.of(Names)
    with pytest.raises(InvalidRecordError, match="Names.*a root model"):
        KafkaSchema.of(Crew)
    text = record("Crew", names={"type": "array", "items": "string"})
    (data,) = encoder(registry, {"text": text})([Crew(names=["Ann"])])
    assert SchemaDecoder(registry)(data, "avro") == {"names": ["Ann"]}


def test_none_stays_none(registry):
    encode = encoder(registry, {"text": FLIGHT})
    assert encode([None, {"tailnum": "N1"}])[0] is None
    assert SchemaDecoder(registry)(None, "avro") is None


@pytest.mark.parametrize("form", mostly_slow(FORMATS))
def test_tombstones_and_records_without_key_may_come_before_what_a_schema_is_derived_from(registry, form):
    place, decode = Place(1.0, 2.0), SchemaDecoder(registry)
    records = [KafkaRecord(None, key=place), KafkaRecord(place, key=None), KafkaRecord(place, key=place)]
    for rows in (records, records[1:], records[:1]):
        encoders = SchemaEncoders(encoder(registry, form), encoder(registry, form, part="key"), form)
        found = [
            part for chunk in chunks(rows, encoders=encoders) for part in zip(chunk.values, chunk.keys, strict=True)
        ]
        assert [(decode(value, form), decode(key, form)) for value, key in found] == [
            (row.value and dataclasses.asdict(place), row.key and dataclasses.asdict(place)) for row in rows
        ]


# Reaching the registry.


def test_options_become_the_clients():
    config = SchemaRegistryConfig(url="https://r:8081", username="u", password="canary-pw", timeout=3)
    options = client_options(config)
    assert options["basic.auth.user.info"] == "u:canary-pw"
    assert options["timeout"] == 3
    token = SchemaRegistryConfig(
        url="https://r", token="canary-token", client_config={"bearer.auth.logical.cluster": "lsrc-1"}
    )
    assert client_options(token)["bearer.auth.token"] == "canary-token"
    assert client_options(token)["bearer.auth.logical.cluster"] == "lsrc-1"
    for shown in (repr(config), str(token), config.redact("said canary-pw")):
        assert "canary" not in shown


def test_raw_settings_that_are_numbers_are_given_as_text():
    numbers = {"timeout": "2.5", "max.retries": "5", "cache.capacity": "10", "cache.latest.ttl.sec": "60"}
    waits = {"retries.wait.ms": "10", "retries.max.wait.ms": "100"}
    config = SchemaRegistryConfig(url="http://h", client_config=numbers | waits)
    assert {name: client_options(config)[name] for name in numbers | waits} == {
        name: float(text) for name, text in (numbers | waits).items()
    }
    SchemaRegistry(config)
    with pytest.raises(KafkaConfigError, match="max.retries is not a number"):
        SchemaRegistry(SchemaRegistryConfig(url="http://h", client_config={"max.retries": "many"}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "localhost:8081"}, "http://host:port"),
        ({"url": "http:///path"}, "http://host:port"),
        ({"url": "http://u:canary@host"}, "set username and password"),
        ({"url": "http://u:can/canary@host"}, "set username and password"),
        ({"url": "http://u:canary,canary@host"}, "http://host:port"),
        ({"url": "http://registry:canary"}, "http://host:port"),
        ({"url": "http://a:1,http://b:99999"}, "the port 1 to 65535"),
        ({"url": "http://my registry:8081"}, "http://host:port"),
        (
            {"url": "http://h", "client_config": {"bearer.auth.issuer.endpoint.url": "http://u:canary@host"}},
            "client_config's bearer.auth.issuer.endpoint.url is not possible with user and password",
        ),
        ({"url": "http://h", "username": "u"}, "go together"),
        ({"url": "http://h", "username": "u", "password": "canary", "token": "t"}, "exclude each other"),
        ({"url": "http://h", "ssl_ca_location": "/no/such.pem"}, "no such file"),
        ({"url": "http://h", "timeout": 0}, "greater than 0"),
        ({"url": "http://h", "usernam": "u"}, "usernam"),
    ],
)
def test_options_that_cannot_work_are_refused(options, said):
    with pytest.raises(ValidationError) as caught:
        SchemaRegistryConfig(**options)
    assert said in str(caught.value)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://h", " https://h.example.com:8081/a/b?c=d , http://under_score", "http://[::1]:1/", "mock://a b"]
)
def test_addresses_of_registries_are_accepted(url):
    assert SchemaRegistryConfig(url=url).url == url


@pytest.mark.slow
def test_a_registry_that_is_away_may_come_back(closed_port):
    registry = SchemaRegistry(SchemaRegistryConfig(url=f"http://{closed_port}", timeout=2))
    with pytest.raises(KafkaError, match="cannot be reached") as caught:
        encoder(registry, {"text": FLIGHT})([{"tailnum": "N1"}])
    assert caught.value.remedy is Remedy.RETRY


@pytest.mark.parametrize(
    ("answer", "said", "fix", "remedy"),
    [
        (b"", "UNEXPECTED_EOF", "runs", Remedy.RETRY),
        (None, "no answer within 0.2 s", "runs", Remedy.RETRY),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "WRONG_VERSION_NUMBER", "ssl_ca_location", Remedy.FAIL),
        (bytes([21, 3, 3, 0, 2, 2, 40]), "ALERT_HANDSHAKE_FAILURE", "ssl_ca_location", Remedy.FAIL),
    ],
    ids=["ends", "hangs", "no TLS", "refuses"],
)
def test_a_registry_that_goes_away_in_a_handshake_may_come_back(answer, said, fix, remedy):
    def serve():
        with server.accept()[0] as connection:
            connection.settimeout(10)
            connection.recv(65536)
            if answer is None:
                connection.recv(1)  # until the client gives up
            else:
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        config = SchemaRegistryConfig(
            url=url, timeout=0.2 if answer is None else 10, client_config={"max.retries": "0"}
        )
        with pytest.raises(KafkaError, match=said) as caught:
            encoder(SchemaRegistry(config), {"text": FLIGHT}).prepare()
        thread.join(20)
    assert fix in caught.value.fix
    assert caught.value.remedy is remedy


@pytest.fixture
def answering():
    """A registry that gives one answer to everything, and what it was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        body, message = b"", ""

        def _answer(self):
            asked.append((self.command, self.path, dict(self.headers)))
            refusal = {"error_code": Handler.status, "message": Handler.message}
            refusal |= {"error": "refused", "error_description": Handler.message}  # as a token server says it
            body = Handler.body if Handler.status < 300 else json.dumps(refusal).encode()
            self.send_response(Handler.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Handler, f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "said", "fix", "remedy"),
    mostly_slow(
        [
            (401, "access was refused", "username", Remedy.FAIL),
            (403, "access was refused", "rights", Remedy.FAIL),
            (302, "no Schema Registry", "url", Remedy.FAIL),
            (404, "is not there", "auto_register", Remedy.FAIL),
            (405, "no Schema Registry", "url", Remedy.FAIL),
            (407, "proxy refused", "proxy", Remedy.FAIL),
            (408, "registry failed", "health", Remedy.RETRY),
            (409, "not compatible", "default", Remedy.FAIL),
            (422, "schema was refused", "Correct", Remedy.FAIL),
            (503, "registry failed", "health", Remedy.RETRY),
        ],
        2,
    ),
)
def test_the_registrys_refusals_keep_its_words_and_say_what_to_do(answering, status, said, fix, remedy):
    handler, url, asked = answering
    handler.status, handler.message = status, "some.Exception: words of the registry, and canary-pw"
    registry = SchemaRegistry(SchemaRegistryConfig(url=url, username="u", password="canary-pw"))
    with pytest.raises(KafkaError) as caught:
        encoder(registry, {"text": FLIGHT})([{"tailnum": "N1"}])
    error = caught.value
    assert said in error.cause
    assert "words of the registry, and ***" in error.cause
    assert "some.Exception" not in error.cause
    assert fix in error.fix
    assert error.remedy is remedy
    assert "subject 'flights-value'" in error.culprit
    expected = "Basic " + base64.b64encode(b"u:canary-pw").decode()
    assert {headers.get("Authorization", headers.get("authorization")) for _, _, headers in asked} == {expected}


def with_oauth(url, token_url, **options):
    oauth = {
        "client.id": "me",
        "client.secret": "canary-ä",
        "scope": "s",
        "logical.cluster": "l",
        "identity.pool.id": "p",
    }
    oauth |= {"credentials.source": "OAUTHBEARER", "issuer.endpoint.url": token_url}
    options |= {f"bearer.auth.{name}": value for name, value in oauth.items()} | {"retries.wait.ms": "1"}
    return SchemaRegistry(SchemaRegistryConfig(url=url, client_config=options))


@pytest.mark.parametrize(
    ("answer", "said", "fix", "remedy"),
    [
        ((401, b""), "OAuthError: refused: you sent Basic ***, which is me:***", "client.secret", Remedy.FAIL),
        ((404, b""), "OAuthError", "bearer.auth.issuer.endpoint.url", Remedy.FAIL),
        ((200, b"{}"), "KeyError", "bearer.auth.issuer.endpoint.url", Remedy.FAIL),
        ((503, b""), "HTTPStatusError: Server error '503 Service Unavailable' for url '***'", "runs", Remedy.RETRY),
        (None, "ConnectError", "runs", Remedy.RETRY),
    ],
)
def test_a_token_server_of_the_registrys_that_gives_no_token_is_named(
    answering, closed_port, answer, said, fix, remedy
):
    handler, url, _ = answering
    if said == "KeyError" and importlib.metadata.version("confluent-kafka").startswith("2.13."):
        pytest.skip("confluent-kafka 2.13 gives no error of its own for an answer without a token")
    if answer is not None:
        handler.status, handler.body = answer
    basic = base64.b64encode("me:canary-ä".encode("latin-1")).decode()
    handler.message = f"you sent Basic {basic}, which is me:canary-ä"
    registry = with_oauth(url, f"http://{closed_port}" if answer is None else url)
    for ask in (ASKING["register"], ASKING["decode"], ASKING["is compatible"]):
        with pytest.raises(KafkaError) as caught:
            ask(registry, "avro")
        error = caught.value
        assert error.culprit == f"OAuth token server of Schema Registry at {url}"
        assert f"it gave no token: {said}" in error.cause
        assert fix in error.fix
        assert error.remedy is remedy
        told = "".join(traceback.format_exception(error))
        assert [secret for secret in ("canary", basic) if secret in told] == []


def test_a_token_server_that_goes_away_between_records_is_no_record_that_does_not_fit(answering):
    handler, url, _ = answering
    found = {"id": 1, "version": 1, "schema": json.dumps(FLIGHT), "access_token": "t", "expires_in": -1}
    handler.status, handler.body = 200, json.dumps(found).encode()
    encode = encoder(with_oauth(url, url, **{"cache.latest.ttl.sec": "0"}), latest("avro"))
    encode.prepare()
    handler.status = 503
    with pytest.raises(KafkaError, match="OAuth token server") as caught:
        encode([{"tailnum": "N1"}])
    assert caught.value.remedy is Remedy.RETRY


def latest(form):
    return KafkaSchema(format=form, use_latest_version=True, name="N")


ASKING = {
    "register": lambda registry, form: encoder(registry, KafkaSchema.of(Place, format=form)).prepare(),
    "latest": lambda registry, form: encoder(registry, latest(form)).prepare(),
    "decode": lambda registry, form: SchemaDecoder(registry)(b"\0\0\0\0\1\0\2", form),
    "is compatible": lambda registry, form: encoder(registry, KafkaSchema.of(Place, format=form)).compatibility(),
    "has a latest": lambda registry, form: encoder(registry, latest(form)).compatibility(),
}


@pytest.mark.parametrize("asking", ASKING)
@pytest.mark.parametrize("form", mostly_slow(FORMATS))
def test_an_answer_that_is_no_registrys_says_so(answering, asking, form):
    handler, url, _ = answering
    answers = [(200, body) for body in (b"<html>Please log in</html>", b"null", b"[]", b"{}", b'"x"', b'{"id": "x"}')]
    for handler.status, handler.body in [*answers, (204, b"")]:
        with pytest.raises(KafkaError, match=r"what answers there is no Schema Registry.*url, with the path") as caught:
            ASKING[asking](SchemaRegistry(SchemaRegistryConfig(url=url)), form)
        assert caught.value.remedy is Remedy.FAIL


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, -1, None, True])
def test_an_id_that_no_schema_has_is_no_registrys(answering, number):
    handler, url, _ = answering
    handler.status, handler.body = 200, json.dumps({"id": number, "version": 1, "schema": '"string"'}).encode()
    for asking in ("register", "latest"):
        with pytest.raises(KafkaError, match="what answers there is no Schema Registry"):
            ASKING[asking](SchemaRegistry(SchemaRegistryConfig(url=url)), "avro")


def test_a_latest_version_that_is_no_avro_schema_is_told(answering):
    handler, url, _ = answering
    handler.status, handler.body = 200, json.dumps({"id": 1, "version": 1, "schema": "record R"}).encode()
    with pytest.raises(KafkaConfigError, match="no avro schema"):
        ASKING["latest"](SchemaRegistry(SchemaRegistryConfig(url=url)), "avro")


def test_a_record_that_is_no_json_is_no_answer_of_the_registry(registry):
    encode = encoder(registry, KafkaSchema(format="json_schema", text='{"type": "object"}'))
    (data,) = encode([{"a": 1}])
    with pytest.raises(KafkaError, match="they are not json_schema"):
        SchemaDecoder(registry)(data[:-1], "json_schema")


@pytest.mark.slow
def test_without_the_extra_it_is_said_what_to_install(python):
    source = (
        "import sys; sys.modules['confluent_kafka.schema_registry'] = None\n"
        "import dataforge_kafka_dagster, dataforge_kafka_dagster.kafka.schemas\n"
        "from dataforge_kafka_dagster.kafka.registry import *\n"
        "try: SchemaRegistry(SchemaRegistryConfig(url='http://h'))\n"
        "except Exception as error: print(error)\n"
    )
    assert "pip install 'dataforge-kafka-dagster[schema-registry]'" in python(source)


def test_a_protoc_that_takes_too_long_is_tried_again(monkeypatch):
    monkeypatch.setattr("dataforge_kafka_dagster.kafka.protobuf._PROTOC_SECONDS", 0.001)
    with pytest.raises(KafkaError, match=r"protoc has not read it after 0.001 s") as caught:
        message_of_text('syntax = "proto3"; message Order { int32 n = 1; }', None, {})
    assert caught.value.remedy is Remedy.RETRY
