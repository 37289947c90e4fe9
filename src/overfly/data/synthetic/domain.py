"""The synthetic world: two aerial domains, urban and rural, that need no download.

A scene is laid out (`overfly.data.synthetic.layout`) and rendered (`overfly.data.synthetic.objects`). The two domains
differ in class shares, shapes and sizes, materials and season, ground resolution, sun and shadow, haze, and sensor.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from overfly.core.atomic_files import temporary_path
from overfly.core.choices import Scene
from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.core.records import Item, UInt8
from overfly.core.spec import Count, Pixels
from overfly.data.domain import SPLITS, Domain, Split
from overfly.data.loveda import CLASSES
from overfly.data.synthetic.drawing import Dice, Sheet
from overfly.data.synthetic.layout import country, town
from overfly.data.synthetic.objects import AUTUMN, CLASS_OF, SUMMER, Material, render

SCENES: tuple[Scene, ...] = get_args(Scene)

EDITION = 1
"""Part of every seed and of a written world's record; a change to any image raises it."""
IDS: UInt8 = np.array([CLASS_OF[material] for material in Material], np.uint8)
STATISTICS: dict[Scene, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "urban": ((114.57, 116.16, 105.05), (39.83, 32.79, 35.73)),
    "rural": ((119.44, 120.57, 87.79), (36.05, 27.09, 25.80)),
}
"""Mean and standard deviation of red, green and blue over the train split at its default size and number."""
GROUND: dict[Scene, float] = {"urban": 0.3, "rural": 0.5}
RECORD = "synthetic.json"


def synthesize(scene: Scene, split: Split, index: int, size: int = 256) -> tuple[UInt8, UInt8]:
    """Synthesize a scene. It is a function of the four arguments: the same on every machine and in every process.

    Args:
        scene: ``urban`` or ``rural``.
        split: train, val and test are different places.
        index: number of the scene in its split, from 0 on.
        size: side S in pixels; a larger image shows more ground, not more detail.

    Returns:
        Image (S, S, 3), 0 to 255, and label (S, S), class ids 0 to 6 in LoveDA's order.

    Raises:
        DataError: there is no such scene or split, or a number is out of range.
    """
    if scene not in SCENES or split not in SPLITS:
        raise DataError(
            f"the synthetic world has no scene {scene!r} with a split {split!r}; scenes are {', '.join(SCENES)}, "
            f"splits {', '.join(SPLITS)}"
        )
    if index < 0 or size < 16:
        raise DataError(
            f"synthetic scene {index} of size {size} cannot be; number scenes from 0 and make them 16 pixels or larger"
        )
    key = (EDITION, SCENES.index(scene), SPLITS.index(split), index, size)
    sheet, dice = Sheet(size), Dice(*key)
    if scene == "urban":
        town(sheet, dice)
        image = render(sheet, dice, SUMMER)
    else:
        country(sheet, dice)
        image = render(sheet, dice, AUTUMN)
    return image, IDS[sheet.material]


_recent = lru_cache(maxsize=4)(synthesize)
"""Caches a scene between the reading of its image and of its label."""


def draw_image(scene: Scene, split: Split, index: int, size: int) -> UInt8:
    """The image (S, S, 3) of `synthesize`, 0 to 255."""
    return _recent(scene, split, index, size)[0].copy()


def draw_label(scene: Scene, split: Split, index: int, size: int) -> UInt8:
    """The label (S, S) of `synthesize`, class ids 0 to 6."""
    return _recent(scene, split, index, size)[1].copy()


