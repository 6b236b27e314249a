"""Much through one process, and a broker that is far slower than the data: memory, threads and files stay as they are."""

import json
import os
import socket
import struct
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from dataforge_kafka_dagster import KafkaError, KafkaProducerConfig
from dataforge_kafka_dagster.kafka import sender
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.errors import Remedy
from dataforge_kafka_dagster.kafka.publication import publish
from dataforge_kafka_dagster.local import LocalKafka

pytestmark = pytest.mark.faults

_MEGABYTE = 1_000_000
_QUEUE = 32 * _MEGABYTE

# Each runs in a process of its own, so that its memory is its own, and prints what it found as JSON.
_COMMON = """
import gc, json, sys, threading, time, uuid
import psutil
from dataforge_kafka_dagster import KafkaProducerConfig
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.publication import publish
from dataforge_kafka_dagster.kafka.sender import Sender

process = psutil.Process()
servers, topic, count, queue = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def config(**more):
    producer = KafkaProducerConfig(bootstrap_servers=servers, connect_timeout=60, buffer_memory=queue, **more)
    return PublicationConfig(producer=producer, transaction_timeout=3000)

def once(rows, **more):
    name = uuid.uuid4().hex
    return publish(config(**more), rows, transactional_id="long", publication_id=name, topic=topic)
"""

_FREE = (
    _COMMON
    + """
from dataforge_kafka_dagster.kafka.statistics import Statistics

sent = []
take = Statistics.take

def counting(self, text):
    report = json.loads(text)
    sent.append((report["ts"] / 1e6, report["tx_bytes"]))
    take(self, text)

Statistics.take = counting
began = time.monotonic()
once(({"i": i} for i in range(count)), compression_type="none")
seconds = time.monotonic() - began
(first, some), (last, all_of_them) = sent[0], sent[-1]
print(json.dumps({"records": count / seconds, "bytes": (all_of_them - some) / (last - first)}))
"""
)

_THROTTLED = (
    _COMMON
    + """
once({"i": i} for i in range(1000))  # an idle worker has published before
gc.collect()
idle = process.memory_info().rss
most, over, full = [idle], threading.Event(), [0]
wait = Sender._produce_with_room

def counting(self, *args, **record):
    full[0] += 1
    return wait(self, *args, **record)

Sender._produce_with_room = counting

def watch():
    while not over.wait(0.05):
        most[0] = max(most[0], process.memory_info().rss)

watcher = threading.Thread(target=watch)
watcher.start()
began = time.monotonic()
try:
    done = once(({"i": i} for i in range(count)), delivery_timeout=600, compression_type="none")
finally:
    over.set()
    watcher.join()
seconds = time.monotonic() - began
print(json.dumps({"idle": idle, "most": most[0], "full": full[0], "records": done.records, "seconds": seconds}))
"""
)

_MANY = (
    _COMMON
    + """
def now():
    gc.collect()
    return [process.memory_info().rss, process.num_threads(), process.num_fds()]

found = {}
began = time.monotonic()
for number in range(1, count + 1):
    assert once({"i": i} for i in range(50)).records == 50
    if number in (100, count // 2, count):
        time.sleep(1)  # librdkafka's threads end a little later
        found[number] = now()
print(json.dumps({"found": found, "seconds": time.monotonic() - began}))
"""
)


def _run(source, *arguments, timeout):
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def kafka():
    with LocalKafka(config={"transaction.max.timeout.ms": "3600000"}) as kafka:
        yield kafka


