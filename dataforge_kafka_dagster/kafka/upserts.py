"""Upserts: the keys that the last publication had and this one lacks get a tombstone, in the same transaction."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from dataforge_kafka_dagster.kafka.config import KafkaProducerConfig
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.ledger import Publication
from dataforge_kafka_dagster.kafka.reader import read_publication
from dataforge_kafka_dagster.kafka.records import Chunk, Extra
from dataforge_kafka_dagster.kafka.topics import are_different

_TOMBSTONES: Final = 1_000


class Upsert:
    """Remembers the keys that go by, and deletes the others of the last publications.

    Args:
        config: The cluster.
        previous: What this publication replaces.
        topic: Where it goes.
        timeout: Longest wait for the next records of the last publications, seconds.
    """

    def __init__(
        self, config: KafkaProducerConfig, previous: Sequence[Publication], topic: str, timeout: float = 30.0
    ) -> None:
        self._config = config
        self._previous = previous
        self._topic = topic
        self._timeout = timeout
        # A digest each, whatever a key's length: about 100 bytes of memory.
        self._settled: set[bytes] = set()
        # Those of them that this publication has deleted by itself.
        self._deleted: set[bytes] = set()
        self._records = 0
        self.superseded = 0
        """How many of the records that went by have a later one of the same key."""

    def remember(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Pass chunks on, and remember their keys.

        Raises:
            InvalidRecordError: A record has no key.
        """
        for chunk in chunks:
            keys = chunk.keys
            if keys is None or None in keys:
                index = self._records + (0 if keys is None else list(keys).index(None))
                raise InvalidRecordError(
                    f"record {index}",
                    "it has no key, so that nothing could ever replace it",
                    "Name the key's field, or set write_mode to 'append'",
                    index=index,
                )
            self._settle(keys, chunk)
            self._records += len(chunk.values)
            yield chunk

    def _settle(self, keys: Sequence[bytes | str | None], chunk: Chunk) -> None:
        places = itertools.repeat(None) if chunk.extras is None else (extra.partition for extra in chunk.extras)
        named = [(key, place) for key, place in zip(keys, places, strict=False) if key is not None]
        # In a Kafka partition of their own choice, records supersede none of the same key elsewhere.
        digests = [_digest(key, place) for key, place in named]
        if chunk.tombstones or self._deleted:
            self._settle_each(digests, chunk.values)
        else:
            known = len(self._settled)
            self._settled.update(digests)
            self.superseded += known + len(digests) - len(self._settled)
        self._settled.update(_digest(key) for key, place in named if place is not None)

    def _settle_each(self, digests: Sequence[bytes], values: Sequence[bytes | str | None]) -> None:
        for digest, value in zip(digests, values, strict=True):
            self.superseded += digest in self._settled and digest not in self._deleted
            self._settled.add(digest)
            if value is None:
                self._deleted.add(digest)
            else:
                self._deleted.discard(digest)

    @property
    def replaces(self) -> list[str]:
        """Ids of the publications that this one replaces."""
        return [publication.publication_id for publication in self._previous]

    def find(
        self,
        topic_ids: Mapping[str, str],
        partition_counts: Mapping[str, int],
        partitioner: str,
        more: Sequence[Publication] = (),
    ) -> tuple[list[Publication], list[Publication]]:
        """The last publications that are still in the topic.

        Args:
            topic_ids: Kafka's own ids of the topics as they are now: one that was made anew holds nothing to delete.
            partition_counts: How many Kafka partitions they have now.
            partitioner: How a key chooses one of them now.
            more: Publications that it replaces too.

        Returns:
            Those whose keys may go elsewhere by now, for `delete_all`, and those whose keys stay, for `delete_others`.
        """
        topic = self._topic
        moved: list[Publication] = []
        stayed: list[Publication] = []
        for previous in (*self._previous, *more):
            here = tuple(offsets for offsets in previous.offsets if offsets.topic == topic)
            publication = dataclasses.replace(previous, offsets=here)
            if here and not are_different(publication.topic_ids.get(topic), topic_ids.get(topic)):
                same = (previous.partition_counts.get(topic), previous.partitioner)
                (stayed if same == (partition_counts.get(topic), partitioner) else moved).append(publication)
        return moved, stayed

    def delete_all(self, publications: Sequence[Publication]) -> Iterator[Chunk]:
        """The records that delete every key of these publications.

        They come before this publication's own records, which win where a key stays in its Kafka partition: a record in
        another one would not replace it.

        Raises:
            KafkaError: They could not be read.
        """
        return _in_chunks(self._keys_of(publications))

    def delete_others(self, publications: Sequence[Publication]) -> Iterator[Chunk]:
        """The records that delete each other key of these, each in the Kafka partition where that key is.

        Records that compaction has removed are not missed: a later record has their key, or it is deleted already.

        Raises:
            KafkaError: They could not be read.
        """
        return _in_chunks(self._others(publications))

    def _others(self, publications: Sequence[Publication]) -> Iterator[tuple[bytes, int]]:
        for key, partition in self._keys_of(publications):
            digest = _digest(key)
            if digest not in self._settled:
                self._settled.add(digest)
                yield key, partition

    def _keys_of(self, publications: Sequence[Publication]) -> Iterator[tuple[bytes, int]]:
        """Each record's key and Kafka partition."""
        for publication in publications:
            for record in read_publication(self._config, publication, self._timeout, partial=True):
                if record.key is not None and record.value is not None:
                    yield record.key, record.message.partition() or 0


def _in_chunks(deleted: Iterator[tuple[bytes, int]]) -> Iterator[Chunk]:
    while some := list(itertools.islice(deleted, _TOMBSTONES)):
        keys = [key for key, _ in some]
        extras = [Extra(None, partition, 0) for _, partition in some]
        yield Chunk([None] * len(keys), keys, extras, sum(map(len, keys)), None, len(keys))


def _digest(key: bytes | str, partition: int | None = None) -> bytes:
    salt = b"" if partition is None else b"%d" % partition
    return hashlib.blake2b(key.encode() if isinstance(key, str) else key, digest_size=16, salt=salt).digest()
