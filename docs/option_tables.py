"""A hook of mkdocs that puts the tables of options into the reference, for mkdocstrings does not show them."""

import html
import inspect
import re
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import dataforge_kafka_dagster
from dataforge_kafka_dagster.kafka import registry

_TABLE = re.compile(r"^<!-- options: (\w+)(?: without (\w+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with a table for each `<!-- options: Class -->`, `without` another class's options or one option.

    Raises:
        AttributeError: There is no such class.
    """
    return _TABLE.sub(lambda found: _table(*found.groups()), markdown)


def options_of(name: str) -> dict[str, FieldInfo]:
    """The options of a public class, its own first; a component's are the attributes of its YAML."""
    found = getattr(registry if name == "SchemaRegistryConfig" else dataforge_kafka_dagster, name)
    model: type[BaseModel] = found if issubclass(found, BaseModel) else found.model()
    own = [option for cls in model.__mro__ for option in inspect.get_annotations(cls)]
    return {option: model.model_fields[option] for option in own if option in model.model_fields}


def _table(name: str, without: str | None) -> str:
    leave = options_of(without) if without in dataforge_kafka_dagster.__all__ else {without}
    rows = [
        f"| `{option}` | `{_type(info.annotation)}` | {_default(info)} | {_cell(info.description or '')} |"
        for option, info in options_of(name).items()
        if option not in leave
    ]
    return "\n".join(["| option | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def _type(annotation: Any) -> str:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "mapping"
    # Without modules; what is private is Dagster's form of a public class.
    return re.sub(r"\b(?:\w+\.)+", "", inspect.formatannotation(annotation)).replace("_Topic", "KafkaTopic")


def _default(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True)
    return "required" if info.is_required() else f"`{ {} if isinstance(default, BaseModel) else default!r}`"


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", r"\|").replace("\n", " ")
