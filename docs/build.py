"""Write docs/reference.md (every setting of a recipe), docs/datasets.md and the catalog of `overfly list`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from overfly.commands.data import CATALOG, build_catalog, choices, summary
from overfly.data.datasets import SHEETS, Dataset, Sheet, read_sheet
from overfly.data.domain import Domain
from overfly.data.folder import Folder
from overfly.recipe import Labels, Model, Recipe, Validation

PAGE = Path(__file__).parent / "reference.md"
DATASETS = Path(__file__).parent / "datasets.md"


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
            if kind.__module__ != Dataset.__module__:
                skip = frozenset(Dataset.model_fields) if issubclass(kind, Dataset) else frozenset()
                lines += [f"### `{name}`", "", summary(kind), "", *settings(kind, skip)]
        if choice is Domain:
            named = ", ".join(f"`{name}`" for name, kind in sorted(choice.kinds.items()) if issubclass(kind, Dataset))
            lines += [
                "### Public data sets",
                "",
                f"{named}: see [the data sets](datasets.md). They have the settings of",
            ]
            lines[-1] += " `folder`, which their data sheets fill in, and:"
            lines += ["", *settings(Dataset, frozenset(Folder.model_fields) - {"root"})]
    return "\n".join(lines).rstrip() + "\n"


def datasets() -> str:
    """The page of the public data sets."""
    lines = [INTRODUCTION]
    names = sorted(file.stem for file in SHEETS.glob("*.yaml"))
    lines += [f"| [`{name}`](#{name}) | {read_sheet(name).summary} |" for name in names]
    for name in names:
        sheet = read_sheet(name)
        lines += ["", f"## {name}", "", sheet.summary, ""]
        lines += [f"- **{key.capitalize()}.** {fact}" for key, fact in sheet.facts.items() if key != "url"]
        get = sheet.get.replace("{root}", f"data/{name}")
        lines += [f"- **Get it.** {get[:1].upper()}{get[1:]} ({sheet.facts['url']})."]
        if sheet.subset:
            known = ", ".join(f"`{subset}`" for subset in sheet.subsets) or "Any name that the files have"
            pattern = sheet.subset.replace("{}", "SUBSET")
            lines += [f"- **Subsets.** {known}: the images whose names match `{pattern}`."]
        for variant, changes in sheet.variants.items():
            names_of = ", ".join(f"`{key}`" for key in changes)
            lines += [f"- **Variant** `{variant}` has other {names_of}."]
        lines += ["", "```", *sheet.layout.rstrip().splitlines(), "```", ""]
        classes = ", ".join(Domain.model_validate({"name": name, "root": "."}).classes.names)
        lines += [f"Classes: {classes}. The settings are in the [data sheet](../src/overfly/data/sheets/{name}.yaml)."]
    return "\n".join([*lines, "", "## The data sheet", "", SHEET, "", *settings(Sheet)]).rstrip() + "\n"


INTRODUCTION = """# Public data sets by name

Made by `make docs` from the data sheets; `overfly data list` shows the names in a terminal, and
`overfly data list potsdam` a sheet.

A data set is a domain by its name, read from the layout in which its publisher packs it. overfly bundles and downloads
none of them, except for [LoveDA](guides/loveda.md): read each license, and state it with what you train.

```yaml
source: {name: potsdam, root: data/potsdam, variant: irrg}
target: {name: vaihingen, root: data/vaihingen}
method: dacs
steps: 10000
```

- `variant` chooses other bands, labels or classes of the same data set, one or several. To score a run on labels
  without boundaries: `overfly evaluate runs/NAME --domain target variant=no_boundary`, and for IRRG images of Potsdam
  `variant=[irrg,no_boundary]`, since it replaces the variant of the run.
- `subset` chooses a region, city, department or condition, one or several; each must have images in the splits that
  are read.
- Every setting of the [folder domain](guides/folders.md) can be given too and replaces that of the sheet. With
  `classes` and `mapping`, two data sets get one label set.
- `overfly data check potsdam root=data/potsdam` reads every file. A message about missing files says what the folder
  must hold and where to get it.
- `recipes/pairs/` has recipes of the pairs that papers report, each with its source-only start.
  `overfly benchmark recipes/pairs --dry-run` says what would be trained, what is missing on disk, and about how long
  it takes.
- Images are decoded whole; `--cache disk` keeps large ones, such as those of Potsdam, decoded.

Layouts, lists and labels follow the publishers' descriptions and public loaders, and the tests read a generated
miniature of each. Of the data sets themselves, only tiles of LoveDA were at hand: `overfly data check` tells whether
yours is as described.

| name | |
|---|---|"""
SHEET = """A sheet is a YAML file with these keys. To read another data set, write the settings into a `folder` domain;
to add one by name, add a sheet to `src/overfly/data/sheets` and its miniature to `tests/miniatures.py`."""


def catalog() -> str:
    """The catalog file."""
    return json.dumps(build_catalog().groups, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    DATASETS.write_text(datasets(), encoding="utf-8")
    CATALOG.write_text(catalog(), encoding="utf-8")
    print(f"written: {PAGE}, {DATASETS}, {CATALOG}", file=sys.stderr)
