"""`KafkaIOManager`: one output, one publication; and a publication back as an input."""

import contextlib
import difflib
import functools
import typing
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import dagster as dg
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator, model_validator

from dataforge_kafka_dagster.failures import log_prefix
from dataforge_kafka_dagster.history import (
    HandledOutputs,
    Published,
    last_published,
    name_of,
    published,
    refuse_partition_for_whole,
)
from dataforge_kafka_dagster.identity import Identity, has_sessions, is_again, output_identity, step_context_of
from dataforge_kafka_dagster.inputs import form_of_each, in_form
from dataforge_kafka_dagster.kafka.cloudevents import CloudEventHeaders
from dataforge_kafka_dagster.kafka.config import KafkaTopicSpec, check_on_bad_record, check_topic, refuse_unknown
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaConfigError, KafkaError, SupersededError
from dataforge_kafka_dagster.kafka.ledger import Publication
from dataforge_kafka_dagster.kafka.publication import OtherWriterError, PublicationWriter, settle
from dataforge_kafka_dagster.kafka.reader import ReadRecord, read_publication, refuse_lost_topics
from dataforge_kafka_dagster.kafka.records import Chunk, key_fields
from dataforge_kafka_dagster.kafka.registry import SchemaRegistry, SchemaRegistryConfig
from dataforge_kafka_dagster.kafka.schemas import SCHEMA_FORMATS, KafkaSchema, SchemaDecoder, SchemaFormat
from dataforge_kafka_dagster.kafka.serialization import ValueFormat
from dataforge_kafka_dagster.kafka.served_producer import RecordMetadata
from dataforge_kafka_dagster.kafka.sources import chunks, is_repeatable
from dataforge_kafka_dagster.kafka.upserts import Upsert
from dataforge_kafka_dagster.resource import (
    PUBLICATION_METADATA,
    KafkaProducerResource,
    PublishingSession,
    describe,
    is_env_var,
    publication_metadata,
)

WRITE_MODES: Final = ("append", "upsert")

_PREFIX: Final = "kafka/"
# Of the metadata that are read.
_NAMES: Final = (
    "kafka/topic",
    "kafka/key",
    "kafka/create_topic",
    "kafka/on_bad_record",
    "kafka/value_schema",
    "kafka/key_schema",
    "kafka/write_mode",
    "kafka/cloudevents",
)
# What a materialization says, and the entry that is meant by who writes it into a definition.
_SAID: Final[dict[str, str | None]] = {
    **dict.fromkeys(("records", "bytes", "seconds", "records_per_second", "replayed", "offsets", "publication")),
    **dict.fromkeys(("latency_p50_ms", "latency_p99_ms", "request_retries", "most_queued_records", "throttled_ms")),
    **dict.fromkeys(("tombstones", "mapping_key", "run")),
    **dict.fromkeys(("dead_letter_topic", "dead_letter_records"), "on_bad_record"),
    **dict.fromkeys(("value_format", "value_subject", "value_schema_id", "value_schema_version"), "value_schema"),
    **dict.fromkeys(("key_format", "key_subject", "key_schema_id", "key_schema_version"), "key_schema"),
}


