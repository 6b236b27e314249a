"""Bad records: they end the publication, or go to a dead-letter topic in the same transaction."""

import dataclasses
import json
import uuid

import dagster as dg
import pandas as pd
import polars as pl
import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from pydantic import ValidationError

from dataforge_kafka_dagster import KafkaError, KafkaIOManager, KafkaProducerConfig, KafkaProducerResource, KafkaRecord
from dataforge_kafka_dagster.kafka.config import KafkaTopicSpec, PublicationConfig
from dataforge_kafka_dagster.kafka.dead_letters import dead_letter
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaConfigError
from dataforge_kafka_dagster.kafka.ledger import Publication
from dataforge_kafka_dagster.kafka.publication import PublicationWriter


class _Rude:
    def __repr__(self):
        raise RuntimeError("no")


@dataclasses.dataclass
class _Point:
    x: object


VALUES = [
    (b"\x00\xff", b"\x00\xff"),
    (bytearray(b"ab"), b"ab"),
    ("flüge", "flüge".encode()),
    ("\ud800", b"\\ud800"),
    ({"a": {1}}, b"{'a': {1}}"),
    (5, b"5"),
    (_Point(1j), b"_Point(x=1j)"),
    (_Rude(), b"<_Rude, whose repr raised RuntimeError>"),
    (KafkaRecord({"a": {1}}), b"{'a': {1}}"),
    (KafkaRecord(None), None),
]


@pytest.mark.parametrize(("bad", "value"), VALUES, ids=[str(i) for i in range(len(VALUES))])
def test_a_dead_letter_is_the_bytes_or_the_repr(bad, value):
    letter = dead_letter(bad, InvalidRecordError("record 7", "it is bad", "Mend it", index=7), "t", 100)
    assert (letter["value"], letter["key"]) == (value, None)
    assert dict(letter["headers"]) == {
        "dead-letter.error": b"record 7: it is bad. Mend it",
        "dead-letter.code": b"InvalidRecordError",
        "dead-letter.index": b"7",
        "dead-letter.topic": b"t",
    }


def test_a_long_dead_letter_is_cut_and_says_so():
    error = KafkaError("record 0", "x" * 10_000, "Split it", code="MSG_SIZE_TOO_LARGE")
    letter = dead_letter(KafkaRecord("v" * 1000, "k" * 1000), error, "t", 100)
    assert (letter["value"], letter["key"]) == (b"v" * 100, b"k" * 100)
    headers = dict(letter["headers"])
    assert headers["dead-letter.length"] == b"1000"
    assert headers["dead-letter.code"] == b"MSG_SIZE_TOO_LARGE"
    assert len(headers["dead-letter.error"]) == 50
    assert len(dict(dead_letter("v", error, "t", 100_000)["headers"])["dead-letter.error"]) == 2000


@pytest.mark.parametrize("name", ["", "a b", "{asset}", "x" * 250, "{topic"])
def test_a_dead_letter_topic_that_kafka_refuses_is_refused_at_definition(name):
    with pytest.raises(ValidationError, match="on_bad_record"):
        KafkaProducerResource(on_bad_record=name)


def test_the_publications_own_topic_is_no_dead_letter_topic():
    for name in ("t", "{topic}"):
        with pytest.raises(KafkaConfigError, match="own topic"):
            PublicationWriter(
                PublicationConfig(), transactional_id="a", publication_id="b", topic="t", on_bad_record=name
            )


@pytest.fixture
def topics(kafka_topic):
    """A topic with two Kafka partitions, and its dead-letter topic."""
    topic = kafka_topic(partitions=2)
    return topic, kafka_topic(name=f"{topic}.dead")


