import collections
import json
import time
import types
import uuid

import dagster as dg
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic
from conftest import make_anew

from dataforge_kafka_dagster import (
    KafkaIOManager,
    KafkaProducerConfig,
    KafkaProducerResource,
    KafkaRecord,
    io_manager,
)
from dataforge_kafka_dagster.kafka import topics, upserts
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.records import Chunk
from dataforge_kafka_dagster.kafka.sources import chunks
from dataforge_kafka_dagster.kafka.upserts import Upsert

pytestmark = pytest.mark.kafka

PREFIX = f"test-{uuid.uuid4().hex[:8]}"
DAYS = dg.StaticPartitionsDefinition(["mon", "tue"])


@pytest.fixture
def publish(kafka_bootstrap_servers, instance):
    """Publishes rows by an asset in upsert mode, and returns its metadata."""

    def manager(raw):
        kafka = KafkaProducerResource(
            bootstrap_servers=kafka_bootstrap_servers,
            transactional_id_prefix=PREFIX,
            step_retry_delay=0.01,
            librdkafka_config={"topic.metadata.refresh.interval.ms": 300} | raw,
        )
        return KafkaIOManager(kafka=kafka)

    def publish(
        topic,
        output,
        *,
        partition_key=None,
        mode="upsert",
        key="k",
        fail=False,
        partitions_def=None,
        tags=None,
        raw=None,
        **more,
    ):
        metadata = {f"kafka/{name}": value for name, value in more.items()} | {
            "kafka/topic": topic,
            "kafka/key": key,
            "kafka/write_mode": mode,
        }

        @dg.asset(
            metadata={name: value for name, value in metadata.items() if value is not None},
            partitions_def=partitions_def or (DAYS if partition_key else None),
            backfill_policy=dg.BackfillPolicy.single_run() if partitions_def else None,
        )
        def places():
            return dg.Output(output() if callable(output) else output)

        result = dg.materialize(
            [places],
            resources={"io_manager": manager(raw or {})},
            instance=instance,
            partition_key=partition_key,
            raise_on_error=not fail,
            tags=tags,
        )
        if fail:
            (event,) = result.get_step_failure_events()
            return str(event.event_specific_data.user_failure_data)
        metadata = [event.materialization.metadata for event in result.get_asset_materialization_events()]
        return {name: value.value for name, value in metadata[0].items() if name != "kafka/offsets"}

    return publish


def _rows(*keys, v=1):
    return [{"k": key, "v": v} for key in keys]


def _table(found):
    """What a reader of a compacted topic has in the end."""
    table = {}
    for record in found:
        table[record.key.decode()] = None if record.value is None else json.loads(record.value)["v"]
    return {key: value for key, value in table.items() if value is not None}


def test_keys_that_are_not_there_any_more_get_a_tombstone(publish, kafka_topic, read):
    topic = kafka_topic(partitions=3)
    assert "kafka/tombstones" not in publish(topic, _rows("a", "b", "c"))
    said = publish(topic, _rows("b", "c", "d", v=2))
    assert _table(read(topic)) == {"b": 2, "c": 2, "d": 2}
    assert (said["kafka/tombstones"], said["kafka/records"], said["dagster/row_count"]) == (1, 4, 3)
    assert [(record.key, record.value) for record in read(topic) if record.value is None] == [(b"a", None)]
    said = publish(topic, _rows("d", v=3))
    assert _table(read(topic)) == {"d": 3}
    assert said["kafka/tombstones"] == 2


def test_a_tombstone_is_where_its_key_was(publish, kafka_topic, read):
    topic = kafka_topic(partitions=4)
    rows = [KafkaRecord({"v": 1}, key=f"k{i}", partition=i % 4) for i in range(20)]
    publish(topic, rows, key=None)
    said = publish(topic, [], key=None)
    assert said["kafka/tombstones"] == 20
    places = collections.defaultdict(set)
    for record in read(topic):
        places[record.key].add((record.partition, record.value is None))
    assert all({deleted for _, deleted in found} == {True, False} for found in places.values())
    assert all(len({partition for partition, _ in found}) == 1 for found in places.values())


