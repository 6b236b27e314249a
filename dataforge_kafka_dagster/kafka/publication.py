"""One publication: all records of one output, visible together and once, or not at all.

A publication is one transaction (KIP-98) of a producer of its own. Its ledger, what was published where, is the
metadata of consumer-group offsets that the same transaction commits, so it exists exactly if the records do. The next
attempt fences the last one (`init_transactions`), then reads the ledger, and publishes nothing if the work is done.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime as dt
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

import confluent_kafka
from typing_extensions import Self

from dataforge_kafka_dagster.kafka.config import (
    KafkaProducerConfig,
    KafkaTopicSpec,
    PublicationConfig,
    check_on_bad_record,
    check_topic,
    publication_options,
)
from dataforge_kafka_dagster.kafka.connection import SLICE, Connection, logger
from dataforge_kafka_dagster.kafka.deliveries import Track
from dataforge_kafka_dagster.kafka.errors import (
    FENCED_CODES,
    FencedError,
    InvalidRecordError,
    KafkaConfigError,
    KafkaError,
    Remedy,
    fix_for,
    out_of_turn,
)
from dataforge_kafka_dagster.kafka.ledger import Ledger, Publication
from dataforge_kafka_dagster.kafka.records import Chunk, as_record, encode_record, key_fields
from dataforge_kafka_dagster.kafka.schemas import KafkaSchema, SchemaEncoders, schema_encoders
from dataforge_kafka_dagster.kafka.sender import Sender
from dataforge_kafka_dagster.kafka.serialization import DEFAULT_ENCODERS, Encoders, Headers, format_of
from dataforge_kafka_dagster.kafka.sources import BadRecordTaker, chunks, is_repeatable
from dataforge_kafka_dagster.kafka.telemetry import PublicationSpan
from dataforge_kafka_dagster.kafka.topics import are_different, current, end_offsets, lost_since

_PROGRESS_SECONDS: Final = 5.0
# Fewer records are not worth the requests that take the place of their delivery reports.
_MANY: Final = 20_000
_ABORT_SECONDS: Final = 5.0
# For an interrupt, and where the broker is the trouble: what is left open, the next attempt or the broker aborts.
_HASTY_ABORT_SECONDS: Final = 0.5
# Where nobody has answered the last request either.
_VAIN_ABORT_SECONDS: Final = 0.05
# A publication that took longer is worth another request, whether its topic is still the same.
_LOOK_AGAIN_SECONDS: Final = 1.0


class OtherWriterError(KafkaError):
    """Somebody else wrote to the topic during a publication without delivery reports, which `settle` repeats.

    Attributes:
        ledger: What the publisher's ledger began with: as long as that is so, no later attempt has published.
    """

    def __init__(self, culprit: str, cause: str, fix: str, ledger: str) -> None:
        super().__init__(culprit, cause, fix, remedy=Remedy.RETRY)
        self.ledger = ledger


class PublicationWriter:
    """Publishes one publication: a context manager that commits at its end, and aborts on an exception.

    If an earlier attempt has published the same publication id, `replayed` is true from the start, what is sent is
    ignored, and `publication` says where the records are.

    Several threads may send, if they are done when the with block ends. Their records mix, and a position that an error
    names counts from where its `send_all` began.

    Args:
        config: Cluster, guarantee and deadlines.
        transactional_id: Names the publisher, see `make_transactional_id`.
        publication_id: Names the work, the same for each attempt at it.
        topic: Where records go that name no other.
        key: Field or column that is the key of records that have none; several make a JSON object.
        value_schema: The schema of values; None goes by their type: JSON, text or bytes.
        key_schema: The schema of keys; None writes them as text.
        create_topic: How to create its topics if they are missing; the config's create_topics if None.
        on_bad_record: 'fail' or a dead-letter topic; the config's on_bad_record if None.
        on_progress: Called every 5 seconds or so with records, bytes and seconds so far.
        reports: Whether Python hears of each record's delivery. If not, which is faster, the offsets are those between
            the ends of the Kafka partitions before and after: exact if nobody else wrote to the topic meanwhile, and
            else `OtherWriterError` ends the publication. Needs exactly_once, one topic and no dead-letter topic.
        of_retry: Whether an earlier attempt may have published it, perhaps to another topic: all are looked into then.
        repeats: What ended the same without reports. If another one has been published since, it is not repeated.

    Raises:
        NoBrokersAvailable: No broker answered within connect_timeout, or none let us in.
        OtherWriterError: Without reports only: somebody else wrote to the topic.
        FencedError: Another attempt took over.
        KafkaError: The topic does not exist, an ACL is missing, a record was refused, a deadline passed.
        InvalidRecordError: A record cannot be encoded.
    """

    def __init__(
        self,
        config: PublicationConfig,
        *,
        transactional_id: str,
        publication_id: str,
        topic: str,
        key: str | Sequence[str] | None = None,
        value_schema: KafkaSchema | None = None,
        key_schema: KafkaSchema | None = None,
        create_topic: KafkaTopicSpec | None = None,
        on_bad_record: str | None = None,
        on_progress: Callable[[int, int, float], object] | None = None,
        reports: bool = True,
        of_retry: bool = False,
        repeats: OtherWriterError | None = None,
    ) -> None:
        if not config.producer.acknowledged:
            raise KafkaConfigError(
                "acks=0",
                "the brokers do not tell what they have got, so nothing can be said of a publication",
                "Set acks to 'all' or 1, and keep 0 for single records",
            )
        if create_topic is not None and not isinstance(create_topic, KafkaTopicSpec):
            raise KafkaConfigError(
                f"create_topic={create_topic!r}", "it is no KafkaTopicSpec", "Give KafkaTopicSpec(partitions=...)"
            )
        self.topic = check_topic(topic)
        self.on_bad: BadRecordTaker | None = None
        """Takes bad records to the dead-letter topic; None if they end the publication. For `chunks`."""
        self.keeps_places = False
        """Whether Kafka partitions that are added meanwhile end the publication: keys would be in others."""
        self.superseded = 0
        """How many records another one of the same key has replaced; told by who counts them."""
        self.partitioner = ""
        """How keys choose their Kafka partitions, by librdkafka's name; known inside the with block."""
        self.publication: Publication | None = None
        self._config = config
        self._transactional_id = transactional_id
        self._publication_id = publication_id
        self._of_retry = of_retry
        self._repeats = repeats
        self._key = key_fields(key)
        self._schemas = (value_schema, key_schema)
        self._encoders: dict[str, SchemaEncoders] = {}
        self._on_progress = on_progress or _log_progress
        self._exactly_once = config.delivery_guarantee == "exactly_once"
        self._connection = Connection(config.producer)
        self._span: PublicationSpan | None = None
        self._ledger = Ledger(self._connection, transactional_id, self.topic, config.producer.delivery_timeout)
        dead_topic = _dead_letter_topic(on_bad_record or config.on_bad_record, self.topic)
        self._sender = Sender(
            config,
            self._connection,
            publication_id=publication_id,
            topic=self.topic,
            create_topic=create_topic or config.create_topics,
            dead_topic=dead_topic,
        )
        if dead_topic is not None:
            self.on_bad = self._sender.bury
        self._reports = reports or not self._exactly_once or dead_topic is not None
        self._ends_before: list[int] | None = None
        self._alone = False
        self._began = time.monotonic()
        self._reported = self._began
        self._committing = False
        # Each `send_all`, and each `send` of another thread, that has not returned yet.
        self._under_way: set[object] = set()
        self._thread = threading.get_ident()

    @property
    def replayed(self) -> bool:
        """Whether an earlier attempt had published it all."""
        return self.publication is not None and self.publication.replayed

    def __enter__(self) -> Self:
        if self._span is not None:
            raise out_of_turn(
                f"publication {self._publication_id!r}",
                "it was begun before, and what is added now would be taken for what it had published",
                "Begin another one",
            )
        self._span = PublicationSpan(self.topic, self._publication_id, self._transactional_id)
        try:
            self._open()
        except BaseException as error:
            self._abandon(error)
            raise
        return self

    def _open(self) -> None:
        config = self._config
        connection = self._connection
        connection.make_ready()
        if self._exactly_once:
            self._ledger.warm_up()
        options = publication_options(config, self._transactional_id)
        self.partitioner = str(options["partitioner"])
        if not self._reports:
            options["delivery.report.only.error"] = True
        connected = self._sender.open(options)
        if not self._exactly_once:
            return
        concurrent.futures.wait([connected], 2 * SLICE)
        producer = self._sender.live()
        name = f"transactional id {self._transactional_id!r}, {connection.name}"
        try:
            connection.resume(
                producer.init_transactions, config.producer.delivery_timeout, name, self._sender.has_failed
            )
        except KafkaError as error:
            if error.code == "_TIMED_OUT":
                error.add("no broker coordinates its transactions", fix_for("COORDINATOR_NOT_AVAILABLE"))
            if error.code != "INVALID_TRANSACTION_TIMEOUT":
                raise
            raise KafkaConfigError(
                f"transaction_timeout={config.transaction_timeout:g} s, {connection.name}",
                f"the brokers allow no transaction as long as that [{error.code}]",
                error.fix,
                code=error.code,
            ) from None
        done = self._ledger.read(self._publication_id, of_retry=self._of_retry)
        if done is not None and _is_there(done, connection, config.producer.connect_timeout, self.topic_ids):
            self.publication = done
            self._end_span(self.publication)
            self._close()
            return
        if self._repeats is not None and self._repeats.ledger != self._ledger.last:
            raise FencedError(
                f"publication to {self.topic!r}",
                "another run has published it anew since this attempt began",
                "Nothing of this attempt is visible; look at the other run",
                code="_FENCED",
                remedy=Remedy.FAIL,
            )
        self._sender.begin_transaction()

    def encoders(self, topic: str | None = None) -> Encoders:
        """How the values and keys of a topic become bytes; a schema that is given is looked up or registered.

        Args:
            topic: The topic; the publication's own if None.

        Raises:
            KafkaError: The registry refused a schema or does not answer, or there is none.
        """
        if not any(self._schemas):
            return DEFAULT_ENCODERS
        topic = topic or self.topic
        with self._sender.lock:
            if topic not in self._encoders:
                self._encoders[topic] = schema_encoders(self._config.schema_registry, topic, *self._schemas)
            return self._encoders[topic]

    def send(
        self,
        value: Any,
        key: Any = None,
        headers: Headers | None = None,
        partition: int | None = None,
        timestamp: int | dt.datetime | None = None,
        *,
        topic: str | None = None,
    ) -> None:
        """Add one record to the publication.

        Args:
            value: Mapping, dataclass or pydantic model (sent as JSON), str, bytes, or None (a tombstone); a
                `KafkaRecord` has the other arguments in it.
            key: str, bytes, int, date, time, UUID, or a mapping or list of those.
            headers: Mapping or (name, value) pairs of str to str, bytes or None.
            partition: Kafka partition, from 0; None lets the key decide.
            timestamp: Milliseconds since the epoch or an aware datetime; None is now.
            topic: Another topic than the publication's own; both are committed together.

        Raises:
            KafkaError: As the class says.
        """
        if self.replayed:
            return
        if threading.get_ident() == self._thread:
            self._send(value, key, headers, partition, timestamp, topic)
        else:
            with self._whole("send"):
                self._send(value, key, headers, partition, timestamp, topic)

    def _send(
        self,
        value: Any,
        key: Any,
        headers: Headers | None,
        partition: int | None,
        timestamp: int | dt.datetime | None,
        topic: str | None,
    ) -> None:
        with self._sender.lock:
            record = as_record(value, key, headers, partition, timestamp, self._sender.position)
            encoders = self.encoders(topic)
            try:
                value_bytes, key_bytes, extra = encode_record(record, self._sender.position, self._key, encoders)
            except InvalidRecordError as error:
                self._sender.bury(record, self._sender.position, error, topic)
                return
            size = len(value_bytes or b"") + len(key_bytes or b"")
            form = None if record.value is None else encoders.form or format_of(type(record.value))
            chunk = Chunk([value_bytes], [key_bytes], [extra], size, form, int(value_bytes is None))
            self._write(chunk, topic or self.topic)

    def send_all(self, output: Any, key: str | Sequence[str] | None = None, *, topic: str | None = None) -> None:
        """Add an output's records to the publication; generators are streamed.

        Args:
            output: A mapping, dataclass, pydantic model, str, bytes or `KafkaRecord`; a list, iterator or generator of
                those; or a data frame.
            key: Field or column that is the record's key; the publication's own if None.
            topic: Another topic than the publication's own.

        Raises:
            KafkaError: As the class says.
        """
        if not self.replayed:
            fields = self._key if key is None else key
            on_bad = self.on_bad and functools.partial(self._sender.bury, topic=topic)
            with self._whole():  # also while the first record is being made
                encoded = chunks(output, fields, self._sender.position, self.encoders(topic), on_bad)
                with contextlib.closing(encoded):
                    self._send_chunks(encoded, topic)

    def send_chunks(self, encoded: Iterable[Chunk], *, topic: str | None = None) -> None:
        """Add records that are encoded already, as `chunks` does.

        Raises:
            KafkaError: As the class says.
        """
        if self.replayed:
            return
        with self._whole():
            self._send_chunks(encoded, topic)

    def _send_chunks(self, encoded: Iterable[Chunk], topic: str | None) -> None:
        if topic:  # before a record of it is made
            with self._sender.lock:
                self._sender.add_topic(topic)
        for chunk in encoded:
            with self._sender.lock:
                self._write(chunk, topic or self.topic)

    @contextlib.contextmanager
    def _whole(self, name: str = "send_all") -> Iterator[None]:
        """If not all records inside can be sent, nothing is committed even if somebody catches the error.

        Who catches it does not know which records were sent; and what ends another thread's call, nobody may look at.
        """
        before, call = self._sender.position, object()
        self._under_way.add(call)
        try:
            yield
        except BaseException as error:
            position = self._sender.position
            if position > before or threading.get_ident() != self._thread:
                at = f"after record {position - 1}" if position > before else "before its first record"
                if not isinstance(error, KafkaError):
                    error = KafkaError(
                        f"publication to {self.topic!r}",
                        f"a {name} ended {at} with {type(error).__name__}: {error}",
                        "Let that error end the with block, or catch it where the records are made",
                    )
                self._sender.broken = self._sender.broken or error
            raise
        finally:
            self._under_way.discard(call)

    def _write(self, chunk: Chunk, topic: str) -> None:
        sender = self._sender
        track = sender.add_topic(topic)
        if not self._reports and topic != self.topic:
            raise KafkaConfigError("reports=False", f"{topic!r} is not the publication's own topic", "Set it to True")
        if not self._reports and self._ends_before is None:
            self._ends_before = self._ends(track)
        sender.write(chunk, topic)
        if not (self._reports or self._alone) and sender.records >= _MANY // 2:
            # Rather now than after all of them.
            self._flush()
            self._alone = True
        now = time.monotonic()
        if now - self._reported >= _PROGRESS_SECONDS:
            self._reported = now
            self._on_progress(sender.records, sender.bytes, now - self._began)

    def commit(self) -> Publication:
        """Wait for every record and commit; called by the end of the with block.

        Raises:
            KafkaError: As the class says. After a time-out of the commit itself the outcome is unknown: the next
                attempt reads it from the ledger.
        """
        with self._sender.lock:
            return self._commit()

    def _commit(self) -> Publication:
        if self.publication is not None:
            return self.publication
        sender = self._sender
        producer = sender.live()
        if self._under_way:
            raise out_of_turn(
                f"publication {self._publication_id!r}",
                "another thread, or a generator, is still sending to it",
                "Wait for them inside the with block",
            )
        if not self._committing:
            self._flush()
        for expired in filter(None, (track.expired for track in sender.tracks.values())):
            logger.warning("%s", expired)
        offsets = tuple(itertools.chain.from_iterable(track.offsets for track in sender.tracks.values()))
        publication = Publication(
            self._publication_id,
            self._transactional_id,
            self.topic,
            sender.records,
            sender.bytes,
            sender.form,
            offsets,
            replayed=False,
            seconds=0.0,
            dead_letters=sender.dead_letters,
            dead_letter_topic=sender.dead_topic,
            topic_ids=self.topic_ids,
            partition_counts=self.partition_counts,
            tombstones=sender.tombstones,
            superseded=self.superseded,
            partitioner=self.partitioner,
            schemas=tuple(schema for encoders in self._encoders.values() for schema in encoders.registered),
        )
        if self._exactly_once:
            self._commit_transaction(producer, publication)
        self.publication = dataclasses.replace(
            publication, seconds=time.monotonic() - self._began, statistics=sender.statistics.summary()
        )
        self._end_span(self.publication)
        self._close()
        return self.publication

    @property
    def topic_ids(self) -> dict[str, str]:
        """Kafka's own id of each topic that this publication goes to."""
        return {track.topic: track.topic_id for track in self._sender.tracks.values() if track.topic_id is not None}

    @property
    def partition_counts(self) -> dict[str, int]:
        """How many Kafka partitions each of these topics has."""
        return {track.topic: track.partitions for track in self._sender.tracks.values()}

    def _ends(self, track: Track) -> list[int]:
        """The offset that each Kafka partition's next record would get."""
        timeout = self._config.producer.delivery_timeout
        return end_offsets(self._connection, track.topic, track.partitions, timeout)

    def _find_offsets(self) -> None:
        """Learn the offsets from the Kafka partitions' ends, before and after, if they leave room for no other record.

        What a broker has acknowledged to acks=all is before the end that it tells (KIP-207), and records that others
        had under way may only widen the range: if it is as long as what was sent, it holds exactly that.
        """
        track = self._sender.tracks[self.topic]
        try:
            before, after = self._ends_before or [], self._ends(track)
        except KafkaError:
            self._look_again(track)
            raise
        written = sum(after) - sum(before)
        if written > self._sender.records:
            # If it was an attempt that has taken over, the broker says so now; a new producer would fence that one.
            self._sender.abort_transaction(_ABORT_SECONDS)
            raise OtherWriterError(
                f"publication to {self.topic!r}",
                f"{written} offsets were given for its {self._sender.records} records: somebody else writes there too",
                "Publish it with delivery reports",
                self._ledger.last,
            )
        track.set_ranges(before, after)

    def _flush(self) -> None:
        """Wait until all is delivered, and count it."""
        self._sender.flush()
        self._check_topics()
        if self._ends_before is not None:
            self._find_offsets()
        delivered = sum(offsets.records for track in self._sender.all_tracks for offsets in track.offsets)
        if delivered != self._sender.position:
            unseen = (
                ": a broker may have refused some of them and taken later ones, as one that has just become leader does"
                if self._ends_before is None
                else ": a broker that lacks some of them may have become leader (unclean.leader.election.enable)"
            )
            raise KafkaError(
                self._sender.name,
                f"{self._sender.position} records were sent, but {delivered} acknowledged{unseen}",
                "Try again",
                remedy=Remedy.REBUILD,
            )

    def _check_topics(self) -> None:
        """Refuse to commit records of a topic that has changed since they were sent.

        In a long publication, and where keys are to stay in their Kafka partitions, the topic is looked at once more;
        in others only what its offsets tell is seen.
        """
        tracks = list(self._sender.all_tracks)
        for track in tracks:
            if track.moved_back:
                raise _made_anew(track)
        if self._needs_same_partitions or self._sender.transaction_seconds > _LOOK_AGAIN_SECONDS:
            for track in tracks:
                if not self._look_again(track):
                    break  # If nobody answers, the commit has more time to wait for that.

    @property
    def _needs_same_partitions(self) -> bool:
        """Whether the topics must have no more Kafka partitions than before: for their keys, or to know all ends."""
        return self.keeps_places or self._ends_before is not None

    def _look_again(self, track: Track) -> bool:
        """Look whether a topic was deleted, and perhaps made anew, or has more Kafka partitions where that matters.

        Returns:
            Whether the brokers answered, which can wait unless it matters.

        Raises:
            KafkaError: It was, or has; or the brokers do not say, and that matters.
        """
        limits = self._config.producer
        timeout = limits.delivery_timeout if self._needs_same_partitions else limits.connect_timeout
        try:
            now = current(self._connection, track.topic, timeout)
        except KafkaError as error:
            if error.code == "UNKNOWN_TOPIC_OR_PART":
                raise _made_anew(track) from None
            if error.remedy is not Remedy.RETRY or self._needs_same_partitions:
                raise
            return False
        if are_different(track.topic_id, now.id):
            raise _made_anew(track)
        added = self._needs_same_partitions and now.partitions != track.partitions
        if added and track.topic in self._sender.tracks:  # the dead-letter topic may have more
            raise KafkaError(
                self._sender.name,
                f"Kafka partitions were added to {track.topic!r} meanwhile, to which records may have gone",
                "Try again",
                remedy=Remedy.RETRY,
            )
        return True

    def _commit_transaction(self, producer: confluent_kafka.Producer, publication: Publication) -> None:
        timeout = self._config.producer.delivery_timeout
        name = f"commit of {publication.records} records to {', '.join(self._sender.tracks)!r}"
        try:
            if not self._committing:  # else it goes on
                self._ledger.write(producer, publication, name)
                self._committing = True
            self._connection.resume(producer.commit_transaction, timeout, name, self._sender.has_failed)
        except KafkaError as error:
            raise self._commit_error(error, name) from None
        self._sender.in_transaction = False

    def _commit_error(self, error: KafkaError, name: str) -> KafkaError:
        fatal = self._connection.fatal
        failure = self._sender.failure() if fatal is None else self._sender.explain(fatal, name)
        error = failure or error
        if not self._committing:
            if error.code == "_TIMED_OUT":
                gone = self._sender.gone_topic()
                if gone is None:
                    error.add("no broker takes its ledger", fix_for("COORDINATOR_NOT_AVAILABLE"))
                else:
                    error.add(f"the topic {gone!r} does not exist any more")
            return error
        unknown = "whether it was committed is not known"
        if isinstance(error, FencedError):
            # It may be, before the other attempt began: the broker's answer was lost.
            return FencedError(
                error.culprit,
                f"{error.cause}; {unknown}",
                "Look at the run of the other attempt; to learn the outcome, re-execute this run from failure: it reads"
                " the ledger",
                code=error.code,
                remedy=Remedy.FAIL,
            )
        if fatal is not None and fatal.name() in FENCED_CODES:
            error.add(unknown, "To learn the outcome, re-execute this run from failure: it reads the ledger")
        elif failure is None and (error.remedy is Remedy.RETRY or error.code == "UNKNOWN"):
            error.remedy = Remedy.RETRY
            error.add(unknown, "Try again: the next attempt reads the outcome from the ledger")
        return error

    def abort(self, timeout: float = _ABORT_SECONDS) -> None:
        """Give up: nothing of the publication becomes visible. Called by an exception in the with block."""
        try:
            self._sender.take_back(timeout)
        finally:
            self._close()

    def _end_span(self, done: Publication) -> None:
        if self._span is not None:
            records = collections.Counter({done.topic: 0})
            for offsets in done.offsets:
                records[offsets.topic] += offsets.records
            self._span.succeed(records, done.bytes, replayed=done.replayed)

    def _abandon(self, error: BaseException) -> None:
        passing = isinstance(error, KafkaError) and error.remedy is Remedy.RETRY
        try:
            if passing and self._connection.silent:
                self.abort(_VAIN_ABORT_SECONDS)
            else:
                self.abort(_HASTY_ABORT_SECONDS if passing or not isinstance(error, Exception) else _ABORT_SECONDS)
        finally:
            if self._span is not None:
                self._span.fail(error)

    def _close(self) -> None:
        # Neither is closed: a producer with an open transaction waits for minutes for a dead broker, a consumer for its
        # coordinator.
        self._connection.close(self._sender.let_go(), *self._ledger.let_go())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandon(error)
            return
        try:
            self.commit()
        except BaseException as failure:
            self._abandon(failure)
            raise

    def predecessor(self, known: Iterable[str]) -> Publication | None:
        """What was committed last with this transactional id, if the ledger has it and it is none of the known.

        Its attempt ended before it could tell anybody: it was killed after its commit. Its id is not known.

        Args:
            known: Publication ids.

        Raises:
            KafkaError: The broker does not answer.
        """
        return self._ledger.other_than((self._publication_id, *known))


