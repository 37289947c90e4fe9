"""The commands: ``overfly train a.yaml --out runs`` is ``overfly.train("a.yaml", out="runs")``.

Each file holds one verb: a function whose signature and docstring are the command's options and help, and the class of
its result, which prints itself (``__rich_console__``). A command file is light to import, so that ``--help`` is fast:
at the top only the standard library, cyclopts, `overfly.core.errors`, `overfly.core.choices` and
`overfly.commands.arguments`; everything else (rich too) is imported inside the functions, or under TYPE_CHECKING.
cyclopts resolves the annotations of the function, its result's too, so these need a class that exists at runtime.
Paths are annotated `PathLike` (a Path or a string) and converted with ``Path(…)`` inside.
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
