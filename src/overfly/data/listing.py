"""List the files of a folder of images: globs, pairing of images with masks, and splits."""

import glob
import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from overfly.core.errors import DataError
from overfly.data.headers import SUFFIXES

Key = tuple[str, ...]
"""Text matched by each wildcard of a glob, equal for an image and its mask."""
Rule = float | str | tuple[str, ...]
"""Definition of a split: a share, a list file ``.txt``, or globs."""
MAX_NAMED = 20
"""Largest number of unpaired files that a message names."""
_WILDCARD = re.compile(r"\*\*/|\*+|\?|\[!?\]?[^]]*\]")


class ImagePair(NamedTuple):
    """An image, its mask if there is one, its name and its path below the root, with forward slashes.

    The name is the text matched by the wildcards, joined by underscores.
    """

    name: str
    relative: str
    image: Path
    mask: Path | None


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sorting key that puts ``tile_2`` before ``tile_10``."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def count_wildcards(pattern: str) -> int:
    """Number of wildcards in a glob; a directory counts as one, for the names in it."""
    return len(_WILDCARD.findall(pattern)) or 1


def glob_to_regex(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression in which each wildcard is a group."""
    parts, end = [], 0
    for match in _WILDCARD.finditer(pattern):
        wildcard = match.group()
        parts.append(re.escape(pattern[end : match.start()]))
        if wildcard == "**/":
            parts.append("((?:[^/]+/)*)")
        elif wildcard.startswith("["):
            negated = wildcard.startswith("[!")
            inside = re.sub(r"([\\\[&|~^])", r"\\\1", wildcard[1 + negated : -1])
            parts.append(f"([{'^' * negated}{inside}])")
        else:
            parts.append("([^/])" if wildcard == "?" else "([^/]*)")
        end = match.end()
    return re.compile("".join(parts) + re.escape(pattern[end:]))


def match_files(root: Path, pattern: str) -> dict[Key, Path]:
    """Find the images of a directory or a glob below ``root``, by the text of the wildcards, in natural order.

    Raises `DataError`: two files of a directory differ in their suffix only, the pattern is invalid, a folder cannot be
    read, or a file's name is not valid UTF-8.
    """
    pattern = pattern.rstrip("/")
    try:
        matches = _matches(root, pattern)
    except (re.error, ValueError):
        raise DataError(f"{pattern!r} is not a valid path or glob below {root}; correct it") from None
    except OSError as error:
        raise DataError(f"{root / pattern} cannot be read ({error.strerror}); check its path and permissions") from None
    matches.sort(key=lambda entry: ([natural_key(part) for part in entry[0]], str(entry[1])))
    files: dict[Key, Path] = {}
    for key, path in matches:
        check_name(path)
        if key in files:
            raise DataError(f"{files[key]} and {path} have the same name; remove one of them, or use a glob")
        files[key] = path
    return files


def check_name(path: Path) -> None:
    """Raise `DataError` if a path cannot be printed: its bytes are not valid UTF-8, or it has control characters."""
    if re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", str(path)):
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise DataError(f"the name of {shown} is not valid UTF-8, or has control characters; rename it")


def _matches(root: Path, pattern: str) -> list[tuple[Key, Path]]:
    """Match a directory or a glob; return files with the text of the wildcards, including pipes and devices."""
    path = root / pattern
    if path.is_dir():
        return [((_nfc(file.stem),), file) for file in path.iterdir() if is_image_name(file)]
    if path.is_file():
        return [((_nfc(path.stem),), path)]
    regular = glob_to_regex(_nfc(pattern))
    forms = dict.fromkeys((pattern, _nfc(pattern), unicodedata.normalize("NFD", pattern)))  # as the disk may store it
    relative = dict.fromkeys(name for form in forms for name in glob.glob(form, root_dir=root, recursive=True))  # noqa: PTH207
    tried = ((regular.fullmatch(_nfc(name.replace("\\", "/"))), root / name) for name in relative)
    open_end = pattern.endswith("*")  # such a pattern matches sidecars too
    return [
        (match.groups(), path)
        for match, path in tried
        if match and not path.is_dir() and (is_image_name(path) if open_end else not path.name.startswith("."))
    ]


def _nfc(text: str) -> str:
    """Text in Unicode's composed form: macOS stores names decomposed."""
    return unicodedata.normalize("NFC", text)


def is_image_name(path: Path) -> bool:
    """Whether a file of a folder is an image by its name; hidden files are not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def find_images(
    root: Path, images: str, masks: str | None, *, masks_optional: bool = False, check: bool = True
) -> list[ImagePair]:
    """Find images below ``root`` and the masks with the same text of the wildcards.

    Both are directories or globs; without ``masks``, and with ``masks_optional`` if none match, images have no masks.
    Raises `DataError`: there are no masks, an image has none or a mask no image (`MAX_NAMED` are named, all are
    counted) unless ``check`` is false, or two images would have one name.
    """
    files = match_files(root, images)
    labels = match_files(root, masks) if masks is not None else {}
    if masks is not None and check and not (masks_optional and not labels):
        _check_pairs(files, labels, root, images, masks)
    named: dict[str, ImagePair] = {}
    for key, path in files.items():
        name = "_".join(part for part in "/".join(key).split("/") if part) or _nfc(path.stem)
        if name in named:
            raise DataError(f"{named[name].image} and {path} have the same image name {name}; rename one of them")
        named[name] = ImagePair(name, _relative_path(root, path), path, labels.get(key))
    return list(named.values())


def select_split(
    listed: Sequence[ImagePair], split: str, rules: Mapping[Any, Rule], root: Path, seed: int, *, partial: bool = False
) -> list[ImagePair]:
    """Select the images of one split.

    Shares depend on the image's name and the seed only, so that adding images does not move others to another split.
    With ``partial``, names of a list that are not among the images are left out.
    Raises `DataError`: a rule matches no image, a list names a missing image, or two splits share an image.
    """
    rule = rules[split]
    if isinstance(rule, float):
        shares = [share for share in rules.values() if isinstance(share, float)]
        start = sum(shares[: list(rules).index(split)], 0.0)
        keys = (f"{seed}/{pair.name}".encode(errors="surrogateescape") for pair in listed)
        numbers = (int.from_bytes(hashlib.sha256(key).digest()[:6]) / 2**48 for key in keys)  # in [0, 1)
        chosen = [pair for pair, number in zip(listed, numbers, strict=True) if start <= number < start + rule]
    else:
        matched = {
            name: _by_name(listed, other, root, partial)
            for name, other in rules.items()
            if not isinstance(other, float)
        }
        for other, names in matched.items():
            both = sorted(matched[split] & names, key=natural_key) if other != split else []
            if both:
                raise DataError(
                    f"{both[0]} is in the split {split} and in {other}, as are {len(both) - 1} more images; "
                    "training and scored images must differ; correct the splits"
                )
        chosen = [pair for pair in listed if pair.name in matched[split]]
    if not chosen:
        raise DataError(f"the split {split} ({rule}) matches none of {_names(listed)} in {root}; correct the splits")
    return chosen


def _check_pairs(files: Mapping[Key, Path], labels: Mapping[Key, Path], root: Path, images: str, masks: str) -> None:
    if files and not labels:
        raise DataError(f"{root} has no masks {masks}; correct the domain's masks, or remove the setting for a target")
    problems = []
    for own, others, pattern, kind, other_kind in (
        (files, labels, masks, "image", "mask"),
        (labels, files, images, "mask", "image"),
    ):
        unpaired = [path for key, path in own.items() if key not in others] if others else []
        if unpaired:
            more = ", ".join(_relative_path(root, path) for path in unpaired[1:MAX_NAMED])
            more += ", …" if len(unpaired) > MAX_NAMED else ""
            problems.append(
                f"{unpaired[0]} has no {other_kind} in {root / pattern} ({len(unpaired)} of {len(own)} {kind}s have "
                + (f"none: also {more})" if more else "none)")
            )
    if problems:
        raise DataError(f"{', and '.join(problems)}; add the missing files, remove the others, or correct the patterns")


def no_images_message(root: Path, images: str) -> str:
    """Error message for a folder or glob without images; names the subfolders that hold some."""
    folder = root / images if (root / images).is_dir() else root
    files = list(itertools.islice(folder.rglob("*"), 10_000))
    parents = {path.parent.relative_to(folder).as_posix() for path in files if is_image_name(path)}
    subfolders = sorted(parents - {"."}, key=natural_key)
    endings = sorted({path.suffix for path in files if path.suffix})[:3]
    found = f", only {', '.join(endings)}" if endings and not subfolders else ""
    message = f"{root / images} holds no files that end in {', '.join(SUFFIXES)}{found}"
    if not subfolders:
        return f"{message}, nor do its subfolders; correct the domain's root or images"
    more = f" and {len(subfolders) - 3} more" if len(subfolders) > 3 else ""
    below = (folder / subfolders[0]).relative_to(root).as_posix()
    return (
        f"{message}; its subfolders {', '.join(subfolders[:3])}{more} do: set images to one of them, such as {below}, "
        "or to a glob over all, such as **/*.png"
    )


def _relative_path(root: Path, path: Path) -> str:
    """Return a path relative to the root, or unchanged if it is outside the root."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _names(listed: Sequence[ImagePair]) -> str:
    return f"the {len(listed)} images ({', '.join(pair.name for pair in listed[:2])}, …)"


def _by_name(listed: Sequence[ImagePair], rule: str | tuple[str, ...], root: Path, partial: bool) -> set[str]:
    if isinstance(rule, str) and rule.endswith(".txt"):
        return _from_list(listed, root, rule, partial)
    patterns = [_nfc(each) for each in ((rule,) if isinstance(rule, str) else rule)]
    texts = [(pair.name, _nfc(pair.name), _nfc(pair.relative)) for pair in listed]
    return {
        name for name, own, path in texts if any(fnmatchcase(path if "/" in each else own, each) for each in patterns)
    }


def _from_list(listed: Sequence[ImagePair], root: Path, rule: str, partial: bool) -> set[str]:
    """Read names of images from a text file, one per line: name, stem, file name, or path below the root."""
    path = root / rule
    problem = ""
    try:
        if not path.is_file():
            problem = "not a regular file" if path.exists() else "no such file"
        data = b"" if problem else path.read_bytes()
        encoding = "utf-16" if data[:2] in {b"\xff\xfe", b"\xfe\xff"} else "utf-8-sig"
        lines = [_nfc(line.strip()) for line in data.decode(encoding).splitlines()]
    except OSError as error:
        problem = error.strerror or "it cannot be opened"
    except ValueError:
        problem = "it is not UTF-8 text"
    if problem:
        raise DataError(f"the list {path} cannot be read ({problem}); check the path in the domain's splits")
    known: dict[str, set[str]] = {}
    for pair in listed:
        relative = Path(pair.relative)
        aliases = (pair.name, pair.relative, relative.with_suffix("").as_posix(), relative.name, relative.stem)
        for alias in aliases:
            known.setdefault(_nfc(alias), set()).add(pair.name)
    chosen: set[str] = set()
    for line in lines:
        if not line or line.startswith("#"):
            continue
        names = known.get(line.replace("\\", "/").removeprefix("./"), set())
        if len(names) != 1 and not (partial and not names):
            problem = f"matches {len(names)} images" if names else f"is not one of {_names(listed)}"
            raise DataError(f"the list {path} names {line}, which {problem}; write a name, or a path below {root}")
        chosen |= names
    return chosen
