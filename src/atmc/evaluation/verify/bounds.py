"""Sound bounds of a network's logits over a box of images, by interval arithmetic in float64.

The bounds hold for what runs in float32: every operation's bounds are widened outward by a margin that covers the
rounding of its execution, in whatever order it takes its sums, and the rounding of the calculation here.
docs/verification.md derives the margins.

Legend: u = 2^-24, the unit roundoff of float32; gamma(k) = k u / (1 - k u), which bounds the relative error of k
roundings (Higham 2002, lemma 3.1); n images; z_j the logit of class j, y the label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from atmc.deploy.graph.graph import (
    Add,
    Affine,
    AvgPool,
    Conv,
    Flatten,
    FloatArray,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Node,
    Op,
    Relu,
)
from atmc.evaluation.accuracy import SLACK
from atmc.robust.threats import Threat, check_threat

UNIT = 2.0**-24  # unit roundoff of float32
WIDENING = 2.0**-23  # one unit in the last place of a float32 at 1, the largest pixel: rounding of x - eps and x + eps
SPARE = 3  # roundings that are counted on top: of a constant, and of a division by a rounded reciprocal
AFFINE_ROUNDINGS = 8  # of x * scale + shift, batch norm's own calculation of scale and shift included
FLOAT64 = 1 + 2.0**-10  # factor on a margin that covers the rounding of the calculation here, in float64, as well
MOST = 2**18  # terms of a sum for which that factor suffices
TINY = 2.0**-124  # per term: underflow, with or without subnormal numbers
LARGEST = 2.0**127  # a sum of absolute values from which on float32 may overflow


@dataclass(frozen=True, eq=False)
class Box:
    """Bounds of one value of a network, elementwise, for each of n images.

    Args:
        lower, upper: (n, ...) float64; NaN if nothing is known.
        terms: (n, ...) upper bounds of the sum of the absolute values of the terms that are added up to the value; None
            for the value itself, a single term.
        count: number of these terms, per channel or for all.
    """

    lower: Tensor
    upper: Tensor
    terms: Tensor | None = None
    count: Tensor | int = 1

    def magnitude(self) -> Tensor:
        """Return the largest absolute value of each entry."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def map(self, function: Callable[[Tensor], Tensor]) -> Box:
        """Return the box through a function that never decreases, does not round, or only rearranges entries."""
        return Box(function(self.lower), function(self.upper))


@dataclass(frozen=True)
class Rounding:
    """The margin for rounding.

    Args:
        outward: False for bounds of exact arithmetic, calculated without any margin. They prove nothing.
        shift_terms: of affines that batch norms became, the absolute terms of their shift (`TracedModel.shift_terms`).
    """

    outward: bool = True
    shift_terms: Mapping[Op, FloatArray] = field(default_factory=dict)

    def margin(self, terms: Tensor, count: Tensor | int, scale: Tensor | float) -> Tensor:
        """Bound |computed - exact| of sums; NaN if float32 may overflow, or if there are too many terms.

        Args:
            terms, count: as in `Box`; the count per channel has a shape that broadcasts.
            scale: (1 + largest absolute weight) * (1 + largest absolute input), for underflow.
        """
        roundings = torch.as_tensor(count, dtype=torch.float64) + SPARE
        gamma = torch.where(roundings < MOST, roundings * UNIT / (1 - roundings * UNIT), torch.nan)
        margin = (gamma * terms + TINY * roundings * scale) * FLOAT64
        return torch.where(terms < LARGEST, margin, torch.nan)

    def widen(self, lower: Tensor, upper: Tensor, terms: Tensor, count: Tensor | int, scale: Tensor | float) -> Box:
        """Return the box of a sum that is computed in float32, from bounds of the exact sum; arguments as `margin`."""
        if not self.outward:
            return Box(lower, upper)
        margin = self.margin(terms, count, scale)
        return Box(lower - margin, upper + margin, terms, count)


def bound_images(x: Tensor, threat: Threat) -> Box:
    """Return the box [x - eps, x + eps] within [0, 1] of images x (n, c, h, w), widened outward.

    It is wider than the threat by the rounding of float32 and by the share of eps that `accuracy.SLACK` lets an attack
    exceed it, so that every image that counts as an attack lies inside.

    Raises:
        ValueError: a threat that is not an l-infinity ball, eps above 1, or a pixel outside [0, 1].
    """
    check_provable(threat, x[0].numel())
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError("expected pixels in [0, 1]")
    middle = x.detach().cpu().double()
    eps = threat.eps * (1 + SLACK) + WIDENING
    return Box((middle - eps).clamp(0, 1), (middle + eps).clamp(0, 1))


