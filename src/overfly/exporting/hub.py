"""A model hub: exported files pushed to a repository with their card as its page, and loaded from one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from overfly.core.atomic_files import temporary_path
from overfly.core.errors import DownloadError, MissingExtraError, WeightsError
from overfly.exporting import shelf
from overfly.models.checkpoints import first_line

PAGE = "README.md"
"""What a hub shows as a repository's page."""
FOLDER = "file://"
"""Begins the address of a folder that is laid out like a hub's repository."""
FRONT = f"""{shelf.OWN_PAGE}pipeline_tag: image-segmentation
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
        WeightsError: there is no such export, or it is not the one of the figures beside it.
        DownloadError: the hub refuses, or files of somebody else are in the way in the folder.
        MissingExtraError: huggingface_hub is not installed.
    """
    if export.suffix not in shelf.OPENED or not export.is_file():
        raise WeightsError(f"{export} is no exported file; give the .onnx, .xml or .pt2 that `overfly export` wrote")
    shelf.check_export(export)
    parts = shelf.parts(export)
    page = export.with_suffix(".md")
    text = FRONT + (page.read_text(encoding="utf-8") if page.is_file() else f"# {export.stem}\n")
    names = [part.name for part in parts] + [PAGE]
    if repository.startswith(FOLDER):
        folder = _folder(repository)
        copied: dict[Path, Path | str] = {folder / part.name: part for part in reversed(parts)}
        shelf.put({folder / PAGE: text, **copied}, folder)
        return names, str(folder)
    api = _package().HfApi(endpoint=endpoint)
    operation = _package().CommitOperationAdd
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        operations = [operation(path_in_repo=part.name, path_or_fileobj=str(part)) for part in parts]
        operations.append(operation(path_in_repo=PAGE, path_or_fileobj=text.encode()))
        api.create_commit(repository, operations, commit_message=f"{export.name} from overfly")
    except Exception as error:  # the client raises its own kinds and those of its transport
        raise DownloadError(
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
        The files that came: those that are opened, then those beside them. A repository's page comes as the card of
        its export.

    Raises:
        DownloadError: there is no such repository, or it holds no export, or files of somebody else are in the way.
        WeightsError: an export is not the one of the figures beside it.
        MissingExtraError: huggingface_hub is not installed.
    """
    if repository.startswith(FOLDER):
        folder = _folder(repository)
        if folder.resolve() == out.resolve():
            raise DownloadError(f"{folder} is the repository itself; give another folder as --out")
        return _take(folder, out, str(folder))
    patterns = [f"*{suffix}" for suffix in (*shelf.OPENED, ".bin", ".json", ".md")]
    package = _package()
    with contextlib.ExitStack() as held:
        with shelf.writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            work = held.enter_context(temporary_path(out, folder=True))
        try:
            package.snapshot_download(
                repository, revision=revision, local_dir=work, allow_patterns=patterns, endpoint=endpoint
            )
        except Exception as error:  # as above
            if isinstance(error, OSError) and error.errno in shelf.FULL:
                with shelf.writing(out):
                    raise
            raise DownloadError(
                f"{repository} cannot be loaded from the hub ({first_line(error)}); check the name, and log in with "
                "`hf auth login` where it is private"
            ) from error
        return _take(work, out, repository)


def _folder(repository: str) -> Path:
    """The folder that an address names."""
    named = repository.removeprefix(FOLDER)
    if not named:
        raise DownloadError(f"{repository} names no folder; write it as {FOLDER}/some/folder")
    return Path(named)


def _take(folder: Path, out: Path, title: str) -> list[Path]:
    """Copy the exports of a folder, and what belongs to them, to another; the files there."""
    found = shelf.exports(folder)
    if not found:
        raise DownloadError(
            f"{title} holds no exported file (.onnx, .pt2, .xml with its .bin); give another one that does"
        )
    beside: dict[Path, Path | str] = {}
    for export in found:
        shelf.check_export(export)
        more = [*shelf.parts(export)[1:], *([card] if (card := export.with_suffix(".md")).is_file() else [])]
        beside |= {out / part.name: part for part in more}
    page = folder / PAGE
    target = shelf.page_target(page, found, out) if page.is_file() else None
    if target is not None:
        text = page.read_text(encoding="utf-8", errors="replace")
        beside[target] = text.removeprefix(FRONT) if target.name != PAGE else page
    opened: dict[Path, Path | str] = {out / export.name: export for export in found}
    shelf.put({**beside, **opened}, out)
    return [*opened, *beside]


def _package() -> Any:
    try:
        import huggingface_hub as package
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub", "a model hub") from None
    return package


__all__ = ["load", "push"]
