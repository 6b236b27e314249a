import collections
import concurrent.futures
import datetime as dt
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import types
import uuid
import weakref
from dataclasses import dataclass
from pathlib import Path

import confluent_kafka
import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from conftest import Clock

from dataforge_kafka_dagster import (
    DataForgeKafkaProducer,
    KafkaError,
    KafkaProducerConfig,
    KafkaRecord,
    KafkaTimeoutError,
    NoBrokersAvailable,
    RecordMetadata,
    create_kafka_producer,
)
from dataforge_kafka_dagster.kafka import producer as producer_module
from dataforge_kafka_dagster.kafka.connection import Connection, logger
from dataforge_kafka_dagster.kafka.errors import UNKNOWN_TOPIC_CODES, InvalidRecordError, Remedy

pytestmark = pytest.mark.kafka

LOCAL = "localhost:9092"
# Not far in the past: a broker removes records as soon as they are older than its retention, seven days.
WHEN = dt.datetime.now(dt.timezone.utc).replace(microsecond=0) - dt.timedelta(hours=1)
EARLIER = round(WHEN.timestamp() * 1000) - 1234


@pytest.fixture
def config(kafka_bootstrap_servers):
    return KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers, delivery_timeout=10)


@pytest.fixture
def producer(config):
    with DataForgeKafkaProducer(config) as producer:
        yield producer


def _run(source, servers, topic):
    """Execute a documented usage with the broker and the topic of the test in place of its own."""
    assert LOCAL in source
    names = {}
    exec(source.replace(LOCAL, servers).replace('"my-topic"', repr(topic)), names)
    return names


IMPORTS = """
from dataforge_kafka_dagster import DataForgeKafkaProducer, KafkaProducerConfig, create_kafka_producer
config = KafkaProducerConfig(bootstrap_servers=["localhost:9092"])
"""

SYNC = """
producer = DataForgeKafkaProducer(config)
success = producer.send_sync("my-topic", {"message": "Hello Kafka!"})
outcome = None
if success:
    outcome = "sent"
producer.close()
"""

ASYNC = """
producer = DataForgeKafkaProducer(config)
calls = []
def delivery_callback(err, msg):
    if err:
        calls.append(err)
    else:
        calls.append((msg.topic(), msg.partition()))

producer.send_async("my-topic", {"async_message": "Hello Async!"}, callback=delivery_callback)
producer.close()
"""

WITH = """
with DataForgeKafkaProducer(config) as producer:
    producer.send_sync("my-topic", {"message": "from the block"})
    producer.send_async("my-topic", {"message": "left to the block's end"})
"""

FACTORY = """
producer = create_kafka_producer(
    {"bootstrap_servers": ["localhost:9092"], "client_id": "factory-producer", "compression_type": "snappy"}
)
success = producer.send_sync("my-topic", {"message": "factory"})
producer.close()
"""


def _values(found):
    return [record.value for record in found]


def test_documented_usage_send_sync(kafka_bootstrap_servers, kafka_topic, read):
    topic = kafka_topic()
    names = _run(IMPORTS + SYNC, kafka_bootstrap_servers, topic)
    assert names["outcome"] == "sent"
    assert _values(read(topic)) == [b'{"message":"Hello Kafka!"}']


def test_documented_usage_send_async(kafka_bootstrap_servers, kafka_topic, read):
    topic = kafka_topic()
    names = _run(IMPORTS + ASYNC, kafka_bootstrap_servers, topic)
    assert names["calls"] == [(topic, 0)]
    assert _values(read(topic)) == [b'{"async_message":"Hello Async!"}']


def test_documented_usage_with(kafka_bootstrap_servers, kafka_topic, read):
    topic = kafka_topic()
    _run(IMPORTS + WITH, kafka_bootstrap_servers, topic)
    assert _values(read(topic)) == [b'{"message":"from the block"}', b'{"message":"left to the block\'s end"}']


def test_documented_usage_factory(kafka_bootstrap_servers, kafka_topic, read):
    topic = kafka_topic()
    names = _run(IMPORTS + FACTORY, kafka_bootstrap_servers, topic)
    assert isinstance(names["success"], RecordMetadata)
    assert names["producer"].config.client_id == "factory-producer"
    assert _values(read(topic)) == [b'{"message":"factory"}']


def test_what_send_sync_returns_is_what_a_reader_finds(producer, kafka_topic, read):
    topic = kafka_topic(partitions=3)
    began = time.time() * 1000
    sent = [
        producer.send_sync(topic, {"i": 0}, key="a"),
        producer.send_sync(topic, "text", key=7, partition=2, headers={"h": "é", "n": None}, timestamp=EARLIER),
        producer.send_sync(topic, b"\x00\xff", partition=1, headers=[("h", b"1"), ("h", b"2")]),
        producer.send_sync(topic, None, key=b"k", partition=1),
        producer.send_sync(topic, "later", partition=2, timestamp=WHEN),
    ]
    assert all(sent)
    found = {(record.partition, record.offset): record for record in read(topic)}
    assert len(found) == len(sent)
    for metadata in sent:
        assert metadata.topic == topic
        assert found[metadata.partition, metadata.offset].timestamp == metadata.timestamp
    first, second, third, fourth, fifth = (found[metadata.partition, metadata.offset] for metadata in sent)
    assert (first.key, first.value) == (b"a", b'{"i":0}')
    assert began - 1000 <= first.timestamp <= time.time() * 1000 + 1000
    assert (second.partition, second.key, second.value) == (2, b"7", b"text")
    assert (second.headers, second.timestamp) == ([("h", "é".encode()), ("n", None)], EARLIER)
    assert (third.partition, third.value, third.headers) == (1, b"\x00\xff", [("h", b"1"), ("h", b"2")])
    assert (fourth.partition, fourth.key, fourth.value) == (1, b"k", None)
    assert fifth.timestamp == round(WHEN.timestamp() * 1000)


