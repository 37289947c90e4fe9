"""How familiar pictures are to networks before adaptation: those of their own target, and of worlds with other classes.

    python benchmarks/familiarity.py RUNS… --foreign RECIPE… [--out familiarity.json]

RUNS are folders of source-only runs. Each network looks at held-out pictures of its source, at its target's, and at
the targets of the foreign recipes, as `overfly adapt` looks; no label is read. Writes JSON and prints a line for each,
then how far apart the gate's bound keeps the two kinds. Exits 1 where one is on the wrong side.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from overfly.adaptation import CROP, LOOKED_AT
from overfly.data.domain import Domain, Split
from overfly.recipe import load
from overfly.scoring.gate import Gate, familiarity, steadiness
from overfly.scoring.validators import LabelFree, look
from overfly.training.run import Run


def rows(run: Run, foreign: list[Domain]) -> list[dict[str, Any]]:
    """One for the run's own target, and one for each foreign domain."""
    network, recipe = run.segmenter(), run.recipe
    source = recipe.domain("source")

    def seen(domain: Domain, split: Split) -> LabelFree:
        return look(network, domain, split, limit=LOOKED_AT, crop=CROP, resize=recipe.resize, window=recipe.window)

    home = seen(source, recipe.validation.split)
    found = []
    for domain in (recipe.domain("target"), *foreign):
        away = seen(domain, "train")
        found.append(
            {
                "source": source.title, "network": recipe.model.name, "seed": recipe.seed, "pictures": domain.title,
                "foreign": domain in foreign, "familiarity": familiarity(home, away),
                "steadiness": [steadiness(home), steadiness(away)], "nuclear_norm": [home.bnm, away.bnm],
                "views_miou": [home.views_miou, away.views_miou],
            }
        )  # fmt: skip
        one = found[-1]
        print(f"{source.title}, seed {recipe.seed} → {domain.title}: {one['familiarity']:.3f}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--foreign", nargs="+", required=True)
    parser.add_argument("--set", action="append", default=[], help="a setting of the foreign recipes, such as root=…")
    parser.add_argument("--out", type=Path, default=Path("familiarity.json"))
    given = parser.parse_args()
    foreign = [load(recipe, *given.set).domain("target") for recipe in given.foreign]
    found = [row for path in given.runs for row in rows(Run.open(path), foreign)]
    own = [row["familiarity"] for row in found if not row["foreign"]]
    others = [row["familiarity"] for row in found if row["foreign"]]
    bound = Gate().familiar
    print(f"own targets {min(own):.3f} and more, foreign ones {max(others):.3f} and less; the gate's bound is {bound}")
    given.out.write_text(json.dumps({"bound": bound, "rows": found}, indent=1) + "\n", encoding="utf-8")
    return int(min(own) < bound or max(others) >= bound)


if __name__ == "__main__":
    sys.exit(main())
