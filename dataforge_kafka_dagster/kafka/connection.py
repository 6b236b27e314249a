"""Clients with a memory for causes, and calls that end: every wait has a deadline and yields to signals.

librdkafka's calls hold the interpreter until they return, so that a signal handler has to wait for them. Here they
wait in slices.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import ctypes
import functools
import logging
import os
import re
import ssl
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, SupportsFloat, TypeVar

import confluent_kafka

from dataforge_kafka_dagster.kafka.config import (
    SENDABLE,
    KafkaProducerConfig,
    client_options,
    is_extension,
    oauth_callback,
    token_server,
)
from dataforge_kafka_dagster.kafka.errors import (
    FENCED_CODES,
    LATCHED_CODES,
    NO_ANSWER_CODES,
    KafkaConfigError,
    KafkaError,
    KafkaTimeoutError,
    NoBrokersAvailable,
    Remedy,
    fix_for,
    from_broker,
    remedy_of,
    remedy_of_status,
)

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient

T = TypeVar("T")

logger: Final = logging.getLogger("dataforge_kafka_dagster")

SLICE: Final = 0.25
"""Longest time, seconds, that a call holds back a signal."""

# Said of a call whose callback Ctrl-C interrupted: before Python 3.12, confluent-kafka (2.16) loses Python's own
# interrupt, which has no text, and the delivery report with it.
_LOST: Final = "returned NULL without setting an exception"
_END_SECONDS: Final = 6.0
_RETURN_SECONDS: Final = 0.05
# Of librdkafka's log: the share of a client's time that it may take, and the seconds that it may be ahead of that.
_LOG_SHARE: Final = 0.25
_LOG_SECONDS: Final = 2.0
# How librdkafka begins what it tells of a token server (OpenID Connect); its code is that of a wrong password.
_NO_TOKEN: Final = "Failed to acquire SASL OAUTHBEARER token: "  # noqa: S105
# What its log says of an answer that it got, or did not get: -1. The error has the answer alone.
_TOKEN_STATUS: Final = re.compile(r"Failed to retrieve \w+ token from .* \((-?\d+)\)\s*$", re.DOTALL)
# How it begins what it tells of an answer that has no token, and of settings by which it cannot ask.
_WRONG_ANSWER: Final = ("Expected ", "Failed to decode JWT", "Failed to parse JSON", "Response is not JSON")
_CANNOT_ASK: Final = (
    "Failed to create JWT",
    "Failed to build JWT",
    "Unrecognized sasl.oauthbearer",
    "Invalid sasl.oauth",
)
# In what it tells of a listener that has no SASL; its code is that of a wrong password, too.
_NO_SASL: Final = "not valid in current SASL state"
# What Amazon MSK answers who connects with IAM more often than it lets: aws-msk-iam-auth's README.
_TOO_MANY: Final = "Too many connects"
# In what is told, with the code of a wrong password, of a broker that has not looked at one.
_NOT_JUDGED: Final = re.compile(rf"handshake failed: Local: (?:Broker transport failure|Timed out)|\]: {_TOO_MANY}")

# What a broker says of a certificate that it does not take, or misses: RFC 5246, 7.2.2, and RFC 8446, 6.2.
_CERTIFICATE_ALERT: Final = re.compile(r"SSL alert number (?:4[2-68]|116)\b")
_CHECK_CERTIFICATE: Final = (
    "The broker does not take the client certificate, or misses one: check ssl_certificate_location (or _pem), its CA,"
    " and the dates in it"
)
# How librdkafka names a broker that another one has told of, in front of what is wrong with it.
_OF_BROKER: Final = re.compile(r"(?:\w+://)?([^/\s]+)/\d+: ")

# What a token function returns: token, expiry, and if there are any, principal and extensions.
_TOKEN: Final = (str, SupportsFloat, str, dict)
_TOKEN_SIZES: Final = (2, 3, 4)
_STATUSES: Final = range(100, 600)
# What an error that a token function makes of it does not pass with: a file, or a certificate.
_STAYS: Final = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ssl.SSLCertVerificationError,
)
# No time in seconds is so late; each in milliseconds is, since 2001.
_MILLISECONDS: Final = 1e12


class Connection:
    """Makes the clients of one cluster and remembers why they could not connect."""

    def __init__(self, config: KafkaProducerConfig) -> None:
        self.config = config
        self._latched: confluent_kafka.KafkaError | None = None
        self._transport: confluent_kafka.KafkaError | None = None
        self._oauth_error: Exception | None = None
        self._token_status = -1
        self._all_down = False
        self._has_heard = False
        self.troubles = 0
        """How often a broker could not be reached since one has answered."""
        self.fatal: confluent_kafka.KafkaError | None = None
        self.silent = False
        """Whether the last that was asked of the cluster had no answer in time."""
        self._admin: AdminClient | None = None
        self.inherited = False
        """Whether this is a forked process, and the connection its parent's."""
        self._making = threading.Lock()
        _open.add(self)

    @property
    def name(self) -> str:
        """What errors call this cluster."""
        return f"Kafka at {self.config.servers}"

    def _on_error(self, error: confluent_kafka.KafkaError) -> None:
        self.troubles += 1
        self._has_heard = True
        if _is_fatal(error):
            self.fatal = self.fatal or error
        elif _NOT_JUDGED.search(error.str()):
            self._transport = confluent_kafka.KafkaError(confluent_kafka.KafkaError._TRANSPORT, error.str())  # noqa: SLF001
        elif error.name() in LATCHED_CODES or _CERTIFICATE_ALERT.search(error.str()):
            self._latched = error
        else:
            self._all_down = self._all_down or error.name() == "_ALL_BROKERS_DOWN"
            if self._transport is None or error.name() != "_ALL_BROKERS_DOWN":  # which says less than what came before
                self._transport = error
        logger.debug("%s: %s", self.name, self.config.redact(str(error)))

    def _on_line(self, line: str) -> None:
        status = _TOKEN_STATUS.search(line)
        if status is not None:
            self._token_status = int(status[1])

    def connected(self) -> None:
        """Forget why a broker could not be reached: one has answered."""
        self._latched = self._transport = self._oauth_error = None
        self._all_down = self.silent = False
        self._has_heard = True
        self.troubles = 0

    def serve(
        self, wait: Callable[[float], object], seconds: float, failed: Callable[[], bool] = lambda: False
    ) -> bool:
        """Let a producer call back, by its poll or flush.

        A fatal error may come out of it instead (confluent-kafka 2.16): it is remembered, unless it comes as a
        SystemError that does not tell it. The callbacks were called all the same.

        Args:
            wait: The producer's poll or flush.
            seconds: Longest wait.
            failed: Asked whether the producer has met a fatal error, where nothing else tells it from Ctrl-C.

        Returns:
            Whether nothing came out.

        Raises:
            Exception: What came out is neither.
        """
        try:
            call_client(wait, seconds)
        except Exception as error:
            self._raise_interrupt(error, failed)
            if self.fatal is None and not isinstance(error, SystemError):
                raise
            logger.debug("librdkafka's callbacks ended in an error", exc_info=True)
            return False
        return True

    def _raise_interrupt(self, error: Exception, failed: Callable[[], bool]) -> None:
        """Raise the interrupt that came during a callback, and out of the call as this error; remember a fatal one."""
        self.note(error)
        for behind in _chain(error):
            if not isinstance(behind, Exception):
                raise behind from None
        told = self.fatal is not None or threading.current_thread() is not threading.main_thread()
        # A fatal error gets lost in the same way.
        if _LOST in str(error) and not told and not failed():
            raise KeyboardInterrupt from None

    def note(self, raised: BaseException) -> None:
        """Remember a fatal error that a client raised: as a KafkaException, or as the cause of another error."""
        for behind in _chain(raised):
            error = behind.args[0] if behind.args else None
            if isinstance(error, confluent_kafka.KafkaError) and _is_fatal(error):
                self.fatal = self.fatal or error

    def _client(self, make: Callable[..., T], options: dict[str, Any]) -> T:
        extra: dict[str, Any] = {"error_cb": self._on_error, "logger": _Quiet(self._on_line, self.config.redact)}
        token = oauth_callback(self.config)
        if token is not None:
            extra["oauth_cb"] = self._first_token_at_once(token, options)
        try:
            return make(options | extra)
        except (confluent_kafka.KafkaException, ValueError, TypeError, AttributeError) as error:
            text = error.args[0].str() if isinstance(error, confluent_kafka.KafkaException) else str(error)
            # librdkafka may call a setting by another name than it was given by.
            raw = f", which sets {', '.join(self.config.librdkafka_config)}" if self.config.librdkafka_config else ""
            raise KafkaConfigError(
                "librdkafka's settings",
                self.config.redact(text),
                f"Correct the option that this names, in the config or in librdkafka_config{raw}",
                code="_INVALID_ARG",
            ) from None

    def _first_token_at_once(
        self, token: Callable[[str], tuple[Any, ...]], options: dict[str, Any]
    ) -> Callable[[str], tuple[Any, ...]]:
        """The token function, for librdkafka, which waits 10 s for a first token and does not tell why none comes."""

        def fetch(oauth_config: str) -> tuple[Any, ...]:
            if first:
                return first.pop()
            try:
                fetched = token(oauth_config)
                self._check_token(fetched)
            except Exception as error:
                self._oauth_error = error
                raise
            self._oauth_error = None
            if self._lacks_token:
                self._latched = None
            return fetched

        first: list[tuple[Any, ...]] = []
        timeout = self.config.connect_timeout
        fetching = _spawn(functools.partial(fetch, options.get("sasl.oauthbearer.config", "")))
        concurrent.futures.wait([fetching], timeout)
        try:
            if not fetching.done():
                raise KafkaError(  # noqa: TRY301
                    self._of_token,
                    f"it has not returned after connect_timeout, {timeout:g} s",
                    "Give what it asks for the token a deadline, or raise connect_timeout",
                    code="_AUTHENTICATION",
                    remedy=Remedy.RETRY,
                )
            first.append(fetching.result())
        except Exception as error:  # noqa: BLE001  (of any kind: the function is the user's)
            raise self._oauth_cause(error) from None
        return fetch

    @property
    def _of_token(self) -> str:
        """What errors call the function that fetches tokens."""
        if self.config.sasl_mechanism == "AWS_MSK_IAM":
            return "sasl_mechanism='AWS_MSK_IAM'"
        return f"sasl_oauthbearer_callback={self.config.sasl_oauthbearer_callback!r}"

    def _check_token(self, fetched: Any) -> None:
        """Refuse what librdkafka would, which does not tell why, or would take for a token without end."""
        if not isinstance(fetched, tuple):
            cause = f"it returned {type(fetched).__name__}"
        elif len(fetched) not in _TOKEN_SIZES or not all(map(isinstance, fetched, _TOKEN)):
            cause = f"it returned ({', '.join(type(part).__name__ for part in fetched)})"
        elif not time.time() < float(fetched[1]) < _MILLISECONDS:
            cause = f"the expiry that it returned is {float(fetched[1]):.0f}, and now is {time.time():.0f}"
        elif unsendable := _unsendable(*fetched):
            cause = f"it returned {unsendable} that cannot be sent"
        else:
            return
        raise KafkaError(
            self._of_token,
            cause,
            "Return (token, expiry in seconds since the epoch), a str and a number, from a function that is not async;"
            " after them may come the principal, a str, and a dict of SASL extensions. All but the principal is ASCII;"
            " extensions have names of letters",
            code="_AUTHENTICATION",
        )

    def _oauth_cause(self, error: Exception) -> KafkaError:
        if isinstance(error, KafkaError):  # which may be the function's own
            error.culprit, error.cause, error.fix = map(self.config.redact, (error.culprit, error.cause, error.fix))
            error.args = (self.config.redact(str(error)),)
            return error
        return KafkaError(
            self._of_token,
            self.config.redact(f"it raised {type(error).__name__}: {error}"),
            "Correct the function, or what it asks for the token",
            code="_AUTHENTICATION",
            remedy=_remedy_of_token(error),
        )

    def producer(self, options: dict[str, Any]) -> confluent_kafka.Producer:
        """A producer with these settings of librdkafka.

        Raises:
            KafkaConfigError: librdkafka refuses one of them.
        """
        return self._client(confluent_kafka.Producer, options)

    def consumer(self, options: dict[str, Any]) -> confluent_kafka.Consumer:
        """A consumer with these settings on top of servers and security.

        Raises:
            KafkaConfigError: librdkafka refuses one of them.
        """
        return self._client(confluent_kafka.Consumer, client_options(self.config) | options)

    def reader(self, options: Mapping[str, Any] | None = None) -> confluent_kafka.Consumer:
        """A consumer that is told which offsets to read, and sees all that is at them.

        A consumer of committed records only takes the first open transaction, anybody's, for the end.

        Args:
            options: More settings of librdkafka.

        Raises:
            KafkaConfigError: librdkafka refuses one of them.
        """
        # The group is never joined or committed to; librdkafka wants a name.
        own = {
            "group.id": f"{self.config.client_id or 'dagster'}-read-{uuid.uuid4()}",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "isolation.level": "read_uncommitted",
        }
        return self.consumer(own | dict(options or {}))

    @property
    def admin(self) -> AdminClient:
        """The cluster's admin client, made when first asked for."""
        with self._making:
            if self._admin is None:
                from confluent_kafka.admin import AdminClient  # noqa: PLC0415  (slow to import)

                self._admin = self._client(AdminClient, client_options(self.config))
            return self._admin

    def make_ready(self) -> None:
        """Make the admin client while others are made: with a token function, each waits a second for its token.

        So confluent-kafka does (2.16), however fast the function is.
        """
        if oauth_callback(self.config) is not None:
            self.aside(lambda: self.admin)

    def close(self, *clients: object) -> None:
        """Let go of the admin client, and of others of this cluster, which end beside: that takes milliseconds.

        A client that reaches no broker takes until 5 s after its start to end, and the interpreter waits with it
        (librdkafka 2.16 with a short reconnect.backoff.ms): that time passes first. One that may wait for a token
        begins to end at once, and takes up to 20 s, or ends with the process.

        Args:
            clients: Those that whoever calls this lets go of, too, when it returns.
        """
        if self.inherited:
            keep_for_ever(*clients)
        elif (lacking := self._may_lack_token) or clients or self.silent:
            patience = _END_SECONDS if self.silent and not lacking else _RETURN_SECONDS
            kept: list[object] = [self._admin, *clients]
            if self.config.protocol != "PLAINTEXT" and not lacking:
                _kept.append(kept)
            self.aside(functools.partial(_keep, kept, patience))
        self._admin = None

    def cause(self, error: confluent_kafka.KafkaError, culprit: str) -> KafkaError:
        """Our error for one of confluent-kafka's, or for the connection error that it stands for.

        A wrong password, an unknown host or a TLS mismatch is seen only by the error callback: to the request it looks
        like a time-out. Where it met one broker of several, it need not be why. What a broker itself has answered is
        its own cause.
        """
        ours = from_broker(error, culprit)
        if error.name() not in NO_ANSWER_CODES:
            return ours
        hidden = self._hidden_cause()
        told = hidden if hidden is not None and self._holds_for_all else ours
        if hidden is not None and told is ours:
            ours.add(f"an earlier connection error: {hidden.cause}")
        if told is ours or self._met_others:
            self._add_transport(told)
        return told

    def _add_transport(self, error: KafkaError) -> None:
        if self._transport is not None:
            error.add(f"the last connection error: {self.config.redact(self._transport.str())}")

    @property
    def is_in_trouble(self) -> bool:
        """Whether a connection error is known since brokers last answered."""
        return self._transport is not None

    def _hidden_cause(self) -> KafkaError | None:
        if self._oauth_error is not None:
            return self._oauth_cause(self._oauth_error)
        if self._latched is None:
            return None
        code = self._latched.name()
        if self._lacks_token:
            return self._no_token(self._latched.str().removeprefix(_NO_TOKEN), code)
        text, fix = self.config.redact(self._latched.str()), fix_for(code)
        if _CERTIFICATE_ALERT.search(text):
            code, fix = "_SSL", _CHECK_CERTIFICATE
        elif _NO_SASL in text:
            plain = "SSL" if self.config.protocol == "SASL_SSL" else "PLAINTEXT"
            fix = f"The listener has no SASL: set security_protocol={plain!r}, or the port of a listener that has SASL"
        elif code != "_SSL" and (self.config.sasl_password or "").strip() != (self.config.sasl_password or ""):
            fix = f"sasl_password begins or ends with white space, perhaps a line's end of its file. {fix}"
        return NoBrokersAvailable(self.name, f"{text} [{code}]", fix, code=code)

    @property
    def _holds_for_all(self) -> bool:
        """Whether the hidden cause is that of all brokers: none lets us in, or there is no token, which is for all."""
        return self._all_down or self._lacks_token or self._oauth_error is not None

    @property
    def _met_others(self) -> bool:
        """Whether the last connection error is another broker's than the hidden one; librdkafka names it first."""
        if self._latched is None or self._transport is None or self._oauth_error is not None:
            return False
        (of_latched, *_), (of_transport, *said) = (e.str().split(": ") for e in (self._latched, self._transport))
        return bool(said) and of_latched != of_transport

    @property
    def _lacks_token(self) -> bool:
        return self._latched is not None and self._latched.str().startswith(_NO_TOKEN)

    @property
    def _may_lack_token(self) -> bool:
        """Whether librdkafka may still wait for a first token, without which it tries no connection.

        It asks a token server that answers 429 or 5xx again, for 50 s, and does not tell. Meanwhile it cannot be ended.
        """
        return not self._has_heard and token_server(self.config) is not None

    def _no_token(self, answer: str, code: str) -> KafkaError:
        """The error for a token server that gives librdkafka no token, after its answer (RFC 6749, 5.2) or without."""
        fix, remedy = "Check that it runs at this address, and https_ca_location", Remedy.RETRY
        if answer.startswith(_CANNOT_ASK):
            fix, remedy = "Check the settings of sasl.oauthbearer in librdkafka_config, and their files", Remedy.FAIL
        elif answer.startswith(_WRONG_ANSWER):
            fix, remedy = "Check this address: what answers there gives no token that is a JWT", Remedy.FAIL
        elif self._token_status > 0:
            answer = f"HTTP status {self._token_status}, {answer}"
            names = "sasl_oauthbearer_client_id, sasl_oauthbearer_client_secret and sasl_oauthbearer_scope"
            if self.config.sasl_oauthbearer_client_secret is None:
                names = "the client's id, secret and scope in librdkafka_config"
            fix = f"Check this address, {names}"
            remedy = remedy_of_status(self._token_status)
        return NoBrokersAvailable(
            token_server(self.config) or "OAuth in librdkafka_config",
            f"it gave no token: {self.config.redact(answer)} [{code}]",
            fix,
            code=code,
            remedy=remedy,
        )

    def unreachable(self, seconds: float) -> KafkaError:
        """The error for a cluster that gave no answer in this time."""
        self.silent = True
        hidden = self._hidden_cause()
        if hidden is not None:
            return hidden
        if self._may_lack_token:
            return NoBrokersAvailable(
                f"{token_server(self.config)}, or {self.name}",
                f"no answer in {seconds:.1f} s: no token came, or no broker answered [_TIMED_OUT]",
                "Check that the token server gives tokens: while it answers 429 or 5xx, librdkafka asks again and tells"
                " nothing. Check also that the brokers run and can be reached from here",
                code="_TIMED_OUT",
                remedy=Remedy.RETRY,
            )
        code, text = "_TIMED_OUT", "no broker answered"
        if self._transport is not None:
            code, text = self._transport.name(), self.config.redact(self._transport.str())
        fix = fix_for(code)
        if code == "_ALL_BROKERS_DOWN":  # its own text counts brokers, also as none of two
            text = "each connection was refused, or closed again"
        if _TOO_MANY in text:
            fix = "Begin fewer steps at once, or raise 'reconnect.backoff.ms' in librdkafka_config"
        elsewhere = _OF_BROKER.match(text)
        if elsewhere and _address(elsewhere[1]) not in map(_address, self.config.servers.split(",")):
            fix = (
                f"bootstrap_servers answered, and named {elsewhere[1]} as the address of a broker: check that it runs,"
                " and the brokers' advertised.listeners, or name the listener that is for clients like this one"
            )
        return NoBrokersAvailable(
            self.name, f"no answer in {seconds:.1f} s: {text} [{code}]", fix, code=code, remedy=Remedy.RETRY
        )

    def late(self, culprit: str, seconds: float) -> KafkaTimeoutError:
        """The error for a deadline of our own, with the last connection error."""
        error = timed_out(culprit, seconds)
        self._add_transport(error)
        return error

    def resume(
        self, call: Callable[[float], T], timeout: float, culprit: str, failed: Callable[[], bool] = lambda: False
    ) -> T:
        """Call, and call again while the error can be retried, until it returns.

        Args:
            call: Takes the seconds that it may wait; librdkafka's transactional calls resume where they were.
            timeout: Longest time for all calls, seconds.
            culprit: What an error's message begins with.
            failed: As for `serve`.

        Raises:
            KafkaError: The call failed for good, or the time was up.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                result = call_client(call, max(0.01, min(SLICE, deadline - time.monotonic())))
            except confluent_kafka.KafkaException as exception:
                error = exception.args[0]
                fatal = self.fatal or error
                if _is_fatal(fatal) or error.txn_requires_abort() or not error.retriable():
                    raise self.cause(fatal, culprit) from None
                if time.monotonic() >= deadline:
                    raise self.cause(error, f"{culprit}, {timeout:.0f} s") from None
            except SystemError as error:
                self._raise_interrupt(error, failed)
                if self.fatal is not None:
                    raise self.cause(self.fatal, culprit) from None
                raise
            else:
                self.connected()
                return result
            time.sleep(0.02)

    def in_thread(self, call: Callable[[], T], timeout: float, culprit: str) -> T:
        """Call what cannot wait in slices from a thread of its own, so that a signal or the deadline ends the wait.

        A call that is left behind ends with librdkafka's own socket.timeout.ms.

        Raises:
            KafkaError: As `answer`.
        """
        return self.answer(lambda: _spawn(call), timeout, culprit)

    def aside(self, call: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Start a call that has a deadline of its own, in a thread, and go on."""
        return _spawn(call)

    def answer(self, ask: Callable[[], concurrent.futures.Future[T]], timeout: float, culprit: str) -> T:
        """The answer to a request, asked again while the error can be retried.

        Raises:
            KafkaError: The request failed for good, or the time was up.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                future = ask()
                # Not by a time-out of its result, which what was called may have raised itself.
                while not concurrent.futures.wait([future], max(0.01, min(SLICE, deadline - time.monotonic()))).done:
                    self._serve_errors()
                    if time.monotonic() >= deadline or self._locked_out:
                        raise self.unreachable(timeout)
                result = future.result()
            except confluent_kafka.KafkaException as exception:
                self._serve_errors()
                error = exception.args[0]
                fatal = self.fatal or error
                given_up = _is_fatal(fatal) or error.txn_requires_abort()
                if given_up or remedy_of(fatal.name()) is not Remedy.RETRY:
                    raise self.cause(fatal, culprit) from None
                if time.monotonic() + 0.1 >= deadline:
                    if error.name() in NO_ANSWER_CODES:
                        raise self.unreachable(timeout) from None
                    raise self.cause(error, culprit) from None
            else:
                self.connected()
                return result
            time.sleep(0.1)

    @property
    def _locked_out(self) -> bool:
        """Whether no broker lets us in, for a reason that waiting does not mend.

        librdkafka tells at once that one does not, but goes on trying. Another broker might: it is heard first.
        """
        if self._latched is None or not self._holds_for_all:
            return False
        hidden = self._hidden_cause()
        return hidden is not None and hidden.remedy is Remedy.FAIL

    def _serve_errors(self) -> None:
        """The error callback of an admin client is called from its poll only."""
        admin = self._admin
        if admin is not None:
            admin.poll(0)


def _unsendable(token: str, _: object, principal: str = "", extensions: Mapping[object, object] = {}) -> str:
    """Of what a token function returned, that which librdkafka does not take; nothing if it takes all."""
    if not SENDABLE.fullmatch(token):
        return "a token"
    if "\0" in principal:
        return "a principal"
    wrong = (name for name, value in extensions.items() if not is_extension(name, value))
    return next((f"an extension {name!r}" for name in wrong), "")


def _remedy_of_token(error: Exception) -> Remedy:
    """Whether what a token function raised may pass: what it asks was away, or has answered so (RFC 9110, 15).

    The function or its library may have made another error of it, as httpx and botocore do.
    """
    for behind in _chain(error):
        # As urllib, requests and httpx name it.
        told = (getattr(behind, "code", None), getattr(getattr(behind, "response", None), "status_code", None))
        status = next((one for one in told if isinstance(one, int) and one in _STATUSES), None)
        if status is not None:
            return remedy_of_status(status)
        if isinstance(behind, OSError) and (behind is error or not isinstance(behind, _STAYS)):
            return Remedy.RETRY
    return Remedy.FAIL


def _address(server: str) -> str:
    """A broker's host and port, as librdkafka and `bootstrap_servers` may write them differently."""
    server = server.strip().rpartition("://")[2].lower()
    return server if re.search(r":\d+$", server) else f"{server}:9092"


