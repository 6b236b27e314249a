import gc
import math
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import dagster as dg
import hypothesis
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

pytest_plugins = ["dataforge_kafka_dagster.pytest_plugin", "pytester"]

hypothesis.settings.register_profile("tests", deadline=None, max_examples=20, database=None)
hypothesis.settings.load_profile("tests")

_DEADLINE = 60.0
# A coordinator tells a producer of its commit before all Kafka partitions have their markers, which make it visible.
_MARKER_SECONDS = 1.0

# What is imported and collected lives to the end: the collector would look through it again after every few tests.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


class Clock:
    """In the place of a module's `time`: it goes on by what it is told to, however busy the machine is."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def mostly_slow(cases: Iterable[object], fast: int = 1) -> list[object]:
    """These cases for `parametrize`: the first ones run in the editor too, all of them in `make test`."""

    def marked(case):
        return pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.slow)

    return [case if place < fast else marked(case) for place, case in enumerate(cases)]


class Found(NamedTuple):
    """A record as an independent consumer finds it."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]] | None
    timestamp: int


def read_topic(bootstrap: str, topic: str, isolation: str = "read_committed") -> list[Found]:
    """All records of a topic that a plain consumer sees, by Kafka partition and offset."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"independent-{uuid.uuid4()}",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "isolation.level": isolation,
            "fetch.wait.max.ms": 20,
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=_DEADLINE).topics[topic].partitions
        assert partitions, f"no topic {topic!r}"
        consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        found, ended, deadline = [], set(), time.monotonic() + _DEADLINE
        behind, patience = set(), math.inf
        while ended != set(partitions) or (behind and time.monotonic() < patience):
            assert time.monotonic() < deadline, f"{topic!r} was not read to its end in {_DEADLINE} s"
            if ended == set(partitions):
                patience = min(patience, time.monotonic() + _MARKER_SECONDS)
            for message in consumer.consume(1000, 0.1):
                if message.error() is None:
                    ended.discard(message.partition())
                    found.append(
                        Found(
                            message.partition(),
                            message.offset(),
                            message.key(),
                            message.value(),
                            message.headers(),
                            message.timestamp()[1],
                        )
                    )
                else:
                    assert message.error().code() == KafkaError._PARTITION_EOF, message.error()
                    ended.add(message.partition())
                    place = TopicPartition(topic, message.partition())
                    _, end = consumer.get_watermark_offsets(place, cached=True)
                    (behind.add if message.offset() < end else behind.discard)(message.partition())
    finally:
        consumer.close()
    return sorted(found, key=lambda record: record[:2])


def make_anew(admin: AdminClient, topic: str, partitions: int = 1) -> None:
    """Make a topic that was just deleted; older brokers take a while to forget it."""
    deadline = time.monotonic() + _DEADLINE
    while True:
        try:
            admin.create_topics([NewTopic(topic, partitions)], operation_timeout=30)[topic].result(30)
        except KafkaException as exception:
            if exception.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


@pytest.fixture(scope="session", autouse=True)
def _let_go():
    """Contexts built without a run hold a database, which is to be closed while Python still can."""
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture
def read(kafka_bootstrap_servers: str) -> Callable[..., list[Found]]:
    """Reads a topic with a consumer that shares no code with the package."""
    return lambda topic, isolation="read_committed": read_topic(kafka_bootstrap_servers, topic, isolation)


@pytest.fixture(scope="session")
def secured(tmp_path_factory):
    """A real Kafka with SASL, TLS and ACLs, for the session."""
    from secured import secured_kafka

    with secured_kafka(tmp_path_factory.mktemp("certificates")) as kafka:
        yield kafka


@pytest.fixture
def closed_port() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as held:  # so that no other process gets it meanwhile
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def instance():
    """An ephemeral Dagster instance."""
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def stored_instance(tmp_path, monkeypatch):
    """A Dagster instance that other processes can open."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        yield instance


@pytest.fixture
def eventually() -> Callable[..., object]:
    """Waits until a condition holds, to a deadline."""

    def wait(condition: Callable[[], object], seconds: float = 10.0) -> object:
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < deadline, f"not so within {seconds} s"
            time.sleep(0.02)
        return result

    return wait


@pytest.fixture
def in_time() -> Callable[..., object]:
    """Lets something end in so many seconds: in one of three tries, since a busy machine may hold one up."""

    def call(seconds: float, what: Callable[[], object], tries: int = 3) -> object:
        took = []
        while len(took) < tries:
            began = time.monotonic()
            result = what()
            took.append(time.monotonic() - began)
            if took[-1] < seconds:
                return result
        raise AssertionError(f"not in {seconds} s, but {took}")

    return call


@pytest.fixture
def say(capsys) -> Callable[[str], None]:
    """Prints a figure where the one who runs the tests sees it."""

    def write(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")  # noqa: T201

    return write


@pytest.fixture
def python() -> Callable[[str], str]:
    """Runs Python source in a process of its own and returns what it prints."""

    def run(source: str) -> str:
        root = str(Path(__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", source],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=root,
            env=os.environ | {"PYTHONPATH": root},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def new_topic(kafka_bootstrap_servers):
    """The name of a topic that does not exist; removed afterwards if it does."""
    name = f"new-{uuid.uuid4().hex[:12]}"
    yield name
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
    if name in admin.list_topics(timeout=30).topics:
        admin.delete_topics([name], operation_timeout=30)[name].result(30)
