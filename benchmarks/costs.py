"""Time and memory of training steps, as ratios of two things that take turns in one process.

    python benchmarks/costs.py [--rounds 15] [--threads 2] [--out docs/results]
    python benchmarks/costs.py recipes/methods/*.yaml [--rounds 15] [--threads 2] [--out runs/costs]

Without recipes (`make bench`): the arithmetic of a step, its overhead over forward pass, backward pass and optimizer on
a fixed batch, and the share of the time that training waits for images. Writes speed.json and speed.md.

With recipes: all are prepared beside each other, with random weights, and take turns: in every round each does one
whole step (batch, losses, backward pass, optimizer, teacher). A method's ratio is the median over the rounds of its
seconds over source only's seconds in the same round, so that other load of the machine slows both. Memory is the peak
of a process of its own that does three steps, less what the same process holds before it builds the networks. Writes
costs.json and prints a table. One of the recipes must be of method `source_only`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from overfly.core.device import describe_machine
from overfly.core.prefetch import prefetch
from overfly.data.loading import batch_loader
from overfly.data.synthetic import synthesize
from overfly.recipe import Recipe, load
from overfly.training.engine import (
    ARITHMETICS,
    TrainerConfig,
    choose_arithmetic,
    launch_fabric,
    plain_step,
    time_arithmetics,
)
from overfly.training.run import Run
from overfly.training.setup import prepare_training
from overfly.training.trainer import READ_AHEAD, Trainer

CONFIG = TrainerConfig(device="cpu", quiet=True)
FEW = 3
"""Steps of warm-up, and steps whose memory is measured."""
SCENES = {"source": "urban", "target": "rural"}
NETWORKS = (("lraspp_mobilenet_v2", 256), ("pidnet_s", 128), ("pidnet_s", 256))
SMALL = ("source.train=40", "target.train=40")
"""Fewer images to synthesize; the time of a step does not depend on their number."""


def trainer_of(recipe: Recipe, folder: Path) -> Trainer:
    """A trainer before its first step."""
    fabric = launch_fabric(recipe, CONFIG)
    arithmetic = choose_arithmetic(recipe, fabric.device)
    fabric = launch_fabric(recipe, CONFIG, arithmetic)
    setup = prepare_training(recipe, fabric, CONFIG)
    trainer = Trainer(Run.open_or_create(folder, recipe), fabric, CONFIG, setup, arithmetic)
    trainer.resume()
    return trainer


def stepper(file: Path, folder: Path) -> Callable[[int], object]:
    """A function that does step ``number`` of a recipe."""
    recipe = load(file)
    recipe = load(file, *(override for override in SMALL if getattr(recipe, override.partition(".")[0]) is not None))
    trainer = trainer_of(recipe, folder)
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


def in_turn(steps: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; with one thread those of the CPU, which other processes do not lengthen."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(FEW + rounds):
        for name, step in steps.items():
            started = clock()
            step(number)
            if number >= FEW:
                seconds[name].append(clock() - started)
        print(f"round {number + 1} of {FEW + rounds}", file=sys.stderr, flush=True)
    return seconds


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median ratio of seconds in the same round."""
    return statistics.median(own / plain for own, plain in zip(values, base, strict=True))


