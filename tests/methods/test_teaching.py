"""Self-training: images, pseudo-labels and losses of each method."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from overfly.core.records import IGNORE, Batch, Labeled
from overfly.data.loading import BatchDataset
from overfly.methods.dacs import DACS, GCWLDQ, MIC, AnchoredNetworks, DAFormer, feature_distance, majority
from overfly.methods.method import Method, Networks, TeacherStudent
from overfly.methods.self_training import CBST, IAST
from overfly.methods.source_free import SourceFree
from overfly.ops.color import ColorJitter
from overfly.ops.geometry import Dihedral
from overfly.ops.normalization import batch_norms
from overfly.ops.pseudo_labels import linear_ramp
from overfly.recipe import Recipe, load
from overfly.training.setup import initial_network, training_streams

TEACHERS = ["cbst", "dacs", "daformer", "dsbn", "iast", "mic", "source_free"]
NODATA_METHODS = ["minent", "cbst", "distill", "dsbn", "iast", "multiscale_self_training", "source_free", "tent"]
Case = tuple[Recipe, Batch]


@pytest.fixture
def case(small: dict[str, Any]) -> Case:
    recipe = load(small, "method=dacs")
    return recipe, BatchDataset(*training_streams(recipe)).batch(0)


class StudentInputs:
    """Record the image batches that a student receives in training."""

    def __init__(self, nets: Networks) -> None:
        self.images: list[Tensor] = []
        nets.student.register_forward_pre_hook(lambda _, given: self.images.append(given[0]))


def run(
    method: Method[Any], case: Case, teacher_scores: Tensor | None = None
) -> tuple[Any, StudentInputs, dict[str, Tensor]]:
    """Networks, student inputs and losses of one step; ``teacher_scores`` replaces the teacher's output."""
    torch.manual_seed(0)
    nets = method.networks(initial_network(case[0])[0]).train()
    if teacher_scores is not None:
        nets.teacher.register_forward_hook(lambda *given: given[2]._replace(main=teacher_scores))
    inputs = StudentInputs(nets)
    torch.manual_seed(0)
    return nets, inputs, dict(method.losses(nets, case[1]))


def scores_of(label: Tensor, margin: float) -> Tensor:
    """Scores of 7 classes whose most probable one is the label's, all with the same margin."""
    return margin * torch.nn.functional.one_hot(label, 7).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("name", TEACHERS)
def test_self_training_uses_one_forward_pass_and_deploys_the_teacher(
    name: str, recipe_of: Callable[..., Recipe]
) -> None:
    recipe = recipe_of(name)
    nets = recipe.method.networks(initial_network(recipe)[0]).train()
    assert isinstance(nets, TeacherStudent)
    assert not any(part.training for part in nets.teacher.modules())
    assert not any(weight.requires_grad for weight in nets.teacher.parameters())
    inputs = StudentInputs(nets)
    before = {key: value.clone() for key, value in nets.teacher.state_dict().items()}
    recipe.method.losses(nets, BatchDataset(*training_streams(recipe)).batch(0))
    assert len(inputs.images) == (2 if name == "mic" else 1)  # covered images apart
    assert all(torch.equal(value, before[key]) for key, value in nets.teacher.state_dict().items())
    recipe.method.after_step(nets, 0)
    own = nets.teacher.state_dict()
    share = float(getattr(recipe.method, "ema", 0)) if recipe.method.needs_start else 0.0
    for key, value in nets.student.state_dict().items():
        expected = torch.lerp(value, before[key], share) if value.is_floating_point() else value
        torch.testing.assert_close(own[key], expected)
    saved = recipe.method.inference_network(nets).state_dict()
    assert all(torch.equal(value, own[key]) for key, value in saved.items() if key in own)


@pytest.mark.parametrize("margin", [0.0, 50.0])
def test_dacs_pastes_source_pixels_with_their_labels_and_weighs_the_rest(case: Case, margin: float) -> None:
    (image, label), target, _ = case[1]
    pseudo = torch.randint(0, 7, label.shape)
    method = DACS(strong_augment=())
    nets = method.networks(initial_network(case[0])[0]).train()
    nets.teacher.register_forward_hook(lambda *given: given[2]._replace(main=scores_of(pseudo, margin)))
    torch.manual_seed(0)
    mix = method.mix(nets, case[1])
    expected = pseudo if margin else torch.zeros_like(pseudo)
    assert mix.from_source.any()
    assert torch.equal(mix.label, torch.where(mix.from_source, label, expected))
    assert torch.allclose(mix.image, torch.where(mix.from_source[:, None], image, target), atol=1e-3)
    assert (mix.weight[mix.from_source] == 1).all()
    assert (mix.weight[~mix.from_source] == float(margin > 0)).all()
    assert not (mix.label == IGNORE).any()