def _dead_letter_topic(on_bad_record: str, topic: str) -> str | None:
    """Where bad records of a topic go; None if they end the publication."""
    if on_bad_record == "fail":
        return None
    named = check_on_bad_record(on_bad_record).replace("{topic}", topic)
    if check_topic(named) == topic:
        raise KafkaConfigError(
            f"on_bad_record={on_bad_record!r}",
            "it is the publication's own topic",
            "Name another one, such as '{topic}.dead'",
        )
    return named


def _made_anew(track: Track) -> KafkaError:
    return KafkaError(
        f"publication to {track.topic!r}",
        "the topic was deleted or made anew meanwhile, and what had been sent is gone with it",
        "Try again",
        remedy=Remedy.RETRY,
    )


def find_published(
    config: KafkaProducerConfig, transactional_id: str, publication_id: str, topic: str
) -> Publication | None:
    """What this publisher has published last, to whatever topic, if it is this publication.

    Args:
        config: The cluster.
        transactional_id: Names the publisher.
        publication_id: Names the work.
        topic: The publication's own topic.

    Raises:
        NoBrokersAvailable: No broker answered within connect_timeout, or none let us in.
        KafkaError: The brokers do not answer, or others were published since.
    """
    connection = Connection(config)
    ledger = Ledger(connection, transactional_id, topic, config.delivery_timeout)

    try:
        # To see within connect_timeout whether a broker is there.
        ids = {topic: current(connection, topic, config.connect_timeout).id}
    except KafkaError as error:
        if error.code != "UNKNOWN_TOPIC_OR_PART":
            raise
        ids = {}
    try:
        found = ledger.read(publication_id, of_retry=True)
        return found if found and _is_there(found, connection, config.connect_timeout, ids) else None
    finally:
        connection.close(*ledger.let_go())


