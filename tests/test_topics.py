"""The look at a topic before a publication, and its creation where that is asked for."""

import concurrent.futures
import contextlib
import json
import threading
import types
import uuid

import confluent_kafka
import dagster as dg
import pytest
from confluent_kafka.admin import AdminClient, ConfigResource
from conftest import Clock, make_anew, mostly_slow
from pydantic import ValidationError

from dataforge_kafka_dagster import (
    DataForgeKafkaProducer,
    KafkaError,
    KafkaIOManager,
    KafkaProducerConfig,
    KafkaProducerResource,
    KafkaRecord,
    KafkaTopicSpec,
    local,
    pytest_plugin,
)
from dataforge_kafka_dagster.kafka import publication, topics
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.errors import Remedy
from dataforge_kafka_dagster.kafka.publication import PublicationWriter, publish
from dataforge_kafka_dagster.kafka.topics import (
    ask_end_offsets,
    check_topic_exists,
    current,
    end_offsets,
    look_at_topic,
)
from dataforge_kafka_dagster.local import LocalKafka


def _topics(servers):
    return AdminClient({"bootstrap.servers": servers}).list_topics(timeout=30).topics


def _settings(servers, topic):
    asked = ConfigResource(ConfigResource.Type.TOPIC, topic)
    admin = AdminClient({"bootstrap.servers": servers})  # in a variable: it gives up its calls when it is collected
    return {name: entry.value for name, entry in admin.describe_configs([asked])[asked].result(30).items()}


def _writer(servers, topic, spec=None, *, reports=True, **options):
    name = f"topics-{uuid.uuid4().hex}"
    config = PublicationConfig(producer=KafkaProducerConfig(bootstrap_servers=servers, connect_timeout=30, **options))
    return PublicationWriter(
        config, transactional_id=name, publication_id=name, topic=topic, create_topic=spec, reports=reports
    )


WRONG = [
    {"partitions": 0},
    {"replication_factor": 0},
    {"partitions": "many"},
    {"configs": {"a": None}},
    {"partition": 6},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_wrong_specs_are_refused_at_definition(options):
    for door in (lambda: KafkaTopicSpec(**options), lambda: KafkaProducerResource(create_topics=options)):
        with pytest.raises(ValidationError, match=next(iter(options))):
            door()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("partition", "did you mean 'partitions'?"),
        ("retention.ms", "the options are partitions, replication_factor, configs."),
    ],
)
def test_a_misspelt_field_of_a_spec_is_told_what_is_meant(name, hint):
    for door in (lambda: KafkaTopicSpec(**{name: 3}), lambda: KafkaProducerResource(create_topics={name: 3})):
        with pytest.raises(ValidationError) as caught:
            door()
        assert f"unknown option {name!r}: {hint}" in str(caught.value)


def test_settings_may_be_numbers_and_booleans():
    given = {"retention.ms": 604800000, "preallocate": True, "cleanup.policy": "compact"}
    texts = {"retention.ms": "604800000", "preallocate": "true", "cleanup.policy": "compact"}
    assert KafkaTopicSpec(configs=given).configs == texts
    with KafkaProducerResource(create_topics={"configs": given}).process_config_and_initialize_cm() as kafka:
        assert kafka.publication_config().create_topics == KafkaTopicSpec(configs=texts)


def test_env_vars_are_resolved_from_a_mapping_and_refused_in_a_spec(monkeypatch):
    monkeypatch.setenv("RETENTION_OF_TEST", "604800000")
    monkeypatch.setenv("COUNT_OF_TEST", "3")
    count, configs = dg.EnvVar.int("COUNT_OF_TEST"), {"retention.ms": dg.EnvVar("RETENTION_OF_TEST")}
    given = {"partitions": count, "replication_factor": count, "configs": configs}
    with KafkaProducerResource(create_topics=given).process_config_and_initialize_cm() as kafka:
        found = kafka.publication_config().create_topics
    assert found == KafkaTopicSpec(partitions=3, replication_factor=3, configs={"retention.ms": "604800000"})
    for name, said in (
        ("partitions", r"partitions=EnvVar\('COUNT_OF_TEST'\)"),
        ("replication_factor", r"replication_factor=EnvVar\('COUNT_OF_TEST'\)"),
        ("configs", r"configs\['retention.ms'\]=EnvVar\('RETENTION_OF_TEST'\)"),
    ):
        with pytest.raises(ValidationError, match=f"{said}.* not be looked up.* create_topics as a mapping"):
            KafkaTopicSpec(**{name: given[name]})


