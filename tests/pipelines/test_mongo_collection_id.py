"""The UUID of a MongoDB collection: it tells a collection that was replaced from the one that was read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pymongo
import pytest
from bson import Binary
from pymongo.errors import OperationFailure
from support.mongo_market import TABLE, Market, open_market

from lakehouse.errors import OffsetExpired
from lakehouse.source import restart_position


@pytest.fixture
def market(servers: Any) -> Iterator[Market]:
    with open_market(servers.mongo_uri) as market:
        yield market


def report_uuid(monkeypatch: pytest.MonkeyPatch, uuid: Any) -> None:
    """Let the server report a UUID of the collection, as MongoDB does and the emulation of these tests does not."""

    def listed(database: Any, filter: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"name": filter["name"], "info": {"readOnly": False, "uuid": uuid}}]

    monkeypatch.setattr(pymongo.database.Database, "list_collections", listed)


FIRST, SECOND = (Binary.from_uuid(UUID(int=number)) for number in (1, 2))


@pytest.mark.parametrize("mode", ["watermark", "change_stream"])
def test_a_replaced_collection_is_an_error_until_it_is_rebuilt(
    market: Market, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    market.use_settings(mode=mode)
    report_uuid(monkeypatch, FIRST)
    market.add(1, 2)
    market.reader.run()
    market.add(3, 3)
    market.reader.run()
    assert market.reader.positions[TABLE]["collection"] == str(UUID(int=1))
    report_uuid(monkeypatch, SECOND)
    with pytest.raises(OffsetExpired, match=rf"UUID was {UUID(int=1)} and is now {UUID(int=2)}.*python -m app rebuild {TABLE}"):
        market.reader.plan()
    market.reader.positions = {TABLE: restart_position(market.reader.positions[TABLE])}
    market.reader.run()
    assert market.reader.positions[TABLE]["collection"] == str(UUID(int=2))
    assert not market.reader.plan().tasks


@pytest.mark.parametrize("mode", ["watermark", "change_stream"])
def test_a_position_without_the_uuid_is_completed(market: Market, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    market.use_settings(mode=mode)
    market.add(1, 2)
    market.reader.run()
    assert "collection" not in market.reader.positions[TABLE]
    report_uuid(monkeypatch, FIRST)
    assert market.reader.run() == {}
    assert market.reader.positions[TABLE]["collection"] == str(UUID(int=1))
    assert not market.reader.plan().tasks
    market.add(3, 3)
    assert len(market.reader.run()[TABLE]) == 1


def test_a_uuid_that_is_not_reported_is_not_compared(market: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    report_uuid(monkeypatch, FIRST)
    market.add(1, 2)
    market.reader.run()
    report_uuid(monkeypatch, "00000000-0000-0000-0000-000000000000")
    market.add(3, 3)
    market.reader.run()

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OperationFailure("not authorized on shop to execute command listCollections", 13)

    monkeypatch.setattr(pymongo.database.Database, "list_collections", refuse)
    market.add(4, 4)
    market.reader.run()
    assert len(market.bronze_documents()) == 4
    assert market.reader.positions[TABLE]["collection"] == str(UUID(int=1))
