"""An output (mapping, iterable, generator, data frame, file, query) to chunks of encoded records, never held whole."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dataforge_kafka_dagster.kafka.errors import InvalidRecordError
from dataforge_kafka_dagster.kafka.records import Chunk, KafkaRecord, RowEncoder, key_fields, refuse_output
from dataforge_kafka_dagster.kafka.serialization import DEFAULT_ENCODERS, Encoders, format_of, is_message
from dataforge_kafka_dagster.kafka.streams import Stream, open_stream

if TYPE_CHECKING:
    from dataforge_kafka_dagster.kafka.frames import Columns

# Rows and bytes that are encoded at a time at most: as much text as stays in a processor's cache with its rows.
# An iterator's rows may grow from one to the next by any factor: few at a time bound what is held. Those of a list are
# held anyway. A slice of a frame has a price of its own.
_ITERATED: Final = (128, 65_536)
_LISTED: Final = (512, 65_536)
_FRAME: Final = (20_000, 8_000_000)
_CHUNK_SECONDS: Final = 0.5

# Rows of a frame that are worth another thread.
_MANY: Final = 4_096
# Rows that cost less one by one than by halves where half of them are bad.
_FEW: Final = 8

E = TypeVar("E", bound="Chunk | Columns")

BadRecordTaker = Callable[[Any, int, InvalidRecordError], None]
"""Takes a record that cannot be published, its position in the output, and why."""


class Chunks(Iterator[Chunk]):
    """The chunks of an output, and an end for what they are read from.

    Args:
        made: The chunks.
        stream: What they are read from bit by bit, if so.
    """

    def __init__(self, made: Generator[Chunk, None, None], stream: Stream | None) -> None:
        self._made = made
        self._stream = stream

    def __next__(self) -> Chunk:
        return next(self._made)

    def close(self) -> None:
        """Read and encode no more: a file or a database's connection is free for the next attempt, a thread ends."""
        self._made.close()
        if self._stream is not None:
            self._stream.parts.close()


def chunks(
    output: Any,
    key: str | Sequence[str] | None = None,
    start: int = 0,
    encoders: Encoders = DEFAULT_ENCODERS,
    on_bad: BadRecordTaker | None = None,
) -> Chunks:
    """The records of an output, encoded, some megabytes at a time at most.

    Args:
        output: A mapping, dataclass, pydantic model, str, bytes or `KafkaRecord`; a list, iterator or generator of
            those; a data frame, one record per row; or what `open_stream` reads bit by bit.
        key: Field or column that is the record's key; several make a JSON object of them.
        start: What errors add to a record's position.
        encoders: How values and keys become bytes.
        on_bad: Takes each record that cannot be encoded, its position and why; the others go on. None raises.

    Returns:
        The chunks, to be closed by who does not take all of them.

    Raises:
        InvalidRecordError: The output, a record or a field cannot be published. The output's type and a frame's columns
            are checked by the call itself, records when their chunk is made.
    """
    fields = key_fields(key)
    if isinstance(output, KafkaRecord) or format_of(type(output)) is not None or is_message(output):
        output = [output]
    stream = open_stream(output)
    try:
        return Chunks(_chunks(output, stream, fields, start, encoders, on_bad), stream)
    except BaseException:
        if stream is not None:
            stream.parts.close()
        raise


def _chunks(
    output: Any,
    stream: Stream | None,
    fields: tuple[str, ...],
    start: int,
    encoders: Encoders,
    on_bad: BadRecordTaker | None,
) -> Generator[Chunk, None, None]:
    if stream is None or not stream.of_frames:
        if stream is not None:
            output = _peeked(stream.parts)
        elif isinstance(output, Sequence) and not isinstance(output, (list, tuple)):
            output = iter(output)
        if isinstance(output, Iterator):
            return _paced(lambda _, size: _take(output, size), RowEncoder(fields, encoders), start, on_bad, _ITERATED)
        if isinstance(output, (list, tuple)):

            def rows(start: int, size: int) -> Sequence[Any]:
                return output[start : start + size]

            return _paced(rows, RowEncoder(fields, encoders), start, on_bad, _LISTED)
    # Imported by those who have a frame: narwhals is slow to import.
    from dataforge_kafka_dagster.kafka.frames import FrameEncoder, in_pieces, open_frame  # noqa: PLC0415

    def opened(native: Any) -> Any:
        frame = open_frame(native, fields)
        if frame is None:
            raise refuse_output(native)
        if frame.columns and len(frame):  # of no rows, a column may have no type yet
            encoders.prepare(frame, fields)
        return frame

    encode = FrameEncoder(fields, encoders)
    # The first part is read now: a query that fails, or a missing column, is refused before anything is connected.
    frames = _peeked(map(opened, [output] if stream is None else stream.parts))
    return _pieces(_slices(frames, encode, start, on_bad), in_pieces)


