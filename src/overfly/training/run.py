"""The run: a folder on disk as an object. Nothing is loaded before it is asked for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from overfly.core.atomic_files import atomic_write
from overfly.core.errors import RunError
from overfly.core.settings import validation_message
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe
from overfly.training.journal import Journal

Scores = dict[str, Any]
"""What ``scores.json`` holds: for each ``role/split``, what the scorer found."""


class Run:
    """A folder that holds a recipe and what came of it.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run in a folder.

        Raises:
            RunError: there is no run there.
        """
        path = Path(path)
        if not path.exists():
            raise RunError(f"{path} is not there; give the folder of a run, such as one below runs/")
        if not (path / "recipe.yaml").is_file():
            raise RunError(f"{path} is no run: it has no recipe.yaml; give the folder that `overfly train` named")
        return cls(path)

    @classmethod
    def place(cls, out: Path | str, recipe: Recipe) -> Run:
        """The run of a recipe below ``out``: the one that is there already, finished or not, else a new folder.

        Raises:
            RunError: ``out`` is itself the run of another recipe, or cannot be written.
        """
        out = Path(out)
        if (out / "recipe.yaml").is_file():
            run = cls.open(out)
            if run.recipe != recipe:
                raise RunError(
                    f"{out} holds the run of another recipe, which is never overwritten; choose another --out"
                )
            return run
        found = cls.find(out, recipe)
        if found is not None:
            return found
        try:
            path = _new_folder(out, _title(recipe))
            partial = path / "recipe.partial"
            recipe.save(partial)
            partial.replace(path / "recipe.yaml")
        except OSError as error:
            raise RunError(f"{out} cannot be written ({error.strerror}); choose another --out") from None
        return cls(path)

    @classmethod
    def find(cls, out: Path | str, recipe: Recipe) -> Run | None:
        """The newest run below ``out`` that has just this recipe, or None."""
        for file in sorted(Path(out).glob("*/recipe.yaml"), reverse=True):
            try:
                if Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8"))) == recipe:
                    return cls(file.parent)
            except (ValueError, yaml.YAMLError, OSError):
                continue
        return None

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, every setting resolved.

        Raises:
            RunError: the file was changed into something that is no recipe.
        """
        file = self.path / "recipe.yaml"
        try:
            return Recipe.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        except ValidationError as error:
            raise RunError(validation_message(error, str(file))) from None
        except (ValueError, yaml.YAMLError, OSError):
            raise RunError(f"{file} is no YAML any more; restore it, or train again") from None

    @property
    def checkpoint(self) -> Path:
        """All state of training, to resume from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def weights(self) -> Path:
        """The network that the run ends in: weights, classes, normalization."""
        return self.path / "checkpoints" / "best.safetensors"

    def weights_at(self, step: int) -> Path:
        """Where the weights of a validation are kept, if the recipe says so."""
        return self.path / "checkpoints" / f"step-{step}.safetensors"

    @property
    def kept(self) -> dict[int, Path]:
        """The weights that validations kept, by step, earliest first."""
        found = (self.path / "checkpoints").glob("step-*.safetensors")
        steps = sorted(int(number) for file in found if (number := file.stem.removeprefix("step-")).isdigit())
        return {step: self.weights_at(step) for step in steps}

    @property
    def journal(self) -> Journal:
        """What happened, line by line."""
        return Journal(self.path / "journal.jsonl")

    @property
    def machine(self) -> dict[str, Any]:
        """Versions, device, start, duration."""
        return self._json("machine.json")

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return bool(self.machine.get("finished")) and self.weights.exists()

    @property
    def scores(self) -> Scores:
        """What the scorer found, by ``role/split``; empty before `overfly evaluate`."""
        scores = self._json("scores.json")
        if all(isinstance(values, dict) for values in scores.values()):
            return scores
        raise RunError(f"{self.path / 'scores.json'} is damaged; delete it and run overfly evaluate again")

    def record(self, file: str, values: dict[str, Any]) -> None:
        """Write a JSON file of the folder, whole or not at all."""
        path = self.path / file
        with atomic_write(path) as part:
            part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            part.replace(path)

    def segmenter(self, step: int | None = None) -> Segmenter:
        """The network that the run ended in, or that of a kept validation, in evaluation mode.

        Args:
            step: of a validation whose weights were kept.

        Raises:
            RunError: training has not come to its end, or kept no weights at this step.
        """
        if step is not None:
            if not self.weights_at(step).is_file():
                raise RunError(f"{self.path} kept no weights at step {step}; train it with validation.keep_all")
            return Segmenter.load(self.weights_at(step)).eval()
        if not self.finished:
            raise RunError(f"{self.path} has no trained network yet; run `overfly train {self.path}` to go on with it")
        return Segmenter.load(self.weights).eval()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second process; the lock goes with the process, however it ends.

        Raises:
            RunError: another process trains here.
        """
        try:
            import fcntl
        except ImportError:  # Windows has other locks; there two trainings of one folder are the user's to avoid
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"{self.path} is being trained by another process; wait for it or stop it") from None
            yield

    def _json(self, file: str) -> dict[str, Any]:
        path = self.path / file
        if not path.exists():
            return {}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise RunError(f"{path} is damaged; delete it and run the command that wrote it again") from None
        if not isinstance(values, dict):
            raise RunError(f"{path} is damaged; delete it and run the command that wrote it again")
        return values


def _title(recipe: Recipe) -> str:
    places = "-".join(domain.title.lower() for domain in (recipe.source, recipe.target) if domain)
    return f"{places}_{recipe.model.name}_{recipe.method.name}_{recipe.seed}".replace("/", "-").replace(" ", "-")


def _new_folder(out: Path, title: str) -> Path:
    """A folder that no other process has, with the time of day in front."""
    stamp = datetime.now().astimezone().strftime("%Y-%m-%dT%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        path = out / f"{stamp}_{title}{suffix}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            (path / "checkpoints").mkdir()
            return path
    raise OSError(0, "too many runs of one second")
