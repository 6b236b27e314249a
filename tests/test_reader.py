import functools

import pytest
from confluent_kafka import KafkaError as KafkaCode
from conftest import Clock

from dataforge_kafka_dagster import KafkaError, KafkaProducerConfig, NoBrokersAvailable
from dataforge_kafka_dagster.kafka import reader, verification
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.errors import Remedy
from dataforge_kafka_dagster.kafka.ledger import PartitionOffsets, Publication
from dataforge_kafka_dagster.kafka.reader import GoneError, _read_all, read_publication

TIMEOUT = 0.3


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """It goes on only while a consumer is asked."""
    clock = Clock()
    monkeypatch.setattr(reader, "time", clock)
    return clock


class _Told:
    """What a consumer tells in a record's place."""

    def __init__(self, error, offset=None):
        self._error = error
        self._offset = offset

    def error(self):
        return self._error

    def offset(self):
        return self._offset


class _Record:
    """A record at an offset, which is its value, and its key if it has no other."""

    def __init__(self, offset, key=None):
        self._offset, self._key = offset, key

    def error(self):
        return None

    def offset(self):
        return self._offset

    def key(self):
        return self._key or self.value()

    def value(self):
        return b"%d" % self._offset


class _Consumer:
    """A consumer that gives a record after each so many errors, and none after the last."""

    def __init__(self, clock, errors, records):
        self._clock = clock
        self._errors, self._records = errors, records
        self._calls = self._given = 0

    def assign(self, _places): ...

    def consume(self, _count, _seconds):
        self._clock.sleep(0.01)
        self._calls += 1
        if self._given < self._records and self._calls % self._errors == 0:
            self._given += 1
            return [_Record(self._given - 1)]
        return [_Told(KafkaCode(KafkaCode.LEADER_NOT_AVAILABLE))]

    def position(self, places):
        places[0].offset = self._given
        return places


def _read(consumer, runs=((0, 4),), *, timeout=TIMEOUT, partial=False, connection=None, **more):
    offsets = PartitionOffsets("t", 2, runs)
    fields = {"publication_id": "p", "transactional_id": "x", "topic": "t", "bytes": 0, "value_format": "bytes"}
    counts = {"records": offsets.records, "replayed": False, "seconds": 0.0}
    publication = Publication(**fields, offsets=(offsets,), **counts, **more)
    connection = connection or Connection(KafkaProducerConfig(bootstrap_servers="localhost:1"))
    return _read_all(connection, consumer, publication, timeout, partial=partial)


def test_errors_that_pass_without_end_do_not_put_the_deadline_off(clock):
    began = clock.now
    with pytest.raises(KafkaError) as caught:
        list(_read(_Consumer(clock, errors=10, records=3)))
    assert 3 * 0.1 + TIMEOUT < clock.now - began < 3 * 0.1 + TIMEOUT + 0.1
    error = caught.value
    assert (error.culprit, error.code) == ("topic 't', Kafka partition 2", "LEADER_NOT_AVAILABLE")
    assert f"no record in {TIMEOUT} s" in error.cause


def test_who_has_read_a_record_lacks_no_token(clock):
    of_token_server = {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "OAUTHBEARER",
        "sasl_oauthbearer_method": "oidc",
        "sasl_oauthbearer_token_endpoint_url": "HTTPS://localhost:1/token",
        "sasl_oauthbearer_client_id": "reader",
        "sasl_oauthbearer_client_secret": "canary",
    }
    connection = Connection(KafkaProducerConfig(bootstrap_servers="localhost:1", **of_token_server))
    assert connection._may_lack_token
    list(_read(_Consumer(clock, errors=1, records=5), connection=connection))
    assert not connection._may_lack_token


def test_each_record_puts_the_deadline_off(clock):
    began = clock.now
    found = [record.value for record in _read(_Consumer(clock, errors=20, records=5))]
    assert clock.now - began > 2 * TIMEOUT
    assert found == [b"0", b"1", b"2", b"3", b"4"]


class _Silent(_Consumer):
    """A consumer that tells nothing any more after its last record."""

    def consume(self, count, seconds):
        found = super().consume(count, seconds)
        return found if self._given < self._records or isinstance(found[0], _Record) else []


@pytest.mark.parametrize("records", [0, 1])
def test_silence_is_told_as_such_also_after_errors_that_have_passed(records, clock):
    began = clock.now
    with pytest.raises(NoBrokersAvailable, match="no broker answered") as caught:
        list(_read(_Silent(clock, errors=5, records=records)))
    assert TIMEOUT < clock.now - began < TIMEOUT + 0.1
    assert "LEADER" not in str(caught.value)


