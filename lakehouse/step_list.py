"""The steps of a package, named by their tables: one table, one file, one line in the list."""

from __future__ import annotations

from importlib import import_module

from lakehouse.step import Step


def declared_steps(package: str, *tables: str) -> tuple[Step, ...]:
    """Return the step of each table, for example `pipelines.silver.products.STEP` for 'silver.products'.

    Raises ValueError when a module does not exist, has no STEP, or its STEP maintains another table.
    """
    return tuple(_declared_step(package, table) for table in tables)


def _declared_step(package: str, table: str) -> Step:
    module_name = f"{package}.{table}"
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise ValueError(
            f"There is no module {module_name} for table {table}. Create {module_name.replace('.', '/')}.py."
        ) from None
    step = getattr(module, "STEP", None)
    if not isinstance(step, Step):
        raise ValueError(f"Module {module_name} declares no step. Assign a Step that maintains {table} to STEP.")
    if step.target.name != table:
        raise ValueError(f"Module {module_name} declares the step of {step.target.name}, expected {table}.")
    return step
