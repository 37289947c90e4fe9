from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from formula_weights import fill, segmenter, smooth_image
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from overfly.core.classes import Classes
from overfly.core.errors import DataError, RecipeError, WeightsError
from overfly.models import Network, Segmenter, build, network
from overfly.models.checkpoints import tensors_sha256
from overfly.models.deeplabv2 import DeepLabV2
from overfly.models.segmenter import IMAGENET_MEAN, IMAGENET_STD, read_segmenter_file

CLASSES = Classes(names=("ground", "roof", "road"), colors=((1, 2, 3), (4, 5, 6), (7, 8, 9)))


MEAN = [255 * value for value in IMAGENET_MEAN]
STD = [255 * value for value in IMAGENET_STD]


def make(name: str = "lraspp_mobilenet_v2", mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Segmenter:
    made = segmenter(name, CLASSES, mean=mean, std=std)
    fill(made.network)
    return made.eval()


def sensor(height: int, width: int, bands: int = 3) -> torch.Tensor:
    return (smooth_image(height, width, bands=bands) * 90 + 120).round().clamp(0, 255)


def test_normalizes_by_its_own_buffers_and_enlarges() -> None:
    made = make("pidnet_s", mean=[10, 20, 30], std=[2, 4, 5])
    image = sensor(64, 96)
    with torch.no_grad():
        out = made(image)
        inner = made.network(
            (image - torch.tensor([10, 20, 30]).view(1, 3, 1, 1)) / torch.tensor([2, 4, 5]).view(1, 3, 1, 1)
        )
    assert inner.boundary is not None
    assert out.boundary is not None
    for got, small in ((out.main, inner.main), (out.aux[0], inner.aux[0]), (out.boundary, inner.boundary)):
        assert got.shape[2:] == (64, 96)
        torch.testing.assert_close(got, F.interpolate(small, size=(64, 96), mode="bilinear", align_corners=False))


@settings(deadline=None, max_examples=6)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_any_size_is_as_if_its_last_pixels_went_on(height: int, width: int) -> None:
    made = make()
    image = sensor(height, width)
    beyond = F.pad(image, (0, -width % made.stride, 0, -height % made.stride), mode="replicate")
    with torch.no_grad():
        scores = made.scores(image)
        assert scores.shape == (1, 3, height, width)
        torch.testing.assert_close(scores, made.scores(beyond)[..., :height, :width])
        assert all(extra.shape == scores.shape for extra in made(image).aux)


def test_whole_numbers_are_images_too() -> None:
    made = make()
    image = sensor(32, 32)
    with torch.no_grad():
        assert torch.equal(made.scores(image.to(torch.uint8)), made.scores(image))


def test_other_bands_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(B, 3, H, W\).*\(1, 4, 32, 32\)"):
        make()(torch.zeros(1, 4, 32, 32))


@pytest.mark.parametrize(("mean", "std"), [([1.0, 2.0], [1.0]), ([1, 2, 3], [1, 0, 1]), ([], [])])
def test_impossible_normalization_is_refused(mean: list[float], std: list[float]) -> None:
    network = build("lraspp_mobilenet_v2", 3)
    with pytest.raises(RecipeError, match="std"):
        Segmenter(network, CLASSES, architecture="lraspp_mobilenet_v2", mean=mean, std=std)


@pytest.mark.parametrize(("name", "bands"), [("lraspp_mobilenet_v2", 4), ("pidnet_s", 3)])
def test_a_saved_file_is_complete(name: str, bands: int, tmp_path: Path) -> None:
    mean, std = [float(i + 1) for i in range(bands)], [float(i + 9) for i in range(bands)]
    network = build(name, 3, bands=bands)
    made = Segmenter(network, CLASSES, architecture=name, mean=mean, std=std, max_value=65535.0).eval()
    path = made.save(tmp_path / "deep" / "best.safetensors")
    again = Segmenter.load(path).eval()
    assert (again.architecture, again.classes, again.bands, again.max_value) == (name, CLASSES, bands, 65535.0)
    assert again.network.has_training_heads
    image = sensor(32, 48, bands)
    with torch.no_grad():
        assert torch.equal(made.scores(image), again.scores(image))
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["overfly"])
    assert about["classes"] == {"names": ["ground", "roof", "road"], "colors": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}
    assert [file.name for file in path.parent.iterdir()] == ["best.safetensors"]


def test_training_heads_can_be_dropped(tmp_path: Path) -> None:
    made = make("pidnet_s")
    image = sensor(40, 56)
    lighter = made.without_training_heads()
    with torch.no_grad():
        full, light = made(image), lighter(image)
        assert torch.equal(full.main, light.main)
        assert full.aux
        assert light.aux == ()
        assert light.boundary is None
        path = made.save(tmp_path / "full.safetensors")
        assert torch.equal(Segmenter.load(path, training_heads=False).eval().scores(image), full.main)
        path = lighter.save(tmp_path / "light.safetensors")
        assert not Segmenter.load(path).network.has_training_heads
        grown = Segmenter.load(path, training_heads=True).eval()
        assert grown.network.has_training_heads
        assert torch.equal(grown.scores(image), full.main)


