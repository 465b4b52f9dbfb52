"""A gradient-boosted forest as flat arrays: score and reasons of one row in tens of microseconds.

XGBoost's own calls are made for many rows: one row costs more in crossing over than in computing, and its exact
contributions (TreeSHAP) cost more than all the rest of a request. Here all trees go down one level at a time, as NumPy
arrays. Contributions are those of Saabas (http://blog.datadive.net/interpreting-random-forests/), XGBoost's
`approx_contribs`: what each split on the row's way changed in the expected log-odds; they add up to the row's own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ml.training.model import FittedModel
from ml.training.settings import TrainingError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TOLERANCE = 1e-6
"""How far a score may be from XGBoost's own."""
MOST_CATEGORIES = 63
PROBES = 128
"""Made-up rows that a forest is compared with XGBoost on."""


@dataclass(frozen=True)
class Forest:
    """All nodes of all trees in one row of arrays; a leaf leads to itself.

    children   of node n: where a row goes from it: at 2n when not less than the threshold, at 2n + 1 when less
    column     which value decides: a feature, or one of the values that are made for splits on categories
    threshold  of a split
    missing    whether a row without the value goes to the 'less' side
    expected   log-odds that a row in this node has on average, by training's weights; of a leaf: its value
    roots      the first node of each tree
    depth      splits on the longest way
    feature    which feature a column is of
    masks, of  for the values made for splits on categories: the categories of the one side as bits, and their feature
    base       log-odds before the first tree
    """

    children: Ints
    column: Ints
    threshold: Floats
    missing: npt.NDArray[np.bool_]
    expected: npt.NDArray[np.float64]
    roots: Ints
    depth: int
    feature: Ints
    masks: Ints
    of: Ints
    base: float
    features: int

    def score(self, row: Floats) -> float:
        """The probability of fraud. row: the model's columns (`FittedModel.matrix`), one row."""
        return _probability(self.base + float(self.expected[self._leaves(row)].sum()))

    def explain(self, row: Floats) -> tuple[float, npt.NDArray[np.float64]]:
        """The probability, and what each feature adds to the log-odds of the average order."""
        ways = np.empty((self.depth + 1, len(self.roots)), dtype=np.int64)
        leaves = self._leaves(row, ways)
        expected = self.expected[ways]
        steps = expected[1:] - expected[:-1]
        columns = self.feature[self.column[ways[:-1]]].ravel()
        added = np.bincount(columns, weights=steps.ravel(), minlength=self.features).astype(np.float64)
        return _probability(self.base + float(self.expected[leaves].sum())), added

    @property
    def level(self) -> float:
        """The log-odds of the average order: where contributions start from."""
        return self.base + float(self.expected[self.roots].sum())

    def _leaves(self, row: Floats, ways: Ints | None = None) -> Ints:
        if len(self.masks):
            # whether the row's category is on the other side; a missing one is not asked
            category = row[self.of]
            unknown = np.isnan(category)
            bits = (self.masks >> np.where(unknown, 0, category).astype(np.int64)) & 1
            row = np.concatenate([row, np.where(unknown, category, bits).astype(np.float32)])
        absent = np.isnan(row)
        node = self.roots
        for level in range(self.depth):
            if ways is not None:
                ways[level] = node
            column = self.column[node]
            less = np.where(absent[column], self.missing[node], row[column] < self.threshold[node])
            node = self.children[2 * node + less]
        if ways is not None:
            ways[self.depth] = node
        return node


def _probability(log_odds: float) -> float:
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    odds = math.exp(log_odds)
    return odds / (1.0 + odds)


def forest_of(model: FittedModel, rows: Floats | None = None) -> Forest:
    """The forest of a model, compared with XGBoost's own scores on rows around its thresholds, and on `rows`.

    Raises TrainingError for a model that is no such forest, or when a score differs by more than 1e-6.
    """
    import xgboost

    booster = xgboost.Booster(model_file=bytearray(model.booster))
    learner = json.loads(booster.save_raw("json"))["learner"]
    kind, objective = learner["gradient_booster"]["name"], learner["objective"]["name"]
    if kind != "gbtree" or objective != "binary:logistic":
        raise TrainingError(f"The model is {kind} with {objective}; expected gbtree with binary:logistic. Train it again.")
    trees = learner["gradient_booster"]["model"]["trees"]
    base = float(str(learner["learner_model_param"]["base_score"]).strip("[]"))
    forest = _joined([_FlatTree.of(tree) for tree in trees], len(model.features), math.log(base / (1.0 - base)))
    probes = _probes(forest, model)
    checked = probes if rows is None else np.concatenate([probes, rows])
    for number, (row, own) in enumerate(zip(checked, model.score_matrix(checked).tolist(), strict=True)):
        if abs(forest.score(row) - own) > TOLERANCE:
            raise TrainingError(
                f"Row {number} scores {forest.score(row):.9f} here and {own:.9f} in XGBoost. "
                "This version of XGBoost stores its trees in another way: see requirements.lock for the one that is known."
            )
    return forest


