"""Asset checks: what an asset published last is still in Kafka, whole."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

import dagster as dg

from dataforge_kafka_dagster.history import Published, last_published, name_of, refuse_partition_for_whole
from dataforge_kafka_dagster.io_manager import KafkaIOManager, topic_of
from dataforge_kafka_dagster.kafka.errors import KafkaConfigError, KafkaError, place_name
from dataforge_kafka_dagster.kafka.ledger import Publication
from dataforge_kafka_dagster.kafka.schemas import KafkaSchema, check_compatible
from dataforge_kafka_dagster.kafka.verification import Missing, find_missing
from dataforge_kafka_dagster.resource import KafkaProducerResource

_SHOWN: Final = 100
_COLUMNS: Final = dg.TableSchema(
    columns=[
        dg.TableColumn("publication", "string", "Asset, and Dagster partition if it has any"),
        dg.TableColumn("topic", "string", "Kafka topic"),
        dg.TableColumn("partition", "int", "Kafka partition; all if empty"),
        dg.TableColumn("missing records", "int", "How many, as far as known"),
        dg.TableColumn("cause", "string", "What happened to them"),
    ]
)


def build_publication_checks(
    assets: Iterable[dg.AssetsDefinition | dg.AssetSpec | dg.AssetKey | str],
    *,
    thorough: bool = False,
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
    blocking: bool = False,
    resource_key: str = "kafka",
    timeout: float = 30.0,
) -> Sequence[dg.AssetChecksDefinition]:
    """A check for each asset, ``publication_is_in_kafka``: its last publication is still in the topic, whole.

    It fails when retention has eaten records, somebody deleted them, or the topic was deleted or made anew. It costs a
    request for the topic, and one for each Kafka partition. In a run for some Dagster partitions it looks at theirs,
    or, if the asset has none of those, at all that are materialized; those that were reported by hand, or stored
    elsewhere, it counts. An AssetSpec says by its partitions_def whether there are any.

    An asset whose metadata gives a schema (``kafka/value_schema``, ``kafka/key_schema``) that is known without an
    output has a second check, ``schema_is_compatible``: the Schema Registry would take it for the topic, which is the
    metadata's ``kafka/topic`` or the one that the asset's IO manager would choose (with ``{job}`` in it, the last
    materialization's).

    Args:
        assets: What to check, by definition, spec or key.
        thorough: Also read the records back, and compare their number and bytes; this finds what compaction removed.
        severity: Of a check that fails.
        blocking: Whether assets downstream wait for the check, and are not materialized if it fails with ERROR.
        resource_key: Name of the `KafkaProducerResource`.
        timeout: Longest wait for each answer of the brokers, seconds.

    Returns:
        The checks, for `dagster.Definitions(asset_checks=...)`.

    Raises:
        KafkaConfigError: A single asset is given, or something else than one, or one's schema is none; or the wait has
            no end.

    Example:
        >>> checks = build_publication_checks([flights], severity=dg.AssetCheckSeverity.WARN)
    """
    if isinstance(assets, (str, dg.AssetKey, dg.AssetSpec, dg.AssetsDefinition)):
        kind = type(assets).__qualname__
        raise KafkaConfigError(f"assets of type {kind}", "it is a single one", "Give a list of them")
    if not 0 < timeout < math.inf:
        raise KafkaConfigError(f"timeout={timeout!r}", "a wait needs an end", "Give a number of seconds above 0")
    specs = [(spec, manager, bare) for asset in assets for spec, manager, bare in _specs(asset)]
    checks = [_build_check(spec, bare, thorough, severity, blocking, resource_key, timeout) for spec, _, bare in specs]
    for spec, io_manager_key, _ in specs:
        schemas = _schemas(spec)
        if schemas:
            checks.append(_build_schema_check(spec, schemas, severity, blocking, resource_key, io_manager_key))
    return checks


def _schemas(spec: dg.AssetSpec) -> dict[Literal["value", "key"], KafkaSchema]:
    """The schemas that an asset's metadata gives, and that need no output to be known."""
    found: dict[Literal["value", "key"], KafkaSchema] = {}
    parts: tuple[Literal["value"], Literal["key"]] = ("value", "key")
    for part in parts:
        given = _metadata(spec, f"kafka/{part}_schema")
        if given is not None:
            schema = KafkaSchema.parse(given)
            if schema.is_given:
                found[part] = schema
    return found


def _metadata(spec: dg.AssetSpec, name: str) -> Any:
    given = spec.metadata.get(name)
    return given.value if isinstance(given, dg.MetadataValue) else given


def _build_schema_check(
    spec: dg.AssetSpec,
    schemas: dict[Literal["value", "key"], KafkaSchema],
    severity: dg.AssetCheckSeverity,
    blocking: bool,
    resource_key: str,
    io_manager_key: str,
) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=spec.key,
        name="schema_is_compatible",
        description="The Schema Registry would take the asset's schema for its topic.",
        blocking=blocking,
        required_resource_keys={resource_key, io_manager_key},
    )
    def schema_is_compatible(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        kafka: KafkaProducerResource = getattr(context.resources, resource_key)
        manager = getattr(context.resources, io_manager_key)
        op_context = context.op_execution_context
        with kafka.errors_in_dagster(op_context):
            registry = kafka.publication_config().schema_registry
            if registry is None:
                raise KafkaConfigError(
                    name_of(spec.key, None), "there is no Schema Registry to ask", "Set schema_registry_url"
                )
            # What publishes from the asset's body has some other IO manager.
            template = manager.topic if isinstance(manager, KafkaIOManager) else None
            given = _metadata(spec, "kafka/topic")
            if given is None and "{job" in (template or ""):
                # The check's own job need not be the one that publishes.
                given = _last_topic(op_context.instance, spec.key)
            topic = topic_of(spec.key.path, given, template, "")
            found = [check_compatible(registry, schema, topic, part=part) for part, schema in schemas.items()]
        reasons = "; ".join(f"{one.subject}: {one.reason}" for one in found if not one.compatible)
        return dg.AssetCheckResult(
            passed=not reasons,
            severity=severity,
            description=reasons or "The Schema Registry takes it",
            metadata={"kafka/subjects": ", ".join(one.subject for one in found)},
        )

    return schema_is_compatible


def _last_topic(instance: dg.DagsterInstance, asset_key: dg.AssetKey) -> str:
    """The topic that an asset's last materialization names, first if there are several."""
    event = instance.get_latest_materialization_event(asset_key)
    materialization = event.asset_materialization if event else None
    said = materialization.metadata.get("kafka/topic") if materialization else None
    if said is None:
        raise KafkaConfigError(
            name_of(asset_key, None),
            "its topic has the name of the job that publishes it, which only a materialization tells",
            "Materialize it first, or give it a topic by the metadata kafka/topic",
        )
    return str(said.value).partition(",")[0]


def _specs(asset: dg.AssetsDefinition | dg.AssetSpec | dg.AssetKey | str) -> Iterable[tuple[dg.AssetSpec, str, bool]]:
    """Each asset's spec, the key of its IO manager, and whether only its key is known."""
    if isinstance(asset, dg.AssetsDefinition):
        return [(spec, asset.get_io_manager_key_for_asset_key(spec.key), False) for spec in asset.specs]
    if not isinstance(asset, (str, dg.AssetKey, dg.AssetSpec)):
        raise KafkaConfigError(
            f"asset of type {type(asset).__qualname__}",
            "nobody publishes such a one",
            "Leave it out, or give a definition, an AssetSpec, an AssetKey or its name",
        )
    spec = asset if isinstance(asset, dg.AssetSpec) else dg.AssetSpec(asset)
    return [(spec, spec.metadata.get("dagster/io_manager_key", "io_manager"), spec is not asset)]


def _build_check(
    spec: dg.AssetSpec,
    bare: bool,
    thorough: bool,
    severity: dg.AssetCheckSeverity,
    blocking: bool,
    resource_key: str,
    timeout: float,
) -> dg.AssetChecksDefinition:
    # It has the Dagster partitions of its run without a partitions_def, with which it could not run without them
    # (Dagster 1.13).
    @dg.asset_check(
        asset=spec.key,
        name="publication_is_in_kafka",
        description="The last publication is still in the topic, whole: neither retention nor anybody has deleted it.",
        blocking=blocking,
        required_resource_keys={resource_key},
    )
    def publication_is_in_kafka(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        kafka: KafkaProducerResource = getattr(context.resources, resource_key)
        op_context = context.op_execution_context
        with kafka.errors_in_dagster(op_context):
            config = kafka.producer_config()
            publications, others = _publications(op_context, spec, bare)
            found = {
                name: find_missing(config, publication, thorough=thorough, timeout=timeout)
                for name, publication in publications.items()
                if publication is not None
            }
            return _result(publications, found, others, severity)

    return publication_is_in_kafka


def _publications(
    context: dg.OpExecutionContext, spec: dg.AssetSpec, bare: bool
) -> tuple[dict[str, Publication | None], list[KafkaError]]:
    """What the asset's materializations published, by name, each publication once; and what was not published here."""
    publications: dict[str, Publication | None] = {}
    seen = set()
    partitions, are_asked = _partitions(context, spec, bare)
    others: list[KafkaError] = []
    for partition in partitions:
        try:
            last = _last_published(context.instance, spec.key, partition, bare)
        except KafkaError as error:
            # Somebody has reported it by hand, or stored it elsewhere.
            if are_asked:
                raise
            others.append(error)
            continue
        identity = last.publication and last.publication.publication_id
        if identity is None or identity not in seen:
            seen.add(identity)
            publications[name_of(spec.key, partition)] = last.publication
    if others and not publications:
        raise others[0]
    return publications, others


def _last_published(
    instance: dg.DagsterInstance, asset_key: dg.AssetKey, partition: str | None, bare: bool
) -> Published:
    last = last_published(instance, asset_key, partition)
    if last is None:
        raise KafkaError(name_of(asset_key, partition), "it was never materialized", "Materialize it first")
    if not bare:
        refuse_partition_for_whole(asset_key, partition, last)
    return last


def _partitions(context: dg.OpExecutionContext, spec: dg.AssetSpec, bare: bool) -> tuple[Sequence[str | None], bool]:
    """The Dagster partitions to look at, and whether the run asks for them.

    They are those of the run that the asset has, else all that are materialized; None for an asset without.

    Dagster's event log also has materializations from before an asset's partitions changed: what they are now, its
    definition says, and the log only where that is not known.
    """
    known = spec.partitions_def
    if known is None and not bare:
        return [None], True
    of_run = context.partition_keys if context.has_partition_key or context.has_partition_key_range else ()
    keys = None if known is None else set(known.get_partition_keys(dynamic_partitions_store=context.instance))
    if keys is not None:
        of_run = [key for key in of_run if key in keys]
        if of_run:
            return of_run, True
    materialized = context.instance.get_materialized_partitions(spec.key)
    if keys is not None:
        materialized &= keys
        if not materialized:
            raise KafkaError(
                name_of(spec.key, None), "none of its Dagster partitions was materialized", "Materialize them first"
            )
    elif not materialized:
        return [None], True
    return (of_run, True) if of_run else (sorted(materialized), False)


def _result(
    publications: dict[str, Publication | None],
    found: dict[str, list[Missing]],
    others: list[KafkaError],
    severity: dg.AssetCheckSeverity,
) -> dg.AssetCheckResult:
    missing = [(name, gone) for name, some in found.items() for gone in some]
    records = sum(publication.records for publication in publications.values() if publication is not None)
    metadata: dict[str, Any] = {
        "kafka/publications": len(publications),
        "kafka/records": records,
        "kafka/missing_records": sum(gone.records for _, gone in missing),
    }
    if others:
        metadata["kafka/not_checked"] = f"{len(others)} Dagster partitions. The first: {others[0]}"
    if not missing:
        return dg.AssetCheckResult(passed=True, metadata=metadata, description=f"All {records:,} records are in Kafka")
    rows = [
        dg.TableRecord(
            {
                "publication": name,
                "topic": gone.topic,
                "partition": "" if gone.partition is None else gone.partition,
                "missing records": gone.records,
                "cause": gone.cause,
            }
        )
        for name, gone in missing[:_SHOWN]
    ]
    metadata["kafka/missing"] = dg.MetadataValue.table(rows, _COLUMNS)
    name, gone = missing[0]
    place = place_name(gone.topic, gone.partition)
    count = metadata["kafka/missing_records"]
    description = f"{count:,} of {records:,} records are gone. {name}, {place}: {gone.cause}"
    return dg.AssetCheckResult(passed=False, severity=severity, metadata=metadata, description=description)
