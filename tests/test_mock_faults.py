"""Errors that a real broker cannot be made to give, from the mock cluster inside librdkafka."""

import time
from unittest import mock

import pytest
from confluent_kafka import KafkaError as Code
from confluent_kafka import KafkaException
from mock_cluster import ADD_OFFSETS, ADD_PARTITIONS, END_TXN, PRODUCE, TXN_OFFSETS, MockCluster

from dataforge_kafka_dagster import (
    DataForgeKafkaProducer,
    KafkaError,
    KafkaProducerConfig,
    KafkaProducerResource,
    KafkaRecord,
    KafkaTimeoutError,
)
from dataforge_kafka_dagster.failures import failure_of
from dataforge_kafka_dagster.kafka import publication, sender
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.connection import Connection, timed_out
from dataforge_kafka_dagster.kafka.deliveries import Span
from dataforge_kafka_dagster.kafka.errors import FencedError, Remedy
from dataforge_kafka_dagster.kafka.publication import PublicationWriter
from dataforge_kafka_dagster.kafka.topics import Topic

PRODUCER_FENCED = 90
HELD = 60_000
"""Milliseconds: what is answered after that is answered when `answer_after(0)` says so."""

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch):
    # It does not know the request that the look at a topic makes.
    monkeypatch.setattr(sender, "check_topic_exists", lambda *_, **__: Topic(2, None))
    monkeypatch.setattr(publication, "current", lambda *_: Topic(2, None))
    with MockCluster() as cluster:
        cluster.create_topic("t", partitions=2)
        yield cluster


def _writer(cluster, on_bad_record=None, **options):
    producer = KafkaProducerConfig(
        bootstrap_servers=cluster.bootstrap_servers, connect_timeout=10, **{"delivery_timeout": 15, **options}
    )
    return PublicationWriter(
        PublicationConfig(producer=producer),
        transactional_id="mock",
        publication_id="p",
        topic="t",
        on_bad_record=on_bad_record,
    )


def _publish(cluster, faults=lambda: None, **options):
    with _writer(cluster, **options) as writer:
        faults()
        writer.send_all({"i": i} for i in range(500))
        time.sleep(0.05)  # more than one batch
        writer.send_all({"i": i} for i in range(500))
    return writer.publication


PASSING = {
    "too few replicas": (PRODUCE, [Code.NOT_ENOUGH_REPLICAS] * 3),
    "too few replicas after the append": (PRODUCE, [Code.NOT_ENOUGH_REPLICAS_AFTER_APPEND]),
    "another leader": (PRODUCE, [Code.NOT_LEADER_FOR_PARTITION] * 2),
    "storage error": (PRODUCE, [Code.KAFKA_STORAGE_ERROR]),
    "another coordinator at the commit": (END_TXN, [Code.NOT_COORDINATOR] * 2),
    "a coordinator that loads": (END_TXN, [Code.COORDINATOR_LOAD_IN_PROGRESS] * 2),
    "no coordinator for the ledger": (TXN_OFFSETS, [Code.COORDINATOR_NOT_AVAILABLE] * 2),
    "concurrent transactions": (ADD_PARTITIONS, [Code.CONCURRENT_TRANSACTIONS] * 2),
}


@pytest.mark.parametrize(("request_kind", "codes"), PASSING.values(), ids=PASSING)
def test_what_passes_is_waited_out(request_kind, codes, cluster):
    done = _publish(cluster, lambda: cluster.fail_next(request_kind, *codes))
    assert done.records == 1000
    assert sum(offsets.records for offsets in done.offsets) == 1000


def test_a_coordinator_and_leaders_that_move_in_mid_publication(cluster):
    def move():
        cluster.move_coordinator("mock", 2)
        cluster.move_leader("t", 0, 3)
        cluster.move_leader("t", 1, 1)

    assert _publish(cluster, move).records == 1000