_open: Final[weakref.WeakSet[Connection]] = weakref.WeakSet()
# The clients of clusters with TLS that have been let go of and have not ended.
_kept: Final[list[list[object]]] = []


def _keep(things: list[object], seconds: float) -> None:
    time.sleep(seconds)
    things.clear()
    with contextlib.suppress(ValueError):  # the process is ending, too
        _kept.remove(things)


def keep_for_ever(*things: object) -> None:
    """In a forked process, keep clients of its parent's: their end would wait for threads that are not there."""
    for thing in things:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _keep_inherited() -> None:
    keep_for_ever(*_kept)
    _kept.clear()
    for connection in list(_open):
        connection.inherited = True
        keep_for_ever(connection._admin)  # noqa: SLF001
    _open.clear()


def _end_at_exit() -> None:
    """End what has not ended, since the process ends with a clean-up of OpenSSL.

    A thread of librdkafka that is in a handshake then crashes it. Only a lookup of a host's name holds an end up.
    """
    deadline = time.monotonic() + _END_SECONDS
    for connection in list(_open):
        if connection._may_lack_token:  # noqa: SLF001
            keep_for_ever(connection._admin)  # noqa: SLF001
        elif connection.config.protocol != "PLAINTEXT":
            _kept.append([connection._admin])  # noqa: SLF001
            connection._admin = None  # noqa: SLF001
    while _kept and time.monotonic() < deadline:
        _kept.pop().clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_keep_inherited)
