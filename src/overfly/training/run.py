"""The folder of a run: its recipe, machine, log, checkpoints and scores. Files are read on first use."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from pydantic import ConfigDict, ValidationError

from overfly.core.atomic_files import atomic_write, has_digest, read_json, write_json, write_text
from overfly.core.errors import RecipeError, RunError, import_extra
from overfly.core.progress import print_status
from overfly.core.settings import read_mapping, validation_message
from overfly.core.spec import NonNegativeInt, Spec
from overfly.models.checkpoints import weights_sha256
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe

FORMAT = 2
"""Version of the folder's layout, ``format`` in ``machine.json``."""


class LabelCount(Spec):
    """How often labels were read, and how many."""

    times: NonNegativeInt
    """Times that they were read."""
    images: NonNegativeInt
    """Labels that were read, each counted every time."""


class StoredScores(Spec):
    """The parts of ``scores.json``; the others are ``role/split`` with the scores, which may be of another format."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]]

    labels_opened: dict[str, LabelCount] | None = None
    """By role and split."""
    checkpoints: dict[str, dict[str, dict[str, Any]]] | None = None
    """Scores of validation steps, by ``step-N``, then by role and split."""


class RunLog:
    """``log.jsonl``: one JSON object per line, each with its step.

    TensorBoard curves of the same values are written to the folder ``tensorboard``; raises `MissingExtraError` without
    its extra.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self.path = path
        self.writer: Any = None
        if tensorboard is not None:
            import_extra("tensorboard", "tensorboard", "--tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(tensorboard))

    def write(self, step: int, **values: Any) -> None:
        """Append a line: the number of finished optimizer steps, and values."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(name, float(value), step)
            self.writer.flush()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all lines, oldest first; an incomplete last line of a killed process is skipped."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row

    def rewind(self, step: int) -> None:
        """Remove the lines after a step; a resumed run writes them again."""
        lines = [json.dumps(row) for row in self.rows() if row["step"] <= step]
        write_text(self.path, "".join(line + "\n" for line in lines))


class Run:
    """The folder ``path``, which holds a recipe and the results of training it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open a run folder; raise `RunError` if it is missing, not a run, or of another format."""
        path = Path(path)
        if not path.exists():
            raise RunError(f"{path} does not exist; give the folder of a run, such as one below runs/")
        if not (path / "recipe.yaml").is_file():
            raise RunError(f"{path} is not a run, it has no recipe.yaml; give the folder that `overfly train` printed")
        run = cls(path)
        number = run.machine.get("format")
        if isinstance(number, int) and number > FORMAT:
            raise RunError(f"{path} was written by a newer version of overfly (format {number}); update overfly")
        if number != FORMAT:
            raise RunError(f"{path} was written by an older version of overfly; train it again")
        return run

    @classmethod
    def open_or_create(
        cls, out: Path | str, recipe: Recipe, start_sha256: str | None = None, files_sha256: str | None = None
    ) -> Self:
        """Return the run of a recipe in or below ``out``, finished or not, or create it.

        ``start_sha256`` is the SHA-256 of the weights file that the recipe's ``start`` resolves to, ``files_sha256``
        that of `training_files_sha256`. Raises `RunError`: ``out`` is the run of another recipe, of other initial
        weights, images or masks, or cannot be written.
        """
        out = Path(out)
        if (out / "recipe.yaml").is_file():
            run = cls.open(out)
            if run.recipe != recipe:
                raise RunError(f"{out} holds the run of another recipe, which is not overwritten; change --out")
            if not run.fits(start_sha256, files_sha256):
                raise RunError(f"{out} was trained from other initial weights, images or masks than now; change --out")
            return run
        for run in cls.find_all(out, recipe):
            if run.fits(start_sha256, files_sha256):
                return run
        path = None
        try:
            domains = "-".join(domain.title.lower() for domain in (recipe.source, recipe.target) if domain)
            path = new_folder(out, f"{domains[:80]}_{recipe.model.name}_{recipe.method.name}_{recipe.seed}")
            run = cls(path)
            inputs = {"start_sha256": start_sha256, "files_sha256": files_sha256}
            run.write_json("machine.json", {"format": FORMAT, **inputs})
            with atomic_write(path / "recipe.yaml") as part:
                recipe.save(part)
        except OSError as error:
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
            raise RunError(f"{out} cannot be written ({error.strerror}); change --out") from None
        return run

    def fits(self, start_sha256: object, files_sha256: str | None) -> bool:
        """Whether the run has these initial weights, and these images and masks if both are known."""
        same = files_sha256 is None or self.machine.get("files_sha256") in (None, files_sha256)
        return same and self.machine.get("start_sha256") == start_sha256

    @classmethod
    def find(cls, out: Path | str, recipe: Recipe) -> Self | None:
        """Return the newest run of this recipe below ``out``, or None."""
        return next(cls.find_all(out, recipe), None)

    @classmethod
    def find_all(cls, out: Path | str, recipe: Recipe) -> Iterator[Self]:
        """Yield the runs of this recipe below ``out``, newest first; their initial weights may differ."""
        for file in sorted(Path(out).glob("*/recipe.yaml"), reverse=True):
            with contextlib.suppress(RunError):
                run = cls.open(file.parent)
                if run.recipe == recipe:
                    yield run

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, every setting resolved; raises `RunError` if recipe.yaml is not a valid recipe."""
        file = self.path / "recipe.yaml"
        try:
            return Recipe.model_validate(read_mapping(file))
        except ValidationError as error:
            raise RunError(validation_message(error, str(file), Recipe)) from None
        except RecipeError as error:
            raise RunError(str(error)) from None

    @property
    def checkpoint(self) -> Path:
        """The file that training resumes from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def previous_checkpoint(self) -> Path:
        """The checkpoint before it."""
        return self.path / "checkpoints" / "previous.ckpt"

    def whole_checkpoint(self) -> Path | None:
        """The newest checkpoint that is not damaged; None without any; raise `RunError` if all are damaged."""
        files = [file for file in (self.checkpoint, self.previous_checkpoint) if file.is_file()]
        whole = next((file for file in files if has_digest(file)), None)
        if files and whole is None:
            raise RunError(
                f"{files[0]} is unreadable, damaged or of another version of overfly; delete {files[0].parent}"
            )
        if whole != next(iter(files), None):
            print_status(f"{self.checkpoint} is unreadable or damaged; resuming from the checkpoint before it")
        return whole

    @property
    def weights(self) -> Path:
        """The trained network: weights, classes, normalization."""
        return self.path / "checkpoints" / "best.safetensors"

    def weights_at(self, step: int) -> Path:
        """Path of the weights of a validation step, written if the recipe sets ``validation.keep_all``."""
        return self.path / "checkpoints" / f"step-{step}.safetensors"

    @property
    def validation_weights(self) -> dict[int, Path]:
        """Weights files of validations by step, in order."""
        files = (self.path / "checkpoints").glob("step-*.safetensors")
        steps = sorted(int(number) for file in files if (number := file.stem.removeprefix("step-")).isdecimal())
        return {step: self.weights_at(step) for step in steps}

    @property
    def log(self) -> RunLog:
        """Losses, validations and other events by step."""
        return RunLog(self.path / "log.jsonl")

    @property
    def machine(self) -> dict[str, Any]:
        """Contents of ``machine.json``: versions, device, duration, initial weights and their digest."""
        return self._read_json("machine.json")

    @property
    def finished(self) -> bool:
        """Whether training is complete."""
        return bool(self.machine.get("finished")) and self.weights.exists()

    @property
    def scores(self) -> dict[str, Any]:
        """Contents of ``scores.json``, by ``role/split``, without scores of other weights than the run has now."""
        scores = self._read_json("scores.json")
        try:
            StoredScores.model_validate(scores)
        except ValidationError:
            raise RunError(f"{self.path / 'scores.json'} is damaged; delete it, and run overfly evaluate") from None
        if not any("weights_sha256" in values for values in scores.values()) or not self.weights.is_file():
            return scores
        known = (None, weights_sha256(self.weights))
        return {key: values for key, values in scores.items() if values.get("weights_sha256") in known}

    def write_json(self, file: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file of the folder atomically, with its digest."""
        write_json(self.path / file, values)

    def segmenter(self, step: int | None = None) -> Segmenter:
        """Load the final weights, or those of a validation step, for inference; raise `RunError` if there are none."""
        if step is not None:
            if not self.weights_at(step).is_file():
                raise RunError(f"{self.path} has no weights of step {step}; train it with validation.keep_all=true")
            return Segmenter.load(self.weights_at(step)).eval()
        self.check_finished()
        return Segmenter.load(self.weights).eval()

    def check_finished(self) -> None:
        """Raise `RunError` if training is not finished."""
        if not self.finished:
            raise RunError(f"{self.path} has no trained network yet; continue it with `overfly train {self.path}`")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder until the block or the process ends; raise `RunError` if another process trains here."""
        try:
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout:
            raise RunError(f"{self.path} is being trained by another process; wait for it or stop it") from None

    def _read_json(self, file: str) -> dict[str, Any]:
        path = self.path / file
        try:
            return read_json(path)
        except FileNotFoundError:
            return {}
        except ValueError:
            raise RunError(f"{path} is damaged; delete it and run the command that wrote it again") from None


def new_folder(out: Path, title: str) -> Path:
    """Create a folder named after the current time and a title; characters beyond letters and digits become hyphens."""
    title = re.sub(r"[^\w.+-]+", "-", title)[:120]
    stamp = datetime.now().astimezone().strftime("%Y-%m-%dT%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        path = out / f"{stamp}_{title}{suffix}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise OSError(0, "100 runs started in one second")


def utc_now() -> str:
    """Return the date and time in UTC (ISO 8601)."""
    return datetime.now(UTC).isoformat()
