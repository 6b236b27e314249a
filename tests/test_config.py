import base64
import json
import os
import pickle
import re
import sys
import threading
import time
import traceback
import urllib.parse
from urllib.parse import quote, quote_plus

import botocore.exceptions as aws
import confluent_kafka
import dagster as dg
import pytest
from pydantic import ValidationError

from dataforge_kafka_dagster import KafkaProducerConfig, KafkaProducerResource, create_kafka_producer
from dataforge_kafka_dagster.kafka.config import (
    COMPRESSION_TYPES,
    SECRET_OPTIONS,
    PublicationConfig,
    check_topic,
    client_options,
    oauth_callback,
    producer_options,
    publication_options,
)
from dataforge_kafka_dagster.kafka.connection import Connection
from dataforge_kafka_dagster.kafka.errors import KafkaConfigError, KafkaError, Remedy
from dataforge_kafka_dagster.kafka.registry import SchemaRegistryConfig

CANARY = "canary-8d1f"
PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


def test_names_and_defaults_are_those_of_the_dataforge_table():
    table = {
        "bootstrap_servers": ["localhost:9092"],
        "client_id": None,
        "acks": "all",
        "retries": 3,
        "batch_size": 16384,
        "linger_ms": 5,
        "buffer_memory": 33554432,
        "compression_type": "snappy",
    }
    config = KafkaProducerConfig()
    assert {name: getattr(config, name) for name in table} == table
    assert type(config.bootstrap_servers) is list


def test_every_option_is_described():
    for model in (KafkaProducerConfig, PublicationConfig):
        for name, field in model.model_fields.items():
            assert field.description, name
            assert field.description.endswith((".", "?")), name


OAUTH = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}
OIDC = {
    "sasl_oauthbearer_method": "OIDC",
    "sasl_oauthbearer_client_id": "me",
    "sasl_oauthbearer_client_secret": CANARY,
    "sasl_oauthbearer_token_endpoint_url": "https://id.example.com/token",
}
MSK = {"security_protocol": "SASL_SSL", "sasl_mechanism": "aws_msk_iam", "sasl_aws_region": "eu-central-1"}

