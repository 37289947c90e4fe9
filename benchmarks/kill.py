"""Kill a training with SIGKILL at random moments, resume it, and compare its weights with an uninterrupted run's.

    python benchmarks/kill.py --times 20 [--devices 2] [--out FOLDER]

Prints one line a trial and how many ended bitwise equal; exits 1 unless all did.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

RECIPE = """
source: {name: synthetic, scene: urban, size: 64, train: 8, val: 4}
target: {name: synthetic, scene: rural, size: 64, train: 8, val: 4}
method: {name: source_only, criterion: ohem}
optim: {name: adamw, lr: 1e-3}
augment: [dihedral, scale_jitter, color_jitter]
validation: {every: 10}
crop: 64
batch: {batch}
steps: 40
"""


def command(recipe: Path, out: Path, devices: int) -> list[str]:
    """The training, as a user types it."""
    start = [sys.executable, "-m", "overfly", "train", str(recipe), "--out", str(out), "--device", "cpu"]
    return [*start, "--devices", str(devices), "--checkpoint-every", "7", "--log-every", "1", "--quiet"]


def steps_done(out: Path) -> int:
    """Lines of the only log below a folder."""
    logs = list(out.glob("*/log.jsonl"))
    return len(logs[0].read_text().splitlines()) if logs else 0


def trial(recipe: Path, out: Path, devices: int, kills: list[int]) -> list[int]:
    """Train, killing once the log has as many lines as each of ``kills``; return the lines at each kill."""
    at = []
    for lines in kills:
        process = subprocess.Popen(command(recipe, out, devices), start_new_session=True, stderr=subprocess.DEVNULL)
        while process.poll() is None and steps_done(out) < lines:
            time.sleep(random.uniform(0.001, 0.02))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            at.append(steps_done(out))
        process.wait()
    subprocess.run(command(recipe, out, devices), check=True, stdout=subprocess.DEVNULL)
    return at


def main() -> int:
    """All trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    root = settings.out or Path(tempfile.mkdtemp(prefix="overfly-kill-"))
    root.mkdir(parents=True, exist_ok=True)
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.replace("{batch}", str(2 * settings.devices)))
    subprocess.run(command(recipe, root / "whole", settings.devices), check=True, stdout=subprocess.DEVNULL)
    whole = load_file(next((root / "whole").glob("*/checkpoints/best.safetensors")))
    equal = 0
    for number in range(settings.times):
        kills = sorted(random.sample(range(1, 42), k=random.choice([1, 1, 2])))
        out = root / f"trial-{number}"
        at = trial(recipe, out, settings.devices, kills)
        result = load_file(next(out.glob("*/checkpoints/best.safetensors")))
        same = result.keys() == whole.keys() and all(torch.equal(result[key], whole[key]) for key in whole)
        equal += same and bool(at)
        print(f"trial {number + 1}: killed after log line {at}, {'equal' if same else 'DIFFERENT'}", flush=True)
    print(f"{equal} of {settings.times} bitwise equal ({settings.devices} process(es))")
    return int(equal != settings.times)


if __name__ == "__main__":
    sys.exit(main())