def test_dataclasses_and_records_are_values(producer, kafka_topic, read):
    @dataclass
    class Point:
        x: int

    topic = kafka_topic()
    producer.send_sync(topic, Point(1))
    assert _values(read(topic)) == [b'{"x":1}']


def test_a_kafka_record_is_not_published_as_json_of_itself(producer, kafka_topic, read):
    topic = kafka_topic()
    try:
        producer.send_sync(topic, KafkaRecord({"a": 1}, key="k"))
    except InvalidRecordError:
        assert read(topic) == []
    else:
        assert [(record.key, record.value) for record in read(topic)] == [(b"k", b'{"a":1}')]


def test_acks_0_has_no_offset_and_acks_1_has(kafka_bootstrap_servers, kafka_topic, read):
    topic = kafka_topic()
    with create_kafka_producer({"bootstrap_servers": kafka_bootstrap_servers, "acks": 0}) as producer:
        assert producer.send_sync(topic, "0").offset == -1
    with create_kafka_producer({"bootstrap_servers": kafka_bootstrap_servers, "acks": 1}) as producer:
        assert producer.send_sync(topic, "1").offset == 1
    assert _values(read(topic)) == [b"0", b"1"]


def _murmur2(data):
    """Kafka's org.apache.kafka.common.utils.Utils.murmur2, from its Java source."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = (0x9747B28C ^ len(data)) & mask
    whole = len(data) // 4 * 4
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & mask
        k = (k ^ (k >> 24)) * m & mask
        h = (h * m & mask) ^ k
    rest = data[whole:]
    if rest:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ (h >> 13)) * m & mask
    return h ^ (h >> 15)


def test_the_murmur2_of_this_test_is_javas():
    # From Kafka's own UtilsTest.testMurmur2.
    vectors = {
        b"21": -973932308,
        b"foobar": -790332482,
        b"a-little-bit-long-string": -985981536,
        b"a-little-bit-longer-string": -1486304829,
        b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        b"abc": 479470107,
    }
    for data, signed in vectors.items():
        assert _murmur2(data) == signed & 0xFFFFFFFF


def test_keys_go_to_the_kafka_partition_of_javas_client(producer, kafka_topic, read):
    topic = kafka_topic(partitions=7)
    keys = [*(f"N{i}" for i in range(60)), "é", "foobar", "a-little-bit-longer-string"]
    for key in keys:
        producer.send_async(topic, "v", key=key)
    producer.flush()
    found = {record.key: record.partition for record in read(topic)}
    assert found == {key.encode(): (_murmur2(key.encode()) & 0x7FFFFFFF) % 7 for key in keys}
    assert len(set(found.values())) == 7


def test_callback_and_future_of_delivered_records(producer, kafka_topic, read):
    topic = kafka_topic(partitions=2)
    calls = []
    futures = [
        producer.send_async(
            topic, str(i), key=str(i), callback=lambda err, msg: calls.append((err, msg.partition(), msg.offset()))
        )
        for i in range(50)
    ]
    told = [future.result(10) for future in futures]
    producer.flush()
    assert [err for err, _, _ in calls] == [None] * 50
    places = {(record.partition, record.offset): record.key for record in read(topic)}
    assert {(partition, offset) for _, partition, offset in calls} == set(places)
    assert [places[metadata.partition, metadata.offset] for metadata in told] == [str(i).encode() for i in range(50)]


@pytest.mark.parametrize("seconds", [1, 4])
def test_a_topic_that_does_not_exist_is_told_before_the_time_is_up(config, seconds):
    with DataForgeKafkaProducer(config.model_copy(update={"delivery_timeout": seconds})) as producer:
        with pytest.raises(KafkaError, match="Create the topic") as caught:
            producer.send_sync("no-such-topic", "x")
        assert not producer.failed
    assert caught.value.code in UNKNOWN_TOPIC_CODES


@pytest.fixture
def no_room(kafka_topic):
    """A topic that refuses records of more than 1000 bytes, as the broker says in the delivery report."""
    return kafka_topic(config={"max.message.bytes": "1000"})


LARGE = uuid.uuid4().hex * 200


def test_callback_gets_the_error_of_a_failed_record(kafka_bootstrap_servers, no_room, read):
    calls = collections.defaultdict(list)
    options = {"bootstrap_servers": kafka_bootstrap_servers, "compression_type": "none", "linger_ms": 0}
    with create_kafka_producer(options) as producer:
        bad = producer.send_async(no_room, LARGE, callback=lambda err, msg: calls["bad"].append(err))
        with pytest.raises(KafkaError) as caught:
            bad.result(10)
        good = producer.send_async(no_room, "small", callback=lambda err, msg: calls["good"].append(err))
        assert good.result(10).offset == 0
        producer.flush()
    assert [err.name() for err in calls["bad"]] == ["MSG_SIZE_TOO_LARGE"]
    assert calls["good"] == [None]
    assert caught.value.code == "MSG_SIZE_TOO_LARGE"
    assert _values(read(no_room)) == [b"small"]


def test_flush_raises_for_records_lost_without_a_callback_once(kafka_bootstrap_servers, no_room, caplog):
    producer = create_kafka_producer({"bootstrap_servers": kafka_bootstrap_servers, "compression_type": "none"})
    for _ in range(3):
        # One at a time: the broker refuses a batch as a whole.
        for value in (LARGE, "small"):
            concurrent.futures.wait([producer.send_async(no_room, value)], 10)
    with caplog.at_level(logging.ERROR, "dataforge_kafka_dagster"), pytest.raises(KafkaError) as caught:
        producer.flush()
    assert caught.value.code == "MSG_SIZE_TOO_LARGE"
    assert "3 x MSG_SIZE_TOO_LARGE" in str(caught.value)
    assert caught.value.counts == {"MSG_SIZE_TOO_LARGE": 3}
    assert repr(no_room) in str(caught.value)
    producer.flush()
    producer.close()


def test_failures_are_logged(kafka_bootstrap_servers, no_room, caplog):
    with (
        caplog.at_level(logging.ERROR, "dataforge_kafka_dagster"),
        create_kafka_producer({"bootstrap_servers": kafka_bootstrap_servers, "compression_type": "none"}) as producer,
        pytest.raises(KafkaError),
    ):
        producer.send_sync(no_room, LARGE)
    assert [r for r in caplog.records if no_room in r.getMessage() and "MSG_SIZE_TOO_LARGE" in r.getMessage()]


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.parametrize(("topic", "said"), [(None, ""), ("no-such-topic", "The process ends, and 2 records are lost")])
def test_what_nobody_flushes_is_delivered_at_the_end_of_the_process_or_told(
    topic, said, kafka_bootstrap_servers, kafka_topic, read
):
    there = topic or kafka_topic()
    script = f"""
