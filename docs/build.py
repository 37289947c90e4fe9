"""Write docs/reference.md (every setting of a recipe) and the catalog of `overfly list`, from the docstrings."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from overfly.commands.list import CATALOG, build_catalog, choices, summary
from overfly.recipe import Labels, Model, Recipe, Validation

PAGE = Path(__file__).parent / "reference.md"


def settings(kind: type[BaseModel], skip: frozenset[str] = frozenset()) -> list[str]:
    """A Markdown table of a kind's settings."""
    rows = []
    for name, field in kind.model_fields.items():
        if name in skip:
            continue
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        rows.append(f"| `{name}` | {default} | {' '.join((field.description or '').split())} |")
    return ["| setting | default | meaning |", "|---|---|---|", *rows, ""] if rows else ["No settings.", ""]


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return f"`{value.get('name', 'its defaults')}`"
    return "none" if value is None else f"`{value}`".replace("|", "\\|")


def page() -> str:
    """The whole page."""
    lines = [
        "# Every setting of a recipe",
        "",
        "Made by `make docs` from the code; `overfly list` shows the same names in a terminal.",
        "",
        "## Recipe",
        "",
        *settings(Recipe),
        "## model",
        "",
        *settings(Model),
        "## labels",
        "",
        *settings(Labels),
        "## validation",
        "",
        *settings(Validation),
    ]
    for group, choice in choices().items():
        lines += [f"## {group}", ""]
        for name, kind in sorted(choice.kinds.items()):
            if not kind.__module__.startswith("overfly."):  # a plug-in's
                continue
            lines += [f"### `{name}`", "", summary(kind), "", *settings(kind)]
    return "\n".join(lines).rstrip() + "\n"


def catalog() -> str:
    """The catalog file."""
    return json.dumps(build_catalog().groups, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    CATALOG.write_text(catalog(), encoding="utf-8")
    print(f"written: {PAGE}, {CATALOG}", file=sys.stderr)
