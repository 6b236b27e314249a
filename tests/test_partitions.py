"""Dagster partitions of every kind, and several outputs of one step: each is a publication with names of its own."""

import collections
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Mapping

import dagster as dg
import polars as pl
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run

from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerResource
from dataforge_kafka_dagster.kafka.ledger import make_transactional_id

LONG = ["x" * 499 + end for end in "ab"]
ODD = ["Zürich/東京 🛫", "Zürich/東京 🛬", "a b", "a-b", "a.b", "../..", " ", "a'\"\\;"]
MULTI = dg.MultiPartitionsDefinition(
    {
        "day": dg.DailyPartitionsDefinition("2013-01-01", end_date="2013-01-03"),
        "origin": dg.StaticPartitionsDefinition(["JFK", "LGA"]),
    }
)
KINDS = {
    "500 characters": (dg.StaticPartitionsDefinition(LONG), LONG),
    "odd characters": (dg.StaticPartitionsDefinition(ODD), ODD[:2]),
    "multi-dimensional": (MULTI, list(MULTI.get_partition_keys())[1:3]),
    "dynamic": (dg.DynamicPartitionsDefinition(name="kinds"), ["one", "two/2"]),
    "hours": (
        dg.HourlyPartitionsDefinition("2013-01-01-00:00", end_date="2013-01-01-02:00"),
        ["2013-01-01-00:00", "2013-01-01-01:00"],
    ),
}


@pytest.fixture
def manager(kafka_bootstrap_servers):
    prefix = f"test-{uuid.uuid4().hex[:8]}"
    kafka = KafkaProducerResource(
        bootstrap_servers=kafka_bootstrap_servers, transactional_id_prefix=prefix, step_retry_delay=0.01
    )
    return KafkaIOManager(kafka=kafka)


def _publications(result):
    """What each materialization says, by asset and Dagster partition."""
    return {
        (event.asset_key.to_user_string(), event.partition): event.materialization.metadata["kafka/publication"].value
        for event in result.get_asset_materialization_events()
    }


@pytest.mark.parametrize("keys", [LONG, ODD], ids=["500 characters", "odd characters"])
def test_transactional_ids_are_legal_stable_and_different(keys):
    ids = [make_transactional_id("dagster", ("asset", "größe", "result"), (key,)) for key in keys]
    assert len(set(ids)) == len(keys)
    for key, name in zip(keys, ids, strict=True):
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,249}", name)
        assert name.startswith("dagster.asset.gr-e.result.")
        assert name == make_transactional_id("dagster", ("asset", "größe", "result"), (key,))


def test_the_parts_of_a_name_are_not_mixed_up():
    names = [(("a", "b"), ()), (("a",), ("b",)), (("a.b",), ()), (("a",), ("b", "c")), (("a",), ("b.c",))]
    assert len({make_transactional_id("p", name, partition) for name, partition in names}) == len(names)


RANGE = """
import dagster as dg
from dataforge_kafka_dagster.identity import output_identity

class Show(dg.IOManager):
    def handle_output(self, context, obj):
        print("identity:", output_identity(context).partition)

    def load_input(self, context): ...

@dg.asset(partitions_def=dg.StaticPartitionsDefinition(list("abcdefgh")), backfill_policy=dg.BackfillPolicy.single_run())
def letters():
    return 1

tags = {"dagster/asset_partition_range_start": "b", "dagster/asset_partition_range_end": "g"}
assert dg.materialize([letters], tags=tags, resources={"io_manager": Show()}).success
"""


@pytest.mark.slow
def test_a_range_has_one_name_in_every_process():
    """Dagster gives its Dagster partitions as a set, in an order that the process's hash seed makes."""
    for seed in "01":
        command = [sys.executable, "-c", RANGE]
        done = subprocess.run(
            command, check=False, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=120
        )
        assert f"identity: {tuple('bcdefg')}" in done.stdout, done.stderr