class KafkaIOManager(dg.ConfigurableIOManager):
    """Publishes each output to a Kafka topic in one transaction, and reads publications back.

    Its cluster is ``kafka``, a `KafkaProducerResource`. An output may be a mapping, dataclass, pydantic model, str,
    bytes or `KafkaRecord`; a list, iterator or generator of those (streamed); a pandas, polars or pyarrow data frame,
    one record per row; or, read bit by bit, a polars LazyFrame, a DuckDB relation, an Arrow stream or Dataset, or a
    `pathlib.Path` to NDJSON, CSV or Parquet. ``None`` publishes nothing.

    Topic and key come from, in this order: output metadata, the asset's definition metadata (``kafka/topic``,
    ``kafka/key``), this IO manager's config; the topic in the end from the asset key, its parts joined by dots.
    The metadata ``kafka/create_topic``, a mapping of `KafkaTopicSpec`'s fields, creates the topic if it is missing, and
    ``kafka/on_bad_record`` names a dead-letter topic.
    ``kafka/cloudevents``, a mapping of CloudEvents attributes, adds their headers to each record.
    ``kafka/write_mode``, "append" or "upsert", wins over this IO manager's ``write_mode``.
    The metadata ``kafka/value_schema`` and ``kafka/key_schema``, or the config, give values and keys a schema of the
    Schema Registry: whatever `KafkaSchema.parse` takes. Reading back decodes them.

    Raises:
        pydantic.ValidationError: At definition, an option is unknown or not allowed. What environment variables hold is
            checked when the run starts.
        KafkaConfigError: At definition, ``kafka`` is missing or something else, or ``write_mode`` does not go with its
            ``delivery_guarantee``.

    Example:
        >>> defs = dg.Definitions(assets=[flights], resources={"io_manager": KafkaIOManager(kafka=kafka)})
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    kafka: dg.ResourceDependency[KafkaProducerResource]
    topic: str | None = Field(
        default=None,
        description=(
            "Topic of outputs whose metadata has no kafka/topic; '{asset_key}' (parts joined by dots), '{name}' (its"
            " last part, or the output's name) and '{job}' are filled in."
        ),
    )
    key: str | None = Field(
        default=None,
        description="Field that is the record's key, for outputs whose metadata has no kafka/key; several with commas.",
    )
    write_mode: str = Field(
        default="append",
        description=(
            "For outputs whose metadata has no kafka/write_mode. 'append' adds records. 'upsert', for compacted topics,"
            " also deletes the keys that the asset's last publication had and this one lacks, by tombstones."
        ),
    )
    value_schema: str | None = Field(
        default=None,
        description=(
            "Schema of values whose metadata has no kafka/value_schema: 'avro', 'json_schema' or 'protobuf' (derived"
            " from the output), 'latest' (the registry's, Avro), or a file that ends in .avsc, .json or .proto."
        ),
    )
    key_schema: str | None = Field(
        default=None, description="Schema of keys whose metadata has no kafka/key_schema; as value_schema."
    )
    read_timeout: float = Field(
        default=30.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest wait for the next records when reading back, seconds.",
    )

    _outputs: HandledOutputs = PrivateAttr(default_factory=HandledOutputs)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        refuse_other_cluster("kafka of the KafkaIOManager", self.kafka)
        guarantee = getattr(options.get("kafka"), "delivery_guarantee", None)
        if self.write_mode == "upsert" and guarantee is not None and not is_env_var(guarantee):
            _refuse_upsert(guarantee)

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, options: Any) -> Any:
        for name in options:
            if name in KafkaProducerResource.model_fields and name not in cls.model_fields:
                raise ValueError(f"unknown option {name!r}: give kafka=KafkaProducerResource({name}=...)")
        return refuse_unknown(options, cls)

    @field_validator("topic", "key", "write_mode", "value_schema", "key_schema", mode="before")
    @classmethod
    def _is_allowed(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str) or is_env_var(value):
            return value
        if info.field_name == "topic":
            topic_of(["of_an_asset"], None, value, "of_a_job")
        elif info.field_name == "key":
            _names_in(value)
        elif info.field_name == "write_mode":
            check_write_mode(value)
        else:
            KafkaSchema.parse(value)
        return value

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Publish an output in one transaction; Dagster emits its materialization after the commit.

        A mapping whose keys are exactly the run's Dagster partitions makes one publication of each of its values; any
        other output of a run over a range of Dagster partitions is one publication for the whole range.

        Raises:
            dagster.RetryRequested: It failed for a cause that may pass.
            dagster.Failure: It failed for good, or the asset's own RetryPolicy is to decide.
        """
        mapped = {"kafka/mapping_key": context.mapping_key} if context.mapping_key else {}
        with self.kafka.errors_in_dagster(context):
            _check_names(context)
            if obj is None and _is_handed_on(context):
                _warn_of_unreadable(context)
                if not context.has_asset_key:
                    handed = {n: v for n, v in (context.output_metadata or {}).items() if n.startswith(_PREFIX)}
                    context.add_output_metadata(handed | mapped)
                return
            target = _Target(
                self._topic_of(context),
                self._key_of(context),
                _spec_of(context),
                _on_bad_record_of(context),
                _schema_of(context, "kafka/value_schema", self.value_schema),
                _schema_of(context, "kafka/key_schema", self.key_schema),
            )
        with self.kafka.errors_in_dagster(context, target.topic):
            identity = output_identity(context)
            # An op's output is handed on as it is, also inside the graph of an asset.
            outputs = _by_partition(context, obj, identity.partition) if context.has_asset_key else {}
        if len(outputs) > 1:
            for partition, output in outputs.items():
                with self.kafka.errors_in_dagster(context, target.topic, (partition,)):
                    self._refuse_at_once(context, output, target, identity)
            done: dict[str, dict[str, Any]] = {}
            try:
                self._publish_each(context, outputs, target, identity, done)
            except BaseException:
                try:
                    _tell_at_once(context, done)
                except Exception as error:  # noqa: BLE001  (it must not stand in the place of what the step fails by)
                    context.log.warning(f"Dagster could not be told of the {len(done)} that are published: {error}")
                raise
            for partition, said in done.items():
                context.step_context.add_asset_metadata(said, context.asset_key, partition)
            return
        (output,) = outputs.values() or (obj,)
        said = self._publish(context, output, target, identity) | mapped
        context.add_output_metadata(said)
        # What the asset has added by the same names would be shown instead.
        for of_partition, added in _added_metadata(context, identity.partition).items():
            same = {name: value for name, value in said.items() if name in added}
            if same:
                context.step_context.add_asset_metadata(same, context.asset_key, of_partition)

    def _publish_each(
        self,
        context: dg.OutputContext,
        outputs: Mapping[str, Any],
        target: "_Target",
        identity: Identity,
        done: dict[str, dict[str, Any]],
    ) -> None:
        """Publish the outputs of Dagster partitions, and note in `done` what their materializations say."""
        superseded: dg.Failure | None = None
        for partition, output in outputs.items():
            try:
                done[partition] = self._publish(context, output, target, identity.of_partition(partition))
            except dg.Failure as failure:
                # The others are still to be published.
                if not isinstance(failure.__cause__, SupersededError):
                    raise
                superseded = superseded or failure
        if superseded is not None:
            raise superseded

    def _refuse_at_once(self, context: dg.OutputContext, output: Any, target: "_Target", identity: Identity) -> None:
        """Refuse what is no output, as far as a look tells that takes nothing of it."""
        _refuse_own(output)
        if output is None:
            if not is_again(context, identity):
                self._refuse_none(context)
        elif is_repeatable(output) or (type(output).__module__ == "builtins" and not isinstance(output, Iterator)):
            chunks(output, target.key).close()

    def _refuse_none(self, context: dg.OutputContext) -> None:
        if self._write_mode_of(context) == "upsert" and not _has_own_sessions(context):
            raise InvalidRecordError(
                "output None",
                "an upsert would forget the keys that are there",
                "Return an empty list to delete them all; or raise, and nothing changes",
            )

    def _publish(self, context: dg.OutputContext, obj: Any, target: "_Target", identity: Identity) -> dict[str, Any]:
        """Publish one output and return what its materialization says."""
        with self.kafka.errors_in_dagster(context, target.topic, identity.partition):
            _refuse_own(obj)
            if obj is not None:
                publication = self._publish_records(context, obj, target, identity)
            elif is_again(context, identity) and (done := self.kafka.published(identity, target.topic)) is not None:
                publication = done  # by an earlier attempt
            else:
                self._refuse_none(context)
                return _said_of_none(context, target.topic, identity)
        context.log.info(describe(publication, identity.partition))
        return publication_metadata(publication, identity.partition)

    def _publish_records(
        self, context: dg.OutputContext, obj: Any, target: "_Target", identity: Identity
    ) -> Publication:
        if unpublished := _index_names(obj):
            context.log.warning(
                f"{log_prefix(identity.partition)}The frame's index {', '.join(unpublished)} is not published:"
                " frame.reset_index() makes it a column"
            )

        def attempt(reports: bool, repeats: OtherWriterError | None) -> Publication:
            writer = self.kafka.writer(context, identity, **target._asdict(), reports=reports, repeats=repeats)
            # Refuses the output and its schema before anything is connected.
            with contextlib.closing(
                chunks(obj, target.key, encoders=writer.encoders(), on_bad=writer.on_bad)
            ) as encoded:
                return publish(writer, encoded)

        def publish(writer: PublicationWriter, encoded: Iterator[Chunk]) -> Publication:
            events = _cloud_events_of(context, identity)
            if events is not None:
                encoded = events.add(encoded)
            upsert = self._upsert(context, target, identity)
            writer.keeps_places = upsert is not None
            with writer:
                if upsert is None or writer.replayed:
                    writer.send_chunks(encoded)
                else:
                    untold = writer.predecessor(upsert.replaces)
                    more = [untold] if untold else []
                    moved, stayed = upsert.find(writer.topic_ids, writer.partition_counts, writer.partitioner, more)
                    writer.send_chunks(upsert.delete_all(moved))
                    writer.send_chunks(upsert.remember(encoded))
                    writer.superseded = upsert.superseded
                    writer.send_chunks(upsert.delete_others(stayed))
            return writer.commit()

        return settle(obj, attempt)

    def _topic_of(self, context: dg.OutputContext) -> str:
        # A mapped step's key ends in [mapping_key], which no topic can be named by.
        path = context.asset_key.path if context.has_asset_key else [context.step_key.partition("[")[0], context.name]
        # A context made by build_output_context has no job.
        job = context.job_name if "{job" in (self.topic or "") else ""
        return topic_of(path, _metadata(context, "kafka/topic"), self.topic, job)

    def _key_of(self, context: dg.OutputContext) -> tuple[str, ...]:
        given = _metadata(context, "kafka/key")
        return _names_in(self.key) if given is None else key_fields(given)

    def _write_mode_of(self, context: dg.OutputContext) -> str:
        given = _metadata(context, "kafka/write_mode")
        return check_write_mode(self.write_mode if given is None else given)

    def _upsert(self, context: dg.OutputContext, target: "_Target", identity: Identity) -> Upsert | None:
        """What deletes the keys of the asset's last publication, if it is to replace that one."""
        if self._write_mode_of(context) == "append":
            return None
        if not context.has_asset_key:
            raise KafkaConfigError(
                f"output {context.name!r} of step {context.step_key!r}",
                "runs of an op have no last publication to replace",
                "Make it an asset, or set write_mode to 'append'",
            )
        config = self.kafka.publication_config()
        _refuse_upsert(config.delivery_guarantee)
        if (target.on_bad_record or config.on_bad_record) != "fail":
            raise KafkaConfigError(
                "write_mode='upsert'",
                "a record that goes to a dead-letter topic would take the old record of its key with it",
                "Set on_bad_record to 'fail'",
            )
        step = step_context_of(context)
        # Behind a context made by build_output_context is no event log.
        replaced = _replaced(step.instance, context.asset_key, identity.partition) if step else {}
        previous: dict[str, Publication] = {}
        for partition, last in replaced.items():
            if last is None or last.publication is None:
                continue
            _refuse_others(
                name_of(context.asset_key, partition),
                last,
                list(replaced),
                "Its keys cannot be told from theirs: materialize all of them in one run, as one output, not a mapping."
                " If the asset has other Dagster partitions by now, wipe its materializations in Dagster: rows that it"
                " has given up then stay",
            )
            previous[last.publication.publication_id] = last.publication
        return Upsert(config.producer, list(previous.values()), target.topic, self.read_timeout)

    def load_input(self, context: dg.InputContext) -> Any:
        """The records of exactly the Dagster partitions (or the run, for an op) that the input asks for.

        The input's annotation says in what form, with or without ``| None``: ``pl.DataFrame``, ``pd.DataFrame``,
        ``pa.Table``, ``list[KafkaRecord]``, ``dict`` (of the only record; ``dict | None`` is None if there is none), a
        pydantic model or dataclass (of the only record) or a ``list`` of one, else a list of values as JSON has them.
        Of an asset with Dagster partitions, ``dict[str, list[dict]]``, or a mapping to frames or lists of models, is
        the records of each by its partition key. Where an input takes several outputs as a list, as after
        ``.collect()``, that is the form of its items: ``list[dict]`` is a list of the only record of each output.

        Raises:
            dagster.Failure: There is no publication to read, its records are gone, or Kafka failed for good.
            dagster.RetryRequested: Kafka failed for a cause that may pass.
        """
        with self.kafka.errors_in_dagster(context):
            found = (
                _publications(context) if context.has_asset_key else {None: _publication_of_op(context, self._outputs)}
            )
            # What several Dagster partitions have together is there once.
            publications = {one.publication_id: one for one in found.values() if one}
            config = self.kafka.publication_config()
            refuse_lost_topics(config.producer, publications.values())

            # One for all publications: it asks the registry for each schema once.
            registry = config.schema_registry
            decoder = None if registry is None else functools.cache(functools.partial(_decoder_of, registry))

            def read(wanted: Iterable[Publication]) -> Generator[tuple[ReadRecord, ValueFormat | None], None, None]:
                for publication in wanted:
                    records = read_publication(config.producer, publication, self.read_timeout)
                    yield from _decoded(decoder, publication, records)

            def made(form: Any, wanted: Iterable[Publication]) -> Any:
                # Else an error on its way would keep the consumer, which goes on fetching.
                with contextlib.closing(read(wanted)) as records:
                    return in_form(form, records)

            form = _form_of(context)
            of_each = form_of_each(form) if context.has_asset_partitions else None
            if of_each is None:
                return made(form, publications.values())
            if len(publications) < sum(one is not None for one in found.values()):
                raise KafkaError(
                    f"input {context.name!r}, of asset {context.asset_key.to_user_string()!r}",
                    "it is annotated as a mapping by Dagster partition, but several were published as one publication",
                    "Annotate it as a list or a data frame, or return a mapping from partition key to records upstream",
                )
            return {partition: made(of_each, [one] if one else ()) for partition, one in found.items()}


