"""The mock cluster inside librdkafka, for broker errors that a real broker cannot be made to give.

It proves nothing about isolation or exactly once: it neither aborts nor stores a ledger.
"""

import ctypes
from pathlib import Path

import confluent_kafka

PRODUCE, ADD_PARTITIONS, ADD_OFFSETS, END_TXN, TXN_OFFSETS = 0, 24, 25, 26, 28
"""Numbers of requests: https://kafka.apache.org/protocol#protocol_api_keys"""


def _library():
    package = Path(confluent_kafka.__file__).parent
    # Where wheels for Linux and for macOS have it.
    (path,) = [*package.parent.glob("confluent_kafka.libs/librdkafka*"), *package.glob(".dylibs/librdkafka*")]
    library = ctypes.CDLL(str(path))
    for name, result, *arguments in [
        ("rd_kafka_new", "p", "i", "p", "s", "z"),
        ("rd_kafka_conf_new", "p"),
        ("rd_kafka_destroy", None, "p"),
        ("rd_kafka_mock_cluster_new", "p", "p", "i"),
        ("rd_kafka_mock_cluster_destroy", None, "p"),
        ("rd_kafka_mock_cluster_bootstraps", "s", "p"),
        ("rd_kafka_mock_topic_create", "i", "p", "s", "i", "i"),
        ("rd_kafka_mock_push_request_errors_array", None, "p", "h", "z", "e"),
        ("rd_kafka_mock_broker_set_rtt", "i", "p", "i", "i"),
        ("rd_kafka_mock_coordinator_set", "i", "p", "s", "s", "i"),
        ("rd_kafka_mock_partition_set_leader", "i", "p", "s", "i", "i"),
        ("rd_kafka_mock_start_request_tracking", None, "p"),
        ("rd_kafka_mock_get_requests", "a", "p", "n"),
        ("rd_kafka_mock_request_api_key", "h", "p"),
        ("rd_kafka_mock_request_destroy_array", None, "a", "z"),
    ]:
        kinds = {
            "p": ctypes.c_void_p,
            "i": ctypes.c_int,
            "s": ctypes.c_char_p,
            "z": ctypes.c_size_t,
            "h": ctypes.c_int16,
            "e": ctypes.POINTER(ctypes.c_int),
            "n": ctypes.POINTER(ctypes.c_size_t),
            "a": ctypes.POINTER(ctypes.c_void_p),
            None: None,
        }
        function = getattr(library, name)
        function.restype, function.argtypes = kinds[result], [kinds[kind] for kind in arguments]
    return library


class MockCluster:
    """Brokers on this machine's loopback interface, in this process; a context manager.

    Attributes:
        bootstrap_servers: Their addresses.
    """

    def __init__(self, brokers=3):
        self._brokers = brokers

    def __enter__(self):
        self._library = _library()
        text = ctypes.create_string_buffer(512)
        self._client = self._library.rd_kafka_new(0, self._library.rd_kafka_conf_new(), text, 512)
        assert self._client, text.value
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._client, self._brokers)
        self._library.rd_kafka_mock_start_request_tracking(self._cluster)
        self.bootstrap_servers = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        return self

    def __exit__(self, *_):
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)

    def create_topic(self, topic, partitions=1):
        """Create a topic with as many replicas as there are brokers."""
        assert self._library.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, self._brokers) == 0

    def fail_next(self, request, *codes):
        """Answer the next requests of this kind, on any broker, with these error codes."""
        array = (ctypes.c_int * len(codes))(*codes)
        self._library.rd_kafka_mock_push_request_errors_array(self._cluster, request, len(codes), array)

    def count(self, request):
        """How many requests of this kind have come."""
        size = ctypes.c_size_t()
        requests = self._library.rd_kafka_mock_get_requests(self._cluster, ctypes.byref(size))
        found = [self._library.rd_kafka_mock_request_api_key(requests[i]) for i in range(size.value)]
        self._library.rd_kafka_mock_request_destroy_array(requests, size)
        return found.count(request)

    def answer_after(self, milliseconds):
        """Let every broker take this long for each answer, also for those that it has not given yet."""
        for broker in range(1, self._brokers + 1):
            assert self._library.rd_kafka_mock_broker_set_rtt(self._cluster, broker, milliseconds) == 0

    def move_coordinator(self, transactional_id, broker):
        """Make this broker (from 1) the coordinator of a transactional id."""
        name = transactional_id.encode()
        assert self._library.rd_kafka_mock_coordinator_set(self._cluster, b"transaction", name, broker) == 0

    def move_leader(self, topic, partition, broker):
        """Make this broker (from 1) the leader of a Kafka partition."""
        assert self._library.rd_kafka_mock_partition_set_leader(self._cluster, topic.encode(), partition, broker) == 0
