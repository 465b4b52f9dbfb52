"""Connected components."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def connected_components(count: int, left: Indices, right: Indices) -> Indices:
    """Return the component of each of `count` vertices with the edges left[i] - right[i]: its smallest vertex."""
    labels = np.arange(count, dtype=np.int64)
    while left.size:
        at_left, at_right = labels[left], labels[right]
        apart = at_left != at_right
        if not apart.any():
            break
        left, right, at_left, at_right = left[apart], right[apart], at_left[apart], at_right[apart]
        smaller = np.minimum(at_left, at_right)
        np.minimum.at(labels, np.maximum(at_left, at_right), smaller)
        while True:
            further = labels[labels]
            if np.array_equal(further, labels):
                break
            labels = further
    return labels
