"""What a topic's own settings refuse: known before it is sent, by position and key; small records always fit."""

import os
import random
import string
import time
import uuid

import numpy as np
import pytest

from dataforge_kafka_dagster import KafkaError, KafkaProducerConfig, KafkaRecord
from dataforge_kafka_dagster.kafka import topics
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.deliveries import Track
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.publication import PublicationWriter
from dataforge_kafka_dagster.kafka.records import Chunk, Extra

pytestmark = pytest.mark.kafka

LIMIT = 20_000


def _noise(size):
    return np.random.default_rng(7).bytes(size)


@pytest.fixture
def publish(kafka_bootstrap_servers):
    def publish(topic, output, dead="fail", **options):
        name = uuid.uuid4().hex
        config = PublicationConfig(producer=KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers, **options))
        ids = {"transactional_id": f"limits-{name}", "publication_id": name}
        with PublicationWriter(config, **ids, topic=topic, on_bad_record=dead) as writer:
            writer.send_all(output)
        return writer.publication

    return publish


@pytest.fixture
def small(kafka_topic):
    """A topic that takes batches of no more than `LIMIT` bytes."""
    return kafka_topic(config={"max.message.bytes": str(LIMIT)})


@pytest.mark.parametrize("codec", ["none", "snappy"])
def test_batches_are_no_larger_than_the_topic_takes(codec, publish, small, read):
    rows = [_noise(100)] * 3000
    assert publish(small, rows, compression_type=codec).records == 3000
    assert len(read(small)) == 3000


@pytest.mark.parametrize("codec", ["none", "snappy"])
def test_a_record_that_the_topic_does_not_take_is_named(codec, publish, small, read):
    rows = [KafkaRecord(_noise(2 * LIMIT if i == 3 else 10), key=f"k{i}") for i in range(5)]
    with pytest.raises(KafkaError) as caught:
        publish(small, rows, compression_type=codec)
    assert (caught.value.index, caught.value.key, caught.value.code) == (3, b"k3", "MSG_SIZE_TOO_LARGE")
    assert caught.value.culprit.startswith("record 3 (key ")
    assert f"max.message.bytes is {LIMIT}" in caught.value.cause
    assert read(small) == []


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_a_record_that_the_topic_does_not_take_is_a_dead_letter(codec, publish, small, kafka_topic, read):
    rows = [_noise(2 * LIMIT if i == 1234 else 10) for i in range(2000)]
    dead = kafka_topic(config={"max.message.bytes": "9000"})
    done = publish(small, rows, dead, compression_type=codec)
    assert (done.records, done.dead_letters) == (1999, 1)
    (letter,) = read(dead)
    headers = dict(letter.headers)
    assert headers["dead-letter.index"] == b"1234"
    assert headers["dead-letter.code"] == b"MSG_SIZE_TOO_LARGE"
    assert headers["dead-letter.length"] == str(2 * LIMIT).encode()
    # A third of what its own topic takes.
    assert letter.value == _noise(2 * LIMIT)[:3000]


def test_a_large_record_that_fits_when_compressed_is_published(publish, small, kafka_topic, read):
    rows = [{"text": "x" * 5 * LIMIT}, {"text": "y"}]
    assert publish(small, rows).records == 2
    done = publish(small, rows, kafka_topic())
    assert (done.records, done.dead_letters) == (2, 0)
    assert len(read(small)) == 4


