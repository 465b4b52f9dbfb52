"""Erasure of a person end to end: real sources and a real lakehouse, all of whose files are searched afterwards."""

from __future__ import annotations

import json
import os
import stat
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import polars as pl
import psycopg
import pymongo
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from support.erasure_world import World, context_of, files_containing, find_customer, personal_texts, shop
from support.mlflow_server import mlflow_server
from support.project import use_project
from support.waiting import wait_for

import pipelines
import pipelines.privacy.erase
from app.cli.erasure_receipt import receipt_lines
from app.cli.main import main
from app.project import PROJECT
from lakehouse.digest import digest
from lakehouse.errors import SettingsError, ShopSphereError
from lakehouse.expectations import accepted
from lakehouse.iceberg.catalog import Lake
from ml.registry import Registry
from ml.tables import feature_tables
from ml.tables.order_features import ORDER_FEATURES
from pipelines.bronze.tables import EVENTS, MARKETPLACE_ORDERS, USERS
from pipelines.gold.customer_360 import CUSTOMER_360
from pipelines.gold.fact_orders import FACT_ORDERS
from pipelines.gold.sales_daily import SALES_DAILY
from pipelines.privacy.context import ErasureContext
from pipelines.privacy.erase import erase_person, finish, request
from pipelines.privacy.export import export_person
from pipelines.privacy.person import SubjectQuery
from pipelines.privacy.pseudonyms import KEY_FILE, is_pseudonym
from pipelines.privacy.suppression import erasures
from pipelines.rebuild import rebuild_tables
from pipelines.replay import replay_quarantined
from pipelines.runner import run_once
from pipelines.settings import business_settings
from pipelines.silver.quarantine import QUARANTINE
from pipelines.silver.users_scd import USERS_SCD
from pipelines.sources.kafka.clients import open_consumer
from serve.settings import ServeSettings
from serve.state.online_state import OnlineState


@pytest.fixture(scope="module")
def filled_shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with shop(tmp_path_factory.mktemp("erasure") / "home", orders=400, seed=5) as world:
        yield world


@pytest.fixture
def world(filled_shop: World) -> World:
    filled_shop.restore()
    return filled_shop


def digests(lake: Lake, layers: tuple[str, ...] = ("silver", "gold")) -> dict[str, str]:
    return {name: digest(lake.load(table)) for name, table in pipelines.TABLES.items() if table.layer in layers}


def run(world: World) -> None:
    with world.engine() as engine:
        assert not run_once(engine, PROJECT, lambda name, report: None).errors


def test_erasure_removes_a_person_from_every_file_and_keeps_every_sum(world: World) -> None:
    lake, person = world.lake, find_customer(world.lake)
    texts = personal_texts(person)
    assert files_containing(world.home, texts), "the person must be stored before the erasure"
    sales = lake.load(SALES_DAILY).read([c.name for c in SALES_DAILY.columns]).sort(SALES_DAILY.key)
    orders = lake.load(FACT_ORDERS).read(["order_id", "net_revenue", "store_id", "order_date", "master_user_id"]).sort("order_id")
    before, begun = digests(lake), datetime.now(UTC)
    with world.engine() as engine:
        (receipt,) = erase_person(context_of(engine), SubjectQuery(email=person["email_raw"]))
    assert begun <= receipt.requested_at <= receipt.finished_at
    assert receipt.clean
    assert receipt.values
    assert not receipt.searched.matches
    assert files_containing(world.home, texts) == []
    lake = world.lake
    assert lake.load(SALES_DAILY).read([c.name for c in SALES_DAILY.columns]).sort(SALES_DAILY.key).equals(sales)
    assert lake.load(FACT_ORDERS).read(orders.columns).sort("order_id").equals(orders)
    master = lake.load(CUSTOMER_360).read(["name", "email", "phone"], pl.col("master_user_id") == person["master_user_id"])
    assert master.height == 1
    assert master["email"][0].endswith("@erased.invalid")
    assert master["phone"][0].startswith("+8839")
    # another run changes nothing, and a rebuild has the same result
    after = digests(lake)
    assert after != before
    run(world)
    with world.engine() as engine:
        rebuild_tables(engine, PROJECT, [name for name, table in pipelines.TABLES.items() if table.layer != "bronze"])
    assert digests(world.lake) == after
    # older snapshots are gone, and the receipt contains no text of the person
    assert all(
        len(lake.load(table).iceberg_table.metadata.snapshots) <= 1
        for table in pipelines.TABLES.values()
        if table.layer == "gold"
    )
    kept = "".join(file.read_text() for file in (world.home / "erasures").iterdir())
    assert not [text for text in texts if text in kept]
    with world.engine() as engine, pytest.raises(ShopSphereError, match="No customer matches"):
        erase_person(context_of(engine), SubjectQuery(email=person["email_raw"]))


