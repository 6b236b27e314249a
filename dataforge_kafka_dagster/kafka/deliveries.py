"""One topic of a publication: what it may refuse, and where its records were delivered."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import confluent_kafka

from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaError
from dataforge_kafka_dagster.kafka.ledger import PartitionOffsets
from dataforge_kafka_dagster.kafka.records import Chunk, Extra
from dataforge_kafka_dagster.kafka.serialization import text_size
from dataforge_kafka_dagster.kafka.topics import Topic

PURGED: Final = frozenset({"_PURGE_QUEUE", "_PURGE_INFLIGHT"})
"""Codes of records that were taken back, for the fault of others or by the publication itself."""
# Said of a record, or of the batch that it is in; all other codes could have met any record.
_OF_RECORDS: Final = frozenset(
    {"INVALID_RECORD", "INVALID_TIMESTAMP", "MSG_SIZE_TOO_LARGE", "RECORD_LIST_TOO_LARGE", "_INVALID_DIFFERENT_RECORD"}
)
# Bytes of a batch of one record without the record's value, key and headers, at least and at most; and of a header, at
# most, beside its name and value. From https://kafka.apache.org/documentation/#messageformat
_OVERHEAD: Final = (68, 90)
_HEADER_OVERHEAD: Final = 10
# What a record has at most when compressed: for each byte that it has by zlib at level 1 with this strategy, and for
# each of its own. Snappy and lz4 repeat text as zlib does, but write whole bytes, as a fixed code nearly does.
_WHOLE_BYTES: Final = (zlib.Z_FIXED, 2.5, 0.05)
_PACKED: Final = {
    "gzip": (zlib.Z_DEFAULT_STRATEGY, 1.05, 0.0),
    "zstd": (zlib.Z_DEFAULT_STRATEGY, 1.05, 0.0),
    "snappy": _WHOLE_BYTES,
    "lz4": _WHOLE_BYTES,
}


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

    Args:
        topic: The topic.
        found: As it is.
        codec: How records are compressed.
        cautious: Whether `check` refuses what the broker may refuse; if not, only what it is sure to.

    Attributes:
        max_bytes: The largest batch that it takes, after compression; None if that is not known.
        compacted: Whether it takes only records with a key.
        timestamps: How old and how far ahead a timestamp may be, milliseconds; None if it may be anything.
        retention: After how long the topic deletes records, milliseconds; None if it does not, or that is not known.
        oldest: The first timestamp that was given, milliseconds since the epoch; None if none was.
        failures: Records that failed, by error code.
        first_failure: The first of them, or the first that was at fault.
        moved_back: Whether an offset came that is before those of earlier records: the topic was made anew.
        given_up: Whether the publication has taken back what was on its way: that is not counted as failures.
    """

    def __init__(self, topic: str, found: Topic, codec: str, *, cautious: bool) -> None:
        self.topic = topic
        self._codec = codec
        self._cautious = cautious
        self.partitions = found.partitions
        self.topic_id = found.id
        self.failures: collections.Counter[str] = collections.Counter()
        self.max_bytes = found.max_bytes
        self.compacted = found.compacted
        self.timestamps = found.timestamps
        self.retention = found.retention
        self.oldest: int | None = None
        self._blameless = False
        self.first_failure: Failure | None = None
        self.given_up = False
        self.moved_back = False
        self._first_lost: Span | None = None
        self._starts: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}
        self._next: dict[int, int] = {}

    def look_over(self, chunk: Chunk) -> bool:
        """Note how old some records are, and tell whether one is to be checked by itself: the topic may refuse it."""
        if self.compacted and (chunk.keys is None or None in chunk.keys):
            return True
        headers = 0
        if chunk.extras is not None:
            all_headers, partitions, timestamps = zip(*chunk.extras, strict=True)
            given = [timestamp for timestamp in timestamps if timestamp]
            if given:
                oldest = min(given)
                self.oldest = oldest if self.oldest is None else min(oldest, self.oldest)
                if not (self.age_fits(oldest) and self.age_fits(max(given))):
                    return True
            if max(partitions) >= self.partitions:
                return True
            # Of all records together, which is less work than to find the most that one has.
            pairs = list(itertools.chain.from_iterable(filter(None, all_headers)))
            headers = _headers_size(pairs) + _HEADER_OVERHEAD * len(pairs)
        if self.max_bytes is None or chunk.size + headers + _OVERHEAD[1] <= self.max_bytes:
            return False
        # A character may take four bytes.
        longest = sum(max(map(len, filter(None, texts or ())), default=0) for texts in chunk[:2])
        return 4 * longest + headers + _OVERHEAD[1] > self.max_bytes

    def check(self, index: int, value: bytes | str | None, key: bytes | str | None, extra: Extra) -> None:
        """Refuse a record that the topic refuses, which ends a transaction if it is sent.

        Raises:
            InvalidRecordError: Its Kafka partition, key or timestamp is not what the topic takes.
            KafkaError: It is too large.
        """
        topic = self.topic
        if extra.partition >= self.partitions:
            raise InvalidRecordError(
                f"record {index}",
                f"topic {topic!r} has no Kafka partition {extra.partition}",
                f"Use 0 to {self.partitions - 1}, or None and let the key decide",
                index=index,
            )
        if self.compacted and key is None:
            raise InvalidRecordError(
                f"record {index}",
                f"it has no key, and topic {topic!r} is compacted: it takes no record without one",
                "Give every record a key, such as kafka/key in the asset's metadata",
                index=index,
            )
        if self.timestamps is not None and extra.timestamp and not self.age_fits(extra.timestamp):
            age = round(time.time() * 1000) - extra.timestamp
            which, most = ("before", self.timestamps[0]) if age > 0 else ("after", self.timestamps[1])
            raise InvalidRecordError(
                f"record {index}",
                f"timestamp={extra.timestamp} is {abs(age) / 1000:.0f} s {'old' if age > 0 else 'ahead'}, topic"
                f" {topic!r} has message.timestamp.{which}.max.ms={most}",
                "Give another timestamp (milliseconds since the epoch), or raise that setting of the topic, which is"
                " message.timestamp.difference.max.ms before Kafka 3.6",
                index=index,
            )
        size = self._size_if_too_large(value, key, extra)
        if size is not None:
            code = "MSG_SIZE_TOO_LARGE"
            error = KafkaError(
                f"record {index}{shown(key)}, topic {topic!r}",
                f"it has {size}, the topic's max.message.bytes is {self.max_bytes} [{code}]",
                "Split the record, or raise max.message.bytes on the topic",
                code=code,
            )
            error.index, error.key = index, as_bytes(key)
            raise error

    def _size_if_too_large(self, value: bytes | str | None, key: bytes | str | None, extra: Extra) -> str | None:
        """The size that a record has as a batch of its own, in words, if that is too large for the topic."""
        headers = extra.headers or ()
        size = text_size([value, key]) + _headers_size(headers)
        overhead = _OVERHEAD[1] + _HEADER_OVERHEAD * len(headers) if self._cautious else _OVERHEAD[0]
        if self.max_bytes is None or size + overhead <= self.max_bytes:
            return None
        packed = _PACKED.get(self._codec)
        if packed is None:
            return f"{size} bytes"
        if not self._cautious:
            return None  # it may fit; the broker decides
        parts = [as_bytes(value), as_bytes(key), *(part for name, text in headers for part in (name.encode(), text))]
        strategy, by_zlib, by_size = packed
        packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
        shortest = len(packer.compress(b"".join(filter(None, parts)))) + len(packer.flush())
        most = round(by_zlib * shortest + by_size * size) + overhead
        return f"up to {most} bytes compressed by {self._codec}" if most > self.max_bytes else None

    @property
    def expired(self) -> str | None:
        """What is to be said if a record's timestamp is older than what the topic keeps."""
        age = 0 if self.oldest is None else time.time() * 1000 - self.oldest
        if self.retention is None or age <= self.retention:
            return None
        return (
            f"topic {self.topic!r} deletes records {self.retention / 1000:.0f} s after their timestamps (retention.ms),"
            f" and timestamp={self.oldest} of one of these was {age / 1000:.0f} s ago: Kafka may delete it at any time."
            " Timestamps are milliseconds since the epoch; give none for the time of sending, or raise retention.ms"
        )

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
                if following.get(partition, -1) != offset:
                    if offset is None or offset < 0:
                        return  # the broker has it without knowing where, or has lost it: the commit finds one too few
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
        if self.given_up and code in PURGED:
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
            settled: Whether every record has been delivered or has failed, and in a Kafka partition none was delivered
                after one that failed.
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
            self.moved_back = self.moved_back or offset < self._next[partition]
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


def shown(key: bytes | str | None) -> str:
    """A key, for an error's culprit."""
    return f" (key {key[:100]!r})" if key else ""


def as_bytes(key: bytes | str | None) -> bytes | None:
    """What librdkafka writes for a key or value."""
    return key.encode() if isinstance(key, str) else key


def _headers_size(headers: Iterable[tuple[str, bytes | None]]) -> int:
    """Bytes of headers."""
    return sum(len(name) + len(text or b"") for name, text in headers)
