import http.client
import pickle
import ssl
import sys
import threading
import time
import traceback
import types
import urllib.error
from pathlib import Path

import botocore.config
import botocore.session
import confluent_kafka
import dagster as dg
import httpx
import pytest
from conftest import mostly_slow

from dataforge_kafka_dagster import (
    DataForgeKafkaProducer,
    KafkaError,
    KafkaIOManager,
    KafkaProducerConfig,
    KafkaProducerResource,
    KafkaTimeoutError,
    NoBrokersAvailable,
)
from dataforge_kafka_dagster.failures import failure_of, raise_in_dagster
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.errors import (
    FENCED_CODES,
    LATCHED_CODES,
    NO_ANSWER_CODES,
    REMEDIES,
    FencedError,
    InvalidRecordError,
    KafkaConfigError,
    Remedy,
    fix_for,
    from_broker,
    remedy_of,
)
from dataforge_kafka_dagster.kafka.publication import PublicationWriter

CODES = {
    name: value
    for name, value in vars(confluent_kafka.KafkaError).items()
    if isinstance(value, int) and name.strip("_").isupper()
}
NAMES = sorted({confluent_kafka.KafkaError(value).name() for value in CODES.values()} - {"NO_ERROR", "UNKNOWN"})


def test_the_client_has_codes_to_walk():
    assert len(CODES) > 140
    assert {"_MSG_TIMED_OUT", "MSG_SIZE_TOO_LARGE", "_FENCED"} <= set(NAMES)


def test_every_code_has_a_remedy_and_a_fix():
    for name in NAMES:
        assert isinstance(remedy_of(name), Remedy), name
        fix = fix_for(name)
        assert len(fix.split()) >= 4, name
        assert fix[0].isupper(), name
        assert not fix.endswith("."), name


def test_every_code_of_the_client_becomes_our_error():
    for value in CODES.values():
        theirs = confluent_kafka.KafkaError(value)
        ours = from_broker(theirs, "topic 't'")
        assert isinstance(ours, KafkaError)
        assert ours.code == theirs.name()
        assert str(ours).startswith("topic 't': "), ours
        assert theirs.name() in ours.cause
        assert ours.fix in str(ours)
        if not isinstance(ours, FencedError):
            assert ours.remedy is remedy_of(theirs.name())


def test_the_table_names_real_codes_only():
    # confluent-kafka 2.13 does not know these two yet.
    newer = {"INCONSISTENT_TOPIC_ID", "TRANSACTION_ABORTABLE"}
    assert (set(REMEDIES) | FENCED_CODES | LATCHED_CODES | NO_ANSWER_CODES) - set(NAMES) <= newer


@pytest.mark.parametrize(
    ("name", "remedy"),
    {
        "_MSG_TIMED_OUT": Remedy.RETRY,
        "_ALL_BROKERS_DOWN": Remedy.RETRY,
        "_TRANSPORT": Remedy.RETRY,
        "NOT_ENOUGH_REPLICAS": Remedy.RETRY,
        "NOT_LEADER_FOR_PARTITION": Remedy.RETRY,
        "OUT_OF_ORDER_SEQUENCE_NUMBER": Remedy.REBUILD,
        "_FATAL": Remedy.REBUILD,
        "_STATE": Remedy.REBUILD,
        "_PURGE_QUEUE": Remedy.REBUILD,
        "REBALANCE_IN_PROGRESS": Remedy.RETRY,
        "MSG_SIZE_TOO_LARGE": Remedy.FAIL,
        "TOPIC_AUTHORIZATION_FAILED": Remedy.FAIL,
        "UNKNOWN_TOPIC_OR_PART": Remedy.FAIL,
        "_AUTHENTICATION": Remedy.FAIL,
        "_SSL": Remedy.FAIL,
        "_FENCED": Remedy.FAIL,
        "POLICY_VIOLATION": Remedy.FAIL,
        "INVALID_RECORD": Remedy.FAIL,
        "A_CODE_OF_NEXT_YEAR": Remedy.FAIL,
    }.items(),
)
def test_remedies(name, remedy):
    assert remedy_of(name) is remedy


@pytest.mark.parametrize("code", ["_TRANSPORT", "_ALL_BROKERS_DOWN", "_TIMED_OUT"])
def test_where_no_broker_answers_the_first_to_check_is_that_it_runs(code):
    assert fix_for(code).startswith("Check that the brokers in bootstrap_servers run")


