"""CloudEvents in binary mode: each record's attributes as its headers.

Names and forms are the CloudEvents package's:
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from dataforge_kafka_dagster.kafka.errors import KafkaConfigError
from dataforge_kafka_dagster.kafka.records import PLAIN, Chunk

_CONTENT_TYPES: Final[dict[str | None, str]] = {
    "json": "application/json",
    "string": "text/plain; charset=utf-8",
    "bytes": "application/octet-stream",
}


class CloudEventHeaders:
    """Adds the headers of CloudEvents to records.

    Args:
        attributes: ``type`` and ``source``, and any of ``subject``, ``dataschema``, ``datacontenttype``, ``time`` or
            your own extensions. ``datacontenttype`` follows from the values if left out; ``time``, an aware datetime
            or its ISO 8601 text, is now.
        publication_id: Names the work: a record's ``ce_id`` is made of it and of its position, so that it is the same
            in each attempt.

    Raises:
        KafkaConfigError: CloudEvents does not allow these attributes, or the package is not installed.
    """

    def __init__(self, attributes: Mapping[str, Any], publication_id: str) -> None:
        try:
            event = importlib.import_module("cloudevents.core.v1.event")
            binding = importlib.import_module("cloudevents.core.bindings.kafka")
        except ImportError as error:
            raise KafkaConfigError(
                "CloudEvents",
                f"the package cannot be imported: {error}",
                "Install it with: pip install 'dataforge-kafka-dagster[cloudevents]'",
            ) from error
        culprit = f"CloudEvents attributes {dict(attributes)!r}"
        if "id" in attributes:
            raise KafkaConfigError(
                culprit, "each record has an id of its own, made of the publication and its position", "Leave id out"
            )
        self._prefix = hashlib.sha256(publication_id.encode()).hexdigest()[:24]
        try:
            made = event.CloudEvent({**attributes, **_time_of(attributes), "id": self._prefix})
            headers = binding.to_binary_event(made).headers
        except Exception as error:
            missing = {"type", "source"} - attributes.keys()
            fix = "Give at least type and source" if missing else "Give what CloudEvents allows, or leave it out"
            raise KafkaConfigError(culprit, str(error), fix) from error
        self._headers = [(name, value) for name, value in headers.items() if name != "ce_id"]
        self._typed = "content-type" in headers
        self._records = 0

    def add(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The same records with the headers, after those they have."""
        for chunk in chunks:
            form = _CONTENT_TYPES.get(chunk.form)
            headers = self._headers
            if not self._typed and form is not None:
                headers = [*headers, ("content-type", form.encode())]
            extras = chunk.extras or [PLAIN] * len(chunk.values)
            start, prefix = self._records, self._prefix
            self._records += len(chunk.values)
            yield chunk._replace(
                extras=[
                    extra._replace(headers=[*(extra.headers or ()), ("ce_id", f"{prefix}-{index}".encode()), *headers])
                    for index, extra in enumerate(extras, start)
                ]
            )


def _time_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attribute ``time`` as a datetime, if it is text: metadata of an output has no other form for it."""
    text = attributes.get("time")
    if not isinstance(text, str):
        return {}
    # Python before 3.11 does not read the Z.
    return {"time": dt.datetime.fromisoformat(f"{text[:-1]}+00:00" if text.endswith(("Z", "z")) else text)}
