"""A .pt2 file that would run code when PyTorch loads it is refused before PyTorch reads it."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from overfly.commands.load_predictor import load_predictor
from overfly.core.errors import OverflyError, WeightsError
from overfly.exporting.graph import ExportModule
from overfly.exporting.predictor import ExportSettings, Floats, metadata_entries, model_metadata, segmenter_predictor
from overfly.exporting.runtimes import torch_predictor
from overfly.exporting.torch_program import _is_size, clean_archive, write_torch
from overfly.models.segmenter import Segmenter
from random_networks import random_network

SIDE = 64
MODEL = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"
Change = Callable[[dict[str, Any], str], None]


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return random_network("lraspp_mobilenet_v2")


@pytest.fixture(scope="module")
def file(segmenter: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = model_metadata(segmenter, window=SIDE).model_copy(update={"fixed": True})
    path = tmp_path_factory.mktemp("export") / "network.pt2"
    settings = ExportSettings(format="torch")
    return write_torch(ExportModule(segmenter, fixed=(SIDE, SIDE)).eval(), path, metadata_entries(metadata, settings))


def rewritten(file: Path, path: Path, part: str, change: Change, code: str) -> Path:
    """Copy an archive with one of its JSON parts changed."""
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == part:
                values = json.loads(content)
                change(values, code)
                content = json.dumps(values).encode()
            target.writestr(name, content)
    return path


def graph(model: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = model["graph_module"]["graph"]
    return found


def first_tensor(model: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(graph(model)["tensor_values"].values()))
    return found


def expression(code: str) -> dict[str, Any]:
    return {"as_expr": {"expr_str": code, "hint": {"as_int": 1}}}


def size(model: dict[str, Any], code: str) -> None:
    first_tensor(model)["sizes"][0] = expression(code)


def stride(model: dict[str, Any], code: str) -> None:
    first_tensor(model)["strides"][0] = expression(code)


def offset(model: dict[str, Any], code: str) -> None:
    first_tensor(model)["storage_offset"] = expression(code)


def sym_int(model: dict[str, Any], code: str) -> None:
    graph(model)["sym_int_values"]["size"] = expression(code)


def sym_bool(model: dict[str, Any], code: str) -> None:
    graph(model)["sym_bool_values"]["size"] = {"as_expr": {"expr_str": code, "hint": None}}


def sym_float(model: dict[str, Any], code: str) -> None:
    graph(model)["sym_float_values"]["size"] = {"as_expr": {"expr_str": code, "hint": None}}


def assumption(model: dict[str, Any], code: str) -> None:
    size(model, f"Symbol('s0', positive={code})")


def guards(model: dict[str, Any], code: str) -> None:
    model["guards_code"] = [code]


def operator(model: dict[str, Any], code: str) -> None:
    del code
    graph(model)["nodes"][0]["target"] = "torch.os.system"


def writing_operator(model: dict[str, Any], code: str) -> None:
    del code
    graph(model)["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def placeholder(model: dict[str, Any], code: str) -> None:
    graph(model)["inputs"][-1]["as_tensor"]["name"] = f"image={code}"


def argument_name(model: dict[str, Any], code: str) -> None:
    signature = next(each["signature"] for each in model["graph_module"]["module_call_graph"] if each["signature"])
    signature["forward_arg_names"] = [f'image", {code}, "']


def tree(model: dict[str, Any], code: str) -> None:
    del code
    signature = next(each["signature"] for each in model["graph_module"]["module_call_graph"] if each["signature"])
    context = json.dumps({"default_factory_module": "this", "default_factory_name": "s", "dict_context": "[]"})
    node = {"type": "collections.defaultdict", "context": context, "children_spec": []}
    signature["out_spec"] = json.dumps([1, node])


def subgraph(model: dict[str, Any], code: str) -> None:
    argument = {"as_graph": {"name": "inner", "graph": graph(json.loads(json.dumps(model)))}}
    size(argument["as_graph"] | {"graph_module": {"graph": argument["as_graph"]["graph"]}}, code)
    graph(model)["nodes"][0]["inputs"][0]["arg"] = argument


def custom_object(model: dict[str, Any], code: str) -> None:
    del code
    graph(model)["custom_obj_values"]["it"] = {"name": "it", "class_fqn": "os.system"}
    graph(model)["nodes"][0]["inputs"][0]["arg"] = {"as_custom_obj": {"name": "it", "class_fqn": "os.system"}}


def range_constraint(model: dict[str, Any], code: str) -> None:
    model["range_constraints"][code] = {"min_val": 1, "max_val": 2}


CHANGES: tuple[Change, ...] = (
    size, stride, offset, sym_int, sym_bool, sym_float, assumption, guards, operator, writing_operator, placeholder,
    argument_name, tree, subgraph, custom_object, range_constraint,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_code_in_the_model_is_refused_unread(
    change: Change, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    code = f"__import__('os').system('touch {marker}')"
    crafted = rewritten(file, tmp_path / "crafted.pt2", MODEL, change, code)
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("PyTorch reads the file"))
    for opened in (torch_predictor, load_predictor):
        with pytest.raises(OverflyError, match=r"crafted\.pt2") as raised:
            opened(crafted, device="cpu")
        assert len(str(raised.value).splitlines()) == 1
    assert not marker.exists()


@pytest.mark.parametrize("part", [WEIGHTS, "archive/data/constants/model_constants_config.json"])
def test_pickles_and_code_in_tensor_configurations_are_refused(part: str, file: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    def use_pickle(values: dict[str, Any], code: str) -> None:
        del code
        meta = next(iter(values["config"].values()), {"path_name": "tensor_0", "is_param": False, "tensor_meta": None})
        values["config"]["it"] = meta | {"use_pickle": True}

    def sizes(values: dict[str, Any], code: str) -> None:
        values["config"]["it"] = {"path_name": "weight_0", "tensor_meta": {"sizes": [expression(code)]}}

    for change in (use_pickle, sizes):
        crafted = rewritten(file, tmp_path / "crafted.pt2", part, change, f"__import__('os').system('touch {marker}')")
        with pytest.raises(WeightsError, match=r"crafted\.pt2"):
            torch_predictor(crafted)
    assert not marker.exists()


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    "name",
    [
        "archive/data/constants/opaque_obj_0", "archive/data/constants/custom_obj_0", "archive/data/weights/model.pt",
        "archive/data/aotinductor/model/model.so", "archive/MODELS/MODEL.JSON", "archive/models/../models/model.json",
        "archive/data/sample_inputs/other.pt", "serialized_exported_program.json", "version",
    ],
)  # fmt: skip
def test_other_parts_are_refused(name: str, file: Path, tmp_path: Path) -> None:
    crafted, marker = tmp_path / "crafted.pt2", tmp_path / "executed"
    crafted.write_bytes(file.read_bytes())
    with zipfile.ZipFile(crafted, "a") as archive:
        archive.writestr(name, pickle.dumps(Payload(marker)))
    with pytest.raises(WeightsError, match=r"crafted\.pt2"):
        torch_predictor(crafted)
    assert not marker.exists()


def test_a_part_of_two_contents_is_refused(file: Path, tmp_path: Path) -> None:
    crafted = tmp_path / "crafted.pt2"
    crafted.write_bytes(file.read_bytes())
    with zipfile.ZipFile(crafted, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(MODEL, b"{}")
    with pytest.raises(WeightsError, match=r"model\.json"):
        clean_archive(crafted)


def test_a_compressed_part_is_refused(file: Path, tmp_path: Path) -> None:
    crafted = tmp_path / "crafted.pt2"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(crafted, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(WeightsError, match=r"crafted\.pt2"):
        clean_archive(crafted)


def test_pytorch_reads_the_checked_copy_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original_load = torch.export.load

    def load(source: Any, **more: Any) -> Any:
        assert isinstance(source, io.BytesIO)  # a second directory in the file would be read by PyTorch alone
        return original_load(source, **more)

    monkeypatch.setattr(torch.export, "load", load)
    torch_predictor(file)


@pytest.mark.parametrize(
    "text",
    [
        "4", "-1", "s0", "s0 + 1", "2*((s77 + 31)//32)", "Max(1, s0)", "Integer(-1)",
        "FloorDiv(Add(Symbol('s6', positive=True, integer=True), Integer(3)), Integer(4))",
    ],
)  # fmt: skip
def test_expressions_of_sizes_are_allowed(text: str) -> None:
    import ast

    assert _is_size(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize(
    "text",
    [
        "s0.x", "s0()", "9**9", "'s0'", "Symbol('os')", "Symbol('s0', real=s0)", "[s0]", "lambda: s0", "1.5", "True",
        "Max(*s0)", "Max(1, x=1)", "system", "s0 if s0 else s0", "s0 and s0", "f'{s0}'", str(2**70), "(s0 := 1)",
    ],
)  # fmt: skip
def test_other_expressions_are_not(text: str) -> None:
    import ast

    assert not _is_size(ast.parse(text, mode="eval").body)


def test_own_exports_open_and_predict_as_pytorch(file: Path, segmenter: Segmenter) -> None:
    predictor = torch_predictor(file)
    image: Floats = np.random.default_rng(0).uniform(0, 255, (1, 3, SIDE, SIDE)).astype(np.float32)
    expected = segmenter_predictor(segmenter, predictor.metadata)(image)
    np.testing.assert_allclose(predictor(image), expected, atol=1e-4)


def test_own_exports_hold_no_paths_of_the_machine(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        assert b"site-packages" not in archive.read(MODEL)
        assert b".py" not in archive.read(MODEL)
