"""Export a module as C source, by the graph that has the smallest tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from atmc.deploy.export.c.source import CSource, to_c
from atmc.deploy.graph.expand_factors import VALUE_COST, expand_factors
from atmc.deploy.graph.graph import Graph
from atmc.deploy.graph.remove_channels import remove_dead_channels
from atmc.deploy.graph.simplify import round_constants, simplify
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
    """Return the C source of a module, in the form with the fewest bytes of tables.

    The forms are: batch norms folded into the weights; batch norms kept apart, with layers as their factors if that
    takes fewer multiply-adds; and the same with layers as their factors if that takes fewer nonzeros.

    Args:
        model, input_shape, factors: see `simplify`.
        name, labels: see `to_c`.

    Raises:
        ValueError: see `simplify` and `to_c`.

    >>> from atmc import models
    >>> model_to_c(models.build("lenet", 10, seed=0)).arena_bytes
    14976
    """
    graphs = list_graphs(model, input_shape, factors)
    return min((to_c(graph, name=name, labels=labels) for graph in graphs), key=lambda source: source.table_bytes)


def list_graphs(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    factors: Mapping[str, weight_forms.Weight] | None = None,
) -> list[Graph]:
    """Return the graphs of which `model_to_c` takes one; the first is the graph that the engine runs.

    Args:
        model, input_shape, factors: see `simplify`.
    """
    factors = weight_forms.factorized_weights(model) if factors is None else factors
    graphs = [simplify(model, input_shape, factors), simplify_keeping_affines(model, input_shape, factors)]
    if factors:
        graphs.append(simplify_keeping_affines(model, input_shape, factors, value_cost=0))
    return graphs


def simplify_keeping_affines(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    factors: Mapping[str, weight_forms.Weight] | None = None,
    *,
    value_cost: int = VALUE_COST,
) -> Graph:
    """Simplify a module without folding affines into weights, so that the weights keep the values of their codebook.

    Args:
        model, input_shape, factors: see `simplify`.
        value_cost: see `expand_factors`.
    """
    factors = weight_forms.factorized_weights(model) if factors is None else factors
    graph = expand_factors(trace(model, input_shape), factors, value_cost=value_cost)
    size = None
    while size != (size := (len(graph.nodes), sum(shape[0] for shape in graph.shapes()), graph.macs())):
        graph = remove_dead_channels(graph)
    return round_constants(graph)
