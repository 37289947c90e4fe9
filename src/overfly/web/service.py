"""What the web server asks of the networks: an uploaded image becomes maps, within its time and room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from overfly.evaluation.panels import displayed
from overfly.raster.raster_source import input_gain
from overfly.web.config import Limits, Room
from overfly.web.gauges import Gauges
from overfly.web.kept import Answer, Kept, Map
from overfly.web.networks import Network
from overfly.web.prediction import predict
from overfly.web.uploads import Picture, checked, read, stored

T = TypeVar("T")


class Desk:
    """The networks of a server, its bounds, and the maps that it keeps.

    Attributes:
        networks: by key.
        limits: the bounds.
        kept: maps that were made for the page.
        gauges: what is counted.
        scenes: pictures of the server's own, by the number in the list.
    """

    def __init__(self, networks: Sequence[Network], limits: Limits, scenes: Sequence[Path] = ()) -> None:
        self.networks = {network.key: network for network in networks}
        self.limits = limits
        self.scenes = list(scenes)
        self.kept = Kept(limits.kept)
        self.room = Room(2 * limits.pixels)
        self._pool: ThreadPoolExecutor | None = None
        self.gauges = Gauges(lambda: sum(network.waiting for network in networks))

    async def work(self, task: Callable[[float], T]) -> T:
        """What a task gives that is told its deadline, done by a thread while others are served."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.limits.queue, thread_name_prefix="requests")
        deadline = time.monotonic() + self.limits.seconds
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: task(deadline))

    def upload(
        self, file: BinaryIO, networks: Sequence[Network], deadline: float, max_value: float | None = None
    ) -> tuple[Picture, dict[str, Answer]]:
        """What some networks say of an image that somebody sent.

        Args:
            file: the bytes of a PNG, JPEG or TIFF.
            networks: who is asked, each once.
            deadline: time of `time.monotonic` at which to give up.
            max_value: value of the image's brightest pixel; None where it is the networks'.

        Raises:
            DataError: it is no image that they read, or of another range of values and ``max_value`` is not given.
            LateError: the deadline has passed.
        """
        with stored(file) as path:
            return self.ask(path, networks, deadline, max_value)

    def ask(
        self, path: Path, networks: Sequence[Network], deadline: float, max_value: float | None = None
    ) -> tuple[Picture, dict[str, Answer]]:
        """The same of a file on disk; each network gets the bands that it reads, the picture is the first's."""
        answers: dict[str, Answer] = {}
        metadata = [network.ready(self.limits, self.gauges.batches.observe)[0] for network in networks]
        several = len({each.bands for each in metadata}) > 1
        for network, each in zip(networks, metadata, strict=True):
            title = network.title if several else "the network"
            found = checked(path, bands=each.bands, pixels=self.limits.pixels, network=title)
        gains = [
            input_gain(path, found.stored or found.dtype, each, max_value, option="max_value=") for each in metadata
        ]
        pixels = found.height * found.width
        with self.room.take(pixels, deadline):
            pictures = {bands: read(path, found, bands) for bands in dict.fromkeys(each.bands for each in metadata)}
            for network, each, gain in zip(networks, metadata, gains, strict=True):
                picture = pictures[each.bands]
                run = network.runner(self.limits, deadline, self.gauges.batches.observe)
                answers[network.key] = Answer(network.title, each.classes, predict(picture, each, run, gain))
                self.gauges.pixels.inc(pixels)
        return pictures[metadata[0].bands], answers

    def keep(self, picture: Picture, answers: dict[str, Answer]) -> Map:
        """Keep maps to be looked at."""
        return self.kept.add(displayed(picture.image), picture.place, answers)

    def close(self) -> None:
        """Let go of all networks and threads; the next request begins anew."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        for network in self.networks.values():
            network.close()


__all__ = ["Desk"]