def _kinds(size):
    """Texts of many kinds, some of which zlib makes small enough for a topic and snappy and lz4 do not."""
    chance = random.Random(7)
    words = ["".join(chance.choices(string.ascii_lowercase, k=6)) for _ in range(500)]
    for alphabet in ("01", "ACGT", string.digits, string.hexdigits, string.printable):
        yield "".join(chance.choices(alphabet, k=size))
    for things in (words, words[:5], [str(i / 7) for i in range(1000)], [f'{{"id": {i}}}' for i in range(1000)]):
        yield " ".join(chance.choices(things, k=size // 5))[:size]
    yield "x" * size
    yield (f"{chance.random()}" * size)[:size]


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_no_record_that_the_broker_may_refuse_is_sent_if_there_is_a_dead_letter_topic(
    codec, publish, small, kafka_topic, read
):
    rows = [text for size in (1.1, 1.5, 2, 3, 5, 10) for text in _kinds(int(size * LIMIT))]
    dead = kafka_topic()
    done = publish(small, rows, dead, compression_type=codec)
    assert done.records + done.dead_letters == len(rows)
    assert done.records > len(rows) / 4
    assert done.dead_letters > len(rows) / 8
    assert len(read(small)) == done.records
    assert len(read(dead)) == done.dead_letters


@pytest.mark.parametrize("codec", ["none", "snappy"])
def test_a_record_at_the_limit_is_published_or_a_dead_letter(codec, publish, small, kafka_topic, read):
    rows = [KafkaRecord(_noise(LIMIT - less), key=b"k", headers={"h": "v"}) for less in range(130)]
    done = publish(small, rows, kafka_topic(), compression_type=codec)
    assert (done.records, done.dead_letters) == (27, 103)
    assert [len(record.value) for record in read(small)] == [LIMIT - less for less in range(103, 130)]


def test_batches_to_a_topic_that_comes_later_are_explained(kafka_bootstrap_servers, kafka_topic, small):
    producer = KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers, compression_type="none")
    name, config = uuid.uuid4().hex, PublicationConfig(producer=producer)
    with pytest.raises(KafkaError, match=f"lower batch_size to {LIMIT}"):  # noqa: SIM117
        with PublicationWriter(config, transactional_id=name, publication_id=name, topic=kafka_topic()) as writer:
            writer.send_all([_noise(100)] * 3000, topic=small)


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_a_record_that_was_delivered_is_never_named_for_one_that_was_refused(
    guarantee, kafka_bootstrap_servers, kafka_topic, monkeypatch
):
    """Where the topic's limit is not known, the broker refuses it, and takes what comes after it at least once."""
    monkeypatch.setattr(topics, "_settings_of", lambda *_: {})
    topic, name, bad = kafka_topic(config={"max.message.bytes": "500000"}), uuid.uuid4().hex, 1000
    producer = KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers, batch_size=300_000)
    config = PublicationConfig(producer=producer, delivery_guarantee=guarantee)
    rows = [KafkaRecord(os.urandom(800_000 if i == bad else 100), key=f"key{i}") for i in range(3000)]
    writer = PublicationWriter(config, transactional_id=name, publication_id=name, topic=topic)
    with pytest.raises(KafkaError) as caught, writer:
        writer.send_all(rows)
    error = caught.value
    assert error.key == b"key1000"
    first, last = error.among or (error.index, error.index)
    assert first <= bad <= last
    assert (error.index == bad) is (guarantee == "exactly_once")


def test_a_compacted_topic_takes_no_record_without_a_key(publish, kafka_topic, read):
    topic, dead = kafka_topic(config={"cleanup.policy": "compact"}), kafka_topic()
    for rows in ([{"a": 1}], [KafkaRecord({"a": 0}, key="a"), KafkaRecord({"a": 1})]):
        with pytest.raises(InvalidRecordError, match="compacted") as caught:
            publish(topic, rows)
        assert caught.value.index == len(rows) - 1
    done = publish(topic, rows, dead)
    assert (done.records, done.dead_letters) == (1, 1)
    assert len(read(topic)) == len(read(dead)) == 1


@pytest.mark.parametrize(("days", "which"), [(-3, "before"), (3, "after")])
def test_a_timestamp_that_the_topic_does_not_take_is_named(days, which, publish, kafka_topic, read):
    settings = {"message.timestamp.before.max.ms": "86400000", "message.timestamp.after.max.ms": "86400000"}
    topic, now = kafka_topic(config=settings), round(time.time() * 1000)
    rows = [KafkaRecord(b"good", timestamp=now), KafkaRecord(b"bad", timestamp=now + days * 86_400_000)]
    with pytest.raises(InvalidRecordError, match=rf"record 1: .*message.timestamp.{which}.max.ms=86400000") as caught:
        publish(topic, rows)
    assert caught.value.index == 1
    assert read(topic) == []
    assert publish(topic, rows, kafka_topic()).dead_letters == 1


