"""The plan of a refresh, from positions and flags alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lakehouse.engine.plan import RefreshKind, StagedSnapshot, TableState, plan_refresh


def at(sequence: int, table: str = "uuid-1") -> dict[str, object]:
    return {"table": table, "sequence": sequence}


UP_TO_DATE = TableState(
    positions={"silver.orders": at(4), "silver.rates": at(2)},
    stored_fingerprint="abc",
    fingerprint="abc",
    upstream={"silver.orders": at(4), "silver.rates": at(2)},
    incremental={"silver.orders"},
)
NEW_ORDERS = replace(UP_TO_DATE, upstream={"silver.orders": at(6), "silver.rates": at(2)})


def test_nothing_new_is_no_work():
    plan = plan_refresh(UP_TO_DATE)
    assert plan.kind is RefreshKind.UNCHANGED
    assert not plan.full


def test_new_rows_are_an_incremental_refresh_from_the_stored_position():
    plan = plan_refresh(NEW_ORDERS)
    assert (plan.kind, plan.reason) == (RefreshKind.INCREMENTAL, "new rows in silver.orders")
    assert plan.since == {"silver.orders": 4, "silver.rates": 2}
    assert plan.positions == NEW_ORDERS.upstream


def test_new_rows_of_a_table_that_is_not_read_by_its_new_rows_are_incremental_too():
    plan = plan_refresh(replace(UP_TO_DATE, upstream={"silver.orders": at(4), "silver.rates": at(3)}))
    assert (plan.kind, plan.reason) == (RefreshKind.INCREMENTAL, "new rows in silver.rates")


def test_a_first_refresh_is_full():
    plan = plan_refresh(replace(NEW_ORDERS, positions={}, stored_fingerprint=None))
    assert (plan.kind, plan.reason) == (RefreshKind.FULL, "silver.orders has never been read")
    assert plan.since == {"silver.orders": None, "silver.rates": None}
    assert not plan.redefined


def test_a_first_refresh_on_empty_tables_is_no_work():
    empty = {"silver.orders": at(0), "silver.rates": at(0)}
    assert plan_refresh(replace(UP_TO_DATE, positions={}, stored_fingerprint=None, upstream=empty)).kind is RefreshKind.UNCHANGED


def test_a_new_broadcast_table_alone_is_incremental():
    state = replace(UP_TO_DATE, positions={"silver.orders": at(4)})
    plan = plan_refresh(state)
    assert (plan.kind, plan.since["silver.rates"]) == (RefreshKind.INCREMENTAL, None)


def test_a_new_upstream_table_that_is_read_by_its_new_rows_is_full_once_it_has_rows():
    state = replace(NEW_ORDERS, incremental={"silver.orders", "silver.items"})
    with_items = replace(state, upstream={**state.upstream, "silver.items": at(1)})
    without_rows = replace(state, upstream={**state.upstream, "silver.items": at(0)})
    assert plan_refresh(with_items).kind is RefreshKind.FULL
    assert plan_refresh(without_rows).kind is RefreshKind.INCREMENTAL


def test_a_re_created_upstream_table_is_full_even_when_it_is_empty():
    state = replace(UP_TO_DATE, upstream={"silver.orders": at(0, "uuid-2"), "silver.rates": at(0, "uuid-1")})
    plan = plan_refresh(state)
    assert (plan.kind, plan.reason) == (RefreshKind.FULL, "silver.orders was re-created")
    assert plan.since["silver.orders"] is None


def test_a_redefined_table_is_full():
    plan = plan_refresh(replace(UP_TO_DATE, fingerprint="def"))
    assert (plan.kind, plan.redefined, plan.reason) == (RefreshKind.FULL, True, "the definition has changed")
    assert plan.fingerprint == "def"


def test_a_re_created_quarantine_table_is_full():
    quarantine = {"silver.quarantine": at(0, "uuid-q")}
    first = replace(UP_TO_DATE, quarantine=quarantine)
    assert plan_refresh(first).kind is RefreshKind.UNCHANGED, "a table from before quarantine positions were stored"
    known = replace(first, positions={**UP_TO_DATE.positions, **quarantine})
    assert plan_refresh(known).kind is RefreshKind.UNCHANGED
    plan = plan_refresh(replace(known, quarantine={"silver.quarantine": at(0, "uuid-r")}))
    assert (plan.kind, plan.reason) == (RefreshKind.FULL, "silver.quarantine was re-created")
    assert plan.positions["silver.quarantine"] == at(0, "uuid-r")


def test_a_rebuild_is_full_whatever_has_changed():
    assert plan_refresh(UP_TO_DATE, rebuild=True).kind is RefreshKind.FULL
    empty = {"silver.orders": at(0), "silver.rates": at(0)}
    assert plan_refresh(replace(UP_TO_DATE, upstream=empty, positions={}), rebuild=True).kind is RefreshKind.FULL


def test_a_replay_is_incremental_without_new_rows_and_full_for_a_table_never_filled():
    assert plan_refresh(UP_TO_DATE, replay=True).kind is RefreshKind.INCREMENTAL
    assert plan_refresh(replace(UP_TO_DATE, positions={}), replay=True).kind is RefreshKind.FULL


STAGED = replace(NEW_ORDERS, staged=StagedSnapshot(NEW_ORDERS.upstream, "abc"))


def test_a_staged_snapshot_of_the_same_positions_is_published():
    assert plan_refresh(STAGED).kind is RefreshKind.PUBLISH_STAGED
    recreated = replace(STAGED, positions={"silver.orders": at(4, "uuid-0"), "silver.rates": at(2)})
    assert plan_refresh(recreated).kind is RefreshKind.PUBLISH_STAGED, "it was built in full"


@pytest.mark.parametrize("staged", [StagedSnapshot(UP_TO_DATE.upstream, "abc"), StagedSnapshot(NEW_ORDERS.upstream, "def"), None])
def test_a_staged_snapshot_of_other_positions_or_another_definition_is_built_again(staged):
    assert plan_refresh(replace(NEW_ORDERS, staged=staged)).kind is RefreshKind.INCREMENTAL


def test_a_rebuild_or_replay_does_not_publish_what_is_staged():
    assert plan_refresh(STAGED, rebuild=True).kind is RefreshKind.FULL
    assert plan_refresh(STAGED, replay=True).kind is RefreshKind.INCREMENTAL


def test_nothing_new_leaves_a_staged_snapshot_alone():
    assert plan_refresh(replace(STAGED, upstream=UP_TO_DATE.upstream)).kind is RefreshKind.UNCHANGED
