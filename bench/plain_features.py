"""The features of ml/features/groups as a plain polars script would compute them: everything in memory, one process.

The reference of bench/training_set.py, for the cost and for the values. Simultaneous orders are not ordered here, so the data
must not have any.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import polars as pl

PERIODS = {"10m": "10m", "1h": "1h", "24h": "24h", "3d": "3d", "7d": "7d", "14d": "14d", "30d": "30d", "1d": "1d", "28d": "28d"}
USUAL = ("10m", "1h", "24h", "7d", "30d")
RISK = ("1d", "7d", "14d", "28d")
PLURAL = {"customer": "customers", "card": "cards", "device": "devices", "address": "addresses"}
DELAY = "45d"
CATEGORIES = {
    "channel": ("web", "pos", "marketplace", "other", "missing"),
    "payment_method": ("card", "wallet", "bank_transfer", "cash", "other", "missing"),
}
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def counted_until(rows: pl.DataFrame, counts: pl.DataFrame, kind: str, at: str, offset: str, name: str) -> pl.Series:
    """Return per row the running count `name` of the entity just before (placed_at - offset); 0 if there is none."""
    requested = rows.select("n", kind, pl.col("placed_at").dt.offset_by(f"-{offset}").alias("moment"))
    found = (
        requested.filter(pl.col(kind).is_not_null())
        .sort("moment")
        .join_asof(
            counts.select(kind, pl.col(at).alias("moment"), name).sort("moment"),
            on="moment",
            by=kind,
            strategy="backward",
            allow_exact_matches=False,
            check_sortedness=False,
        )
    )
    filled = rows.select("n", kind).join(found.select("n", name), on="n", how="left", maintain_order="left")
    return filled.select(pl.when(pl.col(kind).is_not_null()).then(pl.col(name).fill_null(0))).to_series()


def minutes(later: pl.Expr, earlier: pl.Expr) -> pl.Expr:
    return (later - earlier).dt.total_microseconds() / 60e6


def velocities(rows: pl.DataFrame, kind: str, windows: tuple[str, ...]) -> pl.DataFrame:
    """Return the orders and amounts in the windows before."""
    there = pl.col(kind).is_not_null()
    expressions = []
    for window in windows:
        sums = [
            pl.col(c).rolling_sum_by("placed_at", PERIODS[window], closed="left").over(kind).fill_null(0)
            for c in ("one", "cents")
        ]
        expressions += [
            pl.when(there).then(sums[0]).alias(f"{kind}_orders_{window}"),
            pl.when(there).then(sums[1] / 100).alias(f"{kind}_amount_{window}"),
        ]
    return rows.select(expressions)


def entity(
    rows: pl.DataFrame, kind: str, windows: tuple[str, ...], others: tuple[str, ...], frauds: tuple[str, ...]
) -> pl.DataFrame:
    """Return velocities, age, distinct others and reported frauds of an entity kind."""
    there, now = pl.col(kind).is_not_null(), pl.col("placed_at")
    columns = [velocities(rows, kind, windows)] if windows else []
    expressions = [
        (pl.col("one").cum_sum() - 1).over(kind).alias(f"{kind}_orders_ever"),
        minutes(now, pl.when(pl.col("one").cum_sum() > 1).then(now.first())).over(kind).alias(f"{kind}_minutes_since_first"),
        minutes(now, now.shift(1)).over(kind).alias(f"{kind}_minutes_since_last"),
    ]
    for other in others:
        first = (pl.struct(kind, other).is_first_distinct() & pl.col(other).is_not_null()).cast(pl.Int64)
        expressions.append((first.cum_sum() - first).over(kind).alias(f"{kind}_{PLURAL[other]}_ever"))
    columns.append(rows.select(pl.when(there).then(e) for e in expressions))
    known = (
        rows.filter(pl.col("known_at").is_not_null() & there)
        .sort("known_at")
        .select(kind, "known_at", pl.col("placed_at").alias("fraud_at"), pl.col("one").cum_sum().over(kind).alias("frauds"))
    )
    ever = counted_until(rows, known, kind, "known_at", "0d", "frauds")
    last = (
        rows.select("n", kind, moment="placed_at")
        .filter(there)
        .sort("moment")
        .join_asof(
            known.select(kind, "known_at", "fraud_at"),
            left_on="moment",
            right_on="known_at",
            by=kind,
            strategy="backward",
            allow_exact_matches=False,
            check_sortedness=False,
        )
    )
    since = rows.select("n", "placed_at").join(last.select("n", "fraud_at"), on="n", how="left", maintain_order="left")
    within = {w: ever - counted_until(rows, known, kind, "known_at", w, "frauds") for w in frauds}
    columns.append(
        pl.DataFrame({f"{kind}_frauds_ever": ever, **{f"{kind}_frauds_{w}": s for w, s in within.items()}}).with_columns(
            since.select(minutes(now, pl.col("fraud_at")).alias(f"{kind}_minutes_since_fraud")).to_series()
        )
    )
    return pl.concat(columns, how="horizontal")


def mature_labels(
    rows: pl.DataFrame, kind: str, frauds: pl.DataFrame, windows: tuple[str, ...], labels: tuple[int, ...]
) -> pl.DataFrame:
    """Return the features of mature labels."""
    counts = rows.filter(pl.col(kind).is_not_null()).select(
        kind,
        "placed_at",
        "cents",
        pl.col("one").cum_sum().over(kind).alias("orders"),
        (pl.col("known_at") - pl.col("placed_at") <= timedelta(days=45)).fill_null(False).alias("fraud"),
    )
    due = counted_until(rows, counts, kind, "placed_at", DELAY, "orders")
    columns = {}
    for window in windows:
        days = int(window[:-1]) + 45
        columns[f"{kind}_settled_{window}"] = orders = due - counted_until(rows, counts, kind, "placed_at", f"{days}d", "orders")
        risk = frauds[f"{kind}_frauds_{window}"] / pl.select(pl.when(orders > 0).then(orders)).to_series()
        columns[f"{kind}_risk_{window}"] = risk
    if not labels:
        return pl.DataFrame(columns)
    run = (pl.col("fraud") != pl.col("fraud").shift(1)).fill_null(True).cum_sum().over(kind)
    history = counts.with_columns(
        pl.col("fraud").cast(pl.Int64).cum_sum().over(kind).alias("so_far"), run.alias("run")
    ).with_columns(
        pl.when("fraud").then(pl.col("orders") - pl.col("orders").first().over(kind, "run") + 1).otherwise(0).alias("length"),
        pl.when("fraud").then(pl.col("placed_at").first().over(kind, "run")).alias("began"),
        pl.when("fraud").then(pl.col("cents").cum_min().over(kind, "run")).alias("least"),
        pl.when(~pl.col("fraud")).then("placed_at").forward_fill().over(kind).alias("genuine"),
    )
    requested = rows.select("n", kind, "placed_at").with_columns(due.alias("due"))

    def lookup(at: pl.Expr) -> pl.DataFrame:
        wanted = requested.with_columns(at.alias("orders"))
        return wanted.join(history.drop("placed_at"), on=[kind, "orders"], how="left", maintain_order="left")

    newest = lookup(pl.col("due"))
    there = pl.col(kind).is_not_null()
    for last in labels:
        earlier = lookup(pl.col("due") - last)["so_far"].fill_null(0)
        columns[f"{kind}_frauds_of_last_{last}"] = (
            newest.select(pl.when(there).then(pl.col("so_far").fill_null(0))).to_series() - earlier
        )
    tail = newest.select(
        pl.when(there).then(pl.col("length").fill_null(0)).alias(f"{kind}_run_frauds"),
        minutes(pl.col("placed_at"), pl.col("began")).alias(f"{kind}_run_minutes"),
        (pl.col("least") / 100).alias(f"{kind}_run_least"),
        minutes(pl.col("placed_at"), pl.col("genuine")).alias(f"{kind}_minutes_since_genuine"),
    )
    return pl.concat([pl.DataFrame(columns), tail], how="horizontal")


def own_history(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the amounts relative to the customer's own history."""
    who, cents, priced = "customer", pl.col("cents"), pl.col("priced")
    there = pl.col(who).is_not_null()
    n = (priced.cum_sum() - priced).over(who)
    s = (cents.cum_sum() - cents).over(who)
    q = ((cents * cents).cum_sum() - cents * cents).over(who)
    moments = rows.select(n=pl.when(there & (n > 0)).then(n), s=s, q=q, amount="amount", customer=who, placed_at="placed_at")
    mean = pl.col("s") / pl.col("n")
    spread = (pl.col("q") * pl.col("n") - pl.col("s") * pl.col("s")).clip(0) / pl.when(pl.col("n") > 1).then(
        pl.col("n") * (pl.col("n") - 1)
    )
    base = moments.with_columns(mean=mean, deviation=spread.sqrt()).with_columns(
        ratio=pl.when(pl.col("mean") > 0).then(pl.col("amount") / pl.col("mean")),
        z=pl.when(pl.col("deviation") > 0).then((pl.col("amount") - pl.col("mean")) / pl.col("deviation")),
    )
    columns = [
        base.select(
            customer_mean=pl.col("mean") / 100,
            customer_deviation=pl.col("deviation") / 100,
            customer_ratio="ratio",
            customer_z="z",
        )
    ]
    for window in ("7d", "30d"):
        recent = [pl.col(c).rolling_sum_by("placed_at", window, closed="left").over(who) for c in ("cents", "priced")]
        usual = rows.select(pl.when(there & (recent[1] > 0)).then(recent[0] / recent[1]).alias("usual"), "amount")
        columns.append(
            usual.select(pl.when(pl.col("usual") > 0).then(pl.col("amount") / pl.col("usual")).alias(f"customer_ratio_{window}"))
        )
    columns.append(
        base.select(
            pl.when(there)
            .then(pl.col("ratio").rolling_max_by("placed_at", w, closed="left").over(who))
            .alias(f"customer_greatest_ratio_{w}")
            for w in ("24h", "3d", "7d", "14d", "30d")
        )
    )
    columns.append(
        rows.select(
            pl.when(there & pl.col(o).is_not_null()).then(pl.struct(who, o).is_first_distinct().cast(pl.Int64)).alias(f"new_{o}")
            for o in ("card", "device", "address")
        )
    )
    return pl.concat(columns, how="horizontal")


