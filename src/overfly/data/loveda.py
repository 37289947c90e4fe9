"""LoveDA (Wang et al., 2021): aerial scenes of Nanjing, Changzhou and Wuhan at 0.3 m, urban and rural."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.core.records import IGNORE, Item, UInt8
from overfly.data import reading
from overfly.data.domain import Domain, Split, SplitError
from overfly.data.reading import UNKNOWN, from_numbers, unknown_numbers

CLASSES = Classes(
    names=("background", "building", "road", "water", "barren", "forest", "agriculture"),
    colors=(
        (255, 255, 255), (255, 0, 0), (255, 255, 0), (0, 0, 255), (159, 129, 183), (0, 255, 0), (255, 195, 128),
    ),
)  # fmt: skip
"""The label set of LoveDA, with its official colors."""

MEANING = {0: IGNORE, **{number: number - 1 for number in range(1, 8)}}
"""Class id of each number in a mask file: 0 is no data, 1 to 7 are the classes."""


class LoveDA(Domain, name="loveda"):
    """LoveDA: 5,987 aerial scenes for domain adaptation between town and country.

    * Format: RGB PNG, 1024×1024, 8 bits; ``{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/N.png``.
    * Bands: red, green, blue. Resolution: 0.3 m. Places: Nanjing, Changzhou, Wuhan (Google Earth, July 2016).
    * Scenes: 2,713 urban, 3,274 rural, each split into train, val and test.
    * Classes (number in the mask): background 1, building 2, road 3, water 4, barren 5, forest 6, agriculture 7;
      0 is no data and ignored. The masks of test are hidden; the benchmark's server scores them.
    * License: CC BY-NC-SA 4.0, for academic use; the imagery is subject to the terms of Google Earth.
    * Citation: Wang, Zheng, Ma, Lu, Zhong: LoveDA: A Remote Sensing Land-Cover Dataset for Domain Adaptive Semantic
      Segmentation. NeurIPS Datasets and Benchmarks, 2021. doi:10.5281/zenodo.5706578
    """

    root: Path
    """Folder that holds ``Train``, ``Val`` and ``Test``; the synthetic world can be written in the same layout."""
    scene: Literal["urban", "rural", "both"] = "both"
    """Which scenes: ``urban``, ``rural``, or ``both`` as one domain."""

    @property
    def classes(self) -> Classes:
        """The seven classes."""
        return CLASSES

    @property
    def gsd(self) -> float:
        """0.3 m a pixel."""
        return 0.3

    def items(self, split: Split) -> Sequence[Item]:
        """Scenes in the order of their numbers, urban before rural, named like ``Rural_12``.

        Raises:
            SplitError: a folder of images does not exist.
            DataError: a scene of train or val has no mask, or a folder of images is empty.
        """
        scenes = ("Urban", "Rural") if self.scene == "both" else (self.scene.capitalize(),)
        return [item for scene in scenes for item in self._scene(split, scene)]

    def read_label(self, item: Item) -> UInt8:
        """The label (H, W): no data as 255, classes as 0 to 6.

        Raises:
            DataError: there is none, or it is broken, of another size than the image, or holds other numbers.
        """
        values = reading.read_label_pixels(reading.label_of(item)).values
        if values.ndim != 2:
            raise DataError(f"{item.label} holds colors, and LoveDA's masks hold numbers 0 to 7; fetch it again")
        reading.check_size(item, values)
        label = from_numbers(values, MEANING)
        if (label == UNKNOWN).any():
            raise DataError(
                f"{item.label} holds {unknown_numbers(values, label)}, and LoveDA's masks hold numbers 0 to 7; "
                "fetch it again, or describe your own masks with the domain 'folder'"
            )
        return label

    def _scene(self, split: Split, scene: str) -> list[Item]:
        root = self.root.expanduser()
        folder = root / split.capitalize() / scene / "images_png"
        if not folder.is_dir():
            raise SplitError(f"LoveDA is not in {folder}; get it with: overfly data fetch loveda --root {root}")
        paths = [path for path in folder.glob("*.png") if path.stem.isdecimal()]
        if not paths:
            raise DataError(f"{folder} holds no images N.png; get them with: overfly data fetch loveda --root {root}")
        paths.sort(key=lambda path: int(path.stem))
        masks = folder.parent / "masks_png"
        present = {path.name for path in masks.glob("*.png")}
        missing = [path for path in paths if path.name not in present]
        if missing and split != "test":
            raise DataError(
                f"{masks / missing[0].name} is missing, the mask of one of {len(missing)} images without; "
                f"fetch the split again with: overfly data fetch loveda --root {root}"
            )
        return [
            Item(f"{scene}_{path.stem}", path, masks / path.name if path.name in present else None) for path in paths
        ]
