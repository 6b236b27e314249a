"""Finds what fastavro would write as another value than it is given: "no" as true, None as false, a moment as its day.

It checks the types of a union's members, to choose one, and of most others when it writes them; the rest is checked
here.
fastavro's own `validate` has the same rules, but takes 18 times as long as to write where fields may be null (fastavro
1.13: 680 microseconds beside 37, the flights; these checks take less than one there).
"""

from __future__ import annotations

import datetime as dt
import decimal
import functools
import io
import math
import numbers
import struct
import typing
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple


class Misfit(NamedTuple):
    """What of a value does not fit, and why.

    Attributes:
        field: Dotted path of the field; empty if it is the value as a whole.
        cause: What is wrong with it.
    """

    field: str
    cause: str


Check = Callable[[Any], "Misfit | None"]


def avro_check(avro: Any, others: Sequence[Any] = ()) -> Check | None:
    """A function that tells what of a value would be written as something else.

    Args:
        avro: An Avro schema as JSON values.
        others: The schemas that define what it refers to by name, each behind those that it refers to itself.

    Returns:
        None if there is nothing that fastavro does not check.
    """
    schemas = [*others, avro]
    schemas = [schema for i, schema in enumerate(schemas) if schema not in schemas[:i]]
    checks = _Checks(schemas)
    return [checks.of(schema) for schema in schemas][-1]


class _Checks:
    """Checks by type. What is inside a union has its type checked already."""

    def __init__(self, schemas: Sequence[Any]) -> None:
        self._schemas = schemas
        self._records: dict[str, Any] = {}
        self._made: dict[tuple[str, bool], list[Check | None]] = {}

    def of(self, avro: Any, space: str = "", *, in_union: bool = False) -> Check | None:
        if isinstance(avro, list):
            return self._of_union(avro, space)
        if isinstance(avro, str):
            return (_IN_UNIONS if in_union else _SCALARS).get(avro) or self._of_name(avro, space, in_union)
        kind = avro["type"]
        if kind in {"record", "error"}:
            return self._of_record(avro, space, in_union)
        if kind == "array":
            return _each(self.of(avro["items"], space, in_union=in_union), in_union)
        if kind == "map":
            return _values(self.of(avro["values"], space, in_union=in_union))
        logical = avro.get("logicalType")
        if logical in _LOGICAL:
            return _LOGICAL[logical]
        if logical == "decimal" and kind == "fixed":
            return _no_minus_zero
        if logical is not None and kind in {"int", "long"}:
            return None if in_union else _no_fraction
        return self.of(kind, space, in_union=in_union)

    def _of_union(self, members: list[Any], space: str) -> Check | None:
        others = [member for member in members if member != "null"]
        only = others[0] if len(others) == 1 else None
        if isinstance(only, dict) and only["type"] == "array":  # no other member takes text or bytes
            return self.of(only, space)
        wider = {"float": "double"}
        timed = any("timestamp" in member.get("logicalType", "") for member in members if isinstance(member, dict))
        checks = {
            i: check
            for i, member in enumerate(members)
            if (check := self.of(member, space, in_union=True))
            and not (check is _uuid and "string" in members[:i])
            and not (isinstance(member, str) and wider.get(member) in members)
        }
        for i, member in enumerate(members):
            if checks.get(i) is _date and timed:
                checks[i] = _no_datetime
            if taken := _taken(member, members[i + 1 :]):
                checks[i] = _before(taken, member["logicalType"], checks.get(i))
        if not checks:
            return None
        if only is not None:
            return next(iter(checks.values()))
        choose = self._choice(members, space)

        def chosen(value: Any) -> Misfit | None:
            misfit = next((misfit for check in checks.values() if (misfit := check(value))), None)
            if misfit is None or (i := choose(value)) is None:
                return misfit
            return checks[i](value) if i in checks else None

        return chosen

    def _choice(self, members: list[Any], space: str) -> Callable[[Any], int | None]:
        """A function that tells which member fastavro writes a value as; None if it cannot be told."""
        types = [_by_name(member, space) for member in members]

        @functools.cache
        def schema() -> Any:
            from fastavro import parse_schema  # noqa: PLC0415  (optional)

            # Arrays of the whole schemas, always empty, define the names.
            fields = [
                {"name": f"names{i}", "type": {"type": "array", "items": avro}, "default": []}
                for i, avro in enumerate(self._schemas)
            ]
            return parse_schema(
                {"type": "record", "name": "_Choice", "fields": [*fields, {"name": "value", "type": types}]}
            )

        def choose(value: Any) -> int | None:
            from fastavro import schemaless_reader, schemaless_writer  # noqa: PLC0415  (optional)

            written = io.BytesIO()
            try:
                schemaless_writer(written, schema(), {"value": value})
            except Exception:  # noqa: BLE001  (no member fits, or schemas of other subjects have a name twice)
                return None
            written.seek(len(self._schemas))
            return typing.cast("int", schemaless_reader(written, "long", None))

        return choose

    def _of_record(self, avro: Mapping[str, Any], space: str, in_union: bool) -> Check | None:
        name = _full_name(avro["name"], avro.get("namespace", space))
        self._records[name] = avro
        made = self._made[name, in_union] = []
        within = name.rpartition(".")[0]
        checks = [
            (field["name"], check)
            for field in avro["fields"]
            if (check := self.of(field["type"], within, in_union=in_union))
        ]

        def fields(value: Any) -> Misfit | None:
            if isinstance(value, Mapping):
                for field, check in checks:
                    if field in value and (misfit := check(value[field])):
                        return _within(field, misfit)
            return None

        made.append(fields if checks else None)
        return made[0]

    def _of_name(self, name: str, space: str, in_union: bool) -> Check | None:
        name = _full_name(name, space)
        if name not in self._records:
            return None
        if (name, in_union) not in self._made:
            return self._of_record(self._records[name], name.rpartition(".")[0], in_union)
        made = self._made[name, in_union]

        # Inside itself a record is not made yet.
        return made[0] if made else lambda value: made[0] and made[0](value)


