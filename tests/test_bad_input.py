"""Every public door, given what it cannot take: a typed error that names culprit, cause and fix; nothing visible."""

import collections
import dataclasses
import datetime as dt
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import dagster as dg
import numpy as np
import pandas as pd
import polars as pl
import pytest
from conftest import mostly_slow, read_topic
from dagster._core.definitions.scoped_resources_builder import ScopedResourcesBuilder
from pydantic import ConfigDict, Field, ValidationError

from dataforge_kafka_dagster import (
    DataForgeKafkaProducer,
    KafkaError,
    KafkaIOManager,
    KafkaProducerConfig,
    KafkaProducerResource,
    KafkaRecord,
    KafkaResourceComponent,
    Publication,
    RecordMetadata,
    build_publication_checks,
    create_kafka_producer,
)
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaConfigError
from dataforge_kafka_dagster.kafka.publication import PublicationWriter, publish
from dataforge_kafka_dagster.kafka.sources import chunks
from dataforge_kafka_dagster.resource import PublishingSession

NAN, INF = float("nan"), float("inf")
CANARY = "canary-3f77"


# Options, of the producer and of the resource. Nothing listens where they point, and nothing needs to.

OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown name": ({"compresion_type": "gzip"}, ["compresion_type", "compression_type"]),
    "unknown secret": ({"sasl_pasword": CANARY}, ["sasl_pasword", "sasl_password"]),
    "unknown dotted name": ({"linger.ms": 5}, ["linger.ms", "librdkafka_config"]),
    "negative batch_size": ({"batch_size": -1}, ["batch_size", "-1"]),
    "zero batch_size": ({"batch_size": 0}, ["batch_size", "0"]),
    "text batch_size": ({"batch_size": "big"}, ["batch_size", "big"]),
    "huge batch_size": ({"batch_size": 2**40}, ["batch_size", str(2**40)]),
    "negative retries": ({"retries": -1}, ["retries", "-1"]),
    "fractional retries": ({"retries": 0.5}, ["retries", "0.5"]),
    "negative linger_ms": ({"linger_ms": -1}, ["linger_ms", "-1"]),
    "nan linger_ms": ({"linger_ms": NAN}, ["linger_ms", "nan"]),
    "small buffer_memory": ({"buffer_memory": 10}, ["buffer_memory", "10"]),
    "no acks": ({"acks": "none"}, ["acks", "none", "all"]),
    "acks 3": ({"acks": 3}, ["acks", "3", "all"]),
    "empty servers": ({"bootstrap_servers": ""}, ["bootstrap_servers", "''", "localhost:9092"]),
    "no servers": ({"bootstrap_servers": []}, ["bootstrap_servers", "localhost:9092"]),
    "number as a server": ({"bootstrap_servers": ["a:1", 5]}, ["bootstrap_servers", "str"]),
    "port 70000": ({"bootstrap_servers": "a:70000"}, ["bootstrap_servers", "a:70000", "65535"]),
    "port 0": ({"bootstrap_servers": ["a:1", "b:0"]}, ["bootstrap_servers", "b:0", "65535"]),
    "URL as a server": ({"bootstrap_servers": "http://a/"}, ["bootstrap_servers", "http://a/", "host:port"]),
    "unknown codec": ({"compression_type": "rar"}, ["compression_type", "rar", "zstd"]),
    "zero connect_timeout": ({"connect_timeout": 0}, ["connect_timeout", "0"]),
    "negative delivery_timeout": ({"delivery_timeout": -1}, ["delivery_timeout", "-1"]),
    "unknown protocol": ({"security_protocol": "TLS"}, ["security_protocol", "TLS", "SSL"]),
    "Kerberos": ({"security_protocol": "SASL_SSL", "sasl_mechanism": "GSSAPI"}, ["sasl_mechanism", "Kerberos"]),
    "password without SASL": ({"sasl_password": CANARY}, ["sasl_password", "security_protocol"]),
    "SASL without a user": (
        {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_password": CANARY},
        ["sasl_username"],
    ),
    "missing CA": ({"security_protocol": "SSL", "ssl_ca_location": "/no.pem"}, ["ssl_ca_location", "/no.pem"]),
    "certificate without key": ({"security_protocol": "SSL", "ssl_certificate_pem": CANARY}, ["certificate", "key"]),
    "NUL in a server": ({"bootstrap_servers": "a\0b:1"}, ["bootstrap_servers", "NUL"]),
    "NUL in a listed server": ({"bootstrap_servers": ["a:1", "b\0:1"]}, ["bootstrap_servers", "NUL"]),
    "NUL in client_id": ({"client_id": "a\0b"}, ["client_id", "NUL"]),
    "NUL in a password": ({"sasl_password": f"{CANARY}\0"}, ["sasl_password"]),
    "NUL in a raw setting": ({"librdkafka_config": {"client.id": "a\0b"}}, ["librdkafka_config", "NUL"]),
    "infinite delivery_timeout": ({"delivery_timeout": INF}, ["delivery_timeout", "inf"]),
    "no compression_type": ({"compression_type": None}, ["compression_type", "str"]),
    "raw settings as text": ({"librdkafka_config": "a=b"}, ["librdkafka_config"]),
    "raw transactional.id": ({"librdkafka_config": {"transactional.id": "a"}}, ["librdkafka_config", "prefix"]),
    "raw list": ({"librdkafka_config": {"batch.size": [5]}}, ["librdkafka_config", "batch.size"]),
}


