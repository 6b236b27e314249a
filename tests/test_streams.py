import contextlib
import gzip
import json
import uuid
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import dagster as dg
import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet
import pytest
from conftest import mostly_slow

from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerConfig, KafkaProducerResource
from dataforge_kafka_dagster.kafka import frames
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaError
from dataforge_kafka_dagster.kafka.publication import publish
from dataforge_kafka_dagster.kafka.sources import chunks

ROWS = [{"n": i, "s": f"é{i}"} for i in range(25_000)]
TABLE = pa.Table.from_pylist(ROWS)

# Without a time, which would be in the names of tests.
ROWS_GZ = gzip.compress(b'{"n": 1}\n', mtime=0)


def _ndjson(path):
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    return path


def _zipped(path, write):
    plain = write(path.with_suffix(""))
    path.write_bytes(gzip.compress(plain.read_bytes(), 1))
    return path


def _csv(path):
    pyarrow.csv.write_csv(TABLE, path)
    return path


def _parquet(path):
    pyarrow.parquet.write_table(TABLE, path, row_group_size=7_000)
    return path


class Streaming:
    """What speaks Arrow's stream interface, and nothing else."""

    def __arrow_c_stream__(self, requested_schema=None):
        return TABLE.to_reader(max_chunksize=4_000).__arrow_c_stream__(requested_schema)


SOURCES = {
    "NDJSON": lambda folder: _ndjson(folder / "rows.ndjson"),
    "jsonl": lambda folder: _ndjson(folder / "rows.JSONL"),
    "zipped NDJSON": lambda folder: _zipped(folder / "rows.ndjson.gz", _ndjson),
    "CSV": lambda folder: _csv(folder / "rows.2026.csv"),
    "zipped CSV": lambda folder: _zipped(folder / "rows.csv.gz", _csv),
    "Parquet": lambda folder: _parquet(folder / "rows.parquet"),
    "LazyFrame": lambda _: pl.LazyFrame(ROWS).with_columns(pl.col("n") + 0),
    "scan": lambda folder: pl.scan_parquet(_parquet(folder / "rows.parquet")),
    "DuckDB": lambda _: duckdb.from_arrow(TABLE).order("n"),
    "reader": lambda _: TABLE.to_reader(max_chunksize=4_000),
    "Dataset": lambda folder: pyarrow.dataset.dataset(_parquet(folder / "rows.parquet")),
    "RecordBatch": lambda _: TABLE.combine_chunks().to_batches()[0],
    "stream": lambda _: Streaming(),
}


@pytest.mark.parametrize("make", mostly_slow(SOURCES.values()), ids=SOURCES)
def test_each_source_gives_its_rows_in_order(make, tmp_path):
    found = list(chunks(make(tmp_path), "s"))
    values = [value for chunk in found for value in chunk.values]
    assert [json.loads(value) for value in values] == ROWS
    keys = [key if isinstance(key, str) else key.decode() for chunk in found for key in chunk.keys]
    assert keys == [row["s"] for row in ROWS]
    assert len(found) >= 5


