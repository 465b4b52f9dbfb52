"""The command line on a small sandbox: output, errors, and the state it leaves."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pymongo
import pytest
from confluent_kafka import Producer

from app import sandbox
from app.cli.main import main
from lakehouse.engine.engine import Engine
from lakehouse.errors import CommitConflict
from lakehouse.iceberg.catalog import Lake
from lakehouse.iceberg.table_handle import TableHandle
from pipelines.bronze.tables import EVENTS
from pipelines.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the home directory of a sandbox with 400 orders and a lakehouse that contains them."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOPSPHERE_HOME", str(folder))
        patch.setenv("SHOPSPHERE_POSTGRES__RETYPED_COLUMNS", "beside")
        sandbox.start(folder, orders=400, seed=5)
        try:
            assert main(["run", "--json"]) == 0
            yield folder
        finally:
            sandbox.stop(folder)


@pytest.fixture
def cli(home, capsys):
    """Return a function that runs a command in this process: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def from_json(out: str):
    return json.loads(out.splitlines()[-1])


def digests(cli) -> dict[str, str]:
    return from_json(cli("digest", "--json")[1])


def test_a_second_run_commits_nothing(cli):
    before = {s["table"]: s["snapshot"] for s in from_json(cli("status", "--json")[1])}
    code, out, _ = cli("run", "--json")
    assert code == 0
    assert {s["status"] for s in from_json(out)["steps"]} == {"unchanged"}
    assert {s["table"]: s["snapshot"] for s in from_json(cli("status", "--json")[1])} == before


def test_run_prints_each_step_as_text_and_as_json(cli, home):
    sandbox.step(home, 30)
    code, out, _err = cli("run")
    assert code == 0
    assert re.search(r"step +status +rows read +rows written +deleted +written +seconds +cpu s", out)
    assert re.search(r"silver\.orders_unified +changed", out)
    sandbox.step(home, 30)
    done = from_json(cli("run", "--json")[1])
    step = next(s for s in done["steps"] if s["table"] == "gold.fact_orders")
    assert step["rows_read"] > 0
    assert step["rows_written"] > 0
    assert step["bytes_written"] > 0
    assert step["seconds"] > 0
    assert step["cpu_seconds"] >= 0
    assert done["cpu_seconds"] > 0


def test_status_shows_rows_snapshot_position_lag_and_last_run(cli):
    found = {s["table"]: s for s in from_json(cli("status", "--json")[1])}
    orders = found["silver.orders_unified"]
    assert orders["rows"] >= 400
    assert orders["snapshot"]
    assert orders["lag"] == "up to date"
    assert orders["last_run"]
    assert found["bronze.bronze_kafka__events"]["position"]["kafka"]
    code, out, _ = cli("status")
    assert code == 0
    assert "gold.customer_360" in out


def test_model_tables_are_listed_as_behind_until_train(cli):
    found = {s["table"]: s for s in from_json(cli("status", "--json")[1])}
    entities = found["silver.order_entities"]
    assert entities["rows"] == 0
    assert entities["lag"].startswith("behind chargebacks, order_items_unified, orders_unified")
    assert entities["lag"].endswith("until the next train or monitor")
    assert {"silver.fraud_ratios", "silver.order_features", "gold.user_fraud_scores"} <= found.keys()


def test_sql_gives_an_array_of_objects(cli):
    code, out, _ = cli("sql", "SELECT order_id, net_revenue FROM gold.fact_orders ORDER BY order_id LIMIT 2", "--json")
    assert code == 0
    rows = from_json(out)
    assert len(rows) == 2
    assert set(rows[0]) == {"order_id", "net_revenue"}


def test_sql_time_travel(cli, home):
    count = "SELECT count(*) AS n FROM gold.fact_orders"
    snapshot = next(s for s in from_json(cli("status", "--json")[1]) if s["table"] == "gold.fact_orders")["snapshot"]
    before = from_json(cli("sql", count, "--json")[1])[0]["n"]
    time.sleep(1.1)
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    sandbox.step(home, 25)
    cli("run", "--json")
    assert from_json(cli("sql", count, "--json")[1])[0]["n"] == before + 25
    assert from_json(cli("sql", f"{count} FOR VERSION AS OF {snapshot}", "--json")[1])[0]["n"] == before
    assert from_json(cli("sql", f"{count} FOR TIMESTAMP AS OF '{moment}'", "--json")[1])[0]["n"] == before


