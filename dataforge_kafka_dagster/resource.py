"""`KafkaProducerResource`: the producer's life inside a run, and publications from the body of an asset or op."""

from __future__ import annotations

import base64
import contextlib
import copy
import datetime as dt
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

import dagster as dg
from pydantic import ConfigDict, Field, PrivateAttr, field_validator
from typing_extensions import Self

from dataforge_kafka_dagster.failures import log_prefix, raise_in_dagster
from dataforge_kafka_dagster.identity import Identity, is_again, op_context_of, session_identity, step_context_of
from dataforge_kafka_dagster.kafka.config import (
    KafkaOptions,
    KafkaProducerConfig,
    KafkaTopicSpec,
    PublicationConfig,
    SchemaRegistryOptions,
    TopicOptions,
    check_topic,
    registry_config,
)
from dataforge_kafka_dagster.kafka.connection import logger
from dataforge_kafka_dagster.kafka.errors import FencedError, KafkaConfigError, KafkaError, out_of_turn
from dataforge_kafka_dagster.kafka.ledger import Publication, make_transactional_id
from dataforge_kafka_dagster.kafka.producer import DataForgeKafkaProducer
from dataforge_kafka_dagster.kafka.publication import OtherWriterError, PublicationWriter, find_published
from dataforge_kafka_dagster.kafka.schemas import KafkaSchema
from dataforge_kafka_dagster.kafka.serialization import Headers
from dataforge_kafka_dagster.kafka.served_producer import DeliveryCallback, RecordMetadata

PUBLICATION_METADATA: Final = "kafka/publication"
"""Name of the metadata that holds a publication as JSON: `Publication.to_dict`, and its Dagster partitions."""

_PUBLICATION_OPTIONS: Final = (
    "delivery_guarantee",
    "transactional_id_prefix",
    "transaction_timeout",
    "create_topics",
    "on_bad_record",
)
# More Dagster partitions of one publication are compressed in its metadata.
_MOST_PLAIN: Final = 20
_CLOSE_SECONDS: Final = 10.0
# For a producer that delivers nothing more to tell it of each record.
_FAILED_CLOSE_SECONDS: Final = 1.0

_COLUMNS: Final = dg.TableSchema(
    columns=[
        dg.TableColumn("partition", "int", "Kafka partition"),
        dg.TableColumn("first offset", "int", "Offset of the first record"),
        dg.TableColumn("last offset", "int", "Offset of the last record"),
        dg.TableColumn("records", "int", "Records of this publication"),
        # Last, since it may be wide, and stands in kafka/topic too.
        dg.TableColumn("topic", "string", "Kafka topic"),
    ]
)


class _TopicSpec(dg.Config, TopicOptions):
    """`KafkaTopicSpec` as a part of Dagster's configuration, which resolves an EnvVar."""

    # Without the limits, which an EnvVar.int is not within; `KafkaTopicSpec` checks what it holds when the run starts.
    partitions: int = Field(default=1, description=TopicOptions.model_fields["partitions"].description)
    replication_factor: int | None = Field(
        default=None, description=TopicOptions.model_fields["replication_factor"].description
    )


