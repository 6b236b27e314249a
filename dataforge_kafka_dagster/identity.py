"""Who publishes what: the names by which attempts at the same work find each other in Kafka.

The *publisher* names an output of an asset and its Dagster partition; it makes the transactional id, so that every
attempt fences the one before. The *publication id* names the work; a retry has the id of what it repeats.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import uuid
import weakref
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, NamedTuple

import dagster as dg

from dataforge_kafka_dagster.kafka.errors import KafkaConfigError

_NUMBER_TAG = "dagster/retry_number"
_RESUME_TAG = "dagster/is_resume_retry"
_ASSET_RESUME_TAG = "dagster/is_asset_resume_retry"


@dataclasses.dataclass(frozen=True)
class Identity:
    """Names of one publication.

    Attributes:
        name: Of the publisher: asset key and output, or job, step and run for an op.
        partition: Dagster partition keys, sorted; empty if not partitioned.
        publication_id: The same for each attempt at the same work.
        origin: Id of the run whose work it is.
    """

    name: tuple[str, ...]
    partition: tuple[str, ...]
    publication_id: str
    origin: str

    def of_partition(self, partition: str) -> Identity:
        """The same publisher for one Dagster partition: the names a run for that one alone has."""
        return _identity(self.name, (partition,), self.origin)


class Origin(NamedTuple):
    """Where the work that a step does began.

    Attributes:
        run_id: Id of the run.
        step_key: Key of the step in that run.
    """

    run_id: str
    step_key: str


def origin_of(
    instance: dg.DagsterInstance, run: dg.DagsterRun, step_key: str, made: AbstractSet[Any] = frozenset()
) -> Origin:
    """Where the work that a step does began: in the first ancestor of its run that is not itself a retry.

    Automatic run retries and re-executions from failure are retries. A re-execution of everything is new work, and so
    is a re-execution of selected steps for a step that had succeeded, also if what they repeat was a retry itself.

    Args:
        instance: Where its runs are.
        run: The run.
        step_key: The step's key.
        made: The keys of the assets and checks whose work it is; all that the step makes if empty.

    Raises:
        KafkaConfigError: What the run repeats cannot be told.
    """
    if run.parent_run_id is not None:
        made = made or _made_by(instance, run).get(step_key.partition(".")[0], set())
    while run.parent_run_id is not None:
        parent = instance.get_run_by_id(run.parent_run_id)
        there = _key_in(instance, parent, step_key, made)
        if not _is_retry(instance, run, parent, there, made):
            break
        step_key = there
        if parent is None:
            if run.parent_run_id != run.root_run_id:
                raise KafkaConfigError(
                    f"run {run.parent_run_id}",
                    "it was deleted, so that it cannot be told whether what its retry repeats was a retry itself",
                    "Launch a new run",
                )
            return Origin(run.parent_run_id, step_key)
        run = parent
    return Origin(run.run_id, step_key)


def _key_in(instance: dg.DagsterInstance, run: dg.DagsterRun | None, step_key: str, made: AbstractSet[Any]) -> str:
    """The key that a step had in a run that its own repeats.

    Dagster names a node after its op, and numbers those of one op. A run of other assets numbers them anew, so that an
    asset's step may have the key that another's had.

    Args:
        instance: Where the run is.
        run: The run.
        step_key: The step's key in its own.
        made: The keys of the assets and checks whose work it is.

    Raises:
        KafkaConfigError: Several steps did that work.
    """
    node, dot, inside = step_key.partition(".")
    nodes = [name for name, also in _made_by(instance, run).items() if made & also]
    if run is not None and len(nodes) > 1:
        begun = {key.partition(".")[0] for key in _steps(instance, run.run_id, dg.DagsterEventType.STEP_START)}
        nodes = [name for name in nodes if name in begun] or nodes[:1]
        if len(nodes) > 1:
            raise KafkaConfigError(
                f"step {step_key!r}",
                f"in run {run.run_id}, which is repeated, it was several steps: {', '.join(nodes)}",
                "Launch a new run",
            )
    return f"{nodes[0] if nodes else node}{dot}{inside}"


def _made_by(instance: dg.DagsterInstance, run: dg.DagsterRun | None) -> dict[str, set[Any]]:
    """The keys of the assets and checks that each node of a run's plan makes, a graph's steps as one."""
    if run is None or run.execution_plan_snapshot_id is None:
        return {}
    if (known := _plans.get(run.execution_plan_snapshot_id)) is not None:
        return known
    made: dict[str, set[Any]] = collections.defaultdict(set)
    for step in instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id).steps:
        for output in step.outputs:
            told: Any = output.properties
            made[step.key.partition(".")[0]] |= {told.asset_key, told.asset_check_key} - {None}
    if len(_plans) >= _PLANS:
        _plans.clear()
    _plans[run.execution_plan_snapshot_id] = known = dict(made)
    return known


# What the nodes of plans make, by the id of the snapshot, which is its hash: to read one of many steps takes long, and
# each of the steps asks.
_plans: Final[dict[str, dict[str, set[Any]]]] = {}
_PLANS: Final = 8


def _is_retry(
    instance: dg.DagsterInstance,
    run: dg.DagsterRun,
    parent: dg.DagsterRun | None,
    step_key: str,
    made: AbstractSet[Any],
) -> bool:
    """Whether a run is a retry of its parent for the step that had this key there."""
    # A re-execution of selected steps has the number of its parent; an automatic retry has a higher one.
    number, before = (one.tags.get(_NUMBER_TAG) if one else None for one in (run, parent))
    if _RESUME_TAG in run.tags or (number is not None and number != before):
        return True
    # Neither of these two is sure: a re-execution of everything inherits the tag from a parent that has it, and a
    # re-execution from failure that was launched from Python has no tag, but starts from its parent's state as one of
    # selected steps does.
    if _ASSET_RESUME_TAG not in run.tags and not _starts_from_parent(instance, run):
        return False
    if not _had_succeeded(instance, parent, step_key, made):
        return True
    # A graph's asset is executed again as a whole if one of its steps has failed.
    if _ASSET_RESUME_TAG not in run.tags or (parent is not None and _ASSET_RESUME_TAG in parent.tags):
        return False
    graph, inside, _ = step_key.partition(".")
    failed = _steps(instance, run.parent_run_id, dg.DagsterEventType.STEP_FAILURE)
    return bool(inside) and any(key.startswith(f"{graph}.") for key in failed)


def _had_succeeded(
    instance: dg.DagsterInstance, run: dg.DagsterRun | None, step_key: str, made: AbstractSet[Any]
) -> bool:
    """Whether a step had ended in success when it was last begun, in a run or in those that the run repeats.

    A re-execution from failure leaves out what had succeeded.
    """
    while run is not None:
        if step_key in _steps(instance, run.run_id, dg.DagsterEventType.STEP_SUCCESS):
            return True
        if run.parent_run_id is None or step_key in _steps(instance, run.run_id, dg.DagsterEventType.STEP_START):
            return False
        run = instance.get_run_by_id(run.parent_run_id)
        step_key = _key_in(instance, run, step_key, made)
    return False


def _steps(instance: dg.DagsterInstance, run_id: str | None, event: dg.DagsterEventType) -> set[str]:
    """The keys of the steps of a run that have such an event."""
    return {entry.step_key for entry in instance.all_logs(run_id or "", of_type=event) if entry.step_key}


def _starts_from_parent(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    if run.step_keys_to_execute is None or run.execution_plan_snapshot_id is None:
        return False
    known = instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id).initial_known_state
    return known is not None and known.parent_state is not None


def output_identity(context: dg.OutputContext) -> Identity:
    """Names of what a step publishes for one output."""
    origin = _origin_of_output(context)
    if context.has_asset_key:
        name = ("asset", *context.asset_key.path, _name(context))
        partition = tuple(map(str, context.asset_partition_keys)) if context.has_asset_partitions else ()
    else:
        mapping = (context.mapping_key,) if context.mapping_key else ()
        # A context made by build_output_context has no job.
        job = context.job_name if step_context_of(context) else ""
        # Runs of an op job are different work and may overlap: they must not fence each other.
        name = ("job", job, origin.step_key, context.name, *mapping, origin.run_id)
        partition = (str(context.partition_key),) if context.has_partition_key else ()
    return _identity(name, partition, origin.run_id)


def _name(context: dg.OutputContext) -> str:
    try:
        return context.name
    except dg.DagsterInvariantViolationError:
        # A context made by build_output_context without a name.
        return "result"


def _origin_of_output(context: dg.OutputContext) -> Origin:
    step = step_context_of(context)
    if step is None:  # each is work of its own
        return Origin(str(uuid.uuid4()), "")
    # One of a multi-asset's may have been another step's.
    made = {context.asset_key} if context.has_asset_key else set()
    return origin_of(step.instance, step.dagster_run, context.step_key, made)


def op_context_of(
    context: dg.OpExecutionContext | dg.AssetExecutionContext | dg.AssetCheckExecutionContext,
) -> dg.OpExecutionContext:
    """The op's context, which an asset's or a check's context wraps."""
    if isinstance(context, (dg.AssetExecutionContext, dg.AssetCheckExecutionContext)):
        return context.op_execution_context
    return context


