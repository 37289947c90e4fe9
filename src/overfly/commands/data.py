"""What the API does with imagery alone: draw, fetch, measure and check it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult

from overfly.commands.arguments import load_domain, load_domains, pathlike
from overfly.core.choices import Scene, Split
from overfly.core.progress import Progress
from overfly.data import check as checks
from overfly.data.domain import SPLITS
from overfly.data.download import Downloaded, download_loveda
from overfly.data.statistics import Statistics, statistics
from overfly.data.synthetic.domain import write_synthetic

__all__ = ["data_check", "data_fetch", "data_stats", "data_synthesize"]


@dataclass(frozen=True)
class SynthesizeResult:
    """A synthetic world on disk."""

    root: Path
    pictures: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield f"drawn: {self.pictures} pictures in LoveDA's layout below {self.root}"


@dataclass(frozen=True)
class CheckResult:
    """Findings of ``overfly data check``."""

    reports: Mapping[str, checks.Report]

    @property
    def exit_status(self) -> int:
        """1 where a file is bad."""
        return int(any(report.problems for report in self.reports.values()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for name, report in self.reports.items():
            yield f"== {name}"
            yield str(report)


@pathlike
def data_synthesize(
    root: Path,
    *,
    scenes: list[Scene] | None = None,
    size: int = 256,
    train: int = 400,
    val: int = 60,
    test: int = 60,
    workers: int = 1,
) -> SynthesizeResult:
    """Draw the world that needs no download, in LoveDA's own layout.

    Args:
        root: folder to write, the root of a loveda domain.
        scenes: urban or rural, both where left out; may be repeated: --scenes urban --scenes rural.
        size: side of each picture in pixels.
        train: pictures of each scene for training.
        val: pictures of each scene for validation.
        test: pictures of each scene without masks.
        workers: processes that draw.

    Returns:
        The folder, and how many pictures it holds.
    """
    count = write_synthetic(
        root,
        size=size,
        train=train,
        val=val,
        test=test,
        scenes=tuple(scenes or ("urban", "rural")),
        workers=workers,
    )
    return SynthesizeResult(root, count)


@pathlike
def data_fetch(
    name: Literal["loveda"],
    *,
    root: Path = Path("data/loveda"),
    splits: list[Split] | None = None,
    base: str | None = None,
    keep_archives: bool = False,
) -> Downloaded:
    """Download a public dataset, check it and unpack it; a broken download goes on where it stopped.

    Args:
        name: the dataset.
        root: folder to unpack into.
        splits: train, val or test, all where left out; may be repeated: --splits train --splits val.
        base: another address to fetch from.
        keep_archives: keep the downloaded archives.

    Returns:
        What was fetched, and the license that it comes with.
    """
    del name
    with Progress("bytes") as progress:
        return download_loveda(
            root, tuple(splits or SPLITS), base=base, progress=progress.update, keep_archives=keep_archives
        )


def data_stats(domain: str, *overrides: str, split: Split = "train", limit: int | None = None) -> Statistics:
    """Estimate the mean and standard deviation of each band, for a domain's or a recipe's settings.

    Args:
        domain: the file or the name of a domain, or a recipe file (its source).
        overrides: settings of the domain, such as root=/data/loveda scene=urban.
        split: train, val or test.
        limit: pictures to look at, evenly spread; all where left out.

    Returns:
        Mean, standard deviation, smallest and largest value of each band.
    """
    return statistics(load_domain(domain, overrides), split, limit=limit)


def data_check(domain: str, *overrides: str, splits: list[Split] | None = None) -> CheckResult:
    """Go through every picture of a domain, or of both of a recipe: what cannot be read, class shares, sizes, bands.

    Args:
        domain: a recipe file, or the file or the name of a domain.
        overrides: settings to change, such as root=/data/loveda of a domain, or source.root=/data/loveda of a recipe.
        splits: train, val or test, all that are there where left out; may be repeated: --splits train --splits val.

    Returns:
        The findings. The command exits with status 1 where a file is bad.
    """
    return CheckResult({name: checks.check(place, splits) for name, place in load_domains(domain, overrides).items()})
