"""Load public checkpoints into a network, and report which tensors matched."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from overfly.core.errors import WeightsError, render_text
from overfly.models.checkpoints import check_digest, check_values, locate, read_tensors, strip_prefixes
from overfly.models.network import Network
from overfly.models.segmenter import Segmenter

Shape = tuple[int, ...]
REPORT = Path(__file__).with_name("load_report.txt.jinja")


@dataclass(frozen=True)
class LoadReport:
    """Result of `load_weights`; ``str`` gives a summary.

    Attributes:
        loaded: names of the network's tensors that now hold the file's values.
        missing, unexpected: names of tensors that only the network has, and that only the file has.
        mismatched: (name, shape in the file, shape in the network) of tensors of different shapes.
        notes: sentences about conversions and about the file.
    """

    source: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        missing, unexpected = (_some(_groups(names, self.loaded)) for names in (self.missing, self.unexpected))
        shapes = [
            f"{name} ({_shape(file)} in the file, {_shape(own)} in the network)" for name, file, own in self.mismatched
        ]
        return render_text(
            REPORT, report=self, missing=missing, unexpected=unexpected, mismatched=_some(shapes)
        ).strip()


def load_weights(network: nn.Module, path: Path | str, *, sha256: str | None = None) -> LoadReport:
    """Load the tensors of a checkpoint whose names and shapes match the network's, and return which.

    Names of known checkpoints are translated: PIDNet's release (ImageNet and Cityscapes), torchvision's ResNet-101 and
    MobileNetV2, DeepLab of the AdaptSegNet family, and files of overfly. Where the file's first convolution has another
    number of bands, each band gets the mean over the file's bands, scaled by their number over the network's, so that
    the output for a gray image does not change. Of a `Segmenter`, normalization and classes do not change. ``path`` is
    as in `locate`; ``sha256`` is that of the file, in full or its first 8 or more hex digits.

    Raises:
        WeightsError: the file is missing, damaged, would run code, has another digest, holds values that are not finite
            real numbers, or matches less than half of the network without its heads. The network is then unchanged.
        DownloadError: the download of a named file fails.
    """
    if isinstance(network, Segmenter):
        network = network.network
    file = locate(path)
    if sha256 is not None:
        check_digest(file, sha256)
    return load_tensors(
        network, file, strip_prefixes(read_tensors(file), tuple(name for name, _ in network.named_children()))
    )


def load_tensors(network: nn.Module, file: Path, state: dict[str, Tensor]) -> LoadReport:
    """Load tensors by name as `load_weights` does; ``file`` is where they come from, for the report."""
    notes: tuple[str, ...] = ()
    if isinstance(network, Network):
        state, notes = network.convert_checkpoint(state)
    own = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    check_values(file, {name: tensor for name, tensor in state.items() if name in own})
    if isinstance(network, Network):
        state, bands = _fit_bands(network, state)
        notes += bands
    fitting = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    report = LoadReport(
        source=file,
        loaded=_weights(fitting),
        missing=_weights(name for name in own if name not in state),
        unexpected=_weights(name for name in state if name not in own),
        mismatched=tuple(
            (name, tuple(tensor.shape), tuple(own[name].shape))
            for name, tensor in state.items()
            if name in own and name not in fitting
        ),
        notes=notes,
    )
    _check_share(network, own, fitting, report)
    with torch.no_grad():
        network.load_state_dict(fitting, strict=False)
    return report


def _weights(names: Iterable[str]) -> tuple[str, ...]:
    """Names of weights, without counters such as those of batch normalization."""
    return tuple(name for name in names if not name.endswith(("num_batches_tracked", "_extra_state")))


def _fit_bands(network: Network, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Convert the first convolution to the network's number of bands."""
    name = f"{network.first_conv}.weight"
    own, file = network.state_dict().get(name), state.get(name)
    if own is None or file is None or file.ndim != 4 or file.shape[1] in (0, own.shape[1]):
        return state, ()
    before, now = file.shape[1], own.shape[1]
    if file[:, 0].shape != own[:, 0].shape:
        return state, ()
    adapted = (file.float().mean(1, keepdim=True) * (before / now)).expand(-1, now, -1, -1)
    note = f"{name} converted from {before} bands to {now}: their mean times {before}/{now}"
    return {**state, name: adapted}, (note,)


def _check_share(network: nn.Module, own: dict[str, Tensor], fitting: dict[str, Tensor], report: LoadReport) -> None:
    """Check that a file holds at least half of the network's weights without its heads."""
    heads = tuple(f"{prefix}." for prefix in network.heads) if isinstance(network, Network) else ()
    body = [name for name in _weights(own) if not name.startswith(heads)]
    total = sum(own[name].numel() for name in body)
    share = sum(own[name].numel() for name in body if name in fitting) / max(total, 1)
    if share < 0.5:
        names = _some(_groups([*report.unexpected, *(name for name, *_ in report.mismatched)], ()))
        raise WeightsError(
            f"{report.source} matches {share:.0%} of {type(network).__name__} without its heads (tensors that do not "
            f"match: {names}); choose another network or another file"
        )


def _groups(names: Iterable[str], loaded: Iterable[str]) -> list[str]:
    """Names cut to the shortest prefix that no loaded tensor has, each once."""
    taken = {name.rsplit(".", depth)[0] for name in loaded for depth in range(name.count(".") + 1)}
    groups: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        groups[next((prefix for prefix in prefixes if prefix not in taken), name)] = None
    return list(groups)


def _some(words: list[str], most: int = 8) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _shape(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "scalar"
