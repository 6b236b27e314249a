"""Runs that are interrupted in a phase of their publication, each in a process forked from one that imported it all.

A program: reads one JSON line per run from its standard input, and writes JSON lines: ``{"pid", "at"}`` when a run is in
its phase, ``{"pid", "left"}`` with the threads and sockets that are left when it has ended, and ``{"pid", "exit",
"when", "starved"}`` when its process is gone, by the clock of `time.monotonic`. ``starved``, of a run in its phase too,
is how long its main thread has waited for a processor in its life.
"""

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PHASES = ("connect", "init_transactions", "ledger", "mid_write", "queue_full", "flush", "send_offsets", "commit")
RECORDS = 3_000


class Interrupted:
    """The processes of some runs; a context manager that leaves none behind."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        self._said = []
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()
        self._process.wait(10)

    def start(self, **run):
        """Start a run; its keys are those that `_run` takes."""
        self._process.stdin.write(json.dumps(run).encode() + b"\n")
        self._process.stdin.flush()

    def wait(self, what, pids, seconds=60.0):
        """The lines of these runs that say this; of so many runs that have just been started, if a number is given."""
        found, deadline = [], time.monotonic() + seconds
        count = pids if isinstance(pids, int) else len(pids)
        while True:
            wanted = [line for line in self._said if what in line and (pids == count or line["pid"] in pids)]
            found += wanted[: count - len(found)]
            self._said = [line for line in self._said if line not in found]
            if len(found) == count:
                return found
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{len(found)} of {count} runs said {what!r} within {seconds} s; {self._said}"
            line = os.read(self._process.stdout.fileno(), 1 << 20)
            assert line, f"the runs' parent has ended; {self._said}"
            self._said += map(json.loads, line.splitlines())


def _say(**line):
    # One write of less than PIPE_BUF bytes: lines of several processes do not mix.
    os.write(1, json.dumps({"pid": os.getpid()} | line).encode() + b"\n")


def starved(pid):
    """How long the main thread of a process has been ready to run, but had no processor, in its life: seconds.

    https://www.kernel.org/doc/html/latest/scheduler/sched-stats.html#proc-pid-schedstat; 0 on other systems.
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except FileNotFoundError:
        return 0.0


def _sockets():
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(fd.readlink())
            found += [target] if target.startswith("socket:") else []
    return found


def _run(*, phase, servers, topic, prefix, go, itself=None):
    """One run, in a child process.

    Args:
        phase: Where to say ``at``.
        servers: The brokers.
        topic: The topic.
        prefix: Of the transactional ids.
        go: File that lets it go on when it exists.
        itself: Signal that it sends to itself in its phase, instead of waiting for ``go``.
    """
    import dagster as dg

    from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerResource

    before, told, full = set(_sockets()), [], []

    def reach(here):
        if here != phase or told:
            return
        told.append(here)
        _say(at=here, when=time.monotonic(), starved=starved(os.getpid()))
        if itself:
            os.kill(os.getpid(), itself)
            return
        while not Path(go).exists():
            time.sleep(0.01)

    _call_at_each_phase(reach, full)

    def rows():
        i = 0
        while i < RECORDS or phase == "queue_full":
            if i == RECORDS // 2:
                time.sleep(0.1)
                reach("mid_write")
            yield {"i": i, "padding": "x" * 100}
            i += 1

    @dg.asset(metadata={"kafka/topic": topic})
    def interrupted():
        yield dg.Output(rows())

    kafka = KafkaProducerResource(
        bootstrap_servers=servers,
        transactional_id_prefix=prefix,
        connect_timeout=30,
        delivery_timeout=60,
        buffer_memory=100_000 if phase == "queue_full" else 67_108_864,
    )
    try:
        dg.materialize([interrupted], resources={"io_manager": KafkaIOManager(kafka=kafka)})
        ended = "success"
    except BaseException as error:  # noqa: BLE001
        ended = type(error).__name__
    if itself is None and phase == "queue_full" and not full:
        ended = "the queue was never full"
    # What the error's traceback held is let go of. A call that waits for a broker that is away ends with the process.
    gc.collect()
    deadline = time.monotonic() + (10 if itself else 0)
    while (left := _left(before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    _say(left=left, ended=ended)


def _call_at_each_phase(reach, full):
    """Call ``reach`` with a phase's name as it begins; ``full`` grows with each record that finds the queue full."""
    from dataforge_kafka_dagster.kafka import sender
    from dataforge_kafka_dagster.kafka.connection import Connection
    from dataforge_kafka_dagster.kafka.ledger import Ledger
    from dataforge_kafka_dagster.kafka.publication import PublicationWriter

    def before_call(owner, name, here, when=lambda *_: True):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if when(*args):
                reach(here)
            return function(*args, **kwargs)

        setattr(owner, name, wrapped)

    def is_call(name):
        return lambda _, call, *__: getattr(call, "__name__", "") == name

    before_call(sender, "check_topic_exists", "connect")
    before_call(Connection, "resume", "init_transactions", is_call("init_transactions"))
    before_call(Ledger, "read", "ledger")
    before_call(sender.Sender, "_produce_with_room", "queue_full", lambda *_: full.append(1) is None)
    before_call(PublicationWriter, "_flush", "flush")
    before_call(PublicationWriter, "_commit_transaction", "send_offsets")
    before_call(Connection, "resume", "commit", is_call("commit_transaction"))


def _left(sockets):
    threads = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    native = len(list(Path("/proc/self/task").iterdir())) - 1 - len(threads)
    return threads + ["native thread"] * native + sorted(set(_sockets()) - sockets)


def _main():
    import dataforge_kafka_dagster  # noqa: F401

    # A shell starts what runs in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    children, text = {}, b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.005 if children else 3600)
        if ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            text += data
        *lines, text = text.split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                _run(**json.loads(line))
                return
            children[pid] = line
        while children:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                break
            when, waited = time.monotonic(), starved(ended.si_pid)
            pid, status = os.waitpid(ended.si_pid, 0)
            del children[pid]
            _say(pid=pid, exit=os.waitstatus_to_exitcode(status), when=when, starved=waited)


if __name__ == "__main__":
    _main()
