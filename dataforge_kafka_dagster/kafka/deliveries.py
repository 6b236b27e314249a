"""One topic of a publication: what it may refuse, and where its records were delivered."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import confluent_kafka

from dataforge_kafka_dagster.kafka.ledger import PartitionOffsets
from dataforge_kafka_dagster.kafka.records import Chunk
from dataforge_kafka_dagster.kafka.topics import Topic

_PURGED: Final = frozenset({"_PURGE_QUEUE", "_PURGE_INFLIGHT"})
# Said of a record, or of the batch that it is in; all other codes could have met any record.
_OF_RECORDS: Final = frozenset(
    {"INVALID_RECORD", "INVALID_TIMESTAMP", "MSG_SIZE_TOO_LARGE", "RECORD_LIST_TOO_LARGE", "_INVALID_DIFFERENT_RECORD"}
)


@dataclasses.dataclass
class Span:
    """Records that were given to librdkafka one after the other.

    Attributes:
        first: Position of the first.
        end: Position after the last.
        key: Key of the first.
        lost: How many of them have failed.
        lost_key: Key of the first that failed.
    """

    first: int
    end: int
    key: bytes | None = None
    lost: int = 0
    lost_key: bytes | None = None


class Failure(NamedTuple):
    """One record that failed.

    Attributes:
        error: Why.
        key: Its key.
        span: What it was sent with.
        before: How many of those failed before it.
    """

    error: confluent_kafka.KafkaError
    key: bytes | None
    span: Span
    before: int


class Track:
    """Delivery reports of one topic, collapsed into runs of offsets.

    Attributes:
        max_bytes: The largest batch that it takes, after compression; None if that is not known.
        compacted: Whether it takes only records with a key.
        timestamps: How old and how far ahead a timestamp may be, milliseconds; None if it may be anything.
        failures: Records that failed, by error code.
        first_failure: The first of them, or the first that was at fault.
        given_up: Whether the publication has taken back what was on its way: that is not counted as failures.
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
        self.first_failure: Failure | None = None
        self.given_up = False
        self._first_lost: Span | None = None
        self._starts: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}
        self._next: dict[int, int] = {}

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

    def reporter(self, span: Span) -> Callable[[confluent_kafka.KafkaError | None, Any], None]:
        """The delivery callback of some records: it records and never raises.

        A function, which Python calls faster than a method.
        """
        following = self._next

        def report(err: confluent_kafka.KafkaError | None, msg: Any) -> None:
            if err is None:
                partition = msg.partition()
                offset = msg.offset()
                if following.get(partition) != offset:
                    self._begin(partition, offset)
                following[partition] = offset + 1
            else:
                self._fail(err, msg.key(), span)

        return report

    def _fail(self, err: confluent_kafka.KafkaError, key: bytes | None, span: Span) -> None:
        code = err.name()
        if span.lost == 0:
            span.lost_key = key
            if self._first_lost is None or span.first < self._first_lost.first:
                self._first_lost = span
        span.lost += 1
        if self.given_up and code in _PURGED:
            return
        self.failures[code] += 1
        # Said of the records beside the one at fault.
        blameless = code == "_INVALID_DIFFERENT_RECORD"
        if self.first_failure is None or (not blameless and self._blameless):
            self.first_failure, self._blameless = Failure(err, key, span, span.lost - 1), blameless

    def place(self, failure: Failure, *, settled: bool) -> tuple[int, int, bytes | None]:
        """Where the first record that failed is: the first and last position that it may have, and its key.

        Nothing is counted for it while records are delivered, so it is what is left: the first that was not delivered.

        Args:
            failure: The first failure.
            settled: Whether every record has been delivered or has failed, and those of a Kafka partition in order.
        """
        _, key, span, before = failure
        if failure.error.name() not in _OF_RECORDS and self._first_lost is not None:
            span, before = self._first_lost, 0
            key = span.lost_key
            if settled and span.lost == span.end - span.first:
                return span.first, span.first, span.key
        if settled and self.partitions == 1:
            place = span.end - span.lost + before
            return place, place, key
        return span.first, span.end - 1, key

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
