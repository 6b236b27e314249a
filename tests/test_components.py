import functools
import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import dagster as dg
import pytest
import yaml
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer
from conftest import mostly_slow
from dagster.components.core.package_entry import discover_entry_point_package_objects
from dagster.components.resolved.core_models import OpSpec
from jsonschema import Draft202012Validator
from pydantic import ValidationError

import dataforge_kafka_dagster
from dataforge_kafka_dagster import (
    KafkaIOManager,
    KafkaProducerResource,
    KafkaResourceComponent,
    KafkaSchema,
    KafkaTopicComponent,
    KafkaTopicSpec,
)
from dataforge_kafka_dagster.kafka.config import REGISTRY_SECRET_OPTIONS, SECRET_OPTIONS
from dataforge_kafka_dagster.kafka.errors import KafkaConfigError, KafkaError

ROOT = Path(__file__).parents[1]
CANARY = "canary-52be"
NUMBERS = [{"n": i, "name": f"N{i}"} for i in range(10)]


def numbers():
    yield from NUMBERS


def numbers_with_metadata():
    return dg.Output(iter(NUMBERS), metadata={"source": "a test"})


def numbers_as_result():
    return dg.MaterializeResult(value=iter(NUMBERS), metadata={"source": "a test"})


def day(context):
    return [{"day": context.partition_key, "asset": context.asset_key.to_user_string()}]


def _component(cls, text):
    return cls.from_attributes_dict(attributes=yaml.safe_load(text))


def _defs(*components):
    return dg.Definitions.merge(*(component.build_defs(None) for component in components))


def _said(cls, text):
    """What `dg check yaml` says: (path, message) of each error."""
    validator = Draft202012Validator(cls.get_model_cls().model_json_schema())
    return {(".".join(map(str, e.absolute_path)), e.message) for e in validator.iter_errors(yaml.safe_load(text))}


@pytest.mark.slow
def test_dg_finds_the_components_although_the_import_is_lazy(python):
    found = {key.name: thing for key, thing in discover_entry_point_package_objects().items() if "Kafka" in key.name}
    assert found == {"KafkaResourceComponent": KafkaResourceComponent, "KafkaTopicComponent": KafkaTopicComponent}
    assert (
        python("import sys, dataforge_kafka_dagster as d; print([m for m in sys.modules if m.endswith('.components')])")
        .strip()
        .count("dataforge")
        == 0
    )


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="KafkaTopicComponents"):
        dataforge_kafka_dagster.KafkaTopicComponents  # noqa: B018


def test_dagster_knows_the_library():
    from dagster_shared.libraries import DagsterLibraryRegistry

    assert DagsterLibraryRegistry.get()["dataforge-kafka-dagster"] == "0.1.0"


def test_the_resource_has_the_options_of_the_yaml(monkeypatch):
    monkeypatch.setenv("SERVERS_OF_TEST", "broker:9092")
    monkeypatch.setenv("RETRIES_OF_TEST", "7")
    component = _component(
        KafkaResourceComponent,
        """
        bootstrap_servers: {env: SERVERS_OF_TEST}
        retries: {env: RETRIES_OF_TEST}
        linger_ms: 7.5
        acks: all
        client_id: "01"
        librdkafka_config: {socket.timeout.ms: 1000, socket.keepalive.enable: true}
        resource_key: cluster
        io_manager_key: io_manager
        io_manager: {topic: "{name}", read_timeout: 5}
        """,
    )
    resources = _defs(component).resources
    assert set(resources) == {"cluster", "io_manager"}
    with resources["cluster"].process_config_and_initialize_cm() as kafka:
        config = kafka.producer_config()
    assert (config.servers, config.retries, config.linger_ms, config.client_id) == ("broker:9092", 7, 7.5, "01")
    assert config.librdkafka_config == {"socket.timeout.ms": "1000", "socket.keepalive.enable": "true"}
    manager = resources["io_manager"]
    assert isinstance(manager, KafkaIOManager)
    assert (manager.topic, manager.read_timeout) == ("{name}", 5)
    assert manager.kafka is resources["cluster"]


def test_every_option_of_the_resource_and_the_io_manager_is_there():
    fields = KafkaResourceComponent.get_model_cls().model_json_schema()
    assert set(fields["properties"]) == {
        *KafkaProducerResource.model_fields,
        "resource_key",
        "io_manager_key",
        "io_manager",
    }
    assert set(fields["$defs"]["_IOManagerAttributes"]["properties"]) == set(KafkaIOManager.model_fields) - {"kafka"}
    for name, info in KafkaProducerResource.model_fields.items():
        assert fields["properties"][name]["description"] == info.description
        assert fields["properties"][name]["default"] == info.get_default(call_default_factory=True)


def test_a_resource_without_an_io_manager():
    assert set(_defs(_component(KafkaResourceComponent, "io_manager_key: null")).resources) == {"kafka"}


def test_options_of_an_io_manager_that_is_not_made_are_refused():
    with pytest.raises(ValidationError, match="io_manager has options, but io_manager_key null makes no IO manager"):
        _component(KafkaResourceComponent, "{io_manager_key: null, io_manager: {topic: a}}")


