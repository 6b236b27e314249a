"""The DataForge Kafka Producer Module: single records, sync and async."""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime as dt
import functools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final

import confluent_kafka
from typing_extensions import Self

from dataforge_kafka_dagster.kafka.config import ACKS, KafkaProducerConfig, check_topic, producer_options
from dataforge_kafka_dagster.kafka.connection import SLICE, Connection, logger, timed_out
from dataforge_kafka_dagster.kafka.errors import KafkaConfigError, KafkaError, KafkaTimeoutError
from dataforge_kafka_dagster.kafka.records import Extra, KafkaRecord, as_record, encode_record
from dataforge_kafka_dagster.kafka.serialization import Headers

DeliveryCallback = Callable[["confluent_kafka.KafkaError | None", confluent_kafka.Message], object]
_Report = Callable[["confluent_kafka.KafkaError | None", confluent_kafka.Message], None]

# How long close waits for a delivery callback that does not return.
_TOLD_SECONDS: Final = 1.0
# librdkafka takes a batch that a broker refused for delivered when the next one is, which was on its way already: a
# broker that has just become a Kafka partition's leader takes any first batch (confluent-kafka-go issue 921).
_NOT_ACKNOWLEDGED: Final = "a broker has taken later records, but said of this one only that it refused it, or nothing"
# How long the end of a process waits for what was not flushed.
_EXIT_SECONDS: Final = 5.0
_alive: Final[weakref.WeakSet[DataForgeKafkaProducer]] = weakref.WeakSet()


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


