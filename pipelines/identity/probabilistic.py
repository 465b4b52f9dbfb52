"""Probable matches: Splink with fixed parameters, so that a pair's weight depends on the pair alone.

Nothing is trained on the data and no term frequencies are taken from it: a trained model would give another table
for another order of arrival. The parameters are those of people who already meet at an address, a device, a
contact or a close spelling of name and address; each pair of m (among matches) and u (among non-matches) gives
log2(m / u) bits.

Splink compiles the model to one query over two tables. That query is kept beside this file, since loading Splink and
compiling cost more than all comparisons of a small run; of a model other than the kept one, Splink compiles anew.
A test compares it with what Splink gives, and says how to write it again.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import polars as pl

THRESHOLD = 3.0
"""Match weight (log2 of the odds) from which a pair is one person: 8 to 1."""
PRIOR = 0.05
"""Share of one-person pairs among those who meet at a weak identifier and nothing stronger joined."""

Level = tuple[str, str, float, float]
"""SQL condition ('' for all else), words for the reason, m, u."""

LEVELS: dict[str, tuple[Level, ...]] = {
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
            # another number is another person's address, not a slip
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
TEXT = ("name", "given", "short", "address", "phone", "email", "local")
KEPT_QUERY = Path(__file__).with_name("match_weight.sql")


def compare(left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    """Match weight of left[i] with right[i].

    Both have the columns of TEXT and `devices` (list of text); a null says nothing. Gives `weight` and `reason`, in
    the order of the rows.
    """
    if left.is_empty():
        return pl.DataFrame(schema={"weight": pl.Float64, "reason": pl.String})
    import duckdb

    connection = duckdb.connect(":memory:", config={"threads": 1})
    try:
        connection.register("compared_left", left.with_row_index("pair").to_arrow())
        connection.register("compared_right", right.with_row_index("pair").to_arrow())
        levels = ", ".join(f'"gamma_{name}"' for name in LEVELS)
        scored = connection.sql(f"select match_weight, {levels} from ({query()}) order by pair_l").to_arrow_table()
    finally:
        connection.close()
    frame = pl.from_arrow(scored)
    assert isinstance(frame, pl.DataFrame)
    return frame.select(pl.col("match_weight").round(6).alias("weight"), _reason().alias("reason"))


def _reason() -> pl.Expr:
    """The levels reached, in words. Splink numbers levels from 0 (all else) up, and -1 for a missing value."""
    parts = []
    for name, levels in LEVELS.items():
        words = pl.lit(None, pl.String)
        for at, (_, text, _, _) in enumerate(levels):
            words = pl.when(pl.col(f"gamma_{name}") == len(levels) - 1 - at).then(pl.lit(text)).otherwise(words)
        parts.append(words)
    return pl.concat_str(*parts, separator=", ", ignore_nulls=True)


@lru_cache(maxsize=1)
def query() -> str:
    """Splink's query over the tables `compared_left` and `compared_right`, whose rows of one `pair` are compared."""
    head, _, kept = KEPT_QUERY.read_text(encoding="utf-8").partition("\n") if KEPT_QUERY.exists() else ("", "", "")
    return kept if head == _head() else compiled()


def _head() -> str:
    """The first line of the kept query: whose it is."""
    model = blake2b(repr((PRIOR, LEVELS, TEXT)).encode(), digest_size=8).hexdigest()
    return f"-- Splink's query for the model of probabilistic.py, {model}"


def keep() -> None:
    """Write KEPT_QUERY anew."""
    KEPT_QUERY.write_text(f"{_head()}\n{compiled()}", encoding="utf-8")


def compiled() -> str:
    """The query that Splink makes of the model."""
    import duckdb
    from splink import DuckDBAPI
    from splink.internals.realtime import compare_records

    logging.getLogger("splink").setLevel(logging.ERROR)
    nobody = pl.DataFrame(schema={"pair": pl.UInt32, **dict.fromkeys(TEXT, pl.String), "devices": pl.List(pl.String)}).to_arrow()
    connection = duckdb.connect(":memory:", config={"threads": 1})
    try:
        made = compare_records(nobody, nobody, _model(), DuckDBAPI(connection), join_condition="l.pair = r.pair")
        text = str(made.sql_used_to_create)
    finally:
        connection.close()
    named = re.sub(r"__splink__compare_records_(left|right)_\w+", r"compared_\1", text)
    return "\n".join(line.rstrip() for line in named.strip().splitlines()) + "\n"


def _model() -> Any:
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
            for name, levels in LEVELS.items()
        ],
    )