from dataforge_kafka_dagster import create_kafka_producer
producer = create_kafka_producer({{"bootstrap_servers": "{kafka_bootstrap_servers}", "linger_ms": 4000}})
for i in range(2):
    producer.send_async("{there}", str(i))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0
    assert said in ended.stderr
    assert bool(said) == bool(ended.stderr)
    if topic is None:
        assert [record.value for record in read(there)] == [b"0", b"1"]


@pytest.mark.kafka
def test_a_callback_that_raises_breaks_nothing(producer, kafka_topic, read, caplog):
    topic = kafka_topic()

    def callback(err, msg):
        raise ZeroDivisionError("in the callback")

    with caplog.at_level(logging.ERROR, "dataforge_kafka_dagster"):
        futures = [producer.send_async(topic, str(i), callback=callback) for i in range(3)]
        assert [future.result(10).offset for future in futures] == [0, 1, 2]
        producer.flush()
    assert len([r for r in caplog.records if r.exc_info and "in the callback" in str(r.exc_info[1])]) == 3
    assert producer.send_sync(topic, "after").offset == 3
    assert len(read(topic)) == 4


def test_a_cancelled_future_breaks_nothing(config, kafka_topic, read):
    topic = kafka_topic()
    calls = []
    with DataForgeKafkaProducer(config.model_copy(update={"linger_ms": 300})) as producer:
        future = producer.send_async(topic, "a", callback=lambda err, msg: calls.append(err))
        future.cancel()
        producer.flush()
        assert producer.send_sync(topic, "b").offset == 1
    assert calls == [None]
    assert _values(read(topic)) == [b"a", b"b"]


def test_too_large_for_the_client_fails_at_once(producer, kafka_topic, read):
    topic = kafka_topic()
    with pytest.raises(KafkaError) as caught:
        producer.send_sync(topic, "x" * 2_000_000)
    assert caught.value.code == "MSG_SIZE_TOO_LARGE"
    assert "message.max.bytes" in caught.value.fix
    assert repr(topic) in str(caught.value)
    assert read(topic) == []


def test_an_unknown_topic_fails_within_seconds_and_says_so(producer):
    topic = f"never-{uuid.uuid4().hex}"
    began = time.monotonic()
    with pytest.raises(KafkaError) as caught:
        producer.send_sync(topic, "x")
    assert time.monotonic() - began < 10
    assert caught.value.code in {"UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC"}
    assert repr(topic) in str(caught.value)
    assert "Create the topic" in caught.value.fix


def test_an_unknown_kafka_partition_fails(producer, kafka_topic):
    topic = kafka_topic()
    producer.send_sync(topic, "x")
    with pytest.raises(KafkaError) as caught:
        producer.send_sync(topic, "x", partition=5)
    assert caught.value.code == "_UNKNOWN_PARTITION"
    assert repr(topic) in str(caught.value)


def test_nothing_is_sent_of_what_cannot_be_encoded(producer, kafka_topic, read):
    topic = kafka_topic()
    for arguments in ({"value": {1, 2}}, {"value": {"a": float("nan")}}, {"value": "x", "headers": {"a": 1}}):
        with pytest.raises(InvalidRecordError):
            producer.send_sync(topic, **arguments)
        with pytest.raises(InvalidRecordError):
            producer.send_async(topic, **arguments)
    assert read(topic) == []


def _poll_threads():
    return [thread for thread in threading.enumerate() if "kafka" in thread.name]


