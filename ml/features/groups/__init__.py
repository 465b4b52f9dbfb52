"""Table of contents of the features, in the order of the model's columns."""

from __future__ import annotations

from ml.features.declarations import Feature, FeatureGroup
from ml.features.groups.address import ADDRESS
from ml.features.groups.card import CARD
from ml.features.groups.customer import CUSTOMER
from ml.features.groups.device import DEVICE
from ml.features.groups.events import ACCOUNT_EVENTS, DEVICE_EVENTS
from ml.features.groups.ip import IP
from ml.features.groups.order import ORDER
from ml.features.groups.person import PERSON

FEATURE_GROUPS: tuple[FeatureGroup, ...] = (ORDER, CUSTOMER, CARD, DEVICE, ADDRESS, IP, PERSON, ACCOUNT_EVENTS, DEVICE_EVENTS)
FEATURES: tuple[Feature, ...] = tuple(feature for group in FEATURE_GROUPS for feature in group.features)
FEATURE_NAMES: tuple[str, ...] = tuple(feature.name for feature in FEATURES)
