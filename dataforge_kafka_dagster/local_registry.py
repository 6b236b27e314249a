"""A real Schema Registry on this machine, Apicurio Registry: no Docker, no system Java.

`LocalSchemaRegistry` runs it on the loopback interface, beside a `LocalKafka`. It needs the extras `local` and
`schema-registry`. Linux and macOS. From a shell: `python -m dataforge_kafka_dagster.local --registry-port 8081`.
"""

import os
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from dataforge_kafka_dagster.kafka.errors import KafkaConfigError, KafkaError
from dataforge_kafka_dagster.kafka.registry import SchemaRegistry, SchemaRegistryConfig
from dataforge_kafka_dagster.local_java import (
    JVM_OPTIONS,
    LAST_PORT,
    STARTED,
    LocalKafkaError,
    Supervisor,
    default_cache_dir,
    fetch_jars,
    free_ports,
    is_free,
    java_program,
    tail,
    to_stderr,
)

__all__ = ("APICURIO_VERSION", "LocalSchemaRegistry")

# The newest that Maven Central has as an archive.
APICURIO_VERSION = "2.5.11.Final"
_JARS = (
    f"apicurio-registry-{APICURIO_VERSION}",
    f"io.apicurio:apicurio-registry-app:{APICURIO_VERSION}:tar.gz:all",
)
_MEGABYTES = 280  # the archive and what is in it
_MAIN = "io.quarkus.runner.GeneratedMain"


_COMPATIBILITIES = {
    None,
    "NONE",
    *(f"{name}{more}" for name in ("BACKWARD", "FORWARD", "FULL") for more in ("", "_TRANSITIVE")),
}