REFUSED = {
    "unknown name": ({"compresion_type": "gzip"}, ["compresion_type", "compression_type"]),
    "unknown name like none": ({"zzzzqqqq": 1}, ["zzzzqqqq", "bootstrap_servers", "compression_type"]),
    "dotted name": ({"batch.size": 1}, ["batch.size", "batch_size", "librdkafka_config"]),
    "a name in capitals": ({"BOOTSTRAP_SERVERS": "a:1"}, ["BOOTSTRAP_SERVERS", "mean 'bootstrap_servers'"]),
    "another client's name": ({"ssl_cafile": "ca.pem"}, ["ssl_cafile", "did you mean 'ssl_ca_location'?"]),
    "another client's name of a raw setting": (
        {"max_request_size": 2_000_000},
        ["max_request_size", "set 'message.max.bytes' in librdkafka_config"],
    ),
    "another client's serializer": ({"value_serializer": str}, ["value_serializer", "serialize before you send"]),
    "raw reports of errors only": (
        {"librdkafka_config": {"delivery.report.only.error": True}},
        ["delivery.report.only.error", "Leave it out"],
    ),
    "batch_size negative": ({"batch_size": -1}, ["batch_size", "-1", "1 to 2147483647"]),
    "batch_size zero": ({"batch_size": 0}, ["batch_size=0", "1 to"]),
    "batch_size too large": ({"batch_size": 2**31}, ["batch_size", str(2**31), "2147483647"]),
    "batch_size bool": ({"batch_size": True}, ["batch_size", "True", "number"]),
    "batch_size text": ({"batch_size": "large"}, ["batch_size", "large", "number"]),
    "batch_size None": ({"batch_size": None}, ["batch_size", "None", "number"]),
    "batch_size fraction": ({"batch_size": 1.5}, ["batch_size", "1.5"]),
    "retries negative": ({"retries": -1}, ["retries", "-1", "0 to"]),
    "retries bool": ({"retries": False}, ["retries", "False"]),
    "linger_ms negative": ({"linger_ms": -0.5}, ["linger_ms", "-0.5", "0 to 900000"]),
    "linger_ms as long as delivery_timeout": (
        {"linger_ms": 30_000, "delivery_timeout": 30},
        ["delivery_timeout=30 s", "linger_ms=30000", "lower linger_ms"],
    ),
    "linger_ms nan": ({"linger_ms": float("nan")}, ["linger_ms", "nan"]),
    "buffer_memory small": ({"buffer_memory": 1023}, ["buffer_memory", "1023", "1024 to"]),
    "buffer_memory inf": ({"buffer_memory": float("inf")}, ["buffer_memory", "inf"]),
    "acks 2": ({"acks": 2}, ["acks", "2", "'all', -1, 0 and 1"]),
    "acks text": ({"acks": "most"}, ["acks", "most", "'all'"]),
    "acks bool": ({"acks": True}, ["acks", "True", "'all'"]),
    "acks None": ({"acks": None}, ["acks", "None"]),
    "servers empty list": ({"bootstrap_servers": []}, ["bootstrap_servers", "[]", "localhost:9092"]),
    "servers empty text": ({"bootstrap_servers": ""}, ["bootstrap_servers", "''", "localhost:9092"]),
    "servers commas": ({"bootstrap_servers": " , "}, ["bootstrap_servers", "localhost:9092"]),
    "servers of a variable that is not set": ({"bootstrap_servers": None}, ["bootstrap_servers=None", "variable set"]),
    "server of a variable that is not set": (
        {"bootstrap_servers": [None]},
        ["bootstrap_servers=[None]", "variable set"],
    ),
    "servers number": ({"bootstrap_servers": 9092}, ["bootstrap_servers", "str"]),
    "servers list of numbers": ({"bootstrap_servers": ["a:1", 2]}, ["bootstrap_servers", "str"]),
    "server with port 0": ({"bootstrap_servers": "a:0"}, ["bootstrap_servers", "a:0", "1 to 65535"]),
    "server with port 65536": ({"bootstrap_servers": ["a:65536"]}, ["bootstrap_servers", "a:65536", "65535"]),
    "server with port text": ({"bootstrap_servers": ["a:kafka"]}, ["bootstrap_servers", "a:kafka", "host:port"]),
    "server with space": ({"bootstrap_servers": ["a b:1"]}, ["bootstrap_servers", "a b:1", "host:port"]),
    "server as URL": ({"bootstrap_servers": "http://a:1"}, ["bootstrap_servers", "http://a:1", "host:port"]),
    "codec": ({"compression_type": "brotli"}, ["compression_type", "brotli", *COMPRESSION_TYPES]),
    "codec number": ({"compression_type": 5}, ["compression_type", "str"]),
    "client_id number": ({"client_id": 5}, ["client_id", "str"]),
    "connect_timeout 0": ({"connect_timeout": 0}, ["connect_timeout", "0.001 to"]),
    "connect_timeout long": ({"connect_timeout": 301}, ["connect_timeout", "300"]),
    "delivery_timeout": ({"delivery_timeout": -1}, ["delivery_timeout", "0.001 to"]),
    "raw not text": ({"librdkafka_config": {"a": [1]}}, ["librdkafka_config", "str"]),
    "raw not mapping": ({"librdkafka_config": "a=b"}, ["librdkafka_config", "dict"]),
    "protocol": ({"security_protocol": "TLS"}, ["security_protocol", "TLS", "SASL_SSL", "PLAINTEXT"]),
    "GSSAPI": (
        {"security_protocol": "SASL_SSL", "sasl_mechanism": "GSSAPI"},
        ["sasl_mechanism", "GSSAPI", "Kerberos", "SCRAM-SHA-512"],
    ),
    "mechanism": (
        {"security_protocol": "SASL_SSL", "sasl_mechanism": "MD5"},
        ["sasl_mechanism", "MD5", "SCRAM-SHA-256", "PLAIN"],
    ),
    "SASL option without SASL": ({"sasl_password": CANARY}, ["sasl_password", "PLAINTEXT", "SASL_SSL"]),
    "SASL without mechanism": ({"security_protocol": "SASL_SSL"}, ["security_protocol", "sasl_mechanism", "PLAIN"]),
    "SASL without password": (
        {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": "u"},
        ["PLAIN", "sasl_username", "sasl_password"],
    ),
    "OAUTHBEARER without token": (
        {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"},
        ["OAUTHBEARER", "sasl_oauthbearer_callback", "oidc"],
    ),
    "TLS option without TLS": ({"ssl_ca_pem": CANARY}, ["ssl_ca_pem", "PLAINTEXT", "SSL"]),
    "missing CA file": (
        {"security_protocol": "SSL", "ssl_ca_location": "/no/ca.pem"},
        ["ssl_ca_location", "/no/ca.pem", "no such file"],
    ),
    "verification off without TLS": (
        {"enable_ssl_certificate_verification": False},
        ["enable_ssl_certificate_verification", "would be ignored", "PLAINTEXT"],
    ),
    "CA twice": (
        {"security_protocol": "SSL", "ssl_ca_location": "/", "ssl_ca_pem": CANARY},
        ["ssl_ca_location", "ssl_ca_pem", "one of them"],
    ),
    "certificate without key": (
        {"security_protocol": "SSL", "ssl_certificate_pem": CANARY},
        ["certificate", "private key", "both"],
    ),
    "file that is not there, relative": (
        {"security_protocol": "SSL", "ssl_ca_location": "no/ca.pem"},
        ["ssl_ca_location", "no/ca.pem", "no such file", "absolute path"],
    ),
    "folder for a file": (
        {"security_protocol": "SSL", "ssl_crl_location": "/"},
        ["ssl_crl_location", "folder"],
    ),
    "PEM that is a path": (
        {"security_protocol": "SSL", "ssl_ca_pem": "/etc/ca.pem"},
        ["ssl_ca_pem", "no PEM text", "ssl_ca_location"],
    ),
    "key password without key": ({"security_protocol": "SSL", "ssl_key_password": CANARY}, ["ssl_key_password"]),
    "key store without password": (
        {"security_protocol": "SSL", "ssl_keystore_location": __file__},
        ["ssl_keystore_location", "ssl_keystore_password", "both"],
    ),
    "key store and certificate": (
        {
            "security_protocol": "SSL",
            "ssl_keystore_location": __file__,
            "ssl_keystore_password": CANARY,
            "ssl_certificate_location": __file__,
            "ssl_key_location": __file__,
        },
        ["ssl_keystore_location", "ssl_certificate_location", "one of them"],
    ),
    "host name check": (
        {"security_protocol": "SSL", "ssl_endpoint_identification_algorithm": "never"},
        ["ssl_endpoint_identification_algorithm", "never", "https", "none"],
    ),
    "Kerberos option": (
        {"sasl_kerberos_keytab": "/k"},
        ["sasl_kerberos_keytab", "Kerberos", "PLAIN", "librdkafka_config"],
    ),
    "password for OAUTHBEARER": (
        OAUTH | {"sasl_oauthbearer_callback": "os.path:join", "sasl_password": CANARY},
        ["sasl_password", "ignored", "OAUTHBEARER"],
    ),
    "token for SCRAM": (
        {
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_username": "u",
            "sasl_password": CANARY,
            "sasl_oauthbearer_client_secret": CANARY,
        },
        ["sasl_oauthbearer_client_secret", "ignored", "SCRAM-SHA-512"],
    ),
    "two sources of a token": (
        OAUTH | OIDC | {"sasl_oauthbearer_callback": "os.path:join"},
        ["sasl_oauthbearer_callback", "oidc", "exclude"],
    ),
    "OIDC without secret": (
        OAUTH | OIDC | {"sasl_oauthbearer_client_secret": None},
        ["oidc", "needs sasl_oauthbearer_client_secret"],
    ),
    "password in the address of OIDC": (
        OAUTH | OIDC | {"sasl_oauthbearer_token_endpoint_url": f"https://user:a/{CANARY}@id.example.com/token"},
        ["sasl_oauthbearer_token_endpoint_url", "set sasl_oauthbearer_client_id"],
    ),
    "address of OIDC without scheme": (
        OAUTH | OIDC | {"sasl_oauthbearer_token_endpoint_url": "id.example.com/token"},
        ["sasl_oauthbearer_token_endpoint_url", "'https://host:port'"],
    ),
    "text for OIDC": (
        OAUTH | OIDC | {"sasl_oauthbearer_config": CANARY},
        ["sasl_oauthbearer_config", "ignored", "oidc"],
    ),
    "OIDC's options with callback": (
        OAUTH | OIDC | {"sasl_oauthbearer_callback": "os.path:join", "sasl_oauthbearer_method": "default"},
        ["sasl_oauthbearer_client_id, sasl_oauthbearer_client_secret, sasl_oauthbearer_token_endpoint_url", "ignored"],
    ),
    "extension without value": (
        OAUTH | OIDC | {"sasl_oauthbearer_extensions": "a=b, noequals"},
        ["sasl_oauthbearer_extensions='noequals'", "name=value"],
    ),
    "extension with a name that is none": (
        OAUTH | OIDC | {"sasl_oauthbearer_extensions": "bad key=1"},
        ["sasl_oauthbearer_extensions='bad key'", "letters"],
    ),
    "CA of OIDC with callback": (
        OAUTH | {"sasl_oauthbearer_callback": "os.path:join", "https_ca_location": __file__},
        ["https_ca_location", "ignored", "sasl_oauthbearer_callback"],
    ),
    "way to a token": (OAUTH | {"sasl_oauthbearer_method": "jwt"}, ["sasl_oauthbearer_method", "jwt", "oidc"]),
    "callback that is no path": (
        OAUTH | {"sasl_oauthbearer_callback": "os.path.join"},
        ["sasl_oauthbearer_callback", "os.path.join", "package.module:function"],
    ),
    "CA of OIDC without OAUTHBEARER": (
        {"https_ca_location": __file__},
        ["https_ca_location", "PLAINTEXT", "SASL_SSL"],
    ),
    "MSK without region": (
        {"security_protocol": "SASL_SSL", "sasl_mechanism": "AWS_MSK_IAM"},
        ["AWS_MSK_IAM", "needs sasl_aws_region"],
    ),
    "MSK without TLS": (
        {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "AWS_MSK_IAM", "sasl_aws_region": "eu-west-1"},
        ["AWS_MSK_IAM", "SASL_SSL"],
    ),
    "MSK with password": (MSK | {"sasl_password": CANARY}, ["sasl_password", "ignored", "AWS_MSK_IAM"]),
    "MSK with profile and role": (
        MSK | {"sasl_aws_profile": "p", "sasl_aws_role_arn": "arn:aws:iam::1:role/r"},
        ["sasl_aws_profile", "sasl_aws_role_arn", "exclude"],
    ),
    "region without MSK": (
        OAUTH | {"sasl_oauthbearer_callback": "os.path:join", "sasl_aws_region": "eu-west-1"},
        ["sasl_aws_region", "ignored"],
    ),
    "password in the servers": (
        {"bootstrap_servers": f"SASL_SSL://user:{CANARY}@a:9092"},
        ["bootstrap_servers", "***@a:9092", "host:port"],
    ),
    "password with a comma in the servers": (
        {"bootstrap_servers": f"user:{CANARY},{CANARY}@a:9092,b:9092"},
        ["bootstrap_servers='***@a:9092,b:9092'", "host:port"],
    ),
    "key without certificate": ({"security_protocol": "SSL", "ssl_key_pem": CANARY}, ["certificate", "key", "both"]),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_wrong_options_are_refused_with_option_value_and_what_is_allowed(options, said):
    with pytest.raises(ValidationError) as caught:
        KafkaProducerConfig(**options)
    message = str(caught.value)
    assert [part for part in said if part not in message] == []
    assert CANARY not in message


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (KafkaProducerConfig, {"bootstrap_servers": dg.EnvVar("NAME_OF_VARIABLE")}),
        (KafkaProducerConfig, {"bootstrap_servers": ["a:1", dg.EnvVar("NAME_OF_VARIABLE")]}),
        (KafkaProducerConfig, {"security_protocol": "SASL_SSL", "sasl_password": dg.EnvVar("NAME_OF_VARIABLE")}),
        (KafkaProducerConfig, {"acks": dg.EnvVar("NAME_OF_VARIABLE")}),
        (KafkaProducerConfig, {"retries": dg.EnvVar.int("NAME_OF_VARIABLE")}),
        (KafkaProducerConfig, {"librdkafka_config": {"client.rack": dg.EnvVar("NAME_OF_VARIABLE")}}),
        (lambda **options: create_kafka_producer(options), {"client_id": dg.EnvVar("NAME_OF_VARIABLE")}),
        (SchemaRegistryConfig, {"url": dg.EnvVar("NAME_OF_VARIABLE")}),
        (SchemaRegistryConfig, {"url": "http://r:1", "token": dg.EnvVar("NAME_OF_VARIABLE")}),
        (SchemaRegistryConfig, {"url": "http://r:1", "client_config": {"x": dg.EnvVar("NAME_OF_VARIABLE")}}),
    ],
)
def test_an_env_var_is_refused_where_nothing_looks_it_up(make, options):
    option = list(options)[-1]
    with pytest.raises(
        ValidationError, match=rf"{option}.*=EnvVar\('NAME_OF_VARIABLE'\) is not.*os\.environ"
    ) as caught:
        make(**options)
    assert len(caught.value.errors()) == 1


@pytest.mark.parametrize("option", ["connect_timeout", "delivery_timeout"])
@pytest.mark.parametrize("value", [0, -3, True, "soon", float("nan"), 1e12])
def test_wrong_timeouts_are_refused_by_name_and_value(option, value):
    with pytest.raises(ValidationError) as caught:
        KafkaProducerConfig(**{option: value})
    assert option in str(caught.value)
    assert f"{option}={value!r}" in str(caught.value)


@pytest.mark.parametrize("servers", ["a", "a:1,b:2", ["a:1", "b:2"], "[::1]:9092", "PLAINTEXT://a.b-c:9092"])
def test_servers_are_accepted(servers):
    assert KafkaProducerConfig(bootstrap_servers=servers).servers == (
        servers if isinstance(servers, str) else ",".join(servers)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": "PLAIN",
            "sasl_username": "u",
            "sasl_password": CANARY,
        },
    ],
    ids=["PLAINTEXT", "SASL"],
)
def test_a_server_with_the_prefix_of_another_protocol_is_refused(options):
    KafkaProducerConfig(bootstrap_servers="SSL://a:1,b:2", security_protocol="SSL")
    KafkaProducerConfig(bootstrap_servers="SSL://a:1", librdkafka_config={"security.protocol": "ssl"})
    with pytest.raises(ValidationError, match="'SSL://a:1' and security_protocol='.*PLAINTEXT' contradict"):
        KafkaProducerConfig(bootstrap_servers="b:2,SSL://a:1", **options)


