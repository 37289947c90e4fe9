"""The recipe: an experiment as a value. The same thing in a file, in Python and on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from overfly import data, methods  # noqa: F401  (their kinds are known once they are imported)
from overfly.core.errors import RecipeError
from overfly.core.optimizers import SGD, Optim, Poly, Schedule
from overfly.core.settings import read_mapping, set_value, validation_message
from overfly.core.spec import Choice, Count, Pixels, Positive, Spec, Whole, load_plugins
from overfly.data.domain import Domain, Split
from overfly.data.sampling import Sampling, Uniform
from overfly.methods.method import Method
from overfly.methods.source_only import SourceOnly
from overfly.models import names
from overfly.ops.augmentation import Augment
from overfly.ops.geometry import RandomCrop


class Model(Spec):
    """The network that is trained."""

    name: str = "pidnet_s"
    """Architecture, one of those that `overfly list` shows."""
    weights: str | None = None
    """Weights to start from: a file, ``package:NAME/FILE`` inside an installed package, or a name of `overfly list`."""
    sha256: str | None = None
    """What the file of weights must hash to."""
    mean: tuple[float, ...] | None = None
    """Mean of each band in the sensor's own range; left out: ImageNet's with weights, else the source's."""
    std: tuple[Positive, ...] | None = None
    """Standard deviation of each band; left out like the mean."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name not in names():
            load_plugins()
        if self.name not in names():
            raise ValueError(f"no model is called {self.name!r}; there are: {', '.join(names())}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given together or not at all")
        if self.sha256 is not None and self.weights is None:
            raise ValueError("sha256 says what a file of weights must hash to; name the file under weights")
        return self


class Validation(Spec):
    """Watching training by the source's held-out labels and by pictures of the target. Its labels are never read."""

    every: Whole = 0
    """Steps between two validations; 0: none, and the last weights are kept."""
    split: Split = "val"
    """Split of the source that is scored."""
    select: Literal["best", "last"] = "best"
    """Whether the weights of the best validation are kept, or the last."""
    patience: Whole = 0
    """Validations without a new best after which training stops; 0: never."""
    target: bool = False
    """Look at fixed pictures of the target's train split too, without labels, and write the label-free figures of the
    network (entropy, consistency, agreement with its teacher, …) into log.jsonl."""
    keep_all: bool = False
    """Keep each validation's weights as checkpoints/step-N.safetensors, for `overfly validate` to choose from."""

    @model_validator(mode="after")
    def _watched(self) -> Self:
        if (self.target or self.keep_all) and not self.every:
            named = "target" if self.target else "keep_all"
            raise ValueError(f"{named} says what is done at every validation; say under every how often that is")
        return self


def _nested(value: object) -> object:
    """A recipe inside a recipe, where ``start`` is one."""
    if value is not None and not isinstance(value, Mapping | str | Path | Recipe):
        raise ValueError("give a run folder, a Segmenter's file, or a recipe")
    return Recipe.model_validate(value) if isinstance(value, Mapping) else value


def _seeded(recipe: Recipe, seed: Any) -> Recipe:
    """A recipe with another seed, as deep as it starts from others."""
    start = _seeded(recipe.start, seed) if isinstance(recipe.start, Recipe) else recipe.start
    return recipe.model_copy(update={"seed": seed, "start": start})


def _word(value: object) -> object:
    """Take the number 32 to mean the word "32"."""
    return str(value) if isinstance(value, int) else value


