"""Every way into a secured Kafka, and what is said where there is none."""

import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest
from confluent_kafka.admin import AclOperation
from secured import KEY_PASSWORD, PREFIX, USERS

from dataforge_kafka_dagster import (
    DataForgeKafkaProducer,
    KafkaError,
    KafkaIOManager,
    KafkaProducerConfig,
    KafkaProducerResource,
    NoBrokersAvailable,
)
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.errors import Remedy
from dataforge_kafka_dagster.kafka.publication import PublicationWriter

pytestmark = pytest.mark.kafka

CONNECT_SECONDS = 1.5
LATEST_SECONDS = 12.0
"""Far over CONNECT_SECONDS, for slow machines; far under delivery_timeout, which nothing here may wait for."""


@pytest.fixture(scope="module")
def topic(secured):
    secured.kafka.create_topic("ways", partitions=2)
    return "ways"


def _materialize(instance, topic, options, **more):
    """Publish three records from one asset, read them back in another; the run's result and what was read."""
    retry = {"step_retries": 1, "step_retry_delay": 0.01}
    kafka = KafkaProducerResource(transactional_id_prefix=PREFIX, **retry, **more, **options)
    got = []

    @dg.asset(name=f"made_{uuid.uuid4().hex}", metadata={"kafka/topic": topic})
    def made():
        return [{"number": number} for number in range(3)]

    @dg.asset(ins={"rows": dg.AssetIn(made.key)})
    def read(rows: list):
        got.extend(rows)

    resources = {"io_manager": KafkaIOManager(kafka=kafka)}
    return dg.materialize([made, read], resources=resources, instance=instance, raise_on_error=False), got


def _failure(result):
    """What the failure says, and whether the step was tried again before."""
    (event,) = [e for e in result.all_events if e.event_type_value == "STEP_FAILURE"]
    retried = [e for e in result.all_events if e.event_type_value == "STEP_UP_FOR_RETRY"]
    said = event.event_specific_data.user_failure_data.metadata
    return {name: value.value for name, value in said.items()}, bool(retried)


def _with_certificate(secured):
    made = secured.certificates
    return secured.mutual_tls(ssl_certificate_location=str(made.client), ssl_key_location=str(made.key))


def _with_encrypted_key(secured):
    made = secured.certificates
    return secured.mutual_tls(
        ssl_certificate_location=str(made.client),
        ssl_key_location=str(made.encrypted_key),
        ssl_key_password=KEY_PASSWORD,
    )


def _with_text(secured):
    made = secured.certificates
    return {
        **secured.mutual_tls(),
        "ssl_ca_location": None,
        "ssl_ca_pem": made.ca.read_text(),
        "ssl_certificate_pem": made.client.read_text(),
        "ssl_key_pem": made.encrypted_key.read_text(),
        "ssl_key_password": KEY_PASSWORD,
    }


def _with_keystore(secured):
    made = secured.certificates
    return secured.mutual_tls(ssl_keystore_location=str(made.keystore), ssl_keystore_password=KEY_PASSWORD)


WAYS_IN = {
    "PLAIN": lambda secured: secured.sasl(mechanism="PLAIN"),
    "SCRAM-SHA-256": lambda secured: secured.sasl(mechanism="SCRAM-SHA-256"),
    "SCRAM-SHA-512": lambda secured: secured.sasl(mechanism="SCRAM-SHA-512"),
    "PLAIN over TLS": lambda secured: secured.sasl(mechanism="PLAIN", listener="SASL_TLS"),
    "SCRAM over TLS": lambda secured: secured.sasl(listener="SASL_TLS"),
    "token function": lambda secured: secured.oauth(),
    "OpenID Connect": lambda secured: secured.oidc(),
    "TLS": lambda secured: {"bootstrap_servers": secured.kafka.servers_of("TLS"), **secured.tls},
    "mutual TLS by path": _with_certificate,
    "mutual TLS by path, key encrypted": _with_encrypted_key,
    "mutual TLS by text, key encrypted": _with_text,
    "mutual TLS by key store": _with_keystore,
}


@pytest.mark.parametrize("way", WAYS_IN.values(), ids=WAYS_IN)
def test_publishing_and_reading_back_on_a_secured_listener(way, secured, topic, instance):
    options = way(secured)
    with DataForgeKafkaProducer(KafkaProducerConfig(**options)) as producer:
        assert producer.send_sync(topic, {"single": True}).offset >= 0
    result, got = _materialize(instance, topic, options)
    assert result.success
    assert sorted(row["number"] for row in got) == [0, 1, 2]


# ACLs


