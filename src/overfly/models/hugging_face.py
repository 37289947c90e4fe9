"""Networks and backbones of transformers, from a folder or the hub: safetensors alone, and no code is run."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overfly.core.errors import RecipeError, WeightsError, import_extra
from overfly.core.records import Logits
from overfly.models.checkpoints import first_line
from overfly.models.network import CHECKPOINT_BUILDERS, Network, resize

NAME = "transformers"
"""Name of these networks in a recipe; an architecture is ``transformers:CHECKPOINT``."""
MASKS = ("eomt", "eomt_dinov3", "mask2former", "maskformer")
"""Types whose queries predict masks and their classes."""
SQUARE = ("dpt", "eomt")
"""Types that read squares of ``image_size`` pixels."""
PADDED = 32
"""Multiple of pixels that images are padded to, where no patch size says otherwise."""
LEAST = 1e-6
"""Least probability of a class in the scores of masks."""
UNSAFE = ("auto_map", "quantization_config", "use_pretrained_backbone", "backbone_kwargs", "use_kernels", "dtype")
"""Settings that would load code, other weights or other kinds of numbers."""
_library = partial(import_extra, "transformers", "transformers", "a network of Hugging Face's transformers")


class TransformersNetwork(Network):
    """A network of transformers: per-pixel scores, masks with classes, or a backbone with a linear head.

    The head of a backbone is batch normalization and a 1×1 convolution on its feature maps, as in DINOv2's linear
    evaluation (Oquab et al., 2023, arXiv:2304.07193). Scores of masks are the logarithm of each class's probability,
    summed over the queries (Cheng et al., 2022, Mask2Former, arXiv:2112.01527). Types that
    read one size only (EoMT, DPT) get images resized to it.
    """

    def __init__(self, config: Any, classes: int, bands: int) -> None:
        super().__init__()
        library, kind = _library(), type(config)
        mappings = library.models.auto.modeling_auto
        for part in (config, getattr(config, "backbone_config", None)):
            if hasattr(part, "num_channels"):
                setattr(part, "num_channels", bands)  # noqa: B010 - the configuration of a backbone may be None
        config.num_labels = classes
        self.config = {**config.to_dict(), "model_type": config.model_type}
        self.head: nn.Module | None = None
        if kind in mappings.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
            loader = library.AutoModelForSemanticSegmentation
        elif config.model_type in MASKS:
            loader = library.AutoModelForUniversalSegmentation
        elif kind in mappings.MODEL_FOR_BACKBONE_MAPPING:
            loader = library.AutoBackbone
        else:
            raise RecipeError(
                f"{config.model_type} has no segmentation network in transformers; choose another checkpoint"
            )
        self.model: nn.Module = loader.from_config(config)
        backbone = loader is library.AutoBackbone
        if backbone:
            planes = sum(self.model.channels)
            self.head = nn.Sequential(nn.BatchNorm2d(planes), nn.Conv2d(planes, classes, 1))
            self.heads = ("head",)
        self.fixed = config.image_size if config.model_type in SQUARE else None
        patch = getattr(config, "patch_size", None)
        self.stride = patch if isinstance(patch, int) and backbone else PADDED
        convolutions = (name for name, part in self.named_modules() if isinstance(part, nn.Conv2d))
        self.first_conv = next(convolutions, "")

    def forward(self, image: Tensor) -> Logits:
        """Class scores (B, K, h, w) of normalized images (B, C, H, W) at the network's own stride.

        With a backbone, ``features`` are its feature maps (B, F, h, w).
        """
        pixels = image if self.fixed is None else F.interpolate(image, size=(self.fixed, self.fixed), mode="bilinear")
        output = self.model(pixel_values=pixels)
        if self.head is not None:
            maps = output.feature_maps
            features = torch.cat([resize(each, maps[0]) for each in maps], 1)
            return Logits(self.head(features), features=features)
        if "masks_queries_logits" not in output:
            return Logits(output.logits)
        shares = output.class_queries_logits.float().softmax(-1)[..., :-1]
        masks = output.masks_queries_logits.float().sigmoid()
        return Logits(torch.einsum("bqk,bqhw->bkhw", shares, masks).clamp_min(LEAST).log())

    def pretrained(self, checkpoint: str) -> dict[str, Tensor]:
        """Tensors of a checkpoint, by this network's names; raise `WeightsError` if they cannot be had or read."""
        checkpoint = _expanded(checkpoint)
        with _errors(checkpoint, WeightsError):
            own, report = cast(Any, type(self.model)).from_pretrained(
                checkpoint, config=_config(checkpoint), use_safetensors=True, output_loading_info=True
            )
        random = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
        return {f"model.{name}": tensor for name, tensor in own.float().state_dict().items() if name not in random}


def transformers(checkpoint: str, config: Mapping[str, Any] | None, classes: int, bands: int) -> Network:
    """A segmentation network or backbone of Hugging Face's transformers, from a folder or a name on the hub.

    It has random weights, K classes and C bands. The configuration is ``config``, or that of ``checkpoint``. Raises
    `RecipeError`: the configuration cannot be read, or transformers cannot build it.
    """
    if not checkpoint:
        raise RecipeError(f"{NAME} needs a checkpoint; set model.checkpoint to a folder or a name on the hub")
    checkpoint = _expanded(checkpoint)
    with _errors(checkpoint, RecipeError):
        return TransformersNetwork(_config(checkpoint, config), classes, bands)


CHECKPOINT_BUILDERS[NAME] = transformers


def _expanded(checkpoint: str) -> str:
    """Replace a leading ``~`` by the home folder."""
    return str(Path(checkpoint).expanduser()) if checkpoint.startswith("~") else checkpoint


def _config(checkpoint: str, config: Mapping[str, Any] | None = None) -> Any:
    """Configuration, by default that of a folder or of a name on the hub."""
    if config is None and checkpoint[0] in "./" and not Path(checkpoint).is_dir():
        raise FileNotFoundError("the folder does not exist")
    values = _safe(config or _library().PreTrainedConfig.get_config_dict(checkpoint)[0])
    return _library().AutoConfig.for_model(values.pop("model_type"), **values)


def _safe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a configuration what loads code or files; raise `ValueError` if a backbone would be downloaded."""
    if isinstance(config.get("backbone"), str):
        raise ValueError(f"its backbone is another repository, {config['backbone']}")
    kept = {key: value for key, value in config.items() if key not in UNSAFE and "attn_implementation" not in str(key)}
    return {key: _safe(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


@contextmanager
def _errors(checkpoint: str, kind: Callable[[str], Exception]) -> Iterator[None]:
    """Raise the library's many errors as one of overfly's, without its warnings."""
    _library().utils.logging.disable_progress_bar()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of the library, and of its connections to the hub
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (RecipeError, WeightsError):
        raise
    except Exception as error:  # OSError for the hub, and any other for a configuration that is not consistent
        raise kind(
            f"{checkpoint} cannot be opened as a network of transformers ({first_line(error)}); give a folder with "
            "config.json and model.safetensors, or a name on the Hugging Face hub"
        ) from error
    finally:
        logging.disable(level)
