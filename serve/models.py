"""The models that score: the registry's champion, and the challenger in its shadow."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import polars as pl

from lakehouse.errors import ShopSphereError
from ml.features import FEATURE_NAMES, FEATURES
from ml.registry import CHALLENGER, CHAMPION, Loaded, Registry

logger = logging.getLogger("shopsphere.serve")


@dataclass(frozen=True)
class Models:
    """What scores now. champion is None while there is none."""

    champion: Loaded | None = None
    challenger: Loaded | None = None


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
        if models != now:
            logger.info("champion %s, challenger %s", versions.get(CHAMPION), versions.get(CHALLENGER))
            self.current = models

    def _loaded(self, number: int | None, *held: Loaded | None) -> Loaded | None:
        if number is None:
            return None
        for one in held:
            if one is not None and one.version.number == number:
                return one
        loaded = self.registry.load(number)
        if missing := [name for name in loaded.model.features if name not in FEATURE_NAMES]:
            self._fail(
                f"Version {number} of model '{self.registry.name}' wants the feature '{missing[0]}', which is not there. "
                "Serve with the code it was trained with, or train anew: python -m app train."
            )
            return held[0]
        # the first score of a model reads its trees
        types = {feature.name: feature.dtype for feature in FEATURES}
        empty = pl.DataFrame({name: pl.Series([None], dtype=types[name]) for name in loaded.model.features})
        loaded.model.score(empty)
        loaded.model.contributions(empty)
        return loaded