def test_boundary_loss_uses_source_pixels_only(case: Case) -> None:
    teacher_scores = scores_of(torch.randint(0, 7, case[1].source.label.shape), 50.0)
    unlabeled = case[1]._replace(
        source=Labeled(case[1].source.image, torch.full_like(case[1].source.label, IGNORE)),
    )
    for method in (DACS(), MIC(), DAFormer(warmup=0)):
        _, _, losses = run(method, (case[0], unlabeled), teacher_scores)
        assert losses["mixed_main"] > 0
        assert losses["mixed_boundary"] == 0
        assert losses["source_main"] == 0
    for name in ("cbst", "iast"):
        _, _, losses = run(Method.kind(name)(), case, teacher_scores)
        assert not [key for key in losses if "boundary" in key and not key.startswith("source")]


def test_geometry_cannot_be_a_strong_augmentation() -> None:
    with pytest.raises(ValueError, match="dihedral"):
        DACS(strong_augment=(ColorJitter(), Dihedral()))


def test_gradual_class_weights_follow_the_source(case: Case) -> None:
    nets, _, losses = run(GCWLDQ(), case)
    label = case[1].source.label
    each = []
    for one in label:  # the weights of each image, not of all together
        shares = torch.stack([(one == index).sum() / (one != IGNORE).sum() for index in range(7)])
        each.append(7 * ((1 - shares) / 0.1).softmax(0))
    assert torch.allclose(nets.class_weights, 0.9 + (1 - 0.9) * torch.stack(each).mean(0))
    _, _, without = run(DACS(), case)
    assert losses["source_main"] != without["source_main"]
    assert losses["mixed_main"] == without["mixed_main"]


def test_local_quality_weighs_pixel_by_pixel(case: Case) -> None:
    label = torch.zeros_like(case[1].source.label)
    teacher_scores = scores_of(label, 50.0)
    teacher_scores[..., :32] = 0  # the left half has no confident class
    method = GCWLDQ(strong_augment=())
    nets = method.networks(initial_network(case[0])[0]).train()
    nets.teacher.register_forward_hook(lambda *given: given[2]._replace(main=teacher_scores))
    mix = method.mix(nets, case[1])
    assert (mix.pseudo_weight[:, :, :29] == 0).all()
    assert (mix.pseudo_weight[:, :, 35:] == 1).all()


def test_dacs_warmup_trains_on_the_source_only(case: Case) -> None:
    nets, inputs, losses = run(DACS(warmup=1), case)
    assert len(inputs.images[0]) == 2
    assert not [key for key in losses if key.startswith("mixed")]
    nets.step = 1
    assert "mixed_main" in DACS(warmup=1).losses(nets, case[1])


def test_daformer_feature_distance_is_zero_at_the_anchor(case: Case) -> None:
    method = DAFormer()
    nets = method.networks(initial_network(case[0])[0]).train()
    assert isinstance(nets, AnchoredNetworks)
    assert not any(part.training for part in nets.anchor.modules())
    nets.student.eval()
    assert method.losses(nets, case[1])["feature_distance"] < 1e-5
    with torch.no_grad():
        next(nets.student.parameters()).mul_(3)
    assert method.losses(nets, case[1])["feature_distance"] > 1e-4
    nothing = DAFormer(feature_classes=(6,))
    batch = case[1]._replace(source=case[1].source._replace(label=torch.zeros_like(case[1].source.label)))
    assert nothing.losses(nets, batch)["feature_distance"] == 0


