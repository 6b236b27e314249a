"""Each way to fail: told within its deadline and two seconds, as a retry or a failure, by a message with the cause."""

import contextlib
import os
import socket
import threading
import time
import uuid

import dagster as dg
import pytest
from confluent_kafka.admin import AdminClient
from conftest import read_topic

from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerResource
from dataforge_kafka_dagster.local import LocalKafka

# Two seconds are promised; a busy machine gets the rest.
_LEEWAY = 2.0 + float(os.environ.get("DEADLINE_LEEWAY", "4.0"))

RETRY, FAIL = "STEP_UP_FOR_RETRY", "STEP_FAILURE"


class Told:
    """What Dagster tells of a step whose publication failed.

    Attributes:
        event: `RETRY` or `FAIL`.
        text: The error, with all its causes.
        metadata: Of the failure; of a retry only the text is kept.
        seconds: How long the step took to fail.
    """

    def __init__(self, events, seconds):
        failed = next(event for event in events if event.event_type_value in {RETRY, FAIL})
        self.event = failed.event_type_value
        data = failed.event_specific_data
        self.text = _all_of(data.error)
        said = getattr(data, "user_failure_data", None)
        self.metadata = {name: entry.value for name, entry in said.metadata.items()} if said else {}
        self.seconds = seconds


def _all_of(error):
    return f"{error.message} {_all_of(error.cause)}" if error else ""


def fail(instance, servers, topic, rows=lambda: [{"i": 0}], **options):
    """Publish rows to a topic, which must fail; a retry publishes nothing."""
    attempts = []

    @dg.asset(metadata={"kafka/topic": topic})
    def doomed():
        attempts.append(time.monotonic())
        if len(attempts) > 1:
            raise dg.Failure("tried again")
        return dg.Output(rows())

    kafka = KafkaProducerResource(bootstrap_servers=servers, step_retries=1, step_retry_delay=0.01, **options)
    resources = {"io_manager": KafkaIOManager(kafka=kafka)}
    result = dg.materialize([doomed], resources=resources, instance=instance, raise_on_error=False)
    ended = attempts[1] if len(attempts) > 1 else time.monotonic()
    return Told(result.all_events, ended - attempts[0])


def check(told, event, deadline, *said):
    """The step failed as it was to, in time, and its message names the cause."""
    assert told.event == event, told.text
    assert [part for part in said if part not in told.text] == [], told.text
    assert told.seconds < deadline + _LEEWAY
    if event == FAIL:
        assert told.metadata["kafka/what_to_do"]


@pytest.mark.slow
def test_a_broker_that_is_not_there(closed_port, instance):
    told = fail(instance, closed_port, "t", connect_timeout=0.5)
    check(told, RETRY, 0.5, closed_port, "Connection refused", "bootstrap_servers")


@pytest.mark.slow
def test_a_host_that_does_not_exist(instance, in_time):
    # Not the 5 s that librdkafka's clients took to end.
    told = in_time(4, lambda: fail(instance, "no-such-host.invalid:9092", "t", connect_timeout=1))
    check(told, RETRY, 1, "no-such-host.invalid", "_RESOLVE", "host names")


@pytest.fixture
def not_kafka():
    """A port where something takes connections and says nothing, and one where it hangs up."""
    with contextlib.ExitStack() as stack:
        mute, rude = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        over = threading.Event()

        def hang_up():
            rude.settimeout(0.05)
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    rude.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        yield {"mute": f"127.0.0.1:{mute.getsockname()[1]}", "rude": f"127.0.0.1:{rude.getsockname()[1]}"}
        over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("manner", ["mute", "rude"])
def test_a_port_of_another_service(manner, not_kafka, instance):
    told = fail(instance, not_kafka[manner], "t", connect_timeout=0.5)
    check(told, RETRY, 0.5, not_kafka[manner], "no answer in 0.5 s", "bootstrap_servers")


@pytest.mark.kafka
def test_a_topic_that_does_not_exist(kafka_bootstrap_servers, instance):
    told = fail(instance, kafka_bootstrap_servers, "no-such-topic")
    check(told, FAIL, 5, "no-such-topic", "UNKNOWN_TOPIC_OR_PART", "--create --topic no-such-topic")


@pytest.mark.kafka
def test_a_record_that_is_too_large_for_the_client(kafka_bootstrap_servers, kafka_topic, read, instance):
    topic = kafka_topic()
    told = fail(instance, kafka_bootstrap_servers, topic, lambda: [{"i": 0}, {"x": "x" * 3_000_000}])
    check(told, FAIL, 5, "record 1", "MSG_SIZE_TOO_LARGE", "message.max.bytes")
    assert told.metadata["kafka/record_index"] == 1
    assert read(topic) == []


@pytest.mark.kafka
def test_a_record_that_is_too_large_for_the_topic_when_compressed(kafka_bootstrap_servers, kafka_topic, read, instance):
    topic = kafka_topic(config={"max.message.bytes": "2000"})
    small = fail(instance, kafka_bootstrap_servers, topic, lambda: [{"x": os.urandom(8000).hex()}])
    check(small, FAIL, 5, topic, "MSG_SIZE_TOO_LARGE", "max.message.bytes")
    assert small.metadata["kafka/errors_by_code"] == {"MSG_SIZE_TOO_LARGE": 1}
    assert read(topic) == []