def test_close_is_idempotent_and_leaves_no_thread(config, kafka_topic, eventually):
    topic = kafka_topic()
    before = len(_poll_threads())
    producer = DataForgeKafkaProducer(config)
    producer.send_async(topic, "x")
    assert len(_poll_threads()) == before + 1
    producer.close()
    producer.close()
    eventually(lambda: len(_poll_threads()) == before)
    for send in (producer.send_sync, producer.send_async):
        with pytest.raises(KafkaError) as caught:
            send(topic, "after")
        assert "closed" in caught.value.cause
        assert caught.value.code == "_STATE"


def test_flush_after_close_does_not_crash(config):
    producer = DataForgeKafkaProducer(config)
    producer.close()
    try:
        producer.flush()
    except KafkaError as error:
        assert "closed" in error.cause  # noqa: PT017


def test_an_error_in_the_block_comes_through_and_closes(config, kafka_topic, read):
    topic = kafka_topic()
    with pytest.raises(ZeroDivisionError), DataForgeKafkaProducer(config) as producer:
        producer.send_async(topic, "sent before")
        raise ZeroDivisionError
    with pytest.raises(KafkaError, match="closed"):
        producer.send_sync(topic, "x")
    assert _values(read(topic)) == [b"sent before"]


def test_sends_of_many_threads(producer, kafka_topic, read):
    topic = kafka_topic(partitions=2)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda i: producer.send_sync(topic, str(i)), range(200)))
    assert len({(metadata.partition, metadata.offset) for metadata in told}) == 200
    assert sorted(_values(read(topic))) == sorted(str(i).encode() for i in range(200))


def test_a_full_buffer_is_backpressure_not_an_error(kafka_bootstrap_servers, kafka_topic, read):
    topic = kafka_topic()
    options = {"bootstrap_servers": kafka_bootstrap_servers, "buffer_memory": 65536, "compression_type": "none"}
    with create_kafka_producer(options) as producer:
        futures = [producer.send_async(topic, "x" * 10_000) for _ in range(200)]
        producer.flush()
        assert {future.result(10).offset for future in futures} == set(range(200))
    assert len(read(topic)) == 200


@pytest.mark.parametrize("seconds", [1.0, 2.5])
def test_no_broker_is_told_within_the_connect_timeout(closed_port, seconds, caplog, in_time):
    def connect():
        with caplog.at_level(logging.ERROR, "dataforge_kafka_dagster"), pytest.raises(NoBrokersAvailable) as caught:
            create_kafka_producer({"bootstrap_servers": closed_port, "connect_timeout": seconds})
        return caught

    caught = in_time(seconds + 2, connect)
    assert closed_port in str(caught.value)
    assert "bootstrap_servers" in caught.value.fix
    assert caught.value.code in {"_TRANSPORT", "_ALL_BROKERS_DOWN", "_TIMED_OUT"}
    assert [record for record in caplog.records if closed_port in record.getMessage()]


def test_an_unknown_host_is_the_cause_that_is_told(in_time):
    def connect():
        with pytest.raises(NoBrokersAvailable) as caught:
            create_kafka_producer({"bootstrap_servers": "no-such-host.invalid:9092", "connect_timeout": 2})
        return caught

    caught = in_time(4, connect)
    assert caught.value.code == "_RESOLVE"
    assert "host names" in caught.value.fix


def test_a_setting_that_librdkafka_refuses_is_named(kafka_bootstrap_servers):
    options = {"bootstrap_servers": kafka_bootstrap_servers, "librdkafka_config": {"no.such.setting": "1"}}
    with pytest.raises(KafkaError, match=r"no\.such\.setting"):
        create_kafka_producer(options)


def test_send_sync_in_a_delivery_callback_is_refused_at_once(producer, kafka_topic, read):
    topic, caught = kafka_topic(), concurrent.futures.Future()

    def callback(_err, _msg):
        try:
            producer.send_sync(topic, "second")
        except KafkaError as error:
            caught.set_result(error)

    producer.send_async(topic, "first", callback=callback)
    assert "delivery callback" in str(caught.result(30))
    assert [record.value for record in read(topic)] == [b"first"]


@pytest.mark.parametrize("call", ["flush", "close"])
def test_to_flush_or_close_in_a_delivery_callback_is_refused_at_once(call, config, kafka_topic, read):
    """Whichever thread it is called in: that of the producer, or the one that flushes."""
    topic, caught = kafka_topic(), concurrent.futures.Future()

    def callback(_err, _msg):
        try:
            getattr(producer, call)()
        except KafkaError as error:
            caught.set_result(error)

    with DataForgeKafkaProducer(config) as producer:
        producer.send_async(topic, "first", callback=callback)
        assert "delivery callback" in str(caught.result(30))
        producer.send_async(topic, "second")
    assert [record.value for record in read(topic)] == [b"first", b"second"]


def test_close_does_not_wait_for_what_other_threads_go_on_sending(config, kafka_topic, read):
    topic, sent, refused = kafka_topic(), [], []
    producer = DataForgeKafkaProducer(config)

    def send():
        try:
            while True:
                sent.append(producer.send_async(topic, "x"))
        except KafkaError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=send, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    producer.close()
    for thread in threads:
        thread.join(10)
    assert len(refused) == 2
    assert all("the producer is closed" in error for error in refused)
    assert len(read(topic)) == len(sent) > 0


@pytest.fixture
def unconnected(closed_port, monkeypatch):
    """Makes producers for an address where nothing listens."""
    monkeypatch.setattr(Connection, "answer", lambda *_: None)
    return lambda **options: create_kafka_producer({"bootstrap_servers": closed_port, **options})


