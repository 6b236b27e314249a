"""Publishing to Kafka without Dagster; nothing in this package imports it."""
