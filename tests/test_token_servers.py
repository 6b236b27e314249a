"""What OpenID Connect servers may answer librdkafka, which asks them itself, and what becomes of it."""

import base64
import http.server
import json
import subprocess
import sys
import threading
import time

import pytest

from dataforge_kafka_dagster import DataForgeKafkaProducer, KafkaError, KafkaProducerConfig
from dataforge_kafka_dagster.kafka.errors import Remedy

SECRET = "the client's secret"


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, kind, body = self.server.answer(self.headers)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def token_server():
    """A server that is busy, until its `answer` is another one."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        server.answer = lambda _: (503, "application/json", json.dumps({"error": "temporarily_unavailable"}))
        server.url = f"http://127.0.0.1:{server.server_port}/token"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)


def _options(servers, url, **options):
    return {
        "bootstrap_servers": servers,
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "OAUTHBEARER",
        "sasl_oauthbearer_method": "oidc",
        "sasl_oauthbearer_client_id": "me",
        "sasl_oauthbearer_client_secret": SECRET,
        "sasl_oauthbearer_token_endpoint_url": url,
        **options,
    }


# librdkafka asks a busy server again after 5, 10, 15 and 20 s, and its client cannot be ended in between.
_ASKS_AGAIN = 5.0
BUSY = """
import json, os, signal, sys, time
from dataforge_kafka_dagster import DataForgeKafkaProducer, KafkaError, KafkaProducerConfig
from dataforge_kafka_dagster.kafka.config import PublicationConfig
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.publication import publish

def stop(*_):
    raise SystemExit(3)

