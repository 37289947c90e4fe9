"""Read and predict the images that label-free metrics are computed on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overfly.core.errors import DataError, NotFiniteError
from overfly.core.records import Array, Item, Logits
from overfly.data.domain import Domain, Split, sample_evenly, without_labels
from overfly.ops.windows import slide_inference


@dataclass(frozen=True)
class MetricOptions:
    """Images that label-free metrics are computed on, and prediction settings."""

    limit: int | None = 24
    """Maximum number of images, evenly spaced; None: all."""
    crop: int | None = None
    """Side of the center crop in pixels; None: whole images."""
    resize: int | None = None
    """Side of the square that images are first resized to; None: not resized."""
    window: int | None = None
    """Side of overlapping windows for larger images; None: the whole image at once."""
    device: torch.device | str = "cpu"
    """Device that networks are moved to."""
    seed: int = 0
    """Seed of the random draws. Global random state is neither read nor changed."""


def unlabeled_images(domain: Domain, split: Split, options: MetricOptions = MetricOptions()) -> Iterator[Tensor]:
    """Yield the images (C, H, W) of a split, float, in the sensor's range; labels are removed before anything is read.

    Raises `DataError`: the split has no images, or one cannot be read.
    """
    items = sample_evenly(without_labels(domain.items(split)), options.limit)
    if not items:
        raise DataError(f"split {split} of the {domain.title} domain has no images; choose another split")
    for item in items:
        yield center_crop(resized(to_tensor(domain.read_image(item)), options.resize), options.crop)


def labeled_images(
    domain: Domain, split: Split, options: MetricOptions = MetricOptions()
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read images as `unlabeled_images`, with labels (H, W), int64, resized to the image by nearest neighbor.

    Only for source domains. Raises `DataError`: no image of the split has a label.
    """
    labeled = [item for item in domain.items(split) if item.label is not None]
    items: Sequence[Item] = sample_evenly(labeled, options.limit)
    if not items:
        raise DataError(f"split {split} of the {domain.title} domain has no labels; choose another split")
    for item in items:
        image = resized(to_tensor(domain.read_image(item)), options.resize)
        label = torch.from_numpy(domain.read_label(item).astype(np.int64))
        if label.shape != image.shape[-2:]:
            label = F.interpolate(label[None, None].float(), image.shape[-2:], mode="nearest-exact")[0, 0].long()
        yield center_crop(image, options.crop), center_crop(label, options.crop)


def to_tensor(image: Array) -> Tensor:
    """Convert an image (H, W, C) of any number type to (C, H, W), float32."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))


def center_crop(image: Tensor, crop: int | None) -> Tensor:
    """Crop (..., H, W) at its center to sides of at most ``crop`` pixels."""
    height, width = image.shape[-2:]
    if crop is None or max(height, width) <= crop:
        return image
    rows, columns = min(crop, height), min(crop, width)
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[..., top : top + rows, left : left + columns].contiguous()


@torch.inference_mode()
def predict_scores(network: nn.Module, image: Tensor, window: int | None = None) -> Tensor:
    """Class scores (K, H, W), float32, of one image (C, H, W) in the sensor's range, before any softmax.

    The network, in evaluation mode on the image's device, gives `Logits` at the image's size. ``window`` is the side of
    overlapping windows for larger images; None: the whole image. Raises `NotFiniteError`: a score is not finite.
    """

    def main(patch: Tensor) -> Tensor:
        logits: Logits = network(patch)
        return logits.main.float()

    larger = window is not None and max(image.shape[-2:]) > window
    scores = slide_inference(main, image[None], window)[0] if larger and window is not None else main(image[None])[0]
    if not bool(scores.isfinite().all()):
        raise NotFiniteError(
            "the network's scores are not finite: its weights or its mean and standard deviation are invalid; train "
            "it again or use another checkpoint"
        )
    return scores


def random_pixels(height: int, width: int, pixels: int, *seed: int) -> Tensor:
    """Indices (pixels,) of random pixels in a flattened image; a function of ``seed``."""
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.randint(height * width, (pixels,), generator=torch.Generator().manual_seed(state))


def resized(image: Tensor, side: int | None) -> Tensor:
    """Resize (C, H, W) to (C, side, side), bilinear with antialiasing; unchanged for None."""
    if side is None or image.shape[-2:] == (side, side):
        return image
    return F.interpolate(image[None], (side, side), mode="bilinear", align_corners=False, antialias=True)[0]
