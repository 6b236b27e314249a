"""That the benchmark runs, that its figures are told as they were measured, and that the docs show those figures."""

import shutil
import sys

import orjson
import pytest

from benchmarks import __main__ as command
from benchmarks import report, scenarios, speed


@pytest.fixture
def part(tmp_path):
    results = {
        "hand-written loop over dicts": {"ours": False, "records": 5, "per_second": [1000.0, 3000.0, 2000.0]},
        "dict rows": {"ours": True, "records": 20, "per_second": [9000.0, 6000.0, 8000.0]},
    }
    sets = {"flights": {"record_bytes": 300.0, "results": results}}
    return {"measured": report.machine(tmp_path), "sets": sets, "tables": speed.tables(sets, 3)}


def test_a_ratio_is_taken_between_figures_of_the_same_round(part):
    bars = part["tables"][0]["rows"]
    assert bars == [["dict rows / hand-written loop (flights)", "4", "4.00", "2.00 to 9.00", "yes"]]


def test_figures_are_kept_by_part_and_shown_between_the_page_s_markers(part, tmp_path):
    page = tmp_path / report.PAGE
    page.write_text(
        "Before\n<!-- benchmark speed -->\nold\n<!-- end -->\n<!-- benchmark read -->\nold\n<!-- end -->\nAfter\n"
    )
    other = {"measured": report.machine(tmp_path), "tables": [report.table("Others", ["what", "n"], [["a", "1"]])]}
    report.write("other", other, tmp_path)
    report.write("speed", part, tmp_path)
    figures = orjson.loads((tmp_path / report.FIGURES).read_bytes())
    assert figures == {"other": other, "speed": part}
    text = page.read_text()
    assert text.startswith("Before\n<!-- benchmark speed -->\n![")
    assert "| **dict rows** | 20 | 8,000 | 6,000 to 9,000 | 4.0 |" in text
    assert text.endswith("<!-- benchmark read -->\nNot measured yet.\n<!-- end -->\nAfter\n")
    chart = (tmp_path / report.CHART).read_text()
    assert chart.count("<rect") == 2
    assert '<rect x="230" y="82" width="300.0" height="16" class="ours"/>' in chart


def test_the_docs_show_the_figures_as_they_were_measured():
    page = (report.DOCS / report.PAGE).read_text()
    figures = orjson.loads((report.DOCS / report.FIGURES).read_bytes())
    assert page.count("<!-- benchmark ") == len({"speed", *scenarios.ALL})
    assert report.page_with_tables(page, figures) == page
    if "speed" in figures:
        assert (report.DOCS / report.CHART).read_text() == report.draw(figures["speed"])


@pytest.mark.kafka
def test_every_contender_publishes_what_a_reader_finds(local_kafka, tmp_path):
    program = speed.build_c(tmp_path)
    assert program if shutil.which("cc") else program is None
    data = speed.Data("small", speed.small_rows(200), "user", tmp_path)
    found = speed.measure_rounds(local_kafka, data, speed.contenders(program), 1)
    assert len(found["results"]) >= 12
    for name, result in found["results"].items():
        assert result["per_second"][0] > 0, name


@pytest.mark.kafka
def test_a_contender_that_loses_a_record_stops_the_benchmark(local_kafka, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "MARKERS", 0.5)
    data = speed.Data("small", speed.small_rows(3), "user", tmp_path)

    def lose_one(at):
        return speed.publish_in_step(at.servers, at.topic, lambda: at.data.dicts[1:], 2)

    loses = speed.Contender("loses", lose_one, transactional=True)
    with pytest.raises(RuntimeError, match="records found, 3 published"):
        speed.measure_rounds(local_kafka, data, [loses], 1)


@pytest.mark.kafka
@pytest.mark.parametrize("name", scenarios.ALL)
def test_each_scenario_runs(local_kafka, name):
    part = scenarios.ALL[name](local_kafka, quick=True)
    assert all(len(row) == len(table["columns"]) for table in part["tables"] for row in table["rows"])
    assert report.on_screen(part)


def test_an_unknown_part_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "sped"])
    with pytest.raises(SystemExit):
        command.main()
    assert "no such part: sped" in capsys.readouterr().err