def terminate(_):
    print(json.dumps(time.monotonic()), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

what, options, is_terminated = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
if is_terminated:
    signal.signal(signal.SIGTERM, stop)
    Connection._serve_errors = terminate  # while it waits for an answer
config = KafkaProducerConfig(**options)
began = time.monotonic()
try:
    if what == "single":
        DataForgeKafkaProducer(config)
    else:
        publish(PublicationConfig(producer=config), [{}], transactional_id="t", publication_id="p", topic="t")
except KafkaError as error:
    said = [str(error), error.remedy.value]
print(json.dumps([*said, time.monotonic() - began, time.monotonic()]), flush=True)
"""


def _end(*arguments):
    """What such a process says, how it ends, and when, by the clock of `time.monotonic`."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(10)
    assert said, errors
    return json.loads(said), process.returncode, time.monotonic()


@pytest.mark.parametrize("what", ["single", "publication"])
def test_a_busy_token_server_is_named_and_holds_nothing_up(what, token_server, closed_port):
    options = _options(closed_port, token_server.url, connect_timeout=0.5)
    (text, remedy, took, said), code, ended = _end(what, json.dumps(options), "false")
    assert text.startswith(f"sasl_oauthbearer_token_endpoint_url={token_server.url!r}, or Kafka at {closed_port}: ")
    assert "no token came" in text
    assert (remedy, code) == ("retry", 0)
    assert took + ended - said < _ASKS_AGAIN


@pytest.mark.parametrize("what", ["single", "publication"])
def test_a_process_that_waits_for_a_busy_token_server_ends_when_it_is_terminated(what, token_server, closed_port):
    options = _options(closed_port, token_server.url, connect_timeout=60)
    terminated, code, ended = _end(what, json.dumps(options), "true")
    assert code == 3
    assert ended - terminated < 3  # two seconds are promised; the machine may be busy


def _refusal(servers, url, connect_timeout=20, **options):
    options = _options(servers, url, connect_timeout=connect_timeout, **options)
    with pytest.raises(KafkaError) as caught:
        DataForgeKafkaProducer(KafkaProducerConfig(**options))
    return caught.value


@pytest.mark.parametrize(
    "raw", [{}, {"sasl.oauthbearer.client.credentials.client.secret": SECRET[::-1]}], ids=["", "raw"]
)
def test_no_secret_in_what_a_token_server_quotes(raw, token_server, closed_port, caplog):
    def quote(headers):
        basic = headers["Authorization"].partition(" ")[2]
        quoted = {"error": "invalid_client", "error_description": f"{basic} is {base64.b64decode(basic).decode()}"}
        return 401, "application/json", json.dumps(quoted)

    caplog.set_level("DEBUG")
    token_server.answer = quote
    error = _refusal(closed_port, token_server.url, librdkafka_config=raw)
    assert "*** is me:***" in error.cause
    assert "Failed to retrieve OIDC token" in caplog.text
    for secret in (SECRET, SECRET[::-1]):
        for form in (secret, base64.b64encode(f"me:{secret}".encode()).decode()):
            assert form not in f"{error} {caplog.text}"


_ERROR = json.dumps({"error": "invalid_client"})
ANSWERS = {
    "refused": (
        (401, "application/json", _ERROR),
        "HTTP status 401, ",
        "sasl_oauthbearer_client_secret",
        Remedy.FAIL,
    ),
    "refused in HTML": (
        (403, "text/html", "<html>no"),
        "HTTP status 403, <html>no",
        "sasl_oauthbearer_client_id",
        Remedy.FAIL,
    ),
    "refused without a word": ((401, "text/plain", ""), "HTTP status 401, ", "sasl_oauthbearer_client_id", Remedy.FAIL),
    "another address": ((404, "text/html", "<html>"), "HTTP status 404, <html>", "this address", Remedy.FAIL),
    "a fault of its own": ((501, "application/json", _ERROR), "HTTP status 501, ", "this address", Remedy.RETRY),
    "no token": ((200, "application/json", "{}"), "access_token", "gives no token that is a JWT", Remedy.FAIL),
    "HTML": ((200, "text/html", "<html>"), "not JSON", "gives no token that is a JWT", Remedy.FAIL),
    "no JWT": (
        (200, "application/json", json.dumps({"access_token": "opaque"})),
        "JWT",
        "gives no token that is a JWT",
        Remedy.FAIL,
    ),
}


@pytest.mark.parametrize(("answer", "said", "fix", "remedy"), ANSWERS.values(), ids=ANSWERS)
def test_what_a_token_server_answers_says_whether_it_is_asked_again(
    answer, said, fix, remedy, token_server, closed_port
):
    token_server.answer = lambda _: answer
    error = _refusal(closed_port, token_server.url, connect_timeout=20 if remedy is Remedy.FAIL else 1)
    assert token_server.url in error.culprit
    assert said in error.cause
    assert fix in error.fix
    assert error.remedy is remedy
    assert "opaque" not in str(error)


def test_raw_settings_of_a_token_server_are_named_as_they_were_given(token_server, closed_port):
    token_server.answer = lambda _: (401, "application/json", _ERROR)
    raw = {
        "sasl.oauthbearer.method": "oidc",
        "sasl.oauthbearer.client.id": "me",
        "sasl.oauthbearer.client.secret": SECRET,
        "sasl.oauthbearer.token.endpoint.url": token_server.url,
    }
    oauth = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "OAUTHBEARER", "connect_timeout": 20}
    with pytest.raises(KafkaError) as caught:
        DataForgeKafkaProducer(KafkaProducerConfig(bootstrap_servers=closed_port, **oauth, librdkafka_config=raw))
    assert f"'sasl.oauthbearer.token.endpoint.url': '{token_server.url}'" in caught.value.culprit
    assert "sasl_oauthbearer" not in str(caught.value)
    assert caught.value.remedy is Remedy.FAIL


def test_settings_by_which_no_token_can_be_asked_for_fail(closed_port):
    raw = {"enable.sasl.oauthbearer.unsecure.jwt": "true", "sasl.oauthbearer.config": "principal=me nonsense"}
    oauth = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "OAUTHBEARER", "connect_timeout": 20}
    with pytest.raises(KafkaError, match=r"Check the settings of sasl\.oauthbearer in librdkafka_config") as caught:
        DataForgeKafkaProducer(KafkaProducerConfig(bootstrap_servers=closed_port, **oauth, librdkafka_config=raw))
    assert caught.value.remedy is Remedy.FAIL
