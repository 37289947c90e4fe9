from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overfly.core.errors import DataError
from overfly.data.listing import (
    ImagePair,
    Rule,
    count_wildcards,
    find_images,
    glob_to_regex,
    match_files,
    natural_key,
    select_split,
)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(found: list[ImagePair]) -> list[str]:
    return [pair.name for pair in found]


LISTED = [
    ImagePair(f"{tile}_{k}", f"Tile {tile}/images/{k}.jpg", Path("i"), None) for tile in (4, 8) for k in range(1, 10)
]


def test_natural_order() -> None:
    assert sorted(["b10", "b9", "a", "b1c2", "10", "9"], key=natural_key) == ["9", "10", "a", "b1c2", "b9", "b10"]


@pytest.mark.parametrize(
    ("pattern", "path", "groups"),
    [
        ("Tile [48]/images/*.jpg", "Tile 4/images/a.jpg", ("4", "a")),
        ("Tile [48]/images/*.jpg", "Tile 5/images/a.jpg", None),
        ("Tile [!48]/*.jpg", "Tile 5/a.jpg", ("5", "a")),
        ("**/*.tif", "a/b/c.tif", ("a/b/", "c")),
        ("**/*.tif", "c.tif", ("", "c")),
        ("im?/*_rgb.png", "im1/x_rgb.png", ("1", "x")),
        ("a.b/*.png", "aXb/c.png", None),
        ("*.png", "a/b.png", None),
        ("[[&^]*.png", "[b.png", ("[", "b")),
        ("[^a]*.png", "bc.png", None),
    ],
)
def test_wildcards_are_groups(pattern: str, path: str, groups: tuple[str, ...] | None) -> None:
    match = glob_to_regex(pattern).fullmatch(path)
    assert (match and match.groups()) == groups
    assert glob_to_regex(pattern).groups == count_wildcards(pattern)


def test_directories_pair_by_stem(tmp_path: Path) -> None:
    touch(tmp_path, "i/b10.jpg", "i/b9.JPG", "i/b9.txt", "m/b9.png", "m/b10.tif")
    found = find_images(tmp_path, "i", "m/")
    assert [(each.name, each.image.name, each.mask and each.mask.name) for each in found] == [
        ("b9", "b9.JPG", "b9.png"),
        ("b10", "b10.jpg", "b10.tif"),
    ]


def test_globs_pair_by_wildcards_and_mix_with_directories(tmp_path: Path) -> None:
    touch(tmp_path, "T 1/i/a.jpg", "T 2/i/a.jpg", "T 1/m/a_mask.png", "T 2/m/a_mask.png")
    found = find_images(tmp_path, "T */i/*.jpg", "T */m/*_mask.png")
    assert names(found) == ["1_a", "2_a"]
    assert [str(each.mask.parent.parent.name) for each in found if each.mask] == ["T 1", "T 2"]
    assert names(find_images(tmp_path, "T 1/i", "T 1/m/*_mask.png")) == ["a"]
    assert names(find_images(tmp_path, "**/*.jpg", None)) == ["T 1_i_a", "T 2_i_a"]


def test_unpaired_files_are_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "i/a.jpg", "i/b.jpg", "i/c.jpg", "m/c.png")
    with pytest.raises(DataError, match=r"i/a\.jpg .*/m \(2 of 3"):
        find_images(tmp_path, "i", "m")
    touch(tmp_path, "m/a.png", "m/b.png", "m/x.png")
    with pytest.raises(DataError, match=r"m/x\.png .*1 of 4"):
        find_images(tmp_path, "i", "m")
    touch(tmp_path, *(f"i/{number}.jpg" for number in range(30)))
    with pytest.raises(DataError) as caught:
        find_images(tmp_path, "i", "m")
    assert "i/0.jpg" in str(caught.value)
    assert "30 of 33" in str(caught.value)
    assert "m/x.png" in str(caught.value)
    assert str(caught.value).count(".jpg") == 20
    with pytest.raises(DataError, match="nowhere"):
        find_images(tmp_path, "i", "nowhere")


