"""A module as the graph that the engine and the exports run: batch norms folded, dead channels removed.

`simplify` is the entry. Its steps are `trace` (the module, operator by operator), `expand_factors` (layers as their
factors if that is less work) and then, until nothing changes, `fold_affines` (batch norms into weights) and
`remove_dead_channels`. All steps compute in float64; the result is rounded to float32 once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from atmc.deploy.graph.expand_factors import expand_factors
from atmc.deploy.graph.fold_affines import fold_affines
from atmc.deploy.graph.graph import Affine, Conv, Graph, Linear, Node, Op
from atmc.deploy.graph.remove_channels import remove_dead_channels
from atmc.deploy.graph.rewrite import input_count
from atmc.deploy.graph.trace import trace
from atmc.pack import weight_forms


@dataclass(frozen=True)
class LayerChange:
    """How simplification changed a convolution or linear layer.

    Args:
        name: of the module.
        channels_before, channels_after: (outputs, inputs); (0, 0) if the layer was removed; if it runs as its factors,
            the outputs of U and the inputs of V.
        macs_before, macs_after: multiply-adds per image of nonzero weights; of all parts if it runs as its factors.
        factored: whether it runs as its factors.
    """

    name: str
    channels_before: tuple[int, int]
    channels_after: tuple[int, int]
    macs_before: int
    macs_after: int
    factored: bool


@dataclass(frozen=True)
class Simplified:
    """A simplified graph and how it differs from the module; macs: multiply-adds per image of nonzero weights."""

    graph: Graph
    layers: tuple[LayerChange, ...]
    macs_before: int
    macs_after: int


def simplify(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    factors: Mapping[str, weight_forms.Weight] | None = None,
) -> Graph:
    """Return the graph of a module in evaluation mode, with as few operations, channels and multiply-adds as possible.

    Args:
        model: any module from images to logits; it is left as it is.
        input_shape: (c, h, w) of the images; by default that of the model's ``atmc_spec``.
        factors: name of a weight in the state dict -> its factors (`artifact.LoadedModel.factors`), for layers that may
            be cheaper as two sparse layers; by default those of the model's own factorized layers.

    Raises:
        UnsupportedModel: the module cannot be traced, or has an operator that a graph cannot hold.
        ValueError: the shape of the images is not known, or the factors are not those of the model's weights.

    >>> from atmc import models
    >>> [type(node.op).__name__ for node in simplify(models.build("lenet", 10, seed=0)).nodes][:3]
    ['Conv', 'MaxPool', 'Relu']
    """
    return simplify_with_report(model, input_shape, factors).graph


def simplify_with_report(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    factors: Mapping[str, weight_forms.Weight] | None = None,
) -> Simplified:
    """Simplify a module as `simplify` does, and report what changed. Raises ValueError as `simplify` does."""
    traced = trace(model, input_shape)
    factors = weight_forms.factorized_weights(model) if factors is None else factors
    graph = round_constants(simplify_graph(expand_factors(traced, factors)))
    return Simplified(graph, _compare_layers(traced.graph, graph), traced.graph.macs(), graph.macs())


def simplify_graph(graph: Graph) -> Graph:
    """Fold affines and remove dead channels until nothing changes; constants in float64."""
    before = None
    while before != (before := _fingerprint(graph)):
        graph = remove_dead_channels(fold_affines(graph))
    return graph


def _fingerprint(graph: Graph) -> tuple[list[type], int, int]:
    """Return the operations, channels and nonzeros; every effective rewrite changes one of them."""
    return [type(node.op) for node in graph.nodes], sum(shape[0] for shape in graph.shapes()), graph.macs()


def round_constants(graph: Graph) -> Graph:
    """Round the constants of a graph to float32."""
    nodes = [Node(_round_operation(node.op), node.inputs, node.name) for node in graph.nodes]
    return Graph(graph.input_shape, tuple(nodes))


def _round_operation(op: Op) -> Op:
    match op:
        case Conv() | Linear():
            return replace(op, weight=_to_float32(op.weight), bias=_to_float32(op.bias))
        case Affine():
            return Affine(_to_float32(op.scale), _to_float32(op.shift))
    return op


def _to_float32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32)


def _compare_layers(before: Graph, after: Graph) -> tuple[LayerChange, ...]:
    """Return one entry per layer of the first graph, in its order; calls of one layer count together."""
    old, new = _layer_sizes(before), _layer_sizes(after)
    changes = []
    for name, (channels, macs) in old.items():
        parts = {part: new[key] for part in ("", "V", "U", "C") if (key := f"{name}.{part}".rstrip(".")) in new}
        if "" in parts:
            channels_after = parts[""][0]
        elif "U" in parts and "V" in parts:
            channels_after = parts["U"][0][0], parts["V"][0][1]
        else:
            channels_after = next((part_channels for part_channels, _ in parts.values()), (0, 0))
        changes.append(
            LayerChange(
                name=name,
                channels_before=channels,
                channels_after=channels_after,
                macs_before=macs,
                macs_after=sum(part_macs for _, part_macs in parts.values()),
                factored=bool(parts) and "" not in parts,
            )
        )
    return tuple(changes)


def _layer_sizes(graph: Graph) -> dict[str, tuple[tuple[int, int], int]]:
    """Map the name of every convolution and linear layer to ((outputs, inputs), multiply-adds)."""
    sizes: dict[str, tuple[tuple[int, int], int]] = {}
    for node, shape in zip(graph.nodes, graph.shapes()[1:], strict=True):
        if isinstance(node.op, Conv | Linear):
            channels = len(node.op.weight), input_count(node.op)
            macs = int(np.count_nonzero(node.op.weight)) * math.prod(shape[1:])
            sizes[node.name] = channels, macs + sizes.get(node.name, (channels, 0))[1]
    return sizes
