"""Parameters, multiply-accumulates of one image, and latency without training heads, after warm-up."""

import contextlib
import copy
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from overfly.core.choices import Precision
from overfly.core.device import describe_machine
from overfly.core.errors import OverflyError, RecipeError
from overfly.core.spec import NonNegativeFloat, NonNegativeInt, Pixels, PositiveFloat, PositiveInt, Spec
from overfly.evaluation.score import evaluation_mode
from overfly.models.network import Network

METHOD = (
    "wall clock of each forward pass after warm-up, images on the device, which is synchronized before and after; "
    "without transfers and decoding"
)
MEMORY = {
    "cuda": "tensors on the GPU at the peak of the passes, weights included (torch.cuda.max_memory_allocated)",
    "cpu": "resident memory of the whole process at its peak, interpreter and libraries included",
}
DTYPES: dict[Precision, torch.dtype] = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
RECENT = 120
"""Frames of the recent statistics of a stream."""
RATIO = 1.01
"""Ratio of the bounds of a latency histogram's bins."""
SHORTEST = 1e-5
"""Shortest latency of the histogram, in seconds."""


class Timing(Spec):
    """Forward passes of one batch size; milliseconds are those of the whole batch."""

    batch: PositiveInt
    """Images in one forward pass."""
    mean_ms: NonNegativeFloat
    """Mean time of a forward pass."""
    std_ms: NonNegativeFloat
    """Standard deviation of it."""
    p50_ms: NonNegativeFloat
    """Median."""
    p95_ms: NonNegativeFloat
    """95th percentile."""
    p99_ms: NonNegativeFloat
    """99th percentile."""
    images_per_second: PositiveFloat
    """Batch over mean time."""
    peak_memory_mb: NonNegativeFloat | None
    """Peak memory during the passes, in 10⁶ bytes; see ``memory``. None if unknown."""


class Speed(Spec):
    """Size and speed of a network on one machine."""

    parameters: NonNegativeInt
    """Weights and biases, without the heads that only training uses."""
    macs: NonNegativeInt
    """Multiply-accumulates of one image, in convolutions and matrix products; about half the FLOPs."""
    macs_of_batch: dict[int, int] = Field(default_factory=dict)
    """Multiply-accumulates of whole batches, by batch size, if requested."""
    bands: PositiveInt
    """Bands of the image."""
    size: tuple[Pixels, Pixels]
    """Height and width of the image in pixels."""
    timings: tuple[Timing, ...]
    """One entry per batch size."""
    warmup: NonNegativeInt
    """Untimed passes per batch size."""
    repeats: PositiveInt
    """Timed passes per batch size."""
    precision: Precision
    """32, or mixed with bf16 or 16."""
    training_heads: bool
    """True if training heads ran, in networks that cannot drop them."""
    machine: dict[str, Any]
    """Device, threads and versions."""
    memory: str
    """Description of the peak memory."""
    method: str
    """Description of the time measurement."""

    @property
    def latency(self) -> Timing:
        """The timing of the smallest batch."""
        return min(self.timings, key=lambda timing: timing.batch)


def measure_speed(
    network: nn.Module, *, size: int | tuple[int, int] = 512, batches: Sequence[int] = (1,), bands: int = 3,
    device: torch.device | str = "cpu", warmup: int = 10, repeats: int = 50, threads: int | None = None,
    precision: Precision = "32", macs_of_batch: Sequence[int] = (),
) -> Speed:  # fmt: skip
    """Measure size and speed of a copy of a network that takes (B, C, H, W) floats, without its training heads.

    The side of the image is in pixels, or (height, width). ``warmup`` untimed and ``repeats`` timed passes are taken
    for each batch size, on ``threads`` CPU threads (None: unchanged), in 32 bits or mixed with bf16 or 16.
    Multiply-accumulates of whole batches are counted for the sizes ``macs_of_batch``. Raises `RecipeError`: batch size,
    repeats or threads below 1, and `OverflyError`: a batch does not fit into the device's memory.
    """
    if not batches or min((*batches, *macs_of_batch, repeats, 1 if threads is None else threads)) < 1:
        raise RecipeError("batch sizes, repeats and threads are 1 or more; correct the ones given")
    shape = (size, size) if isinstance(size, int) else size
    device = torch.device(device)
    network = without_training_heads(network).to(device)
    with limited_threads(threads), evaluation_mode(network), torch.no_grad():
        cudnn = torch.backends.cudnn  # settings that change the speed of convolutions
        settings = {"tf32": cudnn.allow_tf32, "cudnn_benchmark": cudnn.benchmark} if device.type == "cuda" else {}
        machine = describe_machine(device) | settings
        cast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "32")
        image = _images(1, bands, shape, device)
        with torch.inference_mode(), cast:
            timings = tuple(
                _time(network, _images(batch, bands, shape, device), warmup, repeats) for batch in sorted(set(batches))
            )
        output = network(image)
        return Speed(
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            macs=count_macs(network, image),
            macs_of_batch={batch: count_macs(network, _images(batch, bands, shape, device)) for batch in macs_of_batch},
            bands=bands, size=shape, timings=timings, warmup=warmup, repeats=repeats, precision=precision,
            training_heads=bool(getattr(output, "aux", ())) or getattr(output, "boundary", None) is not None,
            machine=machine, memory=MEMORY["cuda" if device.type == "cuda" else "cpu"], method=METHOD,
        )  # fmt: skip