def test_a_time_out_without_a_connection_is_not_told_as_a_topic_made_anew(unconnected):
    with unconnected(delivery_timeout=1, linger_ms=0) as producer, pytest.raises(KafkaTimeoutError) as caught:
        producer.send_sync("t", "x")
    assert "the last connection error" in caught.value.cause
    assert "made anew" not in caught.value.cause
    assert "new producer" not in caught.value.fix


def test_what_send_sync_has_waited_for_room_counts(unconnected, monkeypatch):
    clock, waits = Clock(), []

    def send(*_):
        clock.sleep(8)
        return concurrent.futures.Future()

    with unconnected(delivery_timeout=10) as producer, monkeypatch.context() as patched:
        patched.setattr(producer_module, "time", clock)
        patched.setattr(producer._served, "send", send)
        patched.setattr("concurrent.futures.wait", lambda _, seconds: waits.append(seconds))
        with pytest.raises(KafkaTimeoutError, match=r"topic 't': not done in 10\.0 s"):
            producer.send_sync("t", "x")
    assert waits == [2 + producer_module._ON_THE_WAY]


def test_a_fatal_error_that_no_new_try_helps_says_that_the_producer_has_ended(unconnected):
    producer = unconnected()
    fatal = confluent_kafka.KafkaError(confluent_kafka.KafkaError.CLUSTER_AUTHORIZATION_FAILED, fatal=True)
    producer._served._connection.fatal = fatal
    error = producer._served._explain(fatal, types.SimpleNamespace(topic="t", partition=-1))
    assert "Grant this user the WRITE ACL on the topic" in str(error)
    assert str(error).endswith(", then make a new producer")


def _send_until_refused(producer, sent, refused, queued):
    try:
        while True:
            sent.append(producer.send_async("t", "x" * 10_000))
            queued.release()
    except KafkaError as error:
        refused.append(error.code)


