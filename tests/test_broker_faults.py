"""100,000 records through Dagster while the brokers of a cluster of three are stopped, started and killed.

As Kafka's own transactions_test does: 750 records a transaction, three replicas of which two must be in sync.
"""

import collections
import concurrent.futures
import itertools
import multiprocessing
import time

import crashing
import orjson
import pytest
from conftest import read_topic
from crashing import assert_told_truly
from test_exactly_once import instance, last_materialization

from dataforge_kafka_dagster.local import LocalKafka

pytestmark = pytest.mark.faults
__all__ = ["instance"]

RECORDS = 100_000
PER_PUBLICATION = 750
WRITERS = 3


@pytest.fixture
def three_brokers():
    with LocalKafka(brokers=3, startup_timeout=180) as kafka:
        yield kafka


def _bounce(kafka, node, how, seconds):
    """Take a broker away for this time, and bring it back; when it was away."""
    began = time.time()
    (kafka.kill_broker if how == "killed" else kafka.stop_broker)(node)
    time.sleep(seconds)
    kafka.start_broker(node)
    return how, began, time.time()


@pytest.mark.timeout(1800)
def test_nothing_is_lost_or_doubled_while_brokers_come_and_go(three_brokers, instance, say):
    kafka, topic = three_brokers, "bounced"
    kafka.create_topic(topic, partitions=6)
    count = -(-RECORDS // PER_PUBLICATION)
    sizes = {f"p{i}": min(PER_PUBLICATION, RECORDS - i * PER_PUBLICATION) for i in range(count)}
    instance.add_dynamic_partitions("many", list(sizes))
    config = crashing.run_config(kafka.bootstrap_servers, "bounced")

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crashing"])
    shares = [list(sizes.items())[start::WRITERS] for start in range(WRITERS)]
    with concurrent.futures.ProcessPoolExecutor(WRITERS, context) as pool:
        began = time.monotonic()
        # Not from the environment, which is the fork server's and may be that of an earlier test.
        home = instance.root_directory
        writers = [pool.submit(crashing.publish_slowly, share, topic, config, home) for share in shares]
        away = []
        for node, how in zip(itertools.cycle((1, 2, 3)), itertools.cycle(("killed", "stopped")), strict=False):
            away.append(_bounce(kafka, node, how, 3))
            if all(writer.done() for writer in writers):
                break
        published = [when for writer in writers for when in writer.result()]
    say(f"{RECORDS} records, {count} publications, {len(away)} bounces in {time.monotonic() - began:.0f} s")

    # The faults were real: publications were in the midst of being made when a broker went.
    hit = collections.Counter(how for how, gone, _ in away for start, end in published if start < gone < end)
    say(f"publications under way when a broker was taken away: {dict(hit)}")
    assert hit["killed"] >= 3
    assert hit["stopped"] >= 3

    found = collections.defaultdict(list)
    for record in read_topic(kafka.bootstrap_servers, topic):
        value = orjson.loads(record.value)
        found[value["partition"]].append((record.partition, record.offset, value))
    numbers = {
        partition: collections.Counter(value["i"] for _, _, value in records) for partition, records in found.items()
    }
    assert sum(map(len, found.values())) == RECORDS
    assert numbers == {partition: collections.Counter(range(size)) for partition, size in sizes.items()}
    for partition, records in found.items():
        assert_told_truly(last_materialization(instance, "partitioned", partition), records)
