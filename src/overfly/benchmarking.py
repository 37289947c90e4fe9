"""Train and score recipes with several seeds, and tabulate mean ± standard deviation; plan what would be trained."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from overfly.core.atomic_files import write_text
from overfly.core.classes import Classes
from overfly.core.errors import DataError, OverflyError, RecipeError, render_text
from overfly.core.optimizers import Optim, Schedule
from overfly.core.progress import percent
from overfly.core.records import Item, UInt8
from overfly.core.spec import NonNegativeInt, Spec
from overfly.data.domain import Domain, Split, SplitError
from overfly.evaluation.score import Samples
from overfly.evaluation.scores import Scores
from overfly.evaluation.speed import Speed, measure_speed
from overfly.recipe import Recipe, load
from overfly.training.engine import TrainerConfig, run_on_rank_zero
from overfly.training.evaluate import evaluate_domain, has_labels, stored_scores
from overfly.training.run import Run
from overfly.training.train_recipe import train_recipe

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TEMPLATE = Path(__file__).with_name("benchmark.md.jinja")
SaveSamples = Callable[[Run, str, Domain, Scores, Samples], object]
"""Saves sample images: run, name, domain, scores, and a few images with predictions."""


class SeedStatistics(Spec):
    """A quantity over seeds."""

    mean: float | None
    """Mean over the seeds with a value; none if no seed has one."""
    deviation: float | None
    """Standard deviation over the seeds (n - 1); none for a single value."""
    values: tuple[float | None, ...]
    """One value per seed."""

    @classmethod
    def from_values(cls, values: Sequence[float | None]) -> "SeedStatistics":
        """Mean and standard deviation of the values that are not None."""
        present = [value for value in values if value is not None]
        return cls(
            mean=statistics.fmean(present) if present else None,
            deviation=statistics.stdev(present) if len(present) > 1 else None,
            values=tuple(values),
        )

    def percent(self) -> str:
        """In percent, such as ``57.31 ± 0.42``."""
        return percent(self.mean) + ("" if self.deviation is None else f" ± {percent(self.deviation)}")


class BenchmarkRow(Spec):
    """One recipe over all its seeds."""

    recipe: str
    """Name of the recipe file without its suffix."""
    version: NonNegativeInt
    """Index of the row among those of its network, from 0."""
    model: str
    """Network."""
    method: str
    """Method."""
    augmentation: str
    """Names of the augmentations."""
    source: str
    """Title of the source."""
    batch: int
    """Images in a batch."""
    criterion: str
    """Supervised loss."""
    optimizer: str
    """Optimizer with its settings."""
    scheduler: str
    """Learning-rate schedule with its settings."""
    length: str
    """Epochs, or steps."""
    miou: "dict[str, SeedStatistics]"
    """mIoU, 0 to 1, by the title of the domain."""
    classes: "dict[str, dict[str, SeedStatistics]]"
    """IoU of each class by the title of the domain."""
    minutes: "SeedStatistics"
    """Minutes of training."""
    runs: tuple[str, ...]
    """Folders of the runs, one per seed."""
    split: Split
    """The split that was scored."""
    labels_opened: int
    """Number of times the target's labels were read, over all seeds."""
    gap_closed: "SeedStatistics | None" = None
    """(adapted - source only) / (oracle - source only) in mIoU on the target, per seed; the oracle is trained on target
    labels. None unless the table has both baselines; of several runs the longest counts."""


class BenchmarkNetwork(Spec):
    """A network of the table."""

    name: str
    """Name of the architecture."""
    parameters_training: int
    """Parameters, including training heads."""
    speed: Speed
    """Size and speed without training heads."""


class BenchmarkTable(Spec):
    """Results of a benchmark."""

    seeds: tuple[int, ...]
    """The seeds."""
    machine: dict[str, Any] = Field(default_factory=dict)
    """Machine of the first run."""
    networks: tuple[BenchmarkNetwork, ...] = ()
    """Size and speed of each network."""
    rows: tuple[BenchmarkRow, ...] = ()
    """One row per recipe."""
    data: tuple[str, ...] = ()
    """The domains with their folders."""
    changed: tuple[str, ...] = ()
    """Overrides of all recipes."""

    def markdown(self) -> str:
        """The table as Markdown."""
        titles = list(dict.fromkeys(title for row in self.rows for title in row.miou))
        groups = [(network, [row for row in self.rows if row.model == network.name]) for network in self.networks]
        return render_text(TEMPLATE, table=self, groups=groups, titles=titles)


