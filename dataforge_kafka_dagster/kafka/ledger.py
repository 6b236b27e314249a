"""What a publication was, and its ledger: that, as the metadata of consumer-group offsets.

Its transaction commits the ledger with the records, so that one exists exactly if the others do.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import functools
import hashlib
import itertools
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import confluent_kafka
import orjson
from confluent_kafka import KafkaException, TopicPartition

from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.errors import KafkaError, SupersededError
from dataforge_kafka_dagster.kafka.schemas import RegisteredSchema, SchemaFormat
from dataforge_kafka_dagster.kafka.serialization import ValueFormat

_LEDGER_VERSION: Final = 3
# Brokers refuse more than offset.metadata.max.bytes, 4096 by default.
_LARGEST: Final = 4096
_LEDGER_BYTES: Final = 3500
_LEDGER_SCHEMA_BYTES: Final = 800
_LEDGER_HEADER_BYTES: Final = 1000
# Brokers write a group in one batch, which __consumer_offsets takes up to about 1 MB; and what each entry has there
# beside its runs and names.
_GROUP_BYTES: Final = 500_000
_ENTRY_BYTES: Final = 150
# So many publications before the last one are known by their keys.
_EARLIER: Final = 10
_ID_BYTES: Final = 180
_REQUEST_SECONDS: Final = 10.0
_WARM_SECONDS: Final = 1.0


@dataclasses.dataclass(frozen=True)
class PartitionOffsets:
    """The records of a publication in one Kafka partition.

    Attributes:
        topic: The topic.
        partition: Kafka partition, from 0.
        runs: (first offset, last offset) of each unbroken run, both inclusive, in order. Other writers' records, and
            the markers that end transactions, lie between runs.
    """

    topic: str
    partition: int
    runs: tuple[tuple[int, int], ...]

    @property
    def first(self) -> int:
        """Offset of the first record."""
        return self.runs[0][0]

    @property
    def last(self) -> int:
        """Offset of the last record."""
        return self.runs[-1][1]

    @property
    def records(self) -> int:
        """Number of records."""
        return sum(last - first + 1 for first, last in self.runs)


@dataclasses.dataclass(frozen=True)
class Publication:
    """What was published, and where it is.

    Attributes:
        publication_id: Names the work: the same for every attempt at it.
        transactional_id: Names the publisher: the same for every publication of one output and Dagster partition.
        topic: The topic, or the first of several.
        records: Number of records.
        bytes: Bytes of their values and keys, before compression.
        value_format: "json", "string" or "bytes"; with a schema "avro", "json_schema" or "protobuf"; None if there is
            no value.
        offsets: Where they are, by topic and Kafka partition.
        replayed: True if an earlier attempt had published it, so that this one published nothing.
        seconds: Time this attempt took, from connecting to commit.
        tombstones: How many of the records have no value.
        superseded: How many have one, and a later record of the same key behind them: compaction removes them, as it
            does tombstones. Counted for upserts only.
        statistics: What librdkafka measured, by name: `Statistics.summary`; empty if it took no second.
        topic_ids: Kafka's own id of each topic, which another one of the same name does not have.
        partition_counts: How many Kafka partitions each topic had.
        partitioner: How a key chose one of them, by librdkafka's name.
        dead_letters: Number of records that could not be published and went to the dead-letter topic instead; they are
            not among `records`, `bytes` and `offsets`.
        dead_letter_topic: That topic; None if bad records end a publication.
        schemas: The schemas of its values and keys, as the registry knows them.
    """

    publication_id: str
    transactional_id: str
    topic: str
    records: int
    bytes: int
    value_format: ValueFormat | None
    offsets: tuple[PartitionOffsets, ...]
    replayed: bool
    seconds: float
    topic_ids: Mapping[str, str] = dataclasses.field(default_factory=dict)
    partition_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dead_letters: int = 0
    dead_letter_topic: str | None = None
    tombstones: int = 0
    superseded: int = 0
    partitioner: str = ""
    schemas: tuple[RegisteredSchema, ...] = ()
    statistics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def key_format(self) -> SchemaFormat | None:
        """The format of its keys if they have a schema, else None: they are text."""
        return next((schema.format for schema in self.schemas if schema.part == "key"), None)

    @property
    def rows(self) -> int:
        """How many records are there once the topic is compacted."""
        return self.records - self.tombstones - self.superseded

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics that hold its records, and its own first."""
        return tuple(dict.fromkeys((self.topic, *(offsets.topic for offsets in self.offsets))))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values, offsets as "first offset, length, gap, length, ..." of runs; `from_dict` reads them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "offsets"}
        places: dict[str, dict[str, str]] = collections.defaultdict(dict)
        for offsets in self.offsets:
            places[offsets.topic][str(offsets.partition)] = " ".join(map(str, _pack(offsets.runs)))
        schemas = [dataclasses.asdict(schema) for schema in self.schemas]
        return fields | {"offsets": dict(places), "schemas": schemas}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Publication:
        """What `to_dict` wrote.

        Raises:
            KeyError: A value is missing.
        """
        names = (f.name for f in dataclasses.fields(cls) if f.name not in {"offsets", "schemas"})
        schemas = tuple(RegisteredSchema(**schema) for schema in values["schemas"])
        offsets = tuple(
            PartitionOffsets(topic, int(partition), _unpack([int(number) for number in packed.split()]))
            for topic, partitions in values["offsets"].items()
            for partition, packed in partitions.items()
        )
        return cls(**{name: values[name] for name in names}, offsets=offsets, schemas=schemas)


