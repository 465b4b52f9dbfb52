"""The list of steps: names of tables become their steps, and a wrong name is an error that says what is missing."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import pipelines
from lakehouse.step_list import declared_steps


def test_a_name_is_the_step_of_its_table() -> None:
    (step,) = declared_steps("pipelines", "silver.products")
    assert step.target.name == "silver.products"


def test_a_module_that_does_not_exist_is_named_with_its_file() -> None:
    with pytest.raises(ValueError, match=r"no module pipelines\.silver\.nothing .* Create pipelines/silver/nothing\.py\."):
        declared_steps("pipelines", "silver.nothing")


def test_a_module_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pipelines\.silver\.quarantine declares no step"):
        declared_steps("pipelines", "silver.quarantine")


def test_a_step_of_another_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("pipelines.silver.renamed")
    module.STEP = next(step for step in pipelines.STEPS if step.target.name == "silver.products")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(ValueError, match=r"declares the step of silver\.products, expected silver\.renamed"):
        declared_steps("pipelines", "silver.renamed")
