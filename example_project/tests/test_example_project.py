"""Tests of the example project that need no Kafka: the assets are functions, and are called as such."""

import contextlib
import datetime as dt
import fcntl
import importlib.util
import os
import signal
import socket
import sys
import types
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from example_project.definitions import defs
from example_project.defs.assets import carrier_delays, flights, planes
from example_project.defs.checks import each_flight_once, every_flight_counted
from example_project.defs.jobs import every_morning
from example_project.rows import weather

from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.serialization import serialize_value


def _demo():
    path = Path(__file__).parents[1] / "demo.py"
    demo = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("demo", path))
    spec.loader.exec_module(demo)
    return demo


def test_a_second_ui_of_a_clone_is_told_of_the_first(monkeypatch, tmp_path, capsys):
    demo = _demo()
    monkeypatch.setattr(demo, "cluster", lambda *_: pytest.fail("started"))
    (tmp_path / "kafka").mkdir()
    # The port of the first one is in use, too.
    with (tmp_path / "kafka" / "lock").open("w") as lock, socket.create_server(("127.0.0.1", 0)) as first:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert demo.ui(first.getsockname()[1], tmp_path, "", "") == 1
    said = capsys.readouterr().err
    assert f"'make ui' runs already on {tmp_path}" in said
    assert "PORT" not in said
    assert not demo.is_used(tmp_path / "kafka")
    assert not demo.is_used(tmp_path / "none")


@pytest.mark.parametrize(
    ("number", "before", "code"),
    [
        (signal.SIGINT, signal.SIG_IGN, 130),  # as a shell starts what runs in the background
        (signal.SIGTERM, signal.SIG_DFL, 130),
        (signal.SIGHUP, lambda *_: None, 130),
        (signal.SIGHUP, signal.SIG_IGN, 0),  # as nohup starts it
    ],
)
def test_the_demo_ends_with_its_terminal_unless_it_is_to_outlive_it(number, before, code, monkeypatch):
    demo = _demo()
    monkeypatch.setattr(demo, "demo", lambda *_: signal.raise_signal(number) or 0)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {each: signal.signal(each, signal.SIG_DFL) for each in numbers}
    try:
        signal.signal(number, before)
        assert demo.main() == code
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


@pytest.mark.parametrize("given", [("", ""), ("a:1", "http://a:2")])
def test_the_demo_goes_to_its_own_cluster_or_to_that_of_the_environment(given, monkeypatch):
    demo = _demo()
    local = types.SimpleNamespace(bootstrap_servers="127.0.0.1:1", url="http://127.0.0.1:2")
    topics_made_at = []
    monkeypatch.setattr(demo, "LocalKafka", lambda **_: contextlib.nullcontext(local))
    monkeypatch.setattr(demo, "LocalSchemaRegistry", lambda **_: contextlib.nullcontext(local))
    monkeypatch.setattr(demo, "create_topics", topics_made_at.append)
    names = ("KAFKA_BOOTSTRAP_SERVERS", "SCHEMA_REGISTRY_URL")
    for name, value in zip(names, given, strict=True):
        monkeypatch.setenv(name, value)
    seen = []

    def published():
        seen.extend(os.environ[name] for name in names)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "publish_week", published)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    assert demo.main() == 130
    assert seen == (list(given) if given[0] else [local.bootstrap_servers, local.url])
    assert topics_made_at == seen[:1]


def test_definitions_load():
    definitions = defs()
    dg.Definitions.validate_loadable(definitions)
    assert {job.name for job in definitions.jobs or ()} == {"announce", "publish_day"}


def test_each_asset_of_a_day_has_its_checks():
    checks = {key.to_user_string() for key in defs().resolve_asset_graph().asset_check_keys}
    published = {f"{asset}:publication_is_in_kafka" for asset in ("flights", "carrier_delays", "long_delays")}
    others = {"flights:each_flight_once", "carrier_delays:every_flight_counted", "carrier_delays:schema_is_compatible"}
    assert checks == published | others


def test_what_fails_on_purpose_is_in_no_job_that_is_scheduled():
    definitions = defs()
    selected = definitions.resolve_job_def("publish_day").asset_layer.selected_asset_keys
    assert {key.to_user_string() for key in selected} == {"carrier_delays", "flights", "long_delays", "weather"}
    (failing,) = planes.keys
    assert failing not in selected


def test_the_failing_asset_fails_for_the_reason_it_says():
    with pytest.raises(InvalidRecordError, match="record 0, field 'speed': JSON has neither NaN nor infinity"):
        serialize_value(planes()[0], 0)


def test_weather_is_of_the_day():
    day = weather(dg.build_asset_context(partition_key="2013-01-02"))
    assert set(day.origin) == {"EWR", "JFK", "LGA"}
    assert set(day.day) == {2}


def test_carriers_add_up_to_the_day():
    context = dg.build_asset_context(partition_key="2013-01-01")
    day = pl.from_pandas(flights(context)["2013-01-01"])
    assert len(day) == 842
    assert each_flight_once(day).passed

    delays = carrier_delays(context, day)
    assert every_flight_counted(delays, day).passed
    assert delays.filter(carrier="AA").row(0, named=True) == {
        "date": dt.date(2013, 1, 1),
        "carrier": "AA",
        "flights": 94,
        "mean_departure_delay": 8.0,
        "worst_arrival_delay": 246.0,
    }


def test_a_flight_that_comes_twice_is_found():
    flight = {"year": 2013, "month": 1, "day": 2, "carrier": "AA", "flight": 1, "origin": "JFK", "sched_dep_time": 900}
    assert not each_flight_once(pl.DataFrame([flight, flight])).passed
    assert each_flight_once(pl.DataFrame([flight, {**flight, "day": 3}])).passed


def test_a_backfills_run_has_an_output_for_each_of_its_days():
    with dg.build_asset_context(partition_key_range=dg.PartitionKeyRange("2013-01-31", "2013-02-02")) as context:
        days = flights(context)
    assert {day: len(frame) for day, frame in days.items()} == {"2013-01-31": 928, "2013-02-01": 926, "2013-02-02": 682}
    assert all(
        set(zip(frame.month, frame.day, strict=True)) == {(int(day[5:7]), int(day[8:]))} for day, frame in days.items()
    )


@pytest.mark.parametrize(("today", "partition"), [("2026-03-05", "2013-03-05"), ("2028-02-29", None)])
def test_schedule_runs_the_same_day_of_2013(today, partition):
    context = dg.build_schedule_context(scheduled_execution_time=dt.datetime.fromisoformat(today))
    assert getattr(every_morning(context), "partition_key", None) == partition
