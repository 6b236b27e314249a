import _thread
import datetime as dt
import signal
import threading
import time
import types
import uuid

import dagster as dg
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from conftest import make_anew

from dataforge_kafka_dagster import (
    KafkaIOManager,
    KafkaProducerConfig,
    KafkaProducerResource,
    KafkaRecord,
    Publication,
    build_publication_checks,
)
from dataforge_kafka_dagster.checks import _last_topic
from dataforge_kafka_dagster.kafka import verification
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.errors import KafkaConfigError
from dataforge_kafka_dagster.kafka.ledger import PartitionOffsets
from dataforge_kafka_dagster.kafka.reader import GoneError

pytestmark = pytest.mark.kafka

PREFIX = f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def resources(kafka_bootstrap_servers):
    kafka = KafkaProducerResource(bootstrap_servers=kafka_bootstrap_servers, transactional_id_prefix=PREFIX)
    return {"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka)}


@pytest.fixture
def admin(kafka_bootstrap_servers):
    return AdminClient({"bootstrap.servers": kafka_bootstrap_servers})


def _rows(topic, count=100, **options):
    @dg.asset(metadata={"kafka/topic": topic}, **options)
    def rows():
        return [{"n": n} for n in range(count)] if count else None

    return rows


def _evaluate(assets, checks, resources, instance, selection=None, **options):
    result = dg.materialize(
        [*assets, *checks],
        resources=resources,
        instance=instance,
        selection=dg.AssetSelection.checks(*checks) if selection is None else selection,
        **options,
    )
    (evaluation,) = result.get_asset_check_evaluations()
    return evaluation


def _fails(asset, checked, resources, instance):
    checks = build_publication_checks([checked])
    result = dg.materialize(
        [asset, *checks],
        resources=resources,
        instance=instance,
        selection=dg.AssetSelection.checks(*checks),
        raise_on_error=False,
    )
    (failure,) = result.get_step_failure_events()
    return failure.event_specific_data.user_failure_data.description


def _plain(evaluation):
    return {name: value.value for name, value in evaluation.metadata.items() if name != "kafka/missing"}


def _delete_before(admin, topic, offset):
    (future,) = admin.delete_records([TopicPartition(topic, 0, offset)]).values()
    future.result(30)


def test_a_publication_that_is_whole_passes(resources, kafka_topic, instance):
    asset = _rows(kafka_topic(partitions=3))
    checks = build_publication_checks([asset])
    evaluation = _evaluate([asset], checks, resources, instance, dg.AssetSelection.all())
    assert evaluation.passed
    assert evaluation.check_name == "publication_is_in_kafka"
    assert _plain(evaluation) == {"kafka/publications": 1, "kafka/records": 100, "kafka/missing_records": 0}


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("severity", list(dg.AssetCheckSeverity))
def test_what_retention_has_eaten_is_counted(severity, thorough, resources, kafka_topic, admin, instance):
    topic = kafka_topic()
    asset = _rows(topic)
    checks = build_publication_checks([asset], severity=severity, thorough=thorough)
    dg.materialize([asset], resources=resources, instance=instance)
    _delete_before(admin, topic, 30)
    evaluation = _evaluate([asset], checks, resources, instance)
    assert not evaluation.passed
    assert evaluation.severity == severity
    assert _plain(evaluation)["kafka/missing_records"] == 30
    assert evaluation.description.startswith("30 of 100 records are gone. asset 'rows', topic")
    (row,) = evaluation.metadata["kafka/missing"].records
    assert (row.data["topic"], row.data["partition"], row.data["missing records"]) == (topic, 0, 30)
    assert "begins at offset 30" in row.data["cause"]


def test_records_before_the_publication_may_go(resources, kafka_topic, admin, instance):
    topic = kafka_topic()
    asset = _rows(topic)
    for _ in range(2):
        dg.materialize([asset], resources=resources, instance=instance)
    _delete_before(admin, topic, 101)
    assert _evaluate([asset], build_publication_checks([asset]), resources, instance).passed


def test_a_topic_that_was_deleted_is_noticed_and_so_is_one_made_anew(
    resources, kafka_topic, admin, instance, kafka_bootstrap_servers, eventually
):
    topic = f"gone-{uuid.uuid4().hex[:8]}"
    admin.create_topics([NewTopic(topic, 1)])[topic].result(30)
    asset = _rows(topic)
    checks = build_publication_checks(["rows"])
    dg.materialize([asset], resources=resources, instance=instance)
    admin.delete_topics([topic])[topic].result(30)
    eventually(lambda: topic not in admin.list_topics(timeout=10).topics)
    evaluation = _evaluate([asset], checks, resources, instance)
    assert (evaluation.passed, _plain(evaluation)["kafka/missing_records"]) == (False, 100)
    assert "the topic was deleted" in evaluation.description

    make_anew(admin, topic)
    try:
        # As many records as before, so that the offsets look right.
        dg.materialize([_rows(topic, 100, name="others")], resources=resources, instance=instance)
        evaluation = _evaluate([asset], checks, resources, instance)
        assert not evaluation.passed
        assert "the topic was deleted and made anew" in evaluation.description
    finally:
        admin.delete_topics([topic])[topic].result(30)


def test_reading_finds_a_publication_that_is_not_what_dagster_says(resources, kafka_topic, instance):
    asset = _rows(kafka_topic())
    result = dg.materialize([asset], resources=resources, instance=instance)
    (event,) = result.get_asset_materialization_events()
    said = event.materialization.metadata["kafka/publication"].value
    metadata = {"kafka/publication": dg.MetadataValue.json(said | {"bytes": said["bytes"] + 1})}
    instance.report_runless_asset_event(dg.AssetMaterialization("rows", metadata=metadata))
    assert _evaluate([asset], build_publication_checks([asset]), resources, instance).passed
    evaluation = _evaluate([asset], build_publication_checks([asset], thorough=True), resources, instance)
    assert not evaluation.passed
    assert "its 100 records have" in evaluation.description


def test_reading_passes_a_publication_that_is_whole(resources, kafka_topic, instance):
    @dg.asset(metadata={"kafka/topic": kafka_topic(partitions=2)})
    def rows():
        return [KafkaRecord("a", key="k"), KafkaRecord(None, key="k")]

    checks = build_publication_checks([rows], thorough=True)
    assert _evaluate([rows], checks, resources, instance, dg.AssetSelection.all()).passed


def test_an_output_of_nothing_passes(resources, kafka_topic, instance):
    asset = _rows(kafka_topic(), 0)
    assert _evaluate([asset], build_publication_checks([asset]), resources, instance, dg.AssetSelection.all()).passed


def test_what_was_never_materialized_fails_with_what_to_do(resources, kafka_topic, instance):
    asset = _rows(kafka_topic())
    assert "it was never materialized. Materialize it first" in _fails(asset, asset, resources, instance)


def test_an_output_that_another_io_manager_has_stored_does_not_pass(resources, kafka_topic, instance):
    asset = _rows(kafka_topic())
    dg.materialize([asset], resources={"io_manager": dg.mem_io_manager}, instance=instance)
    assert "it was not published by a KafkaIOManager" in _fails(asset, asset, resources, instance)


def test_a_run_for_a_dagster_partition_checks_that_one(resources, kafka_topic, admin, instance):
    topic, days = kafka_topic(), dg.StaticPartitionsDefinition(["mon", "tue"])
    asset = _rows(topic, partitions_def=days)
    checks = build_publication_checks([asset])
    dg.materialize([asset], resources=resources, instance=instance, partition_key="mon")
    _delete_before(admin, topic, 50)
    evaluation = _evaluate([asset], checks, resources, instance, dg.AssetSelection.all(), partition_key="tue")
    assert evaluation.passed
    assert _plain(evaluation)["kafka/publications"] == 1
    # A run of the check alone looks at all of them.
    for some in (checks, build_publication_checks(["rows"])):
        evaluation = _evaluate([asset], some, resources, instance)
        assert evaluation.description.startswith("50 of 200 records are gone. asset 'rows', partition 'mon', topic")


def test_a_run_for_dagster_partitions_that_the_asset_has_not_checks_all_of_its_own(resources, kafka_topic, instance):
    asset = _rows(kafka_topic(), partitions_def=dg.StaticPartitionsDefinition(["mon", "tue"]))
    for day in ("mon", "tue"):
        dg.materialize([asset], resources=resources, instance=instance, partition_key=day)
    other = dg.asset(name="other", partitions_def=dg.StaticPartitionsDefinition(["eu"]))(lambda: None)
    checks = build_publication_checks([asset], blocking=True)
    selection = dg.AssetSelection.checks(*checks) | dg.AssetSelection.assets(other)
    evaluation = _evaluate([asset, other], checks, resources, instance, selection, partition_key="eu")
    assert evaluation.passed
    assert _plain(evaluation)["kafka/publications"] == 2


@pytest.mark.parametrize("blocking", [False, True])
def test_assets_downstream_wait_for_checks_that_are_to_block(blocking):
    schema = {"kafka/value_schema": "latest"}
    checks = build_publication_checks([dg.AssetSpec("rows", metadata=schema)], blocking=blocking)
    specs = [spec for check in checks for spec in check.check_specs]
    assert [(spec.name, spec.blocking) for spec in specs] == [
        ("publication_is_in_kafka", blocking),
        ("schema_is_compatible", blocking),
    ]


def test_the_topic_of_a_schema_is_the_first_that_the_last_materialization_names(instance):
    with pytest.raises(KafkaConfigError, match="only a materialization tells. Materialize it first"):
        _last_topic(instance, dg.AssetKey("rows"))
    instance.report_runless_asset_event(dg.AssetMaterialization("rows", metadata={"kafka/topic": "own, other"}))
    assert _last_topic(instance, dg.AssetKey("rows")) == "own"


def test_a_source_asset_is_refused():
    with pytest.raises(KafkaConfigError, match="asset of type SourceAsset: nobody publishes such a one. Leave it out"):
        build_publication_checks([dg.SourceAsset("outside")])


def test_freshness_is_dagsters_own(resources, kafka_topic, instance):
    asset = _rows(kafka_topic())
    checks = dg.build_last_update_freshness_checks(assets=[asset], lower_bound_delta=dt.timedelta(hours=1))
    result = dg.materialize([asset, *checks], resources=resources, instance=instance)
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.passed
    assert evaluation.check_name == "freshness_check"


def test_what_was_published_before_the_asset_lost_its_partitions_does_not_count(resources, kafka_topic, instance):
    daily = dg.DailyPartitionsDefinition("2026-01-01", end_date="2026-01-03")
    before = _rows(kafka_topic(), 1, partitions_def=daily)
    dg.materialize([before], partition_key="2026-01-01", resources=resources, instance=instance)
    asset = _rows(kafka_topic(), 2)
    dg.materialize([asset], resources=resources, instance=instance)
    checks = build_publication_checks([asset])
    assert _plain(_evaluate([asset], checks, resources, instance))["kafka/records"] == 2
    # By its key alone, only what the event log says is known.
    bare = build_publication_checks([asset.key])
    assert _plain(_evaluate([asset], bare, resources, instance))["kafka/records"] == 1


def test_a_dynamic_partition_that_was_deleted_is_not_asked_for(resources, kafka_topic, instance):
    dynamic = dg.DynamicPartitionsDefinition(name="checked")
    asset = _rows(kafka_topic(), 3, partitions_def=dynamic)
    instance.add_dynamic_partitions("checked", ["x", "y"])
    for key in "xy":
        dg.materialize([asset], partition_key=key, resources=resources, instance=instance)
    instance.delete_dynamic_partition("checked", "x")
    evaluation = _evaluate([asset], build_publication_checks([asset]), resources, instance)
    assert _plain(evaluation)["kafka/records"] == 3


def test_somebody_elses_open_transaction_is_not_taken_for_the_end(
    resources, kafka_topic, instance, kafka_bootstrap_servers
):
    topic = kafka_topic()
    other = Producer({"bootstrap.servers": kafka_bootstrap_servers, "transactional.id": topic})
    other.init_transactions(30)
    other.begin_transaction()
    other.produce(topic, b"not committed")
    assert other.flush(30) == 0
    asset = _rows(topic)
    dg.materialize([asset], resources=resources, instance=instance)
    try:
        assert _evaluate([asset], build_publication_checks([asset]), resources, instance).passed
    finally:
        other.abort_transaction(30)


def test_an_interrupt_ends_the_look_for_missing_records_at_once(monkeypatch):
    """Also where a broker does not answer, in whose time-out closing the reader would wait."""
    publication = Publication(
        "p", "t", "t", 1, 1, "json", (PartitionOffsets("t", 0, ((0, 0),)),), replayed=False, seconds=0.0
    )
    asked, done = threading.Event(), threading.Event()

    class Reader:
        def get_watermark_offsets(self, *_, **__):
            asked.set()
            done.wait(60)

        def close(self):
            pytest.fail("it is in use")

    def interrupt():
        asked.wait(60)
        _thread.interrupt_main()

    monkeypatch.setattr(verification, "lost_since", lambda *_: None)
    monkeypatch.setattr(Connection, "reader", lambda *_: Reader())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    threading.Thread(target=interrupt).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            verification.find_missing(KafkaProducerConfig(bootstrap_servers="localhost:1"), publication, timeout=60)
    finally:
        done.set()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("low", "high", "missing"),
    [
        (0, 21, []),
        (0, 20, []),  # the record is there, and what followed it is not
        (10, 20, []),
        (0, 19, [(1, "it ends at offset 19 now")]),
        (0, 16, [(2, "it ends at offset 16 now")]),  # offsets 15 to 17 are somebody else's
        (0, 12, [(5, "it ends at offset 12 now")]),
        (0, 5, [(7, "it ends at offset 5 now")]),
        (11, 21, [(1, "it begins at offset 11 now")]),
        (19, 21, [(6, "it begins at offset 19 now")]),
        (20, 20, [(7, "it begins at offset 20 now")]),
    ],
)
def test_what_is_missing_at_either_end_is_counted_without_what_others_have_there(low, high, missing, monkeypatch):
    there = PartitionOffsets("t", 3, ((10, 14), (18, 19)))
    publication = Publication("p", "t", "t", 7, 1, "json", (there,), replayed=False, seconds=0.0)
    reader, closed = types.SimpleNamespace(get_watermark_offsets=lambda *_, **__: (low, high)), []
    monkeypatch.setattr(verification, "lost_since", lambda *_: None)
    monkeypatch.setattr(Connection, "reader", lambda *_: reader)
    monkeypatch.setattr(Connection, "close", lambda _, *clients: closed.extend(clients))
    found = verification.find_missing(KafkaProducerConfig(bootstrap_servers="localhost:1"), publication, timeout=10)
    assert [(one.topic, one.partition, one.records) for one in found] == [("t", 3, count) for count, _ in missing]
    assert all(one.cause.startswith(cause) for one, (_, cause) in zip(found, missing, strict=True))
    assert closed == [reader]


