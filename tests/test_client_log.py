"""librdkafka's log: all of it where it can be kept, and no step that waits for it."""

import logging
import time
import uuid

import pytest

from dataforge_kafka_dagster import KafkaProducerConfig
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.connection import _Quiet, logger
from dataforge_kafka_dagster.kafka.publication import publish
from dataforge_kafka_dagster.kafka.reader import read_publication


class _Keeping(logging.Handler):
    """Keeps lines, each for so many seconds."""

    def __init__(self, seconds):
        super().__init__()
        self.lines, self._seconds = [], seconds

    def emit(self, record):
        time.sleep(self._seconds)
        self.lines.append(record.getMessage())


@pytest.fixture
def keeping(monkeypatch):
    """Makes a handler of our logger, the only one."""
    made = []

    def make(seconds):
        made.append(_Keeping(seconds))
        logger.addHandler(made[-1])
        return made[-1]

    monkeypatch.setattr(logger, "propagate", False)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    yield make
    logger.setLevel(level)
    for handler in made:
        logger.removeHandler(handler)


def test_lines_that_can_be_kept_are_kept(keeping):
    kept, log = keeping(0), _Quiet(str, str)
    for number in range(500):
        log.log(logging.CRITICAL, "line %d", number)
    assert kept.lines == [f"line {number}" for number in range(500)]


@pytest.mark.slow
def test_lines_that_come_too_fast_are_dropped_and_counted(keeping):
    kept, log, sent = keeping(0.2), _Quiet(str, str), 0
    began = time.monotonic()
    while not any("were dropped" in line for line in kept.lines):
        log.log(logging.DEBUG, "line")
        sent += 1
        assert time.monotonic() - began < 30
    dropped = int(next(line for line in kept.lines if "were dropped" in line).split()[0])
    assert dropped + kept.lines.count("line") in {sent, sent - 1}
    assert dropped > 0


@pytest.mark.faults  # for its ten seconds
def test_a_publication_does_not_wait_for_a_log_that_is_slow(keeping, kafka_bootstrap_servers, kafka_topic):
    """Each line takes librdkafka's own threads long enough to write more: without a bound, a read never ended."""
    config = KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers, librdkafka_config={"debug": "all"})
    topic, name, kept = kafka_topic(), uuid.uuid4().hex, keeping(0.03)
    began = time.monotonic()
    done = publish(
        PublicationConfig(producer=config), ["a", "b"], transactional_id=name, publication_id=name, topic=topic
    )
    assert [record.value for record in read_publication(config, done, 30)] == [b"a", b"b"]
    assert time.monotonic() - began < 30
    assert kept.lines
