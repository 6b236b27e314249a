"""Reads a publication's records back: those and no others, whoever else writes to the topic."""

from __future__ import annotations

import bisect
import contextlib
import functools
import math
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import confluent_kafka
from confluent_kafka import TopicPartition

from dataforge_kafka_dagster.kafka.config import KafkaProducerConfig
from dataforge_kafka_dagster.kafka.connection import SLICE, Connection
from dataforge_kafka_dagster.kafka.errors import KafkaError, Remedy, place_name, remedy_of
from dataforge_kafka_dagster.kafka.ledger import PartitionOffsets, Publication
from dataforge_kafka_dagster.kafka.topics import lost_since

_BATCH: Final = 5_000
# The end of a log may move on: a broker that has just become leader learns it from the others.
_LAG_SECONDS: Final = 1.0
# How many Kafka partitions an error names.
_SHOWN: Final = 5


class GoneError(KafkaError):
    """Records are not in Kafka any more.

    Attributes:
        places: Where some were that are not there; of several, perhaps only those that compaction may remove.
        records: How many, without those that compaction may remove; None if that is not known.
    """

    def __init__(self, places: Sequence[PartitionOffsets], cause: str, records: int | None = None) -> None:
        first, *others = places
        culprit = f"{place_name(first.topic, first.partition)}, offsets {first.first} to {first.last}"
        if others:
            names = ", ".join(place_name(offsets.topic, offsets.partition) for offsets in places[:_SHOWN])
            culprit = f"one of {len(places)} Kafka partitions, {names}"
        super().__init__(
            culprit,
            f"{cause}: retention or compaction removed them, brokers lost them, or the topic was made anew",
            "Materialize the upstream asset again, or raise the topic's retention.ms, or min.compaction.lag.ms where it"
            " is compacted",
        )
        self.places = places
        self.records = records


class ReadRecord(NamedTuple):
    """A record as it is in Kafka, or decoded; headers and timestamp are asked of the message when needed."""

    value: Any
    key: Any
    message: confluent_kafka.Message


def read_publication(
    config: KafkaProducerConfig, publication: Publication, timeout: float = 30.0, *, partial: bool = False
) -> Iterator[ReadRecord]:
    """The records of a publication, Kafka partition by Kafka partition, each in its order.

    Args:
        config: The cluster.
        publication: What to read.
        timeout: Longest wait for the next records, seconds.
        partial: Take what is left of it, also if that is nothing. If not, what compaction removes of a table may be
            gone: tombstones, and of an upsert the records that it has superseded itself.

    Raises:
        GoneError: Records are gone (retention, compaction, a deleted topic), and it is not partial.
        KafkaError: The broker does not let us read, or it gives no more of them within the timeout.
    """
    if not publication.offsets:
        return
    connection = Connection(config)
    consumer = connection.reader(
        {
            "auto.offset.reset": "earliest" if partial else "error",
            "enable.partition.eof": True,
            # The request for more than there is of one Kafka partition holds up the next one's.
            "fetch.wait.max.ms": 5,
            "queued.max.messages.kbytes": 32768,
        }
    )
    try:
        yield from _read_all(connection, consumer, publication, timeout, partial=partial)
    finally:
        connection.close(consumer)


def _read_all(
    connection: Connection,
    consumer: confluent_kafka.Consumer,
    publication: Publication,
    timeout: float,
    *,
    partial: bool,
) -> Iterator[ReadRecord]:
    rows = 0
    short: list[PartitionOffsets] = []
    for offsets in publication.offsets:
        # A superseded record that is still there does not stand for another key's.
        keys: set[bytes] | None = set() if publication.superseded else None
        found, tombstones = yield from _read_partition(connection, consumer, offsets, timeout, keys)
        rows += found - tombstones if keys is None else len(keys)
        if found < offsets.records:
            short.append(offsets)
    gone = publication.rows - rows
    if short and not partial and gone > 0:
        raise GoneError(short, f"{gone} of {publication.rows} records are gone", gone)


def refuse_lost_topics(config: KafkaProducerConfig, publications: Iterable[Publication]) -> None:
    """Refuse to read publications whose topic was deleted: in one made anew, their offsets are others' records.

    Args:
        config: The cluster.
        publications: What is to be read.

    Raises:
        KafkaError: A topic was deleted, or made anew, or the broker does not answer within connect_timeout.
    """
    with contextlib.closing(Connection(config)) as connection:
        look = functools.cache(functools.partial(lost_since, connection, timeout=config.connect_timeout))
        for publication in publications:
            for topic in dict.fromkeys(offsets.topic for offsets in publication.offsets):
                lost = look(topic, publication.topic_ids.get(topic))
                if lost:
                    raise _lost(topic, f"the topic was {lost}")