def test_the_setting_that_is_too_small_for_the_ledger_is_named():
    assert "offset.metadata.max.bytes of the brokers to its default of 4096" in fix_for("OFFSET_METADATA_TOO_LARGE")


def test_unknown_codes_point_to_kafkas_list():
    assert "A_CODE_OF_NEXT_YEAR" in fix_for("A_CODE_OF_NEXT_YEAR")


@pytest.mark.parametrize("name", ["_MSG_TIMED_OUT", "_TIMED_OUT", "_TIMED_OUT_QUEUE", "REQUEST_TIMED_OUT"])
def test_deadlines_are_timeout_errors(name):
    error = from_broker(confluent_kafka.KafkaError(getattr(confluent_kafka.KafkaError, name)), "x")
    assert type(error) is KafkaTimeoutError
    assert error.remedy is Remedy.RETRY


@pytest.mark.parametrize("name", sorted(FENCED_CODES))
def test_fencing_is_told_and_not_repeated(name):
    value = next(v for v in CODES.values() if confluent_kafka.KafkaError(v).name() == name)
    error = from_broker(confluent_kafka.KafkaError(value), "publication")
    assert type(error) is FencedError
    assert error.remedy is Remedy.FAIL
    assert "another attempt" in error.cause
    assert error.code == name


def test_one_base_and_plain_python_bases():
    for cls in (KafkaConfigError, KafkaTimeoutError, NoBrokersAvailable, InvalidRecordError, FencedError):
        assert issubclass(cls, KafkaError)
        assert not issubclass(cls, dg.DagsterError)
    assert issubclass(KafkaConfigError, ValueError)
    assert issubclass(InvalidRecordError, ValueError)
    assert not issubclass(KafkaError, confluent_kafka.KafkaException)


def test_message_is_culprit_cause_fix():
    error = KafkaError("topic 't'", "it is gone", "Create it", code="UNKNOWN_TOPIC_OR_PART")
    assert str(error) == "topic 't': it is gone. Create it"
    assert (error.culprit, error.cause, error.fix) == ("topic 't'", "it is gone", "Create it")


def test_what_is_added_to_an_error_is_told_with_what_to_do_for_it_first():
    error = KafkaError("topic 't'", "no answer", "Try again")
    error.add("it has no leader")
    assert str(error) == "topic 't': no answer; it has no leader. Try again"
    error.add("a broker is away", "Start it")
    assert str(error) == "topic 't': no answer; it has no leader; a broker is away. Start it. Try again"
    assert (error.cause, error.fix) == ("no answer; it has no leader; a broker is away", "Start it. Try again")


def _errors():
    counted = KafkaTimeoutError("a", "b", "C", code="_TIMED_OUT")
    counted.counts = {"_TIMED_OUT": 3}
    return [
        KafkaError("a", "b", "C"),
        KafkaError("a", "b", "C", code="_X", remedy=Remedy.REBUILD),
        counted,
        KafkaConfigError("a", "b", "C"),
        NoBrokersAvailable("a", "b", "C", code="_RESOLVE"),
        InvalidRecordError("a", "b", "C", index=4, field="f"),
        FencedError("a", "b", "C", code="_FENCED"),
    ]