def check_provable(threat: Threat, pixels: int) -> None:
    """Raise ValueError for a threat that cannot be proved: another norm than linf, or eps above 1."""
    if threat.name != "linf":
        raise ValueError(f"expected a threat like linf:8/255, since proofs exist for linf only, got {threat}")
    check_threat(threat, pixels)


def check_finite(graph: Graph) -> None:
    """Raise ValueError if a constant of a graph is not a finite number; it names the layer."""
    for node in graph.nodes:
        for name in ("weight", "bias", "scale", "shift"):
            values = getattr(node.op, name, None)
            if values is not None and not (np.abs(values) < LARGEST).all():
                raise ValueError(f"the {name} of {_describe(node)} is not finite: nothing can be proved")


def bound_logits(graph: Graph, images: Box, rounding: Rounding | None = None) -> Box:
    """Return bounds (n, classes) of the logits that the graph computes, in float32, for all images of a box.

    Raises:
        ValueError: the graph has an operation without a rule.
    """
    return _propagate(graph, images, len(graph.nodes), rounding or Rounding())


def bound_margins(graph: Graph, images: Box, labels: Tensor, rounding: Rounding | None = None) -> Tensor:
    """Return upper bounds (n, classes) of z_j - z_y for labels y (n,), -infinity for the label's own column.

    If the graph ends in a linear layer, the differences of its rows are bounded (Gowal et al. 2018, section 3), and the
    rounding of both logits is added. NaN means that nothing is known.

    Raises:
        ValueError: the graph has an operation without a rule.
    """
    rounding = rounding or Rounding()
    label = labels.cpu()[:, None]
    last = graph.nodes[-1]
    if isinstance(last.op, Linear):
        features = _propagate(graph, images, last.inputs[0], rounding)
        bounds = _bound_differences(last.op, features, label, rounding)
    else:
        logits = bound_logits(graph, images, rounding)
        bounds = logits.upper - logits.lower.gather(1, label)
    return bounds.scatter(1, label, -torch.inf)


def prove(graph: Graph, images: Box, labels: Tensor, rounding: Rounding | None = None) -> Tensor:
    """Return (n,) bool: whether, for every image of the box, the label's logit is the only largest one."""
    return (bound_margins(graph, images, labels, rounding) < 0).all(1)  # false for NaN


def _propagate(graph: Graph, images: Box, value: int, rounding: Rounding) -> Box:
    """Return the box of one value of a graph; boxes that are not needed any more are dropped on the way."""
    last_reader = {source: index for index, node in enumerate(graph.nodes[:value]) for source in node.inputs}
    boxes: dict[int, Box] = {0: images}
    for index, node in enumerate(graph.nodes[:value]):
        rule = RULES.get(type(node.op))
        if rule is None:
            raise ValueError(f"there is no rule for the bounds of {_describe(node)}")
        boxes[index + 1] = rule(node.op, [boxes[source] for source in node.inputs], rounding)
        for source in set(node.inputs):
            if last_reader[source] == index and source != value:
                del boxes[source]
    return boxes[value]


def _describe(node: Node) -> str:
    return f"{type(node.op).__name__} {node.name}".strip()


def _bound_differences(op: Linear, features: Box, label: Tensor, rounding: Rounding) -> Tensor:
    """Return upper bounds (n, classes) of z_j - z_y; label: (n, 1)."""
    weight, bias = _float64(op.weight), _float64(op.bias)
    middle, radius = _center(features)
    logits = F.linear(middle, weight, bias)
    bounds = logits - logits.gather(1, label)
    for y in sorted(set(label[:, 0].tolist())):
        rows = label[:, 0] == y
        bounds[rows] += F.linear(radius[rows], (weight - weight[y]).abs())
    if rounding.outward:
        magnitude = features.magnitude()
        terms = F.linear(magnitude, weight.abs(), bias.abs())
        margin = rounding.margin(terms, weight.count_nonzero(1) + 1, _scale(weight, magnitude))
        bounds = bounds + margin + margin.gather(1, label)
    return bounds


# Rules. Each takes an operation, the boxes of its inputs and the rounding, and returns the box of its output.

Rule = Callable[[Any, Sequence[Box], Rounding], Box]


def _convolve(op: Conv, inputs: Sequence[Box], rounding: Rounding) -> Box:
    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, op.stride, op.padding, op.dilation, op.groups)

    return _bound_layer(op, apply, inputs[0], rounding)


def _multiply(op: Linear, inputs: Sequence[Box], rounding: Rounding) -> Box:
    return _bound_layer(op, F.linear, inputs[0], rounding)


