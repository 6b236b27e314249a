"""A run that is cancelled ends within two seconds, aborted, whatever it was doing and whatever the broker does."""

import itertools
import os
import signal
import time
import uuid

import confluent_kafka
import pytest
from conftest import read_topic
from interrupting import PHASES, RECORDS, Interrupted, starved

from dataforge_kafka_dagster.local import LocalKafka

pytestmark = pytest.mark.kafka

# Two seconds are promised. The time that a run waits for a processor is not counted: on a busy machine that is most of it.
# What librdkafka's own threads wait for one, and pages that a forked process has to copy, get the rest.
_PROMISED = 2.0
_LEEWAY = float(os.environ.get("INTERRUPT_LEEWAY", "1.0"))
_SIGNALS = itertools.cycle([signal.SIGTERM, signal.SIGINT])


@pytest.fixture(scope="module")
def runs():
    with Interrupted() as runs:
        yield runs


@pytest.fixture(scope="module")
def broker():
    with LocalKafka() as kafka:
        yield kafka


def _end_in_time(runs, signalled, *, alone=False):
    """Every run of these was interrupted and its process is gone in time; how long each took, less its waits for a processor.

    Args:
        runs: The runs' parent.
        signalled: By pid, when it was signalled, and how long it had waited for a processor in its life till then.
        alone: It had no thread and no socket left before that.
    """
    waits = []
    for said in runs.wait("left", signalled):
        assert not alone or said["left"] == []
        assert said["ended"] in {"DagsterExecutionInterruptedError", "KeyboardInterrupt"}
    for said in runs.wait("exit", signalled):
        assert said["exit"] == 0
        when, waited = signalled[said["pid"]]
        waits.append(said["when"] - when - (said["starved"] - waited))
    assert max(waits) < _PROMISED + _LEEWAY
    return waits


def _no_record_visible(servers, topic, *, settled):
    """No record of an interrupted run; ``settled``: nor a transaction that holds readers up."""
    if settled:
        producer = confluent_kafka.Producer({"bootstrap.servers": servers})
        producer.produce(topic, b"after")
        assert producer.flush(30) == 0
    assert [record.value for record in read_topic(servers, topic)] == ([b"after"] if settled else [])


def interrupt_live(runs, servers, topic, phase):
    """Interrupt a run as it enters a phase, while the broker is well."""
    prefix = f"i{uuid.uuid4().hex[:8]}"
    runs.start(phase=phase, servers=servers, topic=topic, prefix=prefix, go="", itself=next(_SIGNALS))
    (at,) = runs.wait("at", 1)
    return _end_in_time(runs, {at["pid"]: (at["when"], at["starved"])}, alone=True)


def interrupt_without_broker(runs, broker, phase, folder, trouble, count):
    """Interrupt runs that wait in a phase for a broker that is paused or dead."""
    topic, go = f"interrupted-{uuid.uuid4().hex[:8]}", folder / uuid.uuid4().hex
    broker.create_topic(topic)
    for number in range(count):
        prefix = f"i{uuid.uuid4().hex[:8]}-{number}"
        runs.start(phase=phase, servers=broker.bootstrap_servers, topic=topic, prefix=prefix, go=str(go))
    pids = [said["pid"] for said in runs.wait("at", count)]
    (broker.pause_broker if trouble == "paused" else broker.kill_broker)(1)
    try:
        go.touch()
        time.sleep(0.5)
        signalled = {}
        for pid in pids:
            signalled[pid] = (time.monotonic(), starved(pid))
            os.kill(pid, next(_SIGNALS))
        waits = _end_in_time(runs, signalled)
    finally:
        (broker.resume_broker if trouble == "paused" else broker.start_broker)(1)
    if phase != "commit":
        _no_record_visible(broker.bootstrap_servers, topic, settled=False)
        return waits
    # A commit that is under way cannot be called back: all of a run's records are there, or none.
    assert len(read_topic(broker.bootstrap_servers, topic)) in range(0, count * RECORDS + 1, RECORDS)
    return waits


@pytest.mark.parametrize("phase", ["mid_write", "queue_full", "commit"])
def test_a_run_that_is_cancelled_ends_aborted(phase, runs, broker):
    topic = f"interrupted-{uuid.uuid4().hex[:8]}"
    broker.create_topic(topic)
    interrupt_live(runs, broker.bootstrap_servers, topic, phase)
    _no_record_visible(broker.bootstrap_servers, topic, settled=True)


@pytest.mark.parametrize("phase", ["connect", "ledger", "flush"])
def test_a_run_that_waits_for_a_frozen_broker_ends_when_cancelled(phase, runs, broker, tmp_path):
    interrupt_without_broker(runs, broker, phase, tmp_path, "paused", 1)


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_is_cancelled_ends_aborted_twenty_times(phase, runs, broker, say):
    topic = f"interrupted-{uuid.uuid4().hex[:8]}"
    broker.create_topic(topic)
    waits = [wait for _ in range(20) for wait in interrupt_live(runs, broker.bootstrap_servers, topic, phase)]
    say(f"{phase}, broker well: {max(waits):.2f} s at most")
    _no_record_visible(broker.bootstrap_servers, topic, settled=True)


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("trouble", ["paused", "dead"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_waits_for_a_broker_that_is_away_ends_when_cancelled_twenty_times(
    phase, trouble, runs, broker, tmp_path, say
):
    # Four at a time, since a broker takes seconds to come back.
    waits = [w for _ in range(5) for w in interrupt_without_broker(runs, broker, phase, tmp_path, trouble, 4)]
    assert len(waits) == 20
    say(f"{phase}, broker {trouble}: {max(waits):.2f} s at most")
