"""Export a graph as an ONNX model: input `images` (n, c, h, w) float32 in [0, 1], output `logits`, n of any size or 1.

Opset 13 and IR version 7, of 2020. No pooling uses ONNX's ceil_mode, which onnxruntime and onnx's own reference
evaluator interpret differently: the padding is written out so that whole windows fit. The same graph gives the same
bytes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atmc.core.files import write_beside
from atmc.core.version import __version__
from atmc.deploy.graph.graph import (
    Add,
    Affine,
    AvgPool,
    Conv,
    Flatten,
    FloatArray,
    GlobalAvgPool,
    Graph,
    Linear,
    LogitsFunction,
    MaxPool,
    Op,
    Pair,
    Relu,
    Shape,
)
from atmc.models.factory import USER_CODE_ERRORS, first_line

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

OPSET, IR_VERSION = 13, 7
INPUT, OUTPUT = "images", "logits"
EXTRA = "pip install 'atmc[deploy]'"

Operation = tuple[str, list[str], dict[str, Any]]  # operator, names of constants that follow its inputs, attributes
Store = Callable[[str, Any], str]  # (role, values) -> name of the constant that holds them


def to_onnx(graph: Graph, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> int:
    """Write the ONNX model of a graph, whole or not at all, and return its size in bytes; see `to_bytes`."""
    return write_beside(Path(path), to_bytes(graph, metadata=metadata))


def to_bytes(graph: Graph, *, metadata: Mapping[str, str] | None = None, batch: int | None = None) -> bytes:
    """Return the bytes of the ONNX model of a graph, checked by onnx.checker.

    Args:
        metadata: entries of its metadata_props, such as threat and method; "tool" is added.
        batch: the number of images that the model takes at once; None for any number.

    Raises:
        RuntimeError: onnx is not installed.
        ValueError: the graph is not consistent, or ONNX does not define one of its operations.
    """
    onnx = import_extra("onnx")
    model = onnx.helper.make_model(
        _build_graph(graph, batch),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="atmc",
        producer_version=__version__,
    )
    onnx.helper.set_model_props(model, dict(sorted({**(metadata or {}), "tool": f"atmc {__version__}"}.items())))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _build_graph(graph: Graph, batch: int | None) -> GraphProto:
    from onnx import TensorProto, helper, numpy_helper

    shapes = graph.shapes()
    unique, constants = _unique_names(INPUT, OUTPUT), []

    def store(owner: str, role: str, values: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values, order="C"), unique(f"{owner}.{role}")))
        return constants[-1].name

    nodes: list[NodeProto] = []
    names, last = [INPUT], len(graph.nodes) - 1
    assert last >= 0
    for index, node in enumerate(graph.nodes):
        name = unique(node.name or type(node.op).__name__.lower())
        names.append(OUTPUT if index == last else name)
        before, after = shapes[node.inputs[0]], shapes[index + 1]
        operations = _operations(node.op, before, after, partial(store, name))
        nodes += _chain(operations, [names[value] for value in node.inputs], names[-1], name, unique)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch or "n", *shape])
        for name, shape in ((INPUT, shapes[0]), (OUTPUT, shapes[-1]))
    ]
    return helper.make_graph(nodes, "atmc", ends[:1], ends[1:], constants)


def open_runtime(data: bytes, threads: int = 0) -> LogitsFunction:
    """Return a function that runs an ONNX model by onnxruntime on the CPU.

    Args:
        data: the bytes of the model.
        threads: of one call; 0 leaves the number to onnxruntime.

    Raises:
        RuntimeError: onnxruntime is not installed, or fails; the function raises it too.
    """
    runtime, failures = import_extra("onnxruntime"), runtime_errors()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only
    try:
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except failures as error:
        raise RuntimeError(f"onnxruntime cannot load the model: {first_line(error)}") from error

    def run(images: FloatArray) -> FloatArray:
        try:
            logits: FloatArray = session.run([OUTPUT], {INPUT: images})[0]
        except failures as error:
            raise RuntimeError(f"onnxruntime failed: {first_line(error)}") from error
        return logits

    return run


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return the errors of onnxruntime, its quantizer and onnx's checks; most share no base class but Exception."""
    names = ("onnxruntime.capi.onnxruntime_pybind11_state", "onnx.checker", "onnx.shape_inference")
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    errors = [value for value in values if isinstance(value, type) and issubclass(value, Exception)]
    return *USER_CODE_ERRORS, *errors


