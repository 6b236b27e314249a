"""What Dagster's event log knows of publications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import dagster as dg

from dataforge_kafka_dagster.kafka.errors import KafkaError
from dataforge_kafka_dagster.kafka.ledger import Publication
from dataforge_kafka_dagster.resource import PUBLICATION_METADATA, unpack_partitions

_PAGE: Final = 100
_EVENTS: Final = 1_000
# A materialization of no run that has one of these is ours.
_SAID_HERE: Final = frozenset({PUBLICATION_METADATA, "kafka/run"})


class Published(NamedTuple):
    """What a materialization says of its publication.

    Attributes:
        publication: The publication; None if nothing was published.
        partitions: The Dagster partitions that it covers.
        partition: The one that the materialization is of, None if of none.
    """

    publication: Publication | None
    partitions: Sequence[str]
    partition: str | None = None


def last_published(instance: dg.DagsterInstance, asset_key: dg.AssetKey, partition: str | None) -> Published | None:
    """What an asset's last materialization published.

    Args:
        instance: Where its event log is.
        asset_key: The asset.
        partition: Its Dagster partition; None for the last of any.

    Returns:
        None if it was never materialized.

    Raises:
        KafkaError: It was materialized by something else than this package, or tells of another Dagster partition.
    """
    partitions = None if partition is None else [partition]
    filters = dg.AssetRecordsFilter(asset_key=asset_key, asset_partitions=partitions)
    limit, cursor = 1, None
    while True:
        page = instance.fetch_materializations(filters, limit=limit, cursor=cursor)
        # What somebody has reported by hand, in the UI for instance, was published before that; what a failed step had
        # published is of no run either.
        for record in page.records:
            materialization = record.asset_materialization
            if materialization is not None and (record.run_id or _SAID_HERE & materialization.metadata.keys()):
                name = name_of(asset_key, partition)
                said = published(materialization.metadata, name)._replace(partition=materialization.partition)
                if said.partitions and said.partition is not None and said.partition not in said.partitions:
                    raise KafkaError(
                        name,
                        f"its last materialization tells of a publication of {said.partitions[0]!r}",
                        "Hand on that of each from the asset's body: context.add_asset_metadata("
                        "publication.materialize_result().metadata, partition_key=...)",
                    )
                return said
        if not page.has_more or page.cursor is None:
            return None
        limit, cursor = _PAGE, page.cursor


def refuse_partition_for_whole(asset_key: dg.AssetKey, partition: str | None, last: Published) -> None:
    """Refuse the last publication of one Dagster partition where that of the whole asset was asked for.

    Raises:
        KafkaError: It is such a one.
    """
    if partition is None and last.partition is not None:
        raise KafkaError(
            name_of(asset_key, partition),
            f"it is read as a whole, but was last materialized for its Dagster partition {last.partition!r} only",
            "Ask for a Dagster partition; of an AssetSpec, give it the partitions_def that the asset has; if the asset"
            " has none any more, materialize it anew",
        )


def name_of(asset_key: dg.AssetKey, partition: str | None) -> str:
    """What errors call an asset and its Dagster partition."""
    return f"asset {asset_key.to_user_string()!r}" + ("" if partition is None else f", partition {partition!r}")


def published(metadata: Mapping[str, Any], name: str) -> Published:
    """What an event's metadata says.

    Args:
        metadata: Of a materialization, or of an output that was handled.
        name: What an error calls its origin.

    Raises:
        KafkaError: It says nothing of a publication.
    """
    said = metadata.get(PUBLICATION_METADATA)
    if said is not None:
        return Published(Publication.from_dict(said.value), unpack_partitions(said.value["partitions"]))
    count = metadata.get("kafka/records")
    if count is not None and count.value == 0:
        return Published(None, ())
    raise KafkaError(
        name,
        f"its last materialization has no {PUBLICATION_METADATA!r}: it was not published by a KafkaIOManager (or its"
        " function is annotated '-> None', and Dagster hands no IO manager what it returns)",
        "Materialize it with this IO manager, give the input the IO manager that stored it, or return"
        " publication.materialize_result() from its body",
    )


class HandledOutputs:
    """What runs say of their ops' outputs. Each event is read once: a step may have an input of each of thousands."""

    def __init__(self) -> None:
        self._cursors: dict[str, str | None] = {}
        self._found: dict[tuple[str, str, str, str | None], Mapping[str, Any]] = {}

    def find(
        self, instance: dg.DagsterInstance, run_id: str, step_key: str, name: str, mapping_key: str | None
    ) -> Mapping[str, Any] | None:
        """The metadata of an output, as its last attempt has given them; None if there are none."""
        more = True
        while more:
            page = instance.get_records_for_run(
                run_id, self._cursors.get(run_id), of_type=dg.DagsterEventType.HANDLED_OUTPUT, limit=_EVENTS
            )
            for record in page.records:
                event = record.event_log_entry.dagster_event
                if event is not None and event.step_key is not None:
                    data: Any = event.event_specific_data
                    mapped = data.metadata.get("kafka/mapping_key")
                    self._found[run_id, event.step_key, data.output_name, mapped and mapped.value] = data.metadata
            self._cursors[run_id], more = page.cursor, page.has_more
        return self._found.get((run_id, step_key, name, mapping_key))
