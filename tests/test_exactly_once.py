"""Retries, crashes and zombies publish every record one time: through Dagster, on the real broker."""

import collections
import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import crashing
import dagster as dg
import orjson
import pytest
from conftest import read_topic
from crashing import POINTS, RECORDS, assert_once, assert_told_truly
from dagster._core.execution.api import ReexecutionOptions, execute_run

from dataforge_kafka_dagster import KafkaProducerConfig
from dataforge_kafka_dagster.identity import origin_of
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.errors import KafkaConfigError
from dataforge_kafka_dagster.kafka.ledger import make_transactional_id
from dataforge_kafka_dagster.kafka.publication import PublicationWriter

pytestmark = pytest.mark.kafka


@pytest.fixture
def instance(tmp_path, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


@pytest.fixture
def crash(kafka_bootstrap_servers, kafka_topic, tmp_path, monkeypatch):
    """Makes run tags for a crash; every test has its own topic and transactional ids."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    marks = tmp_path / "marks"
    marks.mkdir()
    topic = kafka_topic(partitions=3)

    def tags(point=None, **more):
        found = {"crash/topic": topic, "crash/marks": str(marks), **more}
        return found | ({"crash/point": point} if point else {})

    tags.topic, tags.marks = topic, marks
    tags.run_config = crashing.run_config(kafka_bootstrap_servers, f"t{uuid.uuid4().hex[:8]}")
    tags.options = lambda point=None, **more: {
        "tags": tags(point, **more),
        "run_config": tags.run_config,
        "partition_key": "p",
    }
    return tags


def run(job, instance, crash, point=None, **options):
    return dg.execute_job(
        dg.reconstructable(job),
        instance,
        tags=crash(point),
        run_config=crash.run_config,
        raise_on_error=False,
        **options,
    )


def read(bootstrap_servers, topic, isolation="read_committed"):
    """Every record of a topic that an independent consumer sees now, as (partition, offset, value)."""
    found = read_topic(bootstrap_servers, topic, isolation)
    return [(record.partition, record.offset, orjson.loads(record.value)) for record in found]


def last_materialization(instance, asset, partition=None):
    filters = dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[partition] if partition else None)
    return instance.fetch_materializations(filters, limit=1).records[0].asset_materialization


def kill_and_retry(job, asset, point, instance, crash, servers):
    """A step killed at a point, retried by Dagster: one committed set, told truly."""
    with run(job, instance, crash, point) as result:
        assert result.success
    assert [mark.name for mark in crash.marks.iterdir()] == [point], "the crash never happened"
    records = read(servers, crash.topic)
    assert_once(records)
    told = last_materialization(instance, asset)
    assert_told_truly(told, records)
    assert told.metadata["kafka/replayed"].value == (point == "after_commit")


@pytest.mark.parametrize("point", POINTS)
def test_a_step_killed_anywhere_is_published_once(point, instance, crash, kafka_bootstrap_servers):
    kill_and_retry(crashing.crashing_job, "crashing", point, instance, crash, kafka_bootstrap_servers)


def test_without_a_crash_a_mark_is_missing(instance, crash, kafka_bootstrap_servers):
    """The crash harness can fail: without its crash it says so."""
    with pytest.raises(AssertionError, match="the crash never happened"):
        kill_and_retry(crashing.crashing_job, "crashing", None, instance, crash, kafka_bootstrap_servers)


def test_an_op_without_asset_key_is_published_once(instance, crash, kafka_bootstrap_servers):
    with run(crashing.crashing_op_job, instance, crash, "after_commit") as result:
        assert result.success
    assert [mark.name for mark in crash.marks.iterdir()] == ["after_commit"]
    assert_once(read(kafka_bootstrap_servers, crash.topic))


@pytest.mark.parametrize("point", ["mid_write", "after_commit"])
def test_reexecution_from_failure_repeats_the_publication(point, instance, crash, kafka_bootstrap_servers):
    with run(crashing.without_policy_job, instance, crash, point) as first:
        assert not first.success
    options = ReexecutionOptions.from_failure(first.run_id, instance)
    with run(crashing.without_policy_job, instance, crash, reexecution_options=options) as second:
        assert second.success
    records = read(kafka_bootstrap_servers, crash.topic)
    assert_once(records)
    told = last_materialization(instance, "crashing_without_policy")
    assert_told_truly(told, records)
    assert told.metadata["kafka/replayed"].value == (point == "after_commit")


def test_a_retry_of_a_retry_repeats_the_publication(instance, crash, kafka_bootstrap_servers):
    with run(crashing.session_job, instance, crash, "after_commit") as first:
        assert not first.success
    options = ReexecutionOptions.from_failure(first.run_id, instance)
    with run(crashing.session_job, instance, crash, "before_begin", reexecution_options=options) as second:
        assert not second.success
    options = ReexecutionOptions.from_failure(second.run_id, instance)
    with run(crashing.session_job, instance, crash, reexecution_options=options) as third:
        assert third.success
    records = read(kafka_bootstrap_servers, crash.topic)
    assert_once(records)
    assert_told_truly(last_materialization(instance, "session"), records)


def test_reexecution_of_everything_is_new_work(instance, crash, kafka_bootstrap_servers):
    with run(crashing.crashing_job, instance, crash) as first:
        assert first.success
    again = ReexecutionOptions(first.run_id)
    with run(crashing.crashing_job, instance, crash, "after_commit", reexecution_options=again) as second:
        assert second.success
    records = read(kafka_bootstrap_servers, crash.topic)
    assert len(records) == 2 * RECORDS
    for run_id in (first.run_id, second.run_id):
        assert_once([record for record in records if record[2]["run"] == run_id])


def test_a_retry_after_a_reexecution_of_everything_finds_that_ones_publication(
    instance, crash, kafka_bootstrap_servers
):
    with run(crashing.without_policy_job, instance, crash) as first:
        assert first.success
    everything = ReexecutionOptions(first.run_id)
    with run(crashing.without_policy_job, instance, crash, "after_commit", reexecution_options=everything) as second:
        assert not second.success
    failed = ReexecutionOptions.from_failure(second.run_id, instance)
    with run(crashing.without_policy_job, instance, crash, reexecution_options=failed) as third:
        assert third.success
    records = read(kafka_bootstrap_servers, crash.topic)
    assert len(records) == 2 * RECORDS
    assert {value["run"] for _, _, value in records} == {first.run_id, second.run_id}


@pytest.mark.parametrize(
    ("tags", "same"),
    [
        ({"dagster/retry_number": "1"}, True),
        ({"dagster/is_resume_retry": "true"}, True),
        ({"dagster/is_asset_resume_retry": "true"}, True),
        ({}, False),
    ],
)
def test_dagsters_retry_tags_tell_a_retry(tags, same, instance, crash, kafka_bootstrap_servers):
    """As the run-retry daemon and the UI launch them: a new run with its parent's id and these tags."""
    with run(crashing.without_policy_job, instance, crash, "after_commit") as first:
        assert not first.success
    job = crashing.without_policy_job()
    second = instance.create_run_for_job(
        job,
        tags=crash() | tags,
        run_config=crash.run_config,
        parent_run_id=first.run_id,
        root_run_id=first.run_id,
    )
    result = execute_run(dg.reconstructable(crashing.without_policy_job), second, instance)
    assert result.success
    records = read(kafka_bootstrap_servers, crash.topic)
    assert len(records) == (RECORDS if same else 2 * RECORDS)


def test_what_is_launched_from_an_automatic_retry_is_no_retry_for_its_tag(instance):
    """The UI's re-execution of selected steps has its parent's tags; the daemon counts on."""

    @dg.op
    def work():
        return 1

    job = dg.GraphDefinition("job", node_defs=[work]).to_job()
    runs = []

    def launched(number, parent):
        tags = {} if number is None else {"dagster/retry_number": str(number)}
        runs.append(
            instance.create_run_for_job(job, tags=tags, parent_run_id=parent, root_run_id=parent and runs[0].run_id)
        )
        return origin_of(instance, runs[-1], "work").run_id, runs[-1].run_id

    origin, first = launched(None, None)
    assert origin == first
    origin, second = launched(1, first)
    assert origin == first
    origin, selected = launched(1, second)
    assert origin == selected
    origin, third = launched(2, second)
    assert origin == first
    origin, _ = launched(3, selected)
    assert origin == selected
    assert len({first, second, selected, third}) == 4


@pytest.mark.parametrize("deleted", ["root", "between"])
def test_a_retry_of_a_run_that_was_deleted_is_its_work_unless_that_may_have_been_a_retry_itself(deleted, instance):
    @dg.op
    def work(): ...

    job = dg.GraphDefinition("job", node_defs=[work]).to_job()
    tags = {"dagster/is_resume_retry": "true"}
    root = instance.create_run_for_job(job).run_id
    between = instance.create_run_for_job(job, tags=tags, parent_run_id=root, root_run_id=root).run_id
    parent = root if deleted == "root" else between
    run = instance.create_run_for_job(job, tags=tags, parent_run_id=parent, root_run_id=root)
    instance.delete_run(parent)
    if deleted == "root":
        assert origin_of(instance, run, "work") == (root, "work")
    else:
        with pytest.raises(KafkaConfigError, match=f"run {between}: it was deleted, .*Launch a new run"):
            origin_of(instance, run, "work")


@dg.op
def first_step(): ...


@dg.op(ins={"after": dg.In(dg.Nothing)})
def second_step(context: dg.OpExecutionContext):
    if "fail" in context.run.tags:
        raise ZeroDivisionError


@dg.job(executor_def=dg.in_process_executor)
def two_steps():
    second_step(first_step())


@pytest.mark.parametrize(
    ("step", "fails", "origin"), [("first_step", 1, 2), ("second_step", 1, 2), ("second_step", 2, 0)]
)
def test_a_selected_step_is_a_retry_only_if_it_had_failed_last(step, fails, origin, instance):
    """Also where the run whose steps are selected was one from failure, which left out what had succeeded."""
    runs = []

    def launch(options=None):
        tags = {"fail": "yes"} if len(runs) < fails else {}
        done = dg.execute_job(
            dg.reconstructable(two_steps), instance, tags=tags, reexecution_options=options, raise_on_error=False
        )
        assert done.success is not bool(tags)
        runs.append(instance.get_run_by_id(done.run_id))

    launch()
    launch(ReexecutionOptions.from_failure(runs[0].run_id, instance))
    launch(ReexecutionOptions(runs[1].run_id, [step]))
    assert origin_of(instance, runs[2], step).run_id == runs[origin].run_id
    assert origin_of(instance, runs[1], "second_step").run_id == runs[0].run_id


def start(job, dagster_home, tags):
    """A run in a process of its own."""
    code = (
        "import sys, json, dagster as dg, crashing\n"
        "if __name__ == '__main__':\n"
        "    with dg.DagsterInstance.from_config(sys.argv[1]) as instance:\n"
        "        job = getattr(crashing, sys.argv[2])()\n"
        "        options = json.loads(sys.argv[3])\n"
        "        result = job.execute_in_process(instance=instance, raise_on_error=False, **options)\n"
        "        print(json.dumps([result.success, result.run_id]))\n"
        "        for event in result.all_events:\n"
        "            if event.is_step_failure: print(event.event_specific_data.error_display_string)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(dagster_home), job, json.dumps(tags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DAGSTER_HOME": str(dagster_home)},
    )


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@contextlib.contextmanager
def ended(process):
    """Ends a process that a failing test leaves behind."""
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate()


