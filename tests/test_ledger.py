"""The ledger of a publication that other writers cut into thousands of runs of offsets."""

import collections
import dataclasses
import threading
import types

import orjson
import pytest
from confluent_kafka import KafkaError as KafkaCode
from confluent_kafka import Producer
from hypothesis import given
from hypothesis import strategies as st

from dataforge_kafka_dagster import KafkaError, KafkaProducerConfig
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.ledger import (
    Ledger,
    PartitionOffsets,
    Publication,
    decode_ledger,
    encode_ledger,
    find_headers,
    ledger_key,
)
from dataforge_kafka_dagster.kafka.publication import PublicationWriter, find_published, publish
from dataforge_kafka_dagster.kafka.reader import read_publication
from dataforge_kafka_dagster.kafka.schemas import RegisteredSchema

LARGEST_METADATA = 4096
"""What a broker takes of an offset's metadata: its offset.metadata.max.bytes."""

runs = st.lists(st.tuples(st.integers(1, 10**7), st.integers(0, 10**7)), min_size=1, max_size=600)

ROUNDS = 900


def _offsets(topic, partition, steps):
    found, end = [], 0
    for gap, length in steps:
        first = end + gap
        end = first + length + 1
        found.append((first, end - 1))
    return PartitionOffsets(topic, partition, tuple(found))


def _publication(offsets):
    records = sum(o.records for o in offsets)
    return Publication("run/asset", "id", "t", records, 1, "json", tuple(offsets), replayed=True, seconds=0.0)


@pytest.mark.parametrize(("code", "cause"), [(KafkaCode.TOPIC_AUTHORIZATION_FAILED, "TOPIC_AUTH"), (88, "UNSTABLE")])
def test_what_the_broker_does_not_tell_is_not_taken_for_an_empty_ledger(monkeypatch, code, cause):
    entry = types.SimpleNamespace(topic="t", partition=0, metadata=None, error=KafkaCode(code))
    consumer = types.SimpleNamespace(committed=lambda *_: [entry])
    connection = Connection(KafkaProducerConfig(bootstrap_servers="nowhere:1"))
    monkeypatch.setattr(connection, "consumer", lambda _: consumer)
    with pytest.raises(KafkaError, match=cause):
        Ledger(connection, "id", "t", 0.3).read("run/asset")


def test_a_client_that_is_still_being_made_when_the_ledger_lets_go_is_not_kept(monkeypatch):
    # So it comes when a run is interrupted as it begins.
    connection = Connection(KafkaProducerConfig(bootstrap_servers="127.0.0.1:9"))
    begun, over, made = threading.Event(), threading.Event(), []

    def consumer(_options):
        begun.set()
        assert over.wait(10)
        made.append(types.SimpleNamespace(committed=lambda *_: []))
        return made[0]

    monkeypatch.setattr(connection, "consumer", consumer)
    started, aside = [], connection.aside
    monkeypatch.setattr(connection, "aside", lambda call: started.append(aside(call)))
    ledger = Ledger(connection, "id", "topic", 1.0)
    ledger.warm_up()
    assert begun.wait(10)
    assert ledger.let_go() == []
    over.set()
    assert started[0].result(10) == []
    assert len(made) == 1
    assert ledger.let_go() == []


class _Group:
    """A ledger's group, which holds these entries, in a cluster with these topics."""

    def __init__(self, entries, topics=()):
        self._entries = entries
        self._topics = topics
        self.asked = []

    def committed(self, asked, _seconds):
        places = {(place.topic, place.partition) for place in asked}
        self.asked += places
        return [entry for entry in self._entries if (entry.topic, entry.partition) in places]

    def list_topics(self, timeout):
        return types.SimpleNamespace(topics=dict.fromkeys(self._topics))


def _ledger(monkeypatch, group, topic="t"):
    connection = Connection(KafkaProducerConfig(bootstrap_servers="localhost:1"))
    monkeypatch.setattr(connection, "consumer", lambda _: group)
    return Ledger(connection, "id", topic, 10)


def test_a_ledger_whose_offsets_somebody_has_changed_is_refused(monkeypatch):
    publication = _publication([_offsets("t", 0, [(1, 1)]), _offsets("t", 1, [(1, 3)])])
    (entries,) = encode_ledger(publication)
    assert _ledger(monkeypatch, _Group(entries)).read("run/asset") == publication
    left = [entry for entry in entries if entry.partition == 0]
    with pytest.raises(KafkaError, match="it names 6 records, but the offsets of 2. Somebody changed the group's"):
        _ledger(monkeypatch, _Group(left)).read("run/asset")