class DataForgeKafkaProducer:
    """Sends single records to Kafka and says what became of each.

    Thread-safe. A forked process needs one of its own: there, this one refuses to send, and to close it does nothing.
    Fork before the first producer is made, or after one has delivered: glibc keeps the lock of a name lookup that was
    under way at a fork, and the forked process then reaches no broker.
    Every failure is logged to the logger ``dataforge_kafka_dagster``. What was not flushed when the process ends has 5
    seconds, then the log says how many records are lost; a process that multiprocessing has forked ends without that.

    Args:
        config: The options; the documented defaults if None.

    Attributes:
        inherited: Whether this is a forked process, and the producer its parent's.

    Raises:
        NoBrokersAvailable: No broker answered within the config's connect_timeout, or none let us in.
        KafkaConfigError: librdkafka refuses an option, or this is no KafkaProducerConfig.

    Example:
        >>> with DataForgeKafkaProducer(config) as producer:
        ...     producer.send_sync("my-topic", {"message": "Hello Kafka!"})
    """

    def __init__(self, config: KafkaProducerConfig | None = None) -> None:
        if config is not None and not isinstance(config, KafkaProducerConfig):
            raise KafkaConfigError(
                f"config of type {type(config).__qualname__}",
                "it is no KafkaProducerConfig",
                "Make one of it, or call create_kafka_producer with a mapping",
            )
        self.config = config or KafkaProducerConfig()
        self.inherited = False
        self._connection = Connection(self.config)
        self._failures: collections.Counter[str] = collections.Counter()
        self._first_failure: KafkaError | None = None
        self._lock = threading.RLock()  # a signal handler may send, too
        self._poller: threading.Thread | None = None
        self._closing = False
        self._late = False
        self._closed = threading.Event()
        self._users = 0
        """How many calls of librdkafka that wait are under way, those of close left out."""
        self._reporting = threading.local()
        self._unreported: dict[_Report, tuple[str, bytes | None]] = {}
        """What is to tell the end of each record that was sent, and the record's topic and key."""
        self._settling: set[object] = set()
        """Reports that a thread has taken and not counted yet."""
        self._producer = self._connection.producer(producer_options(self.config))
        _alive.add(self)
        try:
            admin = self._connection.admin
            timeout = self.config.connect_timeout
            self._connection.answer(
                lambda: admin.describe_cluster(request_timeout=timeout), timeout, self._connection.name
            )
        except KafkaError as error:
            logger.error("Cannot connect: %s", error)
            raise
        finally:
            self._connection.close()

    @property
    def failed(self) -> bool:
        """Whether to make a new producer: an error has ended this one, or what was sent last was late.

        A client never finds a topic again that it knew and that was made anew with another leader (librdkafka 4898).
        """
        return self._connection.fatal is not None or (self._late and not self._left())

    def send_sync(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Headers | None = None,
        partition: int | None = None,
        timestamp: int | dt.datetime | None = None,
    ) -> RecordMetadata:
        """Send one record and wait until it is delivered.

        Args:
            topic: The topic.
            value: Mapping, dataclass or pydantic model (sent as JSON), str (UTF-8), bytes, or None (a tombstone).
            key: str, bytes, int, date, time, UUID, or a mapping or list of those.
            headers: Mapping or (name, value) pairs of str to str, bytes or None.
            partition: Kafka partition, from 0; None lets the key decide (murmur2, as Kafka's Java client).
            timestamp: Milliseconds since the epoch or an aware datetime; None is now.

        Returns:
            Where the record is.

        Raises:
            KafkaTimeoutError: Not delivered within the config's delivery_timeout; it may have been written.
            KafkaError: The broker refused the record; `KafkaError.code` says why.
            InvalidRecordError: It cannot be encoded; nothing was sent.
        """
        self._refuse_in_callback(f"send_sync to topic {topic!r}", "Call send_async there")
        future = self._produce(topic, as_record(value, key, headers, partition, timestamp), None)
        deadline = time.monotonic() + self.config.delivery_timeout + 5
        while not future.done():
            if self._poller is None and not self._closed.is_set():
                self._serve(self._producer.poll, SLICE)
            else:
                concurrent.futures.wait([future], SLICE)
            if time.monotonic() > deadline:
                raise self._logged(timed_out(f"topic {topic!r}", self.config.delivery_timeout))
        return future.result()

    def send_async(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Headers | None = None,
        partition: int | None = None,
        timestamp: int | dt.datetime | None = None,
        callback: DeliveryCallback | None = None,
    ) -> concurrent.futures.Future[RecordMetadata]:
        """Send one record without waiting. A full buffer makes this call wait: backpressure, not an error.

        Args:
            topic: The topic.
            value: As for `send_sync`, and so are key, headers, partition and timestamp.
            key: See value.
            headers: See value.
            partition: See value.
            timestamp: See value.
            callback: Called with ``(err, msg)`` from a thread of the producer when the record is delivered (``err`` is
                None; ``msg.topic()``, ``msg.partition()``, ``msg.offset()``) or has failed, or may be lost
                (``_INCONSISTENT``). What it raises is logged.

        Returns:
            A future of the `RecordMetadata`, or of the `KafkaError`.

        Raises:
            KafkaTimeoutError: The buffer stayed full for delivery_timeout, or is full in a delivery callback, during
                which it cannot empty.
            KafkaError: The record was refused at once, for instance as too large.
            InvalidRecordError: It cannot be encoded; nothing was sent.
        """
        if self._poller is None and not self.inherited:
            with self._lock:
                if self._poller is None:
                    self._poller = threading.Thread(target=self._poll, name="dataforge-kafka-poll", daemon=True)
                    self._poller.start()
        return self._produce(topic, as_record(value, key, headers, partition, timestamp), callback or _count_only)

    def _poll(self) -> None:
        while not self._closed.is_set():
            # The end of this thread would be that of all callbacks: it stays, whatever one of them raises.
            with contextlib.suppress(BaseException):
                self._serve(self._producer.poll, 0.1)

    @property
    def _in_callback(self) -> bool:
        return getattr(self._reporting, "now", False)

    def _refuse_in_callback(self, name: str, fix: str) -> None:
        if self._in_callback:
            raise KafkaError(
                name, "it was called from a delivery callback, before the end of which nothing is delivered", fix
            )

    def _serve(self, wait: Callable[[float], object], seconds: float) -> None:
        self._use(self._tell, wait, seconds)

    def _use(self, serve: Callable[..., object], wait: Callable[[float], object], seconds: float) -> None:
        """Call what waits in the client, unless it is closed, which in the midst of a call would crash."""
        with self._lock:
            if self._closed.is_set():
                return
            self._users += 1
        try:
            serve(wait, seconds)
        finally:
            with self._lock:
                self._users -= 1

    def _left(self) -> int:
        """How many records are not told of; another thread may have taken a report, and not told it yet."""
        with self._lock:
            return 0 if self._closed.is_set() else len(self._producer) or len(self._unreported) or len(self._settling)

    def _tell(self, wait: Callable[[float], object], seconds: float) -> None:
        self._connection.serve(wait, seconds)
        fatal = self._connection.fatal
        if fatal is None or len(self._producer):
            return
        # The reports of records that fail with it may be lost when a fatal error comes out of the same call.
        for on_delivery, (topic, key) in list(self._unreported.items()):
            on_delivery(fatal, confluent_kafka.Message(topic=topic, key=key, error=fatal))

    def _produce(
        self, topic: str, record: KafkaRecord, callback: DeliveryCallback | None
    ) -> concurrent.futures.Future[RecordMetadata]:
        check_topic(topic)
        if self.inherited:
            raise KafkaError(
                f"topic {topic!r}",
                f"process {os.getpid()} was forked, and the threads of this producer are its parent's",
                "Make a producer in each process",
            )
        value, key, extra = encode_record(record)
        future: concurrent.futures.Future[RecordMetadata] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # what is sent cannot be taken back

        def on_delivery(err: confluent_kafka.KafkaError | None, msg: Any) -> None:
            # With a fatal error pending, the first call raises it, so that this does nothing: `_serve` does it again.
            if self._unreported.get(on_delivery) is None:
                return
            taken = object()
            self._settling.add(taken)
            outer, self._reporting.now = self._in_callback, True
            try:
                if self._unreported.pop(on_delivery, None) is not None:
                    settle(err, msg, taken)
            finally:
                self._settling.discard(taken)
                self._reporting.now = outer

        def settle(err: confluent_kafka.KafkaError | None, msg: Any, taken: object) -> None:
            place: Any = _place(topic, msg) if err is None else None
            if place is not None and place.offset < 0 and ACKS[str(self.config.acks)] != "0":
                err = confluent_kafka.KafkaError(confluent_kafka.KafkaError._INCONSISTENT, _NOT_ACKNOWLEDGED)  # noqa: SLF001
            if err is None:
                self._late = False
                self._connection.connected()
                future.set_result(place)
            else:
                error = self._explain(err, topic)
                if callback is _count_only:
                    self._failures[err.name()] += 1
                    self._first_failure = self._first_failure or error
                # What close gives up it tells at once, not record by record.
                logger.log(logging.DEBUG if err.name().startswith("_PURGE") else logging.ERROR, "%s", error)
                future.set_exception(error)
            self._settling.discard(taken)
            if callback is not None:
                try:
                    callback(err, msg)
                except BaseException as raised:
                    if not isinstance(raised, Exception) and threading.current_thread() is not self._poller:
                        raise
                    logger.exception("The delivery callback of a record to topic %r raised", topic)

        self._unreported[on_delivery] = (topic, key)
        try:
            self._queue(topic, value, key, extra, on_delivery)
        except BaseException:
            self._unreported.pop(on_delivery, None)
            raise
        return future

    def _explain(self, err: confluent_kafka.KafkaError, topic: str) -> KafkaError:
        error = self._connection.cause(self._connection.fatal or err, f"topic {topic!r}")
        if error.code == "_MSG_TIMED_OUT":
            self._late = True
            error.add("or the topic was made anew, which this client does not see", "Try a new producer")
        return error

    def _queue(self, topic: str, value: bytes | None, key: bytes | None, extra: Extra, on_delivery: _Report) -> None:
        deadline = time.monotonic() + self.config.delivery_timeout
        while True:
            try:
                headers: Any = extra.headers
                with self._lock:
                    # What is sent while close waits would keep it waiting; a callback may send on until the end.
                    if self._closed.is_set() or (self._closing and not self._in_callback):
                        raise KafkaError(
                            f"topic {topic!r}", "the producer is closed", "Send before close()", code="_STATE"
                        )
                    self._producer.produce(
                        topic, value, key, extra.partition, on_delivery, timestamp=extra.timestamp, headers=headers
                    )
            except BufferError:
                # To poll within a poll aborts the process (confluent-kafka 2.16).
                if self._in_callback:
                    raise KafkaTimeoutError(
                        f"topic {topic!r}, buffer_memory",
                        "the buffer is full, and stays so until this delivery callback has ended [_QUEUE_FULL]",
                        "Raise buffer_memory, or hand the record to the thread that sends the others",
                        code="_QUEUE_FULL",
                    ) from None
                if time.monotonic() > deadline:
                    waited = self.config.delivery_timeout
                    raise self._logged(timed_out(f"topic {topic!r}, buffer_memory", waited, "_QUEUE_FULL")) from None
                self._use(self._connection.serve, self._producer.poll, SLICE)
            except confluent_kafka.KafkaException as exception:
                if exception.args[0].name() == "_FATAL" and not self._in_callback:
                    self._use(self._connection.serve, self._producer.poll, SLICE)  # tells the cause
                error = self._connection.fatal or exception.args[0]
                raise self._logged(self._connection.cause(error, f"topic {topic!r}")) from None
            else:
                return

    def _logged(self, error: KafkaError) -> KafkaError:
        logger.error("%s", error)
        return error

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything sent, by any thread, is delivered or has failed.

        Whose record it is that failed is not known here: for your own, ask its future.

        Args:
            timeout: Longest wait, seconds; the config's delivery_timeout if None.

        Raises:
            KafkaTimeoutError: Records are still on their way.
            KafkaError: A record that was sent async without a callback failed since the last flush; or it was called
                from a delivery callback.
        """
        if self._closed.is_set() or self.inherited:
            return
        self._refuse_in_callback("flush", "Call it where the records are sent")
        # A record's own deadline comes first, so that its error says why.
        seconds = self.config.delivery_timeout + 2 if timeout is None else timeout
        deadline = time.monotonic() + seconds
        while self._left():
            self._serve(self._producer.flush, max(0.0, min(SLICE, deadline - time.monotonic())))
            left = self._left()
            if left and time.monotonic() >= deadline:
                raise self._logged(timed_out(f"{left} records not yet delivered", seconds))
        first, failures = self._first_failure, dict(self._failures)
        self._first_failure, self._failures = None, collections.Counter()
        if first is not None:
            counts = ", ".join(f"{count} x {code}" for code, count in failures.items())
            raise type(first)(
                f"{sum(failures.values())} records were not delivered ({counts}); the first: {first.culprit}",
                first.cause,
                first.fix,
                code=first.code,
                remedy=first.remedy,
            ) from first

    def close(self, timeout: float | None = None) -> None:
        """Flush, give up what is not delivered by then, and let go of the connection. Again is harmless.

        Args:
            timeout: Longest wait for deliveries, seconds; the config's delivery_timeout if None.

        Raises:
            KafkaTimeoutError: Records were given up; each one's callback and future say so too.
            KafkaError: As `flush`.
        """
        if self._closed.is_set() or self.inherited:
            return
        self._refuse_in_callback("close", "Call it where the producer was made")
        with self._lock:
            self._closing = True
        try:
            self.flush(timeout)
        finally:
            self._end()

    def _end(self) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        done = False
        try:
            done = self._let_go(_TOLD_SECONDS)
        finally:
            if not done:  # also where Ctrl-C ends it
                self._connection.aside(functools.partial(self._let_go, math.inf))

    def _let_go(self, patience: float) -> bool:
        """Give up what is on its way and, once all of it is told, close the client, which waits without a deadline.

        Args:
            patience: How long to wait while nothing is told, seconds: a callback may not return.

        Returns:
            Whether it is closed.
        """
        before, since = 0, 0.0
        while left := len(self._producer) + self._users:
            if left != before:
                before, since = left, time.monotonic()
            elif time.monotonic() > since + patience:
                return False
            self._producer.purge()
            self._tell(self._producer.flush, SLICE)
            if self._users:
                time.sleep(0.01)
        if self._poller is not None:
            self._poller.join(2)
        with contextlib.suppress(confluent_kafka.KafkaException):  # a fatal error, which its records have told
            self._producer.close()
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(KafkaError):
            # An interrupt is not to wait for a broker that may be away.
            self.close(None if isinstance(error, Exception) else 1.0)


def _keep_inherited() -> None:
    """In a forked process, keep its parent's clients for ever: their end would wait for threads that are not there."""
    for producer in list(_alive):
        producer.inherited = True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(producer._producer))  # noqa: SLF001


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_keep_inherited)


