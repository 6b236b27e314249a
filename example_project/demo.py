"""`make demo` and `make ui`: the example project on a real Kafka that this script starts on 127.0.0.1.

With the environment variables KAFKA_BOOTSTRAP_SERVERS and SCHEMA_REGISTRY_URL set, the records and their schemas go to
that open cluster and that registry instead.
"""
# ruff: noqa: T201, INP001

import argparse
import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import dagster as dg
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from example_project.definitions import defs

from dataforge_kafka_dagster import Publication
from dataforge_kafka_dagster.local import LocalKafka, LocalKafkaError
from dataforge_kafka_dagster.local_registry import LocalSchemaRegistry

PROJECT = Path(__file__).parent
HOME = PROJECT.parent / ".dagster_home"
TOPICS = {"flights": 6, "carrier-delays": 3, "alerts": 1, "weather": 3, "planes": 1, "announcements": 1}
ASSETS = {"flights": "flights", "carrier_delays": "carrier-delays", "long_delays": "alerts", "weather": "weather"}
WEEK = [f"2013-01-{day:02}" for day in range(1, 8)]

Place = tuple[int, int]
"""A record's place in its topic: Kafka partition, offset."""


@contextlib.contextmanager
def cluster(servers: str, registry_url: str, folder: Path | None = None) -> Iterator[LocalKafka]:
    """A local Kafka and Schema Registry; the topics are made there, or on the cluster of `servers`."""
    print("Starting a Kafka and a Schema Registry on this machine", flush=True)
    with LocalKafka(data_dir=folder and folder / "kafka") as kafka, schema_registry(registry_url, folder):
        used = os.environ["KAFKA_BOOTSTRAP_SERVERS"] = servers or kafka.bootstrap_servers
        print(f"Kafka: {used}" + (" (the local one is for its tools)" if servers else ""))
        create_topics(used)
        yield kafka


@contextlib.contextmanager
def schema_registry(url: str, folder: Path | None) -> Iterator[None]:
    """SCHEMA_REGISTRY_URL names this registry, or a local one."""
    local = contextlib.nullcontext() if url else LocalSchemaRegistry(data_dir=folder and folder / "schemas")
    with local as registry:
        os.environ["SCHEMA_REGISTRY_URL"] = registry.url if registry else url
        print(f"Schema Registry: {os.environ['SCHEMA_REGISTRY_URL']}")
        yield


def create_topics(servers: str) -> None:
    """Create the topics that are not there yet."""
    admin = AdminClient({"bootstrap.servers": servers, "log_level": 0})
    topics = [NewTopic(topic, partitions) for topic, partitions in TOPICS.items()]
    for topic, future in admin.create_topics(topics, request_timeout=20).items():
        try:
            future.result()
        except KafkaException as error:
            if error.args[0].name() != "TOPIC_ALREADY_EXISTS":
                raise LocalKafkaError(
                    f"Could not create topic {topic!r} at {servers}: {error.args[0].str()}. Name an open cluster that"
                    " runs, without TLS and passwords, or none."
                ) from error


def demo(servers: str, registry_url: str) -> int:
    """Publish one week, and count its records with Kafka's own tools.

    Returns:
        The exit code: 0 if Kafka holds what Dagster reported, else 1.
    """
    with cluster(servers, registry_url) as kafka:
        started = time.monotonic()
        publications = publish_week()
        print(f"\nDagster published the week and ran the job 'announce' in {time.monotonic() - started:.0f} s.")
        print("\nNow Kafka's own console consumer reads the topics (isolation level read_committed):")
        with ThreadPoolExecutor(2) as pool:  # each reader is a Java program, that takes seconds to start
            found = pool.map(lambda topic: read_places(kafka, topic), ASSETS.values())
            matches = [
                compare(kafka, topic, publications[asset], read)
                for (asset, topic), read in zip(ASSETS.items(), found, strict=True)
            ]
        explain_end_offsets(kafka, publications["flights"])
        (schema,) = publications["carrier_delays"][-1].schemas
        print(
            f"\n'carrier-delays' is in Avro; the Schema Registry keeps the schema: subject {schema.subject!r}, version"
            f" {schema.version}, id {schema.id}."
        )
    return 0 if all(matches) else 1


def publish_week() -> dict[str, list[Publication]]:
    """Run the jobs, print the materializations, and return what they say, by asset."""
    definitions = defs()
    publish_day, announce = (definitions.resolve_job_def(name) for name in ("publish_day", "announce"))
    quiet = {"loggers": {"console": {"config": {"log_level": "WARNING"}}}}
    publications: dict[str, list[Publication]] = {asset: [] for asset in ASSETS}
    print(f"\n{'asset':<15}{'partition':<12}{'records':>8}{'seconds':>9}  Kafka partition: first offset..last offset")
    with dg.DagsterInstance.ephemeral() as instance:
        for day in WEEK:
            run = publish_day.execute_in_process(run_config=quiet, instance=instance, partition_key=day)
            for asset, found in publications.items():
                (event,) = run.asset_materializations_for_node(asset)
                publication = Publication.from_dict(event.metadata["kafka/publication"].value)  # type: ignore[arg-type]
                found.append(publication)
                offsets = "  ".join(f"{o.partition}: {o.first}..{o.last}" for o in publication.offsets)
                print(f"{asset:<15}{day:<12}{publication.records:>8}{publication.seconds:>9.2f}  {offsets or '-'}")
        announce.execute_in_process(run_config=quiet, instance=instance)
    return publications


