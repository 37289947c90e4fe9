"""The command ``list``."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from overfly.core.spec import Choice

CATALOG = Path(__file__).with_name("catalog.json")
"""The catalog without plug-ins, written by ``make docs`` and read without PyTorch."""


@dataclass(frozen=True)
class Catalog:
    """Names that a recipe can hold, by setting."""

    groups: dict[str, dict[str, str]]
    """Setting → name → first sentence of its docstring."""

    def __rich_console__(self, *_: object) -> "Iterator[str | Table]":
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


def choices() -> "dict[str, type[Choice]]":
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
