"""The recipe: all settings of an experiment, in YAML, Python or on the command line."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from overfly import data, methods  # noqa: F401  (importing them registers their kinds)
from overfly.core.choices import TrainingPrecision
from overfly.core.errors import RecipeError
from overfly.core.optimizers import SGD, Optim, Poly, Schedule
from overfly.core.settings import read_mapping, set_value, validation_message, write_mapping
from overfly.core.spec import Choice, NonNegativeInt, Pixels, PositiveFloat, PositiveInt, Spec, load_plugins
from overfly.data.domain import Domain, Split
from overfly.data.sampling import Sampling, Uniform
from overfly.methods.method import Method
from overfly.methods.source_only import SourceOnly
from overfly.models import names
from overfly.models.network import CHECKPOINT_BUILDERS
from overfly.ops.augmentation import Augment
from overfly.ops.geometry import RandomCrop


class Model(Spec):
    """The network that is trained."""

    name: str = "pidnet_s"
    """Architecture, by its name in `overfly list`."""
    checkpoint: str | None = None
    """For ``transformers``: a folder with config.json and model.safetensors, or a name on the Hugging Face hub."""
    weights: str | None = "imagenet"
    """Weights to start from: ``imagenet``, random where the network's ImageNet weights cannot be had (of a network of
    ``transformers``: those of its checkpoint); a file;
    ``package:NAME/FILE`` inside an installed package; or a name of `overfly list`. null: random."""
    sha256: str | None = None
    """SHA-256 of the weights file."""
    count_include_pad: bool | None = None
    """Whether PIDNet's average pools count the zeros around a map, as in its release: pooled values then grow with the
    image, up to 17 cells of 64 pixels. false: means over the map alone. none: as in ``start``, else true."""
    mean: tuple[float, ...] | None = None
    """Mean of each band in the sensor's own range; default: ImageNet's with weights, else the source's."""
    std: tuple[PositiveFloat, ...] | None = None
    """Standard deviation of each band; default as for the mean."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        name, _, checkpoint = value.partition(":")
        return {"name": name, "checkpoint": checkpoint} if checkpoint else {"name": name}

    @property
    def architecture(self) -> str:
        """The name that `overfly.models.build` takes: ``name`` or ``name:checkpoint``."""
        return f"{self.name}:{self.checkpoint}" if self.checkpoint else self.name

    @property
    def title(self) -> str:
        """The architecture as weights files name it: with the last part of the checkpoint's path alone."""
        return f"{self.name}:{Path(self.checkpoint).name}" if self.checkpoint else self.name

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if (self.name in CHECKPOINT_BUILDERS) != bool(self.checkpoint):
            raise ValueError(
                f"model {self.name} takes no checkpoint; remove it" if self.checkpoint
                else f"model {self.name} needs a checkpoint; set model.checkpoint to a folder or a name on the hub"
            )  # fmt: skip
        if self.checkpoint is None and self.name not in names():
            load_plugins()
            if self.name not in names():
                raise ValueError(f"no model is called {self.name!r}; there are: {', '.join(names())}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std must be given together")
        if self.sha256 is not None and self.weights in (None, "imagenet"):
            raise ValueError("sha256 needs weights; set weights to the file")
        return self


class Labels(Spec):
    """Labeled images of the target, trained on with the source."""

    domain: Domain
    """The images and their masks, all in split train."""
    sha256: str | None = None
    """SHA-256 of the images and masks, so that changed masks are another recipe."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the source's images in every batch that are drawn from these instead; at least one image of each."""

    def count(self, batch: int) -> int:
        """Number of images of a source batch that are drawn from these."""
        return min(max(1, round(self.share * batch)), batch - 1)


class Validation(Spec):
    """Validation during training on the source's held-out labels, and on unlabeled target images."""

    every: NonNegativeInt = 0
    """Steps between two validations; 0: no validation, the last weights are kept."""
    split: Split = "val"
    """Split of the source that is scored."""
    select: Literal["best", "last"] = "best"
    """Keep the weights of the best validation, or the last ones."""
    patience: NonNegativeInt = 0
    """Validations without a new best after which training stops; 0: never."""
    target: bool = False
    """Also log label-free metrics (entropy, consistency, agreement with the teacher, …) on fixed images of the target's
    train split."""
    keep_all: bool = False
    """Keep each validation's weights as checkpoints/step-N.safetensors, for `overfly rank`."""

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if (self.target or self.keep_all) and not self.every:
            raise ValueError(f"{'target' if self.target else 'keep_all'} needs validations; set every above 0")
        return self


def _parse_start(value: object) -> object:
    """Parse a recipe under ``start``."""
    if value is not None and not isinstance(value, Mapping | str | Path | Recipe):
        raise ValueError("must be a run folder, a weights file, or a recipe")
    return Recipe.model_validate(value) if isinstance(value, Mapping) else value


