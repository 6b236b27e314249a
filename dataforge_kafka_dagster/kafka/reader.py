"""Reads a publication's records back: those and no others, whoever else writes to the topic."""

from __future__ import annotations

import bisect
import contextlib
import functools
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import confluent_kafka
from confluent_kafka import TopicPartition

from dataforge_kafka_dagster.kafka.config import KafkaProducerConfig
from dataforge_kafka_dagster.kafka.connection import SLICE, Connection
from dataforge_kafka_dagster.kafka.errors import KafkaError, Remedy, remedy_of
from dataforge_kafka_dagster.kafka.ledger import PartitionOffsets, Publication
from dataforge_kafka_dagster.kafka.topics import lost_since

_BATCH: Final = 5_000


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
        partial: Take what is left of it, also if that is nothing.

    Raises:
        KafkaError: Records are gone (retention, compaction, a deleted topic) and it is not partial, the broker does not
            let us read, or it gives no more of them within the timeout.
    """
    if not publication.offsets:
        return
    connection = Connection(config)
    consumer = connection.reader(
        {
            "auto.offset.reset": "earliest" if partial else "error",
            "enable.partition.eof": partial,
            # The request for more than there is of one Kafka partition holds up the next one's.
            "fetch.wait.max.ms": 5,
            "queued.max.messages.kbytes": 32768,
        }
    )
    try:
        for offsets in publication.offsets:
            yield from _read_partition(connection, consumer, offsets, timeout, partial)
    finally:
        consumer.close()


def refuse_lost_topics(config: KafkaProducerConfig, publications: Iterable[Publication], timeout: float) -> None:
    """Refuse to read publications whose topic was deleted: in one made anew, their offsets are others' records.

    Args:
        config: The cluster.
        publications: What is to be read.
        timeout: Longest wait for each topic's answer, seconds.

    Raises:
        KafkaError: A topic was deleted, or made anew, or the broker does not answer.
    """
    with contextlib.closing(Connection(config)) as connection:
        look = functools.cache(functools.partial(lost_since, connection, timeout=timeout))
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
    connection: Connection, consumer: confluent_kafka.Consumer, offsets: PartitionOffsets, timeout: float, partial: bool
) -> Iterator[ReadRecord]:
    consumer.assign([TopicPartition(offsets.topic, offsets.partition, offsets.first)])
    whole = len(offsets.runs) == 1
    starts = [first for first, _ in offsets.runs]
    found = 0
    reached = offsets.first
    passing: confluent_kafka.KafkaError | None = None
    deadline = time.monotonic() + timeout
    while True:
        # Not more than there can be: consume waits for as many as it is asked for.
        messages: list[Any] = consumer.consume(max(1, min(_BATCH, offsets.records - found)), SLICE)
        for message in messages:
            error: confluent_kafka.KafkaError | None = message.error()
            if error is not None:
                if error.name() == "_PARTITION_EOF":
                    return
                _check(connection, error, offsets)
                passing = error
                continue
            offset = message.offset()
            if offset < offsets.first:
                return  # the log was cut before it: what is at its offsets now is somebody else's
            if offset > offsets.last:
                break
            if whole or offset <= offsets.runs[bisect.bisect_right(starts, offset) - 1][1]:
                found += 1
                yield ReadRecord(message.value(), message.key(), message)
        else:
            position = consumer.position([TopicPartition(offsets.topic, offsets.partition)])[0].offset
            if position <= offsets.last:
                # By records alone: an error that can be retried is told again and again.
                if position > reached:
                    reached, passing, deadline = position, None, time.monotonic() + timeout
                elif time.monotonic() > deadline:
                    raise _no_more(connection, passing, offsets, timeout)
                continue
        break
    if found != offsets.records and not partial:
        raise _gone(offsets, f"{offsets.records - found} of {offsets.records} records are gone")


def _check(connection: Connection, error: confluent_kafka.KafkaError, offsets: PartitionOffsets) -> None:
    if error.name() in {"OFFSET_OUT_OF_RANGE", "_AUTO_OFFSET_RESET"}:
        raise _gone(offsets, f"offset {offsets.first} is gone")
    if error.name() == "GROUP_AUTHORIZATION_FAILED":
        return  # the group is never used
    if remedy_of(error.name()) is not Remedy.RETRY:
        raise connection.cause(error, _place(offsets))


def _no_more(
    connection: Connection, passing: confluent_kafka.KafkaError | None, offsets: PartitionOffsets, timeout: float
) -> KafkaError:
    if passing is None:
        return connection.unreachable(timeout)
    error = connection.cause(passing, _place(offsets))
    error.add(f"no record in {timeout:.1f} s")
    return error


def _gone(offsets: PartitionOffsets, cause: str) -> KafkaError:
    return KafkaError(
        f"{_place(offsets)}, offsets {offsets.first} to {offsets.last}",
        f"{cause}: retention or compaction removed them, or the topic was made anew",
        "Materialize the upstream asset again, or raise the topic's retention.ms",
    )


def _place(offsets: PartitionOffsets) -> str:
    return f"topic {offsets.topic!r}, Kafka partition {offsets.partition}"