@pytest.mark.parametrize("pattern", ["[z-a]*.png", "a\0b/*.png", "x" * 300, "x" * 300 + "*"])
def test_invalid_patterns_are_errors(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read|not a valid"):
        match_files(touch(tmp_path, "a.png"), pattern)


def test_names_must_be_utf8(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).touch()
    except OSError:
        pytest.skip("the file system takes no such name")
    for pattern in (".", "*.png"):
        with pytest.raises(DataError, match=r"\\xff\.png .*UTF-8") as caught:
            match_files(tmp_path, pattern)
        assert str(caught.value).encode()
    odd = ImagePair(os.fsdecode(b"\xff"), "", Path(), None)
    assert select_split([odd], "train", {"train": 1.0}, Path(), 0) == [odd]


def test_patterns_outside_the_root(tmp_path: Path) -> None:
    touch(tmp_path, "i/a.jpg", "root/b.jpg")
    found = find_images(tmp_path / "root", str(tmp_path / "i"), None)
    assert [pair.relative for pair in found] == [(tmp_path / "i" / "a.jpg").as_posix()]


def test_names_must_differ(tmp_path: Path) -> None:
    touch(tmp_path, "i/a.jpg", "i/a.png", "j/a_b/c.png", "j/a/b_c.png")
    with pytest.raises(DataError, match=r"a\.jpg .*a\.png"):
        match_files(tmp_path, "i")
    with pytest.raises(DataError, match="a_b_c"):
        find_images(tmp_path, "j/*/*.png", None)


def test_split_by_globs_over_names_and_paths() -> None:
    rules: dict[str, Rule] = {"train": "*_[1-6]", "val": ("Tile 4/*/[789].jpg", "8_[789]")}
    train, val = (select_split(LISTED, split, rules, Path(), 0) for split in rules)
    assert len(train) == 12
    assert names(val) == ["4_7", "4_8", "4_9", "8_7", "8_8", "8_9"]


def test_splits_must_not_share_images_nor_be_empty() -> None:
    with pytest.raises(DataError, match=r"4_6 .*train .*val"):
        select_split(LISTED, "train", {"train": "*_[1-6]", "val": "*_[6-9]"}, Path(), 0)
    with pytest.raises(DataError, match=r"nothing.* 18 images"):
        select_split(LISTED, "val", {"val": "nothing*"}, Path(), 0)


def test_split_by_lists(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("# chosen by hand\n4_1\n\nTile 8/images/2.jpg\nTile 8/images/3\n")
    assert names(select_split(LISTED, "train", {"train": "train.txt"}, tmp_path, 0)) == ["4_1", "8_2", "8_3"]
    (tmp_path / "train.txt").write_text("7.jpg\n")
    with pytest.raises(DataError, match=r"7\.jpg.* 2 images"):
        select_split(LISTED, "train", {"train": "train.txt"}, tmp_path, 0)
    (tmp_path / "train.txt").write_text("9_9\n")
    with pytest.raises(DataError, match="9_9"):
        select_split(LISTED, "train", {"train": "train.txt"}, tmp_path, 0)
    with pytest.raises(DataError, match=r"val\.txt"):
        select_split(LISTED, "val", {"val": "val.txt"}, tmp_path, 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(200, 400), st.floats(0.2, 0.6))
def test_shares_are_disjoint_and_stable(seed: int, count: int, share: float) -> None:
    listed = [ImagePair(f"p{number}", "", Path(), None) for number in range(count)]
    rules = {"train": share, "val": 1 - share}
    train, val = (set(names(select_split(listed, split, rules, Path(), seed))) for split in rules)
    assert train | val == {pair.name for pair in listed}
    assert not train & val
    assert abs(len(train) / count - share) < 0.2
    fewer = set(names(select_split(listed[: count // 2], "train", rules, Path(), seed)))
    assert fewer == {name for name in train if int(name[1:]) < count // 2}
