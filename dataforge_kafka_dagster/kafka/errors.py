"""One base error. Each message names the culprit, the cause and the fix; each broker error has one remedy.

librdkafka's own ``retriable()``, ``fatal()`` and ``txn_requires_abort()`` flags are unset in delivery reports, so
errors are classified by code alone, from `REMEDIES`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Final
from urllib.parse import quote, quote_plus

import confluent_kafka


class Remedy(Enum):
    """What can be done about an error."""

    RETRY = "retry"
    """The same work may succeed later: a broker was away, a deadline passed."""
    REBUILD = "rebuild"
    """The same work may succeed with a new producer: this one's state is lost."""
    FAIL = "fail"
    """The same work fails again until somebody changes a setting, a permission or the data."""


class KafkaError(Exception):
    """Base of every error that this package raises.

    Attributes:
        culprit: What is wrong: a topic, an option, a record, a broker address.
        cause: What happened to it, in the words of Kafka where it has some.
        fix: What to do about it.
        code: Name of the Kafka error code, such as ``"MSG_SIZE_TOO_LARGE"``; ``None`` if the error is not Kafka's.
            Names are those of https://kafka.apache.org/protocol#protocol_error_codes; local ones begin with ``_``.
        remedy: Whether trying again can help.
        counts: Undelivered records by error code, if records failed.
        index: Position of the first record that failed, from 0, if a record is at fault.
        among: First and last position that it may have, where only that is known; index is None then.
        key: Its key as it was to be sent, if it has one.
    """

    def __init__(
        self, culprit: str, cause: str, fix: str, *, code: str | None = None, remedy: Remedy | None = None
    ) -> None:
        super().__init__(f"{culprit}: {cause}. {fix}")
        self.culprit = culprit
        self.cause = cause
        self.fix = fix
        self.code = code
        self.remedy = remedy or (remedy_of(code) if code else Remedy.FAIL)
        self.counts: dict[str, int] = {}
        self.index: int | None = None
        self.among: tuple[int, int] | None = None
        self.key: bytes | None = None

    def add(self, cause: str, fix: str = "") -> None:
        """Say more of the cause, and say first what else to do."""
        self.cause += f"; {cause}"
        self.fix = f"{fix}. {self.fix}" if fix else self.fix
        self.args = (f"{self.culprit}: {self.cause}. {self.fix}",)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_error, (type(self), self.__dict__.copy(), str(self)))


def _rebuild_error(cls: type[KafkaError], state: dict[str, object], message: str) -> KafkaError:
    error = cls.__new__(cls, message)
    error.args = (message,)
    error.__dict__.update(state)
    return error


def place_name(topic: str, partition: int | None) -> str:
    """What errors call a topic, or a Kafka partition of it if it is not None."""
    return f"topic {topic!r}" + ("" if partition is None else f", Kafka partition {partition}")


def out_of_turn(culprit: str, cause: str, fix: str) -> KafkaError:
    """The error for a call at a time when it cannot work, nor when it is tried again."""
    return KafkaError(culprit, cause, fix, code="_STATE", remedy=Remedy.FAIL)


class KafkaConfigError(KafkaError, ValueError):
    """A setting that cannot work, alone or together with another one."""


class KafkaTimeoutError(KafkaError):
    """A deadline passed. The record or request may still have reached the broker."""


class NoBrokersAvailable(KafkaError):  # noqa: N818  (the DataForge module's documented name)
    """No broker answered within the connect timeout, or none let us in."""


class InvalidRecordError(KafkaError, ValueError):
    """A record that cannot be published; nothing of its publication is visible, if that is exactly once.

    Attributes:
        index: Position of the record in the output, from 0; ``None`` if the output as a whole is refused.
        field: Name of the field at fault, if one is.
    """

    def __init__(
        self, culprit: str, cause: str, fix: str, *, index: int | None = None, field: str | None = None
    ) -> None:
        super().__init__(culprit, cause, fix)
        self.index = index
        self.field = field


class FencedError(KafkaError):
    """Another attempt of the same publication took over, or somebody ended this one's transaction.

    This one has published nothing, unless its cause says that its outcome is not known.
    """