@pytest.mark.parametrize(("options", "said"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "door",
    mostly_slow(
        [
            lambda options: KafkaProducerConfig(**options),
            lambda options: KafkaProducerResource(**options),
            lambda options: PublicationConfig(producer=options),
            create_kafka_producer,
        ]
    ),
    ids=["config", "resource", "publication", "create_kafka_producer"],
)
def test_wrong_options_are_refused_when_given(door, options, said):
    with pytest.raises(ValidationError) as caught:
        door(options)
    message = str(caught.value)
    assert [part for part in said if part not in message] == []
    assert CANARY not in message


@pytest.mark.parametrize(("options", "said"), mostly_slow(OPTIONS.values()))
def test_wrong_options_are_refused_in_yaml(options, said):
    with pytest.raises(ValidationError) as caught:
        KafkaResourceComponent.from_attributes_dict(attributes=options)
    message = str(caught.value)
    # A secret that is written there is refused for that, whatever else is wrong.
    assert said[0] in message or "a secret is not written into YAML" in message
    assert CANARY not in message


RESOURCE_OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown guarantee": ({"delivery_guarantee": "sometimes"}, ["delivery_guarantee", "exactly_once"]),
    "acks for exactly once": ({"acks": "1"}, ["acks", "exactly_once", "at_least_once"]),
    "acks as a number": ({"acks": 0}, ["acks", "exactly_once"]),
    "prefix that is no ASCII": ({"transactional_id_prefix": "flüge"}, ["transactional_id_prefix", "ASCII"]),
    "no retries": ({"retries": 0}, ["retries=0", "exactly_once", "at_least_once"]),
    "NUL in the prefix": ({"transactional_id_prefix": "a\0b"}, ["transactional_id_prefix", "NUL"]),
    "empty prefix": ({"transactional_id_prefix": ""}, ["transactional_id_prefix"]),
    "long prefix": ({"transactional_id_prefix": "x" * 100}, ["transactional_id_prefix"]),
    "short transaction": ({"transaction_timeout": 0}, ["transaction_timeout"]),
    "negative step_retries": ({"step_retries": -1}, ["step_retries"]),
    "no retry delay": ({"step_retry_delay": 0}, ["step_retry_delay"]),
}


@pytest.mark.parametrize("config", [{"bootstrap_servers": "localhost:1"}, "localhost:1", 5])
def test_what_is_no_config_is_refused_by_the_producer(config):
    with pytest.raises(KafkaConfigError, match=f"config of type {type(config).__name__}: it is no KafkaProducerConfig"):
        DataForgeKafkaProducer(config)


@pytest.mark.parametrize("config", [None, "localhost:1", [("acks", 1)], KafkaProducerConfig()])
def test_what_is_no_mapping_is_refused_by_the_factory(config):
    with pytest.raises(KafkaConfigError, match=f"config of type {type(config).__name__}: it is no mapping"):
        create_kafka_producer(config)


@pytest.mark.parametrize(("options", "said"), RESOURCE_OPTIONS.values(), ids=RESOURCE_OPTIONS)
@pytest.mark.parametrize(
    "door",
    [
        lambda options: KafkaProducerResource(**options),
        lambda options: KafkaResourceComponent.from_attributes_dict(attributes=options),
    ],
    ids=["resource", "yaml"],
)
def test_wrong_resource_options_are_refused_at_definition(door, options, said):
    with pytest.raises(ValidationError) as caught:
        door(options)
    assert [part for part in said if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    "options",
    [
        {"topik": "a"},
        {"read_timeout": 0},
        {"read_timeout": "long"},
        {"read_timeout": float("inf")},
        {"topic": 5},
        {"topic": "{asset}"},
        {"topic": "{name[a]}"},
        {"topic": "{"},
        {"topic": "{0}"},
        {"topic": "{asset_key.x}"},
        {"topic": "{asset_key!z}"},
        {"topic": "a b"},
        {"topic": "{asset_key:>400}"},
        {"key": "a, a"},
        {"key": ","},
        {"key": "a,"},
        {"write_mode": "x"},
        {"value_schema": "zzz"},
        {"key_schema": "zzz"},
    ],
    ids=repr,
)
def test_wrong_io_manager_options_are_refused_at_definition(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        KafkaIOManager(kafka=KafkaProducerResource(), **options)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("topik", "did you mean 'topic'?"),
        ("bootstrap_servers", "give kafka=KafkaProducerResource(bootstrap_servers=...)"),
    ],
)
def test_an_unknown_option_of_an_io_manager_is_told_what_is_meant(name, hint):
    with pytest.raises(ValidationError) as caught:
        KafkaIOManager(kafka=KafkaProducerResource(), **{name: "a:1"})
    assert f"unknown option {name!r}: {hint}" in str(caught.value)