@pytest.fixture
def writer(kafka_bootstrap_servers, topics):
    """Makes a writer with a dead-letter topic; the same name is another attempt at the same publication."""

    def make(name=None, *, raw=None, **options):
        producer = KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers, librdkafka_config=raw or {})
        name = name or uuid.uuid4().hex
        options = {"on_bad_record": topics[1]} | options
        return PublicationWriter(
            PublicationConfig(producer=producer),
            transactional_id=f"dead-{name}",
            publication_id=name,
            topic=topics[0],
            **options,
        )

    return make


def test_a_compacted_dead_letter_topic_is_refused(writer, kafka_topic, topics, read):
    compacted = kafka_topic(config={"cleanup.policy": "compact"})
    with pytest.raises(KafkaConfigError, match="it is compacted"), writer(on_bad_record=compacted) as publication:
        publication.send({"a": 1})
    assert read(topics[0]) == []


def test_the_dead_letter_topic_of_a_compacted_topic_is_not_made_compacted(writer, new_topic, read):
    spec = KafkaTopicSpec(configs={"cleanup.policy": "compact", "retention.ms": "100000000"})
    with writer(on_bad_record=new_topic, create_topic=spec) as publication:
        publication.send({1})
    assert len(read(new_topic)) == 1


def test_a_dead_letter_topic_that_is_there_may_have_fewer_kafka_partitions(writer, topics, read):
    with writer(create_topic=KafkaTopicSpec(partitions=2)) as publication:
        publication.send({1})
    assert len(read(topics[1])) == 1


def _letters(found):
    """What a reader finds in the dead-letter topic: (index, code, value), by index."""
    letters = []
    for record in found:
        headers = dict(record.headers)
        assert headers["dead-letter.error"]
        letters.append((int(headers["dead-letter.index"]), headers["dead-letter.code"].decode(), record.value))
    return sorted(letters)


BAD = InvalidRecordError.__name__
OUTPUTS = {
    "list": (lambda: [{"i": 0}, {"i": {1}}, {"i": 2}], None, [0, 2], [(1, BAD, b"{'i': {1}}")]),
    "bad at both ends": (
        lambda: [{"i": {0}}, {"i": 1}, {"i": {2}}],
        None,
        [1],
        [(0, BAD, b"{'i': {0}}"), (2, BAD, b"{'i': {2}}")],
    ),
    "all bad": (lambda: [{"i": {0}}, {"i": {1}}], None, [], [(0, BAD, b"{'i': {0}}"), (1, BAD, b"{'i': {1}}")]),
    "missing key": (lambda: iter([{"i": 0}, {"j": 1}, {"i": 2}]), "i", [0, 2], [(1, BAD, b"{'j': 1}")]),
    "other kinds": (
        lambda: [{"i": 0}, "text", 5, None, b"bytes"],
        None,
        [0],
        [(1, BAD, b"text"), (2, BAD, b"5"), (3, BAD, None), (4, BAD, b"bytes")],
    ),
    "not a number": (lambda: [{"i": float("nan")}, {"i": 1}], None, [1], [(0, BAD, b"{'i': nan}")]),
    "no such Kafka partition": (
        lambda: [KafkaRecord({"i": 0}, partition=1), KafkaRecord({"i": 1}, partition=2)],
        None,
        [0],
        [(1, BAD, b'{"i":1}')],
    ),
    "too large": (
        lambda: [{"i": 0}, {"i": 1, "x": "y" * 20_000}, {"i": 2}],
        None,
        [0, 2],
        [(1, "MSG_SIZE_TOO_LARGE", (b'{"i":1,"x":"' + b"y" * 20_000)[:4000])],
    ),
    "too large, with a header": (
        lambda: [KafkaRecord({"i": 0}), KafkaRecord({"i": 1, "x": "y" * 20_000}, headers={"a": "b"})],
        None,
        [0],
        [(1, "MSG_SIZE_TOO_LARGE", (b'{"i":1,"x":"' + b"y" * 20_000)[:4000])],
    ),
    "polars frame": (
        lambda: pl.DataFrame({"i": [0.0, float("inf"), 2.0]}),
        None,
        [0, 2],
        [(1, BAD, b"{'i': inf}")],
    ),
    "pandas frame": (lambda: pd.DataFrame({"i": [0, {1}, 2]}), None, [0, 2], [(1, BAD, b"{'i': {1}}")]),
    "among thousands": (
        lambda: ({"i": {i} if i % 1000 == 999 else i} for i in range(3000)),
        None,
        [i for i in range(3000) if i % 1000 != 999],
        [(i, BAD, f"{{'i': {{{i}}}}}".encode()) for i in (999, 1999, 2999)],
    ),
}


