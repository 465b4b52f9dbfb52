"""The commands about a person's data: erase, export."""

from __future__ import annotations

import getpass
import sys
from datetime import UTC, datetime
from json import loads as decode_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.options import Json
from app.cli.output import Output
from app.project import PROJECT
from lakehouse.errors import ShopSphereError
from pipelines.settings import load_settings

if TYPE_CHECKING:
    from pipelines.privacy.person import SubjectQuery

OPTIONS = ("--email", "--phone", "--loyalty-id", "--user-id", "--master-user-id", "--from")
STANDARD_INPUT = "-"
"""As an identifier: read it from standard input, since other local users can see a command line."""
Email = Annotated[str | None, typer.Option(help="E-mail address of the person; - reads it from standard input")]
Phone = Annotated[str | None, typer.Option(help="Phone number of the person; - reads it from standard input")]
LoyaltyId = Annotated[str | None, typer.Option(help="Loyalty card number of the person; - reads it from standard input")]
UserId = Annotated[int | None, typer.Option(help="Account id of the person")]
FromFile = Annotated[
    Path | None,
    typer.Option("--from", help='JSON file that names the person: {"email": "..."}'),
]
MasterUserId = Annotated[str | None, typer.Option(help="Id of the person in gold.customer_360")]


def erase(
    email: Email = None,
    phone: Phone = None,
    loyalty_id: LoyaltyId = None,
    user_id: UserId = None,
    master_user_id: MasterUserId = None,
    from_file: FromFile = None,
    json: Json = False,
) -> None:
    """Erase a person from every table, snapshot and file, and verify it. Without a person: finish pending erasures."""
    from app.cli.erasure_receipt import receipt_lines
    from app.erasure import erasure_context
    from pipelines.privacy.erase import erase_person
    from pipelines.privacy.receipt import as_json
    from pipelines.runner import open_engine

    output, subject = Output(json), subject_query(email, phone, loyalty_id, user_id, master_user_id, from_file)
    with open_engine(load_settings()) as engine, output.progress() as show:
        receipts = erase_person(erasure_context(engine, show), subject)
    if json:
        output.json([as_json(receipt) for receipt in receipts])
    for receipt in receipts:
        for line in receipt_lines(receipt):
            output.say(line)
    if not receipts:
        output.say("No erasure was pending.")
    if not all(receipt.clean for receipt in receipts):
        raise ShopSphereError("The erasure is not verified: see the receipt above, then run `python -m app erase` again.")


def export(
    email: Email = None,
    phone: Phone = None,
    loyalty_id: LoyaltyId = None,
    user_id: UserId = None,
    master_user_id: MasterUserId = None,
    from_file: FromFile = None,
    directory: Annotated[Path | None, typer.Option("--output", help="New directory; by default ./export-<time>")] = None,
    json: Json = False,
) -> None:
    """Write all data about a person, from every layer and the whole history, as JSON and CSV."""
    from lakehouse.iceberg.catalog import Lake
    from pipelines.privacy.export import export_person

    output, subject = Output(json), subject_query(email, phone, loyalty_id, user_id, master_user_id, from_file)
    if subject is None:
        raise ShopSphereError(f"Name the person: {' or '.join(OPTIONS)}.")
    directory = directory or Path(f"export-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    exported = export_person(Lake(load_settings()), PROJECT.tables, subject, directory)
    if json:
        output.json({"directory": str(exported.directory), "rows": dict(exported.rows)})
        return
    output.table(("table", "rows"), list(exported.rows.items()))
    output.say(f"Written to {exported.directory}: person.json and one CSV file per table. This is personal data: protect it.")


def subject_query(
    email: str | None,
    phone: str | None,
    loyalty_id: str | None,
    user_id: int | None,
    master_user_id: str | None,
    from_file: Path | None = None,
) -> SubjectQuery | None:
    """Return the query for the one identifier given, or None without one. Raises ShopSphereError on several."""
    from pipelines.privacy.person import SubjectQuery

    given = {
        "email": _value_or_input(email),
        "phone": _value_or_input(phone),
        "loyalty_id": _value_or_input(loyalty_id),
        "user_id": user_id,
        "master_user_id": master_user_id,
    }
    named: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if len(named) + (from_file is not None) > 1:
        raise ShopSphereError(f"Name the person by one of {', '.join(OPTIONS)}.")
    if from_file is not None:
        named = _read_person(from_file)
    return SubjectQuery(**named) if named else None


def _value_or_input(value: str | None) -> str | None:
    """Return the value of an option; '-' is replaced by a line of standard input, which a terminal does not show."""
    if value != STANDARD_INPUT:
        return value
    line = getpass.getpass("Identifier: ") if sys.stdin.isatty() else sys.stdin.readline()
    if not line.strip():
        raise ShopSphereError("Standard input has no identifier. Write one line to it.")
    return line.strip()


def _read_person(file: Path) -> dict[str, Any]:
    """Return the identifier in a JSON file. Raises ShopSphereError, which quotes nothing of the file."""
    fields = {"email": str, "phone": str, "loyalty_id": str, "user_id": int, "master_user_id": str}
    try:
        person = decode_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ShopSphereError(f"{file} cannot be read as JSON ({type(error).__name__}).") from None
    valid = isinstance(person, dict) and len(person) == 1 and all(isinstance(v, fields.get(k, ())) for k, v in person.items())
    if not valid:
        raise ShopSphereError(f'{file} must be a JSON object with one of {", ".join(fields)}, such as {{"email": "..."}}.')
    return dict(person)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (erase, export):
        app.command()(command)