@pytest.mark.kafka
@pytest.mark.parametrize("kind", KINDS)
def test_each_dagster_partition_is_published_and_read_by_itself(kind, manager, kafka_topic, read, instance):
    definition, keys = KINDS[kind]
    topic, got = kafka_topic(), {}
    if isinstance(definition, dg.DynamicPartitionsDefinition):
        instance.add_dynamic_partitions(definition.name, keys)

    @dg.asset(partitions_def=definition, metadata={"kafka/topic": topic})
    def made(context: dg.AssetExecutionContext):
        return [{"key": context.partition_key, "i": i} for i in range(3)]

    @dg.asset(partitions_def=definition)
    def reader(context: dg.AssetExecutionContext, made: list) -> None:
        got[context.partition_key] = made

    said = {}
    for key in keys:
        options = {"resources": {"io_manager": manager}, "instance": instance, "partition_key": key}
        result = dg.materialize([made], **options)
        said[key] = _publications(result)["made", key]
    # The one that is read is not the one that was published last.
    options["partition_key"] = keys[0]
    assert dg.materialize([made, reader], selection=[reader], **options).success
    assert got == {keys[0]: [{"key": keys[0], "i": i} for i in range(3)]}
    assert len({publication["transactional_id"] for publication in said.values()}) == len(keys)
    assert len({publication["publication_id"] for publication in said.values()}) == len(keys)
    found = collections.Counter(json.loads(record.value)["key"] for record in read(topic))
    assert found == dict.fromkeys(keys, 3)