LOGIN = {"sasl_mechanism": "PLAIN", "sasl_username": "u", "sasl_password": CANARY}
RAW_PAIR = {"ssl.certificate.pem": PEM, "ssl.key.pem": PEM}


@pytest.mark.parametrize(
    ("options", "raw"),
    [
        (LOGIN | {"ssl_ca_location": "probe"}, {"security.protocol": "sasl_ssl"}),
        ({}, {"security.protocol": "SASL_SSL", "sasl.mechanisms": "PLAIN", "sasl.username": "u", "sasl.password": "p"}),
        ({"security_protocol": "SSL", "ssl_key_password": CANARY}, RAW_PAIR),
        ({"security_protocol": "SSL", "ssl_certificate_pem": PEM}, {"ssl.key.pem": PEM}),
    ],
)
def test_options_go_together_with_raw_settings(options, raw):
    config = KafkaProducerConfig(librdkafka_config=raw, **options)
    expected = {name.replace("_", "."): value for name, value in options.items()} | raw
    assert expected.items() <= client_options(config).items()


def test_options_that_a_raw_protocol_would_ignore_are_refused():
    with pytest.raises(ValidationError, match="would be ignored with security_protocol='PLAINTEXT'"):
        KafkaProducerConfig(security_protocol="SASL_SSL", librdkafka_config={"security.protocol": "plaintext"}, **LOGIN)
    unverified = KafkaProducerConfig(
        enable_ssl_certificate_verification=False, librdkafka_config={"security.protocol": "SSL"}
    )
    assert client_options(unverified)["enable.ssl.certificate.verification"] == "false"


