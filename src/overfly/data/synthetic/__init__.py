"""Synthetic dataset: two aerial domains, urban and rural, that need no download.

A scene is laid out (`overfly.data.synthetic.layout`) and rendered. The two domains differ in class shares, shapes and
sizes, materials and season, ground resolution, sun and shadow, haze, and sensor.
"""

import json
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image, ImageFilter

from overfly.core.atomic_files import remove_stale, temporary_path
from overfly.core.choices import Scene
from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.core.records import Item, UInt8
from overfly.core.spec import Pixels, PositiveInt
from overfly.data.domain import SPLITS, Domain, Split
from overfly.data.loveda import CLASSES
from overfly.data.synthetic.drawing import Canvas, Float, Random, clouds, crowns, direction, grain, shadow_mask
from overfly.data.synthetic.layout import CLASS_OF, DOMAINS, Material, lay_out_rural, lay_out_urban

SCENES: tuple[Scene, ...] = get_args(Scene)

EDITION = 1
"""Part of every seed and of the record of a written dataset; raised when any image changes."""
CLASS_IDS: UInt8 = np.array([CLASS_OF[material] for material in Material], np.uint8)
RECORD_FILE = "synthetic.json"


def synthesize(scene: Scene, split: Split, index: int, size: int = 256) -> tuple[UInt8, UInt8]:
    """Synthesize scene ``index``, from 0 on, of a split: a deterministic function of the arguments on all machines.

    The side S is in pixels; a larger image shows more ground, not more detail. Returns image (S, S, 3), 0 to 255, and
    label (S, S), class ids 0 to 6 in LoveDA's order. Raises `DataError`: the scene or split does not exist, or a number
    is out of range.
    """
    if scene not in SCENES or split not in SPLITS:
        raise DataError(
            f"scene must be {' or '.join(SCENES)}, split {' or '.join(SPLITS)}, got {scene!r} and {split!r}"
        )
    if index < 0 or size < 16:
        raise DataError(f"index must be at least 0 and size at least 16, got {index} and {size}")
    key = (EDITION, SCENES.index(scene), SPLITS.index(split), index, size)
    canvas, random = Canvas(size), Random(*key)
    (lay_out_urban if scene == "urban" else lay_out_rural)(canvas, random)
    image = _render(canvas, random, DOMAINS[scene])
    return image, CLASS_IDS[canvas.material]


_cached_synthesize = lru_cache(maxsize=4)(synthesize)
"""Caches a scene between the reading of its image and of its label."""


def draw(part: int, scene: Scene, split: Split, index: int, size: int) -> UInt8:
    """The image of `synthesize` if ``part`` is 0, the label if it is 1."""
    return _cached_synthesize(scene, split, index, size)[part].copy()


