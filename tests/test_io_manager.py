import collections
import dataclasses
import datetime as dt
import json
import logging
import shutil
import subprocess
import time
import uuid

import dagster as dg
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from confluent_kafka import Producer
from conftest import make_anew
from pydantic import BaseModel

from dataforge_kafka_dagster import KafkaError, KafkaIOManager, KafkaProducerResource, KafkaRecord
from dataforge_kafka_dagster.kafka import topics
from dataforge_kafka_dagster.kafka.errors import Remedy

pytestmark = pytest.mark.kafka

PREFIX = f"test-{uuid.uuid4().hex[:8]}"
"""Keeps apart the publishers of test sessions that share a Kafka: all of them have an asset `made`."""


class Place(BaseModel):
    code: str
    lat: float


@dataclasses.dataclass
class Point:
    x: int


@pytest.fixture
def manager(kafka_bootstrap_servers):
    return _manager(kafka_bootstrap_servers)


def _manager(servers, *, topic=None, key=None, **options):
    defaults = {"step_retry_delay": 0.01, "transactional_id_prefix": PREFIX}
    kafka = KafkaProducerResource(bootstrap_servers=servers, **(defaults | options))
    return KafkaIOManager(kafka=kafka, topic=topic, key=key)


def _materialize(assets, manager, instance, **options):
    assets = assets if isinstance(assets, list) else [assets]
    return dg.materialize(assets, resources={"io_manager": manager}, instance=instance, **options)


def _asset(output, topic=None, key=None, **options):
    metadata = {name: value for name, value in {"kafka/topic": topic, "kafka/key": key}.items() if value is not None}

    @dg.asset(**({"name": "made", "metadata": metadata} | options))
    def made():
        return dg.Output(output() if callable(output) else output)

    return made


def _raw_metadata(result, asset="made"):
    (event,) = (e for e in result.get_asset_materialization_events() if e.asset_key.path[-1] == asset)
    return event.materialization.metadata


def _metadata(result, asset="made"):
    return _plain(_raw_metadata(result, asset))


def _plain(metadata):
    plain = {name: value.value for name, value in metadata.items()}
    if "kafka/offsets" in plain:
        plain["kafka/offsets"] = [record.data for record in plain["kafka/offsets"].records]
    return plain


def _offsets(found, topic):
    """The table that the metadata should have, from what an independent reader found."""
    places = collections.defaultdict(list)
    for record in found:
        places[record.partition].append(record.offset)
    return [
        {
            "topic": topic,
            "partition": partition,
            "first offset": offsets[0],
            "last offset": offsets[-1],
            "records": len(offsets),
        }
        for partition, offsets in sorted(places.items())
    ]


def _values(found):
    return [record.value for record in found]


def _failure(result):
    (event,) = result.get_step_failure_events()
    return event.event_specific_data.user_failure_data


def _generator():
    yield {"i": 0}
    yield {"i": 1}


ROWS = [b'{"i":0}', b'{"i":1}']


