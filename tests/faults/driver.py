"""Make the n-th write, rename, fsync or creation of a file fail, or kill there, and look at what is left.

    gcc -shared -fPIC -o shim.so tests/faults/shim.c -ldl
    LD_PRELOAD=$PWD/shim.so PYTHONPATH=src:tests:tests/faults python tests/faults/driver.py [SCENARIO …] [--most 1000]

Every case runs in a forked child, in a copy of the scenario's folder. It must succeed, be killed, or raise an error
that the command line prints as one sentence. Then its files are whole or absent, and the same work done again without a
fault gives the same content and leaves no unfinished file. Prints a line of JSON a scenario; exits 1 if a case failed.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import small_network  # noqa: F401 - registers the network
from fake_hub import FakeHub, fake_hub
from overfly import adapt, benchmark, train
from overfly.adaptation import pipeline
from overfly.adaptation.selection import Comparison
from overfly.core.atomic_files import TRAILER, TRAILER_BYTES
from overfly.core.errors import OverflyError
from overfly.data import loading
from overfly.data.domain import Domain
from overfly.data.synthetic import write_synthetic
from overfly.exporting import exporter, hub
from overfly.exporting.predictor import ExportSettings, model_metadata
from overfly.exporting.runtimes import check_export
from overfly.models.segmenter import Segmenter
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import map_raster
from overfly.recipe import load
from overfly.training.run import Run
from random_networks import random_network
from rasters import ids, noise, pointwise, write

CALLS = {"write": 1, "rename": 2, "fsync": 4, "create": 8}
KILL, SHORT = -1, -2
FAULTS = {
    "kill": (KILL, ("write", "rename", "fsync", "create")), "full disk": (errno.ENOSPC, ("write", "create")),
    "EIO": (errno.EIO, ("write", "fsync", "rename")), "read only": (errno.EROFS, ("create", "rename")),
    "EACCES": (errno.EACCES, ("create", "rename")), "short write": (SHORT, ("write",)),
}  # fmt: skip
"""Faults, and the calls that they befall."""


IMPORTED = (
    "huggingface_hub.hf_api", "huggingface_hub.repocard",
    "kornia", "lightning_fabric.strategies.ddp", "matplotlib.figure", "overfly.reporting.report",
    "overfly.training.trainer", "overfly.training.train_recipe", "torch.export.passes", "torch._dynamo",
    "torch._inductor.compile_fx",
)  # fmt: skip
"""Modules that the work imports late, imported once for all children."""


class Scenario(NamedTuple):
    """Work in a folder.

    Attributes:
        prepare: writes what the work needs.
        act: does the work, and returns its content.
        check: raises unless every file of the work is whole or absent.
    """

    prepare: Callable[[Path], object]
    act: Callable[[Path], bytes]
    check: Callable[[Path], object]


def save_weights(folder: Path) -> bytes:
    network = random_network("small_network")
    network.mean += 1
    return network.save(folder / "w.safetensors").read_bytes()


WORLD: dict[str, Any] = {"name": "synthetic", "scene": "urban", "size": 64, "train": 4, "val": 2, "test": 2}
RECIPE = {"source": WORLD, "model": "small_network", "optim": {"name": "sgd", "lr": 0.01}, "crop": 64, "batch": 2}


def train_run(folder: Path) -> bytes:
    run = train(load(RECIPE, "steps=3"), out=folder, device="cpu", quiet=True, checkpoint_every=1).run
    return b"".join(tensor.numpy().tobytes() for tensor in run.segmenter().state_dict().values())


def check_runs(folder: Path) -> None:
    for file in folder.glob("*/recipe.yaml"):
        run = Run.open(file.parent)
        assert run.recipe
        assert list(run.log.rows()) or not run.scores
        run.whole_checkpoint()
        if run.weights.exists():
            Segmenter.load(run.weights)


def export(folder: Path) -> bytes:
    segmenter, image = random_network("small_network"), np.full((1, 3, 64, 64), 100, np.float32)
    metadata = model_metadata(segmenter, window=64)
    data = exporter.EvaluationData([image], [image], None, "gray")
    file, report = exporter.export(
        segmenter, metadata, ExportSettings(format="torch"), data, folder=folder, name="net", on_progress=lambda _: None
    )
    assert check_export(file)
    return str(report.parity[0].agreement).encode()


def check_exports(folder: Path) -> None:
    if (folder / "net.pt2").exists():
        assert check_export(folder / "net.pt2")


def make_map(folder: Path) -> bytes:
    settings = MapSettings(window=64, uncertainty=True)
    map_raster(pointwise(), str(folder / "scene.tif"), folder / "map.tif", settings, network="none")
    return ids(folder / "map.tif").tobytes() + ids(folder / "map_uncertainty.tif").tobytes()


def check_map(folder: Path) -> None:
    for name in ("map.tif", "map_uncertainty.tif"):
        if (folder / name).exists():
            assert ids(folder / name).shape == (200, 150)


def report(folder: Path) -> bytes:
    from overfly.commands.train import report as write_report

    write_report([next(folder.glob("*/recipe.yaml")).parent], out=folder / "report.html", images=0, speed=False)
    check_report(folder)
    return b"written"


def check_report(folder: Path) -> None:
    if (folder / "report.html").exists():
        assert (folder / "report.html").read_text().rstrip().endswith("</html>")


def synthesize(folder: Path) -> bytes:
    write_synthetic(folder / "world", size=16, train=1, val=1, test=1)
    return b"".join(file.read_bytes() for file in sorted((folder / "world").rglob("*.png")))


def move_from_hub(folder: Path) -> bytes:
    """The part of `hub load` after the download."""
    shutil.copytree(folder / "downloaded", folder / "copy", dirs_exist_ok=True)
    files = hub._move_exports(folder / "copy", folder / "out", "me/net")
    return files[0].read_bytes()


def check_hub(folder: Path) -> None:
    check_exports(folder / "out")


def prepare_hub(folder: Path) -> None:
    (folder / "downloaded").mkdir()
    export(folder / "downloaded")


def push_to_hub(folder: Path) -> bytes:
    """Push an export; its card is written to a temporary folder first."""
    (folder / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = str(folder / "tmp")
    with fake_hub() as address:
        try:
            hub.push(folder / "downloaded" / "net.pt2", "me/net", endpoint=address)
        except OverflyError:
            assert not FakeHub.files  # one commit holds all files
            raise
        return b"".join(name.encode() + data for name, data in sorted(FakeHub.files.items()))


def fill_cache(folder: Path) -> bytes:
    """Decoded images and masks, by way of a cache folder."""
    domain = Domain.model_validate({"name": "loveda", "root": str(folder / "world"), "scene": "urban"})
    loading._VERIFIED.clear()  # as in a new process
    arrays = [loading.open_image(domain, item, None, folder / "cache") for item in domain.items("train")]
    return b"".join(np.asarray(array).tobytes() for pair in arrays for array in pair)


def check_cache(folder: Path) -> None:
    for file in folder.glob("cache/**/*.npy"):
        assert file.read_bytes()[-TRAILER_BYTES:].startswith(TRAILER)


def adapt_run(folder: Path) -> bytes:
    target = {**WORLD, "scene": "rural"}
    recipe = load({**RECIPE, "target": target, "start": {**RECIPE, "steps": 2}}, "method=multiscale_self_training")
    path = adapt(recipe, "steps=2", out=folder, device="cpu", quiet=True, checkpoint_every=1).path
    comparison = Comparison(path)
    tensors = Segmenter.load(comparison.weights).state_dict().values()
    return comparison.selection.recommended.encode() + b"".join(tensor.numpy().tobytes() for tensor in tensors)


def check_comparisons(folder: Path) -> None:
    check_runs(folder)
    for comparison in Comparison.find_all(folder):
        assert comparison.selection.candidates
    for file in folder.glob("*_comparison*/*.safetensors"):
        Segmenter.load(file)


def benchmark_run(folder: Path) -> bytes:
    load(RECIPE, "steps=2").save(folder / "benchmark.yaml")
    table = benchmark([folder / "benchmark.yaml"], seeds="1", out=folder, size=64, device="cpu", quiet=True).table
    return table.model_dump_json(include={"seeds": True, "rows": {0: {"miou": True}}}).encode()


def check_benchmark(folder: Path) -> None:
    check_runs(folder)
    if (folder / "table.json").exists():
        assert json.loads((folder / "table.json").read_text())["rows"]


def write_carelessly(folder: Path) -> bytes:
    """Leave a torn file behind, and fail with a traceback on a full disk."""
    try:
        with (folder / "a").open("wb", buffering=0) as file:
            for _ in range(4):
                file.write(b"12345678")
    except OSError:
        return bytes(1 // 0)
    return (folder / "a").read_bytes()


def check_careless(folder: Path) -> None:
    assert not (folder / "a").exists() or (folder / "a").stat().st_size == 32


SCENARIOS = {
    "weights": Scenario(
        lambda folder: random_network("small_network").save(folder / "w.safetensors"),
        save_weights,
        lambda folder: Segmenter.load(folder / "w.safetensors"),
    ),
    "training": Scenario(lambda _: None, train_run, check_runs),
    "export": Scenario(lambda _: None, export, check_exports),
    "map": Scenario(lambda folder: write(folder / "scene.tif", noise(200, 150)), make_map, check_map),
    "report": Scenario(train_run, report, check_report),
    "synthesize": Scenario(lambda _: None, synthesize, lambda _: None),
    "hub": Scenario(prepare_hub, move_from_hub, check_hub),
    "push": Scenario(prepare_hub, push_to_hub, lambda folder: check_export(folder / "downloaded" / "net.pt2")),
    "cache": Scenario(
        lambda folder: write_synthetic(folder / "world", size=16, train=2, val=1, test=1), fill_cache, check_cache
    ),
    "adapt": Scenario(lambda _: None, adapt_run, check_comparisons),
    "benchmark": Scenario(lambda _: None, benchmark_run, check_benchmark),
    "careless": Scenario(lambda _: None, write_carelessly, check_careless),
}


def in_child(work: Callable[[], bytes]) -> tuple[str, str]:
    """Do work in a forked child.

    Returns:
        done, refused, killed or failed; and the digest of its content, the message or the traceback.
    """
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(300)
        try:
            outcome, text = "done", hashlib.sha256(work()).hexdigest()
        except (OverflyError, OSError) as error:
            outcome, text = "refused", f"{type(error).__name__}: {error}"
        except BaseException:
            outcome, text = "failed", traceback.format_exc()
        os.write(send, f"{outcome}\n{text}".encode()[-60_000:])
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if not answer:
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        return ("killed" if killed else "failed"), f"status {status}"
    outcome, _, text = answer.partition("\n")
    return outcome, text


def run_case(scenario: Scenario, prepared: Path, folder: Path, fault: tuple[int, int, int]) -> tuple[str, str]:
    """Do the work with a fault (calls, number, action), look at its files, do it again."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)
    shim = ctypes.CDLL(None)

    def with_fault() -> bytes:
        shim.fault_arm(os.fsencode(folder), *fault)
        return scenario.act(folder)

    def look() -> bytes:
        scenario.check(folder)
        return b""

    first, text = in_child(with_fault)
    if first == "failed":
        return "failed", text
    looked, problem = in_child(look)
    if looked != "done":
        return "failed", f"after {first} ({text}), its files are not whole: {problem}"
    again, digest = in_child(lambda: scenario.act(folder))
    if again != "done":
        return "failed", f"after {first} ({text}), it cannot be done again: {digest}"
    for path in folder.glob("20*_*"):  # a run that was killed before it had a recipe: nothing reads its folder
        if not (path / "recipe.yaml").exists() and first == "killed":
            shutil.rmtree(path)
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".part.lock", ".unfinished"))]
    if left:
        return "failed", f"after {first} ({text}), {left} are left"
    return first, digest


