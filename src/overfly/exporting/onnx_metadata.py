"""What QGIS' plug-in Deepness wants to read in an ONNX file, so that the file opens there as it is.

Deepness gives the graph ``(tile / 255 - standardization_mean) / standardization_std`` of 8-bit tiles (B, C, S, S), and
takes the class of largest output where that is above seg_thresh, class 0 elsewhere. Our graph takes the sensor's own
range, so a mean of 0 and a deviation of 1/255 undo its division, and a threshold of 0 leaves every pixel its class.
Source: the plug-in's documentation for creators of models, and its reader ``processing/models/model_base.py``.
"""

from __future__ import annotations

import json

from overfly.exporting.predictor import ModelMetadata

OVERLAP = 25
"""Percent of a tile that the next one covers again."""


def deepness_properties(metadata: ModelMetadata) -> dict[str, str]:
    """Deepness' metadata keys, each value as JSON.

    Args:
        metadata: of the network; resolution is left out where nobody has given the length of a pixel on the ground.
    """
    values: dict[str, object] = {
        "model_type": "Segmentor",
        "class_names": dict(enumerate(metadata.classes.names)),
        "tiles_size": metadata.window,
        "tile_size": metadata.window,  # the plug-in's reader asks for this spelling, its documentation for the other
        "tiles_overlap": OVERLAP,
        "standardization_mean": [0.0] * metadata.bands,
        "standardization_std": [1 / 255] * metadata.bands,
        "seg_thresh": 0.0,
        "seg_small_segment": 0,
    }
    if metadata.gsd is not None:
        values["resolution"] = round(100 * metadata.gsd, 4)
    return {key: json.dumps(value) for key, value in values.items()}


__all__ = ["deepness_properties"]
