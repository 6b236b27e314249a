"""Publish Dagster assets to Apache Kafka, exactly once, with the offsets in the Dagster UI."""

from dataforge_kafka_dagster.io_manager import KafkaIOManager
from dataforge_kafka_dagster.kafka.config import KafkaProducerConfig, KafkaTopicSpec
from dataforge_kafka_dagster.kafka.errors import KafkaError, KafkaTimeoutError, NoBrokersAvailable
from dataforge_kafka_dagster.kafka.producer import DataForgeKafkaProducer, RecordMetadata, create_kafka_producer
from dataforge_kafka_dagster.kafka.publication import Publication
from dataforge_kafka_dagster.kafka.records import KafkaRecord
from dataforge_kafka_dagster.resource import KafkaProducerResource

__all__ = [
    "DataForgeKafkaProducer",
    "KafkaError",
    "KafkaIOManager",
    "KafkaProducerConfig",
    "KafkaProducerResource",
    "KafkaRecord",
    "KafkaTimeoutError",
    "KafkaTopicSpec",
    "NoBrokersAvailable",
    "Publication",
    "RecordMetadata",
    "create_kafka_producer",
]
