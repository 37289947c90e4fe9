"""Settings of a recipe: frozen pydantic models, selected by name.

`Spec` is a group of settings. `Choice` is a spec with several kinds, registered by name: after
``class DACS(Method, name="dacs")``, ``{name: dacs, ema: 0.99}`` in YAML equals ``DACS(ema=0.99)`` in Python;
``dacs`` alone gives the defaults.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Self

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator


def _not_bool(value: Any) -> Any:
    """Raise an error for true and false, which pydantic would read as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


Share = Annotated[float, Field(ge=0, le=1)]
"""A share, 0 to 1."""
PositiveInt = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
"""An integer of at least 1."""
NonNegativeInt = Annotated[int, BeforeValidator(_not_bool), Field(ge=0)]
"""An integer of at least 0."""
Pixels = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
"""A length in pixels, at least 1."""
Meters = Annotated[float, Field(gt=0)]
"""A length in meters, greater than 0."""
PositiveFloat = Annotated[float, Field(gt=0)]
"""A number greater than 0."""
NonNegativeFloat = Annotated[float, Field(ge=0)]
"""A number of at least 0."""


class Spec(BaseModel):
    """A group of settings. Unknown settings are errors; the docstring of a setting is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class Choice(Spec):
    """A spec with several kinds: named subclasses in this package or a plug-in (entry point ``overfly.plugins``)."""

    name: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[Any]]] = {}

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if Choice in cls.__bases__:
            cls.kinds = {}
        if name is not None:
            cls.name = name
            cls.kinds[name] = cls

    @classmethod
    def __class_getitem__(cls, typevar_values: Any) -> Any:
        """Return the class with type arguments; skips reading attribute docstrings again, which takes 0.1 s."""
        cls.model_config["use_attribute_docstrings"] = False
        try:
            parametrized: Any = super().__class_getitem__(typevar_values)
            parametrized.model_config["use_attribute_docstrings"] = True
        finally:
            cls.model_config["use_attribute_docstrings"] = True
        return parametrized

    @classmethod
    def kind(cls, name: str) -> type[Self]:
        """Return the class registered as ``name``; raise `ValueError` with all names if none has this name."""
        if name not in cls.kinds:
            load_plugins()
        if name not in cls.kinds:
            known = ", ".join(sorted(cls.kinds))
            noun = cls.__name__.partition("[")[0].lower()
            raise ValueError(f"no {noun} is called {name!r}; there are: {known}")
        return cls.kinds[name]

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, value: Any, handler: pydantic.ModelWrapValidatorHandler[Self]) -> Any:
        if isinstance(value, cls.__pydantic_generic_metadata__["origin"] or cls):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping) and "name" in value:
            kind = cls.kind(str(value["name"]))
            return kind.model_validate({key: entry for key, entry in value.items() if key != "name"})
        if not cls.name and isinstance(value, Mapping):
            raise ValueError(f"name must be one of {', '.join(sorted(cls.kinds))}")
        return handler(value)

    @model_serializer(mode="plain")
    def _with_name(self) -> dict[str, Any]:
        """Serialize name and all settings; pydantic's default writes only those of the declared type."""
        return {"name": self.name, **{field: getattr(self, field) for field in type(self).model_fields}}


def load_plugins() -> None:
    """Import the packages with the entry point ``overfly.plugins``."""
    for plugin in entry_points(group="overfly.plugins"):
        plugin.load()
