"""The look at a topic before anything is written to it; and its creation, for those who ask for it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import confluent_kafka
from confluent_kafka.cimpl import NewTopic

from dataforge_kafka_dagster.kafka.config import KafkaTopicSpec
from dataforge_kafka_dagster.kafka.connection import Connection, logger
from dataforge_kafka_dagster.kafka.errors import KafkaError, fix_for

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient

GONE: Final = "the topic does not exist any more"
ASK_WAIT: Final = 3.0
"""Seconds in which `ask_end_offsets` has an answer, if the leaders that a client knows are still there."""
_UNKNOWN: Final = "UNKNOWN_TOPIC_OR_PART"
# Brokers hear of a new topic one after the other.
_NEW_TOPIC_SECONDS: Final = 1.0
# To learn its settings, once a broker has told the rest.
_SETTINGS_SECONDS: Final = 1.0
_DENIED: Final = frozenset({"TOPIC_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED"})


class Topic(NamedTuple):
    """A topic as it is.

    Attributes:
        partitions: Number of Kafka partitions.
        id: Kafka's own id; a topic that is deleted and made anew has another one. None from brokers before 2.8.
        max_bytes: Its max.message.bytes, the largest batch after compression; None if it is not known.
        compacted: Whether its cleanup.policy is known to compact it: then it takes no record without a key.
        timestamps: How much older and how much newer than the broker's clock a record's timestamp may be, milliseconds;
            None if it may be anything, or that is not known.
        retention: How long after its timestamp it deletes a record, milliseconds; None if it does not, or that is not
            known.
        writable: Whether this user may write to it; true if the brokers do not tell.
        readable: Whether this user may read it, the same way.
    """

    partitions: int
    id: str | None
    max_bytes: int | None = None
    compacted: bool = False
    timestamps: tuple[int, int] | None = None
    retention: int | None = None
    writable: bool = True
    readable: bool = True


def check_topic_exists(
    connection: Connection,
    topic: str,
    spec: KafkaTopicSpec | None,
    timeout: float,
    *,
    ledger: bool = False,
    any_number: bool = False,
) -> Topic:
    """Check that a topic can be written to, by a request for it and one for its settings if it is as it should be.

    Args:
        connection: The cluster.
        topic: The topic.
        spec: How to create it if it is missing, and the least Kafka partitions it must have; None creates nothing.
        timeout: Longest wait, seconds.
        ledger: Whether a ledger will name its offsets, for which brokers want READ on it.
        any_number: Whether it may have fewer Kafka partitions than it would be created with.

    Returns:
        The topic as it is.

    Raises:
        NoBrokersAvailable: No broker answered in time, or none let us in.
        KafkaError: It does not exist and is not to be created, could not be created, has too few Kafka partitions, or
            this user may not write to it, or has no READ for the ledger.
    """
    deadline = time.monotonic() + timeout
    try:
        grace = 0.0 if spec else min(_NEW_TOPIC_SECONDS, timeout)
        found = _look_for(connection, topic, deadline, grace)
    except KafkaError as error:
        if spec is not None and error.code in _DENIED:
            error.add("the topic may be missing, too", "To create it, this user needs the CREATE ACL on it besides")
        elif error.code in _DENIED:
            error.add("Kafka says the same of a topic that is not there", "Correct its name if it is wrong")
        if error.code != _UNKNOWN:
            raise
        if spec is None:
            raise KafkaError(error.culprit, error.cause, _how_to_create(connection, topic), code=_UNKNOWN) from None
        _create(connection, topic, spec, deadline)
        found = _look_for(connection, topic, deadline, timeout)
        with contextlib.suppress(KafkaError):
            end_offsets(connection, topic, found.partitions, max(0.1, deadline - time.monotonic()))
    unreadable = ledger and not found.readable
    if unreadable or not found.writable:
        culprit, code = f"topic {topic!r}, {connection.name}", "TOPIC_AUTHORIZATION_FAILED"
        what = "write to it" if not found.writable else "read it, as the ledger needs"
        raise KafkaError(culprit, f"this user may not {what} [{code}]", fix_for(code), code=code)
    if spec is not None and found.partitions < spec.partitions and not any_number:
        raise KafkaError(
            f"topic {topic!r}, {connection.name}",
            f"it has {found.partitions} Kafka partitions, but create_topics asks for {spec.partitions}",
            f"Add some: kafka-topics.sh --bootstrap-server {connection.config.servers} --alter --topic {topic}"
            f" --partitions {spec.partitions} (keys then go to other Kafka partitions than before),"
            f" or ask for {found.partitions}",
        )
    return found


def look_at_topic(connection: Connection, topic: str, timeout: float, *, settings: bool = False) -> Topic:
    """A topic as it is, by one metadata request.

    Args:
        connection: The cluster.
        topic: The topic.
        timeout: Longest wait, seconds.
        settings: Whether to ask for its settings at the same time; they are left out if they do not come in time.

    Raises:
        NoBrokersAvailable: No broker answered in time, or none let us in.
        KafkaError: It does not exist, or this user may not see it.
    """
    deadline = time.monotonic() + timeout
    culprit = f"topic {topic!r}, {connection.name}"
    asked: list[concurrent.futures.Future[Any]] = []

    def ask() -> concurrent.futures.Future[Any]:
        left = max(0.1, deadline - time.monotonic())
        if settings:
            asked[:] = [_ask_for_settings(connection, topic, left)]
        names = confluent_kafka.TopicCollection([topic])
        future: concurrent.futures.Future[Any] = connection.admin.describe_topics(
            names, include_authorized_operations=True, request_timeout=left
        )[topic]
        return future

    description = connection.answer(ask, max(0.1, deadline - time.monotonic()), culprit)
    # Brokers that do not say what is allowed give none.
    allowed = {operation.name for operation in description.authorized_operations or ()}
    # The id of all zeros, which brokers give that have none.
    identifier = str(description.topic_id)
    known = _settings_of(asked[0], deadline) if asked else {}
    size = known.get("max.message.bytes")
    return Topic(
        len(description.partitions),
        None if not identifier.strip("A") else identifier,
        None if size is None else int(size),
        "compact" in known.get("cleanup.policy", ""),
        _timestamps(known),
        _retention(known),
        not allowed or "WRITE" in allowed,
        not allowed or "READ" in allowed,
    )


def _timestamps(known: dict[str, str]) -> tuple[int, int] | None:
    if known.get("message.timestamp.type") != "CreateTime":
        return None
    # One setting before Kafka 3.6.
    both = known.get("message.timestamp.difference.max.ms", str(2**63))
    before, after = (known.get(f"message.timestamp.{which}.max.ms", both) for which in ("before", "after"))
    return int(before), int(after)


def _retention(known: dict[str, str]) -> int | None:
    if "delete" not in known.get("cleanup.policy", "") or known.get("message.timestamp.type") != "CreateTime":
        return None
    milliseconds = int(known.get("retention.ms", "-1"))
    return None if milliseconds < 0 else milliseconds


def _ask_for_settings(connection: Connection, topic: str, timeout: float) -> concurrent.futures.Future[Any]:
    from confluent_kafka.admin import ConfigResource  # type: ignore[attr-defined]  # noqa: PLC0415  (slow to import)

    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    asked: dict[ConfigResource, concurrent.futures.Future[Any]] = connection.admin.describe_configs(
        [resource], request_timeout=timeout
    )
    return asked[resource]


def _settings_of(asked: concurrent.futures.Future[Any], deadline: float) -> dict[str, str]:
    """A topic's settings; none if this user may not see them, or they do not come in time."""
    try:
        entries = asked.result(max(0.0, min(_SETTINGS_SECONDS, deadline - time.monotonic())))
    except (confluent_kafka.KafkaException, concurrent.futures.TimeoutError):
        return {}
    return {name: entry.value for name, entry in entries.items() if entry.value is not None}


