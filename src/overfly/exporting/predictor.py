"""One call over all runtimes: images in the sensor's own range in, class probabilities out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from overfly.core.choices import Backend
from overfly.core.classes import Classes
from overfly.core.errors import DataError
from overfly.core.spec import Count, Meters, Pixels, Positive, Spec
from overfly.models.segmenter import Segmenter

Floats = NDArray[np.float32]


class ModelMetadata(Spec):
    """What a network's user must know of it; an exported file carries it as JSON in its metadata, key ``overfly``."""

    architecture: str
    """The network's name in the registry."""
    classes: Classes
    """Names and colors of the K classes."""
    bands: Count = 3
    """Bands C of the image, in the order of the training images."""
    max_value: Positive = 255.0
    """Value of the brightest pixel that the sensor can give."""
    mean: tuple[float, ...]
    """Mean of each band in the sensor's own range; the network subtracts it itself."""
    std: tuple[float, ...]
    """Standard deviation of each band in the sensor's own range; the network divides by it itself."""
    window: Pixels = 512
    """Side of the windows that large pictures are cut into, in pixels."""
    fixed: bool = False
    """Whether images must have just this side; else any size goes."""
    gsd: Meters | None = None
    """Length on the ground of a pixel that the network was trained on, in meters; None where nobody has given it."""
    title: str = ""
    """The run that it came from."""


@dataclass(frozen=True)
class Predictor:
    """A network on a runtime.

    Attributes:
        metadata: classes, bands, window.
        backend: torch, onnxruntime or openvino.
        device: where it runs, in the runtime's words.
        run: images (B, C, H, W), float32, in the sensor's own range, to class probabilities (B, K, H, W), float32.
            May be called from several threads, one at a time.
        export: format and precision of its file; None where it is no export.
    """

    metadata: ModelMetadata
    backend: str
    device: str
    run: Callable[[Floats], Floats]
    export: tuple[str, str] | None = None

    def __call__(self, images: Floats) -> Floats:
        """Class probabilities (B, K, H, W), float32, of images (B, C, H, W) in the sensor's own range.

        Raises:
            DataError: the images do not have the bands, or the fixed size, that the network reads.
        """
        metadata, shape = self.metadata, images.shape
        if len(shape) != 4 or shape[1] != metadata.bands:
            raise DataError(
                f"the network reads images (B, {metadata.bands}, H, W), not {shape}; give it {metadata.bands} bands"
            )
        if metadata.fixed and shape[2:] != (metadata.window, metadata.window):
            raise DataError(
                f"the network reads windows of {metadata.window} pixels a side, not {shape[2]} × {shape[3]}"
            )
        return self.run(np.ascontiguousarray(images, dtype=np.float32))


def model_metadata(
    segmenter: Segmenter, *, window: int = 512, gsd: float | None = None, title: str = ""
) -> ModelMetadata:
    """The facts of a trained network.

    Args:
        segmenter: the network.
        window: side of the windows that large pictures are cut into, in pixels.
        gsd: length of a pixel of its training images on the ground, in meters.
        title: the run that it came from.
    """
    return ModelMetadata(
        architecture=segmenter.architecture,
        classes=segmenter.classes,
        bands=segmenter.bands,
        max_value=segmenter.max_value,
        mean=tuple(segmenter.mean.flatten().tolist()),
        std=tuple(segmenter.std.flatten().tolist()),
        window=window,
        gsd=gsd,
        title=title,
    )


def segmenter_predictor(segmenter: Segmenter, metadata: ModelMetadata, device: torch.device | str = "cpu") -> Predictor:
    """A trained network run by PyTorch, without its training heads.

    Args:
        segmenter: the network; a copy of it is used.
        metadata: what `model_metadata` says of it.
        device: where to run.
    """
    place = torch.device(device)
    network = segmenter.without_training_heads().eval().to(place)

    def run(images: Floats) -> Floats:
        with torch.inference_mode():
            found = network.scores(torch.from_numpy(images).to(place)).float().softmax(1)
        probabilities: Floats = found.cpu().numpy()
        return probabilities

    return Predictor(metadata, "torch", str(place), run)


__all__ = ["Backend", "Floats", "ModelMetadata", "Predictor", "model_metadata", "segmenter_predictor"]