class _Asked(_Consumer):
    """A consumer that remembers how many records it was asked for."""

    def __init__(self, clock, records):
        super().__init__(clock, 1, records)
        self.counts = []

    def consume(self, count, seconds):
        self.counts.append(count)
        return super().consume(count, seconds)


def test_no_more_records_are_asked_for_than_there_can_be(clock):
    # It would wait for them.
    consumer = _Asked(clock, 5)
    assert len(list(_read(consumer))) == 5
    assert consumer.counts == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("code", [KafkaCode.TOPIC_AUTHORIZATION_FAILED, KafkaCode._FATAL])
def test_an_error_that_waiting_does_not_help_is_told_at_once(code, clock):
    class Refused(_Consumer):
        def consume(self, _count, _seconds):
            self._clock.sleep(0.01)
            return [_Told(KafkaCode(code))]

    began = clock.now
    with pytest.raises(KafkaError) as caught:
        list(_read(Refused(clock, 1, 5)))
    assert (caught.value.code, caught.value.culprit) == (KafkaCode(code).name(), "topic 't', Kafka partition 2")
    assert clock.now - began < TIMEOUT / 2


def test_the_reader_is_let_go_of_also_if_its_records_are_not_read_to_the_end(clock, monkeypatch):
    closed, consumer = [], _Consumer(clock, errors=1, records=5)
    monkeypatch.setattr(Connection, "reader", lambda *_: consumer)
    monkeypatch.setattr(Connection, "close", lambda _, *clients: closed.extend(clients))
    there = (PartitionOffsets("t", 0, ((0, 4),)),)
    publication = Publication("p", "x", "t", 5, 0, "bytes", there, replayed=False, seconds=0.0)
    records = read_publication(KafkaProducerConfig(bootstrap_servers="localhost:1"), publication)
    assert next(records).value == b"0"
    assert closed == []
    records.close()
    assert closed == [consumer]


class _Ending:
    """A consumer of a log that ends after so many records, and then after all."""

    def __init__(self, clock, first, then):
        self._clock, self._first, self._then = clock, first, then
        self._given, self._began = 0, clock.now

    def assign(self, _places): ...

    def consume(self, _count, _seconds):
        self._clock.sleep(0.01)
        end = self._first if self._clock.now < self._began + 0.5 else self._then
        if self._given < end:
            self._given += 1
            found = [_Record(self._given - 1)]
            return [*found, _Told(KafkaCode(KafkaCode._PARTITION_EOF), end)] if self._given == end else found
        return []

    def position(self, places):
        places[0].offset = self._given
        return places


def test_a_log_that_ends_too_early_is_told_as_such_and_soon(clock):
    began = clock.now
    with pytest.raises(KafkaError, match="2 of 5 records are gone") as caught:
        list(_read(_Ending(clock, 3, 3), timeout=30))
    assert clock.now - began < 2
    assert caught.value.remedy is Remedy.FAIL


def test_an_end_that_moves_on_is_none(clock):
    assert len(list(_read(_Ending(clock, 3, 5), timeout=30))) == 5


class _CutLog:
    """A consumer of a Kafka partition that ends at offset 5 now, and begins to read where it can."""

    def assign(self, _places): ...

    def consume(self, count, _seconds):
        return [_Record(offset) for offset in range(5)][:count]

    def position(self, places):
        return places


@pytest.mark.parametrize("runs", [((1000, 1009),), ((1000, 1004), (1006, 1009))])
def test_in_a_log_that_was_cut_nothing_is_taken_for_the_last_publications(runs):
    assert list(_read(_CutLog(), runs, partial=True)) == []


@pytest.mark.parametrize("more", [{"tombstones": 2}, {"superseded": 2}, {"tombstones": 1, "superseded": 1}])
def test_what_compaction_removes_of_a_table_is_not_missed(more, clock):
    assert len(list(_read(_Ending(clock, 3, 3), timeout=30, **more))) == 3


@pytest.mark.parametrize(
    ("more", "gone"), [({}, "2 of 5"), ({"tombstones": 1}, "1 of 4"), ({"superseded": 1}, "1 of 4")]
)
def test_what_compaction_removes_of_rows_is(more, gone, clock):
    with pytest.raises(KafkaError, match=f"{gone} records are gone.*min.compaction.lag.ms"):
        list(_read(_Ending(clock, 3, 3), timeout=30, **more))