class Synthetic(Domain, name="synthetic"):
    """Synthetic aerial images of two domains, for demos, tests and first experiments; no download.

    * Format: generated on access, about 30 ms a scene of 256×256 pixels; `write_synthetic` writes LoveDA's layout.
    * Bands: red, green, blue, 8 bits. Resolution: about 0.3 m (urban) and 0.5 m (rural).
    * Classes: LoveDA's seven. Every pixel has one; nothing is ignored.
    * Shift: shares (building 15 %, road 25 %, agriculture 7 % in urban; 6, 6 and 35 % in rural), road grids and blocks
      against lanes and hamlets, season, materials, ground resolution, length and side of the shadows, haze, noise.
    * Splits: train, val and test differ in their seeds. Scenes of one split are independent of each other.
    * License: that of this package.
    """

    scene: Scene = "urban"
    """Domain: ``urban`` or ``rural``."""
    size: Pixels = 256
    """Side of each image; a larger one shows more ground."""
    train: PositiveInt = 400
    """Scenes in the train split."""
    val: PositiveInt = 60
    """Scenes in the val split."""
    test: PositiveInt = 60
    """Scenes in the test split. It has labels."""

    @property
    def classes(self) -> Classes:
        """LoveDA's seven classes."""
        return CLASSES

    @property
    def gsd(self) -> float:
        """Length of a pixel on the ground in meters."""
        return float(DOMAINS[self.scene]["gsd"])

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of red, green and blue over the train split, 0 to 255."""
        return tuple(DOMAINS[self.scene]["mean"]), tuple(DOMAINS[self.scene]["std"])

    def items(self, split: Split) -> Sequence[Item]:
        """Scenes 0 to n - 1 of a split, named like ``Urban_12``."""
        number: int = {"train": self.train, "val": self.val, "test": self.test}[split]
        title, keys = self.scene.capitalize(), [(self.scene, split, index, self.size) for index in range(number)]
        return [Item(f"{title}_{key[2]}", partial(draw, 0, *key), partial(draw, 1, *key)) for key in keys]


def write_synthetic(
    root: Path | str, *, size: int = 256, train: int = 400, val: int = 60, test: int = 60,
    scenes: Sequence[Scene] = SCENES, workers: int = 1,
) -> int:  # fmt: skip
    """Write synthetic images in LoveDA's layout: ``{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/N.png``.

    As in LoveDA, a mask holds class id + 1, Test has no masks, and no two files share a number. Scene ``index`` of a
    split is the same image as that of `Synthetic`. The folder is created only when complete; an existing
    folder with these images is not changed.

    The arguments are those of `overfly data synthesize`; several workers need the caller's script to be importable.
    Returns the number of images in the folder. Raises `DataError`: the folder has other content or cannot be written,
    or a number is out of range.
    """
    root = Path(root).expanduser()
    numbers: dict[Split, int] = {"train": train, "val": val, "test": test}
    settings = ("size", size, 16), ("train", train, 1), ("val", val, 0), ("test", test, 0), ("workers", workers, 1)
    for setting, value, least in settings:
        if value < least:
            raise DataError(f"{setting} must be at least {least}, got {value}")
    if not scenes or set(scenes) - set(SCENES):
        raise DataError(f"scenes must be some of {', '.join(SCENES)}, got {', '.join(scenes) or 'none'}")
    chosen = sorted(set(scenes))
    record: dict[str, object] = {"edition": EDITION, "size": size, "train": train, "val": val, "test": test}
    record["scenes"] = chosen
    count = sum(numbers.values()) * len(chosen)
    remove_stale(root)
    if _is_written(root, record):
        return count
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with temporary_path(root, folder=True) as part:
            folder = part / "images"
            _write_all(folder, numbers, chosen, size, workers)
            (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if root.is_dir():
                root.rmdir()
            folder.replace(root)
    except OSError as error:
        if _is_written(root, record):  # another process was faster
            return count
        raise DataError(
            f"the synthetic images cannot be written to {root} ({error.strerror or error}); choose another folder"
        ) from error
    return count


def _is_written(root: Path, record: dict[str, Any]) -> bool:
    """Return whether a folder holds the dataset of this record; raise `DataError` if it has other content."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        existing = json.loads((root / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        existing = None
    if existing == record:
        files = sum(file.stat().st_size > 0 for file in root.rglob("*.png"))
        expected = (2 * (record["train"] + record["val"]) + record["test"]) * len(record["scenes"])
        if files != expected:
            raise DataError(f"{root} has {files} of its {expected} files; remove the folder and give the command again")
        return True
    content = "synthetic images with other settings" if isinstance(existing, dict) else "other files"
    raise DataError(f"{root} already holds {content}; choose another folder, or remove this one")


def _write_all(root: Path, numbers: dict[Split, int], scenes: Sequence[Scene], size: int, workers: int) -> None:
    """Write every scene, each under its own number, rural before urban as in LoveDA."""
    jobs: list[tuple[Path, Scene, Split, int, int]] = []
    for split, number in numbers.items():
        for scene in scenes:
            folder = root / split.capitalize() / scene.capitalize()
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


