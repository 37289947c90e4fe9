"""Public data sets by name, each on a miniature in its publisher's layout: lists, labels, check, training, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miniatures import SIDE, SYNTHIA, TRAIN_IDS, WRITERS
from overfly import data_check, evaluate, train
from overfly.commands.export_data import card_content
from overfly.commands.load_predictor import NetworkFolder
from overfly.core.errors import DataError
from overfly.data.datasets import SHEETS, Dataset, read_sheet
from overfly.data.domain import Domain, SplitError
from overfly.recipe import Recipe

LISTS: dict[str, dict[str, list[str]]] = {
    "potsdam": {"train": ["2_10", "6_7", "7_12"], "val": ["2_13", "5_15", "7_13"]},
    "vaihingen": {"train": ["1", "11", "37"], "val": ["2", "38"]},
    "openearthmap": {
        "train": ["aachen_aachen_1", "aachen_aachen_2", "christchurch_christchurch_1"],
        "val": ["aachen_aachen_3", "christchurch_christchurch_2"],
        "test": ["christchurch_christchurch_3"],
    },
    "flair": {
        "train": [*(f"train_D013_2020_Z1_NN_01300{n}" for n in range(10)), "train_D070_2021_Z1_NN_070000"],
        "val": [*(f"train_D067_2021_Z1_NN_06700{n}" for n in range(10)), "train_D077_2021_Z1_NN_077000"],
        "test": ["1_test_D012_2019_Z1_NN_012000"],
    },
    "landcoverai": {
        "train": ["M-33-20-D-c-4-2_0", "M-33-20-D-c-4-2_1"],
        "val": ["M-33-20-D-c-4-2_2"],
        "test": ["M-33-20-D-c-4-2_3"],
    },
    "inria": {
        "train": [f"{city}{n}" for city in ("austin", "chicago", "kitsap", "tyrol-w", "vienna") for n in (6, 10, 36)],
        "val": ["austin1", "chicago1", "kitsap1", "tyrol-w1", "vienna1"],
    },
    "uavid": {
        "train": ["seq1_000000", "seq1_000100", "seq2_000000", "seq2_000100"],
        "val": ["seq16_000000", "seq16_000100"],
        "test": ["seq21_000000", "seq21_000100"],
    },
    "cityscapes": {
        "train": ["aachen_aachen_000000_000019", "ulm_ulm_000000_000019"],
        "val": ["lindau_lindau_000000_000019"],
    },
    "gta5": {"train": ["00001", "00002", "00003"]},
    "synthia": {"train": ["0000000", "0000001", "0000002"]},
    "acdc": {
        split: [f"{name}_GOPR0475_GOPR0475_frame_00004{len(name)}" for name in ("fog", "night", "rain", "snow")]
        for split in ("train", "val", "test")
    },
    "loveda": {
        "train": ["Urban_3", "Urban_4", "Rural_1", "Rural_2"],
        "val": ["Urban_13", "Urban_14", "Rural_11", "Rural_12"],
        "test": ["Urban_23", "Urban_24", "Rural_21", "Rural_22"],
    },
}  # fmt: skip
"""Names of the images of each split; those of DeepGlobe are drawn."""
DECODED: dict[str, list[int]] = {
    "potsdam": [0, 1, 2, 3, 4, 5],
    "vaihingen": [0, 1, 2, 3, 4, 5],
    "openearthmap": [255, *range(8)],
    "flair": [*range(12), *[12] * 7],
    "landcoverai": [0, 1, 2, 3, 4],
    "deepglobe": [0, 1, 2, 3, 4, 5, 255],
    "inria": [0, 1],
    "uavid": [0, 1, 2, 3, 4, 5, 6, 7],
    "cityscapes": [TRAIN_IDS.get(number, 255) for number in range(34)],
    "gta5": [TRAIN_IDS.get(number, 255) for number in range(35)],
    "synthia": [SYNTHIA.get(number, 255) for number in range(23)],
    "acdc": [*range(19), 255],
    "loveda": [255, *range(7)],
}
"""Class ids of the stripes of a label."""
STREET_16 = [
    name for index, name in enumerate(read_sheet("cityscapes").settings["classes"]) if index not in (9, 14, 16)
]


def domain(name: str, root: Path, **settings: Any) -> Dataset:
    value = Domain.model_validate({"name": name, "root": str(root / name), **settings})
    assert isinstance(value, Dataset)
    return value


def stripes(value: Domain, split: Any = "train", index: int = 0) -> list[int]:
    """Class ids of the stripes of a label."""
    label = value.read_label(value.items(split)[index])
    assert label.shape == (SIDE, SIDE)
    assert (label == label[0]).all()
    row = label[0]
    count = len(DECODED[value.name])
    return [int(row[-(-position * SIDE // count)]) for position in range(count)]


def test_every_sheet_has_a_miniature() -> None:
    names = {file.stem for file in SHEETS.glob("*.yaml")}
    assert names == set(WRITERS) == set(DECODED) == set(LISTS) | {"deepglobe"}
    assert names == {name for name, kind in Domain.kinds.items() if issubclass(kind, Dataset)}


@pytest.mark.parametrize("name", LISTS)
def test_splits_are_the_published_ones(name: str, root: Path) -> None:
    value = domain(name, root)
    found = {}
    for split in ("train", "val", "test"):
        try:
            found[split] = [item.name for item in value.items(split)]
        except SplitError as error:
            assert "has no split" in str(error)  # noqa: PT017
    assert found == LISTS[name]


@pytest.mark.parametrize("name", WRITERS)
def test_labels_become_class_ids(name: str, root: Path) -> None:
    value = domain(name, root)
    assert stripes(value) == DECODED[name]
    assert value.read_image(value.items("train")[0]).shape == (SIDE, SIDE, value.bands)
    assert (
        len(value.classes.colors) == len(value.classes) == max(number for number in DECODED[name] if number < 255) + 1
    )


@pytest.mark.parametrize("name", WRITERS)
def test_checked_trained_and_scored(name: str, root: Path, tmp_path: Path) -> None:
    assert data_check(name, f"root={root / name}").exit_status == 0
    value = domain(name, root)
    scored = "val" if "val" in value.splits else "train"
    recipe = Recipe(source=value, model={"name": "small_network", "weights": None}, crop=64, batch=2, steps=2)
    run = train(recipe, out=tmp_path, device="cpu", quiet=True).path
    scores = evaluate(run, domain="source", split=scored, device="cpu", samples=False).scores[f"source/{scored}"]  # type: ignore[arg-type]
    assert scores.miou is not None
    assert set(scores.classes) == set(value.classes.names)
    (described,) = card_content(NetworkFolder.open(run)).domains
    assert f"License: {value.sheet().facts['license']}" in described[1]


def test_variants(root: Path) -> None:
    assert domain("potsdam", root, variant="irrg").items("val")[0].image.name == "top_potsdam_2_13_IRRG.tif"  # type: ignore[union-attr]
    four = domain("potsdam", root, variant=["rgbir", "no_boundary"])
    assert four.read_image(four.items("train")[0]).shape[2] == 4
    for name in ("potsdam", "vaihingen"):
        label = (eroded := domain(name, root, variant="no_boundary")).read_label(eroded.items("val")[0])
        assert np.unique(label).tolist() == [0, 1, 2, 3, 4, 5, 255]
    fifteen = domain("flair", root, variant="classes15")
    assert stripes(fifteen) == [*range(14), 255, 255, 255, 14, 255]
    whole = domain("landcoverai", root, variant="orthophotos")
    assert sum(len(whole.items(split)) for split in ("train", "val")) == 12
    with pytest.raises(ValueError, match="Potsdam has no variant 'ir'; there are: irrg, rgbir, no_boundary"):
        domain("potsdam", root, variant="ir")


def test_label_sets_of_pairs_agree(root: Path) -> None:
    assert domain("gta5", root).classes == domain("cityscapes", root).classes == domain("acdc", root).classes
    assert domain("potsdam", root).classes == domain("vaihingen", root).classes
    sixteen = domain("synthia", root).classes
    assert sixteen == domain("cityscapes", root, variant="classes16").classes
    assert list(sixteen.names) == STREET_16
    thirteen = domain("synthia", root, variant="classes13").classes
    assert thirteen == domain("cityscapes", root, variant="classes13").classes
    assert list(thirteen.names) == [name for name in STREET_16 if name not in ("wall", "fence", "pole")]
    for variant, classes in (("classes16", sixteen), ("classes13", thirteen)):
        names = {number: name for name, number in read_sheet("cityscapes").settings["ids"].items()}
        wanted = [classes.names.index(names[n]) if names.get(n) in classes.names else 255 for n in range(34)]
        assert stripes(domain("cityscapes", root, variant=variant)) == wanted


def test_classes_can_be_mapped(root: Path) -> None:
    ground = ("road", "sidewalk", "terrain")
    mapping = {name: "ground" if name in ground else "other" for name in domain("acdc", root).classes.names}
    value = domain("acdc", root, classes=["ground", "other"], mapping=mapping)
    assert stripes(value) == [0, 0, *[1] * 7, 0, *[1] * 9, 255]


def test_subsets(root: Path) -> None:
    fog = domain("acdc", root, subset="fog")
    assert [item.name[:3] for item in fog.items("val")] == ["fog"]
    assert fog.title == "ACDC fog"
    both = domain("flair", root, subset=["D077", "D067"])
    assert [item.name[6:10] for item in both.items("val")] == ["D077", *["D067"] * 10]
    assert [item.name for item in domain("inria", root, subset="tyrol-w").items("val")] == ["tyrol-w1"]
    assert [item.name for item in domain("openearthmap", root, subset="christchurch").items("train")] == [
        "christchurch_christchurch_1"
    ]
    with pytest.raises(SplitError, match=r"no image of val in .* is of ulm; Cityscapes has leftImg8bit/val/"):
        domain("cityscapes", root, subset="ulm").items("val")
    with pytest.raises(ValueError, match="GTA5 has no subsets"):
        domain("gta5", root, subset="day")


def test_one_condition_is_not_taken_for_all(root: Path, tmp_path: Path) -> None:
    (tmp_path / "acdc").mkdir()
    for folder in ("rgb_anon", "gt"):
        (tmp_path / "acdc" / folder).mkdir()
        (tmp_path / "acdc" / folder / "fog").symlink_to(root / "acdc" / folder / "fog")
    assert len(domain("acdc", tmp_path, subset="fog").items("train")) == 1
    with pytest.raises(SplitError, match=r"no image of train in .* is of night"):
        domain("acdc", tmp_path).items("train")


def test_missing_files_name_their_source(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"is not a folder; Potsdam has 2_Ortho_RGB/.*to get it, fill in .*\(https://www.isprs"
    ):
        domain("potsdam", tmp_path).items("train")
    (tmp_path / "gta5").mkdir()
    with pytest.raises(DataError, match=r"matches no files; GTA5 has images/\*\.png and labels/\*\.png below its root"):
        domain("gta5", tmp_path).items("train")
    WRITERS["cityscapes"](tmp_path / "cityscapes")
    next((tmp_path / "cityscapes/gtFine/train/ulm").glob("*labelIds.png")).unlink()
    with pytest.raises(DataError, match=r"ulm_000000_000019_leftImg8bit\.png has no mask"):
        domain("cityscapes", tmp_path).items("train")
    assert len(domain("cityscapes", tmp_path, subset="aachen").items("train")) == 1
    with pytest.raises(DataError, match=r"ulm_000000_000019_leftImg8bit\.png has no mask \(1 of 1 "):
        domain("cityscapes", tmp_path, subset="ulm").items("train")
    WRITERS["openearthmap"](tmp_path / "openearthmap")
    (tmp_path / "openearthmap/christchurch/labels/christchurch_1.tif").unlink()
    with pytest.raises(DataError, match=r"christchurch_1\.tif has no mask \(1 of 3 images have none\)"):
        domain("openearthmap", tmp_path).items("train")


def test_a_wrong_label_is_an_error(tmp_path: Path) -> None:
    WRITERS["synthia"](tmp_path / "synthia")
    WRITERS["gta5"](tmp_path / "synthia")
    label = tmp_path / "synthia/GT/LABELS/0000000.png"
    label.write_bytes((tmp_path / "synthia/labels/00001.png").read_bytes())  # one band: numbers, above 22 unknown
    value = domain("synthia", tmp_path)
    with pytest.raises(DataError, match="holds numbers of no class"):
        value.read_label(value.items("train")[0])


def test_a_saved_recipe_holds_what_differs_from_the_sheet(root: Path) -> None:
    value = domain("potsdam", root, variant="irrg", gsd=0.09)
    saved = json.loads(json.dumps(value.model_dump(mode="json")))
    expected = {"name": "potsdam", "root": str(root / "potsdam"), "variant": ["irrg"], "subset": [], "gsd": 0.09}
    assert saved == {**expected, "sheet_sha256": read_sheet("potsdam").sha256}
    assert Domain.model_validate(saved) == value
    assert Domain.model_validate({**saved, "variant": []}).images.startswith("2_Ortho_RGB")  # type: ignore[attr-defined]


def test_a_changed_sheet_is_another_recipe(root: Path) -> None:
    sheet = read_sheet("potsdam")
    assert sheet.model_copy(update={"facts": {}, "layout": ""}).sha256 == sheet.sha256
    assert sheet.model_copy(update={"binarize": False}).sha256 != sheet.sha256
    old = domain("potsdam", root, sheet_sha256="old")
    assert old != domain("potsdam", root)
    assert Domain.model_validate(old.model_dump(mode="json")) == old


@pytest.mark.parametrize("name", WRITERS)
def test_sheets_are_complete(name: str) -> None:
    sheet = read_sheet(name)
    assert list(sheet.facts) == ["format", "labels", "splits", "license", "citation", "url"]
    assert sheet.facts["url"].startswith("http")
    assert all(len(text) > 10 for text in (sheet.summary, sheet.get, sheet.layout, *sheet.facts.values()))
    for settings in (sheet.settings, *sheet.variants.values()):
        assert set(settings.get("ids", sheet.settings["classes"])) == set(
            settings.get("classes", sheet.settings["classes"])
        )
