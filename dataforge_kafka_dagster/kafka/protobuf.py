"""Protobuf messages: derived from Avro, found in the text of a file, checked, and as Python's own values.

The rules of names are those of https://protobuf.dev/programming-guides/proto3/, the forms of well-known types those of
https://protobuf.dev/programming-guides/json/.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime as dt
import functools
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dataforge_kafka_dagster.kafka.avro_check import is_exact
from dataforge_kafka_dagster.kafka.errors import InvalidRecordError, KafkaConfigError, KafkaError, Remedy
from dataforge_kafka_dagster.kafka.schema_types import first_free

_PROTOC_SECONDS: Final = 60


def protobuf_of(avro: Mapping[str, Any]) -> Any:
    """A message class for an Avro record: fields are numbered in their order, and may all be absent.

    Instants are ``google.protobuf.Timestamp``; dates, times, local timestamps, decimals and UUIDs are text.

    Raises:
        InvalidRecordError: A field is a map, or a union of several types; or two have one name in Protobuf's JSON.
    """
    from google.protobuf import descriptor_pb2  # noqa: PLC0415  (optional)

    package, _, name = avro["name"].rpartition(".")
    file = descriptor_pb2.FileDescriptorProto(name=f"{avro['name']}.proto", package=package, syntax="proto3")
    path = f".{avro['name']}"
    _add_message(file.message_type.add(), name, avro["fields"], path, file, {avro["name"]: path})
    try:
        return _class_at(file, [0])
    except TypeError as error:
        raise InvalidRecordError(
            f"Protobuf message of {avro['name']!r}",
            str(error),
            "Rename one of the fields: in Protobuf's JSON, a_b and aB are the same",
        ) from error


def _add_message(
    message: Any, name: str, fields: Sequence[Mapping[str, Any]], path: str, file: Any, known: dict[str, str]
) -> None:
    """Add fields to a message at a path; `known` has the paths of all messages by their Avro names."""
    message.name = name
    # Fields, messages and the oneofs of optional fields share one scope.
    scope = [field["name"] for field in fields]
    for number, field in enumerate(fields, 1):
        avro, repeated = field["type"], False
        if isinstance(avro, list):
            members = [member for member in avro if member != "null"]
            if len(members) != 1:
                raise _not_in_protobuf(f"{name}.{field['name']}", "a union of several types")
            avro = members[0]
        if isinstance(avro, dict) and avro["type"] == "array":
            avro, repeated = avro["items"], True
            avro = avro[-1] if isinstance(avro, list) else avro
        added = message.field.add(name=field["name"], number=number, label=3 if repeated else 1)
        kind = _PROTOBUF.get(avro if isinstance(avro, str) else avro.get("logicalType") or avro["type"])
        if kind == "timestamp":
            added.type, added.type_name = 11, ".google.protobuf.Timestamp"
            if _TIMESTAMP not in file.dependency:
                file.dependency.append(_TIMESTAMP)
        elif kind is not None:
            added.type = kind
        elif isinstance(avro, dict) and avro["type"] == "record":
            own = first_free([avro["name"], f"{avro['name']}_record"], scope)
            scope.append(own)
            added.type, added.type_name = 11, f"{path}.{own}"
            known[avro["name"]] = added.type_name
            _add_message(message.nested_type.add(), own, avro["fields"], added.type_name, file, known)
        elif isinstance(avro, str) and avro in known:
            added.type, added.type_name = 11, known[avro]
        else:
            raise _not_in_protobuf(f"{name}.{field['name']}", str(avro))
        if not repeated:
            added.proto3_optional = True
            added.oneof_index = len(message.oneof_decl)
            scope.append(_oneof_name(field["name"], scope))
            message.oneof_decl.add(name=scope[-1])


def _oneof_name(field: str, scope: Sequence[str]) -> str:
    """The name that protoc gives the oneof of an optional field."""
    name = field if field.startswith("_") else f"_{field}"
    while name in scope:
        name = f"X{name}"
    return name


_TIMESTAMP: Final = "google/protobuf/timestamp.proto"
# Numbers are those of google.protobuf.FieldDescriptorProto.Type.
_PROTOBUF: Final[dict[str, Any]] = {
    "boolean": 8,
    "int": 5,
    "long": 3,
    "float": 2,
    "double": 1,
    "string": 9,
    "bytes": 12,
    "timestamp-micros": "timestamp",
    **dict.fromkeys(("date", "time-micros", "local-timestamp-micros", "decimal", "uuid"), 9),
}


def _not_in_protobuf(place: str, what: str) -> InvalidRecordError:
    return InvalidRecordError(
        f"schema, field {place!r}",
        f"no Protobuf field can be derived from {what}",
        "Give a message class that protoc made, or the .proto file",
        field=place.rpartition(".")[2],
    )


def message_of_text(text: str, wanted: str | None, imports: Mapping[str, str], folder: Path | None = None) -> Any:
    """The class of a message in a file's text.

    Args:
        text: .proto text, or a FileDescriptorProto in base64, as registries keep it.
        wanted: The message: ``Order``, ``Order.Item`` inside of it, or either with the package in front; None for the
            only one.
        imports: The texts of files that it imports, by name. Google's own well-known ones are found by themselves.
        folder: Where else protoc looks for those.

    Raises:
        ValueError: There is no such message, or none is named and there are several.
        KafkaConfigError: The text is no Protobuf.
    """
    file, *others = _files_of_text(text, imports, folder)
    places = {".".join(path): place for path, place in _places(file.message_type)}
    names = [message.name for message in file.message_type]
    if wanted is None and len(names) != 1:
        raise ValueError(f"it has the messages {', '.join(names)}; name one as message")
    wanted = names[0] if wanted is None else wanted
    place = places.get(wanted) or places.get(wanted.removeprefix(f"{file.package}."))
    if place is None:
        raise ValueError(f"it has no message {wanted!r}, but {', '.join(places)}")
    return _class_at(file, place, others)


def message_at(text: str, place: Sequence[int], imports: Mapping[str, str]) -> Any:
    """The class of a message in a file's text, by where it is there.

    Args:
        text: .proto text, or a FileDescriptorProto in base64.
        place: Its number in the file, and in each message around it, as the wire format has it.
        imports: The texts of files that it imports, by name.

    Raises:
        KafkaConfigError: The text is no Protobuf.
    """
    file, *others = _files_of_text(text, imports)
    return _class_at(file, place, others)


def place_of(descriptor: Any) -> list[int]:
    """Where a message is in its file: its number there, and in each message around it."""
    around = descriptor.containing_type
    if around is None:
        return [list(descriptor.file.message_types_by_name).index(descriptor.name)]
    return [*place_of(around), [inner.name for inner in around.nested_types].index(descriptor.name)]


def _places(messages: Sequence[Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """The path and place of each message, and of those inside it."""
    for number, message in enumerate(messages):
        inner = (*path, message.name)
        yield inner, [number]
        for deeper, place in _places(message.nested_type, inner):
            yield deeper, [number, *place]


def _class_at(file: Any, place: Sequence[int], files: Sequence[Any] = ()) -> Any:
    """The class of a message in a FileDescriptorProto, in a pool of its own.

    Args:
        file: The file.
        place: Where the message is: its number in the file, and in each message around it.
        files: The files that it imports; Google's own well-known ones are found by themselves.
    """
    from google.protobuf import descriptor_pool, message_factory  # noqa: PLC0415  (optional)

    pool = descriptor_pool.DescriptorPool()
    given = {imported.name: imported for imported in files}
    added = set()

    def add(one: Any) -> None:
        for name in one.dependency:
            if name not in added:
                added.add(name)
                add(given[name] if name in given else _installed_file(name))
        pool.Add(one)

    add(file)
    message = list(pool.FindFileByName(file.name).message_types_by_name.values())[place[0]]
    for index in place[1:]:
        message = message.nested_types[index]
    return message_factory.GetMessageClass(message)


def _installed_file(name: str) -> Any:
    """A file that an installed package has made known, or one of Google's."""
    from google.protobuf import descriptor_pb2, descriptor_pool  # noqa: PLC0415  (optional)

    if re.fullmatch(r"google(?:/\w+)+\.proto", name):
        with contextlib.suppress(ImportError):
            importlib.import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
    proto = descriptor_pb2.FileDescriptorProto()
    try:
        descriptor_pool.Default().FindFileByName(name).CopyToProto(proto)
    except KeyError:
        raise ValueError(f"it imports {name}, which is not known") from None
    return proto


