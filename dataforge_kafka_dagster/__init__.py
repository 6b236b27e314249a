"""Publish Dagster assets to Apache Kafka, exactly once, with the offsets in the Dagster UI."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from dagster_shared.libraries import DagsterLibraryRegistry

from dataforge_kafka_dagster.io_manager import KafkaIOManager
from dataforge_kafka_dagster.kafka.config import KafkaProducerConfig, KafkaTopicSpec
from dataforge_kafka_dagster.kafka.errors import KafkaError, KafkaTimeoutError, NoBrokersAvailable
from dataforge_kafka_dagster.kafka.ledger import Publication
from dataforge_kafka_dagster.kafka.producer import DataForgeKafkaProducer, create_kafka_producer
from dataforge_kafka_dagster.kafka.records import KafkaRecord
from dataforge_kafka_dagster.kafka.schemas import KafkaSchema
from dataforge_kafka_dagster.kafka.served_producer import RecordMetadata
from dataforge_kafka_dagster.resource import KafkaProducerResource

if TYPE_CHECKING:
    from dataforge_kafka_dagster.checks import build_publication_checks
    from dataforge_kafka_dagster.components import KafkaResourceComponent, KafkaTopicComponent

__all__ = [
    "DataForgeKafkaProducer",
    "KafkaError",
    "KafkaIOManager",
    "KafkaProducerConfig",
    "KafkaProducerResource",
    "KafkaRecord",
    "KafkaResourceComponent",
    "KafkaSchema",
    "KafkaTimeoutError",
    "KafkaTopicComponent",
    "KafkaTopicSpec",
    "NoBrokersAvailable",
    "Publication",
    "RecordMetadata",
    "build_publication_checks",
    "create_kafka_producer",
]

_LAZY: Final = {
    "KafkaResourceComponent": "components",
    "KafkaTopicComponent": "components",
    "build_publication_checks": "checks",
}
"""Names that are imported when first asked for, by module: dg finds components in this package's `dir`."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


DagsterLibraryRegistry.register("dataforge-kafka-dagster", version("dataforge-kafka-dagster"), is_dagster_package=False)
