"""Networks, the segmenter around them, and their weights. A new architecture is added to `BUILT_IN`."""

from overfly.models import deeplabv2, hugging_face, lraspp, pidnet
from overfly.models.checkpoints import PRETRAINED
from overfly.models.network import Network, build, names, register
from overfly.models.segmenter import Segmenter
from overfly.models.weights import LoadReport, load_weights

BUILT_IN = (deeplabv2, hugging_face, lraspp, pidnet)
"""Modules of the built-in networks."""
__all__ = ["BUILT_IN", "PRETRAINED", "LoadReport", "Network", "Segmenter", "build", "load_weights", "names", "register"]
