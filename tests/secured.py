"""A real Kafka with SASL, TLS and ACLs, its users and certificates, for the tests of security.

Whoever connects to its PLAINTEXT listener is a super user; on the others, `USERS` are, with their ACLs.
"""

import base64
import contextlib
import datetime as dt
import http.server
import json
import os
import ssl
import threading
import time
import urllib.parse
from ipaddress import IPv4Address
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    pkcs12,
)

from dataforge_kafka_dagster.local import LocalKafka

PREFIX = "secured"
"""Begins transactional ids and ledger groups here; the ACLs name it."""
KEY_PASSWORD = "the key's password"

_TOPIC, _GROUP, _TRANSACTIONAL_ID = ResourceType.TOPIC, ResourceType.GROUP, ResourceType.TRANSACTIONAL_ID
_READ, _WRITE, _DESCRIBE = AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE

_PUBLISHER = ((_TOPIC, _WRITE), (_TOPIC, _READ), (_TRANSACTIONAL_ID, _WRITE), (_GROUP, _READ))
USERS = {
    "publisher": _PUBLISHER,
    "without-transactions": ((_TOPIC, _WRITE), (_TOPIC, _READ)),
    "without-group": [grant for grant in _PUBLISHER if grant != (_GROUP, _READ)],
    "without-topic-read": [grant for grant in _PUBLISHER if grant != (_TOPIC, _READ)],
    "without-write": ((_TOPIC, _DESCRIBE), (_TRANSACTIONAL_ID, _WRITE), (_GROUP, _READ)),
    "without-topic": ((_TRANSACTIONAL_ID, _WRITE), (_GROUP, _READ)),
}
"""The ACLs of each user. READ and WRITE imply DESCRIBE."""

_LOGIN = "org.apache.kafka.common.security"


def password_of(user):
    return f"the password of {user}"


def unsecured_token(user):
    """A token that the broker believes: `sasl_oauthbearer_callback="secured:unsecured_token"`."""
    now = time.time()
    return _unsecured({"sub": user or "publisher", "iat": now - 10, "exp": now + 3600}), now + 3600


def _unsecured(claims):
    parts = (json.dumps(part).encode() for part in ({"alg": "none"}, claims))
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + "."


def canary_token(_):
    """A token that holds the secret in KAFKA_TOKEN_OF_TEST."""
    now = time.time()
    claims = {"sub": "publisher", "iat": now - 10, "exp": now + 3600, "jti": os.environ["KAFKA_TOKEN_OF_TEST"]}
    return _unsecured(claims), now + 3600


def quoting_token(config):
    raise RuntimeError(f"no token for {config}")


def broken_token(_):
    raise RuntimeError("the token server is closed on Sundays")


def garbage_token(_):
    return "no token at all", time.time() + 3600


class Certificates:
    """A CA, the broker's certificate and a client's, as PEM files in a folder; and a CA that signed none of them."""

    def __init__(self, folder: Path, client: str) -> None:
        self.folder = folder
        self._ca, self._ca_key = self._signed("the CA", ca=True)
        self.ca = self._write("ca.pem", self._ca)
        self.other_ca = self._write("other-ca.pem", self._signed("another CA", ca=True)[0])
        names = [x509.IPAddress(IPv4Address("127.0.0.1")), x509.DNSName("localhost")]
        certificate, key = self._signed("the broker", names)
        self.broker = self._write("broker.pem", key, certificate)
        certificate, key = self._signed(client)
        self.client = self._write("client.pem", certificate)
        self.key = self._write("key.pem", key)
        certificate_then, key_then = self._signed(client, until=dt.timedelta(minutes=-1))
        self.expired = self._write("expired.pem", certificate_then)
        self.expired_key = self._write("expired-key.pem", key_then)
        password = KEY_PASSWORD.encode()
        encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
        self.encrypted_key = folder / "encrypted-key.pem"
        self.encrypted_key.write_bytes(encrypted)
        self.keystore = folder / "client.p12"
        self.keystore.write_bytes(
            pkcs12.serialize_key_and_certificates(b"me", key, certificate, None, BestAvailableEncryption(password))
        )

    def _signed(self, name, alternatives=(), *, ca=False, until=dt.timedelta(days=1)):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = dt.datetime.now(dt.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if ca else self._ca.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + until)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(key if ca else self._ca_key, hashes.SHA256()), key

    def _write(self, name, *things):
        path = self.folder / name
        path.write_bytes(b"".join(_pem(thing) for thing in things))
        return path