def test_what_an_env_var_of_a_spec_holds_is_checked_when_the_run_starts(monkeypatch):
    monkeypatch.setenv("COUNT_OF_TEST", "0")
    given = {"partitions": dg.EnvVar.int("COUNT_OF_TEST")}
    with (
        pytest.raises(Exception, match=r"create_topics.partitions\n.*greater than or equal to 1") as raised,
        KafkaProducerResource(create_topics=given).process_config_and_initialize_cm(),
    ):
        pass
    assert isinstance(raised.value, ValidationError)


@pytest.mark.parametrize("options", mostly_slow([*WRONG, "six"]), ids=str)
def test_wrong_specs_in_metadata_fail_the_step(options, closed_port, instance):
    @dg.asset(metadata={"kafka/topic": "t", "kafka/create_topic": options})
    def made():
        return [{"a": 1}]

    manager = KafkaIOManager(kafka=KafkaProducerResource(bootstrap_servers=closed_port))
    result = dg.materialize([made], resources={"io_manager": manager}, instance=instance, raise_on_error=False)
    (failure,) = result.get_step_failure_events()
    said = failure.step_failure_data.user_failure_data
    assert "kafka/create_topic" in said.description
    assert ("unknown option 'partition': did you mean 'partitions'?" in said.description) == ("partition" in options)
    assert "partitions, replication_factor, configs" in said.description


@pytest.mark.parametrize(
    "spec", mostly_slow([KafkaTopicSpec(partitions=3, configs={"a": "b"}), {"partitions": 3, "configs": {"a": "b"}}])
)
def test_the_spec_of_the_resource_reaches_publications(spec, instance):
    seen = []

    @dg.op
    def look(kafka: KafkaProducerResource):
        seen.append(kafka.publication_config().create_topics)

    @dg.job(resource_defs={"kafka": KafkaProducerResource(create_topics=spec)})
    def work():
        look()

    assert work.execute_in_process(instance=instance).success
    assert seen == [KafkaTopicSpec(partitions=3, configs={"a": "b"})]
    assert type(seen[0]) is KafkaTopicSpec


@pytest.mark.kafka
def test_a_missing_topic_is_refused_with_the_command_that_creates_it(kafka_bootstrap_servers, new_topic):
    with pytest.raises(KafkaError) as caught, _writer(kafka_bootstrap_servers, new_topic):
        pass
    assert caught.value.code == "UNKNOWN_TOPIC_OR_PART"
    assert f"--bootstrap-server {kafka_bootstrap_servers} --create --topic {new_topic}" in caught.value.fix
    assert "create_topics=KafkaTopicSpec(partitions=6), in YAML create_topics: {partitions: 6}," in caught.value.fix
    assert "KafkaTopicSpec" in caught.value.fix
    assert new_topic not in _topics(kafka_bootstrap_servers)


