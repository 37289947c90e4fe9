"""Latency of PyTorch eager and of every export on this CPU, in one process, in turn.

    python benchmarks/latency.py RUN… [--side 512] [--threads 2] [--rounds 15] [--out latency.json]

Each RUN is the folder of a finished run; its network is exported into a temporary folder, and timed at batch 1. All
candidates return class probabilities at full resolution, or class ids (--output classes). Every round times each
candidate once, so that other load on the machine affects all alike; ratios are of medians and of the shortest times.
On a shared machine set --threads 1 and compare CPU time, which excludes other processes. Writes JSON and prints a
table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from overfly.commands.export_data import patches
from overfly.commands.load_predictor import load_network
from overfly.core.choices import ExportOutput
from overfly.core.device import describe_machine
from overfly.evaluation.speed import compare_latency
from overfly.exporting.formats import quantize_onnx, quantize_openvino, write_onnx, write_openvino
from overfly.exporting.graph import ExportModule
from overfly.exporting.predictor import ExportSettings, metadata_entries
from overfly.exporting.runtimes import onnx_predictor, openvino_predictor
from overfly.models.segmenter import Segmenter
from overfly.training.run import Run


def candidates(run: Path, side: int, threads: int, output: ExportOutput, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the candidates by name, eager first."""
    segmenter, metadata = load_network(run)
    metadata = metadata.model_copy(update={"window": side, "fixed": True})
    image = next(patches(Run.open(run).recipe.domain("target"), "val", 1, side))
    tensor = torch.from_numpy(image)

    light = segmenter.without_training_heads()

    def eagerly(network: Segmenter) -> Any:
        with torch.inference_mode():
            scores = network.scores(tensor)
            return scores.argmax(1) if output == "classes" else scores.softmax(1)

    runs: dict[str, Callable[[], Any]] = {
        "torch eager 32": partial(eagerly, light),
        "torch eager 32, training heads on": partial(eagerly, segmenter),
    }
    calibration = list(patches(Run.open(run).recipe.domain("target"), "train", 16, side))
    module = ExportModule(segmenter, output=output, fixed=(side, side)).eval()
    texts = {
        kind: metadata_entries(metadata, ExportSettings(precision=kind, output=output, format="openvino"))
        for kind in ("32", "16", "int8")
    }
    plain = write_onnx(module, folder / "32.onnx", texts["32"])
    files = {
        "onnxruntime 32": plain,
        "onnxruntime int8": quantize_onnx(plain, folder / "int8.onnx", calibration, texts["int8"]),
        "openvino 32": write_openvino(plain, folder / "32.xml", texts["32"]),
        "openvino 16": write_openvino(plain, folder / "16.xml", texts["16"], half=True),
        "openvino int8": quantize_openvino(plain, folder / "int8.xml", calibration, texts["int8"]),
    }
    for name, file in files.items():
        opened = onnx_predictor if file.suffix == ".onnx" else openvino_predictor
        predictor = opened(file, threads=threads)
        runs[name] = partial(predictor.run, image)
    return runs


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| network | candidate | median ms | shortest ms | CPU ms | × eager (median) | (shortest) | (CPU) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network, latencies in rows.items():
        for name, each in latencies.items():
            lines.append(
                f"| {network} | {name} | {each['median_ms']:.1f} | {each['min_ms']:.1f} | "
                f"{each['cpu_ms']:.1f} | {each['times_median']:.2f} | {each['times_min']:.2f} | "
                f"{each['times_cpu']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", choices=("probabilities", "classes"), default="probabilities")
    parser.add_argument("--out", type=Path, default=Path("latency.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for run in given.runs:
        with tempfile.TemporaryDirectory() as folder:
            runs = candidates(run, given.side, given.threads, given.output, Path(folder))
            latencies = compare_latency(runs, rounds=given.rounds)
        eager = latencies["torch eager 32"]
        rows[load_network(run)[1].architecture] = {
            name: each.model_dump()
            | {
                "times_median": eager.median_ms / each.median_ms,
                "times_min": eager.min_ms / each.min_ms,
                "times_cpu": eager.cpu_ms / each.cpu_ms,
            }
            for name, each in latencies.items()
        }
    result = {
        "side": given.side, "batch": 1, "threads": given.threads, "output": given.output,
        "machine": describe_machine(), "networks": rows,
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
