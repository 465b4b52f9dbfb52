"""The demo: the whole way on a seeded shop, from its source servers to answers over HTTP, with what came out."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app import sandbox
from app.cli.main import print_pass, teller
from app.cli.output import Output
from app.cli.train_output import print_training, training_json
from app.demo.answers import ANSWERS
from app.demo.identity_scores import Scores, pairwise_scores
from app.demo.live_requests import as_json as answered_as_json
from app.demo.live_requests import ask_live, print_answered, product_to_look_up, requests
from app.project import PROJECT
from lakehouse.errors import SandboxError
from lakehouse.format_bytes import format_bytes
from lakehouse.iceberg.catalog import Lake
from lakehouse.query import query
from lakehouse.settings import home_directory
from lakehouse.status import statuses
from ml.registry import Registry
from ml.training.train import DEMO, TrainingResult, train_on
from pipelines.runner import open_engine, run_once
from pipelines.settings import load_settings
from pipelines.silver.identity_graph import IDENTITY_GRAPH


def run_demo(output: Output, *, orders: int, seed: int, keep: bool) -> None:
    """Start a fresh sandbox in `<home>/demo`, run one pass, train; show the model, tables, identity scores, answers; serve,
    and ask about orders and stock over HTTP."""
    started = time.monotonic()
    home = fresh_home(home_directory() / "demo")
    output.say(f"ShopSphere demo: {orders:,} orders (seed {seed}) in {home}\n")
    try:
        with output.progress() as show:
            addresses = sandbox.start(home, orders=orders, seed=seed, progress=show)
        output.say(f"1. Source servers run and hold the shop ({time.monotonic() - started:.0f} s).")
        for name, value in asdict(addresses).items():
            output.say(f"   {name:16} {value}")
        settings = load_settings()
        with open_engine(settings) as engine:
            output.say("\n2. Sources -> bronze -> silver -> gold")
            with output.progress() as show:
                done = run_once(engine, PROJECT, teller(show))
            if not output.as_json:
                print_pass(output, done)
            if done.errors:
                raise done.errors[0]
            output.say("\n3. A fraud model, from what the shop knew of each order when it was placed")
            registry = Registry(home=settings.home)
            registry.check()
            with output.progress() as show:
                trained = train_on(engine, registry, DEMO, show, sandbox.truth(home)["fraud"]["order_id"])
            if not output.as_json:
                print_training(output, trained)
        lake = Lake(settings)
        told = show_results(output, lake, home, done.seconds, trained)
        output.say("\n7. Answers over HTTP, while it happens")
        asked, product = requests(lake, sandbox.truth(home)["fraud"]), product_to_look_up(lake)
        with output.progress() as show:
            answered = ask_live(home, asked, product, model=registry.champion() is not None, show=show)
        print_answered(output, answered)
        seconds = time.monotonic() - started
        if output.as_json:
            output.json({**told, "serving": answered_as_json(answered), "seconds": seconds})
        output.say(f"\nDone in {seconds:.0f} s.")
    finally:
        if not keep:
            sandbox.stop(home)
    if not keep:
        output.say("\nThe source servers are stopped; the lakehouse stays. Look around:")
    where = f"SHOPSPHERE_HOME={_shown(home)} .venv/bin/python -m app"
    output.say(f'   {where} sql "SELECT * FROM gold.customer_360 ORDER BY net_revenue DESC LIMIT 3"')
    output.say(f"   {where} status")
    output.say("Serve it yourself (stock follows the topics, so the source servers must run):")
    if not keep:
        output.say(f"   {where} sandbox start --orders {orders} --seed {seed}")
    output.say(f"   {where} serve")
    output.say(f"   {'.venv/bin/' if registry.local else ''}{registry.command}")


def fresh_home(home: Path) -> Path:
    """An empty home directory for the demo; one that an earlier demo left is removed."""
    if home.exists():
        try:
            sandbox.stop(home)
        except SandboxError as error:
            raise SandboxError(f"The servers of an earlier demo in {home} cannot be stopped: {error}") from error
        shutil.rmtree(home)
    home.mkdir(parents=True)
    os.environ["SHOPSPHERE_HOME"] = str(home)
    return home


def identity_scores(lake: Lake, home: Path) -> Scores:
    """How well people were recognised, against the sandbox's ground truth."""
    predicted = lake.load(IDENTITY_GRAPH).read(["record_id", "master_user_id"]).unique()
    truth = sandbox.truth(home)["people"].select("record_id", "person")
    return pairwise_scores(predicted, truth)


def show_results(output: Output, lake: Lake, home: Path, seconds: float, trained: TrainingResult) -> dict[str, Any]:
    """Tables, identity, answers; gives them as for JSON."""
    found, scores = statuses(lake, PROJECT), identity_scores(lake, home)
    answers = {answer.title: query(lake, PROJECT.tables, answer.sql) for answer in ANSWERS}
    told = {
        "tables": {s.table: s.rows for s in found},
        "identity": {"precision": scores.precision, "recall": scores.recall, "f1": scores.f1},
        "answers": {title: rows.to_pylist() for title, rows in answers.items()},
        "model": training_json(trained),
        "pass_seconds": seconds,
    }
    if output.as_json:
        return told
    output.say("\n4. What the lakehouse holds")
    output.table(
        ("table", "rows", "files", "size", "what it is"),
        [
            (s.table, s.rows, s.files, format_bytes(s.bytes), PROJECT.tables[s.table].doc.split(". ")[0].rstrip("."))
            for s in found
        ],
    )
    output.say(
        f"\n5. One identity per person, against the ground truth: precision {scores.precision:.4f}, "
        f"recall {scores.recall:.4f}, F1 {scores.f1:.4f}"
    )
    output.say("\n6. What a business would ask")
    for answer in ANSWERS:
        rows = answers[answer.title]
        output.table(rows.schema.names, [list(row.values()) for row in rows.to_pylist()], title=answer.title)
        output.say(f"   {answer.reading}")
    return told


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