def test_sql_time_travel_with_names_quoted_qualified_and_aliased(cli):
    snapshot = next(s for s in from_json(cli("status", "--json")[1]) if s["table"] == "gold.dim_stores")["snapshot"]
    plain = from_json(cli("sql", "SELECT store_id FROM gold.dim_stores ORDER BY 1", "--json")[1])
    assert plain
    for statement in (
        f'SELECT "store_id" FROM gold.dim_stores FOR VERSION AS OF {snapshot} ORDER BY "store_id"',
        f'SELECT d."store_id" FROM "gold"."dim_stores" VERSION AS OF {snapshot} d ORDER BY 1',
        f"SELECT gold.dim_stores.store_id FROM gold.dim_stores FOR VERSION AS OF {snapshot} ORDER BY 1",
        "SELECT gold.dim_stores.store_id FROM gold.dim_stores ORDER BY gold.dim_stores.store_id",
        f"""WITH earlier AS (SELECT store_id FROM gold.dim_stores FOR VERSION AS OF {snapshot})
            SELECT now.store_id FROM gold.dim_stores AS now JOIN earlier USING (store_id) ORDER BY 1""",
    ):
        code, out, err = cli("sql", statement, "--json")
        assert code == 0, err
        assert from_json(out) == plain
    text = from_json(cli("sql", "SELECT 'VERSION AS OF 3' AS \"a b\"", "--json")[1])
    assert text == [{"a b": "VERSION AS OF 3"}]


def test_json_has_no_nan(cli):
    code, out, _ = cli("sql", "SELECT 'nan'::DOUBLE AS a, 'inf'::DOUBLE AS b, 1.5::DOUBLE AS c", "--json")
    assert code == 0
    assert json.loads(out, parse_constant=lambda name: pytest.fail(name)) == [{"a": None, "b": None, "c": 1.5}]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SELECT * FROM gold.dim_stores d FOR VERSION AS OF 1", "before its alias"),
        ("SELECT 1 FOR VERSION AS OF 1", "directly follow a table's name"),
        ("SELECT * FROM gold.dim_stores FOR TIMESTAMP AS OF now()", "needs a literal"),
        ("SELECT * FROM gold.nothing", "There is no table gold.nothing. Tables:"),
        ("SELECT * FROM fact_orders", "Did you mean gold.fact_orders?"),
        ("SELECT nope FROM gold.fact_orders", "cannot be run"),
        ("DROP TABLE gold.fact_orders", "exactly one SELECT"),
        ("SELECT * FROM gold.fact_orders FOR VERSION AS OF 1", "no snapshot 1"),
        ("SELEC 1", "cannot be read"),
    ],
)
def test_a_wrong_statement_is_one_line(cli, statement, expected):
    code, _out, err = cli("sql", statement)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


@pytest.mark.slow
def test_rebuild_gives_the_same_digest(cli):
    before = digests(cli)
    for table in ("silver.orders_unified", "gold.sales_daily", "silver.inventory_snapshots", "silver.identity_graph"):
        assert cli("rebuild", table)[0] == 0
    assert digests(cli) == before
    assert cli("rebuild", "no_such_table")[0] == 1


@pytest.mark.slow
def test_rereading_a_source_changes_no_silver_or_gold_table(cli):
    assert cli("run")[0] == 0  # an earlier test may have changed a source since the last run
    before = digests(cli)
    assert cli("rebuild", "bronze.bronze_postgres__orders")[0] == 0
    assert cli("rebuild", "bronze.bronze_kafka__events")[0] == 0
    assert cli("run", "--json")[0] == 0
    after = digests(cli)
    assert {n: d for n, d in after.items() if not n.startswith("bronze")} == {
        n: d for n, d in before.items() if not n.startswith("bronze")
    }


def test_maintain_keeps_every_digest(cli):
    before = digests(cli)
    code, out, _ = cli("maintain", "--snapshot-hours", "0", "--orphan-hours", "1", "--json")
    assert code == 0
    done = from_json(out)
    assert sum(m["snapshots_expired"] for m in done) > 0
    assert any(m["files_after"] < m["files_before"] for m in done)
    assert digests(cli) == before
    statuses = {s["status"] for s in from_json(cli("run", "--json")[1])["steps"]}
    assert statuses == {"unchanged"}


