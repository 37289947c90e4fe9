"""A VRT may name image files only: GDAL would also read addresses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio

from overfly.core.errors import DataError
from overfly.data.headers import read_header
from overfly.data.reading import read_image

SOURCE = "<SimpleSource><SourceFilename {0}>{1}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
BAND = f"<VRTRasterBand dataType='Byte' band='1'>{SOURCE}</VRTRasterBand>"


def write_vrt(path: Path, name: str, relative: str = "relativeToVRT='1'") -> Path:
    path.write_text(f"<VRTDataset rasterXSize='20' rasterYSize='10'>{BAND.format(relative, name)}</VRTDataset>")
    return path


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_files_are_read_also_through_another_vrt(tmp_path: Path) -> None:
    pixels = np.arange(200, dtype=np.uint8).reshape(1, 10, 20)
    with rasterio.open(tmp_path / "a &.tif", "w", driver="GTiff", width=20, height=10, count=1, dtype="uint8") as out:
        out.write(pixels)
    write_vrt(tmp_path / "inner.vrt", "a &amp;.tif")
    write_vrt(tmp_path / "outer.vrt", str(tmp_path / "inner.vrt"), "")
    assert np.array_equal(read_image(tmp_path / "outer.vrt", bands=1)[..., 0], pixels[0])


@pytest.mark.parametrize(
    "name",
    ["/vsicurl/http://127.0.0.1:9/a.tif", "http://127.0.0.1:9/a.tif", "&#47;vsis3/bucket/a.tif", "vrt://a.tif?bands=1"],
)
def test_addresses_are_rejected_also_in_another_vrt(tmp_path: Path, name: str) -> None:
    inner = write_vrt(tmp_path / "inner.vrt", name, "relativeToVRT='0'")
    for file in (inner, write_vrt(tmp_path / "outer.vrt", "inner.vrt")):
        with pytest.raises(DataError, match=r"inner\.vrt names .*a VRT may name image files only"):
            read_header(file)


def test_files_that_are_no_images_and_loops_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "service.xml").write_text("<GDAL_WMS><Service name='TMS'/></GDAL_WMS>")
    with pytest.raises(DataError, match=r"service\.xml is text, not"):
        read_header(write_vrt(tmp_path / "a.vrt", "service.xml"))
    with pytest.raises(DataError, match=r"loop\.vrt names loop\.vrt"):
        read_header(write_vrt(tmp_path / "loop.vrt", "loop.vrt"))
