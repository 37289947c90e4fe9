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
from overfly.evaluation.images import MetricOptions
from overfly.evaluation.label_free_metrics import LabelFreeMetrics, label_free_metrics
from overfly.recipe import Recipe, load
from overfly.training.run import Run


def folder_target(recipe: Recipe, folder: Path) -> Domain:
    """The images of a folder, as the recipe's target."""
    target = {"name": "folder", "title": folder.name, "root": str(folder), "images": "**/images/*"}
    return load({**recipe.model_dump(mode="json"), "target": target}).domain("target")


def rows(run: Run, domains: list[Domain], folders: list[Path]) -> list[dict[str, Any]]:
    """A row for the run's own target, and one for each foreign domain."""
    network, recipe = run.segmenter(), run.recipe
    foreign = [*domains, *(folder_target(recipe, folder) for folder in folders)]
    source = recipe.domain("source")
    held = recipe.validation.split
    options = MetricOptions(METRIC_IMAGES, CROP, recipe.resize, recipe.window)

    def metrics_of(domain: Domain, split: Split) -> LabelFreeMetrics:
        return label_free_metrics(network, domain, split, options, reference=network, reference_classes=True)

    on_source = metrics_of(source, held)
    table = []
    for domain in (recipe.domain("target"), *foreign):
        on_target, reverse = metrics_of(domain, "train"), reverse_validation(network, source, domain, held, options)
        known = familiarity(on_source, on_target)
        table.append(
            {
                "source": source.title, "network": recipe.model.name, "seed": recipe.seed, "images": domain.title,
                "foreign": domain in foreign, "familiarity": known, "reverse_validation": reverse,
                "unfamiliar": bool(Gate().unfamiliar(known, reverse)),
                "geometric_consistency": [geometric_consistency(on_source), geometric_consistency(on_target)],
                "nuclear_norm": [on_source.nuclear_norm, on_target.nuclear_norm],
                "views_miou": [on_source.views_miou, on_target.views_miou],
            }
        )  # fmt: skip
        score = "–" if reverse is None else f"{reverse:.3f}"
        print(f"{source.title}, seed {recipe.seed} → {domain.title}: {known:.3f}, reverse {score}", flush=True)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--foreign", nargs="*", default=[])
    parser.add_argument("--images", nargs="*", type=Path, default=[], help="folders of images of other objects")
    parser.add_argument("--set", action="append", default=[], help="a setting of the foreign recipes, such as root=…")
    parser.add_argument("--out", type=Path, default=Path("familiarity.json"))
    given = parser.parse_args()
    foreign = [load(recipe, *given.set).domain("target") for recipe in given.foreign]
    result = [row for path in given.runs for row in rows(Run.open(path), foreign, given.images)]
    wrong = [row for row in result if row["foreign"] != row["unfamiliar"]]
    for row in wrong:
        decision = "rejected" if row["unfamiliar"] else "accepted"
        print(f"{row['source']}, seed {row['seed']} → {row['images']}: {decision}, wrongly")
    print(f"{len(result) - len(wrong)} of {len(result)} right")
    content = {"gate": Gate().model_dump(mode="json"), "rows": result}
    given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
