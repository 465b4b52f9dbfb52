"""Erases one person from the lakehouse and proves it. See docs/concepts/erasure.md."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from lakehouse.byte_search import FileSearchResult, SearchTerms
from lakehouse.errors import ShopSphereError
from lakehouse.iceberg.catalog import Lake
from lakehouse.retry import retry_commit
from pipelines.privacy.bronze_rewrite import replace_delta_rows, rewrite_bronze
from pipelines.privacy.context import ErasureContext, StageProgress
from pipelines.privacy.erasure_plan import ErasurePlan, plan_erasure
from pipelines.privacy.history import forget_history, refresh_all
from pipelines.privacy.leftovers import search_tables_and_home
from pipelines.privacy.person import SubjectQuery, find_person
from pipelines.privacy.pseudonyms import Pseudonyms, erasure_key
from pipelines.privacy.receipt import (
    Baseline,
    Receipt,
    count_bronze_rows,
    count_rows_ingested_since,
    read_receipt,
    sales_totals,
    write_receipt,
)
from pipelines.privacy.search_list import (
    SearchList,
    discard_orphaned_lists,
    locked,
    read_search_list,
    search_list_file,
    stored_search_list,
)
from pipelines.privacy.served_scores import delete_scores, ingest_scores
from pipelines.privacy.suppression import (
    FINISHED,
    REQUESTED,
    Erasure,
    append_digests,
    erasures,
    load_suppression,
)
from pipelines.settings import settings_of

STAGES = 4


def erase_person(context: ErasureContext, query: SubjectQuery | None) -> list[Receipt]:
    """Finish the pending erasures, then erase the person that `query` names. Raises ShopSphereError."""
    receipts = finish_pending(context)
    if query is not None:
        receipts.append(finish(context, request(context, query)))
    return receipts


def finish_pending(context: ErasureContext) -> list[Receipt]:
    """Finish the erasures that an interrupted `erase` left pending; return their receipts."""
    discard_orphaned_lists(context.lake)
    return [finish(context, erasure) for erasure in erasures(context.lake) if not erasure.finished]


def request(context: ErasureContext, query: SubjectQuery) -> Erasure:
    """Find the person and commit the suppression of their values. From then on the erasure is pending until it is finished.

    Raises ShopSphereError when no customer or several match.
    """
    lake = context.lake
    context.on_progress("collect", 0, 1)
    ingest_scores(context.engine, context.project, context.scores_topic())
    stored = count_bronze_rows(lake)  # before the refresh: rows stored from here on may be in the sums or not
    refresh_all(context)
    person = find_person(lake, query)
    load_suppression(lake)  # raises when the key is missing or changed; only the first erasure creates one
    key = erasure_key(settings_of(lake), create=True)
    assert key is not None
    pseudonyms = Pseudonyms(key, settings_of(lake).default_region)
    erasure = Erasure(secrets.token_hex(8), datetime.now(UTC), False)
    plan = plan_erasure(lake, person, pseudonyms, erasure.id, int(erasure.requested_at.timestamp() * 1_000_000))
    if not person.records and not _has_mention(plan):
        raise ShopSphereError("No customer matches this identifier and no row mentions it. There is nothing to erase.")
    rows = [(REQUESTED, pseudonyms.check), *sorted(plan.entries)]
    search_list = SearchList(plan.texts, plan.shared, Baseline(sales_totals(lake), stored))
    with stored_search_list(lake, erasure, search_list):
        retry_commit(lambda: append_digests(lake, erasure.id, erasure.requested_at, rows, plan.until))
    return erasure


def _has_mention(plan: ErasurePlan) -> bool:
    return any(kind == "mention" for kind, _ in plan.entries)


def finish(context: ErasureContext, erasure: Erasure) -> Receipt:
    """Run the remaining stages of an erasure and return its receipt. Every stage can be repeated.

    One process of this machine does it at a time; another returns the receipt of the first.
    """
    lake = context.lake
    with locked(search_list_file(lake, erasure)):
        if any(other.id == erasure.id and other.finished for other in erasures(lake)):
            return read_receipt(lake, erasure.id)
        receipt = _run_stages(context, erasure, read_search_list(lake, erasure))
        write_receipt(lake, receipt)
        if receipt.clean or not receipt.proved:
            _mark_finished(context, erasure)
            search_list_file(lake, erasure).unlink(missing_ok=True)
        return receipt


@dataclass
class _StageTimer:
    """Measures the seconds of each stage and reports the progress."""

    on_progress: StageProgress
    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def complete(self, stage: str) -> None:
        """Record the time since the previous stage."""
        now = time.monotonic()
        self.seconds[stage], self._last = round(now - self._last, 3), now
        self.on_progress(stage, len(self.seconds), STAGES)


def _run_stages(context: ErasureContext, erasure: Erasure, search_list: SearchList | None) -> Receipt:
    lake, timer = context.lake, _StageTimer(context.on_progress)
    context.on_progress("rewrite", 0, STAGES)
    rewritten = rewrite_bronze(context.engine, erasure)
    replace_delta_rows(context.engine, context.project, erasure)
    timer.complete("rewrite")
    refresh_all(context)
    timer.complete("follow")
    forgotten = forget_history(context)
    timer.complete("forget")
    texts = search_list.texts if search_list is not None else ()
    searched, unreached = _search(context, erasure, texts)
    timer.complete("prove")
    baseline = search_list.baseline if search_list is not None else None
    return Receipt(
        erasure=erasure.id,
        requested_at=erasure.requested_at,
        finished_at=datetime.now(UTC),
        values=len(texts),
        shared=dict(search_list.shared) if search_list is not None else {},
        rewritten=rewritten,
        forgotten=forgotten,
        searched=searched,
        proved=search_list is not None,
        sums_before=baseline.sums if baseline is not None else None,
        sums_after=sales_totals(lake),
        arrived=_count_arrived(lake, erasure, baseline),
        seconds=round(time.monotonic() - timer.started, 3),
        stages=timer.seconds,
        unreached=unreached,
    )


def _search(context: ErasureContext, erasure: Erasure, texts: tuple[str, ...]) -> tuple[FileSearchResult, tuple[str, ...]]:
    """Search for the texts everywhere and empty the topic of scores; also return the reasons why something was not reached."""
    needles = SearchTerms(texts)
    searched = search_tables_and_home(context.lake, context.project, needles)
    models, models_unreached = context.search_models(context.lake, needles)
    scores_unreached = delete_scores(context.lake, context.scores_topic(), erasure)
    return searched + models, tuple(filter(None, (scores_unreached, models_unreached)))


def _count_arrived(lake: Lake, erasure: Erasure, baseline: Baseline | None) -> int:
    """Return how many bronze rows were stored since the request, at least."""
    since_count = count_bronze_rows(lake) - baseline.stored if baseline is not None else 0
    return max(count_rows_ingested_since(lake, erasure.requested_at), since_count)


def _mark_finished(context: ErasureContext, erasure: Erasure) -> None:
    lake = context.lake
    suppression = load_suppression(lake)
    assert suppression is not None
    rows = [(FINISHED, suppression.pseudonyms.check)]
    retry_commit(lambda: append_digests(lake, erasure.id, erasure.requested_at, rows))