class KafkaProducerResource(dg.ConfigurableResource, KafkaOptions, SchemaRegistryOptions):  # type: ignore[type-arg]
    """A Kafka cluster to publish to, for assets, ops and sensors.

    Nothing is connected before the first send. Each process has a producer of its own, closed at the end of the run.
    Give secrets as `dagster.EnvVar`: a plain string stands in Dagster's snapshots.

    Raises:
        pydantic.ValidationError: At definition, an option is unknown or not allowed. What environment variables hold is
            checked when the run starts.

    Example:
        >>> kafka = KafkaProducerResource(bootstrap_servers=dg.EnvVar("KAFKA_BOOTSTRAP_SERVERS"))
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    bootstrap_servers: str = Field(
        default="localhost:9092",
        description="Brokers to connect to first, as 'host:port': a list, or one string with commas.",
    )
    acks: str = Field(
        default="all",
        description=(
            "Replicas that must have a record before it counts as delivered: 'all', 1 or 0. 1 needs"
            " delivery_guarantee='at_least_once', and so does 0, which is for single records only."
        ),
    )
    delivery_guarantee: str = Field(
        default="exactly_once",
        description=(
            "Of publications. 'exactly_once': one transaction each. 'at_least_once': an idempotent producer without"
            " transactions, for clusters that have none or do not grant their ACLs."
        ),
    )
    transactional_id_prefix: str = Field(
        default="dagster",
        description=(
            "Begins every transactional id and ledger group; grant ACLs by it. Deployments that share a cluster need"
            " one each."
        ),
    )
    transaction_timeout: float = Field(
        default=600.0,
        description="Longest publication, seconds; at most the broker's transaction.max.timeout.ms (900 s by default).",
    )
    create_topics: _TopicSpec | None = Field(
        default=None,
        description=(
            "How publications create topics that are missing, a KafkaTopicSpec; None creates none. An asset's metadata"
            " kafka/create_topic wins. Brokers never create topics by themselves."
        ),
    )
    on_bad_record: str = Field(
        default="fail",
        description=(
            "What to do with a record that cannot be published: 'fail' ends the publication; else the dead-letter topic"
            " that takes it, in the same transaction ('{topic}' in its name stands for the publication's own)."
        ),
    )
    step_retries: int = Field(
        default=3,
        ge=0,
        description=(
            "Retries of a step whose publication failed for a cause that may pass. A RetryPolicy of the asset or op"
            " decides alone where there is one."
        ),
    )
    step_retry_delay: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="Wait before the first of them, seconds; doubled before each next one.",
    )

    _producer: DataForgeKafkaProducer | None = PrivateAttr(default=None)
    _lost: KafkaError | None = PrivateAttr(default=None)
    # When it was last tried in vain to connect: who has waited for that does not try again.
    _refused: tuple[float, KafkaError] | None = PrivateAttr(default=None)
    # By process: that of a forked one's parent may be held by a thread that is not there.
    _locks: dict[int, Any] = PrivateAttr(default_factory=dict)

    @field_validator("bootstrap_servers", mode="before")
    @classmethod
    def _join_servers(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value

    @field_validator("acks", mode="before")
    @classmethod
    def _acks_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("create_topics", mode="before")
    @classmethod
    def _topic_spec(cls, value: Any) -> Any:
        return value.model_dump() if isinstance(value, KafkaTopicSpec) else value

    def __init__(self, **options: Any) -> None:
        fields = type(self).model_fields
        defaults = {  # which may be a subclass's own
            name: fields[name].get_default(call_default_factory=True)
            for name in KafkaProducerResource.model_fields
            if not fields[name].is_required()
        }
        _check_at_definition(defaults | options, fields)
        super().__init__(**options)

    def __copy__(self) -> Self:
        """A copy, as model_copy makes it, too, may be told of another cluster: it has a producer of its own."""
        copied = super().__copy__()
        copied._producer, copied._lost, copied._refused, copied._locks = None, None, None, {}  # noqa: SLF001
        return copied

    def publication_config(self) -> PublicationConfig:
        """The checked options of this resource's publications; picklable.

        Raises:
            pydantic.ValidationError: An environment variable holds what is not allowed.
            KafkaConfigError: An option is an EnvVar that no run has looked up.
        """
        for name in type(self).model_fields:
            if is_env_var(value := getattr(self, name)):
                raise KafkaConfigError(
                    f"{name}=EnvVar({value.env_var_name!r})",
                    "no run has looked it up",
                    "Use the resource in a run, or what resource.process_config_and_initialize_cm() gives",
                )
        producer = KafkaProducerConfig(**{name: getattr(self, name) for name in KafkaProducerConfig.model_fields})
        options = {name: getattr(self, name) for name in _PUBLICATION_OPTIONS}
        if self.create_topics is not None:
            options["create_topics"] = self.create_topics.model_dump()
        registry = registry_config({name: getattr(self, name) for name in SchemaRegistryOptions.model_fields})
        return PublicationConfig(producer=producer, schema_registry=registry, **options)

    def producer_config(self) -> KafkaProducerConfig:
        """The checked options of this resource's producer.

        Raises:
            pydantic.ValidationError: An environment variable holds what is not allowed.
        """
        return self.publication_config().producer

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:  # noqa: ARG002
        """Close the producer; what is still undelivered after 10 seconds is given up and logged as an error."""
        with self._lock:
            producer, self._producer = self._producer, None
            lost, self._lost = self._lost, None
        try:
            if producer is not None:
                producer.close(_CLOSE_SECONDS)
        except KafkaError as error:
            lost = lost or error
        if lost is not None:
            # Dagster does not fail a run for it: call flush() in the step, or use publishing().
            logger.error("Records were lost at the end of the run: %s", lost)

    @property
    def producer(self) -> DataForgeKafkaProducer:
        """The connected producer of this process, made when first asked for, and anew if it was closed or has failed.

        Raises:
            NoBrokersAvailable: No broker answered within connect_timeout, or none let us in.
        """
        asked = time.monotonic()
        with self._lock:
            if self._producer is not None and self._producer.inherited:
                self._producer = None
            if self._producer is not None and self._producer.failed:
                try:
                    self._producer.close(_FAILED_CLOSE_SECONDS)
                except KafkaError as error:
                    self._lost = self._lost or error
                self._producer = None
            if self._producer is None:
                if self._refused is not None and self._refused[0] > asked:
                    raise copy.copy(self._refused[1])
                try:
                    made = DataForgeKafkaProducer(self.producer_config())
                except KafkaError as error:
                    # A copy has no traceback, which would keep what its frames hold.
                    self._refused = time.monotonic(), copy.copy(error)
                    raise
                if self._producer is None:
                    self._producer = made
                else:  # a signal handler has sent meanwhile
                    made.close()
            return self._producer

    @property
    def _lock(self) -> Any:
        """Lets in one thread, and signal handlers in the midst of it."""
        return self._locks.setdefault(os.getpid(), threading.RLock())

    def send_sync(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Headers | None = None,
        partition: int | None = None,
        timestamp: int | dt.datetime | None = None,
    ) -> RecordMetadata:
        """Send one record and wait until it is delivered; see `DataForgeKafkaProducer.send_sync`.

        Args:
            topic: The topic.
            value: Mapping, dataclass or pydantic model (sent as JSON), str (UTF-8), bytes, or None (a tombstone).
            key: str, bytes, int, date, time, UUID, or a mapping or list of those.
            headers: Mapping or (name, value) pairs of str to str, bytes or None.
            partition: Kafka partition, from 0; None lets the key decide.
            timestamp: Milliseconds since the epoch or an aware datetime; None is now.

        Returns:
            Where the record is.

        Raises:
            NoBrokersAvailable: It is the first, and no broker answered within connect_timeout.
            KafkaTimeoutError: Not delivered within delivery_timeout; it may have been written.
            KafkaError: It was not delivered.
        """
        return self.producer.send_sync(topic, value, key, headers, partition, timestamp)

    def send_async(
        self,
        topic: str,
        value: Any,
        key: Any = None,
        headers: Headers | None = None,
        partition: int | None = None,
        timestamp: int | dt.datetime | None = None,
        callback: DeliveryCallback | None = None,
    ) -> Future[RecordMetadata]:
        """Send one record without waiting; see `DataForgeKafkaProducer.send_async`.

        Call `flush` before the step ends: Dagster does not fail a run for what is lost after it.

        Args:
            topic: The topic.
            value: As for `send_sync`, and so are key, headers, partition and timestamp.
            key: See value.
            headers: See value.
            partition: See value.
            timestamp: See value.
            callback: Called with ``(err, msg)`` when the record is delivered or has failed.

        Returns:
            A future of the `RecordMetadata`, or of the `KafkaError`.

        Raises:
            NoBrokersAvailable: It is the first, and no broker answered within connect_timeout.
            KafkaTimeoutError: The buffer stayed full for delivery_timeout.
            KafkaError: The record was refused at once, for instance as too large.
        """
        return self.producer.send_async(topic, value, key, headers, partition, timestamp, callback)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything sent async, by any step of this process, is delivered.

        Whose record it is that failed is not known here: for your own, ask its future.

        Args:
            timeout: Longest wait, seconds; 5 more than delivery_timeout if None.

        Raises:
            KafkaError: A record without a callback was not delivered, also by a producer that an error has ended since.
        """
        producer = self._producer
        if producer is not None:
            producer.flush(timeout)
        # Not before: what that raised would hide it.
        with self._lock:
            lost, self._lost = self._lost, None
        if lost is not None:
            raise lost

    @contextlib.contextmanager
    def publishing(
        self,
        context: dg.AssetExecutionContext | dg.OpExecutionContext | dg.AssetCheckExecutionContext,
        *,
        topic: str,
        key: str | Sequence[str] | None = None,
        name: str | None = None,
        partition_key: str | None = None,
        create_topic: KafkaTopicSpec | None = None,
        on_bad_record: str | None = None,
        value_schema: KafkaSchema | Mapping[str, Any] | str | None = None,
        key_schema: KafkaSchema | Mapping[str, Any] | str | None = None,
    ) -> Iterator[PublishingSession]:
        """A publication from the body of an asset or op: all of its records or none, whatever happens to the step.

        It is committed at the end of the with block. A retry whose first attempt had committed publishes nothing and
        reports what that one did. Outside of a run, in an asset or op that a test calls, each session publishes.

        Several threads may send to it, if they are done when the with block ends: it waits for none of them.

        Args:
            context: The step's context.
            topic: Where records go that name no other.
            key: Field that is the key of records that have none; several make a JSON object.
            name: Tells sessions of one step apart; the topic if None, numbered if it comes again. Give names where
                a retry may have other sessions or another order of them, such as one for each selected asset.
            partition_key: Which Dagster partition it is of, in a run of several; all of the run's if None. Hand what it
                says on by ``context.add_asset_metadata(publication.materialize_result().metadata, partition_key=...)``.
            create_topic: How to create its topics if they are missing; the resource's create_topics if None.
            on_bad_record: 'fail' or a dead-letter topic; the resource's on_bad_record if None.
            value_schema: The schema of values, in the Schema Registry of this resource: whatever `KafkaSchema.parse`
                takes. None goes by their type: JSON, text or bytes.
            key_schema: The schema of keys, the same way; None writes them as text.

        Raises:
            dagster.RetryRequested: It failed for a cause that may pass.
            dagster.Failure: It failed for good, or the asset's own RetryPolicy is to decide.
            KafkaConfigError: The context is that of no step, but of a sensor, say.
        """
        if not isinstance(context, (dg.OpExecutionContext, dg.AssetExecutionContext, dg.AssetCheckExecutionContext)):
            raise KafkaConfigError(
                f"context of type {type(context).__qualname__}",
                "only the step of an asset, check or op can publish",
                "Give the step's context; in a sensor or schedule call send_sync, or request a run that publishes",
            )
        with self.errors_in_dagster(context, topic if isinstance(topic, str) else None):
            session_name = name or check_topic(topic)
            if not isinstance(session_name, str):
                raise KafkaConfigError(f"name={name!r}", "it is no str", "Give a name of your own, or None")
            identity = session_identity(context, session_name, partition_key)
            value, key_ = (None if one is None else KafkaSchema.parse(one) for one in (value_schema, key_schema))
            writer = self.writer(context, identity, topic, key, create_topic, on_bad_record, value, key_)
            writer.encoders()  # refuses a schema before anything is connected
            session = PublishingSession(writer, identity.partition)
            try:
                with session:
                    if session.replayed:
                        _refuse_that_of_other_assets(op_context_of(context), identity, named=name is not None)
                    yield session
            except FencedError as error:
                op_context = op_context_of(context)
                if name is None and op_context.has_assets_def and op_context.assets_def.can_subset:
                    error.add(
                        "so would a run of other assets of this multi-asset",
                        "If it was one, name each session after what it publishes, publishing(..., name=)",
                    )
                raise
            context.log.info(describe(session.result, identity.partition))

    def writer(
        self,
        context: Any,
        identity: Identity,
        topic: str,
        key: str | Sequence[str] | None = None,
        create_topic: KafkaTopicSpec | None = None,
        on_bad_record: str | None = None,
        value_schema: KafkaSchema | None = None,
        key_schema: KafkaSchema | None = None,
        *,
        reports: bool = True,
        repeats: OtherWriterError | None = None,
    ) -> PublicationWriter:
        """A writer of the publication with this identity, which logs its progress to the context's log."""
        config = self.publication_config()
        begin = log_prefix(identity.partition)

        def on_progress(records: int, size: int, seconds: float) -> None:
            rate = records / seconds if seconds else 0
            context.log.info(
                f"{begin}Published {records:,} records ({size / 1e6:,.1f} MB) to {topic!r} in {seconds:.0f} s,"
                f" {rate:,.0f} records/s; not committed yet"
            )

        return PublicationWriter(
            config,
            transactional_id=_transactional_id(config, identity),
            publication_id=identity.publication_id,
            topic=topic,
            key=key,
            value_schema=value_schema,
            key_schema=key_schema,
            create_topic=create_topic,
            on_bad_record=on_bad_record,
            on_progress=on_progress,
            reports=reports,
            repeats=repeats,
            of_retry=is_again(context, identity),
        )

    def published(self, identity: Identity, topic: str) -> Publication | None:
        """What an earlier attempt at this publication has published; None if nothing, or without exactly_once.

        That attempt is not fenced: it is to have ended.

        Raises:
            KafkaError: The brokers do not answer, or it was published anew since.
        """
        config = self.publication_config()
        if config.delivery_guarantee != "exactly_once":
            return None
        return find_published(config.producer, _transactional_id(config, identity), identity.publication_id, topic)

    @contextlib.contextmanager
    def errors_in_dagster(
        self, context: Any, topic: str | None = None, partitions: Sequence[str] = ()
    ) -> Iterator[None]:
        """Kafka's errors inside become Dagster's, which name the topic, and the Dagster partition if it is one.

        Raises:
            dagster.RetryRequested: The error may pass, and the step has no RetryPolicy of its own.
            dagster.Failure: Else; with ``allow_retries=False`` if trying again cannot help.
        """
        try:
            yield
        except KafkaError as error:
            step = step_context_of(context)
            raise_in_dagster(
                error,
                attempt=step.previous_attempt_count if step else 0,
                has_retry_policy=step is not None and step.op_retry_policy is not None,
                # Outside of a step nobody tries again.
                max_retries=self.step_retries if step else 0,
                retry_delay=self.step_retry_delay,
                topic=topic,
                brokers=self.producer_config().servers,
                partitions=partitions,
            )


