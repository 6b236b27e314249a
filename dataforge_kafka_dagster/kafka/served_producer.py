"""librdkafka's producer of single records, and the one thread that serves it.

Delivery reports come to that thread alone. A report that comes to a thread whose wait a signal ends would be lost, and
threads that wait for each other's would be late.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final

import confluent_kafka

from dataforge_kafka_dagster.kafka.config import KafkaProducerConfig, producer_options
from dataforge_kafka_dagster.kafka.connection import (
    SLICE,
    Connection,
    keep_for_ever,
    logger,
    refuse_larger_than_buffer,
    timed_out,
)
from dataforge_kafka_dagster.kafka.errors import KafkaError, KafkaTimeoutError, Remedy, fix_for, place_name
from dataforge_kafka_dagster.kafka.records import Extra

DeliveryCallback = Callable[["confluent_kafka.KafkaError | None", confluent_kafka.Message], object]

# The thread's wait for reports, and for the next record.
_POLL_SECONDS: Final = 0.1
_IDLE_SECONDS: Final = 1.0
# A full buffer is asked again so soon: some thousand records later.
_FULL_SECONDS: Final = 0.001
# How long an end waits for a delivery callback that does not return.
_TOLD_SECONDS: Final = 1.0
# How long the end of a process waits for what was not flushed.
_EXIT_SECONDS: Final = 5.0
# So many failures a second are logged one by one.
_LOGGED_A_SECOND: Final = 10
# librdkafka takes a batch that a broker refused for delivered when the next one is, which was on its way already: a
# broker that has just become a Kafka partition's leader takes any first batch (confluent-kafka-go issue 921).
_NOT_ACKNOWLEDGED: Final = "a broker has taken later records, but said of this one only that it refused it, or nothing"

_alive: Final[weakref.WeakSet[ServedProducer]] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class RecordMetadata:
    """Where a delivered record is; always true.

    Attributes:
        topic: The topic.
        partition: Kafka partition, from 0.
        offset: Offset in it, from 0; -1 if acks=0, where the broker does not tell.
        timestamp: Milliseconds since the epoch; None if the broker did not tell.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int | None


class Report:
    """What becomes of one record, for librdkafka to call.

    Attributes:
        topic: Where the record goes.
        key: Its key.
        partition: The Kafka partition that was asked for; -1 for none.
        callback: Called with what became of it; None if the failure is to be told by `ServedProducer.flush`.
        future: The same for who waits.
        told: Whether it has been told.
    """

    __slots__ = ("_producer", "callback", "future", "key", "partition", "told", "topic")

    def __init__(
        self, producer: ServedProducer, topic: str, key: bytes | None, partition: int, callback: DeliveryCallback | None
    ) -> None:
        self._producer = producer
        self.topic = topic
        self.key = key
        self.partition = partition
        self.callback = callback
        self.future: concurrent.futures.Future[RecordMetadata] = concurrent.futures.Future()
        self.future.set_running_or_notify_cancel()  # what is sent cannot be taken back
        self.told = False

    def __call__(self, err: confluent_kafka.KafkaError | None, msg: confluent_kafka.Message) -> None:
        """Tell it."""
        self._producer.tell(self, err, msg)


