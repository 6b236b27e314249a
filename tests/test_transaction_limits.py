"""Transactions that a broker refuses, aborts or forgets: through Dagster, on a broker with small limits."""

import itertools
import time

import dagster as dg
import pytest
from confluent_kafka import IsolationLevel, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from conftest import read_topic

from dataforge_kafka_dagster import KafkaProducerResource
from dataforge_kafka_dagster.kafka.errors import KafkaConfigError
from dataforge_kafka_dagster.kafka.publication import publish
from dataforge_kafka_dagster.local import LocalKafka

pytestmark = pytest.mark.kafka

LIMITS = {
    "transaction.max.timeout.ms": "30000",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "200",
    "transactional.id.expiration.ms": "2000",
    "transaction.remove.expired.transaction.cleanup.interval.ms": "200",
}
_topics = itertools.count()


@pytest.fixture(scope="module")
def strict_kafka():
    with LocalKafka(config=LIMITS) as kafka:
        yield kafka


@pytest.fixture
def topic(strict_kafka):
    name = f"limits-{next(_topics)}"
    strict_kafka.create_topic(name)
    return name


def _resource(strict_kafka, **options):
    defaults = {"transaction_timeout": 30, "step_retry_delay": 0.01}
    return KafkaProducerResource(bootstrap_servers=strict_kafka.bootstrap_servers, **(defaults | options))


def _run(body, kafka, instance):
    @dg.asset
    def work(context: dg.AssetExecutionContext, kafka: KafkaProducerResource) -> dg.MaterializeResult:
        return body(context, kafka)

    return dg.materialize([work], resources={"kafka": kafka}, instance=instance, raise_on_error=False)


def _failure(result):
    assert not result.success
    assert [e for e in result.all_events if e.event_type is dg.DagsterEventType.STEP_UP_FOR_RETRY] == []
    (event,) = result.get_step_failure_events()
    return event.event_specific_data.user_failure_data.description


def test_a_timeout_above_the_brokers_names_both_settings(strict_kafka, topic):
    config = _resource(strict_kafka, transaction_timeout=31).publication_config()
    with pytest.raises(KafkaConfigError) as caught:
        publish(config, "x", transactional_id=topic, publication_id="p", topic=topic)
    assert caught.value.culprit.startswith("transaction_timeout=31 s")
    assert "transaction.max.timeout.ms" in caught.value.fix
    assert caught.value.code == "INVALID_TRANSACTION_TIMEOUT"


def test_a_timeout_above_the_brokers_is_not_tried_again(strict_kafka, topic, instance):
    def body(context, kafka):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("x")
        return publication.materialize_result()

    assert "transaction_timeout=31 s" in _failure(_run(body, _resource(strict_kafka, transaction_timeout=31), instance))
    assert _run(body, _resource(strict_kafka), instance).success


@pytest.mark.parametrize("where", ["between two records", "before the commit"])
def test_a_publication_that_the_broker_aborts_for_its_length_names_the_setting(
    where, strict_kafka, topic, instance, eventually
):
    admin, place = AdminClient({"bootstrap.servers": strict_kafka.bootstrap_servers}), TopicPartition(topic, 0)

    def is_aborted():
        """Whether readers see past the record, and the marker behind it."""
        asked = admin.list_offsets({place: OffsetSpec.latest()}, isolation_level=IsolationLevel.READ_COMMITTED)
        return asked[place].result(30).offset == 2

    def body(context, kafka):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("x")
            eventually(is_aborted, 30)
            if where == "between two records":
                publication.send("y")
        return publication.materialize_result()

    said = _failure(_run(body, _resource(strict_kafka, transaction_timeout=1), instance))
    assert "transaction_timeout=1 s" in said
    assert "transaction.max.timeout.ms" in said
    assert "another attempt" not in said
    assert read_topic(strict_kafka.bootstrap_servers, topic) == []


def test_what_is_computed_before_the_first_record_takes_nothing_of_the_timeout(strict_kafka, topic, instance):
    def body(context, kafka):
        with kafka.publishing(context, topic=topic) as publication:
            time.sleep(1.5)
            publication.send("x")
        return publication.materialize_result()

    # A busy machine may take that second for the rest: not each time.
    assert any(_run(body, _resource(strict_kafka, transaction_timeout=1), instance).success for _ in range(3))
    assert len(read_topic(strict_kafka.bootstrap_servers, topic)) == 1


def test_a_producer_that_the_broker_has_forgotten_is_replaced_by_a_retry(strict_kafka, topic, instance, eventually):
    """A fatal state of librdkafka's: the next attempt has a new producer, and publishes all of it once."""
    attempts = []

    def body(context, kafka):
        attempts.append(context.op_execution_context.retry_number)
        with kafka.publishing(context, topic=topic) as publication:
            if attempts == [0]:
                time.sleep(4)  # longer than transactional.id.expiration.ms
            publication.send_all(str(i) for i in range(10))
        return publication.materialize_result()

    result = _run(body, _resource(strict_kafka), instance)
    assert result.success
    assert attempts == [0, 1]
    assert [r.value for r in read_topic(strict_kafka.bootstrap_servers, topic)] == [b"%d" % i for i in range(10)]