class _Compacted:
    """A consumer of two Kafka partitions of which compaction has left these offsets and keys."""

    def __init__(self, clock, *left):
        self._clock, self._left = clock, left

    def assign(self, places):
        (place,) = places
        self._given = [_Record(offset, key) for offset, key in self._left[place.partition].items()]

    def consume(self, _count, _seconds):
        self._clock.sleep(0.01)
        given, self._given = self._given, [_Told(KafkaCode(KafkaCode._PARTITION_EOF), 10)]
        return given

    def position(self, places):
        places[0].offset = 10
        return places


SURVIVORS = {
    "all": ({0: b"a", 1: b"b"}, {0: b"x", 1: b"x"}, None, ""),
    "a replaced one gone": ({0: b"a", 1: b"b"}, {1: b"x"}, None, ""),
    "a row gone": ({1: b"b"}, {0: b"x", 1: b"x"}, 1, "topic 't', Kafka partition 0, offsets 0 to 1: 1 of 3 records"),
    "a row and a replaced one": (
        {1: b"b"},
        {1: b"x"},
        1,
        "one of 2 Kafka partitions, topic 't', Kafka partition 0, top",
    ),
    "all rows": ({}, {}, 3, "one of 2 Kafka partitions"),
}


@pytest.mark.parametrize(("first", "second", "gone", "said"), SURVIVORS.values(), ids=SURVIVORS)
def test_a_replaced_record_stands_for_no_other_row(first, second, gone, said, clock):
    offsets = tuple(PartitionOffsets("t", partition, ((0, 1),)) for partition in (0, 1))
    publication = Publication("p", "x", "t", 4, 0, "bytes", offsets, replayed=False, seconds=0.0, superseded=1)
    connection = Connection(KafkaProducerConfig(bootstrap_servers="localhost:1"))
    reading = _read_all(connection, _Compacted(clock, first, second), publication, TIMEOUT, partial=False)
    if gone is None:
        assert len(list(reading)) == len(first) + len(second)
        return
    with pytest.raises(GoneError) as caught:
        list(reading)
    assert caught.value.records == gone
    assert str(caught.value).startswith(said)


def test_what_is_missing_of_a_second_topic_is_not_said_of_the_first(clock, monkeypatch):
    offsets = (PartitionOffsets("first", 0, ((0, 1),)), PartitionOffsets("second", 1, ((0, 1),)))
    publication = Publication("p", "x", "first", 4, 0, "bytes", offsets, replayed=False, seconds=0.0)
    consumer = _Compacted(clock, {0: b"a", 1: b"b"}, {1: b"x"})
    config = KafkaProducerConfig(bootstrap_servers="localhost:1")
    reading = functools.partial(_read_all, Connection(config), consumer, partial=False)
    monkeypatch.setattr(verification, "read_publication", lambda _, *what: reading(*what))
    (missing,) = verification._missing_when_read(config, publication, TIMEOUT)
    assert (missing.topic, missing.partition, missing.records) == ("second", 1, 1)


def test_of_many_kafka_partitions_that_lack_records_some_are_named(clock):
    there = tuple(PartitionOffsets("t", partition, ((0, 1),)) for partition in range(9))
    publication = Publication("p", "x", "t", 18, 0, "bytes", there, replayed=False, seconds=0.0)
    connection = Connection(KafkaProducerConfig(bootstrap_servers="localhost:1"))
    with pytest.raises(GoneError) as caught:
        list(_read_all(connection, _Compacted(clock, *[{}] * 9), publication, TIMEOUT, partial=False))
    named = ", ".join(f"topic 't', Kafka partition {partition}" for partition in range(5))
    assert caught.value.culprit == f"one of 9 Kafka partitions, {named}"
    assert caught.value.records == 18


def test_a_row_that_its_own_publication_has_deleted_stands_for_no_other_row(clock, monkeypatch):
    monkeypatch.setattr(_Record, "value", lambda self: None if self._offset == 2 else b"v")
    there = (PartitionOffsets("t", 0, ((0, 3),)),)
    fields = {"replayed": False, "seconds": 0.0, "superseded": 1, "tombstones": 1}
    publication = Publication("p", "x", "t", 4, 0, "bytes", there, **fields)
    connection = Connection(KafkaProducerConfig(bootstrap_servers="localhost:1"))
    consumer = _Compacted(clock, {0: b"deleted", 2: b"deleted", 3: b"a"})
    with pytest.raises(GoneError, match="1 of 2 records are gone"):
        list(_read_all(connection, consumer, publication, TIMEOUT, partial=False))