@pytest.mark.parametrize("error", _errors(), ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert again.args == error.args
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert traceback.format_exception(again)[-1].strip().endswith(str(error))


def test_failure_says_what_happened_and_what_to_do():
    error = KafkaError("topic 't': 5 records", "too large", "Split it", code="MSG_SIZE_TOO_LARGE")
    error.counts = {"MSG_SIZE_TOO_LARGE": 3, "_PURGE_QUEUE": 2}
    failure = failure_of(error, topic="t", brokers="a:1", attempt=0)
    assert failure.description == str(error)
    assert failure.allow_retries is False
    said = {name: value.value for name, value in failure.metadata.items()}
    assert said == {
        "kafka/topic": "t",
        "kafka/brokers": "a:1",
        "kafka/attempt": 1,
        "kafka/retriable": False,
        "kafka/error_code": "MSG_SIZE_TOO_LARGE",
        "kafka/culprit": "topic 't': 5 records",
        "kafka/cause": "too large",
        "kafka/what_to_do": "Split it",
        "kafka/errors_by_code": {"MSG_SIZE_TOO_LARGE": 3, "_PURGE_QUEUE": 2},
        "kafka/undelivered_records": 5,
    }


def test_failure_of_a_record_names_index_and_field():
    error = InvalidRecordError("a", "b", "C", index=4, field="f")
    error.key = b"k\xff" + b"x" * 1000
    failure = failure_of(error)
    assert failure.metadata["kafka/record_key"].value.startswith("k\\xffxx")
    assert len(failure.metadata["kafka/record_key"].value) < 300
    assert failure.metadata["kafka/record_index"].value == 4
    assert failure.metadata["kafka/field"].value == "f"
    assert "kafka/error_code" not in failure.metadata


@pytest.mark.parametrize(("partitions", "named"), [((), None), (("mon",), "mon"), (("mon", "tue"), None)])
def test_failure_of_one_dagster_partition_names_it(partitions, named):
    failure = failure_of(KafkaError("a", "b", "C"), partitions=partitions)
    assert failure.description == ("a: b. C" if named is None else f"Dagster partition {named!r}: a: b. C")
    said = failure.metadata.get("kafka/dagster_partition")
    assert (said and said.value) == named


def test_failure_of_one_of_several_records_names_the_first_and_last_that_it_may_be():
    error = KafkaError("a", "b", "C")
    error.among = (3, 9)
    metadata = failure_of(error).metadata
    assert metadata["kafka/record_among"].value == "3 to 9"
    assert "kafka/record_index" not in metadata


def _raise(error, **options):
    raise_in_dagster(
        error, **({"attempt": 0, "has_retry_policy": False, "max_retries": 3, "retry_delay": 2.0} | options)
    )


@pytest.mark.parametrize("code", ["_MSG_TIMED_OUT", "OUT_OF_ORDER_SEQUENCE_NUMBER"])
def test_what_may_pass_is_retried(code):
    error = KafkaError("a", "b", "C", code=code)
    with pytest.raises(dg.RetryRequested) as caught:
        _raise(error, attempt=1)
    assert caught.value.max_retries == 3
    assert 4.0 <= caught.value.seconds_to_wait <= 5.0
    assert isinstance(caught.value.__cause__, dg.Failure)
    assert str(caught.value) == "a: b. C"
    said = caught.value.__cause__.metadata
    assert (said["kafka/retriable"].value, said["kafka/attempt"].value) == (True, 2)


@pytest.mark.parametrize(("attempt", "low", "high"), [(1, 4, 5), (3, 16, 20), (30, 300, 375), (2000, 300, 375)])
def test_waits_double_to_a_bound_with_jitter(attempt, low, high):
    waits = set()
    for _ in range(20):
        with pytest.raises(dg.RetryRequested) as caught:
            _raise(KafkaError("a", "b", "C", code="_TRANSPORT"), attempt=attempt, max_retries=4000)
        waits.add(caught.value.seconds_to_wait)
    assert low <= min(waits) < max(waits) <= high


def test_what_cannot_pass_is_never_retried():
    with pytest.raises(dg.Failure) as caught:
        _raise(KafkaError("a", "b", "C", code="MSG_SIZE_TOO_LARGE"))
    assert caught.value.allow_retries is False


@pytest.mark.parametrize("options", [{"has_retry_policy": True}, {"max_retries": 0}])
@pytest.mark.parametrize("code", ["_TRANSPORT", "OUT_OF_ORDER_SEQUENCE_NUMBER"])
def test_a_retry_policy_decides_alone(code, options):
    with pytest.raises(dg.Failure) as caught:
        _raise(KafkaError("a", "b", "C", code=code), **options)
    assert caught.value.allow_retries is True


ATTEMPTS = [
    # (RetryPolicy's max_retries, step_retries, attempts)
    (None, 0, 1),
    (None, 2, 3),
    (1, 0, 2),
    (1, 3, 2),
    (0, 3, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "step_retries", "attempts"), ATTEMPTS)
@pytest.mark.parametrize("door", ["io manager", "publishing"])
def test_a_retry_policy_and_step_retries_are_never_multiplied(
    door, policy, step_retries, attempts, closed_port, instance
):
    began = []
    kafka = KafkaProducerResource(
        bootstrap_servers=closed_port, connect_timeout=0.1, step_retries=step_retries, step_retry_delay=0.01
    )
    retry_policy = None if policy is None else dg.RetryPolicy(max_retries=policy)

    @dg.asset(retry_policy=retry_policy)
    def made():
        began.append(1)
        return [{"a": 1}]

    @dg.asset(retry_policy=retry_policy)
    def sent(context: dg.AssetExecutionContext, kafka: KafkaProducerResource) -> None:
        began.append(1)
        with kafka.publishing(context, topic="t") as publication:
            publication.send({"a": 1})

    asset = made if door == "io manager" else sent
    resources = {"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka)}
    result = dg.materialize([asset], resources=resources, instance=instance, raise_on_error=False)
    assert not result.success
    assert len(began) == attempts
    (failed,) = result.get_step_failure_events()
    said = failed.step_failure_data.user_failure_data or failed.step_failure_data.error.cause
    assert closed_port in str(said)


@pytest.mark.parametrize("policy", mostly_slow([None, dg.RetryPolicy(max_retries=2)]))
def test_what_cannot_pass_is_tried_once_whatever_the_policy(policy, closed_port, instance):
    began = []

    @dg.asset(retry_policy=policy)
    def made():
        began.append(1)
        return {1, 2}

    manager = KafkaIOManager(kafka=KafkaProducerResource(bootstrap_servers=closed_port))
    assert not dg.materialize(
        [made], resources={"io_manager": manager}, instance=instance, raise_on_error=False
    ).success
    assert len(began) == 1


def _theirs(name):
    return confluent_kafka.KafkaError(getattr(confluent_kafka.KafkaError, name), f"text of {name}")


@pytest.fixture
def connection():
    return Connection(KafkaProducerConfig(bootstrap_servers="a:1"))


@pytest.mark.parametrize("latched", sorted(LATCHED_CODES))
@pytest.mark.parametrize("seen", sorted(NO_ANSWER_CODES))
def test_no_answer_is_told_as_what_the_error_callback_saw(seen, latched, connection):
    connection._on_error(_theirs(latched))
    connection._on_error(_theirs("_ALL_BROKERS_DOWN"))
    error = connection.cause(_theirs(seen), "topic 't'")
    assert type(error) is NoBrokersAvailable
    assert error.code == latched
    assert error.fix == fix_for(latched)
    assert error.remedy is remedy_of(latched)
    assert connection.unreachable(5).code == latched


@pytest.mark.parametrize("latched", sorted(LATCHED_CODES))
@pytest.mark.parametrize("seen", sorted(NO_ANSWER_CODES))
def test_what_met_one_broker_of_several_is_told_beside_the_time_out(seen, latched, connection):
    connection._on_error(_theirs(latched))
    error = connection.cause(_theirs(seen), "topic 't'")
    assert error.code == seen
    assert error.remedy is Remedy.RETRY
    assert f"text of {latched} [{latched}]" in str(error)
    assert "text of _TRANSPORT" not in connection.cause(_theirs("_TIMED_OUT"), "topic 't'").cause
    connection._on_error(_theirs("_TRANSPORT"))
    told = connection.cause(_theirs("_TIMED_OUT"), "topic 't'").cause
    assert told.index(f"text of {latched}") < told.index("text of _TRANSPORT")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("inside:1/2: Connect to ipv4#10.0.0.1:1 failed: Connection refused", "named inside:1 as the address of a"),
        (
            "sasl_ssl://inside:1/2: Connection setup timed out",
            "check that it runs, and the brokers' advertised.listeners",
        ),
        ("a:1/1: Connect to ipv4#10.0.0.1:1 failed: Connection refused", "Check that the brokers in bootstrap_servers"),
        ("ssl://b:9092/2: Connection setup timed out", "Check that the brokers in bootstrap_servers"),
        ("PLAINTEXT://c:3/2: Connection setup timed out", "Check that the brokers in bootstrap_servers"),
        ("b:1/bootstrap: Connection setup timed out", "Check that the brokers in bootstrap_servers"),
    ],
)
def test_an_address_that_only_the_brokers_name_is_told_as_theirs(text, told):
    connection = Connection(KafkaProducerConfig(bootstrap_servers="a:1, B,PLAINTEXT://C:3"))
    connection._on_error(confluent_kafka.KafkaError(confluent_kafka.KafkaError._TRANSPORT, text))
    error = connection.unreachable(5)
    assert told in error.fix
    assert (error.code, error.remedy) == ("_TRANSPORT", Remedy.RETRY)