def test_templates_are_filled_in(monkeypatch):
    monkeypatch.setenv("CLIENT_OF_TEST", "me")
    component = _component(KafkaResourceComponent, 'client_id: "{{ env.CLIENT_OF_TEST }}"')
    assert component.kafka.client_id == "me"


def test_a_template_of_a_number_is_text_where_settings_are_text(monkeypatch):
    monkeypatch.setenv("NUMBER_OF_TEST", "604800000")
    number = "{{ env.NUMBER_OF_TEST }}"
    kafka = KafkaResourceComponent.from_attributes_dict(
        attributes={
            "batch_size": "{{ env.NUMBER_OF_TEST }}",
            "schema_registry_url": "http://a:1",
            "schema_registry_client_config": {"cache.capacity": number},
            "librdkafka_config": {"connections.max.idle.ms": number, "client.rack": "01"},
            "create_topics": {"partitions": 2, "configs": {"retention.ms": number}},
        }
    ).kafka
    assert kafka.batch_size == 604800000
    assert kafka.schema_registry_client_config == {"cache.capacity": "604800000"}
    assert kafka.librdkafka_config == {"connections.max.idle.ms": "604800000", "client.rack": "01"}
    assert kafka.publication_config().create_topics == KafkaTopicSpec(
        partitions=2, configs={"retention.ms": "604800000"}
    )


def test_templates_of_a_topics_settings_are_filled_in_as_text(monkeypatch):
    monkeypatch.setenv("NUMBER_OF_TEST", "604800000")
    topic = KafkaTopicComponent.from_attributes_dict(
        attributes={
            "asset": {"key": "a"},
            "function": "test_components:day",
            "create_topic": {"configs": {"retention.ms": "{{ env.NUMBER_OF_TEST }}", "preallocate": "{{ 1 > 0 }}"}},
        }
    )
    (asset,) = _defs(topic).assets
    (spec,) = asset.specs
    assert spec.metadata["kafka/create_topic"] == {"configs": {"retention.ms": "604800000", "preallocate": "true"}}


BAD_RESOURCES = [
    ("compression_type: snapy", "compression_type", "'snapy' is not one of ['none', 'gzip', 'snappy', 'lz4', 'zstd']"),
    ("linger_ms: 9000000", "linger_ms", "9000000 is greater than the maximum of 900000"),
    ("batch_size: lots", "batch_size", "'lots' is not of type 'integer'"),
    ("acks: 2", "acks", "2 is not one of ['all', '-1', '0', '1', 0, 1]"),
    ("ackz: all", "", "Additional properties are not allowed ('ackz' was unexpected)"),
    ("client_id: {enw: X}", "client_id", "{'enw': 'X'} is not of type 'null', 'string'"),
    ("client_id: {env: X-Y}", "client_id.env", "'X-Y' does not match '^[A-Za-z_][A-Za-z0-9_]*$'"),
    ("linger_ms: {env: X}", "linger_ms", "{'env': 'X'} is not of type 'number'"),
    ("sasl_password: secret", "sasl_password", "{'env': 'NAME_OF_A_VARIABLE'} was expected"),
    ('sasl_password: "{{ env.PW }}"', "sasl_password", "{'env': 'NAME_OF_A_VARIABLE'} was expected"),
    (
        "librdkafka_config: {sasl.password: secret}",
        "librdkafka_config.sasl.password",
        "{'env': 'NAME_OF_A_VARIABLE'} was expected",
    ),
    (
        "schema_registry_client_config: {basic.auth.user.info: 'me:secret'}",
        "schema_registry_client_config.basic.auth.user.info",
        "{'env': 'NAME_OF_A_VARIABLE'} was expected",
    ),
    ("librdkafka_config: [1]", "librdkafka_config", "[1] is not of type 'object'"),
    (
        "create_topics: {replication_factor: x}",
        "create_topics.replication_factor",
        "'x' is not of type 'integer', 'null'",
    ),
    ("create_topics: {partitions: 0}", "create_topics.partitions", "0 is less than the minimum of 1"),
    ("io_manager: {read_timeout: soon}", "io_manager.read_timeout", "'soon' is not of type 'number'"),
]


@pytest.mark.parametrize(("text", "path", "message"), BAD_RESOURCES, ids=[text for text, _, _ in BAD_RESOURCES])
def test_bad_values_of_a_resource_are_refused_by_schema_and_by_loading(text, path, message):
    assert _said(KafkaResourceComponent, text) == {(path, message)}
    with pytest.raises(ValidationError) as refused:
        _component(KafkaResourceComponent, text)
    place = ".".join(path.split(".")[:1])
    assert place in ".".join(map(str, refused.value.errors()[0]["loc"]))


def test_options_that_do_not_go_together_are_refused_with_their_reason():
    with pytest.raises(ValidationError, match="security_protocol='SASL_SSL' needs sasl_mechanism"):
        _component(KafkaResourceComponent, "security_protocol: SASL_SSL")


