"""One paper a file. Each method is a value that says which networks it needs and what to minimize."""

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
from overfly.methods import color_transfer as color_transfer
from overfly.methods import distillation as distill
from overfly.methods import multiscale_self_training as overfly

__all__ = [
    "adaptsegnet",
    "advent",
    "cbst",
    "clan",
    "color_transfer",
    "dacs",
    "daformer",
    "distill",
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
