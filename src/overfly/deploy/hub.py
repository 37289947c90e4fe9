"""A model hub: exported files pushed to a repository with their card as its page, and loaded from one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from overfly.core.errors import FetchError, MissingExtraError, WeightsError
from overfly.models.checkpoints import first_line

PAGE = "README.md"
"""What a hub shows as a repository's page."""
OPENED = (".onnx", ".xml", ".pt2")
"""Suffixes of the files that are opened."""
FOLDER = "file://"
"""Begins the address of a folder that is laid out like a hub's repository."""
FRONT = """---
library_name: overfly
pipeline_tag: image-segmentation
tags:
- semantic-segmentation
- remote-sensing
- aerial-imagery
---
"""


def push(export: Path, repository: str, *, private: bool = True, endpoint: str | None = None) -> tuple[list[str], str]:
    """Push an exported file with all that lies beside it.

    Args:
        export: the file that is opened (.onnx, .xml or .pt2).
        repository: OWNER/NAME of a hub, or ``file://`` and a folder.
        private: make a new repository private.
        endpoint: address of another hub than the default.

    Returns:
        Names of the files, and where they are.

    Raises:
        WeightsError: there is no such export.
        FetchError: the hub refuses.
        MissingExtraError: huggingface_hub is not installed.
    """
    if export.suffix not in OPENED or not export.is_file():
        raise WeightsError(f"{export} is no exported file; give the .onnx, .xml or .pt2 that `overfly export` wrote")
    parts = [part for part in (export, *(export.with_suffix(end) for end in (".bin", ".json"))) if part.is_file()]
    page = export.with_suffix(".md")
    text = FRONT + (page.read_text(encoding="utf-8") if page.is_file() else f"# {export.stem}\n")
    names = [part.name for part in parts] + [PAGE]
    if repository.startswith(FOLDER):
        folder = Path(repository.removeprefix(FOLDER))
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            shutil.copyfile(part, folder / part.name)
        (folder / PAGE).write_text(text, encoding="utf-8")
        return names, str(folder)
    api = _package().HfApi(endpoint=endpoint)
    operation = _package().CommitOperationAdd
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        operations = [operation(path_in_repo=part.name, path_or_fileobj=str(part)) for part in parts]
        operations.append(operation(path_in_repo=PAGE, path_or_fileobj=text.encode()))
        api.create_commit(repository, operations, commit_message=f"{export.name} from overfly")
    except Exception as error:  # the client raises its own kinds and those of its transport
        raise FetchError(
            f"the hub did not take {repository} ({first_line(error)}); check the name and log in with `hf auth login`"
        ) from error
    return names, str(address)


def load(repository: str, out: Path, *, revision: str | None = None, endpoint: str | None = None) -> list[Path]:
    """Load exported files from a repository.

    Args:
        repository: OWNER/NAME of a hub, or ``file://`` and a folder.
        out: folder to write to.
        revision: branch, tag or commit; None: the newest.
        endpoint: address of another hub than the default.

    Returns:
        The files that are opened, then those beside them.

    Raises:
        FetchError: there is no such repository, or it holds no export.
        MissingExtraError: huggingface_hub is not installed.
    """
    patterns = [f"*{suffix}" for suffix in (*OPENED, ".bin", ".json", ".md")]
    if repository.startswith(FOLDER):
        folder = Path(repository.removeprefix(FOLDER))
        found = [part for part in sorted(folder.glob("*")) if part.is_file() and any(map(part.match, patterns))]
        if not any(part.suffix in OPENED for part in found):
            raise FetchError(f"{folder} holds no exported file; give the folder of a .onnx, .xml or .pt2 file")
        out.mkdir(parents=True, exist_ok=True)
        for part in found:
            shutil.copyfile(part, out / part.name)
    else:
        try:
            _package().snapshot_download(
                repository, revision=revision, local_dir=out, allow_patterns=patterns, endpoint=endpoint
            )
        except MissingExtraError:
            raise
        except Exception as error:  # as above
            raise FetchError(
                f"{repository} cannot be loaded from the hub ({first_line(error)}); check the name, and log in with "
                "`hf auth login` where it is private"
            ) from error
    files = sorted((part for part in out.iterdir() if part.is_file()), key=lambda part: part.suffix not in OPENED)
    if not files or files[0].suffix not in OPENED:
        raise FetchError(f"{repository} holds no exported file (.onnx, .xml, .pt2); give another repository")
    return files


def _package() -> Any:
    try:
        import huggingface_hub as package
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub", "a model hub") from None
    return package


__all__ = ["load", "push"]
