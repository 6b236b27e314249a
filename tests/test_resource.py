import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import threading
import time
import uuid
from pathlib import Path

import dagster as dg
import pytest
from conftest import mostly_slow
from dagster._core.definitions.reconstruct import ReconstructableJob
from pydantic import ValidationError

from dataforge_kafka_dagster import (
    DataForgeKafkaProducer,
    KafkaError,
    KafkaIOManager,
    KafkaProducerResource,
    NoBrokersAvailable,
    Publication,
)
from dataforge_kafka_dagster import resource as resource_module
from dataforge_kafka_dagster.kafka import publication as publication_module
from dataforge_kafka_dagster.kafka.errors import KafkaConfigError, Remedy
from dataforge_kafka_dagster.kafka.publication import PublicationWriter
from dataforge_kafka_dagster.kafka.registry import SchemaRegistryConfig
from dataforge_kafka_dagster.resource import PublishingSession, describe

CANARY = "canary-91ce"


@pytest.fixture
def kafka(kafka_bootstrap_servers):
    # The prefix keeps apart test sessions that share a Kafka.
    prefix = f"test-{uuid.uuid4().hex[:8]}"
    return KafkaProducerResource(
        bootstrap_servers=kafka_bootstrap_servers, step_retry_delay=0.01, transactional_id_prefix=prefix
    )


def _values(found):
    return [record.value for record in found]


def _run_op(op, kafka, instance, **options):
    @dg.job(resource_defs={"kafka": kafka})
    def work():
        op()

    return work.execute_in_process(instance=instance, **options)


def _materialize(asset, kafka, instance, **options):
    return dg.materialize([asset], resources={"kafka": kafka}, instance=instance, **options)


def _metadata(result):
    (event,) = result.get_asset_materialization_events()
    metadata = {name: value.value for name, value in event.materialization.metadata.items()}
    if "kafka/offsets" in metadata:
        metadata["kafka/offsets"] = [record.data for record in metadata["kafka/offsets"].records]
    return metadata


def _kafka_threads():
    return [thread for thread in threading.enumerate() if "kafka" in thread.name]


# Without a broker


def test_defining_and_building_connects_to_nothing(closed_port, instance, monkeypatch):
    monkeypatch.setattr("confluent_kafka.Producer", None)
    monkeypatch.setattr("confluent_kafka.admin.AdminClient", None)

    @dg.op
    def idle(kafka: KafkaProducerResource):
        assert kafka.bootstrap_servers == closed_port

    kafka = KafkaProducerResource(bootstrap_servers=closed_port)
    dg.Definitions(resources={"kafka": kafka}).get_repository_def()
    assert _run_op(idle, kafka, instance).success


def test_a_list_of_servers_is_taken():
    resource = KafkaProducerResource(bootstrap_servers=["a:1", "b:2"], acks=-1)
    assert resource.producer_config().servers == "a:1,b:2"
    assert resource.publication_config().producer.acks == "-1"


def test_options_reach_the_config():
    resource = KafkaProducerResource(
        bootstrap_servers="a:1",
        compression_type="zstd",
        batch_size=123,
        delivery_guarantee="at_least_once",
        transactional_id_prefix="mine",
        transaction_timeout=77,
        librdkafka_config={"a.b": "c"},
    )
    config = resource.publication_config()
    assert (config.producer.compression_type, config.producer.batch_size) == ("zstd", 123)
    assert config.producer.librdkafka_config == {"a.b": "c"}
    assert (config.delivery_guarantee, config.transactional_id_prefix) == ("at_least_once", "mine")
    assert config.transaction_timeout == 77


def _secured(**options):
    return KafkaProducerResource(
        bootstrap_servers="a:1",
        security_protocol="SASL_SSL",
        sasl_mechanism="PLAIN",
        sasl_username="user",
        **options,
    )


def test_no_secret_in_repr_or_snapshot(monkeypatch):
    from dagster._core.remote_representation.external_data import RepositorySnap

    monkeypatch.setenv("KAFKA_PASSWORD_OF_TEST", CANARY)
    resource = _secured(
        sasl_password=dg.EnvVar("KAFKA_PASSWORD_OF_TEST"),
        librdkafka_config={"ssl.keystore.password": dg.EnvVar("KAFKA_PASSWORD_OF_TEST")},
    )

    @dg.asset
    def made(kafka: KafkaProducerResource): ...

    definitions = dg.Definitions(assets=[made], resources={"kafka": resource})
    snapshot = dg.serialize_value(RepositorySnap.from_def(definitions.get_repository_def()))
    assert "KAFKA_PASSWORD_OF_TEST" in snapshot
    with resource.process_config_and_initialize_cm() as resolved:
        assert resolved.producer_config().sasl_password == CANARY
        for text in (snapshot, repr(resource), str(resource), repr(resolved), str(resolved)):
            assert CANARY not in text


def test_no_secret_in_the_errors_of_a_definition():
    for options in ({"sasl_password": CANARY, "sasl_mecanism": CANARY}, {"sasl_password": [CANARY]}):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            KafkaProducerResource(bootstrap_servers="a:1", **options)
        assert CANARY not in str(caught.value)


