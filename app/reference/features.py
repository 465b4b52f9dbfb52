"""docs/reference/features.md: every feature of the fraud model."""

from __future__ import annotations

from app.reference.markdown import GENERATED
from ml.features.groups import FEATURE_GROUPS, FEATURES
from ml.features.groups.order import ORDER


def features_page() -> str:
    """Return the page."""
    lines = [
        GENERATED,
        "# Features of the fraud model",
        "",
        f"{len(FEATURES)} features, each as of the time its order was placed ([how](../concepts/fraud-model.md)). "
        "The last column is the text that a reviewer sees. Types: `count` is a whole number, `amount` is in units of the base "
        "currency, `ratio` is a number without unit, `minutes` is elapsed time, `flag` is 0 or 1, `category` is one of the "
        "listed texts.",
        "",
    ]
    for group in FEATURE_GROUPS:
        source = "the order itself" if group is ORDER else f"{'account events' if group.events else 'orders'} by `{group.key}`"
        lines += [f"## {group.name}: {source}", "", "| feature | type | window | meaning | reason |", "|---|---|---|---|---|"]
        for feature in group.features:
            texts = f" ({', '.join(feature.categories)})" if feature.categories else ""
            lines.append(
                f"| `{feature.name}` | {feature.type} | {feature.window} | {feature.doc}{texts} | {feature.reason_text} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