def expand_recipe_paths(recipes: Sequence[Path | str]) -> list[Path]:
    """Expand paths, folders and globs to recipe files without duplicates; raise `RecipeError` if none match."""
    paths: list[Path] = []
    for entry in recipes:
        path = Path(entry)
        if path.is_dir():
            files = sorted(path.glob("*.yaml"))
        elif any(mark in str(entry) for mark in "*?["):
            files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        else:
            files = [path]
        if not files:
            raise RecipeError(f"{entry} matches no recipe; give YAML files or a folder of them")
        paths += files
    return list(dict.fromkeys(paths))


def run_benchmark(
    recipes: Sequence[Path], overrides: Sequence[str], seeds: Sequence[int], *, out: Path, fabric: "Fabric",
    config: TrainerConfig, split: Split, save_samples: SaveSamples | None = None,
) -> dict[Path, list[Run]]:  # fmt: skip
    """Train and score every recipe with every seed, skipping finished runs.

    All recipes are read first, so that an error in the last one is raised before training. ``save_samples`` saves
    sample images of newly scored runs.
    """
    planned = [(path, [load(path, *overrides, f"seed={seed}") for seed in seeds]) for path in recipes]
    done: dict[Path, list[Run]] = {}
    for path, versions in planned:
        for recipe in versions:
            run = train_recipe(recipe, out, fabric, config)
            run_on_rank_zero(fabric, partial(_score, run, split, fabric, save_samples, config.workers))
            done.setdefault(path, []).append(run)
    return done


def tabulate(
    done: Mapping[Path, Sequence[Run]], seeds: Sequence[int], split: Split, *, size: int, device: str,
    changed: Sequence[str] = (),
) -> BenchmarkTable:  # fmt: skip
    """Create the table of finished and scored runs."""
    rows = benchmark_rows(done, split)
    networks = []
    for name in dict.fromkeys(row.model for row in rows):
        run = next(runs[0] for runs in done.values() if runs[0].recipe.model.architecture == name)
        segmenter = run.segmenter()
        full = segmenter.network
        speed = measure_speed(full, size=size, bands=segmenter.bands, device=device)
        parameters = sum(parameter.numel() for parameter in full.parameters())
        networks.append(BenchmarkNetwork(name=name, parameters_training=parameters, speed=speed))
    first = [runs[0] for runs in done.values()]
    domains = [domain for run in first for domain in (run.recipe.source, run.recipe.target) if domain is not None]
    folders = [f", {domain.root}" if hasattr(domain, "root") else "" for domain in domains]
    origins = [f"{domain.title} ({domain.name}{folder})" for domain, folder in zip(domains, folders, strict=True)]
    return BenchmarkTable(
        seeds=tuple(seeds), machine=first[0].machine, networks=tuple(networks), rows=tuple(rows),
        data=tuple(dict.fromkeys(origins)), changed=tuple(changed),
    )  # fmt: skip


def benchmark_rows(done: Mapping[Path, Sequence[Run]], split: Split) -> list[BenchmarkRow]:
    """The rows of a table, with the scores of finished runs and the share of the gap that each recipe closed."""
    rows: list[BenchmarkRow] = []
    for path, runs in done.items():
        row = _row(path, runs, sum(row.model == runs[0].recipe.model.architecture for row in rows), split)
        rows.append(row.model_copy(update={"gap_closed": _gap_closed(runs, done.values(), split)}))
    return rows