@pytest.mark.parametrize("killed", [False, True])
def test_a_key_that_goes_elsewhere_since_the_topic_has_more_partitions_is_there_once(
    killed, publish, kafka_topic, read, kafka_bootstrap_servers, monkeypatch
):
    topic, keys = kafka_topic(partitions=2), [f"k{i}" for i in range(20)]
    if killed:
        with monkeypatch.context() as patch:
            patch.setattr(io_manager, "publication_metadata", lambda *_: 1 / 0)
            publish(topic, _rows(*keys), fail=True)
    else:
        publish(topic, _rows(*keys))
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
    admin.create_partitions([NewPartitions(topic, 5)])[topic].result(30)
    said = publish(topic, _rows(*keys[1:], v=2))
    assert (said["kafka/tombstones"], said["dagster/row_count"]) == (20, 19)
    assert _rows_by_place(read(topic)) == {key: [2] for key in keys[1:]}
    assert publish(topic, _rows(*keys[2:], v=3))["kafka/tombstones"] == 1
    assert _rows_by_place(read(topic)) == {key: [3] for key in keys[2:]}


def _rows_by_place(found):
    """By key, what each Kafka partition has of it in the end."""
    by_place = {(record.key.decode(), record.partition): record.value for record in found}
    rows = collections.defaultdict(list)
    for (key, _), value in by_place.items():
        if value is not None:
            rows[key].append(json.loads(value)["v"])
    return rows


def test_an_empty_output_deletes_all_and_none_is_refused(publish, kafka_topic, read):
    topic = kafka_topic()
    publish(topic, _rows("a", "b"))
    assert "Return an empty list to delete them all" in publish(topic, None, fail=True)
    assert _table(read(topic)) == {"a": 1, "b": 1}
    assert publish(topic, [])["dagster/row_count"] == 0
    assert _table(read(topic)) == {}
    assert publish(topic, [])["kafka/records"] == 0


def test_a_retry_that_returns_none_tells_what_was_published(publish, kafka_topic, read, monkeypatch):
    topic, attempts, handle = kafka_topic(), [], KafkaIOManager.handle_output

    def lost_after_the_commit(*arguments):
        handle(*arguments)
        if len(attempts) == 1:
            raise dg.RetryRequested

    def rows():
        attempts.append(1)
        return _rows("a") if len(attempts) == 1 else None

    monkeypatch.setattr(KafkaIOManager, "handle_output", lost_after_the_commit)
    assert publish(topic, rows)["kafka/records"] == 1
    assert len(attempts) == 2
    assert _table(read(topic)) == {"a": 1}


def test_each_dagster_partition_replaces_its_own_keys_only(publish, kafka_topic, read):
    topic = kafka_topic()
    publish(topic, _rows("a", "shared"), partition_key="mon")
    publish(topic, _rows("b", "shared", v=2), partition_key="tue")
    publish(topic, _rows("a", v=3), partition_key="mon")
    # A key of two Dagster partitions is deleted by the one that gives it up: docs/upserts.md says so.
    assert _table(read(topic)) == {"a": 3, "b": 2}


def test_keys_that_go_elsewhere_by_another_partitioner_are_there_once(publish, kafka_topic, read):
    topic, keys = kafka_topic(partitions=4), [f"k{i}" for i in range(20)]
    publish(topic, _rows(*keys))
    said = publish(topic, _rows(*keys[1:], v=2), raw={"partitioner": "consistent_random"})
    assert (said["kafka/tombstones"], said["dagster/row_count"]) == (20, 19)
    assert _rows_by_place(read(topic)) == {key: [2] for key in keys[1:]}
    assert publish(topic, [], raw={"partitioner": "consistent_random"})["kafka/tombstones"] == 19
    assert _rows_by_place(read(topic)) == {}


def test_a_key_that_comes_twice_is_one_row(publish, kafka_topic, read):
    topic = kafka_topic()
    said = publish(topic, [*_rows("a", "b"), *_rows("a", v=2)])
    assert (said["kafka/records"], said["dagster/row_count"]) == (3, 2)
    assert _table(read(topic)) == {"a": 2, "b": 1}
    assert publish(topic, _rows("b", v=2))["kafka/tombstones"] == 1
    assert _table(read(topic)) == {"b": 2}


