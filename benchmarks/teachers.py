"""Compare ways to use a large network for a small one: adaptation in one run, distillation afterwards, none.

    python benchmarks/teachers.py DATA [--pairs dubai-city,dubai-coast] [--seeds 0,1,2] [--out runs/teachers]
        [--students lraspp_mobilenet_v2_half,pidnet_s] [--large lraspp_mobilenet_v2] [SETTING=VALUE …]

DATA and SETTING are as for `benchmarks/pairs.py`. The large network and the small one are trained on the source. Then,
with the settings that `overfly adapt` proposes, class shares corrected towards equal ones: the small one adapts itself;
the large one adapts itself and is distilled into the small one on source and target; both adapt in one run
(large_teacher), with class weights and without. Finished runs are used again. Target labels are read afterwards, on
`val`. Prints a table and writes OUT/teachers.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pairs import command_line, recipes

import overfly
from overfly.methods.distillation import Distill
from overfly.methods.large_teacher import LargeTeacher
from overfly.methods.method import Method
from overfly.methods.multiscale_self_training import MultiscaleSelfTraining
from overfly.recipe import Recipe
from overfly.training.evaluate import evaluate_domain, stored_scores
from overfly.training.run import Run


def trained(recipe: Any, out: Path) -> Run:
    """The finished run of a recipe below a folder, trained now if there is none."""
    return Run.open(overfly.train(recipe, out=out, quiet=True).path)


def large_teacher(method: MultiscaleSelfTraining, teacher: Path, **changes: Any) -> LargeTeacher:
    """The method with the settings of self-training."""
    return LargeTeacher(**{**dict(method), "teacher": teacher, **changes})


def compare(large: Recipe, small: Recipe, out: Path) -> dict[str, float]:
    """Target mIoU of every network of one direction, seed and student."""
    teacher, adapted, start = trained(large.start, out), trained(large, out), trained(small.start, out)

    def student(method: Method[Any]) -> Run:
        return trained(small.model_copy(update={"method": method}), out)

    own = small.method
    assert isinstance(own, MultiscaleSelfTraining)
    runs = {
        "large, source only": teacher, "large, adapted": adapted, "small, source only": start,
        "small, adapted by itself": student(own),
        "large adapted, then distilled": student(Distill(teacher=adapted.path)),
        "both in one run": student(large_teacher(own, teacher.path)),
        "both in one run, equal weights": student(large_teacher(own, teacher.path, inconsistency_weight=0.0)),
    }  # fmt: skip
    result = {}
    for name, run in runs.items():
        domain = run.recipe.domain("target") if run.recipe.target else adapted.recipe.domain("target")
        scores = stored_scores(run, "target", "val", domain) or evaluate_domain(run, domain, "target", "val")
        result[name] = float(scores.miou or 0)
    return result


def main() -> None:
    """Run the command line."""
    given, settings, pairs, fabric = command_line(
        __doc__ or "", Path("runs/teachers"), "dubai-city,dubai-coast", seeds="0,1,2",
        students="lraspp_mobilenet_v2_half,pidnet_s", large="lraspp_mobilenet_v2",
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for seed in map(int, given.seeds.split(",")):
        for pair in given.pairs:
            for name in given.students.split(","):
                large, small = (
                    recipes(pairs[pair], fabric, f"model={network}", f"seed={seed}", *settings)[0]
                    for network in (given.large, name)
                )
                scores = compare(large, small, given.out)
                rows.append({"pair": pair, "student": name, "seed": seed, "miou": scores})
                print(pair, name, seed, {key: round(100 * value, 1) for key, value in scores.items()}, flush=True)
                (given.out / "teachers.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("| direction | student | " + " | ".join(rows[0]["miou"]) + " |")
    print("|---" * (2 + len(rows[0]["miou"])) + "|")
    for pair, name in dict.fromkeys((row["pair"], row["student"]) for row in rows):
        same = [row["miou"] for row in rows if (row["pair"], row["student"]) == (pair, name)]
        cells = [[100 * scores[key] for scores in same] for key in same[0]]
        shown = [f"{fmean(cell):.1f} ± {stdev(cell):.1f}" if len(cell) > 1 else f"{cell[0]:.1f}" for cell in cells]
        print(f"| {pair} | {name} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