class Synthetic(Domain, name="synthetic"):
    """The synthetic world: two aerial domains that need no download, for demos, tests and first experiments.

    * Format: generated on access, about 30 ms a scene of 256×256 pixels; `write_synthetic` writes LoveDA's layout.
    * Bands: red, green, blue, 8 bits. Resolution: about 0.3 m (urban) and 0.5 m (rural).
    * Classes: LoveDA's seven. Every pixel has one; nothing is ignored.
    * Shift: shares (building 15 %, road 25 %, agriculture 7 % in urban; 6, 6 and 35 % in rural), road grids and blocks
      against lanes and hamlets, season, materials, ground resolution, length and side of the shadows, haze, noise.
    * Splits: train, val and test differ in their seeds. Scenes of one split are independent of each other.
    * License: that of this package.
    """

    scene: Scene = "urban"
    """Which of the two domains: ``urban`` or ``rural``."""
    size: Pixels = 256
    """Side of each image; a larger one shows more ground."""
    train: Count = 400
    """Scenes in the train split."""
    val: Count = 60
    """Scenes in the val split."""
    test: Count = 60
    """Scenes in the test split. It has labels."""

    @property
    def classes(self) -> Classes:
        """LoveDA's seven classes."""
        return CLASSES

    @property
    def gsd(self) -> float:
        """Length of a pixel on the ground in meters."""
        return GROUND[self.scene]

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of red, green and blue over the train split, 0 to 255."""
        return STATISTICS[self.scene]

    def items(self, split: Split) -> Sequence[Item]:
        """Scenes 0 to n - 1 of a split, named like ``Urban_12``."""
        number: int = {"train": self.train, "val": self.val, "test": self.test}[split]
        found = []
        for index in range(number):
            place = (self.scene, split, index, self.size)
            found.append(
                Item(f"{self.scene.capitalize()}_{index}", partial(draw_image, *place), partial(draw_label, *place))
            )
        return found


def write_synthetic(
    root: Path | str,
    *,
    size: int = 256,
    train: int = 400,
    val: int = 60,
    test: int = 60,
    scenes: Sequence[Scene] = SCENES,
    workers: int = 1,
) -> int:
    """Write the synthetic world in LoveDA's layout: ``{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/N.png``.

    As in LoveDA, a mask holds class id + 1, Test has no masks, and no two files share a number. Scene ``index`` of a
    split is the same image that `Synthetic` gives. The folder appears when it is complete; one that holds this very
    world already is left as it is.

    Args:
        root: folder to write; it must not exist, or be empty.
        size: side of each image in pixels.
        train: images of each scene for training.
        val: images of each scene for validation.
        test: images of each scene without masks.
        scenes: which scenes.
        workers: processes that draw; more than one needs the caller's script to be importable.

    Returns:
        How many images the folder holds.

    Raises:
        DataError: the folder holds something else or cannot be written, or a number is out of range.
    """
    root = Path(root).expanduser()
    numbers: dict[Split, int] = {"train": train, "val": val, "test": test}
    if size < 16 or min(numbers.values()) < 0 or train < 1 or workers < 1 or not scenes or set(scenes) - set(SCENES):
        raise DataError(
            f"a synthetic world of {train}, {val} and {test} images of {size} pixels, scenes {tuple(scenes)}, by "
            f"{workers} workers cannot be; ask for at least 1 image to train on, 16 pixels and 1 worker, and for "
            "scenes urban or rural"
        )
    counts = {"train": train, "val": val, "test": test}
    record = {"edition": EDITION, "size": size, **counts, "scenes": sorted(set(scenes))}
    count = sum(numbers.values()) * len(set(scenes))
    if _holds(root, record):
        return count
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with temporary_path(root, folder=True) as part:
            world = part / "world"
            _write_all(world, numbers, sorted(set(scenes)), size, workers)
            (world / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if root.is_dir():
                root.rmdir()
            world.replace(root)
    except OSError as error:
        raise DataError(
            f"the synthetic world cannot be written to {root} ({error.strerror or error}); choose another folder"
        ) from error
    return count


def _holds(root: Path, record: dict[str, Any]) -> bool:
    """Whether a folder holds the world of this record.

    Raises:
        DataError: it holds something else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == record:
        return True
    what = "a synthetic world with other settings" if isinstance(found, dict) else "something else"
    raise DataError(f"{root} holds {what} already, and worlds are not mixed; name a new folder, or remove this one")


def _write_all(world: Path, numbers: dict[Split, int], scenes: Sequence[Scene], size: int, workers: int) -> None:
    """Write every scene, each under its own number, rural before urban as in LoveDA."""
    jobs: list[tuple[Path, Scene, Split, int, int]] = []
    for split, number in numbers.items():
        for scene in scenes:
            folder = world / split.capitalize() / scene.capitalize()
            if number:
                (folder / "images_png").mkdir(parents=True)
                if split != "test":
                    (folder / "masks_png").mkdir()
            jobs += [(folder / f"{len(jobs) + index}.png", scene, split, index, size) for index in range(number)]
    if workers == 1:
        for job in jobs:
            _write(job)
        return
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends this process, which ends the workers
    with ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, ignore_interrupts) as pool:
        list(pool.map(_write, jobs))


def _write(job: tuple[Path, Scene, Split, int, int]) -> None:
    path, scene, split, index, size = job
    image, label = synthesize(scene, split, index, size)
    Image.fromarray(image).save(path.parent / "images_png" / path.name)
    if split != "test":
        Image.fromarray(label + np.uint8(1)).save(path.parent / "masks_png" / path.name)
