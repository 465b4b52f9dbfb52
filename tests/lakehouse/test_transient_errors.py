"""Infrastructure failures are recognised as transient errors; bugs are not."""

from __future__ import annotations

import errno
import sqlite3

import pytest
from requests.exceptions import ConnectionError as NoConnection
from sqlalchemy.exc import OperationalError

import pipelines
import pipelines.runner
from app.cli.output import Output
from app.cli.unfinished_erasures import finish_erasures
from app.project import PROJECT
from lakehouse.errors import SettingsError, TransientError, UnforeseenError
from lakehouse.parallel import TaskPool
from lakehouse.settings import RaySettings
from lakehouse.transient_errors import as_transient_error
from pipelines.runner import open_engine, run_once
from pipelines.settings import KafkaSettings, MongoSettings, PostgresSettings, Settings


def caused(error: Exception, by: Exception) -> Exception:
    """Return the error with its cause set."""
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
        (caused(RuntimeError("task failed"), OSError(errno.EDQUOT, "Disk quota exceeded")), "The disk is full"),
        (OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full")), "The disk is full"),
        (OperationalError("SELECT", {}, sqlite3.OperationalError("disk I/O error")), "cannot be used"),
        (OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7"), "curlCode: 7"),
        (caused(ValueError("no metadata"), NoConnection("catalog refused")), "catalog refused"),
        (ConnectionResetError("reset by peer"), "reset by peer"),
    ],
)
def test_infrastructure_failures_are_transient_and_say_how_to_continue(error, message):
    found = as_transient_error(error)
    assert isinstance(found, TransientError)
    assert message in str(found)
    assert "un again" in str(found)


@pytest.mark.parametrize("error", [ValueError("wrong"), FileNotFoundError("x.parquet"), KeyError("column"), ZeroDivisionError()])
def test_a_bug_is_not_transient(error):
    assert as_transient_error(error) is None


def test_a_lost_ray_node_is_transient_and_a_bug_in_a_task_is_not():
    from ray.exceptions import NodeDiedError, RayTaskError, WorkerCrashedError

    for lost in (WorkerCrashedError(), NodeDiedError("gone"), caused(RuntimeError("stage failed"), WorkerCrashedError())):
        assert isinstance(as_transient_error(lost), TransientError)
    bug = RayTaskError("map", "Traceback", ValueError("wrong"))
    assert as_transient_error(bug) is None
    assert isinstance(as_transient_error(RayTaskError("map", "Traceback", OSError("AWS Error SLOW_DOWN"))), TransientError)
    without_code = ModuleNotFoundError("No module named 'lakehouse.engine.engine'", name="lakehouse.engine.engine")
    assert "No module named 'lakehouse.engine.engine'" in str(as_transient_error(RayTaskError("map", "Traceback", without_code)))
    assert as_transient_error(without_code) is None, "without Ray it is a bug"


def test_a_run_continues_after_a_transient_error_and_after_a_bug(tmp_path, monkeypatch):
    settings = Settings(
        home=tmp_path,
        postgres=PostgresSettings(enabled=False),
        mongo=MongoSettings(enabled=False),
        kafka=KafkaSettings(enabled=False),
    )
    with open_engine(settings) as engine:
        refresh = engine.refresh

        def failing(step, **how):
            if step.target.name == "gold.dim_date":
                raise OSError("AWS Error NETWORK_CONNECTION during PutObject")
            return refresh(step, **how)

        monkeypatch.setattr(engine, "refresh", failing)
        done = run_once(engine, PROJECT, lambda name, report: None)
        assert [type(error) for error in done.errors] == [TransientError]
        assert {report.table for report in done.results} >= {step.target.name for step in pipelines.STEPS} - {"gold.dim_date"}
        monkeypatch.setattr(pipelines.runner, "as_transient_error", lambda error: None)
        done = run_once(engine, PROJECT, lambda name, report: None)
        assert [type(error) for error in done.errors] == [UnforeseenError]
        assert str(done.errors[0]).startswith("gold.dim_date: unforeseen OSError at ")
        assert "PutObject" not in str(done.errors[0])


def test_a_recurring_run_may_start_during_an_outage(tmp_path, monkeypatch, capsys):
    def unreachable(context):
        raise OSError("AWS Error NETWORK_CONNECTION during HeadObject operation")

    monkeypatch.setattr("pipelines.privacy.erase.finish_pending", unreachable)
    with open_engine(Settings(home=tmp_path)) as engine:
        assert not finish_erasures(engine, Output(False), keep_going=True)
        assert "cannot be used: AWS Error NETWORK_CONNECTION" in capsys.readouterr().err
        with pytest.raises(OSError, match="HeadObject"):
            finish_erasures(engine, Output(False))


def test_a_cluster_without_tokens_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    pool = TaskPool(RaySettings(address="192.0.2.1:6379"))
    with pytest.raises(SettingsError, match=r"192\.0\.2\.1:6379 does not authenticate: .*RAY_AUTH_MODE=token"):
        pool.start()