def _is_there(done: Publication, connection: Connection, timeout: float, known: Mapping[str, str | None]) -> bool:
    """Whether the topics of what an earlier attempt has published are still the same.

    Brokers forget a group's offsets in a topic that is deleted, unless the group's coordinator dies at that moment.

    Args:
        done: What the ledger says.
        connection: The cluster.
        timeout: Longest wait for each topic's answer, seconds.
        known: The present ids of some topics.

    Raises:
        KafkaError: Some are the same, and some are not; or the brokers do not answer.
    """
    holding = {offsets.topic for offsets in done.offsets} or {done.topic}
    ids = {topic: one for topic, one in done.topic_ids.items() if topic in holding}
    gone = [t for t, one in ids.items() if known.get(t) != one and lost_since(connection, t, one, timeout)]
    if gone and len(gone) < len(ids):
        raise KafkaError(
            f"publication {done.publication_id!r}",
            f"an earlier attempt had published it, and of its topics {', '.join(gone)} was deleted or made anew since",
            "Start a new run, which publishes again to all of them",
            remedy=Remedy.FAIL,
        )
    return not gone


def publish(
    config: PublicationConfig,
    output: Any,
    *,
    transactional_id: str,
    publication_id: str,
    topic: str,
    key: str | Sequence[str] | None = None,
    value_schema: KafkaSchema | None = None,
    key_schema: KafkaSchema | None = None,
    create_topic: KafkaTopicSpec | None = None,
    on_bad_record: str | None = None,
    on_progress: Callable[[int, int, float], object] | None = None,
) -> Publication:
    """Publish an output's records in one publication, and say where they are.

    A list or frame of many records is sent without delivery reports first, and with them if another writer is seen.

    Args:
        config: Cluster, guarantee and deadlines.
        output: A record or many, in any form that `KafkaIOManager` takes; a generator is streamed.
        transactional_id: Names the publisher, see `make_transactional_id`.
        publication_id: Names the work, the same for each attempt at it.
        topic: Where the records go.
        key: Field or column that is the key of records that have none; several make a JSON object.
        value_schema: The schema of values; None goes by their type: JSON, text or bytes.
        key_schema: The schema of keys; None writes them as text.
        create_topic: How to create its topics if they are missing; the config's create_topics if None.
        on_bad_record: 'fail' or a dead-letter topic; the config's on_bad_record if None.
        on_progress: Called every 5 seconds or so with records, bytes and seconds so far.

    Returns:
        The publication; `Publication.replayed` if an earlier attempt had published it.

    Raises:
        NoBrokersAvailable: No broker answered within connect_timeout, or none let us in.
        FencedError: Another attempt took over.
        InvalidRecordError: The output or a record of it cannot be published.
        KafkaError: The topic does not exist, an ACL is missing, a record was refused, a deadline passed. Nothing of the
            publication is visible, unless the error says that its outcome is not known, or delivery_guarantee is
            'at_least_once'.
    """

    def attempt(reports: bool, repeats: OtherWriterError | None) -> Publication:
        with PublicationWriter(
            config,
            transactional_id=transactional_id,
            publication_id=publication_id,
            topic=topic,
            key=key,
            value_schema=value_schema,
            key_schema=key_schema,
            create_topic=create_topic,
            on_bad_record=on_bad_record,
            on_progress=on_progress,
            reports=reports,
            repeats=repeats,
        ) as writer:
            writer.send_all(output)
        return writer.commit()

    return settle(output, attempt)


def settle(output: Any, attempt: Callable[[bool, OtherWriterError | None], Publication]) -> Publication:
    """Publish an output without delivery reports if it is large and can be sent again, and else with them.

    Args:
        output: What is published.
        attempt: Publishes it; takes `reports` and `repeats` for `PublicationWriter`.

    Returns:
        The publication. If another writer was seen on the topic, nothing of the first attempt became visible.
    """
    other = None
    if is_repeatable(output) and len(output) >= _MANY:
        try:
            return attempt(False, None)  # noqa: FBT003
        except OtherWriterError as error:
            logger.info("%s; it is published again, with delivery reports", error.cause)
            other = error
    return attempt(True, other)  # noqa: FBT003


def _log_progress(records: int, size: int, seconds: float) -> None:
    logger.info("Published %d records, %.1f MB, in %.0f s; not committed yet", records, size / 1e6, seconds)
