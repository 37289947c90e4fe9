"""Networks of transformers, with random weights and small configurations."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import REPOSITORY
from overfly import adapt, report, train
from overfly.core.errors import RecipeError, WeightsError
from overfly.models import build
from overfly.models.hugging_face import TransformersNetwork
from overfly.models.segmenter import Segmenter
from overfly.recipe import Model, load
from overfly.training.run import Run

transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
HIDDEN = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
SWIN = {
    "model_type": "swin", "embed_dim": 16, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
QUERIES = {"num_queries": 6, "mask_feature_size": 32, "backbone_config": SWIN}
CONFIGS: dict[str, dict[str, Any]] = {
    "segformer": {
        "depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16,
    },
    "dinov2": {**HIDDEN, "image_size": 56, "patch_size": 14},
    "dinov3_vit": {**HIDDEN, "image_size": 64, "patch_size": 16},
    "convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "out_features": ["stage1", "stage4"]},
    "eomt": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_blocks": 2, "num_attention_heads": 2, "image_size": 96,
        "patch_size": 16, "num_queries": 6, "num_upscale_blocks": 1, "mlp_ratio": 2,
    },
    "mask2former": {
        **QUERIES, "feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32,
        "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2,
    },
    "dpt": {**HIDDEN, "image_size": 64, "patch_size": 16, "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 16, "readout_type": "project"},
}  # fmt: skip


def network(kind: str, classes: int = 7, bands: int = 3) -> TransformersNetwork:
    built = build("transformers:small", classes, bands=bands, config={"model_type": kind, **CONFIGS[kind]})
    assert isinstance(built, TransformersNetwork)
    return built


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Write a checkpoint of 5 classes as the library does."""

    def write(kind: str) -> Path:
        network(kind, classes=5).model.save_pretrained(tmp_path / kind)  # type: ignore[operator]
        return tmp_path / kind

    return write


@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_of_every_size(kind: str, bands: int) -> None:
    built = network(kind, bands=bands).eval()
    segmenter = Segmenter(
        built, load({"source": {"name": "synthetic", "scene": "urban"}}).domain("source").classes,
        architecture="transformers:small", mean=[127.0] * bands, std=[60.0] * bands,
    )  # fmt: skip
    for height, width in ((96, 64), (71, 117)):
        scores = segmenter.scores(torch.rand(2, bands, height, width) * 255)
        assert scores.shape == (2, 7, height, width)
        assert scores.isfinite().all()
        assert scores.std() > 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_reaches_the_first_layer(kind: str) -> None:
    built = network(kind)
    built(torch.randn(2, 3, 96, 96)).main[:, 1].mean().backward()  # type: ignore[no-untyped-call]
    gradient = built.get_parameter(f"{built.first_conv}.weight").grad
    assert gradient is not None
    assert gradient.any()


