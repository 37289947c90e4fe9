"""One paper a file. Each method is a value that says which networks it needs and what to minimise."""

from overfly.methods import (
    cbst,
    colour_transfer,
    dacs,
    daformer,
    distil,
    dsbn,
    fda,
    iast,
    mic,
    recalibrate,
    source_free,
    source_only,
    tent,
    transnorm,
)

__all__ = [
    "cbst",
    "colour_transfer",
    "dacs",
    "daformer",
    "distil",
    "dsbn",
    "fda",
    "iast",
    "mic",
    "recalibrate",
    "source_free",
    "source_only",
    "tent",
    "transnorm",
]