def test_at_least_once_needs_no_acl_but_the_topics(secured, topic, instance):
    options = secured.sasl("without-transactions")
    result, got = _materialize(instance, topic, options, delivery_guarantee="at_least_once")
    assert result.success
    assert len(got) == 3


REFUSED = {
    "without-transactions": (
        "TRANSACTIONAL_ID_AUTHORIZATION_FAILED",
        ["ACL", "TransactionalId", "delivery_guarantee='at_least_once'"],
    ),
    "without-group": ("GROUP_AUTHORIZATION_FAILED", ["ACL", "Group", "delivery_guarantee='at_least_once'"]),
    "without-topic-read": ("TOPIC_AUTHORIZATION_FAILED", ["ACL", "READ", "ledger"]),
    "without-write": ("TOPIC_AUTHORIZATION_FAILED", ["ACL", "WRITE"]),
    "without-topic": ("TOPIC_AUTHORIZATION_FAILED", ["ACL", "WRITE"]),
}


@pytest.mark.parametrize("user", REFUSED)
def test_a_missing_acl_fails_the_step_and_is_named(user, secured, topic, instance):
    code, said = REFUSED[user]
    began = time.monotonic()
    result, got = _materialize(instance, topic, secured.sasl(user))
    assert time.monotonic() - began < LATEST_SECONDS
    failure, retried = _failure(result)
    assert not retried
    assert failure["kafka/error_code"] == code
    assert [part for part in said if part not in failure["kafka/what_to_do"]] == []
    assert got == []


def _writer(options, topic, config=None, **more):
    name = f"{PREFIX}.{uuid.uuid4().hex}"
    config = PublicationConfig(producer=KafkaProducerConfig(**options), **(config or {}))
    return PublicationWriter(config, transactional_id=name, publication_id=name, topic=topic, **more)


@pytest.fixture(scope="module")
def readable(secured):
    """A topic that who may read no other one may read."""
    secured.kafka.create_topic("readable")
    secured.grant("without-topic-read", "readable", AclOperation.READ)
    return "readable"


@pytest.mark.parametrize("later", [False, True])
def test_a_missing_read_for_the_ledger_is_told_before_a_row_is_taken(later, secured, topic, readable):
    rows = iter([{"a": 1}])
    with pytest.raises(KafkaError) as caught:  # noqa: SIM117
        with _writer(secured.sasl("without-topic-read"), readable if later else topic) as writer:
            writer.send_all(rows, topic=topic)
    assert caught.value.code == "TOPIC_AUTHORIZATION_FAILED"
    assert f"topic {topic!r}" in caught.value.culprit
    assert "may not read it, as the ledger needs" in caught.value.cause
    assert "ACLs on the topic: WRITE to publish, READ" in caught.value.fix
    assert list(rows) == [{"a": 1}]


def test_a_topic_that_no_ledger_names_needs_no_read(secured, topic, readable):
    options = secured.sasl("without-topic-read")
    with _writer(options, readable, on_bad_record=topic) as writer:
        writer.send_all([{"a": 1}, {"a": object()}])
    assert (writer.publication.records, writer.publication.dead_letters) == (1, 1)
    with _writer(options, topic, {"delivery_guarantee": "at_least_once"}) as writer:
        writer.send({"a": 1})
    assert writer.publication.records == 1
    with DataForgeKafkaProducer(KafkaProducerConfig(**options)) as producer:
        assert producer.send_sync(topic, {"a": 1}).offset >= 0


def test_a_batch_that_is_too_large_names_batch_size_where_the_topics_settings_may_not_be_read(secured):
    secured.kafka.create_topic("small", config={"max.message.bytes": "2000"})
    with pytest.raises(KafkaError, match="If no record is that large, lower batch_size to it") as caught:  # noqa: SIM117
        with _writer({**secured.sasl(), "compression_type": "none"}, "small") as writer:
            writer.send_all(["x" * 100] * 3000)
    assert "max.message.bytes is not known to this user" in caught.value.cause


def test_every_user_with_a_missing_acl_is_tested():
    assert {*REFUSED, "publisher"} == set(USERS)


@pytest.mark.parametrize("user", ["without-write", "without-topic"])
def test_a_single_record_to_a_topic_without_acl_is_refused(user, secured, topic):
    config = KafkaProducerConfig(**secured.sasl(user))
    began = time.monotonic()
    with DataForgeKafkaProducer(config) as producer:
        with pytest.raises(KafkaError, match="Grant this user") as caught:
            producer.send_sync(topic, {"a": 1})
        with pytest.raises(KafkaError, match="Grant this user"):
            producer.send_async(topic, {"a": 2}, callback=lambda *_: None).result(LATEST_SECONDS)
    assert time.monotonic() - began < LATEST_SECONDS
    assert caught.value.code.endswith("_AUTHORIZATION_FAILED")
    assert caught.value.remedy is Remedy.FAIL


