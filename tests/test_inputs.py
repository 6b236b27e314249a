"""What records are read back as: frames with all columns and exact values, models, lists, by annotation."""

import dataclasses
import datetime as dt
import decimal
import types
import uuid

import orjson
import pandas as pd
import polars as pl
import pydantic
import pytest

from dataforge_kafka_dagster import KafkaError, KafkaRecord, inputs
from dataforge_kafka_dagster.kafka.models import KNOWS_NAMES
from dataforge_kafka_dagster.kafka.reader import ReadRecord
from dataforge_kafka_dagster.kafka.serialization import serialize_value

BIG = 2**53 + 1  # not a float


@pytest.fixture(params=["json", "decoded"])
def frame(request):
    """Makes a frame of rows, from their JSON or as a schema decodes them."""
    return lambda library, rows: inputs.frame_of(
        library, list(map(orjson.dumps, rows)) if request.param == "json" else rows
    )


def listed(made):
    """A frame's columns as lists, in order, with None for what is missing."""
    if isinstance(made, pd.DataFrame):
        return [(name, [None if pd.isna(value) else value for value in made[name].tolist()]) for name in made]
    return list((made.to_dict(as_series=False) if isinstance(made, pl.DataFrame) else made.to_pydict()).items())


@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([{"a": 1}, {"a": 2, "b": 3}], [("a", [1, 2]), ("b", [None, 3])]),
        ([{"z": 1}, {"b": "x", "a": None}, {"a": 0.5}], [("z", [1, None, None]), ("b", [None, "x", None]), ("a", [None, None, 0.5])]),
        ([{"id": BIG}, {"id": None}], [("id", [BIG, None])]),
        ([{"s": "x"}, {"id": -BIG, "s": "y"}], [("s", ["x", "y"]), ("id", [None, -BIG])]),
        ([{"id": 2**63 - 1}, {}, {"id": -(2**63)}], [("id", [2**63 - 1, None, -(2**63)])]),
        ([], []),
    ],
)  # fmt: skip
def test_all_columns_of_all_rows_come_back_exact(library, rows, columns, frame):
    made = dict(listed(frame(library, rows)))
    assert made == dict(columns)
    if library != "polars":  # which begins with those of its longest row
        assert list(made) == [name for name, _ in columns]
    for name, values in columns:
        assert list(map(type, made[name])) == list(map(type, values))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([BIG, None], "Int64"),
        ([0, None], "Int64"),
        ([None, 2**64 - 1, BIG], "UInt64"),
        ([1, BIG], "int64"),
        ([1, 2**64 - 1], "uint64"),
        ([1, 0.5, None], "float64"),
        ([0.5, None], "float64"),
        ([True, None], "object"),
        ([True, 1, None], "object"),
        ([[1], None], "object"),
        ([None, None], "object"),
    ],
)
def test_only_columns_of_integers_and_missing_values_get_another_dtype(values, dtype, frame):
    rows = [{"id": value} for value in values]
    made = frame("pandas", rows)
    assert made["id"].dtype == dtype
    assert listed(made) == [("id", values)]
    if dtype not in {"Int64", "UInt64"}:
        pd.testing.assert_frame_equal(made, pd.DataFrame(rows))


@pytest.mark.parametrize(
    "values", [[None, 2**63, -1, BIG], [2**64, BIG, None], [None, 2**63, None, 2**64, BIG], [-(2**63) - 1, None, BIG]]
)
def test_integers_that_need_more_than_64_bits_stay_pythons_own(values):
    made = inputs.frame_of("pandas", [{"id": value} for value in values])
    assert made["id"].dtype == object
    assert listed(made) == [("id", values)]


@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
def test_integers_of_64_bits_without_sign_come_back_exact(library, frame):
    made = frame(library, [{"n": 1}, {"n": 2**64 - 1}, {"n": None}])
    assert listed(made) == [("n", [1, 2**64 - 1, None])]


@pytest.mark.parametrize("library", ["polars", "pyarrow"])
@pytest.mark.parametrize(
    "values",
    [
        [1, "x"],
        ["x", 1],
        ["x", -0.5, None],
        ["x", True],
        [1, True],
        [1.5, True],
        [1, [1]],
        ["x", [1]],
        [{"a": 1}, 1],
        ["x", {"a": 1}],
    ],
)
def test_a_column_of_values_that_fit_no_type_is_refused(library, values, frame):
    with pytest.raises(KafkaError, match=f"annotated as a {library} frame: .* list") as caught:
        frame(library, [{"a": value} for value in values])
    assert "\n" not in str(caught.value)