def test_a_subclass_has_options_of_its_own_by_their_aliases_or_any():
    class Renamed(KafkaIOManager):
        team: str = Field(default="a", alias="owner")

    class Open(KafkaIOManager):
        model_config = ConfigDict(extra="allow")

    assert Renamed(kafka=KafkaProducerResource(), owner="b").team == "b"
    assert Open(kafka=KafkaProducerResource(), owner="b").owner == "b"
    with pytest.raises(ValidationError, match="unknown option 'ownr'"):
        Renamed(kafka=KafkaProducerResource(), ownr="b")


def test_an_upsert_without_transactions_is_refused_at_definition():
    options = {"delivery_guarantee": "at_least_once"}
    with pytest.raises(KafkaConfigError, match="write_mode='upsert': delivery_guarantee='at_least_once'"):
        KafkaIOManager(kafka=KafkaProducerResource(**options), write_mode="upsert")
    with pytest.raises(ValidationError, match="write_mode='upsert': delivery_guarantee='at_least_once'"):
        KafkaResourceComponent.from_attributes_dict(attributes=options | {"io_manager": {"write_mode": "upsert"}})


class OtherResource(dg.ConfigurableResource):
    name: str


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "it is missing"),
        ({"kafka": None}, "it is missing"),
        ({"kafka": "localhost:9092"}, "it is a str"),
        ({"kafka": KafkaProducerConfig()}, "it is a KafkaProducerConfig"),
        ({"kafka": KafkaProducerResource}, "it is the class KafkaProducerResource itself"),
        ({"kafka": OtherResource(name="x")}, "it is a OtherResource"),
        ({"kafka": OtherResource.configure_at_launch()}, "it is a PartialResource"),
    ],
    ids=repr,
)
def test_an_io_manager_without_a_cluster_is_refused_at_definition(options, said):
    with pytest.raises(KafkaConfigError, match=said) as caught:
        KafkaIOManager(**options)
    assert caught.value.fix == "Give kafka=KafkaProducerResource(bootstrap_servers=...)"


def test_the_cluster_of_an_io_manager_may_come_when_the_run_starts(instance):
    """None needs a broker: an output None is published without one."""

    class Ours(dg.ConfigurableResource):
        def create_resource(self, context):
            return KafkaProducerResource()

    @dg.resource
    def function(context):
        return KafkaProducerResource()

    @dg.asset
    def made():
        return None

    late = KafkaProducerResource.configure_at_launch()
    config = {"resources": {"kafka": {"config": {"bootstrap_servers": "localhost:9092"}}}}
    for kafka, run_config in ((late, config), (function, {}), (Ours(), {}), (KafkaProducerResource(), {})):
        managers = [KafkaIOManager(kafka=kafka), KafkaIOManager.configure_at_launch(kafka=kafka)]
        for manager in managers:
            resources = {"kafka": kafka, "io_manager": manager}
            result = dg.materialize([made], resources=resources, instance=instance, run_config=run_config)
            assert result.success


def test_what_variables_hold_for_the_io_manager_is_checked_when_the_run_starts(monkeypatch):
    names = ("topic", "key", "write_mode", "value_schema")
    manager = KafkaIOManager(kafka=KafkaProducerResource(), **{name: dg.EnvVar(f"ITS_{name}") for name in names})
    for name, value in zip(names, ("{name}", "a,b", "upsert", "avro"), strict=True):
        monkeypatch.setenv(f"ITS_{name}", value)
    with manager.process_config_and_initialize_cm() as filled:
        assert [getattr(filled, name) for name in names] == ["{name}", "a,b", "upsert", "avro"]
    monkeypatch.setenv("ITS_key", "a,a")
    with pytest.raises(ValidationError, match="more than once"), manager.process_config_and_initialize_cm():
        pass


# Records: each through a publication, behind a good record, and (single values) through the producer.


class Case(NamedTuple):
    """What is published, and what the error says of it."""

    make: Callable[[], Any]
    said: list[str]
    error: type[Exception] = InvalidRecordError
    key: Any = None
    single: bool = True


@dataclasses.dataclass
class Point:
    """A value with a field."""

    x: Any


def _raising():
    yield {"i": 0}
    yield {"i": 1}
    raise ZeroDivisionError("half-way")


def _divided(i: int) -> dict[str, float]:
    return {"i": 1 / i}


def _nested():
    yield {"i": 0}
    yield from _raising()


def _r(value: Any = "v", **rest: Any) -> KafkaRecord:
    return KafkaRecord(value, **rest)