def _pem(thing):
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(Encoding.PEM)
    return thing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class _TokenHandler(http.server.BaseHTTPRequestHandler):
    """An OpenID Connect server's token endpoint for the client credentials grant (RFC 6749, 4.4)."""

    def do_POST(self):
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = dict(urllib.parse.parse_qsl(form))
        _, _, given = self.headers.get("Authorization", "").partition(" ")
        user, _, password = base64.b64decode(given).decode().partition(":")
        if asked["grant_type"] == "client_credentials" and password == password_of(user):
            token, until = unsecured_token(user)
            self._answer(200, {"access_token": token, "token_type": "Bearer", "expires_in": int(until - time.time())})
        else:
            self._answer(401, {"error": "invalid_client", "error_description": "no such client, or another secret"})

    def _answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def token_endpoint(certificates):
    """Its https address, until the end of the with block."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _TokenHandler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates.broker)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}/token"
        finally:
            server.shutdown()
            thread.join(10)


class SecuredKafka:
    """The broker, and the options with which a user gets in."""

    def __init__(self, kafka, certificates, token_url):
        self.kafka = kafka
        self.certificates = certificates
        self.token_url = token_url
        self.tls = {"security_protocol": "SSL", "ssl_ca_location": str(certificates.ca)}

    def sasl(self, user="publisher", mechanism="SCRAM-SHA-512", listener="SASL"):
        """Options of one who has a password; listener SASL or SASL_TLS."""
        tls = {"security_protocol": "SASL_SSL", "ssl_ca_location": str(self.certificates.ca)}
        return {
            "bootstrap_servers": self.kafka.servers_of(listener),
            "sasl_mechanism": mechanism,
            "sasl_username": user,
            "sasl_password": password_of(user),
            **(tls if listener == "SASL_TLS" else {"security_protocol": "SASL_PLAINTEXT"}),
        }

    def oauth(self, callback="unsecured_token", user=None):
        """Options of one who has a token."""
        return {
            "bootstrap_servers": self.kafka.servers_of("SASL"),
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": "OAUTHBEARER",
            "sasl_oauthbearer_callback": f"secured:{callback}",
            "sasl_oauthbearer_config": user,
        }

    def oidc(self, **how):
        """Options of one for whom librdkafka fetches the token from an OpenID Connect server."""
        return {
            "bootstrap_servers": self.kafka.servers_of("SASL"),
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": "OAUTHBEARER",
            "sasl_oauthbearer_method": "oidc",
            "sasl_oauthbearer_token_endpoint_url": self.token_url,
            "sasl_oauthbearer_client_id": "publisher",
            "sasl_oauthbearer_client_secret": password_of("publisher"),
            "https_ca_location": str(self.certificates.ca),
            **how,
        }

    def grant(self, user, topic, operation):
        """Let a user do something with one topic."""
        kind, pattern = AclPermissionType.ALLOW, ResourcePatternType.LITERAL
        binding = AclBinding(_TOPIC, topic, pattern, f"User:{user}", "*", operation, kind)
        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap_servers})
        admin.create_acls([binding])[binding].result(30)

    def mutual_tls(self, **how):
        """Options of one who has a certificate."""
        return {"bootstrap_servers": self.kafka.servers_of("MUTUAL_TLS"), **self.tls, **how}


@contextlib.contextmanager
def secured_kafka(folder):
    """A `SecuredKafka`, until the end of the with block."""
    certificates = Certificates(folder, "publisher")
    mechanisms = {
        "plain": f"{_LOGIN}.plain.PlainLoginModule required "
        + " ".join(f'user_{user}="{password_of(user)}"' for user in USERS)
        + ";",
        "scram-sha-256": f"{_LOGIN}.scram.ScramLoginModule required;",
        "scram-sha-512": f"{_LOGIN}.scram.ScramLoginModule required;",
        "oauthbearer": f"{_LOGIN}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub=broker;",
    }
    sasl = ("sasl", "sasl_tls")
    config = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "sasl.enabled.mechanisms": ",".join(name.upper() for name in mechanisms),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(certificates.broker),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(certificates.ca),
        "listener.name.mutual_tls.ssl.client.auth": "required",
        "listener.name.mutual_tls.ssl.principal.mapping.rules": "RULE:^CN=([^,]+).*$/$1/",
        **{f"listener.name.{at}.{name}.sasl.jaas.config": login for at in sasl for name, login in mechanisms.items()},
    }
    scram = [
        argument
        for user in USERS
        for number in (256, 512)
        for argument in ("--add-scram", f"SCRAM-SHA-{number}=[name={user},password={password_of(user)}]")
    ]
    protocols = {"SASL": "SASL_PLAINTEXT", "SASL_TLS": "SASL_SSL", "TLS": "SSL", "MUTUAL_TLS": "SSL"}
    with LocalKafka(listeners=protocols, config=config, format_args=scram, heap="256m") as kafka:
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
        bindings = [_binding(user, *grant) for user, grants in USERS.items() for grant in grants]
        for future in admin.create_acls(bindings).values():
            future.result(30)
        with token_endpoint(certificates) as token_url:
            yield SecuredKafka(kafka, certificates, token_url)


def _binding(user, resource, operation):
    name, pattern = ("*", ResourcePatternType.LITERAL) if resource == _TOPIC else (PREFIX, ResourcePatternType.PREFIXED)
    return AclBinding(resource, name, pattern, f"User:{user}", "*", operation, AclPermissionType.ALLOW)