TEXTURE_STRENGTH: Float = np.array([DOMAINS["texture"][material.name.lower()] for material in Material], np.float32)
"""Strength of each material's texture, of 255, at scales of 1, 3, 9 and 40 pixels."""


def _draw_trees(canvas: Canvas, random: Random, appearance: Mapping[str, Any], away: tuple[float, float]) -> None:
    """Draw tree crowns where the layout allows trees, shaded by the direction of the sun."""
    spacing, size = random.integer(*appearance["spacing"]), canvas.size
    right, down, square, number = crowns(random, size, spacing)
    pixel = np.arange(size)
    rows = np.clip(pixel[:, None] - (down * np.float32(spacing)).astype(np.intp), 0, size - 1)
    columns = np.clip(pixel[None, :] - (right * np.float32(spacing)).astype(np.intp), 0, size - 1)
    density = canvas.tree_density[rows, columns]
    reach = np.where(density < 1, np.float32(0.3), np.float32(0.56))
    material = canvas.material
    has_tree = (number < density) & (square < reach) & (material != Material.ROOF)
    obstacle = np.isin(material, (Material.ASPHALT, Material.TRACK, Material.WATER))
    has_tree &= ~obstacle | (square < np.float32(0.1))
    first, second = (np.array(random.choice(appearance["leaves"]), np.float32) for _ in range(2))
    number = number[has_tree]
    mix, tone = (number * 7 % 1)[:, None], (number * 31 % 1)[:, None]
    canvas.color[has_tree] = first + (second - first) * mix + (tone - np.float32(0.5)) * 26
    canvas.relief[has_tree] = (right * away[0] + down * away[1])[has_tree] * -70
    canvas.height[has_tree] = (7 - 6 * square)[has_tree]
    material[has_tree] = Material.CROWN


def _texture(canvas: Canvas, random: Random) -> Float:
    """Return the brightness offset of each pixel (S, S) by its material."""
    size, strength = canvas.size, TEXTURE_STRENGTH[canvas.material]
    fine = (random.noise(size, size).astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    light: Float = canvas.relief + strength[..., 0] * fine
    light += strength[..., 1] * grain(random, size, 1.2)
    light += strength[..., 2] * clouds(random, size, 9)
    light += strength[..., 3] * clouds(random, size, 40)
    return light + 5 * clouds(random, size, 100)


def _render(canvas: Canvas, random: Random, appearance: Mapping[str, Any]) -> UInt8:
    """Draw the trees and render the image (S, S, 3), 0 to 255, with the domain's light and sensor."""
    size, (to_x, to_y) = canvas.size, direction(random.uniform(*appearance["sun"]))
    away = (-to_x, -to_y)
    _draw_trees(canvas, random, appearance, away)
    slope, highest = random.uniform(*appearance["slope"]), float(canvas.height.max())
    hard = Image.fromarray(shadow_mask(canvas.height, away, slope, highest).astype(np.uint8) * np.uint8(255))
    shadow = np.asarray(hard.filter(ImageFilter.GaussianBlur(0.6)), np.float32) / np.float32(255)
    image = canvas.color + _texture(canvas, random)[..., None]
    image *= 1 - shadow[..., None] * (1 - np.array(appearance["shade"], np.float32))
    gain = np.array(random.tint(appearance["gain"], 0.0, 0.03), np.float32)
    image *= gain * np.float32(random.uniform(*appearance["exposure"]))
    haze = np.float32(random.uniform(*appearance["haze"]))
    image = image * (1 - haze) + np.array(appearance["haze_color"], np.float32) * haze
    lens = ImageFilter.GaussianBlur(random.uniform(*appearance["blur"]))
    blurred = np.asarray(Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).filter(lens), np.float32)
    noise = random.noise(size, size * 3).astype(np.float32) + random.noise(size, size * 3) - np.float32(255)
    noise *= np.float32(random.uniform(*appearance["noise"]) / 104)  # the standard deviation of the sum of two bytes
    return np.clip(blurred + noise.reshape(size, size, 3) + np.float32(0.5), 0, 255).astype(np.uint8)
