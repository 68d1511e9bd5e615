"""What runs of a model in float32 on the CPU: the graphs that a proof must cover, each with its rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from atmc.deploy.export.c.model import list_graphs
from atmc.deploy.graph.graph import Graph
from atmc.deploy.graph.trace import UnsupportedModel, trace
from atmc.evaluation.verify.bounds import Rounding, check_finite
from atmc.pack.weight_forms import Weight


@dataclass(frozen=True, kw_only=True)
class Execution:
    """A graph that runs in float32 on the CPU, and the rounding that its bounds must cover."""

    graph: Graph
    rounding: Rounding


def list_executions(
    model: nn.Module, input_shape: tuple[int, ...], factors: Mapping[str, Weight] | None = None
) -> list[Execution]:
    """Return what runs of a model: by PyTorch the traced module, by the engine and exported C a simplified graph.

    Raises:
        ValueError: an operation that a graph cannot hold, or a constant that is not a finite number.
    """
    try:
        traced = trace(model, input_shape)
        executions = [Execution(graph=traced.graph, rounding=Rounding(shift_terms=traced.shift_terms))]
        check_finite(traced.graph)
        graphs = list_graphs(model, input_shape, factors)
    except UnsupportedModel as error:
        raise ValueError(f"cannot verify the model: {error}") from None
    for graph in graphs:
        check_finite(graph)
    return executions + [Execution(graph=graph, rounding=Rounding()) for graph in graphs]
