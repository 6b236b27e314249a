"""One topic of a publication: what it may refuse, and where its records were delivered."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import confluent_kafka

from dataforge_kafka_dagster.kafka.ledger import PartitionOffsets
from dataforge_kafka_dagster.kafka.records import Chunk
from dataforge_kafka_dagster.kafka.topics import Topic


class Track:
    """Delivery reports of one topic, collapsed into runs of offsets.

    Attributes:
        max_bytes: The largest batch that it takes, after compression; None if that is not known.
        compacted: Whether it takes only records with a key.
        timestamps: How old and how far ahead a timestamp may be, milliseconds; None if it may be anything.
        report: The delivery callback: it records and never raises. A function, which Python calls faster than a method.
        first_failure: Its error, the record's key, and the record's position if it is known.
    """

    def __init__(self, topic: str, found: Topic) -> None:
        self.topic = topic
        self.partitions = found.partitions
        self.topic_id = found.id
        self.failures: collections.Counter[str] = collections.Counter()
        self.max_bytes = found.max_bytes
        self.compacted = found.compacted
        self.timestamps = found.timestamps
        self._blameless = False
        self.first_failure: tuple[confluent_kafka.KafkaError, bytes | None, int | None] | None = None
        self._starts: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}
        self._next: dict[int, int] = {}
        self.report = self.reporter()

    def may_refuse(self, chunk: Chunk) -> bool:
        """Whether a record of some is to be looked at by itself: the topic may refuse it."""
        if self.compacted and (chunk.keys is None or None in chunk.keys):
            return True
        headers = 0
        if chunk.extras is not None:
            all_headers, partitions, timestamps = zip(*chunk.extras, strict=True)
            given = [timestamp for timestamp in timestamps if timestamp]
            if given and not (self.age_fits(min(given)) and self.age_fits(max(given))):
                return True
            if max(partitions) >= self.partitions:
                return True
            headers = max(map(headers_size, filter(None, all_headers)), default=0)
        if self.max_bytes is None or chunk.size + headers * len(chunk.values) <= self.max_bytes:
            return False
        # A character may take four bytes.
        longest = sum(max(map(len, filter(None, texts or ())), default=0) for texts in chunk[:2])
        return 4 * longest + headers > self.max_bytes

    def age_fits(self, timestamp: int) -> bool:
        """Whether the topic takes a timestamp, in milliseconds."""
        if self.timestamps is None:
            return True
        return -self.timestamps[1] <= round(time.time() * 1000) - timestamp <= self.timestamps[0]

    def reporter(self, index: int | None = None) -> Callable[[confluent_kafka.KafkaError | None, Any], None]:
        """A delivery callback, which knows the record's position if it is of one record only."""
        following = self._next

        def report(err: confluent_kafka.KafkaError | None, msg: Any) -> None:
            if err is None:
                partition = msg.partition()
                offset = msg.offset()
                if following.get(partition) != offset:
                    self._begin(partition, offset)
                following[partition] = offset + 1
            else:
                # Said of the records beside the one at fault.
                blameless = err.name() == "_INVALID_DIFFERENT_RECORD"
                self.failures[err.name()] += 1
                if self.first_failure is None or (not blameless and self._blameless):
                    self.first_failure, self._blameless = (err, msg.key(), index), blameless

        return report

    def _begin(self, partition: int, offset: int) -> None:
        if partition in self._next:
            self._ends.setdefault(partition, []).append(self._next[partition] - 1)
        self._starts.setdefault(partition, []).append(offset)

    def set_ranges(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Take all offsets from some ends to others, by Kafka partition, for delivered."""
        for partition, (start, end) in enumerate(zip(before, after, strict=True)):
            if start < end:
                self._starts[partition], self._next[partition] = [start], end

    @property
    def offsets(self) -> tuple[PartitionOffsets, ...]:
        """What was delivered so far, by Kafka partition."""
        return tuple(
            PartitionOffsets(
                self.topic,
                partition,
                tuple(zip(starts, [*self._ends.get(partition, ()), self._next[partition] - 1], strict=True)),
            )
            for partition, starts in sorted(self._starts.items())
        )


def headers_size(headers: Iterable[tuple[str, bytes | None]]) -> int:
    """Bytes of a record's headers."""
    return sum(len(name) + len(text or b"") for name, text in headers)