class PublishingSession:
    """What `KafkaProducerResource.publishing` gives: add records, and afterwards ask where they are.

    Several threads may add records, if they are done when the with block ends.
    """

    def __init__(self, writer: PublicationWriter, partitions: Sequence[str] = ()) -> None:
        self._writer = writer
        self._partitions = partitions
        self._has_ended = False

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._writer.__exit__(*error)  # type: ignore[arg-type]
        finally:
            self._has_ended = True

    @property
    def send(self) -> Callable[..., None]:
        """Add one record: `PublicationWriter.send`."""
        return self._writer.send

    @property
    def send_all(self) -> Callable[..., None]:
        """Add the records of an iterable or data frame: `PublicationWriter.send_all`."""
        return self._writer.send_all

    @property
    def replayed(self) -> bool:
        """Whether an earlier attempt had published it all: what is sent now is ignored."""
        return self._writer.replayed

    @property
    def result(self) -> Publication:
        """What was published, and where.

        Raises:
            KafkaError: The with block has not ended, or has ended in an error.
        """
        if self._writer.publication is None:
            why, fix = "it is not committed yet", "Ask for its result after the with block"
            if self._has_ended:
                why, fix = (
                    "its with block has ended in an error",
                    "Let that error end the step: it says what was published",
                )
            raise out_of_turn("publication", why, fix)
        return self._writer.publication

    def materialize_result(
        self, asset_key: dg.AssetKey | str | None = None, **metadata: Any
    ) -> dg.MaterializeResult[Any]:
        """The asset's result, with the publication's metadata and any of your own.

        Args:
            asset_key: Which asset of a multi-asset; each tells the whole publication, also of several topics.
            metadata: More metadata, by name.
        """
        said = publication_metadata(self.result, self._partitions)
        return dg.MaterializeResult(asset_key=asset_key, metadata={**said, **metadata})