@pytest.mark.parametrize("request_kind", [ADD_OFFSETS, TXN_OFFSETS], ids=["group", "offsets"])
@pytest.mark.parametrize("name", ["TRANSACTION_ABORTABLE", "REBALANCE_IN_PROGRESS"])
def test_a_transaction_that_the_ledger_cannot_join_is_given_up_at_once(request_kind, name, cluster):
    code = getattr(Code, name, None)
    if code is None:
        pytest.skip("this librdkafka does not know the code")
    began = time.monotonic()
    with pytest.raises(KafkaError) as caught:
        _publish(cluster, lambda: cluster.fail_next(request_kind, code), delivery_timeout=60)
    assert time.monotonic() - began < 30
    assert caught.value.remedy is Remedy.RETRY
    assert _publish(cluster).records == 1000


def test_a_commit_whose_answer_says_nothing_may_have_been_one(cluster):
    with pytest.raises(KafkaError, match="whether it was committed is not known") as caught:
        _publish(cluster, lambda: cluster.fail_next(END_TXN, Code.UNKNOWN))
    assert caught.value.remedy is Remedy.RETRY


def test_a_commit_that_was_late_goes_on_at_the_end_of_the_block(cluster, monkeypatch):
    writer, late = _writer(cluster), []
    resume = writer._connection.resume

    def once_late(call, timeout, culprit, *more):
        if culprit.startswith("commit") and not late:
            cluster.answer_after(HELD)
            with pytest.raises(KafkaException) as caught:
                call(0)
            cluster.answer_after(0)
            late.append(caught.value.args[0].name())
            raise timed_out(culprit, timeout)
        return resume(call, timeout, culprit, *more)

    monkeypatch.setattr(writer._connection, "resume", once_late)
    with writer:
        writer.send("x")
        with pytest.raises(KafkaTimeoutError, match="whether it was committed is not known"):
            writer.commit()
    assert late == ["_TIMED_OUT"]
    assert writer.publication.records == 1


LOST = {
    "sequence out of order": (PRODUCE, Code.OUT_OF_ORDER_SEQUENCE_NUMBER, "OUT_OF_ORDER_SEQUENCE_NUMBER"),
    "unknown producer at the commit": (END_TXN, Code.INVALID_PRODUCER_ID_MAPPING, "INVALID_PRODUCER_ID_MAPPING"),
}


@pytest.mark.parametrize(("request_kind", "code", "name"), LOST.values(), ids=LOST)
def test_a_producer_whose_state_is_lost_is_made_anew(request_kind, code, name, cluster):
    with pytest.raises(KafkaError) as caught:
        _publish(cluster, lambda: cluster.fail_next(request_kind, code))
    assert caught.value.remedy in {Remedy.REBUILD, Remedy.RETRY}, caught.value
    assert name in str(caught.value)
    assert _publish(cluster).records == 1000


@pytest.mark.parametrize("request_kind", [ADD_PARTITIONS, END_TXN], ids=["in the midst", "at the commit"])
@pytest.mark.parametrize("code", [Code.INVALID_PRODUCER_EPOCH, PRODUCER_FENCED])
def test_a_fenced_producer_says_so_and_is_not_repeated(request_kind, code, cluster):
    began = time.monotonic()
    with pytest.raises(FencedError) as caught, _writer(cluster, delivery_timeout=60) as writer:
        cluster.fail_next(request_kind, *[code] * 3)
        writer.send_all({"i": i} for i in range(500))
    assert caught.value.remedy is Remedy.FAIL
    assert "another attempt" in caught.value.cause
    at_the_commit = request_kind == END_TXN
    assert ("whether it was committed is not known" in caught.value.cause) is at_the_commit
    assert ("Nothing of this attempt is visible" in caught.value.fix) is not at_the_commit
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("code", [Code._UNKNOWN_PARTITION, Code._UNKNOWN_TOPIC, Code.UNKNOWN_TOPIC_OR_PART])
@pytest.mark.parametrize("trouble", [None, "the topic does not exist any more"])
def test_a_topic_that_was_there_and_is_not_known_any_more_is_tried_again(code, trouble, cluster, monkeypatch):
    """By a broker that is behind the others (librdkafka 4401), or because it is gone: no record is at fault."""
    monkeypatch.setattr(sender, "topic_trouble", lambda *_: trouble)
    with pytest.raises(KafkaError) as caught, _writer(cluster) as writer:
        writer.send({"i": 1})
        writer._sender.tracks["t"].reporter(Span(0, 1))(Code(code), mock.Mock())
    assert caught.value.remedy is Remedy.RETRY
    assert (trouble or "a broker did not know the topic for a moment") in caught.value.cause
    assert caught.value.fix == "Try again"


