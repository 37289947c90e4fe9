"""The command `watch`, with its written videos checked frame by frame."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import REPOSITORY
from overfly import cli
from overfly.commands import watch as streaming
from overfly.core.errors import DataError
from overfly.exporting.predictor import Floats, Predictor
from overfly.video.player import LatestFrame
from streams import BLUE, GREEN, RED, brightest, frame_number, numbered_frame, read, rule_model, video

pytest.importorskip("av")


def overfly(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[[Predictor], None]:
    """Replace every run by this network."""

    def planted(predictor: Predictor) -> None:
        monkeypatch.setattr("overfly.commands.load_predictor.load_predictor", lambda *_, **__: predictor)

    planted(rule_model())
    return planted


def test_watch_writes_a_video(network: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del network
    source, out = video(tmp_path / "a.mp4", frames=20, size=(128, 96)), tmp_path / "overlay.mp4"
    assert overfly("watch", "RUN", source, "--out", out, "--opacity", 1, "--no-legend", "--no-stats", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["summary"]["read"] == result["summary"]["shown"] == 20
    assert result["summary"]["dropped"] == 0
    assert result["summary"]["p50_ms"] > 0
    assert result["input"] == result["frame"] == [128, 96]
    (frames, times), (overlays, shown) = read(source), read(out)
    assert shown == pytest.approx(times, abs=0.002)
    assert len(overlays) == 20
    assert overlays[0].shape == (96, 128, 3)
    for frame, overlay in zip(frames, overlays, strict=True):
        expected = np.array([RED, GREEN, BLUE])[frame.argmax(-1)]
        nearest = np.linalg.norm(overlay[..., None, :].astype(float) - np.array([RED, GREEN, BLUE]), axis=-1)
        right = (expected == np.array([RED, GREEN, BLUE])[nearest.argmin(-1)]).all(-1)
        assert right.mean() > 0.85, "colors at the borders of classes are blurred by the codec, no more"


def test_watch_reads_a_folder(tmp_path: Path, recipe: object, capsys: pytest.CaptureFixture[str]) -> None:
    from overfly.recipe import Recipe
    from overfly.training.setup import initial_network

    assert isinstance(recipe, Recipe)
    weights = initial_network(recipe)[0].save(tmp_path / "net.safetensors")
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(3):
        Image.fromarray(numbered_frame(index, 128, 96)).save(frames / f"{index}.png")
    out = tmp_path / "new" / "overlay.mkv"
    assert overfly("watch", weights, frames, "--out", out, "--fps", 4, "--size", 64, "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert "frames: 3 read, 3 shown, 0 dropped" in shown
    assert "128×96, network input 64×48; net with torch" in shown
    overlays, times = read(out)
    assert [overlay.shape for overlay in overlays] == [(96, 128, 3)] * 3
    assert times == pytest.approx([0, 0.25, 0.5], abs=0.002)


def test_interrupt_finishes_the_video(
    network: Callable[[Predictor], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = 0

    def interrupted(images: Floats) -> Floats:
        nonlocal passes
        passes += 1
        if passes == 1 + 7:  # the first warms up
            os.kill(os.getpid(), signal.SIGINT)
        return brightest(images)

    before = signal.getsignal(signal.SIGINT)
    network(rule_model(interrupted))
    source = video(tmp_path / "a.mp4", frames=60)
    assert (
        overfly("watch", "RUN", source, "--out", tmp_path / "o.mp4", "--opacity", 0, "--no-legend", "--no-stats") == 0
    )
    assert "stopped by the user" in capsys.readouterr().out
    overlays, _ = read(tmp_path / "o.mp4")
    assert [frame_number(overlay) for overlay in overlays] == list(range(7))
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "o.mp4"]


def test_second_interrupt_stops_at_once(
    network: Callable[[Predictor], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hit_twice(images: Floats) -> Floats:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return brightest(images)

    network(rule_model(hit_twice))
    assert overfly("watch", "RUN", video(tmp_path / "a.mp4"), "--out", tmp_path / "o.mp4") == 130
    assert "stopped" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_realtime_drops_frames(
    network: Callable[[Predictor], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import time

    def slow(images: Floats) -> Floats:
        time.sleep(0.1)
        return brightest(images)

    network(rule_model(slow))
    source = video(tmp_path / "a.mp4", frames=30, fps=50)
    assert overfly("watch", "RUN", source, "--out", tmp_path / "o.mp4", "--realtime", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    summary = result["summary"]
    assert result["realtime"]
    assert summary["read"] == 30
    assert summary["shown"] + summary["dropped"] == 30
    assert 1 <= summary["shown"] <= 8
    assert 0.58 <= summary["seconds"] < 10
    assert summary["p50_ms"] >= 100
    overlays, times = read(tmp_path / "o.mp4")
    assert len(overlays) == summary["shown"]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(29 / 50, abs=0.002), "the last frame is shown at its own time"


def test_overlay_is_served(
    network: Callable[[Predictor], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import urllib.request

    pages: list[bytes] = []

    def predict(images: Floats) -> Floats:
        if (result := re.search(r"overlay at (\S+)", capsys.readouterr().err)) and not pages:
            page.append(result.group(1))
        if page and len(shown) > 1:  # the first pass warms up, the second is of the first frame
            with urllib.request.urlopen(f"{page[0]}", timeout=10) as answer:  # noqa: S310  (our own page)
                pages.append(answer.read())
        shown.append(1)
        return brightest(images)

    page: list[str] = []
    shown: list[int] = []
    network(rule_model(predict))
    result = streaming.watch("RUN", str(video(tmp_path / "a.mp4", frames=4)), serve=0)
    assert result.summary.shown == 4
    assert pages
    assert all(b"/stream" in page for page in pages)


@pytest.mark.parametrize("breaks", [False, True])
def test_page_shows_how_the_stream_ended(
    breaks: bool, network: Callable[[Predictor], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(images: Floats) -> Floats:
        if breaks and screens and screens[0].number:
            raise DataError("frames/2.png is damaged; remove it")
        return brightest(images)

    class RecordingFrame(LatestFrame):
        def __init__(self) -> None:
            super().__init__()
            screens.append(self)

    screens: list[LatestFrame] = []
    monkeypatch.setattr("overfly.video.player.LatestFrame", RecordingFrame)
    network(rule_model(predict))
    source = str(video(tmp_path / "a.mp4", frames=4))
    if breaks:
        with pytest.raises(DataError, match="damaged"):
            streaming.watch("RUN", source, serve=0, quiet=True)
    else:
        streaming.watch("RUN", source, serve=0, quiet=True)
    (latest_frame,) = screens
    assert latest_frame.end_reason == ("frames/2.png is damaged; remove it" if breaks else "finished after 4 frames")


MISTAKES = [
    (["{video}"], "--out"),
    (["{folder}/none.mp4", "--out", "{out}"], "none.mp4"),
    (["{folder}/empty", "--out", "{out}"], "empty"),
    (["{folder}/text.mp4", "--out", "{out}"], "text.mp4"),
    (["{folder}/cut.mp4", "--out", "{out}"], "cut.mp4"),
    (["/dev/video77", "--out", "{out}"], "/dev/video77"),
    (["{video}", "--out", "{video}"], "a.mp4"),
    (["{video}", "--out", "{folder}/o.gif"], "o.mp4"),
    (["{video}", "--out", "{folder}/text.mp4/o.mp4"], "o.mp4"),
    (["{video}", "--out", "{out}", "--opacity", "2"], "--opacity"),
    (["{video}", "--out", "{out}", "--size", "0"], "--size"),
    (["{video}", "--out", "{out}", "--fps", "5"], "--fps"),
    (["{video}", "--out", "{out}", "--seconds", "-1"], "--seconds"),
    (["{video}", "--serve", "99999"], "--serve"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[" ".join(mistake[0])[:50] for mistake in MISTAKES])
def test_mistakes_give_one_line(
    arguments: list[str], named: str, network: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del network
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    source = video(tmp_path / "a.mp4", frames=40)
    (tmp_path / "cut.mp4").write_bytes(source.read_bytes()[: source.stat().st_size * 7 // 10])
    before = sorted(tmp_path.iterdir())
    names = {"video": source, "folder": tmp_path, "out": tmp_path / "o.mp4"}
    assert overfly("watch", "RUN", *(entry.format(**names) for entry in arguments)) == 2
    shown = capsys.readouterr()
    assert named in shown.err
    assert "Traceback" not in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_network_of_other_bands_is_rejected(
    network: Callable[[Predictor], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network(rule_model(bands=4))
    assert overfly("watch", "RUN", video(tmp_path / "a.mp4"), "--out", tmp_path / "o.mp4") == 2
    assert "4 bands" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_guide_runs(
    network: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run every command and the program, except those that need a camera."""
    del network
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("overfly.commands.load_predictor.load_predictor", lambda *_, **__: rule_model())
    (tmp_path / "frames").mkdir()
    for index in range(3):
        Image.fromarray(numbered_frame(index)).save(tmp_path / "frames" / f"{index}.png")
    video(Path("flight.mp4"))
    text = (REPOSITORY / "docs" / "guides" / "stream.md").read_text(encoding="utf-8")
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if "/dev/video" in line or "rtsp:" in line:
                continue
            assert overfly(*shlex.split(line.replace("--serve 8000", "--serve 0"))[1:]) == 0, line
            lines.append(line)
    assert len(lines) == 3
    assert len(read(tmp_path / "overlay.mp4")[0]) == 10
    capsys.readouterr()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(program, "stream.md", "exec"), {})  # noqa: S102  (our own guide)
    shown, dropped, p95 = capsys.readouterr().out.split()
    assert int(shown) + int(dropped) == 10
    assert float(p95) > 0
