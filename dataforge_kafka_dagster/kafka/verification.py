"""What of a publication is not in its topics any more."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import confluent_kafka
from confluent_kafka import TopicPartition

from dataforge_kafka_dagster.kafka.config import KafkaProducerConfig
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.errors import place_name
from dataforge_kafka_dagster.kafka.ledger import PartitionOffsets, Publication
from dataforge_kafka_dagster.kafka.reader import GoneError, read_publication
from dataforge_kafka_dagster.kafka.topics import lost_since


class Missing(NamedTuple):
    """Records of a publication that are not where it put them.

    Attributes:
        topic: The topic; with commas if it may be any of several.
        partition: Kafka partition; None for all of them.
        records: How many, as far as known.
        cause: What happened to them.
    """

    topic: str
    partition: int | None
    records: int
    cause: str


def find_missing(
    config: KafkaProducerConfig, publication: Publication, *, thorough: bool = False, timeout: float = 30.0
) -> list[Missing]:
    """What of a publication is gone: by retention, or because its topic was deleted, or made anew.

    Compares the topic's id, and each Kafka partition's first and last offset, with the publication's own. Compaction
    takes records from between them: only reading finds that.

    Args:
        config: The cluster.
        publication: What to look for.
        thorough: Also read all of its records, and compare their number and their bytes.
        timeout: Longest wait for each answer, seconds.

    Returns:
        Nothing if it is there, whole.

    Raises:
        KafkaError: The brokers could not be asked.
    """
    missing = _missing_by_offsets(config, publication, timeout)
    if thorough and not missing:
        missing = list(_missing_when_read(config, publication, timeout))
    return missing


def _missing_by_offsets(config: KafkaProducerConfig, publication: Publication, timeout: float) -> list[Missing]:
    topics = dict.fromkeys(offsets.topic for offsets in publication.offsets)
    if not topics:
        return []
    connection = Connection(config)
    reader = connection.reader()
    try:
        return [
            found for topic in topics for found in _missing_of_topic(connection, reader, topic, publication, timeout)
        ]
    finally:
        # Let go of, not closed: after an interrupt a call is still waiting in it.
        connection.close(reader)


def _missing_of_topic(
    connection: Connection, reader: confluent_kafka.Consumer, topic: str, publication: Publication, timeout: float
) -> Iterator[Missing]:
    places = [offsets for offsets in publication.offsets if offsets.topic == topic]
    records = sum(offsets.records for offsets in places)
    lost = lost_since(connection, topic, publication.topic_ids.get(topic), timeout)
    if lost is not None:
        yield Missing(topic, None, records, f"the topic was {lost}, or this is another cluster")
        return
    for offsets in places:
        ask = functools.partial(
            reader.get_watermark_offsets, TopicPartition(topic, offsets.partition), timeout, cached=False
        )
        low, high = connection.in_thread(ask, timeout, place_name(topic, offsets.partition))
        before = _records_before(offsets, low)
        if before:
            cause = f"it begins at offset {low} now: retention or somebody deleted what was before"
            yield Missing(topic, offsets.partition, before, cause)
        elif high <= offsets.last:
            cause = f"it ends at offset {high} now: it was made anew, or lost records that were not replicated"
            yield Missing(topic, offsets.partition, offsets.records - _records_before(offsets, high), cause)


def _records_before(offsets: PartitionOffsets, end: int) -> int:
    return sum(max(0, min(last + 1, end) - first) for first, last in offsets.runs)


def _missing_when_read(config: KafkaProducerConfig, publication: Publication, timeout: float) -> Iterator[Missing]:
    records = size = 0
    try:
        for record in read_publication(config, publication, timeout):
            records += 1
            size += len(record.value or b"") + len(record.key or b"")
    except GoneError as error:
        gone = publication.records - records if error.records is None else error.records
        topics = dict.fromkeys(offsets.topic for offsets in error.places)
        partition = error.places[0].partition if len(error.places) == 1 else None
        yield Missing(", ".join(topics), partition, gone, error.cause)
        return
    # Where compaction has removed tombstones, their bytes are not known.
    if records == publication.records and size != publication.bytes:
        cause = f"its {records} records have {size} bytes, but {publication.bytes} bytes were published"
        yield Missing(", ".join(publication.topics), None, 0, cause)