def import_extra(name: str) -> Any:
    """Import a package of the extra ``deploy``. Raises RuntimeError, which says what to install, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"{name} is not installed: {EXTRA}") from error


def _unique_names(*taken: str) -> Callable[[str], str]:
    """Return a function that returns a name as it is, or with the first of _1, _2, ... that makes it unique."""
    used = set(taken)

    def unique(wanted: str) -> str:
        name, number = wanted, 0
        while name in used:
            number += 1
            name = f"{wanted}_{number}"
        used.add(name)
        return name

    return unique


def _chain(
    operations: Sequence[Operation],
    inputs: list[str],
    output: str,
    name: str,
    unique: Callable[[str], str],
) -> list[NodeProto]:
    """Return ONNX nodes for the operations, each of which reads the one before it."""
    from onnx import helper

    nodes = []
    for index, (operator, constants, attributes) in enumerate(operations):
        last = index == len(operations) - 1
        label = name if last else unique(f"{name}.{operator.lower()}")
        result = output if last else label
        nodes.append(helper.make_node(operator, [*inputs, *constants], [result], label, **attributes))
        inputs = [result]
    return nodes


def _operations(op: Op, before: Shape, after: Shape, store: Store) -> list[Operation]:
    match op:
        case Conv():
            constants = [store("weight", op.weight), store("bias", op.bias)]
            kernel: Pair = op.weight.shape[2:]
            attributes = {"kernel_shape": kernel, "strides": op.stride, "pads": op.padding * 2}
            return [("Conv", constants, attributes | {"dilations": op.dilation, "group": op.groups})]
        case Linear():
            return [("Gemm", [store("weight", op.weight), store("bias", op.bias)], {"transB": 1})]
        case Affine():
            shape = (-1,) + (1,) * (len(before) - 1)
            scale, shift = store("scale", op.scale.reshape(shape)), store("shift", op.shift.reshape(shape))
            return [("Mul", [scale], {}), ("Add", [shift], {})]
        case Relu():
            if op.ceiling is None:
                return [("Relu", [], {})]
            bounds = [("min", 0), ("max", op.ceiling)]
            return [("Clip", [store(role, np.array(bound, np.float32)) for role, bound in bounds], {})]
        case MaxPool():
            return _max_pool(op, before, after, store)
        case AvgPool():
            return _avg_pool(op, before, after, store)
        case GlobalAvgPool():
            return [("GlobalAveragePool", [], {})]
        case Flatten():
            return [("Flatten", [], {"axis": 1})]
        case Add():
            return [("Add", [], {})]


def _max_pool(op: MaxPool, before: Shape, after: Shape, store: Store) -> list[Operation]:
    if any(map(_has_empty_window, before[1:], after[1:], op.kernel, op.stride, op.padding, op.dilation)):
        raise ValueError(f"{op} on a value of shape {before} has a window of padding alone, which ONNX does not define")
    end = _end_padding(before, after, op.kernel, op.stride, op.padding, op.dilation)
    attributes = {"kernel_shape": op.kernel, "strides": op.stride, "dilations": op.dilation}
    if all(max(*pads) < k for *pads, k in zip(op.padding, end, op.kernel, strict=True)):
        return [("MaxPool", [], attributes | {"pads": (*op.padding, *end)})]
    # a dilated window may take more padding than onnxruntime allows its kernel
    return [_pad(op.padding, end, -np.inf, store), ("MaxPool", [], attributes)]


def _has_empty_window(side: int, count: int, k: int, s: int, p: int, d: int) -> bool:
    """Return whether one of the windows along a side has no pixel of the image."""
    return any(not any(0 <= first + d * i < side for i in range(k)) for first in range(-p, count * s - p, s))


def _avg_pool(op: AvgPool, before: Shape, after: Shape, store: Store) -> list[Operation]:
    """Return an average pooling that counts the zeros of the padding if `op` does, and never what lies beyond them."""
    end = _end_padding(before, after, op.kernel, op.stride, op.padding, (1, 1))
    attributes: dict[str, Any] = {"kernel_shape": op.kernel, "strides": op.stride}
    if not op.count_padding or end == op.padding:
        counted = int(op.count_padding)
        return [("AveragePool", [], attributes | {"pads": (*op.padding, *end), "count_include_pad": counted})]
    beyond = tuple(e - p for e, p in zip(end, op.padding, strict=True))
    averaged: Operation = ("AveragePool", [], attributes | {"pads": (0, 0, *beyond), "count_include_pad": 0})
    return [_pad(op.padding, op.padding, 0, store), averaged] if any(op.padding) else [averaged]


def _pad(begin: Pair, end: Pair, value: float, store: Store) -> Operation:
    pads = np.array([0, 0, *begin, 0, 0, *end], np.int64)
    return "Pad", [store("pads", pads), store("padding", np.array(value, np.float32))], {"mode": "constant"}


def _end_padding(before: Shape, after: Shape, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Return the padding after the image, at least `padding`, with which whole windows give the shape `after`."""
    sides = []
    for side, count, k, s, p, d in zip(before[1:], after[1:], kernel, stride, padding, dilation, strict=True):
        sides.append(max(p, (count - 1) * s + d * (k - 1) + 1 - side - p))
    return sides[0], sides[1]
