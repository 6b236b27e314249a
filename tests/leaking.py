"""Jobs that publish, and fail, with secrets from the environment at hand: none of them may be seen anywhere."""

import os

import dagster as dg

from dataforge_kafka_dagster import KafkaIOManager, KafkaProducerResource

SECRETS = (
    "PASSWORD",
    "WRONG",
    "RAW",
    "KEY",
    "KEY_PASSWORD",
    "OAUTH_CONFIG",
    "TOKEN",
    "REGISTRY_PASSWORD",
    "REGISTRY_TOKEN",
    "REGISTRY_KEY_PASSWORD",
)


def variable(name):
    """The environment variable that holds a setting or secret of the job."""
    return f"KAFKA_{name}_OF_TEST"


def _env(name):
    return dg.EnvVar(variable(name))


def _resource(**options):
    defaults = {
        "bootstrap_servers": _env("SERVERS"),
        "connect_timeout": 20,
        "step_retries": 0,
        "transactional_id_prefix": "secured",
        "librdkafka_config": {"debug": "security,conf", "ssl.keystore.password": _env("RAW")},
    }
    return KafkaProducerResource(**(defaults | options))


_SASL = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": "publisher"}
_OAUTH = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "OAUTHBEARER"}
_CERTIFICATE = {
    "security_protocol": "SSL",
    "ssl_ca_location": _env("CA"),
    "ssl_certificate_location": _env("CERTIFICATE"),
}

_REGISTRY = {**_SASL, "sasl_password": _env("PASSWORD"), "schema_registry_url": _env("REGISTRY")}

RESOURCES = {
    "kafka": _resource(**_SASL, sasl_password=_env("PASSWORD")),
    "locked_out": _resource(**_SASL, sasl_password=_env("WRONG"), connect_timeout=4),
    "mistaken": _resource(**(_SASL | {"security_protocol": _env("PROTOCOL")}), sasl_password=_env("PASSWORD")),
    "certified": _resource(**_CERTIFICATE, bootstrap_servers=_env("TLS_SERVERS"), ssl_key_pem=_env("KEY")),
    "locked_key": _resource(
        **_CERTIFICATE, ssl_key_location=_env("ENCRYPTED_KEY"), ssl_key_password=_env("KEY_PASSWORD")
    ),
    "with_token": _resource(**_OAUTH, sasl_oauthbearer_callback="secured:canary_token"),
    "without_token": _resource(
        **_OAUTH, sasl_oauthbearer_callback="secured:quoting_token", sasl_oauthbearer_config=_env("OAUTH_CONFIG")
    ),
    "with_registry_password": _resource(
        **_REGISTRY, schema_registry_username="user", schema_registry_password=_env("REGISTRY_PASSWORD")
    ),
    "with_registry_token": _resource(**_REGISTRY, schema_registry_token=_env("REGISTRY_TOKEN")),
    "with_registry_key": _resource(
        **_REGISTRY,
        schema_registry_ssl_certificate_location=_env("CERTIFICATE"),
        schema_registry_ssl_key_location=_env("ENCRYPTED_KEY"),
        schema_registry_client_config={"ssl.key.password": _env("REGISTRY_KEY_PASSWORD")},
    ),
}


@dg.op(out=dg.Out(io_manager_key="published"))
def publish() -> list:
    return [{"number": number} for number in range(5)]


@dg.op
def read(rows: list) -> None:
    assert len(rows) == 5


def _op(name, needs, **options):
    @dg.op(name=name, required_resource_keys={needs})
    def run(context) -> None:
        resource = getattr(context.resources, needs)
        with resource.publishing(context, topic=os.environ[variable("TOPIC")], **options) as publication:
            publication.send({"from": name})

    return run


@dg.op
def fail_at_topic(context, kafka: KafkaProducerResource) -> None:
    with kafka.publishing(context, topic="no-such-topic"):
        pass


@dg.op
def fail_with_all_reprs(context, kafka: KafkaProducerResource) -> None:
    writer_locals = (kafka, kafka.producer_config(), kafka.publication_config(), kafka.producer)
    raise RuntimeError(f"{writer_locals!r} {kafka!s} {context.resources!r}")


@dg.op
def leak(context) -> None:
    """Says a secret if it is asked to, so that the search for it is seen to find it."""
    if os.environ.get(variable("LEAK")):
        context.log.info(f"the password is {os.environ[variable('PASSWORD')]}")


_RESOURCES = {**RESOURCES, "published": KafkaIOManager(kafka=RESOURCES["kafka"], topic=_env("TOPIC"))}


@dg.job(executor_def=dg.multiprocess_executor.configured({"max_concurrent": 3}), resource_defs=_RESOURCES)
def in_processes() -> None:
    read(publish())
    _op("use_token", "with_token")()
    _op("fail_at_password", "locked_out")()
    fail_with_all_reprs()


@dg.job(executor_def=dg.in_process_executor, resource_defs=_RESOURCES)
def in_one_process() -> None:
    _op("use_certificate", "certified")()
    _op("fail_at_key", "locked_key")()
    _op("fail_at_token", "without_token")()
    _op("fail_at_registry_password", "with_registry_password", value_schema="latest")()
    _op("fail_at_registry_token", "with_registry_token", value_schema="latest")()
    _op("fail_at_registry_key", "with_registry_key", value_schema="latest")()
    fail_at_topic()
    leak()


@dg.job(executor_def=dg.in_process_executor, resource_defs=_RESOURCES)
def not_even_started() -> None:
    _op("fail_at_options", "mistaken")()


@dg.repository
def repository():
    return [in_processes, in_one_process, not_even_started]