class SupersededError(KafkaError):
    """An earlier attempt had published the publication, and another run has published it anew since."""


_RETRY: Final = (
    "_TRANSPORT _RESOLVE _MSG_TIMED_OUT _ALL_BROKERS_DOWN _TIMED_OUT _TIMED_OUT_QUEUE _QUEUE_FULL _ISR_INSUFF "
    "_NODE_UPDATE _WAIT_COORD _IN_PROGRESS _PREV_IN_PROGRESS _OUTDATED _WAIT_CACHE _INTR _RETRY _UNKNOWN_BROKER "
    "_DESTROY_BROKER _PARTIAL "
    "LEADER_NOT_AVAILABLE NOT_LEADER_FOR_PARTITION REQUEST_TIMED_OUT BROKER_NOT_AVAILABLE REPLICA_NOT_AVAILABLE "
    "STALE_CTRL_EPOCH NETWORK_EXCEPTION COORDINATOR_LOAD_IN_PROGRESS COORDINATOR_NOT_AVAILABLE NOT_COORDINATOR "
    "NOT_ENOUGH_REPLICAS NOT_ENOUGH_REPLICAS_AFTER_APPEND NOT_CONTROLLER CONCURRENT_TRANSACTIONS "
    "TRANSACTION_COORDINATOR_FENCED KAFKA_STORAGE_ERROR REASSIGNMENT_IN_PROGRESS FENCED_LEADER_EPOCH "
    "UNKNOWN_LEADER_EPOCH STALE_BROKER_EPOCH OFFSET_NOT_AVAILABLE PREFERRED_LEADER_NOT_AVAILABLE "
    "ELIGIBLE_LEADERS_NOT_AVAILABLE UNSTABLE_OFFSET_COMMIT THROTTLING_QUOTA_EXCEEDED TRANSACTION_ABORTABLE "
    "UNKNOWN_TOPIC_ID INCONSISTENT_TOPIC_ID REBOOTSTRAP_REQUIRED REBALANCE_IN_PROGRESS"
)
_REBUILD: Final = (
    "_FATAL _GAPLESS_GUARANTEE _INCONSISTENT _DESTROY _CRIT_SYS_RESOURCE _STATE _CONFLICT _PURGE_QUEUE _PURGE_INFLIGHT "
    "OUT_OF_ORDER_SEQUENCE_NUMBER DUPLICATE_SEQUENCE_NUMBER UNKNOWN_PRODUCER_ID INVALID_PRODUCER_ID_MAPPING "
    "INVALID_TXN_STATE"
)
REMEDIES: Final[dict[str, Remedy]] = {
    **dict.fromkeys(_RETRY.split(), Remedy.RETRY),
    **dict.fromkeys(_REBUILD.split(), Remedy.REBUILD),
}
"""Remedy by error code. Every code that is not here fails: a code nobody foresaw is shown, not repeated."""

FENCED_CODES: Final = frozenset({"_FENCED", "PRODUCER_FENCED", "INVALID_PRODUCER_EPOCH"})

LATCHED_CODES: Final = frozenset({"_AUTHENTICATION", "_SSL", "_RESOLVE", "SASL_AUTHENTICATION_FAILED"})
"""Codes that only the error callback sees: the request itself just times out."""

UNKNOWN_TOPIC_CODES: Final = frozenset({"UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC", "_UNKNOWN_PARTITION"})
"""Codes of a topic, or a Kafka partition of it, that is not there, or that a broker does not know."""

NO_ANSWER_CODES: Final = frozenset(
    {"_MSG_TIMED_OUT", "_TIMED_OUT", "_TIMED_OUT_QUEUE", "_TRANSPORT", "_ALL_BROKERS_DOWN", "_RESOLVE"}
)
"""Codes that say that no broker answered, but not why."""