def make_transactional_id(prefix: str, name: Sequence[str], partition: Sequence[str] = ()) -> str:
    """A transactional id (and ledger group): readable in front, unique by a hash behind, at most 249 characters.

    Args:
        prefix: Of the deployment; grant ACLs by it.
        name: Of the publisher: asset key and output, or job and step.
        partition: The Dagster partition keys; any text.
    """
    exact = "\0".join([*(f"n{part}" for part in name), *(f"p{part}" for part in partition)])
    digest = hashlib.sha256(exact.encode()).digest()[:15]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", ".".join([*name, *partition]))[: _ID_BYTES - len(prefix)]
    return f"{prefix}.{readable}.{base64.b32encode(digest).decode().lower()}"


def _pack(runs: Iterable[tuple[int, int]]) -> list[int]:
    """Runs of offsets as [first offset, length, gap, length, gap, length, ...]."""
    packed: list[int] = []
    end = 0
    for first, last in runs:
        packed += (first - end, last - first + 1)
        end = last + 1
    return packed


def _unpack(packed: Sequence[int]) -> tuple[tuple[int, int], ...]:
    runs, end = [], 0
    for gap, length in zip(packed[::2], packed[1::2], strict=True):
        first = end + gap
        end = first + length
        runs.append((first, end - 1))
    return tuple(runs)


def group_id(transactional_id: str, number: int) -> str:
    """The consumer group that holds a part of a publisher's ledger; nearly always there is one part, number 0."""
    return f"{transactional_id}.{number}" if number else transactional_id


def ledger_key(publication_id: str) -> str:
    """What stands for a publication id in the ledger: short, whatever the id's length."""
    return base64.b32encode(hashlib.sha256(publication_id.encode()).digest()[:15]).decode().lower()