def _said_of_none(context: dg.OutputContext, topic: str, identity: Identity) -> dict[str, Any]:
    """What the materialization of an output says that is None; logged, too."""
    if _has_own_sessions(context):
        context.log.warning(
            "The output is None, and the body had sessions of kafka.publishing(): this materialization says nothing of"
            " what they published, and it cannot be read back. Return publication.materialize_result()"
        )
        return {}
    begin = log_prefix(identity.partition)
    beside = " beside the body's sessions" if has_sessions(context) else ""
    context.log.info(f"{begin}The output is None: nothing was published to {topic!r}{beside}")
    return {"dagster/row_count": 0, "kafka/topic": topic, "kafka/records": 0}


def topic_of(path: Sequence[str], given: Any, template: str | None, job: str) -> str:
    """The topic of an asset or output.

    Args:
        path: The asset's key, or the step and the output's name.
        given: What the metadata ``kafka/topic`` says; None if nothing.
        template: The IO manager's ``topic``.
        job: The job's name.

    Raises:
        KafkaConfigError: The template cannot be filled in, or the name is illegal.
    """
    if given is not None:
        return check_topic(given)
    template = template or "{asset_key}"
    try:
        topic = template.format(asset_key=".".join(path), name=path[-1], job=job)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise KafkaConfigError(
            f"topic={template!r} of the IO manager",
            f"{error} cannot be filled in",
            "Use {asset_key}, {name} and {job} only",
        ) from error
    return check_topic(topic)