def outliers(rows: pl.DataFrame, ratio: pl.Series) -> pl.DataFrame:
    """Return the amounts relative to the customer's mean without outliers."""
    who = "customer"
    there, amount = pl.col(who).is_not_null(), pl.col("amount")
    usual = pl.when((pl.col("ratio") < 2.5).fill_null(True)).then(pl.col("priced")).otherwise(0)
    marked = rows.with_columns(ratio=ratio).with_columns(usual=usual, spent=pl.col("cents") * usual)
    n = (pl.col("usual").cum_sum() - pl.col("usual")).over(who)
    s = (pl.col("spent").cum_sum() - pl.col("spent")).over(who)
    marked = marked.with_columns(mean=pl.when(there & (n > 0)).then(s / n))
    marked = marked.with_columns(against=pl.when(pl.col("mean") > 0).then(amount / pl.col("mean")))
    marked = marked.with_columns(unusual=(pl.col("against") >= 2.5).fill_null(False).cast(pl.Int64))
    marked = marked.with_columns(begun=pl.when(pl.col("unusual") == 1).then("placed_at"))
    last = pl.when(pl.col("unusual") == 1).then("placed_at").forward_fill().shift(1).over(who)
    return marked.select(
        (pl.col("mean") / 100).alias("customer_usual_mean"),
        pl.col("against").alias("customer_usual_ratio"),
        *(
            pl.when(there)
            .then(pl.col("unusual").rolling_sum_by("placed_at", w, closed="left").over(who).fill_null(0))
            .alias(f"customer_unusual_{w}")
            for w in ("3d", "7d", "14d")
        ),
        pl.when(there).then(minutes(pl.col("placed_at"), last)).alias("customer_minutes_since_unusual"),
        pl.when(there)
        .then(minutes(pl.col("placed_at"), pl.col("begun").rolling_min_by("placed_at", "14d", closed="left").over(who)))
        .alias("customer_minutes_since_unusual_began"),
    )