def step_context_of(context: Any) -> Any:
    """The step execution context behind any of Dagster's contexts; None behind one that was built for a test."""
    try:
        if isinstance(context, (dg.InputContext, dg.OutputContext)):
            return context.step_context
        return op_context_of(context).get_step_execution_context()
    except dg.DagsterError:
        return None


def is_again(context: Any, identity: Identity) -> bool:
    """Whether a step makes another attempt at the same work."""
    step = step_context_of(context)
    return step is not None and (step.previous_attempt_count > 0 or step.run_id != identity.origin)


def session_identity(
    context: dg.OpExecutionContext | dg.AssetExecutionContext | dg.AssetCheckExecutionContext,
    session: str,
    partition_key: str | None = None,
) -> Identity:
    """Names of what a step publishes from its body, in one of its sessions; the second of a name has another one.

    Args:
        context: The step's.
        session: The session's name.
        partition_key: The one Dagster partition that it is of; all of the step's if None.

    Raises:
        KafkaConfigError: The step does not publish that one.
    """
    op_context = op_context_of(context)
    step_context = step_context_of(context)
    if step_context is None:
        # The asset or op was called directly, as unit tests do: each call is work of its own.
        call = str(uuid.uuid4())
        return _identity(("call", call, session), (), call)
    step = step_context.step
    origin = origin_of(op_context.instance, op_context.run, step.key)
    partition = _partition_of_session(op_context, partition_key)
    number = _number(step_context, session, partition)
    # What comes first says how many names follow: no other publisher's can be the same ones.
    kind = "session" if number == 1 else f"session-{number}"
    if op_context.has_assets_def:
        assets_def = op_context.assets_def
        # All keys, not those that this run selects, which may be fewer in a retry; and so with Dagster partitions.
        keys = sorted(assets_def.node_keys_by_output_name.values())
        checks = assets_def.node_check_specs_by_output_name.values()
        if keys:
            kind, path = f"asset-{kind}", list(keys[0].path)
        else:
            # Another code location may have a function of the same name, for another asset.
            first = min([*check.asset_key.path, check.name] for check in checks)
            kind, path = f"check-{kind}", [assets_def.node_def.name, *first]
        if assets_def.can_subset:
            part = _part_of(op_context.instance, origin, {*keys, *(check.key for check in checks)})
            if part is not None:
                kind, path = f"part-of-{kind}", [*path, part]
        # A graph has several steps, and a dynamic one many of a kind.
        _, graph, inside = step.key.partition(".")
        name = (f"step-of-{kind}", inside, *path, session) if graph else (kind, *path, session)
    else:
        name = (f"job-{kind}", op_context.job_name, origin.step_key, session, origin.run_id)
    return _identity(name, partition, origin.run_id)


