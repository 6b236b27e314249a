import datetime as dt
import json
import sys
import uuid

import dagster as dg
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary_event
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerResource, KafkaRecord
from dataforge_kafka_dagster.kafka.cloudevents import CloudEventHeaders
from dataforge_kafka_dagster.kafka.errors import KafkaConfigError
from dataforge_kafka_dagster.kafka.sources import chunks
from dataforge_kafka_dagster.kafka.statistics import Statistics
from dataforge_kafka_dagster.kafka.telemetry import PublicationSpan

EVENT = {"type": "com.example.flight", "source": "/dagster/flights"}


def _manager(servers):
    kafka = KafkaProducerResource(
        bootstrap_servers=servers, transactional_id_prefix=f"test-{uuid.uuid4().hex[:8]}", step_retries=0
    )
    return {"io_manager": KafkaIOManager(kafka=kafka)}


def _report(p50, p99, retries, queued, throttled, count=1, node=1):
    broker = {
        "nodeid": node,
        "txretries": retries,
        "rtt": {"cnt": count, "p50": p50, "p99": p99},
        "throttle": {"sum": throttled},
    }
    return json.dumps({"msg_cnt": queued, "brokers": {"b": broker}})


def test_statistics_are_the_worst_of_their_seconds():
    statistics = Statistics()
    statistics.take(_report(900_000, 900_000, 0, 0, 0, node=-1))
    assert statistics.summary() == {}
    statistics.take(_report(1500, 9000, 1, 10, 5))
    statistics.take(_report(2500, 4000, 3, 7, 2))
    statistics.take(_report(9_999_999, 9_999_999, 3, 7, 0, count=0))
    assert statistics.summary() == {
        "latency_p50_ms": 2.5,
        "latency_p99_ms": 9.0,
        "request_retries": 3,
        "most_queued_records": 10,
        "throttled_ms": 7.0,
    }


def test_what_did_not_happen_is_left_out_of_the_statistics():
    statistics = Statistics()
    statistics.take(_report(1500, 9000, 0, 0, 0))
    assert statistics.summary() == {"latency_p50_ms": 1.5, "latency_p99_ms": 9.0}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"brokers": {"b": {"nodeid": 1}}}'])
def test_reports_of_another_form_are_left_alone(text):
    statistics = Statistics()
    statistics.take(text)
    assert statistics.summary() == {}


@pytest.mark.kafka
def test_librdkafkas_statistics_stand_in_the_metadata(kafka_bootstrap_servers, kafka_topic, instance):
    topic = kafka_topic()

    @dg.asset(metadata={"kafka/topic": topic})
    def slow():
        import time

        def rows():
            for i in range(25):
                yield {"i": i}
                time.sleep(0.1)

        return dg.Output(rows())

    result = dg.materialize([slow], resources=_manager(kafka_bootstrap_servers), instance=instance)
    (event,) = result.get_asset_materialization_events()
    said = {name: value.value for name, value in event.materialization.metadata.items()}
    assert 0 < said["kafka/latency_p50_ms"] <= said["kafka/latency_p99_ms"]
    assert said["kafka/publication"]["statistics"]["latency_p99_ms"] == said["kafka/latency_p99_ms"]


@pytest.fixture(scope="module")
def telemetry():
    """The SDK of this process: spans and metrics in memory."""
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    # A process takes one provider only, and a page of the docs that ran before may have set it.
    trace.set_tracer_provider(TracerProvider())
    tracing = trace.get_tracer_provider()
    tracing.add_span_processor(SimpleSpanProcessor(spans))
    metering = MeterProvider([reader])
    metrics.set_meter_provider(metering)
    yield spans, reader
    metering.shutdown()
    tracing.shutdown()


def _counted(reader):
    data = reader.get_metrics_data()
    return {
        (metric.name, point.attributes["messaging.destination.name"]): point.value
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }


@pytest.mark.kafka
def test_a_publication_is_a_span_and_counts(kafka_bootstrap_servers, kafka_topic, instance, telemetry):
    spans, reader = telemetry
    spans.clear()
    topic = kafka_topic()

    @dg.asset(metadata={"kafka/topic": topic})
    def rows():
        return [{"i": 0}, {"i": 1}]

    assert dg.materialize([rows], resources=_manager(kafka_bootstrap_servers), instance=instance).success
    (span,) = spans.get_finished_spans()
    assert (span.name, span.kind, span.status.is_ok or span.status.is_unset) == (
        f"publish {topic}",
        trace.SpanKind.PRODUCER,
        True,
    )
    said = dict(span.attributes)
    assert said["messaging.system"] == "kafka"
    assert said["messaging.destination.name"] == topic
    assert said["messaging.batch.message_count"] == 2
    assert said["dataforge.kafka.publication.replayed"] is False
    counted = _counted(reader)
    assert counted["messaging.client.sent.messages", topic] == 2
    assert counted["dataforge.kafka.sent.bytes", topic] == 14


@pytest.mark.kafka
def test_records_are_counted_for_the_topic_that_they_went_to(kafka_bootstrap_servers, kafka_topic, telemetry):
    _, reader = telemetry
    own, other = kafka_topic(), kafka_topic()
    kafka = KafkaProducerResource(bootstrap_servers=kafka_bootstrap_servers)
    with kafka.publishing(dg.build_asset_context(), topic=own) as session:
        session.send({"i": 0})
        session.send_all([{"i": i} for i in range(9)], topic=other)
    counted = _counted(reader)
    assert [counted["messaging.client.sent.messages", topic] for topic in (own, other)] == [1, 9]


@pytest.mark.kafka
def test_a_publication_that_fails_is_a_span_with_its_error(kafka_bootstrap_servers, kafka_topic, instance, telemetry):
    spans, reader = telemetry
    spans.clear()
    topic = kafka_topic()

    @dg.asset(metadata={"kafka/topic": topic})
    def rows():
        return dg.Output(iter([{"i": 0}, {"i": object()}]))

    resources = _manager(kafka_bootstrap_servers)
    assert not dg.materialize([rows], resources=resources, instance=instance, raise_on_error=False).success
    (span,) = spans.get_finished_spans()
    assert span.status.status_code == trace.StatusCode.ERROR
    assert span.attributes["error.type"] == "InvalidRecordError"
    assert ("messaging.client.sent.messages", topic) not in _counted(reader)


def test_without_opentelemetry_nothing_happens(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    span = PublicationSpan("topic", "publication", "transactional")
    span.succeed({"topic": 1}, 1, replayed=False)
    span.fail(ValueError())


def _headers(attributes, publication_id, output):
    (chunk,) = CloudEventHeaders(attributes, publication_id).add(chunks(output))
    return [dict(extra.headers) for extra in chunk.extras]


def test_each_record_is_an_event_of_its_own_and_the_same_in_each_attempt():
    rows = [{"i": i} for i in range(3)]
    first, second = _headers(EVENT, "run/asset", rows), _headers(EVENT, "run/asset", rows)
    ids = [headers["ce_id"] for headers in first]
    assert len(set(ids)) == 3
    assert ids == [headers["ce_id"] for headers in second]
    assert ids[0] not in [headers["ce_id"] for headers in _headers(EVENT, "another/asset", rows)]
    assert {(h["ce_type"], h["ce_source"], h["ce_specversion"], h["content-type"]) for h in first} == {
        (b"com.example.flight", b"/dagster/flights", b"1.0", b"application/json")
    }
    assert first[0]["ce_time"].endswith(b"Z")


def test_ids_go_on_from_chunk_to_chunk():
    rows = [{"i": i} for i in range(1000)]
    made = [e for chunk in CloudEventHeaders(EVENT, "p").add(chunks(rows)) for e in chunk.extras]
    assert len({dict(extra.headers)["ce_id"] for extra in made}) == 1000


def test_records_that_are_put_aside_leave_the_others_their_ids_in_each_attempt():
    rows = [{"i": object() if i in {1, 400} else i} for i in range(600)]

    def attempt():
        bad = []
        encoded = chunks(rows, on_bad=lambda row, index, error: bad.append(index))
        made = [e for chunk in CloudEventHeaders(EVENT, "p").add(encoded) for e in chunk.extras]
        return bad, [dict(extra.headers)["ce_id"] for extra in made]

    bad, ids = attempt()
    assert (bad, len(set(ids))) == ([1, 400], 598)
    assert attempt() == (bad, ids)


def test_a_records_own_headers_and_kafka_partition_stay():
    record = KafkaRecord("text", key="k", headers={"trace": "1"}, partition=0, timestamp=5)
    (chunk,) = CloudEventHeaders(EVENT | {"datacontenttype": "text/csv"}, "p").add(chunks([record]))
    (extra,) = chunk.extras
    headers = dict(extra.headers)
    assert (headers["trace"], headers["content-type"]) == (b"1", b"text/csv")
    assert (extra.partition, extra.timestamp) == (0, 5)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"type": "a"}, "source.*Give at least type and source"),
        ({**EVENT, "Bad-Name": "x"}, "lowercase letters and numbers.*Give what CloudEvents allows"),
        ({**EVENT, "id": "mine"}, "an id of its own.*Leave id out"),
        ({**EVENT, "time": "yesterday"}, "yesterday.*Give what CloudEvents allows"),
        ({**EVENT, "time": "2013-01-01T10:00:00"}, "must be timezone aware"),
    ],
)
def test_attributes_that_cloudevents_does_not_allow_are_refused(attributes, reason):
    with pytest.raises(KafkaConfigError, match=rf"(?s){reason}"):
        CloudEventHeaders(attributes, "p")


