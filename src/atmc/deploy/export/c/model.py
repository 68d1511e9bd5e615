"""A module to C: the graph whose tables are the smallest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from atmc.deploy.export.c.source import CSource, to_c
from atmc.deploy.graph.expand_factors import VALUE_COST, expand
from atmc.deploy.graph.graph import Graph
from atmc.deploy.graph.remove_channels import simplify_channels
from atmc.deploy.graph.simplify import rounded, simplify
from atmc.deploy.graph.trace import trace
from atmc.pack import weight_forms


def model_to_c(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    factors: Mapping[str, weight_forms.Weight] | None = None,
    *,
    name: str = "model",
    labels: Sequence[str] | None = None,
) -> CSource:
    """`to_c` of a module, in the form that takes the fewest bytes of tables.

    Batch norms are multiplied in or kept apart; layers that are held as factors run as the fewest multiply-adds would
    have it, or as the fewest nonzeros.

    Args:
        model, input_shape, factors: see `simplify`.
        name, labels: see `to_c`.

    Raises:
        ValueError: see `simplify` and `to_c`.

    >>> from atmc import models
    >>> model_to_c(models.build("lenet", 10, seed=0)).arena_bytes
    14976
    """
    factors = weight_forms.weights(model) if factors is None else factors
    graphs = [simplify(model, input_shape, factors), norms_apart(model, input_shape, factors)]
    if factors:
        graphs.append(norms_apart(model, input_shape, factors, value_cost=0))
    return min((to_c(graph, name=name, labels=labels) for graph in graphs), key=lambda made: made.table_bytes)


def norms_apart(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    factors: Mapping[str, weight_forms.Weight] | None = None,
    *,
    value_cost: int = VALUE_COST,
) -> Graph:
    """`simplify` without its folding: dead channels are gone, affines and with them the weights' codebooks stay."""
    factors = weight_forms.weights(model) if factors is None else factors
    graph = expand(trace(model, input_shape), factors, value_cost=value_cost)
    size = None
    while size != (size := (len(graph.nodes), sum(shape[0] for shape in graph.shapes()), graph.macs())):
        graph = simplify_channels(graph)
    return rounded(graph)
