"""What runs when: the assets of a day every morning, and an announcement by hand."""

from concurrent.futures import Future

import dagster as dg

from dataforge_kafka_dagster import KafkaProducerResource, RecordMetadata
from example_project.defs.assets import daily

# For a week at once, launch a backfill of its days. Dagster warns that only flights may have several of them in a run:
# a backfill of this job has one in each, a backfill of flights alone has up to 31.
publish_day = dg.define_asset_job(
    "publish_day", selection=dg.AssetSelection.all() - dg.AssetSelection.groups("fails_on_purpose")
)


@dg.schedule(job=publish_day, cron_schedule="0 6 * * *", execution_timezone="America/New_York")
def every_morning(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """The data is of 2013: publish the same day of that year."""
    day = f"2013-{context.scheduled_execution_time:%m-%d}"
    return dg.RunRequest(partition_key=day) if daily.has_partition_key(day) else dg.SkipReason(f"There is no {day}.")


@dg.op
def announce_opening(context: dg.OpExecutionContext, kafka: KafkaProducerResource) -> None:
    """Send one record and wait until Kafka has it."""
    sent = kafka.send_sync("announcements", {"text": "The desk is open"}, key="desk")
    context.log.info(f"Kafka partition {sent.partition}, offset {sent.offset}")


@dg.op
def announce_gates(context: dg.OpExecutionContext, kafka: KafkaProducerResource) -> None:
    """Send many records without waiting for each; `flush` raises if one was not delivered."""
    sent: list[Future[RecordMetadata]] = [
        kafka.send_async("announcements", {"text": f"Gate {gate} is open"}, key=f"gate-{gate}") for gate in range(1, 21)
    ]
    kafka.flush()
    context.log.info(f"The last gate: offset {sent[-1].result().offset}")


@dg.job
def announce() -> None:
    """Single records from ops, without an asset."""
    announce_opening()
    announce_gates()