@pytest.mark.parametrize(
    "time", ["2013-01-01T10:00:00Z", "2013-01-01T11:00:00+01:00", dt.datetime(2013, 1, 1, 10, tzinfo=dt.timezone.utc)]
)
def test_the_time_of_an_event_may_be_text(time):
    (headers,) = _headers(EVENT | {"time": time}, "p", [{"i": 0}])
    assert dt.datetime.fromisoformat(headers["ce_time"].decode().replace("Z", "+00:00")).timestamp() == 1357034400


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudevents.core.v1.event", None)
    with pytest.raises(KafkaConfigError, match=r"dataforge-kafka-dagster\[cloudevents\]"):
        CloudEventHeaders(EVENT, "p")


@pytest.mark.kafka
def test_the_cloudevents_package_reads_what_was_published(kafka_bootstrap_servers, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.asset(metadata={"kafka/topic": topic, "kafka/key": "i", "kafka/cloudevents": EVENT | {"subject": "JFK"}})
    def rows():
        return [{"i": 0}, {"i": 1}]

    assert dg.materialize([rows], resources=_manager(kafka_bootstrap_servers), instance=instance).success
    events = [from_binary_event(KafkaMessage(dict(r.headers), r.key, r.value)) for r in read(topic)]
    assert [event.get_data() for event in events] == [{"i": 0}, {"i": 1}]
    assert {event.get_type() for event in events} == {"com.example.flight"}
    assert {event.get_subject() for event in events} == {"JFK"}
    assert len({event.get_id() for event in events}) == 2


@pytest.mark.kafka
def test_events_go_beside_a_dead_letter_topic(kafka_bootstrap_servers, kafka_topic, read, instance):
    topic, dead = kafka_topic(), kafka_topic()

    @dg.asset(metadata={"kafka/topic": topic, "kafka/on_bad_record": dead, "kafka/cloudevents": EVENT})
    def rows():
        return [{"i": 0}, {"i": object()}, {"i": "x" * 2_000_000}, {"i": 3}]

    result = dg.materialize([rows], resources=_manager(kafka_bootstrap_servers), instance=instance)
    assert result.asset_materializations_for_node("rows")[0].metadata["kafka/dead_letter_records"].value == 2
    events = [from_binary_event(KafkaMessage(dict(r.headers), r.key, r.value)) for r in read(topic)]
    assert [event.get_data() for event in events] == [{"i": 0}, {"i": 3}]
    assert len({event.get_id() for event in events}) == 2
    assert [dict(record.headers)["dead-letter.index"] for record in read(dead)] == [b"1", b"2"]