def test_env_vars_are_resolved_and_checked_at_the_start_of_a_run(monkeypatch, instance):
    seen = []

    @dg.op
    def look(kafka: KafkaProducerResource):
        seen.append(kafka.producer_config())

    resource = KafkaProducerResource(
        bootstrap_servers=dg.EnvVar("SERVERS_OF_TEST"),
        batch_size=dg.EnvVar.int("BATCH_OF_TEST"),
        acks=dg.EnvVar("ACKS_OF_TEST"),
        librdkafka_config={"client.rack": dg.EnvVar("RACK_OF_TEST")},
    )
    monkeypatch.setenv("SERVERS_OF_TEST", "x:1,y:2")
    monkeypatch.setenv("BATCH_OF_TEST", "4321")
    monkeypatch.setenv("ACKS_OF_TEST", "all")
    monkeypatch.setenv("RACK_OF_TEST", "r1")
    assert _run_op(look, resource, instance).success
    (config,) = seen
    assert (config.servers, config.batch_size) == ("x:1,y:2", 4321)
    assert config.librdkafka_config == {"client.rack": "r1"}
    monkeypatch.setenv("SERVERS_OF_TEST", "x:99999")
    result = _run_op(look, resource, instance, raise_on_error=False)
    assert not result.success
    assert len(seen) == 1


@pytest.mark.parametrize("name", mostly_slow(["sasl_password", "sasl_username", "sasl_mechanism", "security_protocol"]))
def test_security_options_may_be_env_vars(name, monkeypatch):
    values = {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_username": "user",
        "sasl_password": CANARY,
    }
    monkeypatch.setenv("OPTION_OF_TEST", values[name])
    resource = KafkaProducerResource(bootstrap_servers="a:1", **(values | {name: dg.EnvVar("OPTION_OF_TEST")}))
    with resource.process_config_and_initialize_cm() as resolved:
        assert getattr(resolved.producer_config(), name) == values[name]


CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"
UNKNOWN = dg.EnvVar("NOT_SET_IN_THESE_TESTS")
SASL_SSL = {"security_protocol": "SASL_SSL"}
PLAIN = SASL_SSL | {"sasl_mechanism": "PLAIN", "sasl_username": UNKNOWN, "sasl_password": UNKNOWN}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sasl_username": UNKNOWN, "sasl_password": UNKNOWN}, "sasl_username, sasl_password would be ignored"),
        ({"ssl_ca_pem": UNKNOWN}, "ssl_ca_pem would be ignored"),
        (PLAIN | {"sasl_password": None}, "needs sasl_username and sasl_password"),
        (SASL_SSL | {"sasl_username": UNKNOWN, "sasl_password": UNKNOWN}, "needs sasl_mechanism"),
        (PLAIN | {"sasl_oauthbearer_client_secret": UNKNOWN}, "sasl_oauthbearer_client_secret would be ignored"),
        (PLAIN | {"ssl_certificate_pem": UNKNOWN}, "a client certificate and its private key go together"),
        (PLAIN | {"ssl_ca_pem": UNKNOWN, "ssl_ca_location": "/"}, "ssl_ca_location and ssl_ca_pem name the same"),
        (PLAIN | {"ssl_ca_pem": UNKNOWN, "ssl_crl_location": "/no/crl"}, "no such file"),
        (SASL_SSL | {"sasl_mechanism": "AWS_MSK_IAM", "ssl_ca_pem": UNKNOWN}, "needs sasl_aws_region"),
        (SASL_SSL | {"sasl_mechanism": "GSSAPI", "sasl_username": UNKNOWN}, "Kerberos"),
    ],
)
def test_security_options_that_do_not_fit_are_refused_at_definition_though_secrets_are_not_known(options, said):
    with pytest.raises(ValueError, match=said):
        KafkaProducerResource(bootstrap_servers="a:1", **options)


@pytest.mark.parametrize(
    "options",
    [
        PLAIN | {"ssl_certificate_pem": CERTIFICATE, "ssl_key_pem": UNKNOWN, "ssl_key_password": UNKNOWN},
        {"security_protocol": UNKNOWN, "sasl_username": UNKNOWN, "ssl_ca_pem": UNKNOWN},
        SASL_SSL | {"sasl_mechanism": UNKNOWN, "sasl_username": UNKNOWN},
        SASL_SSL | {"sasl_mechanism": "AWS_MSK_IAM", "sasl_aws_region": UNKNOWN},
        SASL_SSL | {"sasl_mechanism": "OAUTHBEARER", "sasl_oauthbearer_method": UNKNOWN},
        SASL_SSL | {"sasl_mechanism": "OAUTHBEARER", "sasl_oauthbearer_callback": UNKNOWN},
    ],
)
def test_security_options_that_may_fit_are_accepted_at_definition(options):
    KafkaProducerResource(bootstrap_servers="a:1", **options)


class OfTheHouse(KafkaProducerResource):
    security_protocol: str = "SASL_SSL"
    sasl_mechanism: str | None = "SCRAM-SHA-512"
    sasl_username: str | None = "dagster"
    delivery_guarantee: str = "at_least_once"
    schema_registry_url: str | None = "https://registry"
    team: str = "data"


