"""Programs of torch.export as files: written with metadata, and read without running anything that a file brings."""

from __future__ import annotations

import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from overfly.core.errors import WeightsError
from overfly.models.checkpoints import first_line

KNOWN = re.compile(
    r"[^/]+/(archive_format|archive_version|version|byteorder|\.data/(serialization_id|version)|\.format_version"
    r"|\.storage_alignment|models/\w+\.json|data/(weights|constants)/\w+\.json|data/weights/weight_\d+"
    r"|data/constants/tensor_\d+|data/sample_inputs/\w+\.pt|extra/\w+)"
)
"""The parts of an archive whose reading runs nothing; others, such as pickled objects, are refused."""


def write_program(program: Any, path: Path, properties: Mapping[str, str]) -> None:
    """Write a program of torch.export with metadata beside it."""
    program._example_inputs = None  # an image of noise, as large as all the weights
    archive = io.BytesIO()  # PyTorch's own writer ends the process on a full disk
    with _quiet():
        torch.export.save(program, archive, extra_files=dict(properties))
    path.write_bytes(archive.getbuffer())


def read_program(path: Path) -> tuple[Any, dict[str, str]]:
    """A program of torch.export and its metadata.

    ``torch.export.load`` unpickles what an archive marks as pickled; archives with such parts are refused before.

    Raises:
        WeightsError: the file is damaged, is none of ours, or holds what would run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            harmful = next(_harmful(archive), None)
            broken = archive.testzip()
    except Exception as error:  # zlib's, struct's and zipfile's own, by where the damage is
        raise WeightsError(f"{path} is damaged or no .pt2 file ({first_line(error)}); export it again") from error
    if broken is not None:
        raise WeightsError(f"{path} is damaged: its part {broken!r} does not match its checksum; export it again")
    if harmful is not None:
        raise WeightsError(
            f"{path} holds more than a graph and tensors ({harmful}) and loading it could run code from the file, so "
            "it was refused; export it again with `overfly export`"
        )
    properties = dict.fromkeys(("overfly", "overfly_export"), "")
    try:
        with _quiet():
            program = torch.export.load(path, extra_files=properties)
    except Exception as error:  # the library raises many kinds
        raise WeightsError(f"{path} cannot be opened by torch ({first_line(error)}); export it again") from error
    return program, {key: str(value) for key, value in properties.items() if value}


def _harmful(archive: zipfile.ZipFile) -> Iterator[str]:
    """Parts of an archive that are not known to be harmless."""
    for name in archive.namelist():
        if not KNOWN.fullmatch(name):
            yield name
        elif "/data/" in name and name.endswith(".json"):
            config = json.loads(archive.read(name))
            if any(entry.get("use_pickle") for entry in config.get("config", {}).values()):
                yield f"{name}, which asks for a pickle"
        elif name.endswith(".pt") and archive.getinfo(name).file_size:  # pickled sample inputs; ours has none
            yield name


@contextmanager
def _quiet() -> Iterator[None]:
    """The library warns of its own workings; that is of no use to anybody here."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


__all__ = ["read_program", "write_program"]
