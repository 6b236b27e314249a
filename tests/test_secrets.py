"""Secrets stay secret: whatever fails, none is seen in what Dagster stores and shows, nor in any text of an object."""

import base64
import collections
import http.server
import json
import pickle
import threading
import traceback
import uuid
from pathlib import Path

import dagster as dg
import leaking
import pytest
from conftest import mostly_slow
from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster._core.remote_representation.external_data import RepositorySnap
from dagster._utils.error import serializable_error_info_from_exc_info
from secured import KEY_PASSWORD, password_of

from dataforge_kafka_dagster import KafkaError, KafkaIOManager, KafkaProducerConfig, KafkaProducerResource
from dataforge_kafka_dagster.kafka.config import SECRET_OPTIONS, PublicationConfig
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.publication import PublicationWriter

CANARY = f"canary-{uuid.uuid4().hex}"


def _forms(secret):
    """The ways in which a secret may stand in a file: as it is, each line of it, and base64 at any alignment."""
    lines = [line for line in secret.splitlines() if not line.startswith("-----")]
    for text in {secret, json.dumps(secret)[1:-1], *lines}:
        yield text.encode()
    for shift in range(3):
        text = base64.b64encode(b" " * shift + secret.encode()).decode()
        yield text[4 if shift else 0 : -4].encode()


def _found(secrets, content):
    """The names of the secrets in some content."""
    return {name for name, secret in secrets.items() if any(form in content for form in _forms(secret))}


def test_the_search_finds_a_secret_in_each_form():
    secret = f"-----BEGIN KEY-----\n{CANARY}\nline 2 of {CANARY}\n-----END KEY-----"
    secrets = {"one": secret, "other": "another-secret"}
    claims = {"sub": "me", "jti": "another-secret"}
    for content in (
        secret,
        f"x {CANARY} x",
        json.dumps({"a": secret}),
        base64.b64encode(f"{claims}".encode()).decode(),
        base64.b64encode(f"_{claims}".encode()).decode(),
        base64.b64encode(f"__{claims}".encode()).decode(),
    ):
        assert len(_found(secrets, f"before {content} after".encode())) == 1
    assert _found(secrets, b"nothing") == set()


@pytest.fixture(scope="module")
def topic(secured):
    secured.kafka.create_topic("secrets", partitions=2)
    return "secrets"


class _Quoting(http.server.BaseHTTPRequestHandler):
    """A Schema Registry that refuses everybody and quotes what it was given, as it came and decoded."""

    def do_GET(self):
        given = self.headers.get("Authorization", "")
        kind, _, what = given.partition(" ")
        plain = base64.b64decode(what).decode() if kind == "Basic" else what
        quoted = f"no access for {given}, which is {plain}"
        body = json.dumps({"error_code": 401, "message": quoted}).encode()
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def quoting_registry():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Quoting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


@pytest.fixture
def secrets(secured, topic, quoting_registry, monkeypatch):
    """The environment of `leaking`; its secrets by name."""
    made = secured.certificates
    canary = {name: f"{name.lower()}-{uuid.uuid4().hex}" for name in leaking.SECRETS}
    secrets = canary | {"PASSWORD": password_of("publisher"), "KEY": made.key.read_text()}
    settings = {
        "SERVERS": secured.kafka.servers_of("SASL"),
        "TLS_SERVERS": secured.kafka.servers_of("MUTUAL_TLS"),
        "TOPIC": topic,
        "REGISTRY": quoting_registry,
        "PROTOCOL": "PLAINTEXT",
        "CA": str(made.ca),
        "CERTIFICATE": str(made.client),
        "ENCRYPTED_KEY": str(made.encrypted_key),
    }
    for name, value in (settings | secrets).items():
        monkeypatch.setenv(leaking.variable(name), value)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return secrets | {"OTHER_KEY_PASSWORD": KEY_PASSWORD}


