"""Miniatures of public data sets, with the names, folders and encodings of their publishers."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

from overfly.core.records import Array

SIDE = 64
Code = int | tuple[int, int, int]
ISPRS: list[Code] = [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0), (0, 0, 0)]
TRAIN_IDS = dict(zip([7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33], range(19), strict=True))
"""Class of each number of Cityscapes' labelIds."""
SYNTHIA = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 9, 10: 10, 17: 11, 8: 12, 19: 13, 12: 14, 11: 15}
"""Class of each number of SYNTHIA, among the 16 in Cityscapes' order."""


def save(path: Path, pixels: Array) -> None:
    """Write (H, W), (H, W, 3) or more bands by the name's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".png", ".jpg") and pixels.dtype == np.uint8:
        Image.fromarray(pixels).save(path)
        return
    bands = np.moveaxis(np.atleast_3d(pixels), -1, 0)
    driver = {".tif": "GTiff", ".png": "PNG"}[path.suffix]
    profile = {"width": bands.shape[2], "height": bands.shape[1], "count": len(bands), "dtype": bands.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver=driver, **profile) as file:
            file.write(bands)


def image(path: Path, bands: int = 3) -> None:
    """Write noise that depends on the name."""
    random = np.random.default_rng(zlib.crc32(str(path).encode()))
    save(path, random.integers(1, 255, (SIDE, SIDE, bands), np.uint8))


def pattern(codes: Sequence[Code]) -> Array:
    """A label with stripes of all codes in turn, (H, W) or (H, W, 3)."""
    stripes = np.arange(SIDE) * len(codes) // SIDE
    return np.array(codes, np.uint8)[np.broadcast_to(stripes, (SIDE, SIDE))]


def pairs(root: Path, images: str, labels: str | None, names: Sequence[str], codes: Sequence[Code]) -> None:
    """Write an image and a label for each name, which replaces ``@`` in both paths."""
    for name in names:
        image(root / images.replace("@", name))
        if labels is not None:
            save(root / labels.replace("@", name), pattern(codes))


def potsdam(root: Path) -> None:
    for name in ("2_10", "6_7", "7_12", "2_13", "5_15", "7_13"):
        for folder, bands in (("2_Ortho_RGB", 3), ("3_Ortho_IRRG", 3), ("4_Ortho_RGBIR", 4)):
            image(root / folder / f"top_potsdam_{name}_{folder[8:]}.tif", bands)
        codes: list[Code] = [*ISPRS[:4], (252, 255, 0), *ISPRS[5:6]] if name == "6_7" else ISPRS[:6]
        save(root / f"5_Labels_all/top_potsdam_{name}_label.tif", pattern(codes))
        save(root / f"5_Labels_all_noBoundary/top_potsdam_{name}_label_noBoundary.tif", pattern(ISPRS))


def vaihingen(root: Path) -> None:
    truth = "ISPRS_semantic_labeling_Vaihingen_ground_truth"
    for name in ("1", "11", "37", "2", "38"):
        pairs(root, "top/top_mosaic_09cm_area@.tif", f"{truth}_COMPLETE/top_mosaic_09cm_area@.tif", [name], ISPRS[:6])
        save(root / f"{truth}_eroded_COMPLETE/top_mosaic_09cm_area{name}_noBoundary.tif", pattern(ISPRS))


def openearthmap(root: Path) -> None:
    for region, numbers, labels in (
        ("aachen", "123", "labels"),
        ("christchurch", "12", "labels"),
        ("christchurch", "3", None),
    ):
        names = [f"{region}_{number}" for number in numbers]
        path = labels and f"{region}/labels/@.tif"
        pairs(root, f"{region}/images/@.tif", path, names, range(9))
    (root / "train.txt").write_text("aachen_1.tif\naachen_2.tif\nchristchurch_1.tif\nsantarosa-wildfire_7.tif\n")
    (root / "val.txt").write_text("aachen_3.tif\nchristchurch_2.tif\n")
    (root / "test.txt").write_text("christchurch_3.tif\n")


def flair(root: Path) -> None:
    places = {"D013_2020": 10, "D070_2021": 1, "D067_2021": 10, "D077_2021": 1, "D012_2019": 1}
    for place, count in places.items():
        part, split = ("1_", "test") if place == "D012_2019" else ("", "train")
        for number in range(count):
            file = f"{int(place[1:4]):03}{number:03}"
            image(root / f"flair_{part}aerial_{split}/{place}/Z1_NN/img/IMG_{file}.tif", bands=5)
            save(root / f"flair_{part}labels_{split}/{place}/Z1_NN/msk/MSK_{file}.tif", pattern(range(1, 20)))


def landcoverai(root: Path) -> None:
    names = [f"M-33-20-D-c-4-2_{number}" for number in range(4)]
    pairs(root, "output/@.jpg", "output/@_m.png", names, range(5))
    pairs(root, "images/@.tif", "masks/@.tif", [f"N-33-{number}" for number in range(12)], range(5))
    for file, listed in (("train", names[:2]), ("val", names[2:3]), ("test", names[3:])):
        (root / f"{file}.txt").write_text("\n".join(listed))


def deepglobe(root: Path) -> None:
    colors: list[Code] = [
        (0, 255, 255),
        (255, 255, 0),
        (255, 0, 255),
        (0, 255, 0),
        (0, 0, 255),
        (250, 255, 255),
        (5, 0, 0),
    ]
    pairs(root, "train/@_sat.jpg", "train/@_mask.png", [str(number) for number in range(100, 112)], colors)
    pairs(root, "valid/@_sat.jpg", None, ["7"], colors)


def inria(root: Path) -> None:
    names = [
        f"{city}{number}" for city in ("austin", "chicago", "kitsap", "tyrol-w", "vienna") for number in (1, 6, 10, 36)
    ]
    folder = "AerialImageDataset/train"
    pairs(root, f"{folder}/images/@.tif", f"{folder}/gt/@.tif", names, [0, 255])
    pairs(root, "AerialImageDataset/test/images/@.tif", None, ["bellingham1"], [])


def uavid(root: Path) -> None:
    colors: list[Code] = [
        (0, 0, 0), (128, 0, 0), (128, 64, 128), (0, 128, 0), (128, 128, 0), (64, 0, 128), (192, 0, 192), (64, 64, 0),
    ]  # fmt: skip
    for split, sequence, labels in (
        ("train", 1, "Labels"),
        ("train", 2, "Labels"),
        ("val", 16, "Labels"),
        ("test", 21, ""),
    ):
        folder = f"uavid_{split}/seq{sequence}"
        pairs(
            root, f"{folder}/Images/@.png", f"{folder}/Labels/@.png" if labels else None, ["000000", "000100"], colors
        )


def cityscapes(root: Path) -> None:
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "lindau"), ("test", "berlin")):
        name = f"{split}/{city}/{city}_000000_000019"
        pairs(root, "leftImg8bit/@_leftImg8bit.png", "gtFine/@_gtFine_labelIds.png", [name], range(34))
        save(root / f"gtFine/{name}_gtFine_color.png", np.zeros((SIDE, SIDE, 3), np.uint8))


def gta5(root: Path) -> None:
    for name in ("00001", "00002", "00003"):
        image(root / f"images/{name}.png")
        label = Image.fromarray(pattern(range(35)), "P")
        label.putpalette([(7 * value) % 256 for value in range(768)])
        (root / "labels").mkdir(exist_ok=True)
        label.save(root / f"labels/{name}.png")


def synthia(root: Path) -> None:
    for name in ("0000000", "0000001", "0000002"):
        image(root / f"RGB/{name}.png")
        label = pattern(range(23)).astype(np.uint16)
        save(root / f"GT/LABELS/{name}.png", np.stack([label, label * 7 + 300, label * 0], axis=-1))


def acdc(root: Path) -> None:
    for split in ("train", "val", "test"):
        for condition in ("fog", "night", "rain", "snow"):
            name = f"{condition}/{split}/GOPR0475/GOPR0475_frame_00004{len(condition)}"
            labels = "gt/@_gt_labelTrainIds.png" if split != "test" else None
            pairs(root, "rgb_anon/@_rgb_anon.png", labels, [name], [*range(19), 255])
            image(root / f"rgb_anon/{condition}/{split}_ref/GOPR0475/{name[-6:]}_rgb_ref_anon.png")


def loveda(root: Path) -> None:
    for split, number in (("Train", 0), ("Val", 10), ("Test", 20)):
        for scene, first in (("Rural", 1), ("Urban", 3)):
            folder, names = f"{split}/{scene}", [str(number + first), str(number + first + 1)]
            labels = f"{folder}/masks_png/@.png" if split != "Test" else None
            pairs(root, f"{folder}/images_png/@.png", labels, names, range(8))


WRITERS: dict[str, Callable[[Path], None]] = {
    writer.__name__: writer
    for writer in (
        potsdam, vaihingen, openearthmap, flair, landcoverai, deepglobe, inria, uavid, cityscapes, gta5, synthia, acdc,
        loveda,
    )
}  # fmt: skip
"""Functions that write the files of a data set below a folder."""
