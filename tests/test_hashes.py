"""`hashes.txt` covers the pinned versions."""

from __future__ import annotations

import re

from conftest import REPOSITORY


def pinned(file: str) -> dict[str, str]:
    """Versions by normalized name."""
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", (REPOSITORY / file).read_text(), flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}


def test_hashes_are_those_of_the_pinned_versions() -> None:
    """`make hashes` writes them after `make constraints`."""
    constraints = pinned("constraints.txt")
    assert constraints.pop("torch")
    assert pinned("hashes.txt") == constraints


def test_every_version_has_a_sha256() -> None:
    parts = re.split(r"\n(?=\w)", (REPOSITORY / "hashes.txt").read_text().strip())
    assert len(parts) == len(pinned("hashes.txt"))
    for part in parts:
        assert re.fullmatch(r"[\w.-]+==\S+( ; [^\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+", part), part[:200]


def test_commands_name_the_pinned_torch() -> None:
    version = pinned("constraints.txt")["torch"]
    assert f"torch=={version}" in (REPOSITORY / "SECURITY.md").read_text()
