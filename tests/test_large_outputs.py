"""Large lists and frames: their offsets are exact without a delivery report per record, whoever else writes."""

import contextlib
import itertools
import threading
import time
import types
import uuid

import confluent_kafka
import orjson
import polars as pl
import pytest
from confluent_kafka.admin import AdminClient, NewPartitions, OffsetSpec

from dataforge_kafka_dagster import KafkaProducerConfig, KafkaRecord
from dataforge_kafka_dagster.kafka import publication
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.deliveries import Track
from dataforge_kafka_dagster.kafka.errors import FencedError, KafkaConfigError, KafkaError, Remedy
from dataforge_kafka_dagster.kafka.publication import OtherWriterError, PublicationWriter, publish
from dataforge_kafka_dagster.kafka.sender import Sender
from dataforge_kafka_dagster.kafka.sources import is_repeatable

ROWS = 2_000


def test_lists_and_frames_can_be_sent_again_and_generators_cannot():
    frame = pl.DataFrame({"a": [1]})
    assert is_repeatable([1])
    assert is_repeatable(())
    assert is_repeatable(frame)
    assert is_repeatable(frame.to_pandas())
    assert is_repeatable(frame.to_arrow())
    for other in (iter([1]), frame.lazy(), frame.to_arrow().to_reader(), {"a": 1}, "text", KafkaRecord(1)):
        assert not is_repeatable(other)


class _Sent(Sender):
    """What was sent, without a broker."""

    def __init__(self, seconds):
        config = PublicationConfig(producer=KafkaProducerConfig(bootstrap_servers="127.0.0.1:9", delivery_timeout=120))
        connection = Connection(config.producer)
        super().__init__(config, connection, publication_id="p", topic="t", create_topic=None, dead_topic=None)
        self._first_sent = time.monotonic() - seconds
        self.left = 0

    def live(self):
        return range(self.left)

    def add(self, records, size):
        self.records, self.bytes = self.records + records, self.bytes + size
        self._sent_up_to.append((self.position, self.bytes))


@pytest.mark.parametrize(
    ("sent", "left", "seconds", "is_ahead"),
    [  # MB that were given, MB of them on their way, and in which time; delivery_timeout is 120 s
        (16, 16, 0.1, False),
        (20, 15, 1, False),
        (20, 19, 1, True),  # brokers are fast, as a quota lets them at first
        (100, 30, 1, False),  # by a quarter of what they have taken
        (100, 40, 1, True),
        (1000, 100, 6000, True),  # 150 kB/s: 6 MB in 40 s
        (1000, 15, 6000, False),
        (1000, 40, 900, False),  # 1 MB/s
        (1000, 70, 900, True),
    ],
)
def test_how_far_ahead_records_are_sent(sent, left, seconds, is_ahead):
    sender = _Sent(seconds)
    for _ in range(sent * 10):
        sender.add(100, 100_000)
    sender.left = left * 1_000
    assert sender._is_far_ahead() is is_ahead


def test_large_records_behind_many_small_ones_are_not_taken_for_small():
    sender = _Sent(60)
    sender.add(300_000, 30_000_000)
    for _ in range(70):
        sender.add(1, 900_000)
    for sender.left, is_ahead in ((70, True), (17, False)):
        assert sender._is_far_ahead() is is_ahead


@pytest.fixture
def attempts(monkeypatch):
    """Outputs of this file's size are large; counts attempts, by whether they had reports."""
    monkeypatch.setattr(publication, "_MANY", ROWS)
    made = []

    class Counted(PublicationWriter):
        def __init__(self, *args, reports=True, **options):
            made.append(reports)
            super().__init__(*args, reports=reports, **options)

    monkeypatch.setattr(publication, "PublicationWriter", Counted)
    return made


@pytest.fixture
def place(kafka_bootstrap_servers, kafka_topic):
    """Where to publish: a topic of three Kafka partitions."""
    name = uuid.uuid4().hex
    config = PublicationConfig(producer=KafkaProducerConfig(bootstrap_servers=kafka_bootstrap_servers))
    return {
        "config": config,
        "transactional_id": name,
        "publication_id": name,
        "topic": kafka_topic(partitions=3),
    }


def places_of(found):
    return sorted(
        (offsets.partition, offset)
        for offsets in found.offsets
        for first, last in offsets.runs
        for offset in range(first, last + 1)
    )