def _lost(topic: str, cause: str) -> KafkaError:
    return KafkaError(
        f"topic {topic!r}", f"{cause} since the records were published", "Materialize the upstream asset again"
    )


def _read_partition(
    connection: Connection,
    consumer: confluent_kafka.Consumer,
    offsets: PartitionOffsets,
    timeout: float,
    keys: set[bytes] | None,
) -> Generator[ReadRecord, None, tuple[int, int]]:
    """The records of one Kafka partition; in the end, how many there were, and how many of them tombstones.

    In the end, `keys` holds those whose last record has a value.
    """
    consumer.assign([TopicPartition(offsets.topic, offsets.partition, offsets.first)])
    whole = len(offsets.runs) == 1
    starts = [first for first, _ in offsets.runs]
    found = tombstones = 0
    patience = _Patience(connection, offsets, timeout)
    while True:
        # Not more than there can be: consume waits for as many as it is asked for.
        messages: list[Any] = consumer.consume(max(1, min(_BATCH, offsets.records - found)), SLICE)
        for message in messages:
            error: confluent_kafka.KafkaError | None = message.error()
            if error is not None:
                patience.hear(error, message.offset())
                continue
            offset = message.offset()
            if offset < offsets.first:
                return found, tombstones  # the log was cut before it: its offsets are somebody else's now
            if offset > offsets.last:
                break
            if whole or offset <= offsets.runs[bisect.bisect_right(starts, offset) - 1][1]:
                if not found:
                    connection.connected()
                found += 1
                value = message.value()
                if value is None:
                    tombstones += 1
                if keys is not None:
                    (keys.discard if value is None else keys.add)(message.key())
                yield ReadRecord(value, message.key(), message)
        else:
            position = consumer.position([TopicPartition(offsets.topic, offsets.partition)])[0].offset
            if position <= offsets.last and patience.lasts(position):
                continue
        return found, tombstones


class _Patience:
    """How long to wait for the next record of a Kafka partition, and what is told meanwhile."""

    def __init__(self, connection: Connection, offsets: PartitionOffsets, timeout: float) -> None:
        self._connection = connection
        self._offsets = offsets
        self._timeout = timeout
        self._reached = offsets.first
        self._deadline = time.monotonic() + timeout
        self._passing: confluent_kafka.KafkaError | None = None
        self._end: int | None = None
        self._ended = math.inf

    def hear(self, error: confluent_kafka.KafkaError, offset: int | None) -> None:
        """Take what is told in a record's place, at an offset.

        Raises:
            KafkaError: It does not pass.
        """
        if error.name() == "_PARTITION_EOF":
            self._end, self._ended = offset, time.monotonic()
        else:
            _check(self._connection, error, self._offsets)
            self._passing = error

    def lasts(self, position: int) -> bool:
        """Whether to wait on for what follows a position; not if the log ends there.

        Records alone put the deadline off: an error that can be retried is told again and again.

        Raises:
            KafkaError: The time is up.
        """
        now = time.monotonic()
        if position > self._reached:
            self._reached, self._passing, self._deadline = position, None, now + self._timeout
            if self._end is not None and position > self._end:  # it has moved on
                self._ended = math.inf
        if now > self._ended + _LAG_SECONDS:
            return False
        if now <= self._deadline:
            return True
        if self._passing is None:
            raise self._connection.unreachable(self._timeout)
        error = self._connection.cause(self._passing, place_name(self._offsets.topic, self._offsets.partition))
        error.add(f"no record in {self._timeout:.1f} s")
        raise error


def _check(connection: Connection, error: confluent_kafka.KafkaError, offsets: PartitionOffsets) -> None:
    if error.name() in {"OFFSET_OUT_OF_RANGE", "_AUTO_OFFSET_RESET"}:
        raise GoneError([offsets], f"offset {offsets.first} is gone")
    if error.name() == "GROUP_AUTHORIZATION_FAILED":
        return  # the group is never used
    if remedy_of(error.name()) is not Remedy.RETRY:
        raise connection.cause(error, place_name(offsets.topic, offsets.partition))