def publication_metadata(publication: Publication, partitions: Sequence[str] = ()) -> dict[str, Any]:
    """What a materialization says of a publication: where its records are, how many, how fast."""
    seconds = publication.seconds
    said: dict[str, Any] = {
        "dagster/row_count": publication.rows,
        "kafka/topic": ", ".join(publication.topics),
        "kafka/records": publication.records,
        "kafka/bytes": publication.bytes,
        "kafka/replayed": publication.replayed,
    }
    if publication.dead_letter_topic is not None:
        said["kafka/dead_letter_records"] = publication.dead_letters
        said["kafka/dead_letter_topic"] = publication.dead_letter_topic
    if publication.tombstones:
        said["kafka/tombstones"] = publication.tombstones
    if not publication.replayed:
        said["kafka/seconds"] = round(seconds, 3)
        said["kafka/records_per_second"] = round(publication.records / seconds, 1) if seconds else 0.0
    for schema in reversed(publication.schemas):
        # Of several topics, those of the publication's own stand, which come first.
        said |= {
            f"kafka/{schema.part}_format": schema.format,
            f"kafka/{schema.part}_subject": schema.subject,
            f"kafka/{schema.part}_schema_id": schema.id,
        }
        if schema.version is not None:
            said[f"kafka/{schema.part}_schema_version"] = schema.version
    said |= {f"kafka/{name}": number for name, number in publication.statistics.items()}
    if publication.offsets:
        records = [
            dg.TableRecord(
                {
                    "partition": offsets.partition,
                    "first offset": offsets.first,
                    "last offset": offsets.last,
                    "records": offsets.records,
                    "topic": offsets.topic,
                }
            )
            for offsets in publication.offsets
        ]
        said["kafka/offsets"] = dg.MetadataValue.table(records, _COLUMNS)
    said[PUBLICATION_METADATA] = dg.MetadataValue.json(publication.to_dict() | {"partitions": _pack(partitions)})
    return said


