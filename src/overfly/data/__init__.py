"""Imagery: what a dataset must say, and all between its files and a batch. A new dataset is added to this list."""

from __future__ import annotations

from overfly.data import folder, loveda
from overfly.data.synthetic import domain as synthetic

BUILT_IN = (loveda, folder, synthetic)
"""The modules whose domains are always known."""

__all__ = ["BUILT_IN", "folder", "loveda", "synthetic"]
