"""The command ``evaluate``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from overfly.commands.arguments import PathLike
from overfly.core.choices import Split
from overfly.core.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

    from overfly.evaluation.scores import Scores


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