def _pack(partitions: Sequence[str]) -> list[str] | dict[str, Any]:
    """The Dagster partitions that a publication covers; compressed where they are many, since each of them says so."""
    if len(partitions) <= _MOST_PLAIN:
        return list(partitions)
    packed = zlib.compress(json.dumps(list(partitions)).encode(), 9)
    return {"count": len(partitions), "zlib": base64.b64encode(packed).decode()}


def unpack_partitions(packed: Sequence[str] | Mapping[str, Any]) -> Sequence[str]:
    """The Dagster partitions that a materialization says its publication covers."""
    if not isinstance(packed, Mapping):
        return packed
    unpacked: list[str] = json.loads(zlib.decompress(base64.b64decode(packed["zlib"])))
    return unpacked


def describe(publication: Publication, partitions: Sequence[str] = ()) -> str:
    """One line for the step's log."""
    begin = log_prefix(partitions)
    count = "1 record" if publication.records == 1 else f"{publication.records:,} records"
    places = f"{count} to {', '.join(map(repr, publication.topics))}"
    if publication.dead_letters:
        places += f" and {publication.dead_letters:,} bad ones to {publication.dead_letter_topic!r}"
    if publication.replayed:
        return f"{begin}An earlier attempt had published {places}; nothing was published again"
    return f"{begin}Published {places}, {publication.bytes:,} bytes, in {publication.seconds:.2f} s"