@pytest.mark.kafka
@pytest.mark.parametrize("where", ["resource", "metadata", "publishing"])
def test_a_missing_topic_is_created_where_the_user_asks_for_it(
    where, kafka_bootstrap_servers, new_topic, read, instance
):
    spec = KafkaTopicSpec(partitions=4, replication_factor=1, configs={"retention.ms": "86400000"})
    other = KafkaTopicSpec(partitions=2)
    kafka = KafkaProducerResource(
        bootstrap_servers=kafka_bootstrap_servers, create_topics=spec if where == "resource" else other
    )

    @dg.asset(metadata={"kafka/topic": new_topic} | ({"kafka/create_topic": dict(spec)} if where == "metadata" else {}))
    def made():
        return [{"i": i} for i in range(20)]

    @dg.asset(io_manager_key="none")
    def sent(context: dg.AssetExecutionContext, kafka: KafkaProducerResource) -> None:
        with kafka.publishing(context, topic=new_topic, create_topic=spec) as publication:
            publication.send_all({"i": i} for i in range(20))

    resources = {"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka), "none": dg.mem_io_manager}
    asset = sent if where == "publishing" else made
    assert dg.materialize([asset], resources=resources, instance=instance).success
    assert len(_topics(kafka_bootstrap_servers)[new_topic].partitions) == 4
    assert _settings(kafka_bootstrap_servers, new_topic)["retention.ms"] == "86400000"
    assert len(read(new_topic)) == 20


@pytest.mark.kafka
def test_an_existing_topic_with_too_few_kafka_partitions_is_refused(kafka_bootstrap_servers, kafka_topic, read):
    topic = kafka_topic(partitions=2)
    with pytest.raises(KafkaError) as caught, _writer(kafka_bootstrap_servers, topic, KafkaTopicSpec(partitions=3)):
        pass
    assert "has 2 Kafka partitions" in caught.value.cause
    assert f"--alter --topic {topic} --partitions 3" in caught.value.fix
    with _writer(kafka_bootstrap_servers, topic, KafkaTopicSpec(partitions=2)) as writer:
        writer.send("x")
    assert [record.value for record in read(topic)] == [b"x"]


@pytest.mark.kafka
@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"replication_factor": 3}, "INVALID_REPLICATION_FACTOR", "replication_factor"),
        ({"configs": {"retention": "1"}}, "INVALID_CONFIG", "retention"),
        ({"configs": {"retention.ms": "long"}}, "INVALID_CONFIG", "retention.ms"),
    ],
)
def test_what_the_broker_refuses_to_create_is_told(options, code, said, kafka_bootstrap_servers, new_topic):
    with pytest.raises(KafkaError) as caught, _writer(kafka_bootstrap_servers, new_topic, KafkaTopicSpec(**options)):
        pass
    assert caught.value.code == code
    assert said in str(caught.value)
    assert new_topic in caught.value.culprit
    assert new_topic not in _topics(kafka_bootstrap_servers)


