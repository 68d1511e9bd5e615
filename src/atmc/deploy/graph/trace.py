"""Trace any module into a graph, one node per operator, by `torch.export`."""

from __future__ import annotations

import logging
import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from atmc.compress.factorize import fold
from atmc.deploy.graph.graph import Affine, Conv, Flatten, FloatArray, GlobalAvgPool, Graph, Linear, Node, Op
from atmc.deploy.graph.operators import OPERATORS, RESHAPES, SUPPORTED, Arguments, Value, to_float64
from atmc.deploy.graph.rewrite import remove_dead_nodes
from atmc.models.factory import USER_CODE_ERRORS, first_line

BATCH = 2  # of the images that the module is traced with; an operation on the batch axis itself is not supported
Traced = int | Tensor  # the number of an activation, or a constant


class UnsupportedModel(ValueError):
    """The module does something that a graph cannot hold; the message names the operation and the layer.

    A caller puts the failed task in front of it: "cannot export model.atmc to onnx: ...".
    """


@dataclass(frozen=True)
class TracedModel:
    """A module's operations, constants in float64.

    Args:
        weight_names: of convolutions and linear layers, the parameter.
        shift_terms: of affines that were batch norms, |bias| + |mean scale|: PyTorch rounds these, not their sum.
    """

    graph: Graph
    weight_names: dict[Op, str]
    shift_terms: dict[Op, FloatArray]


def trace(model: nn.Module, input_shape: Sequence[int] | None = None) -> TracedModel:
    """Return the graph of a module in evaluation mode: batch norms become affines, dropouts disappear.

    Args:
        model: any module of one input and one output; factorized layers are folded. It is left as it is.
        input_shape: (c, h, w) of the images; by default that of the model's ``atmc_spec``.

    Raises:
        UnsupportedModel: the module cannot be exported, or an operator has no counterpart in a graph.
        ValueError: the shape of the images is not known.
    """
    shape = _image_shape(model, input_shape)
    exported = _export(fold(model).float().cpu().eval(), shape)
    constants, parameter_names = _constants(exported)
    nodes: list[Node] = []
    weight_names: dict[Op, str] = {}
    shift_terms: dict[Op, FloatArray] = {}
    values: dict[fx.Node, Traced] = {}
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            values[node] = constants.get(node.name, 0)
        elif node.op == "get_attr":
            values[node] = getattr(exported.graph_module, str(node.target))
        elif node.op == "call_function" and node.users:
            values[node] = _append_call(node, values, nodes)
            if nodes and isinstance(nodes[-1].op, Conv | Linear) and values[node] == len(nodes):
                weight_names[nodes[-1].op] = parameter_names.get(str(node.args[1]), "")
            elif "batch_norm" in _operator_name(node) and isinstance(values[node], int):
                batch_norm = cast(Affine, nodes[-1].op)
                shift_terms[batch_norm] = _shift_terms(_arguments(node, values), batch_norm)
    graph = remove_dead_nodes(Graph(shape, tuple(nodes)), _logits(output, values))
    graph.shapes()  # raises ValueError if an operation does not fit its input
    return TracedModel(graph, weight_names, shift_terms)


def _image_shape(model: nn.Module, given: Sequence[int] | None) -> tuple[int, int, int]:
    shape = given or (getattr(model, "atmc_spec", None) or {}).get("input_shape")
    if shape is None:
        raise ValueError("expected input_shape=(c, h, w), since the model does not say the shape of its images")
    if len(shape) != 3 or any(int(side) != side or side < 1 for side in shape):
        raise ValueError(f"expected input_shape to be (c, h, w), got {tuple(shape)}")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _export(model: nn.Module, shape: tuple[int, int, int]) -> ExportedProgram:
    """Return the module's operators, those that write in place replaced by ones that return a new value."""
    images = (torch.zeros(BATCH, *shape),)
    try:
        with torch.no_grad(), _silence():
            exported = torch.export.export(model, images, strict=False)
            targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
            if any(getattr(getattr(target, "_schema", None), "is_mutable", False) for target in targets):
                exported = exported.run_decompositions({})
    except USER_CODE_ERRORS as error:  # of the module's own code; those of torch.export are among them
        raise UnsupportedModel(
            f"torch.export cannot trace the model for images {shape}: {first_line(error)}"
        ) from error
    return exported


@contextmanager
def _silence() -> Iterator[None]:
    """Keep torch.export from printing graphs and warnings; of a failure our error says what there is to say."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _constants(exported: ExportedProgram) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return, for every input of the program but the images, its tensor, and its name in the state dict."""
    tensors, names, image_inputs = {}, {}, 0
    for spec in exported.graph_signature.input_specs:
        name = cast(Any, spec.arg).name
        if spec.kind == InputKind.USER_INPUT:
            image_inputs += 1
        else:
            target = str(spec.target)
            owner = exported.state_dict if target in exported.state_dict else exported.constants
            tensors[name] = cast(Tensor, owner[target])
            names[name] = target
    if image_inputs != 1:
        raise UnsupportedModel(f"expected a model of one input, the images; this one has {image_inputs}")
    return tensors, names