@pytest.mark.parametrize(
    ("values", "superseded"),
    [("vv", 1), ("vvv", 2), ("v.", 1), (".v", 0), ("v.v", 1), ("..", 0), (".vv", 1), ("vv.v", 2)],
)
@pytest.mark.parametrize("size", [1, 10])
def test_records_that_later_ones_of_their_key_replace_are_counted(values, superseded, size):
    upsert = Upsert(KafkaProducerConfig(), [], "t")
    records = [(b"k", b"1" if value == "v" else None) for value in values] + [(b"other", b"1")]
    for some in (records[at : at + size] for at in range(0, len(records), size)):
        keys, found = zip(*some, strict=True)
        chunk = Chunk(list(found), list(keys), None, 0, "bytes", found.count(None))
        assert list(upsert.remember([chunk])) == [chunk]
    assert upsert.superseded == superseded


@pytest.mark.parametrize(
    ("places", "superseded"),
    [((0, 1), 0), ((0, 0), 1), ((0, 1, 0), 1), ((None, None), 1)],
)
@pytest.mark.parametrize("last", ["v", None])
def test_a_record_replaces_none_in_a_kafka_partition_that_was_chosen_for_it(places, superseded, last):
    upsert = Upsert(KafkaProducerConfig(), [], "t")
    for place in places:
        records = [KafkaRecord("v", "k", partition=place), KafkaRecord(last, f"other of {place}")]
        assert list(upsert.remember(chunks(records, ())))
    others = 0 if last is None else len(places) - len(set(places))
    assert upsert.superseded == superseded + others


@pytest.mark.parametrize(("keys", "index"), [([b"a", b"b"], 2), ([], 0)], ids=["later", "at once"])
@pytest.mark.parametrize(("more", "place"), [(None, 0), ([b"c", None], 1)])
def test_a_record_without_a_key_is_named_by_its_place_among_all(keys, index, more, place):
    upsert = Upsert(KafkaProducerConfig(), [], "t")
    before = [Chunk([b"1"] * len(keys), keys, None, 0, "bytes", 0)] if keys else []
    with pytest.raises(InvalidRecordError, match=f"record {index + place}: it has no key") as caught:
        list(upsert.remember([*before, Chunk([b"1"] * 2, more, None, 0, "bytes", 0)]))
    assert caught.value.index == index + place


@pytest.mark.parametrize("chosen", [None, 3])
def test_a_key_that_comes_again_is_not_deleted_wherever_it_goes(chosen, monkeypatch):
    def read(*_, **__):
        for key, value in ((b"k", b"1"), (b"gone", b"1"), (b"gone", b"2"), (b"deleted", None)):
            yield types.SimpleNamespace(key=key, value=value, message=types.SimpleNamespace(partition=lambda: 0))

    monkeypatch.setattr(upserts, "read_publication", read)
    upsert = Upsert(KafkaProducerConfig(), [], "t")
    assert list(upsert.remember(chunks([KafkaRecord("v", "k", partition=chosen)], ())))
    (deleted,) = upsert.delete_others([None])
    assert (deleted.keys, deleted.values, deleted.tombstones, deleted.size) == ([b"gone"], [None], 1, 4)


def test_what_another_writer_put_between_stays(publish, kafka_topic, read, kafka_bootstrap_servers):
    topic = kafka_topic()
    publish(topic, _rows("a"))
    publish(topic, _rows("mine"), mode="append")
    publish(topic, _rows("other", "b"), partition_key=None, mode="append")
    said = publish(topic, _rows("b", v=2))
    # Only the last publication is replaced.
    assert _table(read(topic)) == {"a": 1, "mine": 1, "b": 2}
    assert said["kafka/tombstones"] == 1


def test_records_that_are_gone_are_not_missed(publish, kafka_topic, read, kafka_bootstrap_servers):
    topic = kafka_topic()
    publish(topic, _rows(*"abcdef"))
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
    for end in (3, 7):
        (future,) = admin.delete_records([TopicPartition(topic, 0, end)]).values()
        future.result(30)
        if end == 3:
            assert publish(topic, _rows("f", v=2))["kafka/tombstones"] == 2
            assert {record.key for record in read(topic) if record.value is None} == {b"d", b"e"}
    (future,) = admin.delete_records([TopicPartition(topic, 0, -1)]).values()
    future.result(30)
    assert "kafka/tombstones" not in publish(topic, _rows("z"))