@pytest.mark.parametrize("make", mostly_slow(SOURCES.values()), ids=SOURCES)
def test_a_missing_key_is_refused_before_anything_is_connected(make, tmp_path):
    """By the call itself for frames, whose columns are known; by the first chunk for rows."""
    source = make(tmp_path)
    of_rows = isinstance(source, Path) and source.suffix.lower() in {".ndjson", ".jsonl"} | {".gz"}
    with pytest.raises(InvalidRecordError, match="missing"):
        list(chunks(source, "m")) if of_rows else chunks(source, "m")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.ndjson", b'{"n": 1}\n\n{"n": \n', "line 3: it is not JSON"),
        ("rows.ndjson", b"[1]\n", "line 1: it is a JSON list, not an object"),
        ("rows.ndjson", b'{"n": 1}\n{"n": [-9223372036854775809]}', "line 2: -9223372036854775809 has more than 64"),
        ("rows.ndjson", b'{"n":18446744073709551616}', "line 1: 18446744073709551616 has more than 64 bits. Write it"),
        ("rows.ndjson.gz", b'{"n": 1}\n', "rows.ndjson.gz', line 1: it cannot be read: Not a gzipped file"),
        ("rows.ndjson.gz", ROWS_GZ[:-8], "line 2: it cannot be read: .*ended before"),
        ("rows.ndjson.gz", ROWS_GZ[:10] + b"\xff" * 20, "line 1: it cannot be read"),
        ("rows.csv", b"a,b\n1,2\n1\n", "cannot be read as CSV: .*Expected 2 columns, got 1"),
        ("rows.csv", b'a,b\n1,"2\n' + b"3,4\n" * 1_000_000, "cannot be read as CSV: .* a quote that nothing closes"),
        ("rows.csv.gz", b"a,b\n1,2\n", "cannot be read as CSV"),
        ("rows.csv", b"id;name\n1;Smith\n", "rows.csv', line 1: .* 'id;name', as if ';' separated .* with commas"),
        ("rows.csv", "id,name\n1,Smith\n2,Müller\n".encode("latin-1"), "rows.csv', column 'name': it is not UTF-8"),
        ("rows.csv", "id,größe\n1,2\n".encode("latin-1"), "rows.csv', line 1: it is not UTF-8. Write it in UTF-8"),
        ("rows.parquet", b"nothing like it", "cannot be read as Parquet"),
        ("rows.txt", b"", "its name does not say what is in it. Give a path that ends with .ndjson"),
        ("rows.parquet.gz", b"", "its name does not say what is in it"),
        (".gz", b"", "its name does not say what is in it"),
        ("ndjson", b"", "its name does not say what is in it"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_the_place(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRecordError, match=reason):
        list(chunks(tmp_path / name))


def test_numbers_of_64_bits_and_text_of_digits_are_kept_as_they_are(tmp_path):
    path = tmp_path / "rows.ndjson"
    row = {"a": 2**64 - 1, "b": -(2**63), "c": "18446744073709551616", "d": 1e22}
    path.write_text(json.dumps(row))
    (chunk,) = chunks(path)
    assert [json.loads(value) for value in chunk.values] == [row]


def test_a_connection_is_free_again_whatever_became_of_its_query():
    """Though an error on its way, or somebody else, still holds what was read from it."""
    connection, held = duckdb.connect(), []

    def query():
        return connection.sql("select i from range(50000) r(i)")

    with pytest.raises(InvalidRecordError, match="column 'nope'") as caught:
        chunks(query(), "nope")
    held.append(caught)
    with contextlib.closing(chunks(query())) as unread:
        held.append(unread)
    with contextlib.closing(chunks(query())) as begun:
        held.append((begun, next(begun)))
    config = PublicationConfig(producer=KafkaProducerConfig(bootstrap_servers="127.0.0.1:1", connect_timeout=0.1))
    with pytest.raises(KafkaError) as failed:
        publish(config, query(), transactional_id="t", publication_id="t", topic="t")
    held.append(failed)
    assert sum(len(chunk.values) for chunk in chunks(query())) == 50_000


def test_lines_in_the_values_of_a_csv_are_no_rows(tmp_path):
    """In two megabytes, of which pyarrow reads one at a time."""
    path = tmp_path / "rows.csv"
    rows = [{"n": i, "s": f"a\n{i},b\n{i},c\n{i},d"} for i in range(80_000)]
    path.write_text("n,s\n" + "".join(f'{row["n"]},"{row["s"]}"\n' for row in rows))
    assert [json.loads(value) for chunk in chunks(path) for value in chunk.values] == rows


def test_a_zipped_csv_has_a_name_of_any_case(tmp_path):
    path = tmp_path / "ROWS.CSV.GZ"
    path.write_bytes(gzip.compress(b"n,s\n1,a\n"))
    assert [json.loads(value) for chunk in chunks(path) for value in chunk.values] == [{"n": 1, "s": "a"}]


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidRecordError, match="there is no such file"):
        chunks(tmp_path / "rows.ndjson")


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.csv.gz", "rows.parquet"])
def test_an_empty_file_is_no_records(name, tmp_path):
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(TABLE.slice(0, 0), path)
    else:
        path.write_bytes(gzip.compress(b"n,s\n") if name.endswith("gz") else b"")
    assert list(chunks(path)) == []


def test_a_query_that_fails_is_refused_before_anything_is_connected():
    with pytest.raises(duckdb.Error, match="division|Conversion"):
        chunks(duckdb.sql("select cast('x' || i as integer) n from range(10) t(i)"))
    with pytest.raises(pl.exceptions.PolarsError):
        chunks(pl.LazyFrame({"a": ["x"]}).select(pl.col("a").cast(pl.Int64)))


