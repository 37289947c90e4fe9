"""Device selection, and a description of the machine."""

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from overfly.core.errors import RecipeError

SAMENESS = (
    "type", "device", "processor", "instructions", "threads", "torch", "cuda", "kernels", "libraries", "settings",
)  # fmt: skip
"""Keys of `describe_machine` that the bits of trained weights depend on."""
LIBRARIES = ("numpy", "scipy", "pillow", "rasterio", "kornia", "lightning-fabric")
KERNEL_SETTINGS = re.compile("ATEN_|CUBLAS_|CUDNN_|DNNL_|KMP_|MKL_|NVIDIA_TF32|OMP_|ONEDNN_")


def select_device(name: str = "auto", devices: int = 1) -> torch.device:
    """Return the device of a name: auto (the first GPU, or the CPU), cpu, cuda, cuda:1 or mps.

    Raises `RecipeError` if the machine does not have the device, or fewer than ``devices``.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device must be auto, cpu, cuda, cuda:1 or mps, got {name!r}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise RecipeError(f"there is no {device.type} device on this machine; use --device cpu, or leave it out")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if max(devices, (device.index or 0) + 1) > count:
        raise RecipeError(f"this machine has {count} {device.type} device(s); lower --devices or change --device")
    return device


def cpu_name() -> str:
    """Return the model name of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Device, CPU and the instructions that PyTorch uses of it, cores, threads, versions, and kernels' settings."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    kernels = re.findall(
        r"(Math Kernel Library|MKL-DNN|OpenBLAS|CuDNN) (?:Version )?v?([\d.]+\d)", torch.__config__.show()
    )
    return {
        "device": name, "type": device.type, "processor": cpu_name(), "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "system": platform.platform(), "python": platform.python_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "kernels": ", ".join(map(" ".join, kernels)),
        "libraries": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "settings": ", ".join(sorted("=".join(each) for each in os.environ.items() if KERNEL_SETTINGS.match(each[0]))),
    }  # fmt: skip
