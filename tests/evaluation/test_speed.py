from __future__ import annotations

import json
import time

import pytest
import torch
from torch import Tensor, nn

from overfly.core.errors import RecipeError
from overfly.core.records import Logits
from overfly.evaluation.speed import Speed, count_macs, measure_speed, without_training_heads
from overfly.models.network import Network


class Tiny(Network):
    """A network with one head that only training reads."""

    training_heads = ("aside",)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.main = nn.Conv2d(8, 5, 1)
        self.aside: nn.Conv2d | None = nn.Conv2d(8, 5, 1)

    def forward(self, image: Tensor) -> Logits:
        features = self.norm(self.body(image))
        return Logits(self.main(features), () if self.aside is None else (self.aside(features),))


class Wrapped(nn.Module):
    """As a segmenter holds its network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Tiny()

    def forward(self, image: Tensor) -> Logits:
        out: Logits = self.network(image)
        return out


MACS = 16 * 24 * (3 * 8 * 9 + 8 * 5)
PARAMETERS = 3 * 8 * 9 + 2 * 8 + (8 * 5 + 5)


@pytest.mark.parametrize("made", [Tiny, Wrapped])
def test_counts_one_image_without_training_heads(made: type[nn.Module]) -> None:
    """Mistake 14: not those of a batch, and not those of training."""
    network = made().train()
    speed = measure_speed(network, size=(16, 24), batches=(2, 1), warmup=1, repeats=3, macs_of_batch=(6,))
    assert speed.macs == MACS
    assert speed.macs_of_batch == {6: 6 * MACS}
    assert speed.parameters == PARAMETERS
    assert not speed.training_heads
    assert network.training
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS + 45
    assert [timing.batch for timing in speed.timings] == [1, 2]
    assert speed.latency.batch == 1


def test_counts_any_module_as_it_stands() -> None:
    network = Tiny()
    assert count_macs(network, torch.zeros(2, 3, 16, 24)) == 2 * (MACS + 16 * 24 * 40)
    assert count_macs(without_training_heads(network), torch.zeros(2, 3, 16, 24)) == 2 * MACS
    plain = nn.Conv2d(2, 4, 3)
    speed = measure_speed(plain, size=10, bands=2, warmup=0, repeats=1)
    assert speed.macs == 8 * 8 * 2 * 4 * 9
    assert speed.size == (10, 10)


class Clock:
    """A clock that only the worker advances."""

    now = 0.0


class Worker(nn.Module):
    """Takes 4 ms, 12 ms every tenth time, and far longer on its first three passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, image: Tensor) -> Tensor:
        self.passes += 1
        Clock.now += 0.5 if self.passes <= 3 else 0.012 if self.passes % 10 == 0 else 0.004
        return image


def test_latency_excludes_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    speed = measure_speed(Worker(), size=8, batches=(4,), warmup=3, repeats=100).latency
    assert speed.p50_ms == pytest.approx(4)
    assert speed.p95_ms == pytest.approx(12)
    assert speed.p99_ms == pytest.approx(12)
    assert speed.mean_ms == pytest.approx(4.8)
    assert speed.std_ms == pytest.approx(2.4)
    assert speed.images_per_second == pytest.approx(4 / 0.0048)
    assert speed.peak_memory_mb is not None
    assert 10 < speed.peak_memory_mb < 1e5


def test_speed_records_machine_and_method() -> None:
    before = torch.get_num_threads()
    speed = measure_speed(Tiny(), size=8, warmup=2, repeats=2, threads=before + 1, precision="bf16")
    assert torch.get_num_threads() == before
    assert speed.machine["threads"] == before + 1
    assert speed.machine["torch"] == torch.__version__
    assert speed.machine["device"]
    assert (speed.warmup, speed.repeats, speed.precision) == (2, 2, "bf16")
    assert "synchronized" in speed.method
    assert Speed.model_validate(json.loads(json.dumps(speed.model_dump(mode="json"), allow_nan=False))) == speed


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}, {"repeats": 0}, {"threads": 0}])
def test_invalid_arguments_raise(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="1"):
        measure_speed(Tiny(), size=8, **wrong)  # type: ignore[arg-type]
