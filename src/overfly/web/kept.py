"""Maps that were made, kept in memory to be looked at and downloaded, the oldest going first."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from overfly.core.classes import Classes
from overfly.core.records import UInt8
from overfly.raster.georeference import Georeference
from overfly.web.prediction import Found


@dataclass(frozen=True, eq=False)
class Answer:
    """What one network said of an image."""

    title: str
    classes: Classes
    found: Found


@dataclass(frozen=True, eq=False)
class Map:
    """An image and its maps.

    Attributes:
        key: what it is called in addresses; nobody can guess it.
        picture: (H, W, 3), for the eye.
        place: where it lies; None for pictures without coordinates.
        answers: by the key of the network.
    """

    key: str
    picture: UInt8
    place: Georeference | None
    answers: Mapping[str, Answer]

    @property
    def pixels(self) -> int:
        """Of the image, once for each map of it and once for itself."""
        return int(self.picture.shape[0] * self.picture.shape[1]) * (1 + len(self.answers))


class Kept:
    """A bounded number of maps."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self._maps: OrderedDict[str, Map] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, picture: UInt8, place: Georeference | None, answers: Mapping[str, Answer]) -> Map:
        """Keep an image and its maps; older ones go until all fit, this one stays in any case."""
        made = Map(secrets.token_urlsafe(12), picture, place, answers)
        with self._lock:
            self._maps[made.key] = made
            while len(self._maps) > 1 and sum(each.pixels for each in self._maps.values()) > self.pixels:
                self._maps.popitem(last=False)
        return made

    def get(self, key: str) -> Map | None:
        """The map of this key, if it is still there."""
        with self._lock:
            if key in self._maps:
                self._maps.move_to_end(key)
            return self._maps.get(key)

    def __len__(self) -> int:
        return len(self._maps)


__all__ = ["Answer", "Kept", "Map"]
