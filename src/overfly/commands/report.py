"""The command ``report``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overfly.commands.arguments import MAX_SIDE, PathLike, PathLikes, check_bounds
from overfly.core.choices import Split
from overfly.core.errors import OverflyError, RecipeError


@dataclass(frozen=True)
class ReportResult:
    """A written report."""

    path: Path
    recipes: int
    labels_opened: int

    def __rich_console__(self, *_: object) -> Iterator[str]:
        yield f"labels opened for the sample images: {self.labels_opened}"
        yield f"written: {self.path} ({self.recipes} recipes, {self.path.stat().st_size / 1e6:.1f} MB)"


def report(
    runs: PathLikes, *, out: PathLike = Path("report.html"), title: str = "overfly report", split: Split | None = None,
    labels: bool = True, images: int = 40, speed: bool = True, size: int = 512, own_colors: bool = False,
    device: str = "auto",
) -> ReportResult:  # fmt: skip
    """Write a report of runs as one HTML file.

    It shows the table, gap closed, IoU of each class, the selection, sample images, confusion matrices, training curves
    and speed. The file is self-contained and loads nothing from the network.

    Args:
        runs: run folders, or folders of them; runs that differ in their seed alone become one row.
        out: the file to write.
        title: heading of the page.
        split: the split whose scores are shown; default: the one that most of the runs were scored on.
        labels: open the labels of val to choose the worst and best images; scores.json of each run counts them.
        images: number of images of val to choose from, evenly sampled; 0: no sample images.
        speed: measure the speed of the networks on this machine.
        size: side in pixels of the image that speed is measured with.
        own_colors: show the classes' own colors instead of colors that the color-blind can tell apart.
        device: auto, cpu, cuda, cuda:1 or mps.

    Returns:
        The file, and the labels opened for it.
    """
    from overfly.core.atomic_files import write_text
    from overfly.core.device import select_device
    from overfly.core.download import disk_errors
    from overfly.reporting.report import collect_report, render

    check_bounds({"images": (images, 0, 10**6), "size": (size, 8, MAX_SIDE)})
    out = Path(out)
    if out.is_dir() or not out.parent.is_dir():
        raise RecipeError(f"--out {out} must be a file in an existing folder")
    if out.suffix.lower() not in (".html", ".htm"):
        raise RecipeError(f"--out {out} must end in .html; use {out.with_suffix('.html').name}")
    result = collect_report(
        runs, title=title, split=split, labels=labels, limit=images, speed=speed, size=size,
        device=select_device(device), own_colors=own_colors,
    )  # fmt: skip
    with disk_errors(out, OverflyError):
        write_text(out, render(result))
    return ReportResult(out, len(result.entries), sum(samples.labels_opened for samples in result.galleries))
