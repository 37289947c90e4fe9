"""Datasets, and the loading of their images and labels as batches. Add a new dataset to this list."""

from overfly.data import folder, loveda, synthetic

BUILT_IN = (loveda, folder, synthetic)
"""The modules whose domains are always known."""
