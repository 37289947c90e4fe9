"""Time and memory of a training step of each method, as a ratio to a step of source only, in one run.

    python benchmarks/costs.py recipes/methods/*.yaml [--rounds 15] [--threads 2] [--out runs/costs]

All recipes are prepared beside each other, with random weights, and take turns: in every round each does one whole step
(batch, losses, backward pass, optimizer, teacher). A method's ratio is the median over the rounds of its seconds over
source only's seconds in the same round, so that other load of the machine slows both. Memory is the peak of a
process of its own that does three steps, less what the same process holds before it builds the networks. Writes
costs.json and prints a table. One of the recipes must be of method `source_only`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from overfly.core.device import describe_machine
from overfly.recipe import load
from overfly.training.engine import TrainerConfig, choose_arithmetic, launch_fabric
from overfly.training.run import Run
from overfly.training.setup import prepare_training
from overfly.training.trainer import Trainer

CONFIG = TrainerConfig(device="cpu", quiet=True)
FEW = 3
"""Steps of warm-up, and steps whose memory is measured."""
SMALL = ("source.train=40", "target.train=40")
"""Fewer images to synthesize; the time of a step does not depend on their number."""


def stepper(file: Path, folder: Path) -> Callable[[int], object]:
    """A function that does step ``number`` of a recipe."""
    recipe = load(file)
    recipe = load(file, *(override for override in SMALL if getattr(recipe, override.partition(".")[0]) is not None))
    fabric = launch_fabric(recipe, CONFIG)
    arithmetic = choose_arithmetic(recipe, fabric.device)
    fabric = launch_fabric(recipe, CONFIG, arithmetic)
    setup = prepare_training(recipe, fabric, CONFIG)
    trainer = Trainer(Run.open_or_create(folder, recipe), fabric, CONFIG, setup, arithmetic)
    trainer.resume()
    return lambda number: trainer.train_step(number, iter([trainer.batches[number]]))


def peak() -> float:
    """Peak memory of this process, in 10⁶ bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("memory is read from /proc/self/status, which does not exist")


def memory(file: Path, threads: int) -> float:
    """Peak of a process that does some steps of a recipe, in 10⁶ bytes, above its memory before."""
    command = [sys.executable, __file__, str(file), "--memory", "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/costs"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        if given.memory:
            before = peak()
            step = stepper(given.recipes[0], Path(folder))
            for number in range(FEW):
                step(number)
            print(peak() - before)
            return
        steps = {file.stem: stepper(file, Path(folder)) for file in given.recipes}
        if "source_only" not in steps:
            raise SystemExit("no recipe is named source_only.yaml; add it, as the baseline")
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(FEW + given.rounds):
            for name, step in steps.items():
                started = time.perf_counter()
                step(number)
                if number >= FEW:
                    seconds[name].append(time.perf_counter() - started)
            print(f"round {number + 1} of {FEW + given.rounds}", file=sys.stderr, flush=True)
    base = seconds["source_only"]
    rows: list[dict[str, Any]] = [
        {
            "recipe": name,
            "seconds": statistics.median(values),
            "ratio": statistics.median(own / plain for own, plain in zip(values, base, strict=True)),
            "memory_mb": memory(file, given.threads),
        }
        for (name, values), file in zip(seconds.items(), given.recipes, strict=True)
    ]
    lightest = next(row["memory_mb"] for row in rows if row["recipe"] == "source_only")
    given.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": describe_machine(), "rounds": given.rounds, "rows": rows}
    (given.out / "costs.json").write_text(json.dumps(content, indent=1) + "\n")
    print("| recipe | seconds a step | ratio | memory | ratio |\n|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row["ratio"]):
        print(
            f"| {row['recipe']} | {row['seconds']:.2f} | {row['ratio']:.2f} | {row['memory_mb']:.0f} MB "
            f"| {row['memory_mb'] / lightest:.2f} |"
        )


if __name__ == "__main__":
    main()