def test_a_topic_made_anew_holds_nothing_to_delete(publish, kafka_bootstrap_servers, read):
    admin, topic = AdminClient({"bootstrap.servers": kafka_bootstrap_servers}), f"anew-{uuid.uuid4().hex[:8]}"
    admin.create_topics([NewTopic(topic, 1)])[topic].result(30)
    publish(topic, _rows("a", "b"))
    admin.delete_topics([topic])[topic].result(30)
    make_anew(admin, topic)
    # At the offsets of what was published before, somebody else's keys.
    producer = Producer({"bootstrap.servers": kafka_bootstrap_servers})
    for key in ("x", "y"):
        producer.produce(topic, b'{"v":9}', key)
    producer.flush(30)
    try:
        assert "kafka/tombstones" not in publish(topic, _rows("c"))
        assert _table(read(topic)) == {"x": 9, "y": 9, "c": 1}
    finally:
        admin.delete_topics([topic])[topic].result(30)


def test_an_asset_that_moves_to_another_topic_leaves_the_old_one_alone(
    publish, kafka_bootstrap_servers, kafka_topic, read
):
    admin, old = AdminClient({"bootstrap.servers": kafka_bootstrap_servers}), f"old-{uuid.uuid4().hex[:8]}"
    make_anew(admin, old)
    publish(old, _rows("a", "b"))
    admin.delete_topics([old], operation_timeout=30)[old].result(30)
    topic = kafka_topic()
    assert "kafka/tombstones" not in publish(topic, _rows("b", "c"))
    assert publish(topic, _rows("c", v=2))["kafka/tombstones"] == 1
    assert _table(read(topic)) == {"c": 2}


@pytest.mark.parametrize("when", ["before", "after", "always"])
def test_brokers_that_tell_no_topic_ids_have_the_same_topic(when, publish, kafka_topic, read, monkeypatch):
    """As those before 2.8, until they are upgraded."""
    look, topic = topics.look_at_topic, kafka_topic()

    def without(*arguments, **options):
        return look(*arguments, **options)._replace(id=None)

    for now in ("before", "after"):
        monkeypatch.setattr(topics, "look_at_topic", without if when in {now, "always"} else look)
        said = publish(topic, _rows("a", "b") if now == "before" else _rows("b", v=2))
    assert said["kafka/tombstones"] == 1
    assert _table(read(topic)) == {"b": 2}


@pytest.mark.parametrize("noticed", [True, False])
def test_kafka_partitions_that_are_added_meanwhile_end_it(
    noticed, publish, kafka_bootstrap_servers, kafka_topic, read, eventually
):
    topic, attempts = kafka_topic(partitions=2), []
    keys = [str(i) for i in range(20)]
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})

    def grow():
        attempts.append(1)
        for i, row in enumerate(_rows(*keys, v=len(attempts) + 1)):
            if i == (10 if noticed else 19) and len(attempts) == 1:
                admin.create_partitions([NewPartitions(topic, 7)])[topic].result(30)
                eventually(lambda: len(admin.list_topics(topic).topics[topic].partitions) == 7)
                if noticed:
                    time.sleep(1)  # for the producer to look again, and use them
            yield row

    publish(topic, _rows(*keys))
    publish(topic, grow)
    assert len(attempts) == 2
    live = {(record.partition, record.key.decode()): record.value for record in read(topic)}
    assert sorted((key, json.loads(value)["v"]) for (_, key), value in live.items() if value) == sorted(
        (key, 3) for key in keys
    )


def test_a_failure_changes_nothing(publish, kafka_topic, read):
    topic = kafka_topic()
    publish(topic, _rows("a", "b"))
    assert "it has no key" in publish(
        topic, [KafkaRecord({"v": 2}, key="a"), KafkaRecord({"v": 2})], key=None, fail=True
    )
    assert _table(read(topic)) == {"a": 1, "b": 1}


