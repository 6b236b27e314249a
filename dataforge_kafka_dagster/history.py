"""What Dagster's event log knows of publications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import dagster as dg

from dataforge_kafka_dagster.kafka.errors import KafkaError
from dataforge_kafka_dagster.kafka.ledger import Publication
from dataforge_kafka_dagster.resource import PUBLICATION_METADATA


class Published(NamedTuple):
    """What a materialization says of its publication.

    Attributes:
        publication: The publication; None if nothing was published.
        partitions: The Dagster partitions that it covers together, if it covers several.
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
        KafkaError: It was materialized by something else than this package.
    """
    partitions = None if partition is None else [partition]
    filters = dg.AssetRecordsFilter(asset_key=asset_key, asset_partitions=partitions)
    found = instance.fetch_materializations(filters, limit=1).records
    if not found:
        return None
    materialization = found[0].asset_materialization
    said = published(materialization.metadata if materialization else {}, name_of(asset_key, partition))
    return said._replace(partition=materialization.partition if materialization else None)


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
        return Published(Publication.from_dict(said.value), said.value.get("partitions", ()))
    count = metadata.get("kafka/records")
    if count is not None and count.value == 0:
        return Published(None, ())
    raise KafkaError(
        name,
        f"its last materialization has no {PUBLICATION_METADATA!r}: it was not published by a KafkaIOManager",
        "Materialize it with this IO manager, or give the input the IO manager that stored it",
    )
