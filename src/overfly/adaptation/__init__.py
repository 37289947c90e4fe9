"""Adaptation to a target without labels: train candidates, check and compare them, recommend one."""
