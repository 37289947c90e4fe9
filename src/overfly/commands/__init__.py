"""The commands: ``overfly train a.yaml --out runs`` is ``overfly.train("a.yaml", out="runs")``.

Each file has a function whose signature and docstring are the command's options and help, and the class of its result,
which rich prints (``__rich_console__``). Command files import only the standard library, cyclopts,
`overfly.core.errors`, `overfly.core.choices` and `overfly.commands.arguments` at the top, so that ``--help`` is fast;
other imports are inside functions or under TYPE_CHECKING. cyclopts resolves the annotations of arguments and result at
runtime. Paths are annotated `PathLike` and converted with ``Path(…)`` inside.
"""

MODULES = {
    "adapt": "adapt",
    "benchmark": "benchmark",
    "data_check": "data",
    "data_fetch": "data",
    "data_stats": "data",
    "data_synthesize": "data",
    "evaluate": "evaluate",
    "export": "export",
    "hub_load": "export",
    "hub_push": "export",
    "list_kinds": "list",
    "predict": "predict",
    "rank": "rank",
    "report": "report",
    "serve": "serve",
    "speed": "speed",
    "train": "train",
    "watch": "watch",
}
"""Module of each command. ``data_check`` is ``overfly data check`` on the command line, ``list_kinds`` is ``list``."""