@pytest.mark.slow
def test_rereading_a_source_does_not_restore_the_person(world: World) -> None:
    person = find_customer(world.lake)
    with world.engine() as engine:
        erase_person(context_of(engine), SubjectQuery(master_user_id=person["master_user_id"]))
        after = digests(engine.lake)
        rebuild_tables(engine, PROJECT, [table.name for table in pipelines.BRONZE])
    run(world)
    assert files_containing(world.home, personal_texts(person)) == []
    assert digests(world.lake) == after
    # new values of the erased account are replaced; a new account with the same e-mail is another person
    with psycopg.connect(world.settings.postgres.dsn.get_secret_value(), autocommit=True) as source:
        source.execute(
            "UPDATE users SET email = 'new.address@post.example', updated_at = now() WHERE user_id = %s",
            [person["primary_user_id"]],
        )
        source.execute(
            "INSERT INTO users (user_id, email, email_verified, phone_verified, name, created_at, updated_at) "
            "VALUES (987654, %s, true, false, 'Ada Later', now() + interval '1 minute', now())",
            [person["email_raw"]],
        )
    try:
        run(world)
        users = world.lake.load(USERS_SCD).read(["user_id", "email", "master_user_id"], pl.col("is_current"))
        old = users.filter(pl.col("user_id") == int(person["primary_user_id"])).row(0, named=True)
        new = users.filter(pl.col("user_id") == 987654).row(0, named=True)
        assert old["email"].endswith("@erased.invalid")
        assert files_containing(world.home, ["new.address@post.example"]) == []
        assert new["email"] == person["email"]
        assert new["master_user_id"] != person["master_user_id"]
    finally:
        with psycopg.connect(world.settings.postgres.dsn.get_secret_value(), autocommit=True) as source:
            source.execute("UPDATE users SET email = %s WHERE user_id = %s", [person["email_raw"], person["primary_user_id"]])
            source.execute("DELETE FROM users WHERE user_id = 987654")


@pytest.mark.slow
def test_a_failed_expectation_delays_an_erasure_and_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = replace(FACT_ORDERS, expectations=(accepted("channel", {"web", "pos", "marketplace"}),))
    steps = tuple(replace(step, target=strict) if step.target.name == strict.name else step for step in PROJECT.steps)
    use_project(monkeypatch, replace(PROJECT, steps=steps))
    monkeypatch.setenv("SHOPSPHERE_HOME", str(world.home))
    run(world)
    person = find_customer(world.lake, 2)
    with psycopg.connect(world.settings.postgres.dsn.get_secret_value(), autocommit=True) as source:
        source.execute(
            "INSERT INTO orders (order_id, source, status, currency, total_amount, created_at, updated_at) "
            "VALUES (876543, 'phone', 'paid', 'USD', 10, now(), now())"
        )
        try:
            with world.engine() as engine:
                one = request(context_of(engine), SubjectQuery(email=person["email_raw"]))
                for known in pipelines.enabled_sources(world.settings):  # like a run that is killed after ingestion
                    engine.ingest(known, pipelines.TABLES)
            capsys.readouterr()
            assert main(["maintain", "silver.products"]) == 1
            output = capsys.readouterr()
            assert "An erasure is pending and cannot be finished yet. gold.fact_orders: not published" in output.err
            assert "silver.products" in output.out, "the table is maintained all the same"
        finally:
            source.execute("DELETE FROM orders WHERE order_id = 876543")
    assert main(["run"]) == 0, "the run reads the correction, then finishes the erasure"
    assert [found.finished for found in erasures(world.lake) if found.id == one.id] == [True]
    assert files_containing(world.home, personal_texts(person)) == []