def _rows(at, what, count=20_000):
    """Rows with something that happens in their midst."""
    for i in range(count):
        if i == at:
            time.sleep(0.3)  # lets the first rows reach the broker
            what()
        yield {"i": i, "padding": "x" * 100}


@pytest.mark.faults
@pytest.mark.parametrize("how", ["kill_broker", "pause_broker"])
def test_a_broker_that_goes_in_mid_publication(how, instance, say):
    with LocalKafka() as kafka:
        kafka.create_topic("t")
        began = []

        def go():
            getattr(kafka, how)(1)
            began.append(time.monotonic())

        step_began = time.monotonic()
        told = fail(instance, kafka.bootstrap_servers, "t", lambda: _rows(10_000, go), delivery_timeout=6)
        # What the deadline counts from: no record before was late.
        told.seconds -= began[0] - step_began
        say(f"{how} in mid-publication, delivery_timeout 6 s: told {told.seconds:.1f} s after it: {told.text}")
        check(told, RETRY, 6, "_MSG_TIMED_OUT", "records not delivered", "delivery_timeout")
        if how == "kill_broker":
            assert "Connection refused" in told.text or "Disconnected" in told.text
            kafka.start_broker(1)
        else:
            kafka.resume_broker(1)
        assert read_topic(kafka.bootstrap_servers, "t") == []


@pytest.fixture(scope="module")
def three_brokers():
    # Kafka gives a broker that is silent for nine seconds up; here, one that freezes for ten is surely given up.
    with LocalKafka(brokers=3, startup_timeout=180, config={"broker.session.timeout.ms": "5000"}) as kafka:
        yield kafka


def _leaders(kafka, topic):
    partitions = (
        AdminClient({"bootstrap.servers": kafka.bootstrap_servers}).list_topics(topic, 30).topics[topic].partitions
    )
    return {number: partition.leader for number, partition in partitions.items()}


@pytest.mark.faults
def test_too_few_replicas_in_sync(three_brokers, instance, say):
    kafka, topic = three_brokers, f"insync-{uuid.uuid4().hex[:6]}"
    kafka.create_topic(topic, config={"min.insync.replicas": "3"})
    kafka.stop_broker(3)
    try:
        told = fail(instance, kafka.bootstrap_servers, topic, delivery_timeout=8, connect_timeout=8)
        say(f"min.insync.replicas=3 with 2 of 3 brokers, delivery_timeout 8 s: {told.seconds:.1f} s: {told.text}")
        check(told, RETRY, 8, "2 of its 3 replicas in sync", "min.insync.replicas")
    finally:
        kafka.start_broker(3)
    assert read_topic(kafka.bootstrap_servers, topic) == []


@pytest.mark.faults
def test_two_of_three_brokers_away(three_brokers, instance, say):
    kafka, topic = three_brokers, f"majority-{uuid.uuid4().hex[:6]}"
    kafka.create_topic(topic)
    kafka.stop_broker(2)
    kafka.stop_broker(3)
    try:
        told = fail(instance, kafka.bootstrap_servers, topic, delivery_timeout=8, connect_timeout=8)
        say(f"1 of 3 brokers, connect and delivery_timeout 8 s each: {told.seconds:.1f} s: {told.text}")
        check(told, RETRY, 16, "enough brokers run", "__transaction_state")
    finally:
        kafka.start_broker(2)
        kafka.start_broker(3)
    assert read_topic(kafka.bootstrap_servers, topic) == []


@pytest.mark.faults
def test_a_broker_of_three_that_freezes_for_twenty_seconds(three_brokers, instance, say):
    kafka, topic = three_brokers, f"frozen-{uuid.uuid4().hex[:6]}"
    kafka.create_topic(topic, partitions=6)
    paused, before = [], _leaders(kafka, topic)
    led = {number for number, leader in before.items() if leader == 1}
    assert led, "the broker that freezes leads no Kafka partition: it proves nothing"

    def freeze():
        kafka.pause_broker(1)
        # A session is over after 9 s; if the controller is frozen, another one is elected first, and begins it anew.
        paused.append(threading.Timer(20, kafka.resume_broker, [1]))
        paused[0].start()

    @dg.asset(metadata={"kafka/topic": topic})
    def steady():
        yield dg.Output(_rows(10_000, freeze))

    manager = KafkaIOManager(kafka=KafkaProducerResource(bootstrap_servers=kafka.bootstrap_servers, step_retries=0))
    began = time.monotonic()
    try:
        result = dg.materialize([steady], resources={"io_manager": manager}, instance=instance)
        say(f"one broker of three frozen for 20 s: published after {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began > 5, "the freeze did not hold it up: it proves nothing"
    finally:
        paused[0].join()
    after = _leaders(kafka, topic)
    moved = {number for number in led if after[number] != 1}
    say(f"{len(moved)} of its {len(led)} Kafka partitions had another leader afterwards")
    assert moved, "no leader moved"
    (event,) = result.get_asset_materialization_events()
    assert event.materialization.metadata["dagster/row_count"].value == 20_000
    assert len(read_topic(kafka.bootstrap_servers, topic)) == 20_000