def test_that_no_broker_is_down_is_not_told_of_brokers_that_are_all_down(connection):
    connection._on_error(
        confluent_kafka.KafkaError(confluent_kafka.KafkaError._ALL_BROKERS_DOWN, "0/2 brokers are down")
    )
    assert "each connection was refused, or closed again [_ALL_BROKERS_DOWN]" in connection.unreachable(5).cause


@pytest.mark.parametrize("number", [42, 45, 46, 48, 116, 40])
def test_an_alert_for_a_certificate_is_no_outage(number, connection):
    text = f"ssl://a:1/bootstrap: Disconnected: error:0A000: alert something: SSL alert number {number} (after 3ms)"
    connection._on_error(confluent_kafka.KafkaError(confluent_kafka.KafkaError._TRANSPORT, text))
    connection._on_error(_theirs("_ALL_BROKERS_DOWN"))
    for error in (connection.unreachable(5), connection.cause(_theirs("_TIMED_OUT"), "topic 't'")):
        assert ("client certificate, or misses one" in error.fix) == (number != 40)
        assert (error.remedy is Remedy.FAIL) == (number != 40)
    assert connection._locked_out == (number != 40)


@pytest.mark.parametrize(
    "text",
    [
        "a:1/bootstrap: SASL PLAIN mechanism handshake failed: Local: Broker transport failure: broker's supported mechanisms",
        "a:1/bootstrap: SASL SCRAM-SHA-512 mechanism handshake failed: Local: Timed out: broker's supported mechanisms: ",
        "a:1/bootstrap: SASL authentication error: [a1b2-c3]: Too many connects (after 9ms in state AUTH_REQ)",
    ],
)
def test_a_broker_that_has_not_looked_at_the_password_does_not_count_as_one_that_refuses_it(text, connection):
    connection._on_error(confluent_kafka.KafkaError(confluent_kafka.KafkaError._AUTHENTICATION, text))
    connection._on_error(_theirs("_ALL_BROKERS_DOWN"))
    assert not connection._locked_out
    for error in (connection.unreachable(5), connection.cause(_theirs("_TIMED_OUT"), "topic 't'")):
        assert text in error.cause
        assert (error.remedy, "sasl_password" in error.fix) == (Remedy.RETRY, False)
    assert connection.unreachable(5).code == "_TRANSPORT"
    assert ("reconnect.backoff.ms" in connection.unreachable(5).fix) == ("Too many" in text)


