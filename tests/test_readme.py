import ast
import re
import textwrap
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from dataforge_kafka_dagster import KafkaProducerConfig

README = Path(__file__).parents[1] / "README.md"
LOCAL = "localhost:9092"
TOPICS = ["flights", "delays", "alerts", "notifications", "my-topic"]
"""What the README's examples publish to."""

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<tag>[^\n`]*)\n(?P<source>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)


def _blocks():
    """(line, tag, source) of each Python block."""
    text = README.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        tag = match["tag"].strip()
        if tag.split(" ")[0].split(",")[0] == "python":
            yield text.count("\n", 0, match.start()) + 2, tag, textwrap.dedent(match["source"])


BLOCKS = list(_blocks())


def test_the_readme_has_python_to_run():
    assert len([tag for _, tag, _ in BLOCKS if tag == "python"]) >= 2
    assert {tag for _, tag, _ in BLOCKS} <= {"python", "python no-run"}


@pytest.mark.parametrize(("line", "tag", "source"), BLOCKS, ids=[f"line {line}" for line, _, _ in BLOCKS])
def test_python_of_the_readme_compiles(line, tag, source):
    compile(source, f"{README.name}:{line}", "exec")


def test_the_table_of_options_has_the_defaults_of_the_config():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 8
    for name, default in rows:
        assert repr(KafkaProducerConfig.model_fields[name].get_default(call_default_factory=True)) == repr(
            ast.literal_eval(default)
        ), name


@pytest.fixture(scope="module")
def topics(kafka_bootstrap_servers):
    admin = AdminClient({"bootstrap.servers": kafka_bootstrap_servers})
    created = []
    for name, future in admin.create_topics([NewTopic(name, 2) for name in TOPICS], operation_timeout=30).items():
        try:
            future.result(30)
        except KafkaException as error:
            assert error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS  # noqa: PT017
        else:
            created.append(name)
    yield TOPICS
    for future in admin.delete_topics(created).values() if created else ():
        future.result(30)


@pytest.mark.kafka
def test_python_of_the_readme_runs_from_top_to_bottom(kafka_bootstrap_servers, topics, monkeypatch, tmp_path):
    """The blocks share their names, as a reader who pastes one after the other has it."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka_bootstrap_servers)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    ran = 0
    for line, tag, source in BLOCKS:
        if tag == "python":
            # Padded, so that a traceback names the README's lines.
            padded = "\n" * (line - 1) + source.replace(LOCAL, kafka_bootstrap_servers)
            exec(compile(padded, str(README), "exec"), names)
            ran += 1
    assert ran >= 2