class ServedProducer:
    """A producer whose delivery reports are told by a thread of its own, which the first record starts.

    Args:
        config: The options.
        connection: The cluster.

    Attributes:
        closing: Whether records are taken from delivery callbacks only.

    Raises:
        KafkaConfigError: librdkafka refuses an option.
    """

    def __init__(self, config: KafkaProducerConfig, connection: Connection) -> None:
        self.closing = False
        self._config = config
        self._connection = connection
        self._options = producer_options(config)
        self._producer = connection.producer(self._options)
        # Held by who calls the client. The thread, which closes it, takes it for that alone: a signal handler may flush
        # in the midst of a send.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._untold: dict[Report, None] = {}
        self._failures: collections.Counter[str] = collections.Counter()
        self._counting = threading.RLock()
        self._first_failure: KafkaError | None = None
        self._late = False
        self._told = 0
        self._is_telling = False
        self._flushes: set[object] = set()
        self._is_resting = False
        # Unlike those of an Event, its put may be called by a signal handler in the midst of a put.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopping = False
        self._forsaken = False
        self._ended = threading.Event()
        self._logged = _Logged()
        _alive.add(self)

    @property
    def inherited(self) -> bool:
        """Whether this is a forked process, and the producer its parent's: that thread is not here."""
        return self._connection.inherited

    @property
    def failed(self) -> bool:
        """Whether to make a new producer: this one is closed, an error has ended it, or what was sent last was late.

        A client never finds a topic again that it knew and that was made anew with another leader (librdkafka 4898).
        """
        return self.ended or self._connection.fatal is not None or (self._late and not self._untold)

    @property
    def ended(self) -> bool:
        """Whether it is closed."""
        return self._stopping or self._ended.is_set()

    @property
    def left(self) -> int:
        """How many records are on their way, or not told of yet."""
        with self._lock:
            if self._thread is None or self._ended.is_set():  # without a thread, what it counts are events
                return 0
            return len(self._untold) or len(self._producer) or self._is_telling

    @property
    def in_callback(self) -> bool:
        """Whether the caller is a delivery callback, before the end of which nothing is delivered."""
        return self._thread is threading.current_thread()

    def send(
        self, topic: str, value: bytes | None, key: bytes | None, extra: Extra, callback: DeliveryCallback | None
    ) -> concurrent.futures.Future[RecordMetadata]:
        """Send one record; a full buffer makes this wait.

        Args:
            topic: The topic.
            value: Encoded.
            key: Encoded.
            extra: Headers, Kafka partition and timestamp.
            callback: Called when it is delivered or has failed; None if `flush` is to tell of a failure.

        Raises:
            KafkaTimeoutError: The buffer stayed full for delivery_timeout, or is full in a delivery callback.
            KafkaError: It was refused at once, or the producer is closed.
        """
        if self.inherited:
            raise KafkaError(
                f"topic {topic!r}",
                f"process {os.getpid()} was forked, and the threads of this producer are its parent's",
                "Make a producer in each process",
            )
        report = Report(self, topic, key, extra.partition, callback)
        deadline = time.monotonic() + self._config.delivery_timeout
        while True:
            try:
                self._send(topic, value, key, extra, report)
            except BufferError:
                self._wait_for_room(topic, len(value or b"") + len(key or b""), deadline)
            except confluent_kafka.KafkaException as exception:
                error = exception.args[0]
                if error.name() == "_FATAL" and not self.in_callback:
                    self._learn_what_is_fatal()
                told = self._connection.fatal or error
                raise logged(self._connection.cause(told, _culprit(topic, extra.partition))) from None
            else:
                return report.future

    def _send(self, topic: str, value: bytes | None, key: bytes | None, extra: Extra, report: Report) -> None:
        headers: Any = extra.headers
        with self._lock:
            # What is sent while close waits would keep it waiting; a callback may send on until the end.
            if self.ended or (self.closing and not self.in_callback):
                raise KafkaError(f"topic {topic!r}", "the producer is closed", "Send before close()", code="_STATE")
            self._start(topic)
            self._producer.produce(
                topic, value, key, extra.partition, report, timestamp=extra.timestamp, headers=headers
            )
        # Not before: a signal handler may flush in between.
        self._untold[report] = None
        if report.told:
            self._untold.pop(report, None)
        if self._is_resting:
            self._wake.put(None)

    def _start(self, topic: str) -> None:
        """Have the thread, if it is not there yet."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._serve, name="dataforge-kafka-poll", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._thread = None
            fix = "Send before the process ends, or raise its limit of threads"
            raise KafkaError(f"topic {topic!r}", f"the producer's thread does not start: {error}", fix) from None

    def _wait_for_room(self, topic: str, size: int, deadline: float) -> None:
        refuse_larger_than_buffer(size, self._options, f"a record to topic {topic!r}")
        if self.in_callback:
            raise KafkaTimeoutError(
                f"topic {topic!r}, buffer_memory",
                "the buffer is full, and stays so until this delivery callback has ended [_QUEUE_FULL]",
                f"Hand the record to the thread that sends the others. {fix_for('_QUEUE_FULL')}",
                code="_QUEUE_FULL",
            )
        if time.monotonic() > deadline:
            waited = self._config.delivery_timeout
            raise logged(timed_out(f"topic {topic!r}, buffer_memory", waited, "_QUEUE_FULL"))
        time.sleep(_FULL_SECONDS)

    def _learn_what_is_fatal(self) -> None:
        """Wait for the thread to be told it."""
        deadline = time.monotonic() + SLICE
        self._wake.put(None)
        while self._connection.fatal is None and time.monotonic() < deadline:
            time.sleep(_FULL_SECONDS)

    def _serve(self) -> None:
        while not self._has_ended():
            # The end of this thread would be that of all callbacks: it stays, whatever comes out of one of them.
            with contextlib.suppress(BaseException):
                if self._stopping:
                    self._producer.purge()
                if self._untold or self._stopping:
                    self._take_reports()
                else:
                    self._rest()
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(confluent_kafka.KafkaException):  # a fatal error, which its records have told
            self._producer.close()

    def _has_ended(self) -> bool:
        if not (self._stopping or self._forsaken) or len(self._producer) or self._untold:
            return False
        with self._lock:
            if not len(self._producer):  # what was in the midst of a send may have come
                self._ended.set()
        return self._ended.is_set()

    def _take_reports(self) -> None:
        # Flush, unlike poll, does not wait for batches to fill.
        wait = self._producer.flush if self._flushes or self._stopping else self._producer.poll
        self._connection.serve(wait, _POLL_SECONDS)
        fatal = self._connection.fatal
        if fatal is None or len(self._producer):
            return
        # The reports of records that fail with it may be lost when a fatal error comes out of the same call.
        for report in list(self._untold):
            report(fatal, confluent_kafka.Message(topic=report.topic, key=report.key, error=fatal))

    def _rest(self) -> None:
        """Wait for a record; errors and tokens of the connection come meanwhile."""
        self._is_resting = True
        try:
            if not (self._untold or self._stopping or self._forsaken):
                with contextlib.suppress(queue.Empty):
                    self._wake.get(timeout=_IDLE_SECONDS)
        finally:
            self._is_resting = False
        self._logged.rest(int(time.monotonic()))
        self._connection.serve(self._producer.poll, 0)

    def tell(self, report: Report, err: confluent_kafka.KafkaError | None, msg: confluent_kafka.Message) -> None:
        """Tell what became of a record. Called by the thread; it raises nothing."""
        # With a fatal error pending, the first call of a function in C raises that error: this one, so that nothing is
        # told by half. `_take_reports` tells it then.
        self._untold.get(report)
        if report.told:
            return
        report.told = self._is_telling = True
        try:
            self._tell(report, err, msg)
        finally:
            self._told += 1
            self._is_telling = False

    def _tell(self, report: Report, err: confluent_kafka.KafkaError | None, msg: confluent_kafka.Message) -> None:
        place = _place(report.topic, msg) if err is None else None
        if place is not None and place.offset < 0 and self._config.acknowledged:
            err = confluent_kafka.KafkaError(confluent_kafka.KafkaError._INCONSISTENT, _NOT_ACKNOWLEDGED)  # noqa: SLF001
        error = None if err is None else self._failure(report, err)
        if error is None:
            self._late = False
            self._connection.connected()
        self._untold.pop(report, None)
        try:
            if error is None:
                report.future.set_result(place)  # type: ignore[arg-type]
            else:
                report.future.set_exception(error)
        except BaseException:  # noqa: BLE001
            with contextlib.suppress(BaseException):
                logger.exception("What waits for the future of a record to topic %r raised", report.topic)
        if report.callback is not None:
            try:
                report.callback(err, msg)
            except BaseException:  # noqa: BLE001  (also SystemExit: this thread is not the callback's)
                logger.exception("The delivery callback of a record to topic %r raised", report.topic)

    def _failure(self, report: Report, err: confluent_kafka.KafkaError) -> KafkaError:
        error = self._explain(err, report)
        if report.callback is None:
            with self._counting:
                self._failures[err.name()] += 1
                self._first_failure = self._first_failure or error
        # What close gives up it tells at once, not record by record.
        level = logging.DEBUG if err.name().startswith("_PURGE") else logging.ERROR
        with contextlib.suppress(BaseException):  # a handler of the user's
            self._logged.failure(error, level)
        return error

    def _explain(self, err: confluent_kafka.KafkaError, report: Report) -> KafkaError:
        error = self._connection.cause(self._connection.fatal or err, _culprit(report.topic, report.partition))
        if error.code == "_MSG_TIMED_OUT":
            self._late = True
            if not self._connection.is_in_trouble:
                error.add("or the topic was made anew, which this client does not see", "Try a new producer")
        if self._connection.fatal is not None and error.remedy is Remedy.FAIL:
            error.fix += ", then make a new producer"
            error.add("this producer has ended with that")
        if error.code == "_UNKNOWN_PARTITION" and report.partition < 0:
            # It was there when the record was sent, and may be for all but one broker (librdkafka 4401).
            error.fix = "Look whether the topic is still there, and send again"
            error.add("none was asked for: the topic was deleted since, or a broker did not know it for a moment")
        return error

    def flush(self, seconds: float) -> None:
        """Wait until everything sent, by any thread, is delivered or has failed.

        Raises:
            KafkaTimeoutError: Records are still on their way after so many seconds.
            KafkaError: A record without a callback has failed since the last flush.
        """
        deadline = time.monotonic() + seconds
        this = object()
        try:
            self._flushes.add(this)
            while left := self.left:
                if time.monotonic() >= deadline:
                    raise logged(self._connection.late(f"{left} records not yet delivered", seconds))
                self._wait_for_last(deadline)
        finally:
            self._flushes.discard(this)
        self._logged.rest()
        with self._counting:
            first, failures = self._first_failure, dict(self._failures)
            self._first_failure, self._failures = None, collections.Counter()
        if first is not None:
            counts = ", ".join(f"{count} x {code}" for code, count in failures.items())
            error = type(first)(
                f"{sum(failures.values())} records were not delivered ({counts}); the first: {first.culprit}",
                first.cause,
                first.fix,
                code=first.code,
                remedy=first.remedy,
            )
            error.counts = failures
            raise error from first

    def _wait_for_last(self, deadline: float) -> None:
        if self._is_resting:  # it has events of librdkafka's own to take, which count as records
            self._wake.put(None)
        last = None
        with contextlib.suppress(RuntimeError):  # it may change in between
            last = next(reversed(self._untold), None)
        seconds = max(0.0, min(SLICE, deadline - time.monotonic()))
        if last is None or last.future.done():
            time.sleep(min(seconds, _FULL_SECONDS))  # its callback is under way
        else:
            concurrent.futures.wait([last.future], seconds)

    def end(self, seconds: float = math.inf) -> None:
        """Give up what is on its way, and close the client once all is told.

        Args:
            seconds: Longest wait for that; it is done beside then, as where a callback does not return.
        """
        deadline = time.monotonic() + seconds
        with self._lock:
            self._stopping = True
            thread = self._thread
            is_first = not self._ended.is_set()
            if thread is None:
                self._ended.set()
        if thread is None:
            if is_first:
                self._close()
            return
        self._wake.put(None)
        before, since = -1, 0.0
        while thread.is_alive():
            if self._told != before:  # what is left also counts librdkafka's own events
                before, since = self._told, time.monotonic()
            elif time.monotonic() > since + _TOLD_SECONDS:
                return
            if time.monotonic() > deadline:
                return
            thread.join(_FULL_SECONDS)
        self._logged.rest()

    def let_go(self) -> confluent_kafka.Producer:
        """The client, which has been given nothing and is given nothing from now on, for the caller to end."""
        _alive.discard(self)
        self._ended.set()
        producer = self._producer
        del self._producer
        return producer

    def forsake(self) -> None:
        """Deliver what is on its way, and close the client then: nobody has the producer any more."""
        self._forsaken = True
        self._wake.put(None)


class _Logged:
    """Logs failures, and of a flood of them how many there were."""

    def __init__(self) -> None:
        self._second: int | None = None
        self._count = 0

    def failure(self, error: KafkaError, level: int) -> None:
        """Log one."""
        self.rest(int(time.monotonic()))
        if level == logging.ERROR:
            self._count += 1
            level = level if self._count <= _LOGGED_A_SECOND else logging.DEBUG
        logger.log(level, "%s", error)

    def rest(self, second: int | None = None) -> None:
        """Say how many were not logged, if this second is another one, or none."""
        if second == self._second:
            return
        self._second = second
        more, self._count = self._count - _LOGGED_A_SECOND, 0
        if more > 0:
            logger.error("%d more records were not delivered in that second; each says so by its future, too", more)


def _culprit(topic: str, partition: int) -> str:
    return place_name(topic, None if partition < 0 else partition)


def logged(error: KafkaError) -> KafkaError:
    """The error, logged: what fails is logged also where somebody catches it."""
    logger.error("%s", error)
    return error


def _place(topic: str, msg: Any) -> RecordMetadata:
    offset = msg.offset()
    kind, timestamp = msg.timestamp()
    known = -1 if offset is None or offset < 0 else offset
    return RecordMetadata(topic, msg.partition(), known, timestamp if kind else None)


def keep_inherited() -> None:
    """In a forked process, keep its parent's producers."""
    for producer in list(_alive):
        keep_for_ever(producer._producer)  # noqa: SLF001


def deliver_at_exit() -> None:
    """Deliver what nobody has flushed when the process ends, or say that it is lost; end the clients."""
    deadline = time.monotonic() + _EXIT_SECONDS
    for producer in [one for one in _alive if not one.inherited]:
        with contextlib.suppress(Exception):  # also that of a log's handler
            producer.flush(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(Exception):
            if left := producer.left:
                logger.error("The process ends, and %d records are lost. Call flush() or close() before its end", left)
        with contextlib.suppress(Exception):
            producer.end(max(0.0, deadline - time.monotonic()) + _TOLD_SECONDS)