VALUES: dict[str, Case] = {
    "int": Case(lambda: 5, ["int"]),
    "float": Case(lambda: 1.5, ["float"]),
    "bool": Case(lambda: True, ["bool"]),
    "set": Case(lambda: {1, 2}, ["set"]),
    "object": Case(object, ["object"]),
    "class": Case(lambda: Point, ["type"]),
    "function": Case(lambda: _raising, ["function"]),
    "object inside": Case(lambda: {"a": {"b": object()}}, ["'a.b'", "object"]),
    "set inside a list": Case(lambda: {"a": [1, {2}]}, ["'a.1'", "set"]),
    "bytes inside": Case(lambda: {"a": b"x"}, ["'a'", "bytes"]),
    "complex inside": Case(lambda: {"a": 1j}, ["'a'", "complex"]),
    "timedelta inside": Case(lambda: {"a": dt.timedelta(1)}, ["'a'", "timedelta"]),
    "huge int inside": Case(lambda: {"a": 2**64}, ["'a'", "64-bit"]),
    "lone surrogate inside": Case(lambda: {"a": "\ud800"}, ["'a'", "UTF-8"]),
    "lone surrogate": Case(lambda: "\ud800", ["surrogates"]),
    "int as a field name": Case(lambda: {"a": {1: 2}}, ["1", "key must be str"]),
    "object in a dataclass": Case(lambda: Point(object()), ["'x'", "object"]),
    "NaN": Case(lambda: {"a": NAN}, ["'a'", "NaN"]),
    "infinity inside": Case(lambda: {"a": {"b": [INF]}}, ["'a.b.0'", "infinity"]),
    "numpy NaN": Case(lambda: {"a": np.float32("nan")}, ["'a'", "NaN"]),
    "NaN in an array": Case(lambda: {"a": np.array([NAN])}, ["'a", "NaN"]),
    "NaN in a dataclass": Case(lambda: Point(NAN), ["'x'", "NaN"]),
    "itself inside": Case(lambda: (d := {}, d.update(again=d))[0], ["Recursion"]),
    "too large": Case(lambda: {"x": "x" * 3_000_000}, ["MSG_SIZE_TOO_LARGE", "message.max.bytes"], KafkaError),
}
PARTS: dict[str, Case] = {
    "object as key": Case(lambda: _r(key=object()), ["key", "object"]),
    "NaN as key": Case(lambda: _r(key=NAN), ["key", "nan"]),
    "set as key": Case(lambda: _r(key={1}), ["key", "set"]),
    "object inside a key": Case(lambda: _r(key={"a": object()}), ["'a'", "object"]),
    "lone surrogate as key": Case(lambda: _r(key="\ud800"), ["key", "surrogates"]),
    "tombstone without key": Case(lambda: _r(None), ["tombstone", "key"]),
    "int as header": Case(lambda: _r(headers={"a": 1}), ["headers", "'a'", "int"]),
    "int as header name": Case(lambda: _r(headers={1: "a"}), ["headers", "1"]),
    "bytearray as header": Case(lambda: _r(headers={"a": bytearray(b"1")}), ["headers", "'a'", "bytearray"]),
    "None as header name": Case(lambda: _r(headers={None: "a"}), ["headers", "name None", "NoneType"]),
    "NUL in a header name": Case(lambda: _r(headers={"a\0b": "a"}), ["headers", "'a\\x00b'", "NUL"]),
    "too large a header": Case(lambda: _r(headers={"a": "x" * 3_000_000}), ["MSG_SIZE_TOO_LARGE"], KafkaError),
    "too large a key": Case(lambda: _r(key="x" * 3_000_000), ["MSG_SIZE_TOO_LARGE"], KafkaError),
    "headers as text": Case(lambda: _r(headers="ab"), ["headers", "mapping"]),
    "headers as number": Case(lambda: _r(headers=5), ["headers", "mapping"]),
    "header without value": Case(lambda: _r(headers=[("a",)]), ["headers", "pairs"]),
    "lone surrogate in a header name": Case(lambda: _r(headers={"\ud800": "a"}), ["headers"]),
    "negative partition": Case(lambda: _r(partition=-1), ["partition=-1"]),
    "text partition": Case(lambda: _r(partition="0"), ["partition='0'"]),
    "bool partition": Case(lambda: _r(partition=True), ["partition=True"]),
    "huge partition": Case(lambda: _r(partition=2**40), [str(2**40)]),
    "negative timestamp": Case(lambda: _r(timestamp=-5), ["timestamp=-5", "milliseconds"]),
    "timestamp 0": Case(lambda: _r(timestamp=0), ["timestamp=0", "milliseconds"]),
    "bool timestamp": Case(lambda: _r(timestamp=True), ["timestamp=True", "milliseconds"]),
    "infinite timestamp": Case(lambda: _r(timestamp=INF), ["timestamp=inf", "milliseconds"]),
    "year 1": Case(lambda: _r(timestamp=dt.datetime(1, 1, 1, tzinfo=dt.timezone.utc)), ["timestamp", "milliseconds"]),
    "float timestamp": Case(lambda: _r(timestamp=1.5), ["timestamp=1.5", "milliseconds"]),
    "text timestamp": Case(lambda: _r(timestamp="now"), ["timestamp='now'", "milliseconds"]),
    "huge timestamp": Case(lambda: _r(timestamp=2**70), ["timestamp", "milliseconds"]),
    "naive datetime": Case(lambda: _r(timestamp=dt.datetime(2013, 1, 1)), ["timestamp", "time zone"]),
    "date as timestamp": Case(lambda: _r(timestamp=dt.date(2013, 1, 1)), ["timestamp", "time zone"]),
}
OUTPUTS: dict[str, Case] = {
    "set of records": Case(lambda: {"a", "b"}, ["set", "KafkaRecord"]),
    "dict values": Case({"a": {}}.values, ["dict_values", "KafkaRecord"]),
    "number": Case(lambda: 5, ["int", "KafkaRecord"]),
    "series": Case(lambda: pl.Series([1]), ["Series", "polars"]),
    "pandas series": Case(lambda: pd.Series([1]), ["Series", "pandas"]),
    "pandas series with a named index": Case(lambda: pd.Series([1], pd.Index([2], name="i")), ["Series", "pandas"]),
    "array": Case(lambda: np.array([1]), ["ndarray", "KafkaRecord"]),
    "range": Case(lambda: range(3), ["record", "int"]),
    "deque of numbers": Case(lambda: collections.deque([1]), ["record", "int"]),
    "None in a list": Case(lambda: [{"a": 1}, None], ["record", "NoneType", "tombstone"]),
    "list in a list": Case(lambda: [{"a": 1}, [{"a": 1}]], ["record", "list"]),
    "text after mappings": Case(lambda: [{"a": 1}, "text"], ["record", "str", "dict"]),
    "mapping after text": Case(lambda: iter(["text", {"a": 1}]), ["record"]),
    "bytes after text": Case(lambda: ["text", b"bytes"], ["record"]),
    "KafkaRecord after mappings": Case(lambda: iter([{"a": 1}, _r({"a": 2})]), ["record", "KafkaRecord"]),
    "mapping after KafkaRecord": Case(lambda: [_r({"a": 2}), {"a": 1}], ["record", "KafkaRecord"]),
    "two formats of KafkaRecord": Case(lambda: [_r({"a": 1}), _r("text")], ["record", "string", "json"]),
    "raising generator": Case(_raising, ["half-way"], ZeroDivisionError),
    "nested raising generator": Case(_nested, ["half-way"], ZeroDivisionError),
    "raising map": Case(lambda: map(_divided, [2, 1, 0]), ["division"], ZeroDivisionError),
    "late bad record": Case(lambda: ({"i": i if i < 3000 else {i}} for i in range(4000)), ["'i'", "set"]),
    "frame without the key column": Case(lambda: pl.DataFrame({"a": [1]}), ["'k'", "'a'"], key="k"),
    "pandas frame without the key column": Case(lambda: pd.DataFrame({"a": [1]}), ["'k'", "'a'"], key="k"),
    "rows without the key field": Case(lambda: [{"k": 1}, {"a": 1}], ["'k'", "missing"], key="k"),
    "KafkaRecord without the key field": Case(lambda: [_r({"a": 1})], ["'k'", "missing"], key="k"),
    "dataclass without the key field": Case(lambda: [Point(1)], ["'k'", "missing"], key="k"),
    "text with a key field": Case(lambda: ["text"], ["'k'", "fields"], key="k"),
    "object as key field": Case(lambda: [{"k": {1}}], ["set"], key="k"),
    "number as the key's name": Case(lambda: [{"k": 1}], ["key", "5"], KafkaError, key=5),
    "frame with equal columns": Case(lambda: pd.DataFrame([[1, 2]], columns=["a", "a"]), ["data frame", "unique"]),
    "frame with numbered columns": Case(lambda: pd.DataFrame([[1]]), ["data frame", "str"]),
    "frame of bytes": Case(lambda: pl.DataFrame({"b": [b"x"]}), ["record", "'b'", "bytes"]),
    "frame of objects": Case(lambda: pd.DataFrame({"o": [object()]}), ["record", "'o'", "object"]),
    "frame of durations": Case(lambda: pl.DataFrame({"d": [dt.timedelta(1)]}), ["record", "'d'", "timedelta"]),
    "no such Kafka partition": Case(lambda: [_r(partition=0), _r(partition=7)], ["partition 7", "0 to 0"]),
}


