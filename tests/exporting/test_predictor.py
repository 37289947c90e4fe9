from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from overfly.commands.load_predictor import load_predictor
from overfly.core.errors import DataError, OverflyError
from overfly.exporting.predictor import Predictor, model_metadata, segmenter_predictor
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe
from overfly.training.setup import initial_network


@pytest.fixture
def segmenter(recipe: Recipe) -> Segmenter:
    return initial_network(recipe)[0].eval()


def test_probabilities_are_those_of_the_network(segmenter: Segmenter) -> None:
    predictor = segmenter_predictor(segmenter, model_metadata(segmenter, window=64))
    images = np.random.default_rng(0).uniform(0, 255, (2, 3, 50, 70)).astype(np.float32)
    with torch.inference_mode():
        expected = segmenter.scores(torch.from_numpy(images)).softmax(1).numpy()
    result = predictor(images)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_other_bands_and_sizes_are_refused(segmenter: Segmenter) -> None:
    metadata = model_metadata(segmenter, window=64)
    with pytest.raises(DataError, match=r"\(B, 3, H, W\)"):
        segmenter_predictor(segmenter, metadata)(np.zeros((1, 4, 64, 64), np.float32))
    fixed = metadata.model_copy(update={"fixed": True})
    with pytest.raises(DataError, match="64"):
        Predictor(fixed, "torch", "cpu", lambda images: images)(np.zeros((1, 3, 64, 32), np.float32))


def test_other_runtimes_of_a_weights_file_are_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    file = segmenter.save(tmp_path / "a.safetensors")
    predictor = load_predictor(file, device="cpu")
    assert predictor.metadata.classes == segmenter.classes
    assert predictor.backend == "torch"
    with pytest.raises(OverflyError, match="openvino"):
        load_predictor(file, backend="openvino", device="cpu")
