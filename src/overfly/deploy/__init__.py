"""A trained network outside of its run: exports, rasters, streams, many machines."""