def end_offsets(connection: Connection, topic: str, partitions: int, timeout: float) -> list[int]:
    """The offset that the next record of each Kafka partition will get: its high watermark.

    Args:
        connection: The cluster.
        topic: The topic.
        partitions: How many it has.
        timeout: Longest wait, seconds.

    Raises:
        KafkaError: A leader does not answer in time, or refuses.
    """
    seconds = min(timeout, ASK_WAIT)

    def ask() -> list[int]:
        return ask_end_offsets(connection.admin, topic, partitions, seconds)

    return connection.in_thread(ask, timeout, f"topic {topic!r}, {connection.name}")


def ask_end_offsets(admin: AdminClient, topic: str, partitions: int, timeout: float) -> list[int]:
    """As `end_offsets`, asked once: of a new topic, whether each leader takes requests already.

    Brokers name a leader a moment before it is one (KRaft), and then it refuses what is sent to it.

    Raises:
        confluent_kafka.KafkaException: A leader does not answer in time, or is none yet.
    """
    from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]  # noqa: PLC0415  (slow to import)

    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    asked = {confluent_kafka.TopicPartition(topic, partition): latest for partition in range(partitions)}
    try:
        found = admin.list_offsets(asked, request_timeout=timeout)
        offsets = [found[partition].result(2 * timeout).offset for partition in asked]
    except confluent_kafka.KafkaException as exception:
        error = exception.args[0]
    except concurrent.futures.TimeoutError:
        error = confluent_kafka.KafkaError(confluent_kafka.KafkaError.REQUEST_TIMED_OUT)
    else:
        if min(offsets) >= 0:
            return offsets
        error = None
    # The client goes by the leaders that it has seen until it looks again; without any, it does not ask at all.
    admin.list_topics(topic, timeout=timeout)
    if error is None or error.name() == "_NOENT":
        error = confluent_kafka.KafkaError(confluent_kafka.KafkaError.LEADER_NOT_AVAILABLE)
    raise confluent_kafka.KafkaException(error)


