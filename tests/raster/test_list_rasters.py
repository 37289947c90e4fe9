from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from overfly.core.errors import DataError
from overfly.raster.manifest import MapSettings, output_files
from overfly.raster.parallel import check_distinct_outputs, list_rasters


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    for name in ("a/1.tif", "a/10.tif", "a/2.png", "a/notes.txt", "b/1.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_list_rasters_takes_files_folders_and_globs(scenes: Path) -> None:
    out = scenes / "maps"
    assert list_rasters([f"{scenes}/a/1.tif"], scenes / "one.tif") == {f"{scenes}/a/1.tif": scenes / "one.tif"}
    result = list_rasters([f"{scenes}/a"], out)
    assert [Path(name).name for name in result] == ["1.tif", "2.png", "10.tif"]
    assert result[f"{scenes}/a/2.png"] == out / "2.tif"
    assert set(list_rasters([f"{scenes}/*/1.tif"], out).values()) == {out / "a/1.tif", out / "b/1.tif"}
    assert len(list_rasters([f"{scenes}/a", f"{scenes}/a/1.tif"], out)) == 3


def test_addresses_with_wildcards_are_listed() -> None:
    system = fsspec.filesystem("memory")
    system.pipe({"/bucket/x/1.tif": b"", "/bucket/x/2.tif": b""})
    result = list_rasters(["memory://bucket/x/*.tif", "https://example.org/c.tif?sign=1"], Path("maps"))
    assert list(result) == ["memory:///bucket/x/1.tif", "memory:///bucket/x/2.tif", "https://example.org/c.tif?sign=1"]
    assert result["https://example.org/c.tif?sign=1"] == Path("maps/c.tif")


@pytest.mark.parametrize(
    ("entries", "out", "match"),
    [
        (["{}/a"], "one.tif", "--out"),
        (["{}/none/*.tif"], "maps", "none"),
        (["{}"], "maps", "."),
        (["{}/a"], "a/notes.txt", "--out"),
        ([], "maps", "."),
        (["no://where/*.tif"], "maps", "no://where"),
    ],
)
def test_entries_without_rasters_are_errors(scenes: Path, entries: list[str], out: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        list_rasters([entry.replace("{}", str(scenes)) for entry in entries], scenes / out)


def test_outputs_must_be_distinct(scenes: Path) -> None:
    out = scenes / "maps"
    outputs = list_rasters([f"{scenes}/a", f"{scenes}/b"], out)
    with pytest.raises(DataError, match=r"1\.tif"):
        check_distinct_outputs({source: [path] for source, path in outputs.items()})
    products = {"a.tif": MapSettings(probabilities=True), "a_probabilities.tif": MapSettings()}
    with pytest.raises(DataError, match=r"a\.tif .*a_probabilities\.tif"):
        check_distinct_outputs(
            {name: output_files(out / name, settings).values() for name, settings in products.items()}
        )