def test_the_table_is_long_enough():
    assert len(OPTIONS) + len(RESOURCE_OPTIONS) + len(VALUES) + len(PARTS) + len(OUTPUTS) >= 110


def _check(error, case, index=None):
    if isinstance(error, dg.Failure):
        # What a step shows: the same words, and that trying again is of no use.
        assert isinstance(error.__cause__, case.error)
        said = {name: value.value for name, value in error.metadata.items()}
        assert error.description == str(error.__cause__)
        assert said["kafka/culprit"] == error.__cause__.culprit
        assert said["kafka/what_to_do"] == error.__cause__.fix
        assert index is None or said["kafka/record_index"] == index
        assert error.allow_retries is False
        error = error.__cause__
    if index is not None:
        assert error.index == index
        assert f"record {index}" in str(error)
    if isinstance(error, KafkaError):
        assert error.culprit
        assert error.cause
        assert error.fix
        assert str(error) == f"{error.culprit}: {error.cause}. {error.fix}"
        assert "Traceback" not in str(error)
        # However large the value is, its error can be read.
        assert len(str(error)) < 1000
    assert [part for part in case.said if part not in str(error)] == []


@pytest.fixture(scope="session")
def publication_config(kafka_bootstrap_servers):
    return PublicationConfig(producer=KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers))


@pytest.fixture(scope="module")
def shared_topic(kafka_bootstrap_servers):
    """One topic for the module: nothing of these cases may ever be visible in it."""
    from confluent_kafka.admin import AdminClient, NewTopic

    admin, name = AdminClient({"bootstrap.servers": kafka_bootstrap_servers}), f"bad-input-{uuid.uuid4().hex[:8]}"
    admin.create_topics([NewTopic(name, 1)], operation_timeout=30)[name].result(30)
    yield name
    visible = read_topic(kafka_bootstrap_servers, name)
    admin.delete_topics([name])[name].result(30)
    assert visible == []