KEY = f"-----BEGIN PRIVATE KEY-----\n{CANARY * 200}\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(
    "key", [KEY, KEY[:60], KEY.replace("\n", " "), CANARY * 200], ids=["whole", "short", "one line", "no PEM"]
)
def test_a_key_in_place_of_its_file_is_not_shown(key):
    options = {"security_protocol": "SSL", "ssl_certificate_location": __file__, "ssl_key_location": key}
    with pytest.raises(ValidationError) as caught:
        KafkaProducerConfig(**options)
    assert "canary" not in str(caught.value)
    assert ("Set ssl_key_pem" if "BEGIN" in key else "name too long") in str(caught.value)
    with pytest.raises(ValidationError) as caught:
        SchemaRegistryConfig(url="http://h", ssl_certificate_location=__file__, ssl_key_location=key)
    assert "canary" not in str(caught.value)
    assert "ssl_key_location is not possible" in str(caught.value)


def test_what_no_number_holds_is_refused_by_name():
    with pytest.raises(ValidationError, match="batch_size=.* is not possible"):
        KafkaProducerConfig(batch_size=10**400)


def test_servers_are_trimmed():
    assert KafkaProducerConfig(bootstrap_servers=" a:1 , b:2 ").servers == "a:1,b:2"


@pytest.mark.parametrize(
    ("acks", "retries", "sent", "idempotent"),
    [
        ("all", 3, "all", True),
        (-1, 3, "all", True),
        ("-1", 1, "all", True),
        ("all", 0, "all", False),
        (1, 3, "1", False),
        ("0", 3, "0", False),
    ],
)
def test_acks_and_idempotence(acks, retries, sent, idempotent):
    options = producer_options(KafkaProducerConfig(acks=acks, retries=retries))
    assert options["acks"] == sent
    assert options["enable.idempotence"] is idempotent
    confluent_kafka.Producer(options)


