"""Suggest target tiles to label: where candidates disagree, much of the target looks alike, and spread over it.

The tiles S maximize Σ_i a_i · max_{j ∈ S} √d_j · s_ij, a facility-location function (Wei, Iyer and Bilmes, ICML 2015):
a_i is the area of tile i, d_j the disagreement of the candidates on tile j (query by committee, Seung et al., 1992),
s_ij the similarity of two tiles. Tiles are picked one by one, each with the largest gain, which reaches 1 - 1/e of the
maximum (Nemhauser et al., 1978).
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio import CRS, Affine
from rasterio.transform import xy
from torch import Tensor, nn
from torch.nn import functional as F

from overfly.core.atomic_files import file_sha256, read_json, temporary_path, write_json
from overfly.core.classes import Classes
from overfly.core.errors import DataError, RecipeError, render_text
from overfly.core.progress import percent
from overfly.core.records import IGNORE, Array, Item, UInt8
from overfly.core.settings import write_mapping
from overfly.data.check import item_source
from overfly.data.domain import Domain, sample_evenly, without_labels
from overfly.data.reading import Mask, item_header
from overfly.evaluation.images import MetricOptions, predict_scores, resized, to_tensor
from overfly.evaluation.score import evaluation_mode
from overfly.models.segmenter import Segmenter
from overfly.ops.windows import Window, window_grid

MIN_VALID = 0.5
"""Least share of a tile's pixels with data."""
README = Path(__file__).with_name("suggestion.txt")
Floats = NDArray[np.float64]


class Tile(NamedTuple):
    """A window of a target image; ``whole`` if it is the image."""

    item: Item
    window: Window
    whole: bool

    @property
    def name(self) -> str:
        """Name of its files: the image's, with row and column of a window."""
        return self.item.name if self.whole else f"{self.item.name}_r{self.window.top}_c{self.window.left}"


class Pick(NamedTuple):
    """A suggested tile.

    Attributes:
        tile: the tile.
        disagreement: share of its pixels on which two candidates differ, mean over all pairs.
        area: share of the target's area that is more similar to this tile than to the other suggested ones.
        draft: predicted class ids (H, W).
        nodata_mask: pixels without data (H, W); None: none.
    """

    tile: Tile
    disagreement: float
    area: float
    draft: UInt8
    nodata_mask: Mask | None

    @property
    def reason(self) -> str:
        """Why it is suggested."""
        share, area = percent(self.disagreement, 0), percent(self.area, 0)
        return f"candidates disagree on {share} % of it; it resembles {area} % of the target most"


def target_tiles(domain: Domain, side: int | None, limit: int) -> list[Tile]:
    """Cut the training images into windows of at most ``side`` pixels (None: not), and return up to ``limit``, evenly.

    Labels are removed from the domain's items.
    """
    tiles = []
    for item in without_labels(domain.items("train")):
        header = item_header(item)
        size = domain.read_image(item).shape[:2] if header is None else (header.height, header.width)
        grid = window_grid(size[0], size[1], side or max(size), 0)
        tiles += [Tile(item, window, len(grid) == 1) for window in grid]
    return sample_evenly(tiles, limit)


def suggest(
    networks: Sequence[Segmenter], domain: Domain, tiles: Sequence[Tile], count: int, options: MetricOptions
) -> list[Pick]:
    """Pick ``count`` of the tiles of the target ``domain``; the same arguments give the same tiles.

    The first network predicts the drafts, and its features tell which tiles are alike. Of the options, resize, window
    and device are used. Raises `DataError`: fewer than ``count`` tiles have data in half of their pixels.
    """
    found: list[Pick] = []
    vectors: list[Tensor] = []
    with evaluation_mode(nn.ModuleList(networks).to(options.device)), torch.inference_mode():
        for tile, image, nodata_mask in read_tiles(domain, tiles):
            valid = torch.from_numpy(np.ones(image.shape[1:], np.bool_) if nodata_mask is None else ~nodata_mask)
            if float(valid.double().mean()) < MIN_VALID:
                continue
            sized = resized(image, options.resize).to(options.device)
            scores = torch.stack([predict_scores(network, sized, options.window).cpu() for network in networks])
            scores = F.interpolate(scores, image.shape[-2:], mode="bilinear")
            differ = float(disagreement(scores.softmax(1))[valid].mean())
            draft = scores[0].argmax(0).to(torch.uint8).numpy()
            found.append(Pick(tile, differ, float(valid.sum()), draft, nodata_mask))
            vectors.append(tile_features(networks[0], sized))
    if len(found) < count:
        raise DataError(f"{domain.title} has {len(found)} tiles with data, and --count is {count}; lower it or --tile")
    area = np.array([pick.area for pick in found]) / sum(pick.area for pick in found)
    similar = similarity(torch.stack(vectors))
    picked = facility_location(area, np.sqrt([pick.disagreement for pick in found]), similar, count)
    nearest = similar[:, picked].argmax(1)
    return [found[j]._replace(area=float(area[nearest == rank].sum())) for rank, j in enumerate(picked)]


