"""Steps that are killed at any moment, whatever their records are: Dagster's retries publish each of them once."""

import collections
import multiprocessing
import os
import random
import signal
import time
import uuid
from pathlib import Path

import dagster as dg
import interrupting
import orjson
import pytest
from conftest import read_topic
from crashing import assert_told_truly
from dagster._core.execution.api import execute_run
from test_exactly_once import instance, last_materialization

from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerResource
from dataforge_kafka_dagster.kafka.publication import PublicationWriter

pytestmark = pytest.mark.faults
__all__ = ["instance"]

PHASES = ("before", *interrupting.PHASES, "committed")
ROUNDS = int(os.environ.get("RANDOM_KILLS", "60"))

rounds = dg.DynamicPartitionsDefinition(name="rounds")
_reached = {"file": None}


def _reach(phase):
    if _reached["file"] is not None:
        os.pwrite(_reached["file"], bytes([PHASES.index(phase)]), 0)


@dg.asset(partitions_def=rounds)
def made(context: dg.AssetExecutionContext):
    tags = context.run.tags

    def rows():
        noise = random.Random(context.partition_key)
        for i in range(int(tags["kill/records"])):
            if i % 100 == 0 and "kill/slowly" in tags:
                time.sleep(0.01)
            padding = noise.randbytes(noise.randrange(int(tags["kill/size"]))).hex()
            yield {"round": context.partition_key, "attempt": tags["kill/attempt"], "i": i, "padding": padding}

    # A large list is published without delivery reports, a generator is not.
    yield dg.Output(rows() if "kill/slowly" in tags else list(rows()), metadata={"kafka/topic": tags["kill/topic"]})


def job():
    kafka = KafkaProducerResource(
        bootstrap_servers=dg.EnvVar("KAFKA_OF_TEST"), transactional_id_prefix="killed", buffer_memory=1_000_000
    )
    resources = {"io_manager": KafkaIOManager(kafka=kafka)}
    return dg.Definitions(
        [made],
        resources=resources,
        jobs=[dg.define_asset_job("killed", [made], executor_def=dg.in_process_executor)],
    ).resolve_job_def("killed")


def attempt(run_id, servers, home, file):
    """Execute a run, in a process of its own; exits with 0 if it succeeded."""
    os.environ.update(KAFKA_OF_TEST=servers, DAGSTER_HOME=home)
    _reached["file"] = os.open(file, os.O_RDWR)
    interrupting._call_at_each_phase(_reach, [])
    write, commit = PublicationWriter._write, PublicationWriter._commit_transaction

    def writing(*args):
        _reach("mid_write")
        write(*args)

    def committing(*args):
        commit(*args)
        _reach("committed")

    PublicationWriter._write = writing
    PublicationWriter._commit_transaction = committing
    with dg.DagsterInstance.get() as instance:
        result = execute_run(dg.reconstructable(job), instance.get_run_by_id(run_id), instance)
    os._exit(not result.success)


def _execute(processes, arguments, file, kill_after):
    """Execute a run and kill it so many seconds after its publication began, if it is not None.

    Returns the phase in which it was killed, or None if it had succeeded before; and the seconds.
    """
    file.write_bytes(b"\0")
    process = processes.Process(target=attempt, args=(*arguments, str(file)))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while file.read_bytes() == b"\0" and process.is_alive():
            assert time.monotonic() < deadline, "it never began"
            time.sleep(0.001)
        began = time.monotonic()
        process.join(120 if kill_after is None else kill_after)
    finally:
        process.kill()
        process.join()
    assert process.exitcode in {0, -signal.SIGKILL}, "the run failed by itself"
    seconds = time.monotonic() - began
    return (None if process.exitcode == 0 else PHASES[file.read_bytes()[0]]), seconds


def _launch(instance, tags, killed):
    """A run; if there are such that were killed, as Dagster's daemon retries a run whose process has gone."""
    if killed:
        instance.report_run_failed(instance.get_run_by_id(killed[-1]))
        tags = tags | {"dagster/retry_number": str(len(killed))}
    parents = {"parent_run_id": killed[-1], "root_run_id": killed[0]} if killed else {}
    return instance.create_run_for_job(job(), tags=tags | {"kill/attempt": str(len(killed))}, **parents).run_id


@pytest.mark.timeout(3000)
def test_steps_killed_at_any_moment_are_published_once(
    instance, kafka_bootstrap_servers, kafka_topic, tmp_path, monkeypatch, say
):
    seed = int(os.environ.get("RANDOM_KILLS_SEED", uuid.uuid4().int % 2**32))
    say(f"RANDOM_KILLS_SEED={seed}")
    chance, topic, file = random.Random(seed), kafka_topic(partitions=3), tmp_path / "phase"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["test_random_kills"])
    counts, kills, began, usual = {}, collections.Counter(), time.monotonic(), 1.0
    for name in [f"r{number}" for number in range(ROUNDS)]:
        instance.add_dynamic_partitions("rounds", [name])
        large = chance.random() < 0.3
        counts[name] = (
            chance.randrange(20_000, 40_000)
            if large
            else chance.choice([0, 1, chance.randrange(100), chance.randrange(5000)])
        )
        size, most = chance.choice([1, 50] if large else [1, 50, 1000]), chance.randint(1, 3)
        tags = {"kill/topic": topic, "kill/records": str(counts[name]), "kill/size": str(size)}
        tags |= {} if large else {"kill/slowly": "true"}
        killed, phase = [], ""
        while phase is not None:
            run_id = _launch(instance, tags | {"dagster/partition": name}, killed)
            wait = chance.uniform(0, 1.2 * usual) if len(killed) < most else None
            phase, seconds = _execute(processes, (run_id, kafka_bootstrap_servers, str(tmp_path)), file, wait)
            if phase is None:
                usual = (usual + seconds) / 2
            else:
                killed.append(run_id)
                kills[phase] += 1
    many = sum(count >= 20_000 for count in counts.values())
    say(
        f"{ROUNDS} rounds, {many} of large lists, {sum(kills.values())} kills that landed: {dict(kills)}; {time.monotonic() - began:.0f} s"
    )
    assert sum(kills.values()) >= ROUNDS / 2
    assert len(kills) >= min(4, ROUNDS / 10)

    found = collections.defaultdict(list)
    for record in read_topic(kafka_bootstrap_servers, topic):
        value = orjson.loads(record.value)
        found[value["round"]].append((record.partition, record.offset, value))
    numbers = {name: sorted(value["i"] for _, _, value in found[name]) for name in counts}
    assert numbers == {name: list(range(count)) for name, count in counts.items()}
    for name, count in counts.items():
        assert len({value["attempt"] for _, _, value in found[name]}) == (count > 0)
        told = last_materialization(instance, "made", name)
        if count:
            assert_told_truly(told, found[name])
        else:
            assert told.metadata["dagster/row_count"].value == 0