class Recipe(Spec):
    """Everything that decides what a run ends in; what only decides how fast (device, workers) is not part of it."""

    source: Domain | None = None
    """Labeled imagery; none for source-free adaptation, which begins from ``start``."""
    target: Domain | None = None
    """Imagery to work on too; training never sees its labels."""
    start: Annotated[Recipe | Path | None, BeforeValidator(_nested)] = None
    """What to begin from: a run folder, a Segmenter's file, or another recipe, trained first with the same seed."""
    model: Model = Model()
    """The network."""
    method: Method[Any] = SourceOnly()
    """How it is trained or adapted."""
    optim: Optim = SGD(lr=1e-2)
    """How weights follow gradients."""
    schedule: Schedule = Poly()
    """The learning rate over the steps."""
    augment: tuple[Augment, ...] = ()
    """What is done to the source's images and labels, in this order, before normalization."""
    sampling: Sampling = Uniform()
    """How the source's pictures and crops are chosen."""
    validation: Validation = Validation()
    """Watching the source's held-out labels."""
    resize: Pixels | None = None
    """Side of the square that pictures are resized to when read; none: as they are."""
    crop: Annotated[int, Field(ge=8, le=16384)] = 512
    """Side of the square that is cut from each picture."""
    window: Pixels | None = None
    """Side of the overlapping windows in which pictures are scored, after any resize; none: whole pictures. A network
    with global context that learned from small crops does better in windows of their size."""
    batch: Annotated[int, Field(ge=1, le=65536)] = 6
    """Pictures of each domain in one batch, over all devices."""
    accumulate: Count = 1
    """Batches whose gradients one step averages."""
    steps: Count | None = None
    """Steps of the optimizer; 20,000 where neither steps nor epochs are given."""
    epochs: Positive | None = None
    """The length of training in passes over the source, instead of ``steps``."""
    clip: Positive | None = None
    """Bound on the norm of the gradient."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """What all random choices are drawn from."""
    precision: Annotated[Literal["32", "bf16", "16"], BeforeValidator(_word)] = "32"
    """Arithmetic of the networks: full, or mixed with bfloat16 or half floats. A processor without bfloat16 kernels
    computes in full precision instead of emulating them; machine.json says which it was."""

    @model_validator(mode="before")
    @classmethod
    def _classes_of_source(cls, value: object) -> object:
        """A target folder need not repeat the classes: left out, they are the source's."""
        if not isinstance(value, Mapping) or not isinstance(value.get("target"), Mapping) or not value.get("source"):
            return value
        target = value["target"]
        if target.get("name") == "folder" and "classes" not in target:
            source = value["source"]
            if isinstance(source, Mapping) and "classes" in source:
                return {**value, "target": {**target, "classes": source["classes"]}}
            known = Domain.model_validate(source)
            return {**value, "source": known, "target": {**target, "classes": known.classes}}
        return value

    @model_validator(mode="before")
    @classmethod
    def _model_of_start(cls, value: object) -> object:
        """A recipe that starts from another's run has that one's network and seed."""
        if isinstance(value, Mapping) and value.get("start") is not None:
            start = _nested(value["start"])
            if isinstance(start, Recipe):
                start = _seeded(start, value.get("seed", 0))
                return {"model": start.model, **value, "start": start}
            if "model" not in value and (Path(str(start)) / "recipe.yaml").is_file():
                return {**value, "model": read_mapping(Path(str(start)) / "recipe.yaml").get("model")}
        return value

    @model_validator(mode="after")
    def _carried_out(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.method.needs_source and self.source is None:
            raise ValueError(f"method {self.method.name} learns from labeled images; say where they are under source")
        if self.method.needs_target and self.target is None:
            raise ValueError(f"method {self.method.name} adapts to a target; say where its images are under target")
        if isinstance(self.start, Recipe) and self.start.model.name != self.model.name:
            raise ValueError(
                f"the recipe under start trains {self.start.model.name}, and this one asks for {self.model.name}; name "
                "one model in both"
            )
        if self.source is None and self.start is None:
            raise ValueError("a recipe without a source begins from a run or weights; name them under start")
        if self.method.needs_start and self.start is None and self.model.weights is None:
            raise ValueError(f"method {self.method.name} changes a trained network; name a run or recipe under start")
        if self.epochs is not None and (self.source is None or not self.method.needs_source):
            raise ValueError(f"epochs are passes over the source, which {self.method.name} does not read; give steps")
        if self.validation.every and self.source is None and not self.validation.target:
            raise ValueError("validation reads the source's labels; without a source set validation.target or every: 0")
        if self.validation.target and self.target is None:
            raise ValueError("validation.target looks at pictures of the target; say where they are under target")
        cut = next((each.size for each in reversed(self.augment) if isinstance(each, RandomCrop)), self.crop)
        if cut != self.crop and self.method.needs_source and self.method.needs_target:
            raise ValueError(
                f"random_crop leaves {cut} pixels of the source's pictures, and the target's have crop: {self.crop}; "
                f"set crop to {cut}, or take random_crop out of augment"
            )
        weights, domain = self.method.criterion.class_weights, self.source or self.target
        if weights and domain and len(weights) != len(domain.classes):
            raise ValueError(f"class_weights has {len(weights)} numbers, and there are {len(domain.classes)} classes")
        return self

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if not (self.source and self.target):
            return self
        if self.source.classes.names != self.target.classes.names:
            raise ValueError(
                f"source and target have different classes ({', '.join(self.source.classes.names)}, and "
                f"{', '.join(self.target.classes.names)}); bring them together with the folder domain's mapping"
            )
        if self.source.bands != self.target.bands:
            raise ValueError(
                f"source has {self.source.bands} bands and target {self.target.bands}; give both the same bands"
            )
        if self.source.max_value != self.target.max_value:
            raise ValueError(
                f"source goes up to {self.source.max_value:g} and target to {self.target.max_value:g}; bring both to "
                "one range of values, and say it as their max_value"
            )
        return self

    def domain(self, role: Literal["source", "target"]) -> Domain:
        """The source or the target.

        Raises:
            RecipeError: the recipe has none.
        """
        found = self.source if role == "source" else self.target
        if found is None:
            raise RecipeError(f"this recipe has no {role}; add one under {role}")
        return found

    def length(self, pictures: int) -> int:
        """Steps of the optimizer, for a source of so many pictures."""
        if self.epochs is not None:
            return max(1, round(self.epochs * pictures / (self.batch * self.accumulate)))
        return self.steps or 20_000

    def save(self, path: Path) -> None:
        """Write the recipe, every setting resolved, as YAML."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def load(recipe: Recipe | Path | str | Mapping[str, Any], *overrides: str) -> Recipe:
    """Read a recipe.

    Args:
        recipe: a YAML file, a run folder, a mapping, or a recipe.
        overrides: settings to change, such as ``method.ema=0.99``; the value is read as YAML. Those of a domain
            (``source.root=...``) and of the network (``model=...``) hold for the recipe under ``start`` too.

    Raises:
        RecipeError: the file is missing or not YAML, or a setting is unknown or out of range; the message names it.
    """
    named, file = "the recipe", Path("recipe.yaml")
    if isinstance(recipe, Recipe):
        values = recipe.model_dump(mode="json")
    elif isinstance(recipe, Mapping):
        values = deepcopy(dict(recipe))
    else:
        file = Path(recipe)
        file = file / "recipe.yaml" if file.is_dir() else file
        named, values = str(file), read_mapping(file)
    values = _anchored(values, file)
    for override in overrides:
        _spell_out(values, override)
        set_value(values, override)
        values = _anchored(values, Path("recipe.yaml"))
        inner, top = values.get("start"), override.partition("=")[0].split(".")[0]
        shared = top == "model" or (override.startswith(("source.", "target.")))
        while isinstance(inner, dict) and shared and (top == "model" or inner.get(top)):
            _spell_out(inner, override)
            set_value(inner, override)
            inner = inner.get("start")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(validation_message(error, named, Recipe)) from None


def _anchored(values: dict[str, Any], file: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Take ``start: other.yaml`` to mean the file beside this one, and read it."""
    start = values.get("start")
    if not isinstance(start, str) or not start.endswith((".yaml", ".yml")):
        return values
    beside = file.parent / start
    path = beside if beside.exists() else Path(start)
    seen = (*seen, file.resolve())
    if path.resolve() in seen:
        raise RecipeError(f"{file} starts from itself through {path}; name another recipe under start")
    return {**values, "start": _anchored(read_mapping(path), path, seen)}


def _spell_out(values: dict[str, Any], override: str) -> None:
    """Write down a default before one of its settings is changed, as deep as the override goes."""
    owner: type[Spec] = Recipe
    for key in override.partition("=")[0].split(".")[:-1]:
        field = owner.model_fields.get(key)
        if field is None:
            return
        if values.get(key) is None and isinstance(field.default, Spec):
            values[key] = field.default.model_dump(mode="json")
        kinds = field.annotation
        if not (isinstance(kinds, type) and issubclass(kinds, Choice)):
            return
        if isinstance(values.get(key), str):
            values[key] = {"name": values[key]}
        inner = values.get(key)
        if not isinstance(inner, dict):
            return
        try:
            owner, values = kinds.kind(str(inner.get("name"))), inner
        except ValueError:  # said when the recipe is validated
            return


Recipe.model_rebuild()
__all__ = ["Model", "Recipe", "Validation", "load"]
