"""Parity with PyTorch of every network × format × precision, as a table.

    python benchmarks/parity.py RUN… [--networks all] [--images 6] [--out parity.json]

Each RUN is the folder of a finished run, whose network and target images are used. The other networks of the registry
have no run: they are built for the run's classes, trained a few steps on its source (--steps), and measured on the same
images; the table states this. Writes JSON and prints a Markdown table; exits 1 where anything is beyond tolerance.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from overfly.commands.export import export
from overfly.core.choices import ExportFormat, ExportPrecision
from overfly.core.errors import OverflyError
from overfly.exporting import exporter as exporting
from overfly.exporting.exporter import ParityError
from overfly.exporting.predictor import ExportSettings
from overfly.models.network import names
from overfly.recipe import Recipe
from overfly.training.engine import TrainerConfig, launch_fabric
from overfly.training.run import Run
from overfly.training.train_recipe import train_recipe

KINDS: list[tuple[ExportFormat, ExportPrecision]] = [
    ("onnx", "32"), ("onnx", "16"), ("onnx", "int8"),
    ("openvino", "32"), ("openvino", "16"), ("openvino", "int8"),
    ("torch", "32"), ("torch", "16"),
]  # fmt: skip


def quick(run: Run, name: str, steps: int, folder: Path) -> Run:
    """Train another network a few steps on a run's source."""
    own = run.recipe
    values: dict[str, Any] = {
        "source": own.domain("source").model_dump(mode="json"),
        "target": own.domain("target").model_dump(mode="json"),
        "model": name, "steps": steps, "crop": min(own.crop, 128), "batch": 2, "resize": own.resize,
        "window": min(own.window or 256, 256), "optim": {"name": "adamw", "lr": 1e-3},
    }  # fmt: skip
    recipe = Recipe.model_validate(values)
    config = TrainerConfig("cpu", quiet=True)
    return train_recipe(recipe, folder / name, launch_fabric(recipe, config), config)


def rows_of(run: Run, weights: str, images: int, folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind, precision in KINDS:
        name = f"{kind}-{precision}"
        try:
            result = export(
                run.path,
                format=kind,
                precision=precision,
                images=images,
                labels=False,
                name=name,
                out=folder,
                quiet=True,
            ).report.model_dump(mode="json")
        except ParityError as error:
            result = json.loads((folder / f"{name}.failed.json").read_text()) | {"failed": str(error)}
        except OverflyError as error:
            print(f"{kind} {precision}: {error}", file=sys.stderr)
            continue
        network = run.recipe.model.name
        target = run.recipe.domain("target").title
        for parity in result["parity"]:
            row = {
                "network": network, "weights": weights, "target": target, "format": kind, "precision": precision,
                "megabytes": result["bytes"] / 1e6, "failed": parity["agreement"] < parity["tolerance"]["agreement"],
                **{key: parity[key] for key in ("backend", "agreement", "miou", "miou_of_torch")},
                "probability_difference": parity["probability_difference"],
            }  # fmt: skip
            rows.append(row)
            print(line(row), flush=True)
        for file in folder.glob(f"{name}.*"):
            file.unlink()
    return rows


def line(row: dict[str, Any]) -> str:
    difference = f"{row['probability_difference']:.2g}"
    word = "beyond tolerance" if row["failed"] else "passes"
    return (
        f"| {row['network']} ({row['weights']}) | {row['target']} | {row['format']} {row['precision']} | "
        f"{row['backend']} | {100 * row['agreement']:.3f} | {difference} | {row['megabytes']:.1f} | {word} |"
    )


def main() -> int:
    exporting.ROUNDS, exporting.SECONDS = 1, 0.0  # latency has a benchmark of its own
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--networks", default="all", help="all, none, or names with commas, beside the runs' own")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("parity.json"))
    given = parser.parse_args()
    print("| network | target | file | run by | same class (%) | largest probability difference | MB | |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    others = [] if given.networks == "none" else list(names()) if given.networks == "all" else given.networks.split(",")
    for path in given.runs:
        run = Run.open(path)
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(run, "trained", given.images, Path(folder))
            for name in others:
                if name != run.recipe.model.name:
                    other = quick(run, name, given.steps, Path(folder))
                    rows += rows_of(other, f"{given.steps} steps", given.images, Path(folder))
                    shutil.rmtree(other.path)
        result = {"torch": torch.__version__, "version": ExportSettings().version, "images": given.images, "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