@pytest.mark.parametrize(("broker", "told"), [("good:9092/bootstrap", True), ("old:9092/bootstrap", False)])
def test_beside_a_broker_that_is_no_more_that_of_another_is_told(broker, told, connection):
    def seen(name, text):
        connection._on_error(confluent_kafka.KafkaError(getattr(confluent_kafka.KafkaError, name), text))

    seen("_TRANSPORT", f"{broker}: Connect to ipv4#10.0.0.1:9092 failed: Connection refused")
    seen("_RESOLVE", "old:9092/bootstrap: Failed to resolve 'old:9092': Name or service not known")
    seen("_ALL_BROKERS_DOWN", "2/2 brokers are down")
    error = connection.cause(_theirs("_MSG_TIMED_OUT"), "topic 't'")
    assert error.code == "_RESOLVE"
    assert ("Connection refused" in str(error)) is told


def test_what_a_broker_has_answered_is_its_own_cause(connection):
    connection._on_error(_theirs("_RESOLVE"))
    assert connection.cause(_theirs("NOT_ENOUGH_REPLICAS"), "topic 't'").code == "NOT_ENOUGH_REPLICAS"
    assert connection.cause(_theirs("MSG_SIZE_TOO_LARGE"), "topic 't'").code == "MSG_SIZE_TOO_LARGE"


def test_a_cause_is_forgotten_once_a_broker_answers(connection):
    connection._on_error(_theirs("_RESOLVE"))
    connection.resume(lambda seconds: None, 1, "call")
    assert connection.cause(_theirs("_MSG_TIMED_OUT"), "topic 't'").code == "_MSG_TIMED_OUT"


def _raising(error, cause=None):
    def wait(_):
        raise error from cause

    return wait