DAY, MOMENT = dt.date(2020, 1, 1), dt.datetime(2020, 1, 1, 5, 30, tzinfo=dt.timezone.utc)


@pytest.mark.parametrize("library", ["polars", "pyarrow"])
@pytest.mark.parametrize("within", [lambda value: value, lambda value: [value], lambda value: {"a": [value]}])
@pytest.mark.parametrize(
    "values",
    [[DAY, MOMENT], [MOMENT, DAY], [MOMENT, MOMENT.replace(tzinfo=None)], [DAY, 1], [MOMENT, 1.5], ["x", b"y"]],
)
def test_values_that_a_column_would_change_are_refused(library, values, within):
    """pyarrow makes days of moments, moments of numbers, and bytes of text."""
    with pytest.raises(KafkaError, match=f"annotated as a {library} frame: .* column 'a"):
        inputs.frame_of(library, [{"a": within(value)} for value in values])


@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
def test_whole_numbers_that_floats_would_round_are_refused(library, frame):
    for rows in ([2**53 + 1, 1.5], [2**60, 2**53 + 1, 1.5], [[2**53 + 1], [1.5]], [{"x": 1.5}, {"x": 2**53 + 1}]):
        if library != "pandas" or not isinstance(rows[0], (list, dict)):
            with pytest.raises(KafkaError, match="do not fit into one: .*9007199254740993"):
                frame(library, [{"n": row} for row in rows])
    assert listed(frame(library, [{"n": 2**53}, {"n": 1.5}, {"n": -(2.0**60)}])) == [("n", [2**53, 1.5, -(2.0**60)])]


@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
def test_records_from_before_there_was_a_schema_are_rows_too(library):
    for lines in ([b'{"n":1}', {"n": 2}], [{"n": 1}, b'{"n":2}']):
        assert listed(inputs.frame_of(library, lines)) == [("n", [1, 2])]


@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
def test_text_that_looks_like_something_else_stays_text(library, frame):
    texts = ["1", "-0.5", "true", "[1]", '{"a":1}', '"a":1', None]
    made = frame(library, [{"a": text, "s": {"a": 1}} for text in texts])
    assert dict(listed(made))["a"] == texts


@pytest.mark.parametrize("name", ["*", "^a$", "^.*$"])
def test_a_column_whose_name_is_a_pattern_to_polars_is_only_itself(name, frame):
    assert dict(listed(frame("polars", [{name: "x", "a": "1"}]))) == {name: ["x"], "a": ["1"]}
    with pytest.raises(KafkaError, match="do not fit into one"):
        frame("polars", [{name: "x", "a": "y"}, {name: 1, "a": "y"}])


def test_integers_beyond_those_of_arrow_are_refused():
    with pytest.raises(KafkaError, match="do not fit into one: .*too large"):
        inputs.frame_of("pyarrow", [{"n": 2**64}])
    with pytest.raises(KafkaError, match="do not fit into one: .*negative"):
        inputs.frame_of("pyarrow", [{"n": 2**64 - 1}, {"n": -1}])


@pytest.mark.parametrize("library", ["pandas", "pyarrow"])
def test_records_without_fields_stay_rows(library, frame):
    made = frame(library, [{}, {}])
    assert made.shape == (2, 0)


class Inner(pydantic.BaseModel):
    ids: list[uuid.UUID] = []


class Flight(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(populate_by_name=True)
    number: int = pydantic.Field(alias="flightNumber")
    at: dt.datetime
    price: decimal.Decimal
    inner: Inner | None = None


@dataclasses.dataclass
class Row:
    n: int
    day: dt.date


FLIGHTS = [
    Flight(flightNumber=1, at=dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc), price="1.20", inner=Inner(ids=[uuid.UUID(int=1)])),
    Flight(flightNumber=2, at=dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc), price="0"),
]  # fmt: skip
ROWS = [Row(1, dt.date(2026, 1, 1)), Row(2, dt.date(1969, 12, 31))]


def _published(values, value_format="json"):
    """Records as the reader gives them, the first at offset 7."""
    for i, value in enumerate(values):
        message = types.SimpleNamespace(
            offset=lambda i=i: 7 + i, partition=lambda: 3, headers=lambda: None, timestamp=lambda: (1, 5)
        )
        yield ReadRecord(serialize_value(value) if value_format == "json" else value, b"k", message), value_format


