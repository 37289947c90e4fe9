"""Load public checkpoints into a network, and say what fitted and what did not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from overfly.core.errors import WeightsError
from overfly.models.checkpoints import NAMED, check_digest, check_values, locate, read_tensors, strip_prefixes
from overfly.models.network import Network
from overfly.models.segmenter import Segmenter

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What `load_weights` did; printed, it is a few sentences.

    Attributes:
        source: the file that was read.
        loaded: names of the network's tensors that now hold the file's values.
        missing: names of the network's tensors that the file does not have.
        unexpected: names of the file's tensors that the network does not have.
        mismatched: (name, shape in the file, shape in the network) of tensors that could not be taken.
        notes: sentences on what was changed on the way, or should be known about the file.
    """

    source: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        said = [f"{self.source.name}: {len(self.loaded)} of the network's {total} tensors loaded."]
        if self.mismatched:
            shapes = [f"{name} ({_shape(file)} in the file, {_shape(own)} here)" for name, file, own in self.mismatched]
            said.append(f"Left at random for their shape: {_some(shapes)}.")
        if self.missing:
            said.append(f"Left at random, as the file has none: {_some(_groups(self.missing, self.loaded))}.")
        if self.unexpected:
            said.append(f"In the file but not used: {_some(_groups(self.unexpected, self.loaded))}.")
        said += [f"{note[0].upper()}{note[1:]}." for note in self.notes]
        return " ".join(said)


def load_weights(network: nn.Module, path: Path | str, *, sha256: str | None = None) -> Report:
    """Give a network the weights of a checkpoint, as far as names and shapes agree.

    Known spellings are translated: PIDNet's release (ImageNet and Cityscapes), torchvision's ResNet-101 and
    MobileNetV2, DeepLab of the AdaptSegNet family, and files of overfly. Where the file's first convolution reads
    another number of bands, every band gets the mean over the file's bands, scaled by their number over the network's,
    so that a gray picture answers as before.

    Args:
        network: a network, or the `Segmenter` around one, which keeps its own normalization and classes.
        path: a .safetensors, .pth or .pt file; or ``package:NAME/inner/file.pth``, a file inside an installed Python
            package; or a name out of `NAMED`.
        sha256: what the file's SHA-256 must be, in full or its first 8 or more hex digits.

    Returns:
        What was loaded and what was not.

    Raises:
        WeightsError: the file is missing, damaged, would run code, has another digest, holds values for the network
            that are NaN, infinite or no real numbers, or fits less than half of the network apart from its heads. The
            network is then as it was.
        DownloadError: a named file cannot be fetched.
    """
    if isinstance(network, Segmenter):
        network = network.network
    file = locate(path)
    if sha256 is not None:
        check_digest(file, sha256)
    state = strip_prefixes(read_tensors(file), tuple(name for name, _ in network.named_children()))
    notes: tuple[str, ...] = ()
    if isinstance(network, Network):
        state, notes = network.adopt(state)
    own = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    check_values(file, {name: tensor for name, tensor in state.items() if name in own})
    if isinstance(network, Network):
        state, said = _fit_bands(network, state)
        notes += said
    fitting = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    report = Report(
        source=file,
        loaded=_counted(fitting),
        missing=_counted(own.keys() - state.keys(), order=own),
        unexpected=_counted(state.keys() - own.keys(), order=state),
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


def _counted(names: Iterable[str], order: Iterable[str] | None = None) -> tuple[str, ...]:
    """Names that are weights, in the order of the second argument; BatchNorm's counters are bookkeeping."""
    held = set(names)
    bookkeeping = ("num_batches_tracked", "_extra_state")
    return tuple(
        name for name in (names if order is None else order) if name in held and not name.endswith(bookkeeping)
    )


def _fit_bands(network: Network, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Adapt the convolution that reads the image to the network's number of bands."""
    name = f"{network.first}.weight"
    mine = network.state_dict().get(name)
    theirs = state.get(name)
    if mine is None or theirs is None or theirs.ndim != 4 or mine.shape[1] == theirs.shape[1]:
        return state, ()
    before, now = theirs.shape[1], mine.shape[1]
    if before == 0 or theirs[:, 0].shape != mine[:, 0].shape:
        return state, ()
    adapted = (theirs.float().mean(1, keepdim=True) * (before / now)).expand(-1, now, -1, -1)
    note = f"{name} read {before} bands and now reads {now}: each has their mean, times {before}/{now}"
    return {**state, name: adapted}, (note,)


def _check_share(network: nn.Module, own: dict[str, Tensor], fitting: dict[str, Tensor], report: Report) -> None:
    """Refuse a file that holds less than half of the network's weights apart from its heads."""
    heads = tuple(f"{prefix}." for prefix in network.heads) if isinstance(network, Network) else ()
    body = [name for name in _counted(own) if not name.startswith(heads)] if heads else list(_counted(own))
    whole = sum(own[name].numel() for name in body)
    share = sum(own[name].numel() for name in body if name in fitting) / max(whole, 1)
    if share < 0.5:
        names = _some(_groups([*report.unexpected, *(name for name, *_ in report.mismatched)], ()))
        raise WeightsError(
            f"{report.source} fits {share:.0%} of {type(network).__name__} apart from its heads, so it was made for "
            f"another network (tensors that do not fit: {names}); choose that network, or another file"
        )


def _groups(names: Iterable[str], loaded: Iterable[str]) -> list[str]:
    """Names cut to the shortest beginning that no loaded tensor shares, each once."""
    taken = {name.rsplit(".", depth)[0] for name in loaded for depth in range(name.count(".") + 1)}
    groups: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        beginnings = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        groups[next((beginning for beginning in beginnings if beginning not in taken), name)] = None
    return list(groups)


def _some(words: list[str], most: int = 8) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _shape(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "one number"


__all__ = ["NAMED", "Report", "load_weights"]
