from __future__ import annotations

from functools import cache

import pytest
import torch
from formula_weights import fill, smooth_image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from overfly.core.records import Logits
from overfly.models import Network, build, names
from overfly.models.lraspp import Depthwise

PARAMETERS = {  # of 7 classes: with training heads, without
    "pidnet_s": (7_717_839, 7_624_167),
    "pidnet_m": (28_760_015, 28_536_967),
    "pidnet_l": (37_308_143, 36_936_487),
    "deeplabv2_resnet101": (43_016_284, 43_016_284),
    "lraspp_mobilenet_v2": (2_030_390, 2_028_591),
    "lraspp_mobilenet_v2_half": (533_826, 532_923),
}
GMACS = {  # of one 3×512×512 image
    "pidnet_s": (6.274, 5.893),
    "pidnet_m": (23.070, 22.160),
    "pidnet_l": (35.872, 34.354),
    "deeplabv2_resnet101": (184.520, 184.520),
    "lraspp_mobilenet_v2": (2.817, 2.815),
    "lraspp_mobilenet_v2_half": (0.762, 0.761),
}
OUTPUTS = {  # on formula-filled weights: mean, deviation, and the scores at two places
    "deeplabv2_resnet101": (-0.37175, 2.36323, -1.64768, -1.91288),
    "lraspp_mobilenet_v2": (-0.00843, 0.82772, 0.21200, -1.00454),
    "lraspp_mobilenet_v2_half": (-0.04229, 0.96580, 1.84001, 0.25111),
    "pidnet_l": (-0.05042, 0.87192, 0.11798, -0.16847),
    "pidnet_m": (-0.90577, 1.20533, 0.07168, 0.25056),
    "pidnet_s": (-2.03130, 2.43723, -1.21988, 0.83875),
}


@cache
def on_meta(name: str, training_heads: bool = True) -> Network:
    """A network of shapes without values: built, run and differentiated in no time."""
    with torch.device("meta"):
        return build(name, training_heads=training_heads).eval()


def by_formula(name: str) -> Network:
    with torch.device("meta"):
        network = build(name)
    network.to_empty(device="cpu")
    fill(network)
    return network.eval()


def test_every_network_has_golden_numbers() -> None:
    assert {name for name in names() if "small_" not in name} == set(PARAMETERS) == set(GMACS) == set(OUTPUTS)


@pytest.mark.parametrize(
    ("name", "training_heads"),
    [(name, heads) for name in PARAMETERS for heads in (True, False) if heads or len(set(PARAMETERS[name])) > 1],
)
def test_parameters_and_macs(name: str, training_heads: bool) -> None:
    network = on_meta(name, training_heads)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name][0 if training_heads else 1]
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 512, 512, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS[name][0 if training_heads else 1], abs=6e-4)


def test_the_light_network_is_light() -> None:
    assert PARAMETERS["lraspp_mobilenet_v2"][0] <= 4_000_000


def test_resnet101_without_its_classifier() -> None:
    network = on_meta("deeplabv2_resnet101")
    body = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("classifier"))
    assert body == 42_500_160


@pytest.mark.parametrize(("height", "width"), [(64, 64), (71, 53)])
@pytest.mark.parametrize("name", names())
def test_shapes(name: str, height: int, width: int) -> None:
    network = on_meta(name)
    out = network(torch.zeros(2, 3, height, width, device="meta"))
    rounding = 1 if name.startswith("deeplabv2") else 0  # its pool rounds up
    for got, side in zip(out.main.shape[2:], (height, width), strict=True):
        assert got - -(-side // network.stride) in range(rounding + 1)
    assert out.main.shape[:2] == (2, 7)
    assert all(scores.shape[:2] == (2, 7) for scores in out.aux)
    assert out.boundary is None or out.boundary.shape == (2, 1, *out.main.shape[2:])
    assert out.features is not None
    assert out.features.shape[0] == 2


def differentiate(out: Logits) -> None:
    total = out.main.square().mean() + sum(scores.square().mean() for scores in out.aux)
    if out.boundary is not None:
        total = total + out.boundary.square().mean()
    total.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", names())
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    network = on_meta(name)
    network.zero_grad()
    differentiate(network(torch.zeros(2, 3, 64, 64, device="meta")))
    assert [key for key, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["pidnet_s", "lraspp_mobilenet_v2"])
def test_gradients_are_finite_and_reach_the_first_layer(name: str) -> None:
    torch.manual_seed(0)
    network = build(name)
    differentiate(network(smooth_image(128, 128, batch=2)))
    gradients = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert bool(gradients[f"{network.first_conv}.weight"].any())


@pytest.mark.parametrize("name", names())
def test_golden_outputs(name: str) -> None:
    network = by_formula(name)
    image = smooth_image(64, 96)
    with torch.no_grad():
        main = network(image).main
        assert torch.equal(main, network(image).main)
    got = (main.mean(), main.std(), main[0, 0, 3, 4], main[0, 6, 5, 2])
    assert [float(x) for x in got] == pytest.approx(OUTPUTS[name], rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("name", names())
def test_heads_name_parameters_that_exist_and_leave_an_encoder(name: str) -> None:
    network = on_meta(name)
    parameters = dict(network.named_parameters())
    prefixes = tuple(f"{prefix}." for prefix in network.heads)
    heads = [key for key in parameters if key.startswith(prefixes)]
    for prefix in network.heads:
        assert any(key.startswith(f"{prefix}.") for key in parameters), prefix
    assert 0 < len(heads) < len(parameters)
    assert not any(key.startswith(prefixes) for key in parameters if key.startswith(network.first_conv))


@pytest.mark.parametrize("name", ["pidnet_s", "lraspp_mobilenet_v2"])
def test_dropping_the_training_heads_leaves_the_main_scores(name: str) -> None:
    network = by_formula(name)
    image = smooth_image(40, 48)
    with torch.no_grad():
        before = network(image)
        assert network.has_training_heads
        assert before.aux
        network.drop_training_heads()
        after = network(image)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name][1]
    assert after.aux == ()
    assert after.boundary is None
    assert torch.equal(before.main, after.main)


def test_fresh_networks_start_in_range() -> None:
    torch.manual_seed(0)
    for name in ("pidnet_s", "lraspp_mobilenet_v2"):
        network = build(name)
        with torch.no_grad():
            main = network(smooth_image(128, 128, batch=2)).main
        assert 0.01 < float(main.std()) < 30, name


@pytest.mark.parametrize(("stride", "dilation", "side"), [(1, 1, 12), (2, 1, 12), (2, 1, 13), (1, 2, 12), (1, 2, 13)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_depthwise_convolution_in_bfloat16_equals_pytorch(
    stride: int, dilation: int, side: int, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    own = Depthwise(8, stride, dilation)
    plain = nn.Conv2d(8, 8, 3, stride, dilation, dilation, 8, bias=False)
    plain.load_state_dict(own.state_dict())
    image = torch.randn(2, 8, side, side + 2).bfloat16().contiguous(memory_format=memory_format)
    results = []
    for conv in (own, plain):
        leaf = image.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(leaf)
        assert out.dtype == torch.bfloat16
        (out.float() * torch.arange(out.numel()).view_as(out).remainder(7)).sum().backward()
        results.append((out.float(), leaf.grad, conv.weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
