"""The networks that a server offers, each loaded when it is first asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from overfly.exporting.predictor import Floats, ModelMetadata, Predictor
from overfly.training.run import Run
from overfly.web.batching import Batcher
from overfly.web.config import Limits


@dataclass(eq=False)
class Network:
    """One network.

    Attributes:
        key: what it is called in addresses.
        title: what it is called on pages.
        opened: loads it.
        run: the run that it came from, if it did.
        about: facts in words for the list.
    """

    key: str
    title: str
    opened: Callable[[], Predictor]
    run: Run | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _predictor: Predictor | None = None
    _batcher: Batcher | None = None

    def ready(self, limits: Limits, on_batch: Callable[[int], None] | None = None) -> tuple[ModelMetadata, Batcher]:
        """Its facts, and what images are given to; loaded by the first call.

        Raises:
            OverflyError: it cannot be loaded.
        """
        with self._lock:
            if self._predictor is None or self._batcher is None:
                self._predictor = self.opened()
                self._batcher = Batcher(self._predictor, most=limits.batch, wait=limits.wait, on_batch=on_batch)
            return self._predictor.metadata, self._batcher

    @property
    def waiting(self) -> int:
        """Images that wait for it."""
        return 0 if self._batcher is None else self._batcher.waiting

    def runner(self, limits: Limits, deadline: float, on_batch: Callable[[int], None]) -> Callable[[Floats], Floats]:
        """The network as a function of images (N, C, H, W) that gives up at a deadline of `time.monotonic`."""
        _, batcher = self.ready(limits, on_batch)
        return lambda images: batcher(images, deadline)

    def close(self) -> None:
        """Let go of its thread."""
        with self._lock:
            if self._batcher is not None:
                self._batcher.close()
            self._batcher = self._predictor = None


__all__ = ["Network"]
