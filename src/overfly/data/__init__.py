"""Datasets, and the loading of their images and labels as batches. Add a new dataset to this list, or as a sheet."""

from overfly.data import datasets, folder, loveda, raster, synthetic

BUILT_IN = (loveda, folder, raster, synthetic, datasets)
"""The modules whose domains are always known."""
datasets.register_sheets()