def _how_to_create(connection: Connection, topic: str) -> str:
    return (
        f"Create the topic: kafka-topics.sh --bootstrap-server {connection.config.servers} --create --topic {topic}"
        " --partitions 6; or correct its name; or set create_topics=KafkaTopicSpec(partitions=6), in YAML"
        " create_topics: {partitions: 6}, and publications create their topics"
    )


def _create(connection: Connection, topic: str, spec: KafkaTopicSpec, deadline: float) -> None:
    culprit = f"creation of topic {topic!r} ({spec.describe()}), {connection.name}"
    new = NewTopic(topic, spec.partitions, spec.replication_factor or -1, config=dict(spec.configs))

    def ask() -> concurrent.futures.Future[Any]:
        left = max(0.1, deadline - time.monotonic())
        future: concurrent.futures.Future[Any] = connection.admin.create_topics(
            [new], operation_timeout=left, request_timeout=left
        )[topic]
        return future

    try:
        connection.answer(ask, max(0.1, deadline - time.monotonic()), culprit)
        logger.info("Created topic %r (%s)", topic, spec.describe())
    except KafkaError as error:
        if error.code == "TOPIC_ALREADY_EXISTS":  # another step was faster
            return
        if error.code in _DENIED:
            fix = "Grant this user the CREATE ACL on the topic, or have the topic created by somebody who has it"
            raise KafkaError(error.culprit, error.cause, fix, code=error.code) from None
        raise


def topic_trouble(connection: Connection, topic: str, timeout: float) -> str | None:
    """What is wrong with a topic that is gone or lacks replicas; None if all is well, or nobody answers in time."""
    names = confluent_kafka.TopicCollection([topic])

    def ask() -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = connection.admin.describe_topics(names, request_timeout=timeout)[topic]
        return future

    try:
        partitions = connection.answer(ask, timeout, topic).partitions
    except KafkaError as error:
        return GONE if error.code == _UNKNOWN else None
    for partition in partitions:
        if partition.leader is None or partition.leader.id < 0:
            return f"Kafka partition {partition.id} has no leader"
        if len(partition.isr) < len(partition.replicas):
            return (
                f"Kafka partition {partition.id} has {len(partition.isr)} of its {len(partition.replicas)} replicas in"
                " sync, and the topic's min.insync.replicas may ask for more"
            )
    return None


def current(connection: Connection, topic: str, timeout: float) -> Topic:
    """A topic as it is now, without its settings, to see whether it is still the same one.

    Raises:
        NoBrokersAvailable: No broker answered in time, or none let us in.
        KafkaError: It does not exist, also not a second later.
    """
    return _look_for(connection, topic, time.monotonic() + timeout, _NEW_TOPIC_SECONDS, settings=False)


def lost_since(connection: Connection, topic: str, known: str | None, timeout: float) -> str | None:
    """What has become of the topic that had this id, None if brokers told none; None if it is there, as far as known.

    Raises:
        KafkaError: The brokers do not answer.
    """
    try:
        now = current(connection, topic, timeout).id
    except KafkaError as error:
        if error.code != _UNKNOWN:
            raise
        return "deleted"
    return "deleted and made anew" if are_different(known, now) else None


def are_different(known: str | None, now: str | None) -> bool:
    """Whether two ids of a topic are not the same one's; brokers before 2.8 tell none, so that it cannot be said."""
    return None not in {known, now} and known != now


def _look_for(connection: Connection, topic: str, deadline: float, grace: float, *, settings: bool = True) -> Topic:
    """The topic, asked for again for so many seconds while it is unknown."""
    given_up = min(deadline, time.monotonic() + grace)
    while True:
        try:
            return look_at_topic(connection, topic, max(0.1, deadline - time.monotonic()), settings=settings)
        except KafkaError as error:
            if error.code != _UNKNOWN or time.monotonic() >= given_up:
                raise
        time.sleep(0.05)