def test_what_comes_out_of_a_poll_is_remembered_told_or_raised(connection):
    assert connection.serve(lambda _: 1, 0.1)
    assert not connection.serve(_raising(SystemError("error return without exception set")), 0.1)
    assert connection.fatal is None
    with pytest.raises(ZeroDivisionError):
        connection.serve(_raising(ZeroDivisionError()), 0.1)
    with pytest.raises(KeyboardInterrupt):
        connection.serve(_raising(SystemError("a result with an exception set"), KeyboardInterrupt()), 0.1)
    lost = SystemError("<method 'poll' of 'cimpl.Producer' objects> returned NULL without setting an exception")
    with pytest.raises(KeyboardInterrupt):
        connection.serve(_raising(lost), 0.1)
    assert not connection.serve(_raising(lost), 0.1, lambda: True)
    fenced = confluent_kafka.KafkaException(_theirs("_FENCED"))
    assert not connection.serve(_raising(SystemError("a result with an exception set"), fenced), 0.1)
    assert connection.fatal.name() == "_FENCED"
    assert not connection.serve(_raising(lost), 0.1)
    assert not connection.serve(_raising(ZeroDivisionError()), 0.1)


def test_an_interrupt_that_a_call_has_lost_ends_what_goes_on_calling(connection):
    """As one during a callback in the commit, before Python 3.12."""
    lost = SystemError("<method 'commit_transaction'> returned NULL without setting an exception")
    with pytest.raises(KeyboardInterrupt):
        connection.resume(_raising(lost), 5, "the commit")
    with pytest.raises(SystemError):
        connection.resume(_raising(lost), 5, "the commit", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        connection.resume(_raising(SystemError("a result with an exception set"), KeyboardInterrupt()), 5, "the commit")
    fenced = confluent_kafka.KafkaException(_theirs("_FENCED"))
    with pytest.raises(FencedError):
        connection.resume(_raising(SystemError("a result with an exception set"), fenced), 5, "the commit")


def test_a_record_that_was_given_up_in_flight_may_be_there():
    error = from_broker(_theirs("_PURGE_INFLIGHT"), "topic 't'")
    assert isinstance(error, KafkaTimeoutError)
    assert "it may have been written" in error.cause
    assert not isinstance(from_broker(_theirs("_PURGE_QUEUE"), "topic 't'"), KafkaTimeoutError)


def _closed(_):
    raise LookupError("no such tenant")


def _away(_):
    raise ConnectionRefusedError("nobody there")


def _refused(_):
    raise urllib.error.HTTPError("https://login.example.com", 401, "no", http.client.HTTPMessage(), None)


def _busy(_):
    raise urllib.error.HTTPError("https://login.example.com", 503, "no", http.client.HTTPMessage(), None)


class _LibrarysError(Exception):
    """As those of httpx, and of requests, which is an OSError."""

    response = types.SimpleNamespace(status_code=429)


class _SDKsError(_LibrarysError):
    """As those whose code is a word."""

    code = "ServiceUnavailable"


class _SystemsError(OSError):
    code = 7


def _throttled(_):
    raise _LibrarysError


def _throttled_in_words(_):
    raise _SDKsError


def _numbered(_):
    raise _SystemsError("no name server")


def _wrapped(_):
    try:
        _away(_)
    except OSError as error:
        raise LookupError("no token in the vault") from error


def _wrapped_file(_):
    try:
        Path("/no/such/token").read_text(encoding="utf-8")
    except OSError as error:
        raise LookupError("no token in this file") from error


def _wrapped_certificate(_):
    try:
        raise ssl.SSLCertVerificationError
    except OSError as error:
        raise LookupError("no token from who that is") from error


def _wrapped_refusal(_):
    try:
        _refused(_)
    except OSError as error:
        raise LookupError("no token in the vault") from error


def _httpx_away(_):
    httpx.post("http://127.0.0.1:9/token")


def _botocore_away(_):
    no_retries = botocore.config.Config(retries={"max_attempts": 0})
    options = {"region_name": "eu-west-1", "endpoint_url": "http://127.0.0.1:9", "config": no_retries}
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    botocore.session.get_session().create_client("sts", **options, **keys).get_caller_identity()


@pytest.mark.parametrize(
    ("name", "said", "remedy"),
    [
        ("_closed", "LookupError: no such tenant", Remedy.FAIL),
        ("_away", "nobody there", Remedy.RETRY),
        ("_refused", "HTTP Error 401: no", Remedy.FAIL),
        ("_busy", "HTTP Error 503: no", Remedy.RETRY),
        ("_throttled", "it raised _LibrarysError: ", Remedy.RETRY),
        ("_throttled_in_words", "it raised _SDKsError: ", Remedy.RETRY),
        ("_numbered", "no name server", Remedy.RETRY),
        ("_wrapped", "no token in the vault", Remedy.RETRY),
        ("_wrapped_file", "no token in this file", Remedy.FAIL),
        ("_wrapped_certificate", "no token from who that is", Remedy.FAIL),
        ("_wrapped_refusal", "no token in the vault", Remedy.FAIL),
        ("_httpx_away", "ConnectError", Remedy.RETRY),
        ("_botocore_away", "EndpointConnectionError", Remedy.RETRY),
    ],
)
def test_an_error_of_the_token_function_is_the_cause_at_once(name, said, remedy):
    oauth = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}
    config = KafkaProducerConfig(**oauth, sasl_oauthbearer_callback=f"{__name__}:{name}")
    with pytest.raises(KafkaError) as caught:
        Connection(config).producer({})
    assert said in caught.value.cause
    assert name in caught.value.culprit
    assert caught.value.remedy is remedy