def test_maintain_continues_after_a_table_that_cannot_be_maintained(cli, monkeypatch):
    from lakehouse.iceberg import maintenance

    maintain = maintenance.maintain

    def fail_at_orders(lake, table, now):
        if table.name == "silver.orders_unified":
            raise KeyError("north@example.org")
        return maintain(lake, table, now)

    monkeypatch.setattr(maintenance, "maintain", fail_at_orders)
    code, out, err = cli("maintain", "--json")
    assert code == 1
    assert {"silver.users_scd", "gold.sales_daily"} <= {table["table"] for table in from_json(out)}
    assert re.fullmatch(r"error: silver\.orders_unified: unforeseen KeyError at \S+:\d+\. .*--debug.*", err.strip())
    assert "example.org" not in err


def test_debug_shows_the_traceback_of_an_isolated_exception(cli, monkeypatch):
    refresh = Engine.refresh

    def fail_at_orders(self, step, **how):
        if step.target.name == "silver.orders_unified":
            raise KeyError("a column")
        return refresh(self, step, **how)

    monkeypatch.setattr(Engine, "refresh", fail_at_orders)
    code, out, err = cli("run", "--json", "--debug")
    assert code == 1
    assert "silver.users_scd" in {step["table"] for step in from_json(out)["steps"]}
    assert "Traceback (most recent call last)" in err
    assert err.strip().endswith("KeyError: 'a column'")


def test_broken_rows_are_quarantined_corrected_and_replayed(cli, home):
    settings = load_settings()
    cli("run", "--json")
    already = from_json(cli("sql", "SELECT count(*) AS n FROM silver.quarantine", "--json")[1])[0]["n"]
    mongo = pymongo.MongoClient(settings.mongo.uri.get_secret_value())
    mongo.shopsphere.marketplace_orders.insert_one({"platform": "tokopedia", "mp_order_id": "ORD-BROKEN-1", "amount": "a lot"})
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
    producer.produce("events", key="1", value=b'{"event_id": "broken-1", "event_type": "click", "timest')
    producer.flush(10)
    assert cli("run", "--json")[0] == 0
    rows = from_json(cli("sql", "SELECT source_table, source_position, reason, original FROM silver.quarantine", "--json")[1])
    assert len(rows) == already + 2
    mine = [r for r in rows if "ORD-BROKEN-1" in r["original"] or "broken-1" in r["original"]]
    assert len(mine) == 2
    assert all(row["reason"] for row in mine)

    good_event = {"event_id": "broken-1", "event_type": "click", "timestamp": "2026-01-02T10:00:00Z", "user_id": 1}
    good_order = {
        "_id": {"$oid": "0123456789abcdef01234567"}, "platform": "tokopedia", "mp_order_id": "ORD-BROKEN-1",
        "order_time": {"$date": {"$numberLong": "1767348000000"}}, "amount": {"$numberInt": "350000"}, "currency": "IDR",
    }  # fmt: skip
    fixes = home / "fixes.jsonl"
    fixes.write_text(
        "".join(
            json.dumps(
                {
                    "table": row["source_table"],
                    "position": row["source_position"],
                    **(
                        {"value": json.dumps(good_order)}
                        if "mongo" in row["source_table"]
                        else {"value_base64": base64.b64encode(json.dumps(good_event).encode()).decode()}
                    ),
                }
            )
            + "\n"
            for row in mine
        )
    )
    code, out, err = cli("replay", "--fix", str(fixes), "--json")
    assert code == 0, err
    done = from_json(out)
    assert (done["corrections"], done["before"], done["after"]) == (2, already + 2, already)
    found = from_json(
        cli("sql", "SELECT total_amount FROM silver.orders_unified WHERE order_id = 'tokopedia:ORD-BROKEN-1'", "--json")[1]
    )
    assert found == [{"total_amount": "350000.0000"}]
    assert (
        from_json(cli("sql", "SELECT count(*) AS n FROM silver.events_clean WHERE event_id = 'broken-1'", "--json")[1])[0]["n"]
        == 1
    )
    before = digests(cli)
    for table in ("silver.events_clean", "silver.orders_unified", "silver.order_items_unified"):
        assert cli("rebuild", table)[0] == 0
    assert digests(cli) == before

    # the same correction again changes nothing; a different one for a readable row is refused, because the tables would
    # depend on the order of the corrections
    assert cli("replay", "--fix", str(fixes))[0] == 0
    assert digests(cli) == before
    fixes.write_text(fixes.read_text().replace("350000", "360000"))
    code, _, err = cli("replay", "--fix", str(fixes))
    assert code == 1
    assert "is readable" in err