@pytest.mark.parametrize("metadata", [None, "", "committed by a consumer", "[1]", "7", "{}", '{"p":"x"}'])
def test_what_others_have_committed_to_the_group_is_no_ledger(metadata, monkeypatch):
    entry = types.SimpleNamespace(topic="t", partition=0, metadata=metadata, error=None)
    ledger = _ledger(monkeypatch, _Group([entry]))
    assert ledger.read("run/asset") is None
    assert (ledger.last, ledger.other_than([])) == ("", None)


@pytest.mark.parametrize("of_retry", [False, True])
def test_a_retry_finds_what_was_published_to_another_topic_and_asks_for_none_of_kafkas_own(of_retry, monkeypatch):
    publication = dataclasses.replace(_publication([_offsets("before", 0, [(1, 1)])]), topic="before")
    (entries,) = encode_ledger(publication)
    group = _Group(entries, ["before", "t", "__consumer_offsets", "__transaction_state"])
    found = _ledger(monkeypatch, group).read("run/asset", of_retry=of_retry)
    assert found == (publication if of_retry else None)
    assert {topic for topic, _ in group.asked} == ({"t", "before"} if of_retry else {"t"})


@given(st.dictionaries(st.tuples(st.sampled_from(["t", "o" * 249]), st.integers(0, 4)), runs, max_size=4))
def test_any_ledger_comes_back(places):
    publication = _publication([_offsets(*place, steps) for place, steps in sorted(places.items())])
    groups = encode_ledger(publication, [ledger_key(str(number)) for number in range(10)])
    entries = [entry for group in groups for entry in group]
    assert max(len(entry.metadata.encode()) for entry in entries) < LARGEST_METADATA
    key, header = next(find_headers(groups[0]))
    assert header["groups"] == len(groups)
    assert decode_ledger(key, header, entries, "id", "run/asset") == publication
    assert key != ledger_key("another run/asset")
    assert decode_ledger(ledger_key("another"), header, entries, "id", "run/asset").offsets == ()


def test_a_ledger_of_many_kafka_partitions_with_many_runs_is_written_in_several_batches():
    """A broker writes a group's entries in one batch, which is refused above 1 MB or so."""
    publication = _publication([_offsets("t", partition, [(100, 7)] * 300) for partition in range(600)])
    groups = encode_ledger(publication)
    assert max(sum(len(entry.metadata) + 100 for entry in group) for group in groups) < 600_000
    key, header = next(find_headers(groups[0]))
    entries = [entry for group in groups for entry in group]
    assert decode_ledger(key, header, entries, "id", "run/asset") == publication


@pytest.mark.parametrize("count", [1, 14, 30])
def test_a_replay_knows_the_formats_of_its_own_topic_however_many_others_there_are(count):
    schemas = [
        RegisteredSchema(part, "avro", f"topic-{number}-{part}", number, 1)
        for number in range(count)
        for part in ("value", "key")
    ]
    topics = {f"topic-{number}": "A" * 22 for number in range(count)}
    publication = dataclasses.replace(
        _publication([_offsets("t", 0, [(10**6, 10**6)] * 200)]),
        schemas=tuple(schemas),
        partition_counts=dict.fromkeys(topics, 600),
        topic_ids=topics,
    )
    groups = encode_ledger(publication, [ledger_key(str(number)) for number in range(10)])
    entries = [entry for group in groups for entry in group]
    assert max(len(entry.metadata.encode()) for entry in entries) < LARGEST_METADATA
    key, header = next(find_headers(groups[0]))
    found = decode_ledger(key, header, entries, "id", "run/asset")
    assert found.schemas == publication.schemas[: len(found.schemas)]
    assert (found.key_format, found.offsets) == ("avro", publication.offsets)


def test_a_ledger_of_another_version_is_none():
    ((entry, *_),) = encode_ledger(_publication([]))
    assert [header["records"] for _, header in find_headers([entry])] == [0]
    older = types.SimpleNamespace(metadata=entry.metadata.replace('"v":3', '"v":2'))
    assert list(find_headers([older])) == []


def test_what_an_earlier_writing_of_it_has_left_elsewhere_does_not_count():
    left = encode_ledger(_publication([_offsets("t", 0, [(1, 1)]), _offsets("t", 1, [(1, 1)])]))[0]
    again = _publication([_offsets("t", 0, [(9, 4)])])
    (entries,) = encode_ledger(again)
    key, header = next(find_headers(entries))
    assert decode_ledger(key, header, [*entries, left[-1]], "id", "run/asset").offsets == again.offsets


