"""Everything that a recipe can name, with a sentence on each."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from overfly import recipe  # noqa: F401  (imports every kind)
from overfly.core.optimizers import Optim, Schedule
from overfly.core.spec import Choice, load_plugins
from overfly.data.domain import Domain
from overfly.data.sampling import Sampling
from overfly.methods.method import Method
from overfly.models import registry
from overfly.models.weights import NAMED
from overfly.ops.augmentation import Augment
from overfly.ops.criterion import Criterion

GROUPS: dict[str, type[Choice]] = {
    "domain": Domain,
    "method": Method,
    "criterion": Criterion,
    "augment": Augment,
    "sampling": Sampling,
    "optim": Optim,
    "schedule": Schedule,
}
"""Settings of a recipe that choose among kinds."""


@dataclass(frozen=True)
class Catalog:
    """What can be named, by the setting that names it."""

    groups: dict[str, dict[str, str]]
    """Setting → name → first sentence of its docstring."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for group, kinds in self.groups.items():
            table = Table(title=group, title_justify="left", show_header=False, box=None, padding=(0, 2))
            table.add_column(no_wrap=True, style="bold")
            table.add_column()
            for name, sentence in kinds.items():
                table.add_row(name, sentence)
            yield table
            yield ""


def catalog() -> Catalog:
    """Everything that is known, plug-ins included."""
    load_plugins()
    groups = {"model": {name: registry.about(name) for name in registry.names()}}
    groups["weights"] = {name: url for name, (url, _) in sorted(NAMED.items())}
    for group, choice in GROUPS.items():
        groups[group] = {name: _sentence(kind) for name, kind in sorted(choice.kinds.items())}
    return Catalog(groups)


def _sentence(kind: type[object]) -> str:
    return (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
