"""Write programs of torch.export as .pt2 files, and read them without running code of the file.

`torch.export.load` evaluates expressions, imports names and unpickles objects of the file. `clean_archive` parses it
first, rejects content that overfly does not export, and copies the rest into a new archive, which PyTorch reads.
"""

import ast
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_structure, treespec_dumps

from overfly.core.errors import OverflyError, WeightsError
from overfly.exporting.graph import MIN_SIDE, ExportModule
from overfly.exporting.predictor import EXPORT_KEY, MODEL_KEY
from overfly.models.checkpoints import first_line

TRACE_SIZE = (1280, 1408)
"""Image size for tracing, large enough that every feature map has more than one pixel."""
ARCHIVE_PARTS = re.compile(
    r"archive/(archive_format|archive_version|byteorder|\.data/(serialization_id|version)"
    r"|models/\w+\.json|data/(weights|constants)/\w+\.json|data/weights/weight_\d+|data/constants/tensor_\d+"
    r"|data/sample_inputs/\w+\.pt|extra/\w+)"
)
"""Allowed parts of an archive; others, such as pickled objects, are rejected."""
MAX_JSON = 64 * 2**20
"""Largest JSON part of an archive, in bytes."""
NAME = re.compile(r"[A-Za-z0-9_.]*")
"""Allowed strings and keys of an archive's JSON, besides those of `_is_allowed`."""
SYMBOL = re.compile(r"[a-z]{1,2}\d{1,9}")
"""Symbols in the expressions of sizes, such as s0."""
FUNCTIONS = frozenset({"Integer", "Add", "Mul", "FloorDiv", "CeilDiv", "Mod", "PythonMod", "Max", "Min"})
"""Functions in the expressions of sizes."""
SCALAR_OPERATORS = re.compile(
    r"_operator\.(add|sub|mul|floordiv|mod|neg|ge|gt|le|lt|eq|ne)|torch\.sym_(max|min|not|int|float)"
)
"""Operators on sizes."""
TREE_SPECS = frozenset(treespec_dumps(tree_structure(tree)) for tree in (((0,), dict[str, int]()), 0))
"""Allowed structures of input and output: one image, one tensor. Other structures can import modules."""
FORBIDDEN = frozenset({"guards_code", "use_pickle", "as_graph", "as_custom_obj", "as_operator"})
"""Keys whose values PyTorch executes or unpickles; false or empty in exports of overfly."""


def write_torch(module: ExportModule, path: Path, properties: Mapping[str, str]) -> Path:
    """Trace a graph and write it as a program of torch.export (.pt2).

    Raises `OverflyError`: the network cannot be traced, and `WeightsError`: `clean_archive` rejects the program.
    """
    program = _trace(module)
    program._example_inputs = None  # as large as all weights
    archive = io.BytesIO()  # PyTorch's writer ends the process if the disk is full
    with quiet():
        torch.export.save(program, archive, extra_files=dict(properties))
    path.write_bytes(clean_archive(path, archive).getbuffer())
    return path


def _trace(module: ExportModule) -> Any:
    import torch.fx.experimental._config as shapes

    dim = torch.export.Dim
    batch = {0: dim("batch", min=1)}
    sides = {} if module.fixed else {2: dim("height", min=MIN_SIDE), 3: dim("width", min=MIN_SIDE)}
    image = torch.zeros(2, module.bands, *(module.fixed or TRACE_SIZE))
    try:
        # bilinear resizing handles feature maps of one pixel like others
        with warnings.catch_warnings(), shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            warnings.simplefilter("ignore")  # internal to the library
            return torch.export.export(module, (image,), dynamic_shapes=(batch | sides,), strict=False)
    except Exception as error:  # the library has no common error class
        raise OverflyError(
            f"the network cannot be traced by torch.export ({first_line(error)}); set --size for tiles of a fixed size"
        ) from error


class DisallowedContentError(Exception):
    """Content of an archive that overfly does not export."""


def clean_archive(path: Path, archive: io.BytesIO | None = None) -> io.BytesIO:
    """Copy an archive of torch.export into memory, or reject it if loading it could run code.

    The metadata of nodes (stack traces, names of modules) is not copied. ``archive`` is the content of the .pt2 file
    ``path``; None: it is read. Raises `WeightsError`: the file is damaged, or holds content that overfly does not
    export.
    """
    try:
        return _copy_allowed_parts(archive or path)
    except DisallowedContentError as error:
        raise WeightsError(
            f"{path} holds {error}, which overfly does not export and which could run code, so it was refused; export "
            "the run again with `overfly export`"
        ) from None
    except Exception as error:  # errors of zlib, struct or zipfile
        raise WeightsError(f"{path} is damaged or not a .pt2 file ({first_line(error)}); export it again") from error


