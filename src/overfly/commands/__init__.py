"""The commands: ``overfly train a.yaml --out runs`` is ``overfly.train("a.yaml", out="runs")``.

Each file has a function whose signature and docstring are the command's options and help, and the class of its result,
which rich prints. At the top, command files import only the standard library, cyclopts, `overfly.core.errors`,
`overfly.core.choices` and `overfly.commands.arguments`, so that ``--help`` is fast. cyclopts resolves the annotations
of arguments and result at runtime. Paths are annotated `PathLike` and converted with ``Path(…)`` inside.
"""

MODULES = {key: key for key in ("evaluate", "export", "predict", "rank", "serve", "train", "watch")}
MODULES |= dict.fromkeys(("adapt", "benchmark", "report"), "train")
MODULES |= dict.fromkeys(("data_check", "data_fetch", "data_list", "data_stats", "data_synthesize"), "data")
MODULES |= {"hub_load": "export", "hub_push": "export", "list_kinds": "data", "speed": "evaluate", "suggest": "rank"}
"""Module of each command. ``data_check`` is ``overfly data check`` on the command line, ``list_kinds`` is ``list``."""
