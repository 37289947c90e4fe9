"""Verdicts of `overfly adapt` beside the truth: what was chosen without labels, and what that cost.

    python benchmarks/verdicts.py RUNS… [--splits val,test] [--out verdicts.json]

RUNS are folders below which `overfly adapt` has left its runs. The target's labels are opened here, after all
verdicts, once for each network and split; `scores.json` of each run counts them. For every verdict: the true mIoU on
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

from overfly.adaptation.selection import BEFORE, Verdict
from overfly.data.domain import Split
from overfly.evaluation.scores import Scores
from overfly.training.evaluate import assess, recorded
from overfly.training.run import Run

HARM = 0.01
"""mIoU that a recommended network may be worse by before this ends with status 1."""


def verdicts(folders: Sequence[Path]) -> Iterator[tuple[Run, Verdict]]:
    """Every verdict below some folders, once, and a run that it lies in."""
    seen: set[str] = set()
    for file in sorted(file for folder in folders for file in folder.rglob("verdict.json")):
        text = file.read_text(encoding="utf-8")
        if text not in seen:
            seen.add(text)
            yield Run.open(file.parent), Verdict.model_validate_json(text)


def truth(run: Run, split: Split) -> Scores:
    """What a network scores on its target, measured where it was not yet."""
    domain = run.recipe.domain("target")
    return recorded(run, "target", split, domain) or assess(run, domain, "target", split)


def row(verdict: Verdict, split: Split) -> dict[str, Any]:
    """One verdict on one split."""
    runs = {role: Run.open(standing.run) for role, standing in verdict.networks.items()}
    found = {role: truth(run, split) for role, run in runs.items()}
    miou = {role: float(scores.miou or 0) for role, scores in found.items()}
    recipe = next(iter(runs.values())).recipe
    return {
        "source": recipe.domain("source").title, "target": recipe.domain("target").title, "seed": recipe.seed,
        "network": recipe.model.name, "split": split, "recommended": verdict.recommended,
        "sentence": verdict.sentence, "labels_opened_for_the_verdict": verdict.labels_opened,
        "regret": max(miou.values()) - miou[verdict.recommended],
        "gain": miou[verdict.recommended] - miou[BEFORE],
        "networks": {
            role: {
                "method": runs[role].recipe.method.model_dump(mode="json"), "steps": runs[role].recipe.steps,
                "miou": miou[role], "iou": {name: each.iou for name, each in scores.classes.items()},
                "settings": standing.settings,
                "against": standing.against, "figures": standing.figures.model_dump(mode="json"),
                "estimate": standing.estimate and standing.estimate.model_dump(mode="json"),
            }
            for (role, standing), scores in zip(verdict.networks.items(), found.values(), strict=True)
        },
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    each = ", ".join(
        f"{'**' if role == found['recommended'] else ''}{role} {100 * one['miou']:.1f}"
        f"{'**' if role == found['recommended'] else ''}{' (refused)' if one['against'] else ''}"
        for role, one in found["networks"].items()
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
        raise SystemExit(f"no verdict.json below {', '.join(map(str, given.runs))}; run overfly adapt first")
    print("| from → to | seed | split | mIoU (%) on the target, the recommended one in bold | gain | regret |")
    print("|---|---|---|---|---|---|")
    rows = []
    for split in given.splits.split(","):
        for _, verdict in held:
            rows.append(row(verdict, split))
            print(line(rows[-1]), flush=True)
    print(
        f"\n{len(rows)} verdicts: mean gain {100 * fmean(each['gain'] for each in rows):.1f}, mean regret "
        f"{100 * fmean(each['regret'] for each in rows):.1f}, least gain {100 * min(r['gain'] for r in rows):.1f}"
    )
    machine = held[0][0].machine
    told = {
        "machine": {key: machine.get(key) for key in ("device", "cores", "threads", "torch", "overfly")},
        "rows": rows,
    }
    given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return int(any(each["gain"] < -HARM for each in rows))


if __name__ == "__main__":
    sys.exit(main())