_CHECK_USER: Final = (
    "Check sasl_mechanism, and sasl_username and sasl_password or the OAuth token, against the cluster's users"
)
_FIXES: Final[dict[str, str]] = {
    "_AUTHENTICATION": _CHECK_USER,
    "SASL_AUTHENTICATION_FAILED": _CHECK_USER,
    "UNSUPPORTED_SASL_MECHANISM": "Set sasl_mechanism to one that the listener offers",
    "_SSL": (
        "Check security_protocol and ssl_ca_location against the listener, that the broker's certificate is valid today"
        " and has the host name in bootstrap_servers, and the client certificate"
    ),
    "_RESOLVE": "Check the host names in bootstrap_servers, and the advertised listeners of the brokers",
    "_TRANSPORT": (
        "Check that the brokers in bootstrap_servers run and that a firewall lets you through, that it names the"
        " cluster's listener and security_protocol is that of the listener, and whether that asks for a client"
        " certificate"
    ),
    "_ALL_BROKERS_DOWN": (
        "Check that the brokers in bootstrap_servers run, and that security_protocol is that of the listener"
    ),
    "COORDINATOR_NOT_AVAILABLE": (
        "Check that enough brokers run: __transaction_state and __consumer_offsets need their min.insync.replicas"
    ),
    "_MSG_TIMED_OUT": "Check the brokers' health, or raise delivery_timeout",
    "_TIMED_OUT": (
        "Check that the brokers in bootstrap_servers run and can be reached from here, and that security_protocol is"
        " that of their listener"
    ),
    "REQUEST_TIMED_OUT": "Check the brokers' health, or raise delivery_timeout",
    "_UNKNOWN_TOPIC": "Create the topic, or correct its name",
    "UNKNOWN_TOPIC_OR_PART": "Create the topic, or correct its name",
    "TOPIC_EXCEPTION": (
        "Use a legal topic name: 1 to 249 of the characters a-z A-Z 0-9 . _ -, and none that only a . in place of a _"
        " tells from another's"
    ),
    "_UNKNOWN_PARTITION": "Use a Kafka partition that the topic has, or none and let the key decide",
    "MSG_SIZE_TOO_LARGE": (
        "Split the record, or raise 'message.max.bytes' in librdkafka_config and max.message.bytes on the topic"
    ),
    "RECORD_LIST_TOO_LARGE": "Lower batch_size, or raise max.message.bytes on the topic",
    "INVALID_REPLICATION_FACTOR": "Lower replication_factor to at most the number of brokers, or leave it out",
    "INVALID_PARTITIONS": "Correct the number of Kafka partitions",
    "INVALID_CONFIG": "Correct the topic settings in create_topics",
    "TOPIC_AUTHORIZATION_FAILED": (
        "Grant this user the ACLs on the topic: WRITE to publish, READ to read back and for the ledger of"
        " delivery_guarantee='exactly_once'"
    ),
    "GROUP_AUTHORIZATION_FAILED": (
        "Grant this user the READ ACL on Group, prefixed with the resource's transactional_id_prefix,"
        " or set delivery_guarantee='at_least_once'"
    ),
    "TRANSACTIONAL_ID_AUTHORIZATION_FAILED": (
        "Grant this user the WRITE ACL on TransactionalId, prefixed with the resource's"
        " transactional_id_prefix, or set delivery_guarantee='at_least_once'"
    ),
    "CLUSTER_AUTHORIZATION_FAILED": (
        "Grant this user the WRITE ACL on the topic (brokers before 2.8: IDEMPOTENT_WRITE on Cluster too)"
    ),
    "INVALID_TRANSACTION_TIMEOUT": "Lower transaction_timeout to at most the broker's transaction.max.timeout.ms",
    "CONCURRENT_TRANSACTIONS": (
        "Wait until the end of an earlier transaction is written: Kafka cannot while a Kafka partition in it has no"
        " leader, or fewer replicas in sync than its min.insync.replicas"
    ),
    "NOT_ENOUGH_REPLICAS": "Wait until enough replicas are in sync, or lower the topic's min.insync.replicas",
    "NOT_ENOUGH_REPLICAS_AFTER_APPEND": (
        "Wait until enough replicas are in sync, or lower the topic's min.insync.replicas"
    ),
    "INVALID_RECORD": "Give every record a key (the topic is compacted), or correct what the broker's log names",
    "INVALID_TIMESTAMP": "Use a timestamp that the topic's message.timestamp.*.max.ms settings allow",
    "POLICY_VIOLATION": "Ask the cluster's owner which policy refused the request",
    "UNSUPPORTED_VERSION": "Use a broker of Kafka 2.5 or later",
    "OFFSET_METADATA_TOO_LARGE": (
        "Raise offset.metadata.max.bytes of the brokers to its default of 4096, for the ledger,"
        " or set delivery_guarantee='at_least_once'"
    ),
    "_INVALID_ARG": "Correct the option that the message names",
    "_QUEUE_FULL": (
        "Raise buffer_memory and, for more than 100,000 small records at once, 'queue.buffering.max.messages' in"
        " librdkafka_config; or send more slowly"
    ),
    "_INCONSISTENT": (
        "Try again, with a new producer if this one has failed; 'max.in.flight.requests.per.connection': 1 in"
        " librdkafka_config rules this out, and is slower"
    ),
    "_STATE": "Make a new producer: this one was closed or has failed",
    "_PURGE_QUEUE": "Give close() more time, or flush() first",
    "_PURGE_INFLIGHT": "Look whether it is there before you send it again; give close() more time, or flush() first",
}