@pytest.mark.slow
def test_a_postgres_row_with_an_unreadable_value_is_quarantined_corrected_and_replayed(cli, home):
    with psycopg.connect(load_settings().postgres.dsn.get_secret_value(), autocommit=True) as connection:
        row = connection.execute("SELECT order_id, line_no FROM order_items ORDER BY 1, 2 LIMIT 1").fetchone()
        assert row is not None
        connection.execute("UPDATE order_items SET unit_price = 'NaN' WHERE order_id = %s AND line_no = %s", row)
    assert cli("run", "--json")[0] == 0
    query = "SELECT source_table, source_position, reason, original FROM silver.quarantine WHERE source_table LIKE '%order_items'"
    quarantined = from_json(cli("sql", query, "--json")[1])
    assert [(q["source_table"], q["reason"]) for q in quarantined] == [
        ("bronze.bronze_postgres__order_items", "unit_price: a value that the column's type cannot hold")
    ]
    assert json.loads(quarantined[0]["original"])["unit_price"] == "NaN"

    def fix(value: object) -> tuple[int, str, str]:
        line = {
            "table": quarantined[0]["source_table"],
            "position": quarantined[0]["source_position"],
            "value": json.dumps(value),
        }
        (home / "fix.jsonl").write_text(json.dumps(line))
        return cli("replay", "--fix", str(home / "fix.jsonl"), "--json")

    for wrong, expected in (
        ([1], "a JSON object"),
        ({"price": "1"}, "has no column 'price'"),
        ({"unit_price": "cheap"}, "'unit_price' is not a valid numeric(18,4)"),
        ({"order_id": 7}, "is part of the key"),
    ):
        code, _, err = fix(wrong)
        assert code == 1
        assert expected in err
    code, out, err = fix(json.loads(quarantined[0]["original"]) | {"unit_price": 12.5})
    assert code == 0, err
    assert from_json(out)["corrections"] == 1
    assert from_json(cli("sql", query, "--json")[1]) == []
    prices = f"SELECT unit_price FROM silver.order_items_unified WHERE order_id = '{row[0]}' AND line_no = {row[1]}"
    assert from_json(cli("sql", prices, "--json")[1]) == [{"unit_price": "12.5000"}]
    before = digests(cli)
    for table in ("silver.order_items_unified", "gold.fact_orders"):
        assert cli("rebuild", table)[0] == 0
    assert digests(cli) == before
    # otherwise a new lakehouse would quarantine the row too, at another position
    with psycopg.connect(load_settings().postgres.dsn.get_secret_value(), autocommit=True) as connection:
        connection.execute("UPDATE order_items SET unit_price = 12.5 WHERE order_id = %s AND line_no = %s", row)


def test_a_table_that_cannot_be_refreshed_does_not_stop_the_others(cli, home, monkeypatch):
    sandbox.step(home, 10)
    refresh = Engine.refresh

    def failing(self, step, **options):
        if step.target.name == "silver.products":
            raise CommitConflict("silver.products: another writer committed first. Run again.")
        return refresh(self, step, **options)

    monkeypatch.setattr(Engine, "refresh", failing)
    code, out, err = cli("run", "--json")
    assert code == 1
    assert "silver.products: another writer" in err
    assert "gold.fact_orders" in {s["table"] for s in from_json(out)["steps"] if s["status"] == "changed"}
    monkeypatch.undo()
    monkeypatch.setenv("SHOPSPHERE_HOME", str(home))
    monkeypatch.setenv("SHOPSPHERE_POSTGRES__RETYPED_COLUMNS", "beside")
    assert cli("run", "--json")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["data", "metadata", "metadata/*.avro"])