@pytest.mark.kafka
def test_fifty_publications_at_once_create_their_topic_once(kafka_bootstrap_servers, new_topic, read, monkeypatch):
    created, refused, together = [], [], threading.Barrier(50, timeout=60)
    answer = Connection.answer

    def counting(self, ask, timeout, culprit):
        try:
            result = answer(self, ask, timeout, culprit)
        except KafkaError as error:
            if "creation" in culprit:
                refused.append(error.code)
            elif error.code == "UNKNOWN_TOPIC_OR_PART" and not together.broken:
                with contextlib.suppress(threading.BrokenBarrierError):
                    together.wait()  # nobody creates it before all have missed it
            raise
        if "creation" in culprit:
            created.append(culprit)
        return result

    monkeypatch.setattr(Connection, "answer", counting)
    spec, errors = KafkaTopicSpec(partitions=3), []

    def publish(number):
        try:
            with _writer(kafka_bootstrap_servers, new_topic, spec) as writer:
                together.abort()
                writer.send(str(number))
        except KafkaError as error:
            errors.append(error)
            together.abort()

    threads = [threading.Thread(target=publish, args=[number]) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert len(created) == 1
    assert refused == ["TOPIC_ALREADY_EXISTS"] * 49
    assert sorted(int(record.value) for record in read(new_topic)) == list(range(50))
    assert len(_topics(kafka_bootstrap_servers)[new_topic].partitions) == 3


@pytest.mark.kafka
def test_a_publication_asks_for_metadata_and_settings_once(
    kafka_bootstrap_servers, kafka_topic, monkeypatch, eventually
):
    topic, asked = kafka_topic(), []
    eventually(lambda: topic in _topics(kafka_bootstrap_servers))
    for name in ("describe_topics", "list_topics", "describe_cluster", "describe_configs", "create_topics"):
        method = getattr(AdminClient, name)

        def counting(self, *args, _name=name, _method=method, **options):
            asked.append(_name)
            return _method(self, *args, **options)

        monkeypatch.setattr(AdminClient, name, counting)
    with _writer(kafka_bootstrap_servers, topic, KafkaTopicSpec()) as writer:
        writer.send_all({"i": i} for i in range(1000))
    assert asked == ["describe_configs", "describe_topics"]


def test_the_ends_are_asked_for_again_when_the_client_has_looked_who_leads(monkeypatch):
    """As after a lost connection: the client knows no leader, or an old one, or tells -1001 for an offset."""
    errors = [confluent_kafka.KafkaError._NOENT, confluent_kafka.KafkaError.FENCED_LEADER_EPOCH]
    answers = [*(confluent_kafka.KafkaException(confluent_kafka.KafkaError(code)) for code in errors), -1001, 7]
    looks = []

    class Admin:
        def list_offsets(self, asked, request_timeout):
            answer, made = answers.pop(0), {}
            for partition in asked:
                made[partition] = future = concurrent.futures.Future()
                if isinstance(answer, int):
                    future.set_result(types.SimpleNamespace(offset=answer))
                else:
                    future.set_exception(answer)
            return made

        def list_topics(self, topic, timeout):
            looks.append(topic)

        def poll(self, timeout): ...

    connection = Connection(KafkaProducerConfig(bootstrap_servers="localhost:1"))
    connection._admin = Admin()
    assert end_offsets(connection, "t", 2, 10) == [7, 7]
    assert looks == ["t"] * 3
    refused = confluent_kafka.KafkaError(confluent_kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED)
    answers.append(confluent_kafka.KafkaException(refused))
    with pytest.raises(KafkaError, match="TOPIC_AUTHORIZATION_FAILED"):
        end_offsets(connection, "t", 2, 10)


NOT_YET = confluent_kafka.KafkaException(
    confluent_kafka.KafkaError(confluent_kafka.KafkaError.NOT_LEADER_FOR_PARTITION)
)


@pytest.mark.kafka
@pytest.mark.parametrize("creator", ["publication", "LocalKafka", "kafka_topic"])
def test_a_new_topic_is_there_once_its_leaders_take_requests(
    creator, kafka_bootstrap_servers, new_topic, request, monkeypatch
):
    """Metadata names a leader a moment before it is one, and what it then refuses librdkafka may take for delivered."""
    looks = []

    def ask(admin, topic, partitions, timeout):
        looks.append(topic)
        if len(looks) < 3:
            raise NOT_YET
        return ask_end_offsets(admin, topic, partitions, timeout)

    for module in (topics, local, pytest_plugin):
        monkeypatch.setattr(module, "ask_end_offsets", ask)
    if creator == "publication":
        with _writer(kafka_bootstrap_servers, new_topic, KafkaTopicSpec()):
            assert looks == [new_topic] * 3
    elif creator == "LocalKafka":
        request.getfixturevalue("local_kafka").create_topic(new_topic)
        assert looks == [new_topic] * 3
    else:
        topic = request.getfixturevalue("kafka_topic")()
        assert looks == [topic] * 3


@pytest.mark.kafka
def test_a_new_topic_is_written_to_when_its_ends_are_not_told(kafka_bootstrap_servers, new_topic, monkeypatch):
    looks = []

    def ask(admin, topic, partitions, timeout):
        looks.append(topic)
        raise confluent_kafka.KafkaException(
            confluent_kafka.KafkaError(confluent_kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED)
        )

    monkeypatch.setattr(topics, "ask_end_offsets", ask)
    with _writer(kafka_bootstrap_servers, new_topic, KafkaTopicSpec()) as writer:
        writer.send({"i": 1})
    assert looks == [new_topic]
    assert writer.publication.records == 1


@pytest.mark.kafka
def test_a_broker_that_creates_topics_by_itself_creates_none_for_us(instance):
    with LocalKafka(config={"auto.create.topics.enable": "true"}) as kafka:
        servers = kafka.bootstrap_servers
        theirs = confluent_kafka.Producer({"bootstrap.servers": servers})
        theirs.produce("made-by-the-broker", b"x")
        assert theirs.flush(30) == 0
        assert set(_topics(servers)) == {"made-by-the-broker"}, "this broker creates no topics: it proves nothing"

        with pytest.raises(KafkaError, match="misspelt"), _writer(servers, "misspelt"):
            pass
        with DataForgeKafkaProducer(KafkaProducerConfig(bootstrap_servers=servers)) as producer:
            with pytest.raises(KafkaError) as caught:
                producer.send_sync("misspelt", "x")
            assert caught.value.code in {"UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC"}
        with _writer(servers, "made-by-the-broker") as writer:
            writer.send("x")
            with pytest.raises(KafkaError, match="misspelt"):
                writer.send("x", topic="misspelt")
        connection = Connection(KafkaProducerConfig(bootstrap_servers=servers))
        with pytest.raises(KafkaError):
            end_offsets(connection, "gone", 1, 1)
        connection.close()
        assert {name for name in _topics(servers) if not name.startswith("__")} == {"made-by-the-broker"}


@pytest.mark.kafka
def test_the_look_at_a_topic_counts_its_kafka_partitions(kafka_bootstrap_servers, kafka_topic):
    connection = Connection(KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers))
    assert check_topic_exists(connection, kafka_topic(partitions=5), None, 30).partitions == 5


