"""What a path means that somebody wants to predict with: a run, a network's file, an export."""

from __future__ import annotations

from pathlib import Path

from overfly.core.device import pick
from overfly.core.errors import RecipeError
from overfly.deploy.backends import Backend, Predictor, facts_of, of_segmenter
from overfly.models.segmenter import Segmenter
from overfly.training.run import Run

WINDOW = 512
"""Side of the windows where nothing says another, in pixels."""


def predictor_of(path: Path | str, *, backend: Backend = "auto", device: str = "auto") -> Predictor:
    """The network that a path means, on a runtime.

    Args:
        path: the folder of a finished run (its recommended network, where it was adapted by `overfly adapt`), a
            ``.safetensors`` file that a run wrote, or an exported file.
        backend: torch, onnxruntime or openvino; auto takes the one that the file is made for.
        device: auto, cpu, cuda, cuda:1 or mps.

    Raises:
        OverflyError: there is no such network, or it does not run there.
    """
    path = Path(path)
    if backend not in ("auto", "torch"):
        raise RecipeError(f"{path} is run by torch; export it for {backend} first")
    place = pick(device)
    if path.is_dir():
        run = Run.open(path)
        best = run.path / "best.safetensors"
        segmenter = Segmenter.load(best).eval() if best.is_file() else run.segmenter()
        recipe = run.recipe
        grounds = [domain.ground for domain in (recipe.source, recipe.target) if domain is not None]
        ground = next((metres for metres in grounds if metres is not None), None)
        facts = facts_of(segmenter, window=recipe.window or WINDOW, ground=ground, title=run.path.name)
    else:
        segmenter = Segmenter.load(path).eval()
        facts = facts_of(segmenter, window=WINDOW, title=path.stem)
    return of_segmenter(segmenter, facts, place)
