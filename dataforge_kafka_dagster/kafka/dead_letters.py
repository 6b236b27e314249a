"""A record that cannot be published, as a record of a dead-letter topic."""

from __future__ import annotations

from typing import Any, Final

from dataforge_kafka_dagster.kafka.errors import KafkaError
from dataforge_kafka_dagster.kafka.records import KafkaRecord

_LONGEST_ERROR: Final = 2_000


def dead_letter(bad: Any, error: KafkaError, topic: str, most: int) -> dict[str, Any]:
    """What to produce for a bad record.

    Args:
        bad: The record as it was given, or a `KafkaRecord` of its bytes if it was encoded already.
        error: Why it cannot be published.
        topic: Where it was to go.
        most: Longest value and longest key, bytes; what is longer is cut, and a header says how long the value was.

    Returns:
        ``value`` (the record's own bytes, or its repr), ``key`` (likewise, None if it has none) and ``headers``:
        ``dead-letter.error``, ``dead-letter.code``, ``dead-letter.index``, ``dead-letter.topic``, and
        ``dead-letter.length`` of a value that was cut.
    """
    given, given_key = (bad.value, bad.key) if isinstance(bad, KafkaRecord) else (bad, None)
    value, key = _bytes_of(given), _bytes_of(given_key)
    headers = [
        ("dead-letter.error", str(error)[: min(_LONGEST_ERROR, most // 2)].encode(errors="backslashreplace")),
        ("dead-letter.code", (error.code or type(error).__name__).encode()),
        ("dead-letter.index", str(error.index).encode()),
        ("dead-letter.topic", topic.encode()),
    ]
    if value is not None and len(value) > most:
        headers.append(("dead-letter.length", str(len(value)).encode()))
        value = value[:most]
    return {"value": value, "key": None if key is None else key[:most], "headers": headers}


def _bytes_of(value: Any) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode(errors="backslashreplace")
    try:
        return repr(value).encode(errors="backslashreplace")
    except Exception as error:  # noqa: BLE001  (a user's repr may raise anything)
        return f"<{type(value).__qualname__}, whose repr raised {type(error).__name__}>".encode()
