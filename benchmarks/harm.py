"""Train harmful adaptations on purpose and count how many are rejected, or not recommended.

    python benchmarks/harm.py recipes/synthetic/urban-rural-pasted.yaml --seeds 0,1,2 --steps 100 [--set SETTING]
        [--images FOLDER…]

Each recipe must be of method `multiscale_self_training`. Each seed is trained with the pseudo-labels' classes permuted,
with pseudo-labels shuffled over the pixels of the batch, and, for each folder of --images (images without the classes),
with that folder as target. Each result is scored against the labels of the recipe's own target; accepting an adaptation
that did no harm is correct. Writes harm.json and prints one line per adaptation; exits 1 if a harmful one was
recommended.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from overfly.adaptation.pipeline import adapt
from overfly.core.records import IGNORE
from overfly.evaluation.score import score
from overfly.methods.multiscale_self_training import MultiscaleNetworks, MultiscaleSelfTraining
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe, load
from overfly.training.engine import TrainerConfig, launch_fabric
from overfly.training.run import Run

CONFIG = TrainerConfig(device="cpu", quiet=True)


class Planted(MultiscaleSelfTraining, name="planted"):
    """`MultiscaleSelfTraining` with wrong pseudo-labels."""

    harm: Literal["exchanged", "shuffled"] = "exchanged"
    """Kind of error: classes permuted, or labels shuffled over pixels."""
    key: int = 0
    """Seed of the permutation."""

    def pseudo_labels(self, nets: MultiscaleNetworks, target: Tensor, nodata_mask: Tensor | None = None) -> Tensor:
        """The teacher's pseudo-labels, permuted or shuffled."""
        label = super().pseudo_labels(nets, target, nodata_mask)
        classes = len(nets.segmenter.classes)
        if self.harm == "shuffled":
            known = label != IGNORE
            values = label[known]
            label[known] = values[torch.randperm(len(values))]
            return label
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(self.key))
        other = torch.empty_like(order)
        other[order] = order.roll(1)  # one cycle through all classes: each changes
        return torch.where(label == IGNORE, label, other[label.clamp_max(classes - 1)])


def planted(recipe: Recipe, steps: int, folders: list[Path]) -> Iterator[tuple[str, Recipe]]:
    """The harmful versions of a recipe, by name."""
    own = {name: getattr(recipe.method, name) for name in MultiscaleSelfTraining.model_fields}
    settings: dict[Literal["exchanged", "shuffled"], Planted] = {
        harm: Planted(**own, harm=harm, key=recipe.seed) for harm in ("exchanged", "shuffled")
    }
    for harm, method in settings.items():
        yield harm, recipe.model_copy(update={"method": method, "steps": steps})
    for folder in folders:
        target = {"name": "folder", "title": folder.name, "root": str(folder), "images": "**/images/*"}
        other = load({**recipe.model_dump(mode="json"), "target": target, "steps": steps})
        yield f"images of {folder.name}", other


def truth(weights: Path, recipe: Recipe) -> float | None:
    """mIoU on the recipe's target against labels, read once, after all selections."""
    return score(Segmenter.load(weights), recipe.domain("target"), "val", window=recipe.window, batch=8).miou


def weights_of(report: str) -> Path:
    """Weights of a candidate, from its run folder or weights file."""
    return Run.open(report).weights if Path(report).is_dir() else Path(report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--images", nargs="*", type=Path, default=[])
    parser.add_argument("--set", action="append", default=[], help="recipe setting, such as method.ramp_steps=30")
    parser.add_argument("--out", type=Path, default=Path("runs/harm"))
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for file in given.recipes:
        for seed in map(int, given.seeds.split(",")):
            original = load(file, f"seed={seed}", *given.set)
            before = None
            for plant, recipe in planted(original, given.steps, given.images):
                selection = adapt(
                    recipe, out=given.out, fabric=launch_fabric(recipe, CONFIG), config=CONFIG, estimates=False
                ).selection
                report = selection.candidates["adapted"]
                word = "rejected" if report.rejected else "RECOMMENDED"
                if not report.rejected and selection.recommended != "adapted":
                    word = f"{selection.recommended} recommended"
                before = before or truth(weights_of(selection.candidates["source only"].run), original)
                after = truth(weights_of(selection.candidates["adapted"].run), original)
                rows.append(
                    {
                        "recipe": file.stem,
                        "seed": seed,
                        "plant": plant,
                        "foreign": recipe.target != original.target,
                        "rejected": report.rejected,
                        "recommended": selection.recommended,
                        "failed": [str(check) for check in report.checks if not check.passed],
                        "target_checks": {check.name: check.value for check in selection.target_checks},
                        "target_miou": {"source only": before, "adapted": after},
                    }
                )
                print(f"{file.stem}, seed {seed}, {plant}: {word}; target {before:.3f} -> {after:.3f}", flush=True)
                (given.out / "harm.json").write_text(json.dumps(rows, indent=1))
    harmful = [
        row for row in rows if row["foreign"] or row["target_miou"]["adapted"] < row["target_miou"]["source only"]
    ]
    rejected = sum(row["rejected"] for row in harmful)
    recommended = sum(row["recommended"] == "adapted" for row in harmful)
    print(
        f"of {len(harmful)} harmful adaptations {rejected} rejected and {recommended} recommended; "
        f"{len(rows) - len(harmful)} did no harm"
    )
    return int(bool(recommended))


if __name__ == "__main__":
    sys.exit(main())