def _names_in(key: str | None) -> tuple[str, ...]:
    """The fields that an IO manager's ``key`` names.

    Raises:
        KafkaConfigError: It names one twice, or none before or after a comma.
    """
    names = [name.strip() for name in key.split(",")] if key else []
    if not all(names):
        raise KafkaConfigError(
            f"key={key!r}", "a comma has no field beside it", "Name the key's fields, a comma between"
        )
    return key_fields(names)


def check_write_mode(mode: Any) -> str:
    """The write mode.

    Raises:
        KafkaConfigError: There is no such one.
    """
    if mode not in WRITE_MODES:
        raise KafkaConfigError(f"write_mode={mode!r}", "there is no such mode", f"Use {' or '.join(WRITE_MODES)}")
    return str(mode)


def refuse_other_cluster(name: str, kafka: Any) -> None:
    """Refuse what neither is a `KafkaProducerResource` nor may give one when the run starts.

    Raises:
        KafkaConfigError: It is none; the error calls it by the name.
    """
    cls = getattr(kafka, "resource_cls", type(kafka))  # of a partial
    gives_itself = issubclass(cls, dg.ConfigurableResource) and (
        (cls.create_resource, cls.yield_for_execution)
        == (dg.ConfigurableResource.create_resource, dg.ConfigurableResource.yield_for_execution)
    )
    if may_give_resource(kafka) and (issubclass(cls, KafkaProducerResource) or not gives_itself):
        return
    what = f"the class {kafka.__qualname__} itself" if isinstance(kafka, type) else f"a {type(kafka).__qualname__}"
    raise KafkaConfigError(
        name,
        "it is missing" if kafka is None else f"it is {what}",
        "Give kafka=KafkaProducerResource(bootstrap_servers=...)",
    )


