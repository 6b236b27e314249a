import pickle
import traceback

import confluent_kafka
import dagster as dg
import pytest

from dataforge_kafka_dagster import KafkaError, KafkaTimeoutError, NoBrokersAvailable
from dataforge_kafka_dagster.failures import failure_of, raise_in_dagster
from dataforge_kafka_dagster.kafka.errors import (
    FENCED_CODES,
    LATCHED_CODES,
    REMEDIES,
    FencedError,
    InvalidRecordError,
    KafkaConfigError,
    Remedy,
    fix_for,
    from_broker,
    remedy_of,
)

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
    assert (set(REMEDIES) | FENCED_CODES | LATCHED_CODES) - set(NAMES) == set()


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


def test_unknown_codes_point_to_kafkas_list():
    assert "A_CODE_OF_NEXT_YEAR" in fix_for("A_CODE_OF_NEXT_YEAR")


@pytest.mark.parametrize("name", ["_MSG_TIMED_OUT", "_TIMED_OUT", "_TIMED_OUT_QUEUE", "REQUEST_TIMED_OUT"])
def test_deadlines_are_timeout_errors(name):
    error = from_broker(confluent_kafka.KafkaError(getattr(confluent_kafka.KafkaError, name)), "x")
    assert type(error) is KafkaTimeoutError
    assert error.remedy is Remedy.RETRY


@pytest.mark.parametrize("name", ["_FENCED", "PRODUCER_FENCED"])
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
    failure = failure_of(error, topic="t", brokers="a:1")
    assert failure.description == str(error)
    assert failure.allow_retries is False
    said = {name: value.value for name, value in failure.metadata.items()}
    assert said == {
        "kafka/topic": "t",
        "kafka/brokers": "a:1",
        "kafka/error_code": "MSG_SIZE_TOO_LARGE",
        "kafka/culprit": "topic 't': 5 records",
        "kafka/cause": "too large",
        "kafka/what_to_do": "Split it",
        "kafka/errors_by_code": {"MSG_SIZE_TOO_LARGE": 3, "_PURGE_QUEUE": 2},
        "kafka/undelivered_records": 5,
    }


def test_failure_of_a_record_names_index_and_field():
    failure = failure_of(InvalidRecordError("a", "b", "C", index=4, field="f"))
    assert failure.metadata["kafka/record_index"].value == 4
    assert failure.metadata["kafka/field"].value == "f"
    assert "kafka/error_code" not in failure.metadata


def _raise(error, **options):
    raise_in_dagster(
        error, **({"attempt": 0, "has_retry_policy": False, "max_retries": 3, "retry_delay": 2.0} | options)
    )


@pytest.mark.parametrize("code", ["_MSG_TIMED_OUT", "OUT_OF_ORDER_SEQUENCE_NUMBER"])
def test_what_may_pass_is_retried(code):
    error = KafkaError("a", "b", "C", code=code)
    with pytest.raises(dg.RetryRequested) as caught:
        _raise(error)
    assert caught.value.max_retries == 3
    assert 2.0 <= caught.value.seconds_to_wait <= 2.5
    assert isinstance(caught.value.__cause__, dg.Failure)


@pytest.mark.parametrize(("attempt", "low", "high"), [(1, 4, 5), (3, 16, 20), (30, 300, 375)])
def test_waits_double_to_a_bound_with_jitter(attempt, low, high):
    waits = set()
    for _ in range(20):
        with pytest.raises(dg.RetryRequested) as caught:
            _raise(KafkaError("a", "b", "C", code="_TRANSPORT"), attempt=attempt)
        waits.add(caught.value.seconds_to_wait)
    assert low <= min(waits) < max(waits) <= high


def test_what_cannot_pass_is_never_retried():
    with pytest.raises(dg.Failure) as caught:
        _raise(KafkaError("a", "b", "C", code="MSG_SIZE_TOO_LARGE"))
    assert caught.value.allow_retries is False


@pytest.mark.parametrize("options", [{"has_retry_policy": True}, {"max_retries": 0}])
def test_a_retry_policy_decides_alone(options):
    with pytest.raises(dg.Failure) as caught:
        _raise(KafkaError("a", "b", "C", code="_TRANSPORT"), **options)
    assert caught.value.allow_retries is True