def _transactional_id(config: PublicationConfig, identity: Identity) -> str:
    return make_transactional_id(config.transactional_id_prefix, identity.name, identity.partition)


def _refuse_that_of_other_assets(op_context: dg.OpExecutionContext, identity: Identity, *, named: bool) -> None:
    """Refuse a publication that an attempt before this one told of an asset that this one does not make.

    A retry of a multi-asset may select some of its assets. If it has one session for each, and their names are those
    of their topic and numbers, this session need not be the one that had its name before. Whoever names it, knows.
    """
    selected = op_context.selected_asset_keys
    run: dg.DagsterRun | None = op_context.run
    while selected and run is not None:
        for entry in op_context.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION):
            told = entry.asset_materialization
            if told is None or told.asset_key in selected:
                continue
            said: Any = told.metadata.get(PUBLICATION_METADATA)
            if said is not None and said.value["publication_id"] == identity.publication_id:
                raise KafkaError(
                    f"publication {identity.publication_id!r}",
                    f"it was published for asset {told.asset_key.to_user_string()!r}, which is not selected now, and"
                    " whether it holds the records of the assets that are cannot be told",
                    "Launch a new run of them, and name each session after what it publishes, publishing(..., name=)",
                )
        if named or run.run_id == identity.origin or run.parent_run_id is None:
            return
        run = op_context.instance.get_run_by_id(run.parent_run_id)