def test_a_ledger_that_no_broker_takes_is_not_the_topics_fault(cluster, monkeypatch):
    monkeypatch.setattr(sender, "topic_trouble", lambda *_: "Kafka partition 0 has 2 of its 3 replicas in sync")
    never = [Code.COORDINATOR_NOT_AVAILABLE] * 10_000
    with pytest.raises(KafkaError, match="no broker takes its ledger.*__consumer_offsets") as caught:
        _publish(cluster, lambda: cluster.fail_next(TXN_OFFSETS, *never), delivery_timeout=2)
    assert "replicas in sync" not in str(caught.value)
    assert caught.value.remedy is Remedy.RETRY


def test_brokers_that_tell_nothing_of_one_topic_are_not_asked_for_the_next(cluster, monkeypatch):
    asked = []

    def silent(_connection, topic, timeout):
        asked.append((topic, timeout))
        raise KafkaError(f"topic {topic!r}", "no answer", "Try again", remedy=Remedy.RETRY)

    monkeypatch.setattr(publication, "current", silent)
    monkeypatch.setattr(publication, "_LOOK_AGAIN_SECONDS", 0)
    cluster.create_topic("u", partitions=2)
    with _writer(cluster) as writer:
        writer.send("x")
        writer.send("x", topic="u")
    assert writer.publication.records == 2
    assert asked == [("t", 10)]


def test_too_few_replicas_for_good_ends_at_the_deadline(cluster):
    began = time.monotonic()
    with pytest.raises(KafkaError) as caught:
        _publish(
            cluster,
            lambda: cluster.fail_next(PRODUCE, *[Code.NOT_ENOUGH_REPLICAS] * 10_000),
            librdkafka_config={"message.timeout.ms": "1000"},
        )
    assert time.monotonic() - began < 15
    assert caught.value.remedy is Remedy.RETRY
    assert caught.value.counts


@pytest.fixture
def refusing(cluster, monkeypatch):
    """Publishes to a topic whose leaders take so many batches of 50 records, and then no more; gives the error."""

    def refusing(taken, partitions, reports):
        monkeypatch.setattr(sender, "check_topic_exists", lambda *_, **__: Topic(partitions, None))
        cluster.create_topic("few", partitions)
        codes = [0] * taken + [Code.NOT_ENOUGH_REPLICAS] * 10_000
        # The time-out of records only: on a busy machine, connecting takes longer.
        raw = {"batch.num.messages": "50", "max.in.flight": "1", "linger.ms": "300", "message.timeout.ms": "2000"}
        producer = KafkaProducerConfig(
            bootstrap_servers=cluster.bootstrap_servers, connect_timeout=10, delivery_timeout=15, librdkafka_config=raw
        )
        writer = PublicationWriter(
            PublicationConfig(producer=producer),
            transactional_id="mock",
            publication_id="p",
            topic="few",
            reports=reports,
        )
        with pytest.raises(KafkaError) as caught, writer:
            cluster.fail_next(PRODUCE, *codes)
            writer.send_all(KafkaRecord(f"{i}", key=f"k{i}") for i in range(1000))
        assert caught.value.code == "_MSG_TIMED_OUT", caught.value
        return caught.value

    return refusing


@pytest.mark.parametrize(("partitions", "taken", "reports"), [(1, 3, True), (1, 3, False), (4, 0, False)])
def test_the_first_record_that_was_not_delivered_in_time_is_named(partitions, taken, reports, refusing):
    error, delivered = refusing(taken, partitions, reports), 50 * taken
    assert (error.index, error.key, error.among) == (delivered, f"k{delivered}".encode(), None)
    assert error.culprit.startswith(f"record {delivered} (key b'k{delivered}'), topic 'few': ")
    assert failure_of(error).metadata["kafka/record_index"].value == delivered


def test_of_several_kafka_partitions_that_took_some_records_it_is_told_between_which_it_is(refusing):
    error = refusing(1, 4, False)
    first, last = error.among
    assert (error.index, first) == (None, 0)
    assert int(error.key[1:]) <= last < 128
    assert error.culprit.startswith(f"one of records 0 to {last} (key {error.key!r}), topic 'few': ")
    assert failure_of(error).metadata["kafka/record_among"].value == f"0 to {last}"