def test_producer_options_have_librdkafkas_units():
    options = producer_options(
        KafkaProducerConfig(
            bootstrap_servers=["a:1", "b:2"],
            client_id="me",
            retries=7,
            batch_size=1000,
            linger_ms=12.5,
            buffer_memory=10 * 1024 * 1024,
            compression_type="zstd",
            delivery_timeout=1.25,
        )
    )
    assert options == {
        "bootstrap.servers": "a:1,b:2",
        "client.id": "me",
        "security.protocol": "PLAINTEXT",
        "log.connection.close": "false",
        "reconnect.backoff.ms": "1",
        "acks": "all",
        "enable.idempotence": True,
        "message.send.max.retries": 7,
        "batch.size": 1000,
        "queue.buffering.max.ms": 12.5,
        "queue.buffering.max.kbytes": 10240,
        "compression.type": "zstd",
        "message.timeout.ms": 1250,
        "partitioner": "murmur2_random",
        "topic.metadata.propagation.max.ms": 625,
        "allow.auto.create.topics": "false",
    }
    confluent_kafka.Producer(options)


@pytest.mark.parametrize("codec", COMPRESSION_TYPES)
def test_librdkafka_has_every_codec(codec):
    confluent_kafka.Producer(producer_options(KafkaProducerConfig(compression_type=codec)))


def test_security_options_are_librdkafkas_with_dots(tmp_path):
    ca = tmp_path / "ca.pem"
    ca.write_text("x")
    config = KafkaProducerConfig(
        security_protocol="sasl_ssl",
        sasl_mechanism="scram-sha-512",
        sasl_username="u",
        sasl_password=CANARY,
        ssl_ca_location=str(ca),
        ssl_endpoint_identification_algorithm="none",
        enable_ssl_certificate_verification=False,
    )
    options = client_options(config)
    assert options == {
        "bootstrap.servers": "localhost:9092",
        "security.protocol": "SASL_SSL",
        "log.connection.close": "false",
        "reconnect.backoff.ms": "1",
        "allow.auto.create.topics": "false",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "u",
        "sasl.password": CANARY,
        "ssl.ca.location": str(ca),
        "ssl.endpoint.identification.algorithm": "none",
        "enable.ssl.certificate.verification": "false",
    }


def test_every_security_option_is_known_to_librdkafka():
    named = [name for name in KafkaProducerConfig.model_fields if name.startswith(("sasl_", "ssl_", "https_"))]
    assert len(named) > 25
    values = dict.fromkeys(named, "1") | {"sasl_mechanism": "PLAIN", "security_protocol": "SASL_SSL"}
    for name in client_options(KafkaProducerConfig.model_construct(**values)):
        try:
            confluent_kafka.Producer({name: ""})
        except confluent_kafka.KafkaException as error:
            assert "No such configuration property" not in str(error), name  # noqa: PT017


def test_empty_security_options_are_as_none(monkeypatch):
    empty = {name: "" for name in KafkaProducerConfig.model_fields if name.startswith(("sasl_", "ssl_", "https_"))}
    assert KafkaProducerConfig(**empty) == KafkaProducerConfig()


def test_a_pem_text_may_have_its_line_ends_escaped():
    config = KafkaProducerConfig(security_protocol="SSL", ssl_ca_pem=PEM.replace("\n", "\\n"))
    assert config.ssl_ca_pem == PEM


@pytest.mark.parametrize(
    "options",
    [
        OIDC
        | {"sasl_oauthbearer_scope": "s", "sasl_oauthbearer_extensions": "a=b, c=d=e,", "https_ca_location": __file__},
        {"sasl_oauthbearer_callback": "os.path:join", "sasl_oauthbearer_config": CANARY},
        {"librdkafka_config": {"sasl.oauthbearer.metadata.authentication.type": "azure_imds"}},
        {"librdkafka_config": {"enable.sasl.oauthbearer.unsecure.jwt": "true"}},
    ],
    ids=["OIDC", "callback", "raw settings", "unsecured"],
)
def test_ways_to_an_oauth_token(options):
    config = KafkaProducerConfig(**OAUTH, **options)
    assert client_options(config)["sasl.mechanism"] == "OAUTHBEARER"
    assert CANARY not in repr(config)