def encode_ledger(publication: Publication, earlier: Sequence[str] = ()) -> list[list[TopicPartition]]:
    """The ledger as offsets to commit, a list per consumer group; more than one only for hundreds of runs.

    Args:
        publication: The last publication.
        earlier: The keys of those before it.
    """
    # The same publication may be written again, when it is not among the earlier ones any more, and to other places.
    key = f"{ledger_key(publication.publication_id)}.{secrets.token_hex(3)}"
    head = (publication.topic, 0)
    ends = {head: 0} | {(offsets.topic, offsets.partition): offsets.last + 1 for offsets in publication.offsets}
    header: dict[str, Any] = {
        "v": _LEDGER_VERSION,
        "groups": 1,
        "topics": {
            topic: [
                1 + max((p for t, p in ends if t == topic), default=-1),
                publication.partition_counts.get(topic),
                publication.topic_ids.get(topic),
            ]
            for topic in dict.fromkeys([*(topic for topic, _ in ends), *publication.partition_counts])
        },
        "topic": publication.topic,
        "records": publication.records,
        "bytes": publication.bytes,
        "format": publication.value_format,
        "dead": [publication.dead_letters, publication.dead_letter_topic],
        "tombstones": publication.tombstones,
        "superseded": publication.superseded,
        "partitioner": publication.partitioner,
        "earlier": list(earlier),
    }
    is_long = len(orjson.dumps(header)) > _LEDGER_HEADER_BYTES
    # The first are those of its own topic. What a replay then does not tell of others, the ids in the records do.
    header["schemas"] = schemas = [dataclasses.astuple(schema) for schema in publication.schemas]
    while len(orjson.dumps(schemas)) > _LEDGER_SCHEMA_BYTES or (schemas and len(orjson.dumps(header)) > _LEDGER_BYTES):
        schemas.pop()
    groups: list[dict[tuple[str, int], dict[str, Any]]] = [{head: {"p": key, "h": header}}]
    sizes = [_LEDGER_BYTES]
    for offsets in publication.offsets:
        place = (offsets.topic, offsets.partition)
        number = 0 if place == head and is_long else -1
        for some in _split(offsets.runs):
            packed = _pack(some)
            size = len(orjson.dumps(packed)) + len(offsets.topic) + len(publication.transactional_id) + _ENTRY_BYTES
            number += 1
            while number < len(groups) and sizes[number] + size > _GROUP_BYTES:
                number += 1
            if number == len(groups):
                groups.append({})
                sizes.append(0)
            groups[number].setdefault(place, {"p": key})["r"] = packed
            sizes[number] += size
    header["groups"] = len(groups)
    return [
        [
            TopicPartition(topic, partition, ends[topic, partition], orjson.dumps(entry).decode())
            for (topic, partition), entry in group.items()
        ]
        for group in groups
    ]


