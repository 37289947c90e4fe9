"""Training and adaptation methods. The module of a new method is added to this list."""

from importlib import import_module

BUILT_IN = (
    "adaptsegnet", "cbst", "clan", "dacs", "daformer", "distillation", "dsbn", "fada",
    "fda", "gcw_ldq", "iast", "mcd", "mic", "multiscale_self_training", "recalibrate", "source_free", "source_only",
    "tent", "transnorm",
)  # fmt: skip
"""Modules of the built-in methods."""

for _name in BUILT_IN:
    import_module(f"overfly.methods.{_name}")