def compare(kafka: LocalKafka, topic: str, publications: list[Publication], read: list[Place]) -> bool:
    """Whether each place that Dagster reported holds a record, and no other does on a Kafka of our own."""
    reported = {
        (o.partition, offset) for p in publications for o in p.offsets for a, b in o.runs for offset in range(a, b + 1)
    }
    records = sum(publication.records for publication in publications)
    found = len([place for place in read if place in reported])
    equal = records == found == len(reported) and len(set(read)) == len(read)
    print(f"  {topic:<15} {records} records reported by Dagster {'=' if equal else '!='} {found} read from Kafka")
    if len(read) > found:
        print(f"  {'':<15} and {len(read) - found} more that were not published now")
    return equal and (len(read) == found or os.environ["KAFKA_BOOTSTRAP_SERVERS"] != kafka.bootstrap_servers)


def read_places(kafka: LocalKafka, topic: str) -> list[Place]:
    """Where the console consumer finds a record, for each record it reads."""
    output = tool(
        kafka, "consumer.ConsoleConsumer", "--topic", topic, "--from-beginning", "--isolation-level", "read_committed",
        "--timeout-ms", "5000", "--property", "print.partition=true", "--property", "print.offset=true",
        "--property", "print.value=false",
    )  # fmt: skip
    return [(int(p), int(o)) for p, o in re.findall(r"^Partition:(\d+)\tOffset:(\d+)$", output, re.MULTILINE)]


def explain_end_offsets(kafka: LocalKafka, publications: list[Publication]) -> None:
    """Show the end offsets, which are higher than the number of records."""
    lines = tool(kafka, "GetOffsetShell", "--topic", "flights").split()
    print("\nThe end offsets of 'flights', from Kafka's GetOffsetShell (topic:Kafka partition:offset):")
    print(f"  {' '.join(lines)}")
    markers = sum(len(publication.offsets) for publication in publications)
    total = sum(int(line.split(":")[2]) for line in lines)
    print(
        f"  Their sum is {total}: {total - markers} records and {markers} commit markers. Each transaction ends with\n"
        "  one marker in each Kafka partition it wrote to; a marker takes an offset, and consumers never see it."
    )


def tool(kafka: LocalKafka, name: str, *arguments: str) -> str:
    """What one of Kafka's command line tools prints."""
    servers = os.environ["KAFKA_BOOTSTRAP_SERVERS"]
    done = kafka.run_tool(f"org.apache.kafka.tools.{name}", "--bootstrap-server", servers, *arguments)
    if done.returncode:
        raise LocalKafkaError(f"{name} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def is_used(folder: Path) -> bool:
    """Whether a LocalKafka holds the lock of this folder."""
    try:
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def ui(port: int, home: Path, servers: str, registry_url: str) -> int:
    """Run `dg dev` until Ctrl-C, on a Kafka whose data stays in the home folder with Dagster's.

    Returns:
        The exit code of `dg dev` if it ends by itself, else 0.
    """
    if is_used(home / "kafka"):
        print(f"'make ui' runs already on {home}: go on there, or end it with Ctrl-C first", file=sys.stderr)
        return 1
    home.mkdir(parents=True, exist_ok=True)
    settings = home / "dagster.yaml"
    if not settings.exists():
        settings.write_text("telemetry:\n  enabled: false\nnux:\n  enabled: false\n")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            print(f"Port {port} is in use. Choose another one: make ui PORT={port + 1}", file=sys.stderr)
            return 1
    with cluster(servers, registry_url, home):
        print(f"Dagster: http://127.0.0.1:{port} in half a minute (Ctrl-C ends both)", flush=True)
        dev = subprocess.Popen(  # noqa: S603
            [str(Path(sys.executable).with_name("dg")), "dev", "--host", "127.0.0.1", "--port", str(port)],
            cwd=PROJECT,
            env={**os.environ, "DAGSTER_HOME": str(home), "VIRTUAL_ENV": sys.prefix},
            start_new_session=True,
        )
        try:
            return dev.wait()
        except KeyboardInterrupt:
            dev.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                dev.wait(20)
            return 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(dev.pid, signal.SIGKILL)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["demo", "ui"], default="demo")
    parser.add_argument("--port", type=int, default=3000, help="of the Dagster UI")
    parser.add_argument("--home", type=Path, default=HOME, help="folder for the UI's and Kafka's data")
    options = parser.parse_args()
    where = (os.environ.get("KAFKA_BOOTSTRAP_SERVERS", ""), os.environ.get("SCHEMA_REGISTRY_URL", ""))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup lets it outlive its terminal
            signal.signal(number, _interrupt)
    try:
        if options.what == "ui":
            return ui(options.port, options.home.resolve(), *where)
        return demo(*where)
    except LocalKafkaError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
