"""Property tests with few examples in the fast tests and all of them in the slow ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
from hypothesis import given, settings


def property_test(*strategies: Any, fast: int, slow: int, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator like Hypothesis' `given` that runs `fast` examples, and `slow` ones with the marker slow.

    strategies: for the last parameters of the test; the ones before are fixtures. options: of Hypothesis' `settings`.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        parameters = list(inspect.signature(check).parameters.values())
        fixtures = parameters[: len(parameters) - len(strategies)]

        @pytest.mark.parametrize("examples", [fast, pytest.param(slow, marks=pytest.mark.slow)])
        @wraps(check)
        def test(examples: int, **fixture_values: Any) -> None:
            run = settings(max_examples=examples, deadline=None, **options)(given(*strategies)(check))
            run(**fixture_values)

        count = inspect.Parameter("examples", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([count, *fixtures])  # type: ignore[attr-defined]
        return test

    return decorate
