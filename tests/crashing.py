"""Assets and jobs that crash where a test's run tags say, and what must hold for them afterwards."""

import collections
import functools
import os
import signal
import time
from pathlib import Path

import dagster as dg

from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerResource
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.ledger import Ledger
from dataforge_kafka_dagster.kafka.publication import PublicationWriter

POINTS = ("before_begin", "mid_write", "after_flush", "before_commit", "after_commit")
RECORDS = 1_500

_plan = {"point": None, "marks": None, "signal": signal.SIGKILL}


def follow(context):
    """Take the crash that the run's tags ask for."""
    tags = context.run.tags
    _plan.update(point=tags.get("crash/point"), marks=tags.get("crash/marks"))
    _plan["signal"] = signal.Signals(int(tags.get("crash/signal", signal.SIGKILL)))


def crash_at(point):
    """Crash if this is the point, once for each folder of marks, and leave a mark that the crash was reached."""
    if _plan["point"] != point:
        return
    mark = Path(_plan["marks"]) / point
    if mark.exists():
        return
    mark.write_text(str(os.getpid()))
    os.kill(os.getpid(), _plan["signal"])
    time.sleep(0.05)


def _crash_before(owner, name, point, when=lambda *_: True):
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        if when(*args):
            crash_at(point)
        return method(*args, **kwargs)

    setattr(owner, name, wrapped)


def _crash_after(owner, name, point):
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        result = method(*args, **kwargs)
        crash_at(point)
        return result

    setattr(owner, name, wrapped)


_crash_before(Ledger, "read", "before_begin")
_crash_after(PublicationWriter, "_flush", "after_flush")
_crash_before(
    Connection, "resume", "before_commit", lambda _, call, *__: getattr(call, "__name__", "") == "commit_transaction"
)
_crash_after(PublicationWriter, "_commit_transaction", "after_commit")


def rows(context, count=RECORDS):
    """Rows named by run, Dagster partition and number, with the mid-write crash half-way."""
    partition = context.partition_key if context.has_partition_key else ""
    pause = float(context.run.tags.get("crash/pause", 0))
    for i in range(count):
        if pause:
            time.sleep(pause)
        if i == count // 2 and _plan["point"] == "mid_write":
            time.sleep(0.2)  # lets the first half reach the broker
            crash_at("mid_write")
        yield {"run": context.run.tags.get("crash/name", context.run_id), "partition": partition, "i": i}


def gathered(context):
    """Rows of a Dagster partition that wait half-way until as many others as the tags say are half-way too."""
    marks, count = Path(context.run.tags["crash/marks"]), int(context.run.tags["crash/gather"])
    for row in rows(context):
        if row["i"] == RECORDS // 2:
            (marks / context.partition_key).touch()
            deadline = time.monotonic() + 300
            while len(list(marks.iterdir())) < count:
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.1)
        yield row


kafka = KafkaProducerResource.configure_at_launch()
many = dg.DynamicPartitionsDefinition(name="many")


multiprocess = dg.multiprocess_executor.configured(
    {"start_method": {"forkserver": {"preload_modules": ["crashing"]}}}, name="multiprocess"
)


@dg.asset(io_manager_key="kafka_io", retry_policy=dg.RetryPolicy(max_retries=3))
def crashing(context: dg.AssetExecutionContext):
    follow(context)
    yield dg.Output(rows(context), metadata={"kafka/topic": context.run.tags["crash/topic"]})


@dg.asset(io_manager_key="kafka_io")
def crashing_without_policy(context: dg.AssetExecutionContext):
    follow(context)
    yield dg.Output(rows(context), metadata={"kafka/topic": context.run.tags["crash/topic"]})


@dg.asset(io_manager_key="kafka_io", partitions_def=many)
def partitioned(context: dg.AssetExecutionContext):
    follow(context)
    count = int(context.run.tags.get("crash/records", RECORDS))
    yield dg.Output(rows(context, count), metadata={"kafka/topic": context.run.tags["crash/topic"]})


@dg.asset(io_manager_key="kafka_io", partitions_def=many)
def gathering(context: dg.AssetExecutionContext):
    yield dg.Output(gathered(context), metadata={"kafka/topic": context.run.tags["crash/topic"]})


