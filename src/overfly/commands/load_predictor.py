"""Load a network from a run folder, a comparison folder, a weights file or an exported file."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from overfly.adaptation.selection import Comparison, Selection, is_comparison
from overfly.core.atomic_files import read_json
from overfly.core.choices import Backend
from overfly.core.device import describe_machine, select_device
from overfly.core.errors import OverflyError, RecipeError, RunError
from overfly.core.progress import print_status
from overfly.exporting.exporter import ExportReport
from overfly.exporting.predictor import ModelMetadata, Predictor, model_metadata, segmenter_predictor
from overfly.exporting.runtimes import check_export
from overfly.exporting.trial import PREDICTORS, check_resources
from overfly.models.checkpoints import first_line, weights_sha256
from overfly.models.segmenter import Segmenter
from overfly.training.run import Run

WINDOW = 512
"""Default side of windows, in pixels."""
RUNTIMES: dict[str, tuple[Backend, ...]] = {
    ".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",), ".pt2": ("torch",),
}  # fmt: skip
"""Runtimes of exported files by suffix; the first is the default."""


def load_predictor(path: Path | str, *, backend: Backend = "auto", device: str = "auto") -> Predictor:
    """Load the network of a run, comparison, ``.safetensors`` or exported file on a runtime.

    ``backend`` auto is the runtime for the file's format, and for a folder `fastest_file`; ``device`` is auto, cpu,
    cuda, cuda:1 or mps. Raises `OverflyError` if the network is missing, or does not run on this backend or device.
    """
    path, backend = fastest_file(path, backend, device)
    suffix = "" if path.is_dir() else path.suffix.lower()
    runtimes = RUNTIMES.get(suffix, ("torch",))
    if backend != "auto" and backend not in runtimes:
        raise RecipeError(f"{path} runs on {' or '.join(runtimes)}; export it for {backend} first")
    if suffix not in RUNTIMES:
        segmenter, metadata = load_network(path)
        return segmenter_predictor(segmenter, metadata, select_device(device))
    if path.is_file() and not check_export(path):
        print_status(f"{path} has no .json with its digest beside it: its content is not checked")
    installed = list(filter(_is_installed, runtimes))
    runtime = backend if backend != "auto" else [*installed, *runtimes][0]
    if runtime in installed and path.is_file():
        check_resources(path, runtime)
    place = "cpu" if device == "auto" and runtime != "torch" else str(select_device(device))
    return PREDICTORS[runtime](path, place)


def fastest_file(path: Path | str, backend: Backend = "auto", device: str = "auto") -> tuple[Path, Backend]:
    """Return the file and runtime that `load_predictor` opens: for a folder, its fastest export on this machine.

    Exports of its weights in ``exports`` count if they return probabilities, agreed with PyTorch on a runtime that is
    installed, and were timed on this processor with as many threads. Without one that is faster than PyTorch, and for
    another device than the CPU or a given runtime, path and runtime are returned as they are.
    """
    path, best = Path(path), (Path(path), backend)
    if backend != "auto" or not path.is_dir() or select_device(device).type != "cpu":
        return best
    digest, least = weights_sha256(NetworkFolder.open(path).weights), math.inf
    machine = {key: value for key, value in describe_machine().items() if key in ("processor", "threads")}
    for file in sorted((path / "exports").glob("*.json")):
        try:
            report = ExportReport.model_validate(read_json(file))
            metadata, settings, export = report.metadata, report.settings, file.with_name(report.file)
            same = report.weights_sha256 == digest and machine.items() <= report.machine.items()
            if not same or settings.output != "probabilities" or settings.resize or metadata.fixed:
                continue
            for runtime in RUNTIMES[export.suffix]:
                agrees = any(parity.backend == runtime and not parity.violations for parity in report.parity)
                taken = report.latency[runtime].median_ms if agrees and _is_installed(runtime) else math.inf
                if taken < min(least, report.latency["torch eager"].median_ms):
                    check_export(export)
                    best, least = (export, runtime), taken
        except (OverflyError, OSError, ValueError, KeyError) as error:
            print_status(f"{file} is not used: {first_line(error)}")
    if best[0] != path:
        print_status(f"using {best[0].name} with {best[1]}, the fastest export here; --backend torch uses PyTorch")
    return best


def _is_installed(runtime: Backend) -> bool:
    return runtime == "torch" or importlib.util.find_spec(runtime) is not None


@dataclass(frozen=True)
class NetworkFolder:
    """The network of a run folder, or the recommended network of a comparison folder.

    Attributes:
        path: the folder.
        weights: the weights file of the network.
        run: the run that trained it; None if the recommended candidate is a weights file or a deleted run.
        selection: the comparison's selection; None for a run folder.
    """

    path: Path
    weights: Path
    run: Run | None
    selection: Selection | None = None

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open a run or comparison folder; raise `RunError` if it is neither, or the run is not finished."""
        path = Path(path)
        if is_comparison(path):
            comparison = Comparison(path)
            comparison.check_weights(comparison.weights, comparison.selection.recommended)
            return cls(path, comparison.weights, comparison.recommended_run(), comparison.selection)
        run = Run.open(path)
        run.check_finished()
        return cls(path, run.weights, run)


def load_network(path: Path | str) -> tuple[Segmenter, ModelMetadata]:
    """Load the trained network of a run, comparison or ``.safetensors`` file, in evaluation mode, with its metadata.

    Raises `OverflyError` if the network is missing.
    """
    path = Path(path)
    if not path.exists():
        raise RunError(
            f"{path} does not exist; give a run folder, a comparison folder, a .safetensors file, or an exported file "
            f"({', '.join(RUNTIMES)})"
        )
    if not path.is_dir():
        segmenter = Segmenter.load(path).eval()
        return segmenter, model_metadata(segmenter, window=WINDOW, title=path.stem)
    folder = NetworkFolder.open(path)
    segmenter = Segmenter.load(folder.weights).eval()
    if folder.run is None:
        return segmenter, model_metadata(segmenter, window=WINDOW, title=path.name)
    recipe = folder.run.recipe
    resolutions = [domain.gsd for domain in (recipe.source, recipe.target) if domain is not None]
    gsd = next((meters for meters in resolutions if meters is not None), None)
    return segmenter, model_metadata(segmenter, window=recipe.window or WINDOW, gsd=gsd, title=path.name)