def test_a_table_that_lost_files_is_named_and_rebuilt(cli, home, monkeypatch, lost):
    monkeypatch.setattr("lakehouse.retry.MAX_ATTEMPTS", 2)
    assert cli("run")[0] == 0  # an earlier test may have changed a source since the last run
    before, folder = digests(cli), home / "warehouse" / "gold" / "fact_orders"
    for one in folder.glob(lost):
        shutil.rmtree(one) if one.is_dir() else one.unlink()
    listed = {one["table"]: one["lag"] for one in from_json(cli("status", "--json")[1])}
    assert listed.keys() == before.keys()
    assert lost == "data" or "has lost a file" in listed["gold.fact_orders"]
    cli("rebuild", "silver.orders_unified")
    code, out, err = cli("run", "--json")
    if lost == "metadata":  # else the rows that are there are not read when nothing is new
        assert code == 1
        assert err.count("gold.fact_orders: a file is missing") == 1
        assert "python -m app rebuild gold.fact_orders" in err
        assert {"gold.sales_daily", "gold.customer_360"} <= {one["table"] for one in from_json(out)["steps"]}
    assert cli("rebuild", "gold.fact_orders")[0] == 0
    assert cli("run")[0] == 0
    assert digests(cli) == before


def test_a_bronze_table_that_lost_a_file_is_kept(cli, home, tmp_path, monkeypatch):
    monkeypatch.setattr("lakehouse.retry.MAX_ATTEMPTS", 2)
    assert cli("run")[0] == 0  # an earlier test may have changed a source since the last run
    before = digests(cli)
    needed = Lake(load_settings()).load(EVENTS).files()[0].path
    file = Path(needed.removeprefix("file://"))
    kept = shutil.move(file, tmp_path / "kept")
    for command in (("rebuild", "bronze.bronze_kafka__events"), ("rebuild", "silver.events_clean")):
        code, _, err = cli(*command)
        assert code == 1
        assert "bronze.bronze_kafka__events: a file is missing" in err
        assert "Restore it" in err
    shutil.move(kept, file)
    assert cli("run")[0] == 0
    assert digests(cli) == before


