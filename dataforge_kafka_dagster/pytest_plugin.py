"""Pytest fixtures that give tests a real Kafka: `pytest_plugins = ["dataforge_kafka_dagster.pytest_plugin"]`.

They use the open Kafka that the environment variable `KAFKA_BOOTSTRAP_SERVERS` names, else one `LocalKafka` for the
session; and the Schema Registry that `SCHEMA_REGISTRY_URL` names, else one `LocalSchemaRegistry`. pytest's header names
them: tests make and delete topics there.
"""

import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Protocol

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from dataforge_kafka_dagster.kafka.errors import KafkaError
from dataforge_kafka_dagster.kafka.topics import ASK_WAIT, ask_end_offsets
from dataforge_kafka_dagster.local import LocalKafka
from dataforge_kafka_dagster.local_registry import LocalSchemaRegistry

_SERVERS = "KAFKA_BOOTSTRAP_SERVERS"
_REGISTRY = "SCHEMA_REGISTRY_URL"
_CONNECT_WAIT = 10.0
_WAIT = 30.0


def pytest_report_header() -> list[str]:
    """Name the Kafka and the registry that tests use and do not start."""
    given = {name: os.environ.get(name) for name in (_SERVERS, _REGISTRY)}
    return [f"{name}: {re.sub('//[^/@]*@', '//***@', value)}" for name, value in given.items() if value]


class TopicFactory(Protocol):
    """What the fixture `kafka_topic` gives."""

    def __call__(
        self,
        partitions: int = 1,
        name: str | None = None,
        config: Mapping[str, str] | None = None,
        *,
        topic: str | None = None,
    ) -> str:
        """Create a topic, wait until its leaders take requests, and return its name.

        Args:
            partitions: Number of Kafka partitions.
            name: Start of the name, which a unique ending follows. Default: `test`.
            config: Topic settings, such as `{"cleanup.policy": "compact"}`.
            topic: The whole name, instead of `name`: for an asset whose metadata says `kafka/topic`.

        Raises:
            KafkaError: There is a topic of that name already, which is left alone.
            confluent_kafka.KafkaException: Kafka refused it.
        """


@pytest.fixture(scope="session")
def local_kafka() -> Iterator[LocalKafka]:
    """One `LocalKafka` with one broker for the session; tests that use it are skipped with an external Kafka."""
    if os.environ.get(_SERVERS):
        pytest.skip(f"{_SERVERS} names an external Kafka, so no local one is started")
    with LocalKafka() as kafka:
        yield kafka


@pytest.fixture(scope="session")
def kafka_bootstrap_servers(request: pytest.FixtureRequest) -> str:
    """Bootstrap servers of the Kafka under test."""
    if servers := os.environ.get(_SERVERS):
        try:
            AdminClient({"bootstrap.servers": servers, "log_level": 0}).list_topics(timeout=_CONNECT_WAIT)
        except KafkaException as error:
            raise KafkaError(
                f"{_SERVERS}={servers!r}",
                f"no Kafka answers there ({error.args[0].str()})",
                "Name an open cluster that runs, without TLS and passwords; or unset it, and one is started",
            ) from error
        return servers
    kafka: LocalKafka = request.getfixturevalue("local_kafka")
    return kafka.bootstrap_servers


@pytest.fixture(scope="session")
def schema_registry_url(request: pytest.FixtureRequest) -> str:
    """Address of the Schema Registry under test."""
    if url := os.environ.get(_REGISTRY):
        return url
    registry: LocalSchemaRegistry = request.getfixturevalue("local_schema_registry")
    return registry.url


@pytest.fixture(scope="session")
def local_schema_registry() -> Iterator[LocalSchemaRegistry]:
    """One `LocalSchemaRegistry` for the session, whose rule is BACKWARD."""
    with LocalSchemaRegistry() as registry:
        yield registry


@pytest.fixture
def kafka_topic(kafka_bootstrap_servers: str) -> Iterator[TopicFactory]:
    """Factory of topics, with unique names unless they are given, which are deleted after the test."""
    # Its log would stand below pytest's summary: the Kafka ends before it.
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers, "log_level": 0})
    created: list[str] = []

    def create(
        partitions: int = 1,
        name: str | None = None,
        config: Mapping[str, str] | None = None,
        *,
        topic: str | None = None,
    ) -> str:
        topic = topic or f"{name or 'test'}-{uuid.uuid4().hex[:12]}"
        new = NewTopic(topic, partitions, config=dict(config or {}))
        try:
            admin.create_topics([new], operation_timeout=_WAIT, request_timeout=_WAIT)[topic].result(_WAIT)
        except KafkaException as error:
            if error.args[0].name() != "TOPIC_ALREADY_EXISTS":
                raise
            raise KafkaError(
                f"topic {topic!r}",
                f"the Kafka at {kafka_bootstrap_servers} has it already",
                "Delete it, if a test has left it there; or have a new name made by kafka_topic(name=...)",
            ) from error
        created.append(topic)
        deadline = time.monotonic() + _WAIT
        while True:
            try:
                ask_end_offsets(admin, topic, partitions, ASK_WAIT)
            except KafkaException:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                break
        return topic

    yield create
    if created:
        for future in admin.delete_topics(created, operation_timeout=_WAIT, request_timeout=_WAIT).values():
            try:
                future.result(_WAIT)
            except KafkaException as error:
                # The test may have deleted it itself.
                if error.args[0].name() != "UNKNOWN_TOPIC_OR_PART":
                    raise