@pytest.mark.kafka
@pytest.mark.parametrize(("make", "key", "good", "bad"), OUTPUTS.values(), ids=OUTPUTS)
def test_bad_records_go_to_the_dead_letter_topic_and_the_others_on(
    make, key, good, bad, writer, topics, read, eventually
):
    with writer(raw={"message.max.bytes": "12000"}, key=key) as publication:
        publication.send_all(make())
    done = publication.publication
    assert (done.records, done.dead_letters, done.dead_letter_topic) == (len(good), len(bad), topics[1])
    assert sum(offsets.records for offsets in done.offsets) == len(good)
    assert {offsets.topic for offsets in done.offsets} <= {topics[0]}
    # A commit is told before its marker is in each Kafka partition.
    found = eventually(lambda: len(records := read(topics[0])) == len(good) and [records])[0]
    assert done.bytes == sum(len(record.value) + len(record.key or b"") for record in found)
    assert sorted(json.loads(record.value)["i"] for record in found) == good
    assert eventually(lambda: _letters(read(topics[1])) == bad)


@pytest.mark.kafka
def test_single_records_go_there_too_and_later_positions_count_them(writer, topics, read):
    with writer() as publication:
        publication.send({"i": 0})
        publication.send({"i": {1}}, key="k")
        publication.send("text")
        publication.send_all([{"i": 3}, {"i": {4}}])
    assert publication.publication.records == 2
    assert _letters(read(topics[1])) == [(1, BAD, b"{'i': {1}}"), (2, BAD, b"text"), (4, BAD, b"{'i': {4}}")]
    assert next(record.key for record in read(topics[1]) if record.value == b"{'i': {1}}") == b"k"


@pytest.mark.kafka
def test_tombstones_among_records_of_another_format_are_published(writer, topics, read):
    with writer() as publication:
        publication.send({"i": 0}, key="a")
        publication.send_all(
            [KafkaRecord("text", "b"), KafkaRecord(None, "c", headers={"h": "v"}), KafkaRecord("more", "d")]
        )
    done = publication.publication
    assert (done.records, done.tombstones, done.dead_letters, done.bytes) == (2, 1, 2, len(b'{"i":0}' + b"a" + b"c"))
    assert sorted((record.key, record.value, record.headers) for record in read(topics[0])) == [
        (b"a", b'{"i":0}', None),
        (b"c", None, [("h", b"v")]),
    ]
    assert _letters(read(topics[1])) == [(1, BAD, b"text"), (3, BAD, b"more")]


@pytest.mark.kafka
def test_dead_letters_are_in_the_transaction(writer, topics, read):
    with pytest.raises(ZeroDivisionError), writer() as publication:
        publication.send_all([{"i": 0}, {"i": {1}}])
        raise ZeroDivisionError
    assert read(topics[0]) == read(topics[1]) == []


@pytest.mark.kafka
def test_a_later_attempt_reads_their_number_from_the_ledger(writer, topics, read):
    first, second = writer("same"), writer("same")
    with first:
        first.send_all([{"i": 0}, {"i": {1}}, {"i": {2}}])
    with second:
        assert second.replayed
        second.send_all([{"i": 0}, {"i": {1}}, {"i": {2}}])
    again = second.publication
    assert (again.records, again.dead_letters, again.dead_letter_topic) == (1, 2, topics[1])
    assert again.offsets == first.publication.offsets
    assert Publication.from_dict(json.loads(json.dumps(again.to_dict()))) == again
    assert len(read(topics[1])) == 2