def test_what_a_subclass_sets_is_given():
    OfTheHouse(sasl_password=UNKNOWN, acks=1, schema_registry_token=UNKNOWN, team="other")
    with pytest.raises(ValueError, match="needs sasl_username and sasl_password"):
        OfTheHouse()


def test_what_a_subclass_sets_is_given_at_launch_too(instance):
    @dg.op
    def look(kafka: KafkaProducerResource):
        assert kafka.producer_config().sasl_username == "dagster"

    config = {"resources": {"kafka": {"config": {"sasl_password": "secret"}}}}
    assert _run_op(look, OfTheHouse.configure_at_launch(), instance, run_config=config).success


REGISTRY = {"schema_registry_url": "https://registry"}


@pytest.mark.parametrize(("known", "later"), [("key", "certificate"), ("certificate", "key")])
def test_a_file_for_the_registry_may_be_an_env_var_beside_one_that_is_known(known, later, tmp_path, monkeypatch):
    (tmp_path / "known.pem").touch()
    options = REGISTRY | {
        f"schema_registry_ssl_{known}_location": str(tmp_path / "known.pem"),
        f"schema_registry_ssl_{later}_location": dg.EnvVar("FILE_OF_TEST"),
    }
    resource = KafkaProducerResource(**options)
    monkeypatch.setenv("FILE_OF_TEST", str(tmp_path / "later.pem"))
    with pytest.raises(ValueError, match=r"later\.pem.* no such file"), resource.process_config_and_initialize_cm():
        pass
    (tmp_path / "later.pem").touch()
    with resource.process_config_and_initialize_cm() as kafka:
        registry = kafka.publication_config().schema_registry
    assert getattr(registry, f"ssl_{later}_location") == str(tmp_path / "later.pem")


@pytest.mark.parametrize("url", ["https://registry", ""])
@pytest.mark.parametrize(
    "empty",
    [
        ["token", "ssl_ca_location", "ssl_certificate_location", "ssl_key_location"],
        ["username", "password"],
    ],
    ids="-".join,
)
def test_an_option_of_the_registry_whose_variable_is_empty_counts_as_none(url, empty, monkeypatch):
    monkeypatch.setenv("URL_OF_TEST", url)
    monkeypatch.setenv("EMPTY_OF_TEST", "")
    options = {f"schema_registry_{name}": dg.EnvVar("EMPTY_OF_TEST") for name in empty}
    resource = KafkaProducerResource(schema_registry_url=dg.EnvVar("URL_OF_TEST"), **options)
    with resource.process_config_and_initialize_cm() as kafka:
        registry = kafka.publication_config().schema_registry
    assert registry == (SchemaRegistryConfig(url=url) if url else None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"username": UNKNOWN, "password": UNKNOWN, "token": "t"}, "exclude each other"),
        ({"ssl_key_location": UNKNOWN}, "ssl_key_location needs ssl_certificate_location"),
    ],
)
def test_options_of_the_registry_that_do_not_fit_are_refused_at_definition(options, said):
    with pytest.raises(ValueError, match=said):
        KafkaProducerResource(**REGISTRY, **{f"schema_registry_{name}": value for name, value in options.items()})


def test_an_env_var_in_the_list_of_servers_is_refused(monkeypatch):
    monkeypatch.setenv("SERVER_OF_TEST", "real-host:9092")
    # Dagster cannot put an environment variable into a part of a text.
    with pytest.raises(ValueError, match=r"bootstrap_servers\[1\]=EnvVar\('SERVER_OF_TEST'\) is not possible"):
        KafkaProducerResource(bootstrap_servers=["a:1", dg.EnvVar("SERVER_OF_TEST")])


@pytest.mark.parametrize("name", ["bootstrap_servers", "on_bad_record", "transactional_id_prefix"])
def test_an_env_var_that_no_run_has_looked_up_is_never_taken_for_its_value(name):
    kafka = KafkaProducerResource(**{"bootstrap_servers": "localhost:1", name: dg.EnvVar("OPTION_OF_TEST")})
    for use in (
        lambda: kafka.send_sync("t", "x"),
        lambda: kafka.publishing(dg.build_asset_context(), topic="t").__enter__(),
        kafka.producer_config,
    ):
        with pytest.raises(KafkaConfigError, match=rf"{name}=EnvVar\('OPTION_OF_TEST'\): no run has looked it up"):
            use()


# With a broker


@pytest.mark.kafka
def test_send_from_an_asset(kafka, kafka_topic, read, instance):
    topic, when = kafka_topic(), round(time.time() * 1000) - 60_000

    @dg.asset
    def made(kafka: KafkaProducerResource):
        metadata = kafka.send_sync(topic, {"a": 1}, key="k", headers={"h": "v"}, partition=0, timestamp=when)
        return dg.MaterializeResult(metadata={"offset": metadata.offset})

    result = _materialize(made, kafka, instance)
    (found,) = read(topic)
    assert (found.key, found.value, found.timestamp) == (b"k", b'{"a":1}', when)
    assert found.headers == [("h", b"v")]
    assert _metadata(result)["offset"] == found.offset == 0