def step_ratios(network: str, crop: int, precision: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Steps of source only and of self-training on a fixed batch, over their losses, backward pass and optimizer."""
    settings = [f"model={network}", f"crop={crop}", "batch=4", "clip=10", f"precision={precision}", "optim=adamw"]
    settings += ["augment=[dihedral, scale_jitter, color_jitter]", "steps=100000"]
    domains = {role: {"name": "synthetic", "scene": scene, "train": 8} for role, scene in SCENES.items()}
    plain = load(domains, *settings)
    trainer = trainer_of(plain, folder / "source_only")
    trainer.save_weights(folder / "start.safetensors")
    adapted = {**domains, "start": str(folder / "start.safetensors"), "method": "multiscale_self_training"}
    trainers = {"source_only": trainer, "self_training": trainer_of(load(adapted, *settings), folder / "adapted")}
    steps: dict[str, Callable[[int], object]] = {}
    for name, each in trainers.items():
        batch, device = each.fabric.to_device(each.batches[0]), each.fabric.device
        bare = plain_step(each.recipe.method, copy.deepcopy(each.nets), each.arithmetic, device)
        steps[f"bare {name}"] = lambda _, bare=bare, batch=batch: bare(batch)
        steps[name] = lambda number, each=each, batch=batch: each.train_step(number, iter([batch]))
    seconds = in_turn(steps, rounds)
    return {
        "network": network, "crop": crop, "precision": precision,
        "source_only": ratio(seconds["source_only"], seconds["bare source_only"]),
        "self_training": ratio(seconds["self_training"], seconds["bare self_training"]),
        "self_training_over_source_only": ratio(seconds["self_training"], seconds["source_only"]),
    }  # fmt: skip


def waits(images: Path | None, folder: Path) -> dict[str, float]:
    """Share of the time that steps wait for images, in the first epoch and after it; and what reading costs a step.

    That is the ratio of the seconds of a step, while a thread reads the next images, to those of one on a fixed batch
    before there is such a thread, and after it has ended.
    """
    domain: dict[str, Any] = {"name": "synthetic", "scene": "urban", "train": 24}
    if images is not None:
        domain = {
            "name": "folder",
            "root": str(images),
            "images": "images",
            "masks": "masks",
            "classes": list("abcdefg"),
        }
    recipe = load({"source": domain}, "model=lraspp_mobilenet_v2", "crop=256", "batch=4", "precision=auto", "steps=84")
    trainer = trainer_of(recipe, folder)
    shares, steps = {}, iter(range(84))
    batch = trainer.batches[0]

    def step(batch: Any) -> float:
        started = time.perf_counter()
        trainer.train_step(next(steps), iter([batch]))
        return time.perf_counter() - started

    fixed = [step(batch) for _ in range(18)][FEW:]
    with prefetch(batch_loader(trainer.batches, 0, 48, workers=0, pin=False), READ_AHEAD) as batches:
        for name, count in (("first", 12), ("later", 36)):
            waited, reading = 0.0, []
            for _ in range(count):
                started = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - started
                reading.append(step(batch))
            shares[name] = waited / (waited + sum(reading))
    fixed += [step(batch) for _ in range(18)][FEW:]
    return {**shares, "step": statistics.median(reading) / statistics.median(fixed)}


def write_images(folder: Path, count: int = 24, side: int = 1024) -> Path:
    """PNG images with masks."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        image, label = synthesize("urban", "train", number, side)
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        Image.fromarray(label).save(folder / "masks" / f"{number}.png")
    return folder


def speed(rounds: int, out: Path) -> None:
    """Write speed.json and speed.md."""
    machine = describe_machine()
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip()
    shape: dict[str, Any] = {"classes": 7, "bands": 3, "batch": 4, "device": torch.device("cpu")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = {
            f"{network} {size}": {
                str(key): value for key, value in time_arithmetics(network, size=size, **shape).items()
            }
            for network, size in NETWORKS
        }
        overheads = [
            step_ratios(network, size, precision, rounds, folder / f"{network}-{size}-{precision}")
            for network, size in NETWORKS
            for precision in ("32", "bf16")
        ]
        waiting = {
            "synthetic images of 256²": waits(None, folder / "synthetic"),
            "PNG images of 1024²": waits(write_images(folder / "png"), folder / "folder"),
        }
    values = {
        "machine": machine, "commit": commit, "seconds": times, "steps": overheads, "waiting": waiting
    }  # fmt: skip
    (out / "speed.json").write_text(json.dumps(values, indent=1) + "\n")
    lines = [
        "# Speed of training", "",
        "`make bench`: ratios of two things that take turns in one process, so that other load of the machine slows "
        f"both; with one thread, seconds of the CPU. Batch 4. {machine['device']}, {machine['threads']} thread(s), "
        f"torch {machine['torch']}, commit {commit}. "
        "[speed.json](speed.json)", "",
        "## Arithmetic", "",
        "Forward pass, backward pass and optimizer of source only, as a share of the seconds in 32 bits, contiguous. "
        "`precision: auto` chooses the smallest.", "",
        "| network, crop | seconds in 32 bits | " + " | ".join(str(each) for each in ARITHMETICS[1:]) + " |",
        "|---|---|" + "---|" * (len(ARITHMETICS) - 1),
    ]  # fmt: skip
    for title, row in times.items():
        shares = (f"{row[str(each)] / row['32']:.2f}" if str(each) in row else "–" for each in ARITHMETICS[1:])
        lines.append(f"| {title} | {row['32']:.3f} | " + " | ".join(shares) + " |")
    lines += [
        "", "## Step", "",
        "A whole training step on a fixed batch (augmentation, clipping and teacher update included) over losses, "
        "backward pass and optimizer alone; and a step of `multiscale_self_training` over one of source only.", "",
        "| network, crop | precision | source only / bare | self-training / bare | self-training / source only |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['network']} {row['crop']} | {row['precision']} | {row['source_only']:.2f} | "
        f"{row['self_training']:.2f} | {row['self_training_over_source_only']:.2f} |"
        for row in overheads
    ]
    lines += [
        "", "## Waiting for images", "",
        "Share of the time that steps of `lraspp_mobilenet_v2` at crop 256 wait for the reading thread: the first 12 "
        "steps, and 36 later ones; and the seconds of the later steps over those of steps on a fixed batch.", "",
        "| images | first | later | step / on a fixed batch |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {title} | {row['first']:.1%} | {row['later']:.1%} | {row['step']:.2f} |" for title, row in waiting.items()
    ]
    (out / "speed.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.recipes:
        speed(given.rounds, given.out)
        return
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
        seconds = in_turn(steps, given.rounds)
    base = seconds["source_only"]
    rows: list[dict[str, Any]] = [
        {
            "recipe": name,
            "seconds": statistics.median(values),
            "ratio": ratio(values, base),
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