@pytest.mark.slow
def test_quarantined_rows_are_erased_and_their_correction_restores_nothing(world: World, tmp_path: Path) -> None:
    person = find_customer(world.lake, 1)
    broken = {"_id": "erasure-broken", "platform": "lazada", "mp_order_id": "LZ-BROKEN", "user_email": person["email_raw"]}
    broken |= {
        "note": f"ring {person['phone_raw']}",
        "buyer_name": "Xaver Ungelesen",
        "shipping_address": "Hinterhof 77, Nirgends",
    }
    collection = orders_of_marketplaces(world)
    collection.insert_one(broken)
    # PostgreSQL's slot is ahead of the restored lakehouse
    world = world.without_postgres
    try:
        run(world)
        kept = world.lake.load(QUARANTINE).read(["source_position", "original"])
        assert person["email_raw"].encode() in b"".join(kept["original"])
        with world.engine() as engine:
            (receipt,) = erase_person(context_of(engine), SubjectQuery(email=person["email"]))
        assert receipt.clean
        texts = [*personal_texts(person), "Xaver Ungelesen", "Hinterhof 77"]
        assert files_containing(world.home, texts) == []
        kept = world.lake.load(QUARANTINE).read(["source_position", "source_table", "original"])
        (position,) = kept.filter(pl.col("original").bin.contains(b"LZ-BROKEN"))["source_position"]
        value = json.dumps(
            {**broken, "order_time": {"$date": "2026-01-02T03:04:05Z"}, "amount": {"$numberInt": "5"}, "currency": "IDR"}
        )
        fixes = tmp_path / "fixes.jsonl"
        fixes.write_text(json.dumps({"table": MARKETPLACE_ORDERS.name, "position": position, "value": value}))
        with world.engine() as engine:
            done = replay_quarantined(engine, PROJECT, fixes)
            again = replay_quarantined(engine, PROJECT, fixes)
        assert (done.corrections, again.corrections) == (1, 0)
        assert done.after == done.before - 1
        assert files_containing(world.home, texts) == []
    finally:
        collection.delete_one({"_id": "erasure-broken"})


@pytest.mark.slow
def test_texts_that_name_the_person_are_removed_from_undeclared_fields(world: World) -> None:
    person = find_customer(world.lake, 1)
    name, email, account = person["name"], person["email_raw"], int(person["primary_user_id"])
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    item = {"product_id": "P0001", "product_name": "Mug", "quantity": 1, "price": 5, "gift_message": f"Dear {name}"}
    order = {"_id": "erasure-gift", "platform": "lazada", "mp_order_id": "LZ-GIFT", "user_email": email, "amount": 5}
    order |= {"currency": "IDR", "order_time": moment, "items": [{**item, "variant": {"engraving": name}}]}
    other_order = {**order, "_id": "erasure-other", "mp_order_id": "LZ-OTHER", "user_email": "somebody@else.example"}
    other_order |= {"items": [{"product_id": "P0001", "product_name": "Mug", "quantity": 1, "price": 5}]}
    other_order |= {"note": f"write to:\n{email}"}
    shipped = {"event_id": "erasure-ship", "event_type": "order_shipped", "timestamp": moment.isoformat()}
    shipped |= {"metadata": {"order_ref": "lazada:LZ-GIFT", "recipient": name}}
    seen = {"event_id": "erasure-page", "event_type": "view_page", "timestamp": moment.isoformat(), "user_id": 1}
    seen |= {"metadata": {"url": f"/?mail={quote_plus(email)}"}}
    collection, producer = (
        orders_of_marketplaces(world),
        Producer({"bootstrap.servers": world.settings.kafka.bootstrap_servers}),
    )
    collection.insert_many([order, other_order])
    for number, value in enumerate((shipped, seen, {**seen, "event_id": "erasure-key", "metadata": {}})):
        producer.produce("events", json.dumps(value).encode(), key=email if number == 2 else None)
    producer.produce("events", json.dumps({**seen, "event_id": "erasure-header", "metadata": {}}), headers={"user": email})
    assert producer.flush(30) == 0
    world = world.without_postgres
    try:
        run(world)
        with world.engine() as engine:
            (receipt,) = erase_person(context_of(engine), SubjectQuery(user_id=account))
    finally:
        collection.delete_many({"_id": {"$in": ["erasure-gift", "erasure-other"]}})
    assert receipt.clean
    assert "name" not in receipt.shared
    assert files_containing(world.home, [*personal_texts(person), quote_plus(email), b64encode(email.encode()).decode()]) == []


