"""A recipe for somebody's own folders: what it takes from the data, the machine and the time there is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric
from pydantic import ValidationError

from overfly.core.atomic_files import atomic_write
from overfly.core.errors import DataError, RecipeError
from overfly.core.optimizers import AdamW, Poly
from overfly.core.settings import parse_yaml, validation_message
from overfly.data.domain import Domain, Split, sample_evenly
from overfly.data.folder import Folder
from overfly.data.headers import read_header
from overfly.data.statistics import statistics
from overfly.methods.method import Method
from overfly.methods.multiscale_self_training import ILLUMINATION, MultiscaleSelfTraining
from overfly.methods.source_free import SourceFree
from overfly.methods.source_only import SourceOnly
from overfly.models.segmenter import Segmenter
from overfly.ops.color import ColorJitter
from overfly.ops.geometry import Dihedral, ScaleJitter
from overfly.recipe import Recipe, load
from overfly.training.engine import LossModule, TrainerConfig, launch_fabric
from overfly.training.setup import prepare_training
from overfly.training.train_recipe import resolve_start

BUDGET = "30m"
"""The time that there is where nobody says."""
CROPS = {"cpu": 256, "cuda": 512, "mps": 384}
"""Largest crop by the kind of device, in pixels."""
BATCHES = {"cpu": 4, "cuda": 8, "mps": 4}
"""Pictures of each domain in a step."""
LOOKED_AT = 50
"""Pictures whose sizes are read, and from which mean and standard deviation are estimated."""
FEWEST, MOST = 50, 40_000
"""Steps of one training below which nothing is learned, and above which little more is."""
KEPT_BACK: dict[Split, float] = {"train": 0.85, "val": 0.15}
"""Shares of the labeled pictures that are learned from and judged by."""
PARTS = {1: {"source": 0.45, "adapted": 0.4}, 2: {"source": 0.25, "adapted": 0.29}}
"""Shares of the time for source only and for each of one or two adaptations; the rest goes to reading, recalibration,
looking and scoring."""
OF_ONE_PLACE = ("root", "title", "images", "masks", "splits")
"""Settings of a folder that the options give each of the two places."""
RATE = 1e-3
"""Learning rate of an adaptation from the source-only training that is proposed here; half of it costs a point of mIoU
(docs/results/ablation.md). A network that somebody brings, of which nothing is known, learns at half."""
WORTH = 150
"""Steps of each of two adaptations below which the time is better spent on one."""
WAYS = (MultiscaleSelfTraining(), MultiscaleSelfTraining(mix_share=0.0, strong_augment=ILLUMINATION))
"""The two ways to adapt between folders of one's own: pasting source things in unchanged colors, and pasting nothing.
On the synthetic world each wins in one direction by 8.8 points or more and loses in the other, and labels are not
needed to tell which (docs/results/synthetic.md)."""


def seconds(budget: str) -> float:
    """The seconds that ``90s``, ``10m`` or ``2h`` means.

    Raises:
        RecipeError: it means none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", budget.strip().lower())
    if match is None or float(match[1]) == 0:
        raise RecipeError(f"--budget {budget} is no time; write it as 90s, 10m or 2h")
    return float(match[1]) * {"s": 1, "": 60, "m": 60, "h": 3600}[match[2]]


def folder(title: str, images: Path, settings: Mapping[str, Any], masks: Path | None = None) -> Folder:
    """The domain of a folder of images, with or without masks, its mean and standard deviation estimated.

    Args:
        title: what tables call it.
        images: folder or pattern.
        settings: of the domain, such as classes.
        masks: folder or pattern.

    Raises:
        OverflyError: there is nothing there, or it cannot be read.
    """
    for option, path in (("images", images), ("masks", masks)):
        if path is not None and not any(mark in str(path) for mark in "*?[") and not path.is_dir():
            raise DataError(f"{path} is no folder of {option}; give a folder, or a pattern in quotes")
    root = Path(os.path.commonpath([path.absolute() for path in (images, masks) if path is not None]))
    while any(mark in str(root) for mark in "*?["):
        root = root.parent
    root = root.parent if root == images.absolute() else root
    paths = {"images": images, "masks": masks}
    values: dict[str, Any] = {
        key: str(path.absolute().relative_to(root)) for key, path in paths.items() if path is not None
    }
    try:
        found = Folder(root=root, title=title, **{**settings, **values})
    except ValidationError as error:
        raise RecipeError(validation_message(error, f"the folder {images}")) from None
    if masks is not None:
        found = _held_back(found, images)
    if found.mean is not None:
        return found
    measured = statistics(found, "train", limit=LOOKED_AT)
    return found.model_copy(
        update={
            "mean": tuple(round(v, 3) for v in measured.mean),
            "std": tuple(round(max(v, 1e-3), 3) for v in measured.std),
        }
    )