def test_each_topic_is_asked_for_its_own_kafka_partitions(monkeypatch):
    there = tuple(PartitionOffsets(topic, 0, ((0, 9),)) for topic in ("cut", "whole"))
    publication = Publication("p", "t", "cut", 20, 1, "json", there, replayed=False, seconds=0.0)
    reader = types.SimpleNamespace(
        get_watermark_offsets=lambda place, *_, **__: (4 if place.topic == "cut" else 0, 11), close=lambda: None
    )
    monkeypatch.setattr(verification, "lost_since", lambda *_: None)
    monkeypatch.setattr(Connection, "reader", lambda *_: reader)
    found = verification.find_missing(KafkaProducerConfig(bootstrap_servers="localhost:1"), publication, timeout=10)
    assert [(one.topic, one.partition, one.records) for one in found] == [("cut", 0, 4)]


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
def test_a_check_whose_wait_has_no_end_is_refused(timeout):
    with pytest.raises(KafkaConfigError, match=rf"timeout={timeout!r}: a wait needs an end"):
        build_publication_checks(["flights"], timeout=timeout)


_TWO = [PartitionOffsets("t", partition, ((0, 1),)) for partition in (0, 1)]


@pytest.mark.parametrize(
    ("values", "gone", "missing"),
    [
        ([b"abc", b"abc", None], None, []),
        ([b"abc", b"abc"], None, []),  # without the tombstone, which compaction has removed
        ([b"abc", b"ab", None], None, [(0, "its 3 records have 8 bytes, but 9 bytes were published")]),
        ([b"abc"], GoneError(_TWO, "offset 0 is gone"), [(2, "offset 0 is gone")]),
        ([b"abc"], GoneError(_TWO, "1 of 2 records are gone", 1), [(1, "1 of 2 records are gone")]),
    ],
    ids=["whole", "compacted", "other bytes", "gone", "a row gone"],
)
def test_reading_counts_what_is_gone_and_does_not_miss_tombstones(values, gone, missing, monkeypatch):
    def read(*_):
        for value in values:
            yield types.SimpleNamespace(value=value, key=b"k")
        if gone is not None:
            raise gone

    monkeypatch.setattr(verification, "_missing_by_offsets", lambda *_: [])
    monkeypatch.setattr(verification, "read_publication", read)
    publication = Publication("p", "t", "t", 3, 9, "bytes", (), replayed=False, seconds=0.0, tombstones=1)
    found = verification.find_missing(KafkaProducerConfig(bootstrap_servers="localhost:1"), publication, thorough=True)
    assert [(one.topic, one.partition, one.records) for one in found] == [("t", None, count) for count, _ in missing]
    assert all(one.cause.startswith(cause) for one, (_, cause) in zip(found, missing, strict=True))


