"""Runs and prints the demo: source servers, lakehouse, fraud model, business questions, requests over HTTP."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app import sandbox
from app.cli.output import Output
from app.cli.step_report import print_run, step_progress
from app.cli.train_output import print_training, training_json
from app.demo.business_questions import QUESTIONS
from app.demo.identity_scores import PairScores, pairwise_scores
from app.demo.scoring_requests import LiveAnswers, ScoringRequest, bestselling_product, scoring_requests, send_requests
from app.project import PROJECT
from lakehouse.errors import SandboxError
from lakehouse.format_bytes import format_bytes
from lakehouse.iceberg.catalog import Lake
from lakehouse.query import query
from lakehouse.settings import home_directory
from lakehouse.status import statuses
from ml.registry import Registry
from ml.training.train import DEMO, TrainingResult, train_on
from pipelines.runner import RunResult, open_engine, run_once
from pipelines.settings import Settings, load_settings
from pipelines.silver.identity_graph import IDENTITY_GRAPH

SHOWN_REASONS, SHOWN_STORES = 3, 3


def run_demo(output: Output, *, orders: int, seed: int, keep: bool) -> None:
    """Run the demo in a new sandbox under `<home>/demo` and print each stage. keep: leave the source servers running."""
    started = time.monotonic()
    home = new_home(home_directory() / "demo")
    output.say(f"ShopSphere demo: {orders:,} orders (seed {seed}) in {home}\n")
    try:
        _start_sources(output, home, orders, seed, started)
        settings = load_settings()
        registry = Registry(home=settings.home)
        run, trained = _run_and_train(output, home, settings, registry)
        lake = Lake(settings)
        shown = _show_results(output, lake, home)
        answers = _send_requests(output, lake, home, model=registry.champion() is not None)
        seconds = time.monotonic() - started
        if output.as_json:
            totals = {
                "model": training_json(trained),
                "pass_seconds": run.seconds,
                "serving": answers.as_json(),
                "seconds": seconds,
            }
            output.json({**shown, **totals})
        output.say(f"\nDone in {seconds:.0f} s.")
    finally:
        if not keep:
            sandbox.stop(home)
    _say_next_steps(output, home, registry, orders, seed, keep)


def new_home(home: Path) -> Path:
    """Return an empty home directory and make it SHOPSPHERE_HOME. An earlier demo's directory is removed."""
    if home.exists():
        try:
            sandbox.stop(home)
        except SandboxError as error:
            raise SandboxError(f"The servers of an earlier demo in {home} cannot be stopped: {error}") from error
        shutil.rmtree(home)
    home.mkdir(parents=True)
    os.environ["SHOPSPHERE_HOME"] = str(home)
    return home


def _start_sources(output: Output, home: Path, orders: int, seed: int, started: float) -> None:
    with output.progress() as show:
        addresses = sandbox.start(home, orders=orders, seed=seed, progress=show)
    output.say(f"1. Source servers with generated data are running ({time.monotonic() - started:.0f} s).")
    for name, value in asdict(addresses).items():
        output.say(f"   {name:16} {value}")


def _run_and_train(output: Output, home: Path, settings: Settings, registry: Registry) -> tuple[RunResult, TrainingResult]:
    with open_engine(settings) as engine:
        output.say("\n2. Sources -> bronze -> silver -> gold")
        with output.progress() as show:
            run = run_once(engine, PROJECT, step_progress(show))
        if not output.as_json:
            print_run(output, run)
        if run.errors:
            raise run.errors[0]
        output.say("\n3. A fraud model, from the data available when each order was placed")
        registry.check()
        with output.progress() as show:
            trained = train_on(engine, registry, DEMO, show, sandbox.truth(home)["fraud"]["order_id"])
        if not output.as_json:
            print_training(output, trained)
    return run, trained


def identity_scores(lake: Lake, home: Path) -> PairScores:
    """Return how well identity resolution grouped the records, against the sandbox's ground truth."""
    predicted = lake.load(IDENTITY_GRAPH).read(["record_id", "master_user_id"]).unique()
    truth = sandbox.truth(home)["people"].select("record_id", "person")
    return pairwise_scores(predicted, truth)