BAD_TOPICS = [
    ("{asset: {key: a}}", "", "'one of path and function' was expected"),
    ("{asset: {key: a}, path: a.csv, function: 'a:b'}", "", "'one of path and function' was expected"),
    (
        "{asset: {key: a}, path: a.csv, create_topic: {replication_factor: x}}",
        "create_topic.replication_factor",
        "'x' is not of type 'integer', 'null'",
    ),
    ("{asset: {}, function: 'a:b'}", "asset", "'key' is a required property"),
    (
        "{asset: {key: a, grp: x}, function: 'a:b'}",
        "asset",
        "Additional properties are not allowed ('grp' was unexpected)",
    ),
    ("{asset: {key: a}, function: 'a:b', topic: a b}", "topic", "'a b' does not match '^[A-Za-z0-9._-]{1,249}$'"),
    ("{asset: {key: a}, function: 'a:b', key: 3}", "key", "3 is not of type 'string', 'array', 'null'"),
    (
        "{asset: {key: a}, function: 'a:b', write_mode: up}",
        "write_mode",
        "'up' is not one of ['append', 'upsert', None]",
    ),
    (
        "{asset: {key: a}, function: 'a:b', value_schema: 3}",
        "value_schema",
        "3 is not of type 'string', 'object', 'null'",
    ),
    (
        "{asset: {key: a}, function: 'a:b', key_schema: avvro}",
        "key_schema",
        "'avvro' does not match '^(avro|json_schema|protobuf|latest|.+\\\\.(avsc|json|proto))$'",
    ),
    (
        "{asset: {key: a}, function: 'a:b', value_schema: {format: thrift}}",
        "value_schema.format",
        "'thrift' is not one of ['avro', 'json_schema', 'protobuf']",
    ),
    ("{asset: {key: a}, function: 'a:b', op: {pool: 3}}", "op.pool", "3 is not valid under any of the given schemas"),
    (
        "{asset: {key: a}, function: 'a:b', op: {polo: a}}",
        "op",
        "Additional properties are not allowed ('polo' was unexpected)",
    ),
    ("{asset: {key: a}, function: a.b}", "function", "'a.b' does not match '^\\\\w+(\\\\.\\\\w+)*:\\\\w+$'"),
]


@pytest.mark.parametrize(("text", "path", "message"), BAD_TOPICS, ids=[text for text, _, _ in BAD_TOPICS])
def test_bad_values_of_a_topic_are_refused(text, path, message):
    assert _said(KafkaTopicComponent, text) == {(path, message)}


def test_either_a_file_or_a_function_gives_the_records():
    for text in ("{asset: {key: a}, path: null, function: 'a:b'}", "{asset: {key: a}, path: a.csv, function: null}"):
        assert _said(KafkaTopicComponent, text) == set()
        assert KafkaTopicComponent.get_model_cls().model_validate(yaml.safe_load(text))
    for text in ("{asset: {key: a}}", "{asset: {key: a}, path: a.csv, function: 'a:b'}"):
        with pytest.raises(ValidationError, match="give either path or function"):
            _component(KafkaTopicComponent, text)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("nowhere.to_be:found", "No module named 'nowhere'"),
        ("test_components:lost", "no attribute 'lost'"),
        ("test_components:NUMBERS", "it is of type list, no function"),
    ],
)
def test_a_function_that_does_not_exist_is_refused_when_loading(function, reason):
    with pytest.raises(KafkaConfigError, match=reason):
        _component(KafkaTopicComponent, f"{{asset: {{key: a}}, function: '{function}'}}")


def test_a_function_whose_arguments_are_not_known_is_refused():
    with pytest.raises(KafkaConfigError, match="Give a function of Python's that returns records"):
        _defs(_component(KafkaTopicComponent, "{asset: {key: a}, function: 'collections:OrderedDict'}"))


def test_a_template_inside_a_text_that_names_nothing_is_refused():
    with pytest.raises(Exception, match="'nobody' not found"):
        _component(KafkaTopicComponent, "{asset: {key: a}, function: 'test_components:day', topic: '{{ nobody }}a'}")


@pytest.mark.parametrize("text", ["{{ env.NAME_OF_TEST }}.flights", "day-{{ env.NAME_OF_TEST }}", "a{{ env.B }}c"])
def test_a_template_inside_a_text_that_gives_nothing_is_refused(text, monkeypatch):
    monkeypatch.delenv("NAME_OF_TEST", raising=False)
    monkeypatch.setenv("B_OF_TEST", "b")
    attributes = {"asset": {"key": "a"}, "function": "test_components:day", "topic": text}
    with pytest.raises(KafkaConfigError, match="it gives nothing"):
        _component(KafkaTopicComponent, json.dumps(attributes))
    attributes["topic"] = "{{ env.NAME_OF_TEST or 'dev' }}.{{ env.B_OF_TEST }}"
    assert _component(KafkaTopicComponent, json.dumps(attributes)).topic == "dev.b"


@pytest.mark.parametrize("attribute", ["topic", "key", "value_schema", "path", "function"])
def test_a_template_that_gives_nothing_does_not_stand_for_the_default(attribute, monkeypatch):
    monkeypatch.delenv("NAME_OF_TEST", raising=False)
    attributes = {"asset": {"key": "a"}, "function": "test_components:day"} | {attribute: "{{ env.NAME_OF_TEST }}"}
    if attribute == "path":
        del attributes["function"]
    with pytest.raises(KafkaConfigError, match="template '{{ env.NAME_OF_TEST }}': it gives nothing"):
        KafkaTopicComponent.from_attributes_dict(attributes=attributes)


