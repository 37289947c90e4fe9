"""What overfly does, as functions. The command line is made of these, their arguments and their docstrings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from torch import nn

from overfly import benchmarking as benchmarks
from overfly.adaptation import auto_recipe as proposal
from overfly.adaptation import model_selection as choice
from overfly.adaptation import pipeline as adaptation
from overfly.adaptation.gate import Gate
from overfly.commands.arguments import (
    LARGEST,
    Cache,
    More,
    Written,
    cache_of,
    changed,
    check_bounds,
    domain_of,
    is_setting,
    pathlike,
    recipes_and_settings,
    seeds_of,
)  # fmt: skip
from overfly.commands.catalog import Catalog, catalog
from overfly.commands.data import data_check, data_fetch, data_stats, data_synthesize
from overfly.commands.export import export, hub_load, hub_push
from overfly.commands.load_predictor import resolve_start
from overfly.commands.predict import predict
from overfly.commands.report import report
from overfly.commands.results import Adapted, Evaluation, Measured, Ranked, Tabulated, Trained
from overfly.commands.serve import serve
from overfly.commands.watch import data_fly, watch
from overfly.core import device as machines
from overfly.core.errors import DataError, RecipeError
from overfly.data.domain import Split
from overfly.evaluation.label_free_metrics import DEFAULT_VALIDATORS
from overfly.evaluation.samples import Samples
from overfly.evaluation.speed import measure_speed
from overfly.models.registry import build
from overfly.recipe import load
from overfly.reporting.run_samples import draw, samples_folder
from overfly.training.engine import Engine, launch, on_main
from overfly.training.evaluate import assess, labeled, roles
from overfly.training.run import Run
from overfly.training.train_recipe import carry_out

__all__ = [
    "adapt",
    "benchmark",
    "data_check",
    "data_fetch",
    "data_fly",
    "data_stats",
    "data_synthesize",
    "evaluate",
    "export",
    "hub_load",
    "hub_push",
    "list_kinds",
    "predict",
    "rank",
    "report",
    "serve",
    "speed",
    "train",
    "watch",
]


@pathlike
def train(
    recipe: Written,
    *overrides: str,
    out: Path = Path("runs"),
    device: str = "auto",
    devices: int = 1,
    workers: int = 0,
    checkpoint_every: int = 200,
    journal_every: int = 10,
    cache: Cache = "memory",
    track: bool = False,
    quiet: bool = False,
) -> Trained:
    """Train a network by a recipe, or go on with a run that was cut off.

    Args:
        recipe: a recipe file, or the folder of a run.
        overrides: settings to change, such as optim.lr=0.005 or source.root=/data/loveda.
        out: folder that the run's own folder is made in.
        device: auto, cpu, cuda, cuda:1 or mps.
        devices: how many of them, one process each.
        workers: processes that read pictures, for each device; 0 reads between the steps.
        checkpoint_every: steps between two checkpoints; a run that is cut off goes on from the last.
        journal_every: steps that one line of the journal averages.
        cache: where decoded pictures are kept: memory, disk or off.
        track: write TensorBoard curves too (extra: track).
        quiet: print no progress.

    Returns:
        The run's folder.
    """
    if isinstance(recipe, Path | str) and (Path(recipe) / "recipe.yaml").is_file() and not overrides:
        out = Path(recipe)
    value = load(recipe, *overrides)
    engine = Engine(
        device, devices, workers, checkpoint_every, journal_every, cache_of(cache), track=track, quiet=quiet
    )
    return Trained(carry_out(value, out, launch(value, engine), engine).path)


@pathlike
def adapt(
    recipe: Written | None = None,
    *overrides: More,
    images_a: Path | None = None,
    masks_a: Path | None = None,
    images_b: Path | None = None,
    classes: Path | None = None,
    start: Annotated[Path | None, Parameter(name=["--from"])] = None,
    budget: str | None = None,
    estimate: bool = True,
    same_classes: bool = False,
    out: Path = Path("runs"),
    device: str = "auto",
    devices: int = 1,
    workers: int = 0,
    checkpoint_every: int = 200,
    cache: Cache = "memory",
    quiet: bool = False,
) -> Adapted:
    """Adapt to images without labels, and say whether the result is better than what it began from.

    Networks are looked at without target labels: source only, recalibrated and adapted; the recommended one is kept as
    best.safetensors. Give a recipe, or several with the same start to choose among; or your own folders, A with masks
    and B without; or, where A's imagery cannot leave its owner, a trained run (--from) and B.

    Args:
        recipe: a recipe file whose method adapts.
        overrides: more recipe files, and settings to change in all, such as method.ema=0.999.
        images_a: folder or pattern of the labeled images.
        masks_a: folder or pattern of their masks.
        images_b: folder or pattern of the images to adapt to.
        classes: YAML file of the classes: names, or names and their colors; or settings of a folder domain.
        start: run or weights to adapt, without its source's images; of a run that was refused, the recommended network.
        budget: time for own folders, such as 90s, 10m or 2h; left out, 30m. The same command again goes on.
        estimate: estimate each network's mIoU on the target too, with an interval; about as long again as the verdict.
        same_classes: you have looked at B, and it shows A's classes: unfamiliar pictures are no reason to refuse.
        out: folder of the runs.
        device: auto, cpu, cuda, cuda:1 or mps.
        devices: how many of them, one process each.
        workers: processes that read pictures, for each device.
        checkpoint_every: steps between two checkpoints.
        cache: where decoded pictures are kept: memory, disk or off.
        quiet: print no progress.

    Returns:
        The verdict, and where the recommended network lies.
    """
    engine = Engine(device, devices, workers, checkpoint_every, cache=cache_of(cache), quiet=quiet)
    own = proposal.Own(images_a, masks_a, images_b, classes, start and resolve_start(start))
    written, settings = recipes_and_settings([*([] if recipe is None else [recipe]), *overrides])
    if written and own != proposal.Own():
        raise RecipeError("adapt takes a recipe or folders of your own, not both; leave one of them out")
    if written and budget is not None:
        raise RecipeError(f"--budget {budget} is for folders of your own; a recipe says its length, so set steps=…")
    values = [load(each, *settings) for each in written] or proposal.of_folders(own, budget, engine, settings, out)
    run, selection = adaptation.adapt(
        *values, out=out, fabric=launch(values[0], engine), engine=engine, estimates=estimate,
        gate=Gate(familiar=0.0) if same_classes else None,
    )  # fmt: skip
    return Adapted(run.path, selection)


def evaluate(
    run: Path | str,
    *overrides: str,
    domain: str = "both",
    split: Split = "val",
    window: int | None = None,
    overlap: float = 0.25,
    device: str = "auto",
    workers: int = 0,
    pictures: bool = True,
) -> Evaluation:
    """Score a run on labeled pictures: IoU of each class, boundaries, calibration; and draw what it sees.

    Args:
        run: the folder of a finished run.
        overrides: settings of the domain to change, such as root=/data/loveda.
        domain: source, target or both of the run's recipe; or the file or name of another domain.
        split: train, val or test.
        window: side of overlapping windows in pixels; 0: whole pictures; left out: as the recipe says.
        overlap: share of a window that the next one covers again.
        device: auto, cpu, cuda, cuda:1 or mps.
        workers: threads that read ahead.
        pictures: draw panels and confusion matrices into the run's folder samples.

    Returns:
        Scores by domain and split, as they are written to scores.json.
    """
    opened = Run.open(run)
    named = domain in ("source", "target", "both")
    chosen = roles(opened, domain) if named else [(domain, domain_of(domain))]
    places = [(key if named else place.title, changed(place, overrides)) for key, place in chosen]
    told = [f"{key} has no labels in {split}, and is left out" for key, place in places if not labeled(place, split)]
    if len(told) == len(places):
        names = " and ".join(key for key, _ in places)
        raise DataError(f"{names}: no picture of {split} has a label; nothing to score")
    if pictures:
        samples_folder(opened)
    scores, drawn = {}, []
    for key, place in places:
        if not labeled(place, split):
            continue
        samples = Samples() if pictures else None
        scores[f"{key}/{split}"] = assess(
            opened, place, key, split,
            device=machines.select_device(device), window=window, overlap=overlap, samples=samples, workers=workers,
        )  # fmt: skip
        if samples is not None:
            drawn += draw(opened, f"{key}-{split}", place, scores[f"{key}/{split}"], samples)
    return Evaluation(opened.path, scores, list(dict.fromkeys(drawn)), told)


@pathlike
def benchmark(
    recipes: list[str],
    *,
    seeds: str = "3",
    out: Path = Path("runs"),
    table: Path | None = None,
    split: Split = "val",
    size: int = 512,
    device: str = "auto",
    devices: int = 1,
    workers: int = 0,
    checkpoint_every: int = 200,
    cache: Cache = "memory",
    quiet: bool = False,
) -> Tabulated:
    """Train recipes with several seeds, score them on both domains and write one table.

    What is trained and scored already is not done again; what was cut off goes on.

    Args:
        recipes: recipe files, folders of them, and settings to change in all of them, such as source.root=/data/loveda.
        seeds: how many, from 0; or which, such as 0,1,5.
        out: folder of the runs.
        table: folder for table.md and table.json; left out, that of the runs.
        split: the split that is scored.
        size: side of the image that size and speed of the networks are given for.
        device: auto, cpu, cuda, cuda:1 or mps.
        devices: how many of them, one process each.
        workers: processes that read pictures.
        checkpoint_every: steps between two checkpoints.
        cache: where decoded pictures are kept: memory, disk or off.
        quiet: print no progress.

    Returns:
        The table.
    """
    overrides = [entry for entry in recipes if is_setting(entry)]
    files = benchmarks.expand([entry for entry in recipes if entry not in overrides])
    if not files:
        raise RecipeError("benchmark needs at least one recipe; give YAML files or a folder of them")
    numbers = seeds_of(seeds)
    if not 8 <= size <= LARGEST:
        raise RecipeError(f"--size {size} is no size of an image; take 8 to {LARGEST}")
    folder = table or out
    if any(place.exists() and not place.is_dir() for place in (out, folder)):
        raise RecipeError(f"{folder} is a file; give a folder to write to")
    engine = Engine(device, devices, workers, checkpoint_every, cache=cache_of(cache), quiet=quiet)
    fabric = launch(load(files[0], *overrides), engine)
    done = benchmarks.study(
        files, overrides, numbers, out=out, fabric=fabric, engine=engine, split=split, draw=draw, workers=workers
    )
    place = str(fabric.device)
    found = on_main(
        fabric, lambda: benchmarks.tabulate(done, numbers, split, size=size, device=place, changed=overrides)
    )
    on_main(fabric, lambda: benchmarks.write(found, folder))
    return Tabulated(found, folder)


def speed(
    network: str,
    *,
    size: int = 512,
    batch: list[int] | None = None,
    classes: int = 7,
    bands: int = 3,
    device: str = "auto",
    threads: int | None = None,
    precision: Literal["32", "bf16", "16"] = "32",
    warmup: int = 10,
    repeats: int = 50,
    macs_of_batch: int | None = None,
    json: bool = False,
) -> Measured:
    """Measure a network: parameters, multiply-accumulates of one image, latency, images/s, memory.

    Heads that only training reads are off. Times are synchronized and taken after a warm-up.

    Args:
        network: the name of a network, or the folder of a run.
        size: side of the image in pixels.
        batch: size of the batches to time, 1 where none is given; may be repeated: --batch 1 --batch 8.
        classes: classes of a network given by name.
        bands: bands of a network given by name.
        device: auto, cpu, cuda, cuda:1 or mps.
        threads: threads of the processor.
        precision: 32, or mixed with bf16 or 16.
        warmup: passes before the clock starts.
        repeats: passes that are timed.
        macs_of_batch: count a batch of this size too.
        json: print JSON instead of a table.

    Returns:
        Size and speed, and how they were measured.
    """
    check_bounds(
        {"size": (size, 1, LARGEST), "classes": (classes, 1, 254), "bands": (bands, 1, 1000)}
        | {"warmup": (warmup, 0, 10**6), "threads": (threads or 1, 1, 8 * (os.cpu_count() or 1))}
        | {"macs-of-batch": (1 if macs_of_batch is None else macs_of_batch, 1, 10**6)}
    )
    if Path(network).is_dir():
        trained = Run.open(network).segmenter()
        name, bands = trained.architecture, trained.bands
        module: nn.Module = trained
    else:
        name = network
        module = build(network, classes, training_heads=True, bands=bands)
    found = measure_speed(
        module,
        size=size,
        batches=batch or [1],
        bands=bands,
        device=machines.select_device(device),
        warmup=warmup,
        repeats=repeats,
        threads=threads,
        precision=precision,
        macs_of_batch=[macs_of_batch] if macs_of_batch else [],
    )
    return Measured(name, found, as_json=json)


@pathlike
def rank(
    runs: list[str],
    *,
    study: bool = False,
    estimate: bool = False,
    committee: list[str] | None = None,
    reference: str | None = None,
    split: Split = "train",
    limit: int = 24,
    crop: int = 512,
    device: str = "auto",
    out: Path | None = None,
    json: bool = False,
) -> Ranked:
    """Rank runs and their kept checkpoints without target labels; on request, study how well that works with them.

    Args:
        runs: folders of finished runs of one target, or folders of such; validation.keep_all keeps their checkpoints.
        study: open the target's labels in val: each validator's rank correlation with the truth, and its regret.
        estimate: estimate each network's target mIoU too, with an interval made on shifted source pictures.
        committee: a validator that votes by its ranks; may be repeated: --committee consensus --committee masked_miou;
            left out: consensus, masked_miou, views_miou and source_miou.
        reference: a run, such as source-only, whose predictions all are compared with (agreement).
        split: target pictures that are looked at, labels taken away.
        limit: how many of them, evenly spread.
        crop: longest side that is cut from their middle, in pixels.
        device: auto, cpu, cuda, cuda:1 or mps.
        out: folder for validators.json.
        json: print JSON instead of tables.

    Returns:
        Every candidate's figures, and who is chosen.
    """
    check_bounds({"limit": (limit, 1, 10**6), "crop": (crop, 16, LARGEST)})
    ranking = choice.rank(
        choice.gather(runs),
        members=committee or DEFAULT_VALIDATORS,
        reference=Run.open(reference) if reference is not None else None,
        estimates=estimate,
        study=study,
        sight=choice.TargetImages(split, limit, crop, machines.select_device(device)),
    )
    return Ranked(ranking, choice.write(ranking, out) if out is not None else None, as_json=json)


def list_kinds() -> Catalog:
    """List everything a recipe can name: networks, weights, domains, methods, losses, optimizers, augmentations."""
    return catalog()
