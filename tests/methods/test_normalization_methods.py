"""Methods that give each domain normalizations of its own, or change nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overfly.core.classes import Classes
from overfly.core.errors import RecipeError
from overfly.core.records import Batch
from overfly.data.loading import BatchDataset
from overfly.methods.distillation import Distill
from overfly.methods.domain_norms import DSBN, DomainNorm, TransferableNorm, TransNorm
from overfly.methods.method import Method
from overfly.methods.recalibrate import Recalibrate
from overfly.methods.source_free import Tent
from overfly.models import Segmenter, build
from overfly.recipe import Recipe, load
from overfly.training.setup import initial_network, training_streams
from overfly.training.train_recipe import resolve_start

Case = tuple[Recipe, Batch]


@pytest.fixture
def case(small: dict[str, Any]) -> Case:
    recipe = load(small, "method=dacs", "optim.lr=1e-4")
    return recipe, BatchDataset(*training_streams(recipe)).batch(0)


def stepped(method: Method[Any], case: Case, steps: int = 2) -> Any:
    """Networks after a few steps of plain descent."""
    nets = method.networks(initial_network(case[0])[0]).train()
    optimizers = method.optimizers(nets, case[0].optim)
    for step in range(steps):
        losses = method.losses(nets, case[1])
        if losses:
            torch.autograd.backward(torch.stack(list(losses.values())).sum())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        method.after_step(nets, step)
    return nets


def test_recalibrate_share_interpolates_statistics(case: Case) -> None:
    torch.manual_seed(0)
    segmenter = initial_network(case[0])[0]
    result = {}
    for share in (0.0, 0.5, 1.0):
        method = Recalibrate(share=share)
        torch.manual_seed(0)
        result[share] = method.inference_network(stepped(method, case)).state_dict()
    segmenter.load_state_dict(result[0.0])
    torch.manual_seed(0)
    start = initial_network(case[0])[0].state_dict()
    assert all(torch.equal(value, start[key]) for key, value in result[0.0].items())
    for key, value in result[0.5].items():
        if "running" in key:
            assert torch.allclose(value, (result[0.0][key] + result[1.0][key]) / 2, atol=1e-5, rtol=1e-5)
        elif "num_batches" not in key:
            assert torch.equal(value, result[1.0][key])
    assert "beginning" not in "".join(Recalibrate().networks(segmenter).state_dict())


def test_tent_changes_batch_normalization_only(case: Case) -> None:
    torch.manual_seed(0)
    before = initial_network(case[0])[0]
    norms = {name for name, part in before.named_modules() if isinstance(part, nn.BatchNorm2d)}
    torch.manual_seed(0)
    after = stepped(Tent(), case).student.state_dict()
    changed = {key for key, value in before.state_dict().items() if not torch.equal(value, after[key])}
    assert {key.rsplit(".", 1)[0] for key in changed} <= norms
    kinds = {key.rsplit(".", 1)[1] for key in changed}
    assert {"weight", "bias", "running_mean", "running_var"} <= kinds
    heads = [key for key in changed if "seghead" in key and key.endswith(("weight", "bias"))]
    assert not heads


def test_dsbn_of_equal_domains_is_ordinary_batch_normalization() -> None:
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight)
    double = DomainNorm(norm)
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(norm.state_dict())
    image = torch.randn(3, 4, 5, 5) * 3 + 2
    both = double(torch.cat([image, image]))
    expected = plain(image)
    assert torch.equal(both[:3], expected)
    assert torch.equal(both[3:], expected)
    for branch in (double.source, double.target):
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in branch.state_dict().items())
    assert torch.equal(double.eval()(image), plain.eval()(image))


def test_dsbn_has_separate_statistics() -> None:
    double = DomainNorm(nn.BatchNorm2d(1))
    double(torch.cat([torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8) * 9 + 100]))
    result = {name: float(value) for name, value in double.state_dict().items() if name.endswith("running_mean")}
    assert abs(result["source.running_mean"]) < 1
    assert result["target.running_mean"] > 5


@pytest.mark.parametrize("method", [DSBN(), TransNorm(), Recalibrate(share=0.3)], ids=lambda method: method.name)
def test_deployed_networks_are_ordinary_with_equal_outputs(method: Method[Any], case: Case, tmp_path: Path) -> None:
    nets = stepped(method, case)
    inference_network = method.inference_network(nets).eval()
    assert isinstance(inference_network, Segmenter)
    assert inference_network.state_dict().keys() == initial_network(case[0])[0].state_dict().keys()
    loaded = Segmenter.load(inference_network.save(tmp_path / "deployed.safetensors")).eval()
    image = case[1].target
    with torch.no_grad():
        assert torch.equal(loaded(image).main, inference_network(image).main)
        if not isinstance(method, Recalibrate):
            inner = nets.teacher if isinstance(method, DSBN) else nets.student
            assert torch.allclose(inner.eval()(image).main, inference_network(image).main, atol=1e-4, rtol=1e-4)


def test_transferable_normalization_by_the_papers_formula() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    part = TransferableNorm(norm)
    source, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4) + torch.tensor([0.0, 5, 0]).view(1, 3, 1, 1)
    result = part(torch.cat([source, target]))
    ratios = []
    normal = []
    for image in (source, target):
        mean, variance = image.mean((0, 2, 3)), image.var((0, 2, 3), correction=0)
        ratios.append(mean / (variance + norm.eps).sqrt())
        standard = (image - mean.view(1, 3, 1, 1)) / (variance.view(1, 3, 1, 1) + norm.eps).sqrt()
        normal.append(standard * norm.weight.view(1, 3, 1, 1) + norm.bias.view(1, 3, 1, 1))
    near = 1 / (1 + (ratios[0] - ratios[1]).abs())
    alpha = 3 * near / near.sum()
    assert alpha[1] < alpha[0]
    assert torch.allclose(result, torch.cat(normal) * ((1 + alpha) / 2).view(1, 3, 1, 1), atol=1e-5)


def test_transnorm_of_equal_domains_is_the_ordinary_network() -> None:
    """Also where no normalization follows that could compensate a factor: PIDNet's gates and class layer."""
    torch.manual_seed(0)
    names = tuple("abc")
    networks = [
        Segmenter(build("pidnet_s", 3), Classes(names=names), architecture="pidnet_s", mean=[0.0] * 3, std=[1.0] * 3)
        for _ in range(2)
    ]
    networks[1].load_state_dict(networks[0].state_dict())
    nets = TransNorm().networks(networks[1]).train()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain, both = networks[0].train()(image), nets.student(torch.cat([image, image]))
    torch.testing.assert_close(both.main[:2], plain.main, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(both.main[2:], plain.main, atol=1e-3, rtol=1e-3)


def test_distillation_loss_is_zero_for_equal_networks(case: Case, tmp_path: Path) -> None:
    file = initial_network(case[0])[0].save(tmp_path / "teacher.safetensors")
    method = Distill(teacher=file)
    nets = method.networks(Segmenter.load(file))
    nets.eval()
    assert nets.teacher.network.has_training_heads is False
    result = method.losses(nets, case[1])
    assert result["soft"].abs() < 1e-5
    assert {"source_main", "soft_aux"} <= result.keys()
    empty = case[1].source._replace(image=torch.zeros(0, 0, 0, 0))
    assert set(method.losses(nets, case[1]._replace(source=empty))) == {"soft", "soft_aux"}
    before = {key: value.clone() for key, value in nets.teacher.state_dict().items()}
    after = stepped(method, case).teacher.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_distillation_reads_the_source_if_there_is_one(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(small)
    file = initial_network(recipe)[0].save(tmp_path / "teacher.safetensors")
    method = {"name": "distill", "teacher": str(file)}
    with_source = load({**small, "method": method})
    assert load(with_source.model_dump(mode="json")) == with_source
    assert training_streams(with_source)[0] is not None
    unlabeled = load({**small, "source": None, "start": str(file), "method": method, "model": recipe.model.name})
    assert training_streams(unlabeled)[0] is None


def test_a_missing_or_different_teacher_raises(small: dict[str, Any], tmp_path: Path) -> None:
    student = initial_network(load(small))[0]
    with pytest.raises(RecipeError, match=r"method\.teacher: .*nowhere"):
        Distill(teacher=tmp_path / "nowhere").networks(student)
    with pytest.raises(RecipeError, match=r"method\.teacher"):
        Distill(teacher=tmp_path).networks(student)
    file = student.save(tmp_path / "teacher.safetensors")
    other = student.classes.model_copy(update={"names": tuple(reversed(student.classes.names))})
    student.classes = other
    with pytest.raises(RecipeError, match="classes, bands"):
        Distill(teacher=file).networks(student)
    wide = initial_network(load(small))[0]
    wide.max_value = 65535.0
    with pytest.raises(RecipeError, match="65535"):
        Distill(teacher=file).networks(wide)
    with pytest.raises(RecipeError, match="nowhere"):
        resolve_start(tmp_path / "nowhere")