@pytest.mark.parametrize(
    ("output", "values"),
    [
        ({"i": 0}, [b'{"i":0}']),
        (Point(1), [b'{"x":1}']),
        (Place(code="JFK", lat=40.5), [b'{"code":"JFK","lat":40.5}']),
        ("text", [b"text"]),
        (b"\x00\xff", [b"\x00\xff"]),
        (KafkaRecord({"i": 0}, key="k"), [b'{"i":0}']),
        ([{"i": 0}, {"i": 1}], ROWS),
        (({"i": 0}, {"i": 1}), ROWS),
        (lambda: iter([{"i": 0}, {"i": 1}]), ROWS),
        (_generator, ROWS),
        ([Point(1), Point(2)], [b'{"x":1}', b'{"x":2}']),
        ([Place(code="a", lat=1)], [b'{"code":"a","lat":1.0}']),
        (["a", "b"], [b"a", b"b"]),
        ([b"a"], [b"a"]),
        ([KafkaRecord("a"), KafkaRecord(None, key="k")], [b"a", None]),
        (pl.DataFrame({"i": [0, 1]}), ROWS),
        (pd.DataFrame({"i": [0, 1]}), ROWS),
        (pa.table({"i": [0, 1]}), ROWS),
        ([], []),
        (pl.DataFrame({"i": []}), []),
        ("", [b""]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_accepted_outputs(output, values, manager, kafka_topic, read, instance):
    topic = kafka_topic()
    said = _metadata(_materialize(_asset(output, topic), manager, instance))
    found = read(topic)
    assert _values(found) == values
    assert said["dagster/row_count"] == sum(value is not None for value in values)
    assert said["kafka/records"] == len(values)
    assert said["kafka/bytes"] == sum(len(r.value or b"") + len(r.key or b"") for r in found)
    assert said.get("kafka/offsets", []) == _offsets(found, topic)


def test_what_a_materialization_says_is_what_a_reader_finds(manager, kafka_topic, read, instance):
    topic = kafka_topic(partitions=3)
    rows = [{"tailnum": f"N{i % 37}", "i": i} for i in range(1000)]
    result = _materialize(_asset(rows, topic, "tailnum"), manager, instance)
    raw, found = _raw_metadata(result), read(topic)
    assert len(found) == 1000
    types = {
        "dagster/row_count": dg.IntMetadataValue,
        "kafka/topic": dg.TextMetadataValue,
        "kafka/records": dg.IntMetadataValue,
        "kafka/bytes": dg.IntMetadataValue,
        "kafka/replayed": dg.BoolMetadataValue,
        "kafka/seconds": dg.FloatMetadataValue,
        "kafka/records_per_second": dg.FloatMetadataValue,
        "kafka/offsets": dg.TableMetadataValue,
        "kafka/publication": dg.JsonMetadataValue,
    }
    assert {name: type(raw[name]) for name in types} == types
    said = _plain(raw)
    assert said["dagster/row_count"] == said["kafka/records"] == 1000
    assert said["kafka/topic"] == topic
    assert said["kafka/bytes"] == sum(len(record.key) + len(record.value) for record in found)
    assert said["kafka/replayed"] is False
    assert 0 < said["kafka/seconds"] < 60
    assert said["kafka/records_per_second"] == pytest.approx(1000 / said["kafka/seconds"], rel=0.05)
    assert said["kafka/offsets"] == _offsets(found, topic)
    assert {record.key for record in found} == {f"N{i}".encode() for i in range(37)}
    assert sorted(json.loads(record.value)["i"] for record in found) == list(range(1000))
    assert len({(record.key, record.partition) for record in found}) == 37
    assert json.loads(json.dumps(said["kafka/publication"])) == said["kafka/publication"]


def test_kcat_counts_what_dagster_reported(kafka_bootstrap_servers, manager, kafka_topic, instance):
    kcat = shutil.which("kcat")
    if kcat is None:
        pytest.skip("kcat is not installed")
    topic = kafka_topic(partitions=2)
    rows = [{"k": str(i)} for i in range(300)]
    said = _metadata(_materialize(_asset(rows, topic, "k"), manager, instance))
    # kcat reads committed records only, as librdkafka does by default.
    command = [kcat, "-C", "-b", kafka_bootstrap_servers, "-t", topic, "-o", "beginning", "-e", "-q", "-f", "%p %o\n"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    counted = collections.Counter(line.split()[0] for line in done.stdout.splitlines())
    assert counted == {str(row["partition"]): row["records"] for row in said["kafka/offsets"]}
    assert sum(counted.values()) == said["dagster/row_count"] == 300


def test_get_offset_shell_ends_where_dagster_reported(local_kafka, manager, kafka_topic, instance):
    topic = kafka_topic(partitions=2)
    rows = [{"k": str(i)} for i in range(100)]
    said = _metadata(_materialize(_asset(rows, topic, "k"), manager, instance))
    tool = "org.apache.kafka.tools.GetOffsetShell"
    done = local_kafka.run_tool(tool, "--bootstrap-server", local_kafka.bootstrap_servers, "--topic", topic)
    ends = {int(line.split(":")[1]): int(line.split(":")[2]) for line in done.stdout.split()}
    # Behind the last record of each Kafka partition stands the marker of the commit.
    assert ends == {row["partition"]: row["last offset"] + 2 for row in said["kafka/offsets"]}
    assert sum(ends.values()) - len(ends) == said["dagster/row_count"]


def test_a_large_generator_is_published_whole(manager, kafka_topic, read, instance):
    topic = kafka_topic(partitions=2)
    said = _metadata(_materialize(_asset(lambda: ({"i": i} for i in range(20_000)), topic, "i"), manager, instance))
    found = read(topic)
    assert said["dagster/row_count"] == len(found) == 20_000
    assert said["kafka/offsets"] == _offsets(found, topic)


def test_none_publishes_nothing_and_says_so(closed_port, instance):
    @dg.asset
    def made():
        return None

    result = _materialize(made, _manager(closed_port), instance)
    assert result.success
    said = _metadata(result)
    assert (said["dagster/row_count"], said["kafka/records"], said["kafka/topic"]) == (0, 0, "made")
    messages = [entry.user_message for entry in instance.all_logs(result.run_id)]
    assert [message for message in messages if "nothing was published" in message]


# Topic and key


def test_topic_and_key_of_output_metadata_win(kafka_bootstrap_servers, kafka_topic, read, instance):
    topics = {name: kafka_topic(name=name) for name in ("output", "definition", "config")}
    row = {"o": "by output", "d": "by definition", "c": "by config"}

    def publish(output_metadata, definition_metadata):
        @dg.asset(metadata=definition_metadata)
        def made():
            return dg.Output(row, metadata=output_metadata)

        manager = _manager(kafka_bootstrap_servers, topic=topics["config"], key="c")
        return _metadata(_materialize(made, manager, instance))["kafka/topic"]

    by_output = {"kafka/topic": topics["output"], "kafka/key": "o"}
    by_definition = {"kafka/topic": topics["definition"], "kafka/key": "d"}
    assert publish(by_output, by_definition) == topics["output"]
    assert publish({}, by_definition) == topics["definition"]
    assert publish({}, {}) == topics["config"]
    assert [record.key for record in read(topics["output"])] == [b"by output"]
    assert [record.key for record in read(topics["definition"])] == [b"by definition"]
    assert [record.key for record in read(topics["config"])] == [b"by config"]


@pytest.mark.parametrize("partitions", [{}, {"partitions_def": dg.StaticPartitionsDefinition(["a", "b", "c"])}])
@pytest.mark.parametrize("own", [False, True])
def test_what_the_asset_adds_for_itself_wins_and_hides_nothing(own, partitions, manager, kafka_topic, read, instance):
    """By `add_asset_metadata`, which Dagster shows instead of what an IO manager says by the same name."""
    topic = kafka_topic()

    @dg.asset(metadata={"kafka/topic": "by-definition"}, **partitions)
    def made(context: dg.AssetExecutionContext):
        partition = context.partition_key if own and partitions else None
        added = {"kafka/topic": topic, "kafka/key": "i", "kafka/records": 99, "mine": 1}
        context.add_asset_metadata(added, partition_key=partition)
        return {"i": 7}

    options = {"partition_key": "b"} if partitions else {}
    said = _metadata(_materialize(made, manager, instance, **options))
    assert (said["kafka/topic"], said["kafka/records"], said["mine"]) == (topic, 1, 1)
    assert said["kafka/publication"]["topic"] == topic
    assert [record.key for record in read(topic)] == [b"7"]


def test_an_env_var_in_metadata_is_no_topic(manager, instance):
    made = _asset([{"a": 1}], "t", metadata={"kafka/on_bad_record": dg.EnvVar("DEAD")})
    failure = _failure(_materialize(made, manager, instance, raise_on_error=False))
    assert "kafka/on_bad_record=EnvVar('DEAD')" in failure.description
    assert "os.environ['DEAD']" in failure.metadata["kafka/what_to_do"].value


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("keys", "key"),
        ("write-mode", "write_mode"),
        ("tpoic", "topic"),
        ("on_bad_records", "on_bad_record"),
        ("schema", None),
    ],
)
@pytest.mark.parametrize("place", ["definition", "output", "asset"])
def test_a_name_of_the_metadata_that_there_is_not_is_told(place, wrong, meant, manager, instance):
    metadata = {f"kafka/{wrong}": "a"}

    @dg.asset(metadata=metadata if place == "definition" else {})
    def made(context: dg.AssetExecutionContext):
        if place == "asset":
            context.add_asset_metadata(metadata)
        return dg.Output([{"a": 1}], metadata=metadata if place == "output" else {})

    failure = _failure(_materialize(made, manager, instance, raise_on_error=False))
    assert f"kafka/{wrong}" in failure.metadata["kafka/culprit"].value
    fix = failure.metadata["kafka/what_to_do"].value
    assert fix.startswith(f"Did you mean kafka/{meant}?" if meant else "Leave it out, or use one of kafka/topic, ")


def test_other_metadata_of_the_definition_is_left_alone(manager, kafka_topic, instance):
    others = {"team": "data", "kafka_brokers": "two", "topics": "x", "ours/kafka/topic": 7}
    made = _asset([{"a": 1}], metadata=others | {"kafka/topic": kafka_topic()})
    assert _materialize(made, manager, instance).success


def _asset_at(path):
    @dg.asset(key=path)
    def made():
        return "x"

    return made


def test_the_topic_is_the_asset_key_in_the_end(manager, kafka_topic, read, instance):
    topic = kafka_topic(name="shop.orders")
    asset = _asset_at(topic.split("."))
    said = _metadata(_materialize(asset, manager, instance), topic.split(".")[-1])
    assert said["kafka/topic"] == topic
    assert _values(read(topic)) == [b"x"]


def test_topic_templates(kafka_bootstrap_servers, kafka_topic, read, instance):
    topic = kafka_topic(name="live.shop.orders")
    path = topic.split(".")[1:]
    for template in ("live.{asset_key}", f"live.{path[0]}.{{name}}"):
        said = _metadata(
            _materialize(_asset_at(path), _manager(kafka_bootstrap_servers, topic=template), instance), path[-1]
        )
        assert said["kafka/topic"] == topic
    assert len(read(topic)) == 2


def test_metadata_may_hold_metadata_values_and_lists_of_fields(manager, kafka_topic, read, instance):
    topic = kafka_topic()
    key = dg.MetadataValue.json(["a", "b"])
    _materialize(_asset({"a": 1, "b": "x"}, dg.MetadataValue.text(topic), key), manager, instance)
    assert [record.key for record in read(topic)] == [b'{"a":1,"b":"x"}']
    _materialize(_asset({"a": 1, "b": "x"}, topic, ["b"]), manager, instance)
    assert [record.key for record in read(topic)][1:] == [b"x"]


def test_keys_of_the_config_may_be_several(kafka_bootstrap_servers, kafka_topic, read, instance):
    topic = kafka_topic()
    _materialize(_asset({"a": 1, "b": 2}, topic), _manager(kafka_bootstrap_servers, key="a, b"), instance)
    assert [record.key for record in read(topic)] == [b'{"a":1,"b":2}']


# Reading back


def test_a_publication_among_other_writers_is_read_back_exactly(
    kafka_bootstrap_servers, manager, kafka_topic, read, instance, request
):
    topic = kafka_topic(partitions=2)
    plain = Producer({"bootstrap.servers": kafka_bootstrap_servers, "linger.ms": 0})
    transactional = Producer({"bootstrap.servers": kafka_bootstrap_servers, "transactional.id": f"other-{topic}"})
    transactional.init_transactions(30)
    # Dagster keeps the asset, and with it this function, for the life of the process.
    request.addfinalizer(plain.close)
    request.addfinalizer(transactional.close)

    def among_others():
        for i in range(600):
            if i % 60 == 30:
                time.sleep(0.06)  # lets the records before be sent, so that the others' fall between
                for partition in (0, 1):
                    plain.produce(topic, b'{"i":"plain"}', partition=partition)
                assert plain.flush(10) == 0
                transactional.begin_transaction()
                for partition in (0, 1):
                    transactional.produce(topic, b'{"i":"transactional"}', partition=partition)
                if i % 120 == 30:
                    transactional.commit_transaction(30)
                else:
                    assert transactional.flush(10) == 0
                    transactional.abort_transaction(30)
            yield {"i": i}

    received = []

    @dg.asset
    def reader(made: list):
        received.extend(made)

    result = _materialize([_asset(among_others, topic, "i"), reader], manager, instance)
    said = _metadata(result)
    assert sorted(row["i"] for row in received) == list(range(600))
    others = [record for record in read(topic) if b"plain" in record.value or b"transactional" in record.value]
    assert len(others) == 20 + 10
    runs = said["kafka/publication"]["offsets"][topic]
    assert max(len(packed) for packed in runs.values()) > 4, "nothing fell between: this test has shown nothing"
    mine = [record for record in read(topic) if record not in others]
    assert said["kafka/offsets"] == _offsets(mine, topic)


def _reader(annotation, into, **options):
    @dg.asset(name="reader", **options)
    def reader(made):
        into.append(made)

    @dg.asset(ins={"made": dg.AssetIn(dagster_type=dg.Any)}, name="reader", **options)
    def untyped(made):
        into.append(made)

    if annotation is None:
        return untyped

    def body(made):
        into.append(made)

    body.__annotations__["made"] = annotation
    return dg.asset(name="reader", **options)(body)


READ = [{"id": 1, "s": "a", "x": 0.5}, {"id": 2, "s": None, "x": None}]


def _read_back(annotation, output, manager, topic, instance):
    into = []
    _materialize([_asset(output, topic), _reader(annotation, into)], manager, instance)
    (got,) = into
    return got


def test_read_as_polars(manager, kafka_topic, instance):
    got = _read_back(pl.DataFrame, READ, manager, kafka_topic(), instance)
    assert got.equals(pl.DataFrame(READ))


@pytest.mark.parametrize(
    ("frame", "warned"),
    [
        (
            pd.DataFrame({"user": ["a", "a", "b"], "page": [1, 2, 3]}).groupby("user")[["page"]].sum(),
            ["The frame's index 'user' is not published: frame.reset_index() makes it a column"],
        ),
        (pd.DataFrame({"user": ["a"], "page": [1]}).set_index("user", drop=False), []),
        (pd.DataFrame({"page": [1]}), []),
        (pl.DataFrame({"page": [1]}), []),
    ],
)
def test_a_named_index_that_is_not_published_is_told_in_the_steps_log(frame, warned, manager, kafka_topic, instance):
    result = dg.materialize([_asset(frame, kafka_topic())], resources={"io_manager": manager}, instance=instance)
    logged = [entry.user_message for entry in instance.all_logs(result.run_id) if entry.level == logging.WARNING]
    assert logged == warned


def test_read_as_pandas(manager, kafka_topic, instance):
    got = _read_back(pd.DataFrame, READ, manager, kafka_topic(), instance)
    pd.testing.assert_frame_equal(got, pd.DataFrame(READ))


def test_read_as_pyarrow(manager, kafka_topic, instance):
    got = _read_back(pa.Table, READ, manager, kafka_topic(), instance)
    assert got.equals(pa.Table.from_pylist(READ))


@pytest.mark.parametrize("annotation", [None, list, list[dict], collections.abc.Sequence])
def test_read_as_values(annotation, manager, kafka_topic, instance):
    assert _read_back(annotation, READ, manager, kafka_topic(), instance) == READ


@pytest.mark.parametrize("output", [[Point(1), Point(2)], [Place(code="EWR", lat=40.7)]], ids=["dataclass", "model"])
def test_read_as_what_was_published(output, manager, kafka_topic, instance):
    assert _read_back(list[type(output[0])], output, manager, kafka_topic(), instance) == output


def test_read_as_records(manager, kafka_topic, instance):
    when = dt.datetime.now(dt.timezone.utc).replace(microsecond=0) - dt.timedelta(hours=1)
    sent = [
        KafkaRecord({"a": 1}, key="k", headers={"h": "v"}, partition=0, timestamp=when),
        KafkaRecord(None, key="gone"),
    ]
    first, second = _read_back(list[KafkaRecord], sent, manager, kafka_topic(), instance)
    assert first == KafkaRecord({"a": 1}, b"k", [("h", b"v")], 0, round(when.timestamp() * 1000))
    assert (second.value, second.key) == (None, b"gone")


@pytest.mark.parametrize(
    ("annotation", "output", "value"),
    [
        (dict, {"a": 1}, {"a": 1}),
        (dict | None, {"a": 1}, {"a": 1}),
        (str, "text", "text"),
        (bytes, b"\xff", b"\xff"),
        (dict, Point(1), {"x": 1}),
        (Point, Point(1), Point(1)),
        (Place | None, Place(code="EWR", lat=40.7), Place(code="EWR", lat=40.7)),
    ],
)
def test_read_the_only_record(annotation, output, value, manager, kafka_topic, instance):
    assert _read_back(annotation, output, manager, kafka_topic(), instance) == value


@pytest.mark.parametrize("annotation", [pl.DataFrame, pd.DataFrame, pa.Table, list, pl.DataFrame | None])
def test_read_an_empty_publication(annotation, manager, kafka_topic, instance):
    assert len(_read_back(annotation, [], manager, kafka_topic(), instance)) == 0


def test_tombstones_alone_are_an_empty_frame(manager, kafka_topic, instance):
    output = [KafkaRecord(None, key="gone")]
    assert len(_read_back(pl.DataFrame, output, manager, kafka_topic(), instance)) == 0


@pytest.mark.parametrize(("annotation", "nothing"), [(list, []), (dict | None, None), (str | None, None)])
def test_read_none_as_nothing(annotation, nothing, manager, instance):
    into = []

    @dg.asset
    def made():
        return None

    _materialize([made, _reader(annotation, into)], manager, instance)
    assert into == [nothing]


def test_no_record_is_no_dict(manager, instance):
    result = _materialize([_asset(None), _reader(dict, [])], manager, instance, raise_on_error=False)
    assert "0 records" in _failure(result).description


def test_the_first_day_of_a_running_total_has_none_before(manager, kafka_topic, instance):
    days = dg.DailyPartitionsDefinition("2026-01-01", end_date="2026-01-04")
    before = dg.AssetIn(partition_mapping=dg.TimeWindowPartitionMapping(start_offset=-1, end_offset=-1))
    got = []

    @dg.asset(partitions_def=days, ins={"total": before}, metadata={"kafka/topic": kafka_topic()})
    def total(total: dict | None) -> dict:
        got.append(total)
        return {"n": (total or {"n": 0})["n"] + 1}

    for day in ("2026-01-01", "2026-01-02", "2026-01-03"):
        _materialize(total, manager, instance, partition_key=day)
    assert got == [None, {"n": 1}, {"n": 2}]


def test_several_records_are_no_dict(manager, kafka_topic, instance):
    assets = [_asset(READ, kafka_topic()), _reader(dict, [])]
    result = _materialize(assets, manager, instance, raise_on_error=False)
    failure = _failure(result)
    assert "2 records" in failure.description
    assert "list or a data frame" in failure.description


def test_text_as_a_frame_is_refused_clearly(manager, kafka_topic, instance):
    assets = [_asset(["not json"], kafka_topic()), _reader(pl.DataFrame, [])]
    failure = _failure(_materialize(assets, manager, instance, raise_on_error=False))
    assert failure is not None, "the error is neither typed nor explained"
    assert "string" in failure.description


def test_the_last_publication_is_read(manager, kafka_topic, instance):
    topic, into = kafka_topic(), []
    for i in range(3):
        _materialize(_asset([{"i": i}], topic), manager, instance)
    _materialize([_asset([], topic), _reader(list, into)], manager, instance, selection=["reader"])
    assert into == [[{"i": 2}]]


def test_what_was_never_materialized_is_told(manager, instance):
    assets = [_asset([], "never"), _reader(list, [])]
    result = _materialize(assets, manager, instance, selection=["reader"], raise_on_error=False)
    failure = _failure(result)
    assert "'made'" in failure.description
    assert "never materialized" in failure.description
    assert "Materialize it first" in failure.metadata["kafka/what_to_do"].value


@pytest.mark.parametrize("last", [None, [{"i": 2}]])
def test_a_reader_that_knows_no_dagster_partitions_of_its_upstream_is_told(last, manager, kafka_topic, instance):
    outputs = {"a": [{"i": 1}], "b": last}

    @dg.asset(name="made", partitions_def=LETTERS, metadata={"kafka/topic": kafka_topic()})
    def made(context: dg.AssetExecutionContext):
        return outputs[context.partition_key]

    for letter in outputs:
        _materialize(made, manager, instance, partition_key=letter)
    spec = dg.AssetSpec("made").with_io_manager_key("io_manager")
    result = _materialize([spec, _reader(list, [])], manager, instance, selection=["reader"], raise_on_error=False)
    failure = _failure(result)
    assert "Dagster partition 'b' only" in failure.description
    assert "partitions_def" in failure.metadata["kafka/what_to_do"].value


def test_what_another_io_manager_stored_is_told(manager, instance):
    assets = [_asset([], "never"), _reader(list, [])]
    _materialize(assets, dg.mem_io_manager, instance, selection=["made"])
    result = _materialize(assets, manager, instance, selection=["reader"], raise_on_error=False)
    assert "not published by a KafkaIOManager" in _failure(result).description


def test_records_that_are_gone_are_told(kafka_bootstrap_servers, manager, kafka_topic, instance):
    from confluent_kafka import TopicPartition
    from confluent_kafka.admin import AdminClient

    topic, into = kafka_topic(), []
    made = _asset(READ, topic)
    _materialize(made, manager, instance)
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
    (deleted,) = admin.delete_records([TopicPartition(topic, 0, 1)]).values()
    deleted.result(30)
    result = _materialize([made, _reader(list, into)], manager, instance, selection=["reader"], raise_on_error=False)
    failure = _failure(result)
    assert "retention" in failure.description
    assert topic in failure.description
    assert into == []


@pytest.mark.parametrize(("made_anew", "has_id"), [(False, True), (True, True), (False, False)])
def test_others_records_in_a_topic_made_anew_are_not_read(
    made_anew, has_id, kafka_bootstrap_servers, manager, instance, monkeypatch
):
    from confluent_kafka.admin import AdminClient, NewTopic

    topic, into = f"made-anew-{uuid.uuid4().hex}", []
    if not has_id:  # as brokers before 2.8
        look = topics.look_at_topic
        monkeypatch.setattr(topics, "look_at_topic", lambda *a, **options: look(*a, **options)._replace(id=None))
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
    admin.create_topics([NewTopic(topic, 1)], operation_timeout=30)[topic].result(30)
    try:
        made = _asset(READ, topic)
        _materialize(made, manager, instance)
    finally:
        admin.delete_topics([topic], operation_timeout=30)[topic].result(30)
    try:
        if made_anew:
            make_anew(admin, topic)
            producer = Producer({"bootstrap.servers": kafka_bootstrap_servers})
            for _ in range(10):
                producer.produce(topic, '{"of": "others"}')
            assert producer.flush(30) == 0
        began = time.monotonic()
        assets = [made, _reader(list, into)]
        result = _materialize(assets, manager, instance, selection=["reader"], raise_on_error=False)
        assert time.monotonic() - began < 10
    finally:
        if made_anew:
            admin.delete_topics([topic], operation_timeout=30)[topic].result(30)
    assert into == []
    cause = "deleted and made anew" if made_anew else "deleted"
    assert f"{topic!r}: the topic was {cause} since the records were published" in _failure(result).description


# Dagster partitions

LETTERS = dg.StaticPartitionsDefinition(["a", "b", "c"])


def _letters(topic, **options):
    @dg.asset(name="made", partitions_def=LETTERS, metadata={"kafka/topic": topic}, **options)
    def made(context: dg.AssetExecutionContext):
        return [{"letter": context.partition_key, "i": i} for i in range(3)]

    return made


def test_a_dagster_partition_reads_its_own_records(manager, kafka_topic, instance):
    topic, into = kafka_topic(partitions=2), []
    made, reader = _letters(topic), _reader(list, into, partitions_def=LETTERS)
    for letter in "abca":
        assert _materialize(made, manager, instance, partition_key=letter).success
    _materialize([made, reader], manager, instance, selection=["reader"], partition_key="a")
    _materialize([made, reader], manager, instance, selection=["reader"], partition_key="b")
    assert [{row["letter"] for row in rows} for rows in into] == [{"a"}, {"b"}]
    assert [len(rows) for rows in into] == [3, 3]


def test_an_input_of_several_dagster_partitions(manager, kafka_topic, instance):
    topic, into = kafka_topic(partitions=2), []
    made, reader = _letters(topic), _reader(list, into)
    for letter in "abc":
        _materialize(made, manager, instance, partition_key=letter)
    _materialize([made, reader], manager, instance, selection=["reader"])
    assert collections.Counter(row["letter"] for row in into[0]) == {"a": 3, "b": 3, "c": 3}


def test_reading_what_a_function_annotated_as_none_returns_says_why_there_is_nothing(manager, kafka_topic, instance):
    @dg.asset(metadata={"kafka/topic": kafka_topic()})
    def made() -> None:
        pass

    result = _materialize([made, _reader(list, [])], manager, instance, raise_on_error=False)
    assert "its function is annotated '-> None'" in _failure(result).description


def test_a_missing_dagster_partition_is_told_or_left_out(manager, kafka_topic, instance):
    made, into = _letters(kafka_topic()), []
    _materialize(made, manager, instance, partition_key="b")
    strict = _reader(list, into)
    result = _materialize([made, strict], manager, instance, selection=["reader"], raise_on_error=False)
    assert "partition 'a'" in _failure(result).description
    assert _failure(result).description.endswith('dg.AssetIn(metadata={"allow_missing_partitions": True})')

    @dg.asset_check(asset=made)
    def check(made: list):
        return dg.AssetCheckResult(passed=True)

    selection = dg.AssetSelection.checks(check)
    result = _materialize([made, check], manager, instance, selection=selection, raise_on_error=False)
    assert _failure(result).description.endswith("A check that has the asset's partitions_def reads those of its run")

    @dg.asset(ins={"made": dg.AssetIn(metadata={"allow_missing_partitions": True})})
    def lenient(made: list):
        into.append(made)

    _materialize([made, lenient], manager, instance, selection=["lenient"])
    assert [{row["letter"] for row in rows} for rows in into] == [{"b"}]


RANGE = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"}


def _ranged(topic, output):
    @dg.asset(
        name="made",
        partitions_def=LETTERS,
        metadata={"kafka/topic": topic},
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def made(context: dg.AssetExecutionContext):
        return output(context.partition_keys)

    return made


def test_a_range_with_one_output_is_one_publication(manager, kafka_topic, read, instance):
    topic, into = kafka_topic(), []
    made = _ranged(topic, lambda letters: [{"letter": letter} for letter in letters])
    result = _materialize(made, manager, instance, tags=RANGE)
    events = result.get_asset_materialization_events()
    assert sorted(event.partition for event in events) == ["a", "b", "c"]
    publications = {event.materialization.metadata["kafka/publication"].value["publication_id"] for event in events}
    assert len(publications) == 1
    assert len(read(topic)) == 3

    everything = _reader(list, into)
    _materialize([made, everything], manager, instance, selection=["reader"])
    assert [row["letter"] for row in into[0]] == ["a", "b", "c"]

    one = _reader(list, into, partitions_def=LETTERS)
    result = _materialize([made, one], manager, instance, selection=["reader"], partition_key="b", raise_on_error=False)
    failure = _failure(result)
    assert "2 other Dagster partitions" in failure.description
    assert "mapping from partition key" in failure.description
    assert len(into) == 1


def test_a_range_with_a_mapping_is_a_publication_each(manager, kafka_topic, read, instance):
    topic, into = kafka_topic(), []
    sizes = {"a": 1, "b": 0, "c": 3}
    made = _ranged(topic, lambda letters: {letter: [{"letter": letter}] * sizes[letter] for letter in letters})
    result = _materialize(made, manager, instance, tags=RANGE)
    logged = "\n".join(entry.user_message for entry in instance.all_logs(result.run_id))
    assert f"Dagster partition 'b': Published 0 records to {topic!r}, " in logged
    said = {e.partition: _plain(e.materialization.metadata) for e in result.get_asset_materialization_events()}
    assert {letter: metadata["dagster/row_count"] for letter, metadata in said.items()} == sizes
    assert len({metadata["kafka/publication"]["publication_id"] for metadata in said.values()}) == 3
    found = read(topic)
    for letter, metadata in said.items():
        mine = [record for record in found if json.loads(record.value)["letter"] == letter]
        assert metadata.get("kafka/offsets", []) == _offsets(mine, topic)
    reader = _reader(list, into, partitions_def=LETTERS)
    for letter in "abc":
        _materialize([made, reader], manager, instance, selection=["reader"], partition_key=letter)
    assert [len(rows) for rows in into] == [1, 0, 3]


@pytest.mark.parametrize(
    ("letters", "cause"),
    [
        ("ac", "it has no output for 'b'"),
        ("abcd", "'d' is not one of them"),
        ("dc", "no output for 'a'"),
        ("ABC", "no output for 'a'"),
        ("", "no output for 'a'"),
        ([dt.date(2026, 1, 1)], "its key datetime.date(2026, 1, 1) is a date, and Dagster's partition keys are str"),
    ],
)
def test_a_mapping_that_is_not_of_the_runs_dagster_partitions_is_no_record(
    letters, cause, manager, kafka_topic, read, instance
):
    topic = kafka_topic()
    made = _ranged(topic, lambda _: {letter: [{"letter": letter}] for letter in letters})
    failure = _failure(_materialize(made, manager, instance, tags=RANGE, raise_on_error=False))
    assert cause in failure.description
    assert "exactly context.partition_keys" in failure.description
    assert read(topic) == []


@pytest.mark.parametrize(
    ("letters", "cause"),
    [("", "no output for 'b'"), ("a", "no output for 'b'"), ("bc", "'c' is not one of them")],
    ids=["none", "another one", "more"],
)
def test_a_mapping_of_other_dagster_partitions_than_the_only_one_is_no_record(
    letters, cause, manager, kafka_topic, read, instance
):
    topic = kafka_topic()
    made = _ranged(topic, lambda _: {letter: [{"letter": letter}] for letter in letters})
    failure = _failure(_materialize(made, manager, instance, partition_key="b", raise_on_error=False))
    assert cause in failure.description
    assert failure.metadata["kafka/culprit"].value == "mapping for Dagster partition 'b'"
    assert read(topic) == []


@pytest.mark.parametrize("record", [{"d": [1], "e": [2]}, {"a": 1, "b": 2}], ids=["lists", "letters"])
def test_a_record_of_one_dagster_partition_may_have_lists_or_the_names_of_others(
    record, manager, kafka_topic, read, instance
):
    topic = kafka_topic()
    assert _materialize(_ranged(topic, lambda _: record), manager, instance, partition_key="b").success
    assert [json.loads(one.value) for one in read(topic)] == [record]


@pytest.mark.parametrize(
    ("bad", "mode", "cause"),
    [
        (42, "append", "output of type builtins.int"),
        ({1}, "append", "output of type builtins.set"),
        (pd.DataFrame({"letter": ["c"]}), "append", "the key column is missing"),
        (None, "upsert", "an upsert would forget"),
    ],
    ids=["number", "set", "frame", "None"],
)
def test_what_a_look_at_a_mapping_tells_to_be_no_output_is_refused_before_any_of_it_is_published(
    bad, mode, cause, manager, kafka_topic, read, instance
):
    topic = kafka_topic()
    options = {"metadata": {"kafka/topic": topic, "kafka/key": "id", "kafka/write_mode": mode}}

    @dg.asset(partitions_def=LETTERS, backfill_policy=dg.BackfillPolicy.single_run(), **options)
    def made():
        return {"a": [{"id": 1}], "b": iter([{"id": 2}]), "c": bad}

    failure = _failure(_materialize(made, manager, instance, tags=RANGE, raise_on_error=False))
    assert cause in failure.description
    assert failure.metadata["kafka/dagster_partition"].value == "c"
    assert read(topic) == []


def test_what_was_published_before_a_range_failed_is_told_so_that_nobody_publishes_it_again(
    manager, kafka_topic, read, instance
):
    topic, bad = kafka_topic(), {1}
    made = _ranged(topic, lambda letters: {x: [{"letter": x, "n": bad if x == "b" else 1}] for x in letters})
    failure = _failure(_materialize(made, manager, instance, tags=RANGE, raise_on_error=False))
    assert "set" in failure.description
    key = dg.AssetKey("made")
    assert instance.get_materialized_partitions(key) == {"a"}
    told = instance.get_latest_materialization_event(key).asset_materialization.metadata
    assert _plain(told)["kafka/offsets"] == _offsets(read(topic), topic)

    bad = 1
    missing = {"dagster/asset_partition_range_start": "b", "dagster/asset_partition_range_end": "c"}
    _materialize(made, manager, instance, tags=missing)
    assert sorted(json.loads(record.value)["letter"] for record in read(topic)) == ["a", "b", "c"]
    into = []
    _materialize([made, _reader(list, into)], manager, instance, selection=["reader"])
    assert [row["letter"] for row in into[0]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "policy", "fails", "told"),
    [
        ({"step_retries": 1}, None, 2, ["a"]),
        ({"step_retries": 0}, None, 1, ["a"]),
        ({}, dg.RetryPolicy(max_retries=1), 2, ["a"]),
        ({}, dg.RetryPolicy(max_retries=1), 1, ["a", "a", "b", "c"]),
        ({"step_retries": 1}, None, 1, ["a", "a", "b", "c"]),
    ],
)
def test_what_a_failed_attempt_at_a_range_has_published_is_told_once(
    options, policy, fails, told, kafka_bootstrap_servers, kafka_topic, monkeypatch, instance
):
    publish, topic = KafkaIOManager._publish, kafka_topic()
    attempts = []

    def failing(self, context, output, target, identity):
        if identity.partition == ("b",):
            attempts.append(1)
            if len(attempts) <= fails:
                with self.kafka.errors_in_dagster(context):
                    raise KafkaError("all brokers", "away", "Wait", remedy=Remedy.RETRY)
        return publish(self, context, output, target, identity)

    monkeypatch.setattr(KafkaIOManager, "_publish", failing)

    @dg.asset(
        partitions_def=LETTERS,
        metadata={"kafka/topic": topic},
        backfill_policy=dg.BackfillPolicy.single_run(),
        retry_policy=policy,
    )
    def made(context: dg.AssetExecutionContext):
        context.add_asset_metadata({"mine": 1})
        return {letter: [{"letter": letter}] for letter in context.partition_keys}

    result = _materialize(
        made, _manager(kafka_bootstrap_servers, **options), instance, tags=RANGE, raise_on_error=False
    )
    assert result.success == ("c" in told)
    records = instance.fetch_materializations(dg.AssetKey("made"), limit=10).records
    assert sorted(record.partition_key for record in records) == told
    assert all(record.asset_materialization.metadata["mine"].value == 1 for record in records)


def test_what_a_range_has_published_is_told_also_if_its_retry_does_not_come_so_far(
    manager, kafka_topic, read, instance
):
    topic, attempts = kafka_topic(), []

    def rows(letter):
        yield {"letter": letter}
        if letter == "c" and len(attempts) == 1:
            raise ConnectionError("away")

    @dg.asset(
        partitions_def=LETTERS,
        metadata={"kafka/topic": topic},
        backfill_policy=dg.BackfillPolicy.single_run(),
        retry_policy=dg.RetryPolicy(max_retries=1),
    )
    def made(context: dg.AssetExecutionContext):
        attempts.append(1)
        if len(attempts) == 2:
            raise ConnectionError("still away")
        return {letter: rows(letter) for letter in context.partition_keys}

    assert not _materialize(made, manager, instance, tags=RANGE, raise_on_error=False).success
    assert instance.get_materialized_partitions(dg.AssetKey("made")) == {"a", "b"}
    _materialize(made, manager, instance, partition_key="c")
    assert sorted(json.loads(record.value)["letter"] for record in read(topic)) == ["a", "b", "c"]


def test_an_output_in_a_mapping_is_refused(manager, kafka_topic, instance):
    made = _ranged(kafka_topic(), lambda letters: {letter: dg.Output([]) for letter in letters})
    result = _materialize(made, manager, instance, tags=RANGE, raise_on_error=False)
    assert "of 'a': its value is a dagster.Output" in _failure(result).description


def test_the_ops_of_a_graph_hand_a_mapping_on_as_it_is(manager, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.op
    def days(context: dg.OpExecutionContext):
        return {key: [{"letter": key}] for key in context.partition_keys}

    @dg.op(out=dg.Out(metadata={"kafka/topic": topic}))
    def each(days: dict):
        return {key: [*rows, {"letter": "also"}] for key, rows in days.items()}

    @dg.graph_asset(partitions_def=LETTERS)
    def made():
        return each(days())

    _materialize(made, KafkaIOManager(kafka=manager.kafka, topic=kafka_topic()), instance, partition_key="b")
    assert sorted(json.loads(record.value)["letter"] for record in read(topic)) == ["also", "b"]


def test_a_retry_to_another_topic_tells_what_the_first_attempt_has_published(
    kafka_bootstrap_servers, kafka_topic, read, instance
):
    topics = [kafka_topic(), kafka_topic()]
    attempts = []

    class Dies(KafkaIOManager):
        """Fails when the first attempt is committed, and Dagster does not know."""

        def handle_output(self, context, obj):
            super().handle_output(context, obj)
            attempts.append(1)
            if len(attempts) == 1:
                raise dg.RetryRequested(max_retries=1)

    @dg.asset
    def made():
        return dg.Output([{"n": len(attempts)}], metadata={"kafka/topic": topics[min(len(attempts), 1)]})

    manager = Dies(kafka=_manager(kafka_bootstrap_servers).kafka)
    said = _metadata(_materialize(made, manager, instance))
    assert (said["kafka/topic"], said["kafka/replayed"]) == (topics[0], True)
    assert said["kafka/publication"]["topic_ids"].keys() == {topics[0]}
    assert [record.value for record in read(topics[0])] == [b'{"n":0}']
    assert read(topics[1]) == []
    into = []
    _materialize([made, _reader(list, into)], manager, instance, selection=["reader"])
    assert into == [[{"n": 0}]]
    _materialize(made, manager, instance)
    assert len(read(topics[1])) == 1


def test_what_somebody_reports_by_hand_does_not_hide_the_publication(manager, kafka_topic, instance):
    made, into = _asset(READ, kafka_topic()), []
    _materialize(made, manager, instance)
    for _ in range(102):
        instance.report_runless_asset_event(dg.AssetMaterialization("made"))
    _materialize([made, _reader(list, into)], manager, instance, selection=["reader"])
    assert into == [READ]


def test_an_asset_that_was_only_reported_was_never_materialized_here(manager, instance):
    instance.report_runless_asset_event(dg.AssetMaterialization("made"))
    made = _asset(READ, "no-such-topic")
    result = _materialize([made, _reader(list, [])], manager, instance, selection=["reader"], raise_on_error=False)
    assert "it was never materialized" in _failure(result).description


def test_many_dagster_partitions_of_one_publication_are_told_shortly(manager, kafka_topic, instance):
    hours = dg.HourlyPartitionsDefinition("2026-01-01-00:00", end_date="2026-01-05-00:00")
    keys, into = hours.get_partition_keys(), []

    @dg.asset(
        partitions_def=hours, metadata={"kafka/topic": kafka_topic()}, backfill_policy=dg.BackfillPolicy.single_run()
    )
    def made():
        return [{"n": 1}]

    tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
    result = _materialize(made, manager, instance, tags=tags)
    event = result.get_asset_materialization_events()[0]
    packed = event.materialization.metadata["kafka/publication"].value["partitions"]
    assert packed["count"] == len(keys) == 96
    assert len(json.dumps(packed)) < len(json.dumps(keys)) / 4
    _materialize([made, _reader(list, into)], manager, instance, selection=["reader"])
    assert into == [[{"n": 1}]]
    one = _reader(list, into, partitions_def=hours)
    result = _materialize(
        [made, one], manager, instance, selection=["reader"], partition_key=keys[3], raise_on_error=False
    )
    assert "95 other Dagster partitions" in _failure(result).description


def test_the_event_log_is_read_once_for_many_outputs(manager, kafka_topic, instance, monkeypatch):
    topic, into, read = kafka_topic(), [], []
    records_of = instance.get_records_for_run

    def counting(*args, **options):
        page = records_of(*args, **options)
        read.extend(page.records)
        return page

    @dg.op(out=dg.DynamicOut())
    def fan():
        for i in range(20):
            yield dg.DynamicOutput({"i": i}, mapping_key=str(i))

    @dg.op(out=dg.Out(metadata={"kafka/topic": topic}))
    def work(one: dict):
        return one

    @dg.op(out=dg.Out(io_manager_key="mem"))
    def join(all_of_them: list[dict]) -> None:
        into.extend(all_of_them)

    @dg.job(resource_defs={"io_manager": KafkaIOManager(kafka=manager.kafka, topic=topic), "mem": dg.mem_io_manager})
    def fanned():
        join(fan().map(work).collect())

    monkeypatch.setattr(instance, "get_records_for_run", counting)
    assert fanned.execute_in_process(instance=instance).success
    assert sorted(one["i"] for one in into) == list(range(20))
    handled = [record for record in read if record.event_log_entry.dagster_event.event_type_value == "HANDLED_OUTPUT"]
    assert len(handled) <= 2 * 40 + 1


def test_a_range_over_several_dimensions_tells_what_it_has_published(manager, kafka_topic, instance):
    dimensions = {"letter": LETTERS, "number": dg.StaticPartitionsDefinition(["1"])}

    @dg.asset(
        partitions_def=dg.MultiPartitionsDefinition(dimensions),
        metadata={"kafka/topic": kafka_topic()},
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def made(context: dg.AssetExecutionContext):
        return {key: [{"n": {1} if "b" in str(key) else 1}] for key in context.partition_keys}

    tags = {"dagster/asset_partition_range_start": "a|1", "dagster/asset_partition_range_end": "c|1"}
    assert not _materialize(made, manager, instance, tags=tags, raise_on_error=False).success
    (record,) = instance.fetch_materializations(dg.AssetKey("made"), limit=10).records
    assert record.partition_key == "a|1"
    assert record.asset_materialization.tags == {"dagster/partition/letter": "a", "dagster/partition/number": "1"}


def test_a_topic_added_for_one_dagster_partition_of_a_range_is_refused(manager, instance):
    @dg.asset(partitions_def=LETTERS, backfill_policy=dg.BackfillPolicy.single_run())
    def made(context: dg.AssetExecutionContext):
        context.add_asset_metadata({"kafka/topic": "of-b"}, partition_key="b")
        return {letter: [] for letter in context.partition_keys}

    failure = _failure(_materialize(made, manager, instance, tags=RANGE, raise_on_error=False))
    assert failure.metadata["kafka/culprit"].value == "metadata kafka/topic, added for Dagster partition 'b'"


def test_a_mapping_of_one_dagster_partition_is_that_partitions_output(manager, kafka_topic, read, instance):
    """As the last run of a backfill may be left with one, or a day is launched by hand."""
    topic, into = kafka_topic(), []
    made = _ranged(topic, lambda letters: {letter: [{"letter": letter}, {"letter": letter}] for letter in letters})
    (event,) = _materialize(made, manager, instance, partition_key="b").get_asset_materialization_events()
    assert event.partition == "b"
    assert _plain(event.materialization.metadata)["dagster/row_count"] == 2
    assert [json.loads(record.value) for record in read(topic)] == [{"letter": "b"}] * 2
    reader = _reader(list, into, partitions_def=LETTERS)
    _materialize([made, reader], manager, instance, selection=["reader"], partition_key="b")
    assert into == [[{"letter": "b"}] * 2]


def test_a_day_of_a_range_has_the_names_of_a_run_for_it_alone(manager, kafka_topic, instance):
    topic = kafka_topic()
    made = _ranged(topic, lambda letters: {letter: [] for letter in letters})
    ranged = _materialize(made, manager, instance, tags=RANGE).get_asset_materialization_events()
    alone = _materialize(made, manager, instance, partition_key="b").get_asset_materialization_events()
    ids = {e.partition: e.materialization.metadata["kafka/publication"].value["transactional_id"] for e in ranged}
    assert len(set(ids.values())) == 3
    assert alone[0].materialization.metadata["kafka/publication"].value["transactional_id"] == ids["b"]


# Jobs of ops


def test_op_jobs_publish_and_read_their_own_run(manager, kafka_topic, instance):
    topic, got = kafka_topic(), []

    @dg.op(out=dg.Out(metadata={"kafka/topic": topic, "kafka/key": "i"}))
    def produce(context: dg.OpExecutionContext):
        return [{"i": i, "run": context.run_id} for i in range(3)]

    @dg.op(out=dg.Out(metadata={"kafka/topic": topic}))
    def consume(context: dg.OpExecutionContext, rows: list):
        got.append((context.run_id, rows))

    @dg.job(resource_defs={"io_manager": manager})
    def work():
        consume(produce())

    for _ in range(2):
        assert work.execute_in_process(instance=instance).success
    assert len({run for run, _ in got}) == 2
    for run, rows in got:
        assert rows == [{"i": i, "run": run} for i in range(3)]


def test_the_topic_of_an_op_is_step_and_output(kafka_bootstrap_servers, kafka_topic, read, instance):
    topic = kafka_topic(name="job")

    @dg.op(out=dg.Out(io_manager_key="out"))
    def produce():
        return "x"

    @dg.job(resource_defs={"out": _manager(kafka_bootstrap_servers, topic="{asset_key}")})
    def work():
        produce()

    result = work.execute_in_process(instance=instance, raise_on_error=False)
    assert _failure(result).metadata["kafka/topic"].value == "produce.result"

    name = topic.replace("-", "_")

    @dg.job(name=name, resource_defs={"out": _manager(kafka_bootstrap_servers, topic="{job}.{name}")})
    def named():
        produce()

    result = named.execute_in_process(instance=instance, raise_on_error=False)
    assert _failure(result).metadata["kafka/topic"].value == f"{name}.result"
    assert read(topic) == []


def test_mapped_ops_read_their_own_outputs(manager, kafka_topic, read, instance):
    topic, got = kafka_topic(), []

    @dg.op(out=dg.DynamicOut(dict, metadata={"kafka/topic": topic}))
    def produce():
        yield from (dg.DynamicOutput({"i": i}, mapping_key=f"m{i}") for i in range(3))

    @dg.op(out=dg.Out(metadata={"kafka/topic": topic}))
    def consume(row: dict):
        got.append(row["i"])

    @dg.job(resource_defs={"io_manager": manager})
    def work():
        produce().map(consume)

    assert work.execute_in_process(instance=instance).success
    assert sorted(got) == [0, 1, 2]
    assert len(read(topic)) == 3


def test_an_op_that_returns_none_is_read_as_nothing(manager, instance):
    got = []

    @dg.op
    def nothing():
        return None

    @dg.op(out=dg.Out(io_manager_key="memory"))
    def consume(rows: list):
        got.append(rows)

    @dg.job(resource_defs={"io_manager": manager, "memory": dg.mem_io_manager})
    def work():
        consume(nothing())

    assert work.execute_in_process(instance=instance).success
    assert got == [[]]


@pytest.mark.parametrize(("guarantee", "read"), [("exactly_once", 1), ("at_least_once", 2)])
def test_what_an_op_has_published_in_its_last_attempt_is_read(
    guarantee, read, kafka_bootstrap_servers, kafka_topic, instance
):
    topic, attempts, got = kafka_topic(), [], []

    @dg.op(out={"rows": dg.Out(metadata={"kafka/topic": topic}), "end": dg.Out(io_manager_key="memory")})
    def produce():
        attempts.append(1)
        yield dg.Output({"attempt": len(attempts)}, "rows")
        if len(attempts) == 1:
            raise dg.RetryRequested(max_retries=1)
        yield dg.Output(None, "end")

    @dg.op(out=dg.Out(io_manager_key="memory"))
    def consume(rows: dict, end):
        got.append(rows)

    manager = _manager(kafka_bootstrap_servers, delivery_guarantee=guarantee)

    @dg.job(resource_defs={"io_manager": manager, "memory": dg.mem_io_manager})
    def work():
        consume(*produce())

    assert work.execute_in_process(instance=instance).success
    assert got == [{"attempt": read}]


@dg.op(out=dg.DynamicOut(io_manager_key="memory"))
def _each_letter():
    yield from (dg.DynamicOutput(letter, mapping_key=letter) for letter in "ab")


@pytest.mark.parametrize(
    ("annotation", "got"),
    [
        (list[dict], [{"x": "a"}, {"x": "b"}]),
        (list[dict] | None, [{"x": "a"}, {"x": "b"}]),
        (list[list[dict]], [[{"x": "a"}], [{"x": "b"}]]),
        (list, [[{"x": "a"}], [{"x": "b"}]]),
        (None, [[{"x": "a"}], [{"x": "b"}]]),
        (list[pl.DataFrame], [[{"x": "a"}], [{"x": "b"}]]),
    ],
)
def test_the_items_of_a_collected_input_have_its_form(annotation, got, manager, kafka_topic, instance):
    topic, into = kafka_topic(), []

    @dg.op(out=dg.Out(metadata={"kafka/topic": topic}))
    def publish(letter):
        return {"x": letter}

    def read(rows):
        into.extend(rows)

    if annotation is not None:
        read.__annotations__["rows"] = annotation

    @dg.job(resource_defs={"io_manager": manager, "memory": dg.mem_io_manager})
    def work():
        dg.op(read, out=dg.Out(io_manager_key="memory"))(_each_letter().map(publish).collect())

    assert work.execute_in_process(instance=instance).success
    assert [item.to_dicts() if isinstance(item, pl.DataFrame) else item for item in into] == got


def test_the_topic_of_mapped_ops_is_their_steps_without_the_mapping_key(
    kafka_bootstrap_servers, kafka_topic, read, instance
):
    topic = kafka_topic(name="publish.result")

    @dg.op
    def publish(letter):
        return {"x": letter}

    manager = _manager(kafka_bootstrap_servers, topic=topic.replace("publish.result", "{asset_key}"))

    @dg.job(resource_defs={"io_manager": manager, "memory": dg.mem_io_manager})
    def work():
        _each_letter().map(publish)

    result = work.execute_in_process(instance=instance)
    assert sorted(_values(read(topic))) == [b'{"x":"a"}', b'{"x":"b"}']
    said = [e.event_specific_data.metadata for e in _events(result, dg.DagsterEventType.HANDLED_OUTPUT)]
    ids = {one["kafka/publication"].value["publication_id"] for one in said if "kafka/publication" in one}
    assert len(ids) == 2


# Failures


@pytest.mark.kafka
@pytest.mark.parametrize(("guarantee", "told"), [("exactly_once", 3), ("at_least_once", 0)])
def test_an_output_of_none_in_a_retry_tells_what_the_first_attempt_has_published(
    guarantee, told, kafka_bootstrap_servers, kafka_topic, read, instance
):
    topic = kafka_topic()
    attempts = []

    @dg.multi_asset(
        outs={name: dg.AssetOut(metadata={"kafka/topic": topic}) for name in "ab"},
        retry_policy=dg.RetryPolicy(max_retries=1),
    )
    def incremental():
        attempts.append(1)
        yield dg.Output([{"i": i} for i in range(3)] if len(attempts) == 1 else None, "a")
        if len(attempts) == 1:
            raise ZeroDivisionError
        yield dg.Output(None, "b")

    assert _materialize(incremental, _manager(kafka_bootstrap_servers, delivery_guarantee=guarantee), instance).success
    events = [instance.get_latest_materialization_event(dg.AssetKey(name)) for name in "ab"]
    said, of_b = (_plain(event.asset_materialization.metadata) for event in events)
    assert (said["kafka/records"], said["dagster/row_count"]) == (told, told)
    assert of_b["kafka/records"] == 0
    assert len(read(topic)) == 3
    if told:
        assert said["kafka/replayed"]
        assert said["kafka/publication"]["topic_ids"].keys() == {topic}


@pytest.mark.kafka
@pytest.mark.parametrize("there", [True, False])
def test_an_output_of_none_in_a_retry_needs_no_topic_and_waits_no_longer_than_to_connect(
    there, kafka_bootstrap_servers, closed_port, instance
):
    attempts = []

    @dg.asset
    def nothing():
        attempts.append(time.monotonic())
        if len(attempts) == 1:
            raise dg.RetryRequested(max_retries=1)
        return dg.Output(None)

    servers = kafka_bootstrap_servers if there else closed_port
    manager = _manager(servers, connect_timeout=5 if there else 0.2, step_retries=0)
    result = _materialize(nothing, manager, instance, raise_on_error=False)
    assert result.success is there
    assert time.monotonic() - attempts[-1] < 10


@pytest.mark.kafka
def test_an_unknown_topic_fails_without_retry(kafka_bootstrap_servers, instance):
    topic, attempts = f"never-{uuid.uuid4().hex}", []

    def output():
        attempts.append(1)
        return [{"a": 1}]

    made = _asset(output, topic, retry_policy=dg.RetryPolicy(max_retries=3))
    result = _materialize(made, _manager(kafka_bootstrap_servers), instance, raise_on_error=False)
    metadata = {name: value.value for name, value in _failure(result).metadata.items()}
    assert metadata["kafka/topic"] == topic
    assert metadata["kafka/error_code"] == "UNKNOWN_TOPIC_OR_PART"
    assert metadata["kafka/what_to_do"].startswith("Create the topic: ")
    assert metadata["kafka/brokers"] == kafka_bootstrap_servers
    assert attempts == [1]


def test_a_bad_record_fails_without_retry_and_nothing_is_visible(manager, kafka_topic, read, instance):
    topic = kafka_topic()
    rows = [{"i": i} for i in range(2000)] + [{"i": {1}}]
    failure = _failure(_materialize(_asset(rows, topic), manager, instance, raise_on_error=False))
    assert failure.metadata["kafka/record_index"].value == 2000
    assert failure.metadata["kafka/field"].value == "i"
    assert failure.metadata["kafka/topic"].value == topic
    assert read(topic) == []
    assert instance.get_latest_materialization_event(dg.AssetKey("made")) is None


def test_an_error_of_a_generator_half_way_leaves_nothing_visible(manager, kafka_topic, read, instance, eventually):
    topic = kafka_topic()

    def rows():
        yield from ({"i": i} for i in range(2000))
        # Some are in the topic, and a reader who takes uncommitted records sees them.
        eventually(lambda: read(topic, "read_uncommitted"))
        raise ZeroDivisionError("half-way")

    result = _materialize(_asset(rows, topic), manager, instance, raise_on_error=False)
    (event,) = result.get_step_failure_events()
    assert "half-way" in event.event_specific_data.error.to_string()
    assert read(topic) == []
    assert read(topic, "read_uncommitted") != []


def test_records_that_the_broker_refuses_are_counted(kafka_bootstrap_servers, kafka_topic, read, instance):
    topic = kafka_topic(config={"max.message.bytes": "1000"})
    # With a codec it is the broker that decides.
    manager = _manager(kafka_bootstrap_servers, compression_type="snappy")
    rows = [{"x": "".join(uuid.uuid4().hex for _ in range(100))}]
    failure = _failure(_materialize(_asset(rows, topic), manager, instance, raise_on_error=False))
    assert failure.metadata["kafka/record_index"].value == 0
    assert failure.metadata["kafka/error_code"].value == "MSG_SIZE_TOO_LARGE"
    assert failure.metadata["kafka/errors_by_code"].value == {"MSG_SIZE_TOO_LARGE": 1}
    assert failure.metadata["kafka/undelivered_records"].value == 1
    assert read(topic) == []


def _events(result, kind):
    return [event for event in result.all_events if event.event_type is kind]


@pytest.mark.parametrize("retries", [0, 2])
def test_a_dead_broker_is_tried_again_as_often_as_configured(retries, closed_port, instance):
    manager = _manager(closed_port, connect_timeout=0.2, step_retries=retries)
    result = _materialize(_asset("x", "t"), manager, instance, raise_on_error=False)
    assert len(_events(result, dg.DagsterEventType.STEP_UP_FOR_RETRY)) == retries
    (failed,) = result.get_step_failure_events()
    text = failed.event_specific_data.error.to_string()
    assert closed_port in text
    assert "bootstrap_servers" in text


def test_the_wait_before_a_retry_is_that_of_the_config(closed_port, instance):
    manager = _manager(closed_port, connect_timeout=0.2, step_retries=1, step_retry_delay=0.8)
    result = _materialize(_asset("x", "t"), manager, instance, raise_on_error=False)
    (asked,) = _events(result, dg.DagsterEventType.STEP_UP_FOR_RETRY)
    assert 0.8 <= asked.event_specific_data.seconds_to_wait <= 1.0


@pytest.mark.parametrize("retries", [0, 1])
def test_the_assets_own_retry_policy_decides_alone(retries, closed_port, instance):
    manager = _manager(closed_port, connect_timeout=0.2, step_retries=5)
    made = _asset("x", "t", retry_policy=dg.RetryPolicy(max_retries=retries))
    result = _materialize(made, manager, instance, raise_on_error=False)
    assert len(_events(result, dg.DagsterEventType.STEP_UP_FOR_RETRY)) == retries
    assert closed_port in _failure(result).metadata["kafka/brokers"].value


def _read_from(broker, upstream, instance, *, retry_policy=None, **options):
    dead = _manager(broker, connect_timeout=0.2, **options)
    reader = _reader(list, [], retry_policy=retry_policy)
    return _materialize([upstream, reader], dead, instance, selection=["reader"], raise_on_error=False)


def test_a_dead_broker_in_load_input_is_tried_again(manager, kafka_topic, closed_port, instance):
    made = _asset(READ, kafka_topic())
    _materialize(made, manager, instance)
    result = _read_from(closed_port, made, instance, step_retries=2, step_retry_delay=0.1)
    waits = [e.event_specific_data.seconds_to_wait for e in _events(result, dg.DagsterEventType.STEP_UP_FOR_RETRY)]
    # The reader's own attempts count: each wait is twice the one before.
    assert len(waits) == 2
    assert 0.1 <= waits[0] <= 0.125
    assert 0.2 <= waits[1] <= 0.25
    (failed,) = result.get_step_failure_events()
    assert f"Kafka at {closed_port}: no answer in 0.2 s" in failed.event_specific_data.error.to_string()


def test_the_readers_own_retry_policy_decides_alone(manager, kafka_topic, closed_port, instance):
    made = _asset(READ, kafka_topic())
    _materialize(made, manager, instance)
    policy = dg.RetryPolicy(max_retries=1)
    result = _read_from(closed_port, made, instance, retry_policy=policy, step_retries=5)
    assert len(_events(result, dg.DagsterEventType.STEP_UP_FOR_RETRY)) == 1
    assert closed_port in _failure(result).metadata["kafka/brokers"].value


def test_a_failed_attempt_is_made_good_by_the_next(manager, kafka_topic, read, instance):
    topic, attempts = kafka_topic(), []

    def rows():
        attempts.append(1)
        yield from ({"attempt": len(attempts), "i": i} for i in range(500))
        if len(attempts) == 1:
            raise ZeroDivisionError

    result = _materialize(_asset(rows, topic, retry_policy=dg.RetryPolicy(max_retries=1)), manager, instance)
    assert result.success
    assert {json.loads(value)["attempt"] for value in _values(read(topic))} == {2}
    assert _metadata(result)["dagster/row_count"] == len(read(topic)) == 500


def test_works_without_a_run():
    """build_output_context, as unit tests of users have it, needs no run; each is work of its own."""
    context = dg.build_output_context(asset_key="made", definition_metadata={"kafka/topic": "a b"})
    with pytest.raises(dg.Failure, match="topic 'a b'"):
        _manager("localhost:1").handle_output(context, "x")


def test_the_default_topic_of_a_built_context_needs_no_job(closed_port):
    context = dg.build_output_context(asset_key="made")
    with pytest.raises(dg.Failure, match="set"):
        _manager(closed_port).handle_output(context, {1, 2})


@pytest.mark.parametrize("mode", ["append", "upsert"])
def test_published_from_a_built_context(mode, manager, kafka_topic, read):
    topic = kafka_topic()
    metadata = {"kafka/topic": topic, "kafka/key": "a", "kafka/write_mode": mode}
    for _ in range(2):
        context = dg.build_output_context(asset_key="made", definition_metadata=metadata)
        manager.handle_output(context, {"a": 1})
    assert len(read(topic)) == 2


def test_an_output_of_an_op_is_published_from_a_built_context(manager, kafka_topic, read):
    topic = kafka_topic()
    for _ in range(2):
        metadata = {"kafka/topic": topic}
        context = dg.build_output_context(step_key="step", name="result", definition_metadata=metadata)
        manager.handle_output(context, {"a": 1})
    assert len(read(topic)) == 2


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({}, [{"a": 1}]),
        ({"dagster_type": dg.PythonObjectDagsterType(dict)}, {"a": 1}),
    ],
)
def test_read_by_a_built_context(options, got, manager, kafka_topic, instance):
    _materialize(_asset({"a": 1}, kafka_topic()), manager, instance)
    context = dg.build_input_context(asset_key=dg.AssetKey("made"), instance=instance, **options)
    assert manager.load_input(context) == got