def test_where_a_resnet_halves_survives_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small_deeplab(classes: int = 7, training_heads: bool = True, bands: int = 3) -> Network:
        del training_heads
        return DeepLabV2(classes, bands, (1, 1, 1, 1))

    monkeypatch.setattr(network, "_BUILDERS", dict(network._BUILDERS))
    network.register(small_deeplab)
    made = segmenter("small_deeplab", CLASSES, mean=MEAN, std=STD)
    made.network.set_extra_state(torch.tensor(0))
    again = Segmenter.load(made.save(tmp_path / "d.safetensors"))
    assert not again.network.halves_at_first
    assert again.network.get_submodule("layer2.0.conv2").stride == (2, 2)


def test_equal_segmenters_give_equal_files(tmp_path: Path) -> None:
    made = make()
    files = {made.save(tmp_path / f"{index}.safetensors").read_bytes() for index in range(8)}
    assert len(files) == 1


def rewrite(path: Path, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file of other content with its digest."""
    about = {**about, "sha256": tensors_sha256(about, tensors)}
    save_file(dict(tensors), path, metadata={"overfly": json.dumps(about)})


def test_files_of_another_format_are_named(tmp_path: Path) -> None:
    path = make().save(tmp_path / "s.safetensors")
    about, tensors = read_segmenter_file(path)
    rewrite(path, {**about, "format": 1}, tensors)
    with pytest.raises(WeightsError, match="format 3"):
        Segmenter.load(path)


def test_files_of_format_2_have_no_digest_and_open(tmp_path: Path) -> None:
    path = make().save(tmp_path / "s.safetensors")
    about, tensors = read_segmenter_file(path)
    save_file(tensors, path, metadata={"overfly": json.dumps({**about, "format": 2})})
    assert torch.equal(Segmenter.load(path).mean, tensors["mean"])


def test_saving_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make().save(tmp_path / "best.safetensors")
    before = path.read_bytes()

    def breaks(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", breaks)
    with pytest.raises(WeightsError, match=r"best\.safetensors"):
        make().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make().save(tmp_path_factory.mktemp("saved") / "s.safetensors").read_bytes()


@settings(deadline=None, max_examples=15)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_named(share: float, saved: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    path.write_bytes(saved[: int(len(saved) * share)])
    with pytest.raises(WeightsError, match=r"cut\.safetensors"):
        Segmenter.load(path)


def test_foreign_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        Segmenter.load(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "bare.safetensors")
    with pytest.raises(WeightsError, match=r"bare\.safetensors"):
        Segmenter.load(tmp_path / "bare.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"other\.safetensors"):
        Segmenter.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [("architecture", "nowhere", "nowhere"), ("classes", {"names": ["a"]}, r"s\.safetensors .*tensors")],
)
def test_invalid_metadata_raises(key: str, value: object, match: str, tmp_path: Path) -> None:
    path = make().save(tmp_path / "s.safetensors")
    about, tensors = read_segmenter_file(path)
    rewrite(path, {**about, key: value}, tensors)
    with pytest.raises(WeightsError, match=match):
        Segmenter.load(path)


@pytest.mark.parametrize("name", ["mean", "network.classifier.weight"])
@pytest.mark.parametrize(
    ("value", "match"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (1j, "not plain real numbers")]
)
def test_non_finite_or_complex_values_raise(
    name: str, value: complex, match: str, saved: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(saved)
    about, tensors = read_segmenter_file(path)
    tensors[name] = tensors[name].to(torch.complex64 if isinstance(value, complex) else torch.float32)
    tensors[name].view(-1)[0] = torch.tensor(value)
    rewrite(path, about, tensors)
    with pytest.raises(WeightsError, match=match) as refusal:
        Segmenter.load(path)
    assert str(path) in str(refusal.value)
    assert f"({name}:" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "match"),
    [("best.pth", "model.weights"), ("recipe.yaml", "model.weights"), ("best.safetensors", "damaged")],
)
@pytest.mark.parametrize("content", [b"", b"model:\n  name: pidnet_s\n", b"PK\x03\x04" + bytes(200)])
def test_files_of_other_kinds_raise(name: str, match: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=match) as refusal:
        Segmenter.load(tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["training_heads", "classes", "bands", "max_value", "architecture"])
def test_missing_or_invalid_metadata_raises(key: str, saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(saved)
    about, tensors = read_segmenter_file(path)
    lacking = {name: entry for name, entry in about.items() if name != key}
    for described in (lacking, {**lacking, key: [{"a": -1}]} if key != "training_heads" else lacking):
        rewrite(path, described, tensors)
        with pytest.raises(WeightsError, match=r"s\.safetensors") as refusal:
            Segmenter.load(path)
        assert "\n" not in str(refusal.value)