@pytest.mark.kafka
def test_the_core_alone_makes_the_topic_and_takes_a_bad_record_aside(
    kafka_bootstrap_servers, new_topic, kafka_topic, read
):
    dead = kafka_topic()
    publication = publish(
        PublicationConfig(producer=KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers)),
        [{"i": 0}, {"i": {1}}, {"i": 2}],
        transactional_id=f"core-{new_topic}",
        publication_id=new_topic,
        topic=new_topic,
        create_topic=KafkaTopicSpec(partitions=1),
        on_bad_record=dead,
    )
    assert (publication.records, publication.dead_letters) == (2, 1)
    assert [json.loads(record.value)["i"] for record in read(new_topic)] == [0, 2]
    assert [record.value for record in read(dead)] == [b"{'i': {1}}"]


def _begin_anew(servers, topic):
    """Delete a topic and make it anew."""
    admin = AdminClient({"bootstrap.servers": servers})
    admin.delete_topics([topic], operation_timeout=30)[topic].result(30)
    make_anew(admin, topic, 2)


@pytest.mark.kafka
@pytest.mark.parametrize("looks_again", [False, True])
def test_a_topic_that_is_made_anew_in_mid_publication_ends_it(
    looks_again, kafka_bootstrap_servers, kafka_topic, read, monkeypatch
):
    topic = kafka_topic(partitions=2)
    monkeypatch.setattr(publication, "_LOOK_AGAIN_SECONDS", 0.0 if looks_again else 1000.0)
    writer = _writer(kafka_bootstrap_servers, topic)
    with pytest.raises(KafkaError, match="made anew meanwhile") as caught, writer:
        for i in range(2):
            writer.send_all([KafkaRecord(b"x", partition=0)] * 10)
            writer._flush()
            if i == 0 or looks_again:
                _begin_anew(kafka_bootstrap_servers, topic)
            if looks_again:
                break
    assert caught.value.remedy is Remedy.RETRY
    assert read(topic) == []


@pytest.mark.kafka
def test_a_topic_that_is_deleted_in_mid_publication_is_told(kafka_bootstrap_servers, new_topic):
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
    writer = _writer(kafka_bootstrap_servers, new_topic, KafkaTopicSpec(), delivery_timeout=2)
    with pytest.raises(KafkaError, match="the topic does not exist any more"), writer:
        writer.send_all([{"i": 0}])
        admin.delete_topics([new_topic], operation_timeout=30)[new_topic].result(30)
        writer.send_all([{"i": 1}])


@pytest.mark.kafka
def test_a_topic_that_is_deleted_before_a_commit_is_told(kafka_bootstrap_servers, new_topic):
    """The ledger cannot name offsets in it: librdkafka asks again until the time is up."""
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
    writer = _writer(kafka_bootstrap_servers, new_topic, KafkaTopicSpec(), delivery_timeout=2)
    with pytest.raises(KafkaError, match=f"the topic '{new_topic}' does not exist any more") as caught, writer:
        writer.send_all([{"i": 0}])
        writer._sender.flush()
        admin.delete_topics([new_topic], operation_timeout=30)[new_topic].result(30)
    assert caught.value.remedy is Remedy.RETRY


@pytest.mark.kafka
def test_a_topic_that_is_deleted_before_a_commit_without_delivery_reports_is_told(kafka_bootstrap_servers, new_topic):
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
    writer = _writer(kafka_bootstrap_servers, new_topic, KafkaTopicSpec(), reports=False, delivery_timeout=2)
    with pytest.raises(KafkaError, match="the topic was deleted or made anew meanwhile") as caught, writer:
        writer.send_all([{"i": i} for i in range(100)])
        assert writer._sender.live().flush(10) == 0
        admin.delete_topics([new_topic], operation_timeout=30)[new_topic].result(30)
    assert caught.value.remedy is Remedy.RETRY


@pytest.mark.parametrize("spec", [None, KafkaTopicSpec()])
def test_a_topic_that_may_not_be_seen_may_be_missing_too(spec, monkeypatch):
    """Brokers hide a topic from who may not see it: then CREATE may be what is missing besides."""

    def hidden(*_arguments, **_options):
        raise KafkaError("topic 't'", "not allowed", "Grant WRITE", code="TOPIC_AUTHORIZATION_FAILED")

    monkeypatch.setattr(topics, "look_at_topic", hidden)
    with pytest.raises(KafkaError) as caught:
        check_topic_exists(Connection(KafkaProducerConfig()), "t", spec, 1.0)
    assert ("CREATE" in caught.value.fix) == (spec is not None)
    assert "Grant WRITE" in caught.value.fix


