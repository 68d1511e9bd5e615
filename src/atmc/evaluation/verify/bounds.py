"""Sound bounds of a network's logits over a box of images, by interval arithmetic in float64.

The bounds hold for what runs in float32: every operation's bounds are widened outward by a margin that covers the
rounding of its execution, in whatever order it takes its sums, and the rounding of the calculation here.
docs/verification.md derives the margins.

Legend: u = 2^-24, the unit roundoff of float32; gamma(k) = k u / (1 - k u), which bounds the relative error of k
roundings (Higham 2002, lemma 3.1); n images; z_j the logit of class j, y the label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    Pair,
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
POINTWISE = (1, 1), (0, 0), (1, 1), 1  # geometry: stride, padding, dilation, groups
LARGEST = 2.0**127  # a sum of absolute values from which on float32 may overflow


@dataclass(frozen=True, eq=False)
class Box:
    """Bounds of one value of a network, elementwise, for each of n images.

    Args:
        lower, upper: (n, ...) float64; NaN if nothing is known.
        terms: (n, ...) upper bounds of the sum of the absolute values of the terms that are added up to the value; None
            for the value itself, a single term.
        count: number of these terms, per channel or for all.
        form: the value as an affine map of an earlier value, if it is one.
        margin: what float32 computes for the value differs by at most this from the exact result of its operation on
            what float32 computes for the operation's inputs.
    """

    lower: Tensor
    upper: Tensor
    terms: Tensor | None = None
    count: Tensor | int = 1
    form: AffineForm | None = None
    margin: Tensor | float = 0.0

    def magnitude(self) -> Tensor:
        """Return the largest absolute value of each entry."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def map(self, function: Callable[[Tensor], Tensor]) -> Box:
        """Return the box through a function that never decreases, does not round, or only rearranges entries."""
        return Box(function(self.lower), function(self.upper))


@dataclass(frozen=True, eq=False)
class AffineForm:
    """A value y as an affine map of an earlier one, x: float32 computes y with |y - (W x + b)| <= margin.

    Two layers without an activation between them, such as the factors of W = U V + C, are one affine map. Bounds that
    go through it once are tighter than those that go through one layer after the other.

    Args:
        source: the box of x.
        weight, bias: W and b, float64.
        geometry: stride, padding, dilation and groups of a convolution; None for a linear layer.
        margin: (n, ...) like y.
    """

    source: Box
    weight: Tensor
    bias: Tensor
    geometry: tuple[Pair, Pair, Pair, int] | None
    margin: Tensor

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply a weight of this geometry."""
        return F.linear(x, weight, bias) if self.geometry is None else F.conv2d(x, weight, bias, *self.geometry)

    def is_pointwise(self) -> bool:
        """Return whether it is a convolution of 1 x 1 pixels and one group."""
        return self.geometry == POINTWISE and self.weight.shape[2:] == (1, 1)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return lower and upper bounds of y by W m + b -+ (|W| r + margin) for center m and radius r of x."""
        middle, radius = _center(self.source)
        center, reach = self.apply(middle, self.weight, self.bias), self.apply(radius, self.weight.abs())
        return center - reach - self.margin, center + reach + self.margin


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

        The margin is 0 if there is to be none.

        Args:
            terms, count: as in `Box`; the count per channel has a shape that broadcasts.
            scale: (1 + largest absolute weight) * (1 + largest absolute input), for underflow.
        """
        if not self.outward:
            return torch.zeros_like(terms)
        roundings = torch.as_tensor(count, dtype=torch.float64) + SPARE
        gamma = torch.where(roundings < MOST, roundings * UNIT / (1 - roundings * UNIT), torch.nan)
        margin = (gamma * terms + TINY * roundings * scale) * FLOAT64
        return torch.where(terms < LARGEST, margin, torch.nan)

    def widen(self, lower: Tensor, upper: Tensor, terms: Tensor, count: Tensor | int, scale: Tensor | float) -> Box:
        """Return the box of a sum that is computed in float32, from bounds of the exact sum; arguments as `margin`."""
        margin = self.margin(terms, count, scale)
        return Box(lower - margin, upper + margin, terms, count, margin=margin)


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
    last_reader = {value: index for index, node in enumerate(graph.nodes) for value in node.inputs}
    boxes: dict[int, Box] = {0: images}
    for index, node in enumerate(graph.nodes):
        boxes[index + 1] = _bound_node(node, boxes, rounding or Rounding())
        for value in set(node.inputs):
            if last_reader[value] == index:
                del boxes[value]  # to save memory
    return boxes[len(graph.nodes)]


def bound_values(graph: Graph, images: Box, rounding: Rounding | None = None) -> list[Box]:
    """Return the box of every value that the graph computes, in float32, for all images of a box.

    Raises:
        ValueError: the graph has an operation without a rule.
    """
    boxes = {0: images}
    for index, node in enumerate(graph.nodes):
        boxes[index + 1] = _bound_node(node, boxes, rounding or Rounding())
    return list(boxes.values())


def bound_margins(graph: Graph, images: Box, labels: Tensor, rounding: Rounding | None = None) -> Tensor:
    """Return upper bounds (n, classes) of z_j - z_y for labels y (n,), -infinity for the label's own column.

    If the logits are an affine map of features, the differences of its rows are bounded (Gowal et al. 2018, section 3),
    and the rounding of both logits is added. NaN means that nothing is known.

    Raises:
        ValueError: the graph has an operation without a rule.
    """
    label = labels.cpu()[:, None]
    logits = bound_logits(graph, images, rounding)
    if logits.form is not None and logits.form.geometry is None:
        bounds = _bound_differences(logits.form, label)
    else:
        bounds = logits.upper - logits.lower.gather(1, label)
    return bounds.scatter(1, label, -torch.inf)


def prove(graph: Graph, images: Box, labels: Tensor, rounding: Rounding | None = None) -> Tensor:
    """Return (n,) bool: whether, for every image of the box, the label's logit is the only largest one."""
    return (bound_margins(graph, images, labels, rounding) < 0).all(1)  # false for NaN