def unexplained(rows: pl.DataFrame, ratio: pl.Series, kind: str, windows: tuple[str, ...]) -> pl.DataFrame:
    """Return the features of frauds whose amount was not unusual for the customer."""
    frauds = rows.with_columns(
        known_at=pl.when((ratio.is_null() | (ratio < 2.5)) & pl.col("known_at").is_not_null()).then("known_at")
    )
    known = frauds.filter(pl.col("known_at").is_not_null()).select(kind, "known_at", begun="placed_at")
    first = (
        rows.select("n", kind, "placed_at")
        .join(known, on=kind)
        .filter((pl.col("known_at") < pl.col("placed_at")) & (pl.col("begun") >= pl.col("placed_at") - timedelta(days=45 + 28)))
        .group_by("n")
        .agg(pl.col("begun").min())
    )
    begun = rows.select("n", "placed_at").join(first, on="n", how="left", maintain_order="left")
    found = entity(frauds, kind, (), (), windows).with_columns(
        begun.select(minutes(pl.col("placed_at"), pl.col("begun")).alias("since_first")).to_series()
    )
    return found.select(
        *(pl.col(f"{kind}_frauds_{w}").alias(f"{kind}_unexplained_{w}") for w in windows),
        pl.col(f"{kind}_minutes_since_fraud").alias(f"{kind}_minutes_since_unexplained"),
        pl.col("since_first").alias(f"{kind}_minutes_since_unexplained_began"),
    )