def _told_by_ours(config):
    raise NoBrokersAvailable(f"culprit {config}", f"cause {config}", f"fix {config}", code="_TRANSPORT")


def test_no_secret_in_an_error_of_ours_that_a_token_function_raises():
    oauth = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER", "sasl_oauthbearer_config": "canary"}
    config = KafkaProducerConfig(**oauth, sasl_oauthbearer_callback=f"{__name__}:_told_by_ours")
    with pytest.raises(NoBrokersAvailable) as caught:
        _ = Connection(config).admin
    error = caught.value
    assert (str(error), error.cause, error.remedy) == ("culprit ***: cause ***. fix ***", "cause ***", Remedy.RETRY)


_over = threading.Event()


def _hangs(_):
    _over.wait(60)


def test_a_token_function_that_hangs_ends_at_the_connect_timeout():
    oauth = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER", "connect_timeout": 0.3}
    config = KafkaProducerConfig(**oauth, sasl_oauthbearer_callback=f"{__name__}:_hangs")
    _over.clear()
    began = time.monotonic()
    try:
        with pytest.raises(KafkaError, match=r"_hangs'?: it has not returned after connect_timeout, 0.3 s") as caught:
            Connection(config).producer({})
        assert time.monotonic() - began < 20
    finally:
        _over.set()
    assert caught.value.remedy is Remedy.RETRY


WRONG_TOKENS = {
    "token alone": (lambda _: "secret", "it returned str"),
    "bytes": (lambda _: (b"secret", time.time() + 3600), r"it returned \(bytes, float\)"),
    "text": (lambda _: ("secret", str(time.time() + 3600)), r"it returned \(str, str\)"),
    "no principal": (lambda _: ("secret", time.time() + 3600, None, {}), r"it returned \(str, float, NoneType, dict\)"),
    "empty": (lambda _: (), r"it returned \(\)"),
    "nothing": (lambda _: None, "it returned NoneType"),
    "seconds from now": (lambda _: ("secret", 3600), "the expiry that it returned is 3600, and now is 1"),
    "milliseconds": (lambda _: ("secret", (time.time() + 3600) * 1000), "the expiry that it returned is 1[0-9]{12}, "),
    "for ever": (lambda _: ("secret", float("inf")), "the expiry that it returned is inf"),
    "NUL": (lambda _: ("secret\0", NEVER), "it returned a token that cannot be sent"),
    "umlaut": (lambda _: ("secretä", NEVER), "it returned a token that cannot be sent"),
    "NUL in principal": (lambda _: ("secret", NEVER, "me\0", {}), "it returned a principal that cannot be sent"),
    "extension that is no text": (lambda _: ("secret", NEVER, "me", {"a": 1}), "an extension 'a' that cannot be sent"),
    "extension's value": (lambda _: ("secret", NEVER, "me", {"b": "secretä"}), "an extension 'b' that cannot be sent"),
    "extension's name": (lambda _: ("secret", NEVER, "me", {"a": "b", "a b": ""}), "an extension 'a b' that cannot"),
    "extension of SASL's own": (lambda _: ("secret", NEVER, "me", {"auth": "a"}), "an extension 'auth' that cannot"),
}


