"""Facets of OpenLineage events: schema, column lineage and data quality assertions of a table.

The OpenLineage client is imported only when an event is created.
"""

from __future__ import annotations

from typing import Any

from lakehouse.expectations import ExpectationResult
from lakehouse.step import Grouped, Lookup, Step, root_names
from lakehouse.table import Table


def schema_facet(table: Table) -> Any:
    """Return the declared columns with their types and documentation."""
    from openlineage.client.facet_v2 import schema_dataset

    return schema_dataset.SchemaDatasetFacet(
        fields=[
            schema_dataset.SchemaDatasetFacetFields(name=c.name, type=str(c.type), description=c.doc, ordinal_position=n)
            for n, c in enumerate(table.columns, start=1)
        ]
    )


def column_lineage(step: Step, namespace: str) -> tuple[dict[str, Any], list[Any]]:
    """Return the lineage of the group columns, and the columns that influence the whole table, as far as they are declared.

    Group columns derive from the expressions of `keys`. Every column that is read influences the table indirectly. How
    `transform` computes the other columns is code, so their lineage is left out rather than guessed.
    """
    from openlineage.client.facet_v2 import column_lineage_dataset as facet

    def input_field(table: Table, name: str, kind: str, subtype: str) -> Any:
        return facet.InputField(
            namespace=namespace,
            name=table.name,
            field=name,
            transformations=[facet.Transformation(type=kind, subtype=subtype)],
        )

    fields: dict[str, Any] = {}
    whole: dict[tuple[str, str], Any] = {}
    for read in step.reads.values():
        if isinstance(read, Grouped):
            for keys in read.keys:
                for name, expression in zip(step.target.group, keys, strict=True):
                    subtype = "IDENTITY" if expression.meta.is_column() else "TRANSFORMATION"
                    inputs = [input_field(read.table, root, "DIRECT", subtype) for root in root_names(expression)]
                    known = fields.setdefault(name, facet.Fields(inputFields=[])).inputFields
                    known += [item for item in inputs if item not in known]
        columns = read.columns or tuple(column.name for column in read.table.columns)
        subtype = "JOIN" if isinstance(read, Lookup) else "GROUP_BY" if isinstance(read, Grouped) else "CONDITIONAL"
        for name in (*columns, *((read.on,) if isinstance(read, Lookup) else ())):
            whole.setdefault((read.table.name, name), input_field(read.table, name, "INDIRECT", subtype))
    return fields, list(whole.values())


def assertions_facet(results: tuple[ExpectationResult, ...]) -> Any:
    """Return the results of expectations as data quality assertions."""
    from openlineage.client.facet_v2 import data_quality_assertions_dataset as facet

    return facet.DataQualityAssertionsDatasetFacet(
        assertions=[
            facet.Assertion(
                assertion=result.expectation.partition("(")[0],
                success=result.outcome == "pass",
                severity="error" if result.severity == "fail" else "warn",
                name=result.expectation,
                actual=result.detail or f"{result.violations} of {result.rows} rows",
            )
            for result in results
        ]
    )