def _check_at_definition(options: dict[str, Any], known: Container[str]) -> None:
    """Refuse what can be refused before the values of environment variables are known."""
    later = {name for name, value in options.items() if is_env_var(value)}
    given = {
        name: value
        for name, value in options.items()
        if name not in later and (name in KafkaProducerConfig.model_fields or name not in known)
    }
    if "librdkafka_config" in given:
        given["librdkafka_config"] = _known(given["librdkafka_config"])
    context = {"later": later}
    producer = KafkaProducerConfig.model_validate(given, context=context)
    rest = {name: options[name] for name in _PUBLICATION_OPTIONS if name in options and name not in later}
    spec = rest.get("create_topics")
    if isinstance(spec, _TopicSpec):
        spec = spec.model_dump()
    if isinstance(spec, dict):
        rest["create_topics"] = _known(spec) | {"configs": _known(spec.get("configs", {}))}
    PublicationConfig.model_validate({"producer": producer, **rest}, context=context)
    registry = {name: _stand_in(name) if name in later else value for name, value in options.items()}
    if "schema_registry_client_config" in registry:
        registry["schema_registry_client_config"] = _known(registry["schema_registry_client_config"])
    registry_config({name: value for name, value in registry.items() if value is not None})


def _stand_in(name: str) -> Any:
    """What an option of the registry may be, as long as its environment variable's value is not known."""
    if name.endswith("_timeout"):
        return None
    if name.endswith("_location"):
        return "."  # which exists
    return "https://later" if name == "schema_registry_url" else "later"


def _known(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {name: value for name, value in settings.items() if not is_env_var(value)}


def is_env_var(value: Any) -> bool:
    """Whether an option's value is known only when a run starts."""
    return isinstance(value, (dg.EnvVar, type(dg.EnvVar.int("_"))))
