"""`overfly report`: one self-contained HTML file of some runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult

from overfly.commands.arguments import MAX_SIDE, check_bounds, pathlike
from overfly.core import device as machines
from overfly.core.choices import Split
from overfly.core.errors import RecipeError
from overfly.reporting.report import render
from overfly.reporting.report_data import collect_report

__all__ = ["report"]


@dataclass(frozen=True)
class Reported:
    """A report."""

    path: Path
    recipes: int
    labels_opened: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        size = self.path.stat().st_size / 1e6
        yield f"labels read for its pictures: {self.labels_opened}"
        yield f"written: {self.path} ({self.recipes} recipes, {size:.1f} MB); open it in any browser"


@pathlike
def report(
    runs: list[str],
    *,
    out: Path = Path("report.html"),
    title: str = "overfly report",
    split: Split | None = None,
    labels: bool = True,
    pictures: int = 40,
    speed: bool = True,
    size: int = 512,
    own_colors: bool = False,
    device: str = "auto",
) -> Reported:
    """Write one HTML file about some runs: table, gap closed, classes, pictures, confusion, curves, verdict, speed.

    The file holds everything it shows, asks no network, and reads on a phone, in the dark and on paper.

    Args:
        runs: folders of runs, or folders of such; those of one recipe with several seeds become one row.
        out: the file to write.
        title: heading of the page.
        split: the split whose scores are shown; left out, the one that most of the runs were scored on.
        labels: open the labels of val to find the worst and the best pictures; scores.json of each run counts it.
        pictures: how many pictures of val to choose from, evenly spread; 0: no pictures.
        speed: time the networks on this machine.
        size: side of the image that size and speed of the networks are given for.
        own_colors: paint classes in the colors that they bring, instead of ones that the color-blind can tell apart.
        device: auto, cpu, cuda, cuda:1 or mps.

    Returns:
        The file.
    """
    check_bounds({"pictures": (pictures, 0, 10**6), "size": (size, 8, MAX_SIDE)})
    if out.is_dir() or not out.parent.is_dir():
        raise RecipeError(f"{out} cannot be written: give --out a file's name in a folder that is there")
    if out.suffix.lower() not in (".html", ".htm"):
        raise RecipeError(f"{out} has no ending of a page; name it {out.with_suffix('.html').name}")
    found = collect_report(
        runs, title=title, split=split, labels=labels, limit=pictures, speed=speed, size=size,
        device=machines.select_device(device), own_colors=own_colors,
    )  # fmt: skip
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(render(found), encoding="utf-8")
    partial.replace(out)
    return Reported(out, len(found.entries), sum(gallery.album.opened for gallery in found.galleries))
