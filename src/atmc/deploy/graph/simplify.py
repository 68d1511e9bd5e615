"""A module to the graph that engines and exports run: batch norm multiplied in, dead channels removed.

`simplify` is the way in. The steps: `trace` (the module as it stands), `factored` (layers as their factors where that
is less work), then, until nothing changes, `affines` (batch norms into weights) and `channels` (dead channels out). All
of it in float64, rounded to float32 once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from atmc.deploy.graph.expand_factors import expand
from atmc.deploy.graph.fold_affines import fold_affines
from atmc.deploy.graph.graph import Affine, Conv, Graph, Linear, Node, Op
from atmc.deploy.graph.remove_channels import simplify_channels
from atmc.deploy.graph.rewrite import inputs
from atmc.deploy.graph.trace import trace
from atmc.pack import weight_forms


@dataclass(frozen=True)
class LayerChange:
    """What became of a convolution or linear layer: its (outputs, inputs), and multiply-adds, zeros left out.

    (0, 0) of a layer that is gone; of one that runs as its factors, U's outputs, V's inputs, and the work of all parts.
    """

    name: str
    channels_before: tuple[int, int]
    channels_after: tuple[int, int]
    macs_before: int
    macs_after: int
    factored: bool


@dataclass(frozen=True)
class Simplified:
    """A simplified graph and how it differs from the module's own."""

    graph: Graph
    layers: tuple[LayerChange, ...]
    macs_before: int
    macs_after: int


def simplify(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    factors: Mapping[str, weight_forms.Weight] | None = None,
) -> Graph:
    """The graph of a module in evaluation mode, with as few operations, channels and multiply-adds as are found.

    Args:
        model: any module from images to logits; left as it is.
        input_shape: (c, h, w), where the model does not know it.
        factors: name of a weight in the state dict -> its factors (`pack.artifact.LoadedModel.factors`), for layers that
            may be cheaper as two sparse layers; those of a factorized model are found without.

    Raises:
        ValueError: an operator that a graph cannot hold, by name; a module that cannot be traced; factors of other
            weights than the model's.

    >>> from atmc import models
    >>> [type(node.op).__name__ for node in simplify(models.build("lenet", 10, seed=0)).nodes][:3]
    ['Conv', 'MaxPool', 'Relu']
    """
    return simplify_report(model, input_shape, factors).graph


def simplify_report(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    factors: Mapping[str, weight_forms.Weight] | None = None,
) -> Simplified:
    """`simplify`, and what it changed. Raises ValueError."""
    raw = trace(model, input_shape)
    graph = rounded(reduced(expand(raw, weight_forms.weights(model) if factors is None else factors)))
    return Simplified(graph, _changes(raw.graph, graph), raw.graph.macs(), graph.macs())


def reduced(graph: Graph) -> Graph:
    """The same network in its least form, constants in float64."""
    form = None
    while form != (form := _form(graph)):
        graph = simplify_channels(fold_affines(graph))
    return graph


def _form(graph: Graph) -> tuple[list[type], int, int]:
    """What every change that is one changes: operations, channels, nonzeros."""
    return [type(node.op) for node in graph.nodes], sum(shape[0] for shape in graph.shapes()), graph.macs()


def rounded(graph: Graph) -> Graph:
    """The graph with its constants in float32."""
    nodes = [Node(_rounded(node.op), node.inputs, node.name) for node in graph.nodes]
    return Graph(graph.input_shape, tuple(nodes))


def _rounded(op: Op) -> Op:
    match op:
        case Conv() | Linear():
            return replace(op, weight=_narrow(op.weight), bias=_narrow(op.bias))
        case Affine():
            return Affine(_narrow(op.scale), _narrow(op.shift))
    return op


def _narrow(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)


def _changes(before: Graph, after: Graph) -> tuple[LayerChange, ...]:
    """One entry a layer of the first graph, in its order; calls of one layer count together."""
    old, new = _layers(before), _layers(after)
    changes = []
    for name, (channels, macs) in old.items():
        parts = {part: new[key] for part in ("", "V", "U", "C") if (key := f"{name}.{part}".rstrip(".")) in new}
        if "" in parts:
            now = parts[""][0]
        elif "U" in parts and "V" in parts:
            now = parts["U"][0][0], parts["V"][0][1]
        else:
            now = next((shape for shape, _ in parts.values()), (0, 0))
        work = sum(each for _, each in parts.values())
        changes.append(LayerChange(name, channels, now, macs, work, bool(parts) and "" not in parts))
    return tuple(changes)


def _layers(graph: Graph) -> dict[str, tuple[tuple[int, int], int]]:
    """Name -> ((outputs, inputs), multiply-adds) of every convolution and linear layer."""
    found: dict[str, tuple[tuple[int, int], int]] = {}
    for node, sides in zip(graph.nodes, graph.shapes()[1:], strict=True):
        if isinstance(node.op, Conv | Linear):
            shape = len(node.op.weight), inputs(node.op)
            work = int(np.count_nonzero(node.op.weight)) * math.prod(sides[1:])
            found[node.name] = shape, work + found.get(node.name, (shape, 0))[1]
    return found
