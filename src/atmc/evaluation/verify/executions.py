"""What runs of a model in float32 on the CPU: the graphs that a proof must cover, each with its rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from atmc.deploy.export.c.model import list_graphs
from atmc.deploy.graph.graph import Graph, Op
from atmc.deploy.graph.trace import UnsupportedModel, trace
from atmc.evaluation.verify.bounds import Rounding, bound_images, check_finite, prove
from atmc.pack.weight_forms import Weight
from atmc.robust.threats import Threat


@dataclass(frozen=True, kw_only=True)
class Execution:
    """A graph that runs in float32 on the CPU, and the rounding that its bounds must cover."""

    graph: Graph
    rounding: Rounding


Prove = Callable[[Execution, Tensor, Tensor, Threat], Tensor]  # images (n, c, h, w), labels (n,) -> (n,) bool


def list_executions(
    model: nn.Module, input_shape: tuple[int, ...], factors: Mapping[str, Weight] | None = None
) -> list[Execution]:
    """Return what runs of a model: by PyTorch the traced module, by the engine and exported C a simplified graph.

    Graphs of the same operations and constants are listed once; PyTorch's is the first.

    Raises:
        ValueError: an operation that a graph cannot hold, or a constant that is not a finite number.
    """
    try:
        traced = trace(model, input_shape)
        check_finite(traced.graph)
        graphs = list_graphs(model, input_shape, factors)
    except UnsupportedModel as error:
        raise ValueError(f"cannot verify the model: {error}") from None
    executions = [Execution(graph=traced.graph, rounding=Rounding(shift_terms=traced.shift_terms))]
    for graph in graphs:
        check_finite(graph)
        if not any(_is_same(graph, one.graph) and not one.rounding.shift_terms for one in executions):
            executions.append(Execution(graph=graph, rounding=Rounding()))
    return executions


@torch.no_grad()
def prove_intervals(execution: Execution, x: Tensor, labels: Tensor, threat: Threat) -> Tensor:
    """Return (n,) bool: whether interval bounds prove each image x (n, c, h, w) for one execution.

    Raises:
        ValueError: as `bound_images`.
    """
    return prove(execution.graph, bound_images(x, threat), labels, execution.rounding)


def prove_executions(
    executions: Sequence[Execution],
    x: Tensor,
    labels: Tensor,
    threat: Threat,
    prove_one: Prove = prove_intervals,
) -> Tensor:
    """Return (n,) bool: whether each image x (n, c, h, w) is proved for everything that runs.

    Args:
        prove_one: what proves images for one execution; it gets those that are proved for the executions before.

    Raises:
        ValueError: as `bound_images`.
    """
    proved = torch.ones(len(x), dtype=torch.bool)
    for execution in executions:
        rows = proved.nonzero()[:, 0]
        if len(rows):
            proved[rows] = prove_one(execution, x[rows], labels[rows], threat)
    return proved


def _is_same(one: Graph, other: Graph) -> bool:
    """Return whether two graphs have the same operations, on the same values, with the same constants."""
    return len(one.nodes) == len(other.nodes) and all(
        a.inputs == b.inputs and _is_same_op(a.op, b.op) for a, b in zip(one.nodes, other.nodes, strict=True)
    )


def _is_same_op(one: Op, other: Op) -> bool:
    if type(one) is not type(other):
        return False
    return all(np.array_equal(value, getattr(other, name)) for name, value in vars(one).items())