@pytest.mark.parametrize(
    ("config", "age", "warned"),
    [
        ({"retention.ms": "60000"}, 3600, True),
        ({"retention.ms": "60000"}, 1, False),
        ({"retention.ms": "-1"}, 3600, False),
        ({"retention.ms": "60000", "cleanup.policy": "compact"}, 3600, False),
        ({"retention.ms": "60000", "message.timestamp.type": "LogAppendTime"}, 3600, False),
    ],
)
def test_records_that_are_older_than_the_topic_keeps_them_are_warned_of(
    config, age, warned, publish, kafka_topic, caplog
):
    topic, now = kafka_topic(config=config), round(time.time())
    rows = [KafkaRecord("x", key="k", timestamp=1000 * (now - back)) for back in (0, age, 0)]
    assert publish(topic, rows).records == 3
    said = [record.getMessage() for record in caplog.records if "retention.ms" in record.getMessage()]
    assert bool(said) is warned
    if warned:
        assert (
            f"deletes records 60 s after their timestamps (retention.ms), and timestamp={1000 * (now - age)}" in said[0]
        )


def test_a_topic_that_stamps_records_itself_takes_any_timestamp(publish, kafka_topic):
    topic = kafka_topic(config={"message.timestamp.type": "LogAppendTime"})
    assert publish(topic, [KafkaRecord(b"old", timestamp=5)]).records == 1


def test_a_publication_needs_no_look_at_settings(publish, small, monkeypatch, read):
    """Where they may not be seen, the broker's refusal is told."""
    monkeypatch.setattr(topics, "_settings_of", lambda *_: {})
    assert publish(small, [b"x"]).records == 1
    with pytest.raises(KafkaError, match="max.message.bytes on the topic") as caught:
        publish(small, [_noise(2 * LIMIT)])
    assert caught.value.code == "MSG_SIZE_TOO_LARGE"
    assert len(read(small)) == 1


def test_settings_that_do_not_come_are_done_without(kafka_bootstrap_servers, kafka_topic, monkeypatch):
    class Never:
        def result(self, seconds):
            time.sleep(seconds)
            raise topics.concurrent.futures.TimeoutError

    monkeypatch.setattr(topics, "_ask_for_settings", lambda *_: Never())
    monkeypatch.setattr(topics, "_SETTINGS_SECONDS", 0.1)
    connection = Connection(KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers))
    found = topics.check_topic_exists(connection, kafka_topic(), None, 30)
    assert (found.partitions, found.max_bytes) == (1, None)


@pytest.mark.parametrize(("partition", "there"), [(0, True), (2, True), (3, False)])
def test_a_kafka_partition_that_the_topic_has_not_is_refused_before_its_record_is_sent(partition, there):
    track = Track("t", topics.Topic(3, None), "none", cautious=False)
    extra = Extra(None, partition, 0)
    assert track.look_over(Chunk(["v"], ["k"], [extra], 2, "string", 0)) is not there
    if there:
        track.check(7, "v", "k", extra)
        return
    with pytest.raises(InvalidRecordError, match="record 7: topic 't' has no Kafka partition 3. Use 0 to 2") as caught:
        track.check(7, "v", "k", extra)
    assert caught.value.index == 7


def test_the_oldest_timestamp_of_all_records_is_the_one_that_is_warned_of():
    track = Track("t", topics.Topic(1, None, retention=1000), "none", cautious=False)
    for timestamps in ([5, 3], [4, 9]):
        extras = [Extra(None, -1, timestamp) for timestamp in timestamps]
        assert not track.look_over(Chunk(["v", "v"], ["k", "k"], extras, 4, "string", 0))
    assert track.oldest == 3
    assert "timestamp=3 of one of these" in track.expired
