"""The commands ``evaluate`` and ``speed``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from overfly.commands.arguments import MAX_SIDE, PathLike, check_bounds
from overfly.core.choices import Precision, Split
from overfly.core.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from torch import nn

    from overfly.evaluation.scores import Scores
    from overfly.evaluation.speed import Speed


@dataclass(frozen=True)
class EvaluateResult:
    """Scores of one run, by domain and split."""

    path: Path
    scores: Mapping[str, Scores]
    samples: Sequence[Path] = field(default_factory=list)
    notes: Sequence[str] = field(default_factory=list)

    def __rich_console__(self, *_: object) -> Iterator[str | Table]:
        yield scores_table(self.scores)
        yield from self.notes
        for path in (self.path / "scores.json", *self.samples):
            yield f"written: {path}"


def scores_table(scores: Mapping[str, Scores]) -> Table:
    """Return IoU of each class and the overall scores, one column a domain."""
    from rich.table import Column, Table

    from overfly.core.progress import percent

    columns = list(scores.values())
    headings = (Column(f"{key} ({column.images} images)", justify="right") for key, column in scores.items())
    table = Table("", *headings, title="IoU in percent", title_justify="left")
    for name in dict.fromkeys(name for column in columns for name in column.classes):
        ious = [column.classes[name].iou if name in column.classes else None for column in columns]
        table.add_row(name, *map(percent, ious))
    table.add_section()
    table.add_row("mIoU", *(percent(column.miou) for column in columns), style="bold")
    for name, value in (("pixel accuracy", "accuracy"), ("mean F1", "f1"), ("boundary mIoU", "boundary_miou")):
        table.add_row(name, *(percent(getattr(column, value)) for column in columns))
    table.add_row("calibration error", *(percent(column.calibration.ece) for column in columns))
    return table


def evaluate(
    run: PathLike, *overrides: str, domain: str = "both", split: Split = "val", window: int | None = None,
    resize: int | None = None, overlap: float = 0.25, device: str = "auto", workers: int = 0, samples: bool = True,
) -> EvaluateResult:  # fmt: skip
    """Score a run on labeled images: IoU of each class, boundaries, calibration.

    Args:
        run: the folder of a finished run.
        overrides: settings of the domain to change, such as root=/data/loveda.
        domain: source, target or both of the run's recipe; or the file or name of another domain.
        split: train, val or test.
        window: side of overlapping windows in pixels; 0: whole images; default: the recipe's.
        resize: side of the square that images are resized to, masks are not; 0: unchanged; default: the recipe's.
        overlap: share of a window that the next one overlaps.
        device: auto, cpu, cuda, cuda:1 or mps.
        workers: threads that load images ahead.
        samples: write sample images and confusion matrices into the run's folder samples.

    Returns:
        Scores by domain and split, as written to scores.json.
    """
    from overfly.commands.arguments import load_domain, override_domain
    from overfly.core.device import select_device
    from overfly.evaluation.score import Samples
    from overfly.reporting.samples import draw_samples, samples_folder
    from overfly.training.evaluate import domain_roles, evaluate_domain, has_labels
    from overfly.training.run import Run

    opened = Run.open(run)
    named = domain in ("source", "target", "both")
    selected = domain_roles(opened, domain) if named else [(domain, load_domain(domain))]
    domains = [(key if named else value.title, override_domain(value, overrides)) for key, value in selected]
    notes = [f"{key} has no labels in {split} and is left out" for key, each in domains if not has_labels(each, split)]
    if len(notes) == len(domains):
        names = " and ".join(key for key, _ in domains)
        raise DataError(f"{names}: no image of {split} has a label, so there is nothing to score; give another --split")
    if samples:
        samples_folder(opened)
    scores, figures = {}, []
    for key, value in domains:
        if not has_labels(value, split):
            continue
        collector = Samples() if samples else None
        scores[f"{key}/{split}"] = evaluate_domain(
            opened, value, key, split,
            device=select_device(device), window=window, resize=resize, overlap=overlap,
            samples=collector, workers=workers,
        )  # fmt: skip
        if collector is not None:
            figures += draw_samples(opened, f"{key}-{split}", value, scores[f"{key}/{split}"], collector)
    return EvaluateResult(opened.path, scores, list(dict.fromkeys(figures)), notes)


@dataclass(frozen=True)
class SpeedResult:
    """Size and speed of a network."""

    name: str
    speed: Speed
    as_json: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Column, Table

        speed = self.speed
        if self.as_json:
            yield speed.model_dump_json(indent=2)
            return
        height, width = speed.size
        yield f"{self.name}: {speed.parameters:,} parameters (without the heads that only training uses)"
        yield f"one image of {speed.bands}×{height}×{width}: {speed.macs / 1e9:.3f} G multiply-accumulates"
        for batch, macs in speed.macs_of_batch.items():
            yield f"a batch of {batch}: {macs / 1e9:.3f} G multiply-accumulates"
        headings = ("batch", "p50 ms", "p95 ms", "p99 ms", "mean ± sd ms", "images/s", "peak memory")
        table = Table(*(Column(heading, justify="right") for heading in headings))
        for timing in speed.timings:
            memory = "–" if timing.peak_memory_mb is None else f"{timing.peak_memory_mb:.0f} MB"
            table.add_row(
                str(timing.batch), f"{timing.p50_ms:.2f}", f"{timing.p95_ms:.2f}", f"{timing.p99_ms:.2f}",
                f"{timing.mean_ms:.2f} ± {timing.std_ms:.2f}", f"{timing.images_per_second:.1f}", memory,
            )  # fmt: skip
        yield table
        machine = speed.machine
        yield f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {speed.precision} bits"
        yield f"{speed.repeats} passes after {speed.warmup} of warm-up; {speed.method}; memory: {speed.memory}"


@dataclass(frozen=True)
class TrainingSpeedResult:
    """Milliseconds of a training step, by threads and arithmetic."""

    name: str
    size: int
    batch: int
    machine: dict[str, object]
    milliseconds: dict[int, dict[str, float]]
    as_json: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from json import dumps

        from rich.table import Table

        if self.as_json:
            yield dumps({key: value for key, value in asdict(self).items() if key != "as_json"}, indent=2)
            return
        names = dict.fromkeys(name for times in self.milliseconds.values() for name in times)
        table = Table("threads", *names)
        for threads, times in self.milliseconds.items():
            table.add_row(str(threads), *(f"{times[name]:.0f}" if name in times else "far slower" for name in names))
        yield f"{self.name}: milliseconds of a training step on {self.batch} images of {self.size}×{self.size}"
        yield table
        yield f"{self.machine['device']}, torch {self.machine['torch']}; steps taken in turn"


def speed(
    network: str, *, size: int = 512, batch: list[int] | None = None, classes: int = 7, bands: int = 3,
    device: str = "auto", threads: int | None = None, precision: Precision = "32", warmup: int = 10, repeats: int = 50,
    macs_of_batch: int | None = None, training: bool = False, json: bool = False,
) -> SpeedResult | TrainingSpeedResult:  # fmt: skip
    """Measure a network: parameters, multiply-accumulates of one image, latency, images/s, memory.

    Heads that only training uses are off. Times are synchronized and taken after a warm-up.

    Args:
        network: the name of a network, or the folder of a run.
        size: side of the image in pixels.
        batch: size of the batches to time, default 1, or 4 in training; may be repeated: --batch 1 --batch 8.
        classes: number of classes of a network given by name.
        bands: number of bands of a network given by name.
        device: auto, cpu, cuda, cuda:1 or mps.
        threads: CPU threads.
        precision: 32, or mixed with bf16 or 16.
        warmup: forward passes before the timed ones.
        repeats: forward passes that are timed.
        macs_of_batch: count the multiply-accumulates of a batch of this size too.
        training: time source-only training steps instead, in 32 bits and bf16, contiguous and channels-last, with one
            thread and all.
        json: print JSON instead of a table.

    Returns:
        Size and speed, and how they were measured.
    """
    from overfly.core.device import describe_machine, select_device
    from overfly.evaluation.speed import limited_threads, measure_speed
    from overfly.models.network import build
    from overfly.training.engine import time_arithmetics
    from overfly.training.run import Run

    check_bounds(
        {"size": (size, 1, MAX_SIDE), "classes": (classes, 1, 254), "bands": (bands, 1, 1000)}
        | {"warmup": (warmup, 0, 10**6), "threads": (threads or 1, 1, 8 * (os.cpu_count() or 1))}
        | {"batch": (min(batch or [4]), 2 if training else 1, 10**6)}
        | {"macs-of-batch": (1 if macs_of_batch is None else macs_of_batch, 1, 10**6)}
    )
    name = network
    if Path(network).is_dir():
        segmenter = Run.open(network).segmenter()
        name, bands = segmenter.architecture, segmenter.bands
        module: nn.Module = segmenter
    if training:
        place, images, times = select_device(device), (batch or [4])[0], {}
        for count in {threads} if threads else {1, os.cpu_count() or 1}:
            with limited_threads(count):
                timed = time_arithmetics(name, classes=classes, bands=bands, size=size, batch=images, device=place)
            times[count] = {str(arithmetic): 1e3 * seconds for arithmetic, seconds in timed.items()}
        return TrainingSpeedResult(name, size, images, describe_machine(place), times, as_json=json)
    if not Path(network).is_dir():
        module = build(network, classes, training_heads=True, bands=bands)
    result = measure_speed(
        module, size=size, batches=batch or [1], bands=bands, device=select_device(device), warmup=warmup,
        repeats=repeats, threads=threads, precision=precision, macs_of_batch=[macs_of_batch] if macs_of_batch else [],
    )  # fmt: skip
    return SpeedResult(name, result, as_json=json)