def test_whole_numbers_of_128_bits_from_duckdb_are_text_that_keeps_their_digits():
    low, high = 2**128 - 1, 2**127 - 1
    relation = duckdb.sql(f"""select '{low}'::UHUGEINT as "a ""b", 1 as "A ""B", null::UHUGEINT as n""")
    (chunk,) = chunks(relation, key='a "b')
    assert json.loads(chunk.values[0]) == {'a "b': str(low), 'A "B': 1, "n": None}
    assert list(chunk.keys) in ([str(low)], [str(low).encode()])
    if int(pl.__version__.partition(".")[0]) < 2:
        return  # whose own JSON rounds a decimal that has more digits than it is said to have
    (chunk,) = chunks(duckdb.sql(f"select '{high}'::HUGEINT as h"), key="h")
    assert json.loads(chunk.values[0]) == {"h": str(high)}
    assert list(chunk.keys) in ([str(high)], [str(high).encode()])


@pytest.mark.parametrize("version", ["1.36.1", "1.9.0", "0.20.31"])
def test_an_older_polars_that_hides_the_failure_of_a_query_is_refused(version, monkeypatch):
    monkeypatch.setattr(pl, "__version__", version)
    with pytest.raises(InvalidRecordError, match=f"polars {version} .* Use polars 1.37 or later"):
        chunks(pl.LazyFrame({"a": [1]}))


@pytest.mark.parametrize("frame", [pl.DataFrame({"a": [1]}), pl.LazyFrame({"a": [1]})], ids=["DataFrame", "LazyFrame"])
def test_a_polars_of_another_distribution_will_do(frame, monkeypatch):
    """Such as polars-lts-cpu."""

    def not_found(name):
        raise PackageNotFoundError(name)

    frames._json_is_exact.cache_clear()
    monkeypatch.setattr("importlib.metadata.version", not_found)
    assert [json.loads(value) for chunk in chunks(frame) for value in chunk.values] == [{"a": 1}]


@pytest.mark.parametrize("library", ["pyarrow"])
def test_what_is_missing_is_named(library, monkeypatch, tmp_path):
    import sys

    source = _parquet(tmp_path / "rows.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InvalidRecordError, match="pip install pyarrow"):
        chunks(source)


_MEASURE = """
import pathlib, resource
import duckdb, polars as pl, pyarrow as pa, pyarrow.dataset
from dataforge_kafka_dagster.kafka.streams import open_stream

folder, before, rows = pathlib.Path({folder!r}), 0, 0
for source in (
    folder / "rows.parquet",
    folder / "rows.csv",
    folder / "rows.ndjson",
    pl.scan_parquet(folder / "rows.parquet"),
    pa.dataset.dataset(folder / "rows.parquet"),
    duckdb.sql("select n, repeat('x', 500) || n as s from range(500_000) t(n)"),
):
    stream = open_stream(source)
    for part in stream.parts:
        rows += len(part) if stream.of_frames else 1
        before = before or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_nothing_is_held_whole(python, tmp_path):
    """The frames are of a quarter of a gigabyte each; what the readers hold of them stays below half of one."""
    table = pl.select(n=pl.int_range(500_000)).with_columns(s="x" * 500 + pl.col("n").cast(pl.String))
    table.write_parquet(tmp_path / "rows.parquet", row_group_size=20_000)
    table.head(100_000).write_csv(tmp_path / "rows.csv")
    table.head(100_000).write_ndjson(tmp_path / "rows.ndjson")
    rows, growth = map(int, python(_MEASURE.format(folder=str(tmp_path))).split())
    assert rows == 4 * 500_000 + 2 * 100_000
    assert growth < 128 * 1024  # KiB


@pytest.mark.kafka
@pytest.mark.parametrize("name", ["NDJSON", "Parquet", "LazyFrame", "DuckDB"])
def test_a_stream_is_published_by_the_io_manager(name, kafka_bootstrap_servers, kafka_topic, read, instance, tmp_path):
    topic = kafka_topic()

    @dg.asset(metadata={"kafka/topic": topic, "kafka/key": "n"})
    def rows():
        return SOURCES[name](tmp_path)

    kafka = KafkaProducerResource(
        bootstrap_servers=kafka_bootstrap_servers, transactional_id_prefix=f"test-{uuid.uuid4().hex[:8]}"
    )
    result = dg.materialize([rows], resources={"io_manager": KafkaIOManager(kafka=kafka)}, instance=instance)
    (event,) = result.get_asset_materialization_events()
    assert event.materialization.metadata["dagster/row_count"].value == len(ROWS)
    found = read(topic)
    assert [json.loads(record.value) for record in found] == ROWS
    assert [record.key for record in found] == [str(row["n"]).encode() for row in ROWS]