def _files_of_text(text: str, imports: Mapping[str, str], folder: Path | None = None) -> list[Any]:
    """The FileDescriptorProto of a text, and those of the files that it imports."""
    own, sources, encoded = _decoded(text), {}, {}
    for name, some in imports.items():
        file = _decoded(some)
        if file is None:
            sources[name] = some
        else:
            file.name = name
            encoded[name] = file
    imported = any('"schema.proto"' in some for some in (text, *imports.values()))
    name = "schema-of-these.proto" if imported else "schema.proto"
    if own is None:
        sources[name] = text
    compiled = _compiled(sources, list(encoded.values()), folder) if sources else {}
    main = compiled.pop(name) if own is None else own
    return [main, *(compiled | encoded).values()]


def _compiled(sources: Mapping[str, str], known: Sequence[Any], folder: Path | None) -> dict[str, Any]:
    """What protoc makes of .proto files, and of what they import, by name."""
    from google.protobuf import descriptor_pb2  # noqa: PLC0415  (optional)

    try:
        from grpc_tools import protoc  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise KafkaConfigError(
            "Protobuf schema as text",
            "protoc is missing, which reads it",
            "Install grpcio-tools, or give a message class as KafkaSchema(message='package.module_pb2:Message')",
        ) from error
    with tempfile.TemporaryDirectory() as temporary:
        here, output, others = (Path(temporary).resolve() / name for name in ("files", "out.bin", "known.bin"))
        here.mkdir()
        for name, source in sources.items():
            path = (here / name).resolve()
            if not path.is_relative_to(here):
                raise KafkaConfigError("Protobuf schema", f"it imports {name!r}, which names no file", "Correct it")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        others.write_bytes(descriptor_pb2.FileDescriptorSet(file=known).SerializeToString())
        include = [here, Path(protoc.__file__).parent / "_proto", *([folder.resolve()] if folder else [])]
        try:
            done = subprocess.run(  # noqa: S603
                [
                    *(sys.executable, "-m", "grpc_tools.protoc", f"--descriptor_set_out={output}", "--include_imports"),
                    *(f"-I{path}" for path in include),
                    *([f"--descriptor_set_in={others}"] if known else []),
                    *(str(here / name) for name in sources),
                ],
                capture_output=True,
                text=True,
                timeout=_PROTOC_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            cause = f"protoc has not read it after {_PROTOC_SECONDS} s"
            fix = "Try again, on a machine that does less at once"
            raise KafkaError("Protobuf schema as text", cause, fix, remedy=Remedy.RETRY) from None
        if done.returncode:
            raise KafkaConfigError("Protobuf schema", done.stderr.strip().replace(f"{here}/", ""), "Correct it")
        return {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file}


def _decoded(text: str) -> Any:
    """A FileDescriptorProto from its base64 form; None if the text has another."""
    from google.protobuf import descriptor_pb2  # noqa: PLC0415  (optional)

    try:
        return descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return None
    except Exception as error:
        raise KafkaConfigError("Protobuf schema", str(error), "Give .proto text or a message class") from error


def message_to_dict(message: Any) -> dict[str, Any]:
    """A Protobuf message as a mapping: absent fields are None, timestamps aware datetimes, enums their names.

    Of the other well-known types, wrappers and Struct are what they hold, Duration and FieldMask the text that is their
    JSON form, which a message takes again.
    """
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence:  # as every message; Struct and ListValue are a Mapping and Sequence too
            values[field.name] = _from_message(value, field) if message.HasField(field.name) else None
        elif isinstance(value, Mapping):
            of_value = field.message_type.fields_by_name["value"]
            values[field.name] = {key: _from_message(item, of_value) for key, item in value.items()}
        elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            values[field.name] = [_from_message(item, field) for item in value]
        else:
            values[field.name] = _from_message(value, field)
    return values


def _from_message(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        name = field.message_type.full_name
        if name == "google.protobuf.Timestamp":
            return value.ToDatetime(dt.timezone.utc)
        if name in _WRAPPERS:
            return value.value
        if name in _OF_JSON:
            from google.protobuf.json_format import MessageToDict  # noqa: PLC0415  (optional)

            return MessageToDict(value)
        return message_to_dict(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known else value
    return value


_WRAPPERS: Final = frozenset(
    f"google.protobuf.{kind}Value"
    for kind in ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
)
_OF_JSON: Final = frozenset(
    f"google.protobuf.{name}" for name in ("Duration", "FieldMask", "ListValue", "Struct", "Value")
)


def with_required(message: Any) -> Any:
    """The message with defaults in the fields that proto2 requires, without which nothing of it is written."""
    for field in message.DESCRIPTOR.fields:
        # Older protobuf has only the label.
        if getattr(field, "is_required", None) or (not hasattr(field, "is_required") and field.label == _REQUIRED):
            if field.message_type is None:
                setattr(message, field.name, field.default_value)
            else:
                inner = getattr(message, field.name)
                inner.SetInParent()
                with_required(inner)
    return message


_REQUIRED: Final = 2
# As a Decimal is written; longer ones are no whole numbers of any type.
_WHOLE: Final = re.compile(r"-?\d{1,300}")


def rounded_number(value: Any, descriptor: Any, path: str = "") -> str | None:
    """Dotted path of the first whole number that a message would hold rounded, in a field that is a float or double.

    Args:
        value: What the message is to be made of, as JSON values.
        descriptor: The message's.
        path: Where it is.
    """
    fields = _fractional(descriptor) if isinstance(value, Mapping) else {}
    for name, item in value.items() if fields else ():
        field = fields.get(name)
        if field is None:
            continue
        items: Iterable[Any] = item if isinstance(item, list) else [item]
        if isinstance(item, Mapping) and field.message_type is not None and field.message_type.GetOptions().map_entry:
            field, items = field.message_type.fields_by_name["value"], item.values()
        if field.message_type is not None and field.message_type.full_name in _WRAPPERS:
            field = field.message_type.fields_by_name["value"]
        for one in items:
            found = None
            if field.message_type is not None:
                found = rounded_number(one, field.message_type, f"{path}{name}.")
            elif (
                (type(one) is int or (isinstance(one, str) and _WHOLE.fullmatch(one)))
                and _is_fractional(field)
                and not is_exact(int(one), "f" if field.cpp_type == field.CPPTYPE_FLOAT else "d")
            ):
                found = f"{path}{name}"
            if found is not None:
                return found
    return None


def _is_fractional(field: Any) -> bool:
    return field.cpp_type in {field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE}


@functools.lru_cache(1024)
def _fractional(descriptor: Any) -> dict[str, Any]:
    """The fields that are floats, doubles or messages, but no other well-known ones, by each of their names in JSON."""

    def counts(field: Any) -> bool:
        inner = field.message_type
        if inner is None:
            return _is_fractional(field)
        return inner.full_name in _WRAPPERS or not inner.full_name.startswith("google.protobuf.")

    return {name: field for field in filter(counts, descriptor.fields) for name in (field.name, field.json_name)}