def test_a_replayed_upsert_says_what_it_had_deleted(publish, kafka_topic, read, instance):
    topic = kafka_topic()
    publish(topic, _rows("a", "b", "c"))
    first = publish(topic, _rows("c"))
    said = first["kafka/publication"]
    assert said["tombstones"] == first["kafka/tombstones"] == 2
    from dataforge_kafka_dagster.kafka.ledger import Publication, decode_ledger, encode_ledger, find_headers

    publication = Publication.from_dict(said)
    (entries,) = encode_ledger(publication)
    key, header = next(find_headers(entries))
    decoded = decode_ledger(key, header, entries, publication.transactional_id, publication.publication_id)
    assert decoded.tombstones == 2


@pytest.mark.parametrize("first", [True, False], ids=["the first publication", "a later publication"])
def test_what_was_committed_and_never_told_is_replaced_too(publish, kafka_topic, read, monkeypatch, first):
    """As after a kill between the commit and the materialization."""
    topic = kafka_topic(partitions=2)
    if not first:
        publish(topic, _rows("a", "b"))
    with monkeypatch.context() as broken:
        broken.setattr(io_manager, "publication_metadata", lambda *_: 1 / 0)
        assert publish(topic, _rows("b", "untold"), fail=True)
    assert _table(read(topic)) == {"b": 1, "untold": 1}
    said = publish(topic, _rows("b", v=2))
    assert _table(read(topic)) == {"b": 2}
    assert said["kafka/tombstones"] == (1 if first else 2)
    # Now it is told, and the ledger names the same publication as Dagster does.
    assert publish(topic, _rows("c"))["kafka/tombstones"] == 1


@pytest.mark.parametrize(("mode", "reason"), [("upsrt", "Use append or upsert"), ("merge", "there is no such mode")])
def test_other_modes_are_refused(mode, reason, publish, kafka_topic):
    assert reason in publish(kafka_topic(), _rows("a"), mode=mode, fail=True)


def test_a_dead_letter_topic_is_refused(publish, kafka_topic):
    assert "Set on_bad_record to 'fail'" in publish(kafka_topic(), _rows("a"), fail=True, on_bad_record="dead")


def test_what_was_published_together_is_replaced_together(publish, kafka_topic, read):
    topic = kafka_topic()
    tags = {"dagster/asset_partition_range_start": "mon", "dagster/asset_partition_range_end": "tue"}
    publish(topic, _rows("a", "b"), partitions_def=DAYS, tags=tags)
    reason = publish(topic, _rows("a"), partition_key="mon", fail=True)
    assert "published together with 1 other Dagster partitions" in reason
    assert publish(topic, _rows("b"), partitions_def=DAYS, tags=tags)["kafka/tombstones"] == 1
    assert _table(read(topic)) == {"b": 1}


def test_an_asset_that_has_no_dagster_partitions_any_more_replaces_those_that_it_had(publish, kafka_topic, read):
    topic = kafka_topic(partitions=2)
    publish(topic, _rows("m1", "m2"), partition_key="mon")
    publish(topic, _rows("t1", "t2"), partition_key="tue")
    assert publish(topic, _rows("m2", "t1", "new", v=2))["kafka/tombstones"] == 2
    assert _table(read(topic)) == {"m2": 2, "t1": 2, "new": 2}
    assert publish(topic, _rows("new", v=3))["kafka/tombstones"] == 2
    assert _table(read(topic)) == {"new": 3}


def test_one_that_was_published_for_a_range_and_has_no_dagster_partitions_any_more_replaces_it(
    publish, kafka_topic, read
):
    topic = kafka_topic()
    tags = {"dagster/asset_partition_range_start": "mon", "dagster/asset_partition_range_end": "tue"}
    publish(topic, _rows("a", "b"), partitions_def=DAYS, tags=tags)
    assert publish(topic, _rows("b", v=2))["kafka/tombstones"] == 1
    assert _table(read(topic)) == {"b": 2}


def test_memory_is_a_digest_for_each_key():
    upsert = Upsert(None, [], "topic")
    long = [f"{i:>10000}".encode() for i in range(100)]
    list(upsert.remember([Chunk([b"v"] * 100, long, None, 0, "bytes")]))
    assert {len(digest) for digest in upsert._settled} == {16}
    assert len(upsert._settled) == 100
