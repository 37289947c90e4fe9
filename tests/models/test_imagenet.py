"""Weights by name: of the cache, an installed package, or a download; random where they cannot be had."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from overfly.core.errors import DownloadError, WeightsError
from overfly.models import PRETRAINED, build, checkpoints, load_weights
from overfly.models.segmenter import IMAGENET_MEAN, IMAGENET_STD
from overfly.recipe import Recipe, load
from overfly.training import setup
from overfly.training.setup import initial_network

URL = "https://example.org/mobilenet_v2-12345678.pth"


class Downloads:
    """Downloads that find the file in the cache, or are recorded and fail."""

    def __init__(self) -> None:
        self.urls: list[str] = []

    def __call__(self, url: str, path: Path, *, known_hash: str | None = None) -> Path:
        assert known_hash is not None
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == known_hash.removeprefix("sha256:"):
            return path
        self.urls.append(url)
        raise DownloadError(f"{url} is unreachable")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "file.pth"
    torch.manual_seed(5)
    torch.save(build("lraspp_mobilenet_v2").state_dict(), path)
    return path


@pytest.fixture
def downloads(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    """An empty cache, a package that is not installed, and no connection."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setenv("OVERFLY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PRETRAINED, "mobilenet_v2", (URL, digest))
    monkeypatch.setitem(checkpoints.PACKAGED, "mobilenet_v2", "package:carried-weights/inner/w.pth")
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    monkeypatch.setattr(setup, "load_weights", load_weights)
    recorded = Downloads()
    monkeypatch.setattr(checkpoints, "download_file", recorded)
    return recorded


def put(content: bytes, path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights" / "mobilenet_v2-12345678.pth"


@pytest.fixture
def packaged(tmp_path: Path) -> Path:
    return tmp_path / "installed" / "carried_weights" / "inner" / "w.pth"


@pytest.fixture
def light(recipe: Recipe) -> Recipe:
    return load(recipe, "model={name: lraspp_mobilenet_v2}")


def test_the_package_comes_before_the_download(downloads: Downloads, weights: Path, packaged: Path) -> None:
    put(weights.read_bytes(), packaged)
    assert checkpoints.locate("mobilenet_v2") == packaged
    assert not downloads.urls


def test_the_cache_comes_before_the_package(downloads: Downloads, weights: Path, packaged: Path, cached: Path) -> None:
    for path in (packaged, cached):
        put(weights.read_bytes(), path)
    assert checkpoints.locate("mobilenet_v2") == cached
    assert not downloads.urls


def test_a_file_of_another_digest_is_not_taken(downloads: Downloads, packaged: Path, cached: Path) -> None:
    put(b"another file", packaged)
    with pytest.raises(DownloadError):
        checkpoints.locate("mobilenet_v2")
    put(b"another file", cached)
    with pytest.raises(DownloadError):
        checkpoints.locate("mobilenet_v2")
    assert downloads.urls == [URL, URL]


@pytest.mark.usefixtures("downloads")
def test_imagenet_loads_the_weights_and_their_normalization(light: Recipe, weights: Path, packaged: Path) -> None:
    put(weights.read_bytes(), packaged)
    segmenter = initial_network(light)[0]
    name = f"{segmenter.network.first_conv}.weight"
    assert torch.equal(segmenter.network.state_dict()[name], torch.load(weights, weights_only=True)[name])
    assert segmenter.mean.flatten().tolist() == pytest.approx([255 * value for value in IMAGENET_MEAN])
    assert segmenter.std.flatten().tolist() == pytest.approx([255 * value for value in IMAGENET_STD])


def test_without_the_weights_a_network_is_random_and_says_so_once(
    downloads: Downloads, light: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    segmenter = initial_network(light)[0]
    assert downloads.urls == [URL]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "model.weights" in line]
    assert light.model.name in line
    torch.manual_seed(3)
    plain = initial_network(load(light, "model.weights=null"))[0]
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in segmenter.state_dict().items())
    mean = light.domain("source").statistics
    assert mean is None or segmenter.mean.flatten().tolist() == pytest.approx(mean[0])
    assert segmenter.mean.flatten().tolist() != pytest.approx([255 * value for value in IMAGENET_MEAN])
    assert not capfd.readouterr().err


@pytest.mark.usefixtures("downloads")
def test_other_names_of_weights_must_be_there(light: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DownloadError):
        initial_network(load(light, "model.weights=mobilenet_v2"))[0]
    with pytest.raises(WeightsError, match=r"none\.pth"):
        initial_network(load(light, f"model.weights={tmp_path / 'none.pth'}"))[0]


def test_a_network_without_known_weights_is_random(
    downloads: Downloads, recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    initial_network(load(recipe, "model={name: pidnet_s}"))[0]
    assert not downloads.urls
    assert capfd.readouterr().err.count("model.weights") == 1