def disagreement(probability: Tensor) -> Tensor:
    """Share of the pairs of N networks whose classes differ, for each pixel (H, W), from probabilities (N, K, H, W).

    Of a single network, the probability that two classes differ that are drawn by its probabilities.
    """
    count, classes = probability.shape[:2]
    if count == 1:
        return 1 - probability[0].square().sum(0)
    votes = F.one_hot(probability.argmax(1), classes).sum(0).double()
    return 1 - (votes * (votes - 1)).sum(-1) / (count * (count - 1))


def similarity(vectors: Tensor) -> Floats:
    """Similarity (N, N), 0 to 1, of rows (N, F): a Gaussian of standardized distances, as wide as half their median."""
    standard = (vectors - vectors.mean(0)) / vectors.std(0, correction=0).clamp_min(1e-6)
    distance = torch.cdist(standard.double(), standard.double())
    width = distance[~torch.eye(len(distance), dtype=torch.bool)].nanmedian().nan_to_num(1.0).clamp_min(1e-6) / 2
    return np.asarray((-((distance / width) ** 2) / 2).exp())


def facility_location(area: Floats, weight: Floats, similar: Floats, count: int) -> list[int]:
    """Pick ``count`` of N rows greedily, of areas (N,), weights (N,) and similarities (N, N).

    Ties, as where all candidates agree, are decided by the gain without weights, then by the order.
    """
    weighted, picked = similar * weight, list[int]()
    for _ in range(count):
        covered = [np.max(values[:, picked], axis=1, initial=0.0)[:, None] for values in (weighted, similar)]
        gains = area @ np.maximum(weighted - covered[0], 0), area @ np.maximum(similar - covered[1], 0)
        rest = (row for row in range(len(area)) if row not in picked)
        picked.append(max(rest, key=lambda row: (gains[0][row], gains[1][row], -row)))
    return picked


def tile_features(network: Segmenter, image: Tensor) -> Tensor:
    """Mean of the features of an image at half its size (F,); without features, of the class probabilities."""
    logits = network(F.interpolate(image[None], scale_factor=0.5, mode="bilinear", antialias=True))
    maps = logits.main.softmax(1) if logits.features is None else logits.features
    return maps[0].mean((-2, -1)).float().cpu()


def read_tiles(domain: Domain, tiles: Sequence[Tile]) -> Iterator[tuple[Tile, Tensor, Mask | None]]:
    """Read tiles (C, H, W) with their no-data mask (H, W); an image once, if its tiles follow each other."""
    for item, group in groupby(tiles, key=lambda tile: tile.item):
        image, nodata_mask = domain.read_image(item), domain.nodata_mask(item)
        for tile in group:
            part = tile.window.rows, tile.window.columns
            yield tile, to_tensor(image[part]), None if nodata_mask is None else nodata_mask[part]


def write_suggestion(picks: Sequence[Pick], domain: Domain, out: Path, about: Mapping[str, Any]) -> None:
    """Write tiles of the target, empty masks, drafts, outlines, classes and instructions into a folder.

    ``about`` is stored in ``suggestion.json``. Raises `RecipeError`: ``out`` holds other files, or masks that were
    corrected.
    """
    check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(out, folder=True) as part:
        files = [_write_tile(pick, domain, part) for pick in picks]
        rows = [
            {
                "rank": rank, "tile": pick.tile.name, "image": item_source(pick.tile.item), "reason": pick.reason,
                "disagreement": pick.disagreement, "area": pick.area, "window": list(pick.tile.window),
            }
            for rank, pick in enumerate(picks, 1)
        ]  # fmt: skip
        _write_outlines(part / "tiles.gpkg", picks, rows)
        names = domain.classes.names
        colors = {name: list(color) for name, color in zip(names, domain.classes.colors, strict=True)}
        write_mapping(part / "classes.yaml", {"classes": colors, "ids": {name: i for i, name in enumerate(names)}})
        numbers = "\n".join(f"   {number:>3}  {name}" for number, name in enumerate(names))
        text = render_text(README, example=files[0], numbers=numbers, folder=out) + "\n"
        (part / "README.txt").write_text(text, encoding="utf-8")
        write_json(part / "suggestion.json", {**about, "tiles": rows, "files": _digests(part)})
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)


