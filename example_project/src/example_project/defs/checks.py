"""What must be true of each day's records; the checks read them back from Kafka."""

import dagster as dg
import polars as pl

from example_project.defs.assets import carrier_delays, daily, flights

FLIGHT = ["year", "month", "day", "carrier", "flight", "origin", "sched_dep_time"]


@dg.asset_check(asset=flights, partitions_def=daily)
def each_flight_once(flights: pl.DataFrame) -> dg.AssetCheckResult:
    """There are flights, and each is there once."""
    twice = len(flights) - flights.n_unique(FLIGHT)
    return dg.AssetCheckResult(
        passed=len(flights) > 0 and twice == 0, metadata={"flights": len(flights), "twice": twice}
    )


@dg.asset_check(
    asset=carrier_delays,
    additional_ins={"flights": dg.AssetIn("flights")},
    partitions_def=daily,
)
def every_flight_counted(carrier_delays: pl.DataFrame, flights: pl.DataFrame) -> dg.AssetCheckResult:
    """The carriers' flights add up to the day's."""
    counted = int(carrier_delays["flights"].sum())
    return dg.AssetCheckResult(passed=counted == len(flights), metadata={"flights": len(flights), "counted": counted})