@contextlib.contextmanager
def another_writer(bootstrap, topic, every):
    """Writes records of its own to every Kafka partition, at least one before the block, until its end."""
    producer = confluent_kafka.Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
    ended = threading.Event()

    def write():
        for partition in range(3):
            producer.produce(topic, b"other", partition=partition)
        producer.flush(10)

    def go_on():
        while not ended.wait(every):
            write()

    write()
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(20)


def assert_exact(found, read, topic):
    """Its offsets are those of its own records, by a reader that knows nothing of them."""
    seen = read(topic)
    ours = [record for record in seen if record.value != b"other"]
    assert sorted(orjson.loads(record.value)["i"] for record in ours) == list(range(ROWS))
    assert sorted((record.partition, record.offset) for record in ours) == places_of(found)
    assert found.records == ROWS


@pytest.mark.kafka
@pytest.mark.parametrize("form", [list, pl.DataFrame])
def test_a_large_output_is_told_exactly_without_reports(attempts, place, read, form):
    found = publish(place["config"], form([{"i": i} for i in range(ROWS)]), **{k: place[k] for k in list(place)[1:]})
    assert attempts == [False]
    assert_exact(found, read, place["topic"])
    assert all(len(offsets.runs) == 1 for offsets in found.offsets)


@pytest.mark.kafka
@pytest.mark.parametrize("rival_ends", [True, False])
@pytest.mark.parametrize("look", [2, 3], ids=["after the first 10,000", "at the end"])
def test_an_attempt_that_another_has_taken_over_is_not_repeated(look, rival_ends, attempts, place, read, monkeypatch):
    """As one that was frozen there. What was written meanwhile is the other's end, or the end of its own transaction."""
    config, ends, looks = place.pop("config"), PublicationWriter._ends, []
    rival = PublicationWriter(config, **place | {"publication_id": "of another run"})

    def late(self, track):
        looks.append(1)
        if len(looks) == look:
            rival.__enter__()
            rival.send_all([{"i": "rival"}])
            if rival_ends:
                rival.commit()
        return ends(self, track)

    monkeypatch.setattr(PublicationWriter, "_ends", late)
    with pytest.raises(FencedError, match="another attempt"):
        publish(config, [{"i": i} for i in range(ROWS)], **place)
    assert (len(looks), attempts) == (look, [False])
    rival.commit()
    assert [orjson.loads(record.value) for record in read(place["topic"])] == [{"i": "rival"}]


@pytest.mark.kafka
def test_an_attempt_is_not_repeated_after_another_has_been_published(place, read):
    """As one that was frozen between its two passes."""
    config = place.pop("config")
    publish(config, [{"i": 1}], **place)
    before = OtherWriterError("publication", "more offsets", "Repeat it", ledger="")
    repeated = PublicationWriter(config, **place | {"publication_id": "began before"}, repeats=before)
    with pytest.raises(FencedError, match="another run has published it anew"), repeated:
        repeated.send_all([{"i": 2}])
    assert [orjson.loads(record.value) for record in read(place["topic"])] == [{"i": 1}]


@pytest.mark.kafka
def test_a_repeated_attempt_finds_it_in_the_ledger(attempts, place, read):
    config = place.pop("config")
    first = publish(config, [{"i": i} for i in range(ROWS)], **place)
    again = publish(config, [{"i": i} for i in range(ROWS)], **place)
    assert again.replayed
    assert again.offsets == first.offsets
    assert attempts == [False, False]
    assert_exact(again, read, place["topic"])


@pytest.mark.kafka
def test_what_is_small_or_streamed_is_reported(attempts, place, read):
    config = place.pop("config")
    publish(config, [{"i": i} for i in range(ROWS - 1)], **place)
    publish(config, ({"i": i} for i in range(ROWS)), **place | {"publication_id": "2"})
    assert attempts == [True, True]
    assert len(read(place["topic"])) == 2 * ROWS - 1


@pytest.mark.kafka
@pytest.mark.parametrize("unknown", [None, -1001])
@pytest.mark.parametrize("at", [0, 2])
def test_a_record_whose_offset_the_broker_does_not_know_is_published_again(place, read, monkeypatch, at, unknown):
    """As after DUPLICATE_SEQUENCE_NUMBER, of a batch that came twice long ago: it is there, but nobody knows where."""
    config, make, seen = place.pop("config"), Track.reporter, itertools.count()

    def reporter(track, span):
        report = make(track, span)

        def forgetful(err, msg):
            lost = types.SimpleNamespace(partition=msg.partition, offset=lambda: unknown)
            report(err, lost if next(seen) == at else msg)

        return forgetful

    monkeypatch.setattr(Track, "reporter", reporter)
    rows = [{"i": i} for i in range(5)]
    with pytest.raises(KafkaError, match="5 records were sent, but 4 acknowledged") as raised:
        publish(config, rows, **place)
    assert raised.value.remedy is Remedy.REBUILD
    assert publish(config, rows, **place).records == len(read(place["topic"])) == len(rows)


