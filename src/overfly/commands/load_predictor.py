"""What a path means that somebody wants to predict with: a run, a network's file, an export."""

from __future__ import annotations

from pathlib import Path

from overfly.adaptation.selection import Selection
from overfly.core.choices import Backend
from overfly.core.device import select_device
from overfly.core.errors import MissingExtraError, RecipeError
from overfly.exporting.predictor import ModelMetadata, Predictor, model_metadata, segmenter_predictor
from overfly.exporting.runtimes import onnx_predictor, openvino_predictor, torch_predictor
from overfly.models.segmenter import Segmenter
from overfly.training.run import Run

WINDOW = 512
"""Side of the windows where nothing says another, in pixels."""
RUNTIMES: dict[str, tuple[Backend, ...]] = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".pt2": ("torch",),
}
"""What runs an exported file, by its suffix; the first is taken where nobody says."""


def load_predictor(path: Path | str, *, backend: Backend = "auto", device: str = "auto") -> Predictor:
    """The network that a path means, on a runtime.

    Args:
        path: the folder of a finished run (its recommended network, where it was adapted by `overfly adapt`), a
            ``.safetensors`` file that a run wrote, or an exported file (.onnx, .xml, .pt2).
        backend: torch, onnxruntime or openvino; auto takes the one that the file is made for.
        device: auto, cpu, cuda, cuda:1 or mps.

    Raises:
        OverflyError: there is no such network, or it does not run there.
    """
    path = Path(path)
    runtimes = RUNTIMES.get(path.suffix.lower(), ("torch",)) if not path.is_dir() else ("torch",)
    if backend != "auto" and backend not in runtimes:
        raise RecipeError(f"{path} is run by {' or '.join(runtimes)}; export it for {backend} first")
    if path.is_dir() or path.suffix.lower() not in RUNTIMES:
        segmenter, metadata = load_network(path)
        return segmenter_predictor(segmenter, metadata, select_device(device))
    if path.suffix.lower() == ".pt2":
        return torch_predictor(path, select_device(device))
    place = "cpu" if device == "auto" else str(select_device(device))
    if backend == "openvino" or path.suffix.lower() == ".xml":
        return openvino_predictor(path, place)
    try:
        return onnx_predictor(path, place)
    except MissingExtraError as missing:
        if backend == "onnxruntime":
            raise
        try:
            return openvino_predictor(path, place)
        except MissingExtraError:
            raise missing from None


def load_network(path: Path | str) -> tuple[Segmenter, ModelMetadata]:
    """The trained network that a path means, in evaluation mode, and what its user must know of it.

    Args:
        path: the folder of a finished run, or a ``.safetensors`` file that a run wrote.

    Raises:
        OverflyError: there is no such network.
    """
    path = Path(path)
    if not path.is_dir():
        segmenter = Segmenter.load(path).eval()
        return segmenter, model_metadata(segmenter, window=WINDOW, title=path.stem)
    run = Run.open(path)
    best = run.path / "best.safetensors"
    segmenter = Segmenter.load(best).eval() if best.is_file() else run.segmenter()
    recipe = run.recipe
    resolutions = [domain.gsd for domain in (recipe.source, recipe.target) if domain is not None]
    gsd = next((meters for meters in resolutions if meters is not None), None)
    return segmenter, model_metadata(segmenter, window=recipe.window or WINDOW, gsd=gsd, title=run.path.name)


def selection_of(run: Run) -> Selection | None:
    """What `overfly adapt` wrote into a run's folder; None where it did not, or where that is damaged."""
    try:
        return Selection.model_validate_json((run.path / "selection.json").read_bytes())
    except (ValueError, OSError):
        return None


def origin_of(run: Run) -> Run | None:
    """The run whose network a run's folder stands for: its own, or, of one that was refused, the recommended one.

    Returns:
        None where that run is not there, beside this one or where it was.
    """
    selection = selection_of(run)
    if selection is None or not (run.path / "best.safetensors").is_file():
        return run
    place = Path(selection.candidates[selection.recommended].run)
    there = [path for path in (run.path.parent / place.name, place) if (path / "recipe.yaml").is_file()]
    return Run.open(there[0]) if there else None


def resolve_start(start: Path) -> Path:
    """What adaptation begins from where a path is named: itself, or the recommended network where a run was refused.

    Args:
        start: a run's folder or a file of weights; one that is neither is returned as it is.
    """
    if not (start / "recipe.yaml").is_file():
        return start
    run = Run.open(start)
    origin = origin_of(run)
    return run.path / "best.safetensors" if origin is None else start if origin.path == run.path else origin.path


__all__ = ["RUNTIMES", "WINDOW", "load_network", "load_predictor", "origin_of", "resolve_start", "selection_of"]