# No way in


def _at(listener):
    return lambda secured: secured.tls | {"bootstrap_servers": secured.kafka.servers_of(listener)}


WAYS_OUT = {
    "wrong password": (lambda s: s.sasl() | {"sasl_password": "wrong"}, "_AUTHENTICATION", "sasl_password"),
    "wrong PLAIN password": (
        lambda s: s.sasl(mechanism="PLAIN") | {"sasl_password": "wrong"},
        "_AUTHENTICATION",
        "sasl_password",
    ),
    "unknown user": (lambda s: s.sasl() | {"sasl_username": "nobody"}, "_AUTHENTICATION", "sasl_username"),
    "SASL where there is none": (
        lambda s: s.sasl() | {"bootstrap_servers": s.kafka.bootstrap_servers},
        "_AUTHENTICATION",
        "The listener has no SASL: set security_protocol='PLAINTEXT'",
    ),
    "SASL where there is only TLS": (
        lambda s: s.sasl(listener="SASL_TLS") | {"bootstrap_servers": s.kafka.servers_of("TLS")},
        "_AUTHENTICATION",
        "The listener has no SASL: set security_protocol='SSL'",
    ),
    "wrong CA": (
        lambda s: _at("TLS")(s) | {"ssl_ca_location": str(s.certificates.other_ca)},
        "_SSL",
        "ssl_ca_location",
    ),
    "no client certificate": (_at("MUTUAL_TLS"), "_SSL", "client certificate"),
    "expired client certificate": (
        lambda s: s.mutual_tls(
            ssl_certificate_location=str(s.certificates.expired), ssl_key_location=str(s.certificates.expired_key)
        ),
        "_SSL",
        "the dates in it",
    ),
    "password with a line's end": (
        lambda s: s.sasl() | {"sasl_password": s.sasl()["sasl_password"] + "\n"},
        "_AUTHENTICATION",
        "ends with white space",
    ),
    "TLS to a plaintext listener": (_at("SASL"), "_TRANSPORT", "security_protocol"),
    "plaintext to a TLS listener": (
        lambda s: {"bootstrap_servers": s.kafka.servers_of("TLS")},
        "_ALL_BROKERS_DOWN",
        "security_protocol",
    ),
    "wrong key password": (
        lambda s: _with_text(s) | {"ssl_key_password": "wrong"},
        "_INVALID_ARG",
        "Correct the option",
    ),
    "token function fails": (lambda s: s.oauth("broken_token"), "_AUTHENTICATION", "Correct the function"),
    "wrong client secret": (
        lambda s: s.oidc(sasl_oauthbearer_client_secret="wrong"),
        "_AUTHENTICATION",
        "sasl_oauthbearer_client_secret",
    ),
    "token is none": (lambda s: s.oauth("garbage_token"), "_AUTHENTICATION", "token"),
}
# A broker that is about to end looks the same.
RETRIED = {"_TRANSPORT", "_ALL_BROKERS_DOWN"}


TOKEN_SERVERS_AWAY = {
    "of another CA": lambda s: s.oidc(https_ca_location=str(s.certificates.other_ca)),
    "not there": lambda s: s.oidc(sasl_oauthbearer_token_endpoint_url="https://127.0.0.1:9/token"),
}


@pytest.mark.parametrize("way", TOKEN_SERVERS_AWAY.values(), ids=TOKEN_SERVERS_AWAY)
def test_a_token_server_that_cannot_be_asked_is_named_and_asked_again(way, secured, topic, instance):
    options = way(secured)
    began = time.monotonic()
    result, _ = _materialize(instance, topic, options, connect_timeout=CONNECT_SECONDS)
    assert time.monotonic() - began < LATEST_SECONDS
    failure, retried = _failure(result)
    assert retried
    assert options["sasl_oauthbearer_token_endpoint_url"] in failure["kafka/culprit"]
    assert "https_ca_location" in failure["kafka/what_to_do"]


@pytest.mark.parametrize(("way", "code", "fix"), WAYS_OUT.values(), ids=WAYS_OUT)
def test_where_there_is_no_way_in_the_cause_is_named_in_time(way, code, fix, secured, topic, instance):
    options = way(secured)
    # What waiting does not mend is not waited for.
    timeout = CONNECT_SECONDS if code in RETRIED else 10 * LATEST_SECONDS

    def connect():
        with pytest.raises(KafkaError) as caught:
            DataForgeKafkaProducer(KafkaProducerConfig(connect_timeout=timeout, **options))
        return caught.value, time.monotonic() - began

    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        connecting = pool.submit(connect)
        result, _ = _materialize(instance, topic, options, connect_timeout=timeout)
        took = time.monotonic() - began
        error, connect_took = connecting.result()
    failure, retried = _failure(result)
    assert (error.code, failure["kafka/error_code"]) == (code, code)
    assert retried == (code in RETRIED)
    assert (error.remedy is Remedy.RETRY) == (code in RETRIED)
    assert fix in error.fix
    assert fix in failure["kafka/what_to_do"]
    assert max(took, connect_took) < LATEST_SECONDS
    if code != "_INVALID_ARG" and "function" not in fix:
        assert isinstance(error, NoBrokersAvailable)


