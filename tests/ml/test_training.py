"""Training: equal data have equal bytes, whatever the interruptions."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
from support.fraud_world import FEATURES, orders, split

from lakehouse.errors import SettingsError
from lakehouse.parallel import TaskPool
from lakehouse.settings import RaySettings
from lakehouse.storage import Storage
from ml.evaluation.metrics import average_precision, calibration_error
from ml.training.boosting import TrainingProgress, boost, fit_in_process, last
from ml.training.fit import discard, fit
from ml.training.model import encode
from ml.training.search import SearchSettings, parameters_of, search, time_folds
from ml.training.settings import TrainingError, TrainingSettings
from ml.training.training_data import encode_data

QUICK = TrainingSettings(rounds=60, patience=0, report_every=20)


@pytest.fixture(scope="module")
def parts() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    return split(orders(4000))


def test_bytes_do_not_depend_on_the_order_of_rows(parts: tuple[pl.DataFrame, ...]) -> None:
    train, validation, test = parts
    model = fit_in_process(train, validation, FEATURES, QUICK)
    again = fit_in_process(train.sample(fraction=1, shuffle=True, seed=5), validation.reverse(), FEATURES, QUICK)
    assert again.booster == model.booster
    assert fit_in_process(train, validation, FEATURES, replace(QUICK, seed=8)).booster != model.booster
    assert average_precision(test["label"].to_numpy(), model.score(test)) > 0.3


@pytest.mark.parametrize("stopped_after", [0, 1])
def test_a_resumed_training_has_the_same_bytes(parts: tuple[pl.DataFrame, ...], stopped_after: int, tmp_path: Path) -> None:
    train, validation, _ = parts
    data = encode_data(train, validation, FEATURES)
    steps = list(boost(data, QUICK.xgboost(), 60, 0, TrainingProgress.none(), 20))
    assert [step.rounds for step in steps] == [20, 40, 60]
    steps[stopped_after].write(tmp_path)
    assert last(boost(data, QUICK.xgboost(), 60, 0, TrainingProgress.read(tmp_path), 20)) == steps[-1]


def test_a_completed_training_is_not_continued(parts: tuple[pl.DataFrame, ...]) -> None:
    data = encode_data(parts[0], parts[1], FEATURES)
    done = last(boost(data, QUICK.xgboost(), 20, 0, TrainingProgress.none(), 20))
    assert list(boost(data, QUICK.xgboost(), 60, 0, done, 20)) == [done]


def test_training_stops_early_and_keeps_the_best_rounds(parts: tuple[pl.DataFrame, ...]) -> None:
    train, validation, _ = parts
    model = fit_in_process(train, validation, FEATURES, replace(QUICK, rounds=300, patience=15).with_parameters(eta=0.3))
    assert model.rounds == model.best_iteration + 1 + 15
    label, score = validation["label"].to_numpy(), model.score(validation)
    assert average_precision(label, score) == pytest.approx(model.validation_score, abs=1e-6)
    assert calibration_error(label, score) < 0.03


def test_without_validation_orders_all_rounds_are_used(parts: tuple[pl.DataFrame, ...]) -> None:
    model = fit_in_process(parts[0], None, FEATURES, replace(QUICK, rounds=15))
    assert (model.rounds, model.best_iteration, model.validation_score) == (15, 14, None)


def test_a_single_order_scores_as_in_a_batch(parts: tuple[pl.DataFrame, ...]) -> None:
    train, validation, test = parts
    model = pickle.loads(pickle.dumps(fit_in_process(train, validation, FEATURES, QUICK)))
    together = model.score(test)
    alone = [model.score(test[place : place + 1])[0] for place in range(50)]
    assert alone == together[:50].tolist()
    assert model.score(test[:0]).tolist() == []


def test_contributions_add_up_to_the_score(parts: tuple[pl.DataFrame, ...]) -> None:
    train, validation, test = parts
    model = fit_in_process(train, validation, FEATURES, QUICK)
    effects = model.contributions(test)
    assert effects.shape == (len(test), len(FEATURES) + 1)
    assert 1 / (1 + np.exp(-effects.sum(axis=1))) == pytest.approx(model.score(test), abs=1e-4)


def test_columns_are_encoded_as_declared() -> None:
    frame = pl.DataFrame({"n": [1, None], "f": [True, False], "c": ["b", None]})
    encoded = encode(frame, ("c", "n", "f"), ("c", "q", "q"), {"c": ("a", "b")})
    assert encoded.dtype == np.float32
    assert encoded[0].tolist() == [1.0, 1.0, 1.0]
    assert np.isnan(encoded[1]).tolist() == [True, True, False]


def test_invalid_data_is_an_error(parts: tuple[pl.DataFrame, ...]) -> None:
    train, validation, _ = parts
    with pytest.raises(TrainingError, match="the features amount_ratio, noise, which the orders lack"):
        fit_in_process(train.drop("amount_ratio", "noise"), None, FEATURES, QUICK)
    with pytest.raises(TrainingError, match=r"'payment' has the value 'shells'.*card, wallet, other"):
        fit_in_process(train.with_columns(payment=pl.lit("shells")), None, FEATURES, QUICK)
    with pytest.raises(
        TrainingError, match=r"training orders need both frauds and honest orders, but every one of 2400 is honest"
    ):
        fit_in_process(train.with_columns(label=pl.lit(0)), None, FEATURES, QUICK)
    with pytest.raises(TrainingError, match="validation orders is neither 0 nor 1"):
        fit_in_process(train, validation.with_columns(label=pl.lit(None, pl.Int8)), FEATURES, QUICK)
    with pytest.raises(TrainingError, match="there are none"):
        fit_in_process(train[:0], None, FEATURES, QUICK)
    with pytest.raises(SettingsError, match=r"training\.rounds is 0"):
        TrainingSettings(rounds=0)


def test_weight_two_equals_a_duplicated_order(parts: tuple[pl.DataFrame, ...]) -> None:
    # no sampling, and one bin per value: only the sums of the histograms can differ
    exact = {"subsample": 1.0, "colsample_bytree": 1.0, "max_bin": 4096}
    settings = TrainingSettings(rounds=5, patience=0).with_parameters(**exact)
    plain = parts[0].drop("placed_at", "order_id", strict=False)
    frauds = plain.filter(pl.col("label") == 1)
    weighted = plain.with_columns(weight=1.0 + pl.col("label"))
    twice, heavy = (fit_in_process(data, None, FEATURES, settings) for data in (pl.concat([plain, frauds]), weighted))
    once = fit_in_process(plain, None, FEATURES, settings)
    assert np.allclose(twice.score(plain), heavy.score(plain), atol=1e-4)
    assert not np.allclose(once.score(plain), heavy.score(plain), atol=1e-2)
    assert fit_in_process(weighted, None, FEATURES, settings).digest == heavy.digest
    assert encode_data(weighted, None, FEATURES).digest() != encode_data(plain, None, FEATURES).digest()


def test_weights_must_be_positive(parts: tuple[pl.DataFrame, ...]) -> None:
    for wrong in (0.0, -1.0, None, float("nan"), float("inf")):
        frame = parts[0].with_columns(weight=pl.Series([wrong] + [1.0] * (len(parts[0]) - 1), dtype=pl.Float64))
        with pytest.raises(TrainingError, match="weight"):
            encode_data(frame, None, FEATURES)


def test_stripes_contain_every_order_once(parts: tuple[pl.DataFrame, ...]) -> None:
    data = encode_data(parts[0], parts[1], FEATURES)
    stripes = [data.stripe(number, 3) for number in range(3)]
    assert sum(len(stripe.label) for stripe in stripes) == len(data.label)
    assert sum(int(stripe.label.sum()) for stripe in stripes) == int(data.label.sum())


def test_folds_keep_the_delay(parts: tuple[pl.DataFrame, ...]) -> None:
    frame = pl.concat(parts).sample(fraction=1, shuffle=True, seed=1)
    delay = timedelta(days=4)
    folds = time_folds(frame, 3, delay)
    assert len(folds) == 3
    windows = np.zeros(len(frame), dtype=int)
    for before, window in folds:
        newest = frame.filter(pl.Series(before))["placed_at"].max()
        oldest = frame.filter(pl.Series(window))["placed_at"].min()
        assert oldest - newest > delay
        windows += window
    assert windows.max() == 1
    assert windows.sum() == pytest.approx(len(frame) / 2, abs=2)
    with pytest.raises(TrainingError, match="more than 90 days before it"):
        time_folds(frame, 3, timedelta(days=90))
    with pytest.raises(TrainingError, match="none of 3 windows over 0 orders"):
        time_folds(frame[:0], 3, delay)


def test_trials_depend_on_seed_and_number_only() -> None:
    base = {"eta": 0.05, "max_bin": 1024}
    assert parameters_of(0, SearchSettings(), base) == base
    assert parameters_of(3, SearchSettings(trials=4), base) == parameters_of(3, SearchSettings(trials=99), base)
    assert parameters_of(3, SearchSettings(), base) != parameters_of(4, SearchSettings(), base)
    assert parameters_of(3, SearchSettings(), base)["max_bin"] == 1024


def test_zero_trials_disable_the_search(parts: tuple[pl.DataFrame, ...]) -> None:
    found = search(parts[0], FEATURES, SearchSettings(trials=0), QUICK)
    assert (dict(found.best), found.rounds, found.trials) == (dict(QUICK.parameters), 0, ())


# --- on Ray -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[TaskPool]:
    pool = TaskPool(RaySettings(cpus=2))
    yield pool
    pool.close()


@pytest.mark.slow
def test_ray_train_has_the_same_bytes_as_this_process(parts: tuple[pl.DataFrame, ...], pool: TaskPool, tmp_path: Path) -> None:
    train, validation, _ = parts
    model = fit(train, validation, FEATURES, replace(QUICK, storage=Storage.on_disk(tmp_path)), pool=pool)
    assert model == fit_in_process(train, validation, FEATURES, QUICK)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TrainingError, match=r"needs 64 CPUs, but Ray has 2"):
        fit(train, validation, FEATURES, replace(QUICK, workers=64, storage=Storage.on_disk(tmp_path)), pool=pool)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_does_not_change_the_model(pool: TaskPool, tmp_path: Path) -> None:
    train, validation, _ = split(orders(60_000))
    settings = TrainingSettings(rounds=300, patience=0, report_every=30, workers=2, storage=Storage.on_disk(tmp_path), keep=True)
    undisturbed = fit(train, validation, FEATURES, replace(settings, storage=Storage.on_disk(tmp_path / "one")), pool=pool)
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not killed:
            if len(list((tmp_path / "two").glob("fit-*/checkpoint_*/progress.json"))) >= 2:
                workers = [child for child in psutil.Process().children(recursive=True) if _is_trainer(child)]
                if workers:
                    os.kill(workers[0].pid, signal.SIGKILL)
                    killed.append(workers[0].pid)
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one)
    killer.start()
    disturbed = fit(train, validation, FEATURES, replace(settings, storage=Storage.on_disk(tmp_path / "two")), pool=pool)
    killer.join()
    assert killed
    assert disturbed == undisturbed
    discard(disturbed)
    assert list((tmp_path / "two").iterdir()) == []


def _is_trainer(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.mark.slow
def test_a_repeated_search_has_the_same_result(parts: tuple[pl.DataFrame, ...], pool: TaskPool, tmp_path: Path) -> None:
    settings = SearchSettings(trials=3, folds=2, delay=timedelta(days=2))
    found = [
        search(pl.concat(parts[:2]), FEATURES, settings, replace(QUICK, rounds=20, storage=Storage.on_disk(tmp_path)), pool=pool)
        for _ in range(2)
    ]
    assert [trial.number for trial in found[0].trials] == [0, 1, 2]
    assert found[0].best == found[1].best
    assert [trial.score for trial in found[0].trials] == [trial.score for trial in found[1].trials]
    assert max(trial.score for trial in found[0].trials) >= found[0].trials[0].score
    assert list(tmp_path.iterdir()) == []