def may_give_resource(given: Any) -> bool:
    """Whether a run can make a resource of it: of a definition, a resource with config or a partial, but no class."""
    return isinstance(given, dg.ResourceDefinition) or hasattr(type(given), "get_resource_definition")


def _refuse_upsert(guarantee: str) -> None:
    """Refuse to replace a publication where that cannot be done at once."""
    if guarantee != "exactly_once":
        raise KafkaConfigError(
            "write_mode='upsert'",
            f"delivery_guarantee={guarantee!r} cannot replace a publication at once",
            "Set delivery_guarantee to 'exactly_once'",
        )


def _by_partition(context: dg.OutputContext, output: Any, partitions: Sequence[str]) -> dict[str, Any]:
    """The output of each of a run's Dagster partitions, if it is a mapping of them; else nothing.

    Raises:
        InvalidRecordError: It is one of other Dagster partitions, of more or of fewer, which is no record either.
    """
    if not isinstance(output, Mapping):
        return {}
    given, asked = set(output), set(partitions)
    if given == asked:
        wrapped = next((key for key, of_key in output.items() if isinstance(of_key, dg.Output)), None)
        if wrapped is not None:
            raise InvalidRecordError(
                f"mapping by Dagster partition, of {wrapped!r}",
                "its value is a dagster.Output",
                "Give what is in it, and metadata by context.add_asset_metadata(..., partition_key=...)",
            )
        return {partition: output[partition] for partition in partitions}
    other = next((key for key in output if key not in asked), None)
    missing = min(asked - given, default=None)  # the first of days, in whatever order Dagster gives them
    if asked and not isinstance(other, str | None):
        cause = f"its key {other!r} is a {type(other).__qualname__}, and Dagster's partition keys are str"
    elif not asked or not _is_meant_by_partition(context, output, asked):
        return {}
    else:
        cause = f"{other!r} is not one of them" if missing is None else f"it has no output for {missing!r}"
    whose = f"{len(asked)} Dagster partitions" if len(asked) > 1 else f"Dagster partition {partitions[0]!r}"
    raise InvalidRecordError(
        f"mapping for {whose}",
        cause,
        "Return one with exactly context.partition_keys; an empty list publishes nothing. If it is a record, return a"
        " list of it",
    )


def _refuse_own(output: Any) -> None:
    """Refuse what this package says of a publication or a record: it is none."""
    first = next(iter(output[:1]), None) if isinstance(output, (list, tuple)) else None
    for name, one in {"output": output, "row 0": first}.items():
        if isinstance(one, (Publication, PublishingSession, RecordMetadata)):
            raise InvalidRecordError(
                f"{name} of type {type(one).__qualname__}",
                "it says what was published already, and is no record itself",
                "Return None after send_sync"
                if isinstance(one, RecordMetadata)
                else "Return publication.materialize_result()",
            )


def _index_names(output: Any) -> list[str]:
    """What the index of a pandas frame has names for, and no column has."""
    if not hasattr(output, "reset_index") or not hasattr(output, "columns"):  # a Series has no columns
        return []
    return [repr(name) for name in output.index.names if name is not None and name not in output.columns]


def _is_meant_by_partition(context: dg.OutputContext, output: Mapping[str, Any], asked: set[str]) -> bool:
    """Whether a mapping is meant as one of outputs by Dagster partition, and not as a record.

    That of one Dagster partition may well be a record of lists, unless their names are those of Dagster partitions.
    """
    if len(asked) > 1:
        return not asked.isdisjoint(output) or _is_of_outputs(output)
    step = step_context_of(context)
    if not output or not _is_of_outputs(output) or step is None:
        return not output
    keys = context.asset_partitions_def.get_partition_keys(dynamic_partitions_store=step.instance)
    return not output.keys().isdisjoint(keys)


