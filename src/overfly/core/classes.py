"""The classes of a label set: names and colors."""

from collections.abc import Mapping
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from overfly.core.records import IGNORE, UInt8
from overfly.core.spec import Spec

Byte = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Byte, Byte, Byte]
"""Red, green, blue, each 0 to 255."""
PALETTE: tuple[Color, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (120, 120, 120), (136, 34, 85), (17, 119, 51), (221, 204, 119), (51, 34, 136), (68, 170, 153), (170, 68, 153),
)  # fmt: skip
"""Default colors, distinguishable by color-blind people (Okabe and Ito, 2008; Tol, 2021)."""


class Classes(Spec):
    """Names and display colors of K classes, in the order of their ids 0 to K-1; 255 is ignored everywhere."""

    names: tuple[str, ...]
    """Name of each class, in the order of the ids."""
    colors: tuple[Color, ...] = ()
    """Display color of each class; defaults to `PALETTE`."""

    @model_validator(mode="before")
    @classmethod
    def _from_mapping(cls, value: object) -> object:
        """Accept ``{building: [255, 0, 0], road: [255, 255, 0]}`` and plain lists of names too."""
        names = value.get("names", value) if isinstance(value, Mapping) else value
        for name in names if isinstance(names, list | tuple | Mapping) else ():
            if isinstance(name, bool):
                word = "yes" if name else "no"
                raise ValueError(f"YAML reads yes, no, on, off, true and false as {name}; quote names: ['{word}', …]")
        if isinstance(value, list | tuple):
            return {"names": tuple(value)}
        if isinstance(value, Mapping) and value and "names" not in value:
            return {"names": tuple(value), "colors": tuple(value.values())}
        return value

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if not 1 <= len(self.names) < IGNORE:
            raise ValueError(f"there must be 1 to {IGNORE - 1} classes, got {len(self.names)}")
        duplicates = sorted({name for name in self.names if self.names.count(name) > 1})
        if duplicates:
            raise ValueError(f"class names must differ, got {', '.join(duplicates)} more than once")
        if self.colors and len(self.colors) != len(self.names):
            raise ValueError(f"{len(self.names)} classes need {len(self.names)} colors, got {len(self.colors)}")
        if not self.colors:
            colors = tuple(PALETTE[i % len(PALETTE)] for i in range(len(self.names)))
            object.__setattr__(self, "colors", colors)
        return self

    def __len__(self) -> int:
        return len(self.names)

    def paint(self, label: UInt8) -> UInt8:
        """Color a label (H, W) of class ids as an image (H, W, 3); ignored pixels are black."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self.colors)] = self.colors
        return table[label]

    def index(self, name: str) -> int:
        """Return the id of a class, from 0; raise `ValueError` for an unknown name."""
        if name not in self.names:
            raise ValueError(f"there is no class {name!r}; classes: {', '.join(self.names)}")
        return self.names.index(name)