def test_msk_signs_its_own_tokens(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    config = KafkaProducerConfig(**MSK)
    options = client_options(config)
    assert options["sasl.mechanism"] == "OAUTHBEARER"
    assert not [name for name in options if "aws" in name]
    assert "reconnect.backoff.ms" not in options
    text, expiry = oauth_callback(config)("")
    url = urllib.parse.urlsplit(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode())
    query = urllib.parse.parse_qs(url.query)
    assert url.netloc == "kafka.eu-central-1.amazonaws.com"
    assert query["Action"] == ["kafka-cluster:Connect"]
    assert query["X-Amz-Credential"][0].startswith("AKIDEXAMPLE/")
    assert query["X-Amz-Credential"][0].endswith("/eu-central-1/kafka-cluster/aws4_request")
    assert query["X-Amz-Expires"] == ["900"]
    assert len(query["X-Amz-Signature"][0]) == 64
    assert CANARY not in url.query
    assert 800 < expiry - time.time() <= 900


def test_msk_takes_the_credentials_of_a_profile(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "credentials").write_text(f"[mine]\naws_access_key_id = AKIDMINE\naws_secret_access_key = {CANARY}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    text, _ = oauth_callback(KafkaProducerConfig(**MSK, sasl_aws_profile="mine"))("")
    assert "AKIDMINE" in base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()


def test_msk_assumes_a_role(monkeypatch):
    from aws_msk_iam_sasl_signer import MSKAuthTokenProvider

    asked = []

    def sign(*arguments):
        asked.append(arguments)
        return "token", 5000

    monkeypatch.setattr(MSKAuthTokenProvider, "generate_auth_token_from_role_arn", sign)
    token = oauth_callback(KafkaProducerConfig(**MSK, sasl_aws_role_arn="arn:aws:iam::1:role/r"))
    assert token("") == ("token", 5.0)
    assert asked == [("eu-central-1", "arn:aws:iam::1:role/r")]


def test_msk_without_credentials_says_so(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(KafkaConfigError, match="AWS credentials were not found") as caught:
        oauth_callback(KafkaProducerConfig(**MSK))("")
    assert "AWS_ACCESS_KEY_ID" in caught.value.fix


def _answer(status, code):
    return aws.ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "AssumeRole")


@pytest.mark.parametrize(
    ("error", "remedy", "fix"),
    [
        (_answer(403, "AccessDenied"), Remedy.FAIL, "may assume this role"),
        (_answer(400, "Throttling"), Remedy.RETRY, "AWS STS"),
        (_answer(429, "TooManyRequestsException"), Remedy.RETRY, "AWS STS"),
        (_answer(503, "ServiceUnavailable"), Remedy.RETRY, "AWS STS"),
        (aws.EndpointConnectionError(endpoint_url="https://sts"), Remedy.RETRY, "can be reached"),
        (aws.ReadTimeoutError(endpoint_url="https://sts"), Remedy.RETRY, "can be reached"),
        (aws.CredentialRetrievalError(provider="container", error_msg="m"), Remedy.RETRY, "AWS credentials"),
        (aws.NoRegionError(), Remedy.FAIL, "AWS_DEFAULT_REGION"),
        (aws.NoCredentialsError(), Remedy.FAIL, "AWS_ACCESS_KEY_ID"),
    ],
    ids=["role", "throttling", "too many", "fault", "away", "silent", "container", "region", "credentials"],
)
def test_where_aws_gives_no_token_the_cause_is_named_and_what_may_pass_is_retried(error, remedy, fix, monkeypatch):
    from aws_msk_iam_sasl_signer import MSKAuthTokenProvider

    def refuse(*_):
        raise error

    role = "arn:aws:iam::1:role/r"
    monkeypatch.setattr(MSKAuthTokenProvider, "generate_auth_token_from_role_arn", refuse)
    with pytest.raises(KafkaError) as caught:
        Connection(KafkaProducerConfig(**MSK, sasl_aws_role_arn=role)).producer({})
    told = caught.value
    assert (told.remedy, told.code) == (remedy, "_AUTHENTICATION")
    assert fix in told.fix
    assert "AWS_MSK_IAM" in told.culprit
    if not isinstance(told, KafkaConfigError):
        assert repr(role) in told.culprit
        assert str(error).rstrip(".") in told.cause


def test_where_aws_does_not_answer_its_mechanism_is_named_and_no_option_that_was_not_given(monkeypatch):
    from aws_msk_iam_sasl_signer import MSKAuthTokenProvider

    answered = threading.Event()
    monkeypatch.setattr(MSKAuthTokenProvider, "generate_auth_token", lambda _: answered.wait(30))
    with pytest.raises(KafkaError, match=r"^sasl_mechanism='AWS_MSK_IAM': it has not returned .*, 0.2 s"):
        Connection(KafkaProducerConfig(**MSK, connect_timeout=0.2)).producer({})
    answered.set()


def test_a_profile_that_aws_does_not_know_is_named():
    with pytest.raises(KafkaError, match="sasl_aws_profile='nope': .*ProfileNotFound.* Check this profile") as caught:
        oauth_callback(KafkaProducerConfig(**MSK, sasl_aws_profile="nope"))("")
    assert caught.value.remedy is Remedy.FAIL


def test_msk_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "aws_msk_iam_sasl_signer.MSKAuthTokenProvider", None)
    with pytest.raises(KafkaConfigError, match=r"pip install 'dataforge-kafka-dagster\[aws-msk-iam\]'"):
        oauth_callback(KafkaProducerConfig(**MSK))


def test_raw_settings_may_be_numbers_and_booleans():
    config = KafkaProducerConfig(librdkafka_config={"socket.keepalive.enable": True, "statistics.interval.ms": 500})
    assert config.librdkafka_config == {"socket.keepalive.enable": "true", "statistics.interval.ms": "500"}


def test_raw_settings_are_applied_last():
    raw = {"acks": "1", "enable.idempotence": "false", "partitioner": "random", "client.id": "z"}
    config = KafkaProducerConfig(librdkafka_config=raw)
    assert raw.items() <= producer_options(config).items()
    assert client_options(config)["client.id"] == "z"
    bulk = PublicationConfig(producer=KafkaProducerConfig(librdkafka_config={"batch.size": "77", "linger.ms": "9"}))
    assert publication_options(bulk, "t")["batch.size"] == "77"


def test_publications_have_bulk_defaults_where_options_were_left_alone():
    options = publication_options(PublicationConfig(), "id")
    assert options["batch.size"] == 1_000_000
    assert options["queue.buffering.max.ms"] == 20
    assert options["queue.buffering.max.kbytes"] == 65536
    assert options["message.send.max.retries"] == 2147483647
    assert options["compression.type"] == "snappy"
    assert options["transactional.id"] == "id"
    assert options["transaction.timeout.ms"] == 600_000
    assert options["message.timeout.ms"] == 120_000
    assert options["enable.idempotence"] is True
    confluent_kafka.Producer(options)


def test_publications_keep_options_that_were_set():
    producer = KafkaProducerConfig(batch_size=20000, linger_ms=1, buffer_memory=1 << 20)
    options = publication_options(PublicationConfig(producer=producer), "id")
    assert options["batch.size"] == 20000
    assert options["queue.buffering.max.ms"] == 1
    assert options["queue.buffering.max.kbytes"] == 1024


def test_publications_retry_until_delivery_timeout_unless_told_never_to():
    def retries(guarantee="exactly_once", **options):
        config = PublicationConfig(producer=KafkaProducerConfig(**options), delivery_guarantee=guarantee)
        return publication_options(config, "id")["message.send.max.retries"]

    assert retries() == retries(retries=1) == retries(retries=5) == 2147483647
    assert retries("at_least_once", retries=0) == 0
    assert retries(librdkafka_config={"message.send.max.retries": "7"}) == "7"


@pytest.mark.parametrize(("delivery", "transaction", "sent"), [(120, 60, 60_000), (30, 60, 30_000)])
def test_records_do_not_outlive_their_transaction(delivery, transaction, sent):
    config = PublicationConfig(producer=KafkaProducerConfig(delivery_timeout=delivery), transaction_timeout=transaction)
    options = publication_options(config, "id")
    assert options["message.timeout.ms"] == sent
    assert options["message.timeout.ms"] <= options["transaction.timeout.ms"]


def test_a_raw_delivery_timeout_does_not_outlive_the_transaction_either():
    producer = KafkaProducerConfig(librdkafka_config={"delivery.timeout.ms": "100000"})
    options = publication_options(PublicationConfig(producer=producer, transaction_timeout=60), "id")
    assert options["delivery.timeout.ms"] == 60_000
    confluent_kafka.Producer(options)
    confluent_kafka.Producer(options)


def test_at_least_once_has_no_transaction_but_is_idempotent():
    options = publication_options(PublicationConfig(delivery_guarantee="at_least_once"), "id")
    assert not [name for name in options if name.startswith("transaction")]
    assert options["enable.idempotence"] is True


@pytest.mark.parametrize("acks", [0, 1, "0", "1"])
def test_acks_that_lose_records_are_refused_for_exactly_once(acks):
    producer = KafkaProducerConfig(acks=acks)
    with pytest.raises(ValidationError) as caught:
        PublicationConfig(producer=producer)
    for part in (f"acks={acks!r}", "exactly_once", "lost or written twice", "acks='all'", "at_least_once"):
        assert part in str(caught.value)
    assert PublicationConfig(producer=producer, delivery_guarantee="at_least_once").producer.acks == acks


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("enable.idempotence", False, "True"),
        ("acks", 1, "all"),
        ("request.required.acks", "0", -1),
        ("retries", 0, 1),
        ("message.send.max.retries", "0", "10"),
        ("max.in.flight", 6, "5"),
        ("max.in.flight.requests.per.connection", 10, 1),
    ],
)
def test_raw_settings_without_idempotence_are_refused_for_exactly_once(name, wrong, right):
    producer = KafkaProducerConfig(librdkafka_config={name: wrong})
    given = str(wrong).lower()
    with pytest.raises(ValidationError, match=f"'{name}': '{given}'}} cannot give delivery_guarantee='exactly_once'"):
        PublicationConfig(producer=producer)
    assert PublicationConfig(producer=producer, delivery_guarantee="at_least_once").producer is producer
    taken = PublicationConfig(producer=KafkaProducerConfig(librdkafka_config={name: right}))
    confluent_kafka.Producer(publication_options(taken, "id"))