@pytest.mark.slow
def test_rows_with_a_future_timestamp_are_erased(world: World) -> None:
    person = find_customer(world.lake, 2)
    later = {"timestamp": "2090-01-01T00:00:00Z", "event_type": "view_page", "metadata": {}}
    mine = {**later, "event_id": "erasure-signed", "user_id": int(person["primary_user_id"]), "device_id": "d-of-the-future"}
    unsigned = {**later, "event_id": "erasure-unsigned", "device_id": "d-of-the-future"}
    producer = Producer({"bootstrap.servers": world.settings.kafka.bootstrap_servers})
    for value in (mine, unsigned):
        producer.produce("events", json.dumps(value).encode())
    assert producer.flush(30) == 0
    world = world.without_postgres
    run(world)
    assert files_containing(world.home, ["d-of-the-future"])
    with world.engine() as engine:
        (receipt,) = erase_person(context_of(engine), SubjectQuery(email=person["email"]))
        assert receipt.clean
        assert files_containing(world.home, [*personal_texts(person), "d-of-the-future"]) == []
        rebuild_tables(engine, PROJECT, [EVENTS.name])
    run(world)
    assert files_containing(world.home, ["d-of-the-future"]) == []


@pytest.mark.slow
def test_rows_of_other_customers_are_unchanged(world: World) -> None:
    lake, person = world.lake, find_customer(world.lake, 2)
    columns = ["user_id", "email", "phone_number", "name", "master_user_id"]
    others = lake.load(USERS_SCD).read(columns, pl.col("master_user_id") != person["master_user_id"]).sort(columns)
    with world.engine() as engine:
        erase_person(context_of(engine), SubjectQuery(user_id=int(person["primary_user_id"])))
    after = world.lake.load(USERS_SCD).read(columns, pl.col("master_user_id") != person["master_user_id"]).sort(columns)
    assert after.equals(others)


@pytest.mark.slow
def test_the_search_list_is_deleted_with_the_end_of_its_erasure(world: World) -> None:
    person, place = find_customer(world.lake), world.home / "erasures"
    with world.engine() as engine:
        one = request(context_of(engine), SubjectQuery(email=person["email"]))
        (kept,) = place.glob("*.order.json")
        content = kept.read_bytes()
        assert finish(context_of(engine), one).clean
        kept.write_bytes(content)  # as left by a process that was killed before its last step
        assert erase_person(context_of(engine), None) == []
    assert not list(place.glob("*.order.json"))
    assert not list(place.glob(".*"))


@pytest.mark.slow
def test_erasing_a_person_twice_changes_nothing_more(world: World) -> None:
    person = find_customer(world.lake)
    with world.engine() as engine:
        (once,) = erase_person(context_of(engine), SubjectQuery(email=person["email"]))
        names = set(engine.lake.load(USERS_SCD).read(["name"])["name"])
        (again,) = erase_person(context_of(engine), SubjectQuery(user_id=int(person["primary_user_id"])))
        assert set(engine.lake.load(USERS_SCD).read(["name"])["name"]) == names
    assert once.clean
    assert again.clean
    assert again.values == 0


