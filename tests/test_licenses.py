"""Licenses of the installed packages that overfly needs, from their metadata."""

from __future__ import annotations

import importlib.util
from email.message import Message
from types import ModuleType, SimpleNamespace

import pytest

from conftest import REPOSITORY


@pytest.fixture(scope="module")
def licenses() -> ModuleType:
    spec = importlib.util.spec_from_file_location("licenses", REPOSITORY / "docs" / "licenses.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_license_is_permissive_and_listed(licenses: ModuleType) -> None:
    rows = [line.split(" | ") for line in licenses.PAGE.read_text().splitlines() if line.startswith("| ")]
    listed = {row[0].removeprefix("| "): row[1] for row in rows}
    found = {name: entry[0] for name, entry in licenses.packages().items()}
    assert {"torch", "numpy", "rasterio"} <= found.keys()
    missing = {name: text for name, text in found.items() if listed.get(name) != text}
    assert not missing, "run python docs/licenses.py"


@pytest.mark.parametrize("text", ["GPL-3.0-or-later", "AGPL-3.0", "LGPL-2.1 AND MIT", "", "Proprietary", "CC-BY-4.0"])
def test_other_licenses_are_refused(licenses: ModuleType, text: str) -> None:
    metadata = Message()
    metadata["Name"] = "a"
    metadata["License-Expression"] = text
    with pytest.raises(ValueError, match="a has the license"):
        licenses.license_of(SimpleNamespace(metadata=metadata))
