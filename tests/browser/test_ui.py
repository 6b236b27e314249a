"""The Dagster UI as a person uses it, in Chromium: `make test-browser`."""

import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient
from conftest import read_topic
from screenshots import chromium_page, fail, launch_partition, open_when_shown, running_ui

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def ui():
    with running_ui() as ui:
        yield ui


@pytest.fixture
def page():
    with chromium_page() as page:
        yield page


def test_a_day_launched_by_hand_shows_its_rows_and_the_offsets_that_kafka_has(ui, page):
    launch_partition(page, ui.url, "flights", "2013-01-01")
    open_when_shown(page, f"{ui.url}/assets/flights?partition=2013-01-01", "last offset")

    assert page.get_by_text("842", exact=True).count() >= 2  # the row count, and kafka/records
    table = page.locator("table", has_text="first offset").last
    rows = [row.locator("td").all_inner_texts() for row in table.locator("tr").all()]
    shown = {int(row[0]): (int(row[1]), int(row[2]), int(row[3])) for row in rows if len(row) == 5}

    records = read_topic(ui.servers, "flights")
    there = {}
    for record in records:
        first, _, count = there.get(record.partition, (record.offset, 0, 0))
        there[record.partition] = (first, record.offset, count + 1)
    assert len(records) == 842
    assert shown == there


def test_a_topic_with_a_schema_shows_which_one_the_registry_keeps(ui, page):
    for asset, shown in (("flights", "last offset"), ("carrier_delays", "kafka/value_subject")):
        launch_partition(page, ui.url, asset, "2013-01-02")
        open_when_shown(page, f"{ui.url}/assets/{asset}?partition=2013-01-02", shown)
    text = page.inner_text("body")
    assert "carrier-delays-value" in text
    registered = SchemaRegistryClient({"url": ui.registry}).get_latest_version("carrier-delays-value")
    row = page.locator("tr", has_text="kafka/value_schema_id").last
    assert row.locator("td").all_inner_texts()[-1] == str(registered.schema_id)


def test_a_failure_says_in_the_ui_what_to_do(ui, page):
    fail(page, ui)
    text = page.inner_text("body")
    assert "record 0, field 'speed'" in text
    assert "Replace it by None; in a data frame that is published, NaN is null" in text