@pytest.mark.kafka
def test_a_range_of_days_in_one_run_is_one_publication(manager, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.asset(
        partitions_def=dg.DailyPartitionsDefinition("2013-01-01", end_date="2013-02-01"),
        metadata={"kafka/topic": topic},
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def made(context: dg.AssetExecutionContext):
        start, end = context.partition_time_window
        return [{"day": start.day}, {"day": end.day}, *({"key": key} for key in context.partition_keys)]

    days = {"dagster/asset_partition_range_start": "2013-01-05", "dagster/asset_partition_range_end": "2013-01-09"}
    result = dg.materialize([made], resources={"io_manager": manager}, instance=instance, tags=days)
    publications = _publications(result)
    assert sorted(partition for _, partition in publications) == [f"2013-01-0{day}" for day in range(5, 10)]
    assert len({publication["publication_id"] for publication in publications.values()}) == 1
    assert [json.loads(record.value) for record in read(topic)] == [
        {"day": 5},
        {"day": 10},
        *({"key": f"2013-01-0{day}"} for day in range(5, 10)),
    ]


@pytest.mark.kafka
@pytest.mark.parametrize("expected", [{1: [1], 2: [], 3: [1, 2, 3]}, {3: [1, 2, 3]}], ids=["three", "one"])
def test_an_input_annotated_as_a_mapping_has_the_records_of_each_dagster_partition(
    expected, manager, kafka_topic, instance
):
    daily = dg.DailyPartitionsDefinition("2013-01-01", end_date="2013-01-05")
    options = {"partitions_def": daily, "backfill_policy": dg.BackfillPolicy.single_run()}
    topic, got = kafka_topic(partitions=3), {}

    def numbers(day):
        return range(1, int(day[-1]) + 1) if day != "2013-01-02" else ()

    @dg.asset(metadata={"kafka/topic": topic}, **options)
    def made(context: dg.AssetExecutionContext) -> dict[str, list[dict]]:
        return {day: [{"n": n} for n in numbers(day)] for day in context.partition_keys}

    @dg.asset(**options)
    def lists(made: dict[str, list[dict]]) -> None:
        got["lists"] = {int(day[-1]): sorted(row["n"] for row in rows) for day, rows in made.items()}

    @dg.asset(**options)
    def frames(made: Mapping[str, pl.DataFrame] | None) -> None:
        got["frames"] = {int(day[-1]): sorted(frame["n"]) if len(frame) else [] for day, frame in made.items()}

    @dg.asset(**options)
    def only(made: dict) -> None:
        got["only"] = made

    days = {"start": f"2013-01-0{min(expected)}", "end": f"2013-01-0{max(expected)}"}
    tags = {f"dagster/asset_partition_range_{end}": day for end, day in days.items()}
    run = {"resources": {"io_manager": manager}, "instance": instance, "tags": tags}
    assert dg.materialize([made, lists, frames], **run).success
    assert got == {"lists": expected, "frames": expected}
    failed = dg.materialize([made, only], selection=[only], raise_on_error=False, **run)
    (event,) = failed.get_step_failure_events()
    assert "as dict[str, list[dict]] for those of each Dagster partition" in event.step_failure_data.error.to_string()


@pytest.mark.kafka
def test_an_input_by_dagster_partition_refuses_what_several_have_together(manager, kafka_topic, instance):
    daily = dg.DailyPartitionsDefinition("2013-01-01", end_date="2013-01-05")
    options = {"partitions_def": daily, "backfill_policy": dg.BackfillPolicy.single_run()}

    @dg.asset(metadata={"kafka/topic": kafka_topic()}, **options)
    def together():
        return [{"n": 1}]

    @dg.asset(**options)
    def reader(together: dict[str, list[dict]]) -> None: ...

    tags = {"dagster/asset_partition_range_start": "2013-01-01", "dagster/asset_partition_range_end": "2013-01-02"}
    run = {"resources": {"io_manager": manager}, "instance": instance, "tags": tags, "raise_on_error": False}
    (event,) = dg.materialize([together, reader], **run).get_step_failure_events()
    assert event.step_key == "reader"
    assert "several were published as one publication" in event.step_failure_data.error.to_string()


@pytest.mark.kafka
def test_several_outputs_of_one_step_are_published_once_each(manager, kafka_topic, read, instance):
    """The step fails when two of its three outputs are committed, one of them empty; its retry repeats neither."""
    topics = {name: kafka_topic(name=name) for name in ("first", "empty", "last")}
    attempts = []

    @dg.multi_asset(
        outs={name: dg.AssetOut(metadata={"kafka/topic": topic}) for name, topic in topics.items()},
        retry_policy=dg.RetryPolicy(max_retries=1),
    )
    def several():
        attempts.append(1)
        yield dg.Output([{"i": i, "attempt": len(attempts)} for i in range(5)], "first")
        yield dg.Output([], "empty")
        if len(attempts) == 1:
            raise ZeroDivisionError
        yield dg.Output(({"i": i} for i in range(7)), "last")

    result = dg.materialize([several], resources={"io_manager": manager}, instance=instance)
    assert len(attempts) == 2
    assert [json.loads(record.value) for record in read(topics["first"])] == [{"i": i, "attempt": 1} for i in range(5)]
    assert read(topics["empty"]) == []
    assert [json.loads(record.value) for record in read(topics["last"])] == [{"i": i} for i in range(7)]
    events = result.get_asset_materialization_events()
    records = [(event.asset_key.to_user_string(), event.materialization.metadata) for event in events]
    told = [(name, said["kafka/records"].value, said["kafka/replayed"].value) for name, said in records]
    assert told == [
        ("first", 5, False),
        ("empty", 0, False),
        ("first", 5, True),
        ("empty", 0, True),
        ("last", 7, False),
    ]
    assert len({said["kafka/publication"].value["transactional_id"] for _, said in records}) == 3


@pytest.mark.kafka
def test_a_failure_in_a_range_names_its_dagster_partition(manager, kafka_topic, instance):
    letters = dg.StaticPartitionsDefinition(list("abc"))

    @dg.asset(
        partitions_def=letters, backfill_policy=dg.BackfillPolicy.single_run(), metadata={"kafka/topic": kafka_topic()}
    )
    def ranged(context: dg.AssetExecutionContext):
        return {letter: [{"x": object() if letter == "b" else 1}] for letter in context.partition_keys}

    tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"}
    resources = {"io_manager": manager}
    failed = dg.materialize([ranged], raise_on_error=False, resources=resources, instance=instance, tags=tags)
    (failure,) = (event.event_specific_data.user_failure_data for event in failed.get_step_failure_events())
    assert failure.description.startswith("Dagster partition 'b': record 0, field 'x': ")
    assert failure.metadata["kafka/dagster_partition"].value == "b"
    assert failure.metadata["kafka/culprit"].value == "record 0, field 'x'"


@pytest.mark.kafka
def test_what_a_failed_run_has_published_of_a_range_is_told_but_not_as_done_by_that_run(
    manager, kafka_topic, read, instance
):
    """A re-execution "from asset failure" leaves out each asset of which its run has materialized any partition."""
    letters = dg.StaticPartitionsDefinition(list("abcd"))
    topic = kafka_topic()

    def rows(letter):
        yield {"letter": letter}
        if letter == "c":
            raise ZeroDivisionError

    @dg.asset(partitions_def=letters, backfill_policy=dg.BackfillPolicy.single_run(), metadata={"kafka/topic": topic})
    def ranged(context: dg.AssetExecutionContext):
        return {letter: rows(letter) if letter != "b" else [] for letter in context.partition_keys}

    def told(letter):
        records = dg.AssetRecordsFilter(asset_key=ranged.key, asset_partitions=[letter])
        return [event.asset_materialization for event in instance.fetch_materializations(records, limit=9).records]

    tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "d"}
    run = {"resources": {"io_manager": manager}, "instance": instance, "tags": tags}
    failed = dg.materialize([ranged], raise_on_error=False, **run)
    assert instance.all_logs(failed.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION) == []
    assert [len(told(letter)) for letter in "abcd"] == [1, 1, 0, 0]
    assert told("a")[0].metadata["kafka/run"].value == failed.run_id
    assert told("b")[0].metadata["kafka/records"].value == 0

    @dg.asset(partitions_def=letters)
    def reader(ranged: list) -> None:
        assert ranged in ([], [{"letter": "a"}])

    for letter in "ab":
        assert dg.materialize(
            [ranged, reader], selection=[reader], partition_key=letter, resources=run["resources"], instance=instance
        ).success
    assert [json.loads(record.value)["letter"] for record in read(topic)] == ["a"]


@pytest.mark.kafka
def test_an_event_log_that_takes_nothing_does_not_hide_why_a_range_has_failed(
    manager, kafka_topic, instance, monkeypatch
):
    letters = dg.StaticPartitionsDefinition(["a", "b"])

    def rows(letter):
        yield letter
        if letter == "b":
            raise ZeroDivisionError

    @dg.asset(
        partitions_def=letters, backfill_policy=dg.BackfillPolicy.single_run(), metadata={"kafka/topic": kafka_topic()}
    )
    def ranged(context: dg.AssetExecutionContext):
        return {letter: rows(letter) for letter in context.partition_keys}

    def refuse(*_, **__):
        raise OSError("the event log is away")

    monkeypatch.setattr(type(instance), "report_runless_asset_event", refuse)
    tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "b"}
    failed = dg.materialize(
        [ranged], raise_on_error=False, resources={"io_manager": manager}, instance=instance, tags=tags
    )
    causes = [failed.failure_data_for_node("ranged").error]
    while causes[-1].cause:
        causes.append(causes[-1].cause)
    assert causes[-1].cls_name == "ZeroDivisionError"


