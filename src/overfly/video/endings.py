"""How a stream ended, in words for those who look at it."""

from __future__ import annotations

from overfly.video.player import Summary

FAULT = "something went wrong, which the output of the program that shows it tells"
"""What is said of an end that nobody has foreseen."""


def ending(summary: Summary, trouble: str = "") -> str:
    """How a stream ended; ``trouble`` is why, where that was no plain end."""
    how = "it was stopped" if summary.stopped else f"it broke off ({trouble})" if trouble else "it came to its end"
    return f"{how} after {summary.shown} picture{'s' * (summary.shown != 1)}"


def in_public(error: Exception, source: str) -> str:
    """What went wrong with a stream, without its address, which may hold a password."""
    told = str(error)
    if "://" in source:
        return told.replace(source, "the stream")
    return f"the stream{told.removeprefix(source)}" if told.startswith(f"{source} ") else told


__all__ = ["FAULT", "ending", "in_public"]