def test_without_attributes_a_cluster_has_the_defaults_and_a_topic_says_what_is_missing():
    # Dagster 1.11 has no tree.
    tree = getattr(dg, "ComponentTree", None)
    context = tree.for_test().load_context if tree else dg.ComponentLoadContext.for_test()
    assert KafkaResourceComponent.load(None, context).kafka.bootstrap_servers == "localhost:9092"
    with pytest.raises(ValidationError, match="asset"):
        KafkaTopicComponent.load(None, context)


@pytest.mark.parametrize("form", mostly_slow(["avro", "json_schema", "protobuf"]))
def test_a_format_in_yaml_is_the_schema_that_is_asked_for(form, closed_port):
    component = _component(
        KafkaTopicComponent, f"{{asset: {{key: a}}, function: 'test_components:numbers', value_schema: {form}}}"
    )
    (asset,) = _defs(component).assets
    assert KafkaSchema.parse(next(iter(asset.specs)).metadata["kafka/value_schema"]) == KafkaSchema(format=form)
    manager = KafkaIOManager(kafka=KafkaProducerResource(bootstrap_servers=closed_port))
    with dg.DagsterInstance.ephemeral() as instance:
        options = {"resources": {"kafka_io": manager}, "instance": instance, "raise_on_error": False}
        failure = dg.materialize([asset], **options).failure_data_for_node("a").user_failure_data
    assert "there is no Schema Registry to keep it" in failure.description


def test_no_secret_in_snapshot_or_repr(monkeypatch):
    from dagster._core.remote_representation.external_data import RepositorySnap

    monkeypatch.setenv("SECRET_OF_TEST", CANARY)
    component = _component(
        KafkaResourceComponent,
        """
        security_protocol: SASL_SSL
        sasl_mechanism: PLAIN
        sasl_username: me
        sasl_password: {env: SECRET_OF_TEST}
        librdkafka_config: {sasl.jaas.config: {env: SECRET_OF_TEST}}
        """,
    )
    snapshot = dg.serialize_value(RepositorySnap.from_def(_defs(component).get_repository_def()))
    assert "SECRET_OF_TEST" in snapshot
    assert CANARY not in snapshot + repr(component)
    with component.kafka.process_config_and_initialize_cm() as kafka:
        assert kafka.sasl_password == kafka.librdkafka_config["sasl.jaas.config"] == CANARY


def test_every_secret_of_the_resource_takes_an_environment_variable_only():
    for name in (*SECRET_OPTIONS, *REGISTRY_SECRET_OPTIONS):
        assert _said(KafkaResourceComponent, f"{{{name}: text}}"), name
        assert not _said(KafkaResourceComponent, f"{{{name}: {{env: NAME}}}}"), name


def test_the_asset_is_as_its_attributes_say():
    component = _component(
        KafkaTopicComponent,
        """
        asset:
          key: ops/flights
          partitions_def: {type: daily, start_date: "2026-01-01"}
          group_name: ops
          owners: ["team:ops"]
          kinds: [polars]
          tags: {tier: gold}
          deps: [raw/flights]
          metadata: {note: hello, dagster/uri: elsewhere}
          automation_condition: "{{ automation_condition.eager() }}"
        topic: flights
        key: [carrier, flight]
        create_topic: {partitions: 6}
        function: test_components:day
        io_manager_key: out
        op:
          name: publish_flights
          pool: cluster
          tags: {team: ops}
          backfill_policy: {type: multi_run, max_partitions_per_run: 31}
        """,
    )
    (asset,) = _defs(component).assets
    assert asset.backfill_policy == dg.BackfillPolicy.multi_run(31)
    assert (asset.op.name, asset.op.pool, asset.op.tags["team"]) == ("publish_flights", "cluster", "ops")
    (spec,) = asset.specs
    assert spec.key == dg.AssetKey(["ops", "flights"])
    assert spec.partitions_def == dg.DailyPartitionsDefinition("2026-01-01")
    assert (spec.group_name, spec.owners, spec.kinds) == ("ops", ["team:ops"], {"kafka", "polars"})
    assert spec.tags["tier"] == "gold"
    assert [dep.asset_key.to_user_string() for dep in spec.deps] == ["raw/flights"]
    assert spec.automation_condition == dg.AutomationCondition.eager()
    assert {
        name: spec.metadata[name] for name in ("kafka/topic", "kafka/key", "kafka/create_topic", "note", "dagster/uri")
    } == {
        "kafka/create_topic": {"partitions": 6},
        "kafka/topic": "flights",
        "kafka/key": ["carrier", "flight"],
        "note": "hello",
        "dagster/uri": "elsewhere",
    }
    assert asset.required_resource_keys == {"out"}


