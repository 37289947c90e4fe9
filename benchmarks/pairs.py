"""Adapt between pairs of data sets with `overfly adapt`, for the study of its choice.

    python benchmarks/pairs.py DATA [--pairs camvid-day,roads-gray] [--seeds 0,1,2] [--out runs/pairs] [SETTING=VALUE …]

DATA is a folder with `camvid`, `roads` and `carrotweed` (each with `source`, `source_test`, `target` and `target_test`,
which hold `images` and index `masks`) and `dubai`. Every pair runs in both directions, with the recipes that `adapt`
proposes for two folders; settings such as `start.steps=400 steps=200` take the place of its time budget. The start of
one direction is the oracle of the other: the same network, steps and settings on the labels of its target. Target
labels are opened afterwards, by `python benchmarks/selections.py runs/pairs`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import overfly
from overfly.adaptation.auto_recipe import VARIANTS, propose_recipes
from overfly.adaptation.inputs import with_statistics
from overfly.data.check import TURNS, better_turn
from overfly.data.folder import Folder
from overfly.recipe import Recipe
from overfly.training.engine import TrainerConfig, launch_fabric

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LONG = 1e6
"""Time budget in seconds, for steps that are set."""
STREET = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
DUBAI = {
    "building": [60, 16, 152], "land": [132, 41, 246], "road": [110, 193, 228], "vegetation": [254, 221, 58],
    "water": [226, 169, 41],
}  # fmt: skip


def folder(data: Path, name: str, title: str, splits: dict[str, str], classes: str) -> dict[str, Any]:
    """A domain of images and index masks."""
    return {
        "name": "folder", "root": str(data / name), "title": title, "images": "{split}/images",
        "masks": "{split}/masks", "splits": splits, "label_format": "index", "classes": classes.split(),
    }  # fmt: skip


def turned_back(data: Path, out: Path) -> Path:
    """Copy `carrotweed`, whose carrot images are stored turned against their masks, with the masks turned alike.

    `overfly data check` reports them. A mask is turned if its image calls for it, and all of a folder if nearly all do.
    """
    copy = out / "carrotweed"
    for folder_path in sorted((data / "carrotweed").glob("*/masks")) if not copy.is_dir() else ():
        files = sorted(folder_path.glob("*.png"))
        images = [next((folder_path.parent / "images").glob(f"{file.stem}.*")) for file in files]
        masks = [np.asarray(Image.open(file)) for file in files]
        turns = [better_turn(np.asarray(Image.open(image)), mask) for image, mask in zip(images, masks, strict=True)]
        common = max(set(turns), key=turns.count)
        if turns.count(common) > 0.9 * len(turns):
            turns = [common] * len(turns)
        for file, image, mask, turn in zip(files, images, masks, turns, strict=True):
            for path in (file, image):
                (copy / path.relative_to(data / "carrotweed")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, copy / image.relative_to(data / "carrotweed"))
            Image.fromarray(TURNS[turn](mask) if turn else mask).save(copy / file.relative_to(data / "carrotweed"))
    return out


def dubai(data: Path, title: str, tiles: str) -> dict[str, Any]:
    """Tiles of Dubai; neighbors are in one split."""
    return {
        "name": "folder", "root": str(data / "dubai"), "title": title, "images": f"Tile [{tiles}]/images/*.jpg",
        "masks": f"Tile [{tiles}]/masks/*.png", "splits": {"train": "*_00[1-6]", "val": "*_00[7-9]"},
        "label_format": "rgb", "classes": DUBAI, "unknown": "ignore",
    }  # fmt: skip


def domains(data: Path, out: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Source and target of every direction."""
    pairs = {}
    for name, titles, classes in (
        ("camvid", ("Day", "Dusk"), STREET), ("roads", ("Gray", "Green"), "background road"),
        ("carrotweed", ("Carrots", "CWFID"), "soil weed crop"),
    ):  # fmt: skip
        splits = ({"train": "source", "val": "source_test"}, {"train": "target", "val": "target_test"})
        root = turned_back(data, out / "data") if name == "carrotweed" else data
        pairs[name] = [folder(root, name, *entry, classes) for entry in zip(titles, splits, strict=True)]
    pairs["dubai"] = [dubai(data, "City", "48"), dubai(data, "Coast", "1356")]
    pairs["synthetic"] = [{"name": "synthetic", "scene": scene} for scene in ("urban", "rural")]
    return {
        f"{name}-{(first.get('title') or first['scene']).lower()}": (first, second)
        for name, both in pairs.items()
        for first, second in (both, both[::-1])
    }


def recipes(values: tuple[dict[str, Any], dict[str, Any]], fabric: Fabric, *settings: str) -> list[Recipe]:
    """The recipes that `overfly adapt` proposes for a source and a target, with the steps of ``settings``."""
    both = Recipe.model_validate(dict(zip(("source", "target"), values, strict=True)))
    source, target = (
        with_statistics(domain) if isinstance(domain, Folder) else domain
        for domain in (both.domain("source"), both.domain("target"))
    )
    return propose_recipes(source, target, VARIANTS, settings, checkpoint=None, budget=LONG, fabric=fabric)


def command_line(description: str, out: Path, pairs: str, **options: str) -> tuple[Any, list[str], Any, Fabric]:
    """Parse DATA, --pairs, --seeds, --out and ``options`` with their defaults.

    Returns the arguments, with pairs as a list; the settings of recipes; the domains of every direction; and a fabric.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=out)
    for name, default in {"pairs": pairs, **options}.items():
        parser.add_argument(f"--{name}", default=default)
    given, settings = parser.parse_known_args()
    directions = domains(given.data.resolve(), given.out.resolve())
    given.pairs = given.pairs.split(",") if given.pairs else list(directions)
    recipe = Recipe.model_validate({"source": directions[given.pairs[0]][0]})
    return given, settings, directions, launch_fabric(recipe, TrainerConfig())


def main() -> None:
    """Run the command line."""
    variants = "equal,source,plain"
    arguments, settings, pairs, fabric = command_line(
        __doc__ or "", Path("runs/pairs"), "", seeds="0", variants=variants
    )
    for seed in map(int, arguments.seeds.split(",")):
        for name in arguments.pairs:
            proposed = recipes(pairs[name], fabric, f"seed={seed}", *settings)
            every = dict(zip(("equal", "source", "plain"), proposed, strict=True))
            chosen = [every[variant] for variant in arguments.variants.split(",")]
            print(name, seed, overfly.adapt(*chosen, out=arguments.out, estimate=False).selection.summary, flush=True)


if __name__ == "__main__":
    main()
