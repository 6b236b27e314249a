"""A proxy before one broker that loses requests and answers, delays them, and refuses batches in the broker's name."""

import asyncio
import collections
import contextlib
import random
import struct
import threading

PRODUCE, API_VERSIONS = 0, 18
"""Numbers of requests: https://kafka.apache.org/protocol#protocol_api_keys"""
FAULTS = ("request lost", "answer lost", "answer late", "batch refused", "batch written, answered as timed out")
NOT_LEADER_OR_FOLLOWER, REQUEST_TIMED_OUT = 6, 7


class Wire:
    """Stands on a port of its own for the broker on another one; a context manager.

    Args:
        broker_port: The broker's port.
        seed: Of what is done to which request.

    Attributes:
        port: Its own port.
        share: The share of requests that it spoils, from 0 to 1.
        only: Numbers of the requests that it may spoil; None for all.
        spoilt: How often it did what.
    """

    def __init__(self, broker_port, seed):
        self._broker_port = broker_port
        self._random = random.Random(seed)
        self.share = 0.0
        self.only = None
        self.spoilt = collections.Counter()

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire")
        self._thread.start()
        opening = asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(opening, self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self):
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, from_client, to_client):
        try:
            from_broker, to_broker = await asyncio.open_connection("127.0.0.1", self._broker_port)
        except OSError:
            to_client.close()
            return
        fates = {}
        ways = [
            asyncio.ensure_future(self._pass_requests(from_client, to_broker, to_client, fates)),
            asyncio.ensure_future(self._pass_answers(from_broker, to_client, fates)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (to_client, to_broker):
                end.transport.abort()

    async def _pass_requests(self, reader, to_broker, to_client, fates):
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                frame = await _read(reader)
                kind, version, number = struct.unpack_from(">hhi", frame)
                fate = self._fate(kind, version)
                if fate == "request lost":
                    return
                if fate == "batch refused":
                    await _write(to_client, _answer(frame, NOT_LEADER_OR_FOLLOWER))
                    continue
                fates[number] = fate, _answer(frame, REQUEST_TIMED_OUT) if fate == FAULTS[-1] else None
                await _write(to_broker, frame)

    def _fate(self, kind, version):
        if kind == API_VERSIONS or (self.only and kind not in self.only) or self._random.random() >= self.share:
            return None
        # Other versions have another layout.
        possible = FAULTS if kind == PRODUCE and version in range(9, 13) else FAULTS[:3]
        fate = self._random.choice(possible)
        self.spoilt[fate] += 1
        return fate

    async def _pass_answers(self, reader, to_client, fates):
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                frame = await _read(reader)
                (number,) = struct.unpack_from(">i", frame)
                fate, other = fates.pop(number, (None, None))
                if fate == "answer lost":
                    return
                if fate == "answer late":
                    await asyncio.sleep(self._random.uniform(0.05, 1.5))
                await _write(to_client, other or frame)


async def _read(reader):
    (size,) = struct.unpack(">i", await reader.readexactly(4))
    return await reader.readexactly(size)


async def _write(writer, frame):
    writer.write(struct.pack(">i", len(frame)) + frame)
    await writer.drain()


def _varint(frame, at):
    value = shift = 0
    while True:
        value |= (frame[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not frame[at - 1] & 0x80:
            return value, at


def _answer(frame, code):
    """An error for the one batch of a Produce request; librdkafka sends each batch by itself."""
    _, _, number, client = struct.unpack_from(">hhih", frame)
    _tags, at = _varint(frame, 10 + max(client, 0))
    transactional_id, at = _varint(frame, at)
    topics, topic_at = _varint(frame, at + max(transactional_id - 1, 0) + 6)  # behind acks and the timeout
    size, at = _varint(frame, topic_at)
    partitions, partition_at = _varint(frame, at + size - 1)
    assert topics == partitions == 2  # one more than there are
    topic, partition = frame[topic_at : at + size - 1], frame[partition_at : partition_at + 4]
    result = partition + struct.pack(">hqqq", code, -1, -1, -1) + b"\1\0\0"
    return struct.pack(">i", number) + b"\0\2" + topic + b"\2" + result + b"\0" + bytes(4) + b"\0"
