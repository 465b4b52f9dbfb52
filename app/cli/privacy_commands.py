"""The commands about a person's data: erase, export."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.options import Json
from app.cli.output import Output
from app.project import PROJECT
from lakehouse.errors import ShopSphereError
from pipelines.settings import load_settings

if TYPE_CHECKING:
    from pipelines.privacy.person import SubjectQuery

Email = Annotated[str | None, typer.Option(help="E-mail address of the person")]
Phone = Annotated[str | None, typer.Option(help="Phone number of the person")]
LoyaltyId = Annotated[str | None, typer.Option(help="Loyalty card number of the person")]
UserId = Annotated[int | None, typer.Option(help="Account id of the person")]
MasterUserId = Annotated[str | None, typer.Option(help="Id of the person in gold.customer_360")]


def erase(
    email: Email = None,
    phone: Phone = None,
    loyalty_id: LoyaltyId = None,
    user_id: UserId = None,
    master_user_id: MasterUserId = None,
    json: Json = False,
) -> None:
    """Erase a person from every table, snapshot and file, and verify it. Without a person: finish pending erasures."""
    from app.cli.erasure_receipt import receipt_lines
    from app.erasure import erasure_context
    from pipelines.privacy.erase import erase_person
    from pipelines.privacy.receipt import as_json
    from pipelines.runner import open_engine

    output, subject = Output(json), subject_query(email, phone, loyalty_id, user_id, master_user_id)
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
    directory: Annotated[Path | None, typer.Option("--output", help="New directory; by default ./export-<time>")] = None,
    json: Json = False,
) -> None:
    """Write all data about a person, from every layer and the whole history, as JSON and CSV."""
    from lakehouse.iceberg.catalog import Lake
    from pipelines.privacy.export import export_person

    output, subject = Output(json), subject_query(email, phone, loyalty_id, user_id, master_user_id)
    if subject is None:
        raise ShopSphereError("Name the person: --email, --phone, --loyalty-id, --user-id or --master-user-id.")
    directory = directory or Path(f"export-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    exported = export_person(Lake(load_settings()), PROJECT.tables, subject, directory)
    if json:
        output.json({"directory": str(exported.directory), "rows": dict(exported.rows)})
        return
    output.table(("table", "rows"), list(exported.rows.items()))
    output.say(f"Written to {exported.directory}: person.json and one CSV file per table. This is personal data: protect it.")


def subject_query(
    email: str | None, phone: str | None, loyalty_id: str | None, user_id: int | None, master_user_id: str | None
) -> SubjectQuery | None:
    """Return the query for the one identifier given, or None without one. Raises ShopSphereError on several."""
    from pipelines.privacy.person import SubjectQuery

    given = [value for value in (email, phone, loyalty_id, user_id, master_user_id) if value is not None]
    if len(given) > 1:
        raise ShopSphereError("Name the person by one of --email, --phone, --loyalty-id, --user-id, --master-user-id.")
    return SubjectQuery(email, phone, loyalty_id, user_id, master_user_id) if given else None


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (erase, export):
        app.command()(command)
