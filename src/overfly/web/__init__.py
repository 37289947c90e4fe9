"""The web server: pages and an HTTP API (extra: serve)."""

import importlib
import importlib.util
from types import ModuleType

from overfly.core.errors import MissingExtraError

PACKAGES = ("fastapi", "uvicorn", "prometheus_fastapi_instrumentator", "cachetools", "python_multipart")


def load_server() -> ModuleType:
    """Import `overfly.web.server`; raise `MissingExtraError` if a package of its extra is not installed."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "serve", "serving")
    return importlib.import_module("overfly.web.server")
