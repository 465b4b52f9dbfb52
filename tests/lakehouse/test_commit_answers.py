"""Commits that succeed although the catalog reports an error. With a real REST catalog: tests/servers/."""

from __future__ import annotations

import polars as pl
import pytest
from pyiceberg.exceptions import CommitFailedException, ForbiddenError, ServerError
from requests.exceptions import ConnectionError as NoConnection
from support.engines import make_engine

from app.project import PROJECT
from lakehouse.errors import CatalogUnreachable, CommitConflict, ShopSphereError
from pipelines.gold.dim_stores import DIM_STORES
from pipelines.runner import run_once


def failing(monkeypatch, catalog, method: str, error: Exception, *, arrives: bool = True) -> None:
    """Let a method of the catalog raise `error`, after it was carried out if `arrives`."""
    original = getattr(catalog, method)

    def fail(*arguments, **named):
        if arrives:
            original(*arguments, **named)
        raise error

    monkeypatch.setattr(catalog, method, fail)


@pytest.mark.parametrize("error", [CommitFailedException("no"), ServerError("?"), NoConnection("gone")])
def test_a_commit_that_succeeded_is_complete_and_found_after_reloading(tmp_path, monkeypatch, error):
    lake = make_engine(tmp_path).lake
    handle = lake.load(DIM_STORES)
    rows = pl.DataFrame({"store_id": ["S1", "S2"], "_seq": [1, 1]})
    with monkeypatch.context() as patch:
        failing(patch, lake.catalog, "commit_table", error)
        with pytest.raises(CommitConflict):
            handle.commit(handle.writer.write(rows), positions={"a": 1})
    now = lake.load(DIM_STORES)
    assert now.positions == {"a": 1}
    assert sorted(now.read(["store_id"])["store_id"]) == ["S1", "S2"]


def test_a_refused_commit_is_not_retried(tmp_path, monkeypatch):
    lake = make_engine(tmp_path).lake
    handle = lake.load(DIM_STORES)
    failing(monkeypatch, lake.catalog, "commit_table", ForbiddenError("secret words"), arrives=False)
    with pytest.raises(ShopSphereError, match=r"gold\.dim_stores: the catalog refuses") as caught:
        handle.commit(positions={"a": 1})
    assert not isinstance(caught.value, CommitConflict)
    assert "secret words" not in str(caught.value)


def test_a_run_ends_when_the_catalog_does_not_respond(tmp_path, monkeypatch):
    monkeypatch.setattr("lakehouse.retry.time.sleep", lambda seconds: None)
    engine = make_engine(tmp_path)
    for source in ("postgres", "mongo", "kafka"):
        part = getattr(engine.lake.settings, source).model_copy(update={"enabled": False})
        engine.lake.settings = engine.lake.settings.model_copy(update={source: part})
    failing(monkeypatch, engine.lake.catalog, "load_table", NoConnection("http://me:pw@host"), arrives=False)
    result = run_once(engine, PROJECT, lambda name, report: None)
    assert [type(error) for error in result.errors] == [CatalogUnreachable]
    assert "pw" not in str(result.errors[0])