def test_close_lets_in_nobody_who_waits_for_room(unconnected):
    for _ in range(3):  # of which most took delivery_timeout
        producer = unconnected(delivery_timeout=60, buffer_memory=65536)
        sent, refused, queued = [], [], threading.Semaphore(0)
        arguments = (producer, sent, refused, queued)
        threads = [threading.Thread(target=_send_until_refused, args=arguments, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        while queued.acquire(timeout=0.5):
            pass
        began = time.monotonic()
        with pytest.raises(KafkaTimeoutError):
            producer.close(0.2)
        assert time.monotonic() - began < 20
        for thread in threads:
            thread.join(30)
        assert refused == ["_STATE"] * 4
        assert [future.exception(30).code for future in sent] == ["_PURGE_QUEUE"] * len(sent)


def test_a_callback_that_sends_again_on_failure_does_not_hold_close_up(unconnected, caplog):
    told = []

    def again(err, _msg):
        told.append(err.name())
        producer.send_async("t", "again", callback=again)

    producer = unconnected(delivery_timeout=60)
    producer.send_async("t", "first", callback=again)
    began = time.monotonic()
    with pytest.raises(KafkaTimeoutError):
        producer.close(0.2)
    assert time.monotonic() - began < 20
    assert told == ["_PURGE_QUEUE"]
    assert "the producer is closed" in caplog.text


RESEND = """
import faulthandler
faulthandler.enable()
from dataforge_kafka_dagster import KafkaProducerConfig, DataForgeKafkaProducer, KafkaTimeoutError
from dataforge_kafka_dagster.kafka.connection import Connection

Connection.answer = lambda *_: None
refused = []


def again(err, msg):
    try:
        producer.send_async("t", msg.value(), callback=again)
    except KafkaTimeoutError as error:
        refused.append(str(error))


config = KafkaProducerConfig(bootstrap_servers=BROKER, buffer_memory=65536, delivery_timeout=1, linger_ms=0)
producer = DataForgeKafkaProducer(config)
try:
    for i in range(30):
        producer.send_async("t", "x" * 10_000, callback=again)
except KafkaTimeoutError:
    pass
try:
    producer.close(1)
except KafkaTimeoutError:
    pass
print(refused[0])
"""


def test_a_callback_that_sends_into_a_full_buffer_is_told_so(closed_port):
    """A poll in its midst aborts the process, which is why this has one of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"BROKER = {closed_port!r}\n{RESEND}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "topic 't', buffer_memory: the buffer is full, and stays so" in done.stdout


def test_close_does_not_wait_for_a_callback_that_does_not_return(unconnected, eventually):
    entered, go, told = threading.Event(), threading.Event(), []

    def stay(_err, _msg):
        entered.set()
        go.wait(60)
        told.append(1)

    producer = unconnected(delivery_timeout=0.5, linger_ms=0)
    futures = [producer.send_async("t", "x", callback=stay) for _ in range(3)]
    assert entered.wait(10)
    began = time.monotonic()
    try:
        with pytest.raises(KafkaTimeoutError):
            producer.close(0.2)
        assert time.monotonic() - began < 20
    finally:
        go.set()
    eventually(lambda: len(told) == 3)
    assert all(future.done() for future in futures)


def test_flush_keeps_the_remedy_of_the_first_failure(unconnected, monkeypatch):
    away = KafkaError("token server", "away", "Check it", code="_AUTHENTICATION", remedy=Remedy.RETRY)
    producer = unconnected(delivery_timeout=0.5, linger_ms=0)
    monkeypatch.setattr(producer._served._connection, "cause", lambda *_: away)
    producer.send_async("t", "x")
    with pytest.raises(KafkaError) as caught:
        producer.flush()
    assert (caught.value.code, caught.value.remedy) == ("_AUTHENTICATION", Remedy.RETRY)
    producer.close()


class _Drained:
    """A client that has given all its reports, as after a fatal error."""

    def __init__(self, client):
        self._client = client

    def __len__(self):
        return 0

    def __getattr__(self, name):
        return getattr(self._client, name)


def test_flush_waits_for_a_report_that_another_thread_has_taken_and_not_counted_yet(unconnected, monkeypatch):
    producer, taken, cause = unconnected(delivery_timeout=60, linger_ms=0), threading.Event(), Connection.cause

    def slow(self, *args):
        taken.set()
        time.sleep(0.5)
        return cause(self, *args)

    producer.send_async("t", "x")
    served = producer._served
    (report,) = served._untold
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "cause", slow)
        patch.setattr(served, "_producer", _Drained(served._producer))
        error = confluent_kafka.KafkaError(confluent_kafka.KafkaError._FATAL)
        thread = threading.Thread(target=report, args=(error, None))
        thread.start()
        assert taken.wait(10)
        with pytest.raises(KafkaError, match="1 records were not delivered"):
            producer.flush()
        thread.join(10)
    with pytest.raises(KafkaTimeoutError):
        producer.close(0.1)


def test_a_callback_may_send_until_the_end_of_close(config, kafka_topic, read):
    topic = kafka_topic()

    def again(_err, msg):
        if msg.value() != b"3":
            producer.send_async(topic, str(int(msg.value()) + 1), callback=again)

    with DataForgeKafkaProducer(config) as producer:
        producer.send_async(topic, "0", callback=again)
    assert [record.value for record in read(topic)] == [b"0", b"1", b"2", b"3"]


def test_a_callback_that_ends_its_thread_ends_no_other_callback(producer, kafka_topic, read, caplog):
    topic = kafka_topic()

    def leave(_err, _msg):
        raise SystemExit

    producer.send_async(topic, "first", callback=leave).result(30)
    assert producer.send_async(topic, "second").result(30).offset == 1
    assert "The delivery callback of a record" in caplog.text
    assert len(read(topic)) == 2


def _run_program(program, *arguments, interrupt_after=None):
    """A program's exit code, and what it printed; interrupted by Ctrl-C a while after it has printed a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    with process:
        try:
            if interrupt_after is not None:
                assert process.stdout.readline()
                time.sleep(interrupt_after)
                process.send_signal(signal.SIGINT)
            return process.wait(60), process.stdout.read()
        finally:
            process.kill()


SYNC_FOR_EVER = """
import signal, sys
from dataforge_kafka_dagster import DataForgeKafkaProducer, KafkaProducerConfig
# A shell starts what runs in the background with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
producer = DataForgeKafkaProducer(KafkaProducerConfig(bootstrap_servers=sys.argv[1]))
print("connected", flush=True)
while True:
    producer.send_sync(sys.argv[2], "x")
"""


def test_ctrl_c_ends_a_loop_of_send_sync(kafka_bootstrap_servers, kafka_topic):
    code, _ = _run_program(SYNC_FOR_EVER, kafka_bootstrap_servers, kafka_topic(), interrupt_after=0.5)
    assert code == -signal.SIGINT


FORKS = """
import os, sys, time
from dataforge_kafka_dagster import DataForgeKafkaProducer, KafkaError, KafkaProducerConfig
config = KafkaProducerConfig(bootstrap_servers=sys.argv[1])
with DataForgeKafkaProducer(config) as producer:
    producer.send_sync(sys.argv[2], "first")  # connects
    producer.send_async(sys.argv[2], "parent")
    child = os.fork()
    if child == 0:
        for send in (producer.send_sync, producer.send_async):
            try:
                send(sys.argv[2], "child")
            except KafkaError as error:
                print(error.cause, flush=True)
        producer.flush()
if child == 0:
    with DataForgeKafkaProducer(config) as own:
        own.send_sync(sys.argv[2], "own")
    sys.exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_is_refused_its_parents_producer_and_ends_well(kafka_bootstrap_servers, kafka_topic, read):
    topic = kafka_topic()
    code, said = _run_program(FORKS, kafka_bootstrap_servers, topic)
    assert code == 0
    assert said.count("was forked") == 2
    assert said.splitlines()[-1] == "5"
    assert sorted(record.value for record in read(topic)) == [b"first", b"own", b"parent"]


INTERRUPTED = """
import logging, signal, sys, time
from dataforge_kafka_dagster import DataForgeKafkaProducer, KafkaProducerConfig

logging.disable()  # a handler of log lines may be interrupted, too
servers, topic, way = sys.argv[1:]

class Late(Exception): ...

def ring(*_):
    raise Late

signal.signal(signal.SIGALRM, ring)
futures, hit, worst = [], 0, 0.0
for after in range(1, 21):
    producer = DataForgeKafkaProducer(KafkaProducerConfig(bootstrap_servers=servers, linger_ms=1))
    try:
        signal.setitimer(signal.ITIMER_REAL, after / 1000)
        while True:
            if way == "send_sync":
                producer.send_sync(topic, "x")
            else:
                futures += [producer.send_async(topic, "x") for _ in range(5000)]
                producer.flush()
    except Late:
        hit += 1
    began = time.monotonic()
    producer.close()
    worst = max(worst, time.monotonic() - began)
print(hit, sum(not future.done() for future in futures), worst)
"""


@pytest.mark.parametrize("way", ["send_sync", "flush"])
def test_a_signal_in_a_wait_loses_no_report(way, kafka_bootstrap_servers, kafka_topic):
    """One that came to the waiting thread was lost: its future stayed, and close waited for it until delivery_timeout."""
    code, said = _run_program(INTERRUPTED, kafka_bootstrap_servers, kafka_topic(), way)
    hit, undone, worst = said.split()
    assert (code, hit, undone) == (0, "20", "0")
    assert float(worst) < 15


SENDS_IN_HANDLER = """
import signal, sys, time
from dataforge_kafka_dagster import DataForgeKafkaProducer, KafkaError, KafkaProducerConfig

servers, topic, way = sys.argv[1:]
producer = DataForgeKafkaProducer(KafkaProducerConfig(bootstrap_servers=servers))
took = []

def stop(*_):
    began = time.monotonic()
    producer.send_sync(topic, "last")
    producer.close()
    took.append(time.monotonic() - began)

signal.signal(signal.SIGALRM, stop)
signal.setitimer(signal.ITIMER_REAL, 0.05)
try:
    while True:
        getattr(producer, way)(topic, "x")
except KafkaError as error:
    print(error.cause, max(took) < 15)
"""


@pytest.mark.parametrize("way", ["send_sync", "send_async"])
def test_a_signal_handler_may_send_and_close_in_the_midst_of_a_send(way, kafka_bootstrap_servers, kafka_topic, read):
    topic = kafka_topic()
    said = _run_program(SENDS_IN_HANDLER, kafka_bootstrap_servers, topic, way)
    assert said == (0, "the producer is closed True\n")
    assert read(topic)[-1].value == b"last"


def test_send_sync_of_many_threads_does_not_wait_for_each_other(config, kafka_topic):
    topic, medians = kafka_topic(), []

    def send(_):
        began = time.monotonic()
        producer.send_sync(topic, "x")
        return time.monotonic() - began

    with DataForgeKafkaProducer(config) as producer:
        producer.send_sync(topic, "connects")
        # A record takes the linger of 5 ms; who waited for another thread's turn waited up to 250. A busy machine takes
        # some more, and not always.
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            while len(medians) < 5 and min(medians, default=1) >= 0.04:
                medians.append(sorted(pool.map(send, range(200)))[100])
    assert min(medians) < 0.04


def test_a_delivered_record_leaves_nothing_behind(config, kafka_topic):
    topic = kafka_topic()
    with DataForgeKafkaProducer(config) as producer:
        producer.send_sync(topic, "connects")
        gc.collect()
        gc.disable()
        try:
            future = weakref.ref(producer.send_async(topic, "x", callback=lambda *_: None))
            producer.flush()
            assert future() is None
        finally:
            gc.enable()


def test_a_producer_that_nobody_has_any_more_delivers_and_ends(config, kafka_topic, read, eventually):
    topic = kafka_topic()
    before = set(threading.enumerate())
    producer = DataForgeKafkaProducer(config)
    producer.send_async(topic, "forsaken")
    del producer
    eventually(lambda: set(threading.enumerate()) <= before)
    assert [record.value for record in read(topic)] == [b"forsaken"]


def test_of_a_flood_of_failures_the_first_are_logged_and_then_how_many(config, no_room, caplog):
    with DataForgeKafkaProducer(config) as producer:
        futures = [producer.send_async(no_room, os.urandom(2000), callback=lambda *_: None) for _ in range(200)]
        producer.flush()
        assert all(isinstance(future.exception(0), KafkaError) for future in futures)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    single = [line for line in lines if "MSG_SIZE_TOO_LARGE" in line]
    more = [int(line.split()[0]) for line in lines if "more records were not delivered" in line]
    assert 10 <= len(single) < 100
    assert len(single) + sum(more) == 200


async def _async_callback(_err, _msg): ...


class _AsyncCallback:
    async def __call__(self, _err, _msg): ...


@pytest.mark.parametrize("callback", ["print", _async_callback, _AsyncCallback()])
def test_what_cannot_be_called_back_is_refused_before_anything_is_sent(callback, producer, kafka_topic, read):
    topic = kafka_topic()
    with pytest.raises(KafkaError, match="callback="):
        producer.send_async(topic, "x", callback=callback)
    assert read(topic) == []


@pytest.mark.parametrize("timeout", [-1, "5", float("nan"), True])
def test_no_number_of_seconds_is_refused_and_closes_nothing(timeout, producer, kafka_topic):
    for call in (producer.flush, producer.close):
        with pytest.raises(KafkaError, match=r"timeout=.*it is no number of seconds"):
            call(timeout)
    assert producer.send_sync(kafka_topic(), "x")


def test_a_record_larger_than_the_buffer_is_refused_at_once(config, kafka_topic):
    topic = kafka_topic()
    with DataForgeKafkaProducer(config.model_copy(update={"buffer_memory": 100_000})) as producer:
        began = time.monotonic()
        with pytest.raises(KafkaError, match="has 200000 bytes, and buffer_memory is"):
            producer.send_sync(topic, b"x" * 200_000)
        assert time.monotonic() - began < 5
        assert producer.send_sync(topic, b"x")


def test_a_timestamp_in_seconds_is_warned_of_once(config, kafka_topic, caplog):
    topic = kafka_topic(config={"retention.ms": "-1"})
    with DataForgeKafkaProducer(config) as producer:
        for _ in range(2):
            producer.send_async(topic, "x", timestamp=1_700_000_000)
    assert caplog.text.count("timestamp=1700000000 of a record") == 1


def test_a_future_whose_waiter_ends_the_thread_does_not_keep_the_callback_away(producer, kafka_topic, caplog):
    told = threading.Event()
    future = producer.send_async(kafka_topic(), "x", callback=lambda *_: told.set())
    future.add_done_callback(lambda _: sys.exit())
    assert told.wait(10)
    assert "What waits for the future" in caplog.text


def test_raw_acks_of_none_count_as_such(kafka_bootstrap_servers, kafka_topic):
    raw = {"acks": "0", "enable.idempotence": "false"}
    with create_kafka_producer({"bootstrap_servers": kafka_bootstrap_servers, "librdkafka_config": raw}) as producer:
        assert producer.send_sync(kafka_topic(), "x").offset == -1


def test_a_deleted_topic_is_not_told_as_a_wrong_kafka_partition(kafka_bootstrap_servers, new_topic):
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
    admin.create_topics([NewTopic(new_topic, 1)], operation_timeout=30)[new_topic].result(30)
    raw = {"topic.metadata.refresh.interval.ms": 300}
    config = KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers, librdkafka_config=raw, delivery_timeout=15)
    with DataForgeKafkaProducer(config) as producer:
        producer.send_sync(new_topic, "x")
        admin.delete_topics([new_topic], operation_timeout=30)[new_topic].result(30)
        with pytest.raises(KafkaError) as caught:
            producer.send_sync(new_topic, "x")
    assert "let the key decide" not in caught.value.fix
    # Or by librdkafka's _DESTROY, of what it had for the Kafka partition.
    assert caught.value.code in {"_UNKNOWN_PARTITION", "_UNKNOWN_TOPIC", "UNKNOWN_TOPIC_OR_PART", "_DESTROY"}


def test_events_of_a_connection_that_is_lost_are_no_records(unconnected, eventually):
    producer = unconnected(linger_ms=0, delivery_timeout=0.5)
    time.sleep(0.5)  # for a bootstrap server that refuses
    producer.flush(0)
    assert isinstance(producer.send_async("t", "x", callback=lambda *_: None).exception(10), KafkaError)
    for _ in range(3):
        time.sleep(0.3)
        producer.flush(0.2)
    producer.close(0.2)


def _refuse_to_log(_):
    raise RuntimeError("the handler is broken")


def test_a_log_that_raises_keeps_no_failure_back(config, no_room, monkeypatch):
    told = []
    with DataForgeKafkaProducer(config) as producer:
        monkeypatch.setattr(logger, "filter", _refuse_to_log)
        future = producer.send_async(no_room, os.urandom(2000), callback=lambda err, _: told.append(err.name()))
        assert future.exception(10).code == "MSG_SIZE_TOO_LARGE"
        producer.flush(10)
    assert told == ["MSG_SIZE_TOO_LARGE"]


def test_a_thread_that_does_not_start_is_told_and_tried_again(producer, kafka_topic, monkeypatch, read):
    topic = kafka_topic()

    def start(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(KafkaError, match="thread does not start: can't start new thread"):
            producer.send_async(topic, "refused")
    assert producer.send_sync(topic, "taken").offset == 0
    assert [record.value for record in read(topic)] == [b"taken"]


def test_a_flood_of_failures_is_counted_also_where_nobody_flushes(config, no_room, caplog, eventually):
    with DataForgeKafkaProducer(config) as producer:
        for _ in range(100):
            producer.send_async(no_room, os.urandom(2000), callback=lambda *_: None)
        eventually(lambda: "more records were not delivered" in caplog.text)


def test_the_client_of_a_producer_that_has_sent_nothing_is_closed_once(config, monkeypatch):
    producer = DataForgeKafkaProducer(config)
    closed = []
    monkeypatch.setattr(producer._served, "_close", lambda: closed.append(1))
    producer._served.end()
    producer._served.end()
    assert closed == [1]


LEAVES = """
import logging, sys, time
from dataforge_kafka_dagster import create_kafka_producer
from dataforge_kafka_dagster.kafka import producer as producer_module
from dataforge_kafka_dagster.kafka.connection import Connection, logger

Connection.answer = lambda *_: None
told = []

def slow(err, _):
    told.append(err.name())
    print(err.name(), flush=True)
    time.sleep(0.5)

def broken(_):
    raise RuntimeError("the handler is broken")

if sys.argv[2] == "broken":
    logger.filter = broken
producers = [create_kafka_producer({"bootstrap_servers": sys.argv[1]}) for _ in range(2)]
for producer in producers:
    for _ in range(int(sys.argv[3])):
        producer.send_async("t", "x", callback=slow)
"""


def test_the_end_of_a_process_does_not_wait_for_each_slow_callback(closed_port):
    began = time.monotonic()
    code, said = _run_program(LEAVES, closed_port, "whole", "200")
    assert time.monotonic() - began < 45
    assert code == 0
    assert said.startswith("_PURGE_QUEUE")


def test_a_log_that_raises_keeps_no_failure_back_at_the_end_of_the_process_either(closed_port):
    code, said = _run_program(LEAVES, closed_port, "broken", "1")
    assert (code, said.split()) == (0, ["_PURGE_QUEUE"] * 2)