def with_seed(recipe: "Recipe", seed: Any) -> "Recipe":
    """Return a recipe with another seed, also in the recipes under its ``start``."""
    start = with_seed(recipe.start, seed) if isinstance(recipe.start, Recipe) else recipe.start
    return recipe.model_copy(update={"seed": seed, "start": start})


class Recipe(Spec):
    """All settings that determine the trained weights; device and workers are options of the command."""

    source: Domain | None = None
    """Labeled imagery; none for source-free adaptation, which needs ``start``."""
    target: Domain | None = None
    """Imagery to adapt to; training never reads its labels."""
    labels: Labels | None = None
    """Labeled images of the target that are trained on too, as `overfly adapt --labels` does."""
    start: "Annotated[Recipe | Path | None, BeforeValidator(_parse_start)]" = None
    """Initial network: a run folder, a weights file of a run, or another recipe, trained first with the same seed."""
    model: Model = Model()
    """The network."""
    method: Method[Any] = SourceOnly()
    """Training or adaptation method."""
    optim: Optim = SGD(lr=1e-2)
    """Optimizer."""
    schedule: Schedule = Poly()
    """Learning-rate schedule."""
    augment: tuple[Augment, ...] = ()
    """Augmentations of the source's images and labels, in this order, before normalization."""
    sampling: Sampling = Uniform()
    """Sampling of the source's images and crops."""
    validation: Validation = Validation()
    """Validation during training."""
    resize: Pixels | None = None
    """Side of the square that images are resized to when read; none: unchanged."""
    crop: Annotated[int, Field(ge=8, le=16384)] = 512
    """Side of the square crops."""
    window: Pixels | None = None
    """Side of the overlapping windows in which images are scored, after any resize; none: whole images. A network with
    global context that was trained on small crops scores better in windows of their size."""
    batch: Annotated[int, Field(ge=1, le=65536)] = 6
    """Images of each domain in one batch, over all devices."""
    accumulate: PositiveInt = 1
    """Batches per optimizer step, whose gradients are averaged."""
    steps: PositiveInt | None = None
    """Optimizer steps; 20,000 where neither steps nor epochs are given."""
    epochs: PositiveFloat | None = None
    """Passes over the source, instead of ``steps``."""
    clip: PositiveFloat | None = None
    """Largest norm of the gradient."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Random seed."""
    precision: Annotated[TrainingPrecision, BeforeValidator(lambda given: "32" if given == 32 else given)] = "32"
    """Full precision, or mixed with bfloat16 or float16, which a CPU without kernels for it computes in full precision.
    ``auto``: the fastest of 32 and bf16, contiguous and channels-last, by steps that are timed once for each machine,
    network, crop and batch; 32 on several devices. machine.json records it, and a resumed run keeps it."""

    @model_validator(mode="before")
    @classmethod
    def _use_classes_of_source(cls, value: object) -> object:
        """Use the source's classes for a target folder or raster without classes."""
        if not isinstance(value, Mapping) or not isinstance(value.get("target"), Mapping) or not value.get("source"):
            return value
        target = value["target"]
        if target.get("name") in ("folder", "raster") and "classes" not in target:
            source = value["source"]
            if isinstance(source, Mapping) and "classes" in source:
                return {**value, "target": {**target, "classes": source["classes"]}}
            known = Domain.model_validate(source)
            return {**value, "source": known, "target": {**target, "classes": known.classes}}
        return value

    @model_validator(mode="before")
    @classmethod
    def _use_model_of_start(cls, value: object) -> object:
        """Use the model of the recipe or run under ``start``, and this recipe's seed for it."""
        if isinstance(value, Mapping) and value.get("start") is not None:
            start = _parse_start(value["start"])
            if isinstance(start, Recipe):
                start = with_seed(start, value.get("seed", 0))
                return {"model": start.model, **value, "start": start}
            if "model" not in value and (Path(str(start)) / "recipe.yaml").is_file():
                return {**value, "model": read_mapping(Path(str(start)) / "recipe.yaml").get("model")}
        return value

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs cannot both be set; set steps=null or epochs=null")
        if self.method.needs_source and self.source is None:
            raise ValueError(f"method {self.method.name} needs labeled images; set source")
        if self.method.needs_target and self.target is None:
            raise ValueError(f"method {self.method.name} needs target images; set target")
        if isinstance(self.start, Recipe) and self.start.model.name != self.model.name:
            raise ValueError(f"start has model {self.start.model.name}, the recipe {self.model.name}; set one for both")
        if self.source is None and self.start is None:
            raise ValueError("a recipe without a source needs a run or weights to start from; set start")
        if self.method.needs_start and self.start is None and self.model.weights in (None, "imagenet"):
            raise ValueError(f"method {self.method.name} needs a trained network; set start to a run or a recipe")
        if self.epochs is not None and (self.source is None or not self.method.needs_source):
            raise ValueError(f"method {self.method.name} reads no source, so epochs are undefined; set steps")
        if self.validation.every and self.source is None and not self.validation.target:
            raise ValueError("validation needs a source; without one set validation.target=true or validation.every=0")
        if self.validation.target and self.target is None:
            raise ValueError("validation.target needs target images; set target")
        cut = next((entry.size for entry in reversed(self.augment) if isinstance(entry, RandomCrop)), self.crop)
        if cut != self.crop and self.method.needs_source and self.method.needs_target:
            raise ValueError(
                f"random_crop cuts the source to {cut} pixels, and the target has crop: {self.crop}; "
                f"set crop to {cut}, or remove random_crop from augment"
            )
        return self

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        warmup = self.schedule.warmup
        if (preheat := getattr(self.method, "preheat_steps", warmup)) < warmup:
            raise ValueError(f"method.preheat_steps must be at least schedule.warmup, {warmup}, got {preheat}")
        domain, confidence = self.source or self.target, getattr(self.method, "class_confidence", ())
        for key, values in (("class_weights", self.method.criterion.class_weights), ("class_confidence", confidence)):
            if values and domain and len(values) != (count := len(domain.classes)):
                raise ValueError(f"{key} must have {count} numbers, one per class, got {len(values)}")
        return self

    @model_validator(mode="after")
    def _check_domains_match(self) -> Self:
        if self.labels and not (self.source and self.method.needs_source and self.batch > 1):
            raise ValueError("labels are drawn with the source; set source, a method that reads it, and batch above 1")
        for role, other in (("target", self.target), ("labels", self.labels and self.labels.domain)):
            if not (self.source and other):
                continue
            if self.source.classes.names != other.classes.names:
                raise ValueError(
                    f"source and {role} have different classes ({', '.join(self.source.classes.names)}, and "
                    f"{', '.join(other.classes.names)}); unify them with the folder domain's mapping"
                )
            if self.source.bands != other.bands:
                difference = f"source has {self.source.bands} bands and {role} {other.bands}"
                raise ValueError(f"{difference}; use the same bands in both")
            if self.source.max_value != other.max_value:
                raise ValueError(
                    f"source has max_value {self.source.max_value:g} and {role} {other.max_value:g}; rescale images "
                    "to one range and set max_value in both"
                )
        return self

    def domain(self, role: Literal["source", "target"]) -> Domain:
        """Return the source or the target; raise `RecipeError` if the recipe does not have it."""
        domain = self.source if role == "source" else self.target
        if domain is None:
            raise RecipeError(f"the recipe has no {role}; set {role}")
        return domain

    def length(self, images: int) -> int:
        """Return the number of optimizer steps; ``images`` is the number of source images, the length of an epoch."""
        if self.epochs is not None:
            return max(1, round(self.epochs * images / (self.batch * self.accumulate)))
        return self.steps or 20_000

    def save(self, path: Path) -> None:
        """Write all settings, including defaults, as YAML."""
        write_mapping(path, self.model_dump(mode="json"))