def _run(name, tmp_path, monkeypatch, op_selection=None):
    """Run a job, all logs at DEBUG: the ends of its steps, and all that the instance holds of it."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    logs = {"python_logs": {"managed_python_loggers": ["root"], "python_log_level": "DEBUG"}}
    console = {"loggers": {"console": {"config": {"log_level": "DEBUG"}}}}
    job = ReconstructableJob.for_file(leaking.__file__, name)
    with dg.instance_for_test(temp_dir=str(tmp_path), overrides=logs) as instance:
        # Not as a context manager: that would set up all resources here, where one cannot be.
        dg.execute_job(job, instance, run_config=console, op_selection=op_selection)
        (run,) = instance.get_runs()
        events = instance.all_logs(run.run_id)
        stored = [run, *events, instance.get_job_snapshot(run.job_snapshot_id)]
        stored.append(instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id))
        ended = collections.defaultdict(set)
        for event in events:
            if event.dagster_event is not None:
                ended[event.dagster_event.event_type_value].add(event.dagster_event.step_key)
        files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    texts = [f"{dg.serialize_value(thing)}\n{thing}".encode() for thing in stored]
    return ended, [*texts, *files]


RUNS = {
    "in_processes": (
        {"publish", "read", "use_token"},
        {"fail_at_password", "fail_with_all_reprs"},
        # What is searched does hold librdkafka's debug log, causes of failures and the events of processes.
        [b"SASLMECHS", b"Invalid username or password", b"STEP_WORKER_START", b"sasl_username='publisher'"],
    ),
    "in_one_process": (
        {"use_certificate", "leak"},
        {
            "fail_at_key",
            "fail_at_token",
            "fail_at_topic",
            "fail_at_registry_password",
            "fail_at_registry_token",
            "fail_at_registry_key",
        },
        [
            b"ssl.key.location failed",
            b"no token for ***",
            b"no-such-topic",
            b"no access for Basic ***",
            b"for Bearer ***",
            # Of httpcore's debug log, which has the headers of the registry's answers.
            b"receive_response_headers.complete",
        ],
    ),
    "not_even_started": (set(), set(), [b"sasl_password would be ignored"]),
}


@pytest.mark.kafka
@pytest.mark.parametrize("name", RUNS)
def test_no_secret_in_what_a_run_leaves_behind(name, secrets, tmp_path, monkeypatch):
    working, failing, said = RUNS[name]
    ended, contents = _run(name, tmp_path, monkeypatch)
    assert (ended["STEP_SUCCESS"], ended["STEP_FAILURE"]) == (working, failing)
    everything = b"\n".join(contents)
    assert [text for text in said if text not in everything] == []
    assert _found(secrets, everything) == set()


@pytest.mark.kafka
def test_the_search_sees_a_secret_that_a_run_leaks(secrets, tmp_path, monkeypatch):
    monkeypatch.setenv(leaking.variable("LEAK"), "1")
    _, contents = _run("in_one_process", tmp_path, monkeypatch, ["leak"])
    assert _found(secrets, b"\n".join(contents)) == {"PASSWORD"}


@pytest.mark.kafka
def test_no_secret_in_definitions(secrets):
    repository = dg.serialize_value(RepositorySnap.from_def(leaking.repository))
    jobs = (leaking.in_processes, leaking.in_one_process, leaking.not_even_started)
    for text in (repository, *(dg.serialize_value(job.get_job_snapshot()) for job in jobs)):
        assert leaking.variable("PASSWORD") in text
        assert _found(secrets, text.encode()) == set()


PEM = f"-----BEGIN CERTIFICATE-----\n{CANARY}\n-----END CERTIFICATE-----"
SECRET_CONFIGS = {
    "sasl_password": {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "PLAIN",
        "sasl_username": "user",
        "sasl_password": CANARY,
    },
    "sasl_oauthbearer_client_secret": {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "OAUTHBEARER",
        "sasl_oauthbearer_method": "oidc",
        "sasl_oauthbearer_client_id": "id",
        "sasl_oauthbearer_client_secret": CANARY,
        "sasl_oauthbearer_token_endpoint_url": "https://id.example.com",
    },
    "sasl_oauthbearer_config": {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "OAUTHBEARER",
        "sasl_oauthbearer_callback": "secured:quoting_token",
        "sasl_oauthbearer_config": CANARY,
    },
    "ssl_key_pem": {"security_protocol": "SSL", "ssl_certificate_pem": PEM, "ssl_key_pem": PEM},
    "ssl_key_password": {
        "security_protocol": "SSL",
        "ssl_certificate_pem": PEM,
        "ssl_key_pem": PEM,
        "ssl_key_password": CANARY,
    },
    "ssl_keystore_password": {
        "security_protocol": "SSL",
        "ssl_keystore_location": __file__,
        "ssl_keystore_password": CANARY,
    },
    "librdkafka_config": {"librdkafka_config": {"sasl.password": CANARY}},
}


def test_every_secret_option_is_tested():
    assert set(SECRET_CONFIGS) == {*SECRET_OPTIONS, "librdkafka_config"}


@pytest.mark.parametrize("options", mostly_slow(SECRET_CONFIGS.values(), 3), ids=SECRET_CONFIGS)
def test_no_secret_in_the_text_of_an_object(options):
    config = KafkaProducerConfig(bootstrap_servers="127.0.0.1:1", **options)
    publication = PublicationConfig(producer=config)
    resource = KafkaProducerResource(bootstrap_servers="127.0.0.1:1", **options)
    manager = KafkaIOManager(kafka=resource)
    writer = PublicationWriter(publication, transactional_id="t", publication_id="p", topic="t")
    with resource.process_config_and_initialize_cm() as resolved:
        for thing in (config, publication, resource, manager, resolved, writer, Connection(config)):
            assert CANARY not in f"{thing!r} {thing!s}"
    assert pickle.loads(pickle.dumps(config)) == config


def _texts_of(error):
    """All that Python and Dagster print of an error and its causes."""
    yield from traceback.TracebackException.from_exception(error).format()
    info = serializable_error_info_from_exc_info((type(error), error, error.__traceback__))
    yield from (str(info), dg.serialize_value(info), info.to_string(), repr(error), str(error))


@pytest.mark.parametrize("make", [KafkaProducerConfig, KafkaProducerResource])
@pytest.mark.parametrize("name", SECRET_CONFIGS)
@pytest.mark.parametrize("wrong", [[CANARY], {"a": CANARY}, CANARY.encode() + b"\xff"], ids=["list", "dict", "bytes"])
def test_no_secret_in_the_error_for_a_wrong_value(name, wrong, make):
    options = SECRET_CONFIGS[name] | {name: [wrong] if name == "librdkafka_config" else wrong}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        make(bootstrap_servers="127.0.0.1:1", **options)
    assert name in str(caught.value)
    for text in _texts_of(caught.value):
        assert CANARY not in text


@pytest.mark.parametrize("make", [KafkaProducerConfig, KafkaProducerResource])
def test_no_secret_in_the_error_for_another_option(make):
    for options in SECRET_CONFIGS.values():
        for wrong in ({"batch_size": -1}, {"no_such_option": 1}, {"security_protocol": "TLS"}):
            with pytest.raises(Exception) as caught:  # noqa: PT011
                make(**(options | wrong))
            for text in _texts_of(caught.value):
                assert CANARY not in text


@pytest.mark.parametrize(
    "name", ["sasl_oauthbearer_config", "ssl_key_pem", "ssl_key_password", "ssl_keystore_password"]
)
def test_no_secret_in_the_error_for_a_client_that_cannot_be_made(name):
    config = KafkaProducerConfig(bootstrap_servers="127.0.0.1:1", **SECRET_CONFIGS[name])
    with pytest.raises(KafkaError) as caught:
        _ = Connection(config).admin
    for text in _texts_of(caught.value):
        assert CANARY not in text


def test_no_secret_in_librdkafkas_debug_log(caplog):
    caplog.set_level("DEBUG")
    for name, options in SECRET_CONFIGS.items():
        raw = options.get("librdkafka_config", {}) | {"debug": "all"}
        config = KafkaProducerConfig(bootstrap_servers="127.0.0.1:1", **(options | {"librdkafka_config": raw}))
        try:
            admin = Connection(config).admin
        except KafkaError:
            assert name.startswith(("ssl_key", "sasl_oauthbearer_config"))
            continue
        admin.poll(0.3)
        del admin
    assert "Client configuration" in caplog.text or "initialized" in caplog.text
    assert CANARY not in caplog.text
