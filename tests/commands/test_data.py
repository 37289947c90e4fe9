from __future__ import annotations

from pathlib import Path

import pytest

from overfly import data_check, data_stats, data_synthesize
from overfly.core.errors import RecipeError


def test_data_commands_accept_paths_and_text(tmp_path: Path) -> None:
    roots: tuple[Path | str, ...] = (tmp_path / "0", str(tmp_path / "1"))
    for number, root in enumerate(roots):
        data_synthesize(root, scenes=["urban"], size=32, train=2, val=1, test=1)
        file = tmp_path / f"{number}.yaml"
        file.write_text(f"name: loveda\nroot: {root}\nscene: urban\n")
        for domain in (file, str(file)):
            (report,) = data_check(domain, splits=["train"]).reports.values()
            assert (report.splits[0].images, report.problems) == (2, ())
            assert data_stats(domain).images == 2


def test_exit_status_of_data_check(tmp_path: Path) -> None:
    data_synthesize(tmp_path / "world", scenes=["urban"], size=32, train=2, val=1, test=1)
    next((tmp_path / "world").rglob("masks_png/*.png")).write_bytes(b"")
    assert data_check("loveda", f"root={tmp_path / 'world'}", "scene=urban").exit_status == 1


def test_misspelled_setting_of_a_domain_has_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="did you mean train"):
        data_check("synthetic", "tran=2")
