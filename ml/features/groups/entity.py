"""Features that every kind of entity can have: velocity, age, co-occurrence, reported frauds, mature labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ml.features.declarations import WINDOW_WORDS, Feature, FeatureGroup

DEFAULT_WINDOWS = ("10m", "1h", "24h", "7d", "30d")
UNUSUAL_RATIO = 2.5
"""An amount is unusual from this multiple of the customer's mean on. An unusual amount explains a fraud: the cause is the
customer's card or account, not the device."""
PLURAL = {"customer": "customers", "card": "cards", "device": "devices", "address": "addresses"}


def entity_group(kind: str, *, of: str, the: str, own: Sequence[Feature] = (), **traits: Any) -> FeatureGroup:
    """Return the group of an entity kind: the features that its traits declare, and its `own`.

    of, the: the entity in words, as in 'orders on the card' and 'the card'; traits: fields of FeatureGroup."""
    group = FeatureGroup(name=kind, key=kind, features=(), **traits)
    features = (
        *_velocity(kind, of, group.windows),
        *_age(kind, the),
        *own,
        *_seen_with(kind, the, group.seen_with),
        *_frauds(kind, the, group.fraud_windows),
        *_risk(kind, the, group.risk_windows),
        *(_labels(kind, the, group.last_labels) if group.last_labels else ()),
        *(_unexplained(kind, the, group.unexplained_windows) if group.unexplained_windows else ()),
    )
    return replace(group, features=features, needs=tuple(dict.fromkeys((*group.needs, *group.seen_with))))


def _velocity(kind: str, of: str, windows: Sequence[str]) -> list[Feature]:
    features = []
    for window in windows:
        words = WINDOW_WORDS[window]
        features += [
            Feature(
                name=f"{kind}_orders_{window}",
                type="count",
                window=window,
                doc=f"Orders {of} in the {words} before.",
                reason_text=f"{{value}} orders {of} within the last {words}",
            ),
            Feature(
                name=f"{kind}_amount_{window}",
                type="amount",
                window=window,
                doc=f"Total amount of the orders {of} in the {words} before.",
                reason_text=f"{{value}} in orders {of} within the last {words}",
            ),
        ]
    return features


def _age(kind: str, the: str) -> list[Feature]:
    return [
        Feature(
            name=f"{kind}_orders_ever",
            type="count",
            window="ever",
            doc=f"Earlier orders of {the}.",
            reason_text=f"{{value}} earlier orders of {the}",
        ),
        Feature(
            name=f"{kind}_minutes_since_first",
            type="minutes",
            window="ever",
            doc=f"Since the first order of {the}.",
            reason_text=f"{the} first seen {{value}} ago",
        ),
        Feature(
            name=f"{kind}_minutes_since_last",
            type="minutes",
            window="ever",
            doc=f"Since the last order of {the}.",
            reason_text=f"{the} last seen {{value}} ago",
        ),
    ]


def _seen_with(kind: str, the: str, others: Sequence[str]) -> list[Feature]:
    return [
        Feature(
            name=f"{kind}_{PLURAL[other]}_ever",
            type="count",
            window="ever",
            doc=f"Different {PLURAL[other]} seen with {the} before.",
            reason_text=f"{{value}} {PLURAL[other]} seen with {the}",
        )
        for other in others
    ]


def _frauds(kind: str, the: str, windows: Sequence[str]) -> list[Feature]:
    return [
        Feature(
            name=f"{kind}_frauds_ever",
            type="count",
            window="ever",
            doc=f"Frauds of {the} that were reported before.",
            reason_text=f"{{value}} earlier frauds reported for {the}",
        ),
        *(
            Feature(
                name=f"{kind}_frauds_{window}",
                type="count",
                window=window,
                doc=f"Frauds of {the} that were reported in the {WINDOW_WORDS[window]} before.",
                reason_text=f"{{value}} frauds reported for {the} within the last {WINDOW_WORDS[window]}",
            )
            for window in windows
        ),
        Feature(
            name=f"{kind}_minutes_since_fraud",
            type="minutes",
            window="ever",
            doc="Since the order whose fraud was reported last.",
            reason_text=f"last known fraud of {the} {{value}} ago",
        ),
    ]


def _risk(kind: str, the: str, windows: Sequence[str]) -> list[Feature]:
    features = []
    for window in windows:
        words = WINDOW_WORDS[window]
        features += [
            Feature(
                name=f"{kind}_settled_{window}",
                type="count",
                window=window,
                doc=f"Orders of {the} whose label became mature in the {words} before.",
                reason_text=f"{{value}} labelled orders of {the} within {words}",
            ),
            Feature(
                name=f"{kind}_risk_{window}",
                type="ratio",
                window=window,
                doc=f"Frauds reported per label that became mature in the {words} before.",
                reason_text=f"fraud share {{value}} of {the} within {words}",
            ),
        ]
    return features


def _labels(kind: str, the: str, last_labels: Sequence[int]) -> list[Feature]:
    return [
        *(
            Feature(
                name=f"{kind}_frauds_of_last_{n}",
                type="count",
                window=f"{n} labels",
                doc=f"Frauds among the last {n} mature labels of {the}.",
                reason_text=f"{{value}} of the last {n} labelled orders of {the} were fraud",
            )
            for n in last_labels
        ),
        Feature(
            name=f"{kind}_run_frauds",
            type="count",
            window="ever",
            doc=f"Length of the fraud streak of {the}: consecutive frauds up to the newest mature label.",
            reason_text=f"the last {{value}} labelled orders of {the} were all fraud",
        ),
        Feature(
            name=f"{kind}_run_minutes",
            type="minutes",
            window="ever",
            doc="Since the first order of the fraud streak.",
            reason_text=f"every labelled order of {the} for {{value}} was fraud",
        ),
        Feature(
            name=f"{kind}_minutes_since_genuine",
            type="minutes",
            window="ever",
            doc=f"Since the newest order of {the} with a mature label that is not fraud.",
            reason_text=f"last order of {the} known to be genuine {{value}} ago",
        ),
        Feature(
            name=f"{kind}_run_least",
            type="amount",
            window="ever",
            doc="Smallest amount in the fraud streak: a small amount does not explain a fraud.",
            reason_text=f"even an order of {{value}} at {the} was fraud",
        ),
    ]


def _unexplained(kind: str, the: str, windows: Sequence[str]) -> list[Feature]:
    return [
        *(
            Feature(
                name=f"{kind}_unexplained_{window}",
                type="count",
                window=window,
                doc=f"Unexplained frauds of {the} reported in the {WINDOW_WORDS[window]} before: the amount was not over "
                f"{UNUSUAL_RATIO:g} times their customer's mean.",
                reason_text=f"{{value}} frauds of ordinary amounts reported for {the} within the last {WINDOW_WORDS[window]}",
            )
            for window in windows
        ),
        Feature(
            name=f"{kind}_minutes_since_unexplained",
            type="minutes",
            window="ever",
            doc="Since the order of the last unexplained fraud.",
            reason_text=f"last fraud of an ordinary amount of {the} {{value}} ago",
        ),
        Feature(
            name=f"{kind}_minutes_since_unexplained_began",
            type="minutes",
            window="28d and the label delay",
            doc="Since the first order with an unexplained fraud in that window: when the device may have been compromised.",
            reason_text=f"frauds of ordinary amounts at {the} began {{value}} ago",
        ),
    ]
