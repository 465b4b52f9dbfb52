"""Entity resolution with the real engine and Iceberg: runs with deletes and repeats equal a rebuild."""

from __future__ import annotations

import random

import polars as pl
from support.engines import make_engine
from support.identity_world import BRONZE, GraphInMemory, document, masters, schema, shop, sorted_rows, truncated, user, web_order

from lakehouse.digest import digest
from lakehouse.engine.engine import Engine
from lakehouse.iceberg.schema import as_arrow
from pipelines.silver.identity_graph import IDENTITY_GRAPH, STEP


def append(engine: Engine, rows) -> None:
    for name, table in BRONZE.items():
        own = [row for kind, row in rows if kind == name]
        handle = engine.lake.load(table)
        if own:
            frame = pl.DataFrame(own, schema=schema(table)).with_columns(
                pl.lit(handle.next_sequence).alias("_seq"), pl.lit(0).alias("_group_hash"), pl.lit(False).alias("_deleted")
            )
            handle.commit(handle.writer.write(as_arrow(frame, handle.writer.schema)), positions={})
        elif handle.snapshot is None:
            handle.commit([], positions={})


def graph(engine: Engine) -> pl.DataFrame:
    return engine.lake.load(IDENTITY_GRAPH).read([column.name for column in IDENTITY_GRAPH.columns])


def test_runs_with_deletes_equal_a_rebuild(tmp_path):
    rows, _ = shop(people=60, seed=5)
    rows += [
        document("0-0", at=9000, op="d"),
        user(1003, at=9001, op="d"),
        document("1-0", at=9002, op="u", user_email="someone@else.example"),
    ]
    random.Random(1).shuffle(rows)
    memory, engine = GraphInMemory(), make_engine(tmp_path / "split")
    for start in range(0, len(rows), 60):
        memory.run(rows[start : start + 60])
        append(engine, rows[start : start + 60])
        engine.refresh(STEP)
        assert sorted_rows(graph(engine)) == sorted_rows(memory.graph)
    assert engine.refresh(STEP).status == "unchanged"
    once = make_engine(tmp_path / "once")
    append(once, rows)
    once.refresh(STEP)
    expected = digest(once.lake.load(IDENTITY_GRAPH))
    assert digest(engine.lake.load(IDENTITY_GRAPH)) == expected
    engine.refresh(STEP, rebuild=True)
    assert digest(engine.lake.load(IDENTITY_GRAPH)) == expected
    assert masters(graph(engine)) == masters(memory.rebuilt())


def test_rows_without_new_evidence_change_nothing(tmp_path):
    engine = make_engine(tmp_path)
    append(engine, [user(1, name="Budi Santoso", email="a@x.com"), user(2, name="Ani Wijaya")])
    engine.refresh(STEP)
    append(engine, [user(1, at=3, op="u", name="Budi Santoso", email="A@x.com")])
    report = engine.refresh(STEP)
    assert report.rows_deleted == 0
    assert engine.refresh(STEP).rows_read == 0
    assert set(masters(graph(engine))) == {"user:1", "user:2"}


def test_truncates_and_deletes_by_key_affect_the_graph(tmp_path):
    rows, _ = shop(people=20, seed=6)
    orders = [row for name, row in rows if name == "orders"]
    assert {row["user_id"] for row in orders[:6]} > {row["user_id"] for row in orders[:3]}
    runs = [
        rows,
        [web_order(row["order_id"], None, at=8000, op="d") for row in orders[:3]],
        [truncated("orders", 8001), document("0-0", at=8002, op="u", user_email="someone@else.example")],
        [web_order(orders[4]["order_id"], orders[4]["user_id"], at=8003, device_id="d-new"), *rows[:1]],
        [truncated("users", 8004), user(1003, at=8005, op="c", name="Somebody Else", email="new@mail.example")],
        [truncated("marketplace", 8006)],
        [user(1004, at=8007, op="c", name="Somebody Else", email="new@mail.example"), *rows[:9]],
    ]
    memory, engine = GraphInMemory(), make_engine(tmp_path)
    for number, run in enumerate(runs):
        memory.run(run)
        append(engine, run)
        engine.refresh(STEP)
        assert sorted_rows(graph(engine)) == sorted_rows(memory.graph) == sorted_rows(memory.rebuilt()), number
    assert masters(graph(engine)) == {"user:1003": "M-user:1003", "user:1004": "M-user:1003"}
    expected = digest(engine.lake.load(IDENTITY_GRAPH))
    engine.refresh(STEP, rebuild=True)
    assert digest(engine.lake.load(IDENTITY_GRAPH)) == expected
