from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from overfly.core.atomic_files import remove_stale
from overfly.core.errors import DataError, OverflyError, RecipeError
from overfly.video.capture import StreamErrors, _Container, _decode, check_output, open_stream, write_video
from overfly.video.player import limit_duration
from streams import frame_number, numbered_frame, read, video

av = pytest.importorskip("av")


def frames_of(path: Path | str, fps: float | None = None) -> tuple[list[np.ndarray], list[float]]:
    with open_stream(str(path), fps=fps) as source:
        result = [(image.pixels(), image.time) for image in source.frames]
    return [pixels for pixels, _ in result], [at for _, at in result]


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "A.MP4"])
def test_written_frames_are_read_back(name: str, tmp_path: Path) -> None:
    path = video(tmp_path / name, frames=12, fps=8)
    with open_stream(str(path)) as source:
        assert (source.width, source.height, source.live) == (64, 48, False)
        assert source.rate == pytest.approx(8, rel=0.01)
    pixels, times = frames_of(path)
    assert [frame_number(frame) for frame in pixels] == list(range(12))
    assert times == pytest.approx([index / 8 for index in range(12)], abs=0.002)
    others, _ = read(path)
    np.testing.assert_array_equal(np.stack(pixels), np.stack(others))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [(64, 48), (1280, 720)])
def test_colors_are_preserved(size: tuple[int, int], tmp_path: Path) -> None:
    colors = [(230, 20, 30), (10, 200, 60), (20, 40, 240), (255, 195, 128)]
    frame = np.zeros((size[1], size[0], 3), np.uint8)
    wide = size[0] // 4
    for index, color in enumerate(colors):
        frame[:, index * wide : (index + 1) * wide] = color
    with write_video(tmp_path / "a.mp4", 10) as file:
        for index in range(3):
            file.write(frame, index / 10)
    (result, *_), _ = frames_of(tmp_path / "a.mp4")
    for index, color in enumerate(colors):
        middle = result[:, index * wide + 6 : (index + 1) * wide - 6].reshape(-1, 3)
        np.testing.assert_allclose(middle.mean(0), color, atol=4)


def test_unspecified_hd_colors_are_bt709(tmp_path: Path) -> None:
    """Above 720 lines those colors are BT.709; FFmpeg by itself would take BT.601, and greens would be off by 20."""
    for height, standard in ((720, "ITU709"), (360, "ITU601")):
        path = tmp_path / f"{height}.mkv"
        color = np.full((height, 64, 3), (20, 180, 60), np.uint8)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=5)
            stream.width, stream.height, stream.pix_fmt = 64, height, "yuv420p"
            frame = av.VideoFrame.from_ndarray(color, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=standard)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        (result, *_), _ = frames_of(path)
        np.testing.assert_allclose(result.reshape(-1, 3).mean(0), (20, 180, 60), atol=4)


def test_frames_keep_their_times(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.5, 0.5, 2.0]
    with write_video(tmp_path / "a.mp4", 10) as file:
        for index, at in enumerate(times):
            file.write(numbered_frame(index), at)
    pixels, result = frames_of(tmp_path / "a.mp4")
    assert result == pytest.approx(times, abs=0.001)
    assert [frame_number(frame) for frame in pixels] == [0, 1, 2, 3, 4]


def test_odd_sides_are_padded_and_other_sizes_fitted(tmp_path: Path) -> None:
    with write_video(tmp_path / "a.mp4", 10) as file:
        file.write(numbered_frame(4, 63, 47), 0)
        file.write(numbered_frame(4, 126, 94), 0.1)
        file.write(numbered_frame(4, 63, 20), 0.2)
    pixels, _ = frames_of(tmp_path / "a.mp4")
    assert [frame.shape for frame in pixels] == [(48, 64, 3)] * 3
    assert frame_number(pixels[1]) == 4
    assert pixels[2][:10].mean() < 8


def test_rotation_flag_is_applied(tmp_path: Path) -> None:
    """Set the second matrix of an MP4, that of the video track, to a quarter turn to the right."""
    path = video(tmp_path / "a.mp4")
    one, minus = b"\0\1\0\0", b"\xff\xff\0\0"
    straight = one + bytes(12) + one + bytes(12) + b"\x40\0\0\0"
    turned = bytes(4) + one + bytes(4) + minus + bytes(16) + b"\x40\0\0\0"
    before, after = path.read_bytes().rsplit(straight, 1)
    upright, _ = frames_of(path)
    path.write_bytes(before + turned + after)
    pixels, _ = frames_of(path)
    assert pixels[0].shape == (64, 48, 3)
    np.testing.assert_array_equal(pixels[4], np.rot90(upright[4], -1))


def test_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    for index, name in enumerate(["frame_2.png", "frame_10.png", "frame_11.jpg"]):
        Image.fromarray(numbered_frame(index)).save(tmp_path / name)
    (tmp_path / ".frame_3.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no frame")
    pixels, times = frames_of(tmp_path, fps=4)
    assert [frame_number(frame) for frame in pixels] == [0, 1, 2]
    assert times == [0, 0.25, 0.5]


