"""Scores on labeled images, label-free metrics, and speed of networks."""