def _full_name(name: str, space: str | None) -> str:
    return f"{space}.{name}" if space and "." not in name else name


def _by_name(avro: Any, space: str) -> Any:
    """The type with full names in place of definitions."""
    if isinstance(avro, list):
        return [_by_name(member, space) for member in avro]
    if isinstance(avro, str):
        return avro if avro in _UNNAMED else _full_name(avro, space)
    if avro["type"] in {"record", "error", "enum", "fixed"}:
        return _full_name(avro["name"], avro.get("namespace", space))
    return avro | {part: _by_name(avro[part], space) for part in ("type", "items", "values") if part in avro}


def _taken(logical: Any, behind: Sequence[Any]) -> set[str]:
    """The plain types behind a logical one in a union whose values fastavro would write as that."""
    if not isinstance(logical, dict) or logical.get("logicalType") not in {*_LOGICAL, "decimal"}:
        return set()
    taken = _TAKEN.get(str(logical["type"]), set()) | ({"string"} if logical["logicalType"] == "date" else set())
    bare = (member["type"] if isinstance(member, dict) and "logicalType" not in member else member for member in behind)
    return taken.intersection(name for name in bare if isinstance(name, str))


def _before(taken: set[str], logical: str, check: Check | None) -> Check:
    """The check of a logical type that stands before plain ones."""

    def plain(value: Any) -> Misfit | None:
        for name in taken:
            if _PLAIN[name](value):
                return Misfit("", f"it would become a {logical}; in a union, put {name} before the {logical}")
        return check(value) if check else None

    return plain


def _within(field: object, misfit: Misfit) -> Misfit:
    return Misfit(f"{field}.{misfit.field}".rstrip("."), misfit.cause)


def _each(check: Check | None, in_union: bool) -> Check | None:
    if in_union and check is None:
        return None

    def items(value: Any) -> Misfit | None:
        if isinstance(value, (str, bytes, Mapping)):
            return None if in_union else _not(value, "array")
        if check is not None and isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if misfit := check(item):
                    return _within(i, misfit)
        return None

    return items


def _values(check: Check | None) -> Check | None:
    if check is None:
        return None

    def values(value: Any) -> Misfit | None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                if misfit := check(item):
                    return _within(key, misfit)
        return None

    return values


def _not(value: object, wanted: str) -> Misfit:
    return Misfit("", f"it is of type {type(value).__qualname__}, not {wanted}")


def _no_minus_zero(value: Any) -> Misfit | None:
    """fastavro writes it to a fixed as another number."""
    minus = isinstance(value, decimal.Decimal) and value.is_zero() and value.is_signed()
    return Misfit("", "it is minus zero, which a decimal of this kind is not: give 0") if minus else None


def _null(value: Any) -> Misfit | None:
    return None if value is None else _not(value, "null")


def _boolean(value: Any) -> Misfit | None:
    # numpy's is no bool.
    return None if isinstance(value, bool) or type(value).__name__ in {"bool", "bool_"} else _not(value, "boolean")