atexit.register(_end_at_exit)


def _chain(raised: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    while raised is not None:
        yield raised
        raised = raised.__cause__ or raised.__context__


def _is_fatal(error: confluent_kafka.KafkaError) -> bool:
    """Whether the producer that gave this error can do nothing more."""
    return error.fatal() or error.name() in FENCED_CODES


def call_client(call: Callable[..., T], *args: object) -> T:
    """Call one of confluent-kafka's functions, whose errors are then exceptions in any case.

    Before Python 3.12 a fatal error that comes while callbacks run may be raised as a bare KafkaError (confluent-kafka
    2.16), which is no exception: no clause that names a class catches it, and it would end the process.

    Raises:
        KafkaException: The call failed.
    """
    try:
        return call(*args)
    except BaseException:
        raise
    except:  # noqa: E722
        bare = sys.exc_info()[1]
    raise confluent_kafka.KafkaException(bare)


def _spawn(call: Callable[[], T]) -> concurrent.futures.Future[T]:
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    threading.Thread(target=_keep_answer, args=(call, future), name="dataforge-kafka-call", daemon=True).start()
    return future


def _keep_answer(call: Callable[[], T], future: concurrent.futures.Future[T]) -> None:
    try:
        future.set_result(call_client(call))
    except BaseException as error:  # noqa: BLE001  (raised again by the one who waits)
        future.set_exception(error)
    finally:
        # The error's traceback holds this frame, which is to hold no client.
        del call, future


class _Quiet(logging.Logger):
    """librdkafka's log, at debug level: what matters of it reaches the user as an error with its cause.

    librdkafka hands its lines over in the calls that wait for a broker, which do not look at their time-outs between
    two lines. Lines that come faster than they can be kept, as with debug=all where Dagster stores them, are dropped.

    Args:
        hear: Called with each line.
        redact: Takes secrets out of a line, such as those that a token server quotes.
    """

    def __init__(self, hear: Callable[[str], object], redact: Callable[[str], str]) -> None:
        super().__init__(f"{logger.name}.librdkafka")
        self.parent = logger
        self._hear, self._redact = hear, redact
        self._spent, self._dropped = 0.0, 0
        self._last = time.monotonic()

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        line = str(msg) % args if args else str(msg)
        self._hear(line)
        if not self.isEnabledFor(min(level, logging.DEBUG)):
            return
        began = time.monotonic()
        self._spent = max(0.0, self._spent - (began - self._last) * _LOG_SHARE)
        self._last = began
        if self._spent > _LOG_SECONDS:
            self._dropped += 1
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            super().log(
                logging.DEBUG, "%d lines of librdkafka were dropped: they came faster than they are kept", dropped
            )
        super().log(min(level, logging.DEBUG), "%s", self._redact(line), **kwargs)
        self._spent += time.monotonic() - began


def buffer_bytes(options: Mapping[str, Any]) -> int:
    """How much a producer with these settings of librdkafka holds: buffer_memory."""
    return int(options["queue.buffering.max.kbytes"]) * 1024


def refuse_larger_than_buffer(size: int, options: Mapping[str, Any], culprit: str) -> None:
    """Refuse a record for which there is never room, to be called when there is none.

    Args:
        size: Bytes of its value and key.
        options: librdkafka's, of the producer.
        culprit: The record.

    Raises:
        KafkaError: It is larger than buffer_memory.
    """
    room = buffer_bytes(options)
    if size > room:
        raise KafkaError(
            culprit,
            f"it has {size} bytes, and buffer_memory is {room}",
            "Raise buffer_memory, or split the record",
            code="MSG_SIZE_TOO_LARGE",
        )


def timed_out(culprit: str, seconds: float, code: str = "_TIMED_OUT") -> KafkaTimeoutError:
    """The error for a deadline of our own."""
    return KafkaTimeoutError(culprit, f"not done in {seconds:.1f} s [{code}]", fix_for(code), code=code)