def _bound_layer(op: Conv | Linear, apply: Callable[..., Tensor], x: Box, rounding: Rounding) -> Box:
    weight, bias = _float64(op.weight), _float64(op.bias)
    middle, radius = _center(x)
    center, reach = apply(middle, weight, bias), apply(radius, weight.abs(), None)
    lower, upper = center - reach, center + reach
    if not rounding.outward:
        return Box(lower, upper)
    magnitude = x.magnitude()
    terms = apply(magnitude, weight.abs(), bias.abs())
    count = _per_channel(weight.flatten(1).count_nonzero(1) + 1, lower)  # a term of a zero weight is exactly zero
    return rounding.widen(lower, upper, terms, count, _like(_scale(weight, magnitude), lower))


def _scale_and_shift(op: Affine, inputs: Sequence[Box], rounding: Rounding) -> Box:
    x = inputs[0]
    scale, shift = (_per_channel(_float64(values), x.lower) for values in (op.scale, op.shift))
    ends = x.lower * scale, x.upper * scale
    lower, upper = torch.minimum(*ends) + shift, torch.maximum(*ends) + shift
    magnitude = x.magnitude()
    shift_terms = rounding.shift_terms.get(op)
    added = shift.abs() if shift_terms is None else _per_channel(_float64(shift_terms), x.lower)
    terms = magnitude * scale.abs() + added
    return rounding.widen(lower, upper, terms, AFFINE_ROUNDINGS, _like(_scale(scale, magnitude), lower))


def _clip(op: Relu, inputs: Sequence[Box], rounding: Rounding) -> Box:
    x = inputs[0].map(lambda values: values.clamp(min=0))
    if op.ceiling is None:
        return x
    slack = UNIT if rounding.outward else 0.0  # the ceiling is rounded to float32
    lower, upper = float(op.ceiling) * (1 - slack), float(op.ceiling) * (1 + slack)
    return Box(x.lower.clamp(max=lower), x.upper.clamp(max=upper))


def _max_pool(op: MaxPool, inputs: Sequence[Box], rounding: Rounding) -> Box:
    return inputs[0].map(lambda x: F.max_pool2d(x, op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode))


def _avg_pool(op: AvgPool, inputs: Sequence[Box], rounding: Rounding) -> Box:
    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, op.kernel, op.stride, op.padding, op.ceil_mode, op.count_padding)

    return _bound_mean(mean, inputs[0], op.kernel[0] * op.kernel[1], rounding)


def _global_avg_pool(op: GlobalAvgPool, inputs: Sequence[Box], rounding: Rounding) -> Box:
    area = inputs[0].lower[0, 0].numel()
    return _bound_mean(lambda x: x.mean((2, 3), keepdim=True), inputs[0], area, rounding)


def _bound_mean(mean: Callable[[Tensor], Tensor], x: Box, area: int, rounding: Rounding) -> Box:
    lower, upper, magnitude = mean(x.lower), mean(x.upper), x.magnitude()
    if rounding.outward and area * float(magnitude.nan_to_num(0).amax()) >= LARGEST:  # the sum before the division
        return Box(lower * torch.nan, upper * torch.nan)
    return rounding.widen(lower, upper, mean(magnitude), area, _like(2 * (1 + _largest(magnitude)), lower))


def _flatten(op: Flatten, inputs: Sequence[Box], rounding: Rounding) -> Box:
    return inputs[0].map(lambda values: values.flatten(1))


def _add(op: Add, inputs: Sequence[Box], rounding: Rounding) -> Box:
    """Bound a sum that may be computed term by term together with the layers whose outputs it adds."""
    one, two = inputs
    terms = [box.magnitude() if box.terms is None else box.terms for box in inputs]
    scale = 2 * (1 + _largest(torch.maximum(*terms)))
    lower, upper = one.lower + two.lower, one.upper + two.upper
    return rounding.widen(lower, upper, terms[0] + terms[1], one.count + two.count, _like(scale, lower))


RULES: dict[type[Op], Rule] = {
    Add: _add,
    Affine: _scale_and_shift,
    AvgPool: _avg_pool,
    Conv: _convolve,
    Flatten: _flatten,
    GlobalAvgPool: _global_avg_pool,
    Linear: _multiply,
    MaxPool: _max_pool,
    Relu: _clip,
}


def _float64(values: FloatArray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


def _center(x: Box) -> tuple[Tensor, Tensor]:
    """Return middle and radius of a box."""
    return (x.upper + x.lower) / 2, (x.upper - x.lower) / 2


def _largest(magnitude: Tensor) -> Tensor:
    """Return (n,) the largest entry of each image."""
    return magnitude.flatten(1).amax(1)


def _scale(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return (n, 1) the argument `scale` of `Rounding.margin`."""
    largest_weight = float(weight.abs().max()) if weight.numel() else 0.0
    return ((1 + largest_weight) * (1 + _largest(magnitude)))[:, None]


def _like(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one number per image so that it broadcasts against like."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one number per channel so that it broadcasts against like (n, c, ...)."""
    return values.reshape(1, -1, *[1] * (like.dim() - 2))