@pytest.mark.slow
def test_truncated_files_of_tables_are_deleted_and_others_are_reported(world: World) -> None:
    person, warehouse = find_customer(world.lake), world.home / "warehouse"
    whole = next((warehouse / "gold" / "dim_stores").rglob("*.parquet")).read_bytes()
    left = [next((warehouse / place).rglob("data")) / "half.parquet" for place in ("gold/dim_stores", "operations/runs")]
    for file in left:
        file.write_bytes(whole[:300])
    outside = world.home / "half.parquet"
    outside.write_bytes(whole[:300])
    try:
        with world.engine() as engine:
            (receipt,) = erase_person(context_of(engine), SubjectQuery(email=person["email"]))
            assert not receipt.clean
            assert receipt.searched.unread == (str(outside),)
            assert any(str(outside) in line for line in receipt_lines(receipt))
            assert not any(file.exists() for file in left)
            outside.unlink()
            (receipt,) = erase_person(context_of(engine), None)
            assert receipt.clean
    finally:
        outside.unlink(missing_ok=True)


@pytest.mark.slow
def test_two_erasures_and_a_pending_one_are_all_finished(world: World) -> None:
    one, other = find_customer(world.lake), find_customer(world.lake, 3)
    with world.engine() as engine:
        request(context_of(engine), SubjectQuery(email=one["email"]))
        request(context_of(engine), SubjectQuery(email=other["email"]))
    assert [item.finished for item in erasures(world.lake)] == [False, False]
    with world.engine() as engine:
        receipts = erase_person(context_of(engine), None)
    assert [receipt.clean for receipt in receipts] == [True, True]
    assert files_containing(world.home, [*personal_texts(one), *personal_texts(other)]) == []
    assert all(item.finished for item in erasures(world.lake))


@pytest.mark.slow
def test_ingestion_fails_without_the_erasure_key(world: World) -> None:
    person = find_customer(world.lake)
    with world.engine() as engine:
        erase_person(context_of(engine), SubjectQuery(email=person["email"]))
    key = world.home / KEY_FILE
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.rename(world.home / "elsewhere")
    assert_nothing_is_ingested(world, "key")
    with world.engine() as engine, pytest.raises(SettingsError, match="is missing"):
        erase_person(context_of(engine), SubjectQuery(user_id=int(find_customer(world.lake, 1)["primary_user_id"])))
    assert not key.exists(), "a new key would replace the former one"
    key.write_text(os.urandom(32).hex())
    assert_nothing_is_ingested(world, "differs")
    (world.home / "elsewhere").unlink()


def assert_nothing_is_ingested(world: World, reason: str) -> None:
    """Assert that a run fails with this reason for each source, and reads none of them."""
    with world.engine() as engine:
        done = run_once(engine, PROJECT, lambda name, report: None)
    assert [type(error) for error in done.errors] == [SettingsError], "the same error for each source is reported once"
    assert reason in str(done.errors[0])
    assert not {result.table for result in done.results if result.table.startswith("bronze")}


def test_export_writes_all_rows_and_overwrites_nothing(world: World, tmp_path: Path) -> None:
    person = find_customer(world.lake)
    target = tmp_path / "export"
    done = export_person(world.lake, PROJECT.tables, SubjectQuery(email=person["email"]), target)
    exported = json.loads((target / "person.json").read_text())
    assert exported["person"]["masters"] == [person["master_user_id"]]
    assert {USERS.name, EVENTS.name, "silver.identity_graph", "silver.users_scd", "gold.customer_360"} <= set(exported["tables"])
    for name, rows in done.rows.items():
        assert len(exported["tables"][name]["rows"]) == rows == pl.read_csv(target / f"{name}.csv", infer_schema=False).height
    assert person["email_raw"] in (target / f"{USERS.name}.csv").read_text()
    orders = world.lake.load(FACT_ORDERS).read(["order_id"], pl.col("master_user_id") == person["master_user_id"])
    assert done.rows["gold.fact_orders"] == orders.height
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in target.iterdir())
    with pytest.raises(ShopSphereError, match="not overwritten"):
        export_person(world.lake, PROJECT.tables, SubjectQuery(email=person["email"]), target)
    with pytest.raises(ShopSphereError, match="No customer matches"):
        export_person(world.lake, PROJECT.tables, SubjectQuery(email="nobody@nowhere.example"), tmp_path / "other")


