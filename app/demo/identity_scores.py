"""Measures identity resolution: the predicted grouping of records against the true one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True)
class PairScores:
    """Precision: share of the joined records that belong together. Recall: share of the records that belong together that
    were joined. F1: their harmonic mean. Each from 0 to 1, and 1 where there is nothing to measure."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Return the harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def pairwise_scores(predicted: pl.DataFrame | Mapping[str, str], truth: pl.DataFrame | Mapping[str, str]) -> PairScores:
    """Return scores over pairs of records.

    predicted, truth: record -> group, as a mapping or as a frame whose first column is the record and whose second is the
    group. Only records in both are scored. Pairs are counted from group sizes, never listed.
    """
    cells = _cells(predicted, truth)
    together = _pairs(cells["n"])
    joined = _pairs(cells.group_by("predicted").agg(pl.col("n").sum())["n"])
    same = _pairs(cells.group_by("true").agg(pl.col("n").sum())["n"])
    return PairScores(together / joined if joined else 1.0, together / same if same else 1.0)


def b_cubed_scores(predicted: pl.DataFrame | Mapping[str, str], truth: pl.DataFrame | Mapping[str, str]) -> PairScores:
    """Return scores averaged over records (B-cubed), which large groups do not dominate. Arguments: see `pairwise_scores`."""
    cells = _cells(predicted, truth).with_columns(
        pl.col("n").sum().over("predicted").alias("joined"), pl.col("n").sum().over("true").alias("same")
    )
    records = int(cells["n"].sum())
    if not records:
        return PairScores(1.0, 1.0)
    squared = cells.select(
        precision=(pl.col("n") ** 2 / pl.col("joined")).sum(), recall=(pl.col("n") ** 2 / pl.col("same")).sum()
    )
    precision, recall = squared.row(0)
    return PairScores(precision / records, recall / records)


def _cells(predicted: pl.DataFrame | Mapping[str, str], truth: pl.DataFrame | Mapping[str, str]) -> pl.DataFrame:
    """Return predicted, true, n: the number of records in each combination of a predicted and a true group."""
    both = _frame(predicted, "predicted").join(_frame(truth, "true"), on="record")
    return both.group_by("predicted", "true").agg(pl.len().cast(pl.Int64).alias("n"))


def _frame(groups: pl.DataFrame | Mapping[str, str], name: str) -> pl.DataFrame:
    if isinstance(groups, pl.DataFrame):
        return groups.select(pl.nth(0).alias("record"), pl.nth(1).alias(name)).unique("record", keep="any")
    return pl.DataFrame(
        {"record": list(groups.keys()), name: list(groups.values())}, schema={"record": pl.String, name: pl.String}
    )


def _pairs(sizes: pl.Series) -> int:
    return int((sizes * (sizes - 1) // 2).sum())