def _is_of_outputs(output: Mapping[str, Any]) -> bool:
    """Whether all that a mapping holds is rows, frames or generators, or it holds nothing."""
    return all(
        (hasattr(value, "__iter__") or hasattr(value, "__arrow_c_stream__"))
        and not isinstance(value, (str, bytes, Mapping))
        for value in output.values()
    )


def _tell_at_once(context: dg.OutputContext, done: Mapping[str, dict[str, Any]]) -> None:
    """Tell Dagster of the Dagster partitions that a step has published before it failed.

    Dagster tells nothing of a step that fails: a new run of what seems to be missing would publish them again. Also if
    there is to be another attempt, which may fail before it comes here. As events of no run: one of this run would tell
    a re-execution "from asset failure" that the asset is done, whichever Dagster partitions are missing.
    """
    step, key = context.step_context, context.asset_key
    for partition in context.asset_partition_keys:
        if str(partition) in done and not _is_told(step.instance, key, str(partition), done[str(partition)]):
            added = _added_metadata(context, [str(partition)])
            metadata = {**added.get(None, {}), **added.get(str(partition), {}), **done[str(partition)]}
            metadata["kafka/run"] = dg.MetadataValue.dagster_run(step.run_id)
            parts = partition.keys_by_dimension if isinstance(partition, dg.MultiPartitionKey) else {}
            tags = {f"dagster/partition/{dimension}": part for dimension, part in parts.items()}
            event = dg.AssetMaterialization(key, partition=partition, metadata=metadata, tags=tags)
            step.instance.report_runless_asset_event(event)


def _is_told(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str, said: Mapping[str, Any]) -> bool:
    """Whether an attempt before this one has told what is to be said of a Dagster partition."""
    if not said.get("kafka/replayed"):
        return False
    try:
        last, mine = last_published(instance, key, partition), published(said, partition)
    except KafkaError:  # something else was told last
        return False
    return last is not None and mine.publication is not None and _holds(last, mine.publication)


class _Target(typing.NamedTuple):
    """Where an output goes, and how."""

    topic: str
    key: Sequence[str]
    create_topic: KafkaTopicSpec | None
    on_bad_record: str | None
    value_schema: KafkaSchema | None
    key_schema: KafkaSchema | None


def _decoder_of(registry: SchemaRegistryConfig) -> SchemaDecoder:
    return SchemaDecoder(SchemaRegistry(registry))


def _decoded(
    decoder: Callable[[], SchemaDecoder] | None, publication: Publication, records: Iterable[ReadRecord]
) -> Iterator[tuple[ReadRecord, ValueFormat | None]]:
    """Records and the format of their values, decoded by the registry's schemas if they have one."""
    value, key = publication.value_format, publication.key_format
    of_value: SchemaFormat | None = value if value in SCHEMA_FORMATS else None
    if of_value is None and key is None:
        for record in records:
            yield record, value
        return
    if decoder is None:
        raise KafkaConfigError(
            f"topic {publication.topic!r}",
            f"its records are {of_value or key}, and there is no Schema Registry to read them by",
            "Set schema_registry_url",
        )
    decode = decoder()
    for record in records:
        read = record
        if of_value is not None:
            read = read._replace(value=decode(record.value, of_value))
        if key is not None:
            read = read._replace(key=decode(record.key, key))
        yield read, value


def _cloud_events_of(context: dg.OutputContext, identity: Identity) -> CloudEventHeaders | None:
    given = _metadata(context, "kafka/cloudevents")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise KafkaConfigError(
            f"metadata kafka/cloudevents={given!r}", "it is not a mapping", "Give at least type and source"
        )
    return CloudEventHeaders(given, identity.publication_id)


def _check_names(context: dg.OutputContext) -> None:
    """Refuse metadata that is meant for this IO manager, and that would do nothing.

    What says a publication is not meant for it.

    Raises:
        KafkaConfigError: A name is none of its own, or is of what a materialization says, or was added for one Dagster
            partition of several.
    """
    partitions = _partitions_of(context)
    added = _added_metadata(context, partitions)
    for metadata in (context.output_metadata, *added.values()):
        # A body that has published by itself may hand on what a materialization says.
        _refuse_names(name for name in metadata or () if name.removeprefix(_PREFIX) not in _SAID)
    _refuse_names(context.definition_metadata or ())
    if len(partitions) > 1:
        for partition, metadata in added.items():
            mine = next((one for one in _NAMES if _is_meant(metadata, one)), None)
            if partition is not None and mine is not None:
                raise KafkaConfigError(
                    f"metadata {mine}, added for Dagster partition {partition!r}",
                    f"this run publishes {len(partitions)} of them, all with the same",
                    "Add it without a partition_key, or publish each from the asset's body:"
                    " kafka.publishing(..., partition_key=...)",
                )


