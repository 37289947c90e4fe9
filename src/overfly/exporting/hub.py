"""Write model cards, and push exported files to a model hub or load them from it with huggingface_hub."""

import filecmp
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from overfly.core.atomic_files import temporary_path
from overfly.core.download import disk_errors
from overfly.core.errors import DownloadError, OverflyError, WeightsError, import_extra, render_text
from overfly.exporting.exporter import SUFFIXES, ExportReport
from overfly.exporting.runtimes import check_export
from overfly.exporting.torch_program import clean_archive
from overfly.models.checkpoints import first_line

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_huggingface_hub = partial(import_extra, "huggingface_hub", "hub", "a model hub")
CARD_FILE = "README.md"
"""Name of the model card in a repository."""
TAGS = ["semantic-segmentation", "remote-sensing", "aerial-imagery"]


@dataclass(frozen=True)
class CardContent:
    """Content of a model card beside the report of an export.

    Attributes:
        domains: titles of the domains, each with its role in training and its data sheet.
        scores: mIoU and IoU by class, by domain and split, by seed, of this run and of those that differ in the seed.
        selection: the choice among the candidates (`Selection`); None if the run was not adapted.
        recipe: the recipe as YAML.
    """

    title: str
    method: str
    domains: Sequence[tuple[str, str]]
    scores: Mapping[str, Mapping[int, Mapping[str, float | None]]] = field(default_factory=dict)
    selection: Any = None
    recipe: str = ""


def model_card(report: ExportReport, content: CardContent) -> str:
    """Return the model card of an export as Markdown (Mitchell et al., 2019)."""
    return render_text(TEMPLATE, report=report, content=content, mean=_format_mean)


def _format_mean(values: Sequence[float | None]) -> str:
    percent = [100 * value for value in values if value is not None]
    if len(percent) < 2:
        return f"{percent[0]:.1f}" if percent else "–"
    return f"{statistics.fmean(percent):.1f} ± {statistics.stdev(percent):.1f} ({len(percent)})"


def push(export: Path, repository: str, *, private: bool = True, endpoint: str | None = None) -> tuple[list[str], str]:
    """Push an exported file, its weights, report and model card to a model hub, in one commit.

    The arguments are those of `overfly hub push`. Returns the names of the files, and the address of the repository.
    Raises `WeightsError`: the export is missing, or does not match its .json, and `DownloadError`: the hub refuses
    the upload.
    """
    if export.suffix not in SUFFIXES.values() or not export.is_file():
        raise WeightsError(f"{export} is not an exported file; give a .onnx, .xml or .pt2 that `overfly export` wrote")
    check_export(export)
    package = _huggingface_hub()
    card = export.with_suffix(".md")
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {export.stem}\n"
    data = package.ModelCardData(library_name="overfly", pipeline_tag="image-segmentation", tags=TAGS)
    with tempfile.TemporaryDirectory() as folder:
        package.ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(Path(folder) / CARD_FILE)
        for part in (export, export.with_suffix(".bin"), export.with_suffix(".json")):
            if part.is_file():
                (Path(folder) / part.name).symlink_to(part.resolve())
        names = sorted(part.name for part in Path(folder).iterdir())
        try:
            api = package.HfApi(endpoint=endpoint)
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"{export.name} from overfly", ignore_patterns=[]
            )
        except Exception as error:  # the client has no common error class
            raise DownloadError(
                f"the hub refused {repository} ({first_line(error)}); check the name, and log in with `hf auth login`"
            ) from error
    return names, str(address)


def load(repository: str, out: Path, *, revision: str | None = None, endpoint: str | None = None) -> list[Path]:
    """Load the exported files of a repository; its page is written as the model card of the export.

    The arguments are those of `overfly hub load`. Returns the files, main files first. Raises `DownloadError`: there is
    no such repository, it holds no export, or another file of the same name exists, and `WeightsError`: an export does
    not match its .json, or could run code.
    """
    package = _huggingface_hub()
    patterns = [f"*{suffix}" for suffix in (*SUFFIXES.values(), ".bin", ".json", ".md")]
    with disk_errors(out, OverflyError):
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_path(out, folder=True) as folder:
            try:
                package.snapshot_download(
                    repository, revision=revision, local_dir=folder, allow_patterns=patterns, endpoint=endpoint
                )
            except Exception as error:  # as in `push`
                raise DownloadError(
                    f"{repository} cannot be loaded from the hub ({first_line(error)}); check the name, and log in "
                    "with `hf auth login` if it is private"
                ) from error
            return _move_exports(folder, out, repository)


def _move_exports(folder: Path, out: Path, repository: str) -> list[Path]:
    """Check the exports of a folder, and move them to another with their weights, reports and cards."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES.values()]
    exports = [file for file in files if file.suffix != ".xml" or file.with_suffix(".bin").is_file()]
    if not exports:
        raise DownloadError(f"{repository} holds no exported file (.onnx, .pt2, .xml with its .bin)")
    for export in exports:
        check_export(export)
        if export.suffix == ".pt2":
            clean_archive(export)
    page = folder / CARD_FILE
    if page.is_file() and len(exports) == 1:
        package = _huggingface_hub()
        exports[0].with_suffix(".md").write_text(package.ModelCard.load(page).text, encoding="utf-8")
    beside = [export.with_suffix(suffix) for export in exports for suffix in (".bin", ".json", ".md")]
    parts = [*exports, *(part for part in beside if part.is_file())]
    for part in parts:
        target = out / part.name
        if target.exists() and not filecmp.cmp(part, target, shallow=False):
            raise DownloadError(f"{target} exists and differs; delete it, or choose another folder as --out")
    out.mkdir(exist_ok=True)
    for part in reversed(parts):
        part.replace(out / part.name)
    return [out / part.name for part in parts]
