"""Adapt to a target without labels: candidates, their label-free checks, and which one is recommended."""