@pytest.mark.kafka
@pytest.mark.parametrize(("passing", "attempts"), [(False, 1), (True, 3)])
def test_errors_in_dagster_gives_single_records_the_rules_of_a_step(passing, attempts, kafka, instance):
    made = []

    @dg.op
    def one(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        made.append(context.retry_number)
        with kafka.errors_in_dagster(context):
            if passing:
                raise KafkaError("it", "it passes", "Try again", remedy=Remedy.RETRY)
            kafka.send_sync("no-such-topic", "x", partition=0)

    kafka = KafkaProducerResource(**kafka.model_dump() | {"step_retries": 2, "delivery_timeout": 10})
    result = _run_op(one, kafka, instance, raise_on_error=False)
    failure = result.failure_data_for_node("one").user_failure_data
    assert (made, bool(failure.metadata["kafka/what_to_do"].value)) == (list(range(attempts)), True)


@pytest.mark.kafka
def test_send_from_an_op(kafka, kafka_topic, read, instance):
    topic = kafka_topic()
    calls = []

    @dg.op
    def notify(kafka: KafkaProducerResource):
        kafka.send_sync(topic, "sync", key="a")
        future = kafka.send_async(topic, "async", callback=lambda err, msg: calls.append((err, msg.topic())))
        kafka.flush()
        assert future.done()

    assert _run_op(notify, kafka, instance).success
    assert _values(read(topic)) == [b"sync", b"async"]
    assert calls == [(None, topic)]


@pytest.mark.kafka
def test_send_from_a_sensor(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.sensor(job_name="none")
    def watch(context: dg.SensorEvaluationContext, kafka: KafkaProducerResource):
        return dg.SkipReason(f"at {kafka.send_sync(topic, 'seen').offset}")

    before = len(_kafka_threads())
    with dg.build_sensor_context(instance=instance, resources={"kafka": kafka}) as context:
        assert watch(context).skip_message == "at 0"
    assert _values(read(topic)) == [b"seen"]
    assert len(_kafka_threads()) == before


@pytest.mark.kafka
def test_the_producer_is_shared_by_steps_and_closed_at_the_end_of_the_run(
    kafka, kafka_topic, read, instance, eventually
):
    topic = kafka_topic()
    before = len(_kafka_threads())
    producers = []

    @dg.op
    def first(kafka: KafkaProducerResource):
        kafka.send_async(topic, "left to the end of the run")
        producers.append(kafka.producer)
        return len(_kafka_threads())

    @dg.op
    def second(kafka: KafkaProducerResource, threads: int):
        producers.append(kafka.producer)
        assert threads == before + 1

    @dg.job(resource_defs={"kafka": kafka})
    def work():
        second(first())

    assert work.execute_in_process(instance=instance).success
    assert producers[0] is producers[1]
    eventually(lambda: len(_kafka_threads()) == before)
    assert _values(read(topic)) == [b"left to the end of the run"]
    with pytest.raises(KafkaError, match="closed"):
        producers[0].send_sync(topic, "x")


@pytest.mark.kafka
def test_two_resources_in_one_run(kafka_bootstrap_servers, kafka_topic, read, instance):
    topics = {name: kafka_topic() for name in ("one", "two")}

    @dg.op
    def both(one: KafkaProducerResource, two: KafkaProducerResource):
        assert one.producer is not two.producer
        assert one.producer.config.client_id == "first"
        one.send_sync(topics["one"], "1")
        two.send_sync(topics["two"], "2")

    @dg.job(
        resource_defs={
            "one": KafkaProducerResource(bootstrap_servers=kafka_bootstrap_servers, client_id="first"),
            "two": KafkaProducerResource(bootstrap_servers=kafka_bootstrap_servers, client_id="second"),
        }
    )
    def work():
        both()

    assert work.execute_in_process(instance=instance).success
    assert _values(read(topics["one"])) == [b"1"]
    assert _values(read(topics["two"])) == [b"2"]


@pytest.mark.kafka
def test_who_closes_the_producer_does_not_close_the_resource(kafka, kafka_topic, read):
    topic = kafka_topic()
    for value in ("x", "y"):
        with kafka.producer as producer:
            producer.send_sync(topic, value)
    assert _values(read(topic)) == [b"x", b"y"]


@pytest.mark.kafka
def test_a_copy_of_a_used_resource_has_a_producer_of_its_own(kafka, kafka_topic, closed_port):
    topic = kafka_topic()
    with kafka.producer:
        kafka.send_sync(topic, "x")
        other = kafka.model_copy(update={"bootstrap_servers": closed_port, "connect_timeout": 1.0})
        with pytest.raises(NoBrokersAvailable, match=closed_port):
            other.send_sync(topic, "y")
        assert other._lock is not kafka._lock


@pytest.mark.kafka
def test_a_lost_record_fails_the_step_that_flushes(kafka_bootstrap_servers, kafka_topic, instance):
    topic = kafka_topic(config={"max.message.bytes": "1000"})
    kafka = KafkaProducerResource(bootstrap_servers=kafka_bootstrap_servers, compression_type="none")

    @dg.op
    def lose(kafka: KafkaProducerResource):
        kafka.send_async(topic, uuid.uuid4().hex * 100)
        kafka.flush()

    result = _run_op(lose, kafka, instance, raise_on_error=False)
    (event,) = result.get_step_failure_events()
    assert "MSG_SIZE_TOO_LARGE" in event.event_specific_data.error.to_string()


@dg.op(out=dg.Out(dg.Any, metadata={"kafka/key": "i"}))
def produce_in_process():
    return dg.Output({"i": i, "pid": os.getpid()} for i in range(10))


@dg.op(config_schema={"topic": str})
def send_from_process(context: dg.OpExecutionContext, rows: list, kafka: KafkaProducerResource) -> None:
    topic = context.op_config["topic"]
    kafka.send_sync(topic, {"sent": len(rows), "pid": os.getpid()})
    with kafka.publishing(context, topic=topic) as publication:
        publication.send_all({"published": row["i"]} for row in rows)


@dg.job(
    executor_def=dg.multiprocess_executor.configured({"max_concurrent": 1}),
    resource_defs={
        "kafka": KafkaProducerResource(bootstrap_servers=dg.EnvVar("KAFKA_SERVERS_OF_TEST")),
        "io_manager": KafkaIOManager(
            kafka=KafkaProducerResource(bootstrap_servers=dg.EnvVar("KAFKA_SERVERS_OF_TEST")),
            topic=dg.EnvVar("KAFKA_TOPIC_OF_TEST"),
        ),
        "nowhere": dg.fs_io_manager,
    },
)
def in_processes():
    send_from_process(produce_in_process())


@pytest.mark.kafka
def test_multiprocess_executor_with_env_vars(kafka_bootstrap_servers, kafka_topic, read, stored_instance, monkeypatch):
    """One process publishes an output, the next reads it back, sends and publishes."""
    # Dagster 1.11 takes the first folder off the path of a child, which is this one.
    monkeypatch.syspath_prepend(Path(__file__).parent)
    output, topic = kafka_topic(), kafka_topic()
    monkeypatch.setenv("KAFKA_SERVERS_OF_TEST", kafka_bootstrap_servers)
    monkeypatch.setenv("KAFKA_TOPIC_OF_TEST", output)
    config = {"ops": {"send_from_process": {"config": {"topic": topic}}}}
    job = ReconstructableJob.for_file(__file__, "in_processes")
    with dg.execute_job(job, stored_instance, run_config=config) as result:
        assert result.success
    written = read(output)
    assert [record.key for record in written] == [str(i).encode() for i in range(10)]
    sent, *published = [json.loads(record.value) for record in read(topic)]
    assert sent["sent"] == 10
    assert published == [{"published": i} for i in range(10)]
    pids = {json.loads(record.value)["pid"] for record in written}
    assert len({os.getpid(), sent["pid"], *pids}) == 3


def _expected_offsets(found, topic):
    """The table of a publication's metadata, from what an independent reader found."""
    rows = []
    for partition in sorted({record.partition for record in found}):
        offsets = [record.offset for record in found if record.partition == partition]
        rows.append(
            {
                "topic": topic,
                "partition": partition,
                "first offset": offsets[0],
                "last offset": offsets[-1],
                "records": len(offsets),
            }
        )
    return rows


@pytest.mark.kafka
def test_publishing_from_an_asset(kafka, kafka_topic, read, instance):
    topic = kafka_topic(partitions=3)
    sessions = []

    @dg.asset
    def alerts(context: dg.AssetExecutionContext, kafka: KafkaProducerResource) -> dg.MaterializeResult:
        with kafka.publishing(context, topic=topic, key="id") as publication:
            sessions.append(publication)
            assert isinstance(publication, PublishingSession)
            assert not publication.replayed
            for i in range(20):
                publication.send({"id": f"a{i}"})
            publication.send({"id": "own"}, key="other", headers={"h": "v"})
            publication.send_all([{"id": "all"}])
            with pytest.raises(KafkaError, match="with block"):
                _ = publication.result
            assert read(topic) == []
        return publication.materialize_result(more="of mine")

    result = _materialize(alerts, kafka, instance)
    found = read(topic)
    assert len(found) == 22
    assert {record.key for record in found} == {*(f"a{i}".encode() for i in range(20)), b"other", b"all"}
    said = _metadata(result)
    assert said["dagster/row_count"] == said["kafka/records"] == 22
    assert said["kafka/topic"] == topic
    assert said["kafka/bytes"] == sum(len(record.key) + len(record.value) for record in found)
    assert said["kafka/replayed"] is False
    assert said["more"] == "of mine"
    assert said["kafka/offsets"] == _expected_offsets(found, topic)
    (event,) = result.get_asset_materialization_events()
    table = event.materialization.metadata["kafka/offsets"]
    names = ["partition", "first offset", "last offset", "records", "topic"]
    assert [column.name for column in table.schema.columns] == names
    assert all(list(record.data) == names for record in table.records)
    publication = sessions[0].result
    assert isinstance(publication, Publication)
    assert publication.records == 22
    assert publication.seconds > 0
    assert said["kafka/publication"]["publication_id"] == publication.publication_id


@pytest.mark.kafka
def test_publishing_to_several_topics_is_one_transaction(kafka, kafka_topic, read, instance):
    one, two = kafka_topic(), kafka_topic()

    @dg.asset
    def both(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=one) as publication:
            publication.send("1")
            publication.send("2", topic=two)
            publication.send_all(["3", "4"], topic=two)
        return publication.materialize_result()

    said = _metadata(_materialize(both, kafka, instance))
    assert _values(read(one)) == [b"1"]
    assert _values(read(two)) == [b"2", b"3", b"4"]
    assert said["kafka/topic"] == f"{one}, {two}"
    assert {(row["topic"], row["records"]) for row in said["kafka/offsets"]} == {(one, 1), (two, 3)}


@pytest.mark.kafka
def test_an_error_between_two_topics_leaves_nothing_in_either(kafka, kafka_topic, read, instance):
    one, two = kafka_topic(), kafka_topic()

    @dg.asset
    def both(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=one) as publication:
            publication.send("1")
            publication.send("2", topic=two)
            raise ZeroDivisionError("of the user")

    result = _materialize(both, kafka, instance, raise_on_error=False)
    (event,) = result.get_step_failure_events()
    assert "of the user" in event.event_specific_data.error.to_string()
    assert read(one) == read(two) == []


@pytest.mark.kafka
def test_sessions_of_one_step_on_one_topic_do_not_collide(kafka, kafka_topic, read, instance):
    topic = kafka_topic()
    ids = []

    @dg.op
    def twice(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        for name in (None, None, "named", "named"):
            with kafka.publishing(context, topic=topic, name=name) as publication:
                assert not publication.replayed
                publication.send(str(len(ids)))
            ids.append((publication.result.publication_id, publication.result.transactional_id))
        with (
            kafka.publishing(context, topic=topic, name="outer") as outer,
            kafka.publishing(context, topic=topic, name="inner") as inner,
        ):
            outer.send("outer")
            inner.send("inner")

    assert _run_op(twice, kafka, instance).success
    assert len({publication for publication, _ in ids}) == 4
    assert len({transactional for _, transactional in ids}) == 4
    assert sorted(_values(read(topic))) == [b"0", b"1", b"2", b"3", b"inner", b"outer"]


@pytest.mark.kafka
def test_an_empty_session_is_a_publication_of_nothing(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.asset
    def nothing(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            pass
        return publication.materialize_result()

    said = _metadata(_materialize(nothing, kafka, instance))
    assert (said["dagster/row_count"], said["kafka/records"], said["kafka/bytes"]) == (0, 0, 0)
    assert said["kafka/topic"] == topic
    assert "kafka/offsets" not in said
    assert read(topic) == []


@pytest.mark.kafka
def test_an_empty_session_is_replayed_too(kafka, kafka_topic, instance):
    topic = kafka_topic()
    replayed = []

    @dg.op
    def nothing(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            replayed.append(publication.replayed)
        if context.retry_number == 0:
            raise dg.RetryRequested

    assert _run_op(nothing, kafka, instance).success
    assert replayed == [False, True]


@pytest.mark.kafka
@pytest.mark.parametrize("kind", ["asset", "op"])
def test_a_retry_after_the_commit_publishes_nothing_and_reports_the_same(kind, kafka, kafka_topic, read, instance):
    topic = kafka_topic(partitions=2)
    results = []

    def body(context, kafka):
        with kafka.publishing(context, topic=topic) as publication:
            for i in range(10):
                publication.send({"i": i, "attempt": context.retry_number}, key=str(i))
        results.append(publication.result)
        if context.retry_number < 2:
            raise dg.RetryRequested(max_retries=2)
        return publication

    if kind == "asset":

        @dg.asset
        def work(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
            return body(context.op_execution_context, kafka).materialize_result()

        said = _metadata(_materialize(work, kafka, instance))
        assert said["kafka/replayed"] is True
        assert said["kafka/records"] == 10
        assert "kafka/seconds" not in said
        assert said["kafka/offsets"] == _expected_offsets(read(topic), topic)
    else:

        @dg.op
        def work(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
            body(context, kafka)

        assert _run_op(work, kafka, instance).success
    assert [result.replayed for result in results] == [False, True, True]
    assert {(r.publication_id, r.transactional_id, r.records, r.bytes, r.offsets) for r in results} == {
        (results[0].publication_id, results[0].transactional_id, 10, results[0].bytes, results[0].offsets)
    }
    found = read(topic)
    assert len(found) == 10
    assert all(b'"attempt":0' in record.value for record in found)


@pytest.mark.kafka
def test_a_retry_after_an_abort_publishes_everything_once(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.op
    def work(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            assert not publication.replayed
            for i in range(5):
                publication.send(f"{context.retry_number}-{i}")
            if context.retry_number == 0:
                raise dg.RetryRequested

    assert _run_op(work, kafka, instance).success
    assert _values(read(topic)) == [f"1-{i}".encode() for i in range(5)]


@pytest.mark.kafka
def test_two_runs_are_two_publications(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.asset
    def work(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("x")
        return publication.materialize_result()

    said = [_metadata(_materialize(work, kafka, instance)) for _ in range(2)]
    assert [metadata["kafka/replayed"] for metadata in said] == [False, False]
    places = [metadata["kafka/publication"] for metadata in said]
    assert places[0]["transactional_id"] == places[1]["transactional_id"]
    assert places[0]["publication_id"] != places[1]["publication_id"]
    assert len(read(topic)) == 2


@pytest.mark.kafka
def test_an_unknown_topic_fails_without_retry(kafka, instance):
    topic = f"never-{uuid.uuid4().hex}"
    attempts = []

    @dg.op(retry_policy=dg.RetryPolicy(max_retries=3))
    def work(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        attempts.append(context.retry_number)
        with kafka.publishing(context, topic=topic):
            pytest.fail("it opened")

    result = _run_op(work, kafka, instance, raise_on_error=False)
    (event,) = result.get_step_failure_events()
    metadata = event.event_specific_data.user_failure_data.metadata
    assert metadata["kafka/topic"].value == topic
    assert metadata["kafka/error_code"].value == "UNKNOWN_TOPIC_OR_PART"
    assert "Create the topic" in metadata["kafka/what_to_do"].value
    assert attempts == [0]


@pytest.mark.kafka
def test_at_least_once_publishes_without_a_transaction(kafka_bootstrap_servers, kafka_topic, read, instance):
    topic = kafka_topic(partitions=2)
    kafka = KafkaProducerResource(bootstrap_servers=kafka_bootstrap_servers, delivery_guarantee="at_least_once", acks=1)

    @dg.asset
    def work(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send_all({"i": i} for i in range(100))
        return publication.materialize_result()

    said = _metadata(_materialize(work, kafka, instance))
    found = read(topic)
    assert said["kafka/records"] == len(found) == 100
    assert said["kafka/offsets"] == _expected_offsets(found, topic)


def test_the_steps_log_tells_a_publication_in_one_line():
    some = Publication("id", "publisher", "orders", 1200, 34567, "json", (), replayed=False, seconds=0.456)
    assert describe(some) == "Published 1,200 records to 'orders', 34,567 bytes, in 0.46 s"
    bad = dataclasses.replace(some, records=1, dead_letters=2, dead_letter_topic="orders.dead")
    assert describe(bad).startswith("Published 1 record to 'orders' and 2 bad ones to 'orders.dead', ")
    assert describe(some, ["a"]).startswith("Dagster partition 'a': Published 1,200 records to 'orders', ")
    assert describe(some, ["a", "b"]) == describe(some)
    again = dataclasses.replace(some, replayed=True)
    assert describe(again) == "An earlier attempt had published 1,200 records to 'orders'; nothing was published again"


@pytest.mark.kafka
def test_a_slow_publication_logs_how_far_it_is(kafka, kafka_topic, instance, monkeypatch):
    topic = kafka_topic()
    assert publication_module._PROGRESS_SECONDS == 5
    monkeypatch.setattr(publication_module, "_PROGRESS_SECONDS", 1.0)

    def slowly():
        for i in range(24):
            time.sleep(0.1)
            yield {"i": i}

    @dg.op
    def work(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send_all(slowly())

    result = _run_op(work, kafka, instance)
    logged = [(entry.timestamp, entry.user_message) for entry in instance.all_logs(result.run_id)]
    progress = [(when, message) for when, message in logged if "not committed yet" in message]
    assert len(progress) >= 2
    assert progress[1][0] - progress[0][0] >= 0.9
    counts = [
        int(re.match(rf"Published (\d+) records .* to {topic!r} in \d+ s, ", message)[1]) for _, message in progress
    ]
    assert 0 < counts[0] < counts[1] < 24
    assert any(message.startswith(f"Published 24 records to {topic!r}, ") for _, message in logged)


@pytest.mark.kafka
def test_sends_after_a_publication_has_ended_are_refused(kafka, kafka_topic, instance):
    topic = kafka_topic()

    @dg.op
    def work(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("a")
        with pytest.raises(KafkaError, match="ended"):
            publication.send("b")

    assert _run_op(work, kafka, instance).success


@pytest.mark.kafka
def test_overlapping_runs_of_an_op_job_do_not_fence_each_other(kafka, kafka_topic, read):
    topic = kafka_topic()
    both = threading.Barrier(2, timeout=30)

    @dg.op
    def work(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("x")
            both.wait()

    @dg.job(resource_defs={"kafka": kafka})
    def job():
        work()

    def run():
        with dg.DagsterInstance.ephemeral() as instance:
            return job.execute_in_process(instance=instance).success

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run) for _ in range(2)]
        assert all(run.result(60) for run in runs)
    assert len(read(topic)) == 2


@pytest.mark.kafka
def test_a_session_is_for_once_and_its_misuse_is_no_cause_to_try_again(kafka, kafka_topic, read, instance):
    topic = kafka_topic()
    tries = []

    @dg.op
    def early(context: dg.OpExecutionContext, kafka: KafkaProducerResource) -> None:
        tries.append(1)
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("early")
            publication.materialize_result()

    assert not _run_op(early, kafka, instance, raise_on_error=False).success
    assert len(tries) == 1

    @dg.op
    def twice(context: dg.OpExecutionContext, kafka: KafkaProducerResource) -> None:
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("once")
        for misuse in (publication.__enter__, lambda: publication.send("late")):
            with pytest.raises(KafkaError) as caught:
                misuse()
            assert caught.value.remedy is Remedy.FAIL

    assert _run_op(twice, kafka, instance).success
    assert _values(read(topic)) == [b"once"]

    @dg.op
    def failed(context: dg.OpExecutionContext, kafka: KafkaProducerResource) -> None:
        with contextlib.suppress(ZeroDivisionError), kafka.publishing(context, topic=topic) as publication:
            raise ZeroDivisionError
        with pytest.raises(KafkaError, match="its with block has ended in an error"):
            publication.materialize_result()

    assert _run_op(failed, kafka, instance).success


@pytest.mark.kafka
def test_a_later_attempt_fences_the_one_before(kafka, kafka_topic, read):
    """What publishing() stands on: the same publisher's open transaction ends when the next one opens."""
    topic = kafka_topic()
    config = kafka.publication_config()

    def writer(publication_id):
        return PublicationWriter(config, transactional_id="fence-" + topic, publication_id=publication_id, topic=topic)

    with pytest.raises(KafkaError) as caught, writer("a") as first:
        first.send("first")
        with writer("a") as second:
            second.send("second")
        first.send("again")
    assert type(caught.value).__name__ == "FencedError"
    assert "another attempt" in str(caught.value)
    assert _values(read(topic)) == [b"second"]


def test_a_signal_handler_may_use_the_resource_while_its_producer_connects(monkeypatch):
    kafka, closed = KafkaProducerResource(), []

    class Connects:
        inherited = failed = False

        def __init__(self, _):
            if Connects in made:
                return
            made.append(Connects)
            kafka.flush()  # as a handler would, in the midst of it
            made.append(kafka.producer)

        def flush(self, _): ...

        def close(self):
            closed.append(self)

    made = []
    monkeypatch.setattr(resource_module, "DataForgeKafkaProducer", Connects)
    thread = threading.Thread(target=lambda: made.append(kafka.producer), daemon=True)
    thread.start()
    thread.join(30)
    assert made[1:] == [kafka.producer] * 2
    assert len(closed) == 1
    assert closed[0] is not kafka.producer


def test_threads_that_wait_for_a_connection_that_fails_fail_with_it(monkeypatch):
    kafka, tries, asked, lock = KafkaProducerResource(), [], threading.Semaphore(0), threading.RLock()

    def count(_):
        asked.release()
        return lock

    class Away:
        def __init__(self, _):
            tries.append(1)
            if len(tries) == 1:
                assert all(asked.acquire(timeout=30) for _ in range(4))
            raise NoBrokersAvailable("Kafka", "it is away", "Start it")

    monkeypatch.setattr(resource_module, "DataForgeKafkaProducer", Away)
    monkeypatch.setattr(KafkaProducerResource, "_lock", property(count))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        errors = [one.exception(60) for one in [pool.submit(lambda: kafka.producer) for _ in range(4)]]
    assert [str(error) for error in errors] == ["Kafka: it is away. Start it"] * 4
    assert len(set(errors)) == 4  # each with a traceback of its own
    assert len(tries) == 1
    with pytest.raises(NoBrokersAvailable):
        _ = kafka.producer
    assert len(tries) == 2


def test_a_process_that_is_forked_while_another_thread_connects_is_not_held_up():
    kafka = KafkaProducerResource()
    held, go = threading.Event(), threading.Event()

    def connect():
        with kafka._lock:
            held.set()
            go.wait(60)

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        assert held.wait(30)
        child = multiprocessing.get_context("fork").Process(target=kafka.flush)
        child.start()
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join(30)
        go.set()
        thread.join(30)


def test_a_raw_setting_may_be_an_environment_variable(monkeypatch):
    monkeypatch.setenv("LINGER", "7")
    with pytest.raises(ValidationError, match=r"'linger.ms': EnvVar.int\('LINGER'\).*Give EnvVar\('LINGER'\)"):
        KafkaProducerResource(librdkafka_config={"linger.ms": dg.EnvVar.int("LINGER")})
    resource = KafkaProducerResource(librdkafka_config={"linger.ms": dg.EnvVar("LINGER")})
    with resource.process_config_and_initialize_cm() as kafka:
        assert kafka.producer_config().librdkafka_config == {"linger.ms": "7"}


@pytest.mark.kafka
def test_a_forked_process_sends_by_a_producer_of_its_own_and_ends_well(kafka, kafka_topic, read):
    topic, fork = kafka_topic(), multiprocessing.get_context("fork")
    for _ in range(3):
        # The crash that this is about comes with the threads of a second producer.
        with DataForgeKafkaProducer(kafka.producer_config()) as other:
            other.send_async(topic, "other").result(30)
            kafka.send_sync(topic, "parent")
            child = fork.Process(target=kafka.send_sync, args=(topic, "child"))
            child.start()
            child.join(30)
            assert child.exitcode == 0
            kafka.producer.close()
    assert sorted(_values(read(topic))) == [b"child"] * 3 + [b"other"] * 3 + [b"parent"] * 3
