"""Write docs/licenses.md: the packages that overfly needs, directly or not, with the licenses of their metadata."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licenses.md"
FAMILIES = {
    "Apache-2.0": r"apache", "MIT": r"\bmit\b", "BSD": r"\b0?bsd\b", "PSF-2.0": r"psf|python software foundation",
    "MPL-2.0": r"mpl|mozilla", "ISC": r"\bisc\b", "Zlib": r"zlib", "CC0-1.0": r"cc0", "BSL-1.0": r"bsl-1|boost",
}  # fmt: skip
"""Licenses that allow use, changes and sale beside Apache-2.0; MPL-2.0 asks to publish changes of its own files."""
OTHERS = r"gpl|affero|general public|eupl|cc-by|proprietary|commercial|sspl|busl"
"""Licenses that do not, or that need a person to read them."""
INTRO = """# Licenses

overfly has the license Apache-2.0. The packages below, which it installs, allow use, changes and sale, and do not ask
you to publish your code; a test reads their licenses from their own metadata. Packages with MPL-2.0 are used unchanged.
Two parts are not covered by the table:

- The wheels of `av` (extra `stream`) contain FFmpeg with x264, which is GPL-2.0 or later: it matters if you pass on an
  environment that holds them.
- `torch` for GPUs installs NVIDIA's packages (`nvidia-*`) under NVIDIA's own terms.

Data and pretrained weights have licenses of their own; `overfly data fetch` and `docs/guides` name them.

`python docs/licenses.py` writes this page.

| package | license | extras |
|---|---|---|
"""


def license_of(package: Distribution) -> str:
    """The families of a package's license, joined by AND; raise `ValueError` if it is unknown or not permissive."""
    metadata = package.metadata
    classifiers = [entry for entry in metadata.get_all("Classifier") or [] if entry.startswith("License ::")]
    first_line = (metadata.get("License") or "").strip().splitlines()[:1]
    text = metadata.get("License-Expression") or " ".join([*first_line, *classifiers])
    found = [name for name, pattern in FAMILIES.items() if re.search(pattern, text, re.IGNORECASE)]
    if not found or re.search(OTHERS, text, re.IGNORECASE):
        raise ValueError(
            f"{metadata['Name']} has the license {text!r}; read it, and add its family here if it allows use"
        )
    return " AND ".join(found)


def requirements() -> dict[str, list[str]]:
    """The requirements of overfly by extra; without one under an empty name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: entries for name, entries in project["optional-dependencies"].items() if name != "dev"}
    return {"": project["dependencies"], **extras}


def packages() -> dict[str, tuple[str, set[str]]]:
    """License and extras of every installed package that overfly needs, by its normalized name."""
    found: dict[str, tuple[str, set[str]]] = {}
    for extra, entries in requirements().items():
        waiting, seen = [Requirement(entry) for entry in entries], set()
        while waiting:
            requirement = waiting.pop()
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            key = (name, *sorted(requirement.extras))
            if key in seen:
                continue
            seen.add(key)
            try:
                package = distribution(name)
            except PackageNotFoundError:  # of another system, or an extra that is not installed
                continue
            if not name.startswith("nvidia-"):
                found.setdefault(name, (license_of(package), set()))[1].add(extra)
            for entry in map(Requirement, package.requires or []):
                wanted = ("", *requirement.extras)
                if entry.marker is None or any(entry.marker.evaluate({"extra": each}) for each in wanted):
                    waiting.append(entry)
    return found


def page() -> str:
    """The page's text."""
    rows = []
    for name, (license, extras) in sorted(packages().items()):  # noqa: A001
        rows.append(f"| {name} | {license} | {'' if '' in extras else ', '.join(sorted(extras))} |\n")
    return INTRO + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