@pytest.mark.parametrize("kind", ["segformer", "dinov2", "mask2former"])
def test_round_trip_through_a_folder(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = {"name": "synthetic", "scene": "urban", "size": 64, "train": 4, "val": 2}
    values = {
        "source": source,
        "crop": 64,
        "window": 64,
        "batch": 2,
        "steps": 2,
        "model": f"transformers:{folder(kind)}",
    }
    run = train(load(values), out=tmp_path / "runs", quiet=True)
    trained = Run.open(run.path).segmenter()
    assert isinstance(trained.network, TransformersNetwork)
    image = torch.rand(1, 3, 64, 64) * 255
    again = Segmenter.load(trained.save(tmp_path / "again.safetensors")).eval()
    assert torch.equal(again.scores(image), trained.scores(image))


def test_a_trained_network_needs_no_checkpoint(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path, settings = folder("segformer"), ["crop=64", "window=64", "batch=2", "steps=2"]
    source = {"name": "synthetic", "scene": "urban", "size": 64, "train": 4, "val": 2}
    run = train(load({"source": source, "model": f"transformers:{path}"}, *settings), out=tmp_path / "runs", quiet=True)
    weights = Path(shutil.copy(run.run.weights, tmp_path / "network.safetensors"))
    assert str(tmp_path).encode() not in weights.read_bytes()
    shutil.rmtree(path)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.fromarray(torch.randint(256, (96, 96, 3), dtype=torch.uint8).numpy()).save(images / f"{number}.png")
    for checkpoint in (weights, run.path):
        adapted = adapt(*settings, checkpoint=checkpoint, target_images=images, out=tmp_path / "adapted", quiet=True)
        assert adapted.selection.recommended in adapted.selection.candidates
    assert report([run.path], out=tmp_path / "report.html").path.is_file()


def test_a_backbone_of_another_repository_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.getaddrinfo", connect)
    config = {"model_type": "upernet", "backbone": "someone/backbone", "use_pretrained_backbone": True}
    with pytest.raises(RecipeError, match="another repository, someone/backbone"):
        build("transformers:small", config=config)
    with pytest.raises(RecipeError, match="another repository, someone/backbone"):
        build("transformers:small", config={"model_type": "maskformer", "backbone_config": config})


def test_weights_of_a_checkpoint(folder: Callable[[str], Path]) -> None:
    from overfly.training.setup import load_initial_weights

    path = folder("segformer")
    model = Model.model_validate(f"transformers:{path}")
    built = build(model.architecture, classes=7)
    report = load_initial_weights(model, built)
    assert report is not None
    assert [name for name, *_ in report.mismatched] == [
        "model.decode_head.classifier.weight", "model.decode_head.classifier.bias"
    ]  # fmt: skip
    assert report.missing == ()
    saved = transformers.SegformerForSemanticSegmentation.from_pretrained(path)
    own = built.state_dict()
    same = [name for name, tensor in saved.state_dict().items() if torch.equal(own[f"model.{name}"], tensor)]
    assert len(same) >= len(report.loaded)


def test_a_classifier_of_the_same_type_gives_its_encoder_alone(tmp_path: Path) -> None:
    from overfly.training.setup import load_initial_weights

    config = transformers.AutoConfig.for_model("segformer", **CONFIGS["segformer"])
    transformers.SegformerForImageClassification(config).save_pretrained(tmp_path)
    model = Model.model_validate(f"transformers:{tmp_path}")
    report = load_initial_weights(model, build(model.architecture))
    assert report is not None
    assert {name.split(".")[1] for name in report.missing} == {"decode_head"}
    assert {name.split(".")[1] for name in report.loaded} == {"segformer"}


def test_export(folder: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    source = {"name": "synthetic", "scene": "urban", "size": 64, "train": 4, "val": 2, "test": 2}
    model = f"transformers:{folder('segformer')}"
    run = train(
        load({"source": source, "crop": 64, "window": 64, "batch": 2, "steps": 1, "model": model}),
        out=tmp_path / "runs", quiet=True,
    )  # fmt: skip
    # a process of its own: in this one the library's tracing would close the captured error stream
    command = [sys.executable, "-m", "overfly", "export", str(run.path), "--size", "64", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "transformers-segformer-onnx-32-64.onnx").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.json": None}, "config.json"),
        ({"model.safetensors": None}, "safetensors"),
        ({"config.json": b"{}"}, "model_type"),
        ({"config.json": json.dumps({"model_type": "bert"}).encode()}, "no segmentation network"),
        ({"model.safetensors": b"\x00" * 40}, "cannot be opened"),
    ],
)
def test_damaged_folders(folder: Callable[[str], Path], change: dict[str, bytes | None], message: str) -> None:
    from overfly.training.setup import load_initial_weights

    path = folder("segformer")
    for name, content in change.items():
        if content is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(content)
    model = Model.model_validate(f"transformers:{path}")
    with pytest.raises((RecipeError, WeightsError), match=message) as refusal:
        load_initial_weights(model, build(model.architecture))
    assert str(path) in str(refusal.value) or "transformers" in str(refusal.value)


def test_a_configuration_cannot_name_code_or_other_weights(folder: Callable[[str], Path]) -> None:
    path = folder("segformer")
    config = json.loads((path / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModelForSemanticSegmentation": "evil.Model"}, "attn_implementation": "someone/kernels",
        "_attn_implementation": "someone/kernels", "quantization_config": {"quant_method": "evil"},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text("raise SystemExit('code of a repository was run')")
    built = build(f"transformers:{path}")
    assert built.config is not None
    assert not {"auto_map", "quantization_config"} & set(built.config)
    assert isinstance(built, TransformersNetwork)
    assert built.pretrained(str(path))


def test_the_checkpoint_is_for_transformers_alone() -> None:
    with pytest.raises(RecipeError, match="takes no checkpoint"):
        load({"source": {"name": "synthetic", "scene": "urban"}, "model": "pidnet_s:folder"})
    with pytest.raises(RecipeError, match="needs a checkpoint"):
        load({"source": {"name": "synthetic", "scene": "urban"}, "model": "transformers"})


def test_the_library_is_imported_only_when_named() -> None:
    code = "import sys, overfly.recipe, overfly.training.trainer; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
