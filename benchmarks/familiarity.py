"""Familiarity and reverse validation of source-only networks on their own target, and on images of other classes.

    python benchmarks/familiarity.py RUNS… [--foreign RECIPE…] [--images FOLDER…] [--out familiarity.json]

RUNS are folders of source-only runs. Familiarity and reverse validation are computed as in `overfly adapt`, for the
run's target, the targets of the foreign recipes and folders of other images. No target label is read. Writes JSON and
prints a line each, then those that the gate decides wrongly. Exits 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from overfly.adaptation.gate import Gate, familiarity, geometric_consistency
from overfly.adaptation.pipeline import CROP, METRIC_IMAGES
from overfly.adaptation.reverse_validation import reverse_validation
from overfly.data.domain import Domain, Split
from overfly.evaluation.label_free_metrics import LabelFreeMetrics, label_free_metrics
from overfly.recipe import Recipe, load
from overfly.training.run import Run


def elsewhere(recipe: Recipe, folder: Path) -> Domain:
    """The images of a folder, as the recipe's target."""
    target = {"name": "folder", "title": folder.name, "root": str(folder), "images": "**/images/*"}
    return load({**recipe.model_dump(mode="json"), "target": target}).domain("target")


def rows(run: Run, domains: list[Domain], folders: list[Path]) -> list[dict[str, Any]]:
    """A row for the run's own target, and one for each foreign domain."""
    network, recipe = run.segmenter(), run.recipe
    foreign = [*domains, *(elsewhere(recipe, folder) for folder in folders)]
    source = recipe.domain("source")
    held = recipe.validation.split
    options: dict[str, Any] = {"limit": METRIC_IMAGES, "crop": CROP, "resize": recipe.resize, "window": recipe.window}

    def metrics_of(domain: Domain, split: Split) -> LabelFreeMetrics:
        return label_free_metrics(network, domain, split, reference=network, reference_classes=True, **options)

    home = metrics_of(source, held)
    found = []
    for domain in (recipe.domain("target"), *foreign):
        away, taught = metrics_of(domain, "train"), reverse_validation(network, source, domain, held, **options)
        known = familiarity(home, away)
        found.append(
            {
                "source": source.title, "network": recipe.model.name, "seed": recipe.seed, "images": domain.title,
                "foreign": domain in foreign, "familiarity": known, "reverse": taught,
                "unfamiliar": bool(Gate().unfamiliar(known, taught)),
                "geometric_consistency": [geometric_consistency(home), geometric_consistency(away)],
                "nuclear_norm": [home.nuclear_norm, away.nuclear_norm],
                "views_miou": [home.views_miou, away.views_miou],
            }
        )  # fmt: skip
        teaches = "–" if taught is None else f"{taught:.3f}"
        print(f"{source.title}, seed {recipe.seed} → {domain.title}: {known:.3f}, reverse {teaches}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--foreign", nargs="*", default=[])
    parser.add_argument("--images", nargs="*", type=Path, default=[], help="folders of images of other objects")
    parser.add_argument("--set", action="append", default=[], help="a setting of the foreign recipes, such as root=…")
    parser.add_argument("--out", type=Path, default=Path("familiarity.json"))
    given = parser.parse_args()
    foreign = [load(recipe, *given.set).domain("target") for recipe in given.foreign]
    found = [row for path in given.runs for row in rows(Run.open(path), foreign, given.images)]
    wrong = [row for row in found if row["foreign"] != row["unfamiliar"]]
    for row in wrong:
        taken = "rejected" if row["unfamiliar"] else "accepted"
        print(f"{row['source']}, seed {row['seed']} → {row['images']}: {taken}, wrongly")
    print(f"{len(found) - len(wrong)} of {len(found)} right")
    answer = {"gate": Gate().model_dump(mode="json"), "rows": found}
    given.out.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
