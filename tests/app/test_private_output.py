"""What commands print and write gives nothing away and runs nothing: identifiers, passwords, control characters, formulas."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from urllib.parse import urlsplit

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cli import privacy_commands
from app.cli.main import main
from app.cli.output import Output, printable
from app.cli.privacy_commands import subject_query
from lakehouse.errors import ShopSphereError
from ml.registry.connection import Connection
from pipelines.privacy.export import _to_csv
from pipelines.privacy.person import SubjectQuery

NOBODY = (None, None, None, None, None)


def test_an_identifier_is_read_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("kim@example.org\n"))
    assert subject_query("-", *NOBODY[1:]) == SubjectQuery("kim@example.org", None, None, None, None)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(ShopSphereError, match="has no identifier"):
        subject_query(None, "-", *NOBODY[2:])


def test_an_identifier_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "person.json"
    file.write_text('{"user_id": 17}')
    assert subject_query(*NOBODY, file) == SubjectQuery(None, None, None, 17, None)
    with pytest.raises(ShopSphereError, match=r"one of --email, .*--from"):
        subject_query("kim@example.org", *NOBODY[1:], file)


@pytest.mark.parametrize(
    "content", ["kim@example.org", "[]", "{}", '{"email": 1}', '{"email": "a", "phone": "b"}', '{"name": "a"}']
)
def test_a_file_that_names_no_person_is_refused_without_quoting_it(tmp_path: Path, content: str) -> None:
    file = tmp_path / "person.json"
    file.write_text(content)
    with pytest.raises(ShopSphereError) as raised:
        subject_query(*NOBODY, file)
    assert "kim@" not in str(raised.value)


def test_a_person_that_is_not_named_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export"]) == 1
    assert " or ".join(privacy_commands.OPTIONS) in capsys.readouterr().err


@given(st.text())
def test_text_from_data_has_no_control_characters_on_the_terminal(value: str) -> None:
    shown = printable(value)
    assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in shown)
    assert printable(shown) == shown


def test_a_table_of_terminal_sequences_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(("name",), [("\x1b]0;owned\x07",), ("Müller 💶",)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b]0;owned\x07" in out
    assert "Müller 💶" in out


@given(st.lists(st.text(st.sampled_from("=+-@\t\r\n,;'\"a1. ")), min_size=1))
def test_no_cell_of_an_exported_csv_is_a_formula(values: list[str]) -> None:
    rows = list(csv.reader(io.StringIO(_to_csv(pl.DataFrame({"value": pl.Series(values, dtype=pl.String)})), newline="")))
    assert rows[0] == ["value"]
    for (cell,), value in zip(rows[1:], values, strict=True):
        assert cell in (value, f"'{value}")
        numeric = cell.replace(".", "", 1).removeprefix("-").isdigit()
        assert numeric or not cell.startswith(("=", "+", "-", "@", "\t", "\r"))


def test_numbers_of_an_exported_csv_stay_numbers() -> None:
    assert _to_csv(pl.DataFrame({"a": ["-3.50"], "b": [-2]})).splitlines()[1] == "-3.50,-2"


@pytest.mark.parametrize("uri", ["postgresql://ops:hunter2@db/mlflow", "https://ops:hunter2@mlflow.example.org"])
def test_the_command_that_shows_the_runs_has_no_password(tmp_path: Path, uri: str) -> None:
    command = Connection(uri, tmp_path).command
    assert "hunter2" not in command
    assert command.startswith(("mlflow ui --backend-store-uri $MLFLOW_TRACKING_URI", "open https://ops@mlflow.example.org"))


def test_the_sandbox_does_not_print_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHOPSPHERE_HOME", str(tmp_path / "home"))
    try:
        assert main(["sandbox", "start", "--empty", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert urlsplit(shown["postgres_dsn"]).password == "***"
        password = json.loads((tmp_path / "home" / "sandbox" / "servers.json").read_text())["password"]
        assert password in (tmp_path / "home" / "shopsphere.toml").read_text()
        assert password not in json.dumps(shown)
    finally:
        main(["sandbox", "stop"])