def _refuse_names(names: Iterable[str]) -> None:
    short = [name.removeprefix(_PREFIX) for name in _NAMES]
    for name in names:
        given = name.removeprefix(_PREFIX)
        if not name.startswith(_PREFIX) or given in short:
            continue
        close = difflib.get_close_matches(given.replace("-", "_"), short, 1, 0.8)
        meant = _SAID[given] if given in _SAID else next(iter(close), None)
        raise KafkaConfigError(
            f"metadata {name}",
            "this is what a materialization says" if given in _SAID else "there is no such entry",
            f"Did you mean {_PREFIX}{meant}?" if meant else f"Leave it out, or use one of {', '.join(_NAMES)}",
        )


def _is_meant(metadata: Mapping[str, Any], name: str) -> bool:
    """Whether an entry is there for this IO manager, and is not what a session says."""
    return name in metadata and (name != "kafka/topic" or PUBLICATION_METADATA not in metadata)


def _is_handed_on(context: dg.OutputContext) -> bool:
    """Whether the body has published by itself, and hands on what it says, of the output or of Dagster partitions."""
    if _metadata(context, PUBLICATION_METADATA) is not None:
        return True
    added = _added_metadata(context, _partitions_of(context))
    return any(PUBLICATION_METADATA in of_it for of_it in added.values())


def _warn_of_unreadable(context: dg.OutputContext) -> None:
    """Warn where what a body hands on of single Dagster partitions cannot be read back.

    Raises:
        KafkaError: It says nothing of a publication.
    """
    if _metadata(context, PUBLICATION_METADATA) is not None:
        return
    partitions = _partitions_of(context)
    added = _added_metadata(context, partitions)
    said = {str(p): published(of_it, str(p)) for p, of_it in added.items() if PUBLICATION_METADATA in of_it}
    whole = [one for one in said.values() if len(one.partitions) > 1]
    if len({one.publication and one.publication.publication_id for one in whole}) > 1:
        context.log.warning(
            f"A publication of {len(whole[0].partitions)} Dagster partitions is handed on for one of them: it is read"
            " back only with the others. Name the one that a session is of: kafka.publishing(..., partition_key=...)"
        )
    others = sorted(set(map(str, partitions)) - set(said))
    if others:
        context.log.warning(
            f"Of {len(others)} Dagster partitions of the run, {others[0]!r} first, the body has handed on nothing that"
            " was published: they are materialized, and cannot be read back. Hand on the metadata of each one's session"
        )


def _metadata(context: dg.OutputContext, name: str) -> Any:
    """An entry of the output's metadata, else of the asset's in this step, else of its definition's, unwrapped.

    Raises:
        KafkaConfigError: It is an EnvVar, which Dagster does not resolve there.
    """
    partitions = _partitions_of(context)
    # Those of several are refused by `_check_names`.
    added = _added_metadata(context, partitions if len(partitions) == 1 else ())
    for metadata in (context.output_metadata, *added.values(), context.definition_metadata):
        value = metadata[name] if metadata and _is_meant(metadata, name) else None
        if value is not None:
            if is_env_var(value):
                raise KafkaConfigError(
                    f"metadata {name}=EnvVar({value.env_var_name!r})",
                    "Dagster looks up no variables in metadata",
                    f"Give os.environ[{value.env_var_name!r}], or the option of the IO manager or its resource",
                )
            return value.value if isinstance(value, dg.MetadataValue) else value
    return None


def _partitions_of(context: dg.OutputContext) -> Sequence[str]:
    return context.asset_partition_keys if context.has_asset_partitions else ()


def _added_metadata(context: dg.OutputContext, partitions: Iterable[str]) -> dict[str | None, Mapping[str, Any]]:
    """What the asset has added by `add_asset_metadata`: for these Dagster partitions; under None, for all."""
    step = step_context_of(context)
    if step is None or not context.has_asset_key:
        return {}
    added = {partition: step.get_asset_metadata(context.asset_key, partition) for partition in (*partitions, None)}
    return {partition: metadata for partition, metadata in added.items() if metadata}


def _spec_of(context: dg.OutputContext) -> KafkaTopicSpec | None:
    given = _metadata(context, "kafka/create_topic")
    if given is None:
        return None
    try:
        return KafkaTopicSpec.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise KafkaConfigError(
            f"metadata kafka/create_topic={given!r}",
            told(first),
            f"Give a mapping of {', '.join(KafkaTopicSpec.model_fields)}",
        ) from error


def told(error: Any) -> str:
    """What is wrong with an option, by name: our own messages have it, pydantic's have not."""
    if error["type"] == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    return f"{'.'.join(map(str, error['loc'])) or 'it'}: {error['msg']}"


def _on_bad_record_of(context: dg.OutputContext) -> str | None:
    given = _metadata(context, "kafka/on_bad_record")
    return None if given is None else check_on_bad_record(given)


def _schema_of(context: dg.OutputContext, name: str, default: str | None) -> KafkaSchema | None:
    given = _metadata(context, name)
    given = default if given is None else given
    return None if given is None else KafkaSchema.parse(given)


