"""A predicted query is right when it returns what the gold query returns, and can do no harm whatever it says."""

import time

import pytest

from loomtune_plugins.sql_execution import Database, executes_same, is_ordered, right_query, written_query

DATABASE = """
CREATE TABLE lake (name TEXT, depth INTEGER, region TEXT);
INSERT INTO lake VALUES ('ula', 30, 'north'), ('mora', 12, 'south'), ('inari', 90, 'north');
"""
NAMES = "SELECT name FROM lake"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"


def same(predicted: str, gold: str = NAMES, ordered: bool = False) -> bool:
    return executes_same(DATABASE, predicted, gold, ordered=ordered, seconds=0.2)


def test_equal_results_match_whatever_the_words() -> None:
    assert same("select lake.name as anything from lake where depth > 0;")


def test_order_counts_only_where_it_was_asked_for() -> None:
    assert same("SELECT name FROM lake ORDER BY depth")
    assert not same("SELECT name FROM lake ORDER BY depth", "SELECT name FROM lake ORDER BY depth DESC", ordered=True)
    assert same("SELECT name FROM lake ORDER BY depth", "SELECT name FROM lake ORDER BY -depth DESC", ordered=True)


def test_repeated_rows_count() -> None:
    assert not same("SELECT DISTINCT region FROM lake", "SELECT region FROM lake")


def test_floats_compare_to_nine_digits() -> None:
    assert same("SELECT SUM(depth) / 3.0 FROM lake", "SELECT AVG(depth) FROM lake")
    assert not same("SELECT 44.001", "SELECT AVG(depth) FROM lake")


def test_text_is_no_number() -> None:
    assert not same("SELECT '132'", "SELECT SUM(depth) FROM lake")


@pytest.mark.parametrize(
    "query",
    [
        "",
        "nonsense",
        "SELECT",
        "SELECT depht FROM lake",
        "SELECT name FROM lake; SELECT 1",
        "SELECT 'a\0b'",
        "SELECT '\ud800'",
        "SELECT ?",
        "SELECT name FROM lake WHERE (" * 2000,
    ],
)
def test_a_bad_query_is_wrong_and_raises_nothing(query: str) -> None:
    assert not same(query)


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE lake",
        "DELETE FROM lake",
        "UPDATE lake SET depth = 1",
        "INSERT INTO lake SELECT * FROM lake",
        "CREATE TABLE other (x)",
        "ATTACH DATABASE ':memory:' AS other",
        "PRAGMA user_version",
        "SELECT load_extension('x')",
        "SELECT length(zeroblob(1000000000))",
        "SELECT name FROM sqlite_master",
        "SELECT fts3_tokenizer('simple')",
        "VACUUM",
        "BEGIN",
    ],
)
def test_nothing_but_reading_the_tables_is_allowed(query: str) -> None:
    assert not executes_same(DATABASE, query, query if query == NAMES else NAMES, ordered=False)


def test_an_endless_query_is_stopped() -> None:
    assert not same(ENDLESS)


def test_a_flood_of_rows_is_wrong() -> None:
    assert not same("SELECT a.name FROM lake a, lake b, lake c, lake d, lake e, lake f, lake g, lake h")


def test_rows_that_are_too_long_together_are_wrong_before_they_fill_the_memory() -> None:
    lakes = Database(DATABASE, seconds=30.0)
    long, many = "printf('%.*c', 900000, 'x')", "lake a, lake b, lake c, lake d, lake e"
    assert lakes.rows(f"SELECT {long}") is not None
    assert lakes.rows(f"SELECT {long} FROM {many}") is None
    assert lakes.rows(f"SELECT CAST({long} AS BLOB) FROM {many}") is None


def test_a_query_of_long_values_ends_in_its_time() -> None:
    began = time.monotonic()
    long = ", ".join(f"max(printf('%.*c', 900000, a.name || {n}))" for n in range(9))
    assert not same(f"SELECT {long} FROM lake a, lake b, lake c, lake d, lake e")
    assert time.monotonic() - began < 1.5


def test_a_gold_query_that_fails_is_the_datas_fault() -> None:
    with pytest.raises(ValueError, match="gold query"):
        same(NAMES, "SELECT nothing FROM lake")


def test_a_query_that_says_nothing_does_not_run() -> None:
    nothing = "SELECT name FROM lake WHERE 0"
    assert same(nothing, nothing) and not same("", nothing) and not same("-- nothing", nothing)


def test_one_database_answers_query_after_query() -> None:
    lakes = Database(DATABASE, seconds=0.2)
    before = lakes.rows(NAMES)
    for query in (ENDLESS, "DROP TABLE lake", "nonsense", "SELECT replace(printf('%.*c', 999999, 'x'), 'x', 'xxxx')"):
        assert lakes.rows(query) is None
    assert lakes.rows(NAMES) == before == [("ula",), ("mora",), ("inari",)]


def test_the_preferred_answer_of_a_pair_is_the_right_query() -> None:
    assert right_query({"chosen": "SELECT 1", "rejected": "SELECT 2"}) == "SELECT 1"
    assert right_query({"completion": "SELECT 3"}) == "SELECT 3"
    assert right_query({"completion": "SELECT 3", "gold": "SELECT 4"}) == "SELECT 4"
    assert right_query({"prompt": "?"}) is None


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (" SELECT 1 ", "SELECT 1"),
        ("It is\n```sql\nSELECT 2\n```\nsee?", "SELECT 2"),
        ("```\nSELECT 1\n```\nNo:\n```SQL\nSELECT 3\n```", "SELECT 3"),
        ("SELECT '```'", "SELECT '```'"),
    ],
)
def test_a_fenced_query_is_what_was_meant(text: str, query: str) -> None:
    assert written_query(text) == query


def test_an_order_is_asked_for_in_any_spelling() -> None:
    assert is_ordered("select a from t order\n  by a") and not is_ordered("SELECT order_by FROM t")