def test_a_publication_to_more_topics_than_the_ledger_can_name_is_refused():
    topics = [f"{number:040}" for number in range(90)]
    publication = _publication([_offsets(topic, 0, [(1, 1)]) for topic in topics])
    publication = dataclasses.replace(publication, partition_counts=dict.fromkeys(topics, 1))
    connection = Connection(KafkaProducerConfig(bootstrap_servers="localhost:1"))
    with pytest.raises(KafkaError, match="no room for the names of 90 topics"):
        Ledger(connection, "id", "t", 1.0).write(None, publication, "commit")


@pytest.mark.kafka
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_ledger_of_a_topic_that_was_made_anew_is_none(
    elsewhere, kafka_bootstrap_servers, kafka_topic, read, monkeypatch
):
    """It is left where the group's coordinator dies while the topic is deleted."""
    topic, other = kafka_topic(), kafka_topic()
    config = PublicationConfig(producer=KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers))
    names = {"transactional_id": topic, "publication_id": "work", "topic": topic}

    def attempt():
        with PublicationWriter(config, **names) as writer:
            writer.send("x")
            if elsewhere:
                writer.send("x", topic=other)
        return writer.commit()

    made, read_ledger = attempt(), Ledger.read
    assert made.topic_ids.keys() == ({topic, other} if elsewhere else {topic})
    again = attempt()
    assert (again.replayed, again.topic_ids) == (True, made.topic_ids)
    left = made.topic_ids | {topic: "that-of-the-topic-before"}
    monkeypatch.setattr(
        Ledger, "read", lambda *args, **options: dataclasses.replace(read_ledger(*args, **options), topic_ids=left)
    )
    if elsewhere:
        with pytest.raises(KafkaError, match=f"of its topics {topic} was deleted or made anew since"):
            attempt()
    else:
        assert find_published(config.producer, topic, "work", topic) is None
        assert not attempt().replayed
    assert len(read(topic)) == (1 if elsewhere else 2)


@pytest.mark.kafka
def test_a_publication_of_thousands_of_runs_is_found_and_read_again(kafka_bootstrap_servers, kafka_topic, read):
    topic = kafka_topic(partitions=2)
    producer = KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers, linger_ms=0)
    config = PublicationConfig(producer=producer)
    other = Producer({"bootstrap.servers": kafka_bootstrap_servers, "linger.ms": 0})

    def writer(publication_id):
        return PublicationWriter(config, transactional_id=topic, publication_id=publication_id, topic=topic)

    with writer("long") as publication:
        for i in range(ROUNDS):
            for partition in (0, 1):
                publication.send({"i": i}, partition=partition)
            # One after the other, so that each record is a run of its own.
            assert publication._sender.live().flush(10) == 0
            for partition in (0, 1):
                other.produce(topic, b'{"other":1}', partition=partition)
            assert other.flush(10) == 0
    made = publication.commit()
    assert sum(len(offsets.runs) for offsets in made.offsets) == 2 * ROUNDS
    assert len(encode_ledger(made)) >= 2

    with writer("long") as again:
        again.send({"i": "never"})
    assert again.publication.replayed
    assert again.publication.offsets == made.offsets

    expected = collections.defaultdict(list)
    for record in read(topic):
        value = orjson.loads(record.value)
        if "i" in value:
            expected[record.partition].append((record.offset, value["i"]))
    assert {partition: [i for _, i in records] for partition, records in expected.items()} == {
        0: list(range(ROUNDS)),
        1: list(range(ROUNDS)),
    }
    back = collections.defaultdict(list)
    for record in read_publication(producer, again.publication):
        back[record.message.partition()].append((record.message.offset(), orjson.loads(record.value)["i"]))
    assert back == expected

    # A short one of the same publisher: what the groups of the long one still hold is not taken for its own.
    with writer("short") as short:
        short.send({"i": 0})
    with writer("short") as again:
        pass
    assert again.publication.replayed
    assert again.publication.offsets == short.publication.offsets
    assert again.publication.records == 1


@pytest.mark.kafka
def test_a_retry_that_comes_after_another_publication_publishes_nothing(kafka_bootstrap_servers, kafka_topic, read):
    topic = kafka_topic()
    config = PublicationConfig(producer=KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers))

    def attempt(publication_id):
        return publish(config, publication_id, transactional_id=topic, publication_id=publication_id, topic=topic)

    for number in range(12):
        assert attempt(str(number)).records == 1
    assert attempt("11").replayed
    for earlier in ("10", "1"):
        with pytest.raises(KafkaError, match="an earlier attempt had published it, and it has been published anew"):
            attempt(earlier)
    assert [record.value for record in read(topic)] == [str(number).encode() for number in range(12)]
    # So many are known, and no more.
    assert attempt("0").records == 1