def test_mic_masks_target_images_only(case: Case) -> None:
    nets, inputs, losses = run(MIC(mask_block=8, mask_ratio=0.7, strong_augment=()), case)
    source, masked = inputs.images[0].chunk(2)[0], inputs.images[1]
    plain, _, _ = run(DACS(strong_augment=()), case)
    for name, value in plain.student.named_buffers():  # what is covered does not reach the statistics
        if value.is_floating_point():
            assert torch.equal(value, dict(nets.student.named_buffers())[name])
    assert {norm.momentum for norm in batch_norms(nets.student)} == {
        norm.momentum for norm in batch_norms(nets.teacher)
    }
    assert torch.equal(source, case[1].source.image)
    target = case[1].target
    same = (masked - target).abs().amax(1) < 1e-2
    assert 0.1 < same.float().mean() < 0.6
    mean = target.mean((2, 3), keepdim=True).expand_as(target).movedim(1, -1)
    assert torch.allclose(masked.movedim(1, -1)[~same], mean[~same], atol=1e-2)
    assert {"masked_main", "masked_aux"} <= losses.keys()


def test_cbst_ramps_its_share_and_keeps_it_of_every_class(case: Case) -> None:
    method = CBST(initial_share=0.2, share=0.6, ramp_steps=10, threshold_ema=0.0)
    assert [linear_ramp(0.2, 0.6, 10, step) for step in (0, 5, 10, 99)] == pytest.approx([0.2, 0.4, 0.6, 0.6])
    label = torch.randint(0, 7, case[1].source.label.shape)
    noisy = scores_of(label, 6.0) + torch.rand(len(label), 7, *label.shape[1:])
    nets, _, _ = run(method, case, noisy)
    probability, pseudo = noisy.softmax(1).max(1)
    for index in range(7):
        own = probability[pseudo == index]
        assert abs((own >= nets.thresholds[index]).float().mean() - 0.2) < 0.01
    method.after_step(nets, 0)
    saved = nets.state_dict()
    assert int(saved["_extra_state"]) == 1
    assert all(value.isfinite().all() for value in saved.values() if value.is_floating_point())


def test_iast_thresholds_follow_the_images(case: Case) -> None:
    label = torch.zeros_like(case[1].source.label)
    low, _, _ = run(IAST(), case, scores_of(label, 2.0))
    high, _, losses = run(IAST(), case, scores_of(label, 50.0))
    assert low.thresholds[0] < 0.9 < high.thresholds[0]
    assert torch.equal(low.thresholds[1:], high.thresholds[1:])
    assert losses["entropy"] == 0  # nothing is ignored
    assert losses["uniform"] > 0


def test_iast_regularizes_by_a_mean_over_pixels_and_classes(case: Case) -> None:
    """As the published code has it: 3 / K of the entropy of ignored pixels in nats, 0.1 / K of the other."""
    label = torch.zeros_like(case[1].source.label)
    confident = torch.zeros_like(label, dtype=torch.bool)
    confident[..., :20] = True  # fully confident; the rest is below the initial threshold
    teacher_scores = torch.where(confident[:, None], scores_of(label, 50.0), scores_of(label, 1.0))
    scores = torch.randn(2 * len(label), 7, *label.shape[1:], generator=torch.Generator().manual_seed(1))
    method = IAST()
    nets = method.networks(initial_network(case[0])[0]).train()
    nets.teacher.register_forward_hook(lambda *given: given[2]._replace(main=teacher_scores))
    nets.student.register_forward_hook(lambda *given: given[2]._replace(main=scores))
    losses = method.losses(nets, case[1])
    probability = scores[len(label) :].softmax(1)
    nats = -(probability * probability.log()).sum(1)
    far = -probability.log().mean(1) - math.log(7)
    torch.testing.assert_close(losses["entropy"], 3 / 7 * nats[~confident].mean())
    torch.testing.assert_close(losses["uniform"], 0.1 / 7 * far[confident].mean())


def test_source_free_reads_no_source(case: Case) -> None:
    empty = Labeled(torch.zeros(0, 0, 0, 0), torch.zeros(0, 0, 0, dtype=torch.int64))
    nets, inputs, losses = run(SourceFree(strong_augment=()), (case[0], Batch(empty, case[1].target)))
    assert torch.allclose(inputs.images[0], case[1].target, atol=1e-3)
    assert set(losses) == {"target_main", "target_aux", "information", "confident_share"}
    frozen = {name for name, weight in nets.student.named_parameters() if not weight.requires_grad}
    assert frozen
    assert all(name.startswith("network.boundary.") for name in frozen)