@dg.asset
def session(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
    follow(context)
    topic = context.run.tags["crash/topic"]
    with kafka.publishing(context, topic=topic) as publication:
        for row in rows(context):
            publication.send(row, key=str(row["i"]))
    return publication.materialize_result()


@dg.op(retry_policy=dg.RetryPolicy(max_retries=3))
def crashing_op(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
    follow(context)
    with kafka.publishing(context, topic=context.run.tags["crash/topic"]) as publication:
        publication.send_all(rows(context))
    context.add_output_metadata({"records": publication.result.records, "replayed": publication.result.replayed})


@dg.job(executor_def=multiprocess)
def op_job():
    crashing_op()


def run_config(bootstrap_servers, prefix):
    """What the tests' resource needs at launch."""
    options = {
        "bootstrap_servers": bootstrap_servers,
        "transactional_id_prefix": prefix,
        "delivery_timeout": 60.0,
        "step_retry_delay": 0.1,
    }
    return {"resources": {"kafka": {"config": options}}}


definitions = dg.Definitions(
    assets=[crashing, crashing_without_policy, partitioned, gathering, session],
    jobs=[
        dg.define_asset_job("crashing_job", [crashing], executor_def=multiprocess),
        dg.define_asset_job("without_policy_job", [crashing_without_policy], executor_def=multiprocess),
        dg.define_asset_job("partitioned_job", [partitioned], executor_def=dg.in_process_executor),
        dg.define_asset_job("gathering_job", [gathering], executor_def=multiprocess),
        dg.define_asset_job("session_job", [session], executor_def=multiprocess),
        op_job,
    ],
    resources={"kafka": kafka, "kafka_io": KafkaIOManager(kafka=kafka)},
)


def crashing_job():
    return definitions.resolve_job_def("crashing_job")


def without_policy_job():
    return definitions.resolve_job_def("without_policy_job")


def partitioned_job():
    return definitions.resolve_job_def("partitioned_job")


def gathering_job():
    return definitions.resolve_job_def("gathering_job")


def session_job():
    return definitions.resolve_job_def("session_job")


def crashing_op_job():
    return definitions.resolve_job_def("op_job")


def run_gathering(partition, home, tags, config):
    """One run in a process of its own, on the Dagster instance of a folder; whether it succeeded."""
    with (
        dg.DagsterInstance.from_config(home) as instance,
        dg.execute_job(
            dg.reconstructable(gathering_job),
            instance,
            tags=tags | {"dagster/partition": partition},
            run_config=config,
            raise_on_error=False,
        ) as result,
    ):
        return result.success


def publish_slowly(sizes, topic, config, home):
    """A run for each Dagster partition and its number of records; when each began and ended, by time.time()."""
    times = []
    with dg.DagsterInstance.from_config(home) as instance:
        for partition, size in sizes:
            tags = {"crash/topic": topic, "crash/records": str(size), "crash/pause": "0.002"}
            began = time.time()
            options = {"partition_key": partition, "tags": tags, "run_config": config, "instance": instance}
            partitioned_job().execute_in_process(**options)
            times.append((began, time.time()))
    return times


def assert_once(records, count=RECORDS):
    """Every number from 0 to count, once, all of one run."""
    numbers = collections.Counter(value["i"] for _, _, value in records)
    duplicates = {number: times for number, times in numbers.items() if times > 1}
    lost = set(range(count)) - set(numbers)
    assert not duplicates
    assert not lost
    assert len({value["run"] for _, _, value in records}) == 1


def assert_told_truly(materialization, records):
    """Count and offsets of a materialization are what a reader found."""
    metadata = materialization.metadata
    assert metadata["dagster/row_count"].value == len(records)
    told = {row.data["partition"]: row.data for row in metadata["kafka/offsets"].value.records}
    found = collections.defaultdict(list)
    for partition, offset, _ in records:
        found[partition].append(offset)
    assert {
        partition: (row["first offset"], row["last offset"], row["records"]) for partition, row in told.items()
    } == {partition: (min(offsets), max(offsets), len(offsets)) for partition, offsets in found.items()}
