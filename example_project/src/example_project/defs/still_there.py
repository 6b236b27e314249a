"""What was published is still in Kafka: retention and other people delete what a materialization points at."""

import dagster as dg

from dataforge_kafka_dagster import build_publication_checks
from example_project.defs.assets import carrier_delays, flights, long_delays


@dg.definitions
def still_there() -> dg.Definitions:
    """For each asset, that its last publication is in its topic, whole; and its schema one that the registry takes."""
    return dg.Definitions(asset_checks=build_publication_checks([flights, carrier_delays, long_delays]))
