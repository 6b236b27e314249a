"""A run that is terminated as the UI does it: by the webserver's GraphQL, to a run of its own process, to its step's."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import confluent_kafka
import crashing
import dagster as dg
import psutil
import pytest
from conftest import read_topic
from dagster_graphql import DagsterGraphQLClient
from test_exactly_once import crash, wait_for

pytestmark = pytest.mark.faults
__all__ = ["crash"]

# What Dagster itself takes to tell the run and the run its step is in it: both look now and then.
_LONGEST = 20.0


def _alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        # One that its parent has not yet waited for is gone all the same.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def instance(tmp_path, monkeypatch):
    """An instance whose runs start at once, as a daemon would start them."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    coordinator = "run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}"
    (tmp_path / "dagster.yaml").write_text(f"telemetry: {{enabled: false}}\n{coordinator}\n")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


@pytest.fixture
def webserver(instance, tmp_path):
    """The UI's server, and its client."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "webserver.log"
    program = Path(sys.executable).parent / "dagster-webserver"
    command = [program, "-h", "127.0.0.1", "-p", str(port), "-f", crashing.__file__, "-a", "definitions"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:

        def listens():
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True

        wait_for(listens, 120)
        yield psutil.Process(process.pid), DagsterGraphQLClient("127.0.0.1", port_number=port)
    finally:
        ours = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        for left in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


@pytest.mark.timeout(400)
def test_a_run_that_the_ui_terminates_ends_and_leaves_nothing(webserver, instance, crash, kafka_bootstrap_servers, say):
    server, client = webserver
    before = set(server.children(recursive=True))
    # SIGCONT does nothing: it only marks that the step is in mid-write, of which 15 seconds are left.
    tags = crash("mid_write", **{"crash/signal": str(int(signal.SIGCONT)), "crash/pause": "0.02"})
    run_id = client.submit_job_execution("without_policy_job", run_config=crash.run_config, tags=tags)
    mark = crash.marks / "mid_write"
    wait_for(lambda: mark.exists() and mark.read_text(), 180)
    step = psutil.Process(int(mark.read_text()))
    # The step's process, those between, and the run's; the code server's stay.
    run = [process for process in (step, *step.parents()) if process not in {server, *server.parents(), *before}]
    assert len(run) > 1, "the step has no process of its own"
    # The fault is real: records of it are in the topic.
    assert read_topic(kafka_bootstrap_servers, crash.topic, "read_uncommitted")

    began = time.monotonic()
    client.terminate_run(run_id)
    wait_for(lambda: not _alive(step), _LONGEST)
    step_ended = time.monotonic() - began
    wait_for(lambda: not any(map(_alive, run)), _LONGEST)
    say(f"terminated: the step's process is gone after {step_ended:.1f} s, the run's {time.monotonic() - began:.1f} s")
    wait_for(lambda: instance.get_run_by_id(run_id).status == dg.DagsterRunStatus.CANCELED, _LONGEST)

    assert instance.fetch_materializations(dg.AssetKey("crashing_without_policy"), limit=1).records == []
    # Aborted, and not only left open: a record behind it can be read.
    producer = confluent_kafka.Producer({"bootstrap.servers": kafka_bootstrap_servers})
    for partition in range(3):
        producer.produce(crash.topic, b"after", partition=partition)
    assert producer.flush(30) == 0
    assert [record.value for record in read_topic(kafka_bootstrap_servers, crash.topic)] == [b"after"] * 3