def _is_whole(value: Any) -> bool:
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def _int(value: Any) -> Misfit | None:
    if not _is_whole(value):
        return _not(value, "int")
    return None if -(2**31) <= value < 2**31 else Misfit("", f"{value} does not fit into an int of 32 bits")


def _long(value: Any) -> Misfit | None:
    return None if _is_whole(value) else _not(value, "long")


def _no_fraction(value: Any) -> Misfit | None:
    fraction = value is not None and isinstance(value, numbers.Number) and not _is_whole(value)
    return _not(value, "a whole number") if fraction else None


def _is_real(value: Any) -> bool:
    return type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def _double(value: Any) -> Misfit | None:
    return _rounded_to_double(value) if _is_real(value) else _not(value, "double")


def _float(value: Any) -> Misfit | None:
    return _rounded_to_float(value) if _is_real(value) else _not(value, "float")


def _rounded_to_double(value: Any) -> Misfit | None:
    # What else a union has is no number.
    if value is None or type(value) is float or not _is_whole(value) or is_exact(value, "d"):
        return None
    return Misfit("", f"{value} would be rounded as a double")


def _rounded_to_float(value: Any) -> Misfit | None:
    if not _is_real(value):
        return None
    if _LARGEST_FLOAT < abs(value) < math.inf:
        return Misfit("", f"{value} does not fit into a float of 32 bits")
    # A fraction is an approximation in any case.
    return Misfit("", f"{value} would be rounded as a float") if _is_whole(value) and not is_exact(value, "f") else None


def is_exact(value: Any, form: str) -> bool:
    """Whether a whole number is a float too, of 64 bits ("d") or 32 ("f")."""
    try:
        return bool(struct.unpack(form, struct.pack(form, float(value)))[0] == int(value))
    except OverflowError:
        return False


_LARGEST_FLOAT: Final = 3.4028235677973366e38


def _instant(value: Any) -> Misfit | None:
    if isinstance(value, dt.datetime):
        # fastavro would take it for this machine's local time.
        return Misfit("", "a datetime without a time zone is no instant") if value.tzinfo is None else None
    return _no_fraction(value)


def _local(value: Any) -> Misfit | None:
    if isinstance(value, dt.datetime):
        return None if value.tzinfo is None else Misfit("", "a datetime with a time zone is no local time")
    return _no_fraction(value)


def _time(value: Any) -> Misfit | None:
    if isinstance(value, dt.time):
        return None if value.tzinfo is None else Misfit("", "Avro's times have no time zone")
    return _no_fraction(value)


def _date(value: Any) -> Misfit | None:
    if isinstance(value, dt.datetime):
        # pandas has no dates, but midnights.
        return None if value.tzinfo is None and value.time() == dt.time() else _no_datetime(value)
    return _no_fraction(value)


def _no_datetime(value: Any) -> Misfit | None:
    if isinstance(value, dt.datetime):
        return Misfit("", "a datetime would lose its time as a date; in a union, put the timestamp before the date")
    return _no_fraction(value)


def _uuid(value: Any) -> Misfit | None:
    if isinstance(value, str):
        try:
            uuid.UUID(value)
        except ValueError:
            return Misfit("", f"{value[:100]!r} is no UUID")
    return None


_UNNAMED: Final = {"null", "boolean", "int", "long", "float", "double", "bytes", "string", "array", "map"}
_SCALARS: Final[Mapping[str, Check]] = {
    "null": _null, "boolean": _boolean, "int": _int, "long": _long, "float": _float, "double": _double
}  # fmt: skip
_NUMBERS: Final = {"int", "long", "float", "double"}
_PLAIN: Final[Mapping[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_NUMBERS, _is_whole),
    "string": lambda value: isinstance(value, str),
    "bytes": lambda value: isinstance(value, (bytes, bytearray)),
}
_TAKEN: Final[Mapping[str, set[str]]] = {
    "int": _NUMBERS, "long": _NUMBERS, "string": {"string"}, "bytes": {"bytes"}, "fixed": {"bytes"}
}  # fmt: skip
_IN_UNIONS: Final[Mapping[str, Check]] = {"float": _rounded_to_float, "double": _rounded_to_double}
_LOGICAL: Final[Mapping[str, Check]] = {
    **dict.fromkeys(("timestamp-millis", "timestamp-micros", "timestamp-nanos"), _instant),
    **dict.fromkeys(("local-timestamp-millis", "local-timestamp-micros", "local-timestamp-nanos"), _local),
    **dict.fromkeys(("time-millis", "time-micros"), _time),
    "date": _date,
    "uuid": _uuid,
}
