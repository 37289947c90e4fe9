"""How a stream ended, in words for those who look at it."""

from __future__ import annotations

from overfly.video.player import StreamSummary

FAULT = "something went wrong, which the output of the program that shows it tells"
"""What is said of an end that nobody has foreseen."""


def end_message(summary: StreamSummary, errors: str = "") -> str:
    """How a stream ended; ``errors`` is why, where that was no plain end."""
    how = "it was stopped" if summary.stopped else f"it broke off ({errors})" if errors else "it came to its end"
    return f"{how} after {summary.shown} picture{'s' * (summary.shown != 1)}"


def public_message(error: Exception, source: str) -> str:
    """What went wrong with a stream, without its address, which may hold a password."""
    on_progress = str(error)
    if "://" in source:
        return on_progress.replace(source, "the stream")
    return f"the stream{on_progress.removeprefix(source)}" if on_progress.startswith(f"{source} ") else on_progress