@pytest.mark.parametrize("values", [FLIGHTS, ROWS], ids=["models", "dataclasses"])
def test_models_and_dataclasses_come_back_as_what_they_were(values):
    cls = type(values[0])
    assert inputs.in_form(list[cls], _published(values)) == values
    assert inputs.in_form(list[cls] | None, _published([None, *values])) == values
    assert inputs.in_form(cls, _published(values[:1])) == values[0]
    assert inputs.in_form(cls | None, _published([])) is None
    assert inputs.in_form(list[cls | None], _published([None, *values])) == values
    assert inputs.in_form(dict[str, cls], _published([{"a": values[0]}])) == {"a": values[0]}
    assert inputs.in_form(list[dict[str, cls]], _published([{"a": values[0]}])) == [{"a": values[0]}]
    assert inputs.form_of_each(dict[str, list[cls]]) == list[cls]


def test_a_model_is_made_of_what_a_schema_has_decoded():
    decoded = {"number": 1, "at": FLIGHTS[0].at, "price": decimal.Decimal("1.20"), "inner": {"ids": [uuid.UUID(int=1)]}}
    assert inputs.in_form(list[Flight], _published([decoded], "avro")) == FLIGHTS[:1]
    assert (
        inputs.in_form(list[Flight], _published([orjson.loads(serialize_value(FLIGHTS[0]))], "json_schema"))
        == FLIGHTS[:1]
    )


@dataclasses.dataclass
class Moment:
    at: dt.date | dt.datetime


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    at: dt.datetime


@pytest.mark.parametrize("value", [Moment(dt.datetime(2020, 1, 1)), Strict(at=dt.datetime(2020, 1, 1))])
def test_what_a_json_schema_has_decoded_is_read_as_json(value):
    assert inputs.in_form(type(value), _published([{"at": "2020-01-01T00:00:00"}], "json_schema")) == value