def test_the_topic_whose_records_failed_is_named_not_one_whose_were_taken_back_for_that(cluster):
    cluster.create_topic("dead")
    with pytest.raises(KafkaError) as caught, _writer(cluster, on_bad_record="dead") as writer:
        # Whether both come in one poll, as here, hangs on librdkafka's clock.
        for track, code, place in (
            (writer._sender.tracks["t"], "_PURGE_QUEUE", 0),
            (writer._sender._dead_track, "_MSG_TIMED_OUT", 7),
        ):
            track.reporter(Span(place, place + 1, b"k"))(Code(getattr(Code, code)), mock.Mock())
        writer.send({"i": 8})
    assert caught.value.counts == {"_MSG_TIMED_OUT": 1}
    assert caught.value.culprit.startswith("record 7 (key b'k'), topic 'dead': 1 records not delivered")


def test_a_resource_whose_producer_has_ended_sends_by_a_new_one(cluster, monkeypatch):
    # The mock cluster does not know the request by which a producer learns that it is connected.
    monkeypatch.setattr(Connection, "answer", lambda *_: None)
    kafka = KafkaProducerResource(bootstrap_servers=cluster.bootstrap_servers, delivery_timeout=15)
    kafka.send_sync("t", "first")
    cluster.fail_next(PRODUCE, Code.OUT_OF_ORDER_SEQUENCE_NUMBER)
    with pytest.raises(KafkaError) as caught:
        kafka.send_sync("t", "second")
    assert caught.value.remedy is Remedy.REBUILD
    assert kafka.send_sync("t", "third")
    kafka.producer.close()


@pytest.mark.parametrize("sent_since", [False, True])
@pytest.mark.parametrize("wait", [0, 2])
def test_flush_of_a_resource_tells_what_a_producer_that_has_ended_has_lost(wait, sent_since, cluster, monkeypatch):
    monkeypatch.setattr(Connection, "answer", lambda *_: None)
    kafka = KafkaProducerResource(bootstrap_servers=cluster.bootstrap_servers, delivery_timeout=15)
    kafka.send_sync("t", "first")
    cluster.fail_next(PRODUCE, Code.OUT_OF_ORDER_SEQUENCE_NUMBER)
    lost = kafka.send_async("t", "lost")
    time.sleep(wait)
    if sent_since:
        assert lost.exception(30)
        kafka.send_async("t", "by a new producer")
    with pytest.raises(KafkaError, match="OUT_OF_ORDER_SEQUENCE_NUMBER"):
        kafka.flush()
    kafka.teardown_after_execution(None)


def test_flush_tells_of_what_was_lost_also_after_a_time_out(cluster, monkeypatch):
    monkeypatch.setattr(Connection, "answer", lambda *_: None)
    kafka = KafkaProducerResource(bootstrap_servers=cluster.bootstrap_servers, delivery_timeout=15)
    kafka.send_sync("t", "first")
    cluster.fail_next(PRODUCE, Code.OUT_OF_ORDER_SEQUENCE_NUMBER)
    assert kafka.send_async("t", "lost").exception(30)
    cluster.answer_after(HELD)
    kafka.send_async("t", "by a new producer")
    with pytest.raises(KafkaTimeoutError):
        kafka.flush(0)
    cluster.answer_after(0)
    with pytest.raises(KafkaError, match="OUT_OF_ORDER_SEQUENCE_NUMBER"):
        kafka.flush()
    kafka.flush()
    kafka.teardown_after_execution(None)


@pytest.mark.parametrize("again", [False, True])
def test_what_kept_records_back_is_forgotten_once_they_are_delivered(again, cluster, monkeypatch):
    with _writer(cluster) as writer:
        connection = writer._connection
        connection._on_error(Code(Code._AUTHENTICATION))
        connection._on_error(Code(Code._ALL_BROKERS_DOWN))
        hidden = connection._hidden_cause
        assert hidden().code == "_AUTHENTICATION"
        serve = connection.serve

        def once_more(*args):
            connection._on_error(Code(Code._AUTHENTICATION))
            return serve(*args)

        if again:
            monkeypatch.setattr(connection, "serve", once_more)
        writer.send({"i": 1})
        writer._flush()
        assert hidden() is None or again


