"""Any module to a graph, operation by operation as it stands, through `torch.export`."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from atmc.compress.factorize import fold
from atmc.deploy.graph.graph import Conv, Flatten, GlobalAvgPool, Graph, Linear, Node, Op
from atmc.deploy.graph.operators import KNOWN, OPERATORS, RESHAPES, Arguments, Value
from atmc.deploy.graph.rewrite import remove_dead_nodes
from atmc.models.factory import USER_CODE_ERRORS, first_line

BATCH = 2  # of the images that the module is traced with; what depends on the batch is no operation of the graph
Traced = int | Tensor  # the number of an activation, or a constant


@dataclass(frozen=True)
class Raw:
    """A module's operations, constants in float64. names: of the weights of its layers, in the state dict."""

    graph: Graph
    names: dict[Op, str]


def trace(model: nn.Module, input_shape: Sequence[int] | None = None) -> Raw:
    """The graph of a module in evaluation mode: batch norms and dropouts are there as affines and not at all.

    Args:
        model: any module of one input and one output; factorized ones are folded. Left as it is.
        input_shape: (c, h, w) of the images, where the model (``atmc_spec``) does not know it.

    Raises:
        ValueError: no shape is known, the module cannot be exported, or an operator has no place in a graph.
    """
    shape = _image_shape(model, input_shape)
    program = _export(fold(model).float().cpu().eval(), shape)
    constants, names = _constants(program)
    nodes: list[Node] = []
    weights: dict[Op, str] = {}
    known: dict[fx.Node, Traced] = {}
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    for node in program.graph.nodes:
        if node.op == "placeholder":
            known[node] = constants.get(node.name, 0)
        elif node.op == "get_attr":
            known[node] = getattr(program.graph_module, str(node.target))
        elif node.op == "call_function" and node.users:
            known[node] = _run(node, known, nodes)
            if nodes and isinstance(nodes[-1].op, Conv | Linear) and known[node] == len(nodes):
                weights[nodes[-1].op] = names.get(str(node.args[1]), "")
    graph = remove_dead_nodes(Graph(shape, tuple(nodes)), _logits(output, known))
    graph.shapes()
    return Raw(graph, weights)


def _image_shape(model: nn.Module, given: Sequence[int] | None) -> tuple[int, int, int]:
    shape = given or (getattr(model, "atmc_spec", None) or {}).get("input_shape")
    if shape is None:
        raise ValueError("expected input_shape=(c, h, w), since the model does not know that of its images")
    if len(shape) != 3 or any(int(side) != side or side < 1 for side in shape):
        raise ValueError(f"expected input_shape to be (c, h, w), got {tuple(shape)}")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _export(model: nn.Module, shape: tuple[int, int, int]) -> ExportedProgram:
    """The module's operators; what changes a value in place is made to give a new one."""
    images = (torch.zeros(BATCH, *shape),)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, images, strict=False)
            calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
            if any(getattr(getattr(target, "_schema", None), "is_mutable", False) for target in calls):
                program = program.run_decompositions({})
    except USER_CODE_ERRORS as error:  # of the module's own code; those of torch.export are among them
        raise ValueError(f"torch.export cannot trace the model for images {shape}: {first_line(error)}") from error
    return program


def _constants(program: ExportedProgram) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of each input that is none of the images: its tensor, and of a parameter its name in the state dict."""
    tensors, names, images = {}, {}, 0
    for spec in program.graph_signature.input_specs:
        name = cast(Any, spec.arg).name
        if spec.kind == InputKind.USER_INPUT:
            images += 1
        else:
            target = str(spec.target)
            held = program.state_dict if target in program.state_dict else program.constants
            tensors[name] = cast(Tensor, held[target])
            names[name] = target
    if images != 1:
        raise ValueError(f"expected a model of one input, the images; this one has {images}")
    return tensors, names


def _run(node: fx.Node, known: dict[fx.Node, Traced], nodes: list[Node]) -> Traced:
    """The constant that a call gives, or the number of its activation, its nodes appended."""
    if node.target is operator.getitem:
        source, index = node.args
        if _operator(cast(fx.Node, source)) == "_native_batch_norm_legit_no_training" and index == 0:
            return known[cast(fx.Node, source)]
    elif not any(isinstance(known[read], int) for read in node.all_input_nodes):
        with torch.no_grad():
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: known[read])
            return cast(Tensor, cast(Any, node.target)(*args, **kwargs))
    layer = _layer(node)
    where = f"aten.{_operator(node)} of " + (f"layer {layer}" if layer else "the model's forward")

    def append(op: Op, *inputs: int) -> int:
        nodes.append(Node(op, inputs, layer))
        return len(nodes)

    name = _operator(node)
    if name not in OPERATORS and name not in RESHAPES:
        raise ValueError(f"the engine cannot run {where}; it knows {KNOWN}")
    arguments = _arguments(node, known)
    try:
        if name in RESHAPES:
            passing = all(_operator(user) in RESHAPES for user in node.users)
            return _reshaped(arguments, nodes, layer, passing)
        return OPERATORS[name](append, arguments)
    except ValueError as error:
        raise ValueError(f"the engine cannot run {where}: {error}") from None


def _operator(node: fx.Node) -> str:
    """ "conv2d" of aten.conv2d.padding."""
    schema = getattr(node.target, "_schema", None)
    return (
        str(schema.name).split("::")[-1] if schema is not None else getattr(node.target, "__name__", str(node.target))
    )


def _layer(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _arguments(node: fx.Node, known: dict[fx.Node, Traced]) -> Arguments:
    """A call's arguments by name, defaults included."""
    found: dict[str, Any] = {"out": _shape(node)}
    for index, argument in enumerate(cast(Any, node.target)._schema.arguments):
        default = argument.default_value
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, default)
        if isinstance(given, fx.Node):
            value = known[given]
            found[argument.name] = Value(value, _shape(given)) if isinstance(value, int) else value
        else:
            found[argument.name] = given
    return Arguments(**found)


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) else value
    return tuple(int(side) for side in value.shape[1:]) if isinstance(value, Tensor) else ()


def _reshaped(a: Arguments, nodes: list[Node], layer: str, passing: bool) -> int:
    """A flattening, or the undoing of one, or nothing: the same shape, or one that only `passing` to the next has."""
    x: Value = a.self
    if a.out == x.shape:
        return x.number
    if passing and len(a.out) > 1 and math.prod(a.out) == math.prod(x.shape):
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


def _logits(output: fx.Node, known: dict[fx.Node, Traced]) -> int:
    given = output.args[0]
    results = list(given) if isinstance(given, tuple | list) else [given]
    value = known.get(results[0]) if len(results) == 1 and isinstance(results[0], fx.Node) else None
    if not isinstance(value, int) or len(_shape(cast(fx.Node, results[0]))) != 1:
        raise ValueError("expected a model that gives one tensor of logits, (n, classes)")
    return value
