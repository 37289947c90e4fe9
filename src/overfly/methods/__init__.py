"""One paper a file. Each method is a value that says which networks it needs and what to minimise."""

from overfly.methods import (
    adaptsegnet,
    advent,
    cbst,
    clan,
    dacs,
    daformer,
    dsbn,
    fada,
    fda,
    iast,
    mcd,
    mic,
    recalibrate,
    source_free,
    source_only,
    tent,
    transnorm,
)
from overfly.methods import color_transfer as colour_transfer
from overfly.methods import distillation as distil
from overfly.methods import multiscale_self_training as overfly

__all__ = [
    "adaptsegnet",
    "advent",
    "cbst",
    "clan",
    "colour_transfer",
    "dacs",
    "daformer",
    "distil",
    "dsbn",
    "fada",
    "fda",
    "iast",
    "mcd",
    "mic",
    "overfly",
    "recalibrate",
    "source_free",
    "source_only",
    "tent",
    "transnorm",
]
