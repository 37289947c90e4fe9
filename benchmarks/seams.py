"""A figure of a map: image | map | the same corner without and with overlapping windows.

    python benchmarks/seams.py --network RUN [--size 768] [--window 128] [--out docs/images/raster.png]

The network should be trained on synthetic images. White lines at the borders of small images mark
where windows meet.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio import Affine

from overfly.commands.load_predictor import load_predictor
from overfly.data.synthetic import synthesize
from overfly.raster.manifest import MapSettings
from overfly.raster.map_raster import map_raster

ZOOM = 3


def main() -> None:
    """Synthesize a scene, predict it twice, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path, required=True)
    parser.add_argument("--scene", default="rural")
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("docs/images/raster.png"))
    settings = parser.parse_args()
    predictor = load_predictor(settings.network, device="cpu")
    image = synthesize(settings.scene, "test", 3, settings.size)[0]
    maps = []
    with tempfile.TemporaryDirectory() as folder:
        raster, transform = Path(folder) / "raster.tif", Affine(0.3, 0, 300_000, 0, -0.3, 2_700_000)
        how = {"driver": "GTiff", "count": 3, "dtype": "uint8", "crs": "EPSG:32640", "transform": transform}
        with rasterio.open(raster, "w", width=settings.size, height=settings.size, **how) as result:
            result.write(np.moveaxis(image, -1, 0))
        for overlap in (0.0, 0.25):
            out = Path(folder) / f"{overlap}.tif"
            chosen = MapSettings(window=settings.window, overlap=overlap)
            map_raster(predictor, str(raster), out, chosen, network="seams")
            with rasterio.open(out) as actual:
                maps.append(predictor.metadata.classes.paint(actual.read(1)))
    part = slice(settings.window // 2, settings.window // 2 + settings.size // ZOOM)
    corners = [np.kron(each[part, part], np.ones((ZOOM, ZOOM, 1), np.uint8)) for each in maps]
    for corner in corners:
        for border in range(settings.window // 2, settings.size // ZOOM, settings.window):
            corner[: 4 * ZOOM, ZOOM * border] = corner[ZOOM * border, : 4 * ZOOM] = 255
    gap = np.full((settings.size, 8, 3), 255, np.uint8)
    row = [image, gap, maps[1], gap, corners[0][: settings.size], gap, corners[1][: settings.size]]
    pixels = Image.fromarray(np.concatenate(row, axis=1))
    pixels.resize((pixels.width // 2, pixels.height // 2), Image.Resampling.LANCZOS).quantize(96).save(settings.out)
    print(settings.out, settings.out.stat().st_size)


if __name__ == "__main__":
    main()