def _publish(config, topic, output, key=None):
    name = uuid.uuid4().hex
    publish(config, output, transactional_id=f"bad-{name}", publication_id=name, topic=topic, key=key)


def _send(config, topic, output, key=None):
    with _writer(config, topic, key) as writer:
        for value in output:
            writer.send(value)


def _context(metadata):
    """The context of an output; given resources that are built already, it makes no Dagster instance of its own."""
    return dg.OutputContext(
        step_key="made",
        name="result",
        asset_key=dg.AssetKey("made"),
        definition_metadata=metadata,
        resources=ScopedResourcesBuilder().build(None),
    )


def _handle(config, topic, output, key=None):
    manager = KafkaIOManager(kafka=KafkaProducerResource(bootstrap_servers=config.producer.bootstrap_servers))
    metadata = {"kafka/topic": topic} | ({} if key is None else {"kafka/key": key})
    manager.handle_output(_context(metadata), output)


def _writer(config, topic, key=None):
    name = uuid.uuid4().hex
    return PublicationWriter(config, transactional_id=f"bad-{name}", publication_id=name, topic=topic, key=key)


def _behind_a_good_one(case):
    bad = case.make()
    return ["good" if isinstance(bad, (KafkaRecord, str)) else {"good": 1}, bad]


@pytest.mark.kafka
@pytest.mark.parametrize("door", [_send, _handle], ids=["PublicationWriter", "IO manager"])
@pytest.mark.parametrize("case", [*VALUES.values(), *PARTS.values()], ids=[*VALUES, *PARTS])
def test_bad_records_end_a_publication(case, door, publication_config, shared_topic):
    rows = _behind_a_good_one(case)
    if door is _handle and isinstance(rows[1], KafkaRecord):
        rows[0] = KafkaRecord("good")  # an output's records are of one kind
    with pytest.raises((case.error, dg.Failure)) as caught:
        door(publication_config, shared_topic, rows)
    _check(caught.value, case, index=1)


@pytest.mark.kafka
@pytest.mark.parametrize("door", [_publish, _handle], ids=["publish", "IO manager"])
@pytest.mark.parametrize("case", OUTPUTS.values(), ids=OUTPUTS)
def test_bad_outputs_end_a_publication(case, door, publication_config, shared_topic):
    with pytest.raises((case.error, dg.Failure)) as caught:
        door(publication_config, shared_topic, case.make(), case.key)
    _check(caught.value, case)


@pytest.fixture(scope="module")
def told_in_a_step(kafka_bootstrap_servers, shared_topic):
    """What `publishing` raises for each case, all in the body of one asset."""
    told = {}

    @dg.asset
    def made(context: dg.AssetExecutionContext, kafka: KafkaProducerResource) -> None:
        for name, case in {**VALUES, **PARTS, **OUTPUTS}.items():
            try:
                with kafka.publishing(context, topic=shared_topic, key=case.key, name=name) as publication:
                    if name in OUTPUTS:
                        publication.send_all(case.make())
                    else:
                        for value in _behind_a_good_one(case):
                            publication.send(value)
            except Exception as error:  # noqa: BLE001
                told[name] = error

    kafka = KafkaProducerResource(bootstrap_servers=kafka_bootstrap_servers)
    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([made], resources={"kafka": kafka}, instance=instance).success
    return told


@pytest.mark.kafka
@pytest.mark.parametrize("name", [*VALUES, *PARTS, *OUTPUTS])
def test_bad_input_ends_a_publication_from_the_body_of_an_asset(name, told_in_a_step):
    case = {**VALUES, **PARTS, **OUTPUTS}[name]
    assert isinstance(told_in_a_step[name], (case.error, dg.Failure))
    _check(told_in_a_step[name], case, index=None if name in OUTPUTS else 1)


@pytest.fixture(scope="module")
def producer(kafka_bootstrap_servers):
    with DataForgeKafkaProducer(KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers)) as producer:
        yield producer


@pytest.fixture(scope="module")
def resource(kafka_bootstrap_servers):
    kafka = KafkaProducerResource(bootstrap_servers=kafka_bootstrap_servers)
    with kafka.process_config_and_initialize_cm() as resource:
        yield resource


@pytest.mark.kafka
@pytest.mark.parametrize("case", [*VALUES.values(), *PARTS.values()], ids=[*VALUES, *PARTS])
def test_bad_records_are_refused_by_producer_and_resource(case, producer, resource, shared_topic):
    record = case.make()
    if not isinstance(record, KafkaRecord):
        record = KafkaRecord(record)
    for send in (producer.send_sync, producer.send_async, resource.send_sync, resource.send_async):
        with pytest.raises(case.error) as caught:
            send(shared_topic, record.value, record.key, record.headers, record.partition, record.timestamp)
        _check(caught.value, case)
    producer.flush()
    resource.flush()


REFUSED_BY_TOPIC: dict[str, tuple[Callable[[], KafkaRecord], list[str]]] = {
    "too large when compressed": (
        lambda: _r(np.random.default_rng(7).bytes(9_000)),
        ["MSG_SIZE_TOO_LARGE", "max.mess"],
    ),
    "no such Kafka partition": (lambda: _r(partition=7), ["Kafka partition"]),
    "far future": (lambda: _r(timestamp=2**62), ["timestamp", "max.ms"]),
}


