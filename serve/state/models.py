"""The models that score: the registry's champion, and the challenger in shadow mode."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from lakehouse.errors import ShopSphereError
from ml.features.groups import FEATURE_NAMES
from ml.features.online.arithmetic import Value
from ml.forest import Floats, Forest, forest_of
from ml.registry import CHALLENGER, CHAMPION, LoadedModel, Registry
from ml.training.model import FittedModel
from ml.training.settings import TrainingError

logger = logging.getLogger("shopsphere.serve")


@dataclass(frozen=True)
class Scorer:
    """A model version that scores one order at a time.

    forest          the model's trees; None: `Forest` does not support the model, and XGBoost scores it
    indices         index of each of the model's features in FEATURES
    category_codes  the model's code of each value, by index of a categorical feature
    """

    loaded: LoadedModel
    forest: Forest | None
    indices: npt.NDArray[np.int64]
    category_codes: Mapping[int, Mapping[Value, float]]

    @staticmethod
    def of(loaded: LoadedModel) -> Scorer:
        """Return the scorer of a version whose features are all in FEATURES."""
        model = loaded.model
        indices = [FEATURE_NAMES.index(name) for name in model.features]
        codes = {FEATURE_NAMES.index(name): _codes(values) for name, values in model.categories.items()}
        # features that the model does not use have no codes
        unused: dict[int, dict[Value, float]] = {index: {} for index in range(len(FEATURE_NAMES)) if index not in indices}
        forest = None
        try:
            forest = forest_of(model)
        except TrainingError as error:
            logger.warning("Version %d is scored by XGBoost, which is slower: %s", loaded.version.number, error)
            # warm up: XGBoost loads its trees on the first score
            row = np.full((1, len(indices)), np.nan, dtype=np.float32)
            model.score_matrix(row)
        return Scorer(loaded, forest, np.array(indices, dtype=np.int64), {**codes, **unused})

    @functools.cached_property
    def _select(self) -> Callable[[Sequence[Value]], Sequence[Value]]:
        indices = self.indices.tolist()
        return itemgetter(*indices) if len(indices) > 1 else lambda values: [values[index] for index in indices]

    def model_features(self, values: Sequence[Value]) -> dict[str, Value]:
        """Return the features that the model uses by name. values: in the order of FEATURES."""
        return dict(zip(self.model.features, self._select(values), strict=True))

    @property
    def number(self) -> int:
        """The version number."""
        return self.loaded.version.number

    @property
    def model(self) -> FittedModel:
        """The fitted model."""
        return self.loaded.model

    @property
    def threshold(self) -> float:
        """The score from which an order is reviewed."""
        return self.loaded.threshold

    def encode(self, values: Sequence[Value]) -> Floats:
        """Return the model's input for an order. values: in the order of FEATURES. Raises TrainingError."""
        numbers = list(values)
        for index, codes in self.category_codes.items():
            code = codes.get(numbers[index], np.nan if not codes else None)
            if code is None:
                raise TrainingError(
                    f"Feature '{FEATURE_NAMES[index]}' has the value '{values[index]}', which version {self.number} does not "
                    "know. Train a model with the current feature declarations: python -m app train."
                )
            numbers[index] = code
        return np.array(numbers, dtype=np.float32)[self.indices]

    def score(self, values: Sequence[Value]) -> float:
        """Return the probability of fraud. values: in the order of FEATURES. Raises TrainingError."""
        row = self.encode(values)
        return self.forest.score(row) if self.forest is not None else float(self.model.score_matrix(row[None, :])[0])

    def explain(self, values: Sequence[Value]) -> tuple[float, npt.NDArray[np.floating]]:
        """Return the probability, and the contribution of each of the model's features to the log-odds."""
        row = self.encode(values)
        if self.forest is not None:
            return self.forest.explain(row)
        matrix = row[None, :]
        contributions = self.model.contributions_matrix(matrix, approximate=True)[0, :-1]  # the last one is the bias
        return float(self.model.score_matrix(matrix)[0]), contributions


def _codes(values: Sequence[str]) -> dict[Value, float]:
    return {value: float(code) for code, value in enumerate(values)}


@dataclass(frozen=True)
class ServedModels:
    """The versions that score now; None: the registry names none."""

    champion: Scorer | None = None
    challenger: Scorer | None = None

    @property
    def fast(self) -> bool:
        """Whether scoring an order takes well below a millisecond."""
        return all(one is None or one.forest is not None for one in (self.champion, self.challenger))


class ModelWatcher:
    """Polls the registry. A new version is loaded while the previous ones keep scoring, then replaces them at once.

    `current` may be read by any thread; one read returns a consistent pair.
    """

    def __init__(self, registry: Registry, seconds: float) -> None:
        self.registry, self.seconds = registry, seconds
        self.current = ServedModels()
        self.first_check_done = threading.Event()
        self.error: str | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)

    def start(self) -> None:
        """Start polling; `first_check_done` is set after the first check."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stopping.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.check()
                self.error = None
            except ShopSphereError as error:
                # the loaded versions keep scoring
                self._fail(str(error))
            except Exception as error:
                self._fail(f"The registry cannot be read ({type(error).__name__}: {error}).")
            self.first_check_done.set()
            self._stopping.wait(self.seconds)

    def _fail(self, message: str) -> None:
        if message != self.error:
            logger.error("%s", message)
        self.error = message

    def check(self) -> None:
        """Load the versions that the registry names, unless they are loaded. Raises RegistryError."""
        current = self.current
        versions = {alias: version.number for version in self.registry.versions() for alias in version.aliases}
        models = ServedModels(
            self._load(versions.get(CHAMPION), current.champion, current.challenger),
            self._load(versions.get(CHALLENGER), current.challenger, current.champion),
        )
        if models.champion is not current.champion or models.challenger is not current.challenger:
            logger.info("Champion: version %s, challenger: version %s", versions.get(CHAMPION), versions.get(CHALLENGER))
            self.current = models

    def _load(self, number: int | None, *loaded_scorers: Scorer | None) -> Scorer | None:
        """Return the scorer of a version, one of `loaded_scorers` where possible; the first of these on an unusable version."""
        if number is None:
            return None
        for scorer in loaded_scorers:
            if scorer is not None and scorer.number == number:
                return scorer
        loaded = self.registry.load(number)
        if missing := [name for name in loaded.model.features if name not in FEATURE_NAMES]:
            self._fail(
                f"Version {number} of model '{self.registry.name}' uses the feature '{missing[0]}', which is not declared. "
                "Serve with the code it was trained with, or train a new version: python -m app train."
            )
            return loaded_scorers[0]
        return Scorer.of(loaded)
