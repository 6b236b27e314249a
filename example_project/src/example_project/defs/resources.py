"""The Kafka cluster, and how assets get there."""

import dagster as dg

from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerResource


@dg.definitions
def resources() -> dg.Definitions:
    """One cluster and its Schema Registry: for assets by the IO manager, for ops by the resource."""
    kafka = KafkaProducerResource(
        bootstrap_servers=dg.EnvVar("KAFKA_BOOTSTRAP_SERVERS"), schema_registry_url=dg.EnvVar("SCHEMA_REGISTRY_URL")
    )
    return dg.Definitions(resources={"kafka": kafka, "io_manager": KafkaIOManager(kafka=kafka)})