@pytest.fixture(scope="module")
def small_topic(kafka_bootstrap_servers):
    """A topic that takes 2,000 bytes at most."""
    from confluent_kafka.admin import AdminClient, NewTopic

    admin, name = AdminClient({"bootstrap.servers": kafka_bootstrap_servers}), f"small-{uuid.uuid4().hex[:8]}"
    new = NewTopic(name, 1, config={"max.message.bytes": "2000"})
    admin.create_topics([new], operation_timeout=30)[name].result(30)
    yield name
    visible = read_topic(kafka_bootstrap_servers, name)
    admin.delete_topics([name])[name].result(30)
    assert visible == []


@pytest.mark.kafka
@pytest.mark.parametrize(("make", "said"), REFUSED_BY_TOPIC.values(), ids=REFUSED_BY_TOPIC)
def test_what_the_topic_refuses_is_told_at_every_door(
    make, said, producer, resource, publication_config, small_topic, kafka_bootstrap_servers
):
    def async_(sender):
        return sender.send_async(small_topic, *arguments, callback=lambda *_: None).result(30)

    arguments = dataclasses.astuple(make())
    case = Case(make, said, KafkaError)
    for door in (
        lambda: producer.send_sync(small_topic, *arguments),
        lambda: resource.send_sync(small_topic, *arguments),
        lambda: async_(producer),
        lambda: async_(resource),
        lambda: _publish(publication_config, small_topic, make()),
        lambda: _send(publication_config, small_topic, [make()]),
        lambda: _handle(publication_config, small_topic, make()),
    ):
        with pytest.raises((KafkaError, dg.Failure)) as caught:
            door()
        _check(caught.value, case)


@pytest.mark.parametrize("good", [[], [_r("v")]], ids=["first", "second"])
def test_a_record_in_a_record_is_refused(good):
    with pytest.raises(InvalidRecordError, match=f"record {len(good)}: its value is a KafkaRecord itself"):
        list(chunks([*good, _r(_r()), _r("v")]))


BESIDE = {"key": "k", "headers": {}, "partition": 0, "timestamp": 1}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_beside_a_record_is_refused_not_ignored(name):
    config = PublicationConfig(producer=KafkaProducerConfig())
    with pytest.raises(InvalidRecordError, match=f"record 0: {name} beside a KafkaRecord would be ignored"):
        _writer(config, "topic").send(_r(), **{name: BESIDE[name]})


@pytest.mark.kafka
def test_what_is_beside_a_single_record_is_refused_not_ignored(producer, resource, shared_topic):
    for send in (producer.send_sync, producer.send_async, resource.send_sync, resource.send_async):
        with pytest.raises(InvalidRecordError, match="key, partition beside a KafkaRecord"):
            send(shared_topic, _r(), "k", partition=0)


@pytest.mark.kafka
def test_nothing_is_something(producer, publication_config, kafka_topic, read):
    """Values and keys of no bytes are no tombstones and no missing keys; a key field that is None is a missing key."""
    topic = kafka_topic()
    producer.send_sync(topic, b"", key=b"", headers={"": b""})
    _publish(publication_config, topic, [KafkaRecord("", key=""), KafkaRecord("\0", key="\0")])
    _publish(publication_config, topic, [{"k": None}], "k")
    assert [(record.value, record.key) for record in read(topic)] == [
        (b"", b""),
        (b"", b""),
        (b"\0", b"\0"),
        (b'{"k":null}', None),
    ]


TOPICS = [
    "",
    ".",
    "..",
    "flüge",
    "航班",
    "a b",
    "a/b",
    "a:b",
    "a\n",
    "a\0b",
    "x" * 250,
    None,
    5,
    b"flights",
    ["flights"],
]


@pytest.mark.kafka
@pytest.mark.parametrize("topic", TOPICS, ids=repr)
def test_topics_that_kafka_refuses_are_refused_at_every_door(topic, producer, publication_config, shared_topic):
    doors = [
        lambda: producer.send_sync(topic, "x"),
        lambda: producer.send_async(topic, "x"),
        lambda: publish(publication_config, ["x"], transactional_id="t", publication_id="p", topic=topic),
    ]
    if topic:  # None and "" mean the publication's own topic

        def inside():
            with _writer(publication_config, shared_topic) as writer:
                writer.send("x", topic=topic)

        doors.append(inside)
    for door in doors:
        with pytest.raises(KafkaConfigError) as caught:
            door()
        assert repr(topic) in caught.value.culprit
        assert "249" in caught.value.fix


@pytest.mark.parametrize("assets", ["flights", dg.AssetKey("flights"), dg.AssetSpec("flights")], ids=type)
def test_checks_are_built_for_a_list_of_assets(assets):
    with pytest.raises(KafkaConfigError, match="single one. Give a list"):
        build_publication_checks(assets)


SESSIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no topic": ({"topic": None}, ["topic None", "249"]),
    "bytes as topic": ({"topic": b"a"}, ["topic b'a'", "249"]),
    "list as topic": ({"topic": ["a"]}, ["topic ['a']", "249"]),
    "int as name": ({"name": 5}, ["name=5", "str"]),
    "list as name": ({"name": ["a"]}, ["name=['a']", "str"]),
    "a field twice as key": ({"key": ["a", "a"]}, ["key=['a', 'a']", "more than once"]),
    "mapping as create_topic": ({"create_topic": {"partitions": 2}}, ["create_topic=", "KafkaTopicSpec"]),
    "int as on_bad_record": ({"on_bad_record": 5}, ["on_bad_record=5", "249"]),
    "int as value_schema": ({"value_schema": 5}, ["schema 5", "avro"]),
}


@pytest.mark.slow
def test_wrong_arguments_of_a_session_are_refused_before_anything_is_connected(closed_port):
    told = {}

    @dg.op
    def made(context: dg.OpExecutionContext, kafka: KafkaProducerResource) -> None:
        for name, (options, _) in SESSIONS.items():
            with pytest.raises(dg.Failure) as caught, kafka.publishing(context, **{"topic": "t"} | options):
                pass
            told[name] = caught.value

    @dg.job
    def session() -> None:
        made()

    with dg.DagsterInstance.ephemeral() as instance:
        kafka = KafkaProducerResource(bootstrap_servers=closed_port)
        assert session.execute_in_process(resources={"kafka": kafka}, instance=instance).success
    for name, (_, said) in SESSIONS.items():
        assert told[name].allow_retries is False
        assert [part for part in said if part not in told[name].description] == [], name


METADATA: dict[str, tuple[dict[str, Any], list[str]]] = {
    "int as topic": ({"kafka/topic": 5}, ["topic 5"]),
    "list as topic": ({"kafka/topic": ["a"]}, ["topic ['a']"]),
    "illegal topic": ({"kafka/topic": "a b"}, ["topic 'a b'", "249"]),
    "empty topic": ({"kafka/topic": ""}, ["topic ''"]),
    "int as key": ({"kafka/key": 5}, ["key=5", "field name"]),
    "a field twice as key": ({"kafka/key": ["a", "a"]}, ["key=['a', 'a']", "more than once"]),
    "list of ints as key": ({"kafka/key": ["a", 1]}, ["key=", "field name"]),
    "mapping as key": ({"kafka/key": {"a": 1}}, ["key=", "field name"]),
    "a slip": ({"kafka/tpoic": "t"}, ["metadata kafka/tpoic: there is no such entry", "Did you mean kafka/topic?"]),
    "what a materialization says": (
        {"kafka/value_format": "avro"},
        ["metadata kafka/value_format: this is what a materialization says", "Did you mean kafka/value_schema?"],
    ),
    "its dead-letter topic": ({"kafka/dead_letter_topic": "t.dead"}, ["Did you mean kafka/on_bad_record?"]),
    "its records": ({"kafka/records": 5}, ["this is what a materialization says. Leave it out, or use one of"]),
} | {
    f"no {name}": ({f"kafka/{name}": "a"}, [f"metadata kafka/{name}: there is no such entry", "kafka/write_mode"])
    for name in ("schema", "mode", "upsert", "record_key", "message_key", "headers", "partitions", "brokers")
}


def _refused(servers, output, metadata=None, **options):
    """The Failure of a step with this output."""
    kafka = KafkaProducerResource(bootstrap_servers=servers, connect_timeout=60)
    manager = KafkaIOManager(kafka=kafka, **options)
    metadata = {"kafka/topic": "made"} | metadata if metadata is not None else {}
    context = _context(metadata)
    began = time.monotonic()
    with pytest.raises(dg.Failure) as caught:
        manager.handle_output(context, output)
    assert time.monotonic() - began < 30, "it was refused only after an attempt to connect"
    assert caught.value.allow_retries is False
    assert caught.value.metadata["kafka/what_to_do"].value
    return caught.value


@pytest.mark.parametrize(("metadata", "said"), METADATA.values(), ids=METADATA)
def test_wrong_metadata_is_refused_before_anything_is_connected(metadata, said, closed_port):
    failure = _refused(closed_port, [{"a": 1}], metadata)
    assert [part for part in said if part not in failure.description] == []


def test_a_topic_template_that_this_asset_cannot_fill_in_is_refused_before_anything_is_connected(closed_port):
    assert "topic" in _refused(closed_port, [{"a": 1}], topic="{name[9]}").description


PUBLICATION = Publication("id", "publisher", "orders", 1, 2, "json", (), replayed=False, seconds=0.1)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    ("output", "fix"),
    [
        (PUBLICATION, "Return publication.materialize_result()"),
        (PublishingSession(None), "Return publication.materialize_result()"),
        (RecordMetadata("t", 0, 0, None), "Return None after send_sync"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_was_published_already_is_no_output(output, fix, rows, closed_port):
    failure = _refused(closed_port, [output] if rows else output, {})
    assert f"{'row 0' if rows else 'output'} of type {type(output).__name__}" in failure.description
    assert failure.metadata["kafka/what_to_do"].value == fix


@pytest.mark.parametrize("output", [5, {1, 2}, object, np.array([1])], ids=type)
def test_wrong_outputs_are_refused_before_anything_is_connected(output, closed_port):
    failure = _refused(closed_port, output, {})
    assert type(output).__qualname__ in failure.description
    assert "KafkaRecord" in failure.metadata["kafka/what_to_do"].value
