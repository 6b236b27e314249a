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
from dagster._core.definitions.scoped_resources_builder import ScopedResourcesBuilder
from pydantic import ValidationError

from dataforge_kafka_dagster import (
    DataForgeKafkaProducer,
    KafkaError,
    KafkaIOManager,
    KafkaProducerConfig,
    KafkaProducerResource,
    KafkaRecord,
    create_kafka_producer,
)
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaConfigError
from dataforge_kafka_dagster.kafka.publication import PublicationWriter, publish

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
    "raw number": ({"librdkafka_config": {"batch.size": 5}}, ["librdkafka_config", "batch.size"]),
}


@pytest.mark.parametrize(("options", "said"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "door", [create_kafka_producer, lambda options: KafkaProducerResource(**options)], ids=["producer", "resource"]
)
def test_wrong_options_are_refused_when_given(door, options, said):
    with pytest.raises(ValidationError) as caught:
        door(options)
    message = str(caught.value)
    assert [part for part in said if part not in message] == []
    assert CANARY not in message


RESOURCE_OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown guarantee": ({"delivery_guarantee": "sometimes"}, ["delivery_guarantee", "exactly_once"]),
    "acks for exactly once": ({"acks": "1"}, ["acks", "exactly_once", "at_least_once"]),
    "acks as a number": ({"acks": 0}, ["acks", "exactly_once"]),
    "empty prefix": ({"transactional_id_prefix": ""}, ["transactional_id_prefix"]),
    "long prefix": ({"transactional_id_prefix": "x" * 100}, ["transactional_id_prefix"]),
    "short transaction": ({"transaction_timeout": 0}, ["transaction_timeout"]),
    "negative step_retries": ({"step_retries": -1}, ["step_retries"]),
    "no retry delay": ({"step_retry_delay": 0}, ["step_retry_delay"]),
}


@pytest.mark.parametrize(("options", "said"), RESOURCE_OPTIONS.values(), ids=RESOURCE_OPTIONS)
def test_wrong_resource_options_are_refused_at_definition(options, said):
    with pytest.raises(ValidationError) as caught:
        KafkaProducerResource(**options)
    assert [part for part in said if part not in str(caught.value)] == []


@pytest.mark.parametrize("options", [{"topik": "a"}, {"read_timeout": 0}, {"read_timeout": "long"}, {"topic": 5}])
def test_wrong_io_manager_options_are_refused_at_definition(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        KafkaIOManager(kafka=KafkaProducerResource(), **options)


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
    "headers as text": Case(lambda: _r(headers="ab"), ["headers", "mapping"]),
    "headers as number": Case(lambda: _r(headers=5), ["headers", "mapping"]),
    "header without value": Case(lambda: _r(headers=[("a",)]), ["headers", "pairs"]),
    "lone surrogate in a header name": Case(lambda: _r(headers={"\ud800": "a"}), ["headers"]),
    "negative partition": Case(lambda: _r(partition=-1), ["partition=-1"]),
    "text partition": Case(lambda: _r(partition="0"), ["partition='0'"]),
    "bool partition": Case(lambda: _r(partition=True), ["partition=True"]),
    "huge partition": Case(lambda: _r(partition=2**40), [str(2**40)]),
    "negative timestamp": Case(lambda: _r(timestamp=-5), ["timestamp=-5", "milliseconds"]),
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


def _check(error, case):
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
    admin.delete_topics([name])[name].result(30)


def _writer(config, topic, key=None):
    name = uuid.uuid4().hex
    return PublicationWriter(config, transactional_id=f"bad-{name}", publication_id=name, topic=topic, key=key)


@pytest.mark.kafka
@pytest.mark.parametrize("case", [*VALUES.values(), *PARTS.values()], ids=[*VALUES, *PARTS])
def test_bad_records_end_a_publication_and_nothing_is_visible(case, publication_config, shared_topic, read):
    with pytest.raises(case.error) as caught, _writer(publication_config, shared_topic) as writer:
        writer.send({"good": 1} if not isinstance(case.make(), KafkaRecord) else "good")
        writer.send(case.make())
    _check(caught.value, case)
    if isinstance(caught.value, InvalidRecordError):
        assert caught.value.index == 1
        assert "record 1" in str(caught.value)
    assert read(shared_topic) == []


@pytest.mark.kafka
@pytest.mark.parametrize("case", OUTPUTS.values(), ids=OUTPUTS)
def test_bad_outputs_end_a_publication_and_nothing_is_visible(case, publication_config, shared_topic, read):
    with pytest.raises(case.error) as caught, _writer(publication_config, shared_topic, case.key) as writer:
        writer.send_all(case.make())
    _check(caught.value, case)
    assert read(shared_topic) == []


@pytest.fixture(scope="module")
def producer(kafka_bootstrap_servers):
    with DataForgeKafkaProducer(KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers)) as producer:
        yield producer