def is_repeatable(output: Any) -> bool:
    """Whether an output has a length and gives the same records again: a list, a tuple or a data frame."""
    of_frames = type(output).__module__.partition(".")[0] in {"pandas", "polars", "pyarrow"}
    return isinstance(output, (list, tuple)) or (of_frames and hasattr(output, "__len__"))


def _peeked(parts: Iterator[Any]) -> Iterator[Any]:
    """The same parts, the first of which is read at once."""
    first = list(itertools.islice(parts, 1))

    def all_of_them() -> Iterator[Any]:
        while first:
            yield first.pop()
        yield from parts

    return all_of_them()


def _pieces(
    slices: Generator[E, None, None], in_pieces: Callable[[E], Iterator[Chunk]]
) -> Generator[Chunk, None, None]:
    """The chunks of slices, which are closed with them."""
    with contextlib.closing(slices):
        for part in slices:
            yield from in_pieces(part)


def _slices(
    frames: Iterable[Any], encode: Callable[[Any, int], E], start: int, on_bad: BadRecordTaker | None
) -> Generator[E, None, None]:
    """Slices of frames, encoded; of each frame the next one by another thread while one is sent."""
    with concurrent.futures.ThreadPoolExecutor(1, "encode") as thread:
        # narwhals slices an Arrow table without columns into as many rows as are asked for.
        for frame in filter(len, frames):

            def take(start: int, size: int, frame: Any = frame) -> Any:
                return frame[start : start + size]

            yield from _paced(take, encode, start, on_bad, _FRAME, thread)
            start += len(frame)


def _paced(
    take: Callable[[int, int], Any],
    encode: Callable[[Any, int], E],
    first: int,
    on_bad: BadRecordTaker | None,
    most: tuple[int, int],
    thread: concurrent.futures.Executor | None = None,
) -> Generator[E, None, None]:
    """Take rows and encode them, as many at a time as make the most bytes, going by those before.

    With a thread, the next rows are taken before those encoded are given, and encoded by it meanwhile: where they are
    many, and need no Python for each row, which one thread runs at a time.
    """
    start, size, by_column = 0, 64, False
    ready: Iterable[E] = ()
    while count := len(rows := take(start, size)):
        encoded: Callable[[], E] = functools.partial(encode, rows, first + start)
        if thread is not None and by_column and count >= _MANY:
            with contextlib.suppress(RuntimeError):  # the process ends, and takes no more work for other threads
                encoded = thread.submit(encoded).result
        yield from ready
        try:
            chunk = encoded()
        except InvalidRecordError as error:
            # Without an index it is the output as a whole that cannot be published.
            if on_bad is None or error.index is None:
                raise
            ready = _in_halves(rows, encode, first + start, on_bad)
        else:
            ready = (chunk,)
            by_column = not isinstance(chunk, Chunk)
            fitting = most[1] * count // max(chunk.size, 1)
            size = max(1, min(most[0], fitting, size * 8))
        finally:
            del encoded  # what it has raised holds this function's variables
        if thread is None:
            yield from ready
            ready = ()
        start += count
    yield from ready


def _in_halves(rows: Any, encode: Callable[[Any, int], E], start: int, on_bad: BadRecordTaker) -> Iterator[E]:
    """Encode rows among which are such that cannot be published: by halves, and few of them one by one."""
    size = -(-len(rows) // 2) if len(rows) > _FEW else 1
    for at in range(start, start + len(rows), size):
        part = rows[at - start : at - start + size]
        try:
            chunk = encode(part, at)
        except InvalidRecordError as error:
            if error.index is None:
                raise
            if len(part) > 1:
                yield from _in_halves(part, encode, at, on_bad)
            else:
                on_bad(part[0] if isinstance(part, (list, tuple)) else _row_of(part), at, error)
        else:
            yield chunk


def _row_of(frame: Any) -> dict[str, Any]:
    from dataforge_kafka_dagster.kafka.frames import row_of  # noqa: PLC0415

    return row_of(frame)


def _take(rows: Iterator[Any], size: int) -> list[Any]:
    """The next rows: as many as asked for, or as come within half a second."""
    taken = []
    deadline = time.monotonic() + _CHUNK_SECONDS
    for row in rows:
        taken.append(row)
        if len(taken) >= size or time.monotonic() > deadline:
            break
    return taken