def run_scenario(name: str, most: int, faults: list[str]) -> dict[str, Any]:
    """All cases of a scenario, or ``most`` evenly spaced ones of each fault and call."""
    scenario = SCENARIOS[name]
    counts: Counter[str] = Counter()
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="overfly-faults-") as root:
        prepared, folder = Path(root).resolve() / "prepared", Path(root).resolve() / "case"
        prepared.mkdir()
        in_child(lambda: str(scenario.prepare(prepared)).encode())
        outcome, expected = run_case(scenario, prepared, folder, (0, 0, 0))
        if outcome != "done":
            return {"scenario": name, "problems": [expected]}
        totals = {}
        for call, mask in CALLS.items():

            def count(mask: int = mask) -> bytes:
                shim = ctypes.CDLL(None)
                shutil.rmtree(folder)
                shutil.copytree(prepared, folder)
                shim.fault_arm(os.fsencode(folder), mask, 0, 0)
                scenario.act(folder)
                (Path(root) / "count").write_text(str(shim.fault_count()))
                return b""

            in_child(count)
            totals[call] = int((Path(root) / "count").read_text())
        for fault, (action, calls) in [(fault, FAULTS[fault]) for fault in faults]:
            for call in calls:
                step = max(1, -(-totals[call] // most))
                for number in range(1 + (len(fault) * 7) % step, totals[call] + 1, step):
                    outcome, text = run_case(scenario, prepared, folder, (CALLS[call], number, action))
                    if outcome != "failed" and text != expected:
                        outcome, text = "failed", f"other content after {outcome}: {text}"
                    counts[outcome] += 1
                    if outcome == "failed":
                        problems.append(f"{fault} at {call} {number}: {text}")
    return {"scenario": name, "calls": totals, **counts, "problems": problems}


def main() -> int:
    """Run scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=[])
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--fault", choices=FAULTS, action="append")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    exporter.SECONDS, exporter.ROUNDS = 0.0, 1
    pipeline.RECALIBRATION = {"batch": 2, "steps": 1}
    failed = 0
    for name in settings.scenarios or [name for name in SCENARIOS if name != "careless"]:
        result = run_scenario(name, settings.most, settings.fault or list(FAULTS))
        failed += len(result["problems"])
        print(json.dumps(result), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
