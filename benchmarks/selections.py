"""Selections of `overfly adapt` against target labels: recommendation, gain and regret.

    python benchmarks/selections.py RUNS… [--splits val,test] [--out selections.json]

RUNS are folders with runs and comparisons of `overfly adapt`. Target labels are opened here, after all selections, once
for each network and split; `scores.json` of each run counts them. For every selection: the target mIoU of each network,
the recommended one, its regret (highest target mIoU minus its own) and its gain over the network before adaptation.
Writes JSON and prints a table; exits 1 if a recommended network is more than a point worse on the target
than the one before adaptation.
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
"""Largest accepted loss of mIoU of a recommended network."""


def selections(folders: Sequence[Path]) -> Iterator[Selection]:
    """The selection of every comparison below some folders."""
    for file in sorted(file for folder in folders for file in folder.rglob("selection.json")):
        yield Comparison(file.parent).selection


def truth(run: Run, split: Split) -> Scores:
    """Scores of a network on its target: stored ones, or computed now."""
    domain = run.recipe.domain("target")
    return stored_scores(run, "target", split, domain) or evaluate_domain(run, domain, "target", split)


def row(selection: Selection, split: Split) -> dict[str, Any]:
    """One selection on one split."""
    runs = {role: Run.open(report.run) for role, report in selection.candidates.items()}
    scored = {role: truth(run, split) for role, run in runs.items()}
    miou = {role: float(scores.miou or 0) for role, scores in scored.items()}
    recipe = next(iter(runs.values())).recipe
    return {
        "source": recipe.domain("source").title, "target": recipe.domain("target").title, "seed": recipe.seed,
        "network": recipe.model.name, "split": split, "recommended": selection.recommended,
        "summary": selection.summary, "labels_opened_for_the_selection": selection.labels_opened,
        "regret": max(miou.values()) - miou[selection.recommended],
        "gain": miou[selection.recommended] - miou[BASELINE],
        "candidates": {
            role: {
                "method": runs[role].recipe.method.model_dump(mode="json"), "steps": runs[role].recipe.steps,
                "miou": miou[role], "iou": {name: each.iou for name, each in scores.classes.items()},
                "settings": report.settings,
                "rejected": report.rejected, "better": report.better,
                "checks": [check.model_dump(mode="json") | {"passed": check.passed} for check in report.checks],
                "metrics": report.metrics.model_dump(mode="json"),
                "estimate": report.estimate and report.estimate.model_dump(mode="json"),
            }
            for (role, report), scores in zip(selection.candidates.items(), scored.values(), strict=True)
        },
    }  # fmt: skip


def line(values: dict[str, Any]) -> str:
    """A row of the table."""
    each = ", ".join(
        f"{'**' if role == values['recommended'] else ''}{role} {100 * one['miou']:.1f}"
        f"{'**' if role == values['recommended'] else ''}{' (rejected)' if one['rejected'] else ''}"
        for role, one in values["candidates"].items()
    )
    domains = f"{values['source']} → {values['target']}"
    return (
        f"| {domains} | {values['seed']} | {values['split']} | {each} | {100 * values['gain']:+.1f} | "
        f"{100 * values['regret']:.1f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--splits", default="val")
    parser.add_argument("--out", type=Path, default=Path("selections.json"))
    given = parser.parse_args()
    compared = list(selections(given.runs))
    if not compared:
        raise SystemExit(f"no selection.json below {', '.join(map(str, given.runs))}; run overfly adapt first")
    print("| from → to | seed | split | mIoU (%) on the target, the recommended one in bold | gain | regret |")
    print("|---|---|---|---|---|---|")
    rows = []
    for split in given.splits.split(","):
        for selection in compared:
            rows.append(row(selection, split))
            print(line(rows[-1]), flush=True)
    print(
        f"\n{len(rows)} selections: mean gain {100 * fmean(each['gain'] for each in rows):.1f}, mean regret "
        f"{100 * fmean(each['regret'] for each in rows):.1f}, least gain {100 * min(r['gain'] for r in rows):.1f}"
    )
    machine = Run.open(compared[0].candidates[BASELINE].run).machine
    content = {
        "machine": {key: machine.get(key) for key in ("device", "cores", "threads", "torch", "overfly")},
        "rows": rows,
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(each["gain"] < -HARM for each in rows))


if __name__ == "__main__":
    sys.exit(main())