@pytest.mark.kafka
def test_where_others_write_it_is_published_again_with_reports(attempts, place, read, monkeypatch):
    config = place.pop("config")
    ends = publication.end_offsets
    found_ends = []

    def seen(*args):
        found_ends.append(ends(*args))
        return found_ends[-1]

    monkeypatch.setattr(publication, "end_offsets", seen)

    class Slow(list):
        """So that the other comes between."""

        def __getitem__(self, where):
            time.sleep(0.05)
            return super().__getitem__(where)

    with another_writer(config.producer.servers, place["topic"], 0.01):
        found = publish(config, Slow({"i": i} for i in range(ROWS)), **place)
    assert attempts == [False, True]
    # Seen half-way, before the rest was sent.
    assert len(found_ends) == 2
    assert_exact(found, read, place["topic"])


@pytest.mark.kafka
@pytest.mark.parametrize("late", [False, True])
def test_another_record_at_any_time_is_seen(attempts, place, read, late):
    """One record of somebody else, before the check half-way or after it."""
    config = place.pop("config")
    at = ROWS * 3 // 4 if late else 100
    other = confluent_kafka.Producer({"bootstrap.servers": config.producer.servers})

    class Rows(list):
        """Writes to the topic, once, while it is being read."""

        written = False

        def __getitem__(self, where):
            if isinstance(where, slice) and where.stop > at and not self.written:
                self.written = True
                other.produce(place["topic"], b"other")
                assert other.flush(10) == 0
            return super().__getitem__(where)

    found = publish(config, Rows({"i": i} for i in range(ROWS)), **place)
    assert attempts == [False, True]
    assert_exact(found, read, place["topic"])
    # Only the first attempt's part before the check was sent in vain, or all of it.
    everything = read(place["topic"], "read_uncommitted")
    assert len(everything) in (range(2 * ROWS + 1, 2 * ROWS + 2) if late else range(ROWS + ROWS // 2, 2 * ROWS))


@pytest.mark.kafka
def test_a_transaction_that_was_aborted_meanwhile_is_no_part_of_it(attempts, place, read):
    config = place.pop("config")
    other = confluent_kafka.Producer(
        {"bootstrap.servers": config.producer.servers, "transactional.id": f"other-{uuid.uuid4().hex}"}
    )
    other.init_transactions(20)
    other.begin_transaction()
    other.produce(place["topic"], b"other", partition=0)
    other.flush(10)

    class Rows(list):
        ended = False

        def __getitem__(self, where):
            if isinstance(where, slice) and where.stop > ROWS // 4 and not self.ended:
                self.ended = True
                other.abort_transaction(20)
            return super().__getitem__(where)

    found = publish(config, Rows({"i": i} for i in range(ROWS)), **place)
    # The marker that ends it has an offset too.
    assert attempts == [False, True]
    assert_exact(found, read, place["topic"])


@pytest.mark.kafka
def test_without_reports_a_record_that_the_broker_refuses_still_fails_it(attempts, place, read, kafka_topic):
    config = place.pop("config")
    place["topic"] = kafka_topic(partitions=1, config={"max.message.bytes": "2000"})
    incompressible = bytes(itertools.islice(itertools.cycle(range(256)), 256)).hex()
    rows = [{"i": i} for i in range(ROWS - 1)] + [{"i": ROWS, "text": "".join(map(str, range(9000))) + incompressible}]
    with pytest.raises(KafkaError) as raised:
        publish(config, rows, **place)
    assert raised.value.code == "MSG_SIZE_TOO_LARGE"
    assert raised.value.counts == {"MSG_SIZE_TOO_LARGE": sum(raised.value.counts.values())}
    assert attempts == [False]
    assert read(place["topic"]) == []


@pytest.mark.kafka
def test_a_writer_without_reports_knows_its_limits(place, kafka_topic):
    config = place.pop("config")
    other = kafka_topic(partitions=1)
    refused = pytest.raises(KafkaConfigError, match="not the publication's own topic")
    with refused, PublicationWriter(config, reports=False, **place) as writer:
        writer.send({"i": 1}, topic=other)
    refused = pytest.raises(OtherWriterError, match="2 offsets were given for its 1 records")
    with refused, PublicationWriter(config, reports=False, **place) as writer:
        writer.send({"i": 1})
        producer = confluent_kafka.Producer({"bootstrap.servers": config.producer.servers})
        producer.produce(place["topic"], b"other")
        producer.flush(10)
    with PublicationWriter(config, reports=False, **place) as writer:
        writer.send({"i": 1})
    assert writer.publication.records == 1


@pytest.mark.kafka
def test_acknowledged_records_that_no_leader_has_any_more_fail_it(place, read, monkeypatch):
    ends, looks = PublicationWriter._ends, itertools.count()

    def lost(self, track):
        first, *others = ends(self, track)
        return [first - (next(looks) > 0), *others]

    monkeypatch.setattr(PublicationWriter, "_ends", lost)
    writer = PublicationWriter(place.pop("config"), reports=False, **place)
    failed = pytest.raises(KafkaError, match="5 records were sent, but 4 acknowledged: a broker that lacks")
    with failed as caught, writer:
        writer.send_all([KafkaRecord({"i": i}, partition=0) for i in range(5)])
    assert caught.value.remedy is Remedy.REBUILD
    assert read(place["topic"]) == []


@pytest.mark.kafka
def test_a_writer_without_reports_waits_for_brokers_as_long_as_for_a_delivery(place, monkeypatch):
    """Its topic has to be looked at before the commit, where one with reports may go on."""
    waits, look = [], publication.current

    def current(connection, topic, timeout):
        waits.append(timeout)
        return look(connection, topic, timeout)

    monkeypatch.setattr(publication, "current", current)
    with PublicationWriter(place.pop("config"), reports=False, **place) as writer:
        writer.send({"i": 1})
    assert waits == [120.0]


@pytest.mark.kafka
def test_a_large_output_with_a_dead_letter_topic_is_reported(attempts, place, read, kafka_topic):
    dead, config = kafka_topic(), place.pop("config")
    rows = [{"i": i} for i in range(ROWS)]
    found = publish(config, [*rows, {"bad": object()}], on_bad_record=dead, **place)
    assert (found.dead_letters, len(read(dead))) == (1, 1)
    assert_exact(found, read, place["topic"])


@pytest.mark.kafka
def test_without_reports_nothing_is_committed_if_the_brokers_do_not_tell_that_the_topic_is_the_same(
    place, read, monkeypatch
):
    def silent(*_):
        raise KafkaError("topic", "no answer", "Try again", code="_TIMED_OUT")

    config = place.pop("config")
    with (
        pytest.raises(KafkaError, match="no answer") as caught,
        PublicationWriter(config, reports=False, **place) as writer,
    ):
        writer.send({"i": 1})
        monkeypatch.setattr(publication, "current", silent)
    assert caught.value.remedy is Remedy.RETRY
    assert read(place["topic"]) == []


@pytest.mark.kafka
def test_a_kafka_partition_that_is_added_meanwhile_hides_no_records(place):
    """As many records of another writer would make up for those that went to it."""
    config = place.pop("config")
    raw = {"topic.metadata.refresh.interval.ms": 300}
    config = config.model_copy(update={"producer": config.producer.model_copy(update={"librdkafka_config": raw})})
    admin = AdminClient({"bootstrap.servers": config.producer.servers})
    topic = place["topic"]
    writer = PublicationWriter(config, reports=False, **place)
    with pytest.raises(KafkaError, match=f"Kafka partitions were added to '{topic}' meanwhile") as caught, writer:
        writer.send({"i": 0})
        admin.create_partitions([NewPartitions(topic, 4)])[topic].result(30)
        deadline = time.monotonic() + 20
        while not _written(admin, topic, 3):
            assert time.monotonic() < deadline
            for i in range(100):
                writer.send({"i": i}, key=str(i))
            time.sleep(0.1)
        writer._sender.flush()
        other = confluent_kafka.Producer({"bootstrap.servers": config.producer.servers})
        for _ in range(_written(admin, topic, 3)):
            other.produce(topic, b"other", partition=0)
        other.flush(10)
    assert caught.value.remedy is Remedy.RETRY


def _written(admin, topic, partition):
    """How many records it has; none while a Kafka partition that is new has no leader that takes requests."""
    end = {confluent_kafka.TopicPartition(topic, partition): OffsetSpec.latest()}
    try:
        return next(iter(admin.list_offsets(end).values())).result(10).offset
    except confluent_kafka.KafkaException:
        return 0