def _part_of(instance: dg.DagsterInstance, origin: Origin, keys: set[Any]) -> str | None:
    """The first asset or check of a step that makes some of a definition's, and not the first of them; else None.

    Dagster makes several steps of a definition where another asset of the run lies between its own.
    """
    made_by = _made_by(instance, instance.get_run_by_id(origin.run_id))
    made = map(_sortable, keys & set().union(*made_by.values()))
    mine = map(_sortable, keys & made_by.get(origin.step_key.partition(".")[0], set()))
    first = min(mine, default=None)
    return first[1] if first is not None and first != min(made) else None


def _sortable(key: Any) -> tuple[bool, str]:
    """A key for sorting, assets before checks."""
    if isinstance(key, dg.AssetCheckKey):
        return True, f"{key.asset_key.to_string()}:{key.name}"
    return False, key.to_string()


def _partition_of_session(op_context: dg.OpExecutionContext, partition_key: str | None) -> tuple[str, ...]:
    """The Dagster partitions that a session of a step is of."""
    partitioned = op_context.has_partition_key or op_context.has_partition_key_range
    if partitioned and op_context.has_assets_def and op_context.assets_def.node_keys_by_output_name:
        # Those of a check have no specs.
        partitioned = any(spec.partitions_def is not None for spec in op_context.assets_def.specs)
    of_step = tuple(map(str, op_context.partition_keys)) if partitioned else ()
    if partition_key is None:
        return of_step
    if partition_key not in of_step:
        raise KafkaConfigError(
            f"partition_key={partition_key!r}",
            f"the step publishes {len(of_step)} Dagster partitions, and that is none of them",
            "Give one of context.partition_keys, or None where the asset has no Dagster partitions",
        )
    return (str(partition_key),)


_numbers: weakref.WeakKeyDictionary[Any, collections.Counter[tuple[str, tuple[str, ...]]]] = weakref.WeakKeyDictionary()
_numbers_lock = threading.Lock()


def _number(step_context: Any, session: str, partition: tuple[str, ...]) -> int:
    """How many sessions of this name and these Dagster partitions the step has had, with this one."""
    with _numbers_lock:
        names = _numbers.setdefault(step_context, collections.Counter())
        names[session, partition] += 1
        return names[session, partition]


def has_sessions(context: dg.OutputContext) -> bool:
    """Whether the body of an output's step had sessions in this attempt."""
    with _numbers_lock:
        return step_context_of(context) in _numbers


def _identity(name: Sequence[str], partition: tuple[str, ...], origin: str) -> Identity:
    # Dagster gives the partitions of a range in no order, and in another one in each process.
    partition = tuple(sorted(partition))
    # Not the step key: Dagster renames the step of a multi-asset when a retry selects some of its assets.
    return Identity(tuple(name), partition, "/".join([origin, *name, "|".join(partition)]), origin)
