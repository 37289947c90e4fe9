"""Selections of `overfly adapt` against target labels: recommendation, gain and regret.

    python benchmarks/verdicts.py RUNS… [--splits val,test] [--out verdicts.json]

RUNS are folders below which `overfly adapt` has left its runs. The target's labels are opened here, after all
verdicts, once for each network and split; `scores.json` of each run counts them. For every selection: the true mIoU on
the target of each network, which one was recommended, its regret (what the best of those there has more), and what it
has more than the network before adaptation. Writes JSON and prints a table; exits 1 where a network was recommended
that is more than a point worse on the target than the one before adaptation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from overfly.adaptation.selection import BASELINE, Comparison, Selection
from overfly.data.domain import Split
from overfly.evaluation.scores import Scores
from overfly.training.evaluate import evaluate_domain, stored_scores
from overfly.training.run import Run

HARM = 0.01
"""mIoU that a recommended network may be worse by before this ends with status 1."""


def verdicts(folders: Sequence[Path]) -> Iterator[Selection]:
    """The selection of every comparison below some folders."""
    for file in sorted(file for folder in folders for file in folder.rglob("selection.json")):
        yield Comparison(file.parent).selection


def truth(run: Run, split: Split) -> Scores:
    """What a network scores on its target, measured where it was not yet."""
    domain = run.recipe.domain("target")
    return stored_scores(run, "target", split, domain) or evaluate_domain(run, domain, "target", split)


def row(selection: Selection, split: Split) -> dict[str, Any]:
    """One selection on one split."""
    runs = {role: Run.open(report.run) for role, report in selection.candidates.items()}
    found = {role: truth(run, split) for role, run in runs.items()}
    miou = {role: float(scores.miou or 0) for role, scores in found.items()}
    recipe = next(iter(runs.values())).recipe
    return {
        "source": recipe.domain("source").title, "target": recipe.domain("target").title, "seed": recipe.seed,
        "network": recipe.model.name, "split": split, "recommended": selection.recommended,
        "sentence": selection.summary, "labels_opened_for_the_verdict": selection.labels_opened,
        "regret": max(miou.values()) - miou[selection.recommended],
        "gain": miou[selection.recommended] - miou[BASELINE],
        "candidates": {
            role: {
                "method": runs[role].recipe.method.model_dump(mode="json"), "steps": runs[role].recipe.steps,
                "miou": miou[role], "iou": {name: each.iou for name, each in scores.classes.items()},
                "settings": report.settings,
                "rejections": report.rejections, "metrics": report.metrics.model_dump(mode="json"),
                "estimate": report.estimate and report.estimate.model_dump(mode="json"),
            }
            for (role, report), scores in zip(selection.candidates.items(), found.values(), strict=True)
        },
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    each = ", ".join(
        f"{'**' if role == found['recommended'] else ''}{role} {100 * one['miou']:.1f}"
        f"{'**' if role == found['recommended'] else ''}{' (refused)' if one['rejections'] else ''}"
        for role, one in found["candidates"].items()
    )
    way = f"{found['source']} → {found['target']}"
    return (
        f"| {way} | {found['seed']} | {found['split']} | {each} | {100 * found['gain']:+.1f} | "
        f"{100 * found['regret']:.1f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--splits", default="val")
    parser.add_argument("--out", type=Path, default=Path("verdicts.json"))
    given = parser.parse_args()
    held = list(verdicts(given.runs))
    if not held:
        raise SystemExit(f"no selection.json below {', '.join(map(str, given.runs))}; run overfly adapt first")
    print("| from → to | seed | split | mIoU (%) on the target, the recommended one in bold | gain | regret |")
    print("|---|---|---|---|---|---|")
    rows = []
    for split in given.splits.split(","):
        for selection in held:
            rows.append(row(selection, split))
            print(line(rows[-1]), flush=True)
    print(
        f"\n{len(rows)} verdicts: mean gain {100 * fmean(each['gain'] for each in rows):.1f}, mean regret "
        f"{100 * fmean(each['regret'] for each in rows):.1f}, least gain {100 * min(r['gain'] for r in rows):.1f}"
    )
    machine = Run.open(held[0].candidates[BASELINE].run).machine
    told = {
        "machine": {key: machine.get(key) for key in ("device", "cores", "threads", "torch", "overfly")},
        "rows": rows,
    }
    given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return int(any(each["gain"] < -HARM for each in rows))


if __name__ == "__main__":
    sys.exit(main())
