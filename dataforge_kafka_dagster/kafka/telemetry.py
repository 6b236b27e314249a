"""OpenTelemetry spans and metrics of publications, if its API package is installed.

Names follow https://opentelemetry.io/docs/specs/semconv/messaging/kafka/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_NAME: Final = "dataforge_kafka_dagster"


def _place(topic: str) -> dict[str, str]:
    """The attributes that say where records go."""
    return {"messaging.system": "kafka", "messaging.destination.name": topic}


class PublicationSpan:
    """The span of one attempt at a publication, which begins when it is made; nothing without OpenTelemetry.

    Args:
        topic: The topic.
        publication_id: Names the work.
        transactional_id: Names the publisher.
    """

    def __init__(self, topic: str, publication_id: str, transactional_id: str) -> None:
        self._span: Any = None
        self._topic = topic
        try:
            from opentelemetry import trace  # noqa: PLC0415  (optional)
        except ImportError:
            return
        attributes = _place(topic) | {
            "messaging.operation.name": "publish",
            "messaging.operation.type": "send",
            "dataforge.kafka.publication.id": publication_id,
            "dataforge.kafka.transactional.id": transactional_id,
        }
        tracer = trace.get_tracer(_NAME)
        self._span = tracer.start_span(f"publish {topic}", kind=trace.SpanKind.PRODUCER, attributes=attributes)

    def succeed(self, records: Mapping[str, int], size: int, *, replayed: bool) -> None:
        """End it, and count what was published: nothing if an earlier attempt had done it.

        Args:
            records: How many records each topic got.
            size: The bytes of them all.
            replayed: Whether an earlier attempt had published them.
        """
        if self._span is None:
            return
        from opentelemetry import metrics  # noqa: PLC0415

        self._span.set_attribute("messaging.batch.message_count", sum(records.values()))
        self._span.set_attribute("dataforge.kafka.publication.bytes", size)
        self._span.set_attribute("dataforge.kafka.publication.replayed", replayed)
        if not replayed:
            meter = metrics.get_meter(_NAME)
            messages = meter.create_counter("messaging.client.sent.messages", "{message}")
            for topic, count in records.items():
                messages.add(count, _place(topic))
            meter.create_counter("dataforge.kafka.sent.bytes", "By").add(size, _place(self._topic))
        self._end()

    def fail(self, error: BaseException) -> None:
        """End it with an error."""
        if self._span is None:
            return
        from opentelemetry import trace  # noqa: PLC0415

        # The text is the log's: it may hold what a record holds.
        self._span.set_attribute("error.type", getattr(error, "code", None) or type(error).__name__)
        self._span.set_status(trace.StatusCode.ERROR)
        self._end()

    def _end(self) -> None:
        self._span.end()
        self._span = None