@pytest.mark.kafka
def test_what_is_no_bad_record_still_ends_the_publication(writer, topics, read):
    def raising():
        yield {"i": 0}
        raise ZeroDivisionError

    for make, error in [
        (raising, ZeroDivisionError),
        (lambda: {1, 2}, InvalidRecordError),
        (lambda: pl.DataFrame({"a": [1]}), InvalidRecordError),
    ]:
        with pytest.raises(error), writer(key="i") as publication:
            publication.send_all(make())
    assert read(topics[0]) == read(topics[1]) == []


LARGE = {"message.max.bytes": "10000000"}


@pytest.mark.kafka
def test_a_record_is_not_taken_for_bad_by_an_earlier_ones_error(kafka_bootstrap_servers, kafka_topic, read):
    topic, dead = kafka_topic(config={"max.message.bytes": "20000000"}), kafka_topic()
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
    producer = KafkaProducerConfig(
        bootstrap_servers=kafka_bootstrap_servers,
        buffer_memory=4 * 1024 * 1024,
        compression_type="none",
        linger_ms=0,
        librdkafka_config=LARGE,
    )
    config = PublicationConfig(producer=producer, on_bad_record=dead, delivery_guarantee="at_least_once")
    rows = [KafkaRecord(b"x" * 3_000_000, key=str(i)) for i in range(1, 9)]
    name = uuid.uuid4().hex
    writer = PublicationWriter(config, transactional_id=name, publication_id=name, topic=topic)
    with pytest.raises(KafkaError, match=r"record 1 \(key b'1'\)") as caught, writer:
        writer.send(b"first", key="0")
        writer._sender.flush()
        setting = ConfigEntry("max.message.bytes", "1000000", incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[setting])
        admin.incremental_alter_configs([resource])[resource].result(30)
        # The last is no record of the topic's: each one is looked at by itself then.
        writer.send_all([*rows, KafkaRecord(b"bad place", key="bad", partition=5)])
    assert caught.value.index == 1
    assert read(dead) == []