def of_events(
    rows: pl.DataFrame, events: pl.DataFrame, key: str, nouns: dict[str, tuple[str | None, tuple[str, ...]]]
) -> pl.DataFrame:
    """Return the counts of account events in the windows before."""
    columns = {}
    mine = events.filter(pl.col(key).is_not_null()).sort("occurred_at")
    for noun, (kind, windows) in nouns.items():
        chosen = mine if kind is None else mine.filter(pl.col("kind") == kind)
        counts = chosen.select(key, "occurred_at", pl.int_range(1, pl.len() + 1).over(key).alias("events"))
        before = counted_until(rows, counts, key, "occurred_at", "0d", "events") if windows else None
        for window in windows:
            assert before is not None
            columns[f"{key}_{noun}_{window}"] = before - counted_until(rows, counts, key, "occurred_at", window, "events")
        last = {"failed_logins": "failed_login", "changes": "change"}.get(noun)
        if last and key == "account":
            found = (
                rows.select("n", key, "placed_at")
                .filter(pl.col(key).is_not_null())
                .join_asof(
                    chosen.select(key, "occurred_at"),
                    left_on="placed_at",
                    right_on="occurred_at",
                    by=key,
                    strategy="backward",
                    allow_exact_matches=False,
                    check_sortedness=False,
                )
            )
            since = rows.select("n").join(found, on="n", how="left", maintain_order="left")
            columns[f"account_minutes_since_{last}"] = since.select(
                minutes(pl.col("placed_at"), pl.col("occurred_at"))
            ).to_series()
    return pl.DataFrame(columns)


def own(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the features of the order itself."""
    now = pl.col("placed_at")
    month = now.dt.month_start().dt.date()
    usual = (
        rows.filter(pl.col("category").is_not_null() & (pl.col("priced") > 0))
        .group_by("category", month=month)
        .agg((pl.col("cents").sum() / pl.len()).alias("usual"))
    )
    measured = rows.with_columns(month=month.dt.offset_by("-1mo")).join(
        usual, on=["category", "month"], how="left", maintain_order="left"
    )
    return measured.select(
        (pl.col("amount") / 100).alias("amount"),
        *(
            pl.when(pl.col(c).is_null())
            .then(pl.lit("missing"))
            .when(pl.col(c).is_in(list(names)))
            .then(c)
            .otherwise(pl.lit("other"))
            .alias(c)
            for c, names in CATEGORIES.items()
        ),
        now.dt.hour().cast(pl.Float64).alias("hour"),
        now.dt.weekday().cast(pl.Int32).replace_strict(dict(enumerate(WEEKDAYS, 1)), return_dtype=pl.String).alias("weekday"),
        pl.when(pl.col("account_created_at") <= now).then(minutes(now, pl.col("account_created_at"))).alias("account_minutes"),
        pl.when(pl.col("usual") > 0).then(pl.col("amount") / pl.col("usual")).alias("category_ratio"),
    )


def features(orders: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Return order_id and all features."""
    rows = (
        orders.sort("placed_at", "order_id")
        .with_row_index("n")
        .with_columns(
            one=pl.lit(1, pl.Int64), cents=pl.col("amount").fill_null(0), priced=pl.col("amount").is_not_null().cast(pl.Int64)
        )
    )
    history = own_history(rows)
    device = entity(rows, "device", USUAL, ("customer", "card"), RISK)
    address = entity(rows, "address", USUAL, ("customer", "card"), ("28d",))
    n = (pl.col("priced").cum_sum() - pl.col("priced")).over("device")
    s = (pl.col("cents").cum_sum() - pl.col("cents")).over("device")
    mean = rows.select(pl.when(pl.col("device").is_not_null() & (n > 0)).then(s / n / 100).alias("device_mean"))
    failed = {"failed_logins": ("login_failed", ("1h", "24h")), "failed_payments": ("payment_failed", ("1h", "24h"))}
    return pl.concat(
        [
            rows.select("order_id"),
            own(rows),
            entity(rows, "customer", tuple(PERIODS)[:7], ("card", "device", "address"), ("7d", "28d")),
            history,
            outliers(rows, history["customer_ratio"]),
            entity(rows, "card", USUAL, ("customer", "device"), ("28d",)),
            device,
            mean,
            unexplained(rows, history["customer_ratio"], "device", ("7d", "14d", "28d")),
            mature_labels(rows, "device", device, RISK, (1, 2, 3, 5, 10)),
            address,
            mature_labels(rows, "address", address, ("28d",), ()),
            entity(rows, "ip", USUAL, ("customer", "card"), ("28d",)),
            entity(rows, "person", ("24h", "30d"), ("customer",), ("28d",)),
            of_events(
                rows, events, "account", {"events": (None, ("10m", "1h", "24h")), **failed, "changes": ("account_changed", ())}
            ),
            of_events(rows, events, "device", failed),
        ],
        how="horizontal",
    )


def main() -> None:
    """plain_features.py ORDERS EVENTS OUTPUT: prints the CPU seconds."""
    orders, events, output = (Path(argument) for argument in sys.argv[1:4])
    started = time.process_time()
    features(pl.read_parquet(orders), pl.read_parquet(events)).write_parquet(output, compression="zstd")
    print(time.process_time() - started)


if __name__ == "__main__":
    main()
