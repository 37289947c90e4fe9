from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.serialization import set_crc32_options

from overfly.core.errors import WeightsError
from overfly.models.checkpoints import check_digest, check_values, read_tensors

STATE = {"conv.weight": torch.arange(5000.0), "conv.bias": torch.ones(3), "count": torch.tensor(4)}


def error_message(path: Path) -> str:
    """Message of the error on reading the file: one line that names the file and what to do."""
    with pytest.raises(WeightsError) as caught:
        read_tensors(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert "again" in text
    return text


class Named:
    """An object whose pickle calls what it is given."""

    def __init__(self, what: Callable[..., object], *arguments: object) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.what, self.arguments


@pytest.mark.parametrize("part", ["data/0", "data/1", "data.pkl"])
def test_bytes_zeroed_inside_an_archive_raise(part: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(STATE, path)
    assert read_tensors(path).keys() == STATE.keys()
    with zipfile.ZipFile(path) as archive:
        held = archive.read(f"w/{part}")
    content = path.read_bytes()
    assert content.count(held) == 1
    middle = content.index(held) + len(held) // 2
    path.write_bytes(content[:middle] + bytes(6) + content[middle + 6 :])
    assert f"'w/{part}'" in error_message(path)


def test_an_entry_marked_as_a_folder_raises(tmp_path: Path) -> None:
    """Torch's reader passes over it and leaves its values undefined."""
    path = tmp_path / "w.pth"
    torch.save(STATE, path)
    content = path.read_bytes()
    entry = content.rindex(b"w/data/0")  # in the directory at the end; its attributes stand 8 bytes before the name
    path.write_bytes(content[: entry - 8] + b"\x10" + content[entry - 7 :])
    assert "'w/data/0'" in error_message(path)


def test_archives_saved_without_checksums_are_read(tmp_path: Path) -> None:
    set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "w.pth")
    finally:
        set_crc32_options(True)
    assert torch.equal(read_tensors(tmp_path / "w.pth")["conv.weight"], STATE["conv.weight"])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@settings(deadline=None, max_examples=40)
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.just(b"PK\x03\x04junk")))
def test_garbage_of_any_kind_is_refused(content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("garbage") / f"w.{suffix}"
    path.write_bytes(content)
    error_message(path)


@pytest.mark.parametrize(
    "content",
    [
        b"hello, these are my notes\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        b"a\n",  # IndexError in the unpickler
        b"tea",
        b"}u.",
        b"K",
        b"X\x02\x00\x00\x00\xff\xff.",
        b"hA.",
        b"]K\x01K\x02s.",
        b"click here\nor there\nfor more",
        b"model:\n  name: pidnet_s\n",
    ],
)
def test_texts_and_halves_of_pickles_are_damaged(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    assert "damaged" in error_message(tmp_path / "w.pth")


def archived(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def archived_before(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def scripted() -> bytes:
    """The layout of a TorchScript file, whose parts are programs."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for part in ("data.pkl", "constants.pkl"):
            archive.writestr(f"net/{part}", pickle.dumps((), protocol=2))
        archive.writestr("net/version", "3")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        *(pickle.dumps(Named(os.system, "true"), protocol=protocol) for protocol in range(6)),
        archived(Named(os.system, "true")),
        archived({**STATE, "hook": Named(eval, "1 + 1")}),
        archived(nn.Conv2d(1, 1, 1)),
        archived_before(Named(os.system, "true")),
        archived_before(nn.Conv2d(1, 1, 1)),
        b"(S'true'\nios\nsystem\n.",
        scripted(),
    ],
)
def test_code_is_never_run(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    assert "would run code from the file" in error_message(tmp_path / "w.pth")


def test_a_truncated_file_of_tensors_is_damaged(tmp_path: Path) -> None:
    whole = archived_before(collections.OrderedDict(STATE, half=nn.Parameter(torch.ones(9))))
    for length in (len(whole) - 9, len(whole) // 2, 300, 40):
        (tmp_path / "w.pth").write_bytes(whole[:length])
        assert "damaged" in error_message(tmp_path / "w.pth")


@pytest.mark.parametrize("steps", [1, 2])
def test_a_state_dict_inside_itself_is_refused(steps: int, tmp_path: Path) -> None:
    inner: dict[str, object] = dict(STATE)
    content = inner
    for _ in range(steps - 1):
        content = {"model": content}
    inner["state_dict"] = content
    torch.save(content, tmp_path / "w.pth")
    assert "contains itself" in error_message(tmp_path / "w.pth")


def test_cut_and_misnamed_safetensors_are_damaged(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    assert read_tensors(tmp_path / "w.safetensors").keys() == STATE.keys()
    for content in (whole[:-1], whole[:30], archived(STATE)):
        (tmp_path / "w.safetensors").write_bytes(content)
        assert "damaged" in error_message(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.tensor([1.0, float("nan")]),
        torch.tensor([-float("inf")], dtype=torch.float16),
        torch.tensor([1e39], dtype=torch.float64),
    ],
)
def test_non_finite_or_complex_values_raise(tensor: torch.Tensor) -> None:
    with pytest.raises(WeightsError, match=r"w\.pth .*\(conv:"):
        check_values(Path("w.pth"), {"fine": torch.ones(2), "conv": tensor})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64])
def test_finite_real_numbers_of_any_width_are_accepted(dtype: torch.dtype) -> None:
    check_values(Path("w.pth"), {"conv": torch.ones(2).to(dtype), "none": torch.empty(0, dtype=dtype)})


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_read_error_is_not_reported_as_damage(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, mode: str) -> None:
        raise PermissionError(13, f"Permission denied to {mode}", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(WeightsError, match=r"Permission denied"):
        read_tensors(tmp_path / name)
    with pytest.raises(WeightsError, match=r"Permission denied"):
        check_digest(tmp_path / name, "0" * 64)