def _split(runs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Runs, cut where their packed text would outgrow one entry."""
    pieces: list[list[tuple[int, int]]] = [[]]
    size = 0
    end = 0
    for first, last in runs:
        size += len(f"{first - end},{last - first + 1},")
        if size > _LEDGER_BYTES - _LEDGER_HEADER_BYTES - _LEDGER_SCHEMA_BYTES:
            pieces.append([])
            size = 2 * len(f"{last},")
        pieces[-1].append((first, last))
        end = last + 1
    return pieces


def find_headers(entries: Iterable[TopicPartition]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What stands for each publication in the ledger, and what the ledger says of it as a whole.

    The first is its key, a dot, and what tells this time that it was written from others.
    """
    for _, content in _ledger_entries(entries):
        if "p" in content and content.get("h", {}).get("v") == _LEDGER_VERSION:
            yield content["p"], content["h"]


def _key_of(written: str) -> str:
    return written.partition(".")[0]


def _is_of(key: str, written: str, header: Mapping[str, Any]) -> bool:
    """Whether a header is of this publication, or of one that came after it."""
    return _key_of(written) == key or key in header["earlier"]


def _ledger_entries(entries: Iterable[TopicPartition]) -> Iterator[tuple[TopicPartition, dict[str, Any]]]:
    for entry in entries:
        try:
            content = orjson.loads(entry.metadata or "null")
        except ValueError:
            continue
        if isinstance(content, dict):
            yield entry, content


def decode_ledger(
    key: str, header: Mapping[str, Any], entries: Iterable[TopicPartition], transactional_id: str, publication_id: str
) -> Publication:
    """The publication that `encode_ledger` wrote.

    Args:
        key: Stands for its id, from `find_headers`.
        header: What is said of it as a whole, from `find_headers`.
        entries: All entries of its groups.
        transactional_id: Its publisher.
        publication_id: Its id.
    """
    runs: dict[tuple[str, int], list[tuple[int, int]]] = collections.defaultdict(list)
    for entry, content in _ledger_entries(entries):
        if content.get("p") == key and "r" in content:
            runs[entry.topic, entry.partition] += _unpack(content["r"])
    return Publication(
        publication_id,
        transactional_id,
        header["topic"],
        header["records"],
        header["bytes"],
        header["format"],
        tuple(PartitionOffsets(topic, partition, tuple(found)) for (topic, partition), found in sorted(runs.items())),
        replayed=True,
        seconds=0.0,
        dead_letters=header["dead"][0],
        dead_letter_topic=header["dead"][1],
        tombstones=header["tombstones"],
        superseded=header["superseded"],
        partitioner=header["partitioner"],
        partition_counts={topic: count for topic, (_, count, _) in header["topics"].items() if count is not None},
        topic_ids={topic: one for topic, (_, _, one) in header["topics"].items() if one is not None},
        schemas=tuple(RegisteredSchema(*schema) for schema in header.get("schemas", ())),
    )


class Ledger:
    """A publisher's ledger in its cluster: what its last publication was, whoever made it.

    Used by one thread, beside which `warm_up` has its own. It is read by consumers: the admin client's request for
    group offsets crashes the process now and then (confluent-kafka 2.16).

    Args:
        connection: Makes its clients.
        transactional_id: The publisher.
        topic: The publication's own topic, whose first Kafka partition has the header.
        timeout: Longest wait for the brokers, seconds.
    """

    def __init__(self, connection: Connection, transactional_id: str, topic: str, timeout: float) -> None:
        self._connection = connection
        self._transactional_id = transactional_id
        self._topic = topic
        self._timeout = timeout
        self._groups: dict[int, confluent_kafka.Consumer] = {}
        self._making = threading.Lock()
        self._over = False
        self._last: tuple[str, dict[str, Any]] | None = None

    def warm_up(self) -> None:
        """Find the group's coordinator while others connect; what it answers does not count yet."""
        anchor = [TopicPartition(self._topic, 0)]
        self._connection.aside(lambda: self._group(0).committed(anchor, _WARM_SECONDS))

    def read(self, publication_id: str, *, of_retry: bool = False) -> Publication | None:
        """What the last publication was, if it is this one. Only after its attempt is fenced does it stay so.

        Args:
            publication_id: Its id.
            of_retry: Whether an attempt before this one may have had another topic: all topics are asked then.

        Raises:
            KafkaError: The brokers do not answer, refuse the group, or somebody has changed its offsets; or this one
                was published, and others since, which took its place in the ledger.
        """
        key = ledger_key(publication_id)
        self._last = next(find_headers(self._committed(0, {self._topic: 1})), None)
        headers = [self._last] if self._last else []
        if of_retry and not any(_is_of(key, *header) for header in headers) and (others := self._other_topics()):
            headers += find_headers(self._committed(0, dict.fromkeys(others, 1)))
        found = next((header for header in headers if _is_of(key, *header)), None)
        if found is None:
            return None
        if _key_of(found[0]) != key:
            raise SupersededError(
                f"publication {publication_id!r}",
                "an earlier attempt had published it, and it has been published anew since, by another run",
                "Nothing is to be done for it: its records are in Kafka once, and where the last ones are, that run"
                " says. To publish them again, or what else is missing of this run, start a new one",
            )
        done = self._decoded(*found, publication_id)
        count = sum(offsets.records for offsets in done.offsets)
        if count != done.records:
            raise KafkaError(
                f"ledger group {self._transactional_id!r}",
                f"it names {done.records} records, but the offsets of {count}",
                "Somebody changed the group's offsets: start a new run, which publishes again",
            )
        return done

    def _other_topics(self) -> list[str]:
        """The topics that may be seen, but for its own and Kafka's."""
        list_topics = functools.partial(self._group(0).list_topics, timeout=_REQUEST_SECONDS)
        name = f"ledger group {self._transactional_id!r}"
        seen = self._connection.in_thread(list_topics, self._timeout, name).topics
        return [topic for topic in seen if topic != self._topic and not topic.startswith("__")]

    @property
    def last(self) -> str:
        """What tells the last publication that `read` has found in its topic from others; empty if there is none."""
        return self._last[0] if self._last else ""

    def other_than(self, known: Iterable[str]) -> Publication | None:
        """What `read` has found, if it is none of these publications; its id is not known.

        Args:
            known: Publication ids.

        Raises:
            KafkaError: The brokers do not answer.
        """
        if self._last is None or _key_of(self._last[0]) in set(map(ledger_key, known)):
            return None
        return self._decoded(*self._last, "")

    def write(self, producer: confluent_kafka.Producer, publication: Publication, name: str) -> None:
        """Add a publication to the producer's transaction.

        Args:
            producer: Its producer, in the transaction that its records are in.
            publication: The publication.
            name: What an error calls it.

        Raises:
            KafkaError: The brokers do not answer, or refuse the group.
        """
        before = [] if self._last is None else [_key_of(self._last[0]), *self._last[1]["earlier"]]
        for number, entries in enumerate(encode_ledger(publication, before[:_EARLIER])):
            if max(len(str(entry.metadata)) for entry in entries) > _LARGEST:
                raise KafkaError(
                    name,
                    f"the ledger has no room for the names of {len(publication.partition_counts)} topics",
                    "Publish to fewer topics at once, in several sessions",
                )
            metadata = self._group(number).consumer_group_metadata()
            send = functools.partial(producer.send_offsets_to_transaction, entries, metadata, self._timeout)
            # It ignores its time-out while a broker does not answer.
            self._connection.in_thread(send, self._timeout, name)

    def let_go(self) -> list[confluent_kafka.Consumer]:
        """Its clients, which it does not use any more; it makes no others."""
        self._over = True
        clients = list(self._groups.values())
        self._groups.clear()
        return clients

    def _decoded(self, key: str, header: Mapping[str, Any], publication_id: str) -> Publication:
        places = {topic: places for topic, (places, _, _) in header["topics"].items()}
        entries = [entry for number in range(header["groups"]) for entry in self._committed(number, places)]
        return decode_ledger(key, header, entries, self._transactional_id, publication_id)

    def _committed(self, number: int, places: Mapping[str, int]) -> list[TopicPartition]:
        """The entries of a group in the first so many Kafka partitions of each topic."""
        consumer = self._group(number)
        asked = [TopicPartition(topic, partition) for topic, count in places.items() for partition in range(count)]
        waits = itertools.chain((1.0, 2.0, 4.0), itertools.repeat(_REQUEST_SECONDS))

        def read() -> list[TopicPartition]:
            try:
                found: list[TopicPartition] = consumer.committed(asked, next(waits))
            except KafkaException:
                # Only a poll tells that the group is refused, and it has to wait for the call above.
                message = consumer.poll(0)
                refused = None if message is None else message.error()
                if refused is not None:
                    raise KafkaException(refused) from None
                raise
            error = next((entry.error for entry in found if entry.error is not None), None)
            if error is not None:  # what is not told is not nothing
                raise KafkaException(error)
            return found

        name = f"ledger group {group_id(self._transactional_id, number)!r}"
        return self._connection.in_thread(read, self._timeout, name)

    def _group(self, number: int) -> confluent_kafka.Consumer:
        """The consumer that stands for one of its groups, made when first asked for."""
        with self._making:
            if number not in self._groups:
                options = {"group.id": group_id(self._transactional_id, number), "enable.auto.commit": False}
                consumer = self._groups[number] = self._connection.consumer(options)
                # Before an interrupt, `warm_up` may have begun to make it: nobody would let go of it any more.
                if self._over:
                    self._groups.clear()
                return consumer
            return self._groups[number]