def _copy_allowed_parts(archive: io.BytesIO | Path) -> io.BytesIO:
    """Copy the parts of an archive; reject those that `ARCHIVE_PARTS` does not match."""
    cleaned = io.BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(cleaned, "w") as target:
        seen = set()
        for part in source.infolist():
            name = part.filename
            if not ARCHIVE_PARTS.fullmatch(name) or name.lower() in seen or part.compress_type != zipfile.ZIP_STORED:
                raise DisallowedContentError(f"the part {name!r}")
            seen.add(name.lower())  # PyTorch ignores case in names
            if name.endswith(".pt") and part.file_size:
                raise DisallowedContentError(f"pickled inputs in {name!r}")
            if name.endswith(".json"):
                if part.file_size > MAX_JSON:
                    raise DisallowedContentError(f"the part {name!r} of {part.file_size} bytes")
                content = json.dumps(_clean_json(json.loads(source.read(part)))).encode()
            else:
                content = source.read(part)
            target.writestr(zipfile.ZipInfo(name), content)
    cleaned.seek(0)
    return cleaned


def _clean_json(value: Any, key: str = "") -> Any:
    """Return a JSON value without the metadata of nodes; reject disallowed strings, keys and objects."""
    if key in FORBIDDEN and value:
        raise DisallowedContentError(f"{key} {str(value)[:60]!r}")
    if key == "metadata":
        return {}
    if isinstance(value, dict):
        for inner in value:
            if not NAME.fullmatch(inner):
                raise DisallowedContentError(f"the key {inner[:60]!r}")
        return {inner: _clean_json(item, inner) for inner, item in value.items()}
    if isinstance(value, list):
        return [_clean_json(item, key) for item in value]
    if isinstance(value, str) and not _is_allowed(key, value):
        raise DisallowedContentError(f"{key} {value[:60]!r}")
    return value


def _is_allowed(key: str, text: str) -> bool:
    """Return whether a string of an archive's JSON is allowed under its key."""
    if key == "expr_str":
        try:
            return len(text) <= 10_000 and _is_size(ast.parse(text, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    if key == "target":
        return SCALAR_OPERATORS.fullmatch(text) is not None or _is_tensor_operator(text)
    if key in ("in_spec", "out_spec"):
        return text in TREE_SPECS
    return key == "torch_version" or NAME.fullmatch(text) is not None


def _is_size(node: ast.expr) -> bool:
    """Return whether an expression consists of integers, symbols such as s0, + - * // and `FUNCTIONS`."""
    match node:
        case ast.Constant(value=value):
            return type(value) is int and value.bit_length() < 64
        case ast.Name(id=name) | ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            assumptions = getattr(node, "keywords", [])
            return SYMBOL.fullmatch(name) is not None and all(
                isinstance(keyword.value, ast.Constant) and keyword.value.value is True for keyword in assumptions
            )
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_size(operand)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv(), right=right):
            return _is_size(left) and _is_size(right)
        case ast.Call(func=ast.Name(id=name), args=values, keywords=[]):
            return name in FUNCTIONS and all(_is_size(value) for value in values)
    return False


def _is_tensor_operator(target: str) -> bool:
    """Return whether a node's target is an operator of ATen without string arguments, such as a file's name."""
    namespace, _, name = target.rpartition("torch.ops.aten.")
    packet, _, overload = name.partition(".")
    schema = getattr(getattr(getattr(torch.ops.aten, packet, None), overload, None), "_schema", None)
    if namespace or not isinstance(schema, torch._C.FunctionSchema):
        return False
    return all("str" not in str(argument.type) or argument.name == "mode" for argument in schema.arguments)


def read_program(path: Path) -> tuple[Any, dict[str, str]]:
    """Read a .pt2 program and its metadata; raise `WeightsError` if the file is damaged or could run code."""
    archive = clean_archive(path)
    properties = dict.fromkeys((MODEL_KEY, EXPORT_KEY), "")
    try:
        with quiet():
            program = torch.export.load(archive, extra_files=properties)
    except Exception as error:  # the library has no common error class
        raise WeightsError(f"{path} cannot be opened by torch ({first_line(error)}); export it again") from error
    return program, {key: str(value) for key, value in properties.items() if value}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress and warnings of PyTorch's and the runtimes' tools."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