class Exact(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    id: uuid.UUID
    ids: tuple[int, ...]


@pytest.mark.parametrize("value_format", ["avro", "protobuf"])
def test_a_strict_model_is_made_of_what_stands_for_its_types_in_a_schema(value_format):
    published = _published([{"id": str(uuid.UUID(int=1)), "ids": [1]}], value_format)
    assert inputs.in_form(list[Exact], published) == [Exact(id=uuid.UUID(int=1), ids=(1,))]


class Swapped(pydantic.BaseModel):
    """An alias of one field is the name of the other, which it is written by."""

    created: int = pydantic.Field(alias="updated")
    updated: int = pydantic.Field(alias="created")


class ByAlias(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(serialize_by_alias=True)
    n: int = pydantic.Field(alias="number")


class Empty(pydantic.BaseModel):
    pass


class Renamed(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(serialize_by_alias=True)
    n: int = pydantic.Field(0, serialization_alias="number")


@dataclasses.dataclass
class Order:
    net: float
    total: float = dataclasses.field(init=False, default=0.0)


@pytest.mark.skipif(not KNOWS_NAMES, reason="pydantic before 2.11 goes by the model's config")
@pytest.mark.parametrize("value", [Swapped(updated=1, created=2), ByAlias(number=5), Empty()])
def test_a_model_is_read_by_the_names_that_it_is_written_by(value):
    assert inputs.in_form(type(value), _published([value])) == value


class Price(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(serialize_by_alias=True)
    amount: float = pydantic.Field(0.0, alias="Amount")


class Priced(pydantic.BaseModel):
    n: int
    price: Price | None = None
    others: list[Price] = []


@dataclasses.dataclass
class Around:
    priced: dict[str, Priced]


class RenamedInside(pydantic.BaseModel):
    inside: list[Renamed]


class Crossed(pydantic.BaseModel):
    """Its own names are written, and those of the model inside are not, one of which is the alias of another here."""

    created: int = pydantic.Field(0, alias="updated")
    updated: int = 0
    price: Price | None = None


PRICED = Priced(n=1, price=Price(Amount=99.5), others=[Price(Amount=1.5)])


@pytest.mark.skipif(not KNOWS_NAMES, reason="pydantic before 2.11 goes by the model's config")
@pytest.mark.parametrize("value", [PRICED, Around({"a": PRICED})])
def test_models_inside_are_read_by_the_names_that_they_are_written_by(value):
    assert inputs.in_form(type(value), _published([value])) == value


@pytest.mark.skipif(not KNOWS_NAMES, reason="pydantic before 2.11 goes by the model's config")
@pytest.mark.parametrize(
    ("value", "field"),
    [(RenamedInside(inside=[Renamed(n=5)]), "n"), (Crossed(updated=1, price=Price(Amount=2)), "created")],
)
def test_models_inside_that_would_come_back_as_their_defaults_are_refused(value, field):
    with pytest.raises(KafkaError, match=rf"input annotated with .*: its field '{field}' is written by a name"):
        inputs.in_form(type(value), _published([value]))


@pytest.mark.skipif(not KNOWS_NAMES, reason="pydantic before 2.11 goes by the model's config")
@pytest.mark.parametrize("value_format", ["avro", "protobuf"])
def test_a_model_is_read_by_its_own_names_where_aliases_are_not_written(value_format):
    for made in (ByAlias.model_validate({"number": 5}), Renamed.model_validate({"n": 5})):
        assert inputs.in_form(type(made), _published([{"n": 5}], value_format)) == made


@pytest.mark.parametrize(("value", "field"), [*([(Renamed(n=5), "n")] if KNOWS_NAMES else []), (Order(1.0), "total")])
def test_a_class_that_would_come_back_as_its_defaults_is_refused(value, field):
    with pytest.raises(KafkaError, match=rf"input annotated with .*: its field '{field}' is written by a name"):
        inputs.in_form(type(value), _published([value]))


def test_a_value_that_does_not_fit_its_model_is_named():
    rows = [{"n": 1, "day": "2026-01-01"}, {"n": 1, "day": "no day"}]
    with pytest.raises(
        KafkaError, match=r"Row, record at offset 8 of Kafka partition 3, field 'day': Input should be a"
    ):
        inputs.in_form(list[Row], _published(rows))
    with pytest.raises(KafkaError, match="input annotated Row: its upstream output has 2 records"):
        inputs.in_form(Row, _published(ROWS))


def test_a_class_that_pydantic_does_not_know_is_refused():
    @dataclasses.dataclass
    class Odd:
        frame: pl.DataFrame

    with pytest.raises(KafkaError, match=r"input annotated with .*Odd: pydantic cannot check its fields: Unable"):
        inputs.in_form(list[Odd], _published([{"frame": 1}]))


def test_the_only_record_comes_with_its_key():
    record = inputs.in_form(KafkaRecord, _published([{"n": 1}]))
    assert record == KafkaRecord({"n": 1}, b"k", None, 3, 5)


def test_a_lazy_frame_is_lazy():
    made = inputs.in_form(pl.LazyFrame, _published([{"n": 1}, None, {"n": 2}]))
    assert isinstance(made, pl.LazyFrame)
    assert made.collect()["n"].to_list() == [1, 2]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (dict[str, list[dict]], list[dict]),
        (dict[str, list[dict[str, int]]] | None, list[dict[str, int]]),
        (dict[str, list[KafkaRecord]], list[KafkaRecord]),
        (dict[str, list[Flight]], list[Flight]),
        (dict[str, list], None),
        (dict[str, list[float]], None),
        (dict[str, pl.DataFrame] | None, pl.DataFrame),
        (dict[str, dict], None),
        (dict, None),
        (list[dict], None),
        (pl.DataFrame, None),
    ],
)
def test_a_mapping_to_lists_or_frames_is_by_dagster_partition(form, expected):
    assert inputs.form_of_each(form) == expected


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (list[dict], [{"n": 1}, {"n": 2}]),
        (list, [{"n": 1}, {"n": 2}]),
        (None, [{"n": 1}, {"n": 2}]),
        (
            list[KafkaRecord],
            [
                KafkaRecord({"n": 1}, b"k", None, 3, 5),
                KafkaRecord(None, b"k", None, 3, 5),
                KafkaRecord({"n": 2}, b"k", None, 3, 5),
            ],
        ),
    ],
)
def test_only_kafka_records_have_tombstones(form, expected):
    assert inputs.in_form(form, _published([{"n": 1}, None, {"n": 2}])) == expected


def test_the_only_row_beside_tombstones_is_the_only_one():
    assert inputs.in_form(dict, _published([None, {"n": 1}, None])) == {"n": 1}
    assert inputs.in_form(dict | None, _published([None])) is None
