"""A layer as the sparse layers V, then U, added to C, where its weight W = U V + C has more work to do.

A weight that is held as (U + I) V + C can run as U V + (V + C), with those terms of U V only that are not zero, as
(U + I) V + C with the identity in U, or as W; so can U (V + I) + C. The least multiply-adds win, those for storing and
adding the extra values included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from atmc.deploy.graph.graph import Add, Conv, Floats, Graph, Linear, Node, Op
from atmc.deploy.graph.operators import wide
from atmc.deploy.graph.rewrite import Layer
from atmc.deploy.graph.trace import Raw
from atmc.pack.weight_forms import PLAIN, Weight

VALUE_COST = 4  # multiply-adds that pass while a value of an extra layer is stored and read again, or added
Factors = tuple[Floats, Floats, Floats]  # U (out, rank), V (rank, columns), C (out, columns)


def expand(raw: Raw, factors: Mapping[str, Weight], *, value_cost: int = VALUE_COST) -> Graph:
    """The graph with every layer of which factors are given in its cheapest form.

    Args:
        value_cost: multiply-adds that an extra value costs; 0 for the fewest nonzeros.

    Raises:
        ValueError: the factors are not those of the layer's weight.
    """
    nodes: list[Node] = []
    place = [0]
    for node, shape in zip(raw.graph.nodes, raw.graph.shapes()[1:], strict=True):
        read = tuple(place[value] for value in node.inputs)
        found = factors.get(raw.names.get(node.op, ""))
        cheapest = None
        if isinstance(node.op, Conv | Linear) and found is not None and found.form != PLAIN:
            _expect_same(found, node.op, raw.names[node.op])
            cheapest = _cheapest(node.op, found, int(np.prod(shape[1:])), value_cost)
        if cheapest is None:
            nodes.append(Node(node.op, read, node.name))
        else:
            assert isinstance(node.op, Conv | Linear)
            _append(nodes, node.op, cheapest, read, node.name)
        place.append(len(nodes))
    return Graph(raw.graph.input_shape, tuple(nodes))


def _expect_same(factors: Weight, layer: Layer, name: str) -> None:
    if factors.shape != layer.weight.shape or not np.allclose(
        factors.value(), layer.weight, rtol=0, atol=1e-5 * float(np.abs(layer.weight).max(initial=0))
    ):
        raise ValueError(f"the factors of {name} are not those of the model's weight")


def _cheapest(layer: Layer, weight: Weight, positions: int, value_cost: int) -> Factors | None:
    """The factors of least work for one image, None for W itself."""

    def work(parts: Factors) -> int:
        _, v, c = parts
        extra = len(v) + (2 * len(c) if c.any() else 0)
        return positions * (sum(map(np.count_nonzero, parts)) + value_cost * extra)

    best = min(_alternatives(weight), key=work, default=None)
    if best is None or work(best) >= positions * np.count_nonzero(layer.weight):
        return None
    return best


def _alternatives(weight: Weight) -> Iterator[Factors]:
    """Ways to write W = U V + C, without the columns of U and rows of V that do nothing."""
    u, v = wide(weight.parts["U"]), wide(weight.parts["V"])
    c = wide(weight.parts["C"]).reshape(len(u), -1) if "C" in weight.parts else wide(np.zeros((len(u), v.shape[1])))
    options = [(u, v, c)]
    if weight.form == "left":
        options = [(u, v, v + c), (wide(u + np.eye(len(u))), v, c)]
    elif weight.form == "right":
        options = [(u, v, u + c), (u, wide(v + np.eye(len(v))), c)]
    for left, right, rest in options:
        live = left.any(axis=0) & right.any(axis=1)
        if live.any():
            yield left[:, live], right[live], rest


def _append(nodes: list[Node], layer: Layer, factors: Factors, read: tuple[int, ...], name: str) -> None:
    """V, U and, where it is not all zero, C and the sum."""
    u, v, c = factors
    kernel = layer.weight.shape[1:]
    first: Op = replace(layer, weight=v.reshape(-1, *kernel), bias=wide(np.zeros(len(v))))
    second: Op = Linear(u, layer.bias)
    if isinstance(layer, Conv):
        second = Conv(u[:, :, None, None], layer.bias)
    nodes.append(Node(first, read, f"{name}.V"))
    nodes.append(Node(second, (len(nodes),), f"{name}.U"))
    if c.any():
        third: Op = replace(layer, weight=c.reshape(-1, *kernel), bias=wide(np.zeros(len(c))))
        nodes.append(Node(third, read, f"{name}.C"))
        nodes.append(Node(Add(), (len(nodes) - 1, len(nodes)), name))