def test_each_record_on_its_way_is_told_of_a_fatal_error(cluster, monkeypatch):
    monkeypatch.setattr(Connection, "answer", lambda *_: None)
    # All are sent before the error comes, however long that takes: the first ones' answer is held, the others wait for it.
    config = KafkaProducerConfig(
        bootstrap_servers=cluster.bootstrap_servers,
        linger_ms=50,
        delivery_timeout=15,
        librdkafka_config={"max.in.flight": "1"},
    )
    told = []
    with DataForgeKafkaProducer(config) as producer:
        producer.send_sync("t", "first")
        cluster.fail_next(PRODUCE, Code.OUT_OF_ORDER_SEQUENCE_NUMBER)
        cluster.answer_after(HELD)
        tell = lambda err, msg: told.append((err.name(), msg.key()))  # noqa: E731
        sent = [producer.send_async("t", "lost", f"key {i}", partition=0, callback=tell) for i in range(20)]
        cluster.answer_after(0)
        for future in sent:
            assert future.exception(30).remedy is Remedy.REBUILD
    assert sorted(key for _, key in told) == sorted(f"key {i}".encode() for i in range(20))


@pytest.mark.parametrize("in_flight", [5, 1])
def test_a_record_that_librdkafka_takes_for_delivered_though_a_broker_refused_it_fails(
    cluster, monkeypatch, in_flight, eventually
):
    """The broker refuses the first batch as no leader yet, and takes the second one, which was on its way."""
    monkeypatch.setattr(Connection, "answer", lambda *_: None)
    config = KafkaProducerConfig(
        bootstrap_servers=cluster.bootstrap_servers,
        linger_ms=0,
        delivery_timeout=15,
        librdkafka_config={"max.in.flight.requests.per.connection": in_flight},
    )
    told = []
    with DataForgeKafkaProducer(config) as producer:
        producer.send_sync("t", "connects", partition=0)
        cluster.answer_after(HELD)
        cluster.fail_next(PRODUCE, Code.NOT_LEADER_FOR_PARTITION)
        sent, before = [], cluster.count(PRODUCE)
        for i in range(4):
            tell = lambda err, msg: told.append((err and err.name(), msg.offset()))  # noqa: E731
            sent.append(producer.send_async("t", f"{i}", partition=0, callback=tell if i else None))
            batches = before + min(len(sent), in_flight)
            eventually(lambda batches=batches: cluster.count(PRODUCE) == batches)
        cluster.answer_after(0)
        if in_flight == 1:
            producer.flush()
        else:
            with pytest.raises(KafkaError, match=r"1 records were not delivered \(1 x _INCONSISTENT\)"):
                producer.flush()
    results = [future.exception(30) or future.result() for future in sent]
    if in_flight == 1:
        assert [result.offset for result in results] == [1, 2, 3, 4]
        assert sorted(told) == [(None, 2), (None, 3), (None, 4)]
    else:
        error, *later = results
        assert (error.code, error.remedy) == ("_INCONSISTENT", Remedy.REBUILD)
        assert "refused it" in error.cause
        assert "'max.in.flight.requests.per.connection': 1" in error.fix
        assert [result.offset for result in later] == [1, 2, 3]


def test_a_producer_whose_last_record_was_late_is_to_be_replaced(cluster, monkeypatch):
    """It may know a topic that was made anew by its old leader for ever (librdkafka 4898)."""
    monkeypatch.setattr(Connection, "answer", lambda *_: None)
    config = KafkaProducerConfig(bootstrap_servers=cluster.bootstrap_servers, delivery_timeout=1, retries=1000)
    with DataForgeKafkaProducer(config) as producer:
        producer.send_sync("t", "fine")
        assert not producer.failed
        cluster.fail_next(PRODUCE, *[Code.NOT_ENOUGH_REPLICAS] * 100)
        with pytest.raises(KafkaTimeoutError, match="made anew.* Try a new producer"):
            producer.send_sync("t", "late")
        assert producer.failed
