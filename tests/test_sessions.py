"""Which publication a `publishing` session is: in graphs, multi-assets and their retries, checks, ranges and tests."""

import concurrent.futures
import contextlib
import inspect
import json
import logging
import threading
import time
import types
import uuid

import dagster as dg
import polars as pl
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run

from dataforge_kafka_dagster import (
    KafkaError,
    KafkaIOManager,
    KafkaProducerConfig,
    KafkaProducerResource,
    KafkaRecord,
    build_publication_checks,
)
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.publication import PublicationWriter

pytestmark = pytest.mark.kafka


@pytest.fixture
def kafka(kafka_bootstrap_servers):
    # The prefix keeps apart test sessions that share a Kafka.
    return KafkaProducerResource(
        bootstrap_servers=kafka_bootstrap_servers,
        step_retry_delay=0.01,
        transactional_id_prefix=f"test-{uuid.uuid4().hex[:8]}",
    )


def _values(found):
    return sorted(record.value.decode() for record in found)


def _failure(result, node):
    return result.failure_data_for_node(node).user_failure_data.description


def test_each_step_of_a_graph_asset_publishes(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.op(out=dg.DynamicOut())
    def parts(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("parts")
        for name in "ab":
            yield dg.DynamicOutput(name, mapping_key=name)

    @dg.op
    def part(context: dg.OpExecutionContext, name, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send(name)
        return publication.replayed

    @dg.op
    def none_replayed(replayed):
        return not any(replayed)

    @dg.graph_asset
    def of_steps():
        return none_replayed(parts().map(part).collect())

    result = dg.materialize([of_steps], resources={"kafka": kafka}, instance=instance)
    assert result.output_for_node("of_steps.none_replayed")
    assert _values(read(topic)) == ["a", "b", "parts"]


def test_sessions_of_two_resources_in_one_step_do_not_collide(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.op
    def twice(context: dg.OpExecutionContext, one: KafkaProducerResource, other: KafkaProducerResource):
        for resource in (one, other):
            with resource.publishing(context, topic=topic) as publication:
                publication.send("x")

    @dg.job(resource_defs={"one": kafka, "other": kafka.model_copy(update={"compression_type": "lz4"})})
    def work():
        twice()

    assert work.execute_in_process(instance=instance).success
    assert _values(read(topic)) == ["x", "x"]


def test_a_step_of_a_graph_asset_is_not_the_asset_whose_key_spells_the_same_path(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.op
    def clean(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("step")
        return 1

    @dg.graph_asset
    def orders():
        return clean()

    @dg.asset(key=["orders", "clean"])
    def cleaned(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("asset")
        return publication.materialize_result()

    resources = {"kafka": kafka, "io_manager": dg.mem_io_manager}
    assert dg.materialize([orders, cleaned], resources=resources, instance=instance).success
    assert _values(read(topic)) == ["asset", "step"]


def test_a_session_is_not_that_of_the_io_manager_whose_output_has_its_name(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.asset(key=["orders", "publishing"], metadata={"kafka/topic": topic})
    def returned():
        return "returned"

    @dg.asset(key="orders")
    def sent(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic, name="result") as publication:
            publication.send("sent")
        return publication.materialize_result()

    resources = {"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka)}
    assert dg.materialize([returned, sent], resources=resources, instance=instance).success
    assert _values(read(topic)) == ["returned", "sent"]


@pytest.mark.parametrize("names", [["load", "load-2", "load"], ["load", "load", "load-2"], [None, None, "{topic}-2"]])
def test_the_number_of_a_session_is_no_name_of_another(names, kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.asset
    def several(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        for number, name in enumerate(names):
            with kafka.publishing(context, topic=topic, name=name and name.format(topic=topic)) as publication:
                publication.send(str(number))

    assert dg.materialize([several], resources={"kafka": kafka}, instance=instance).success
    assert _values(read(topic)) == ["0", "1", "2"]


def _some_rows(fails):
    for i in range(1000):
        if i == 700:
            if fails == "bad record":
                yield {"i": object()}
            elif fails == "generator":
                raise ZeroDivisionError
        yield {"i": i}


@pytest.mark.parametrize("fails", ["bad record", "generator", "nothing"])
def test_records_that_were_sent_by_half_are_not_committed_if_their_error_is_caught(
    fails, kafka, kafka_topic, read, instance
):
    topic = kafka_topic()

    @dg.op
    def work(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            with contextlib.suppress(KafkaError, ZeroDivisionError):
                publication.send_all(_some_rows(fails))
            publication.send({"i": "last"})

    @dg.job(resource_defs={"kafka": kafka})
    def job():
        work()

    result = job.execute_in_process(instance=instance, raise_on_error=False)
    assert result.success is (fails == "nothing")
    assert len(read(topic)) == (1001 if fails == "nothing" else 0)
    if fails == "bad record":
        assert "record 700" in _failure(result, "work")
    elif fails == "generator":
        assert "with ZeroDivisionError" in _failure(result, "work")


def _ends(error, after):
    yield from ({"i": i} for i in range(after))
    raise error


THREADS = {
    "error": lambda *_: _ends(ZeroDivisionError(), 300),
    "error before the first record": lambda *_: _ends(ZeroDivisionError(), 0),
    "exit": lambda *_: _ends(SystemExit("no"), 300),
    "slow first record": lambda began, go_on: (began.set() or (go_on.wait(30) and {"i": i}) for i in range(1)),
    "slow frame": lambda began, go_on: pl.LazyFrame({"i": [1]}).map_batches(
        lambda frame: began.set() or (go_on.wait(30) and frame)
    ),
}


@pytest.mark.parametrize("what", THREADS)
def test_what_another_thread_could_not_send_is_not_left_out(what, kafka, kafka_topic, read, instance):
    """Its error is in a future that nobody may look at."""
    topic, began, go_on = kafka_topic(), threading.Event(), threading.Event()

    @dg.asset
    def threads(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with (
            concurrent.futures.ThreadPoolExecutor(1) as pool,
            contextlib.ExitStack() as after,
            kafka.publishing(context, topic=topic) as publication,
        ):
            after.callback(go_on.set)
            publication.send({"i": -1})
            sent = pool.submit(publication.send_all, THREADS[what](began, go_on))
            if "slow" in what:
                assert began.wait(30)
            else:
                concurrent.futures.wait([sent], 30)
        return publication.materialize_result()

    result = dg.materialize([threads], resources={"kafka": kafka}, instance=instance, raise_on_error=False)
    assert not result.success
    assert ("still sending" if "slow" in what else "a send_all ended") in _failure(result, "threads")
    assert result.get_asset_materialization_events() == []
    assert read(topic) == []


@pytest.mark.parametrize("value", [{"i": float("nan")}, object()])
def test_a_record_that_another_thread_could_not_send_is_not_left_out(value, kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.asset
    def threads(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with concurrent.futures.ThreadPoolExecutor(1) as pool, kafka.publishing(context, topic=topic) as publication:
            publication.send({"i": -1})
            with contextlib.suppress(KafkaError):  # one's own error is one's own to judge
                publication.send(value)
            concurrent.futures.wait([pool.submit(publication.send, value)], 30)
        return publication.materialize_result()

    result = dg.materialize([threads], resources={"kafka": kafka}, instance=instance, raise_on_error=False)
    assert not result.success
    assert "record 1" in _failure(result, "threads")
    assert read(topic) == []


def test_records_that_come_one_by_one_are_not_committed_by_half_either(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    def slowly():
        for partition in (0, 7, 0):
            time.sleep(0.6)  # longer than a chunk is waited for
            yield KafkaRecord("x", partition=partition)

    @dg.asset
    def slow(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication, contextlib.suppress(KafkaError):
            publication.send_all(slowly())

    result = dg.materialize([slow], resources={"kafka": kafka}, instance=instance, raise_on_error=False)
    assert "no Kafka partition 7" in _failure(result, "slow")
    assert read(topic) == []


def _run_and_resume(assets, names, kafka, instance, tags=None, partition=None, times=1):
    """Fails a run, and retries the assets with these names, as the UI does "from failure"; returns the last retry."""
    job = dg.define_asset_job("job", executor_def=dg.in_process_executor)
    resources = {"kafka": kafka, "kafka_io": KafkaIOManager(kafka=kafka), "io_manager": dg.mem_io_manager}
    definition = dg.Definitions(assets, jobs=[job], resources=resources).resolve_job_def("job")
    last = definition.execute_in_process(instance=instance, raise_on_error=False, partition_key=partition)
    tags = tags or {"dagster/is_asset_resume_retry": "true"}
    keys = frozenset(map(dg.AssetKey.from_user_string, names))
    subset = definition.get_subset(asset_selection=keys)
    for _ in range(times):
        assert not last.success
        run = instance.create_run_for_job(
            subset,
            tags=tags if partition is None else tags | {"dagster/partition": partition},
            asset_selection=keys,
            parent_run_id=last.run_id,
            root_run_id=last.run_id,
        )
        last = execute_run(InMemoryJob(subset), run, instance, raise_on_error=False)
    return last


@dg.asset
def first() -> None: ...


@dg.asset(deps=["a"])
def between() -> None: ...


CUT_IN_THREE = {"a": [], "b": ["first"], "c": ["between"]}
"""What assets of one function depend on, so that Dagster runs each in a step of its own."""


@pytest.mark.parametrize("failed", [["b"], ["b", "c"]])
def test_a_retry_of_some_of_several_assets_finds_their_publications(failed, kafka, kafka_topic, read, instance):
    topics = {name: kafka_topic() for name in "abc"}
    attempts = []

    @dg.multi_asset(specs=[dg.AssetSpec(name, skippable=True) for name in ["a", *failed]], can_subset=True)
    def several(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        attempts.append(1)
        for key in sorted(context.selected_asset_keys):
            name = key.to_user_string()
            with kafka.publishing(context, topic=topics[name]) as publication:
                publication.send(name)
            if name == "b" and len(attempts) == 1:
                raise ZeroDivisionError
            yield publication.materialize_result(asset_key=key)

    assert _run_and_resume([several], failed, kafka, instance).success
    assert {name: len(read(topics[name])) for name in ["a", *failed]} == dict.fromkeys(["a", *failed], 1)


def test_a_retry_of_an_asset_without_partitions_beside_one_with_them_finds_it(kafka, kafka_topic, read, instance):
    topic = kafka_topic()
    days = dg.StaticPartitionsDefinition(["x", "y"])
    attempts = []

    @dg.multi_asset(
        specs=[dg.AssetSpec("a", partitions_def=days, skippable=True), dg.AssetSpec("b", skippable=True)],
        can_subset=True,
    )
    def several(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        attempts.append(1)
        for key in sorted(context.selected_asset_keys):
            name = key.to_user_string()
            with kafka.publishing(context, topic=topic, name=name) as publication:
                publication.send(name)
            if name == "b" and len(attempts) == 1:
                raise ZeroDivisionError
            yield publication.materialize_result(asset_key=key)

    assert _run_and_resume([several], ["b"], kafka, instance, partition="x").success
    assert _values(read(topic)) == ["a", "b"]


def test_an_asset_without_partitions_is_read_though_one_with_them_was_published_with_it(kafka, kafka_topic, instance):
    topic, got = kafka_topic(), []
    days = dg.StaticPartitionsDefinition(["x", "y"])

    @dg.multi_asset(specs=[dg.AssetSpec("by_day", partitions_def=days), dg.AssetSpec("whole")], can_subset=True)
    def both(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send({"a": 1})
        yield publication.materialize_result("by_day")
        yield publication.materialize_result("whole")

    @dg.asset
    def reads(whole: list[dict]) -> None:
        got.extend(whole)

    run = {"resources": {"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka)}, "instance": instance}
    assert dg.materialize([both], partition_key="x", **run).success
    assert dg.materialize([both, reads], selection=[reads], **run).success
    assert got == [{"a": 1}]


@pytest.mark.parametrize("named", [False, True])
def test_a_session_is_not_taken_for_that_of_an_asset_which_is_not_retried(named, kafka, kafka_topic, read, instance):
    """The retry's first session on the topic has the default name that another asset's had."""
    topic = kafka_topic()
    attempts = []

    @dg.multi_asset(specs=[dg.AssetSpec(name, skippable=True) for name in "ab"], can_subset=True)
    def several(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        attempts.append(1)
        for key in sorted(context.selected_asset_keys):
            name = key.to_user_string()
            with kafka.publishing(context, topic=topic, name=name if named else None) as publication:
                publication.send(name)
                if name == "b" and len(attempts) == 1:
                    raise ZeroDivisionError
            yield publication.materialize_result(asset_key=key)

    result = _run_and_resume([several], ["b"], kafka, instance)
    assert result.success is named
    assert _values(read(topic)) == (["a", "b"] if named else ["a"])
    if not named:
        (event,) = [event for event in result.all_events if event.is_step_failure]
        assert "it was published for asset 'a'" in event.step_failure_data.user_failure_data.description
        assert "publishing(..., name=)" in event.step_failure_data.user_failure_data.description


@pytest.mark.parametrize("named", [False, True])
def test_a_session_that_a_run_of_other_assets_fences_says_to_name_it(named, kafka, kafka_topic, read, instance):
    topic = kafka_topic()
    run = {"resources": {"kafka": kafka}, "instance": instance, "raise_on_error": False}

    @dg.multi_asset(specs=[dg.AssetSpec(name, skippable=True) for name in "ab"], can_subset=True)
    def several(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        (key,) = context.selected_asset_keys
        name = key.to_user_string()
        with kafka.publishing(context, topic=topic, name=name if named else None) as publication:
            publication.send(name)
            if name == "a":
                assert dg.materialize([several], selection=["b"], **run).success
        yield publication.materialize_result(asset_key=key)

    result = dg.materialize([several], selection=["a"], **run)
    assert result.success is named
    assert sorted(_values(read(topic))) == (["a", "b"] if named else ["b"])
    if not named:
        said = _failure(result, "several")
        assert "another attempt at the same publication took over" in said
        assert "so would a run of other assets of this multi-asset" in said
        assert "publishing(..., name=)" in said


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_graph_asset_that_is_executed_again_finds_what_its_steps_had_published(
    by_hand, kafka, kafka_topic, read, instance
):
    """Dagster executes all of its steps again, also those that had succeeded."""
    topic = kafka_topic()
    attempts = []

    @dg.op
    def publish(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("x")

    @dg.op
    def fail_once(_published):
        attempts.append(1)
        if len(attempts) == 1:
            raise ZeroDivisionError
        return 1

    @dg.graph_asset
    def of_steps():
        return fail_once(publish())

    tags = {"dagster/is_asset_resume_retry": "true"} | ({} if by_hand else {"dagster/retry_number": "1"})
    assert _run_and_resume([of_steps], ["of_steps"], kafka, instance, tags).success
    assert _values(read(topic)) == ["x"]


@pytest.mark.parametrize("by", ["session", "output"])
def test_a_retry_of_an_asset_that_shares_its_function_finds_its_own_publication(by, kafka, kafka_topic, read, instance):
    """Dagster calls the step `rides_2` in the first run, and in the retry, without that of eu, `rides`."""
    topic = kafka_topic()
    failures = iter([ZeroDivisionError] * 2)

    def fail_in_us(key):
        if key.path[0] == "us" and (failure := next(failures, None)):
            raise failure

    class Dies(KafkaIOManager):
        def handle_output(self, context, obj):
            super().handle_output(context, obj)
            fail_in_us(context.asset_key)

    @dg.asset(io_manager_def=Dies(kafka=kafka, topic=topic))
    def rides(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        region = context.asset_key.path[0]
        if by == "output":
            return region
        with kafka.publishing(context, topic=topic) as publication:
            publication.send(region)
        fail_in_us(context.asset_key)
        return publication.materialize_result()

    module = types.ModuleType("rides")
    module.rides = rides
    assets = [asset for region in ("eu", "us") for asset in dg.load_assets_from_modules([module], key_prefix=region)]
    result = _run_and_resume(assets, ["us/rides"], kafka, instance, times=2)
    assert result.success
    assert next(failures, None) is None
    assert _values(read(topic)) == ["eu", "us"]
    (said,) = result.get_asset_materialization_events()
    assert said.materialization.metadata["kafka/replayed"].value is True


def test_the_steps_of_a_retry_read_no_plan_more_than_once(kafka, kafka_topic, read, instance, monkeypatch):
    """To read that of a thousand steps takes 50 ms."""
    topic, names = kafka_topic(), "abcdef"
    failures, plans, plan_of = iter([ZeroDivisionError] * len(names)), [], instance.get_execution_plan_snapshot

    def counted(snapshot_id):
        plans.append(snapshot_id)
        return plan_of(snapshot_id)

    def asset_of(name):
        @dg.asset(name=name, io_manager_def=KafkaIOManager(kafka=kafka, topic=topic))
        def letter():
            if failure := next(failures, None):
                raise failure
            return name

        return letter

    monkeypatch.setattr(instance, "get_execution_plan_snapshot", counted)
    assert _run_and_resume(list(map(asset_of, names)), names, kafka, instance, {"dagster/retry_number": "1"}).success
    assert sorted(_values(read(topic))) == list(names)
    assert len(plans) < len(names)  # Dagster itself reads one, too


@pytest.mark.parametrize("tags", [{"dagster/is_asset_resume_retry": "true"}, {"dagster/retry_number": "1"}])
def test_what_a_graphs_op_hands_on_is_not_taken_for_that_of_another_asset_of_the_graph(
    tags, kafka, kafka_topic, read, instance
):
    between, topics = kafka_topic(), {region: kafka_topic() for region in ("eu", "us", "za")}
    attempts = []

    @dg.op(out=dg.Out(io_manager_key="kafka_io", metadata={"kafka/topic": between}))
    def clean(raw):
        return raw

    @dg.op(ins={"rows": dg.In(input_manager_key="kafka_io")}, out=dg.Out(io_manager_key="kafka_io"))
    def enrich(rows: list[dict]):
        attempts.append(rows[0]["region"])
        if attempts in (["eu", "us"], ["eu", "us", "za"]):
            raise ZeroDivisionError
        return rows

    @dg.graph
    def rides(raw):
        return enrich(clean(raw))

    def assets_of(region):
        @dg.asset(key=[region, "raw"], io_manager_def=dg.FilesystemIOManager(base_dir=instance.storage_directory()))
        def raw():
            return [{"region": region}]

        return raw, dg.AssetsDefinition.from_graph(
            rides,
            keys_by_input_name={"raw": raw.key},
            keys_by_output_name={"result": dg.AssetKey([region, "rides"])},
            metadata_by_output_name={"result": {"kafka/topic": topics[region]}},
        )

    assets = [asset for region in topics for asset in assets_of(region)]
    assert _run_and_resume(assets, ["us/rides", "za/rides"], kafka, instance, tags).success
    for region, topic in topics.items():
        assert [json.loads(value) for value in _values(read(topic))] == [{"region": region}]
    assert len(read(between)) == len(topics)


@pytest.mark.parametrize("name", ["rows", None])
def test_the_sessions_of_a_multi_asset_that_dagster_runs_in_two_steps_are_two(name, kafka, kafka_topic, read, instance):
    topic = kafka_topic()
    failures = iter([ZeroDivisionError])

    @dg.multi_asset(
        specs=[dg.AssetSpec("a", skippable=True), dg.AssetSpec("b", deps=["between"], skippable=True)], can_subset=True
    )
    def several(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        for key in sorted(context.selected_asset_keys):
            with kafka.publishing(context, topic=topic, name=name) as publication:
                publication.send(key.to_user_string())
            if key.path == ["b"] and (failure := next(failures, None)):
                raise failure
            yield publication.materialize_result(asset_key=key)

    result = _run_and_resume([several, between], ["b"], kafka, instance)
    assert result.success
    assert _values(read(topic)) == ["a", "b"]
    (said,) = result.get_asset_materialization_events()
    assert said.materialization.metadata["kafka/replayed"].value is True


def test_the_sessions_of_checks_that_dagster_runs_in_two_steps_are_two(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.asset
    def orders() -> None: ...

    @dg.asset(deps=[orders])
    def invoices() -> None: ...

    specs = [dg.AssetCheckSpec("valid", asset=asset, blocking=True) for asset in (orders, invoices)]

    @dg.multi_asset_check(specs=specs, can_subset=True)
    def valid(context: dg.AssetCheckExecutionContext, kafka: KafkaProducerResource):
        for key in sorted(context.selected_asset_check_keys):
            with kafka.publishing(context, topic=topic) as publication:
                publication.send(key.asset_key.to_user_string())
            yield dg.AssetCheckResult(passed=True, asset_key=key.asset_key, check_name=key.name)

    definitions = dg.Definitions([orders, invoices], asset_checks=[valid], resources={"kafka": kafka})
    assert definitions.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance).success
    assert _values(read(topic)) == ["invoices", "orders"]


def test_a_step_that_does_again_what_several_did_is_refused_as_one_publication(kafka, kafka_topic, read, instance):
    topic = kafka_topic()
    failures = {"b", "c"}

    @dg.multi_asset(
        specs=[dg.AssetSpec(name, deps=deps, skippable=True) for name, deps in CUT_IN_THREE.items()], can_subset=True
    )
    def several(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        for name in sorted(key.to_user_string() for key in context.selected_asset_keys):
            with kafka.publishing(context, topic=topic, name=name) as publication:
                publication.send(name)
            if name in failures:
                failures.discard(name)
                raise ZeroDivisionError
            yield publication.materialize_result(asset_key=name)

    result = _run_and_resume([several, first, between], ["b", "c"], kafka, instance)
    (event,) = [event for event in result.all_events if event.is_step_failure]
    assert "it was several steps: several_2, several_3. Launch a new run" in event.step_failure_data.error.message
    assert _values(read(topic)) == ["a", "b", "c"]


def test_an_output_of_a_step_that_does_again_what_several_did_finds_its_own_publication(
    kafka, kafka_topic, read, instance
):
    """The step of b had succeeded, with nothing to yield; that of c has failed after its commit."""
    topic = kafka_topic()
    failures = iter([ZeroDivisionError])

    class Dies(KafkaIOManager):
        def handle_output(self, context, obj):
            super().handle_output(context, obj)
            if context.asset_key.path == ["c"] and (failure := next(failures, None)):
                raise failure

    outs = {name: dg.AssetOut(is_required=False, io_manager_key="dies") for name in CUT_IN_THREE}
    inside = {name: {dg.AssetKey(dep) for dep in deps} for name, deps in CUT_IN_THREE.items()}

    @dg.multi_asset(
        outs=outs,
        deps=["first", "between"],
        internal_asset_deps=inside,
        can_subset=True,
        resource_defs={"dies": Dies(kafka=kafka, topic=topic)},
    )
    def several(context: dg.AssetExecutionContext):
        for name in sorted(context.op_execution_context.selected_output_names - {"b"}):
            yield dg.Output([name], name)

    assert _run_and_resume([several, first, between], ["b", "c"], kafka, instance).success
    assert _values(read(topic)) == ["a", "c"]


def test_a_range_of_a_session_is_read_back_only_as_a_whole(kafka, kafka_topic, read, instance):
    daily = dg.DailyPartitionsDefinition("2026-01-01", end_date="2026-01-05")
    topic = kafka_topic()

    @dg.asset(partitions_def=daily, backfill_policy=dg.BackfillPolicy.single_run())
    def days(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send_all(context.partition_keys)
        return publication.materialize_result()

    @dg.asset(partitions_def=daily, ins={"days": dg.AssetIn(input_manager_key="kafka_io")})
    def day(days: list[str]):
        return len(days)

    @dg.asset(
        ins={
            "days": dg.AssetIn(
                input_manager_key="kafka_io",
                partition_mapping=dg.SpecificPartitionsPartitionMapping(["2026-01-01", "2026-01-02"]),
            )
        }
    )
    def both_days(days: list[str]):
        return sorted(days)

    resources = {"kafka": kafka, "kafka_io": KafkaIOManager(kafka=kafka), "io_manager": dg.mem_io_manager}
    tags = {"dagster/asset_partition_range_start": "2026-01-01", "dagster/asset_partition_range_end": "2026-01-02"}
    assets = [days, day, both_days]
    assert dg.materialize(assets, selection=[days], tags=tags, resources=resources, instance=instance).success
    whole = dg.materialize(assets, selection=[both_days], resources=resources, instance=instance)
    assert whole.output_for_node("both_days") == ["2026-01-01", "2026-01-02"]
    result = dg.materialize(
        assets,
        selection=[day],
        partition_key="2026-01-01",
        resources=resources,
        instance=instance,
        raise_on_error=False,
    )
    assert "published together with 1 other Dagster partitions" in _failure(result, "day")
    # One of the two anew: the publication of both still holds its old records.
    assert dg.materialize(
        assets, selection=[days], partition_key="2026-01-02", resources=resources, instance=instance
    ).success
    result = dg.materialize(assets, selection=[both_days], resources=resources, instance=instance, raise_on_error=False)
    assert "'2026-01-02' anew since" in _failure(result, "both_days")


LETTERS = dg.StaticPartitionsDefinition(["a", "b", "c"])
RANGE = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"}


def _letters(topic, hands_on="abc", fails=lambda: False):
    """Publishes each of its Dagster partitions by a session, and hands on what some of them say."""

    @dg.asset(
        partitions_def=LETTERS,
        backfill_policy=dg.BackfillPolicy.single_run(),
        retry_policy=dg.RetryPolicy(max_retries=1),
        io_manager_key="kafka_io",
    )
    def letters(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        for letter in sorted(context.partition_keys):
            with kafka.publishing(context, topic=topic, partition_key=letter) as publication:
                publication.send(letter)
            if letter in hands_on:
                context.add_asset_metadata(publication.materialize_result().metadata, partition_key=letter)
            if fails():
                raise ZeroDivisionError
        return None if hands_on else publication.materialize_result()

    return letters


@pytest.fixture
def run_letters(kafka, instance):
    """Materializes them, or what reads one of them back and has it in its metadata."""

    @dg.asset(partitions_def=LETTERS, ins={"letters": dg.AssetIn(input_manager_key="kafka_io")})
    def reader(letters: list[str]):
        return dg.MaterializeResult(metadata={"read": "".join(letters)})

    def run(letters, asset="letters", **options):
        resources = {"kafka": kafka, "kafka_io": KafkaIOManager(kafka=kafka), "io_manager": dg.mem_io_manager}
        return dg.materialize(
            [letters, reader],
            selection=[asset],
            resources=resources,
            instance=instance,
            raise_on_error=False,
            **options,
        )

    return run


def test_a_session_of_one_dagster_partition_of_a_range_is_that_partitions_publication(run_letters, kafka_topic, read):
    topic, fails = kafka_topic(), iter([False, True])
    letters = _letters(topic, fails=lambda: next(fails, False))
    told = run_letters(letters, tags=RANGE).asset_materializations_for_node("letters")
    said = {one.partition: one.metadata for one in told}
    assert {letter: of_it["kafka/replayed"].value for letter, of_it in said.items()} == {
        "a": True,
        "b": True,
        "c": False,
    }
    assert _values(read(topic)) == ["a", "b", "c"]
    # The names are those of a run for it alone.
    (alone,) = run_letters(letters, partition_key="b").asset_materializations_for_node("letters")
    assert len({of_it["kafka/publication"].value["transactional_id"] for of_it in (said["b"], alone.metadata)}) == 1
    assert _values(read(topic)) == ["a", "b", "b", "c"]
    for letter in "abc":
        (told,) = run_letters(letters, "reader", partition_key=letter).asset_materializations_for_node("reader")
        assert told.metadata["read"].value == letter


def test_what_a_body_hands_on_of_some_dagster_partitions_is_told_of_those(run_letters, kafka_topic, instance):
    letters = _letters(kafka_topic(), hands_on="ac")
    result = run_letters(letters, tags=RANGE)
    assert result.success
    (warned,) = [entry.user_message for entry in instance.all_logs(result.run_id) if entry.level == logging.WARNING]
    assert warned.startswith("Of 1 Dagster partitions of the run, 'b' first, the body has handed on nothing")
    assert run_letters(letters, "reader", partition_key="c").success
    assert "was not published by a KafkaIOManager" in _failure(
        run_letters(letters, "reader", partition_key="b"), "reader"
    )


def test_a_session_of_a_range_that_is_handed_on_for_one_dagster_partition_is_warned_of(kafka, kafka_topic, instance):
    topic = kafka_topic()

    @dg.asset(partitions_def=LETTERS, backfill_policy=dg.BackfillPolicy.single_run())
    def letters(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        for letter in context.partition_keys:
            with kafka.publishing(context, topic=topic, name=letter) as publication:
                publication.send(letter)
            context.add_asset_metadata(publication.materialize_result().metadata, partition_key=letter)

    resources = {"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka)}
    result = dg.materialize([letters], tags=RANGE, resources=resources, instance=instance)
    (warned,) = [entry.user_message for entry in instance.all_logs(result.run_id) if entry.level == logging.WARNING]
    assert warned.startswith("A publication of 3 Dagster partitions is handed on for one of them")
    assert "partition_key=" in warned


def test_a_result_of_another_dagster_partition_is_not_read_for_it(run_letters, kafka_topic, kafka, instance):
    letters = _letters(kafka_topic(), hands_on="")
    assert run_letters(letters, tags=RANGE).success
    assert run_letters(letters, "reader", partition_key="c").success
    failure = _failure(run_letters(letters, "reader", partition_key="a"), "reader")
    assert "asset 'letters', partition 'a': its last materialization tells of a publication of 'c'" in failure
    checks = build_publication_checks([letters])
    resources = {"kafka": kafka, "kafka_io": KafkaIOManager(kafka=kafka)}
    selection = dg.AssetSelection.checks(*checks)
    result = dg.materialize([letters, *checks], selection=selection, resources=resources, instance=instance)
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.metadata["kafka/publications"].value == 1
    assert evaluation.metadata["kafka/not_checked"].value.startswith("2 Dagster partitions. The first: asset 'letters'")


@pytest.mark.parametrize("options", [{"tags": RANGE}, {"partition_key": "a"}, {}], ids=["range", "one", "none"])
def test_a_session_of_a_dagster_partition_that_the_step_does_not_publish_is_refused(
    options, kafka, kafka_topic, instance
):
    topic = kafka_topic()

    @dg.asset(partitions_def=LETTERS if options else None, backfill_policy=dg.BackfillPolicy.single_run())
    def letters(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic, partition_key="z"):
            pass

    resources = {"kafka": kafka, "io_manager": dg.mem_io_manager}
    result = dg.materialize([letters], resources=resources, instance=instance, raise_on_error=False, **options)
    count = {"tags": 3, "partition_key": 1}.get(next(iter(options), ""), 0)
    assert f"partition_key='z': the step publishes {count} Dagster partitions" in _failure(result, "letters")


def test_what_a_session_says_beside_an_output_does_not_choose_its_topic(kafka, kafka_topic, read, instance):
    topics = own, first, second = [kafka_topic() for _ in range(3)]

    @dg.asset(metadata={"kafka/topic": own})
    def made(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=first) as publication:
            publication.send("in the body")
            publication.send("in the body", topic=second)
        return dg.Output("the output", metadata=publication.materialize_result().metadata)

    resources = {"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka)}
    (told,) = dg.materialize([made], resources=resources, instance=instance).asset_materializations_for_node("made")
    assert [_values(read(topic)) for topic in topics] == [["the output"], ["in the body"], ["in the body"]]
    assert told.metadata["kafka/publication"].value["topic"] == told.metadata["kafka/topic"].value == own


def test_a_check_publishes(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.asset
    def checked():
        return 1

    @dg.asset_check(asset=checked)
    def tells(context: dg.AssetCheckExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("checked")
        return dg.AssetCheckResult(passed=True)

    definitions = dg.Definitions([checked], asset_checks=[tells], resources={"kafka": kafka})
    assert definitions.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance).success
    assert _values(read(topic)) == ["checked"]


def test_checks_of_one_name_in_two_code_locations_are_two_publishers(kafka, kafka_topic, instance):
    topic, publishers = kafka_topic(), []
    for name in ("orders", "customers"):

        @dg.asset(name=name)
        def checked():
            return 1

        @dg.multi_asset_check(specs=[dg.AssetCheckSpec("ok", asset=name)])
        def quality(context: dg.AssetCheckExecutionContext, kafka: KafkaProducerResource):
            with kafka.publishing(context, topic=topic) as publication:
                publication.send("checked")
            publishers.append(publication.result.transactional_id)
            return dg.AssetCheckResult(passed=True)

        definitions = dg.Definitions([checked], asset_checks=[quality], resources={"kafka": kafka})
        assert definitions.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance).success
    assert len(set(publishers)) == 2


@pytest.mark.skipif(
    "partitions_def" not in inspect.signature(dg.asset_check).parameters, reason="checks had no Dagster partitions yet"
)
def test_a_check_of_one_dagster_partition_does_not_fence_that_of_another(kafka, kafka_topic, instance):
    topic, publishers = kafka_topic(), {}
    letters = dg.StaticPartitionsDefinition(["a", "b"])

    @dg.asset(partitions_def=letters)
    def checked():
        return 1

    @dg.asset_check(asset=checked, partitions_def=letters)
    def tells(context: dg.AssetCheckExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("checked")
        publishers[context.op_execution_context.partition_key] = publication.result.transactional_id
        return dg.AssetCheckResult(passed=True)

    for letter in "ab":
        resources = {"kafka": kafka}
        assert dg.materialize([checked, tells], resources=resources, instance=instance, partition_key=letter).success
    assert len(set(publishers.values())) == 2


def test_an_asset_and_an_op_that_a_test_calls_publish_each_time(kafka, kafka_topic, read):
    topic = kafka_topic()

    @dg.asset
    def alerts(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("alert")
        return publication.materialize_result()

    @dg.op
    def alert(context: dg.OpExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("op")
        return publication.result

    said = [alerts(dg.build_asset_context(), kafka=kafka).metadata for _ in range(2)]
    assert [metadata["kafka/records"] for metadata in said] == [1, 1]
    assert alert(dg.build_op_context(), kafka=kafka).records == 1
    assert _values(read(topic)) == ["alert", "alert", "op"]


def test_to_ask_for_a_result_inside_the_block_is_not_tried_again(kafka, kafka_topic, read, instance):
    topic = kafka_topic()
    attempts = []

    @dg.asset
    def early(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        attempts.append(1)
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("x")
            return publication.materialize_result()

    result = dg.materialize([early], resources={"kafka": kafka}, instance=instance, raise_on_error=False)
    assert "Ask for its result after the with block" in _failure(result, "early")
    assert len(attempts) == 1
    assert read(topic) == []


def test_a_sensor_has_no_step_to_publish_in(kafka):
    with pytest.raises(KafkaError, match="send_sync"), kafka.publishing(dg.build_sensor_context(), topic="t"):
        pytest.fail("it opened")


def test_a_pool_of_threads_sends_to_one_session(kafka, kafka_topic, read):
    topic, dead = kafka_topic(partitions=3), kafka_topic()

    def part(publication, start):
        if start % 2000:
            publication.send_all({"i": i if i % 100 else {i}} for i in range(start, start + 1000))
        else:
            for i in range(start, start + 1000):
                publication.send({"i": i if i % 100 else {i}}, key=str(i))

    @dg.asset
    def pooled(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        pool = concurrent.futures.ThreadPoolExecutor(8)
        with kafka.publishing(context, topic=topic, on_bad_record=dead) as publication, pool:
            list(pool.map(lambda start: part(publication, start), range(0, 20_000, 1000)))
        return publication.result

    done = pooled(dg.build_asset_context(), kafka=kafka)
    found = read(topic)
    assert sorted(json.loads(record.value)["i"] for record in found) == [i for i in range(20_000) if i % 100]
    told = [
        (place.partition, i) for place in done.offsets for first, last in place.runs for i in range(first, last + 1)
    ]
    assert told == [(record.partition, record.offset) for record in found]
    assert (done.records, done.dead_letters, len(read(dead))) == (19_800, 200, 200)
    assert done.bytes == sum(len(record.value) + len(record.key or b"") for record in found)


def test_a_session_does_not_end_well_before_its_threads(kafka, kafka_topic, read):
    topic, sending, go_on = kafka_topic(), threading.Event(), threading.Event()

    def rows():
        yield from ["sent"] * 1000
        sending.set()
        assert go_on.wait(30)
        yield "late"

    @dg.asset
    def early(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            late.append(pool.submit(publication.send_all, rows()))
            assert sending.wait(30)

    late = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            with pytest.raises(dg.Failure, match="another thread, or a generator, is still sending to it") as caught:
                early(dg.build_asset_context(), kafka=kafka)
        finally:
            go_on.set()
        assert not caught.value.allow_retries
        with pytest.raises(KafkaError, match="it has ended"):
            late[0].result(30)
    assert read(topic) == []


@pytest.fixture
def writer(kafka_bootstrap_servers, kafka_topic):
    name = uuid.uuid4().hex
    config = PublicationConfig(producer=KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers))
    return PublicationWriter(config, transactional_id=name, publication_id=name, topic=kafka_topic())


def test_a_send_of_another_thread_that_is_under_way_is_not_left_out(writer, read):
    entered, go_on = threading.Event(), threading.Event()
    take = writer._send

    def send(*record):
        entered.set()
        assert go_on.wait(30)
        take(*record)

    writer._send = send
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            with pytest.raises(KafkaError, match="is still sending to it"), writer:
                late = pool.submit(writer.send, "late")
                assert entered.wait(30)
        finally:
            go_on.set()
        with pytest.raises(KafkaError, match="it has ended, or not begun"):
            late.result(30)
    assert read(writer.topic) == []


def test_threads_are_told_that_the_block_has_failed_and_not_to_flush(writer, read):
    def send():
        while True:
            writer.send_all([{"i": i} for i in range(1000)])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with pytest.raises(ZeroDivisionError), writer:
            sending = [pool.submit(send) for _ in range(2)]
            time.sleep(0.3)
            raise ZeroDivisionError
        for one in sending:
            with pytest.raises(KafkaError, match=r"it was given up|it has ended, or not begun"):
                one.result(20)
    assert read(writer.topic) == []


def test_a_second_interrupt_leaves_no_session_open(writer, read, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), writer:
        writer.send("x")
        monkeypatch.setattr(writer._sender, "abort_transaction", interrupted)
        raise KeyboardInterrupt
    with pytest.raises(KafkaError, match="it has ended, or not begun"):
        writer.send("later")
    assert read(writer.topic) == []


# An asset that publishes from its body, and has a KafkaIOManager


@pytest.mark.parametrize("write_mode", ["append", "upsert"])
def test_an_output_none_denies_nothing_that_the_body_has_published(write_mode, kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.asset
    def forgets(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("a", key="k")

    @dg.asset
    def reads(forgets):
        pass

    resources = {"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka, write_mode=write_mode)}
    assets = [forgets, reads, *build_publication_checks([forgets])]
    result = dg.materialize(assets, resources=resources, instance=instance, raise_on_error=False)
    (told,) = result.asset_materializations_for_node("forgets")
    assert not [name for name in told.metadata if name.startswith(("kafka/", "dagster/"))]
    assert _values(read(topic)) == ["a"]
    warnings = [entry for entry in instance.all_logs(result.run_id) if entry.level == logging.WARNING]
    assert [entry.step_key for entry in warnings] == ["forgets"]
    assert "Return publication.materialize_result()" in warnings[0].user_message
    assert "return publication.materialize_result()" in _failure(result, "reads")
    assert "return publication.materialize_result()" in _failure(result, "forgets_publication_is_in_kafka")


def test_of_an_op_whose_body_has_published_no_more_than_its_output_is_denied(kafka, kafka_topic, read, instance):
    topic = kafka_topic()

    @dg.op
    def publishes(context, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("a")

    @dg.op
    def does_not():
        pass

    @dg.job(resource_defs={"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka, topic=topic)})
    def both():
        publishes()
        does_not()

    result = both.execute_in_process(instance=instance)
    assert _values(read(topic)) == ["a"]
    said = {e.step_key: e.user_message for e in instance.all_logs(result.run_id) if "is None" in e.user_message}
    nothing = f"The output is None: nothing was published to {topic!r}"
    assert said == {"publishes": f"{nothing} beside the body's sessions", "does_not": nothing}


def test_what_the_body_hands_on_is_what_the_materialization_says(kafka, kafka_topic, instance):
    topic, other = kafka_topic(), kafka_topic()

    @dg.asset
    def returns(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("a")
        return publication.materialize_result()

    @dg.asset
    def adds(context: dg.AssetExecutionContext, kafka: KafkaProducerResource):
        with kafka.publishing(context, topic=topic) as publication:
            publication.send("b")
            publication.send("c", topic=other)
        context.add_output_metadata(publication.materialize_result().metadata)

    @dg.asset
    def reads(returns, adds):
        assert (returns, sorted(adds)) == (["a"], ["b", "c"])

    resources = {"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka)}
    result = dg.materialize([returns, adds, reads], resources=resources, instance=instance)
    for name, topics in (("returns", [topic]), ("adds", [topic, other])):
        (told,) = result.asset_materializations_for_node(name)
        assert told.metadata["kafka/records"].value == len(topics)
        assert set(told.metadata["kafka/topic"].value.split(", ")) == set(topics)
    assert not [entry for entry in instance.all_logs(result.run_id) if entry.level == logging.WARNING]


def test_what_an_op_has_published_by_itself_is_read_by_the_next_op(kafka, kafka_topic, instance):
    topic, got = kafka_topic(), {}
    manager = KafkaIOManager(kafka=kafka)

    def publish(context, session, value):
        with context.resources.kafka.publishing(context, topic=topic, name=session) as publication:
            publication.send({"i": value})
        return publication.materialize_result().metadata

    @dg.op(required_resource_keys={"kafka"})
    def one(context):
        return dg.Output(None, metadata=publish(context, "one", 1))

    @dg.op(out=dg.DynamicOut(), required_resource_keys={"kafka"})
    def many(context):
        for i in (2, 3):
            yield dg.DynamicOutput(None, f"m{i}", metadata=publish(context, f"m{i}", i))

    @dg.op
    def reads(one: list) -> None:
        got["one"] = one

    @dg.op
    def collects(found: list) -> None:
        got["many"] = sorted(row["i"] for rows in found for row in rows)

    @dg.job(resource_defs={"kafka": kafka, "io_manager": manager})
    def job():
        reads(one())
        collects(many().collect())

    assert job.execute_in_process(instance=instance).success
    assert got == {"one": [{"i": 1}], "many": [2, 3]}