@pytest.mark.parametrize("point", ["mid_write", "after_flush", "before_commit"])
def test_a_zombie_is_fenced_and_publishes_nothing(point, instance, tmp_path, crash, kafka_bootstrap_servers):
    instance.add_dynamic_partitions("many", ["p"])
    stopped = {"crash/signal": str(int(signal.SIGSTOP)), "crash/name": "zombie"}
    zombie = start("partitioned_job", tmp_path, crash.options(point, **stopped))
    with ended(zombie):
        wait_for((crash.marks / point).exists)
        second = start("partitioned_job", tmp_path, crash.options(None, **{"crash/name": "second"}))
        with ended(second):
            out, err = second.communicate(timeout=60)
            assert "[true" in out, out + err
        zombie.send_signal(signal.SIGCONT)
        out, err = zombie.communicate(timeout=60)
    assert "[false" in out, out + err
    assert "another attempt" in out
    records = read(kafka_bootstrap_servers, crash.topic)
    assert_once(records)
    assert {value["run"] for _, _, value in records} == {"second"}
    # The fault is real: the zombie had written before it was stopped.
    assert any(
        value["run"] == "zombie" for _, _, value in read(kafka_bootstrap_servers, crash.topic, "read_uncommitted")
    )
    assert_told_truly(last_materialization(instance, "partitioned", "p"), records)


