"""The frames that records are read back as: all columns, exact values."""

import orjson
import pandas as pd
import polars as pl
import pytest

from dataforge_kafka_dagster import KafkaError, io_manager

BIG = 2**53 + 1  # not a float


@pytest.fixture(params=["json", "decoded"])
def frame(request):
    """Makes a frame of rows, from their JSON or as a schema decodes them."""
    return lambda library, rows: io_manager._frame(
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
    made = io_manager._frame("pandas", [{"id": value} for value in values])
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
        io_manager._frame("pyarrow", [{"n": 2**64}])
    with pytest.raises(KafkaError, match="do not fit into one: .*negative"):
        io_manager._frame("pyarrow", [{"n": 2**64 - 1}, {"n": -1}])


@pytest.mark.parametrize("library", ["pandas", "pyarrow"])
def test_records_without_fields_stay_rows(library, frame):
    made = frame(library, [{}, {}])
    assert made.shape == (2, 0)