def _days(topic, **options):
    @dg.asset(metadata={"kafka/topic": topic}, partitions_def=dg.DynamicPartitionsDefinition(name="days"), **options)
    def days(context: dg.AssetExecutionContext):
        return [{"day": context.partition_key}]

    return days


def _publish_days(asset, resources, instance, *keys):
    instance.add_dynamic_partitions("days", list(keys))
    for key in keys:
        dg.materialize([asset], resources=resources, instance=instance, partition_key=key)


def test_a_spec_that_hides_dagster_partitions_is_refused(resources, kafka_topic, instance):
    asset = _days(kafka_topic())
    _publish_days(asset, resources, instance, "mon", "tue")
    assert "give it the partitions_def that the asset has" in _fails(asset, dg.AssetSpec("days"), resources, instance)
    assert _plain(_evaluate([asset], build_publication_checks(["days"]), resources, instance))["kafka/records"] == 2


def test_an_asset_whose_dagster_partitions_are_all_gone_does_not_pass(resources, kafka_topic, instance):
    asset = _days(kafka_topic())
    _publish_days(asset, resources, instance, "mon")
    instance.delete_dynamic_partition("days", "mon")
    assert "none of its Dagster partitions was materialized" in _fails(asset, asset, resources, instance)


def test_dagster_partitions_that_were_not_published_here_are_counted(resources, kafka_topic, instance):
    asset = _days(kafka_topic())
    _publish_days(asset, resources, instance, "mon", "tue")
    instance.add_dynamic_partitions("days", ["by hand"])
    instance.report_runless_asset_event(dg.AssetMaterialization("days", partition="by hand"))
    evaluation = _evaluate([asset], build_publication_checks([asset]), resources, instance)
    assert evaluation.passed
    said = _plain(evaluation)
    assert (said["kafka/publications"], said["kafka/records"]) == (2, 2)
    assert said["kafka/not_checked"].startswith("1 Dagster partitions. The first: asset 'days', partition 'by hand'")
    # If they are all that there are, they are none to pass.
    instance.delete_dynamic_partition("days", "mon")
    instance.delete_dynamic_partition("days", "tue")
    assert "it was never materialized" in _fails(asset, asset, resources, instance)
