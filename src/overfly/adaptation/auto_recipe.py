"""Recipes for two image folders, or a trained network and one folder, that fit a time budget on this machine."""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from overfly.adaptation.inputs import ImageInputs, input_domain
from overfly.adaptation.selection import resolve_checkpoint
from overfly.core.atomic_files import json_sha256, read_json, write_json
from overfly.core.errors import RecipeError
from overfly.core.optimizers import AdamW, Poly
from overfly.core.progress import print_status
from overfly.core.settings import parse_budget
from overfly.data.domain import Domain, check_masks, has_fixed_top, shortest_sides
from overfly.data.folder import read_classes
from overfly.methods.method import Method
from overfly.methods.multiscale_self_training import ILLUMINATION, MultiscaleSelfTraining
from overfly.methods.source_free import SourceFree
from overfly.methods.source_only import SourceOnly
from overfly.models.network import build
from overfly.models.segmenter import Segmenter
from overfly.ops.color import ColorJitter
from overfly.ops.geometry import Dihedral, HorizontalFlip, ScaleJitter
from overfly.recipe import Model, Recipe, Validation, load
from overfly.training.engine import TrainerConfig, choose_arithmetic, launch_fabric, plain_step, run_on_rank_zero
from overfly.training.setup import prepare_training
from overfly.training.train_recipe import resolve_start

if TYPE_CHECKING:
    from lightning_fabric import Fabric

DEFAULT_BUDGET = "30m"
CROPS = {"cpu": 256, "cuda": 512, "mps": 384}
"""Largest crop by device type, in pixels."""
MIN_CROP = 128
"""Smallest crop that is tried where the budget is short for a larger one."""
BATCHES = {"cpu": 4, "cuda": 8, "mps": 4}
"""Images of each domain per step, by device type."""
MIN_STEPS, MAX_STEPS = 100, 40_000
"""Bounds for the steps of each training: fewer are too few to adapt from, more gain little."""
MIN_STEPS_OF_SEVERAL = 150
"""With fewer steps for each of several variants, fewer are trained."""
TIMING_SECONDS = 3.0
"""Time after which no further step is timed."""
BUDGET_SHARES = {
    1: {"source": 0.42, "adapted": 0.34}, 2: {"source": 0.32, "adapted": 0.22}, 3: {"source": 0.26, "adapted": 0.17},
}  # fmt: skip
"""Shares of the budget for source only and for each of one to three adaptations; the rest is for the comparison."""
VALIDATIONS, PATIENCE = 5, 2
"""Validations of source only, and those without a new best after which it stops."""
MODEL = "lraspp_mobilenet_v2"  # the real-time network whose ImageNet weights can be had everywhere
LEARNING_RATE, PRETRAINED_RATE = 1e-3, 1.5e-4
"""Of adaptations from random and from ImageNet weights; source only has twice the rate, other networks half of it."""
VARIANTS = (
    MultiscaleSelfTraining(), MultiscaleSelfTraining(reference="source"),
    MultiscaleSelfTraining(mix_share=0.0, strong_augment=ILLUMINATION),
)  # fmt: skip
"""Class shares corrected towards equal and the source's, and without pasted source classes: each is the best of them
on some pair, by up to 20 points (docs/results/choice.md)."""


