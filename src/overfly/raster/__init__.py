"""Predict rasters of any size, window by window, into georeferenced maps."""