def _done(answer):
    future = concurrent.futures.Future()
    (future.set_exception if isinstance(answer, BaseException) else future.set_result)(answer)
    return future


def _refusal(code):
    return confluent_kafka.KafkaException(confluent_kafka.KafkaError(code))


class _Admin:
    """Brokers that tell this of a topic, and of its settings, and take no new one."""

    def __init__(self, settings=None, *, told=None, created=None, **more):
        self.told = told or types.SimpleNamespace(
            **{"partitions": [1, 2], "topic_id": "A" * 22, "authorized_operations": None} | more
        )
        self.settings, self.created, self.new = settings, created, []

    def describe_topics(self, names, **_):
        return {"t": _done(self.told)}

    def describe_configs(self, resources, **_):
        settings = self.settings or {}
        if isinstance(settings, dict):
            settings = _done({name: types.SimpleNamespace(value=value) for name, value in settings.items()})
        return {resources[0]: settings}

    def create_topics(self, new, **_):
        self.new += new
        return {"t": _done(self.created)}

    def poll(self, timeout): ...


def _connected(admin):
    connection = Connection(KafkaProducerConfig(bootstrap_servers="localhost:1"))
    connection._admin = admin
    return connection


CREATE_TIME = {"message.timestamp.type": "CreateTime"}
ANY_TIME = (2**63, 2**63)
SETTINGS = [
    ({}, (None, None, False)),
    (CREATE_TIME, (ANY_TIME, None, False)),
    (
        CREATE_TIME | {"message.timestamp.before.max.ms": "1", "message.timestamp.after.max.ms": "2"},
        ((1, 2), None, False),
    ),
    (CREATE_TIME | {"message.timestamp.difference.max.ms": "5"}, ((5, 5), None, False)),  # before Kafka 3.6
    ({"message.timestamp.type": "LogAppendTime", "cleanup.policy": "delete", "retention.ms": "9"}, (None, None, False)),
    (CREATE_TIME | {"cleanup.policy": "delete", "retention.ms": "9"}, (ANY_TIME, 9, False)),
    (CREATE_TIME | {"cleanup.policy": "delete", "retention.ms": "-1"}, (ANY_TIME, None, False)),
    (CREATE_TIME | {"cleanup.policy": "compact", "retention.ms": "9"}, (ANY_TIME, None, True)),
    (CREATE_TIME | {"cleanup.policy": "compact,delete", "retention.ms": "9"}, (ANY_TIME, 9, True)),
]


@pytest.mark.parametrize(("settings", "found"), SETTINGS, ids=str)
def test_what_a_topic_takes_and_keeps_is_known_from_its_settings(settings, found):
    topic = look_at_topic(_connected(_Admin(settings)), "t", 10, settings=True)
    assert (topic.timestamps, topic.retention, topic.compacted) == found


@pytest.mark.parametrize("settings", [_done(_refusal(29)), concurrent.futures.Future()], ids=["denied", "late"])
def test_a_topic_whose_settings_are_not_told_is_found_without_them(settings, monkeypatch):
    monkeypatch.setattr(topics, "_SETTINGS_SECONDS", 0.01)
    found = look_at_topic(_connected(_Admin(settings)), "t", 10, settings=True)
    assert found == topics.Topic(partitions=2, id=None)


@pytest.mark.parametrize(
    ("allowed", "may"),
    [(None, (True, True)), (["READ"], (False, True)), (["WRITE"], (True, False)), (["DESCRIBE"], (False, False))],
)
def test_what_this_user_may_do_is_what_the_brokers_say_if_they_say_it(allowed, may):
    operations = allowed and [types.SimpleNamespace(name=name) for name in allowed]
    found = look_at_topic(_connected(_Admin(authorized_operations=operations, topic_id="B" * 22)), "t", 10)
    assert ((found.writable, found.readable), found.id) == (may, "B" * 22)


@pytest.mark.parametrize(
    ("known", "now", "different"), [("a", "b", True), ("a", "a", False), (None, "a", False), ("a", None, False)]
)
def test_a_topic_is_another_one_only_if_both_ids_are_known(known, now, different):
    assert topics.are_different(known, now) is different