def choose_crop(domains: list[Domain], device: torch.device) -> int:
    """Choose the crop by device and median image size: a multiple of 32, at least 64."""
    sides = [side for domain in domains for side in shortest_sides(domain)]
    median = sorted(sides)[len(sides) // 2] if sides else CROPS[device.type]
    return max(64, min(CROPS.get(device.type, 256), median) // 32 * 32)


def propose_recipes(
    source: Domain | None, target: Domain, methods: Sequence[Method[Any]], overrides: Sequence[str], *,
    checkpoint: Path | None, budget: float, fabric: "Fabric", out: Path | None = None, crop: int | None = None,
) -> list[Recipe]:  # fmt: skip
    """Propose recipes whose trainings fit a time budget, seconds in all, on this machine.

    The source, labeled images, is None if only a network is given. ``methods`` are one to three variants; if the budget
    is short, only the first ones are taken. Steps set by an override are kept. ``checkpoint`` is the run or weights to
    start from; None: a source-only network is trained first. The fabric is launched; steps are timed on its device.
    Proposed steps are stored in the folder ``out``, so that later calls give the same recipes; None: not stored.
    ``crop`` is the largest crop in pixels, smaller if the budget is short for it; None: `choose_crop`.

    Raises `RecipeError`: the budget is too short, or a setting is unknown.
    """
    crop = crop or choose_crop([domain for domain in (source, target) if domain is not None], fabric.device)
    upright = source is not None and has_fixed_top(source)
    shared: dict[str, Any] = {
        "source": source, "target": target, "crop": crop, "window": crop, "batch": BATCHES.get(fabric.device.type, 4),
        "precision": "auto",
        "augment": (HorizontalFlip() if upright else Dihedral(), ScaleJitter(), ColorJitter()), "clip": 10.0,
    }  # fmt: skip
    if upright:
        turned = MultiscaleSelfTraining
        methods = [each.model_copy(update={"turns": False}) if isinstance(each, turned) else each for each in methods]
    if checkpoint is not None and not checkpoint.is_dir():  # the recipe of a run gives its model
        shared["model"] = Segmenter.load(checkpoint).architecture
    start: Recipe | Path | None = checkpoint
    if source is not None and checkpoint is None:
        own = (entry for entry in overrides if re.match(r"model\b", entry))
        start = load(Recipe(**shared, model=MODEL, method=SourceOnly()), *own)
        start = start.model_copy(update={"optim": _optimizer(start.model, 2.0)})
    optim = _optimizer(start.model) if isinstance(start, Recipe) else AdamW(lr=LEARNING_RATE / 2)
    recipes = [load(Recipe(**shared, start=start, method=method, optim=optim), *overrides) for method in methods]
    recipes = [recipe for index, recipe in enumerate(recipes) if recipe not in recipes[:index]]
    try:
        steps = _propose_steps(recipes, budget, fabric, out)
    except RecipeError:
        smaller = int(crop * 0.75) // 32 * 32
        if smaller < MIN_CROP or recipes[0].crop != crop:
            raise
        with suppress(RecipeError):  # the advice of the largest crop is the best
            return propose_recipes(
                source, target, methods, overrides,
                checkpoint=checkpoint, budget=budget, fabric=fabric, out=out, crop=smaller,
            )  # fmt: skip
        raise
    return [_with_steps(recipe, steps, overrides) for recipe in recipes[: steps["variants"]]]


def _optimizer(model: Model, factor: float = 1.0) -> AdamW:
    """Return the optimizer of an adaptation with ``factor`` times its rate, which is lower for pretrained weights."""
    pretrained = model.weights not in (None, "imagenet") or (
        model.weights and (model.checkpoint or build(model.name).imagenet)
    )
    return AdamW(lr=PRETRAINED_RATE * factor, head=10.0) if pretrained else AdamW(lr=LEARNING_RATE * factor)


def _with_steps(recipe: Recipe, steps: Mapping[str, int], overrides: Sequence[str]) -> Recipe:
    """Set the steps of a recipe, and what depends on them: warm-up, ramp, and the memory of the teacher's average."""
    images = len(recipe.source.items("train")) if recipe.epochs and recipe.source is not None else 0
    count = recipe.length(images) if recipe.steps or recipe.epochs else steps["adapted"]
    method, start = recipe.method, recipe.start
    if isinstance(method, MultiscaleSelfTraining):
        ema = max(0.5, min(method.ema, 1 - 6 / count))  # a sixth of the steps: the teacher must leave its start
        method = method.model_copy(update={"ramp_steps": max(1, count // 3), "ema": ema})
    if isinstance(start, Recipe) and not (start.steps or start.epochs):
        every = max(MIN_STEPS // 2, steps["source"] // VALIDATIONS)
        validation = start.validation if start.validation.every else Validation(every=every, patience=PATIENCE)
        start = start.model_copy(update={"steps": steps["source"], "validation": validation})
    length = {} if recipe.steps or recipe.epochs else {"steps": count}
    schedule = Poly(power=1.0, warmup=max(1, count // 10))
    update = {"start": start, "schedule": schedule, "method": method, **length}
    return load(recipe.model_copy(update=update), *overrides)


def _propose_steps(recipes: Sequence[Recipe], budget: float, fabric: "Fabric", out: Path | None) -> dict[str, int]:
    """Return number of variants and steps of each training, stored for these recipes and budget or timed now."""
    key = json_sha256([[recipe.model_dump(mode="json") for recipe in recipes], budget, fabric.device.type])
    file = out and out / f".adapt-{key[:16]}.json"
    with suppress(OSError, ValueError, KeyError):
        if file is not None:
            stored = read_json(file)
            return {"variants": int(stored.pop("variants")), **{name: int(value) for name, value in stored.items()}}
    start, variants, times = recipes[0].start, len(recipes), {}
    if isinstance(start, Recipe) and not (start.steps or start.epochs):
        times["source"] = time_step(start, fabric)
    if not (recipes[0].steps or recipes[0].epochs):
        times["adapted"] = max(time_step(recipe, fabric) for recipe in recipes)
    enough = MIN_STEPS_OF_SEVERAL
    while variants > 1 and _fitting_steps(budget, times, variants).get("adapted", enough) < enough:
        variants -= 1
    steps = _fitting_steps(budget, times, variants)
    if steps and min(steps.values()) < MIN_STEPS:
        raise RecipeError(_budget_message(budget, times, steps, variants, recipes[0]))
    steps = {"variants": variants, **steps}
    if times and file is not None and fabric.is_global_zero:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, steps)
    return steps


def _fitting_steps(budget: float, times: Mapping[str, float], variants: int) -> dict[str, int]:
    """Compute the steps of each training that fit a budget, from seconds per step."""
    shares = BUDGET_SHARES[variants]
    return {name: min(MAX_STEPS, int(shares[name] * budget / seconds)) for name, seconds in times.items()}


def _budget_message(
    budget: float, times: Mapping[str, float], steps: Mapping[str, int], variants: int, recipe: Recipe
) -> str:
    """Format the error for a short budget, with a sufficient budget, crop or network."""
    names = {"source": "source-only", "adapted": "adapted"}
    fitting = " and ".join(f"{count} {names[name]} steps" for name, count in steps.items())
    needed = max(MIN_STEPS * seconds / BUDGET_SHARES[variants][name] for name, seconds in times.items())
    advice = [f"--budget {int(needed / 60) + 1}m"]
    crop = int(recipe.crop * (min(steps.values()) / MIN_STEPS) ** 0.5) // 32 * 32
    if crop >= 64:
        advice.append(f"crop={crop} window={crop}")
    return (
        f"--budget of {budget:g} s is too short: it fits {fitting} on this machine, and each training needs at least "
        f"{MIN_STEPS}; use {', or '.join(advice)}"
    )


def time_step(recipe: Recipe, fabric: "Fabric", repeats: int = 3) -> float:
    """Measure the median seconds of a training step in the recipe's precision, after one step of warm-up."""
    start = resolve_start(recipe.start) if isinstance(recipe.start, Path) else None
    setup = prepare_training(recipe, fabric, TrainerConfig(quiet=True), start)
    device = fabric.device
    arithmetic = run_on_rank_zero(fabric, lambda: choose_arithmetic(recipe, device, fabric.world_size, start=start))
    step = plain_step(recipe.method, setup.nets, arithmetic, device)
    seconds: list[float] = []
    for number in range(repeats + 1):
        started = time.monotonic()
        batch = setup.batches[number]
        if isinstance(batch, Exception):
            raise batch
        read = time.monotonic()
        step(fabric.to_device(batch))
        seconds.append(max(time.monotonic() - read, read - started))  # a thread reads ahead
        if number and sum(seconds) > TIMING_SECONDS:
            break
    return sorted(seconds[1:])[len(seconds[1:]) // 2]


def folder_recipes(
    inputs: ImageInputs, budget: str | None, config: TrainerConfig, overrides: Sequence[str] = (),
    out: Path | None = None,
) -> list[Recipe]:  # fmt: skip
    """Recipes for two image folders, or for a trained network and one folder; see `propose_recipes`.

    The budget is a time such as 10m; None: `DEFAULT_BUDGET`. Raises `OverflyError`: an option is missing, a folder
    cannot be read, or the budget is too short.
    """
    inputs.check()
    budget = budget or DEFAULT_BUDGET
    seconds = parse_budget(budget)
    checkpoint = None if inputs.checkpoint is None else resolve_checkpoint(inputs.checkpoint)
    if checkpoint is None:
        settings = {} if inputs.classes is None else read_classes(inputs.classes)
    else:
        network = Segmenter.load(resolve_start(checkpoint))
        settings = {"classes": network.classes, "bands": network.bands, "max_value": network.max_value}
    print_status("reading images", quiet=config.quiet)
    source = input_domain("source", inputs, settings) if inputs.source_images is not None else None
    if source is not None:
        check_masks(source, ["train"])  # before a few are read, to name the unknown values of all
        settings = {**settings, "classes": source.classes, "bands": source.bands}
    target = input_domain("target", inputs, settings)
    methods: Sequence[Method[Any]] = VARIANTS if source is not None else (SourceFree(),)
    method: Method[Any] = SourceOnly() if source is not None else methods[0]
    fabric = launch_fabric(Recipe(target=target, start=checkpoint, source=source, method=method), config)
    quiet = config.quiet or not fabric.is_global_zero
    print_status("timing training steps", quiet=quiet)
    recipes = propose_recipes(
        source, target, methods, overrides, checkpoint=checkpoint, budget=seconds, fabric=fabric, out=out
    )
    trainings = [recipe for recipe in (recipes[0].start, *recipes) if isinstance(recipe, Recipe)]
    lengths = ", ".join(
        f"{recipe.epochs:g} epochs" if recipe.epochs else f"{recipe.steps} steps" for recipe in trainings
    )
    print_status(f"trainings in {budget}: {lengths}", quiet=quiet)
    return recipes