def check_replaceable(out: Path) -> None:
    """Raise `RecipeError` if a path exists and is neither an empty folder nor an unchanged suggestion."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    known: dict[str, str] = {}
    with suppress(OSError, ValueError, KeyError):
        known = read_json(out / "suggestion.json")["files"]
    if not known:
        raise RecipeError(f"--out: {out} exists and was not written by overfly suggest; choose another folder")
    changed = [name for name, digest in _digests(out).items() if known.get(name) != digest]
    if changed:
        raise RecipeError(f"--out: {out / changed[0]} was changed and is not overwritten; choose another folder")


def _digests(folder: Path) -> dict[str, str]:
    """Digest of each mask and draft of a folder, by its path there."""
    files = sorted(file for kind in ("masks", "drafts") for file in (folder / kind).glob("*"))
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def _write_tile(pick: Pick, domain: Domain, folder: Path) -> str:
    """Write image, empty mask and draft of a tile; return the name of the mask's file."""
    (item, window, whole), grid = pick.tile, _grid(pick.tile)
    for kind in ("images", "masks", "drafts"):
        (folder / kind).mkdir(exist_ok=True)
    if whole and isinstance(item.image, Path):
        shutil.copy(item.image, folder / "images" / f"{item.name}{item.image.suffix}")
    else:
        image = np.moveaxis(domain.read_image(item)[window.rows, window.columns], -1, 0)
        plain = not grid and pick.nodata_mask is None and image.dtype == np.uint8 and len(image) in (1, 3)
        path = folder / "images" / f"{pick.tile.name}{'.png' if plain else '.tif'}"
        _write_raster(path, image, grid, nodata_mask=pick.nodata_mask)
    name = f"{pick.tile.name}{'.tif' if grid else '.png'}"
    for kind, ids in (("masks", np.full_like(pick.draft, IGNORE)), ("drafts", pick.draft)):
        _write_raster(folder / kind / name, ids[None], grid, domain.classes)
    return name


def _grid(tile: Tile) -> dict[str, Any]:
    """Transform of a tile's pixels, and coordinate reference system if known, as rasterio takes them; else empty."""
    header = item_header(tile.item)
    if header is None or header.transform is None:
        return {}
    whole = Affine.from_gdal(*header.transform)
    left, top = map(float, xy(whole, tile.window.top, tile.window.left, offset="ul"))
    transform = Affine(whole.a, whole.b, left, whole.d, whole.e, top)
    return {"transform": transform, "crs": CRS.from_wkt(header.crs) if header.crs else None}


def _write_raster(
    path: Path, bands: Array, grid: Mapping[str, Any], classes: Classes | None = None, nodata_mask: Mask | None = None
) -> None:
    """Write bands (C, H, W) as PNG or GeoTIFF, by the suffix; of ``classes`` with their colors, empty where 255."""
    options = dict(grid) if path.suffix == ".png" else {**grid, "compress": "deflate"}
    options |= {"nodata": IGNORE} if grid and classes else {}
    count, height, width = bands.shape
    with warnings.catch_warnings(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        warnings.simplefilter("ignore")  # images without georeference
        with rasterio.open(
            path, "w", driver="PNG" if path.suffix == ".png" else "GTiff", dtype=bands.dtype, count=count,
            height=height, width=width, **options,
        ) as dataset:  # fmt: skip
            dataset.write(bands)
            if nodata_mask is not None:
                dataset.write_mask(~nodata_mask)
            if classes is not None:
                dataset.write_colormap(1, {**dict(enumerate(classes.colors)), IGNORE: (0, 0, 0)})


def _write_outlines(path: Path, picks: Sequence[Pick], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write outlines as GeoPackage, a layer for each system; without one in columns and minus rows, as in QGIS."""
    import pyogrio.raw
    import shapely

    layers: dict[str | None, list[tuple[Any, Mapping[str, Any]]]] = {}
    for pick, row in zip(picks, rows, strict=True):
        grid, (top, left, height, width) = _grid(pick.tile), pick.tile.window
        transform = grid.get("transform", Affine(1, 0, left, 0, -1, -top))
        xs, ys = xy(transform, [0, 0, height, height], [0, width, width, 0], offset="ul")
        crs = grid["crs"].to_wkt() if grid.get("crs") else None
        layers.setdefault(crs, []).append((shapely.polygons(np.stack([xs, ys], axis=1)), row))
    types = {"rank": np.int32, "tile": object, "image": object, "reason": object, "disagreement": float, "area": float}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no coordinate reference system
        for number, (crs, members) in enumerate(layers.items(), 1):
            pyogrio.raw.write(
                str(path), shapely.to_wkb([polygon for polygon, _ in members]),
                [np.array([row[name] for _, row in members], kind) for name, kind in types.items()], list(types),
                layer="tiles" if number == 1 else f"tiles {number}", crs=crs, geometry_type="Polygon", driver="GPKG",
            )  # fmt: skip
