"""Networks with known predictions, and images, for tests of the server."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from overfly.core.classes import Classes
from overfly.core.records import Array
from overfly.exporting.predictor import Floats, ModelMetadata, Predictor
from overfly.web.service import ServedNetwork

CLASSES = Classes(names=("dark", "<b>bright</b>"), colors=((10, 20, 30), (250, 240, 230)))


def bright(images: Floats) -> Floats:
    """Probability of the second class: a pixel's first band over 255."""
    share = images[:, :1] / 255
    return np.concatenate([1 - share, share], 1).astype(np.float32)


def predictor(run: Callable[[Floats], Floats] = bright, **changes: Any) -> Predictor:
    metadata = ModelMetadata(architecture="threshold", classes=CLASSES, mean=(0.0,) * 3, std=(1.0,) * 3, window=64)
    return Predictor(metadata.model_copy(update=changes), "torch", "cpu", run)


def network(key: str = "0", run: Callable[[Floats], Floats] = bright, **changes: Any) -> ServedNetwork:
    return ServedNetwork(key, f"network {key}", lambda: predictor(run, **changes), None, {"network": "threshold"})


def inverted(images: Floats) -> Floats:
    return bright(255 - images)


def ramp(height: int = 40, width: int = 50) -> Array:
    """Dark on the left, bright on the right."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    return np.repeat(np.repeat(row[None, :, None], height, 0), 3, 2)


def encoded(image: Array, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def finished(client: Any, result: Any) -> dict[str, Any]:
    """The summary of a new map, when it is finished or has failed."""
    assert result.status_code == 201, result.text
    summary: dict[str, Any] = result.json()
    until = time.monotonic() + 60
    while summary["state"] == "running" and time.monotonic() < until:
        time.sleep(0.02)
        summary = client.get(f"/maps/{summary['key']}").json()
    return summary
