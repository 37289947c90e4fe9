"""Selections of `overfly adapt` against target labels: recommendation, gain and regret.

    python benchmarks/selections.py RUNS… [--splits val,test] [--out selections.json]

RUNS are folders with runs and comparisons of `overfly adapt`. Target labels are opened here, after all selections, once
for each network and split; `scores.json` of each run counts them. For every selection: the target mIoU of each network,
the recommended one, its regret (highest target mIoU minus its own), its gain over the network before adaptation and,
where the opposite direction was adapted too, the share of the gap that it closes to that direction's source-only
network, which was trained on the labels of this target. Writes JSON and prints a table, and a second one of other rules
of choice: always one candidate, the highest value of a label-free metric, or of the sum or mean rank of two of them;
and the best of these rules on all other pairs of domains, applied to the pair that is left out. Exits 1 if a
recommended network is more than a point worse on the target than the one before adaptation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from overfly.adaptation.pipeline import AVERAGED
from overfly.adaptation.selection import ADAPTED, BASELINE, Comparison, Selection
from overfly.core.progress import percent
from overfly.data.domain import Split
from overfly.evaluation.scores import Scores
from overfly.training.evaluate import Role, evaluate_domain, stored_scores
from overfly.training.run import Run

CANDIDATES = (BASELINE, "recalibrated", "half recalibrated", "class-weighted", ADAPTED, AVERAGED)
"""Candidates that a rule may always select; of several adapted ones the last."""
HARM = 0.01
"""Largest accepted loss of mIoU of a recommended network."""


def selections(folders: Sequence[Path]) -> Iterator[Selection]:
    """The selection of every comparison below some folders."""
    for file in sorted(file for folder in folders for file in folder.rglob("selection.json")):
        yield Comparison(file.parent).selection


def truth(run: Run, split: Split, role: Role = "target") -> Scores:
    """Scores of a network on a domain of its recipe: stored ones, or computed now."""
    domain = run.recipe.domain(role)
    return stored_scores(run, role, split, domain) or evaluate_domain(run, domain, role, split)


def oracles(compared: Sequence[Selection]) -> dict[tuple[str, str, int], Run]:
    """Source-only networks by the title of their source, the network's name and the seed."""
    runs = [Run.open(selection.candidates[BASELINE].run) for selection in compared]
    return {(run.recipe.domain("source").title, run.recipe.model.name, run.recipe.seed): run for run in runs}


def row(selection: Selection, split: Split, oracle: Run | None) -> dict[str, Any]:
    """One selection on one split; ``oracle`` is the network that was trained on its target's labels."""
    runs = {role: Run.open(report.run) for role, report in selection.candidates.items()}
    scored = {role: truth(run, split) for role, run in runs.items()}
    miou = {role: float(scores.miou or 0) for role, scores in scored.items()}
    recipe = next(iter(runs.values())).recipe
    gain = miou[selection.recommended] - miou[BASELINE]
    best = None if oracle is None else truth(oracle, split, "source").miou
    return {
        "source": recipe.domain("source").title, "target": recipe.domain("target").title, "seed": recipe.seed,
        "network": recipe.model.name, "split": split, "recommended": selection.recommended,
        "summary": selection.summary, "labels_opened_for_the_selection": selection.labels_opened,
        "regret": max(miou.values()) - miou[selection.recommended],
        "gain": gain, "oracle": best, "closed": best and gain / max(1e-9, best - miou[BASELINE]),
        "candidates": {
            role: {
                "method": runs[role].recipe.method.model_dump(mode="json"), "steps": runs[role].recipe.steps,
                "miou": miou[role],
                "iou": {name: each.iou for name, each in scores.classes.items()},
                "settings": report.settings,
                "rejected": report.rejected, "better": report.better,
                "checks": [check.model_dump(mode="json") | {"passed": check.passed} for check in report.checks],
                "metrics": report.metrics.model_dump(mode="json"),
                "validators": report.metrics.by_validator(),
                "estimate": report.estimate and report.estimate.model_dump(mode="json"),
            }
            for (role, report), scores in zip(selection.candidates.items(), scored.values(), strict=True)
        },
    }  # fmt: skip