@pytest.mark.parametrize(("function", "said"), WRONG_TOKENS.values(), ids=WRONG_TOKENS)
def test_what_is_no_token_is_refused_at_once_and_not_told(function, said, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "_token_of_test", function, raising=False)
    oauth = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}
    config = KafkaProducerConfig(**oauth, connect_timeout=60, sasl_oauthbearer_callback=f"{__name__}:_token_of_test")
    began = time.monotonic()
    with pytest.raises(KafkaError, match=said) as caught:
        Connection(config).producer({})
    assert time.monotonic() - began < 8
    assert "_token_of_test" in caught.value.culprit
    assert "(token, expiry in seconds since the epoch)" in caught.value.fix
    assert "secret" not in str(caught.value)
    assert caught.value.remedy is Remedy.FAIL


def test_what_is_no_token_any_more_is_the_cause_once_the_broker_does_not_let_us_in():
    """librdkafka asks again in a thread of its own."""
    oauth = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}
    connection = Connection(KafkaProducerConfig(**oauth, sasl_oauthbearer_callback="m:f"))
    returned = iter([("token", time.time() + 3600), ("token", 3600)])
    fetch = connection._first_token_at_once(lambda _: next(returned), {})
    assert fetch("")[0] == "token"
    with pytest.raises(KafkaError):
        fetch("")
    assert "m:f" in connection.unreachable(1).culprit


_meeting = threading.Barrier(1)
"""A test's own stands in its place."""


def _together(_):
    _meeting.wait(5)
    return "token", time.time() + 3600


def _publication(config):
    with PublicationWriter(PublicationConfig(producer=config), transactional_id="t", publication_id="p", topic="t"):
        pass


@pytest.mark.parametrize(("connect", "clients"), [(_publication, 3), (DataForgeKafkaProducer, 2)])
def test_clients_wait_for_their_tokens_at_the_same_time(connect, clients, closed_port, monkeypatch):
    meeting = threading.Barrier(clients)
    monkeypatch.setattr(sys.modules[__name__], "_meeting", meeting)
    oauth = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "OAUTHBEARER", "connect_timeout": 0.5}
    config = KafkaProducerConfig(
        bootstrap_servers=closed_port, **oauth, sasl_oauthbearer_callback=f"{__name__}:_together"
    )
    with pytest.raises(NoBrokersAvailable):
        connect(config)
    assert not meeting.broken


NEVER = 1e11
"""When these tokens expire."""


def test_an_error_of_the_token_function_at_a_later_token_is_the_cause(connection):
    first, second = tokens = [("a", NEVER), ("b", NEVER)]

    def token(_):
        if not tokens:
            raise LookupError("no such tenant")
        return tokens.pop(0)

    fetch = connection._first_token_at_once(token, {})
    assert [fetch(""), fetch("")] == [first, second]
    with pytest.raises(LookupError):
        fetch("")
    connection._on_error(_theirs("SASL_AUTHENTICATION_FAILED"))
    error = connection.cause(_theirs("_TIMED_OUT"), "x")
    assert "LookupError: no such tenant" in error.cause
    assert error.remedy is Remedy.FAIL


def test_an_error_of_the_token_function_is_over_once_it_gives_a_token(connection):
    answers = ["first", LookupError("away"), "later"]

    def token(_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer, NEVER

    fetch = connection._first_token_at_once(token, {})
    assert fetch("") == ("first", NEVER)
    with pytest.raises(LookupError):
        fetch("")
    # What librdkafka then tells.
    text = "Failed to acquire SASL OAUTHBEARER token: OAuth callback raised exception"
    connection._on_error(confluent_kafka.KafkaError(confluent_kafka.KafkaError._AUTHENTICATION, text))
    assert "away" in connection.cause(_theirs("_TIMED_OUT"), "x").cause
    assert fetch("") == ("later", NEVER)
    error = connection.cause(_theirs("_TIMED_OUT"), "x")
    assert (error.code, error.remedy) == ("_TIMED_OUT", Remedy.RETRY)
    assert "token" not in str(error)


def test_a_time_out_that_a_call_raises_itself_is_not_taken_for_one_of_the_wait():
    def late():
        raise TimeoutError("own")

    with pytest.raises(TimeoutError, match="own"):
        Connection(KafkaProducerConfig()).in_thread(late, 60, "x")
