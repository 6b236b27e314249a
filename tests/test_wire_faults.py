"""Requests and answers that are lost, late or refused on their way: what is told as published is there, once."""

import collections
import json
import os
import random
import time

import pytest
from conftest import read_topic
from wire import FAULTS, PRODUCE, Wire

from dataforge_kafka_dagster import DataForgeKafkaProducer, KafkaError, KafkaProducerConfig, KafkaRecord
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.errors import Remedy
from dataforge_kafka_dagster.kafka.publication import publish
from dataforge_kafka_dagster.local import LocalKafka
from dataforge_kafka_dagster.local_java import free_ports

pytestmark = pytest.mark.faults

ROUNDS = int(os.environ.get("WIRE_ROUNDS", "40"))
SEED = int(os.environ.get("WIRE_SEED", random.randrange(10**6)))
ATTEMPTS = 8
"""Most of one publication; the last of them has no faults."""
PATIENCE = 120
INIT, ADD_PARTITIONS, ADD_OFFSETS, END, COMMIT_OFFSETS, FIND, FETCH_OFFSETS = 22, 24, 25, 26, 28, 10, 9
SPOILT = [None, {PRODUCE}, {PRODUCE}, {END}, {COMMIT_OFFSETS, ADD_OFFSETS}, {INIT, ADD_PARTITIONS, FIND, FETCH_OFFSETS}]
SOURCES = {
    "a few records": lambda rng, rows: [{"i": i} for i in range(rows % 20 + 1)],
    "a list without delivery reports": lambda rng, rows: [{"i": i, "text": "y" * 50} for i in range(rows + 10_000)],
    "a generator": lambda rng, rows: ({"i": i} for i in range(rows)),
    "slow, in small batches": lambda rng, rows: (time.sleep(rng.choice([0, 0.002])) or {"i": i} for i in range(1500)),
    "with keys": lambda rng, rows: [KafkaRecord({"i": i}, key=f"{i % 97}") for i in range(rows)],
}


@pytest.fixture
def wire():
    broker = next(free_ports())
    with Wire(broker, SEED) as wire:
        config = {"advertised.listeners": f"PLAINTEXT://127.0.0.1:{wire.port}"}
        with LocalKafka(ports=broker, config=config) as kafka:
            wire.kafka, wire.servers = kafka, f"127.0.0.1:{wire.port}"
            yield wire
            wire.share = 0


def _config(wire, **options):
    return KafkaProducerConfig(bootstrap_servers=wire.servers, connect_timeout=8, delivery_timeout=20, **options)


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_publications_are_told_as_they_are_whatever_is_lost_on_the_wire(guarantee, wire):
    rng = random.Random(SEED)
    for number in range(ROUNDS):
        topic, name = f"t{number}", rng.choice(list(SOURCES))
        slow = "slow" in name
        wire.kafka.create_topic(topic, 48 if slow else rng.choice([1, 3, 8]))
        config = PublicationConfig(producer=_config(wire, linger_ms=0 if slow else 5), delivery_guarantee=guarantee)
        rows, began = rng.randrange(1, 30_000), time.monotonic()
        wire.only = rng.choice(SPOILT if guarantee == "exactly_once" else SPOILT[:3])
        for attempt in range(1, ATTEMPTS + 1):
            wire.share = rng.choice([0.05, 0.2, 0.4]) if attempt < ATTEMPTS else 0
            try:
                done = publish(
                    config, SOURCES[name](rng, rows), transactional_id=topic, publication_id=topic, topic=topic
                )
            except KafkaError as error:
                if error.remedy is Remedy.FAIL or attempt == ATTEMPTS:
                    raise
            else:
                break
        wire.share = 0
        assert time.monotonic() < began + PATIENCE * attempt
        found = read_topic(wire.servers, topic)
        values = {json.loads(record.value)["i"] for record in found}
        places = {(record.partition, record.offset) for record in found}
        told = {
            (offsets.partition, offset)
            for offsets in done.offsets
            for first, last in offsets.runs
            for offset in range(first, last + 1)
        }
        case = f"WIRE_SEED={SEED}, round {number}, {name}, attempt {attempt}"
        assert sorted(values) == list(range(done.records)), case
        assert len(told) == done.records, case
        assert told == places if guarantee == "exactly_once" else told <= places, case
    assert all(wire.spoilt[fault] for fault in FAULTS), (SEED, wire.spoilt)


def test_single_records_that_are_told_as_delivered_are_there_whatever_is_lost_on_the_wire(wire):
    rng = random.Random(SEED)
    outcomes = collections.Counter()
    for number in range(ROUNDS):
        topic = f"t{number}"
        wire.kafka.create_topic(topic, rng.choice([1, 3]))
        producer = DataForgeKafkaProducer(_config(wire, linger_ms=rng.choice([0, 5])))
        wire.only, wire.share = {PRODUCE}, rng.choice([0.05, 0.2, 0.4])
        sent = []
        try:
            for i in range(300):
                sent.append(producer.send_async(topic, f"{i}", key=f"{i % 7}"))
                time.sleep(rng.choice([0, 0, 0.001, 0.004]))
            producer.flush()
        except KafkaError as error:
            outcomes[f"raised {error.code}"] += 1
        wire.share = 0
        try:
            producer.close()
        except KafkaError:
            outcomes["close raised"] += 1
        there = {(record.partition, record.offset): record.value for record in read_topic(wire.servers, topic)}
        for i, future in enumerate(sent):
            error = future.exception(30)
            outcomes[error and error.code] += 1
            if error is None:
                place = future.result()
                assert there[place.partition, place.offset] == f"{i}".encode(), (
                    f"WIRE_SEED={SEED}, round {number}, record {i}"
                )
    assert outcomes["_INCONSISTENT"], (SEED, outcomes)
    assert all(wire.spoilt[fault] for fault in FAULTS), (SEED, wire.spoilt)
