"""Which errors are outages, that pass, and which are mistakes, that do not."""

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
from lakehouse.errors import TransientError
from lakehouse.transient_errors import as_transient_error
from pipelines.runner import open_engine, run_once
from pipelines.settings import KafkaSettings, MongoSettings, PostgresSettings, Settings


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "said"),
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
def test_what_fails_below_us_is_an_outage_with_a_way_out(error, said):
    found = as_transient_error(error)
    assert isinstance(found, TransientError)
    assert said in str(found)
    assert "un again" in str(found)


@pytest.mark.parametrize("error", [ValueError("wrong"), FileNotFoundError("x.parquet"), KeyError("column"), ZeroDivisionError()])
def test_a_mistake_is_not_an_outage(error):
    assert as_transient_error(error) is None


def test_a_lost_ray_node_is_an_outage_and_a_mistake_in_a_task_is_not():
    from ray.exceptions import NodeDiedError, RayTaskError, WorkerCrashedError

    for lost in (WorkerCrashedError(), NodeDiedError("gone"), caused(RuntimeError("stage failed"), WorkerCrashedError())):
        assert isinstance(as_transient_error(lost), TransientError)
    mistake = RayTaskError("map", "Traceback", ValueError("wrong"))
    assert as_transient_error(mistake) is None
    assert isinstance(as_transient_error(RayTaskError("map", "Traceback", OSError("AWS Error SLOW_DOWN"))), TransientError)
    without_code = ModuleNotFoundError("No module named 'lakehouse.engine.engine'", name="lakehouse.engine.engine")
    assert "No module named 'lakehouse.engine.engine'" in str(as_transient_error(RayTaskError("map", "Traceback", without_code)))
    assert as_transient_error(without_code) is None, "here it is a mistake"


def test_a_pass_goes_on_after_an_outage_and_stops_at_a_mistake(tmp_path, monkeypatch):
    settings = Settings(
        home=tmp_path,
        postgres=PostgresSettings(enabled=False),
        mongo=MongoSettings(enabled=False),
        kafka=KafkaSettings(enabled=False),
    )
    with open_engine(settings) as engine:
        refresh = engine.refresh

        def struck(step, **how):
            if step.target.name == "gold.dim_date":
                raise OSError("AWS Error NETWORK_CONNECTION during PutObject")
            return refresh(step, **how)

        monkeypatch.setattr(engine, "refresh", struck)
        done = run_once(engine, PROJECT, lambda name, report: None)
        assert [type(error) for error in done.errors] == [TransientError]
        assert {report.table for report in done.results} >= {step.target.name for step in pipelines.STEPS} - {"gold.dim_date"}
        monkeypatch.setattr(pipelines.runner, "as_transient_error", lambda error: None)
        with pytest.raises(OSError, match="PutObject"):
            run_once(engine, PROJECT, lambda name, report: None)


def test_run_every_may_start_during_an_outage(tmp_path, monkeypatch, capsys):
    def away(context):
        raise OSError("AWS Error NETWORK_CONNECTION during HeadObject operation")

    monkeypatch.setattr("pipelines.privacy.erase.finish_pending", away)
    with open_engine(Settings(home=tmp_path)) as engine:
        assert not finish_erasures(engine, Output(False), keep_going=True)
        assert "cannot be used: AWS Error NETWORK_CONNECTION" in capsys.readouterr().err
        with pytest.raises(OSError, match="HeadObject"):
            finish_erasures(engine, Output(False))