@pytest.mark.kafka
def test_a_retry_of_a_range_publishes_what_is_missing_beside_what_another_run_has_published_anew(
    manager, kafka_topic, read, instance
):
    letters = dg.StaticPartitionsDefinition(list("abcd"))
    topic = kafka_topic()
    runs = []

    def rows(letter):
        if letter == "c" and len(runs) == 1:
            raise ZeroDivisionError
        yield {"letter": letter, "run": len(runs)}

    @dg.asset(partitions_def=letters, backfill_policy=dg.BackfillPolicy.single_run(), metadata={"kafka/topic": topic})
    def ranged(context: dg.AssetExecutionContext):
        runs.append(context.run.run_id)
        return {letter: rows(letter) for letter in context.partition_keys}

    job = dg.define_asset_job("job", executor_def=dg.in_process_executor)
    resources = {"io_manager": manager}
    definition = dg.Definitions([ranged], jobs=[job], resources=resources).resolve_job_def("job")
    tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "d"}
    first = definition.execute_in_process(instance=instance, raise_on_error=False, tags=tags)
    assert not first.success
    assert definition.execute_in_process(instance=instance, partition_key="a").success
    run = instance.create_run_for_job(
        definition,
        tags=tags | {"dagster/is_resume_retry": "true"},
        parent_run_id=first.run_id,
        root_run_id=first.run_id,
    )
    retry = execute_run(InMemoryJob(definition), run, instance, raise_on_error=False)
    (failure,) = (event.event_specific_data.user_failure_data for event in retry.get_step_failure_events())
    assert failure.description.startswith("Dagster partition 'a': ")
    assert "it has been published anew since, by another run" in failure.description
    published = [json.loads(record.value) for record in read(topic)]
    assert [(row["letter"], row["run"]) for row in published] == [("a", 1), ("b", 1), ("a", 2), ("c", 3), ("d", 3)]
    assert instance.get_materialized_partitions(ranged.key) == set("abcd")