@pytest.mark.slow
def test_a_serving_replica_anonymises_events(world: World) -> None:
    world, person = world.without_postgres, find_customer(world.lake)
    account = int(person["primary_user_id"])
    context = business_settings(world.settings)
    state = OnlineState(world.settings, ServeSettings(refresh_seconds=0.5), context, lambda follower: None)
    state.start()
    producer = Producer({"bootstrap.servers": world.settings.kafka.bootstrap_servers})

    def send(name: str) -> None:
        event = {"event_id": name, "event_type": "login", "timestamp": datetime.now(UTC).isoformat(), "user_id": account}
        producer.produce("events", json.dumps({**event, "device_id": "d-of-the-tail", "metadata": {}}).encode())
        assert producer.flush(30) == 0

    def devices() -> list[str]:
        later = state.follower.stock.later
        return later.filter(pl.col("event_id").is_in(["tail-1", "tail-2"]))["device_id"].to_list()

    try:
        assert state.ready.wait(60)
        send("tail-1")
        wait_for(lambda: devices() == ["d-of-the-tail"])
        with world.engine() as engine:
            assert erase_person(context_of(engine), SubjectQuery(email=person["email"]))[0].clean
        send("tail-2")
        wait_for(lambda: len(devices()) == 2 and len(set(devices())) == 1 and is_pseudonym("device", devices()[0]))
        run(world)
        assert files_containing(world.home, [*personal_texts(person), "d-of-the-tail"]) == []
    finally:
        state.stop()


@pytest.mark.slow
@pytest.mark.parametrize("ingested", [True, False])
def test_older_served_scores_are_deleted_from_their_topic(world: World, ingested: bool) -> None:
    kafka, name = world.settings.kafka, f"scores-{ingested}".lower()
    world, person = world.without_postgres, find_customer(world.lake)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    admin.create_topics([NewTopic(name, 2, 1)])[name].result(10)
    topics = (*kafka.topics, name) if ingested else kafka.topics
    settings = world.settings.model_copy(update={"kafka": kafka.model_copy(update={"topics": topics})})
    world = replace(world, settings=settings)
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})

    def score(number: int) -> None:
        order = {"order_id": str(number), "account": int(person["primary_user_id"]), "device": "d-of-a-score"}
        event = {"event_id": f"score:{number}", "event_type": "order_scored", "timestamp": datetime.now(UTC).isoformat()}
        message = {**event, "metadata": {"order_ref": str(number), "order": order}}
        producer.produce(name, json.dumps(message).encode(), partition=number % 2)
        assert producer.flush(30) == 0

    def in_topic() -> int:
        with open_consumer(kafka) as consumer:
            ends = [consumer.get_watermark_offsets(TopicPartition(name, number), timeout=10) for number in range(2)]
        return sum(high - low for low, high in ends)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOPSPHERE_SERVE_SCORES_TOPIC", name)
        for number in range(5):
            score(number)
        with world.engine() as engine:
            one = request(context_of(engine), SubjectQuery(email=person["email"]))
            score(5)
            receipt = finish(context_of(engine), one)
        assert receipt.clean
        assert in_topic() == 1, "scores sent after the request remain"
        run(world)
        scores = world.lake.load(EVENTS).read(["value"], pl.col("topic") == name)
        assert scores.height == (6 if ingested else 0)
        assert files_containing(world.home, [*personal_texts(person), "d-of-a-score"]) == []


@pytest.mark.slow
def test_an_erasure_stays_pending_until_the_scores_topic_is_reachable(world: World) -> None:
    away = world.settings.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:1"})
    apart = replace(world, settings=world.settings.model_copy(update={"kafka": away}))
    with apart.engine() as engine:
        (receipt,) = erase_person(context_of(engine), SubjectQuery(email=find_customer(world.lake)["email"]))
        assert not receipt.clean
        message = "not reached topic fraud_scores could not be emptied: Kafka: request to 127.0.0.1:1 failed"
        assert message in "\n".join(receipt_lines(receipt))
    with world.engine() as engine:
        (receipt,) = erase_person(context_of(engine), None)
        assert receipt.clean