def _bound_node(node: Node, boxes: Mapping[int, Box], rounding: Rounding) -> Box:
    rule = RULES.get(type(node.op))
    if rule is None:
        raise ValueError(f"there is no rule for the bounds of {_describe(node)}")
    return rule(node.op, [boxes[value] for value in node.inputs], rounding)


def _describe(node: Node) -> str:
    return f"{type(node.op).__name__} {node.name}".strip()


def _bound_differences(form: AffineForm, label: Tensor) -> Tensor:
    """Return upper bounds (n, classes) of z_j - z_y; label: (n, 1)."""
    middle, radius = _center(form.source)
    logits = F.linear(middle, form.weight, form.bias)
    bounds = logits - logits.gather(1, label)
    for y in sorted(set(label[:, 0].tolist())):
        rows = label[:, 0] == y
        bounds[rows] += F.linear(radius[rows], (form.weight - form.weight[y]).abs())
    return bounds + form.margin + form.margin.gather(1, label)


# Rules. Each takes an operation, the boxes of its inputs and the rounding, and returns the box of its output.

Rule = Callable[[Any, Sequence[Box], Rounding], Box]


def _bound_layer(op: Conv | Linear, inputs: Sequence[Box], rounding: Rounding) -> Box:
    x, geometry = inputs[0], (op.stride, op.padding, op.dilation, op.groups) if isinstance(op, Conv) else None
    weight, bias = _float64(op.weight), _float64(op.bias)
    form = AffineForm(x, weight, bias, geometry, torch.zeros(()))
    magnitude = x.magnitude()
    terms = form.apply(magnitude, weight.abs(), bias.abs())
    count = _per_channel(weight.flatten(1).count_nonzero(1) + 1, terms)  # a term of a zero weight is exactly zero
    margin = rounding.margin(terms, count, _like(_scale(weight, magnitude), terms))
    form = replace(form, margin=margin)
    composed = _compose(x.form, form) if x.form is not None else None
    return _intersect(Box(*form.bounds(), terms, count, form, margin), composed)


def _compose(first: AffineForm, second: AffineForm) -> AffineForm | None:
    """Return second(first(x)) as one form if the second is pointwise: a linear layer, or a convolution of 1 x 1."""
    if second.geometry is None:
        weight = second.weight @ first.weight
    elif second.is_pointwise() and first.geometry is not None and first.geometry[3] == 1:
        weight = torch.einsum("or,rihw->oihw", second.weight[:, :, 0, 0], first.weight)
    else:
        return None
    if weight[0].numel() >= MOST:
        return None
    bias = second.bias + second.weight.flatten(1) @ first.bias
    margin = second.margin + second.apply(first.margin, second.weight.abs())
    return AffineForm(first.source, weight, bias, first.geometry, margin)


def _intersect(box: Box, form: AffineForm | None) -> Box:
    """Return the box of a value that has this form as well."""
    if form is None:
        return box
    lower, upper = form.bounds()
    return replace(box, lower=torch.maximum(box.lower, lower), upper=torch.minimum(box.upper, upper), form=form)


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
    slack = float(op.ceiling) * UNIT if rounding.outward else 0.0  # the ceiling is rounded to float32
    lower, upper = x.lower.clamp(max=op.ceiling - slack), x.upper.clamp(max=op.ceiling + slack)
    return Box(lower, upper, margin=slack)


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
    """Bound a sum that may be computed term by term together with the layers whose outputs it adds.

    Outputs that are read elsewhere too are computed apart from the sum. So the margin of the box, which is about the
    sum of what is computed for them, is larger by their own margins.
    """
    one, two = inputs
    terms = [box.magnitude() if box.terms is None else box.terms for box in inputs]
    scale = 2 * (1 + _largest(torch.maximum(*terms)))
    margin = rounding.margin(terms[0] + terms[1], one.count + two.count, _like(scale, terms[0]))
    lower, upper = one.lower + two.lower - margin, one.upper + two.upper + margin
    apart = margin + sum(box.margin for box in inputs if box.terms is not None)
    box = Box(lower, upper, terms[0] + terms[1], one.count + two.count, margin=apart)
    if one.form is None or two.form is None or not _is_alike(one.form, two.form):
        return box
    weight, bias = one.form.weight + two.form.weight, one.form.bias + two.form.bias
    total = replace(one.form, weight=weight, bias=bias, margin=one.form.margin + two.form.margin + margin)
    return _intersect(box, total)


def _is_alike(one: AffineForm, two: AffineForm) -> bool:
    """Return whether two forms read the same value in the same geometry."""
    return one.source is two.source and one.geometry == two.geometry and one.weight.shape == two.weight.shape


RULES: dict[type[Op], Rule] = {
    Add: _add,
    Affine: _scale_and_shift,
    AvgPool: _avg_pool,
    Conv: _bound_layer,
    Flatten: _flatten,
    GlobalAvgPool: _global_avg_pool,
    Linear: _bound_layer,
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
