"""Predict videos, cameras and folders of frames."""