@pytest.mark.kafka
def test_ten_lines_of_yaml_publish(kafka_bootstrap_servers, kafka_topic, read, instance, monkeypatch):
    topic = kafka_topic()
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka_bootstrap_servers)
    defs = _defs(
        _component(KafkaResourceComponent, "bootstrap_servers: {env: KAFKA_BOOTSTRAP_SERVERS}"),
        _component(
            KafkaTopicComponent,
            f"{{asset: {{key: numbers}}, topic: {topic}, key: name, function: 'test_components:numbers'}}",
        ),
        _component(
            KafkaTopicComponent,
            f"""
            asset: {{key: a/day, partitions_def: {{type: static, partition_keys: [mon, tue]}}}}
            topic: {topic}
            function: test_components:day
            """,
        ),
    )
    assert dg.materialize(defs.assets, resources=defs.resources, instance=instance, partition_key="tue").success
    found = read(topic)
    assert [(r.key, json.loads(r.value)) for r in found if r.key] == [(f"N{i}".encode(), NUMBERS[i]) for i in range(10)]
    assert [json.loads(r.value) for r in found if not r.key] == [{"day": "tue", "asset": "a/day"}]
    for name in ("numbers_with_metadata", "numbers_as_result"):
        text = f"{{asset: {{key: more}}, topic: {topic}, function: 'test_components:{name}'}}"
        (asset,) = _component(KafkaTopicComponent, text).build_defs(None).assets
        result = dg.materialize([asset], resources=defs.resources, instance=instance)
        said = result.asset_materializations_for_node("more")[0].metadata
        assert (said["source"].value, said["kafka/records"].value) == ("a test", len(NUMBERS))


@pytest.mark.kafka
def test_a_file_beside_the_yaml_is_published(kafka_bootstrap_servers, kafka_topic, read, instance, tmp_path):
    topic = kafka_topic()
    for partition, rows in {"mon": "1,a\n2,b\n", "tue": "4,c\n", "wed": "5,d\n6,e\n"}.items():
        (tmp_path / partition).mkdir()
        (tmp_path / partition / "rows.csv").write_text(f"n,name\n{rows}")
    (tmp_path / "rows.ndjson").write_text('{"n": 3}\n')
    context = type("Context", (), {"path": tmp_path})()
    assets = []
    for name, text in {
        "days": 'path: "{partition_key}/rows.csv"',
        "whole": "path: rows.ndjson",
    }.items():
        partitions = ", partitions_def: {type: static, partition_keys: [mon, tue, wed]}" if name == "days" else ""
        component = _component(KafkaTopicComponent, f"{{asset: {{key: {name}{partitions}}}, topic: {topic}, {text}}}")
        assets += component.build_defs(context).assets
    manager = KafkaIOManager(kafka=KafkaProducerResource(bootstrap_servers=kafka_bootstrap_servers))
    assert dg.materialize(assets, resources={"kafka_io": manager}, instance=instance, partition_key="mon").success
    expected = [b'{"n":1,"name":"a"}', b'{"n":2,"name":"b"}', b'{"n":3}']
    assert sorted(record.value for record in read(topic)) == expected

    tags = {"dagster/asset_partition_range_start": "tue", "dagster/asset_partition_range_end": "wed"}
    both = dg.materialize(assets[:1], resources={"kafka_io": manager}, instance=instance, tags=tags)
    said = {
        event.partition: event.metadata["kafka/records"].value for event in both.asset_materializations_for_node("days")
    }
    assert said == {"tue": 1, "wed": 2}
    expected += [b'{"n":4,"name":"c"}', b'{"n":5,"name":"d"}', b'{"n":6,"name":"e"}']
    assert sorted(record.value for record in read(topic)) == expected


@pytest.mark.parametrize(
    ("path", "key", "found"),
    mostly_slow(
        [
            ("{partition_key}.csv", "../mon", None),
            ("{partition_key}.csv", "eu/mon", "eu/mon.csv"),
            ("../days/{partition_key}.csv", "mon", "../days/mon.csv"),
            ("{partition_key}", "/etc/mon", "etc/mon"),
            ("days/{partition_key}/rows.csv", "..", None),
            ("days/{partition_key}/rows.csv", "a/../../mon", None),
            (".{partition_key}/rows.csv", ".", None),
        ],
        fast=2,
    ),
)
def test_a_partition_key_cannot_lead_out_of_the_folder_of_the_path(path, key, found, tmp_path, instance):
    given = []

    class Taker(dg.IOManager):
        def handle_output(self, context, obj):
            given.append(obj)

        def load_input(self, context): ...

    text = f'{{asset: {{key: rows, partitions_def: {{type: static, partition_keys: ["{key}"]}}}}, path: "{path}"}}'
    assets = _component(KafkaTopicComponent, text).build_defs(type("Context", (), {"path": tmp_path})()).assets
    result = dg.materialize(
        assets, resources={"kafka_io": Taker()}, instance=instance, partition_key=key, raise_on_error=False
    )
    if found is None:
        (event,) = result.get_step_failure_events()
        failure = event.step_failure_data.user_failure_data
        assert failure.metadata["kafka/cause"].value == "the key would leave the folder that the path names"
        assert given == []
    else:
        assert given == [{key: tmp_path / found}]