@pytest.mark.slow
def test_a_remote_tracking_server_is_searched(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    person = find_customer(world.lake)
    with mlflow_server(tmp_path) as server, world.engine() as engine:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        registry = Registry()
        registry.check()
        experiment = registry.client.get_experiment_by_name(registry.name)
        assert experiment is not None
        run_id = registry.client.create_run(experiment.experiment_id).info.run_id
        registry.client.log_text(run_id, f"a note on {person['email_raw']}", "note.txt")
        (receipt,) = erase_person(context_of(engine), SubjectQuery(email=person["email"]))
        assert receipt.searched.matches == (f"mlflow/runs/{run_id}/artifacts/note.txt",)
        registry.client.log_text(run_id, "a note on nobody", "note.txt")
        (receipt,) = erase_person(context_of(engine), None)
        assert receipt.clean
        server.stop()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        (receipt,) = erase_person(context_of(engine), SubjectQuery(email=find_customer(world.lake, 1)["email"]))
        assert [what.split(" could")[0] for what in receipt.unreached] == [f"MLflow at {server.address}"]


@pytest.mark.slow
def test_sales_during_an_erasure_do_not_keep_it_pending(world: World) -> None:
    world, person = world.without_postgres, find_customer(world.lake)
    collection = orders_of_marketplaces(world)
    with world.engine() as engine:
        request(context_of(engine), SubjectQuery(email=person["email"]))
        sale = {"_id": "sold-meanwhile", "platform": "lazada", "mp_order_id": "LZ-NEW", "amount": 5, "currency": "IDR"}
        item = {"product_id": "P0001", "product_name": "Thing", "quantity": 1, "price": 5}
        collection.insert_one({**sale, "order_time": datetime.now(UTC), "items": [item]})
        try:
            assert not run_once(engine, PROJECT, lambda name, report: None).errors
            (receipt,) = erase_person(context_of(engine), None)
        finally:
            collection.delete_one({"_id": "sold-meanwhile"})
    assert not receipt.sums_equal
    assert receipt.clean
    assert receipt.arrived >= 1
    assert files_containing(world.home, personal_texts(person)) == []


@pytest.mark.slow
def test_a_sale_ingested_during_the_request_explains_changed_sums(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world, person = world.without_postgres, find_customer(world.lake)
    collection, begun = orders_of_marketplaces(world), pipelines.privacy.erase.refresh_all
    sale = {"_id": "sold-before", "platform": "lazada", "mp_order_id": "LZ-BEFORE", "amount": 5, "currency": "IDR"}
    item = {"product_id": "P0001", "product_name": "Thing", "quantity": 1, "price": 5}

    def refresh_then_ingest(context: ErasureContext) -> None:
        begun(context)
        for source in pipelines.enabled_sources(world.settings):
            context.engine.ingest(source, pipelines.TABLES)
        monkeypatch.undo()

    collection.insert_one({**sale, "order_time": datetime.now(UTC), "items": [item]})
    monkeypatch.setattr(pipelines.privacy.erase, "refresh_all", refresh_then_ingest)
    try:
        with world.engine() as engine:
            (receipt,) = erase_person(context_of(engine), SubjectQuery(email=person["email"]))
    finally:
        collection.delete_one({"_id": "sold-before"})
    assert not receipt.sums_equal
    assert receipt.arrived >= 1
    assert receipt.clean


def orders_of_marketplaces(world: World) -> Any:
    """Return the source collection."""
    mongo = world.settings.mongo
    return pymongo.MongoClient(mongo.uri.get_secret_value())[mongo.database][mongo.collection]


@pytest.mark.slow
def test_the_features_of_every_order_are_unchanged(world: World) -> None:
    person = find_customer(world.lake)
    names = [name for name in ORDER_FEATURES.schema.names if name != "customer"]
    with world.engine() as engine:
        feature_tables.refresh(engine)
        before = engine.lake.load(ORDER_FEATURES).read(names).sort("order_id")
        (receipt,) = erase_person(context_of(engine), SubjectQuery(email=person["email"]))
        after = engine.lake.load(ORDER_FEATURES).read(names).sort("order_id")
    assert receipt.clean
    assert after.equals(before)
    assert files_containing(world.home, personal_texts(person)) == []