def _held_back(place: Folder, images: Path) -> Folder:
    """A folder with pictures held back to judge by, at least one, drawn by the first seed that leaves some for both.

    Raises:
        RecipeError: there is one picture.
    """
    if len(place.items("train")) < 2:
        raise RecipeError(
            f"{images} holds one picture, and what is learned is judged by another; cut it and its mask into several"
        )
    seed = place.seed
    while True:
        found = place.model_copy(update={"seed": seed, "splits": KEPT_BACK})
        with suppress(DataError):  # a share takes none
            if found.items("train") and found.items("val"):
                return found
        seed += 1


def classes_of(file: Path) -> dict[str, Any]:
    """Settings of a folder from a file of classes: names, names with colors, or settings with ``classes`` among them.

    Raises:
        RecipeError: the file is missing or holds none of these.
    """
    if not file.is_file():
        fault = "is no file" if file.exists() else "is not there"
        raise RecipeError(f"{file} {fault}; give a YAML file of classes, such as {{building: [255, 0, 0], …}}")
    try:
        held = parse_yaml(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{file} cannot be read as YAML ({reason}); correct it and try again") from None
    if isinstance(held, list) and held:
        return {"classes": held}
    if not isinstance(held, dict) or not held:
        raise RecipeError(f"{file} holds no classes; write a list of names, or a name and its color a line")
    if "classes" not in held:
        return {"classes": held}
    if held.get("name", "folder") != "folder":
        raise RecipeError(f"{file} speaks of the domain {held['name']}, and adapt reads folders; take the name out")
    said = [str(key) for key in held if key in OF_ONE_PLACE]
    if said:
        raise RecipeError(
            f"{file} says {', '.join(said)}, and it is read for both places, each of which the options say; take that "
            "out, or write a recipe"
        )
    return {str(key): value for key, value in held.items() if key != "name"}


def crop_for(domains: list[Domain], device: torch.device) -> int:
    """Side of the crop: as large as device and pictures allow, a multiple of 32, 64 at least."""
    sides = []
    for domain in domains:
        for item in sample_evenly(list(domain.items("train")), LOOKED_AT):
            if isinstance(item.image, Path):
                size = read_header(item.image)
                sides.append(min(size.height, size.width))
    middle = sorted(sides)[len(sides) // 2] if sides else CROPS[device.type]
    return max(64, min(CROPS.get(device.type, 256), middle) // 32 * 32)


def propose(
    source: Domain | None,
    target: Domain,
    methods: Sequence[Method[Any]],
    overrides: Sequence[str],
    *,
    start: Path | None,
    budget: float,
    fabric: Fabric,
    notes: Path | None = None,
) -> list[Recipe]:
    """Recipes whose trainings all fit a time on this machine.

    Args:
        source: labeled images; None where the network alone is there.
        target: images to adapt to.
        methods: how, in one way or in two; where the time is short, in the first alone.
        overrides: settings to change; ways that they make alike are one. Steps that they set are not proposed.
        start: run or weights to begin from; without it a source-only training comes first.
        budget: seconds for everything.
        fabric: launched; a few steps of each training are timed on its device.
        notes: folder where steps are kept, so that the same proposal made again has the same; None keeps none.

    Raises:
        RecipeError: the time is too short, or a setting is unknown.
    """
    device = fabric.device
    crop = crop_for([domain for domain in (source, target) if domain is not None], device)
    augment = (Dihedral(), ScaleJitter(), ColorJitter())
    shared: dict[str, Any] = {
        "source": source, "target": target, "crop": crop, "window": crop, "batch": BATCHES.get(device.type, 4),
        "augment": augment, "clip": 10.0,
    }  # fmt: skip
    if start is not None and not start.is_dir():  # of a run its recipe tells
        shared["model"] = Segmenter.load(start).architecture
    first: Recipe | Path | None = start
    if source is not None and start is None:
        first = Recipe(**shared, model="pidnet_s", method=SourceOnly(), optim=AdamW(lr=2e-3))
    optim = AdamW(lr=RATE if isinstance(first, Recipe) else RATE / 2)
    made = [load(Recipe(**shared, start=first, method=each, optim=optim), *overrides) for each in methods]
    ways = [way for place, way in enumerate(made) if way not in made[:place]]
    steps = _kept_steps(ways, budget, fabric, notes)
    return [_lengthened(way, steps, overrides) for way in ways[: steps["ways"]]]


def _lengthened(way: Recipe, steps: Mapping[str, int], overrides: Sequence[str]) -> Recipe:
    """A recipe with its steps and what hangs on them: without a warm-up the first steps undo what was learned."""
    images = len(way.source.items("train")) if way.epochs and way.source is not None else 0
    count = way.length(images) if _given(way) else steps["adapted"]
    method = way.method
    if isinstance(method, MultiscaleSelfTraining):
        method = method.model_copy(update={"ramp_steps": max(1, count // 3)})
    schedule = Poly(power=1.0, warmup=max(1, count // 10))
    first = way.start
    if isinstance(first, Recipe) and not _given(first):
        first = first.model_copy(update={"steps": steps["source"]})
    found = way.model_copy(update={"start": first, "schedule": schedule, "method": method})
    return load(found if _given(way) else found.model_copy(update={"steps": count}), *overrides)


def _given(recipe: Recipe) -> bool:
    """Whether the length of a training was said, and is not to be proposed."""
    return bool(recipe.steps or recipe.epochs)


def _kept_steps(ways: Sequence[Recipe], budget: float, fabric: Fabric, notes: Path | None) -> dict[str, int]:
    """Steps of each training and the number of ways, as they were proposed before for the same, or timed now."""
    asked = json.dumps([[way.model_dump(mode="json") for way in ways], budget, fabric.device.type], sort_keys=True)
    file = notes and notes / f".adapt-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError):
        if file is not None:
            held = json.loads(file.read_text(encoding="utf-8"))
            return {name: int(held[name]) for name in ("ways", *(key for key in ("adapted", "source") if key in held))}
    first, count = ways[0].start, len(ways)
    times = {} if _given(ways[0]) else {"adapted": max(step_seconds(way, fabric) for way in ways)}
    if isinstance(first, Recipe) and not _given(first):
        times["source"] = step_seconds(first, fabric)
    if count > 1 and _counts(budget, times, 2).get("adapted", WORTH) < WORTH:
        count = 1
    found = {"ways": count, **_steps(budget, times, count)}
    if times and file is not None and fabric.is_global_zero:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as part:
            part.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def _counts(budget: float, times: Mapping[str, float], ways: int) -> dict[str, int]:
    """Steps of each training that fit a time, with so many adaptations."""
    return {name: min(MOST, int(PARTS[ways][name] * budget / each)) for name, each in times.items()}


def _steps(budget: float, times: Mapping[str, float], ways: int) -> dict[str, int]:
    """Steps of each training that fit a time.

    Raises:
        RecipeError: the time is too short.
    """
    steps = _counts(budget, times, ways)
    if steps and min(steps.values()) < FEWEST:
        need = max(FEWEST * each / PARTS[ways][name] for name, each in times.items())
        raise RecipeError(
            f"--budget {budget:g}s is too short for {FEWEST} steps of each training here; give "
            f"{int(need / 60) + 1}m or more"
        )
    return steps


def step_seconds(recipe: Recipe, fabric: Fabric, repeats: int = 3) -> float:
    """Seconds of one step of a recipe on this device: forward and backward, after one to warm up, the median."""
    file = None
    if isinstance(recipe.start, Path):
        file = resolve_start(recipe.start)
    setup = prepare_training(recipe, fabric, TrainerConfig(quiet=True), file)
    module = fabric.to_device(LossModule(recipe.method, setup.nets))
    module.train()
    found = []
    for number in range(repeats + 1):
        begun = time.monotonic()
        batch = setup.batches[number]
        if isinstance(batch, Exception):
            raise batch
        module.batch = fabric.to_device(batch)
        losses = module()
        if losses:
            torch.autograd.backward(torch.stack(list(losses.values())).sum())
        if fabric.device.type == "cuda":
            torch.cuda.synchronize(fabric.device)
        found.append(time.monotonic() - begun)
    return sorted(found[1:])[repeats // 2]


def classes_from(start: Path) -> dict[str, Any]:
    """The classes and bands of a trained network, as settings of a folder."""
    network = Segmenter.load(resolve_start(start))
    return {"classes": network.classes, "bands": network.bands, "max_value": network.max_value}


@dataclass(frozen=True)
class Own:
    """What somebody has: A with masks, or a network trained on it, and B."""

    images_a: Path | None = None
    """Folder or pattern of the labeled images."""
    masks_a: Path | None = None
    """Folder or pattern of their masks."""
    images_b: Path | None = None
    """Folder or pattern of the images to adapt to."""
    classes: Path | None = None
    """File of the classes."""
    start: Path | None = None
    """Run or weights, where the source's imagery is not there."""

    def see(self) -> None:
        """Refuse what does not make a whole.

        Raises:
            RecipeError: something is missing, or too much is given.
        """
        given = {name for name in ("images_a", "masks_a", "images_b", "classes", "start") if getattr(self, name)}
        if given not in ({"images_a", "masks_a", "images_b", "classes"}, {"images_b", "start"}):
            raise RecipeError(
                "adapt needs a recipe; or --source-images, --source-masks, --target-images and --classes; "
                "or --checkpoint and --target-images"
            )


def of_folders(
    own: Own, budget: str | None, config: TrainerConfig, overrides: Sequence[str] = (), out: Path | None = None
) -> list[Recipe]:
    """The recipes for two folders of one's own, or for a trained network and one folder.

    Args:
        own: the folders.
        budget: the time there is, such as 10m; None: `BUDGET`.
        config: with the device that it is for.
        overrides: settings to change in them.
        out: folder of the runs, where steps are kept for the same command again; None keeps none.

    Raises:
        OverflyError: something is missing, cannot be read, or the time is too short.
    """
    own.see()
    budget = budget or BUDGET
    there_is = seconds(budget)
    settings = classes_of(own.classes) if own.classes is not None else {}
    if own.start is not None:
        settings = classes_from(own.start)
    source = folder("A", own.images_a, settings, own.masks_a) if own.images_a is not None else None
    target = folder("B", own.images_b or Path(), settings)
    methods: Sequence[Method[Any]] = WAYS if source is not None else (SourceFree(),)
    first: Method[Any] = SourceOnly() if source is not None else methods[0]
    fabric = launch_fabric(Recipe(target=target, start=own.start, source=source, method=first), config)
    found = propose(source, target, methods, overrides, start=own.start, budget=there_is, fabric=fabric, notes=out)
    if fabric.is_global_zero and not config.quiet:
        before, each = found[0].start, _length(found[0])
        first_of_all = f"{_length(before)} of source only, then " if isinstance(before, Recipe) else ""
        then = f"{len(found)} ways to adapt of {each} each" if len(found) > 1 else f"{each} of adaptation"
        print(f"in {budget}: {first_of_all}{then}", file=sys.stderr, flush=True)
    return found


def _length(recipe: Recipe) -> str:
    return f"{recipe.epochs:g} epochs" if recipe.epochs else f"{recipe.steps} steps"
