"""What the benchmark says: tables on the screen, figures as JSON, the tables in the docs, and a chart."""

import datetime as dt
import importlib.metadata
import os
import platform
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import orjson

DOCS = Path(__file__).parents[1] / "docs"
FIGURES = "benchmarks.json"
PAGE = "performance.md"
CHART = Path("images") / "benchmark.svg"


def progress(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> dict[str, Any]:
    """A table, as the JSON holds it; the first column is text, the others are figures."""
    return {"title": title, "columns": columns, "rows": rows}


def machine(files: Path) -> dict[str, str]:
    """Where and with what it was measured, and where the broker had its files."""
    cpu = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    names = ("confluent-kafka", "dagster", "orjson", "polars", "pandas", "pyarrow", "aiokafka", "kafka-python")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    from dataforge_kafka_dagster.local import KAFKA_VERSION  # noqa: PLC0415

    where = "in memory" if files.is_relative_to("/dev/shm") else "on a disk"
    return {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {cpu[1] if cpu else platform.processor()}, {platform.system()}, "
        f"the broker's files {where}",
        "load": f"{os.getloadavg()[0]:.1f} when it began",
        "versions": f"Python {platform.python_version()}, Apache Kafka {KAFKA_VERSION}, {', '.join(versions)}",
    }


def in_markdown(part: dict[str, Any]) -> str:
    """A part's tables for a page, with where they were measured."""
    lines = [f"![Records a second, by contender]({CHART.as_posix()})", ""] if "sets" in part else []
    for one in part["tables"]:
        lines += [f"**{one['title']}**", ""]
        lines.append("| " + " | ".join(one["columns"]) + " |")
        lines.append("| --- |" + " ---: |" * (len(one["columns"]) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in one["rows"]]
        lines.append("")
    measured = part["measured"]
    lines.append(
        f"Measured {measured['date']} on {measured['machine']} (load {measured['load']}); {measured['versions']}."
    )
    return "\n".join(lines)


def on_screen(part: dict[str, Any]) -> str:
    """A part's tables for a terminal."""
    lines = []
    for one in part["tables"]:
        rows = [[text.replace("**", "") for text in row] for row in [one["columns"], *one["rows"]]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append(f"\n{one['title']}")
        for row in rows:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append("  " + "  ".join(cells))
    return "\n".join(lines)


def page_with_tables(page: str, figures: dict[str, Any]) -> str:
    """The page with each table between its markers as the figures have it."""

    def fill(match: re.Match[str]) -> str:
        part = figures.get(match["part"])
        text = in_markdown(part) if part else "Not measured yet."
        return f"<!-- benchmark {match['part']} -->\n{text}\n<!-- end -->"

    return re.sub(r"<!-- benchmark (?P<part>\w+) -->\n.*?\n<!-- end -->", fill, page, flags=re.DOTALL)


def write(name: str, part: dict[str, Any], folder: Path) -> None:
    """Keep a part's figures: in the JSON, in the page if the folder has it, and in the chart."""
    file = folder / FIGURES
    figures = orjson.loads(file.read_bytes()) if file.exists() else {}
    figures[name] = part
    file.write_bytes(orjson.dumps(dict(sorted(figures.items())), option=orjson.OPT_INDENT_2) + b"\n")
    page = folder / PAGE
    if page.exists():
        page.write_text(page_with_tables(page.read_text(), figures))
    if name == "speed":
        (folder / CHART).parent.mkdir(exist_ok=True)
        (folder / CHART).write_text(draw(part))


def draw(part: dict[str, Any]) -> str:
    """The speed of every contender as bars, this project's in another colour: SVG."""
    label, width, height, step = 230, 300, 60, 22
    shapes = []
    left = 0
    for name, measured in part["sets"].items():
        rates = {who: statistics.median(found["per_second"]) for who, found in measured["results"].items()}
        title = f"{name}: {measured['record_bytes']:.0f} bytes a record, thousand records/s"
        shapes.append(f'<text x="{left + label}" y="30" class="title">{title}</text>')
        for number, (who, rate) in enumerate(rates.items()):
            y = height + number * step
            ours = ' class="ours"' if measured["results"][who]["ours"] else ""
            long = rate / max(rates.values()) * width
            shapes.append(f'<text x="{left + label - 8}" y="{y + 12}" text-anchor="end"{ours}>{who}</text>')
            shapes.append(f'<rect x="{left + label}" y="{y}" width="{long:.1f}" height="16"{ours}/>')
            shapes.append(f'<text x="{left + label + long + 6:.1f}" y="{y + 12}"{ours}>{rate / 1000:,.0f}</text>')
        left += label + width + 60
    tall = height + 20 + step * max(len(measured["results"]) for measured in part["sets"].values())
    style = (
        "text{font:12px system-ui,sans-serif;fill:#4b5563} rect{fill:#9ca3af} .title{font-size:13px;font-weight:600}"
        " text.ours{fill:#4338ca;font-weight:600} rect.ours{fill:#4f46e5}"
    )
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left} {tall}" width="{left}" height="{tall}">'
    background = '<path fill="#fff" d="M0 0h9999v9999H0z"/>'
    return "\n".join([opening, f"<style>{style}</style>", background, *shapes, "</svg>"]) + "\n"
