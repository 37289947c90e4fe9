from __future__ import annotations

import threading

from overfly.views.frames import Frames


def test_watchers_see_the_newest_and_never_an_old_one() -> None:
    frames = Frames()
    assert frames.newest() is None
    assert frames.wait(timeout=0.01) is None
    for number in range(5):
        frames.put(b"%d" % number)
    found = frames.newest()
    assert found is not None
    assert (found.number, found.jpeg) == (5, b"4")
    assert frames.newest(after=5) is None


def test_a_watcher_is_woken_by_a_frame_and_by_the_end() -> None:
    frames = Frames()
    seen: list[object] = []
    watcher = threading.Thread(target=lambda: seen.extend([frames.wait(timeout=10), frames.wait(1, timeout=10)]))
    watcher.start()
    frames.put(b"one")
    while not seen and watcher.is_alive():
        frames.close()
        watcher.join(0.5)
    watcher.join(10)
    assert seen == [(1, b"one"), None]
    assert frames.closed
