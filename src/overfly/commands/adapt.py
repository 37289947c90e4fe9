"""The command ``adapt``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from overfly.commands.arguments import AddressLike, PathLike, RecipeLike, image_cache, split_entries
from overfly.core.choices import Cache
from overfly.core.errors import RecipeError
from overfly.core.progress import percent

if TYPE_CHECKING:
    from overfly.adaptation.inputs import ImageInputs
    from overfly.adaptation.selection import Selection
    from overfly.recipe import Recipe
    from overfly.training.engine import TrainerConfig


NOT_ADAPTED = 3
"""Exit status if the network before adaptation is recommended although an adapted one is required."""


SHOWN = ("consistency", "own source mIoU", "score", "better", "estimate", "decision")
"""Columns of the table on the terminal; ``selection.md`` holds all."""


@dataclass(frozen=True)
class AdaptResult:
    """A comparison of the networks before and after adaptation, and the recommended one.

    Attributes:
        path: the comparison folder.
        selection: all candidates and the recommendation.
        exit_status: 3 if source only is recommended although an adapted network is required.
    """

    path: Path
    selection: Selection
    exit_status: int = 0

    @property
    def recommended(self) -> Path:
        """File of the recommended network."""
        return self.path / "recommended.safetensors"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from overfly.adaptation.selection import COLUMNS

        table = Table(title="candidates, in percent", title_justify="left", box=None, pad_edge=False)
        rows = self.selection.rows()[:-1]  # without the bounds: reasons name those that a candidate fails
        shown = [COLUMNS.index(name) for name in SHOWN]
        filled = [number for number in shown if any(row[number + 1] != percent(None) for row in rows)]
        for name in ("candidate", *(COLUMNS[number] for number in filled)):
            table.add_column(name, justify="left" if name in ("candidate", "decision") else "right", no_wrap=True)
        for row in rows:
            table.add_row(row[0], *(row[number + 1] for number in filled))
        yield table
        yield from self.selection.reasons
        yield from self.selection.differences
        yield from self.selection.tile_lines
        yield f"target labels opened: {self.selection.labels_opened}"
        yield self.selection.summary
        if self.selection.unsure:
            yield f"{self.selection.unsure}: overfly suggest {self.path} --count 5, then this command with --labels"
        yield f"comparison: {self.path}"
        yield f"predict with: overfly predict {self.path} IMAGE"


def adapt(
    recipe: RecipeLike | None = None, *overrides: RecipeLike, source_images: AddressLike | None = None,
    source_masks: PathLike | None = None, source_labels: AddressLike | None = None, attribute: str | None = None,
    target_images: AddressLike | None = None, classes: PathLike | None = None, checkpoint: PathLike | None = None,
    labels: PathLike | None = None, budget: str | None = None, estimate: bool = False,
    gate: list[str] | None = None, require_adapted: bool = False, out: PathLike = Path("runs"), device: str = "auto",
    devices: int = 1, workers: int = 0, checkpoint_every: int = 200, cache: Cache = "memory", quiet: bool = False,
) -> AdaptResult:  # fmt: skip
    """Adapt to images without labels, and recommend the adapted network or the one before adaptation.

    Candidates are compared without target labels: source only, the same with batch-normalization statistics of the
    target, and networks trained further from the best of these. Give a recipe, or several with the same start; or
    image folders or rasters, the source with masks or polygons and the target without; or a trained network
    (--checkpoint) and the target.

    Args:
        recipe: a recipe file whose method adapts.
        overrides: more recipe files, and settings to change in all, such as method.ema=0.999.
        source_images: folder or pattern of the labeled images; or a raster of any size, a file or an address.
        source_masks: folder or pattern of their masks.
        source_labels: labels of rasters: a vector file of polygons, or a raster.
        attribute: attribute of the polygons that holds the class.
        target_images: folder or pattern of the images to adapt to; or a raster of any size, a file or an address.
        classes: YAML file of the classes: names, or names and their colors; or settings of a folder or raster domain.
            Not needed for polygons with an attribute, each value of which is a class then.
        checkpoint: run, comparison or weights file to adapt, without its source's images.
        labels: folder of a few labeled target tiles, as `overfly suggest` writes it; they decide and are learned from.
        budget: time for folders or rasters, such as 90s, 10min or 2h; default 30m. The same command again resumes.
        estimate: estimate each candidate's mIoU on the target too, with an interval; takes several times as long.
        gate: a bound of the checks; may be repeated: --gate max_source_loss=0.1 --gate min_classes=0.8
        require_adapted: exit with status 3 if the network before adaptation is recommended.
        out: folder of the runs.
        device: auto, cpu, cuda, cuda:1 or mps.
        devices: number of devices, one process each.
        workers: processes that load images, for each device.
        checkpoint_every: steps between two checkpoints.
        cache: where decoded images are cached: memory, disk or off.
        quiet: print no progress.

    Returns:
        The comparison folder and its selection.
    """
    from overfly.adaptation.gate import read_gate
    from overfly.adaptation.inputs import ImageInputs
    from overfly.adaptation.pipeline import adapt as adapt_recipes
    from overfly.adaptation.selection import BASELINE
    from overfly.training.engine import TrainerConfig, launch_fabric

    config = TrainerConfig(device, devices, workers, checkpoint_every, cache=image_cache(cache), quiet=quiet)
    bounds = read_gate(gate or ())
    paths = (None if value is None else Path(value) for value in (source_masks, classes, checkpoint, labels))
    masks, file, start, tiles = paths
    inputs = ImageInputs(source_images, masks, target_images, file, start, source_labels, attribute)
    values = _recipes([*([] if recipe is None else [recipe]), *overrides], inputs, budget, config, Path(out))
    fabric = launch_fabric(values[0], config)
    comparison = adapt_recipes(
        *values, out=Path(out), fabric=fabric, config=config, estimates=estimate, gate=bounds, labels=tiles
    )
    missing = require_adapted and comparison.selection.recommended == BASELINE
    return AdaptResult(comparison.path, comparison.selection, NOT_ADAPTED if missing else 0)


def _recipes(
    entries: list[RecipeLike], inputs: ImageInputs, budget: str | None, config: TrainerConfig, out: Path
) -> list[Recipe]:
    """Read the given recipes, or propose some for the given images."""
    from overfly.adaptation.auto_recipe import folder_recipes
    from overfly.recipe import load

    recipes, settings = split_entries(entries)
    if recipes and inputs != type(inputs)():
        raise RecipeError("adapt takes a recipe or image folders, not both; leave one of them out")
    if recipes and budget is not None:
        raise RecipeError(f"--budget {budget} is for image folders; set steps=… for a recipe")
    return [load(entry, *settings) for entry in recipes] or folder_recipes(inputs, budget, config, settings, out)