@pytest.mark.kafka
@pytest.mark.parametrize("size", [3_000_000, 12_000_000], ids=["than the buffer", "than any record"])
@pytest.mark.parametrize("way", ["send", "send_all"])
def test_a_record_that_is_larger_goes_to_the_dead_letter_topic(way, size, kafka_bootstrap_servers, kafka_topic, read):
    topic, dead = (kafka_topic(config={"max.message.bytes": "20000000"}) for _ in range(2))
    producer = KafkaProducerConfig(
        bootstrap_servers=kafka_bootstrap_servers,
        buffer_memory=1024 * 1024,
        compression_type="none",
        librdkafka_config=LARGE,
    )
    config = PublicationConfig(producer=producer, on_bad_record=dead)
    rows = [b"before", b"x" * size, b"after"]
    name = uuid.uuid4().hex
    with PublicationWriter(config, transactional_id=name, publication_id=name, topic=topic) as writer:
        if way == "send_all":
            writer.send_all(rows)
        else:
            for row in rows:
                writer.send(row)
    assert [record.value for record in read(topic)] == [b"before", b"after"]
    (letter,) = read(dead)
    assert letter.value == b"x" * (1024 * 1024 // 3)
    assert dict(letter.headers)["dead-letter.length"] == str(size).encode()


@pytest.mark.kafka
def test_a_missing_dead_letter_topic_is_told_before_anything_is_written(writer, topics, read):
    with pytest.raises(KafkaError) as caught, writer(on_bad_record="{topic}.missing"):
        pass
    assert f"{topics[0]}.missing" in caught.value.culprit
    assert caught.value.code == "UNKNOWN_TOPIC_OR_PART"


@pytest.mark.kafka
@pytest.mark.parametrize("where", ["resource", "metadata", "publishing"])
def test_the_materialization_says_how_many_and_where(where, kafka_bootstrap_servers, topics, read, instance):
    kafka = KafkaProducerResource(
        bootstrap_servers=kafka_bootstrap_servers, on_bad_record=topics[1] if where == "resource" else "fail"
    )
    rows = [{"i": 0}, {"i": {1}}, {"i": 2}]
    told = {"kafka/on_bad_record": topics[1]} if where == "metadata" else {}

    @dg.asset(metadata={"kafka/topic": topics[0], **told})
    def made():
        return rows

    @dg.asset
    def sent(context: dg.AssetExecutionContext, kafka: KafkaProducerResource) -> dg.MaterializeResult:
        with kafka.publishing(context, topic=topics[0], on_bad_record=topics[1]) as publication:
            publication.send_all(rows)
        return publication.materialize_result()

    resources = {"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka)}
    result = dg.materialize([sent if where == "publishing" else made], resources=resources, instance=instance)
    (event,) = result.get_asset_materialization_events()
    said = {name: value.value for name, value in event.materialization.metadata.items()}
    assert (said["dagster/row_count"], said["kafka/dead_letter_records"]) == (2, 1)
    assert said["kafka/dead_letter_topic"] == topics[1]
    assert _letters(read(topics[1])) == [(1, BAD, b"{'i': {1}}")]


@pytest.mark.kafka
def test_without_a_dead_letter_topic_the_step_fails_and_names_the_record(
    kafka_bootstrap_servers, topics, read, instance
):
    @dg.asset(metadata={"kafka/topic": topics[0]})
    def made():
        return [{"i": 0}, {"i": {1}}]

    manager = KafkaIOManager(kafka=KafkaProducerResource(bootstrap_servers=kafka_bootstrap_servers))
    result = dg.materialize([made], resources={"io_manager": manager}, instance=instance, raise_on_error=False)
    (event,) = result.get_step_failure_events()
    assert event.step_failure_data.user_failure_data.metadata["kafka/record_index"].value == 1
    assert read(topics[0]) == []


@pytest.mark.kafka
def test_an_error_that_is_caught_ends_the_publication_if_some_of_its_records_were_sent(writer, topics, read):
    with writer(on_bad_record="fail") as publication:
        with pytest.raises(KafkaError, match="record 0"):
            publication.send(b"x" * 2_000_000)
        publication.send({"of": "another format"})
    assert publication.publication.records == 1
    with pytest.raises(KafkaError, match="record 1, topic .*MSG_SIZE_TOO_LARGE"), writer(on_bad_record="fail") as again:
        with pytest.raises(KafkaError, match="record 1"):
            again.send_all([b"a", b"x" * 2_000_000, b"b"])
        again.send(b"c")
    assert len(read(topics[0])) == 1


def test_a_publication_needs_acks():
    config = PublicationConfig(producer=KafkaProducerConfig(acks=0), delivery_guarantee="at_least_once")
    with pytest.raises(KafkaConfigError, match="acks=0"):
        PublicationWriter(config, transactional_id="a", publication_id="b", topic="t")


@pytest.mark.kafka
def test_a_dead_letter_names_the_topic_that_it_was_sent_to(writer, topics, kafka_topic, read):
    other = kafka_topic()
    with writer() as session:
        session.send({"i": 0})
        session.send({"i": {1}})
        session.send({"i": {2}}, topic=other)
        session.send_all([{"i": 3}, {"i": {4}}], topic=other)
        session.send("text", topic=other)
        session.send_all([KafkaRecord({"i": 6}, partition=99)], topic=other)
    named = [dict(record.headers)["dead-letter.topic"].decode() for record in read(topics[1])]
    assert named == [topics[0], other, other, other, other]