@atexit.register
def _deliver_at_exit() -> None:
    """Deliver what nobody has flushed when the process ends, or say that it is lost."""
    deadline = time.monotonic() + _EXIT_SECONDS
    for producer in [one for one in _alive if not one.inherited]:
        with contextlib.suppress(KafkaError):
            producer.flush(max(0.0, deadline - time.monotonic()))
        left = producer._left()  # noqa: SLF001
        if left:
            logger.error("The process ends, and %d records are lost. Call flush() or close() before its end", left)


def _place(topic: str, msg: Any) -> RecordMetadata:
    offset = msg.offset()
    kind, timestamp = msg.timestamp()
    known = -1 if offset is None or offset < 0 else offset
    return RecordMetadata(topic, msg.partition(), known, timestamp if kind else None)


def _count_only(_err: object, _msg: object) -> None:
    """Stands for no callback: the failure is kept for flush."""


def create_kafka_producer(config_dict: Mapping[str, Any]) -> DataForgeKafkaProducer:
    """A connected producer from a mapping of `KafkaProducerConfig`'s options.

    Args:
        config_dict: Options by name; the documented defaults stand for those that are missing.

    Returns:
        The producer; close it, or use it in a with block.

    Raises:
        pydantic.ValidationError: An option is unknown or its value not allowed.
        NoBrokersAvailable: No broker answered within connect_timeout, or none let us in.
        KafkaConfigError: librdkafka refuses an option, or this is no mapping.
    """
    if not isinstance(config_dict, Mapping):
        raise KafkaConfigError(
            f"config of type {type(config_dict).__qualname__}", "it is no mapping", "Give a mapping of options by name"
        )
    return DataForgeKafkaProducer(KafkaProducerConfig(**config_dict))
