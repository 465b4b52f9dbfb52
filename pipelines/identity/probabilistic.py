"""Probabilistic matches: Splink with fixed parameters, so the weight of a pair depends on the pair alone.

Nothing is trained on the data and no term frequencies are taken from it: the table would depend on the order of arrival. The
parameters apply to records that share an address, a device, a contact or a blocking key. Each level has the probabilities m
(among matches) and u (among non-matches) and contributes log2(m / u) bits.

Splink compiles the model to one query over two tables. The query is cached in match_weight.sql, since loading Splink and
compiling take longer than all comparisons of a small run. If the model differs from the cached one, Splink compiles it.
A test compares the cached query with Splink's, and prints the command that writes it.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import polars as pl

MIN_MATCH_WEIGHT = 3.0
"""Match weight (log2 of the odds) from which a pair is one person: odds of 8 to 1."""
PRIOR = 0.05
"""Share of matches among the pairs that share a weak identifier and are not joined by a stronger one."""

Level = tuple[str, str, float, float]
"""SQL condition ('' for all other pairs), text of the reason, m, u."""

COMPARISON_LEVELS: dict[str, tuple[Level, ...]] = {
    "name": (
        ('"name_l" = "name_r"', "same name", 0.70, 0.006),
        (
            'left("name_l", 1) = left("name_r", 1) and least(length("name_l"), length("name_r")) >= 9 '
            'and damerau_levenshtein("name_l", "name_r") <= '
            '(case when least(length("name_l"), length("name_r")) >= 12 then 2 else 1 end)',
            "name a typing error apart",
            0.18,
            0.004,
        ),
        (
            '"short_l" = "short_r" and (length("given_l") = 1 or length("given_r") = 1)',
            "same name with initials",
            0.08,
            0.01,
        ),
        ("", "other name", 0.0003, 0.98),
    ),
    "address": (
        ('"address_l" = "address_r"', "same address", 0.60, 0.06),
        (
            'damerau_levenshtein("address_l", "address_r") <= 2 or (least(length("address_l"), length("address_r")) >= 12 '
            'and (starts_with("address_l", "address_r") or starts_with("address_r", "address_l")))',
            "address spelt alike",
            0.25,
            0.0625,
        ),
        ("", "other address", 0.10, 0.80),
    ),
    "phone": (
        ('"phone_l" = "phone_r"', "same phone", 0.50, 0.03),
        ('damerau_levenshtein("phone_l", "phone_r") <= 1', "phone a digit apart", 0.08, 0.003),
        ("", "other phone", 0.20, 0.80),
    ),
    "email": (
        ('"email_l" = "email_r"', "same email", 0.40, 0.0125),
        ('"local_l" = "local_r"', "same email name at another provider", 0.10, 0.006),
        (
            # a different number is a different address, not a typing error
            'damerau_levenshtein("email_l", "email_r") <= 2 and '
            "regexp_replace(\"email_l\", '[^0-9]', '', 'g') = regexp_replace(\"email_r\", '[^0-9]', '', 'g')",
            "email a typing error apart",
            0.06,
            0.006,
        ),
        ("", "other email", 0.30, 0.85),
    ),
    "devices": (
        ('list_has_any("devices_l", "devices_r")', "same device", 0.50, 0.0125),
        ("", "other device", 0.55, 0.80),
    ),
}
TEXT_COLUMNS = ("name", "given", "short", "address", "phone", "email", "local")
CACHED_QUERY = Path(__file__).with_name("match_weight.sql")


def compare(left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    """Return `weight` and `reason` of the pairs left[i], right[i], in the order of the rows.

    Both have TEXT_COLUMNS and `devices` (list of text); a null is ignored.
    """
    if left.is_empty():
        return pl.DataFrame(schema={"weight": pl.Float64, "reason": pl.String})
    import duckdb

    connection = duckdb.connect(":memory:", config={"threads": 1})
    try:
        connection.register("compared_left", left.with_row_index("pair").to_arrow())
        connection.register("compared_right", right.with_row_index("pair").to_arrow())
        levels = ", ".join(f'"gamma_{name}"' for name in COMPARISON_LEVELS)
        scored = connection.sql(f"select match_weight, {levels} from ({match_weight_query()}) order by pair_l").to_arrow_table()
    finally:
        connection.close()
    frame = pl.from_arrow(scored)
    assert isinstance(frame, pl.DataFrame)
    return frame.select(pl.col("match_weight").round(6).alias("weight"), _reason().alias("reason"))


def _reason() -> pl.Expr:
    """Return the text of the levels reached. Splink numbers levels from 0 (all other pairs); a missing value is -1."""
    parts = []
    for name, levels in COMPARISON_LEVELS.items():
        words = pl.lit(None, pl.String)
        for index, (_, text, _, _) in enumerate(levels):
            words = pl.when(pl.col(f"gamma_{name}") == len(levels) - 1 - index).then(pl.lit(text)).otherwise(words)
        parts.append(words)
    return pl.concat_str(*parts, separator=", ", ignore_nulls=True)


@lru_cache(maxsize=1)
def match_weight_query() -> str:
    """Return Splink's query over the tables `compared_left` and `compared_right`: it compares the rows with the same `pair`."""
    head, _, cached = CACHED_QUERY.read_text(encoding="utf-8").partition("\n") if CACHED_QUERY.exists() else ("", "", "")
    return cached if head == _head() else compile_query()


def _head() -> str:
    """Return the first line of the cached query, which identifies its model."""
    model = blake2b(repr((PRIOR, COMPARISON_LEVELS, TEXT_COLUMNS)).encode(), digest_size=8).hexdigest()
    return f"-- Splink's query for the model of probabilistic.py, {model}"


def write_cached_query() -> None:
    """Compile the model and write CACHED_QUERY."""
    CACHED_QUERY.write_text(f"{_head()}\n{compile_query()}", encoding="utf-8")


def compile_query() -> str:
    """Return the query to which Splink compiles the model."""
    import duckdb
    from splink import DuckDBAPI
    from splink.internals.realtime import compare_records

    logging.getLogger("splink").setLevel(logging.ERROR)
    no_records = pl.DataFrame(
        schema={"pair": pl.UInt32, **dict.fromkeys(TEXT_COLUMNS, pl.String), "devices": pl.List(pl.String)}
    ).to_arrow()
    connection = duckdb.connect(":memory:", config={"threads": 1})
    try:
        result = compare_records(no_records, no_records, _model(), DuckDBAPI(connection), join_condition="l.pair = r.pair")
        text = str(result.sql_used_to_create)
    finally:
        connection.close()
    named = re.sub(r"__splink__compare_records_(left|right)_\w+", r"compared_\1", text)
    return "\n".join(line.rstrip() for line in named.strip().splitlines()) + "\n"


def _model() -> Any:
    """Return the model as Splink's settings."""
    from splink import SettingsCreator
    from splink.internals.comparison_level_library import CustomLevel, ElseLevel, NullLevel
    from splink.internals.comparison_library import CustomComparison

    return SettingsCreator(
        link_type="dedupe_only",
        unique_id_column_name="pair",
        probability_two_random_records_match=PRIOR,
        blocking_rules_to_generate_predictions=[],
        comparisons=[
            CustomComparison(
                output_column_name=name,
                comparison_levels=[
                    NullLevel(name),
                    *(
                        (CustomLevel(condition, words) if condition else ElseLevel()).configure(m_probability=m, u_probability=u)
                        for condition, words, m, u in levels
                    ),
                ],
            )
            for name, levels in COMPARISON_LEVELS.items()
        ],
    )
