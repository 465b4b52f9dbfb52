"""Names of source records and of the people behind them, and the look-up from one to the other.

A record is an account ('user:<user_id>') or a marketplace order ('order:<platform>:<mp_order_id>'). Records of the same
person have the same master user id: 'M-' and the record id of the person's oldest record.
"""

from __future__ import annotations

import polars as pl

USER_PREFIX = "user:"
ORDER_PREFIX = "order:"
MASTER_PREFIX = "M-"
RECORD_NODE_PREFIX = "record:"
"""Prefix of a graph node that stands for a record, not for an identifier."""

MARKETPLACE_ORDER_ID = pl.col("platform") + ":" + pl.col("mp_order_id")
"""Order id over columns of bronze marketplace orders; null for a delete, which names neither."""

ORDER_RECORD_ID = ORDER_PREFIX + MARKETPLACE_ORDER_ID
"""Record id over columns of bronze marketplace orders."""

USER_RECORD_ID = USER_PREFIX + pl.col("user_id").cast(pl.String)
"""Record id of an account, over its user_id; null without an account."""


def user_record_ids(user_ids: pl.Series) -> pl.Series:
    """Return the record ids of accounts."""
    return USER_PREFIX + user_ids.cast(pl.String)


def user_ids_of_records(record_ids: pl.Series) -> pl.Series:
    """Return the user ids of those records that are accounts."""
    accounts = record_ids.filter(record_ids.str.starts_with(USER_PREFIX)).str.strip_prefix(USER_PREFIX)
    return accounts.cast(pl.Int64, strict=False).drop_nulls()


def masters_by_record(graph: pl.DataFrame) -> pl.DataFrame:
    """Return one row per record: record_id, master_user_id. graph: rows of silver.identity_graph."""
    return graph.group_by("record_id").agg(pl.col("master_user_id").min())