def _probes(forest: Forest, model: FittedModel) -> Floats:
    """Rows of values at the thresholds and just below, of every category, and of missing ones."""
    random = np.random.default_rng(0)
    inner = forest.children[::2] != np.arange(len(forest.column))
    rows = np.empty((PROBES, forest.features), dtype=np.float32)
    for number, name in enumerate(model.features):
        limits = forest.threshold[inner & (forest.column == number)]
        choice: Floats = np.concatenate([limits, np.nextafter(limits, np.float32(-np.inf)), [np.nan]]).astype(np.float32)
        if name in model.categories:
            choice = np.array([*range(len(model.categories[name])), np.nan], dtype=np.float32)
        rows[:, number] = random.choice(choice, PROBES)
    return rows


@dataclass(frozen=True)
class _FlatTree:
    left: Ints
    right: Ints
    column: Ints
    threshold: Floats
    missing: npt.NDArray[np.bool_]
    expected: npt.NDArray[np.float64]
    categories: dict[int, list[int]]

    @property
    def leaf(self) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = self.left < 0
        return found

    @staticmethod
    def of(tree: dict[str, Any]) -> _FlatTree:
        left, right = np.array(tree["left_children"]), np.array(tree["right_children"])
        threshold = np.array(tree["split_conditions"], dtype=np.float32)
        sizes = zip(tree["categories_nodes"], tree["categories_segments"], tree["categories_sizes"], strict=True)
        return _FlatTree(
            left,
            right,
            np.array(tree["split_indices"]),
            threshold,
            np.array(tree["default_left"], dtype=bool),
            _expected(left, right, threshold, np.array(tree["sum_hessian"])),
            {node: tree["categories"][start : start + size] for node, start, size in sizes},
        )

    @property
    def depth(self) -> int:
        deep = np.zeros(len(self.left), dtype=np.int64)
        for node in range(len(self.left)):  # a child comes after its parent
            if self.left[node] >= 0:
                deep[[self.left[node], self.right[node]]] = deep[node] + 1
        return int(deep.max())


def _expected(left: Ints, right: Ints, value: Floats, weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    expected = value.astype(np.float64)
    for node in range(len(left) - 1, -1, -1):
        if left[node] >= 0:
            sides = [left[node], right[node]]
            expected[node] = float(expected[sides] @ weight[sides]) / float(weight[node])
    return expected


def _joined(trees: list[_FlatTree], features: int, base: float) -> Forest:
    starts = np.cumsum([0, *(len(tree.left) for tree in trees)])
    own = [np.arange(len(tree.left)) for tree in trees]
    less = [np.where(t.leaf, n, t.left) + s for t, n, s in zip(trees, own, starts[:-1], strict=True)]
    more = [np.where(t.leaf, n, t.right) + s for t, n, s in zip(trees, own, starts[:-1], strict=True)]
    column = np.concatenate([np.where(tree.leaf, 0, tree.column) for tree in trees])
    threshold = np.concatenate([tree.threshold for tree in trees])
    masks, of = [], []
    for tree, start in zip(trees, starts[:-1], strict=True):
        for node, categories in tree.categories.items():
            if max(categories, default=0) > MOST_CATEGORIES - 1:
                raise TrainingError(f"The model splits on more than {MOST_CATEGORIES} categories of a feature. Declare fewer.")
            masks.append(sum(1 << category for category in categories))
            of.append(int(tree.column[node]))
            # categories of the set go to the 'not less' side
            column[start + node], threshold[start + node] = features + len(masks) - 1, 0.5
    return Forest(
        children=np.stack([np.concatenate(more), np.concatenate(less)], axis=1).ravel(),
        column=column,
        threshold=threshold,
        missing=np.concatenate([tree.missing for tree in trees]),
        expected=np.concatenate([tree.expected for tree in trees]),
        roots=starts[:-1],
        depth=max(tree.depth for tree in trees),
        feature=np.array([*range(features), *of], dtype=np.int64),
        masks=np.array(masks, dtype=np.int64),
        of=np.array(of, dtype=np.int64),
        base=base,
        features=features,
    )