def remedy_of(code: str) -> Remedy:
    """The remedy for an error code; `Remedy.FAIL` for one that the table does not have."""
    return REMEDIES.get(code, Remedy.FAIL)


def remedy_of_status(status: int) -> Remedy:
    """The remedy for an answer of HTTP: whether it may be another one soon (RFC 9110, 15)."""
    return Remedy.RETRY if status in _PASSING or status >= _SERVERS_FAULT else Remedy.FAIL


# Statuses of HTTP that may be others soon: Request Timeout, Too Early, Too Many Requests, and the server's own faults.
_PASSING: Final = frozenset({408, 425, 429})
_SERVERS_FAULT: Final = 500


def fix_for(code: str) -> str:
    """What a user can do about an error code, as an imperative sentence without its full stop."""
    default = {
        Remedy.RETRY: "Try again; if it goes on, check the brokers' health",
        Remedy.REBUILD: "Try again with a new producer",
        Remedy.FAIL: f"Look up {code} in Kafka's protocol error codes",
    }
    return _FIXES.get(code, default[remedy_of(code)])


def from_broker(error: confluent_kafka.KafkaError, culprit: str) -> KafkaError:
    """Our error for one of confluent-kafka's.

    Returns:
        `KafkaTimeoutError` for a deadline, `FencedError` for a fenced producer, else `KafkaError`, with code,
        cause and fix.
    """
    code = error.name()
    text = error.str() or code
    cause = f"{text} [{code}]"
    if code in FENCED_CODES:
        return FencedError(
            culprit,
            f"another attempt at the same publication took over, or somebody has ended its transaction ({cause})",
            "Nothing of this attempt is visible; look at the run of the other one, and re-execute this one if there is"
            " none",
            code=code,
            remedy=Remedy.FAIL,
        )
    if code == "_PURGE_INFLIGHT":
        cause += "; it was sent, and given up before an answer came, so that it may have been written"
    timed_out = code in {"_MSG_TIMED_OUT", "_TIMED_OUT", "_TIMED_OUT_QUEUE", "REQUEST_TIMED_OUT", "_PURGE_INFLIGHT"}
    return (KafkaTimeoutError if timed_out else KafkaError)(culprit, cause, fix_for(code), code=code)


_SHORT: Final = 3


def without_secrets(text: str, secrets: Sequence[str]) -> str:
    """A text without secrets: as they are, each line of them, and as Python, JSON and URLs quote them."""
    # A key's text may be cut into its lines; what is as short as a brace says nothing, and stands in any text.
    lines = itertools.chain.from_iterable(map(str.splitlines, secrets))
    parts = [line for line in lines if not line.startswith("-----")]
    forms = {form for secret in (*secrets, *parts) if len(secret) > _SHORT for form in _quoted(secret)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def _quoted(secret: str) -> Iterator[str]:
    yield secret
    # Python escapes a ' only in a text that has a " too.
    parts = [repr(f'{part}"')[1:-2] for part in secret.split("'")]
    yield "'".join(parts)
    yield "\\'".join(parts)
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    # What is no text has no such form.
    with contextlib.suppress(UnicodeEncodeError):
        yield quote(secret)
        yield quote(secret, safe="")
        yield quote_plus(secret)