def test_two_runs_of_one_dagster_partition_leave_whole_publications(instance, tmp_path, crash, kafka_bootstrap_servers):
    instance.add_dynamic_partitions("many", ["p"])
    stopped = {"crash/signal": str(int(signal.SIGSTOP))}
    first = start("partitioned_job", tmp_path, crash.options("mid_write", **stopped))
    with ended(first):
        wait_for((crash.marks / "mid_write").exists)
        # SIGCONT stops nothing: it only marks that the second is in the midst of its publication.
        seen = {"crash/signal": str(int(signal.SIGCONT))}
        second = start("partitioned_job", tmp_path, crash.options("after_flush", **seen))
        with ended(second):
            wait_for((crash.marks / "after_flush").exists)
            first.send_signal(signal.SIGCONT)
            outs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert sorted("[true" in out for out in outs) == [False, True], outs
    assert "another attempt" in next(out for out in outs if "[false" in out)
    assert_once(read(kafka_bootstrap_servers, crash.topic))


def test_fifty_publishers_with_open_transactions_at_once_fence_nobody(kafka_bootstrap_servers, kafka_topic):
    topic = kafka_topic(partitions=3)
    config = PublicationConfig(producer=KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers))
    count, rows = 50, 20
    half_way = threading.Barrier(count, timeout=60)

    def publish(number):
        partition = f"p{number}"
        name = make_transactional_id(topic, ("asset", "made"), (partition,))
        with PublicationWriter(config, transactional_id=name, publication_id=partition, topic=topic) as writer:
            writer.send_all({"partition": partition, "i": i} for i in range(rows // 2))
            half_way.wait()
            writer.send_all({"partition": partition, "i": i} for i in range(rows // 2, rows))
        return writer.commit()

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        publications = list(pool.map(publish, range(count)))
    found = collections.defaultdict(list)
    for partition, offset, value in read(kafka_bootstrap_servers, topic):
        found[value["partition"]].append((partition, offset, value["i"]))
    assert {partition: sorted(i for _, _, i in records) for partition, records in found.items()} == {
        f"p{number}": list(range(rows)) for number in range(count)
    }
    for publication in publications:
        places = {
            (offsets.partition, offset)
            for offsets in publication.offsets
            for first, last in offsets.runs
            for offset in range(first, last + 1)
        }
        assert places == {(partition, offset) for partition, offset, _ in found[publication.publication_id]}
