"""One paper a file. Each method is a value that says which networks it needs and what to minimise."""

from overfly.methods import recalibrate, source_only

__all__ = ["recalibrate", "source_only"]