def values(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Values that rules compare, of each accepted candidate of a selection."""
    accepted = {name: one["validators"] for name, one in row["candidates"].items() if not one["rejected"]}
    return {name: {key: float(each) for key, each in one.items() if each is not None} for name, one in accepted.items()}


def choose(rule: tuple[str, ...], row: dict[str, Any]) -> str:
    """The candidate that a rule selects: always this one, or that of the highest metric, or sum or mean rank of two."""
    found = values(row)
    if len(rule) == 1 and rule[0] in CANDIDATES:
        adapted = sorted(name for name in row["candidates"] if name.startswith(ADAPTED))
        name = rule[0] if rule[0] != ADAPTED else adapted[-1]
        return name if name in row["candidates"] else BASELINE
    names = list(found)
    if rule[0] == "sum of":
        return max(names, key=lambda name: sum(found[name].get(key, 0.0) for key in rule[1:]))
    ranks = [
        sum(found[name].get(key, 0.0) > found[other].get(key, 0.0) for key in rule for other in names) for name in names
    ]
    return names[max(range(len(names)), key=lambda index: ranks[index])]


def rules(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Regret of every rule for each selection, and of the best rule of all other pairs."""
    metrics = sorted({key for row in rows for one in values(row).values() for key in one})
    pairs_of = list(combinations(metrics, 2))
    single = [(name,) for name in (*CANDIDATES, *metrics)]
    every: list[tuple[str, ...]] = [*single, *pairs_of, *(("sum of", *two) for two in pairs_of)]

    def regret(rule: tuple[str, ...], row: dict[str, Any]) -> float:
        miou: dict[str, float] = {name: one["miou"] for name, one in row["candidates"].items()}
        return max(miou.values()) - miou[choose(rule, row)]

    regrets = {" + ".join(rule).replace("of +", "of"): [regret(rule, row) for row in rows] for rule in every}
    pairs = [frozenset((row["source"], row["target"])) for row in rows]
    left_out = []
    for index, pair in enumerate(pairs):
        others = [number for number, other in enumerate(pairs) if other != pair]
        best = min(regrets, key=lambda rule: fmean([regrets[rule][number] for number in others] or [0.0]))
        left_out.append(regrets[best][index])
    return {"recommended": [row["regret"] for row in rows], "best rule of the other pairs": left_out} | regrets


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
        f"{100 * values['regret']:.1f} | {percent(values['oracle'], 1)} | {percent(values['closed'], 0)} |"
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
    print("| from → to | seed | split | mIoU (%) on the target, recommended in bold | gain | regret | oracle | gap |")
    print("|---|---|---|---|---|---|---|---|")
    rows, trained = [], oracles(compared)
    for split in given.splits.split(","):
        for selection in compared:
            recipe = Run.open(selection.candidates[BASELINE].run).recipe
            oracle = trained.get((recipe.domain("target").title, recipe.model.name, recipe.seed))
            rows.append(row(selection, split, oracle))
            print(line(rows[-1]), flush=True)
    print(
        f"\n{len(rows)} selections: mean gain {100 * fmean(each['gain'] for each in rows):.1f}, mean regret "
        f"{100 * fmean(each['regret'] for each in rows):.1f}, least gain {100 * min(r['gain'] for r in rows):.1f}"
    )
    print("\n| rule | mean regret | highest regret | least gain over source only |\n|---|---|---|---|")
    best = [max(one["miou"] for one in each["candidates"].values()) for each in rows]
    base = [each["candidates"][BASELINE]["miou"] for each in rows]
    table = sorted(rules(rows).items(), key=lambda item: fmean(item[1]))
    for name, regrets in table:
        gain = min(top - lost - start for top, lost, start in zip(best, regrets, base, strict=True))
        print(f"| {name} | {100 * fmean(regrets):.1f} | {100 * max(regrets):.1f} | {100 * gain:+.1f} |")
    machine = Run.open(compared[0].candidates[BASELINE].run).machine
    content = {
        "machine": {key: machine.get(key) for key in ("device", "cores", "threads", "torch", "overfly")},
        "rules": dict(table),
        "rows": rows,
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(each["gain"] < -HARM for each in rows))


if __name__ == "__main__":
    sys.exit(main())
