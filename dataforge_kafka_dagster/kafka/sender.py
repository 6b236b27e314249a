"""Sends the records of one publication: by a producer of its own, and no faster than brokers take them.

What cannot be sent goes to the dead-letter topic, if there is one, or ends the publication with an error that says why.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import operator
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import confluent_kafka
from confluent_kafka import KafkaException

from dataforge_kafka_dagster.kafka.config import KafkaTopicSpec, PublicationConfig, check_topic
from dataforge_kafka_dagster.kafka.connection import (
    SLICE,
    Connection,
    buffer_bytes,
    refuse_larger_than_buffer,
    timed_out,
)
from dataforge_kafka_dagster.kafka.dead_letters import dead_letter
from dataforge_kafka_dagster.kafka.deliveries import PURGED, Failure, Span, Track, as_bytes, shown
from dataforge_kafka_dagster.kafka.errors import (
    FENCED_CODES,
    UNKNOWN_TOPIC_CODES,
    InvalidRecordError,
    KafkaConfigError,
    KafkaError,
    Remedy,
    out_of_turn,
)
from dataforge_kafka_dagster.kafka.records import PLAIN, Chunk, KafkaRecord
from dataforge_kafka_dagster.kafka.serialization import ValueFormat, text_size
from dataforge_kafka_dagster.kafka.statistics import Statistics
from dataforge_kafka_dagster.kafka.topics import GONE, check_topic_exists, topic_trouble

# So many bytes may be on their way before anything is known of how fast brokers take them.
_AHEAD_BYTES: Final = 16_000_000
_STATISTICS_MS: Final = 1_000
# Less does not make records late.
_THROTTLED_MS: Final = 1_000
# What `produce` raises of what it has learned of the topic or producer, not of the record.
_NOT_OF_RECORD: Final = frozenset({"_FATAL", "_STATE", "_UNKNOWN_TOPIC", "TOPIC_AUTHORIZATION_FAILED"})
# To look why records were not delivered; part of what a failure may take longer than its deadline.
_DIAGNOSIS_SECONDS: Final = 0.5


class Sender:
    """The producer of one publication, its open transaction, and what was sent in it.

    One thread at a time may send or poll: it holds `lock`. `take_back`, after an error, waits for none.

    Args:
        config: Cluster, guarantee and deadlines.
        connection: The cluster.
        publication_id: Names the work, for errors.
        topic: Where records go that name no other.
        create_topic: How to create topics that are missing; None creates none.
        dead_topic: Where records go that cannot be published; None if they end the publication.

    Attributes:
        topic: As given.
        dead_topic: As given.
        tracks: Each topic that records go to, by name.
        statistics: What librdkafka tells of the producer.
        records: How many were sent.
        tombstones: How many of them had no value.
        bytes: Of their values and keys.
        dead_letters: How many went to the dead-letter topic instead.
        form: The format of the values; None before the first.
        in_transaction: Whether a transaction is open.
        broken: What ends the publication, also if somebody caught it.
        lock: For all that sends or polls.
    """

    def __init__(
        self,
        config: PublicationConfig,
        connection: Connection,
        *,
        publication_id: str,
        topic: str,
        create_topic: KafkaTopicSpec | None,
        dead_topic: str | None,
    ) -> None:
        self.topic = topic
        self.tracks: dict[str, Track] = {}
        self.statistics = Statistics()
        self.records = 0
        self.tombstones = 0
        self.bytes = 0
        self.dead_letters = 0
        self.form: ValueFormat | None = None
        self.in_transaction = False
        self.broken: KafkaError | None = None
        # Delivery reports come in order to one thread at a time only.
        self.lock = threading.RLock()
        self._config = config
        self._connection = connection
        self._publication_id = publication_id
        self._create_topic = create_topic
        self.dead_topic = dead_topic
        self._dead_track: Track | None = None
        self._exactly_once = config.delivery_guarantee == "exactly_once"
        self._producer: confluent_kafka.Producer | None = None
        self._options: dict[str, Any] = {}
        self._first_sent = 0.0
        # Up to which position and byte what has been sent is not known to be delivered, a pair for each chunk.
        self._sent_up_to: collections.deque[tuple[int, int]] = collections.deque()
        self._taken = 0

    def open(self, options: dict[str, Any]) -> concurrent.futures.Future[None]:
        """Make the producer, and look at the topics while it connects.

        Args:
            options: librdkafka's.

        Returns:
            Done when it is connected, or cannot be so soon.

        Raises:
            NoBrokersAvailable: No broker answered within connect_timeout, or none let us in.
            KafkaError: A topic does not exist, or this user may not write to it.
        """
        options = options | {"statistics.interval.ms": _STATISTICS_MS, "stats_cb": self.statistics.take}
        self._options = options
        connected = self._connect(options)
        self.add_topic(self.topic)
        if self.dead_topic is not None:
            self._dead_track = self._track_dead_letters(self.dead_topic)
        # The largest batch is the topic's too: the broker refuses a larger one whole, and librdkafka does not split it.
        largest = min((track.max_bytes for track in self.all_tracks if track.max_bytes), default=None)
        if largest is not None and largest < int(options["batch.size"]):
            connected = self._connect(options | {"batch.size": largest})
        return connected

    def _connect(self, options: dict[str, Any]) -> concurrent.futures.Future[None]:
        producer = self._producer = self._connection.producer(options)

        def connect() -> None:
            # The first answer comes over the bootstrap connection, which librdkafka then closes; if init_transactions
            # asks for its coordinator at that moment, it waits half a second to ask again.
            with contextlib.suppress(KafkaException):
                for _ in range(2):
                    producer.list_topics(self.topic, SLICE)

        return self._connection.aside(connect)

    def add_topic(self, topic: str) -> Track:
        """The track of a topic, which is looked at first if nothing was sent to it before.

        Raises:
            KafkaError: It does not exist, or this user may not write to it; or the publication has ended.
        """
        self.live()
        track = self.tracks.get(check_topic(topic))
        if track is None:
            track = self.tracks[topic] = self._track(topic, self._create_topic, ledger=self._exactly_once)
        return track

    def _track(self, topic: str, spec: KafkaTopicSpec | None, **how: bool) -> Track:
        timeout = self._config.producer.connect_timeout
        found = check_topic_exists(self._connection, topic, spec, timeout, **how)
        codec = self._options.get("compression.codec", self._options["compression.type"])
        return Track(topic, found, codec, cautious=self.dead_topic is not None)

    def _track_dead_letters(self, topic: str) -> Track:
        spec = self._create_topic
        if spec is not None:
            kept = {name: value for name, value in spec.configs.items() if name != "cleanup.policy"}
            spec = spec.model_copy(update={"configs": kept})
        track = self._track(topic, spec, any_number=True)
        if track.compacted:
            raise KafkaConfigError(
                f"dead-letter topic {topic!r}",
                "it is compacted: it takes no record without a key, and keeps one of each key",
                "Name a topic with cleanup.policy=delete",
            )
        return track

    def live(self) -> confluent_kafka.Producer:
        """The producer.

        Raises:
            KafkaError: It is not open, or not any more.
        """
        if self._producer is None:
            raise out_of_turn(
                f"publication {self._publication_id!r}", "it has ended, or not begun", "Send inside the with block"
            )
        return self._producer

    @property
    def name(self) -> str:
        """The publication, for errors."""
        return f"publication to {', '.join(self.tracks)!r}"

    @property
    def position(self) -> int:
        """Position of the next record among all that were given."""
        return self.records + self.dead_letters

    @property
    def all_tracks(self) -> list[Track]:
        """Those of its topics, and of the dead-letter topic."""
        return [*self.tracks.values(), *([self._dead_track] if self._dead_track else [])]

    def begin_transaction(self) -> None:
        """What is sent from here on is one transaction."""
        self.live().begin_transaction()
        self.in_transaction = True

    def write(self, chunk: Chunk, topic: str) -> None:
        """Send some records, and wait where brokers are far behind.

        Args:
            chunk: The records.
            topic: Where to.

        Raises:
            KafkaError: One cannot be sent, or what was sent before is lost.
        """
        track = self.add_topic(topic)
        if chunk.form is not None and self.form not in {None, chunk.form}:
            self._bury_all(chunk, topic)
            return
        self._first_sent = self._first_sent or time.monotonic()
        dead_letters = self.dead_letters
        try:
            if track.look_over(chunk):
                self._produce_each(chunk, topic, track)
            else:
                self._produce_all(chunk, topic, track)
        except KafkaError as error:
            if len(chunk.values) > 1:
                # Who catches it does not know which of the others were sent.
                self.broken = self.broken or error
            raise
        added = len(chunk.values) - (self.dead_letters - dead_letters)
        if added:
            self.form = self.form or chunk.form
        self.records += added
        self.tombstones += chunk.tombstones
        self.bytes += chunk.size
        self._poll(0)
        self.check()
        self._sent_up_to.append((self.position, self.bytes))
        while self._is_far_ahead():
            self._poll(SLICE)
            self.check()

    def _produce_all(self, chunk: Chunk, topic: str, track: Track) -> None:
        produce: Callable[..., None] = self.live().produce
        first = self.position
        end = first + len(chunk.values)
        values, keys = iter(chunk.values), iter(chunk.keys or itertools.repeat(None))
        extras = iter(chunk.extras or ())
        span = Span(first, end, as_bytes(chunk.keys[0]) if chunk.keys else None)
        report = track.reporter(span)
        # A publication's speed hangs on these loops: the try is around them, and nothing is counted in them.
        while True:
            try:
                if chunk.extras is None:
                    topics, places, reports = map(itertools.repeat, (topic, -1, report))
                    collections.deque(map(produce, topics, values, keys, places, reports), maxlen=0)
                else:
                    for value, key, (headers, partition, timestamp) in zip(values, keys, extras, strict=False):
                        produce(topic, value, key, partition, report, timestamp=timestamp, headers=headers)
            except (BufferError, KafkaException) as exception:
                at = len(chunk.values) - operator.length_hint(values) - 1
                index = span.end = first + at
                value, key = chunk.values[at], chunk.keys[at] if chunk.keys else None
                try:
                    if isinstance(exception, KafkaException):
                        raise self._refused(exception.args[0], topic, index, key) from None
                    extra = chunk.extras[at] if chunk.extras else PLAIN
                    record = {"value": value, "key": key, "on_delivery": report} | extra._asdict()
                    self._produce_with_room(topic, index, **record)
                    span.end = end
                except KafkaError as error:
                    self._bury_sent(value, key, index, topic, error)
                    span = Span(index + 1, end)
                    report = track.reporter(span)
            else:
                return

    def _is_far_ahead(self) -> bool:
        """Whether more is on its way than brokers may take in a third of delivery_timeout, as fast as they did so far.

        After that time records fail, also where nothing is wrong but a quota or a slow network. To wait for it has an
        end, since what is on its way is delivered or fails. A quota lets more through at first, for the silence before:
        so no more than a quarter of what brokers have taken is sent ahead on that account.
        """
        delivered = self.position - len(self.live())
        while self._sent_up_to and self._sent_up_to[0][0] <= delivered:
            self._taken = self._sent_up_to.popleft()[1]
        ahead = self.bytes - self._taken
        if ahead <= _AHEAD_BYTES:
            return False
        seconds = max(0.001, time.monotonic() - self._first_sent)
        in_time = self._taken / seconds * self._config.producer.delivery_timeout / 3
        return ahead > max(_AHEAD_BYTES, min(in_time, _AHEAD_BYTES + self._taken / 4))

    def _produce_each(self, chunk: Chunk, topic: str, track: Track) -> None:
        for index, (value, key, extra) in enumerate(chunk.each(), self.position):
            try:
                track.check(index, value, key, extra)
                report = track.reporter(Span(index, index + 1, as_bytes(key)))
                self._produce_with_room(topic, index, value=value, key=key, on_delivery=report, **extra._asdict())
            except KafkaError as error:
                self._bury_sent(value, key, index, topic, error)

    def bury(self, bad: Any, index: int, error: KafkaError, topic: str | None = None) -> None:
        """Send a bad record of a topic, the publication's own if None, to the dead-letter topic.

        Raises:
            KafkaError: Its error, if there is none.
        """
        if self._dead_track is None:
            raise error
        error.index = index
        track = self._dead_track
        with self.lock:
            self._first_sent = self._first_sent or time.monotonic()
            record = dead_letter(bad, error, topic or self.topic, self._longest_dead_letter)
            report = track.reporter(Span(index, index + 1, record["key"]))
            self._produce_with_room(track.topic, index, on_delivery=report, **record)
            self.dead_letters += 1

    def _bury_sent(
        self, value: bytes | str | None, key: bytes | str | None, index: int, topic: str, error: KafkaError
    ) -> None:
        """The same for a record that was encoded; an error that is not the record's own is raised."""
        is_its_own = isinstance(error, InvalidRecordError) or error.code == "MSG_SIZE_TOO_LARGE"
        if not is_its_own or error is self.broken:  # which is that of an earlier record
            raise error
        self.bury(KafkaRecord(value, key), index, error, topic)
        self.bytes -= text_size([value, key])
        self.tombstones -= value is None

    def _bury_all(self, chunk: Chunk, topic: str) -> None:
        """Treat records of another format than those before as bad; tombstones have none."""
        for value, key, extra in chunk.each():
            if value is None:
                self.write(Chunk([None], [key], [extra], text_size([key]), None, 1), topic)
                continue
            index = self.position
            error = InvalidRecordError(
                f"record {index}",
                f"its value is {chunk.form}, those before are {self.form}",
                "Publish values of one format per publication",
                index=index,
            )
            self.bury(KafkaRecord(value, key), index, error, topic)

    @property
    def _longest_dead_letter(self) -> int:
        """A third of the largest record, so that value, key and headers find room."""
        most = int(self._config.producer.librdkafka_config.get("message.max.bytes", 1_000_000))
        buffer = buffer_bytes(self._options)
        return min(most, buffer, (self._dead_track and self._dead_track.max_bytes) or most) // 3

    def _produce_with_room(self, topic: str, index: int, **record: Any) -> None:
        producer = self.live()
        deadline = time.monotonic() + self._config.producer.delivery_timeout + 5
        while True:
            try:
                producer.produce(topic, **record)
            except BufferError:
                size = text_size([record["value"], record["key"]])
                refuse_larger_than_buffer(size, self._options, f"record {index}{shown(record['key'])}, topic {topic!r}")
                # The buffer is full: wait for the broker. Records that wait too long fail by themselves.
                self._poll(SLICE)
                self.check()
                if time.monotonic() > deadline:
                    waited = self._config.producer.delivery_timeout
                    raise timed_out(f"topic {topic!r}, buffer_memory", waited, "_QUEUE_FULL") from None
            except KafkaException as exception:
                raise self._refused(exception.args[0], topic, index, record["key"]) from None
            else:
                return

    def _refused(
        self, error: confluent_kafka.KafkaError, topic: str, index: int, key: bytes | str | None
    ) -> KafkaError:
        """The error for a record that librdkafka does not even take."""
        if error.name() in _NOT_OF_RECORD:
            # Something has ended the producer or its transaction, or the topic: the next poll tells what.
            self._poll(SLICE)
        broken = self.failure()
        if broken is not None:
            return broken
        refused = self.explain(error, f"record {index}{shown(key)}, topic {topic!r}")
        refused.index, refused.key = index, as_bytes(key)
        return refused

    def explain(self, error: confluent_kafka.KafkaError, culprit: str) -> KafkaError:
        """Our error; a transaction that the broker aborted for its length is told apart from another attempt."""
        if error.name() in FENCED_CODES and self.transaction_seconds > self._config.transaction_timeout:
            return self._too_long(culprit, error.name())
        return self._connection.cause(error, culprit)

    @property
    def transaction_seconds(self) -> float:
        """How long the transaction has run by the broker's clock, which its first record starts."""
        return time.monotonic() - self._first_sent if self._first_sent else 0.0

    def _too_long(self, culprit: str, code: str | None = None) -> KafkaError:
        """The error for a transaction that the broker aborts soon, or has aborted with this code."""
        said = f" [{code}]" if code else ""
        return KafkaError(
            culprit,
            f"its transaction has run for {self.transaction_seconds:.0f} s and {self.records} records, longer than"
            f" transaction_timeout={self._config.transaction_timeout:g} s, after which the broker aborts it{said}",
            "Raise transaction_timeout (at most the broker's transaction.max.timeout.ms), or publish less at a time",
            code=code,
            remedy=Remedy.FAIL,
        )

    def failure(self) -> KafkaError | None:
        """Why this publication cannot succeed any more, if so."""
        if self._connection.fatal is not None:
            return self.explain(self._connection.fatal, self.name)
        failed = [(track, track.first_failure) for track in self.all_tracks if track.first_failure is not None]
        if failed and self.broken is None:
            # One topic's failure purges what is on its way to the others.
            at_fault = (one for one in failed if one[1].error.name() not in PURGED)
            self.broken = self._delivery_failure(*next(at_fault, failed[0]))
        return self.broken

    def _delivery_failure(self, track: Track, first: Failure) -> KafkaError:
        error = first.error
        if error.name() == "_PURGE_QUEUE":
            error = self._transaction_error() or error
        # Else later records may have been delivered.
        place, last, key = track.place(first, settled=self._give_up() and self._exactly_once)
        counts = ", ".join(f"{count} x {code}" for code, count in track.failures.items())
        which = f"record {place}" if place == last else f"one of records {place} to {last}"
        lost = f"{sum(track.failures.values())} records not delivered ({counts})"
        failure = self.explain(error, f"{which}{shown(key)}, topic {track.topic!r}: {lost}")
        if failure.code == "_MSG_TIMED_OUT" and self.statistics.throttled > _THROTTLED_MS:
            failure.add(
                f"brokers held requests back for {self.statistics.throttled / 1000:.0f} s, by a quota of this user or"
                " client",
                "Lower buffer_memory to what the quota lets through within delivery_timeout, or raise delivery_timeout"
                " (and transaction_timeout), or the quota",
            )
        if failure.code == "_MSG_TIMED_OUT" or failure.code in UNKNOWN_TOPIC_CODES:
            trouble = topic_trouble(self._connection, track.topic, _DIAGNOSIS_SECONDS)
            if failure.code in UNKNOWN_TOPIC_CODES:
                # It was there when it was looked at, and may be for all but one broker (librdkafka 4401).
                failure.remedy, failure.fix = Remedy.RETRY, "Try again"
                trouble = trouble or "a broker did not know the topic for a moment"
            if trouble is not None:
                failure.add(trouble)
        if failure.code == "MSG_SIZE_TOO_LARGE":
            most = "not known to this user" if track.max_bytes is None else track.max_bytes
            several = first.span.end - first.span.first > 1
            failure.add(
                f"the topic's max.message.bytes is {most}, for a batch of compressed records",
                f"If no record is that large, lower batch_size to {track.max_bytes or 'it'}" if several else "",
            )
        failure.counts, failure.key = dict(track.failures), key
        failure.index, failure.among = (place, None) if place == last else (None, (place, last))
        return failure

    def gone_topic(self) -> str | None:
        """A topic that was deleted, among those that brokers tell of at once."""
        deadline = time.monotonic() + _DIAGNOSIS_SECONDS
        looks = ((topic, deadline - time.monotonic()) for topic in self.tracks)
        return next((t for t, left in looks if left > 0 and topic_trouble(self._connection, t, left) == GONE), None)

    def _give_up(self) -> bool:
        """Take back what is on its way, since nothing can be committed; whether every record was settled in time."""
        producer = self.live()
        for track in self.all_tracks:
            track.given_up = True
        with contextlib.suppress(Exception):  # a fatal error may come out here, in several shapes
            # confluent-kafka 2.16 has its argument the wrong way round: blocking=False waits for every thread, one of
            # which may be at a slow name server, and all of Python with it.
            producer.purge()
            self._connection.serve(producer.flush, SLICE, self.has_failed)
        return len(producer) == 0

    def _transaction_error(self) -> confluent_kafka.KafkaError | None:
        """Why librdkafka gave up the transaction, as it does without a word when the broker refuses a Kafka partition.

        Any transactional call tells; to begin one inside another does nothing else.
        """
        try:
            self.live().begin_transaction()
        except KafkaException as exception:
            error: confluent_kafka.KafkaError = exception.args[0]
            return error if error.txn_requires_abort() or error.fatal() else None
        return None

    def has_failed(self) -> bool:
        """Whether librdkafka has given the transaction up."""
        return self.in_transaction and self._transaction_error() is not None

    def check(self) -> None:
        """Raise what ends the publication, if something does."""
        failure = self.failure()
        if failure is not None:
            raise failure
        if self.in_transaction and self.transaction_seconds > self._config.transaction_timeout:
            raise self._too_long(self.name)

    def _poll(self, seconds: float) -> None:
        self._serve(self.live().poll, seconds)

    def _serve(self, wait: Callable[[float], object], seconds: float) -> None:
        producer, troubles = self.live(), self._connection.troubles
        left = len(producer) if troubles else 0
        if self._connection.serve(wait, seconds, self.has_failed):
            taken = left and len(producer) < left and self._connection.troubles == troubles
            if taken and not any(track.first_failure for track in self.all_tracks):
                # Brokers take records again: what fails later has another cause.
                self._connection.connected()
            return
        fatal = self._transaction_error() if self.in_transaction else None
        if fatal is not None:
            self._connection.note(KafkaException(fatal))
        self.check()

    def flush(self) -> None:
        """Wait until every record is delivered.

        Raises:
            KafkaError: One is not, or not in time.
        """
        producer = self.live()
        deadline = time.monotonic() + self._config.producer.delivery_timeout + 5
        while len(producer):
            # Not poll: flush does not wait for batches to fill.
            self._serve(producer.flush, SLICE)
            self.check()
            if time.monotonic() > deadline:
                raise timed_out(f"{len(producer)} records not yet delivered", self._config.producer.delivery_timeout)
        self.check()

    def take_back(self, timeout: float) -> None:
        """Take back what is on its way, and abort the transaction."""
        if self._producer is None:
            return
        # For other threads, which see their records taken back.
        self.broken = self.broken or out_of_turn(
            self.name, "it was given up", "Look for the error that has ended its with block"
        )
        with contextlib.suppress(Exception):
            self._producer.purge()
            if self._connection.fatal is None:
                self.abort_transaction(timeout)

    def abort_transaction(self, timeout: float) -> None:
        """Abort the transaction, if one is open.

        Raises:
            KafkaError: The broker refused, or did not answer in time.
        """
        if self.in_transaction:
            self._connection.resume(self.live().abort_transaction, timeout, self.name, self.has_failed)
            self.in_transaction = False

    def let_go(self) -> confluent_kafka.Producer | None:
        """The producer, which sends nothing from now on."""
        producer, self._producer = self._producer, None
        self.in_transaction = False
        return producer