class Latency(Spec):
    """Times of one image on one runtime."""

    median_ms: NonNegativeFloat
    """Median over the rounds."""
    min_ms: NonNegativeFloat
    """Shortest over the rounds."""
    cpu_ms: NonNegativeFloat
    """Median CPU time of all threads of this process."""
    rounds: PositiveInt
    """Images timed."""


def compare_latency(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int = 10, seconds: float | None = None
) -> dict[str, Latency]:
    """Time several runtimes in alternation, so that other load of the machine affects all equally.

    Each function is called ``rounds`` times, after two untimed ones; after ``seconds``, no further round starts, except
    up to the third. None: no limit.
    """
    for _ in range(2):
        for run in runs.values():
            run()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    start = time.perf_counter()
    for index in range(rounds):
        if seconds is not None and index >= 3 and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            cpu = time.process_time() - cpu
            times[name].append((1e3 * (time.perf_counter() - wall), 1e3 * cpu))
    medians = {name: np.median(values, axis=0).tolist() for name, values in times.items()}
    return {
        name: Latency(median_ms=medians[name][0], min_ms=min(values)[0], cpu_ms=medians[name][1], rounds=len(values))
        for name, values in times.items()
    }


def without_training_heads(network: nn.Module) -> nn.Module:
    """Copy a network without the heads that only training uses."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, Network):
            module.drop_training_heads()
    return network


def count_macs(network: nn.Module, image: Tensor) -> int:
    """Count the multiply-accumulates of a pass of a batch (B, C, H, W) in convolutions and matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return int(counter.get_total_flops()) // 2


def _time(network: nn.Module, images: Tensor, warmup: int, repeats: int) -> Timing:
    device, seconds = images.device, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux: the peak of this process starts again from what it holds now
            Path("/proc/self/clear_refs").write_text("5")
    try:
        for index in range(warmup + repeats):
            _synchronize(device)
            start = time.perf_counter()
            network(images)
            _synchronize(device)
            if index >= warmup:
                seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        raise OverflyError(
            f"a batch of {len(images)} does not fit the memory of {device}; measure smaller batches or a smaller size"
        ) from None
    times = np.asarray(seconds) * 1e3
    p50, p95, p99 = (float(value) for value in np.percentile(times, (50, 95, 99)))
    peak = _peak(device)
    return Timing(
        batch=len(images), mean_ms=float(times.mean()), std_ms=float(times.std()), p50_ms=p50, p95_ms=p95, p99_ms=p99,
        images_per_second=len(images) * 1e3 / float(times.mean()), peak_memory_mb=None if peak is None else peak / 1e6,
    )  # fmt: skip


def _images(batch: int, bands: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(batch, bands, *shape, generator=generator) * 255).to(device)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def limited_threads(number: int | None) -> Iterator[None]:
    """Use a number of CPU threads in the block; None: unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _peak(device: torch.device) -> int | None:
    """Return the peak memory in bytes; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


Summary = tuple[float | None, float | None, float | None]
"""Overlays per second, and median and 95th percentile of the latencies in seconds; None before the first frame."""


class Latencies:
    """Latencies and frame rate of a stream, in constant memory.

    The last `RECENT` frames are exact. Over all frames a histogram with bins of 1 % is kept, so that percentiles are
    exact to half a percent.
    """

    def __init__(self) -> None:
        self.count = 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._bins: Counter[int] = Counter()
        self._first_began = self._last_ready = 0.0

    def add(self, began: float, ready: float) -> None:
        """Count a frame that was decoded at ``began`` and whose overlay was ready at ``ready``, in seconds."""
        latency = max(ready - began, SHORTEST)
        if not self.count:
            self._first_began = began
        self._recent.append((latency, ready))
        self._bins[int(math.log(latency / SHORTEST) / math.log(RATIO))] += 1
        self._last_ready = ready
        self.count += 1

    def recent(self) -> Summary:
        """Rate and latencies of the last frames; the rate is None before the second."""
        if not self._recent:
            return None, None, None
        seconds, count = self._recent[-1][1] - self._recent[0][1], len(self._recent) - 1
        values = [latency for latency, _ in self._recent]
        median, high = np.quantile(values, (0.5, 0.95), method="inverted_cdf").tolist()
        return count / seconds if seconds > 0 else None, median, high

    def overall(self) -> Summary:
        """Rate from the first frame decoded to the last overlay ready, and latencies, of all frames."""
        bins = sorted(self._bins)
        counts = np.cumsum([self._bins[index] for index in bins])
        places = [np.searchsorted(counts, math.ceil(share * self.count)) for share in (0.5, 0.95)] if bins else []
        median, high = [SHORTEST * RATIO ** (bins[at] + 0.5) for at in places] or (None, None)
        seconds = self._last_ready - self._first_began
        return self.count / seconds if seconds > 0 else None, median, high
