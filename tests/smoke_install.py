"""What a clean environment must be able to do with the wheel alone: `make build` runs this in one, in isolated mode."""

import importlib
import importlib.metadata
import sys
from pathlib import Path

import dagster as dg

import dataforge_kafka_dagster as package
from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerConfig, KafkaProducerResource


def refused(make, *said):
    try:
        make()
    except ValueError as error:
        assert all(word in str(error) for word in said), error  # noqa: PT017
    else:
        sys.exit(f"not refused: {said}")


root = Path(package.__file__).parent
assert "site-packages" in root.parts, root
assert (root / "py.typed").exists()
assert importlib.metadata.version("dataforge-kafka-dagster")
for name in package.__all__:
    assert getattr(package, name).__doc__, name

# Not even the modules of the optional packages may fail to import, but for the one that is a pytest plugin.
for path in sorted(root.rglob("*.py")):
    module = ".".join(["dataforge_kafka_dagster", *path.relative_to(root).with_suffix("").parts])
    if not module.endswith(("pytest_plugin", "__main__")):
        importlib.import_module(module.removesuffix(".__init__"))

assert KafkaProducerConfig().bootstrap_servers == ["localhost:9092"]
refused(lambda: KafkaProducerConfig(acks=2), "acks")
refused(lambda: KafkaProducerConfig(batch_sise=1), "batch_sise", "batch_size")
refused(lambda: KafkaProducerResource(bootstrap_servers="localhost:99999"), "bootstrap_servers", "99999")


@dg.asset(metadata={"kafka/topic": "numbers"})
def numbers() -> list[int]:
    return [1, 2, 3]


kafka = KafkaProducerResource(bootstrap_servers=dg.EnvVar("KAFKA_BOOTSTRAP_SERVERS"))
definitions = dg.Definitions(assets=[numbers], resources={"io_manager": KafkaIOManager(kafka=kafka)})
dg.Definitions.validate_loadable(definitions)
print(f"The wheel works without extras on Python {sys.version.split()[0]}")
