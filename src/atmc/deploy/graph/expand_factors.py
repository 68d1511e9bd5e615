"""Run layers as their factors (V, then U, then the sum with C) if that is less work than the weight W = U V + C.

A weight that the file holds as (U + I) V + C can run as U V + (V + C), with those terms of U V only that are not zero,
as (U + I) V + C with the identity added to U, or as W; likewise U (V + I) + C. The form with the fewest multiply-adds
is taken, with a charge for storing and adding the extra values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from atmc.deploy.graph.graph import Add, Conv, FloatArray, Graph, Linear, Node, Op
from atmc.deploy.graph.operators import to_float64
from atmc.deploy.graph.rewrite import Layer
from atmc.deploy.graph.trace import TracedModel
from atmc.pack.weight_forms import PLAIN, Weight

VALUE_COST = 4  # multiply-adds in the time that storing a value of an extra layer and reading or adding it takes
Factors = tuple[FloatArray, FloatArray, FloatArray]  # U (out, rank), V (rank, columns), C (out, columns)


def expand_factors(traced: TracedModel, factors: Mapping[str, Weight], *, value_cost: int = VALUE_COST) -> Graph:
    """Return the graph in which every layer that has factors is in its cheapest form.

    Args:
        factors: name of a weight in the state dict -> its factors.
        value_cost: multiply-adds that an extra value costs; 0 gives the fewest nonzeros.

    Raises:
        ValueError: the factors are not those of the layer's weight.
    """
    nodes: list[Node] = []
    number = [0]  # of every value of the traced graph, the new value
    for node, shape in zip(traced.graph.nodes, traced.graph.shapes()[1:], strict=True):
        inputs = tuple(number[value] for value in node.inputs)
        weight_name = traced.weight_names.get(node.op, "")
        weight = factors.get(weight_name)
        cheapest = None
        if isinstance(node.op, Conv | Linear) and weight is not None and weight.form != PLAIN:
            _check_same(weight, node.op, weight_name)
            cheapest = _choose_factors(node.op, weight, int(np.prod(shape[1:])), value_cost)
        if cheapest is None:
            nodes.append(Node(node.op, inputs, node.name))
        else:
            assert isinstance(node.op, Conv | Linear)
            _append_factors(nodes, node.op, cheapest, inputs, node.name)
        number.append(len(nodes))
    return Graph(traced.graph.input_shape, tuple(nodes))


def _check_same(factors: Weight, layer: Layer, name: str) -> None:
    if factors.shape != layer.weight.shape or not np.allclose(
        factors.value(), layer.weight, rtol=0, atol=1e-5 * float(np.abs(layer.weight).max(initial=0))
    ):
        raise ValueError(f"the factors of {name} are not those of the model's weight")


def _choose_factors(layer: Layer, weight: Weight, positions: int, value_cost: int) -> Factors | None:
    """Return the factors with the least work per image, or None if W itself has less."""

    def work(parts: Factors) -> int:
        _, v, c = parts
        extra_values = len(v) + (2 * len(c) if c.any() else 0)
        return positions * (sum(map(np.count_nonzero, parts)) + value_cost * extra_values)

    best = min(_alternatives(weight), key=work, default=None)
    if best is None or work(best) >= positions * np.count_nonzero(layer.weight):
        return None
    return best


def _alternatives(weight: Weight) -> Iterator[Factors]:
    """Yield ways to write W = U V + C, without the columns of U and rows of V that have no effect."""
    u, v = to_float64(weight.parts["U"]), to_float64(weight.parts["V"])
    c = to_float64(weight.parts["C"] if "C" in weight.parts else np.zeros((len(u), v.shape[1]))).reshape(len(u), -1)
    options = [(u, v, c)]
    if weight.form == "left":
        options = [(u, v, v + c), (to_float64(u + np.eye(len(u))), v, c)]
    elif weight.form == "right":
        options = [(u, v, u + c), (u, to_float64(v + np.eye(len(v))), c)]
    for left, right, rest in options:
        live = left.any(axis=0) & right.any(axis=1)
        if live.any():
            yield left[:, live], right[live], rest


def _append_factors(nodes: list[Node], layer: Layer, factors: Factors, inputs: tuple[int, ...], name: str) -> None:
    """Append layers for V and U and, unless C is zero, for C and the sum."""
    u, v, c = factors
    kernel = layer.weight.shape[1:]
    first: Op = replace(layer, weight=v.reshape(-1, *kernel), bias=to_float64(np.zeros(len(v))))
    second: Op = Linear(u, layer.bias)
    if isinstance(layer, Conv):
        second = Conv(u[:, :, None, None], layer.bias)
    nodes.append(Node(first, inputs, f"{name}.V"))
    nodes.append(Node(second, (len(nodes),), f"{name}.U"))
    if c.any():
        third: Op = replace(layer, weight=c.reshape(-1, *kernel), bias=to_float64(np.zeros(len(c))))
        nodes.append(Node(third, inputs, f"{name}.C"))
        nodes.append(Node(Add(), (len(nodes) - 1, len(nodes)), name))
