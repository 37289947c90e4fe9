"""Labels of whole rasters: polygons or rasters of any grid, converted once to class ids on the image's grid."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio import CRS, Affine, warp
from rasterio.features import rasterize
from rasterio.vrt import WarpedVRT

from overfly.core.atomic_files import append_digest, atomic_write, has_digest, json_sha256, lock
from overfly.core.download import cache_folder
from overfly.core.errors import DataError, import_extra
from overfly.core.progress import Progress
from overfly.core.records import IGNORE, Counts, UInt8
from overfly.data import reading
from overfly.data.domain import UnknownCodesError
from overfly.data.headers import OPTIONS, file_stamp, gdal_errors, keep_raster, read_raster_header
from overfly.data.loading import cached_entry
from overfly.data.raster_grid import Bounds, Grid, open_grid
from overfly.data.reading import Mask
from overfly.ops.windows import Window

if TYPE_CHECKING:
    from overfly.data.raster import Raster

VECTOR_FORMATS = {
    ".gpkg": b"SQLite format 3\0", ".fgb": b"fgb\x03", ".shp": b"\0\0\x27\x0a", ".geojson": b"{", ".json": b"{",
}  # fmt: skip
"""File name suffixes of vector files, and their first bytes."""
TILE = 512
"""Side of the tiles of converted labels, in pixels."""
VERSION = 2
"""Version of converted labels; those of other versions are made again."""
SHOWN = 8
"""Most values that a message lists."""
Burn = Callable[[Window], UInt8]
"""Converts the labels of a window to class ids (H, W)."""
_CONVERTED: dict[str, tuple[Path, Counts]] = {}
"""Converted labels that this process has checked or made, by key."""


class VectorFile(NamedTuple):
    """A layer of a vector file: its coordinate reference system as WKT, and the names of its attributes."""

    path: Path
    layer: str | None
    crs: str
    attributes: tuple[str, ...]

    def read(
        self, grid: Grid, window: Window | None, attribute: str | None = None, *, shapes: bool = True
    ) -> tuple[NDArray[Any], list[str | None]]:
        """Read the polygons of a window, or of a whole raster, in its coordinates, and the values of an attribute.

        Raises `DataError`: the file is damaged, has no such attribute, or holds other geometries.
        """
        import pyogrio
        import shapely

        if attribute not in (None, *self.attributes):
            known = ", ".join(self.attributes) or "none"
            raise DataError(f"{self.path} has no attribute {attribute}; its attributes: {known}")
        box, same = grid.bounds(window), self.crs in ("", grid.crs)
        with _vector_errors(self.path):
            box = box if same else warp.transform_bounds(grid.crs, self.crs, *box, densify_pts=101)
            _, ids, geometry, fields = pyogrio.raw.read(
                self.path, layer=self.layer, columns=[attribute] if attribute else [], bbox=box, force_2d=True,
                read_geometry=shapes, return_fids=True,
            )  # fmt: skip
            order = np.argsort(ids, kind="stable")
            polygons = shapely.from_wkb(geometry[order]) if shapes else np.empty(len(ids), object)
            if shapes and not same:
                polygons = shapely.transform(
                    polygons, lambda points: np.stack(warp.transform(self.crs, grid.crs, *points.T.tolist()), axis=1)
                )
        other = {str(shape.geom_type) for shape in polygons if shape is not None} - {"Polygon", "MultiPolygon"}
        if other:
            raise DataError(f"{self.path} holds {', '.join(sorted(other))}; give a file of polygons")
        return polygons, [_text(value) for value in fields[0][order]] if attribute else [None] * len(ids)

    def mask(self, grid: Grid, window: Window, shape: tuple[int, int] | None = None) -> Mask:
        """Pixels of a window (H, W), or cells of ``shape`` that are touched, in the polygons of this small file."""
        size = shape or (window.height, window.width)
        down, across = window.height / size[0], window.width / size[1]
        factors = (1.0, across, down, 1.0, across, down)
        transform = [n * factor for n, factor in zip(grid.geotransform(window), factors, strict=True)]
        pairs = [(each, 1) for each in _all_polygons(self, grid)]
        return np.asarray(_burn(pairs, transform, size, 0, all_touched=shape is not None), np.bool_)


@lru_cache(maxsize=64)
def _all_polygons(vector: VectorFile, grid: Grid) -> NDArray[Any]:
    return vector.read(grid, None)[0]


def open_vector(path: Path, layer: str | None, grids: Sequence[Grid]) -> VectorFile:
    """Read the header of a vector file, and check that it fits rasters.

    Raises `MissingExtraError` without pyogrio or shapely, and `DataError`: the file cannot be read, has several layers
    and none is given, lies elsewhere than all rasters, or file or raster lack a coordinate reference system.
    """
    from rasterio import CRS

    pyogrio, _ = (import_extra(package, "vector", f"polygons in {path}") for package in ("pyogrio", "shapely"))

    if not path.is_file():
        raise DataError(f"{path} is not a file; give a GeoPackage, GeoJSON, Shapefile or FlatGeobuf")
    with path.open("rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")
    if not start.startswith(VECTOR_FORMATS.get(path.suffix.lower(), b"no format")):
        raise DataError(f"{path} is not a GeoPackage, GeoJSON, Shapefile or FlatGeobuf of that suffix; export it again")
    with _vector_errors(path):
        layers = [str(name) for name, geometry in pyogrio.list_layers(path) if geometry]
        if layer not in (layers if layer or len(layers) > 1 else [None]):
            raise DataError(f"{path} has the layers {', '.join(layers)}; set layer to one of them")
        info = pyogrio.read_info(path, layer=layer, force_feature_count=True, force_total_bounds=True)
        crs = CRS.from_user_input(info["crs"]).to_wkt() if info["crs"] else ""
    if not info["features"] or info["total_bounds"] is None:
        raise DataError(f"{path} holds no polygons; export it again")
    check_overlap(path, crs, info["total_bounds"], grids)
    return VectorFile(path, layer, crs, tuple(info["fields"]))


def check_overlap(path: Path | str, crs: str, bounds: Bounds, grids: Sequence[Grid], *, needed: bool = True) -> bool:
    """Return whether a file overlaps one of some rasters.

    Raises `DataError`: it or a raster has no coordinate reference system, or it overlaps none and it is ``needed``.
    """
    own = place = bounds
    for grid in grids:
        if bool(crs) != bool(grid.crs):
            without, other = (path, grid.source) if grid.crs else (grid.source, path)
            raise DataError(
                f"{without} has no coordinate reference system, and {other} has one; assign one to {without}, such as "
                "with gdal_edit -a_srs EPSG:32633 for a raster or ogr2ogr -a_srs EPSG:32633 for polygons"
            )
        with gdal_errors(path):
            own = bounds if crs == grid.crs else warp.transform_bounds(crs, grid.crs, *bounds, densify_pts=101)
        place = grid.bounds()
        if own[0] < place[2] and own[2] > place[0] and own[1] < place[3] and own[3] > place[1]:
            return True
    if needed:
        shown = [", ".join(f"{value:.6g}" for value in box) for box in (own, place)]
        raise DataError(
            f"{path} does not overlap {grids[-1].source}: in the raster's coordinates it covers {shown[0]}, the raster "
            f"{shown[1]} (left, bottom, right, top); give labels of this place, or correct the coordinate reference "
            "system of one of them"
        )
    return False


def labels_key(domain: "Raster", grid: Grid) -> str:
    """Hash of everything that the converted labels of a raster depend on; opens no labels."""
    stamps = [(path, file_stamp(path)) for path in map(str, filter(None, (*domain.label_files(), domain.area)))]
    unused = {"title", "images", "splits", "seed", "gap", "mean", "std", "bands", "max_value", "nodata"}
    settings = {name: value for name, value in domain.model_dump(mode="json").items() if name not in unused}
    if grid.transform is None:  # the labels are then those of this image alone
        stamps.append((str(grid.source), file_stamp(grid.source)))
    return json_sha256([VERSION, settings, stamps, grid.crs, grid.geotransform(), grid.rows, grid.columns])


def converted_labels(domain: "Raster", grid: Grid, key: str) -> tuple[Path, Counts]:
    """Convert the labels of a raster to class ids on its grid, block by block, unless the cache has `labels_key`.

    Returns a GeoTIFF of class ids, 255 where ignored, and the pixels of each class in each block (rows, columns, K).
    Raises `DataError`: the labels cannot be read, do not fit the raster, or hold values of no class.
    """
    if key in _CONVERTED:
        return _CONVERTED[key]
    folder = cache_folder() / "labels"
    path = folder / f"{key}.tif"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / f"{key}.lock"):
            if not has_digest(path, key):
                (folder / key[:2] / f"{key}.npy").unlink(missing_ok=True)
            counts = cached_entry(folder, key, lambda: _convert(domain, grid, path, key))
    except OSError as error:
        raise DataError(f"the cache {folder} cannot be written ({error.strerror}); free space in it") from None
    _CONVERTED[key] = path, counts
    return path, counts


def _convert(domain: "Raster", grid: Grid, path: Path, key: str) -> Counts:
    """Write the class ids of all pixels, and count them by block; raise `DataError` for values of no class."""
    area, unknown = domain.open_area(), Counter[reading.Code]()
    counts: Counts = np.zeros((*grid.shape, 256), np.int64)
    profile = {"driver": "GTiff", "width": grid.width, "height": grid.height, "count": 1, "dtype": "uint8"}
    place = {"crs": grid.crs or None, "transform": Affine.from_gdal(*grid.geotransform()), "nodata": IGNORE}
    tiled = {"tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "deflate", "zlevel": 1}
    with Progress("rows of blocks") as progress, atomic_write(path) as part:
        with gdal_errors(path), rasterio.Env(**OPTIONS), warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")  # rasters without a georeference
            rows = _polygon_rows(domain, grid) if domain.has_polygons else _raster_rows(domain, grid, stack)
            out = stack.enter_context(rasterio.open(part, "w", **profile, **place, **tiled, bigtiff="if_safer"))
            for row, burn in enumerate(rows):
                for column, window in enumerate(grid.block(row, column) for column in range(grid.shape[1])):
                    try:
                        label = burn(window)
                    except UnknownCodesError as error:
                        unknown += error.codes
                        continue
                    if area is not None:
                        label[~area.mask(grid, window)] = IGNORE
                    out.write(label, 1, window=window.ranges)
                    counts[row, column] = np.bincount(label.ravel(), minlength=256)
                progress.update(f"labels of {Path(grid.source).name}", row + 1, grid.shape[0])
        if unknown:
            share, codes = unknown.total() / (grid.height * grid.width), (code for code, _ in unknown.most_common(9))
            paste = ", ".join(str(list(code) if isinstance(code, tuple) else code) for code in codes)
            raise UnknownCodesError(
                f"{domain.labels} holds values of no class in {share:.1%} of its pixels: {reading.list_codes(unknown)}"
                f"; add them to ids or colors, or set ignore: [{paste}]",
                unknown,
            )
        with part.open("r+b") as file:
            append_digest(file, key)
    return counts[..., : len(domain.classes)]


def _polygon_rows(domain: "Raster", grid: Grid) -> Iterator[Burn]:
    """Yield the conversion of each row of blocks; its polygons are read together."""
    import shapely

    if grid.transform is None and len(domain.grids()) > 1:
        raise DataError(f"{grid.source} has no georeference to place polygons by; give it one, or give one such image")
    vector = open_vector(Path(domain.label_files()[0]), domain.layer, domain.grids())
    table = _class_table(domain, vector, grid)
    fill = IGNORE if domain.background is None else domain.classes.index(domain.background)
    for top, bottom in zip(grid.rows, grid.rows[1:], strict=False):
        shapes, values = vector.read(grid, Window(top, 0, bottom - top, grid.width), domain.attribute)
        ids = np.array([table[value] for value in values], np.uint8)
        if domain.overlap == "smallest":
            order = np.argsort(-shapely.area(shapes), kind="stable")
            shapes, ids = shapes[order], ids[order]
        tree = shapely.STRtree(shapes)

        def burn(window: Window, shapes: Any = shapes, ids: UInt8 = ids, tree: Any = tree) -> UInt8:
            found = np.sort(tree.query(shapely.box(*grid.bounds(window))))
            pairs = [(shapes[index], int(ids[index])) for index in found]
            size = (window.height, window.width)
            return _burn(pairs, grid.geotransform(window), size, fill, all_touched=domain.all_touched)

        yield burn


def _class_table(domain: "Raster", vector: VectorFile, grid: Grid) -> dict[str | None, int]:
    """Class id of each value of the attribute; raise `DataError` for values of no class."""
    names = [name for name in domain.classes.names if name != domain.background]
    if domain.attribute is None and len(names) > 1:
        known = ", ".join(vector.attributes) or "none"
        raise DataError(f"{vector.path} needs the attribute that holds the class; set attribute to one of: {known}")
    if domain.attribute is None:
        return {None: domain.classes.index(names[0])}
    values = Counter(vector.read(grid, None, domain.attribute, shapes=False)[1])
    classes = domain.value_ids()
    unknown = Counter({str(value): values[value] for value in values if value not in (None, *classes)})
    if unknown and domain.unknown == "error":
        shown = unknown.most_common(SHOWN)
        listed = ", ".join(f"{value} ({count / values.total():.1%})" for value, count in shown)
        raise DataError(
            f"{vector.path} holds values of {domain.attribute} that are not a class in "
            f"{unknown.total() / values.total():.1%} of its polygons: {listed}{', …' * (len(unknown) > SHOWN)}; give "
            f"each a class, or null to ignore it: mapping: {{{', '.join(f'{value}: null' for value, _ in shown)}}}"
        )
    return {value: classes.get(value or "", IGNORE) for value in values}


def _raster_rows(domain: "Raster", grid: Grid, stack: ExitStack) -> Iterator[Burn]:
    """Yield the conversion of labels in rasters, the same for each row of blocks; the first that has a class counts."""
    files = domain.label_files()
    if grid.transform is None and (len(files) > 1 or len(domain.grids()) > 1):
        found = [path for path in files if Path(path).stem == Path(grid.source).stem]
        if len(found) != 1:
            raise DataError(
                f"{grid.source} has no georeference, and {len(found)} of {len(files)} label files have its name; give "
                "each such image one label file of the same name, or georeference both"
            )
        files = found
    labels = [open_grid(path, file_stamp(path), grid.height, None) for path in files]
    if len(labels) == 1:
        check_overlap(files[0], labels[0].crs, labels[0].bounds(), domain.grids())
    labels = [each for each in labels if check_overlap(each.source, each.crs, each.bounds(), [grid], needed=False)]
    datasets = [_aligned(label, grid, stack) for label in labels]

    def burn(window: Window) -> UInt8:
        result: UInt8 = np.full((window.height, window.width), IGNORE, np.uint8)
        for label, dataset in zip(labels, datasets, strict=True):
            header = read_raster_header(label.source)
            with gdal_errors(label.source):
                outside = None
                if label.transform is not None:
                    header = header._replace(masked=False)
                    outside = dataset.read(dataset.count, window=window.ranges) == 0
                pixels = reading.decode_label(label.source, header, dataset, window=window.ranges)
            pixels = pixels._replace(masked=reading.union(pixels.masked, outside))
            result = np.where(result == IGNORE, domain.decode(label.source, pixels), result)
        return result

    for _ in range(grid.shape[0]):
        yield burn


def _aligned(label: Grid, grid: Grid, stack: ExitStack) -> Any:
    """Open a raster of labels on another grid, by nearest neighbor; its last band is 0 where it has no label."""
    dataset = stack.enter_context(keep_raster(label.source))
    if label.transform is None or grid.transform is None:
        if (label.height, label.width, label.transform) != (grid.height, grid.width, grid.transform):
            raise DataError(
                f"{label.source} is {label.width}×{label.height} pixels, its raster {grid.source} {grid.width}×"
                f"{grid.height}, one without a georeference; export both at the same size, or with their georeference"
            )
        return dataset
    plane = CRS.from_epsg(3857)  # of files without a coordinate reference system, which are in one plane
    crs = [CRS.from_wkt(text) if text else plane for text in (label.crs, grid.crs)]
    return stack.enter_context(WarpedVRT(
        dataset, src_crs=crs[0], crs=crs[1], transform=Affine.from_gdal(*grid.geotransform()), width=grid.width,
        height=grid.height, src_nodata=None, nodata=None, add_alpha=not read_raster_header(label.source).alpha,
    ))  # fmt: skip


def _burn(
    pairs: Sequence[tuple[Any, int]], at: Sequence[float], shape: tuple[int, int], fill: int, *, all_touched: bool
) -> UInt8:
    """Burn polygons into an array, each over those before it; ``at`` is the array's transform in GDAL's order."""
    pairs = [(polygon, value) for polygon, value in pairs if polygon is not None and not polygon.is_empty]
    burned: UInt8 = np.full(shape, fill, np.uint8)
    place = Affine.from_gdal(*at)
    return rasterize(pairs, out=burned, transform=place, all_touched=all_touched) if pairs else burned


@contextmanager
def _vector_errors(path: Path) -> Iterator[None]:
    """Convert all errors of pyogrio and shapely as `gdal_errors`, and ignore warnings."""
    import shapely

    with gdal_errors(path), warnings.catch_warnings(action="ignore"):
        try:
            yield
        except (RuntimeError, shapely.errors.ShapelyError) as error:
            raise ValueError(str(error)) from None


def _text(value: object) -> str | None:
    """Value of an attribute as text; whole numbers without decimals; None if there is none."""
    if value is None or value == "" or value != value:  # noqa: PLR0124 - NaN
        return None
    return str(int(value)) if isinstance(value, float | np.floating) and value.is_integer() else str(value)