class LocalSchemaRegistry:
    """A Schema Registry on 127.0.0.1, for development and tests: Apicurio, with the API of Confluent's.

    ```python
    with LocalKafka() as kafka, LocalSchemaRegistry() as registry:
        KafkaProducerResource(bootstrap_servers=kafka.bootstrap_servers, schema_registry_url=registry.url)
    ```

    It keeps its schemas in memory, or in a `data_dir`. Its process ends with this one, however it ends; a forked child
    leaves it to its parent.

    Args:
        port: Its port. Default: a free one.
        compatibility: The rule for every subject that has none of its own, such as "BACKWARD" or "FULL_TRANSITIVE";
            None sets none, so that any change is allowed.
        data_dir: Folder that keeps the schemas, made if missing; a second start on it finds them, with the same ids.
            Default: none, they end with the registry.
        startup_timeout: Seconds to wait for it.
        heap: Java heap, in Java's notation.
        cache_dir: As `LocalKafka`'s: where the registry's jars are kept (140 MB, fetched once).
        progress: As `LocalKafka`'s: called with a line of text about every second while they are fetched.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        compatibility: str | None = "BACKWARD",
        data_dir: str | os.PathLike[str] | None = None,
        startup_timeout: float = 120.0,
        heap: str = "256m",
        cache_dir: str | os.PathLike[str] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if port is not None and not 0 < port <= LAST_PORT:
            raise ValueError(f"port={port}: a port from 1 to {LAST_PORT} is needed.")
        if compatibility not in _COMPATIBILITIES:
            names = ", ".join(sorted(filter(None, _COMPATIBILITIES)))
            raise ValueError(f"compatibility={compatibility!r}: one of {names} or None is needed.")
        if startup_timeout <= 0:
            raise ValueError(f"startup_timeout={startup_timeout}: a number of seconds above 0 is needed.")
        if data_dir is not None and ";" in str(data_dir):
            raise ValueError(
                f"data_dir={str(data_dir)!r}: its database takes a semicolon as the end of a folder's name."
            )
        self._data_dir = None if data_dir is None else Path(data_dir).absolute()
        self._fixed_port = port
        self._port: int | None = None
        self._compatibility = compatibility
        self._startup_timeout = startup_timeout
        self._heap = heap
        self._cache_dir = Path(cache_dir or default_cache_dir()).absolute()
        self._progress = progress or to_stderr
        self._temporary: Path | None = None
        self._supervisor: Supervisor | None = None

    def __enter__(self) -> "LocalSchemaRegistry":  # noqa: PYI034 - typing has no Self in Python 3.10
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Its address, for `schema_registry_url`.

        Raises:
            LocalKafkaError: It was never started.
        """
        if self._port is None:
            raise LocalKafkaError("This LocalSchemaRegistry has no address before start().")
        return f"http://127.0.0.1:{self._port}/apis/ccompat/v7"

    def check_installed(self) -> None:
        """Check that the extras are there, before anything is fetched or started.

        Raises:
            LocalKafkaError: One is missing.
        """
        java_program()
        try:
            SchemaRegistry(SchemaRegistryConfig(url="mock://"))
        except KafkaConfigError as error:
            raise LocalKafkaError(str(error)) from error

    def start(self) -> None:
        """Start it and return when clients can use it; nothing is left behind if it fails.

        Raises:
            LocalKafkaError: Already started; an extra is missing; the jars could not be fetched; the port is in use; it
                ended or was not ready within `startup_timeout` (the message shows the end of its log).
        """
        if self._supervisor is not None:
            raise LocalKafkaError("This LocalSchemaRegistry is already started.")
        self.check_installed()
        java = java_program()
        classpath = fetch_jars(self._cache_dir, *_JARS, self._progress, _MEGABYTES)
        if self._fixed_port is not None and not is_free(self._fixed_port):
            raise LocalKafkaError(f"Port {self._fixed_port} on 127.0.0.1 is in use. Choose another one, or none.")
        self._port = self._fixed_port or next(free_ports())
        folder = self._temporary = Path(tempfile.mkdtemp(prefix="local-registry-"))
        try:
            with (folder / "lock").open("w") as lock:
                self._supervisor = Supervisor(folder, lock.fileno())
            STARTED.add(self)
            argv = [
                java,
                *JVM_OPTIONS,
                f"-Xmx{self._heap}",
                f"-Djava.io.tmpdir={folder}",
                "-Dquarkus.http.host=127.0.0.1",
            ]
            argv += [f"-Dquarkus.http.port={self._port}"]
            if self._data_dir is not None:
                self._data_dir.mkdir(parents=True, exist_ok=True)
                # Each change is written at once: the process is killed at its end.
                url = f"jdbc:h2:file:{self._data_dir / 'schemas'};WRITE_DELAY=0"
                argv += [f"-Dquarkus.datasource.jdbc.url={url}"]
            argv += ["-cp", classpath, _MAIN]
            log = folder / "registry.log"
            self._supervisor.start("registry", argv, folder, log, log)
            self._wait(log)
            if self._compatibility is not None:
                registry = SchemaRegistry(SchemaRegistryConfig(url=self.url))
                with registry.errors(f"compatibility={self._compatibility!r}"):
                    registry.client.set_compatibility(None, self._compatibility)
        except KafkaError as error:
            self.stop()
            raise LocalKafkaError(str(error)) from error
        except OSError as error:
            self.stop()
            raise LocalKafkaError(
                f"Could not use {self._data_dir or folder}: {error}. Name another folder (`data_dir`, or the "
                "environment variable TMPDIR), or see whether it is full."
            ) from error
        except BaseException:
            self.stop()
            raise

    def _wait(self, log: Path) -> None:
        supervisor, deadline = self._supervisor, time.monotonic() + self._startup_timeout
        # A proxy of the environment is for other hosts.
        direct, said = urllib.request.build_opener(urllib.request.ProxyHandler({})), "it was not asked"
        while supervisor is not None:
            self._check(supervisor, log)
            if time.monotonic() > deadline:
                raise self._problem(f"is not ready after {self._startup_timeout:g} s: {said}", log)
            try:
                direct.open(f"{self.url}/subjects", timeout=5).close()
            except OSError as error:
                said = str(error)
                time.sleep(0.05)
            else:
                return

    def check(self) -> None:
        """Check that it is still there.

        Raises:
            LocalKafkaError: It ended by itself; the message shows the end of its log.
        """
        if self._supervisor is not None and self._temporary is not None:
            self._check(self._supervisor, self._temporary / "registry.log")

    def _check(self, supervisor: Supervisor, log: Path) -> None:
        returncode = supervisor.wait("registry")
        if returncode is not None:
            raise self._problem(f"ended with exit code {returncode}", log)

    def _problem(self, what: str, log: Path) -> LocalKafkaError:
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return LocalKafkaError(f"The Schema Registry on port {self._port} {what}. Its log ends:\n{tail(text)}")

    def stop(self) -> None:
        """End its process and remove its folder. It may be called again; in a forked child it does nothing."""
        supervisor, self._supervisor = self._supervisor, None
        folder, self._temporary = self._temporary, None
        if supervisor is not None:
            supervisor.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _forked(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        self._temporary = None
        if supervisor is not None:
            supervisor.abandon()