@pytest.mark.kafka
@pytest.mark.parametrize("case", [*VALUES.values(), *PARTS.values()], ids=[*VALUES, *PARTS])
def test_bad_records_are_refused_by_the_producer(case, producer, shared_topic, read):
    record = case.make()
    if not isinstance(record, KafkaRecord):
        record = KafkaRecord(record)
    for send in (producer.send_sync, producer.send_async):
        with pytest.raises(case.error) as caught:
            send(shared_topic, record.value, record.key, record.headers, record.partition, record.timestamp)
        _check(caught.value, case)
    producer.flush()
    assert read(shared_topic) == []


TOPICS = ["", ".", "..", "flüge", "航班", "a b", "a/b", "a:b", "a\n", "x" * 250, None, 5, b"flights", ["flights"]]


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


METADATA: dict[str, tuple[dict[str, Any], list[str]]] = {
    "int as topic": ({"kafka/topic": 5}, ["topic 5"]),
    "list as topic": ({"kafka/topic": ["a"]}, ["topic ['a']"]),
    "illegal topic": ({"kafka/topic": "a b"}, ["topic 'a b'", "249"]),
    "empty topic": ({"kafka/topic": ""}, ["topic ''"]),
    "int as key": ({"kafka/key": 5}, ["key=5", "field name"]),
    "list of ints as key": ({"kafka/key": ["a", 1]}, ["key=", "field name"]),
    "mapping as key": ({"kafka/key": {"a": 1}}, ["key=", "field name"]),
}


def _refused(servers, output, metadata=None, **options):
    """The Failure of a step with this output."""
    manager = KafkaIOManager(kafka=KafkaProducerResource(bootstrap_servers=servers), **options)
    metadata = {"kafka/topic": "made"} | metadata if metadata is not None else {}
    # Given resources that are built already, the context makes no Dagster instance of its own.
    context = dg.build_output_context(
        name="result", asset_key="made", definition_metadata=metadata, resources=ScopedResourcesBuilder().build(None)
    )
    began = time.monotonic()
    with pytest.raises(dg.Failure) as caught:
        manager.handle_output(context, output)
    assert time.monotonic() - began < 1, "it was refused only after an attempt to connect"
    assert caught.value.allow_retries is False
    assert caught.value.metadata["kafka/what_to_do"].value
    return caught.value


@pytest.mark.parametrize(("metadata", "said"), METADATA.values(), ids=METADATA)
def test_wrong_metadata_is_refused_before_anything_is_connected(metadata, said, closed_port):
    failure = _refused(closed_port, [{"a": 1}], metadata)
    assert [part for part in said if part not in failure.description] == []


TEMPLATES = ["{asset}", "{", "{0}", "{asset_key.x}", "{asset_key!z}", "{name[9]}", "a b", "{asset_key:>400}"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_wrong_topic_templates_are_refused_before_anything_is_connected(template, closed_port, monkeypatch):
    monkeypatch.setattr(dg.OutputContext, "job_name", "work")
    assert "topic" in _refused(closed_port, [{"a": 1}], topic=template).description


@pytest.mark.parametrize("output", [5, {1, 2}, object, np.array([1])], ids=type)
def test_wrong_outputs_are_refused_before_anything_is_connected(output, closed_port):
    failure = _refused(closed_port, output, {})
    assert type(output).__qualname__ in failure.description
    assert "KafkaRecord" in failure.metadata["kafka/what_to_do"].value