def test_a_correction_is_retried_after_a_commit_conflict(cli, home, monkeypatch):
    producer = Producer({"bootstrap.servers": load_settings().kafka.bootstrap_servers})
    producer.produce("events", key="1", value=b'{"event_id": "broken-2", "event_type": "cl')
    producer.flush(10)
    assert cli("run", "--json")[0] == 0
    query = (
        "SELECT source_table AS \"table\", source_position AS position FROM silver.quarantine WHERE original LIKE '%broken-2%'"
    )
    (line,) = from_json(cli("sql", query.replace("original LIKE", "original::VARCHAR LIKE"), "--json")[1])
    good = {"event_id": "broken-2", "event_type": "click", "timestamp": "2026-01-02T10:00:00Z"}
    (home / "fix.jsonl").write_text(json.dumps({**line, "value": json.dumps(good)}))
    commit, met = TableHandle.commit, []

    def late(self, *arguments, **options):
        if self.table.name == "bronze.bronze_kafka__events" and not met:
            met.append(commit(Lake(load_settings()).load(self.table), positions=self.positions))
        return commit(self, *arguments, **options)

    monkeypatch.setattr(TableHandle, "commit", late)
    code, out, err = cli("replay", "--fix", str(home / "fix.jsonl"), "--json")
    assert code == 0, err
    assert met
    assert (from_json(out)["corrections"], from_json(out)["after"]) == (1, from_json(out)["before"] - 1)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("not json", "invalid correction"),
        ('{"table": "silver.products", "position": "1", "value": ""}', "not a bronze table"),
        ('{"table": "bronze.bronze_kafka__events", "position": "nowhere", "value": "{}"}', "no row at position"),
    ],
)
def test_a_wrong_correction_is_one_line(cli, tmp_path, line, expected):
    file = tmp_path / "fixes.jsonl"
    file.write_text(line + "\n")
    code, _, err = cli("replay", "--fix", str(file))
    assert code == 1
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_new_source_column_arrives_and_a_changed_type_is_named(cli, home, monkeypatch):
    dsn = load_settings().postgres.dsn.get_secret_value()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("ALTER TABLE stores ADD COLUMN opened_on date")
        connection.execute("UPDATE stores SET opened_on = '2020-05-01'")
        assert cli("run", "--json")[0] == 0
        rows = from_json(
            cli("sql", "SELECT DISTINCT opened_on FROM bronze.bronze_postgres__stores WHERE opened_on IS NOT NULL", "--json")[1]
        )
        assert rows == [{"opened_on": "2020-05-01"}]
        before = digests(cli)
        mongo = pymongo.MongoClient(load_settings().mongo.uri.get_secret_value()).shopsphere.marketplace_orders
        order = {"platform": "tokopedia", "mp_order_id": "MEANWHILE", "order_time": datetime.now(UTC), "amount": 1}
        monkeypatch.setenv("SHOPSPHERE_POSTGRES__RETYPED_COLUMNS", "error")
        connection.execute("ALTER TABLE stores ALTER COLUMN opened_on TYPE text USING opened_on::text")
        connection.execute("UPDATE stores SET opened_on = 'spring'")
        code, _, err = cli("run")
        assert code == 1
        assert "bronze.bronze_postgres__stores" in err
        assert "opened_on" in err
        assert "date" in err
        assert "text" in err
        assert digests(cli) == before
        mongo.insert_one(order)
        assert cli("run")[0] == 1
        count = "SELECT count(*) AS n FROM gold.fact_orders WHERE order_id = 'tokopedia:MEANWHILE'"
        assert from_json(cli("sql", count, "--json")[1]) == [{"n": 1}]
        monkeypatch.setenv("SHOPSPHERE_POSTGRES__RETYPED_COLUMNS", "beside")
        assert cli("run", "--json")[0] == 0
        rows = from_json(
            cli(
                "sql",
                "SELECT DISTINCT opened_on__text AS t FROM bronze.bronze_postgres__stores WHERE opened_on__text = 'spring'",
                "--json",
            )[1]
        )
        assert rows == [{"t": "spring"}]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SHOPSPHERE_BASE_CURRENCY", "dollars", "base_currency"),
        ("SHOPSPHERE_RAY__INLINE_ROWS", "many", "ray.inline_rows"),
        (
            "SHOPSPHERE_CATALOG__PROPERTIES",
            '{"type": "sql", "uri": "sqlite:////nowhere/at/all/c.db", "warehouse": "/nowhere"}',
            "catalog",
        ),
        ("SHOPSPHERE_POSTGRES__DSN", "postgresql://shopsphere:s3cret@127.0.0.1:1/shopsphere", "PostgreSQL"),
        ("SHOPSPHERE_MONGO__URI", "mongodb://127.0.0.1:1", "MongoDB"),
        ("SHOPSPHERE_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1", "Kafka"),
        ("SHOPSPHERE_KAFKA__TOPICS", "no-such-topic", "no-such-topic"),
    ],
)
def test_wrong_settings_and_unreachable_sources_are_one_line(cli, monkeypatch, name, value, expected):
    monkeypatch.setattr("pipelines.sources.mongo.connection.SERVER_SECONDS", 1)
    monkeypatch.setattr("pipelines.sources.kafka.source.REQUEST_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setenv(name, value)
    code, _, err = cli("run")
    assert code == 1
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert "Traceback" not in err
    assert "s3cret" not in err


def test_a_settings_file_that_is_not_toml_is_named(cli, monkeypatch, tmp_path):
    file = tmp_path / "wrong.toml"
    file.write_text("this is = not = toml")
    monkeypatch.setenv("SHOPSPHERE_CONFIG", str(file))
    code, _, err = cli("status")
    assert code == 1
    assert str(file) in err


def test_an_unknown_command_or_option_is_a_usage_error(cli):
    assert cli("frobnicate")[0] == 2
    assert cli("run", "--frobnicate")[0] == 2
    code, _, err = cli("run", "--every", "soon")
    assert code == 1
    assert "5s" in err


def test_a_second_sandbox_in_the_same_home_is_refused(cli):
    code, _, err = cli("sandbox", "start", "--orders", "10")
    assert code == 1
    assert "python -m app sandbox stop" in err


@pytest.mark.parametrize(("number", "code", "message"), [(signal.SIGTERM, 143, "Stopped"), (signal.SIGINT, 130, "Interrupted")])
def test_a_signal_ends_a_command_with_a_message(number, code, message):
    waits = (
        "import sys, time; from app.cli import main as command_line\n"
        "@command_line.app.command()\n"
        "def wait():\n"
        "    try:\n"
        "        print('waiting', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaned up', flush=True)\n"
        "sys.exit(command_line.main(['wait']))"
    )
    process = subprocess.Popen([sys.executable, "-c", waits], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "cleaned up\n")
    assert err.strip() == f"{message}. No partial data was committed. Run the command again to continue."


def test_sigterm_while_ray_starts_ends_the_command(tmp_path):
    starts = (
        "import os, signal, sys; from app.cli import main as command_line; from lakehouse.parallel import TaskPool\n"
        "from lakehouse.settings import RaySettings\n"
        "import ray._private.node\n"
        "def struck(*given, **named): os.kill(os.getpid(), signal.SIGTERM)\n"
        "ray._private.node.Node.__init__ = struck\n"
        "@command_line.app.command()\n"
        "def start(): TaskPool(RaySettings(cpus=1)).start()\n"
        "sys.exit(command_line.main(['start']))"
    )
    done = subprocess.run([sys.executable, "-c", starts], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 143, done.stderr
    assert "Stopped. No partial data was committed." in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_run_every_that_waits_for_a_server(home, tmp_path, number):
    """The catalog's server accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        catalog = {"type": "rest", "uri": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        env = {**os.environ, "SHOPSPHERE_HOME": str(tmp_path), "SHOPSPHERE_CATALOG__PROPERTIES": json.dumps(catalog)}
        process, _ = run_every_second(env)
        try:
            silent.settimeout(60)
            asked, _ = silent.accept()
            process.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2)
            process.send_signal(number)
            _, err = process.communicate(timeout=20)
            asked.close()
        finally:
            process.kill()
            process.wait()
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert err.strip().endswith("No partial data was committed. Run the command again to continue.")


def run_every_second(env: dict[str, str]) -> tuple[subprocess.Popen[str], Iterator[dict[str, Any]]]:
    """Start `run --every 1s`; return the process and the JSON object of each run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "run", "--every", "1s", "--json"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, map(json.loads, iter(process.stdout.readline, ""))


@pytest.mark.slow
def test_run_every_on_ray_stops_cleanly(home, tmp_path):
    env = {**os.environ, "SHOPSPHERE_HOME": str(tmp_path), "SHOPSPHERE_CONFIG": str(home / "shopsphere.toml")}
    env |= {"SHOPSPHERE_POSTGRES__SLOT": "on_ray", "SHOPSPHERE_RAY__INLINE_ROWS": "0"}
    process, runs = run_every_second(env)
    assert any(step["parallel"] for step in next(runs)["steps"])
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_run_every_keeps_going_and_stops_cleanly(home):
    env = {**os.environ, "SHOPSPHERE_HOME": str(home)}
    process, runs = run_every_second(env)
    seen = [next(runs) for _ in range(2)]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert len(seen) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (util-linux) to mount a small file system")
def test_a_full_disk_is_reported_and_loses_nothing(home, tmp_path):
    keep = tmp_path / "keep"
    env = {
        **os.environ,
        "SHOPSPHERE_HOME": str(keep),
        "SHOPSPHERE_CONFIG": str(home / "shopsphere.toml"),
        "SHOPSPHERE_POSTGRES__SLOT": "full_disk",
    }
    keep.mkdir()
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    probe = subprocess.run([*namespace, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(keep)], capture_output=True)
    if probe.returncode:
        pytest.skip("this machine does not allow mounting a small file system")
    app = f"{sys.executable} -m app"
    # the first run has a disk of 200 kB; after it has grown, a second run continues
    script = (
        f"mount -t tmpfs -o size=200k tmpfs {keep} && {app} run; echo code $?; mount -o remount,size=100m {keep} "
        f"&& {app} run --json > /dev/null && {app} digest --json"
    )
    done = subprocess.run([*namespace, "sh", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert "code 1" in done.stdout, done.stderr
    assert "The disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    found = from_json(done.stdout)
    undisturbed = {**env, "SHOPSPHERE_HOME": str(tmp_path / "undisturbed"), "SHOPSPHERE_POSTGRES__SLOT": "undisturbed"}
    for command in (["run", "--json"], ["digest", "--json"]):
        last = subprocess.run(
            [sys.executable, "-m", "app", *command], cwd=ROOT, env=undisturbed, capture_output=True, text=True, timeout=200
        )
        assert last.returncode == 0, last.stderr
    assert from_json(last.stdout) == found