def test_a_broker_that_does_not_let_us_in_is_no_reason_not_to_ask_another(secured, topic):
    options = secured.sasl()
    servers = f"{secured.kafka.bootstrap_servers},{options['bootstrap_servers']}"  # the first wants no SASL
    for _ in range(5):  # librdkafka begins with any of them
        with DataForgeKafkaProducer(KafkaProducerConfig(**(options | {"bootstrap_servers": servers}))) as producer:
            assert producer.send_sync(topic, {"a": 1}).offset >= 0


def _run(program, *arguments, timeout):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


ENDS_AT_ONCE = """
import ctypes, json, os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataforge_kafka_dagster import KafkaError, KafkaProducerConfig
from dataforge_kafka_dagster.kafka.connection import Connection

options, is_forked, is_closed = map(json.loads, sys.argv[1:])
connections = [Connection(KafkaProducerConfig(**options)) for _ in range(10)]
ctypes.pythonapi.Py_IncRef(ctypes.py_object(connections))  # somebody holds them to the end

def fail(connection):
    try:
        connection.answer(lambda: connection.admin.describe_cluster(request_timeout=5), 5, connection.name)
    except KafkaError as error:
        return error.code
    finally:
        if is_closed:
            connection.silent = True  # so that it is kept for a while
            connection.close()

with ThreadPoolExecutor(10) as pool:
    print(*set(pool.map(fail, connections)))
if is_forked:
    time.sleep(1)  # for the connections to the brokers by their own names
    child = os.fork()
    if child:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.alarm(20)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("is_forked", [False, True], ids=["itself", "forked"])
@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "left"])
def test_a_process_that_ends_in_the_midst_of_handshakes_ends_well(is_closed, is_forked, secured):
    """Without an end of the clients, 4 of 10 such processes crash; a forked one would wait for its parent's for ever.

    That one has clients whose handshakes are over, and may try again: OpenSSL's own clean-up would wait for a lock of one
    that was under way.
    """
    options = _at("TLS")(secured) | {"connect_timeout": 5.0}
    if not is_forked:
        options["ssl_ca_location"] = str(secured.certificates.other_ca)
    ends = []
    while len(ends) < (3 if is_forked else 4) and not (is_forked and 0 in ends):
        process = _run(ENDS_AT_ONCE, *map(json.dumps, (options, is_forked, is_closed)), timeout=60)
        assert process.stdout == ("None\n" if is_forked else "_SSL\n"), process.stderr
        ends.append(process.returncode)
    assert ends[-1] == 0 if is_forked else not any(ends), process.stderr


FORKS_IN_A_SESSION = """
import json, os, sys, uuid
from dataforge_kafka_dagster import KafkaProducerConfig
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.publication import PublicationWriter

options, topic = json.loads(sys.argv[1]), sys.argv[2]
name = uuid.uuid4().hex
config = PublicationConfig(producer=KafkaProducerConfig(**options))
with PublicationWriter(config, transactional_id=name, publication_id=name, topic=topic) as writer:
    writer.send("x")
    writer._flush()
    child = os.fork()
    if not child:
        sys.exit(7)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(ended, writer.publication.records)
"""


def test_a_process_that_is_forked_in_a_session_ends_well(secured, topic):
    process = _run(FORKS_IN_A_SESSION, json.dumps(_at("TLS")(secured)), topic, timeout=60)
    assert (process.returncode, process.stdout) == (0, "7 1\n"), process.stderr


def test_a_token_signed_for_msk_reaches_the_broker(secured, monkeypatch):
    """A broker that is not Amazon's can but refuse it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    config = KafkaProducerConfig(
        bootstrap_servers=secured.kafka.servers_of("SASL_TLS"),
        connect_timeout=CONNECT_SECONDS,
        security_protocol="SASL_SSL",
        ssl_ca_location=str(secured.certificates.ca),
        sasl_mechanism="AWS_MSK_IAM",
        sasl_aws_region="eu-central-1",
    )
    with pytest.raises(NoBrokersAvailable, match="invalid_token"):
        DataForgeKafkaProducer(config)