def write(table: BenchmarkTable, out: Path) -> None:
    """Write ``table.md`` and ``table.json``."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", table.markdown().rstrip() + "\n")
    write_text(out / "table.json", json.dumps(table.model_dump(mode="json"), indent=2) + "\n")


def _score(run: Run, split: Split, fabric: "Fabric", save_samples: SaveSamples | None, workers: int) -> None:
    for key, domain in (("source", run.recipe.source), ("target", run.recipe.target)):
        drawn = save_samples is None or (run.path / "samples" / f"{key}-{split}.png").exists()
        if domain is not None and not (drawn and stored_scores(run, key, split, domain)) and has_labels(domain, split):
            samples = Samples()
            scores = evaluate_domain(run, domain, key, split, device=fabric.device, samples=samples, workers=workers)
            if save_samples is not None:
                save_samples(run, f"{key}-{split}", domain, scores, samples)


def _row(path: Path, runs: Sequence[Run], version: int, split: Split) -> BenchmarkRow:
    recipe = runs[0].recipe
    miou: dict[str, SeedStatistics] = {}
    classes: dict[str, dict[str, SeedStatistics]] = {}
    for key, domain in (("source", recipe.source), ("target", recipe.target)):
        by_seed = [stored_scores(run, key, split, domain) for run in runs] if domain is not None else []
        if domain is None or not any(by_seed):
            continue
        title = f"{domain.title} ({key})" if domain.title in miou else domain.title
        miou[title] = SeedStatistics.from_values([scores.miou if scores else None for scores in by_seed])
        classes[title] = {
            name: SeedStatistics.from_values([scores.classes[name].iou if scores else None for scores in by_seed])
            for name in domain.classes.names
        }
    origin, epochs = recipe.start if isinstance(recipe.start, Recipe) else recipe, recipe.epochs
    origin_source = recipe.source or origin.source
    opened = [run.scores.get("labels_opened", {}).get(f"target/{split}", {}).get("times", 0) for run in runs]
    return BenchmarkRow(
        recipe=path.stem, version=version, model=recipe.model.architecture, method=recipe.method.name,
        augmentation=", ".join(entry.name for entry in recipe.augment) or "none",
        source=origin_source.title if origin_source else "none", batch=recipe.batch,
        criterion=recipe.method.criterion.name if recipe.method.needs_source else "none",
        optimizer=_settings(recipe.optim) if recipe.method.trains else "none",
        scheduler=_settings(recipe.schedule) if recipe.method.trains else "none",
        length=f"{recipe.length(0)} steps" if epochs is None else f"{epochs:g} epoch{'s' * (epochs != 1)}",
        miou=miou, classes=classes,
        minutes=SeedStatistics.from_values([float(run.machine.get("took_s") or 0) / 60 for run in runs]),
        runs=tuple(run.path.name for run in runs), split=split, labels_opened=sum(opened),
    )  # fmt: skip


def _gap_closed(runs: Sequence[Run], others: Iterable[Sequence[Run]], split: Split) -> "SeedStatistics | None":
    """Compute the share of the gap between source only and oracle closed by each seed; None without baselines."""
    baselines = [run for row in others for run in row if run.recipe.method.name == "source_only"]

    def trained_on(domain: Domain | None, like: Recipe) -> Run | None:
        same = (domain, like.model.architecture, like.seed)
        runs = [run for run in baselines if (run.recipe.source, run.recipe.model.architecture, run.recipe.seed) == same]
        return max(runs, key=lambda run: (run.recipe.epochs or 0, run.recipe.length(0)), default=None)

    closed: list[float | None] = []
    for run in runs:
        recipe, target = run.recipe, run.recipe.target
        before, oracle = trained_on(recipe.source, recipe), trained_on(target, recipe)
        if recipe.method.name == "source_only" or target is None or before is None or oracle is None:
            return None
        scores = (
            stored_scores(before, "target", split, target),
            stored_scores(run, "target", split, target),
            stored_scores(oracle, "source", split, target),
        )
        low, own, high = (value.miou if value is not None else None for value in scores)
        closed.append(None if low is None or own is None or high is None or high <= low else (own - low) / (high - low))
    return SeedStatistics.from_values(closed)


def _settings(value: Optim | Schedule) -> str:
    """Format an optimizer or schedule and main settings: ``SGD(lr: 0.01, momentum: 0.9, weight_decay: 0.0005)``."""
    always = ("lr", "momentum", "weight_decay", "power")
    fields = type(value).model_fields
    shown = {key: getattr(value, key) for key in fields if key in always or getattr(value, key) != fields[key].default}
    ordered = sorted(shown, key=lambda key: always.index(key) if key in always else len(always))
    text = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in shown.items()}
    inside = ", ".join(f"{key}: {text[key]}" for key in ordered)
    title = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "poly": "PolynomialLR"}.get(value.name, value.name)
    return f"{title}({inside})" if inside else title


class PlannedTraining(Spec):
    """The trainings of a recipe, one for each seed."""

    name: str
    """Name of the recipe file; "start of" it for the recipe under its ``start``."""
    runs: NonNegativeInt
    """Number of runs that are not finished yet."""
    done: NonNegativeInt
    """Number of finished runs."""
    steps: int | None
    """Steps of a run; none if they depend on images that are missing."""
    seconds: float | None
    """Estimated duration of the runs, from steps on generated images; none if unknown."""
    missing: tuple[str, ...] = ()
    """Missing data and weights, and where to get them."""


def plan_benchmark(
    recipes: Sequence[Path], overrides: Sequence[str], seeds: Sequence[int], *, out: Path, split: Split,
    time_step: Callable[[Recipe], float],
) -> list[PlannedTraining]:  # fmt: skip
    """Plan the trainings of a benchmark, each once; ``time_step`` measures the seconds of a step."""
    planned: dict[str, list[Recipe]] = {}
    for path, seed in product(recipes, seeds):
        recipe: Recipe | Path | None = load(path, *overrides, f"seed={seed}")
        name = path.stem
        while isinstance(recipe, Recipe):
            if not any(recipe in others for others in planned.values()):
                planned.setdefault(name, []).append(recipe)
            recipe, name = recipe.start, f"start of {name}"
    times: dict[str, float | None] = {}
    plans = []
    for name, versions in planned.items():
        first, images = versions[0], 0
        with suppress(DataError):
            images = len(first.source.items("train")) if first.epochs and first.source else 0
        steps = None if first.epochs and not images else first.length(images)
        left = sum(not any(run.finished for run in Run.find_all(out, version)) for version in versions)
        seconds = _time(first, times, time_step) if left and steps else None
        total = None if seconds is None or steps is None else seconds * steps * first.accumulate * left
        missing = tuple(dict.fromkeys(_missing(first, split)))
        done = len(versions) - left
        plans.append(PlannedTraining(name=name, runs=left, done=done, steps=steps, seconds=total, missing=missing))
    return plans


def _missing(recipe: Recipe, split: Split) -> Iterator[str]:
    """Yield what a recipe lacks: images and masks, and files of weights."""
    for domain, trains in ((recipe.source, recipe.method.needs_source), (recipe.target, recipe.method.needs_target)):
        for part in ("train" if trains else split, split):
            try:
                if domain is not None:
                    domain.items(part)
            except DataError as error:
                if part in ("train", *getattr(domain, "splits", ())) or not isinstance(error, SplitError):
                    yield str(error)
                break
    weights = recipe.model.weights or ""
    if isinstance(recipe.start, Path) and not recipe.start.exists():
        yield f"start {recipe.start} does not exist"
    if recipe.start is None and Path(weights).suffix and ":" not in weights and not Path(weights).is_file():
        yield f"weights {weights} do not exist"


def _time(recipe: Recipe, times: dict[str, float | None], time_step: Callable[[Recipe], float]) -> float | None:
    """Seconds of a step on generated images, once for recipes that differ in data alone; None if a file is missing."""
    update: dict[str, Any] = {"start": None, "labels": None, "seed": 0, "steps": 1, "epochs": None}
    update["model"] = recipe.model.model_copy(update={"weights": None})
    for role, domain in (("source", recipe.source), ("target", recipe.target)):
        if domain is not None:
            side = recipe.resize or recipe.crop
            update[role] = _Noise(classes=domain.classes, bands=domain.bands, max_value=domain.max_value, side=side)
    generated = recipe.model_copy(update=update)
    key = generated.model_dump_json(exclude={"source", "target"})
    if key not in times:
        times[key] = None
        with suppress(OverflyError):
            times[key] = time_step(generated)
    return times[key]


class _Noise(Domain):
    """Images of noise."""

    name: ClassVar[str] = "noise"
    classes: Classes
    bands: int
    max_value: float
    side: int

    def items(self, split: Split) -> Sequence[Item]:
        """Sixteen images in each split."""
        del split
        label = partial(_noise, (self.side, self.side), len(self.classes))
        shape = (self.side, self.side, self.bands)
        return [Item(str(seed), partial(_noise, shape, 255, seed), label) for seed in range(16)]


def _noise(shape: tuple[int, ...], end: int, seed: int = 0) -> UInt8:
    return np.random.default_rng(seed).integers(0, end, shape, np.uint8)
