"""Write docs/methods/*.md: a page for each method, from its code and from the results in docs/results."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from overfly.methods.method import Method

DOCS = Path(__file__).parent
FOLDER = DOCS / "methods"
TEMPLATE = """\
# `{{ name }}`
{{ paper }}

{{ idea }}

Each step reads {{ reads }}{% if start %}; training starts from a trained network (`start`){% endif %}. \
{% if bases %}It is a variant of {{ bases }}. {% endif %}\
Code: [src/overfly/methods/{{ file }}](../../src/overfly/methods/{{ file }}).

## Losses of a step
```python
{{ losses }}
```

## Settings
{{ settings }}

## Results
{{ results }}
"""
INDEX = """\
# Methods
Made by `make docs`. [Results](../results/methods.md); [how to rank networks](../guides/choosing.md).

| method | summary |
|---|---|
{% for name, sentence in rows %}
| [`{{ name }}`]({{ name }}.md) | {{ sentence }} |
{% endfor %}
"""
NO_RESULTS = "None yet."


def _build() -> Any:
    """The module docs/build.py."""
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    if spec is None or spec.loader is None:
        raise ImportError("docs/build.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds() -> dict[str, type[Method[Any]]]:
    """The methods of this package, by name."""
    return {name: kind for name, kind in sorted(Method.kinds.items()) if kind.__module__.startswith("overfly.")}


def results(name: str) -> str:
    """A table of a method's scores in the studies of docs/results."""
    rows = []
    for file in sorted((DOCS / "results").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if "seeds" not in content:  # not a table of trainings
            continue
        seeds = ", ".join(map(str, content["seeds"]))
        for row in content["rows"]:
            if row["method"] != name:
                continue
            scores = "; ".join(f"{domain} {_percent(score)}" for domain, score in row["miou"].items())
            minutes = row.get("minutes", {}).get("mean")
            took = f"{minutes:.1f}" if minutes else "–"
            page = f"../results/{file.stem.partition('-')[0]}.md"
            rows.append(
                f"| [{row['recipe']}]({page}) | `{row['model']}` | {row['source']} | {scores} | {seeds} | {took} | "
                f"{content['machine']['device']} |"
            )
    if not rows:
        return NO_RESULTS
    head = "| recipe | network | source | mIoU (%) | seeds | minutes | machine |\n|---|---|---|---|---|---|---|\n"
    return head + "\n".join(rows)


def _percent(score: dict[str, Any]) -> str:
    if score["mean"] is None:
        return "–"
    deviation = f" ± {100 * score['deviation']:.1f}" if score["deviation"] is not None else ""
    return f"{100 * score['mean']:.1f}{deviation}"


def _reads(kind: type[Method[Any]]) -> str:
    """Images that a step reads."""
    source = "labeled source images" if kind.needs_source else None
    maybe = "labeled source images if the recipe has a source" if kind.uses_optional_source and not source else None
    target = "unlabeled target images" if kind.needs_target else None
    return " and ".join(part for part in (source, maybe, target) if part)


def page(name: str, kind: type[Method[Any]]) -> str:
    """The page of one method."""
    module = sys.modules[kind.__module__]
    first, _, rest = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
    bases = [base.name for base in kind.__mro__[1:] if issubclass(base, Method) and base.name]
    values = {
        "name": name,
        "paper": " ".join((module.__doc__ or "").split()),
        "idea": "\n\n".join(" ".join(part.split()) for part in (first, *rest.split("\n\n")) if part),
        "reads": _reads(kind),
        "start": kind.needs_start,
        "bases": ", ".join(f"[`{base}`]({base}.md)" for base in dict.fromkeys(bases)),
        "file": Path(module.__file__ or "").name,
        "losses": textwrap.dedent(inspect.getsource(kind.losses)).strip(),
        "settings": "\n".join(_build().settings(kind)).strip(),
        "results": results(name),
    }
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701
    return environment.from_string(TEMPLATE).render(**values).rstrip() + "\n"


def pages() -> dict[Path, str]:
    """Every page, by its file."""
    build = _build()
    rows = [(name, build.summary(kind)) for name, kind in kinds().items()]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701
    result = {FOLDER / "README.md": environment.from_string(INDEX).render(rows=rows).rstrip() + "\n"}
    return result | {FOLDER / f"{name}.md": page(name, kind) for name, kind in kinds().items()}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
    print(f"written: {FOLDER}", file=sys.stderr)