def _publications(context: dg.InputContext) -> dict[str | None, Publication | None]:
    """The publication that holds each Dagster partition's records, in their order; None where it has none."""
    asset_key = context.asset_key
    asked: list[str | None] = list(context.asset_partition_keys) if context.has_asset_partitions else [None]
    if len(asked) > 1:
        # Dagster 1.11 gives them in no order.
        keys = context.asset_partitions_def.get_partition_keys(dynamic_partitions_store=context.instance)
        places = {key: place for place, key in enumerate(keys)}
        asked.sort(key=lambda key: places.get(key or "", 0))
    lenient = bool((context.definition_metadata or {}).get("allow_missing_partitions"))
    last = {partition: last_published(context.instance, asset_key, partition) for partition in asked}
    publications: dict[str | None, Publication | None] = {}
    for partition, found in last.items():
        if found is None:
            if lenient:
                continue
            fix = "Materialize it first, with this IO manager: it does not read what other programs have written"
            step = step_context_of(context)
            if partition is not None and step is not None and step.is_asset_check_step:
                fix += ". A check that has the asset's partitions_def reads those of its run"
            elif partition is not None:
                fix += (
                    ". To read the Dagster partitions that there are, give the input"
                    ' dg.AssetIn(metadata={"allow_missing_partitions": True})'
                )
            raise KafkaError(name_of(asset_key, partition), "it was never materialized", fix)
        publication, covered, _ = found
        refuse_partition_for_whole(asset_key, partition, found)
        publications[partition] = publication
        if publication is None or partition is None:  # which has no others beside it
            continue
        _refuse_others(
            name_of(asset_key, partition),
            found,
            asked,
            "Read them all, or return a mapping from partition key to records from the upstream asset",
        )
        anew = next((other for other in covered if not _holds(last[other], publication)), None)
        if anew is not None:
            raise KafkaError(
                name_of(asset_key, partition),
                f"it was published together with {anew!r} in one publication, and {anew!r} anew since: which records of"
                " the first are out of date is not known",
                "Materialize them together again, or return a mapping from partition key to records",
            )
    return publications


def _has_own_sessions(context: dg.OutputContext) -> bool:
    """Whether an asset's body has published by sessions of its own."""
    return context.has_asset_key and has_sessions(context)


def _holds(last: Published | None, publication: Publication) -> bool:
    """Whether a Dagster partition's last publication is this one."""
    found = last.publication if last else None
    return found is not None and found.publication_id == publication.publication_id


def _replaced(
    instance: dg.DagsterInstance, asset_key: dg.AssetKey, partitions: Sequence[str]
) -> Mapping[str | None, Published | None]:
    """What an upsert replaces, by Dagster partition: without any, the last of all, or those of each that there was."""

    def last_of(partition: str | None) -> Published | None:
        try:
            return last_published(instance, asset_key, partition)
        except KafkaError:
            return None  # something else had stored it, and not in Kafka

    if partitions:
        return {partition: last_of(partition) for partition in partitions}
    whole = last_of(None)
    if whole is None or whole.partition is None:
        return {None: whole}
    return {partition: last_of(partition) for partition in sorted(instance.get_materialized_partitions(asset_key))}


def _refuse_others(name: str, last: Published, asked: Sequence[str | None], fix: str) -> None:
    """Refuse a publication that holds more Dagster partitions than are asked for, of an asset that has them."""
    if last.partition is not None and not set(last.partitions) <= set(asked):
        cause = f"it was published together with {len(last.partitions) - 1} other Dagster partitions in one publication"
        raise KafkaError(name, cause, fix)


def _publication_of_op(context: dg.InputContext, outputs: HandledOutputs) -> Publication | None:
    """What the last attempt has published for the output of an op; None if that was None."""
    upstream = context.upstream_output
    if upstream is None:
        raise KafkaError(
            f"input {context.name!r}",
            "it has no upstream output",
            "Connect it to an output; of an asset, give the op my_asset.to_source_asset() in its job",
        )
    name = f"output {upstream.name!r} of step {upstream.step_key!r}"
    handled = outputs.find(context.instance, upstream.run_id, upstream.step_key, upstream.name, upstream.mapping_key)
    if handled is None:
        raise KafkaError(name, f"run {upstream.run_id} has published nothing for it", "Run it again")
    return published(handled, name).publication


def _form_of(context: dg.InputContext) -> Any:
    """The form in which an input wants the output that is loaded: an item of its list, if it takes one of several."""
    try:
        of_input = context.dagster_type
    except dg.DagsterInvariantViolationError:
        # A context made by build_input_context without a type.
        return typing.Any
    step = step_context_of(context)
    inputs = step.step.step_inputs if step else ()
    source = next((one.source for one in inputs if one.name == context.name), None)
    if type(source).__name__ == "FromMultipleSources" and of_input.supports_fan_in:
        of_input = of_input.get_inner_type_for_fan_in()
    return of_input.typing_type