def test_a_raw_time_out_of_transactions_is_refused_with_the_option_to_set():
    with pytest.raises(ValidationError, match=r"'transaction\.timeout\.ms': .* Set transaction_timeout"):
        KafkaProducerConfig(librdkafka_config={"transaction.timeout.ms": "60000"})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"delivery_guarantee": "at_most_once"}, "exactly_once"),
        ({"transactional_id_prefix": ""}, "transactional_id_prefix"),
        ({"transactional_id_prefix": "x" * 61}, "transactional_id_prefix"),
        ({"transaction_timeout": 0.5}, "transaction_timeout"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_wrong_publication_options_are_refused(options, name):
    with pytest.raises(ValidationError, match=name):
        PublicationConfig(**options)


def _secured(sasl_password=CANARY, **options):
    return KafkaProducerConfig(
        security_protocol="SASL_SSL",
        sasl_mechanism="PLAIN",
        sasl_username="user",
        sasl_password=sasl_password,
        librdkafka_config={"ssl.keystore.password": CANARY + "-raw"},
        **options,
    )


def test_no_secret_in_reprs():
    config = _secured(ssl_certificate_pem=PEM, ssl_key_pem=f"{PEM}{CANARY}", ssl_key_password=CANARY)
    for text in (repr(config), str(config), repr(PublicationConfig(producer=config)), f"{config!s}"):
        assert CANARY not in text
    assert "user" in repr(config)


def test_redact_hides_every_secret_and_nothing_else():
    config = _secured()
    assert config.redact(f"user={CANARY} raw={CANARY}-raw end") == "user=*** raw=*** end"
    assert config.redact("nothing here") == "nothing here"
    assert KafkaProducerConfig().redact("nothing to hide") == "nothing to hide"
    assert _secured(sasl_password="c").redact("10 seconds, codec") == "10 seconds, codec"


@pytest.mark.parametrize("said", [str, repr, json.dumps, "{}'\"".format, quote, quote_plus])
@pytest.mark.parametrize("odd", ["\\", "'", "'\"", "\t", "\n", "\u00e4", "/", " +", "\u20ac'"])
def test_redact_hides_a_secret_however_it_is_quoted(odd, said):
    """As the text of a KeyError has it, or of a request."""
    secret = f"S3{odd}CR{odd}ET"
    for text in (said(secret), repr({"a": [secret], 'b"': 1}), repr((f"'{secret}\"",)), repr(KeyError(f'"{secret}'))):
        shown = _secured(sasl_password=secret).redact(f"it raised {text} here")
        assert "***" in shown
        assert not re.search("S3|CR|ET", shown)


def test_redact_hides_each_line_of_a_key():
    config = KafkaProducerConfig(
        security_protocol="SSL",
        ssl_certificate_pem=PEM,
        ssl_key_pem=f"-----BEGIN PRIVATE KEY-----\n{CANARY}1\n{CANARY}2\n-----END PRIVATE KEY-----",
    )
    assert config.redact(f"-----BEGIN PRIVATE KEY----- {CANARY}2") == "-----BEGIN PRIVATE KEY----- ***"


def test_what_a_token_module_raises_is_told_without_secrets(tmp_path, monkeypatch):
    (tmp_path / "broken_tokens.py").write_text(f"raise KeyError('{CANARY} is not set')")
    monkeypatch.syspath_prepend(tmp_path)
    callback = {"sasl_oauthbearer_callback": "broken_tokens:fetch", "sasl_oauthbearer_config": CANARY}
    with pytest.raises(KafkaConfigError, match=r"broken_tokens:fetch.*KeyError: '\*\*\* is not set'") as caught:
        oauth_callback(KafkaProducerConfig(**OAUTH, **callback))
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_every_secret_is_kept_out_of_reprs_and_errors():
    hidden = {
        name
        for name, field in KafkaProducerConfig.model_fields.items()
        if not field.repr and name not in {"ssl_ca_pem", "ssl_certificate_pem", "https_ca_pem", "librdkafka_config"}
    }
    assert hidden == set(SECRET_OPTIONS)
    secret = {name for name in KafkaProducerConfig.model_fields if re.search("password|secret|key_pem", name)}
    assert secret <= hidden


def test_publication_config_is_picklable():
    config = PublicationConfig(producer=_secured(), transactional_id_prefix="p", transaction_timeout=7)
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert again.producer.sasl_password == CANARY
    assert publication_options(again, "t") == publication_options(config, "t")


def test_configs_are_frozen():
    config = KafkaProducerConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.acks = "1"


@pytest.mark.parametrize("topic", ["a", "A.b_c-9", "x" * 249, "..."])
def test_legal_topics(topic):
    assert check_topic(topic) == topic


@pytest.mark.parametrize("topic", ["", ".", "..", "a b", "a/b", "flüge", "x" * 250, None, 5, b"a", "a\n", ["a"]])
def test_illegal_topics_are_refused(topic):
    with pytest.raises(KafkaConfigError) as caught:
        check_topic(topic)
    assert repr(topic) in str(caught.value)
    assert "249" in caught.value.fix


def test_oauth_callback_is_imported():
    config = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}
    assert oauth_callback(KafkaProducerConfig()) is None
    found = oauth_callback(KafkaProducerConfig(**config, sasl_oauthbearer_callback="os.path:join"))
    assert found is os.path.join
    for path in ("no.such.module:f", "os:no_such"):
        with pytest.raises(KafkaConfigError, match="package.module:function"):
            oauth_callback(KafkaProducerConfig(**config, sasl_oauthbearer_callback=path))


