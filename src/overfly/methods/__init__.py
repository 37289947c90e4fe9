"""One paper a file. Each method is a value that says which networks it needs and what to minimise."""

from overfly.methods import adaptsegnet, advent, clan, fada, mcd, recalibrate, source_only

__all__ = ["adaptsegnet", "advent", "clan", "fada", "mcd", "recalibrate", "source_only"]
