"""Values that can be written in a recipe: frozen, strict, and chosen by name.

`Spec` is any group of settings. `Choice` is a spec that has kinds: ``class DACS(Method, name="dacs")`` makes
``{name: dacs, ema: 0.99}`` in YAML, ``DACS(ema=0.99)`` in Python and ``method.ema=0.99`` on the command line one thing;
``dacs`` alone means its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    model_serializer,
    model_validator,
)


def _no_truth(value: Any) -> Any:
    """True is no number of anything."""
    if isinstance(value, bool):
        raise ValueError(f"a number is meant, not {str(value).lower()}")
    return value


Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole, 0 to 1."""
Count = Annotated[int, BeforeValidator(_no_truth), Field(ge=1)]
"""How many: 1 or more."""
Whole = Annotated[int, BeforeValidator(_no_truth), Field(ge=0)]
"""How many, where none is an answer: 0 or more."""
Pixels = Annotated[int, BeforeValidator(_no_truth), Field(ge=1)]
"""A length in pixels."""
Meters = Annotated[float, Field(gt=0)]
"""A length on the ground."""
Positive = Annotated[float, Field(gt=0)]
"""A number above 0."""
NonNegative = Annotated[float, Field(ge=0)]
"""A number that is 0 or above."""


class Spec(BaseModel):
    """A value of a recipe. Misspelt or extra settings are errors; each one's docstring is its help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class Choice(Spec):
    """A spec that has kinds, found by name in this package or in a plug-in (entry point ``overfly.plugins``)."""

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
    def kind(cls, name: str) -> type[Self]:
        """The kind called ``name``.

        Raises:
            ValueError: no built-in kind and no plug-in has this name; the message lists those that exist.
        """
        if name not in cls.kinds:
            load_plugins()
        if name not in cls.kinds:
            known = ", ".join(sorted(cls.kinds))
            raise ValueError(f"no {cls._noun()} is called {name!r}; there are: {known}")
        found: type[Self] = cls.kinds[name]
        return found

    @classmethod
    def _noun(cls) -> str:
        return cls.__name__.partition("[")[0].lower()

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Any:
        if isinstance(value, cls.__pydantic_generic_metadata__["origin"] or cls):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping) and "name" in value:
            kind = cls.kind(str(value["name"]))
            return kind.model_validate({key: entry for key, entry in value.items() if key != "name"})
        if not cls.name and isinstance(value, Mapping):
            raise ValueError(f"name which {cls._noun()} is meant, one of: {', '.join(sorted(cls.kinds))}")
        return handler(value)

    @model_serializer(mode="plain")
    def _with_name(self) -> dict[str, Any]:
        """All settings of this kind: pydantic by itself would write those of the declared type alone."""
        return {"name": self.name, **{field: getattr(self, field) for field in type(self).model_fields}}


def load_plugins() -> None:
    """Import the packages that announce themselves under the entry point ``overfly.plugins``."""
    for plugin in entry_points(group="overfly.plugins"):
        plugin.load()
