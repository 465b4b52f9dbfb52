"""Fixtures of the tests of serving."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient
from support.page_client import richest_customer
from support.scoring_desk import replica, running

from pipelines.settings import Settings


@pytest.fixture(scope="module")
def client(filled: Settings) -> Iterator[TestClient]:
    """A client of a running replica on the sandbox's lakehouse and topics."""
    with running(replica(filled, scores_topic="")) as client:
        yield client


@pytest.fixture(scope="module")
def merged_customer(filled: Settings) -> str:
    """The master_user_id of a person with several accounts and orders in every channel."""
    return richest_customer(filled)
