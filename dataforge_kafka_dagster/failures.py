"""Which Kafka error becomes a retry, which a failure, and what the Dagster UI says of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NoReturn

import dagster as dg

from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaError, Remedy

_LONGEST_DELAY = 300.0
_LONGEST_KEY = 200


def log_prefix(partitions: Sequence[str]) -> str:
    """What begins what is said of a publication of one Dagster partition: its run may have others."""
    return f"Dagster partition {partitions[0]!r}: " if len(partitions) == 1 else ""


def failure_of(
    error: KafkaError,
    *,
    topic: str | None = None,
    brokers: str | None = None,
    partitions: Sequence[str] = (),
    attempt: int | None = None,
) -> dg.Failure:
    """The Dagster failure for an error, with metadata that says what happened and what to do."""
    said: dict[str, Any] = {
        "kafka/topic": topic,
        "kafka/dagster_partition": partitions[0] if len(partitions) == 1 else None,
        "kafka/brokers": brokers,
        "kafka/error_code": error.code,
        "kafka/culprit": error.culprit,
        "kafka/cause": error.cause,
        "kafka/what_to_do": error.fix,
        "kafka/errors_by_code": dg.MetadataValue.json(error.counts) if error.counts else None,
        "kafka/undelivered_records": sum(error.counts.values()) or None,
        "kafka/record_index": error.index,
        "kafka/record_among": None if error.among is None else "{} to {}".format(*error.among),
        "kafka/record_key": None if error.key is None else error.key[:_LONGEST_KEY].decode(errors="backslashreplace"),
        "kafka/field": error.field if isinstance(error, InvalidRecordError) else None,
        "kafka/attempt": None if attempt is None else attempt + 1,
        "kafka/retriable": error.remedy is not Remedy.FAIL,
    }
    return dg.Failure(
        description=f"{log_prefix(partitions)}{error}",
        metadata={name: value for name, value in said.items() if value is not None},
        allow_retries=error.remedy is not Remedy.FAIL,
    )


def raise_in_dagster(
    error: KafkaError,
    *,
    attempt: int,
    has_retry_policy: bool,
    max_retries: int,
    retry_delay: float,
    topic: str | None = None,
    brokers: str | None = None,
    partitions: Sequence[str] = (),
) -> NoReturn:
    """Raise what makes Dagster retry or fail the step.

    A RetryPolicy of the asset or op decides alone where there is one; else a retriable error asks for a retry itself.

    Args:
        error: What happened.
        attempt: How many attempts of the step there were before this one.
        has_retry_policy: Whether the step has a RetryPolicy of its own.
        max_retries: Most retries of a retriable error, without a policy.
        retry_delay: Wait before the first of them, seconds; twice as long before each next one, and up to a quarter
            more by chance so that steps that failed together do not come back together.
        topic: The topic, for the metadata.
        brokers: The brokers, for the metadata.
        partitions: The Dagster partitions of the publication that failed: if it is one, it is named.

    Raises:
        dagster.RetryRequested: The error may pass, and there is no policy.
        dagster.Failure: Else; with ``allow_retries=False`` if trying again cannot help.
    """
    failure = failure_of(error, topic=topic, brokers=brokers, partitions=partitions, attempt=attempt)
    if error.remedy is Remedy.FAIL or has_retry_policy or attempt >= max_retries:
        raise failure from error
    delay = min(retry_delay * 2 ** min(attempt, 30), _LONGEST_DELAY) * random.uniform(1.0, 1.25)  # noqa: S311  (not a secret)
    request = dg.RetryRequested(max_retries=max_retries, seconds_to_wait=delay)
    request.args = (failure.description,)  # for those who log it by itself
    raise request from failure