def _show_results(output: Output, lake: Lake, home: Path) -> dict[str, Any]:
    """Print the tables, the identity scores and the business questions; return them for JSON output."""
    tables, scores = statuses(lake, PROJECT), identity_scores(lake, home)
    answers = {question.title: query(lake, PROJECT.tables, question.sql) for question in QUESTIONS}
    output.say("\n4. Tables of the lakehouse")
    output.table(
        ("table", "rows", "files", "size", "contents"),
        [
            (one.table, one.rows, one.files, format_bytes(one.bytes), PROJECT.tables[one.table].doc.split(". ")[0].rstrip("."))
            for one in tables
        ],
    )
    output.say(
        f"\n5. Identity resolution against the ground truth: precision {scores.precision:.4f}, "
        f"recall {scores.recall:.4f}, F1 {scores.f1:.4f}"
    )
    output.say("\n6. Business questions")
    for question in QUESTIONS:
        rows = answers[question.title]
        output.table(rows.schema.names, [list(row.values()) for row in rows.to_pylist()], title=question.title)
        output.say(f"   {question.explanation}")
    return {
        "tables": {one.table: one.rows for one in tables},
        "identity": {"precision": scores.precision, "recall": scores.recall, "f1": scores.f1},
        "answers": {title: rows.to_pylist() for title, rows in answers.items()},
    }


def _send_requests(output: Output, lake: Lake, home: Path, *, model: bool) -> LiveAnswers:
    output.say("\n7. Answers over HTTP")
    orders, product = scoring_requests(lake, sandbox.truth(home)["fraud"]), bestselling_product(lake)
    with output.progress() as show:
        show("serving", 0, 1)
        answers = send_requests(home, orders, product, model=model)
        show("serving", 1, 1)
    _print_answers(output, answers)
    return answers


def _print_answers(output: Output, answers: LiveAnswers) -> None:
    if answers.without_model:
        output.say(
            "   No model passed the gate, so no order is scored. Use more orders, which contain more fraud: --orders 20000."
        )
    for request, response in answers.scores:
        _print_score(output, request, response)
    stock = answers.stock
    output.say(f"\n   GET /v1/inventory/{stock['product_id']}")
    output.say(
        f"   -> as of {stock['as_of']}, {stock['staleness_ms']} ms stale, {len(stock['stores'])} stores, "
        f"the first {SHOWN_STORES}:"
    )
    for level in stock["stores"][:SHOWN_STORES]:
        low = ", low" if level["low_stock"] else ""
        output.say(
            f"      {level['store_id']}: {level['on_hand']:,} on hand, {level['reserved']:,} reserved, "
            f"{level['available_to_promise']:,} available to promise{low}"
        )


def _print_score(output: Output, request: ScoringRequest, response: Mapping[str, Any]) -> None:
    body = request.body
    output.say(f"\n   {request.title}: {request.description}")
    output.say(
        f"   POST /v1/fraud/score  order {body['order_id']}, {len(body['items'])} lines, "
        f"{body['total_amount']} {body['currency']}, user {body['user_id']}, device {body['device_id']}"
    )
    output.say(
        f"   -> score {response['score']:.4f} (threshold {response['threshold']:.4f}): {response['decision']}, "
        f"by {response['model']['name']} version {response['model']['version']}, {response['staleness_ms']} ms stale"
    )
    for reason in response["reasons"][:SHOWN_REASONS]:
        output.say(f"      {reason['contribution']:+.2f}  {reason['text']}")


def _say_next_steps(output: Output, home: Path, registry: Registry, orders: int, seed: int, keep: bool) -> None:
    """Print the commands with which to explore the demo's lakehouse."""
    if not keep:
        output.say("\nThe source servers are stopped; the lakehouse is kept. Explore it:")
    app = f"SHOPSPHERE_HOME={_relative(home)} .venv/bin/python -m app"
    output.say(f'   {app} sql "SELECT * FROM gold.customer_360 ORDER BY net_revenue DESC LIMIT 3"')
    output.say(f"   {app} status")
    output.say("Serve it (inventory follows the topics, so the source servers must be running):")
    if not keep:
        output.say(f"   {app} sandbox start --orders {orders} --seed {seed}")
    output.say(f"   {app} serve")
    output.say(f"   {'.venv/bin/' if registry.local else ''}{registry.command}")


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