def _append_call(node: fx.Node, values: dict[fx.Node, Traced], nodes: list[Node]) -> Traced:
    """Append the nodes of a call and return the number of its activation, or its value if it is a constant."""
    if not any(isinstance(values[source], int) for source in node.all_input_nodes):
        if _is_random(node):
            raise UnsupportedModel(f"{_describe_call(node)} is not supported: it is random, also in evaluation mode")
        with torch.no_grad():  # of constants alone; several results come as a tuple, of which getitem takes one
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
            return cast(Tensor, cast(Any, node.target)(*args, **kwargs))
    if node.target is operator.getitem:
        source, index = node.args
        if _operator_name(cast(fx.Node, source)) == "_native_batch_norm_legit_no_training" and index == 0:
            return values[cast(fx.Node, source)]
    layer, name = _layer_name(node), _operator_name(node)
    subject = f"{_describe_call(node)} is not supported"

    def append(op: Op, *inputs: int) -> int:
        nodes.append(Node(op, inputs, layer))
        return len(nodes)

    if name not in OPERATORS and name not in RESHAPES:
        raise UnsupportedModel(f"{subject}; supported are {SUPPORTED}")
    arguments = _arguments(node, values)
    try:
        if name in RESHAPES:
            only_reshaped = all(_operator_name(user) in RESHAPES for user in node.users)
            return _append_reshape(arguments, nodes, layer, only_reshaped)
        return OPERATORS[name](append, arguments)
    except ValueError as error:
        raise UnsupportedModel(f"{subject}: {error}") from None


def _is_random(node: fx.Node) -> bool:
    """Return whether a call draws random numbers; a dropout that is switched off draws none."""
    draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return draws and not ("dropout" in _operator_name(node) and node.args[-1] is False)


def _describe_call(node: fx.Node) -> str:
    """Name an operator and its layer, "aten.silu of layer 1"."""
    layer = _layer_name(node)
    return f"aten.{_operator_name(node)} of {f'layer {layer}' if layer else 'the model itself'}"


def _operator_name(node: fx.Node) -> str:
    """Return the operator that a node calls, such as "conv2d" for aten.conv2d.padding."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).split("::")[-1]
    return getattr(node.target, "__name__", str(node.target))


def _layer_name(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _arguments(node: fx.Node, values: dict[fx.Node, Traced]) -> Arguments:
    """Return a call's arguments by name, defaults included."""
    arguments: dict[str, Any] = {"out": _shape(node)}
    for index, argument in enumerate(cast(Any, node.target)._schema.arguments):
        default = argument.default_value
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, default)
        if isinstance(given, fx.Node):
            value = values[given]
            arguments[argument.name] = Value(value, _shape(given)) if isinstance(value, int) else value
        else:
            arguments[argument.name] = given
    return Arguments(**arguments)


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) else value
    return tuple(int(side) for side in value.shape[1:]) if isinstance(value, Tensor) else ()


def _shift_terms(a: Arguments, batch_norm: Affine) -> FloatArray:
    """Return |bias| + |mean scale| of a batch norm, (c,)."""
    terms = np.abs(to_float64(a.running_mean) * batch_norm.scale)
    return to_float64(terms if a.bias is None else terms + np.abs(to_float64(a.bias)))


def _append_reshape(a: Arguments, nodes: list[Node], layer: str, only_reshaped: bool) -> int:
    """Append a flattening if a reshape is one, and return the number of its value.

    Nothing is appended for a reshape to the same shape, for one that undoes a flattening of a global average, and for
    one whose result is read by reshapes only.
    """
    x: Value = a.self
    if a.out == x.shape:
        return x.number
    if only_reshaped and len(a.out) > 1 and math.prod(a.out) == math.prod(x.shape):
        return x.number
    if a.out == (math.prod(x.shape),):
        nodes.append(Node(Flatten(), (x.number,), layer))
        return len(nodes)
    before = nodes[x.number - 1] if x.number else None
    if before is not None and isinstance(before.op, Flatten) and a.out == (*x.shape, 1, 1):
        pooled = before.inputs[0]
        if pooled and isinstance(nodes[pooled - 1].op, GlobalAvgPool):
            return pooled
    raise ValueError(f"it makes {a.out} of a value of shape {x.shape}")


def _logits(output: fx.Node, values: dict[fx.Node, Traced]) -> int:
    """Return the number of the value that the module returns."""
    given = output.args[0]
    results = list(given) if isinstance(given, tuple | list) else [given]
    value = values.get(results[0]) if len(results) == 1 and isinstance(results[0], fx.Node) else None
    if not isinstance(value, int) or len(_shape(cast(fx.Node, results[0]))) != 1:
        raise UnsupportedModel("expected a model that returns one tensor of logits, (n, classes)")
    return value