@pytest.mark.kafka
def test_schemas_and_upserts_are_attributes_too(
    kafka_bootstrap_servers, schema_registry_url, kafka_topic, read, tmp_path
):
    topic = kafka_topic()
    fields = [{"name": name, "type": "string"} for name in ("code", "name")]
    (tmp_path / "place.avsc").write_text(json.dumps({"type": "record", "name": "Place", "fields": fields}))
    (tmp_path / "places.csv").write_text("code,name\nJFK,Kennedy\nLGA,La Guardia\n")
    cluster = _component(
        KafkaResourceComponent,
        f"{{bootstrap_servers: '{kafka_bootstrap_servers}', schema_registry_url: '{schema_registry_url}'}}",
    )
    text = f"""
        asset: {{key: places}}
        topic: {topic}
        key: code
        value_schema: place.avsc
        key_schema: {{text: {{type: string}}}}
        write_mode: upsert
        path: places.csv
    """
    context = type("Context", (), {"path": tmp_path})()
    assets = _component(KafkaTopicComponent, text).build_defs(context).assets
    with dg.DagsterInstance.ephemeral() as instance:
        resources = cluster.build_defs(context).resources
        assert dg.materialize(assets, resources=resources, instance=instance).success
        (tmp_path / "places.csv").write_text("code,name\nJFK,Kennedy\n")
        result = dg.materialize(assets, resources=resources, instance=instance)
    said = result.asset_materializations_for_node("places")[0].metadata
    assert said["kafka/tombstones"].value == 1
    assert (said["kafka/value_format"].value, said["kafka/key_format"].value) == ("avro", "avro")
    decode = AvroDeserializer(SchemaRegistryClient({"url": schema_registry_url}))
    table = {decode(record.key, None): record.value and decode(record.value, None) for record in read(topic)}
    assert table == {"JFK": {"code": "JFK", "name": "Kennedy"}, "LGA": None}


def test_a_schema_whose_options_do_not_go_together_is_refused_with_its_reason():
    text = "{asset: {key: a}, function: 'test_components:day', value_schema: {text: '{}', file: a.avsc}}"
    with pytest.raises(ValidationError, match="text and file name the same thing"):
        _component(KafkaTopicComponent, text)


def _run(*command, cwd, **env):
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ | env, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def project(tmp_path):
    """A project as create-dagster makes it, without an environment of its own."""
    (tmp_path / "pyproject.toml").write_text(
        textwrap.dedent("""\
        [project]
        name = "proj"
        version = "0.1.0"

        [tool.dg]
        directory_type = "project"

        [tool.dg.project]
        root_module = "proj"
        """)
    )
    defs = tmp_path / "src" / "proj" / "defs"
    defs.mkdir(parents=True)
    (defs.parent / "__init__.py").touch()
    (defs / "__init__.py").touch()
    return tmp_path


@pytest.mark.slow
def test_dg_scaffolds_what_dg_check_yaml_accepts_and_refuses_what_is_bad(project):
    dg_command = str(Path(sys.executable).with_name("dg"))
    for name in ("KafkaResourceComponent", "KafkaTopicComponent"):
        code, out = _run(dg_command, "scaffold", "defs", f"dataforge_kafka_dagster.{name}", name.lower(), cwd=project)
        assert code == 0, out
    file = project / "src" / "proj" / "defs" / "kafkaresourcecomponent" / "defs.yaml"
    assert "\n  # create_topics: {partitions: 6}" in file.read_text()
    for text in (file.read_text(), file.read_text().replace("# create_topics", "create_topics")):
        file.write_text(text)
        code, out = _run(dg_command, "check", "yaml", cwd=project)
        assert code == 0, out
    file.write_text(file.read_text() + "  compression_type: snapy\n")
    code, out = _run(dg_command, "check", "yaml", cwd=project)
    assert code == 1
    line = file.read_text().splitlines().index("  compression_type: snapy") + 1
    assert f"defs.yaml:{line} - " in out
    assert "'snapy' is not one of ['none', 'gzip', 'snappy', 'lz4', 'zstd']" in out