def _bytes_per_second(kafka, rate):
    """Let clients produce no more than this, on each broker, in whole bytes; None lets them do as they like.

    By a request of our own, since neither librdkafka nor the tools in reach have it:
    https://kafka.apache.org/protocol#The_Messages_AlterClientQuotas
    """

    def text(value):
        return struct.pack(">h", -1) if value is None else struct.pack(">h", len(value)) + value.encode()

    entity = struct.pack(">i", 1) + text("client-id") + text(None)
    change = struct.pack(">i", 1) + text("producer_byte_rate") + struct.pack(">d?", rate or 0.0, rate is None)
    body = struct.pack(">hhi", 49, 0, 1) + text("test") + struct.pack(">i", 1) + entity + change + b"\0"
    host, port = kafka.bootstrap_servers.split(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        connection.sendall(struct.pack(">i", len(body)) + body)
        answer = connection.makefile("rb")
        (size,) = struct.unpack(">i", answer.read(4))
        # Correlation id, throttle time, number of entries; then the first one's error code.
        assert struct.unpack(">iiih", answer.read(size)[:14]) == (1, 0, 1, 0)


def _end(kafka, topic):
    admin, place = AdminClient({"bootstrap.servers": kafka.bootstrap_servers}), TopicPartition(topic, 0)
    return admin.list_offsets({place: OffsetSpec.latest()})[place].result(30).offset


@pytest.mark.timeout(3600)
def test_ten_million_records_to_a_throttled_broker(kafka, say):
    topic, count = f"throttled-{uuid.uuid4().hex[:6]}", int(os.environ.get("THROTTLED_RECORDS", "10000000"))
    kafka.create_topic(topic)
    free = _run(_FREE, kafka.bootstrap_servers, topic, 2_000_000, _QUEUE, timeout=600)
    before = _end(kafka, topic)
    rate = round(free["bytes"] / 10)
    _bytes_per_second(kafka, rate)
    try:
        found = _run(_THROTTLED, kafka.bootstrap_servers, topic, count, _QUEUE, timeout=2900)
    finally:
        _bytes_per_second(kafka, None)
    speed = found["records"] / found["seconds"]
    grown = found["most"] - found["idle"]
    say(
        f"{found['records']:,} records in {found['seconds']:.0f} s against {rate / 1e3:.0f} kB/s, {speed:,.0f} a second"
        f" (not throttled: {free['bytes'] / 1e3:.0f} kB/s, {free['records']:,.0f}): RSS {found['idle'] / 1e6:.0f} MB idle,"
        f" {found['most'] / 1e6:.0f} MB at most (queue {_QUEUE / 1e6:.0f} MB), {found['full']:,} times full"
    )
    # A quota gives away some seconds' worth when it begins.
    assert speed < free["records"] / 6
    assert found["records"] == count
    assert found["full"] > 0
    assert grown <= _QUEUE + 50 * _MEGABYTE
    assert _end(kafka, topic) - before >= count


def test_a_quota_that_lets_too_little_through_in_time_is_named(kafka):
    topic = f"quota-{uuid.uuid4().hex[:6]}"
    kafka.create_topic(topic)
    producer = KafkaProducerConfig(bootstrap_servers=kafka.bootstrap_servers, delivery_timeout=8)
    rows = (os.urandom(100).hex() for _ in range(20_000))
    _bytes_per_second(kafka, 5_000)
    try:
        with pytest.raises(KafkaError, match="_MSG_TIMED_OUT.* held requests back for .* by a quota") as caught:
            publish(
                PublicationConfig(producer=producer), rows, transactional_id=topic, publication_id=topic, topic=topic
            )
    finally:
        _bytes_per_second(kafka, None)
    assert caught.value.fix.startswith("Lower buffer_memory")
    assert caught.value.remedy is Remedy.RETRY


@pytest.mark.parametrize("held", [True, False], ids=["held back", "all at once"])
def test_no_more_is_sent_ahead_than_a_quota_lets_through_in_time(held, kafka, monkeypatch, say):
    topic = f"slow-{uuid.uuid4().hex[:6]}"
    kafka.create_topic(topic)
    producer = KafkaProducerConfig(
        bootstrap_servers=kafka.bootstrap_servers, delivery_timeout=40, compression_type="none"
    )
    config = PublicationConfig(producer=producer)
    monkeypatch.setattr(sender, "_AHEAD_BYTES", 200_000 if held else 16_000_000)
    rows = (os.urandom(1_000) for _ in range(9_000))
    _bytes_per_second(kafka, 100_000)
    try:
        if held:
            done = publish(config, rows, transactional_id=topic, publication_id=topic, topic=topic)
            assert done.records == 9_000
            say(f"9 MB at 100 kB/s: {done.seconds:.0f} s")
            assert done.seconds > producer.delivery_timeout
        else:
            with pytest.raises(KafkaError, match="_MSG_TIMED_OUT.* held requests back for .* by a quota"):
                publish(config, rows, transactional_id=topic, publication_id=topic, topic=topic)
    finally:
        _bytes_per_second(kafka, None)


@pytest.mark.timeout(1800)
def test_two_thousand_publications_in_one_process(kafka, say):
    topic, count = f"many-{uuid.uuid4().hex[:6]}", int(os.environ.get("MANY_PUBLICATIONS", "2000"))
    kafka.create_topic(topic)
    found = _run(_MANY, kafka.bootstrap_servers, topic, count, _QUEUE, timeout=1700)
    (memory, threads, files), (memory_last, threads_last, files_last) = (
        found["found"]["100"],
        found["found"][str(count)],
    )
    say(
        f"{count} publications in {found['seconds']:.0f} s; after 100: RSS {memory / 1e6:.1f} MB, {threads} threads,"
        f" {files} files; at the end: {memory_last / 1e6:.1f} MB, {threads_last}, {files_last}"
    )
    assert threads_last <= threads
    assert files_last <= files
    assert memory_last <= memory + 10 * _MEGABYTE