def load(recipe: "Recipe | Path | str | Mapping[str, Any]", *overrides: str) -> "Recipe":
    """Read a recipe.

    Args:
        recipe: a YAML file, a run folder, a mapping, or a recipe.
        overrides: settings to change, such as ``method.ema=0.99``; the value is read as YAML. Overrides
            of a domain (``source.root=...``) or the network (``model=...``) also apply to the recipe under ``start``.

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
    values = _resolve_start(values, file)
    for override in overrides:
        _fill_defaults(values, override)
        set_value(values, override)
        values = _resolve_start(values, Path("recipe.yaml"))
        inner, top = values.get("start"), override.partition("=")[0].split(".")[0]
        shared = top == "model" or (override.startswith(("source.", "target.")))
        while isinstance(inner, dict) and shared and (top == "model" or inner.get(top)):
            _fill_defaults(inner, override)
            set_value(inner, override)
            inner = inner.get("start")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(validation_message(error, named, Recipe)) from None


def _resolve_start(values: dict[str, Any], file: Path, visited: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Replace ``start: other.yaml`` by the recipe in that file, relative to this one."""
    start = values.get("start")
    if not isinstance(start, str) or not start.endswith((".yaml", ".yml")):
        return values
    beside = file.parent / start
    path = beside if beside.exists() else Path(start)
    visited = (*visited, file.resolve())
    if path.resolve() in visited:
        raise RecipeError(f"{file} starts from itself through {path}; change start")
    return {**values, "start": _resolve_start(read_mapping(path), path, visited)}


def _fill_defaults(values: dict[str, Any], override: str) -> None:
    """Insert the defaults of settings whose nested settings an override changes."""
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
        except ValueError:  # an error of the validation that follows
            return


Recipe.model_rebuild()