def cut(path: Path, share: float) -> Path:
    part = path.with_stem(f"cut_{int(share * 100)}")
    part.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return part


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_truncated_video_is_an_error(name: str, tmp_path: Path) -> None:
    path = video(tmp_path / name, frames=80, fps=25, size=(320, 180))
    ends_early = False
    for share in (0.02, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8):
        with pytest.raises(DataError) as error:
            frames_of(cut(path, share))
        sentence = str(error.value)
        assert f"cut_{int(share * 100)}" in sentence
        assert "\n" not in sentence
        ends_early |= "--seconds" in sentence
        if hint := re.search(r"--seconds (\S+)$", sentence):
            with open_stream(str(cut(path, share))) as source:
                seconds = float(hint.group(1))
                assert list(limit_duration(source.frames, seconds)), "the hint is wrong"
    assert ends_early


def test_damaged_video_is_an_error(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", frames=60, fps=25, size=(320, 180))
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 1500):
        data[place] ^= 0x5A
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.mp4"):
        frames_of(path)


class Camera:
    """A live source by script: numbers are frames, errors are raised while decoding, words while reading."""

    def __init__(self, *script: object) -> None:
        self.script = list(script)
        self.closed = False

    def demux(self, _: object) -> Iterator[Camera]:
        while self.script:
            if self.script[0] == "no packet":
                raise av.InvalidDataError(1, self.script.pop(0))
            yield self

    is_corrupt = False

    def decode(self) -> list[object]:
        entry = self.script.pop(0)
        if isinstance(entry, Exception):
            raise entry
        return [entry]

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("script", "frames", "damaged", "end_reason"),
    [
        ((1, 2, 3), 3, 0, ""),
        ((1, av.InvalidDataError(1, "bad"), 2, "no packet", 3), 3, 2, ""),
        ((1, av.error.OSError(5, "the cable is out"), 2), 1, 0, "the cable is out"),
        ((1, *[av.InvalidDataError(1, "Bad")] * 400, 2), 1, 300, "bad"),
    ],
)
def test_live_source_continues_after_damage(
    script: tuple[object, ...], frames: int, damaged: int, end_reason: str
) -> None:
    camera, errors = Camera(*script), StreamErrors()
    result = list(_decode("camera", _Container(camera, None, True), 25, errors))
    assert len(result) == frames
    assert result[0].time == 0
    assert (errors.damaged, errors.end_reason) == (damaged, end_reason)
    assert camera.closed


@pytest.mark.parametrize(("content", "reason"), [(b"", "video"), (b"plain text", "video")])
def test_other_files_are_rejected(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        frames_of(tmp_path / "a.mp4")


def test_audio_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match="video"):
        frames_of(path)


def test_missing_sources_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: dict[Path | str, str] = {
        tmp_path / "no.mp4": r"no\.mp4",
        tmp_path / "empty": "empty",
        "/dev/video77": "/dev/video77",
        "77": "/dev/video77",
        "rtsp://127.0.0.1:9/none": "rtsp://127.0.0.1:9/none",
        "http://127.0.0.1:9/none": "http://127.0.0.1:9/none",
        "nonsense://x": "nonsense://x",
    }
    for source, words in cases.items():
        with pytest.raises(DataError, match=words):
            frames_of(source)
    with pytest.raises(RecipeError, match="--fps"):
        frames_of(video(tmp_path / "a.mp4"), fps=3)


def test_file_named_like_an_address_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "b%03d.mp4", "-c.mp4", "ü ö.mp4"):
        shutil.copy(video(Path("plain.mp4")), name)
        Path("plain.mp4").unlink()
        assert len(frames_of(name)[0]) == 10
    with write_video(Path("http:d.mp4"), 10) as file:
        file.write(numbered_frame(1), 0)
    assert Path("http:d.mp4").is_file()


def test_unsuitable_images_of_a_folder_are_errors(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "gray.png")
    with pytest.raises(OverflyError, match=r"gray\.png .*1 band"):
        frames_of(tmp_path)
    (tmp_path / "gray.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(OverflyError, match=r"gray\.png"):
        frames_of(tmp_path)


def test_failed_video_leaves_no_file(tmp_path: Path) -> None:
    def fails() -> None:
        with write_video(tmp_path / "a.mp4", 10) as file:
            file.write(numbered_frame(0), 0)
            assert {path.suffix for path in tmp_path.iterdir()} == {".part", ".lock"}
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fails()
    with write_video(tmp_path / "b.mp4", 10):
        pass
    assert not list(tmp_path.iterdir())


def test_unwritable_paths_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.mp4", Path("/proc/a.mp4")):
        with pytest.raises(DataError, match=r"a\.mp4"), write_video(path, 10) as file:
            file.write(numbered_frame(0), 0)
    for path, words in ((video(tmp_path / "there.mp4"), r"there\.mp4"), (tmp_path / "a.gif", r"name it a\.mp4")):
        with pytest.raises(DataError, match=words):
            check_output(path)


def test_leftovers_of_a_killed_writer_are_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with write_video(path, 10) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8), 0.0)
        (part,) = (file for file in tmp_path.iterdir() if file.suffix == ".part")
        # the part of a process that was killed: another token, and no lock that is held
        stale = part.with_name(part.name.replace(part.name.split(".")[-2], "0" * 12))
        stale.write_bytes(b"cut")
        remove_stale(path)
        assert part.exists()  # its writer is running
        assert not stale.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_full_disk_is_an_error(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)

    def fills() -> None:
        with write_video(tmp_path / "a.mkv", 10) as file:
            for index in range(100):
                file.write(np.roll(noise, index * 7, 1), index / 10)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"a\.mkv"):
            fills()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_video_of_another_process_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"

    def write() -> None:
        with write_video(path, 10) as file:
            file.write(numbered_frame(0), 0)
            path.write_bytes(b"theirs")

    with pytest.raises(DataError, match="by another process"):
        write()
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]
