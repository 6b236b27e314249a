"""The DataForge Kafka Producer Module: single records, sync and async."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import datetime as dt
import inspect
import os
import time
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final

from typing_extensions import Self

from dataforge_kafka_dagster.kafka.config import KafkaProducerConfig, check_topic
from dataforge_kafka_dagster.kafka.connection import Connection, logger, timed_out
from dataforge_kafka_dagster.kafka.errors import KafkaConfigError, KafkaError
from dataforge_kafka_dagster.kafka.records import KafkaRecord, as_record, encode_record
from dataforge_kafka_dagster.kafka.serialization import Headers
from dataforge_kafka_dagster.kafka.served_producer import (
    DeliveryCallback,
    RecordMetadata,
    ServedProducer,
    deliver_at_exit,
    keep_inherited,
    logged,
)

# A record's own deadline comes first, so that its error says why.
_ON_THE_WAY: Final = 5.0
# Fewer milliseconds since the epoch are rather meant as seconds.
_SECONDS_TODAY: Final = 10_000_000_000


class DataForgeKafkaProducer:
    """Sends single records to Kafka and says what became of each.

    Thread-safe. A forked process needs one of its own: there, this one refuses to send, and to close it does nothing.
    Fork before the first producer is made, or after one has delivered: glibc keeps the lock of a name lookup that was
    under way at a fork, and the forked process then reaches no broker.
    Every failure is logged to the logger ``dataforge_kafka_dagster``; of more than ten in a second, how many. What was
    not flushed when the process ends has 5 seconds, then the log says how many records are lost; a process that
    multiprocessing has forked ends without that.

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
        connection = Connection(self.config)
        self._has_warned = False
        connection.make_ready()
        self._served = ServedProducer(self.config, connection)
        # Who drops this one without close() has the records delivered, and the client ended, all the same.
        weakref.finalize(self, self._served.forsake).atexit = False
        try:
            timeout = self.config.connect_timeout
            connection.answer(
                lambda: connection.admin.describe_cluster(request_timeout=timeout), timeout, connection.name
            )
        except BaseException as error:
            # The traceback may keep this one, and where it is let go of nobody is to wait for the client's end.
            connection.close(self._served.let_go())
            if isinstance(error, KafkaError):
                logger.error("Cannot connect: %s", error)
            raise
        connection.close()

    @property
    def inherited(self) -> bool:
        """Whether this is a forked process, and the producer its parent's."""
        return self._served.inherited

    @property
    def failed(self) -> bool:
        """Whether to make a new producer: this one is closed, an error has ended it, or what was sent last was late."""
        return self._served.failed

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
        seconds = self.config.delivery_timeout
        deadline = time.monotonic() + seconds + _ON_THE_WAY
        future = self._send(topic, as_record(value, key, headers, partition, timestamp), _told_by_send_sync)
        concurrent.futures.wait([future], deadline - time.monotonic())
        if not future.done():
            raise logged(timed_out(f"topic {topic!r}", seconds))
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
        _check_callback(callback)
        return self._send(topic, as_record(value, key, headers, partition, timestamp), callback)

    def _send(
        self, topic: str, record: KafkaRecord, callback: DeliveryCallback | None
    ) -> concurrent.futures.Future[RecordMetadata]:
        check_topic(topic)
        value, key, extra = encode_record(record)
        if 0 < extra.timestamp < _SECONDS_TODAY and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "timestamp=%d of a record to topic %r is in the year 1970 or soon after: Kafka counts milliseconds, and"
                " deletes what is older than the topic's retention.ms",
                extra.timestamp,
                topic,
            )
        return self._served.send(topic, value, key, extra, callback)

    def _seconds(self, timeout: Any) -> float:
        if timeout is None:
            return self.config.delivery_timeout + _ON_THE_WAY
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
            raise KafkaConfigError(f"timeout={timeout!r}", "it is no number of seconds", "Give 0 or more, or None")
        return timeout

    def _refuse_in_callback(self, name: str, fix: str) -> None:
        if self._served.in_callback:
            raise KafkaError(
                name, "it was called from a delivery callback, before the end of which nothing is delivered", fix
            )

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything sent, by any thread, is delivered or has failed.

        Whose record it is that failed is not known here: for your own, ask its future.

        Args:
            timeout: Longest wait, seconds; 5 more than the config's delivery_timeout if None.

        Raises:
            KafkaTimeoutError: Records are still on their way.
            KafkaError: A record that was sent async without a callback failed since the last flush; or it was called
                from a delivery callback.
        """
        seconds = self._seconds(timeout)
        if self._served.ended or self.inherited:
            return
        self._refuse_in_callback("flush", "Call it where the records are sent")
        self._served.flush(seconds)

    def close(self, timeout: float | None = None) -> None:
        """Flush, give up what is not delivered by then, and let go of the connection. Again is harmless.

        Args:
            timeout: Longest wait for deliveries, seconds; 5 more than the config's delivery_timeout if None.

        Raises:
            KafkaTimeoutError: Records were given up; each one's callback and future say so too.
            KafkaError: As `flush`.
        """
        seconds = self._seconds(timeout)
        if self._served.ended or self.inherited:
            return
        self._refuse_in_callback("close", "Call it where the producer was made")
        self._served.closing = True
        try:
            self._served.flush(seconds)
        finally:
            self._served.end()

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


def _told_by_send_sync(_err: object, _msg: object) -> None:
    """Its failure is none of `flush`."""


def _check_callback(callback: Any) -> None:
    if callback is None:
        return
    cause = "it is no function" if not callable(callback) else "it is async, and nobody would await it"
    if not callable(callback) or any(map(inspect.iscoroutinefunction, (callback, type(callback).__call__))):
        raise KafkaConfigError(
            f"callback={callback!r}", cause, "Give a function of (err, msg); asyncio.wrap_future() awaits the future"
        )


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=keep_inherited)
atexit.register(deliver_at_exit)


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
    return DataForgeKafkaProducer(KafkaProducerConfig.model_validate(dict(config_dict)))