@pytest.mark.parametrize(("statistics", "same"), [("frozen", True), ("batch", False)])
def test_source_free_freezes_statistics_by_default(
    case: Case, statistics: Literal["frozen", "batch"], same: bool
) -> None:
    method = SourceFree(statistics=statistics)
    nets = method.networks(initial_network(case[0])[0]).train()
    before = {name: value.clone() for name, value in nets.student.named_buffers() if "running" in name}
    method.losses(nets, case[1])
    now = dict(nets.student.named_buffers())
    assert before
    assert all(torch.equal(now[name], value) for name, value in before.items()) == same


def test_source_free_labels_at_several_scales_and_keeps_the_first_class_shares(case: Case) -> None:
    method = SourceFree(share=1.0)
    nets = method.networks(initial_network(case[0])[0]).train()
    sides: list[int] = []
    nets.teacher.register_forward_pre_hook(lambda _, given: sides.append(given[0].shape[-1]))
    scores = torch.zeros(1, 7, 1, 1)
    scores[0, 0], scores[0, 1] = 1.0, 0.9  # slightly above the second class
    nets.teacher.register_forward_hook(lambda *each: each[2]._replace(main=scores.expand_as(each[2].main)))
    nets.class_prior.copy_(torch.tensor([0.7, *[0.05] * 6]))
    nets.reference.copy_(torch.tensor([0.1, *[0.15] * 6]))
    nets.step = 100
    label = method.label_target(nets, case[1].target, None, share=1.0, threshold_ema=0.9)
    side = case[1].target.shape[-1]
    assert sides == [round(0.67 * side), side, round(1.5 * side)]
    assert bool((label == 1).all())
    assert nets.reference[0].item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    "name", ["minent", "cbst", "distill", "dsbn", "iast", "multiscale_self_training", "source_free", "tent"]
)
def test_pixels_without_data_have_no_loss(name: str, recipe_of: Callable[..., Recipe]) -> None:
    """Of a target of which nothing was measured no term is left, and thresholds stay as they were."""
    recipe = recipe_of(name)
    changes = {"mix_share": 0.0} if name == "multiscale_self_training" else {}
    method = recipe.method.model_copy(update=changes)
    nets = method.networks(initial_network(recipe)[0]).train()
    before = {key: value.clone() for key, value in nets.named_buffers() if key in {"thresholds", "class_prior"}}
    batch = BatchDataset(*training_streams(recipe)).batch(0)
    torch.manual_seed(0)
    measured = dict(method.losses(nets, batch))
    for key, value in before.items():
        dict(nets.named_buffers())[key].copy_(value)
    nodata_mask = torch.ones(len(batch.target), *batch.target.shape[-2:], dtype=torch.bool)
    torch.manual_seed(0)
    losses = method.losses(nets, batch._replace(nodata_mask=nodata_mask))
    own = [key for key in losses if key.split("_")[0] in {"target", "mixed", "soft", "entropy", "uniform"}]
    assert own or name == "source_free"
    assert any(measured[key] != 0 for key in own)
    assert all(losses[key] == 0 for key in own)
    assert all(torch.equal(dict(nets.named_buffers())[key], value) for key, value in before.items())
    total = torch.stack([value for value in losses.values() if value.requires_grad]).sum()
    assert total.isfinite()


def test_majority_is_the_most_frequent_class_of_a_cell() -> None:
    label = torch.tensor([[[0, 0, 1, 2], [0, 0, 1, 1], [IGNORE, IGNORE, 2, 0], [IGNORE, 1, 1, 2]]])
    assert majority(label, (2, 2), 0.75, 3).tolist() == [[[0, 1], [IGNORE, IGNORE]]]
    assert majority(label, (2, 2), 0.0, 3).tolist() == [[[0, 1], [1, 2]]]
    assert (majority(torch.full((1, 4, 4), IGNORE), (2, 2), 0.0, 3) == IGNORE).all()


def test_feature_distance() -> None:
    anchor = torch.randn(1, 6, 2, 2)
    features = anchor.clone().requires_grad_()
    everywhere = torch.ones(1, 2, 2, dtype=torch.bool)
    found = feature_distance(features, anchor, everywhere)
    found.backward()  # type: ignore[no-untyped-call]
    assert found < 1e-5
    assert features.grad is not None
    assert features.grad.isfinite().all()
    moved = anchor + torch.tensor([3.0, 4.0, 0, 0, 0, 0]).view(1, 6, 1, 1)
    assert torch.allclose(feature_distance(moved, anchor, everywhere), torch.tensor(5.0))
    assert feature_distance(moved, anchor, ~everywhere) == 0
