"""A gradient-boosted forest as flat arrays: score and contributions of one row within tens of microseconds.

XGBoost's own functions are made for many rows: for a single row the call overhead dominates, and exact contributions
(TreeSHAP) cost more than the rest of a request. Here all trees are traversed together, one level at a time, as NumPy arrays.
Contributions are those of Saabas (http://blog.datadive.net/interpreting-random-forests/), XGBoost's `approx_contribs`: the
change in the expected log-odds at each split on the row's path. They sum up to the row's log-odds.
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
"""Maximum difference of a score from XGBoost's own."""
MAX_CATEGORIES = 63
PROBES = 128
"""Number of synthetic rows on which a forest is compared with XGBoost."""


@dataclass(frozen=True)
class Forest:
    """All nodes of all trees in common arrays. A leaf is its own child.

    children        next node from node n: at 2n if the value is not less than the threshold, at 2n + 1 if it is less
    column          column of the value that decides: a feature, or a derived column of a split on categories
    threshold       threshold of a split
    missing         whether a row without the value takes the 'less' side
    expected        mean log-odds of the rows in a node, by the weights of training; of a leaf: its value
    roots           first node of each tree
    depth           number of splits on the longest path
    feature         feature of each column
    masks, mask_of  of the derived columns: the categories of the 'not less' side as bits, and their feature
    base            log-odds before the first tree
    features        number of features
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
    mask_of: Ints
    base: float
    features: int

    def score(self, row: Floats) -> float:
        """Return the probability of fraud. row: one row of the model's columns (`FittedModel.matrix`)."""
        return _probability(self.base + float(self.expected[self._leaves(row)].sum()))

    def explain(self, row: Floats) -> tuple[float, npt.NDArray[np.float64]]:
        """Return the probability, and the contribution of each feature to the log-odds."""
        paths = np.empty((self.depth + 1, len(self.roots)), dtype=np.int64)
        leaves = self._leaves(row, paths)
        expected = self.expected[paths]
        steps = expected[1:] - expected[:-1]
        columns = self.feature[self.column[paths[:-1]]].ravel()
        added = np.bincount(columns, weights=steps.ravel(), minlength=self.features).astype(np.float64)
        return _probability(self.base + float(self.expected[leaves].sum())), added

    @property
    def bias(self) -> float:
        """The bias: log-odds of the average order, which contributions are added to."""
        return self.base + float(self.expected[self.roots].sum())

    def _leaves(self, row: Floats, paths: Ints | None = None) -> Ints:
        if len(self.masks):
            # derived columns: 1 if the row's category is on the 'not less' side, NaN if it is missing
            category = row[self.mask_of]
            unknown = np.isnan(category)
            bits = (self.masks >> np.where(unknown, 0, category).astype(np.int64)) & 1
            row = np.concatenate([row, np.where(unknown, category, bits).astype(np.float32)])
        missing = np.isnan(row)
        node = self.roots
        for level in range(self.depth):
            if paths is not None:
                paths[level] = node
            column = self.column[node]
            less = np.where(missing[column], self.missing[node], row[column] < self.threshold[node])
            node = self.children[2 * node + less]
        if paths is not None:
            paths[self.depth] = node
        return node


def _probability(log_odds: float) -> float:
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    odds = math.exp(log_odds)
    return odds / (1.0 + odds)


def forest_of(model: FittedModel, rows: Floats | None = None) -> Forest:
    """Return the forest of a model, verified against XGBoost's scores on rows around its thresholds, and on `rows`.

    Raises TrainingError for a model that is not such a forest, or when a score differs by more than TOLERANCE.
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
                "This version of XGBoost stores its trees in another format: install the version in requirements.lock."
            )
    return forest


def _probes(forest: Forest, model: FittedModel) -> Floats:
    """Return rows with values at the thresholds and just below them, of every category, and missing."""
    random = np.random.default_rng(0)
    inner = forest.children[::2] != np.arange(len(forest.column))
    rows = np.empty((PROBES, forest.features), dtype=np.float32)
    for number, name in enumerate(model.features):
        thresholds = forest.threshold[inner & (forest.column == number)]
        choice: Floats = np.concatenate([thresholds, np.nextafter(thresholds, np.float32(-np.inf)), [np.nan]]).astype(np.float32)
        if name in model.categories:
            choice = np.array([*range(len(model.categories[name])), np.nan], dtype=np.float32)
        rows[:, number] = random.choice(choice, PROBES)
    return rows


@dataclass(frozen=True, kw_only=True)
class _FlatTree:
    left: Ints
    right: Ints
    column: Ints
    threshold: Floats
    missing: npt.NDArray[np.bool_]
    expected: npt.NDArray[np.float64]
    categories: dict[int, list[int]]

    @property
    def leaves(self) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = self.left < 0
        return found

    @staticmethod
    def of(tree: dict[str, Any]) -> _FlatTree:
        left, right = np.array(tree["left_children"]), np.array(tree["right_children"])
        threshold = np.array(tree["split_conditions"], dtype=np.float32)
        sizes = zip(tree["categories_nodes"], tree["categories_segments"], tree["categories_sizes"], strict=True)
        return _FlatTree(
            left=left,
            right=right,
            column=np.array(tree["split_indices"]),
            threshold=threshold,
            missing=np.array(tree["default_left"], dtype=bool),
            expected=_expected(left, right, threshold, np.array(tree["sum_hessian"])),
            categories={node: tree["categories"][start : start + size] for node, start, size in sizes},
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
    less = [np.where(t.leaves, n, t.left) + s for t, n, s in zip(trees, own, starts[:-1], strict=True)]
    more = [np.where(t.leaves, n, t.right) + s for t, n, s in zip(trees, own, starts[:-1], strict=True)]
    column = np.concatenate([np.where(tree.leaves, 0, tree.column) for tree in trees])
    threshold = np.concatenate([tree.threshold for tree in trees])
    masks, mask_of = [], []
    for tree, start in zip(trees, starts[:-1], strict=True):
        for node, categories in tree.categories.items():
            if max(categories, default=0) > MAX_CATEGORIES - 1:
                raise TrainingError(f"The model splits on more than {MAX_CATEGORIES} categories of a feature. Declare fewer.")
            masks.append(sum(1 << category for category in categories))
            mask_of.append(int(tree.column[node]))
            # categories in the set take the 'not less' side
            column[start + node], threshold[start + node] = features + len(masks) - 1, 0.5
    return Forest(
        children=np.stack([np.concatenate(more), np.concatenate(less)], axis=1).ravel(),
        column=column,
        threshold=threshold,
        missing=np.concatenate([tree.missing for tree in trees]),
        expected=np.concatenate([tree.expected for tree in trees]),
        roots=starts[:-1],
        depth=max(tree.depth for tree in trees),
        feature=np.array([*range(features), *mask_of], dtype=np.int64),
        masks=np.array(masks, dtype=np.int64),
        mask_of=np.array(mask_of, dtype=np.int64),
        base=base,
        features=features,
    )