@pytest.mark.faults
def test_a_project_made_with_create_dagster_publishes_with_the_built_wheel(
    kafka_bootstrap_servers, kafka_topic, read, tmp_path
):
    """The whole way of a new user: packages from the registry, the wheel, ten lines of YAML, `dg launch`."""
    topic, uv, dist = kafka_topic(), str(Path(sys.executable).with_name("uv")), tmp_path / "dist"
    assert _run(uv, "build", "--wheel", "--out-dir", str(dist), cwd=ROOT)[0] == 0
    (wheel,) = dist.glob("*.whl")
    assert _run(uv, "venv", "--python", sys.executable, str(tmp_path / "env"), cwd=tmp_path)[0] == 0
    binaries = tmp_path / "env" / "bin"
    packages = [str(wheel), *(f"{name}=={dg.__version__}" for name in ("dagster", "dagster-dg-cli", "create-dagster"))]
    code, out = _run(uv, "pip", "install", "--python", str(binaries / "python"), *packages, cwd=tmp_path)
    assert code == 0, out
    code, out = _run(str(binaries / "create-dagster"), "project", "proj", "--no-uv-sync", cwd=tmp_path)
    assert code == 0, out
    project, home = tmp_path / "proj", tmp_path / "home"
    home.mkdir()
    code, out = _run(uv, "pip", "install", "--python", str(binaries / "python"), "--no-deps", "-e", ".", cwd=project)
    assert code == 0, out
    (project / "src" / "proj" / "rows.py").write_text("def flights():\n    return ({'n': i} for i in range(100))\n")
    (project / "src" / "proj" / "defs" / "cluster").mkdir()
    (project / "src" / "proj" / "defs" / "cluster" / "defs.yaml").write_text(
        textwrap.dedent("""\
        type: dataforge_kafka_dagster.KafkaResourceComponent
        attributes:
          bootstrap_servers: {env: KAFKA_BOOTSTRAP_SERVERS}
        """)
    )
    (project / "src" / "proj" / "defs" / "flights").mkdir()
    (project / "src" / "proj" / "defs" / "flights" / "defs.yaml").write_text(
        textwrap.dedent(f"""\
        type: dataforge_kafka_dagster.KafkaTopicComponent
        attributes:
          asset: {{key: flights}}
          topic: {topic}
          key: n
          function: proj.rows:flights
        """)
    )
    environment = {
        "KAFKA_BOOTSTRAP_SERVERS": kafka_bootstrap_servers,
        "DAGSTER_HOME": str(home),
        "VIRTUAL_ENV": str(tmp_path / "env"),
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
    }
    for command in (["list", "components"], ["check", "yaml"], ["check", "defs"], ["launch", "--assets", "*"]):
        code, out = _run(str(binaries / "dg"), *command, cwd=project, **environment)
        assert code == 0, out
    assert sorted(json.loads(record.value)["n"] for record in read(topic)) == list(range(100))


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ("path: 'x-{partition_key}.ndjson'", "no Dagster partitions.*partitions_def"),
        ("path: 'x_{partition_key}.xyz'", "path='x_{partition_key}.xyz': its name does not say what is in it"),
        ("path: x.txt", "'x.txt': its name does not say what is in it"),
        ("path: x.parquet.gz", "its name does not say"),
        ("path: ''", "its name does not say"),
        ("{path: x.csv, key: [a, a]}", "names a field more than once"),
        (
            "{function: 'test_components:numbers', topic: a, asset: {key: a, metadata: {kafka/topic: b}}}",
            "kafka/topic='b' in the asset's metadata: the component gives it too, 'a'",
        ),
    ],
)
def test_what_could_only_fail_in_a_run_is_refused_when_the_asset_is_loaded(attributes, said):
    attributes = {"asset": {"key": "a"}} | yaml.safe_load(attributes)
    component = KafkaTopicComponent.from_attributes_dict(attributes=attributes)
    with pytest.raises(KafkaError, match=said):
        component.build_defs(None)


def _annotated(ctx: dg.AssetExecutionContext | None = None):
    return [ctx]


@pytest.mark.parametrize(
    ("function", "gets"),
    [
        (lambda: [1], [1]),
        (lambda ctx: [ctx], ["context"]),
        (lambda context=None: [context], ["context"]),
        (lambda context, n=3: [context, n], ["context", 3]),
        (lambda n=3: [n], [3]),
        (lambda *, n=3: [n], [3]),
        (functools.partial(lambda context, n: [context, n], n=3), ["context", 3]),
        (lambda *any_: list(any_), ["context"]),
        (lambda *, context=1: [context], [1]),
        (lambda **options: [len(options)], [0]),
        (functools.partial(lambda context, n: [context, n], context=1, n=2), [1, 2]),
        (_annotated, ["context"]),
    ],
)
def test_a_function_gets_the_context_if_it_asks_for_it(function, gets):
    (asset,) = KafkaTopicComponent(dg.AssetSpec("a"), function).build_defs(None).assets
    (output,) = asset(dg.build_asset_context())
    assert [one if isinstance(one, int) else "context" for one in output.value] == gets


def test_an_async_function_is_refused():
    async def rows():
        return []

    for function in (rows, functools.partial(rows)):
        with pytest.raises(KafkaConfigError, match="rows.*it is async, and would return a coroutine"):
            KafkaTopicComponent(dg.AssetSpec("a"), function).build_defs(None)


@pytest.mark.parametrize("function", [lambda context, other: [], lambda *, context: [], lambda n=3, *, m: []])
def test_a_function_that_takes_more_than_the_context_is_refused(function):
    with pytest.raises(KafkaConfigError, match="function '<lambda>'.*argument.*take the context or nothing"):
        KafkaTopicComponent(dg.AssetSpec("a"), function).build_defs(None)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"topic": "a b"}, "topic 'a b'"), ({"write_mode": "upsrt"}, "write_mode='upsrt': there is no such mode")],
)
def test_a_component_made_in_python_is_checked_when_it_is_built(options, said):
    with pytest.raises(KafkaConfigError, match=said):
        KafkaTopicComponent(dg.AssetSpec("a"), numbers, **options).build_defs(None)


