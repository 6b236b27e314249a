"""Upserts: the keys that the last publication had and this one lacks get a tombstone, in the same transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from dataforge_kafka_dagster.kafka.config import KafkaProducerConfig
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.ledger import Publication
from dataforge_kafka_dagster.kafka.reader import read_publication
from dataforge_kafka_dagster.kafka.records import Chunk, Extra

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
        self._records = 0

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
            self._settled.update(_digest(key) for key in keys if key is not None)
            self._records += len(chunk.values)
            yield chunk

    @property
    def replaces(self) -> list[str]:
        """Ids of the publications that this one replaces."""
        return [publication.publication_id for publication in self._previous]

    def tombstones(self, topic_ids: Mapping[str, str], more: Sequence[Publication] = ()) -> Iterator[Chunk]:
        """The records that delete each other key, each in the Kafka partition where that key is.

        Records that compaction has removed are not missed: a later record has their key, or it is deleted already.

        Args:
            topic_ids: Kafka's own ids of the topics as they are now: one that was made anew holds nothing to delete.
            more: Publications that it replaces too.

        Raises:
            KafkaError: The last publications could not be read.
        """
        keys: list[bytes] = []
        extras: list[Extra] = []
        for publication in (*self._previous, *more):
            if publication.topic_ids.get(self._topic) != topic_ids.get(self._topic):
                continue
            for record in read_publication(self._config, publication, self._timeout, partial=True):
                if record.key is None or record.value is None or record.message.topic() != self._topic:
                    continue
                digest = _digest(record.key)
                if digest in self._settled:
                    continue
                self._settled.add(digest)
                keys.append(record.key)
                extras.append(Extra(None, record.message.partition() or 0, 0))
                if len(keys) == _TOMBSTONES:
                    yield _chunk(keys, extras)
                    keys, extras = [], []
        if keys:
            yield _chunk(keys, extras)


def _chunk(keys: Sequence[bytes], extras: Sequence[Extra]) -> Chunk:
    return Chunk([None] * len(keys), keys, extras, sum(map(len, keys)), None)


def _digest(key: bytes | str) -> bytes:
    return hashlib.blake2b(key.encode() if isinstance(key, str) else key, digest_size=16).digest()