def test_a_raw_setting_that_librdkafka_refuses_by_another_name_is_told_by_its_own():
    with pytest.raises(KafkaConfigError, match=r"queue\.buffering\.max\.ms") as caught:
        create_kafka_producer({"librdkafka_config": {"linger.ms": "abc"}})
    assert caught.value.fix.endswith("in librdkafka_config, which sets linger.ms")


@pytest.mark.parametrize("name", ["bootstrap.servers", "metadata.broker.list"])
def test_raw_servers_that_errors_would_not_name_are_refused(name):
    with pytest.raises(ValidationError, match=f"'{name}': ...}} is not possible: .* Set bootstrap_servers"):
        KafkaProducerConfig(librdkafka_config={name: "z:9"})


@pytest.mark.parametrize("name", ["message.timeout.ms", "delivery.timeout.ms"])
def test_a_raw_time_out_is_at_most_that_of_our_own_waits(name):
    for text in ("abc", "0", "-1", "2001"):
        with pytest.raises(ValidationError, match=f"'{name}': '{text}'}} is not possible: .* Set delivery_timeout"):
            KafkaProducerConfig(delivery_timeout=2, librdkafka_config={name: text})
    KafkaProducerConfig(delivery_timeout=2, librdkafka_config={name: "2000"})


def test_a_raw_time_out_waits_for_the_value_of_delivery_timeout():
    later = {"context": {"later": {"delivery_timeout"}}}
    raw = {"message.timeout.ms": "200000"}
    KafkaProducerConfig.model_validate({"librdkafka_config": raw}, **later)
    with pytest.raises(ValidationError, match="delivery_timeout"):
        KafkaProducerConfig(librdkafka_config=raw)


def test_a_file_may_be_a_path(tmp_path):
    file = tmp_path / "ca.pem"
    file.touch()
    assert KafkaProducerConfig(security_protocol="SSL", ssl_ca_location=file).ssl_ca_location == str(file)
    kafka = KafkaProducerResource(security_protocol="SSL", ssl_ca_location=file)
    assert kafka.producer_config().ssl_ca_location == str(file)


@pytest.mark.parametrize("raw", ["acks", "request.required.acks"])
def test_acks_count_as_they_are_in_the_end(raw):
    assert KafkaProducerConfig().acknowledged
    assert not KafkaProducerConfig(acks=0).acknowledged
    assert not KafkaProducerConfig(librdkafka_config={raw: 0}).acknowledged
    assert KafkaProducerConfig(acks=0, librdkafka_config={raw: "all"}).acknowledged


def test_a_factory_names_an_option_that_is_no_text():
    with pytest.raises(ValueError, match="unknown option 1"):
        create_kafka_producer({1: 2})