@pytest.fixture
def unknown(monkeypatch):
    """A topic that is unknown so many times it is looked for, then there with three Kafka partitions."""
    clock, times = Clock(), []

    def look(*_, **__):
        if times:
            times.pop()
            raise KafkaError("topic 't'", "unknown", "Create it", code="UNKNOWN_TOPIC_OR_PART")
        return topics.Topic(3, None)

    monkeypatch.setattr(topics, "time", clock)
    monkeypatch.setattr(topics, "look_at_topic", look)
    return clock, times


def test_a_topic_that_not_all_brokers_know_yet_is_looked_for_again_for_a_second(unknown):
    clock, times = unknown
    times += [1] * 10
    assert check_topic_exists(_connected(_Admin()), "t", None, 30).partitions == 3
    times += [1] * 1000
    for look in (lambda: check_topic_exists(_connected(_Admin()), "t", None, 30), lambda: current(None, "t", 30)):
        began = clock.now
        with pytest.raises(KafkaError, match="unknown"):
            look()
        assert 1 <= clock.now - began < 1.2
    began = clock.now
    with pytest.raises(KafkaError, match="unknown"):
        current(None, "t", 0.3)
    assert clock.now - began < 0.5


def test_a_topic_that_is_to_be_created_is_not_waited_for(unknown, monkeypatch):
    clock, times = unknown
    times += [1]
    monkeypatch.setattr(topics, "end_offsets", lambda *_: [])
    admin, began = _Admin(), clock.now
    assert check_topic_exists(_connected(admin), "t", KafkaTopicSpec(partitions=2), 30).partitions == 3
    assert clock.now == began
    assert [(new.topic, new.num_partitions, new.replication_factor) for new in admin.new] == [("t", 2, -1)]


def test_a_topic_that_this_user_may_not_create_says_which_acl_is_missing(unknown):
    _, times = unknown
    times += [1]
    admin = _Admin(created=_refusal(confluent_kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED))
    with pytest.raises(KafkaError, match="Grant this user the CREATE ACL on the topic") as caught:
        check_topic_exists(_connected(admin), "t", KafkaTopicSpec(), 30)
    assert caught.value.code == "TOPIC_AUTHORIZATION_FAILED"


def _partition(number, leader=1, in_sync=2):
    leader = None if leader is None else types.SimpleNamespace(id=leader)
    return types.SimpleNamespace(id=number, leader=leader, isr=[1, 2][:in_sync], replicas=[1, 2])


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([_partition(0), _partition(1)], None),
        ([_partition(0), _partition(1, leader=None)], "Kafka partition 1 has no leader"),
        ([_partition(0), _partition(1, leader=-1)], "Kafka partition 1 has no leader"),
        ([_partition(0, in_sync=1)], "Kafka partition 0 has 1 of its 2 replicas in sync"),
        (_refusal(confluent_kafka.KafkaError.UNKNOWN_TOPIC_OR_PART), "the topic does not exist any more"),
        (_refusal(confluent_kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED), None),
    ],
    ids=["well", "unknown leader", "no leader", "replicas", "gone", "hidden"],
)
def test_what_is_wrong_with_a_topic_is_told(told, said):
    described = types.SimpleNamespace(partitions=told) if isinstance(told, list) else told
    trouble = topics.topic_trouble(_connected(_Admin(told=described)), "t", 10)
    assert trouble is None if said is None else trouble.startswith(said)


@pytest.mark.parametrize(("answer", "code"), [(-1001, "LEADER_NOT_AVAILABLE"), (None, "REQUEST_TIMED_OUT")])
def test_the_ends_are_not_told_before_each_leader_has_answered(answer, code):
    late = concurrent.futures.Future() if answer is None else _done(types.SimpleNamespace(offset=answer))
    answers, looks = [_done(types.SimpleNamespace(offset=7)), late], []
    admin = types.SimpleNamespace(
        list_offsets=lambda asked, **_: dict(zip(asked, answers, strict=True)),
        list_topics=lambda topic, **_: looks.append(topic),
    )
    with pytest.raises(confluent_kafka.KafkaException) as caught:
        ask_end_offsets(admin, "t", 2, 0.01)
    assert (caught.value.args[0].name(), looks) == (code, ["t"])
