"""The models that score: the registry's champion, and the challenger in its shadow."""

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
from ml.training.training import FittedModel, TrainingError

logger = logging.getLogger("shopsphere.serve")


@dataclass(frozen=True)
class Scorer:
    """A version that scores orders one at a time.

    forest  None: the model is no forest that is known here, and XGBoost is asked
    places  where each of the model's features is among FEATURES
    codes   by the place of a category: what the model calls its values
    """

    loaded: LoadedModel
    forest: Forest | None
    places: npt.NDArray[np.int64]
    codes: Mapping[int, Mapping[Value, float]]

    @staticmethod
    def of(loaded: LoadedModel) -> Scorer:
        """Make a version ready. The model's features are among FEATURES."""
        model = loaded.model
        places = [FEATURE_NAMES.index(name) for name in model.features]
        codes = {FEATURE_NAMES.index(name): _codes(values) for name, values in model.categories.items()}
        # what the model does not look at has no code
        unused: dict[int, dict[Value, float]] = {at: {} for at in range(len(FEATURE_NAMES)) if at not in places}
        forest = None
        try:
            forest = forest_of(model)
        except TrainingError as error:
            logger.warning("version %d is scored by XGBoost's own calls, which take longer: %s", loaded.version.number, error)
            # the first score of a model reads its trees
            nothing = np.full((1, len(places)), np.nan, dtype=np.float32)
            model.score_matrix(nothing)
        return Scorer(loaded, forest, np.array(places, dtype=np.int64), {**codes, **unused})

    @functools.cached_property
    def _own(self) -> Callable[[Sequence[Value]], Sequence[Value]]:
        places = self.places.tolist()
        return itemgetter(*places) if len(places) > 1 else lambda values: [values[place] for place in places]

    def seen(self, values: Sequence[Value]) -> dict[str, Value]:
        """The features that the model looks at, by name."""
        return dict(zip(self.model.features, self._own(values), strict=True))

    @property
    def number(self) -> int:
        """Of the version."""
        return self.loaded.version.number

    @property
    def model(self) -> FittedModel:
        """Its model."""
        return self.loaded.model

    @property
    def threshold(self) -> float:
        """From which score on an order is reviewed."""
        return self.loaded.threshold

    def encoded(self, values: Sequence[Value]) -> Floats:
        """The model's columns of an order's features (in the order of FEATURES). Raises TrainingError."""
        numbers = list(values)
        for place, codes in self.codes.items():
            code = codes.get(numbers[place], np.nan if not codes else None)
            if code is None:
                raise TrainingError(
                    f"Feature '{FEATURE_NAMES[place]}' has the value '{values[place]}', unknown to version {self.number}. "
                    "Train a model with the declarations of today: python -m app train."
                )
            numbers[place] = code
        return np.array(numbers, dtype=np.float32)[self.places]

    def score(self, values: Sequence[Value]) -> float:
        """The probability of fraud. values: in the order of FEATURES. Raises TrainingError."""
        row = self.encoded(values)
        return self.forest.score(row) if self.forest is not None else float(self.model.score_matrix(row[None, :])[0])

    def explain(self, values: Sequence[Value]) -> tuple[float, npt.NDArray[np.floating]]:
        """The probability, and what each of the model's features adds to the log-odds of the average order."""
        row = self.encoded(values)
        if self.forest is not None:
            return self.forest.explain(row)
        columns = row[None, :]
        added = self.model.contributions_matrix(columns, approximate=True)[0, :-1]  # the last one is the model's own level
        return float(self.model.score_matrix(columns)[0]), added


def _codes(values: Sequence[str]) -> dict[Value, float]:
    return {value: float(code) for code, value in enumerate(values)}


@dataclass(frozen=True)
class Models:
    """What scores now. champion is None while there is none."""

    champion: Scorer | None = None
    challenger: Scorer | None = None

    @property
    def fast(self) -> bool:
        """Whether an order takes well below a millisecond."""
        return all(one is None or one.forest is not None for one in (self.champion, self.challenger))


class ModelWatch:
    """Looks at the registry every so often. A change is loaded beside what serves, and then taken over at once.

    `current` may be read by any thread; who reads it once has a consistent pair.
    """

    def __init__(self, registry: Registry, seconds: float) -> None:
        self.registry, self.seconds = registry, seconds
        self.current = Models()
        self.looked = threading.Event()
        self.error: str | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)

    def start(self) -> None:
        """Begin to look; `looked` is set after the first time."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.look()
                self.error = None
            except ShopSphereError as error:
                # what was loaded goes on serving
                self._fail(str(error))
            except Exception as error:
                self._fail(f"The registry cannot be read ({type(error).__name__}: {error}).")
            self.looked.set()
            self._stopping.wait(self.seconds)

    def _fail(self, why: str) -> None:
        if why != self.error:
            logger.error("%s", why)
        self.error = why

    def look(self) -> None:
        """Load what the registry names, where that is not what is loaded. Raises RegistryError."""
        now = self.current
        versions = {alias: one.number for one in self.registry.versions() for alias in one.aliases}
        models = Models(
            self._loaded(versions.get(CHAMPION), now.champion, now.challenger),
            self._loaded(versions.get(CHALLENGER), now.challenger, now.champion),
        )
        if models.champion is not now.champion or models.challenger is not now.challenger:
            logger.info("champion %s, challenger %s", versions.get(CHAMPION), versions.get(CHALLENGER))
            self.current = models

    def _loaded(self, number: int | None, *held: Scorer | None) -> Scorer | None:
        if number is None:
            return None
        for one in held:
            if one is not None and one.number == number:
                return one
        loaded = self.registry.load(number)
        if missing := [name for name in loaded.model.features if name not in FEATURE_NAMES]:
            self._fail(
                f"Version {number} of model '{self.registry.name}' wants the feature '{missing[0]}', which is not there. "
                "Serve with the code it was trained with, or train anew: python -m app train."
            )
            return held[0]
        return Scorer.of(loaded)