@pytest.mark.parametrize(
    ("given", "attributes"),
    [
        ({"source": Path("a.csv")}, {"source": "a.csv"}),
        ({"create_topic": {"partitions": 3}}, {"create_topic": KafkaTopicSpec(partitions=3)}),
        ({"value_schema": "avro"}, {"value_schema": KafkaSchema(format="avro")}),
        ({"value_schema": {"format": "protobuf"}}, {"value_schema": KafkaSchema(format="protobuf")}),
        ({"key_schema": Path("a.avsc")}, {"key_schema": KafkaSchema(file="a.avsc")}),
        ({"op": {"pool": "x"}}, {"op": OpSpec(pool="x")}),
        ({"op": None}, {"op": OpSpec()}),
        ({"asset": "flights"}, {"asset": dg.AssetSpec("flights")}),
        ({"asset": dg.AssetKey(["a", "b"])}, {"asset": dg.AssetSpec(dg.AssetKey(["a", "b"]))}),
    ],
    ids=lambda named: next(iter(named)),
)
def test_a_topic_made_in_python_takes_what_stands_for_an_attribute(given, attributes):
    component = KafkaTopicComponent(**{"asset": dg.AssetSpec("a"), "source": numbers} | given)
    assert {name: getattr(component, name) for name in attributes} == attributes
    assert component.build_defs(types.SimpleNamespace(path=Path())).assets


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"asset": {"key": "a"}}, "asset: it is of type dict. Give a dagster.AssetSpec"),
        ({"source": None}, "source: it is of type NoneType. Give a function"),
        ({"source": [{"n": 1}]}, "source: it is of type list. Give a function"),
        ({"create_topic": 3}, "create_topic: it is of type int. Give a KafkaTopicSpec"),
        ({"create_topic": {"partitions": 0}}, "create_topic: partitions: Input should be greater than or equal to 1"),
        ({"value_schema": 3}, "value_schema: it is of type int. Give a KafkaSchema"),
        ({"key_schema": "avvro"}, "schema 'avvro': it names no schema"),
        ({"op": "x"}, "op: it is of type str. Give an OpSpec"),
        ({"op": {"polo": "x"}}, "op: polo: Extra inputs are not permitted"),
    ],
    ids=repr,
)
def test_a_topic_made_in_python_refuses_an_attribute_of_another_type(given, said):
    with pytest.raises(KafkaConfigError, match=said):
        KafkaTopicComponent(**{"asset": dg.AssetSpec("a"), "source": numbers} | given)


def test_a_cluster_made_in_python_takes_mappings_of_options_and_needs_no_io_manager():
    assert set(_defs(KafkaResourceComponent(KafkaProducerResource())).resources) == {"kafka"}
    component = KafkaResourceComponent({"bootstrap_servers": "broker:9092"}, {"topic": "{name}"})
    assert component.kafka.bootstrap_servers == "broker:9092"
    assert (component.io_manager.kafka, component.io_manager.topic) == (component.kafka, "{name}")


def test_a_cluster_made_in_python_may_be_configured_at_launch():
    late = KafkaProducerResource.configure_at_launch()
    manager = KafkaIOManager.configure_at_launch(kafka=late)
    assert _defs(KafkaResourceComponent(late, manager)).resources == {"kafka": late, "kafka_io": manager}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["broker:9092"], "kafka of the KafkaResourceComponent: it is a str. Give kafka=KafkaProducerResource"),
        ([None], "kafka of the KafkaResourceComponent: it is missing"),
        ([{"bootstrap_server": "x"}], "kafka: unknown option 'bootstrap_server': did you mean 'bootstrap_servers'"),
        ([{}, "io"], "io_manager: it is of type str. Give io_manager=KafkaIOManager"),
        ([{}, {"topics": "x"}], "io_manager: unknown option 'topics': did you mean 'topic'?"),
    ],
    ids=repr,
)
def test_a_cluster_made_in_python_refuses_what_is_none(given, said):
    with pytest.raises(KafkaConfigError, match=said):
        KafkaResourceComponent(*given)


@pytest.mark.parametrize("path", ["{partition_key}", "x-{partition_key}.ndjson", "x.{partition_key}.gz", "X.CSV.GZ"])
def test_a_path_may_get_its_end_from_the_partition_key(path):
    partitions = {"type": "static", "partition_keys": ["a.csv"]}
    component = KafkaTopicComponent.from_attributes_dict(
        attributes={"asset": {"key": "a", "partitions_def": partitions}, "path": path}
    )
    assert component.build_defs(types.SimpleNamespace(path=Path())).assets


def test_the_name_of_an_op_tells_assets_apart_whose_keys_give_one_name():
    def names(op):
        texts = ["{asset: {key: a/b}, function: 'test_components:numbers'}"]
        texts.append(f"{{asset: {{key: a__b}}, function: 'test_components:numbers', op: {op}}}")
        defs = _defs(KafkaResourceComponent({}, {}), *(_component(KafkaTopicComponent, text) for text in texts))
        return {node.name for node in defs.resolve_implicit_global_asset_job_def().nodes}

    with pytest.raises(dg.DagsterInvalidDefinitionError, match="conflicting node definitions"):
        names("{}")
    assert names("{name: another}") == {"a__b", "another"}


def test_resource_and_io_manager_need_two_names():
    component = _component(KafkaResourceComponent, "{resource_key: x, io_manager_key: x}")
    with pytest.raises(KafkaConfigError, match="resource_key='x': it is the io_manager_key too"):
        _defs(component)
    assert set(_defs(_component(KafkaResourceComponent, "{resource_key: x, io_manager_key: null}")).resources) == {"x"}


@pytest.mark.parametrize("options", ["topic: '{assetkey}'", "key: 'a,a'", "write_mode: up", "value_schema: zzz"])
def test_wrong_options_of_the_io_manager_are_refused_when_it_is_loaded(options):
    with pytest.raises(ValidationError, match=options.partition(":")[0].removeprefix("value_")):
        KafkaResourceComponent.from_attributes_dict(attributes={"io_manager": yaml.safe_load(options)})
