"""The commands ``list``, ``data list``, ``data synthesize``, ``data fetch``, ``data stats`` and ``data check``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from overfly.commands.arguments import PathLike, load_domain, load_domains
from overfly.core.choices import Scene, Split
from overfly.core.errors import RecipeError, render_text
from overfly.core.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from overfly.core.spec import Choice
    from overfly.data.check import DomainReport, Statistics
    from overfly.data.loveda import Downloaded
else:  # cyclopts resolves the annotations of results, which need not be imported for it
    Downloaded = Statistics = object

CATALOG = Path(__file__).with_name("catalog.json")
"""The catalog without plug-ins, written by ``make docs`` and read without PyTorch."""


@dataclass(frozen=True)
class SynthesizeResult:
    """A synthetic dataset on disk."""

    root: Path
    images: int

    def __rich_console__(self, *_: object) -> Iterator[str]:
        yield f"written: {self.images} images in LoveDA's layout below {self.root}"


@dataclass(frozen=True)
class CheckResult:
    """Reports of the checked domains, by title."""

    reports: Mapping[str, DomainReport]
    figures: tuple[Path, ...] = ()

    @property
    def exit_status(self) -> int:
        """1 if any file has a problem."""
        return int(any(report.problems for report in self.reports.values()))

    def __str__(self) -> str:
        return render_text(Path(__file__).with_name("check.txt.jinja"), result=self).rstrip("\n")

    __rich__ = __str__


def data_list(name: str | None = None) -> str:
    """List the public data sets that a domain can name, or show the data sheet of one.

    Args:
        name: a data set, such as potsdam.

    Returns:
        A line for each data set; or facts, files, and settings of the domain, which a recipe can change.
    """
    from overfly.data.datasets import SHEETS, read_sheet

    names = sorted(file.stem for file in SHEETS.glob("*.yaml"))
    if name is None:
        return "\n".join(f"{each:<14}{read_sheet(each).summary}" for each in names)
    if name not in names:
        raise RecipeError(f"no data set is called {name!r}; there are: {', '.join(names)}")
    return (SHEETS / f"{name}.yaml").read_text(encoding="utf-8").rstrip()


def data_synthesize(
    root: PathLike, *, scenes: list[Scene] | None = None, size: int = 256, train: int = 400, val: int = 60,
    test: int = 60, workers: int = 1,
) -> SynthesizeResult:  # fmt: skip
    """Write synthetic urban and rural scenes in LoveDA's layout; needs no download.

    Args:
        root: folder to write, the root of a loveda domain.
        scenes: urban or rural; both by default; may be repeated: --scenes urban --scenes rural.
        size: side of each image in pixels.
        train: training images of each scene.
        val: validation images of each scene.
        test: test images of each scene, without masks.
        workers: processes.

    Returns:
        The folder and its number of images.
    """
    from overfly.data.synthetic import write_synthetic

    count = write_synthetic(
        root, size=size, train=train, val=val, test=test, scenes=tuple(scenes or ("urban", "rural")), workers=workers
    )
    return SynthesizeResult(Path(root), count)


def data_fetch(
    name: Literal["loveda"], *, root: PathLike = Path("data/loveda"), splits: list[Split] | None = None,
    base: str | None = None, keep_archives: bool = False,
) -> Downloaded:  # fmt: skip
    """Download a public dataset, verify its checksums and unpack it; resumes an interrupted download.

    Args:
        name: the dataset.
        root: folder to unpack into.
        splits: train, val or test; all by default; may be repeated: --splits train --splits val.
        base: base URL to download from instead of the dataset's own.
        keep_archives: keep the downloaded archives.

    Returns:
        The folders, and the license of the dataset.
    """
    from overfly.data.domain import SPLITS
    from overfly.data.loveda import download_loveda

    del name
    with Progress("bytes") as progress:
        return download_loveda(
            Path(root), tuple(splits or SPLITS), base=base, progress=progress.update, keep_archives=keep_archives
        )


def data_stats(domain: PathLike, *overrides: str, split: Split = "train", limit: int | None = None) -> Statistics:
    """Compute mean and standard deviation of each band of a domain.

    Args:
        domain: file or name of a domain, or a recipe file (its source).
        overrides: settings of the domain, such as root=/data/loveda scene=urban.
        split: train, val or test.
        limit: number of images, evenly spaced; all by default.

    Returns:
        Mean, standard deviation, minimum and maximum of each band.
    """
    from overfly.data.check import statistics

    return statistics(load_domain(str(domain), overrides), split, limit=limit)


def data_check(
    domain: PathLike, *overrides: str, splits: list[Split] | None = None, out: PathLike = Path("runs/check")
) -> CheckResult:
    """Check all images and masks of a domain, or of a recipe's domains: unreadable files, class shares, sizes, bands.

    The splits of rasters are drawn over them.

    Args:
        domain: a recipe file, or file or name of a domain.
        overrides: settings to change, such as root=/data/loveda of a domain, or source.root=/data/loveda of a recipe.
        splits: train, val or test; all that exist by default; may be repeated: --splits train --splits val.
        out: folder of the figures of rasters.

    Returns:
        The reports. The command exits with status 1 if a file has a problem.
    """
    from overfly.data.check import check
    from overfly.data.raster import Raster
    from overfly.evaluation.panels import splits_figure

    domains = load_domains(str(domain), overrides)
    reports = {name: check(value, splits) for name, value in domains.items()}
    rasters = {name: value for name, value in domains.items() if isinstance(value, Raster)}
    names = {name: re.sub(r"\W+", "-", name).lower() for name in rasters}
    figures = [splits_figure(value, Path(out) / f"splits-{names[name]}.png") for name, value in rasters.items()]
    return CheckResult(reports, tuple(figures))


@dataclass(frozen=True)
class Catalog:
    """Names that a recipe can hold, by setting."""

    groups: dict[str, dict[str, str]]
    """Setting → name → first sentence of its docstring."""

    def __rich_console__(self, *_: object) -> Iterator[str | Table]:
        from rich.table import Column, Table

        for group, kinds in self.groups.items():
            names = Column(no_wrap=True, style="bold")
            table = Table(names, "", title=group, title_justify="left", show_header=False, box=None, padding=(0, 2))
            for name, sentence in kinds.items():
                table.add_row(name, sentence)
            yield table
            yield ""


def list_kinds() -> Catalog:
    """List everything a recipe can name: networks, weights, domains, methods, losses, optimizers, augmentations."""
    import json
    from importlib.metadata import entry_points

    if entry_points(group="overfly.plugins"):
        return build_catalog()
    return Catalog(json.loads(CATALOG.read_text(encoding="utf-8")))


def build_catalog() -> Catalog:
    """Build the catalog from the registries, including plug-ins."""
    from overfly.core.spec import load_plugins
    from overfly.models import network as networks
    from overfly.models.checkpoints import PRETRAINED

    load_plugins()
    groups = {"model": {name: summary(build) for name, build in networks.builders().items()}}
    groups["weights"] = {name: url for name, (url, _) in sorted(PRETRAINED.items())}
    for group, choice in choices().items():
        groups[group] = {name: summary(kind) for name, kind in sorted(choice.kinds.items())}
    return Catalog(groups)


def choices() -> dict[str, type[Choice]]:
    """Return the settings of a recipe with a choice of kinds."""
    from overfly import recipe  # noqa: F401  (imports every kind)
    from overfly.core.optimizers import Optim, Schedule
    from overfly.data.domain import Domain
    from overfly.data.sampling import Sampling
    from overfly.methods.method import Method
    from overfly.ops.augmentation import Augment
    from overfly.ops.criterion import Criterion

    return {
        "domain": Domain, "method": Method, "criterion": Criterion, "augment": Augment, "sampling": Sampling,
        "optim": Optim, "schedule": Schedule,
    }  # fmt: skip


def summary(kind: object) -> str:
    """Return the first paragraph of a docstring, on one line, or the summary of a data sheet."""
    sheet = getattr(kind, "sheet", None)
    return sheet().summary if sheet else " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split())
