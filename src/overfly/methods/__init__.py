"""Training and adaptation methods. The module of a new method is added to this list."""

from importlib import import_module

BUILT_IN = (
    "adversarial", "average_weights", "dacs", "distillation", "domain_norms", "fda", "large_teacher",
    "multiscale_self_training", "recalibrate", "self_training", "source_free", "source_only", "two_classifiers",
)  # fmt: skip
"""Modules of the built-in methods."""

for _name in BUILT_IN:
    import_module(f"overfly.methods.{_name}")
